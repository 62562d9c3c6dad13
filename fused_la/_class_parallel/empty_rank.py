"""A rank that holds no classes: it is given one at -inf, which leaves a row nothing, and takes part like any other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_la._call import checks
from fused_la._call.arguments import Call
from fused_la._call.head_arguments import check_head, stand_in
from fused_la._call.pairwise_margin import PairwiseMargin


def or_one(vector: Any, value: float, dim: int = 0) -> Any:
    """A tensor with one class of this value where it has none; what is wrong with anything else is said later."""
    if not isinstance(vector, Tensor) or vector.dim() <= dim or vector.shape[dim] > 0:
        return vector
    return F.pad(vector, (0, 0) * (vector.dim() - 1 - dim) + (0, 1), value=value)


def logits_or_one(logits: Any) -> tuple[Tensor, int]:
    """Checked logits, and how many classes are here."""
    dim = 0 if isinstance(logits, Tensor) and logits.dim() == 1 else 1
    rows = or_one(logits, 0.0, dim)
    checks.check_logits(rows)
    return rows, 0 if rows is not logits else rows.shape[dim]


def weight_or_one(weight: Any) -> tuple[Tensor, int]:
    held = or_one(weight, 0.0)
    checks.check_classifier(held)
    return held, 0 if held is not weight else len(held)


def head_rows(
    features: Any, weight: Tensor, n_classes: int, bias: Any, target: Any, target_weight: Any
) -> tuple[Tensor, Any, Any]:
    """Logits that a head stands for, and the rows of its target."""
    check_head(features, weight, bias)
    if n_classes == 0 and isinstance(target, Tensor) and target.is_floating_point():
        target = or_one(target, 0.0, features.dim() - 1)
    return stand_in(features, weight, bias, target, target_weight)


def target_or_one(target: Any, n_classes: int, logits: Tensor) -> Any:
    if n_classes > 0 or not isinstance(target, Tensor) or not target.is_floating_point():
        return target
    return or_one(target, 0.0, checks.class_dim(logits))


def out_if_none(call: Call, n_classes: int) -> Call:
    """With tau = 0 nothing else would say that the one class of a rank without classes is at -inf."""
    if n_classes > 0 or (call.problem.log_prior is not None and call.problem.tau > 0.0):
        return call
    problem = call.problem
    out = problem.logits.new_full((1,), -torch.inf, dtype=problem.compute_dtype)
    if problem.log_prior is not None:
        out = out + problem.log_prior  # learned, though not from here: its gradient is there, of no classes
    return call._replace(problem=problem._replace(log_prior=out, tau=1.0))


def margin_or_one(margin: Any, n_classes: int, logits: Tensor) -> Any:
    if n_classes > 0 or not isinstance(margin, PairwiseMargin):
        return margin
    fills = {"negative_offset": -torch.inf, "target_offset": 0.0, "alpha": 1.0, "scale": 1.0}
    filled = margin.mapped(lambda name, value: or_one(value, fills[name]))
    if filled.negative_offset is None:
        out = logits.new_full((1,), -torch.inf, dtype=torch.promote_types(logits.dtype, torch.float32))
        object.__setattr__(filled, "negative_offset", out)
        if margin.offsets_are_equal:
            object.__setattr__(filled, "target_offset", out)
    return filled
