"""Counts of examples and correct predictions by class, and the error rates that follow from them.

    error_c         = 1 - n_correct_c / n_examples_c              NaN for a class without examples
    balanced error  = the mean of error_c over the classes with examples
    top-1 accuracy  = sum_c n_correct_c / sum_c n_examples_c
    many, medium, few error = the mean of error_c over the classes with more than 100, with 20 to 100 and with fewer
                      than 20 *training* examples; classes without examples here are left out, NaN over no class

Counts have C + 1 columns. The last one counts labels that are neither a class nor ignored. On a CPU such a label raises
at once. On a GPU it raises when the counts are read, since reading labels would wait for the device. Apart from that
error nothing here depends on values, so fake tensors work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_la._call.class_counts import checked_counts
from fused_la._call.values import read_value


def shot_groups(class_counts: Any) -> dict[str, Tensor]:
    """Split classes by their number of training examples: "many" > 100, "medium" 20 to 100, "few" < 20.

    Args:
        class_counts: (C,) *training* examples a class: a list, an array or a tensor, integer or floating.

    Returns:
        {"many": mask, "medium": mask, "few": mask}, each (C,) bool on the CPU; every class is in exactly one.

    Raises:
        TypeError, ValueError: counts that are not numbers, not one-dimensional, negative or not finite.

    Example:
        >>> shot_groups([1280, 101, 100, 20, 19, 0])["medium"].nonzero().flatten()
        tensor([2, 3])

    Source: Liu et al., "Large-scale long-tailed recognition in an open world", CVPR 2019.
    """
    counts = torch.as_tensor(checked_counts(class_counts), device="cpu")
    return {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}


def count_predictions(
    n_correct: Tensor, n_examples: Tensor, predictions: Tensor, target: Tensor, ignore_index: int
) -> None:
    """Add rows to the counts: n_correct (..., C + 1), n_examples (C + 1,), predictions (..., rows), target (rows,)."""
    n_classes = len(n_examples) - 1
    target = target.long()  # as uint8, an ignore_index of -100 would be 156
    counts = target != ignore_index
    column = torch.where((target >= 0) & (target < n_classes), target, n_classes)
    n_examples.scatter_add_(0, column, counts.to(n_examples.dtype))
    correct = (predictions == target) & counts
    n_correct.scatter_add_(-1, column.expand_as(predictions), correct.to(n_correct.dtype))


def read_counts(n_correct: Tensor, n_examples: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """n_correct (..., C) and n_examples (C,), int64 on the CPU, or an IndexError for labels that are no class."""
    n_correct, n_examples = n_correct.to("cpu", torch.int64), n_examples.to("cpu", torch.int64)
    n_outside = read_value(n_examples[-1])
    if n_outside:
        raise IndexError(
            f"target must hold class indices in [0, {len(n_examples) - 1}) or ignore_index ({ignore_index}), "
            f"got {n_outside} labels that are neither"
        )
    return n_correct[..., :-1], n_examples[:-1]


def class_error(n_correct: Tensor, n_examples: Tensor) -> Tensor:
    """error_c, (..., C) float64; NaN for a class without examples."""
    return 1.0 - n_correct.double() / n_examples.double()


def mean_rates(n_correct: Tensor, n_examples: Tensor, groups: dict[str, Tensor]) -> dict[str, Tensor]:
    """Balanced error, top-1 accuracy and the error of each group, each (...) float64; NaN over no examples."""
    error = class_error(n_correct, n_examples)
    present = n_examples > 0
    rates = {
        "balanced_error": _mean(error, present),
        "top1_accuracy": n_correct.sum(-1).double() / n_examples.sum().double(),
    }
    for name, members in groups.items():
        rates[f"{name}_error"] = _mean(error, present & members)
    return rates


def _mean(error: Tensor, mask: Tensor) -> Tensor:
    """The mean over the classes of the mask. Indexing by the mask would give a shape that depends on values."""
    return error.masked_fill(~mask, 0.0).sum(-1) / mask.sum()
