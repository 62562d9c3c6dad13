"""Shared by all tests: where kernels run, and the three implementations."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined

import pytest  # noqa: E402


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
