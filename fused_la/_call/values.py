"""Numbers that are read from tensors on a CPU, where that synchronises with nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Numbers that are read one by one. Alone, 4 labels take 0.7 us so and 2.0 us by `aminmax`, 64 take 2.4 and 2.1 us. But
# an operator also slows what runs after it: with a prior of 64 classes a step took 70 us so and 79 us by `amax` (two
# cores of an AMD EPYC, torch 2.14.1, kernels compiled and not launched).
FEW_VALUES = 64

# Modes under which an operation gives a shape alone, or a node of a graph beside its result.
_TRACERS = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))

_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def is_traced(tensor: Tensor) -> bool:
    """Whether a tensor is recorded by `make_fx` or its like, or has a shape alone (fake)."""
    if torch._C._len_torch_dispatch_stack() > 0 and any(map(torch._C._get_dispatch_mode, _TRACERS)):
        return True
    if torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH):  # make_fx(pre_dispatch=True)
        return True
    return type(tensor) is not Tensor and hasattr(tensor, "fake_mode")


def is_fake(tensor: Tensor) -> bool:
    """Whether the tensor is a shape alone, and no graph is recorded that could need it."""
    if torch.compiler.is_compiling() or not hasattr(tensor, "fake_mode"):
        return False
    recording = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    return not recording and not torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)


def is_compiled_or_traced(tensor: Tensor) -> bool:
    """The same, or by `torch.compile`: then nothing can be read, and the passes are operators."""
    return torch.compiler.is_compiling() or is_traced(tensor)


def holds_or_unknown(condition: Tensor) -> bool:
    """Whether a condition holds, True where that cannot be known; on a GPU it waits."""
    return is_compiled_or_traced(condition) or bool(condition)


def check_has_values(name: str, tensor: Tensor, caller: str) -> None:
    """For what looks at values to go on."""
    if is_compiled_or_traced(tensor):
        raise ValueError(f"{name} must have values that {caller} can look at, got a tensor that is fake or is traced")


def read_value(value: Tensor) -> Any:
    """A number from a CPU, or a list of them; None where reading would synchronise, or a transform or a tracer hides
    them."""
    if not value.is_cpu or is_compiled_or_traced(value):
        return None
    try:
        return value.tolist()
    except RuntimeError:  # under vmap
        return None


def label_range(labels: Tensor) -> tuple[Any, Any]:
    """The smallest and largest of labels on a CPU; None for both where there are none, or `read_value` is None."""
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
    """The largest number of a vector, NaN if there is one; None where `read_value` is None."""
    if values.numel() <= FEW_VALUES:
        numbers = read_value(values)
        if numbers is None:
            return None
        if not math.isnan(sum(numbers)):  # max passes over a NaN
            return max(numbers)
    return read_value(values.detach().amax())


def smallest(values: Tensor) -> float:
    """The smallest number of a tensor on a CPU that may be read."""
    return min(values.tolist()) if values.numel() <= FEW_VALUES else values.amin().item()
