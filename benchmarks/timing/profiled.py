"""Hardware counters of the kernels of one training step, read by Nsight Compute (`ncu`).

    ncu [options of `command`] python3 -m benchmarks.timing.profiled --classes 8142

runs steps of `logit_adjusted_cross_entropy` with bfloat16 logits of 4 times the level-2 cache; only the kernels of the
last step are profiled. `parse` reads the output of `ncu --csv`: a line for each metric of each kernel.

`SAMPLE` is text in that format, to try `parse` without ncu. Its numbers are invented.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing.cases import BIG, Case, make_batch, with_rows
from benchmarks.timing.measure import make_step
from benchmarks.timing.providers import PROVIDERS

Record = dict[str, Any]
CLASSES = (8142, 131072)  # in order of value
WARM_UP_STEPS = 3

STALLS = (
    "long_scoreboard", "wait", "short_scoreboard", "barrier", "math_pipe_throttle", "lg_throttle", "mio_throttle",
    "not_selected", "no_instruction", "dispatch_stall", "branch_resolve", "membar", "drain", "sleeping",
)  # fmt: skip
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
# {ncu's name: ours}. Bytes are of device memory. A stall is the number of warps waiting for that reason for each
# instruction issued.
BASIC_METRICS = {
    "gpu__time_duration.sum": "time_ns",
    "dram__bytes_read.sum": "dram_read_bytes",
    "dram__bytes_write.sum": "dram_written_bytes",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_slots_percent",
    "launch__registers_per_thread": "registers",
}
METRICS = {
    **BASIC_METRICS,
    "lts__t_bytes.sum": "l2_bytes",
    "smsp__inst_executed.sum": "instructions",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    **{STALL.format(name): f"stall_{name}" for name in STALLS},
}

SAMPLE = """\
==PROF== Connected to process 4242 (/usr/bin/python3.12)
==PROF== Profiling "_resident_kernel": 0%....50%....100% - 8 passes
==PROF== Disconnected from process 4242
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
"0","4242","python3.12","127.0.0.1","_resident_kernel","1","7","(128, 1, 1)","(12879, 1, 1)","0","9.0",\
"Command line profiler metrics","dram__bytes_read.sum","byte","200,000,000"
"0","4242","python3.12","127.0.0.1","_resident_kernel","1","7","(128, 1, 1)","(12879, 1, 1)","0","9.0",\
"Command line profiler metrics","gpu__time_duration.sum","nsecond","150,000.5"
"0","4242","python3.12","127.0.0.1","_resident_kernel","1","7","(128, 1, 1)","(12879, 1, 1)","0","9.0",\
"Command line profiler metrics","launch__registers_per_thread","register/thread","104"
"0","4242","python3.12","127.0.0.1","_resident_kernel","1","7","(128, 1, 1)","(12879, 1, 1)","0","9.0",\
"Command line profiler metrics","smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio","inst","7.25"
"0","4242","python3.12","127.0.0.1","_resident_kernel","1","7","(128, 1, 1)","(12879, 1, 1)","0","9.0",\
"Command line profiler metrics","smsp__average_warps_issue_stalled_wait_per_issue_active.ratio","inst","n/a"
"1","4242","python3.12","127.0.0.1","_prepare_kernel","1","7","(1024, 1, 1)","(1, 1, 1)","0","9.0",\
"Command line profiler metrics","dram__bytes_read.sum","byte","51,200"
"1","4242","python3.12","127.0.0.1","_prepare_kernel","1","7","(1024, 1, 1)","(1, 1, 1)","0","9.0",\
"Command line profiler metrics","gpu__time_duration.sum","nsecond","4,000"
"""


def find_ncu() -> str | None:
    """The ncu on the path, or else in the folders of its installers; None if there is none."""
    beside_cuda = [Path("/usr/local/cuda/bin/ncu"), *sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))]
    return shutil.which("ncu") or next((str(path) for path in reversed(beside_cuda) if path.is_file()), None)


def command(ncu: str, metrics: Sequence[str], script: Sequence[str]) -> list[str]:
    """The command to profile a script: clocks not locked, caches flushed before each kernel, numbers in base units."""
    return [
        ncu, "--csv", "--clock-control", "none", "--cache-control", "all", "--profile-from-start", "off",
        "--print-units", "base", "--metrics", ",".join(metrics), *script,
    ]  # fmt: skip


def parse(text: str) -> list[Record]:
    """A record for each kernel, in order, with those metrics that have a number; [] if ncu profiled no kernel."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if '"Metric Name"' in line and '"Kernel Name"' in line), None)
    if start is None:
        return []
    kernels: dict[str, Record] = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        kernel = kernels.setdefault(
            row["ID"],
            {"kernel": row["Kernel Name"], "grid": row.get("Grid Size", ""), "block": row.get("Block Size", "")},
        )
        name, value = METRICS.get(row["Metric Name"]), (row["Metric Value"] or "").replace(",", "")
        with contextlib.suppress(ValueError):  # n/a
            if name is not None:
                kernel[name] = float(value)
    return list(kernels.values())


def error_summary(text: str) -> str:
    """The errors that ncu printed, or its last line if it printed none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("==ERROR==")]
    return " ".join(errors[:3]) or (lines[-1] if lines else "it printed nothing")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.timing.profiled", description="A training step for ncu."
    )
    parser.add_argument("--classes", type=int, default=CLASSES[0])
    parser.add_argument("--rows", type=int, default=BIG, help="default: logits of 4 times the level-2 cache")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 2**10
    case = with_rows(Case(options.rows, options.classes, options.dtype), cache_bytes)
    step = make_step(PROVIDERS["fused_la triton"], case, make_batch(case, device), device)
    for _ in range(WARM_UP_STEPS):
        step.reset()
        step.both()
    step.reset()
    with torch.cuda.profiler.profile() if device == "cuda" else contextlib.nullcontext():
        step.both()
        if device == "cuda":
            torch.cuda.synchronize()
    print(f"{case}: {case.logits_bytes} bytes of logits", flush=True)


if __name__ == "__main__":
    main()
