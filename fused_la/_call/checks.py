"""Checks of the arguments of public calls; every message reads "<argument> must <expectation>, got <value>".

Shapes, dtypes and devices are always checked. Values of `target`, `log_prior` and `smoothing_distribution` are checked
if that needs no synchronisation, on a CPU and outside of transforms and tracing; elsewhere a bad value makes the loss
and the gradient NaN. Values of weights and class probabilities are not checked, as in `F.cross_entropy`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from fused_la._call.values import is_compiled_or_traced, label_range, largest, read_value

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABEL_DTYPES = (torch.int64, torch.uint8)  # as in `F.cross_entropy`
FLOATING_NAMES = "float16, bfloat16, float32 or float64"
REDUCTIONS = ("none", "mean", "sum")
_SUM_TOLERANCE = 0.01  # rounded half-precision probabilities pass; counts and log probabilities, far from 1, do not
IMPLEMENTATIONS = ("auto", "triton", "blocked", "reference")


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name} must be a dense tensor, got layout {layout}")


def is_dtensor(value: Any) -> TypeGuard[DTensor]:
    """Whether the value is a torch.distributed.tensor.DTensor; tested without importing that module."""
    return type(value) is not Tensor and hasattr(value, "device_mesh") and hasattr(value, "placements")


def check_logits(logits: Any, name: str = "logits") -> None:
    check_tensor(name, logits)
    if logits.dtype not in FLOATING:
        raise TypeError(f"{name} must be {FLOATING_NAMES}, got {logits.dtype}")
    if logits.dim() == 0:
        raise ValueError(f"{name} must have shape (C,), (N, C) or (N, C, d1, ..., dk), got ()")
    if logits.shape[class_dim(logits)] == 0:
        raise ValueError(f"{name} must have at least one class, got shape {tuple(logits.shape)}")


def class_dim(logits: Tensor) -> int:
    return 0 if logits.dim() == 1 else 1


def check_class_vector(
    name: str, value: Any, n_classes: int, logits: Tensor | None = None, by_group: bool | None = None
) -> None:
    """Check a floating vector of shape (C,), or `by_group` (G, C); `logits` only serve a hint in the message.

    by_group is False where the caller might have given a group, and did not.
    """
    check_tensor(name, value)
    if value.dtype not in FLOATING:
        hint = "; log_prior_from_counts makes a log prior from class counts" if name.endswith("log_prior") else ""
        raise TypeError(f"{name} must be {FLOATING_NAMES}, got {value.dtype}{hint}")
    if by_group:
        if value.dim() != 2 or value.shape[1] != n_classes or len(value) == 0:
            raise ValueError(
                f"{name} must have shape (G, {n_classes}) with group, a row for each group, got {tuple(value.shape)}"
            )
        return
    if value.shape != (n_classes,):
        hint = "" if logits is None else _class_dim_hint(logits, len(value) if value.dim() == 1 else None)
        if by_group is False and value.shape[1:] == (n_classes,):
            hint = "; with a row for each group, group must be given"
        raise ValueError(f"{name} must have shape ({n_classes},), got {tuple(value.shape)}{hint}")


def _class_dim_hint(logits: Tensor, vector_length: int | None) -> str:
    """A hint for logits with more than two dimensions: their classes are dimension 1, and callers expect the last."""
    if logits.dim() < 3:
        return ""
    hint = f"; dimension 1 of the logits, {tuple(logits.shape)}, has the classes"
    return hint + (", pass logits.movedim(-1, 1)" if vector_length in (None, logits.shape[-1]) else "")


def check_device(name: str, value: Tensor, logits: Tensor) -> None:
    if value.device != logits.device:
        raise ValueError(
            f"{name} must be on the device of the logits, {logits.device}, got {value.device}; "
            "move it, or the module that holds it, with .to(logits.device)"
        )


def check_log_prior(
    log_prior: Any, logits: Tensor, tau: float, name: str = "log_prior", all_classes: bool = True,
    by_group: bool | None = None,
) -> None:  # fmt: skip
    """Check a log prior; by_group is whether the caller gave a group, and None if it cannot."""
    n_classes = logits.shape[class_dim(logits)]
    check_class_vector(name, log_prior, n_classes, logits, by_group)
    check_device(name, log_prior, logits)
    if all_classes:
        check_prior_values(log_prior, tau, name)


def check_prior_values(log_prior: Tensor, tau: float = 1.0, name: str = "log_prior") -> None:
    """Check the largest value of a log prior, or of each group's, on a CPU, if it can be read."""
    if not log_prior.is_cpu or torch.compiler.is_compiling():
        return
    if log_prior.dim() == 1:
        check_largest_prior(largest(log_prior), tau, name)
        return
    highest = log_prior.detach().amax(1)
    if read_value(highest.isfinite().all()) is False:
        for group, value in enumerate(highest.tolist()):
            check_largest_prior(value, tau, name, f" of group {group}")


def check_largest_prior(largest: float | None, tau: float, name: str, of_group: str = "") -> None:
    if largest is None or math.isfinite(largest) or (largest == -math.inf and tau == 0.0):
        return
    if largest == -math.inf:
        raise ValueError(f"{name} must be finite for some class{of_group}, got -inf for every class")
    raise ValueError(f"{name} must be finite or -inf, got {largest} for some class{of_group}")


def check_smoothing_distribution(value: Any, n_classes: int, by_group: bool = False) -> Tensor:
    """Check a distribution, or `by_group` one a group, and return it. If its values cannot be read and are invalid, the
    result is NaN."""
    check_class_vector("smoothing_distribution", value, n_classes, by_group=by_group or None)
    wide = torch.promote_types(value.dtype, torch.float32)
    smallest, total = value.detach().amin(-1), value.detach().sum(-1, dtype=wide)
    is_distribution = (smallest >= 0.0) & ((total - 1.0).abs() <= _SUM_TOLERANCE)
    verdict = read_value(is_distribution)
    if verdict is None:
        return value.masked_fill(~is_distribution.unsqueeze(-1), math.nan)
    if not by_group:
        if not verdict:
            check_distribution(smallest.item(), total.item())
    elif False in verdict:
        group = verdict.index(False)
        check_distribution(smallest[group].item(), total[group].item(), f" for group {group}")
    return value


def check_distribution(smallest: float, total: float, of_group: str = "") -> None:
    if not (smallest >= 0.0 and abs(total - 1.0) <= _SUM_TOLERANCE):
        raise ValueError(
            f"smoothing_distribution must hold probabilities that add up to 1{of_group}, "
            f"got a smallest value of {smallest:.6g} and a sum of {total:.6g}"
        )


def rows_of_groups(group: Any, shape: torch.Size, like: Tensor) -> Tensor:
    """The checked group of each row, int64 in the shape of the rows; given so, or one for each index of the first
    dimension of the rows."""
    check_tensor("group", group)
    if group.dtype not in LABEL_DTYPES:
        hint = "; group.long() makes int64 of it" if is_integer(group) else ""
        raise TypeError(f"group must be int64, got {group.dtype}{hint}")
    if group.shape != shape and (len(shape) < 2 or group.shape != shape[:1]):
        expected = tuple(shape) if len(shape) < 2 else f"{tuple(shape)} or {tuple(shape[:1])}"
        raise ValueError(f"group must have shape {expected}, a group for each row, got {tuple(group.shape)}")
    check_device("group", group, like)
    return group.long().reshape((*group.shape, *[1] * (len(shape) - group.dim()))).expand(shape)


def check_groups_in_range(group: Tensor, n_groups: int, target: Tensor | None = None, ignore_index: int = -100) -> None:
    """Check that groups are in [0, n_groups), if their values can be read; with a target those of rows that count."""
    lowest, highest = label_range(group)
    if lowest is None or highest is None or (lowest >= 0 and highest < n_groups):
        return
    outside = (group < 0) | (group >= n_groups)
    if target is not None and not target.is_floating_point():
        counts = target != ignore_index
        outside &= counts if counts.shape == group.shape else counts.any(min(1, counts.dim() - 1))  # K labels a row
    outside = group[outside]
    if outside.numel() > 0:
        raise IndexError(
            f"group must hold indices of the {n_groups} rows of log_prior, in [0, {n_groups}), got {int(outside[0])}"
        )


def check_target(target: Any, target_weight: Any, logits: Tensor, ignore_index: int, in_range: bool = True) -> None:
    """Check index labels, weighted labels (with target_weight) or class probabilities, shaped as in `F.cross_entropy`.

    With `in_range` labels must also be classes of the logits.
    """
    check_tensor("target", target)
    check_device("target", target, logits)
    shape, dim = logits.shape, class_dim(logits)
    if target.dtype not in LABEL_DTYPES:
        if target.dtype not in FLOATING:
            hint = "; target.long() makes int64 of it" if is_integer(target) else ""
            raise TypeError(
                f"target must be int64 class indices, or probabilities in {FLOATING_NAMES}, got {target.dtype}{hint}"
            )
        if target_weight is not None:
            raise ValueError("target_weight must be None with class probabilities as target, got a tensor")
        if target.shape != shape:
            raise ValueError(
                f"target must have shape {tuple(shape)} for class probabilities, got {tuple(target.shape)}"
            )
        if ignore_index >= 0:
            raise ValueError(f"ignore_index must be negative with class probabilities as target, got {ignore_index}")
        return
    if target_weight is None:
        expected = (*shape[:dim], *shape[dim + 1 :])
        if target.shape != expected:
            hint = ""
            if target.dim() == len(shape):
                hint = "; several labels a row need target_weight, and class probabilities must be floating"
            elif target.shape == shape[:-1]:
                hint = _class_dim_hint(logits, None)
            raise ValueError(f"target must have shape {expected} for class indices, got {tuple(target.shape)}{hint}")
    else:
        check_tensor("target_weight", target_weight)
        if target_weight.dtype not in FLOATING:
            raise TypeError(f"target_weight must be {FLOATING_NAMES}, got {target_weight.dtype}")
        check_device("target_weight", target_weight, logits)
        expected = (*map(str, shape[:dim]), "K", *map(str, shape[dim + 1 :]))
        shape_matches = target.dim() == len(shape) and target.shape[dim] > 0
        if not shape_matches or any(target.shape[i] != shape[i] for i in range(len(shape)) if i != dim):
            raise ValueError(
                f"target must have shape ({', '.join(expected)}{',' * (len(expected) == 1)}) with K >= 1 labels "
                f"for target_weight, got {tuple(target.shape)}"
            )
        if target_weight.shape != target.shape:
            raise ValueError(
                f"target_weight must have the shape of target, {tuple(target.shape)}, got {tuple(target_weight.shape)}"
            )
    if in_range:
        _check_labels_in_range(target, shape[dim], ignore_index)


def _check_labels_in_range(target: Tensor, n_classes: int, ignore_index: int) -> None:
    lowest, highest = label_range(target)
    if lowest is None or highest is None or (lowest >= 0 and highest < n_classes):
        return
    target = target.long()  # in uint8, -100 would wrap to 156
    outside = target[((target < 0) | (target >= n_classes)) & (target != ignore_index)]
    if outside.numel() > 0:
        check_label(int(outside[0]), n_classes, ignore_index)


def check_label(label: int, n_classes: int, ignore_index: int) -> None:
    if not 0 <= label < n_classes:
        raise IndexError(
            f"Target {label} is out of bounds: target must hold class indices in [0, {n_classes}) "
            f"or ignore_index ({ignore_index})"
        )


_LEARN_TAU = "; to learn tau, or keep it in a tensor, pass tau * log_prior as log_prior and leave tau at 1"


def check_number(name: str, value: Any, low: float, high: float, expected: str) -> float:
    """Check a Python or NumPy real number in [low, high], and return it as a float."""
    if type(value) is float and low <= value <= high:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        hint = _LEARN_TAU if name == "tau" and isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be a number, got {type(value).__name__}{hint}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be {expected}, got {value}")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return value


_FLOAT32_MAX = torch.finfo(torch.float32).max


def check_tau(tau: Any) -> float:
    return check_number("tau", tau, 0.0, _FLOAT32_MAX, "finite and not negative")


def check_label_smoothing(value: Any) -> float:
    return check_number("label_smoothing", value, 0.0, 1.0, "between 0 and 1")


def check_ignore_index(value: Any) -> int:
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"ignore_index must be an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError("ignore_index must fit in int64, got a number that does not")
    return int(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices[:-1]) + f" or {choices[-1]!r}"
        raise ValueError(f"{name} must be {listed}, got {value!r}")


def check_classifier(weight: Any) -> None:
    """Check a floating weight matrix (C, n_features)."""
    check_tensor("weight", weight)
    if weight.dtype not in FLOATING:
        raise TypeError(f"weight must be {FLOATING_NAMES}, got {weight.dtype}")
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape (C, n_features) with C >= 1, got {tuple(weight.shape)}")


def check_int(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return int(value)


def check_labels(target: Any, logits: Tensor, ignore_index: int) -> None:
    """Check index labels, one per row."""
    check_tensor("target", target)
    _check_label_dtype(target)
    check_target(target, None, logits, ignore_index)


def _check_label_dtype(target: Tensor) -> None:
    if target.dtype not in LABEL_DTYPES:
        hint = "; target.long() makes int64 of it" if is_integer(target) else ""
        raise TypeError(f"target must be int64 class indices, got {target.dtype}{hint}")


def is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def check_predictions(preds: Tensor, target: Any, n_classes: int, ignore_index: int) -> None:
    """Check predicted classes and index labels of the same shape."""
    if preds.is_complex() or preds.dtype == torch.bool:
        raise TypeError(f"preds must be floating scores or integer classes, got {preds.dtype}")
    check_tensor("target", target)
    _check_label_dtype(target)
    if preds.shape != target.shape:
        raise ValueError(
            f"preds must have the shape of target, {tuple(target.shape)}, for predicted classes, "
            f"got {tuple(preds.shape)}"
        )
    if target.device != preds.device:
        raise ValueError(f"target must be on the device of preds, {preds.device}, got {target.device}")
    _check_labels_in_range(target, n_classes, ignore_index)
    if preds.is_cpu and not is_compiled_or_traced(preds):
        preds, target = preds.long(), target.long()  # in uint8, an n_classes of 300 would wrap to 44
        outside = preds[((preds < 0) | (preds >= n_classes)) & (target != ignore_index)]
        if outside.numel() > 0:
            raise IndexError(f"preds must hold class indices in [0, {n_classes}), got {int(outside[0])}")
