"""Shared by all tests: where kernels run, the three implementations, and which parameters are slow."""

import contextlib
import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin take the core of another test process

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined

import pytest  # noqa: E402
import recorded_launches  # noqa: E402


def _patch_once_a_launch() -> None:
    """Halve the interpreter's time: it patches triton.language at every call of a device function, to no effect."""
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


def _pass_over_nan() -> None:
    """Let tl.minimum and tl.maximum pass over a NaN, as a GPU's do; Triton 3.6's interpreter returns it."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    InterpreterBuilder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)


if DEVICE == "cpu":
    with contextlib.suppress(ImportError, AttributeError):  # no Triton, or one that has other names
        _patch_once_a_launch()
        _pass_over_nan()
    if folder := os.environ.get(recorded_launches.FOLDER):
        recorded_launches.record(pathlib.Path(folder))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in a process a core, a file in one of them; a GPU is one process's.

    The interpreter of kernels keeps a core busy. Without pytest-xdist nothing reads these options.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    if DEVICE == "cpu" and whole and config.getoption("numprocesses", None) is None and not config.option.usepdb:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        config.option.numprocesses = min(cores or 1, 8)  # of about a gigabyte each
        config.option.dist = "loadfile"


def slow(*values: Any) -> Any:
    """Parameters of a test with the marker slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def one_in(n: int, *axes: Sequence[Any]) -> list[Any]:
    """Every combination of the values of some axes: one in `n` is quick, the others are slow.

    Each value of each axis is in a quick one.
    """
    cases, missing = [], {(axis, place) for axis, values in enumerate(axes) for place in range(len(values))}
    for places in itertools.product(*(range(len(values)) for values in axes)):
        values = [axis[place] for axis, place in zip(axes, places, strict=True)]
        if sum(places) % n:
            cases.append(slow(*values))
        else:
            cases.append(pytest.param(*values))
            missing -= set(enumerate(places))
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
    """Each implementation that runs on this machine's device; blocked is a CPU's."""
    if request.param == "blocked" and DEVICE != "cpu":
        pytest.skip("impl='blocked' runs on a CPU")
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE == "cuda":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
