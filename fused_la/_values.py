"""Numbers that are read from tensors on a CPU, where that synchronises with nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def read_value(value: Tensor) -> Any:
    """A number from a CPU, or a list of them; None where reading would synchronise, or a transform or a tracer hides
    them."""
    if torch.compiler.is_compiling() or not value.is_cpu:
        return None
    try:
        return value.tolist()
    except RuntimeError:  # under vmap, or a fake tensor
        return None


class LastEnds:
    """The smallest and largest number of CPU tensors, for checks alone. Of the last one they are not read again until
    PyTorch has changed it in place: a prior serves many calls. What NumPy changes is not seen."""

    def __init__(self) -> None:
        self._last: tuple[Callable[[], Tensor | None], int, tuple[Any, Any]] = (lambda: None), 0, (None, None)

    def ends(self, values: Tensor) -> tuple[Any, Any]:
        """None for both where a transform or a tracer hides them."""
        of_last, version, ends = self._last  # as one tuple, of one tensor in every thread
        if of_last() is values and version == values._version:
            return ends
        lowest, highest = (read_value(end) for end in values.detach().aminmax())
        if lowest is not None and not values.is_inference():
            self._last = weakref.ref(values), values._version, (lowest, highest)
        return lowest, highest


of_priors = LastEnds()
