"""Pytest configuration: the device, a fixture of the three implementations, helpers for slow cases and two ranks."""

import contextlib
import gc
import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a spinning thread would take the core of another test process

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined

import pytest  # noqa: E402
import recorded_launches  # noqa: E402


def _patch_once_per_launch() -> None:
    """Halve the interpreter's time: it patches triton.language anew, needlessly, at each call of a device function."""
    from triton.runtime import interpreter

    patch, call, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(fn):
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            return patch(fn)

    def launch(self, *args, **kwargs):
        patched.clear()
        return call(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch


def _ignore_nan_in_min_and_max() -> None:
    """Make tl.minimum and tl.maximum ignore a NaN, as on a GPU; Triton 3.6's interpreter returns the NaN."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    InterpreterBuilder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)


if DEVICE == "cpu":
    with contextlib.suppress(ImportError, AttributeError):  # no Triton, or a version with other names
        _patch_once_per_launch()
        _ignore_nan_in_min_and_max()
    if folder := os.environ.get(recorded_launches.FOLDER):
        recorded_launches.record(pathlib.Path(folder))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """On a CPU, run the whole suite in one process per core, each test file in one process; on a GPU, in one process.

    The kernels' interpreter keeps a core busy. Without pytest-xdist nothing reads these options.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    if DEVICE == "cpu" and whole and config.getoption("numprocesses", None) is None and not config.option.usepdb:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        config.option.numprocesses = min(cores or 1, 8)  # each takes about a gigabyte
        config.option.dist = "loadfile"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process takes all files of tests/class_parallel, which share pools of worker processes."""
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return file.rpartition("/")[0] if "/class_parallel/" in file else file

    return Scheduling(config, log)


def run_on_two_ranks(program: str, folder: pathlib.Path) -> list[Any]:
    """The JSON that a program prints as rank 0 and as rank 1; its arguments are the rank and the path of a store."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(folder / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    return [json.loads(stdout) for stdout, _ in outputs]


def slow(*values: Any) -> Any:
    """One parameter set of a test, with the marker slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def large(*values: Any) -> Any:
    """Parameters of a test with the marker large."""
    return pytest.param(*values, marks=pytest.mark.large)


def one_in(n: int, *axes: Sequence[Any]) -> list[Any]:
    """Every combination of the axes' values: one in `n` is quick, the others have the marker slow.

    Each value of each axis is in some quick combination.
    """
    cases, missing = [], {(axis, index) for axis, values in enumerate(axes) for index in range(len(values))}
    for indices in itertools.product(*(range(len(values)) for values in axes)):
        values = [axis[index] for axis, index in zip(axes, indices, strict=True)]
        if sum(indices) % n:
            cases.append(slow(*values))
        else:
            cases.append(pytest.param(*values))
            missing -= set(enumerate(indices))
    assert not missing, f"{n} is too many: no quick combination has some of the values"
    return cases


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=["reference", "blocked", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    """Each implementation that runs on this machine's device; "blocked" runs on a CPU only."""
    if request.param == "blocked" and DEVICE != "cpu":
        pytest.skip("impl='blocked' runs on a CPU")
    return request.param


def pytest_collection_finish() -> None:
    """Let no garbage collection look at what was imported: that takes a fifth of the time of small tests."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE == "cuda":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
