"""Public functions that count the examples of each class and turn class counts into a log prior.

    n_c         = number of training examples of class c
    log_prior_c = log((n_c + a) / (sum_k n_k + C * a)),    a = pseudocount, C = number of classes

Both functions run once, before training, so they may read values: on a GPU they wait for the device. With fake tensors
and while a graph is recorded there are no values, and they compute without checking.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fused_la._call.class_counts import check_dense, dtype_name, log_prior_of, to_array
from fused_la._call.values import is_compiled_or_traced

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
        n_classes: the number of classes C. Classes that never occur, also the last ones, get the count 0.
        ignore_index: entries of this value are not counted, as in `torch.nn.functional.cross_entropy`.
        group: a `torch.distributed` process group. The counts are summed over its ranks. Every rank has to make this
            call, and an error on one rank raises on all. With None only the target of this process is counted, without
            communication, even if a default process group exists.

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
    from fused_la._class_parallel import exchange  # here: builds of PyTorch without torch.distributed can count too

    def check() -> tuple[Tensor, dict[str, Any]]:
        counts = _count(target, n_classes, ignore_index)
        return counts, {"n_classes": len(counts)}

    class_counts, headers = exchange.exchange_headers(exchange.ranks_of(group), "count_classes", check)
    exchange.check_same("n_classes", "the same", [numbers["n_classes"] for numbers in headers])
    return exchange.sum_over_group(class_counts, group)


def _count(target: Any, n_classes: Any, ignore_index: Any) -> Tensor:
    """The counts of the target of this process."""
    n_classes = _to_int(n_classes, "n_classes")
    if n_classes < 1:
        raise ValueError(f"n_classes must be positive, got {n_classes}")
    ignore_index = _to_int(ignore_index, "ignore_index")
    index, is_uint64 = _to_flat_int64(target)

    ignored = index == ignore_index
    if is_uint64:
        ignored &= index >= 0  # an entry of 2^63 or more has wrapped to a negative one: out of range, never ignored
    if is_compiled_or_traced(index):
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
            dtype, or a sequence of numbers. Or a mapping whose keys are the classes 0 to C - 1 in any order:
            `collections.Counter(labels)`, a dict, or `pandas.Series(labels).value_counts()`. Fractions are fine; not
            every count may be 0.
        pseudocount: examples added to every class, a >= 0. Classes without examples need a > 0, or `exclude_absent`.
        exclude_absent: give classes without examples a log prior of -inf, which excludes them from a loss; for example
            if a head of 1,000 outputs is trained on 10 classes.

    Returns:
        Log prior, (C,) float32, finite except for classes excluded by `exclude_absent`; computed in float64, on the
        device of `class_counts` (the CPU for arrays and sequences). It carries no gradient.

    Raises:
        TypeError: `class_counts` is not numeric, or another argument has the wrong type.
        ValueError: `class_counts` is not one-dimensional, is empty, has a NaN, infinite or negative count,
            or only zeros; keys are not the classes 0 to C - 1; a class has no examples and neither `pseudocount` nor
            `exclude_absent` is given; both are given; `pseudocount` is negative or not finite.

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
    return log_prior_of(class_counts, pseudocount, exclude_absent)


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


def _to_flat_int64(target: Any) -> tuple[Tensor, bool]:
    """`target` as (n,) int64, and whether it was uint64: entries of 2^63 or more become negative."""
    if isinstance(target, Tensor):
        check_dense(target, "target")
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise TypeError(f"target must be integer, got {dtype_name(target)}")
        return target.reshape(-1).to(torch.int64), target.dtype == torch.uint64
    array = to_array(target, "target", "iu", "integer")
    # A copy in C order, because PyTorch does not accept read-only, byte-swapped or reversed memory.
    return torch.from_numpy(array.astype(np.int64, order="C").reshape(-1)), array.dtype == np.uint64
