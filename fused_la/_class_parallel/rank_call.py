"""The call of one rank: its arguments are checked, and a rank without classes is given a placeholder.

The placeholder is one class at -inf, which changes no row, so that such a rank takes part like any other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_la._call import checks
from fused_la._call.arguments import LossCall, Options, read_call
from fused_la._call.head_arguments import check_head, placeholder_logits
from fused_la._call.pairwise_margin import PairwiseMargin


class RankCall(NamedTuple):
    """The checked call of one rank."""

    call: LossCall  # of this rank's classes, or of the placeholder
    own: Tensor  # logits, or the features of a head
    weight: Tensor | None  # (C, D) of a head
    bias: Tensor | None
    n_classes: int  # 0 with a placeholder
    margin: PairwiseMargin  # as given
    tau: float
    impl: Any
    gather_features: bool = False
    average_over_ranks: bool = False


def read_logits_call(logits: Any, target: Any, prior: Any, tau: Any, options: Options, impl: Any) -> RankCall:
    """The call of a loss of logits, for a log prior with its tau, or for a margin if tau is None."""
    rows, n_classes = _logits_or_placeholder(logits)
    if n_classes == 0 and _is_floating(target):
        target = _placeholder_if_empty(target, 0.0, checks.class_dim(rows))
    call, tau_used = _read(rows, n_classes, prior, tau, target, options, "weight")
    margin = prior if tau is None else PairwiseMargin()
    return RankCall(call, rows, None, None, n_classes, margin, tau_used, impl)


def read_head_call(
    features: Any, weight: Any, bias: Any, target: Any, prior: Any, tau: Any, options: Options, impl: Any,
    gather_features: Any = False, average_over_ranks: Any = False,
) -> RankCall:  # fmt: skip
    """The call of a loss of a head, for a log prior with its tau, or for a margin if tau is None."""
    held = _placeholder_if_empty(weight, 0.0)
    checks.check_classifier(held)
    n_classes = 0 if held is not weight else len(held)
    held_bias = _placeholder_if_empty(bias, 0.0)
    check_head(features, held, held_bias)
    if n_classes == 0 and _is_floating(target):
        target = _placeholder_if_empty(target, 0.0, features.dim() - 1)
    rows, target, target_weight = placeholder_logits(features, held, held_bias, target, options.target_weight)
    options = options._replace(target_weight=target_weight)
    call, tau_used = _read(rows, n_classes, prior, tau, target, options, "class_weight")
    margin = prior if tau is None else PairwiseMargin()
    return RankCall(
        call, features, held, held_bias, n_classes, margin, tau_used, impl,
        checks.check_flag("gather_features", gather_features),
        checks.check_flag("average_over_ranks", average_over_ranks),
    )  # fmt: skip


def _read(
    rows: Tensor, n_classes: int, prior: Any, tau: Any, target: Any, options: Options, weight_name: str
) -> tuple[LossCall, float]:
    """The call, and tau as the caller gave it."""
    prior = _margin_or_placeholder(prior, n_classes, rows) if tau is None else _placeholder_if_empty(prior, -torch.inf)
    options = options._replace(
        weight=_placeholder_if_empty(options.weight, 1.0),
        smoothing_distribution=_placeholder_if_empty(options.smoothing_distribution, 0.0),
    )
    call = read_call(rows, prior, tau, target, options, weight_name, all_classes=False)
    return call if tau is None else _exclude_placeholder(call, n_classes), call.problem.tau


# Placeholders ---------------------------------------------------------------------------------------------------------


def _placeholder_if_empty(vector: Any, value: float, dim: int = 0) -> Any:
    """A tensor with one class of this value if it has none; what is wrong with anything else is reported later."""
    if not isinstance(vector, Tensor) or vector.dim() <= dim or vector.shape[dim] > 0:
        return vector
    return F.pad(vector, (0, 0) * (vector.dim() - 1 - dim) + (0, 1), value=value)


def _logits_or_placeholder(logits: Any) -> tuple[Tensor, int]:
    """Checked logits, and how many classes this rank has."""
    dim = 0 if isinstance(logits, Tensor) and logits.dim() == 1 else 1
    rows = _placeholder_if_empty(logits, 0.0, dim)
    checks.check_logits(rows)
    return rows, 0 if rows is not logits else rows.shape[dim]


def _is_floating(target: Any) -> bool:
    return isinstance(target, Tensor) and target.is_floating_point()


def _exclude_placeholder(call: LossCall, n_classes: int) -> LossCall:
    """Put the placeholder at -inf where tau = 0 would not."""
    if n_classes > 0 or (call.problem.log_prior is not None and call.problem.tau > 0.0):
        return call
    problem = call.problem
    excluded = problem.logits.new_full((1,), -torch.inf, dtype=problem.compute_dtype)
    if problem.log_prior is not None:
        excluded = excluded + problem.log_prior  # a learned prior gets its gradient, which is of no classes here
    return call._replace(problem=problem._replace(log_prior=excluded, tau=1.0))


def _margin_or_placeholder(margin: Any, n_classes: int, logits: Tensor) -> Any:
    if n_classes > 0 or not isinstance(margin, PairwiseMargin):
        return margin
    fills = {"negative_offset": -torch.inf, "target_offset": 0.0, "alpha": 1.0, "scale": 1.0}
    filled = margin.mapped(lambda name, value: _placeholder_if_empty(value, fills[name]))
    if filled.negative_offset is None:
        excluded = logits.new_full((1,), -torch.inf, dtype=torch.promote_types(logits.dtype, torch.float32))
        object.__setattr__(filled, "negative_offset", excluded)
        if margin.offsets_are_equal:
            object.__setattr__(filled, "target_offset", excluded)
    return filled
