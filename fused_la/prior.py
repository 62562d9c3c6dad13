"""How often each class occurs, and the log prior that logit adjustment needs.

    n_c         = number of training examples of class c
    log_prior_c = log((n_c + a) / (sum_k n_k + C * a)),    a = pseudocount, C = number of classes

Both functions run once, before training, so they look at values freely: on a GPU they wait for the device.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_MAX_LISTED = 10  # classes that an error message spells out


def count_classes(
    target: Tensor | np.ndarray | Sequence[Any],
    n_classes: int,
    *,
    ignore_index: int = -100,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Count the examples of each class.

        n_c = #{i : target_i = c and target_i != ignore_index}

    Args:
        target: class indices in [0, n_classes) or `ignore_index`, of any shape, also empty: a tensor or
            array of any integer dtype, or a (nested) list of ints.
        n_classes: the number of classes C. Classes that never occur, the last ones too, are counted as 0.
        ignore_index: entries of this value are not counted, as in `torch.nn.functional.cross_entropy`.
        group: a `torch.distributed` process group. The counts are summed over its ranks, and every one of
            them has to make this call; what is wrong on one raises on all. None counts what this process holds
            and does not communicate, not even when a default process group exists.

    Returns:
        Counts, (C,) int64, on the device of `target` (the CPU for arrays and lists).

    Raises:
        TypeError: `target` is not integer, or another argument has the wrong type.
        ValueError: `target` is ragged, `n_classes` is not positive, or not the same on all ranks.
        IndexError: an entry is neither in [0, n_classes) nor `ignore_index`, on this rank or another.

    Example:
        >>> count_classes([0, 1, 0, -100, 0], n_classes=3)
        tensor([3, 1, 0])

    Source:
        The class frequencies of Menon et al., "Long-tail learning via logit adjustment", ICLR 2021.
    """
    if group is None:
        return _count(target, n_classes, ignore_index)
    from fused_la import _ranks  # here, because builds of PyTorch without torch.distributed can still count alone

    def check() -> tuple[Tensor, dict[str, Any]]:
        counts = _count(target, n_classes, ignore_index)
        return counts, {"n_classes": len(counts)}

    class_counts, of_ranks = _ranks.meet(_ranks.ranks_of(group), "count_classes", check)
    _ranks.check_same("n_classes", "the same", [numbers["n_classes"] for numbers in of_ranks])
    return sum_over_group(class_counts, group)


def _count(target: Any, n_classes: Any, ignore_index: Any) -> Tensor:
    n_classes = _to_int(n_classes, "n_classes")
    if n_classes < 1:
        raise ValueError(f"n_classes must be positive, got {n_classes}")
    ignore_index = _to_int(ignore_index, "ignore_index")
    index, is_uint64 = _to_flat_int64(target)

    ignored = index == ignore_index
    if is_uint64:
        ignored &= index >= 0  # an entry from 2^63 up has wrapped around; it is out of range, never ignored
    kept = index[~ignored]
    if kept.numel() > 0 and not 0 <= int(kept.min()) <= int(kept.max()) < n_classes:
        position = int((~ignored & ((index < 0) | (index >= n_classes))).nonzero()[0])
        value = int(index[position]) % 2**64 if is_uint64 else int(index[position])
        raise IndexError(
            f"target must have entries in [0, {n_classes}) or equal to ignore_index = {ignore_index}, "
            f"got {value} at flat index {position}"
        )
    return torch.bincount(kept, minlength=n_classes)


def log_prior_from_counts(class_counts: Tensor | np.ndarray | Sequence[float], *, pseudocount: float = 0.0) -> Tensor:
    """Turn class counts into the logarithm of the class prior.

        log_prior_c = log((n_c + a) / (sum_k n_k + C * a)),    a = pseudocount

    Args:
        class_counts: examples of each class, n_c >= 0, (C,): a tensor or array of any integer or floating
            dtype, or a sequence of numbers. Fractions are fine; not every count may be 0.
        pseudocount: examples that every class is credited with, a >= 0. Classes without examples need a > 0.

    Returns:
        Log prior, (C,) float32, finite, computed in float64; on the device of `class_counts` (the CPU for
        arrays and sequences). It carries no gradient.

    Raises:
        TypeError: `class_counts` is not numeric, or `pseudocount` is not a number.
        ValueError: `class_counts` is not one-dimensional, is empty, has a NaN, infinite or negative count,
            or nothing but zeros; a class has no examples and `pseudocount` is 0; `pseudocount` is negative
            or not finite.

    Example:
        >>> log_prior_from_counts([4, 2, 2]).exp()
        tensor([0.5000, 0.2500, 0.2500])
        >>> log_prior_from_counts([6, 0], pseudocount=1).exp()
        tensor([0.8750, 0.1250])

    Source:
        The prior pi of Menon et al., "Long-tail learning via logit adjustment", ICLR 2021; the pseudocount is
        additive (Laplace) smoothing.
    """
    if isinstance(pseudocount, bool) or not isinstance(pseudocount, numbers.Real):
        raise TypeError(f"pseudocount must be a number, got {type(pseudocount).__name__}")
    try:
        pseudocount = float(pseudocount)
    except OverflowError:
        pseudocount = math.inf
    if not (math.isfinite(pseudocount) and pseudocount >= 0):
        raise ValueError(f"pseudocount must be finite and non-negative, got {pseudocount:g}")
    counts = checked_counts(class_counts)
    if not counts.any():
        raise ValueError(f"class_counts must have a positive count, got 0 for all {counts.numel()} classes")

    smoothed = counts + pseudocount
    if smoothed.sum().isinf():
        raise ValueError("class_counts must have a sum below 1.8e308 with pseudocount, got a larger one")
    prior = smoothed / smoothed.sum()
    # Asked of the quotient, not of the counts: one that underflows is caught too, so the result is finite.
    if not (prior > 0).all():
        raise ValueError(
            f"class_counts must have examples of every class, got {_listed(counts, ~(prior > 0))}; "
            "pass pseudocount > 0 (say 1) or leave such classes out"
        )
    device = class_counts.device if isinstance(class_counts, Tensor) else torch.device("cpu")
    return prior.log().to(torch.float32).to(device)


def checked_counts(class_counts: Any) -> Tensor:
    """`class_counts` as (C,) float64 on the CPU: C >= 1, finite and not negative, or the error that says what came."""
    counts, dtype = _to_float64(class_counts)
    if counts.ndim != 1:
        raise ValueError(f"class_counts must have shape (n_classes,), got {tuple(counts.shape)}")
    if counts.numel() == 0:
        raise ValueError("class_counts must have at least one class, got shape (0,)")
    if counts.isnan().any():
        raise ValueError(f"class_counts must have no NaN, got {_listed(counts, counts.isnan())}")
    if counts.isinf().any():
        hint = " (float16 counts overflow past 65504: count in int64)" if dtype == "float16" else ""
        raise ValueError(f"class_counts must be finite, got {_listed(counts, counts.isinf())}{hint}")
    if (counts < 0).any():
        raise ValueError(f"class_counts must be non-negative, got {_listed(counts, counts < 0)}")
    return counts


def _check_dense(tensor: Tensor, name: str) -> None:
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        raise TypeError(f"{name} must be a dense tensor with values, got {tensor.layout} on {tensor.device}")


def _to_int(value: Any, name: str) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got bool")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must fit in int64, got a number that does not")
    return number


def _to_array(value: Any, name: str, kinds: str, expected: str) -> np.ndarray:
    """An array whose `dtype.kind` is one of `kinds`, or the error that says what came instead."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array, got one: its mask would be ignored")
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name} must be rectangular, got nested sequences of different lengths") from None
    if array.size == 0 and not hasattr(value, "dtype"):
        array = array.astype(np.int64)  # an empty list has no dtype of its own; NumPy calls it float64
    if array.dtype.kind not in kinds:
        got = type(value).__name__ if array.dtype.kind == "O" else array.dtype
        raise TypeError(f"{name} must be {expected}, got {got}")
    return array


def _to_flat_int64(target: Any) -> tuple[Tensor, bool]:
    """`target` as (n,) int64, and whether it was uint64, whose upper half turns negative here."""
    if isinstance(target, Tensor):
        _check_dense(target, "target")
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise TypeError(f"target must be integer, got {_dtype_name(target)}")
        return target.reshape(-1).to(torch.int64), target.dtype == torch.uint64
    array = _to_array(target, "target", "iu", "integer")
    # A copy in C order, because PyTorch takes no read-only, byte-swapped or reversed memory.
    return torch.from_numpy(array.astype(np.int64, order="C").reshape(-1)), array.dtype == np.uint64


def _to_float64(class_counts: Any) -> tuple[Tensor, str]:
    """`class_counts` as float64 on the CPU (some devices have no float64), and the name of its own dtype."""
    if isinstance(class_counts, Tensor):
        _check_dense(class_counts, "class_counts")
        if class_counts.is_complex() or class_counts.dtype == torch.bool:
            raise TypeError(f"class_counts must be integer or floating, got {_dtype_name(class_counts)}")
        return class_counts.detach().cpu().to(torch.float64), _dtype_name(class_counts)
    array = _to_array(class_counts, "class_counts", "iuf", "integer or floating")
    return torch.from_numpy(array.astype(np.float64, order="C")), array.dtype.name


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _listed(counts: Tensor, mask: Tensor) -> str:
    """The counts at `mask`: "-1 for class 3, -2 for class 7 and 5 more (7 of 100 classes)"."""
    classes = mask.nonzero().flatten().tolist()
    shown = ", ".join(f"{counts[c].item():.15g} for class {c}" for c in classes[:_MAX_LISTED])
    more = f" and {len(classes) - _MAX_LISTED} more" if len(classes) > _MAX_LISTED else ""
    return f"{shown}{more} ({len(classes)} of {len(mask)} classes)"


def sum_over_group(class_counts: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the ranks of `group`, wherever it can reduce, on the device of `class_counts`."""
    from fused_la import _ranks

    ranks = _ranks.ranks_of(group)
    device = class_counts.device if class_counts.device.type in ranks.device_types else ranks.device_types[0]
    summed = class_counts.to(device, copy=True)
    return _ranks.all_reduce(ranks, summed).to(class_counts.device)
