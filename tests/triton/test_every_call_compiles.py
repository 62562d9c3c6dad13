"""Every public call that reaches a kernel compiles as Triton specialises it, and calls share compiled kernels.

The other tests run kernels in the interpreter, which specialises nothing. It cannot show that a size of 1 is a
constant without methods, or that another number of rows compiles a kernel again. Here `every_call.py` makes the calls
under `benchmarks.static.compile_only`, which is Triton with a driver that launches nothing, in processes without
TRITON_INTERPRET.

The calls combine values of every entry point's axes: rows, classes, labels and features from 1 on, multiples of 16 and
others; dtypes; layouts; reductions; options; with and without gradient. Each value occurs in some call, and in the slow
tests each pair of values does. These calls go through Triton's front end for sm_90. The slow tests also send calls in
which each value occurs through the whole compiler.

Left out: triples of values, and the whole compiler for sm_80 and sm_100 (`-m large` has them); AMD GPUs, for which this
driver has no target (`python -m benchmarks.disassemble --all` compiles every variant for one); graphs of torch.compile,
which launch the same kernels; more than one rank; and strides beyond 2**31, which are 64-bit arguments.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import large, slow

pytest.importorskip("triton")
import every_call

ROOT = Path(__file__).parents[2]
OTHERS = tuple(name for name in every_call.ENTRY_POINTS if name not in ("losses", "heads"))
N_PARTS = 2  # processes that share the calls of a test


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Environment of a process that does not interpret kernels and has a separate Triton cache."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    cache = str(tmp_path_factory.mktemp("triton"))
    return env | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}


def run_parts(environment: dict[str, str], *arguments: str) -> tuple[list[dict], list[dict]]:
    """(lines that `every_call.py` reports, the summary of each of its processes)."""

    def part(i: int) -> list[dict]:
        command = [sys.executable, str(ROOT / "tests" / "every_call.py"), *arguments, "--part", str(i), str(N_PARTS)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    with concurrent.futures.ThreadPoolExecutor(N_PARTS) as pool:
        parts = list(pool.map(part, range(N_PARTS)))
    return [line for lines in parts for line in lines[:-1]], [lines[-1] for lines in parts]


def assert_compiles(environment: dict[str, str], *names: str, strength: int, options: tuple[str, ...] = ()) -> None:
    arguments = ("compile", "--strength", str(strength), *options, "--only", *names)
    failed, summaries = run_parts(environment, *arguments)
    shown = "\n".join(f"{line['call']}\n    {line['cause']}" for line in failed[:10])
    n_calls = sum(summary["calls"] for summary in summaries)
    assert not failed, f"{len(failed)} of {n_calls} calls do not compile:\n{shown}"
    assert all(summary["compiled"] > 0 for summary in summaries)


# Every call -----------------------------------------------------------------------------------------------------------


def test_every_argument_compiles(environment):
    assert_compiles(environment, *every_call.ENTRY_POINTS, strength=1)


@pytest.mark.parametrize("target", [large("sm_80"), slow("sm_90"), large("sm_100")])
def test_every_argument_passes_the_whole_compiler(environment, target):
    options = ("--whole-compiler", "--target", target)
    assert_compiles(environment, *every_call.ENTRY_POINTS, strength=1, options=options)


@pytest.mark.slow
@pytest.mark.parametrize("names", [("losses",), ("heads",), OTHERS], ids=" ".join)
def test_any_two_arguments_compile_together(environment, names):
    assert_compiles(environment, *names, strength=2)


@pytest.mark.large
@pytest.mark.parametrize("name", list(every_call.ENTRY_POINTS))
def test_any_three_arguments_compile_together(environment, name):
    assert_compiles(environment, name, strength=3)


def test_any_two_values_of_any_two_axes_meet_in_some_call():
    axes = every_call.Axes(
        {"a": (0, 1, 2), "b": "xyz", "c": (True, False)},
        run=lambda choice: None,
        allowed=lambda choice: not (choice.get("a") == 2 and choice.get("b") == "z"),
    )
    choices = every_call.combinations(axes, 2)
    assert {(choice["a"], choice["b"]) for choice in choices} == {
        (a, b) for a in (0, 1, 2) for b in "xyz" if (a, b) != (2, "z")
    }
    assert {(choice["b"], choice["c"]) for choice in choices} == {(b, c) for b in "xyz" for c in (True, False)}
    assert len(choices) < 3 * 3 * 2
    for name in ("rows", "classes", "dtype", "layout", "loss", "target", "option", "reduction", "mode"):
        loss_choices = every_call.combinations(every_call.ENTRY_POINTS["losses"], 1)
        assert {choice[name] for choice in loss_choices} == set(every_call.LOSS[name])


# Calls that share compiled kernels ------------------------------------------------------------------------------------


SHARED = tuple(every_call.shared_calls())
QUICK = (
    "rows of 8142 classes in bfloat16, step",
    "rows of 50257 classes in bfloat16, step",
    "images",
    "rows of a head, step",
    "rows of a tau sweep",
    "tau",
    "upstream gradient of rows",
    "base pointers on 16 bytes",
)


@pytest.fixture(scope="module")
def counted(environment):
    """Counts the variants of each kernel that a group of calls launches; quick and slow groups run separately."""

    @functools.cache
    def count(quick: bool) -> dict[str, dict]:
        counts, _ = run_parts(environment, "count", "--only", *(name for name in SHARED if (name in QUICK) == quick))
        return {line["calls of"]: line for line in counts}

    return lambda name: count(name in QUICK)[name]


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in SHARED])
def test_few_variants_of_a_kernel_serve_all_calls(counted, name):
    """Two variants for all numbers of rows; one for all values of anything else that changes between batches."""
    found = counted(name)
    most, variants = found["most"], found["variants"]
    assert variants, f"calls over {name} launched nothing: {'; '.join(found['causes'])}"
    too_many = {kernel: n for kernel, n in variants.items() if n > most}
    wrong = [f"launch more than {most} variants of a kernel, {too_many}"] * bool(too_many)
    wrong += [f"do not all compile: {cause}" for cause in found["causes"]]
    assert not wrong, f"calls over {name} {', and '.join(wrong)}"


HOOKS_SCRIPT = """
import torch
from triton import knobs

from benchmarks.static.compile_only import CompileOnlyDriver, compile_only
from fused_la import logit_adjusted_cross_entropy

launches = []
CompileOnlyDriver.launcher_cls = lambda self, source, metadata: lambda *arguments: launches.append(arguments)
logits, target, log_prior = torch.randn(3, 8), torch.tensor([0, 1, 2]), torch.zeros(8)

def hooks_of_a_launch():
    launches.clear()
    logit_adjusted_cross_entropy(logits, target, log_prior, reduction="none", impl="triton")
    (arguments,) = launches  # grid (3), stream, function, metadata, launch metadata, hooks (2), arguments
    return arguments[7:9]

def listen(metadata):
    pass

with compile_only("sm_90"):
    hooks_of_a_launch()  # compiles
    assert hooks_of_a_launch() == (None, None)
    for i, place in enumerate(("launch_enter_hook", "launch_exit_hook")):
        chain = getattr(knobs.runtime, place)
        chain.add(listen)
        assert hooks_of_a_launch()[i] is chain
        chain.remove(listen)
        assert hooks_of_a_launch() == (None, None)
        setattr(knobs.runtime, place, listen)
        assert hooks_of_a_launch()[i] is listen
        setattr(knobs.runtime, place, None)
        assert hooks_of_a_launch() == (None, None)
        setattr(knobs.runtime, place, chain)
"""


def test_launch_hooks_of_a_profiler_reach_the_driver(environment):
    """The driver here gets the hooks, as a GPU's driver does, and calls none."""
    done = subprocess.run(
        [sys.executable, "-c", HOOKS_SCRIPT],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
