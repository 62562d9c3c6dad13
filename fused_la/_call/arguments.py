"""The arguments that every loss takes: checked, and brought into rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_la._call import checks
from fused_la._call.pairwise_margin import PairwiseMargin, checked_margin
from fused_la._call.problem import Problem, rows_by_classes


class Call(NamedTuple):
    """A checked call of a loss, and the caller's own tensors whose gradients are the reference's alone."""

    problem: Problem
    reduction: str
    of_target: tuple[Tensor | None, ...]
    of_margin: tuple[Tensor, ...]


def read_prior(log_prior: Any, tau: Any, logits: Tensor, whole: bool = True) -> tuple[Tensor | None, float]:
    """The log prior as implementations take it, and tau; with tau = 0 no class is out, and there is nothing to add.

    Of classes that are not the `whole`, all may be at -inf.
    """
    tau = checks.check_tau(tau)
    checks.check_log_prior(log_prior, logits, tau, whole=whole)
    if tau > 0.0:
        kept = torch.compiler.is_compiling() or not log_prior.is_inference()  # autograd keeps no inference tensor
        return in_order(log_prior) if kept else log_prior.clone(), tau
    return log_prior.masked_fill(log_prior == -torch.inf, 0.0) if log_prior.requires_grad else None, tau


def read_margin(margin: Any, logits: Tensor) -> Tensor | None:
    """The negative offset of a margin that fits the logits."""
    for name, vector in checked_margin(margin).named_vectors():
        checks.check_class_vector(f"margin.{name}", vector, logits.shape[checks.class_dim(logits)], logits)
        checks.check_device(f"margin.{name}", vector, logits)
    return None if margin.negative_offset is None else in_order(margin.negative_offset)


def read_call(
    logits: Tensor,
    offset: Tensor | None,
    tau: float,
    margin: PairwiseMargin | None,
    target: Any,
    target_weight: Any,
    weight: Any,
    ignore_index: Any,
    reduction: Any,
    label_smoothing: Any,
    smoothing_distribution: Any,
    weight_name: str = "weight",
    whole: bool = True,
) -> Call:
    """A call with checked logits and tau * offset as the margin's negative offset, None if it is all there is of a
    margin; `weight_name` is the caller's.

    Where the logits are not of the `whole` of the classes, what it takes all of them to know is not checked: whether
    labels are in range, and whether smoothing_distribution adds up to 1. Rows are (N, P, C) then.
    """
    label_smoothing = checks.check_label_smoothing(label_smoothing)
    ignore_index = checks.check_ignore_index(ignore_index)
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.check_target(target, target_weight, logits, ignore_index, whole)
    n_classes = logits.shape[checks.class_dim(logits)]
    if target.dtype is torch.uint8:
        target = target.long()
    if weight is not None:
        checks.check_class_vector(weight_name, weight, n_classes, logits)
        checks.check_device(weight_name, weight, logits)
    if smoothing_distribution is not None:
        if whole:
            smoothing_distribution = checks.check_smoothing_distribution(smoothing_distribution, n_classes)
        else:
            checks.check_class_vector("smoothing_distribution", smoothing_distribution, n_classes)
        checks.check_device("smoothing_distribution", smoothing_distribution, logits)

    of_target = (target, target_weight, weight, smoothing_distribution)
    mass = weight = None if weight is None else in_order(weight)
    if margin is not None and margin.alpha is not None:
        wide = torch.promote_types(logits.dtype, torch.float32)
        mass = margin.alpha if weight is None else margin.alpha.to(wide) * weight
        if target.is_floating_point() or target_weight is not None or smoothing_distribution is not None:
            # A class without examples has alpha = inf, and a target may ask for 0 of it: nothing, not 0 * inf.
            mass = mass.clamp_max(min(torch.finfo(mass.dtype).max, torch.finfo(torch.float32).max))
    problem = Problem(
        _rows(logits),
        offset,
        _rows(target) if target.is_floating_point() else _label_rows(target, logits),
        None if target_weight is None else _label_rows(target_weight, logits),
        None if mass is None else mass.contiguous(),
        weight,
        None if smoothing_distribution is None else in_order(smoothing_distribution),
        None if margin is None else margin.label_offset(logits),
        None if margin is None else margin.scale_of(logits),
        tau,
        label_smoothing,
        ignore_index,
    )
    problem = problem if whole else problem.with_inner()
    return Call(problem, reduction, of_target, () if margin is None else tuple(margin.only_of_reference()))


def _rows(values: Tensor) -> Tensor:
    values = values.resolve_neg()
    return values if values.dim() == 2 else rows_by_classes(values)


def _label_rows(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels or their weights as contiguous (N,) or (N, K) for logits (N, C), and else (N, P, K)."""
    if logits.dim() == 2:
        return in_order(labels)
    labels = labels.resolve_neg()
    if labels.dim() < logits.dim():
        labels = labels.unsqueeze(checks.class_dim(logits))
    return rows_by_classes(labels).contiguous()


def in_order(values: Tensor) -> Tensor:
    """Values as they are read from memory: without gaps, and a lazy negation (`x.conj().imag`) carried out."""
    return values.resolve_neg().contiguous()
