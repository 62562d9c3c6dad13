"""Dicts of per-class options: iterate over their tensors, replace, move, convert and compare them.

Each value is a (C,) tensor, or (G, C) by group, a `PairwiseMargin`, whose tensors are its vectors, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_la._call import checks
from fused_la._call.pairwise_margin import PairwiseMargin
from fused_la._call.values import is_fake, is_traced


def named_tensors(per_class: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """All tensors with their names; a vector of a margin is called "<option>.<field>"."""
    for name, value in per_class.items():
        if isinstance(value, PairwiseMargin):
            for field, vector in value.named_vectors():
                yield f"{name}.{field}", vector
        elif value is not None:
            yield name, value


def map_tensors(per_class: dict[str, Any], fn: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """The options with each tensor replaced by `fn(name, tensor)`."""
    result = {}
    for name, value in per_class.items():
        if isinstance(value, PairwiseMargin):
            result[name] = value.mapped(lambda field, vector, name=name: fn(f"{name}.{field}", vector))
        else:
            result[name] = None if value is None else fn(name, value)
    return result


def move_tensor(name: str, tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. One that requires a gradient stays where it is: it is the caller's."""
    if tensor.is_meta and device.type != "meta":
        raise ValueError(
            f"{name} must have values, got a tensor on the meta device; a list or an array has them everywhere"
        )
    return tensor if tensor.requires_grad else tensor.to(device)


def is_on_device(value: Any, device: torch.device) -> bool:
    """Whether all tensors of an option are on a device."""
    if isinstance(value, Tensor):
        return value.device == device
    if value is None:
        return True
    return all(vector.device == device for _, vector in value.named_vectors())


def to_fake_or_constant(tensor: Tensor, fake_input: Any) -> Tensor:
    """A tensor that can be combined with a fake input: fake, or a constant of the graph that is being recorded."""
    if not hasattr(tensor, "fake_mode"):
        if is_fake(fake_input):
            tensor = fake_input.fake_mode.from_tensor(tensor)
        else:
            with torch._C._DisableTorchDispatch():
                values = tensor.detach().cpu().numpy()
            tensor = torch.tensor(values)
    return tensor.to(fake_input.device)


def to_class_vector(name: str, value: Any, n_classes: int | None, n_groups: int | None = None) -> Tensor:
    """A checked (C,) tensor: a given tensor unchanged, or float32 from a list or an array. With `n_groups` a
    smoothing_distribution may be (G, C)."""
    if not isinstance(value, Tensor):
        try:
            value = torch.from_numpy(np.array(value, dtype=np.float32))
        except (TypeError, ValueError):
            got = type(value).__name__
            raise TypeError(f"{name} must be a tensor, an array or a list of numbers, got {got}") from None
    if n_classes is None and value.dim() != 1:
        raise ValueError(f"{name} must have shape (C,), got {tuple(value.shape)}")
    by_group = name == "smoothing_distribution" and n_groups is not None and value.dim() == 2
    checks.check_class_vector(name, value, n_classes or len(value), by_group=by_group or None)
    if by_group and len(value) != n_groups:
        raise ValueError(f"{name} must have shape ({n_groups}, {n_classes}) or (C,), got {tuple(value.shape)}")
    if name == "smoothing_distribution":
        checks.check_smoothing_distribution(value, value.shape[-1], by_group)
    return value


def same_values(saved: Tensor, current: Tensor | None) -> bool:
    """Whether a saved tensor agrees with the current one, as far as their values can be read."""
    if current is None or saved.shape != current.shape:
        return False
    if saved.is_meta or current.is_meta or is_traced(saved) or is_traced(current):
        return True
    return torch.allclose(saved.to(current), current, rtol=1e-5, atol=1e-6)
