"""The specification: the loss and its gradient as plain PyTorch, one line an equation.

With m = max_c z_c, j one class that attains it, and everything else kept relative to it,

    rest  = sum_{c != j} exp(z_c - m)                  never 1 + rest: a confident row lives in rest
    nll_c = (m - z_c) + log1p(rest)                    = -log softmax(z)_c
    p_c   = exp(z_c - m) / (1 + rest)                  1 - p_j = rest / (1 + rest)
    loss  = sum_c t_c * nll_c
    dloss/dz_c = (A - t_c) * p_c - t_c * (1 - p_c),    A = sum_c t_c

No term cancels against another of its own size, so a row with p_y -> 1 keeps all its digits.
With a target_offset the loss of label c, whose logit is then y_c, is log1p(others_c * exp(m - y_c)). The sum over its
other classes is others_j = rest for class j, and otherwise others_c = 1 + rest - exp(z_c - m), which is at least 1.
With a label_scale each label has a row of its own, whose logits are multiplied by the label's scale.

Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 10.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_la._call.problem import Problem, label_loss, resolve_labels

# A sum to a single number of at least this length is split over a CPU's threads (PyTorch's at::internal::GRAIN_SIZE).
_SPLIT = 1 << 15


class _Row(NamedTuple):
    z: Tensor  # (N, P, C) adjusted logits
    m: Tensor  # (N, P, 1) their maximum
    is_top: Tensor  # (N, P, C) bool: one class that attains it, j
    excluded: Tensor | None  # (C,) or (N, P, C) bool: at log_prior = -inf
    e: Tensor  # (N, P, C) exp(z - m)
    rest: Tensor  # (N, P, 1)


def _in_order(problem: Problem) -> Problem:
    """The problem contiguous in memory, and a single wide row as two equal ones, so that every sum runs along one row.

    Otherwise the bits of a row, and of its gradients, which autograd sums, would depend on the rows around it.
    """
    n_outer, n_inner, n_classes = problem.logits.shape
    if n_outer * n_inner == 1 and n_classes >= _SPLIT:
        rows = {"logits": problem.logits, "target": problem.target, "target_weight": problem.target_weight,
                "prior_index": problem.prior_index}  # fmt: skip
        problem = problem._replace(**{
            name: None if value is None else value.expand(2, *value.shape[1:]) for name, value in rows.items()
        })  # fmt: skip
    return problem._replace(logits=problem.logits.contiguous(), target=problem.target.contiguous())


def _row(problem: Problem, live: Tensor | None) -> _Row:
    z = problem.scaled_logits()
    offset, excluded = problem.for_rows(problem.offset()), None
    if offset is not None:
        excluded = offset == -math.inf
        excluded = excluded & ~excluded.all(-1, keepdim=True)  # a prior without a class must not leave a gradient of 0
        z = torch.where(excluded, -math.inf, z + offset)
    if problem.prior_index is not None:  # a group out of range makes the row NaN
        z = z + torch.where(problem.groups()[1], 0.0, math.nan).unsqueeze(-1)
    if live is not None:  # NaN or inf in a row that does not count must not meet a factor of 0
        z = torch.where(live.unsqueeze(-1), z, 0.0)
    top = z.detach().argmax(-1, keepdim=True)
    is_top = torch.arange(z.shape[-1], device=z.device) == top
    m = z.gather(-1, top)
    e = (z - m).exp()
    rest = torch.where(is_top, 0.0, e).sum(-1, keepdim=True)
    return _Row(z, m, is_top, excluded, e, rest + (m - m).detach())  # an infinite maximum makes the row NaN


def _weigh(mass: Tensor, nll: Tensor) -> Tensor:
    """mass * nll, which is 0 for a class without mass even if its nll is infinite."""
    return mass * torch.where((mass == 0) & (nll == math.inf), 0.0, nll)


def _nll(problem: Problem, row: _Row, live: Tensor | None) -> Tensor:
    """The loss of each class as the label, (N, P, C), without a label_scale."""
    target_offset = problem.computed(problem.target_offset)
    if target_offset is None:
        # The gap of class j is 0 by definition, not z_j - z_j, whose two gradients would swamp that of log1p.
        return torch.where(row.is_top, 0.0, row.m - row.z) + row.rest.log1p()
    as_label = problem.scaled_logits() + target_offset
    if live is not None:
        as_label = torch.where(live.unsqueeze(-1), as_label, 0.0)
    return label_loss(row.m - as_label, torch.where(row.is_top, row.rest, 1.0 + row.rest - row.e))


def _nll_by_label_scale(problem: Problem, classes: Tensor | None, live: Tensor | None) -> Tensor:
    """The loss of the `classes` (N, P, K), or of every class, as the label under a label_scale."""
    scale = problem.computed(problem.label_scale)
    assert scale is not None
    if classes is None:
        classes = torch.arange(len(scale), device=scale.device).expand(problem.logits.shape)
    n_outer, n_inner, n_labels = classes.shape

    def repeated(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.repeat_interleave(n_labels, 1)

    rows = problem._replace(
        logits=(problem.logits.to(problem.compute_dtype).unsqueeze(2) * scale[classes].unsqueeze(-1)).flatten(1, 2),
        prior_index=repeated(problem.prior_index), label_scale=None,
    )  # fmt: skip
    live = repeated(live)
    nll = _nll(rows, _row(rows, live), live)
    return nll.gather(-1, classes.reshape(n_outer, n_inner * n_labels, 1)).view(classes.shape)


def loss_rows(problem: Problem) -> tuple[Tensor, Tensor]:
    """The loss of every row and its weight in a mean, both (N, P); differentiable to any order in every tensor.

    Equivalent to: `F.cross_entropy(logits + tau * log_prior, target, reduction="none", ...)`, row by row.
    """
    problem, n_outer = _in_order(problem), problem.logits.shape[0]
    labels = None if problem.has_probabilities else resolve_labels(problem)
    live, smoothing = None if labels is None else labels.live, problem.for_rows(problem.smoothing_mass())
    only_labels = None if labels is None or smoothing is not None else labels.classes
    if problem.label_scale is None:
        nll, only_labels = _nll(problem, _row(problem, live), live), None
    else:
        nll = _nll_by_label_scale(problem, only_labels, live)
    if labels is None:
        loss = _weigh(_probability_mass(problem), nll).sum(-1)
        return loss[:n_outer], torch.ones_like(loss[:n_outer])
    loss = _weigh(labels.mass, nll if only_labels is not None else nll.gather(-1, labels.classes)).sum(-1)
    if smoothing is not None:
        loss = loss + labels.share * _weigh(smoothing, nll).sum(-1)
    return torch.where(labels.live, loss, 0.0)[:n_outer], labels.row_weight[:n_outer]


def gradient(problem: Problem, grad_rows: Tensor) -> Tensor:
    """d(sum grad_rows * loss)/dz, (N, P, C), in closed form, which is differentiable in logits, log_prior, grad_rows.

    The fused implementations use it for second derivatives, of problems without a target_offset or a label_scale.
    """
    problem, n_outer = _in_order(problem), problem.logits.shape[0]
    labels = None if problem.has_probabilities else resolve_labels(problem)
    row = _row(problem, None if labels is None else labels.live)
    if labels is None:
        mass = _probability_mass(problem)
    else:
        smoothing = problem.for_rows(problem.smoothing_mass())
        mass = torch.zeros_like(row.z) if smoothing is None else labels.share.unsqueeze(-1) * smoothing
        mass = mass.scatter_add(-1, labels.classes, labels.mass)
    total = mass.sum(-1, keepdim=True)
    d = 1.0 + row.rest
    p = row.e / d
    not_p = torch.where(row.is_top, row.rest / d, 1.0 - p)
    grad_rows = grad_rows.expand(row.z.shape[:2])  # first, so that a sum over classes gives a number a row
    grad = grad_rows.unsqueeze(-1) * ((total - mass) * p - mass * not_p)
    if row.excluded is not None:
        grad = torch.where(row.excluded, 0.0, grad)
    return (grad if labels is None else torch.where(labels.live.unsqueeze(-1), grad, 0.0))[:n_outer]


def _probability_mass(problem: Problem) -> Tensor:
    """t, (N, P, C), of a target of class probabilities."""
    mass = problem.target.to(problem.compute_dtype) * (1.0 - problem.label_smoothing)
    weight = problem.computed(problem.weight)
    mass = mass if weight is None else mass * weight
    smoothing = problem.for_rows(problem.smoothing_mass())
    return mass if smoothing is None else mass + smoothing
