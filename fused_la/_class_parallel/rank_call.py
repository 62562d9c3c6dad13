"""The checked call of one rank, with a placeholder class if the rank has no classes.

The placeholder is one class at -inf. It changes no row, and lets such a rank take part like any other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_la._call import checks
from fused_la._call.arguments import Adjustment, LossCall, Options, ScaledPrior, read_call
from fused_la._call.head_arguments import check_head, placeholder_logits
from fused_la._call.pairwise_margin import PairwiseMargin


class RankCall(NamedTuple):
    """The checked call of one rank."""

    call: LossCall  # of this rank's classes, or of the placeholder
    inputs: Tensor  # logits, or the features of a head
    weight: Tensor | None  # (C, D), of a head
    bias: Tensor | None
    n_classes: int  # 0 with a placeholder
    margin: PairwiseMargin  # as given
    tau: float
    impl: Any
    gather_features: bool = False
    average_over_ranks: bool = False


def read_logits_call(logits: Any, target: Any, prior: Adjustment, options: Options, impl: Any) -> RankCall:
    """The call of a loss of logits. `prior` is a log prior with its tau, or a margin."""
    padded_logits, n_classes = _logits_or_placeholder(logits)
    if n_classes == 0 and _is_floating(target):
        target = _placeholder_if_empty(target, 0.0, checks.class_dim(padded_logits))
    call, checked_tau = _read_with_placeholders(padded_logits, n_classes, prior, target, options, "weight")
    margin = PairwiseMargin() if isinstance(prior, ScaledPrior) else prior
    return RankCall(call, padded_logits, None, None, n_classes, margin, checked_tau, impl)


def read_head_call(
    features: Any, weight: Any, bias: Any, target: Any, prior: Adjustment, options: Options, impl: Any,
    gather_features: Any = False, average_over_ranks: Any = False,
) -> RankCall:  # fmt: skip
    """The call of a loss of a head. `prior` is a log prior with its tau, or a margin."""
    padded_weight = _placeholder_if_empty(weight, 0.0)
    checks.check_classifier(padded_weight)
    n_classes = 0 if padded_weight is not weight else len(padded_weight)
    padded_bias = _placeholder_if_empty(bias, 0.0)
    check_head(features, padded_weight, padded_bias)
    if n_classes == 0 and _is_floating(target):
        target = _placeholder_if_empty(target, 0.0, features.dim() - 1)
    logits, target, target_weight = placeholder_logits(
        features, padded_weight, padded_bias, target, options.target_weight
    )
    options = options._replace(target_weight=target_weight)
    call, checked_tau = _read_with_placeholders(logits, n_classes, prior, target, options, "class_weight")
    margin = PairwiseMargin() if isinstance(prior, ScaledPrior) else prior
    return RankCall(
        call, features, padded_weight, padded_bias, n_classes, margin, checked_tau, impl,
        checks.check_flag("gather_features", gather_features),
        checks.check_flag("average_over_ranks", average_over_ranks),
    )  # fmt: skip


def _read_with_placeholders(
    logits: Tensor, n_classes: int, prior: Adjustment, target: Any, options: Options, weight_name: str
) -> tuple[LossCall, float]:
    """The call, with its placeholder at -inf if there is one, and tau as the caller gave it."""
    is_prior = isinstance(prior, ScaledPrior)
    if is_prior:
        prior = ScaledPrior(_placeholder_if_empty(prior.log_prior, -torch.inf), prior.tau)
    else:
        prior = _margin_or_placeholder(prior, n_classes, logits)
    options = options._replace(
        weight=_placeholder_if_empty(options.weight, 1.0),
        smoothing_distribution=_placeholder_if_empty(options.smoothing_distribution, 0.0),
    )
    call = read_call(logits, prior, target, options, weight_name, all_classes=False)
    return _exclude_placeholder(call, n_classes) if is_prior else call, call.problem.tau


# Placeholders ---------------------------------------------------------------------------------------------------------


def _placeholder_if_empty(tensor: Any, value: float, dim: int = 0) -> Any:
    """A tensor without classes, padded to one class of this value. Anything else is returned, and checked later."""
    if not isinstance(tensor, Tensor) or tensor.dim() <= dim or tensor.shape[dim] > 0:
        return tensor
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1 - dim) + (0, 1), value=value)


def _logits_or_placeholder(logits: Any) -> tuple[Tensor, int]:
    """Checked logits, and the number of classes that this rank has."""
    dim = 0 if isinstance(logits, Tensor) and logits.dim() == 1 else 1
    padded = _placeholder_if_empty(logits, 0.0, dim)
    checks.check_logits(padded)
    return padded, 0 if padded is not logits else padded.shape[dim]


def _is_floating(target: Any) -> bool:
    return isinstance(target, Tensor) and target.is_floating_point()


def _exclude_placeholder(call: LossCall, n_classes: int) -> LossCall:
    """Put the placeholder at -inf if tau * log_prior does not."""
    if n_classes > 0 or (call.problem.log_prior is not None and call.problem.tau > 0.0):
        return call
    problem = call.problem
    excluded = problem.logits.new_full((1,), -torch.inf, dtype=problem.compute_dtype)
    if problem.log_prior is not None:
        excluded = excluded + problem.log_prior  # so that a learned prior gets a gradient, of no classes
    return call._replace(problem=problem._replace(log_prior=excluded, tau=1.0))


def _margin_or_placeholder(margin: Any, n_classes: int, logits: Tensor) -> Any:
    if n_classes > 0 or not isinstance(margin, PairwiseMargin):
        return margin
    fills = {"negative_offset": -torch.inf, "target_offset": 0.0, "alpha": 1.0, "scale": 1.0}
    padded = margin.mapped(lambda name, value: _placeholder_if_empty(value, fills[name]))
    if padded.negative_offset is None:
        excluded = logits.new_full((1,), -torch.inf, dtype=torch.promote_types(logits.dtype, torch.float32))
        object.__setattr__(padded, "negative_offset", excluded)
        if margin.offsets_are_equal:
            object.__setattr__(padded, "target_offset", excluded)
    return padded
