"""Every kernel compiles for GPUs that this machine does not have, and reads and writes 16 bytes a thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """What `compile_kernels.py` prints, from a process whose kernels are not interpreted and with an empty cache."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    script = ROOT / "tests" / "compile_kernels.py"
    run = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_kernel_compiles_for_every_target(compiled):
    assert all(row["binary_bytes"] > 1000 for row in compiled)
    kernels = {"_forward_kernel", "_reduce_kernel", "_grad_logits_kernel", "_grad_log_prior_kernel"}
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert {row["kernel"] for row in compiled if row["target"] == target} == kernels
    on_hopper = Counter(
        row["dtype"] for row in compiled if row["target"] == "sm_90" and row["kernel"] == "_forward_kernel"
    )
    assert set(on_hopper) == {"torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"}
    assert set(on_hopper.values()) == {5}


def test_aligned_rows_are_read_and_written_16_bytes_a_thread(compiled):
    rows = [row for row in compiled if "wide_loads" in row and row["variant"] not in ("images",)]
    forward = [row for row in rows if row["kernel"] == "_forward_kernel"]
    backward = [row for row in rows if row["kernel"] == "_grad_logits_kernel"]
    assert len(forward) >= 20
    assert all(row["wide_loads"] > 0 for row in forward + backward)
    assert all(row["wide_stores"] > 0 for row in backward)
