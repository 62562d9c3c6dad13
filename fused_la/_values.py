"""Numbers that are read from tensors on a CPU, where that synchronises with nothing."""

from __future__ import annotations

import math
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


def largest(values: Tensor) -> float | None:
    """The largest number of a vector, NaN if there is one; None where `read_value` is None."""
    if values.numel() <= FEW:
        numbers = read_value(values)
        if numbers is None or not math.isnan(sum(numbers)):  # max passes over a NaN
            return None if numbers is None else max(numbers)
    return read_value(values.detach().amax())


def smallest(values: Tensor) -> float:
    """The smallest number of a tensor on a CPU that may be read."""
    return min(values.tolist()) if values.numel() <= FEW else values.amin().item()
