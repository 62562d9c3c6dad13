"""The specification: the loss and its gradient as plain PyTorch, one line an equation.

With m = max_c z_c, j one class that attains it, and everything else kept relative to it,

    rest  = sum_{c != j} exp(z_c - m)                  never 1 + rest: a confident row lives in rest
    nll_c = (m - z_c) + log1p(rest)                    = -log softmax(z)_c
    p_c   = exp(z_c - m) / (1 + rest)                  1 - p_j = rest / (1 + rest)
    loss  = sum_c t_c * nll_c
    dloss/dz_c = (A - t_c) * p_c - t_c * (1 - p_c),    A = sum_c t_c

No term cancels against another of its own size, so a row with p_y -> 1 keeps all its digits.
Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 10.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_la._problem import Problem, read_labels


class _Row(NamedTuple):
    z: Tensor  # (N, P, C) adjusted logits
    m: Tensor  # (N, P, 1) their maximum
    is_top: Tensor  # (N, P, C) bool: one class that attains it, j
    e: Tensor  # (N, P, C) exp(z - m)
    rest: Tensor  # (N, P, 1)


def _row(problem: Problem, live: Tensor | None) -> _Row:
    z = problem.logits.to(problem.compute_dtype)
    offset = problem.offset()
    if offset is not None:
        z = torch.where(offset == -math.inf, -math.inf, z + offset)
    if live is not None:  # whatever stands in a row that does not count, it must not reach a product with 0
        z = torch.where(live.unsqueeze(-1), z, 0.0)
    top = z.detach().argmax(-1, keepdim=True)
    is_top = torch.arange(z.shape[-1], device=z.device) == top
    m = z.gather(-1, top)
    e = (z - m).exp()
    rest = torch.where(is_top, 0.0, e).sum(-1, keepdim=True)
    return _Row(z, m, is_top, e, rest + (m - m).detach())  # an infinite maximum makes the row NaN


def _weigh(mass: Tensor, nll: Tensor) -> Tensor:
    """mass * nll, where no mass on an impossible class costs nothing."""
    return mass * torch.where((mass == 0) & (nll == math.inf), 0.0, nll)


def loss_rows(problem: Problem) -> tuple[Tensor, Tensor]:
    """The loss of every row and its weight in a mean, both (N, P); differentiable to any order in every tensor.

    Equivalent to: `F.cross_entropy(logits + tau * log_prior, target, reduction="none", ...)`, row by row.
    """
    labels = None if problem.has_probabilities else read_labels(problem)
    row = _row(problem, None if labels is None else labels.live)
    # The gap of class j is 0 by definition, not z_j - z_j, whose two gradients would swamp that of log1p.
    nll = torch.where(row.is_top, 0.0, row.m - row.z) + row.rest.log1p()
    if labels is None:
        return _weigh(_probability_mass(problem), nll).sum(-1), torch.ones_like(row.m[..., 0])
    loss = _weigh(labels.mass, nll.gather(-1, labels.classes)).sum(-1)
    smoothing = problem.smoothing_mass()
    if smoothing is not None:
        loss = loss + labels.share * _weigh(smoothing, nll).sum(-1)
    return torch.where(labels.live, loss, 0.0), labels.row_weight


def gradient(problem: Problem, grad_rows: Tensor) -> Tensor:
    """d(sum grad_rows * loss)/dz, (N, P, C), in closed form; itself differentiable in logits, log_prior, grad_rows.

    It serves the second derivatives of the fused implementations.
    """
    labels = None if problem.has_probabilities else read_labels(problem)
    row = _row(problem, None if labels is None else labels.live)
    if labels is None:
        mass = _probability_mass(problem)
    else:
        smoothing = problem.smoothing_mass()
        mass = torch.zeros_like(row.z) if smoothing is None else labels.share.unsqueeze(-1) * smoothing
        mass = mass.scatter_add(-1, labels.classes, labels.mass)
    total = mass.sum(-1, keepdim=True)
    d = 1.0 + row.rest
    p = row.e / d
    not_p = torch.where(row.is_top, row.rest / d, 1.0 - p)
    grad = grad_rows.unsqueeze(-1) * ((total - mass) * p - mass * not_p)
    offset = problem.offset()
    if offset is not None:
        grad = torch.where(offset == -math.inf, 0.0, grad)
    return grad if labels is None else torch.where(labels.live.unsqueeze(-1), grad, 0.0)


def _probability_mass(problem: Problem) -> Tensor:
    """t, (N, P, C), of a target of class probabilities."""
    mass = problem.target.to(problem.compute_dtype) * (1.0 - problem.label_smoothing)
    weight = problem.class_weight()
    mass = mass if weight is None else mass * weight
    smoothing = problem.smoothing_mass()
    return mass if smoothing is None else mass + smoothing
