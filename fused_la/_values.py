"""Numbers that are read from tensors on a CPU, where that synchronises with nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FEW = 64  # numbers that are read sooner one by one than by an operator that finds the ends of many


def read_value(value: Tensor) -> Any:
    """A number from a CPU, or a list of them; None where reading would synchronise, or a transform or a tracer hides
    them."""
    if not value.is_cpu or torch.compiler.is_compiling():
        return None
    try:
        return value.tolist()
    except RuntimeError:  # under vmap, or a fake tensor
        return None


def label_ends(labels: Tensor) -> tuple[Any, Any]:
    """The smallest and largest of labels on a CPU; None for both where there are none, or `read_value` is None."""
    if not labels.is_cpu or torch.compiler.is_compiling():
        return None, None
    try:
        if labels.numel() > FEW:
            lowest, highest = labels.aminmax()
            return lowest.item(), highest.item()
        values = labels.tolist() if labels.dim() == 1 else labels.flatten().tolist()
    except RuntimeError:  # as in read_value
        return None, None
    return (min(values), max(values)) if values else (None, None)


def smallest(values: Tensor) -> float:
    """The smallest number of a tensor on a CPU that may be read."""
    return min(values.tolist()) if values.numel() <= FEW else values.amin().item()


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
