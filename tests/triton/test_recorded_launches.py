"""Recording of launches in the interpreter, and the command that compiles the recorded launches."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import recorded_launches
import torch
from conftest import DEVICE

from fused_la import logit_adjusted_cross_entropy

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
KERNEL = """
import triton
import triton.language as tl

@triton.jit
def kernel(out, n):
    tl.store(out, n.to(tl.int64))  # a size of 1 is a constant, which has no methods
"""


def write(folder, *launches):
    with (folder / "1.launches").open("wb") as file:
        for launch in launches:
            pickle.dump((launch, "test_of_a_kernel"), file)


def launch_of(n):
    arguments = (("out", recorded_launches.Pointer(torch.int64, True)), ("n", n))
    return recorded_launches.Launch("kernels_of_a_test", "kernel", arguments, (("num_warps", 4),))


def command(folder, *options):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))), "TRITON_CACHE_DIR": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / "recorded_launches.py"), str(folder), *options],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_recorded_launches_that_compile_end_the_command_with_0(tmp_path):
    (tmp_path / "kernels_of_a_test.py").write_text(KERNEL)
    write(tmp_path, launch_of(16), launch_of(17))
    done = command(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 launches recorded, 2 variants of kernels" in done.stdout


@pytest.mark.slow
def test_a_recorded_launch_that_does_not_compile_ends_the_command_with_1(tmp_path):
    (tmp_path / "kernels_of_a_test.py").write_text(KERNEL)
    write(tmp_path, launch_of(16), launch_of(1), launch_of(17))
    done = command(tmp_path)
    assert done.returncode == 1, done.stderr
    assert "kernel does not compile" in done.stdout
    assert "'int' object has no attribute 'to'" in done.stdout
    assert "of test_of_a_kernel" in done.stdout
    assert "1 refused" in done.stdout


def test_a_folder_without_launches_is_an_error(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 1
    assert "holds no launches" in done.stderr


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels are interpreted on a CPU")
def test_what_is_specialised_alike_is_recorded_once(tmp_path, monkeypatch):
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", interpreter.InterpretedFunction.run)
    recorded_launches.record(tmp_path)

    def call(n_rows, dtype=torch.float32):
        target = torch.zeros(n_rows, dtype=torch.int64)
        logit_adjusted_cross_entropy(torch.zeros(n_rows, 5, dtype=dtype), target, torch.zeros(5), impl="triton")
        return set(recorded_launches.recorded_in(tmp_path))

    first = call(17)
    assert len(first) == 2, "the preparation kernel and the forward pass"
    assert call(18) == first  # the workspace's offsets are no multiples of 16 either
    assert len(call(17, torch.bfloat16) - first) >= 1
    tests = set(recorded_launches.recorded_in(tmp_path).values())
    assert all("test_what_is_specialised_alike_is_recorded_once" in test for test in tests)


@pytest.mark.parametrize(
    ("value", "alike", "other"),
    [
        (17, 19, 16),
        (32, 16, 1),
        (1, 1, 2),
        (-100, 18, 2**40 + 1),
        (2**40 + 1, 2**33 + 2, 2**40),
        (torch.zeros(4), torch.zeros(8), torch.zeros(4)[1:]),
        ((1, torch.zeros(4)), (1, torch.zeros(9)), (1, torch.zeros(4, dtype=torch.float64))),
        (0.5, 0.25, None),
    ],
)
def test_only_values_that_the_compiler_tells_apart_are_told_apart(value, alike, other):
    reduced = recorded_launches.reduced
    assert reduced(value) == reduced(alike) != reduced(other)


def test_the_first_variants_of_the_order_cover_every_pair_of_arguments():
    variants = [
        tuple((f"argument {i}", value) for i, value in enumerate(values))
        for values in itertools.product("ab", "cde", "fg", "h")
    ]
    order, n_needed = recorded_launches.covering_order(variants)
    assert sorted(order) == list(range(len(variants)))
    assert 6 <= n_needed < len(variants)

    def pairs(some):
        return {pair for i in some for pair in itertools.combinations(variants[i], 2)}

    assert pairs(order[:n_needed]) == pairs(order)
    assert pairs(order[: n_needed - 1]) != pairs(order)
