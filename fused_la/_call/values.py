"""Reading values from tensors if that needs no synchronisation, and whether a tensor has values at all."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Up to this many numbers are read one by one. Alone, 4 labels take 0.7 us that way and 2.0 us by `aminmax`, 64 take 2.4
# and 2.1 us. But an operator also slows what runs after it: with a prior of 64 classes a step took 70 us that way and
# 79 us by `amax` (two cores of an AMD EPYC, torch 2.14.1, kernels compiled and not launched).
FEW_VALUES = 64

# Modes in which an operation computes only a shape, or also records a graph node.
_TRACING_MODES = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))

_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def is_traced(tensor: Tensor) -> bool:
    """Whether a tensor is traced, by `make_fx` or similar, or is fake: it has a shape but no values."""
    if torch._C._len_torch_dispatch_stack() > 0 and any(map(torch._C._get_dispatch_mode, _TRACING_MODES)):
        return True
    if torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH):  # make_fx(pre_dispatch=True)
        return True
    return type(tensor) is not Tensor and hasattr(tensor, "fake_mode")


def is_fake(tensor: Tensor) -> bool:
    """Whether the tensor is fake, and no graph is being recorded in which it could be a node."""
    if torch.compiler.is_compiling() or not hasattr(tensor, "fake_mode"):
        return False
    recording = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    return not recording and not torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)


def is_compiled_or_traced(tensor: Tensor) -> bool:
    """`is_traced`, or under `torch.compile`: values cannot be read, and the passes run as operators."""
    return torch.compiler.is_compiling() or is_traced(tensor)


def holds_or_unknown(condition: Tensor) -> bool:
    """Whether a condition holds; True if its value cannot be read. On a GPU this synchronises."""
    return is_compiled_or_traced(condition) or bool(condition)


def check_has_values(name: str, tensor: Tensor, caller: str) -> None:
    """Raise if a tensor has no values, for callers that cannot work without them."""
    if is_compiled_or_traced(tensor):
        raise ValueError(f"{name} must have values that {caller} can look at, got a tensor that is fake or is traced")


def read_value(value: Tensor) -> Any:
    """The number or list of numbers in a tensor; None if reading would synchronise, or a transform or tracing hides the
    values."""
    if not value.is_cpu or is_compiled_or_traced(value):
        return None
    try:
        return value.tolist()
    except RuntimeError:  # under vmap
        return None


def label_range(labels: Tensor) -> tuple[Any, Any]:
    """The smallest and largest label, (None, None) if there are none or `read_value` would return None."""
    if not labels.is_cpu or is_compiled_or_traced(labels):
        return None, None
    try:
        if labels.numel() > FEW_VALUES:
            lowest, highest = labels.aminmax()
            return lowest.item(), highest.item()
        values = labels.tolist() if labels.dim() == 1 else labels.flatten().tolist()
    except RuntimeError:  # as in read_value
        return None, None
    return (min(values), max(values)) if values else (None, None)


def largest(values: Tensor) -> float | None:
    """The largest number of a vector, or NaN if it has one; None if `read_value` returns None."""
    if values.numel() <= FEW_VALUES:
        numbers = read_value(values)
        if numbers is None:
            return None
        if not math.isnan(sum(numbers)):  # max would skip a NaN
            return max(numbers)
    return read_value(values.detach().amax())


def smallest(values: Tensor) -> float:
    """The smallest number of a CPU tensor whose values can be read."""
    if values.numel() > FEW_VALUES:
        return values.amin().item()
    return min(values.tolist() if values.dim() == 1 else values.flatten().tolist())
