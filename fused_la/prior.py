"""How often each class occurs, and the log prior that logit adjustment needs.

    n_c         = number of training examples of class c
    log_prior_c = log((n_c + a) / (sum_k n_k + C * a)),    a = pseudocount, C = number of classes

Both functions run once, before training, so they look at values freely: on a GPU they wait for the device. Where there
is none to look at, with fake tensors and while a graph is recorded, they compute without checking.
"""

from __future__ import annotations

import itertools
import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fused_la._values import is_recorded

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
    if is_recorded(index):
        counts = index.new_zeros(n_classes)
        return counts.scatter_add(0, index.masked_fill(ignored, 0), (~ignored).to(torch.int64))
    kept = index[~ignored]
    if kept.numel() > 0 and not 0 <= int(kept.min()) <= int(kept.max()) < n_classes:
        position = int((~ignored & ((index < 0) | (index >= n_classes))).nonzero()[0])
        value = int(index[position]) % 2**64 if is_uint64 else int(index[position])
        raise IndexError(
            f"target must have entries in [0, {n_classes}) or equal to ignore_index = {ignore_index}, "
            f"got {value} at flat index {position}"
        )
    return torch.bincount(kept, minlength=n_classes)


def log_prior_from_counts(
    class_counts: Tensor | np.ndarray | Sequence[float] | Mapping[int, float],
    *,
    pseudocount: float = 0.0,
    exclude_absent: bool = False,
) -> Tensor:
    """Turn class counts into the logarithm of the class prior.

        log_prior_c = log((n_c + a) / (sum_k n_k + C * a)),    a = pseudocount

    Args:
        class_counts: examples of each class, n_c >= 0, (C,): a tensor or array of any integer or floating
            dtype, or a sequence of numbers. Or counts by class, whose keys are the classes 0 to C - 1 in any order, as
            `collections.Counter(labels)`, a dict, or `pandas.Series(labels).value_counts()`. Fractions are fine; not
            every count may be 0.
        pseudocount: examples that every class is credited with, a >= 0. Classes without examples need a > 0, or
            `exclude_absent`.
        exclude_absent: give classes without examples a log prior of -inf, so that they take no part in a loss: 10
            classes under a head of 1,000 outputs.

    Returns:
        Log prior, (C,) float32, finite but for what `exclude_absent` says, computed in float64; on the device of
        `class_counts` (the CPU for arrays and sequences). It carries no gradient.

    Raises:
        TypeError: `class_counts` is not numeric, or another argument has the wrong type.
        ValueError: `class_counts` is not one-dimensional, is empty, has a NaN, infinite or negative count,
            or nothing but zeros; keys are not the classes 0 to C - 1; a class has no examples and neither `pseudocount`
            nor `exclude_absent` says what that means, or both do; `pseudocount` is negative or not finite.

    Example:
        >>> from collections import Counter
        >>> log_prior_from_counts([4, 2, 2]).exp()
        tensor([0.5000, 0.2500, 0.2500])
        >>> log_prior_from_counts(Counter([1, 0, 2, 0, 1, 0, 0, 2])).exp()
        tensor([0.5000, 0.2500, 0.2500])
        >>> log_prior_from_counts([6, 0], pseudocount=1).exp()
        tensor([0.8750, 0.1250])

    Source:
        The prior pi of Menon et al., "Long-tail learning via logit adjustment", ICLR 2021; the pseudocount is
        additive (Laplace) smoothing.
    """
    pseudocount = check_pseudocount(pseudocount, exclude_absent)
    device = class_counts.device if isinstance(class_counts, Tensor) else torch.device("cpu")
    counts = checked_counts(class_counts)
    with np.errstate(all="ignore"):  # what comes of it is looked at below
        smoothed = counts + pseudocount
        total = smoothed.sum()
        prior = smoothed / total
        log_prior = torch.from_numpy(np.log(prior)) if isinstance(prior, np.ndarray) else prior.log()
    if isinstance(counts, np.ndarray):
        if not counts.any():
            raise ValueError(f"class_counts must have a positive count, got 0 for all {len(counts)} classes")
        if total == math.inf:
            raise ValueError("class_counts must have a sum below 1.8e308 with pseudocount, got a larger one")
        # Asked of the quotient, not of the counts: one that underflows is caught too, so that the logarithm is finite.
        missing = (prior == 0) & ((counts > 0) | (not exclude_absent))
        if missing.any():
            raise ValueError(
                f"class_counts must have examples of every class, got {_listed(counts, missing)}; "
                "pass pseudocount > 0 (say 1), or exclude_absent=True for such classes to take no part"
            )
    return log_prior.to(torch.float32).to(device)


def check_pseudocount(pseudocount: Any, exclude_absent: Any) -> float:
    if isinstance(pseudocount, bool) or not isinstance(pseudocount, numbers.Real):
        raise TypeError(f"pseudocount must be a number, got {type(pseudocount).__name__}")
    if not isinstance(exclude_absent, bool):
        raise TypeError(f"exclude_absent must be True or False, got {type(exclude_absent).__name__}")
    try:
        pseudocount = float(pseudocount)
    except OverflowError:
        pseudocount = math.inf
    if not (math.isfinite(pseudocount) and pseudocount >= 0):
        raise ValueError(f"pseudocount must be finite and non-negative, got {pseudocount:g}")
    if exclude_absent and pseudocount > 0:
        raise ValueError(f"pseudocount must be 0 with exclude_absent=True, got {pseudocount:g}")
    return pseudocount


def checked_counts(class_counts: Any) -> np.ndarray | Tensor:
    """`class_counts` as (C,) float64: C >= 1, finite and not negative, or the error that says what came. A tensor only
    where it has no values to check."""
    raw = counts_of_classes(class_counts)
    counts = raw.to(torch.float64) if isinstance(raw, Tensor) else raw.astype(np.float64)
    if counts.ndim != 1:
        raise ValueError(f"class_counts must have shape (n_classes,), got {tuple(counts.shape)}")
    if len(counts) == 0:
        raise ValueError("class_counts must have at least one class, got shape (0,)")
    if isinstance(counts, Tensor):
        return counts
    if np.isnan(counts).any():
        raise ValueError(f"class_counts must have no NaN, got {_listed(counts, np.isnan(counts))}")
    if np.isinf(counts).any():
        half = getattr(class_counts, "dtype", None) in (torch.float16, np.dtype(np.float16))
        hint = " (float16 counts overflow past 65504: count in int64)" if half else ""
        raise ValueError(f"class_counts must be finite, got {_listed(counts, np.isinf(counts))}{hint}")
    if (counts < 0).any():
        raise ValueError(f"class_counts must be non-negative, got {_listed(counts, counts < 0)}")
    return counts


def counts_of_classes(class_counts: Any) -> np.ndarray | Tensor:
    """A copy of the counts in the order of the classes, integer or floating as they are; a tensor only where it has no
    values."""
    if isinstance(class_counts, Tensor):
        _check_dense(class_counts, "class_counts")
        if class_counts.is_complex() or class_counts.dtype == torch.bool:
            raise TypeError(f"class_counts must be integer or floating, got {_dtype_name(class_counts)}")
        counts = class_counts.detach()
        counts = counts.double() if counts.is_floating_point() and counts.device.type == "cpu" else counts
        if is_recorded(counts):
            return counts
        counts = counts.cpu()
        return (counts.double() if counts.is_floating_point() else counts).numpy().copy()
    keys: Any = class_counts.keys() if isinstance(class_counts, Mapping) else _index_of(class_counts)
    if keys is not None:
        values = class_counts.values() if isinstance(class_counts, Mapping) else class_counts.to_numpy()
        class_counts = _in_order_of_classes(list(keys), list(values))
    array = _to_array(class_counts, "class_counts", "iuf", "integer or floating")
    dtype = np.float64 if array.dtype.kind == "f" else array.dtype.newbyteorder("=")
    return array.astype(dtype, order="C")


def _index_of(class_counts: Any) -> Iterable[Any] | None:
    """The keys of a pandas Series, or of what looks like one; None of what has no keys."""
    if hasattr(class_counts, "to_numpy") and hasattr(class_counts, "index") and getattr(class_counts, "ndim", 0) == 1:
        return class_counts.index
    return None


def _in_order_of_classes(keys: list[Any], values: list[Any]) -> list[Any]:
    """The values of the keys 0, 1, ... C - 1."""
    strange = [key for key in keys if not _is_class(key)]
    if strange:
        shown = ", ".join(map(repr, strange[:_MAX_LISTED])) + (", ..." if len(strange) > _MAX_LISTED else "")
        raise ValueError(
            f"class_counts must have the classes 0, 1, ... as its keys, got {shown} "
            f"({len(strange)} of {len(keys)} keys); counts in the order of the classes may be a list or an array"
        )
    by_class: dict[int, Any] = {}
    for key, value in zip(keys, values, strict=True):
        if int(key) in by_class:
            raise ValueError(f"class_counts must have every class once among its keys, got {key!r} twice")
        by_class[int(key)] = value
    n_classes = max(by_class, default=-1) + 1
    if n_classes > len(by_class):
        missing = itertools.islice((c for c in range(n_classes) if c not in by_class), _MAX_LISTED)
        n_missing = n_classes - len(by_class)
        shown = ", ".join(map(str, missing)) + (", ..." if n_missing > _MAX_LISTED else "")
        raise ValueError(
            f"class_counts must have a count for each class from 0 to {n_classes - 1}, got none for {shown} "
            f"({n_missing} of {n_classes} classes); a class without examples has the count 0"
        )
    return [by_class[c] for c in range(len(by_class))]


def _is_class(key: Any) -> bool:
    if isinstance(key, (bool, np.bool_)) or not isinstance(key, (int, float, np.integer, np.floating)):
        return False
    return bool(0 <= key < math.inf) and float(key).is_integer()


def _check_dense(tensor: Tensor, name: str) -> None:
    if tensor.is_meta:
        raise TypeError(
            f"{name} must have values, got a tensor on the meta device; a list or an array has them everywhere"
        )
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
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
        got = array.dtype
        if array.dtype.kind == "O":  # of what is no number, or of one that is too large
            strange = (type(entry).__name__ for entry in array.flat if not isinstance(entry, (int, float)))
            got = next(strange, type(value).__name__)
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


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _listed(counts: np.ndarray, mask: np.ndarray) -> str:
    """The counts at `mask`: "-1 for class 3, -2 for class 7 and 5 more (7 of 100 classes)"."""
    classes = mask.nonzero()[0]
    shown = ", ".join(f"{counts[c]:.15g} for class {c}" for c in classes[:_MAX_LISTED])
    more = f" and {len(classes) - _MAX_LISTED} more" if len(classes) > _MAX_LISTED else ""
    return f"{shown}{more} ({len(classes)} of {len(mask)} classes)"


def sum_over_group(class_counts: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the ranks of `group`, wherever it can reduce, on the device of `class_counts`."""
    from fused_la import _ranks

    ranks = _ranks.ranks_of(group)
    device = class_counts.device if class_counts.device.type in ranks.device_types else ranks.device_types[0]
    summed = class_counts.to(device, copy=True)
    return _ranks.all_reduce(ranks, summed).to(class_counts.device)
