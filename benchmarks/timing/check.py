"""Relative errors of a loss and its gradients against float64, and their limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.timing.cases import Batch

BLOCK = {"cpu": 2**21, "cuda": 2**24}  # elements converted to float64 at a time


class Errors(NamedTuple):
    """Relative errors.

    `row` finds a few wrong rows, which would not show in the whole gradient. Heads have 0 there: their gradients are
    sums over rows.
    """

    loss: float  # |loss - exact| / |exact|
    gradient: float  # the largest ||gradient - exact|| / ||exact|| of all inputs
    row: float  # the largest ||gradient - exact|| of one row of logits, over the root mean square of ||exact|| of rows


EXACT = Errors(0.0, 0.0, 0.0)


def errors(
    leaves: Sequence[Tensor],
    offset: Tensor | None,
    batch: Batch,
    loss: Tensor,
    gradients: Sequence[Tensor],
    upstream: float = 1.0,
) -> Errors:
    """Errors of a loss and of the gradients of upstream * loss with respect to `leaves`.

    The exact values are computed in float64, with the offset added to the logits.
    """
    offset = torch.zeros_like(batch.log_prior) if offset is None else offset
    with torch.no_grad():
        if len(leaves) == 1:
            return _logits_errors(leaves[0], offset.double(), batch, loss, gradients[0], upstream)
        return _head_errors(leaves, offset.double(), batch, loss, gradients, upstream)


def _probabilities(batch: Batch, rows: slice, n_classes: int) -> Tensor:
    """Any kind of target as (rows, C) float64 probabilities."""
    target = batch.target[rows]
    if target.is_floating_point():
        return target.double()
    dense = torch.zeros(len(target), n_classes, dtype=torch.float64, device=target.device)
    shares = torch.ones_like(target, dtype=torch.float64) if batch.shares is None else batch.shares[rows].double()
    return dense.scatter_add_(1, target.view(len(target), -1), shares.view(len(target), -1))


def _logits_errors(
    logits: Tensor, offset: Tensor, batch: Batch, loss: Tensor, gradient: Tensor, upstream: float
) -> Errors:
    n_rows, n_classes = logits.shape
    step = max(1, BLOCK[logits.device.type] // n_classes)
    exact_loss, squared_error, squared_norm, worst_row = logits.new_zeros(4, dtype=torch.float64)
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        log_p = (logits[rows].double() + offset).log_softmax(1)
        target = _probabilities(batch, rows, n_classes)
        exact_loss -= (target * log_p).sum() / n_rows
        exact = (log_p.exp() * target.sum(1, keepdim=True) - target) * (upstream / n_rows)
        row_errors = (gradient[rows].double() - exact).square().sum(1)
        squared_error += row_errors.sum()
        worst_row = torch.maximum(worst_row, row_errors.max())  # NaN if any row's error is
        squared_norm += exact.square().sum()
    relative = (squared_error / squared_norm).sqrt(), (worst_row / (squared_norm / n_rows)).sqrt()
    return Errors(float((loss.double() / exact_loss - 1).abs()), *map(float, relative))


def _head_errors(
    leaves: Sequence[Tensor], offset: Tensor, batch: Batch, loss: Tensor, gradients: Sequence[Tensor], upstream: float
) -> Errors:
    features, weight, bias = leaves
    grad_features, grad_weight, grad_bias = gradients
    exact_features = features.double()
    step = max(1, BLOCK[weight.device.type] // weight.shape[1])
    chunks = [slice(start, start + step) for start in range(0, len(weight), step)]
    log_p = torch.empty(len(features), len(weight), dtype=torch.float64, device=weight.device)
    for chunk in chunks:
        log_p[:, chunk] = exact_features @ weight[chunk].double().T
    log_p = log_p.add_(bias.double() + offset).log_softmax(1)
    target = _probabilities(batch, slice(None), len(weight))
    exact_loss = -(target * log_p).sum() / len(features)
    exact = log_p.exp_().sub_(target).mul_(upstream / len(features))  # with respect to the logits
    squared_error, squared_norm = weight.new_zeros(2, dtype=torch.float64)
    exact_grad_features = torch.zeros_like(exact_features)
    for chunk in chunks:
        exact_grad_features += exact[:, chunk] @ weight[chunk].double()
        exact_grad_weight = exact[:, chunk].T @ exact_features
        squared_error += (grad_weight[chunk].double() - exact_grad_weight).square().sum()
        squared_norm += exact_grad_weight.square().sum()
    others = ((grad_features, exact_grad_features), (grad_bias, exact.sum(0)))
    relative = [
        (squared_error / squared_norm).sqrt(),
        *((got.double() - want).norm() / want.norm() for got, want in others),
    ]
    return Errors(float((loss.double() / exact_loss - 1).abs()), max(map(float, relative)), 0.0)


def error_limits(dtype: torch.dtype, rounds_loss: bool, eager_errors: Errors = EXACT) -> Errors:
    """Limits of the errors: float32 arithmetic, then a gradient (and with `rounds_loss` the loss) rounded to the dtype.

    Eager's float32 loss and gradient have relative errors of 1e-5 over 1,048,576 classes. A row may have 4 times the
    error of the whole gradient. Matrix products of a head round too, so its limits grow by twice the errors of the
    eager head on the same input.
    """
    eps = torch.finfo(dtype).eps
    gradient = 2e-5 + eps
    return Errors(
        2e-5 + 2 * eps * rounds_loss + 2 * eager_errors.loss, gradient + 2 * eager_errors.gradient, 4 * gradient
    )
