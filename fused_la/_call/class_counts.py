"""Class counts: check what callers give, put it in the order of the classes, and compute the log prior."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_la._call.values import is_compiled_or_traced

_MAX_LISTED = 10  # classes that an error message spells out


def log_prior_of(class_counts: Any, pseudocount: Any, exclude_absent: Any) -> Tensor:
    """The log prior of class counts, (C,) or (G, C) float32; see `fused_la.log_prior_from_counts`."""
    pseudocount = check_pseudocount(pseudocount, exclude_absent)
    device = class_counts.device if isinstance(class_counts, Tensor) else torch.device("cpu")
    counts = checked_counts(class_counts, by_group=True)
    with np.errstate(all="ignore"):  # zeros and overflow are checked below
        smoothed = counts + pseudocount
        total = smoothed.sum(-1)[..., None]
        prior = smoothed / total
        log_prior = torch.from_numpy(np.log(prior)) if isinstance(prior, np.ndarray) else prior.log()
    if isinstance(counts, np.ndarray):
        _check_examples(counts, pseudocount)
        if np.isinf(total).any():
            raise ValueError("class_counts must have a sum below 1.8e308 with pseudocount, got a larger one")
        # The quotient is tested, not the count: an underflow is caught too, so that the logarithm is finite.
        missing = (prior == 0) & ((counts > 0) | (not exclude_absent))
        if missing.any():
            raise ValueError(
                f"class_counts must have examples of every class, got {_describe(counts, missing)}; "
                "pass pseudocount > 0 (say 1), or exclude_absent=True for such classes to take no part"
            )
    return log_prior.to(torch.float32).to(device)


def _check_examples(counts: np.ndarray, pseudocount: float) -> None:
    """Raise if there are no examples at all, or if a group has none and there is no pseudocount."""
    if not counts.any():
        of_groups = "" if counts.ndim == 1 else f" of all {len(counts)} groups"
        raise ValueError(
            f"class_counts must have a positive count, got 0 for all {counts.shape[-1]} classes{of_groups}"
        )
    empty = np.flatnonzero(~np.atleast_2d(counts).any(-1))
    if len(empty) > 0 and pseudocount == 0:
        shown = ", ".join(map(str, empty[:_MAX_LISTED])) + (", ..." if len(empty) > _MAX_LISTED else "")
        raise ValueError(
            f"class_counts must have examples of every group, got 0 for all classes of group {shown} "
            f"({len(empty)} of {len(counts)} groups); pass pseudocount > 0 (say 1), or leave such groups out"
        )


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


def checked_counts(class_counts: Any, by_group: bool = False) -> np.ndarray | Tensor:
    """`class_counts` as a checked float64 array, (C,) or if `by_group` also (G, C): C >= 1, finite and not negative.
    It is a tensor only if it has no values to check."""
    raw = counts_in_class_order(class_counts)
    counts = raw.to(torch.float64) if isinstance(raw, Tensor) else raw.astype(np.float64)
    shape = tuple(counts.shape)
    if counts.ndim != 1 and not (by_group and counts.ndim == 2):
        expected = "(n_classes,) or (n_groups, n_classes)" if by_group else "(n_classes,)"
        raise ValueError(f"class_counts must have shape {expected}, got {shape}")
    if 0 in shape:
        raise ValueError(f"class_counts must have at least one {'class' if len(shape) == 1 else 'group and class'}, "
                         f"got shape {shape}")  # fmt: skip
    if isinstance(counts, Tensor):
        return counts
    if np.isnan(counts).any():
        raise ValueError(f"class_counts must have no NaN, got {_describe(counts, np.isnan(counts))}")
    if np.isinf(counts).any():
        half = getattr(class_counts, "dtype", None) in (torch.float16, np.dtype(np.float16))
        hint = " (float16 counts overflow past 65504: count in int64)" if half else ""
        raise ValueError(f"class_counts must be finite, got {_describe(counts, np.isinf(counts))}{hint}")
    if (counts < 0).any():
        raise ValueError(f"class_counts must be non-negative, got {_describe(counts, counts < 0)}")
    return counts


def counts_in_class_order(class_counts: Any) -> np.ndarray | Tensor:
    """A copy of the counts in the order of the classes, an integer or float64 array. It is a tensor only if it has no
    values."""
    if hasattr(class_counts, "to_numpy") and hasattr(class_counts, "columns"):
        raise TypeError(
            f"class_counts must not be a table, got {type(class_counts).__name__}: its rows and columns may be in any "
            "order; .to_numpy() makes an array of it"
        )
    if isinstance(class_counts, Tensor):
        check_dense(class_counts, "class_counts")
        if class_counts.is_complex() or class_counts.dtype == torch.bool:
            raise TypeError(f"class_counts must be integer or floating, got {dtype_name(class_counts)}")
        counts = class_counts.detach()
        counts = counts.double() if counts.is_floating_point() and counts.device.type == "cpu" else counts
        if is_compiled_or_traced(counts):
            return counts
        counts = counts.cpu()
        return (counts.double() if counts.is_floating_point() else counts).numpy().copy()
    keys: Any = class_counts.keys() if isinstance(class_counts, Mapping) else _series_index(class_counts)
    if keys is not None:
        values = class_counts.values() if isinstance(class_counts, Mapping) else class_counts.to_numpy()
        class_counts = _order_by_class(list(keys), list(values))
    array = to_array(class_counts, "class_counts", "iuf", "integer or floating")
    if keys is not None and array.ndim != 1:
        raise ValueError(f"class_counts must have one number for each of its keys, got shape {array.shape[1:]}")
    dtype = np.float64 if array.dtype.kind == "f" else array.dtype.newbyteorder("=")
    return array.astype(dtype, order="C")


def _series_index(class_counts: Any) -> Iterable[Any] | None:
    """The keys of a pandas Series or an object like it; None if there are no keys."""
    if hasattr(class_counts, "to_numpy") and hasattr(class_counts, "index") and getattr(class_counts, "ndim", 0) == 1:
        return class_counts.index
    return None


def _order_by_class(keys: list[Any], values: list[Any]) -> list[Any]:
    """The values ordered by their keys, which must be 0, 1, ... C - 1."""
    invalid = [key for key in keys if not _is_class(key)]
    if invalid:
        shown = ", ".join(map(repr, invalid[:_MAX_LISTED])) + (", ..." if len(invalid) > _MAX_LISTED else "")
        raise ValueError(
            f"class_counts must have the classes 0, 1, ... as its keys, got {shown} "
            f"({len(invalid)} of {len(keys)} keys); counts in the order of the classes may be a list or an array"
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


def check_dense(tensor: Tensor, name: str) -> None:
    if tensor.is_meta:
        raise TypeError(
            f"{name} must have values, got a tensor on the meta device; a list or an array has them everywhere"
        )
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        raise TypeError(f"{name} must be a dense tensor with values, got {tensor.layout} on {tensor.device}")


def to_array(value: Any, name: str, kinds: str, expected: str) -> np.ndarray:
    """The value as an array; raises if its `dtype.kind` is not in `kinds`, which `expected` names in the message."""
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
        if array.dtype.kind == "O":  # entries that are no numbers, or too large
            invalid = (type(entry).__name__ for entry in array.flat if not isinstance(entry, (int, float)))
            got = next(invalid, type(value).__name__)
        raise TypeError(f"{name} must be {expected}, got {got}")
    return array


def to_int64(value: Any, name: str) -> tuple[Tensor, bool]:
    """Integers as an int64 tensor, flat if they are ragged, and whether they were uint64: entries of 2^63 or more
    become negative."""
    if isinstance(value, Tensor):
        check_dense(value, name)
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be integer, got {dtype_name(value)}")
        return value.to(torch.int64), value.dtype == torch.uint64
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = list(value)
    try:
        array = to_array(value, name, "iu", "integer")
    except ValueError:  # lists of different lengths, as the labels of sentences
        parts = [to_int64(part, name) for part in value]
        return torch.cat([part.reshape(-1) for part, _ in parts]), any(is_uint64 for _, is_uint64 in parts)
    # A copy in C order, because PyTorch does not accept read-only, byte-swapped or reversed memory.
    return torch.from_numpy(array.astype(np.int64, order="C")), array.dtype == np.uint64


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _describe(counts: np.ndarray, mask: np.ndarray) -> str:
    """The counts at `mask` as text: "-1 for class 3, -2 for class 7 and 5 more (7 of 100 classes)"; (G, C) counts are
    those "for class 3 of group 1"."""
    places = np.argwhere(mask)
    shown = ", ".join(
        f"{counts[tuple(place)]:.15g} for class {place[-1]}" + (f" of group {place[0]}" if len(place) > 1 else "")
        for place in places[:_MAX_LISTED]
    )
    more = f" and {len(places) - _MAX_LISTED} more" if len(places) > _MAX_LISTED else ""
    return f"{shown}{more} ({len(places)} of {mask.size} {'classes' if mask.ndim == 1 else 'counts'})"
