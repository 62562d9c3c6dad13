"""The arguments of a loss: they are checked and become a `LossCall`, whose `Problem` has them as rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_la._call import checks
from fused_la._call.pairwise_margin import PairwiseMargin, checked_margin
from fused_la._call.problem import Problem, rows_by_classes


class Options(NamedTuple):
    """The keyword arguments that all losses share, as the caller gave them."""

    target_weight: Any
    weight: Any  # of classes; a head calls it class_weight
    ignore_index: Any
    reduction: Any
    label_smoothing: Any
    smoothing_distribution: Any


class ScaledPrior(NamedTuple):
    """A log prior, its tau, and the group of each row if there is a prior for each, as the caller gave them."""

    log_prior: Any
    tau: Any
    group: Any = None


Adjustment = ScaledPrior | PairwiseMargin  # the two ways in which losses adjust logits


class LossCall(NamedTuple):
    """A checked call of a loss, and the caller's own tensors whose gradients only the reference computes."""

    problem: Problem
    reduction: str
    target_tensors: tuple[Tensor | None, ...]
    margin_tensors: tuple[Tensor, ...]


def read_call(
    logits: Tensor, prior: Adjustment, target: Any, options: Options, weight_name: str = "weight",
    all_classes: bool = True,
) -> LossCall:  # fmt: skip
    """A call with checked logits. A `prior` that is no `ScaledPrior` is checked to be a margin.

    `weight_name` is the caller's name of the class weights. If the logits do not have `all_classes`, nothing is checked
    that needs all of them, the range of labels and the sum of smoothing_distribution, and rows are (N, P, C).
    """
    is_prior = isinstance(prior, ScaledPrior)
    margin = None if is_prior else checked_margin(prior)
    group = prior.group if is_prior else None
    if group is not None:
        dim = checks.class_dim(logits)
        group = checks.rows_of_groups(group, logits.shape[:dim] + logits.shape[dim + 1 :], logits)
        if not torch.compiler.is_compiling() and group.is_inference():  # autograd keeps no inference tensor
            group = group.clone()
    offset, tau = _read_prior(prior, logits, all_classes) if is_prior else _read_margin(prior, logits)
    target_weight, weight, ignore_index, reduction, label_smoothing, smoothing_distribution = options
    label_smoothing = checks.check_label_smoothing(label_smoothing)
    ignore_index = checks.check_ignore_index(ignore_index)
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.check_target(target, target_weight, logits, ignore_index, all_classes)
    n_classes = logits.shape[checks.class_dim(logits)]
    if target.dtype is torch.uint8:
        target = target.long()
    if weight is not None:
        checks.check_class_vector(weight_name, weight, n_classes, logits)
        checks.check_device(weight_name, weight, logits)
    if smoothing_distribution is not None:
        by_group = group is not None and getattr(smoothing_distribution, "ndim", 1) > 1
        if all_classes:
            smoothing_distribution = checks.check_smoothing_distribution(smoothing_distribution, n_classes, by_group)
        else:
            checks.check_class_vector("smoothing_distribution", smoothing_distribution, n_classes)
        checks.check_device("smoothing_distribution", smoothing_distribution, logits)

    if group is not None and offset is not None:
        checks.check_groups_in_range(group, len(offset), target, ignore_index)
        if smoothing_distribution is not None:
            if smoothing_distribution.dim() == 2 and len(smoothing_distribution) != len(offset):
                raise ValueError(
                    f"smoothing_distribution must have a row for each of the {len(offset)} rows of log_prior, or shape "
                    f"({n_classes},), got {tuple(smoothing_distribution.shape)}"
                )
            smoothing_distribution = smoothing_distribution.expand(offset.shape)

    target_tensors = (target, target_weight, weight, smoothing_distribution)
    mass = weight = None if weight is None else contiguous_values(weight)
    if margin is not None and margin.alpha is not None:
        wide = torch.promote_types(logits.dtype, torch.float32)
        mass = margin.alpha if weight is None else margin.alpha.to(wide) * weight
        if target.is_floating_point() or target_weight is not None or smoothing_distribution is not None:
            # A class without examples has alpha = inf, and its target mass may be 0: that gives 0, not 0 * inf.
            mass = mass.clamp_max(min(torch.finfo(mass.dtype).max, torch.finfo(torch.float32).max))
    problem = Problem(
        _rows(logits), offset, _rows(target) if target.is_floating_point() else _label_rows(target, logits),
        None if target_weight is None else _label_rows(target_weight, logits),
        None if group is None else _group_rows(group, logits),
        None if mass is None else mass.contiguous(), weight,
        None if smoothing_distribution is None else contiguous_values(smoothing_distribution),
        None if margin is None else margin.label_offset(logits), None if margin is None else margin.scale_of(logits),
        None if margin is None or margin.label_scale is None else contiguous_values(margin.label_scale),
        tau, label_smoothing, ignore_index,
    )  # fmt: skip
    problem = problem if all_classes else problem.as_3d()
    return LossCall(problem, reduction, target_tensors, () if margin is None else tuple(margin.only_of_reference()))


def _read_prior(prior: ScaledPrior, logits: Tensor, all_classes: bool) -> tuple[Tensor | None, float]:
    """The log prior as implementations take it, and tau; with tau = 0 no class is excluded and nothing is added.

    A prior that does not have `all_classes` may be -inf throughout.
    """
    log_prior, tau, by_group = prior.log_prior, checks.check_tau(prior.tau), prior.group is not None
    checks.check_log_prior(log_prior, logits, tau, all_classes=all_classes, by_group=by_group if all_classes else None)
    if tau > 0.0:
        kept = torch.compiler.is_compiling() or not log_prior.is_inference()  # autograd keeps no inference tensor
        return contiguous_values(log_prior) if kept else log_prior.clone(), tau
    if log_prior.requires_grad or by_group:  # by group its shape says how many there are
        return contiguous_values(log_prior.masked_fill(log_prior == -torch.inf, 0.0)), tau
    return None, tau


def _read_margin(margin: PairwiseMargin, logits: Tensor) -> tuple[Tensor | None, float]:
    """The negative offset of a margin that fits the logits, and its factor tau, 1."""
    for name, vector in margin.named_vectors():
        checks.check_class_vector(f"margin.{name}", vector, logits.shape[checks.class_dim(logits)], logits)
        checks.check_device(f"margin.{name}", vector, logits)
    return None if margin.negative_offset is None else contiguous_values(margin.negative_offset), 1.0


def _rows(values: Tensor) -> Tensor:
    values = values.resolve_neg()
    return values if values.dim() == 2 else rows_by_classes(values)


def _label_rows(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels or their weights as contiguous (N,) or (N, K) for logits (N, C), and else (N, P, K)."""
    if logits.dim() == 2:
        return contiguous_values(labels)
    labels = labels.resolve_neg()
    if labels.dim() < logits.dim():
        labels = labels.unsqueeze(checks.class_dim(logits))
    return rows_by_classes(labels).contiguous()


def _group_rows(group: Tensor, logits: Tensor) -> Tensor:
    """The groups of rows as contiguous (N,) for logits (N, C), and else (N, P)."""
    rows = _label_rows(group, logits)
    return rows if logits.dim() == 2 else rows.squeeze(-1)


def contiguous_values(values: Tensor) -> Tensor:
    """The values contiguous in memory, with a lazy negation (as of `x.conj().imag`) carried out."""
    return values.resolve_neg().contiguous()
