"""Errors of a loss and its gradient against float64, and how large they may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.timing.cases import Batch

BLOCK = {"cpu": 2**21, "cuda": 2**24}  # elements that are float64 at a time


class Errors(NamedTuple):
    """Relative: |loss - exact| / |exact|; of the gradients the largest ||gradient - exact|| / ||exact||; and of the one
    row of logits whose gradient is off most, as a part of a row as they are (root of the mean square): a few wrong
    rows would not show in the gradient as a whole. It is 0 of a head, whose gradients are sums.
    """

    loss: float
    gradient: float
    row: float


EXACT = Errors(0.0, 0.0, 0.0)


def errors(
    leaves: Sequence[Tensor],
    offset: Tensor | None,
    batch: Batch,
    loss: Tensor,
    gradients: Sequence[Tensor],
    upstream: float = 1.0,
) -> Errors:
    """Of a loss and the gradients of upstream * loss with respect to leaves, the offset added to the logits in
    float64."""
    offset = torch.zeros_like(batch.log_prior) if offset is None else offset
    with torch.no_grad():
        if len(leaves) == 1:
            return _errors_of_logits(leaves[0], offset.double(), batch, loss, gradients[0], upstream)
        return _errors_of_head(leaves, offset.double(), batch, loss, gradients, upstream)


def _probabilities(batch: Batch, rows: slice, n_classes: int) -> Tensor:
    """(rows, C) float64 of any kind of target."""
    target = batch.target[rows]
    if target.is_floating_point():
        return target.double()
    dense = torch.zeros(len(target), n_classes, dtype=torch.float64, device=target.device)
    shares = torch.ones_like(target, dtype=torch.float64) if batch.shares is None else batch.shares[rows].double()
    return dense.scatter_add_(1, target.view(len(target), -1), shares.view(len(target), -1))


def _errors_of_logits(
    logits: Tensor, offset: Tensor, batch: Batch, loss: Tensor, gradient: Tensor, upstream: float
) -> Errors:
    n_rows, n_classes = logits.shape
    step = max(1, BLOCK[logits.device.type] // n_classes)
    exact_loss, wrong, size, worst = logits.new_zeros(4, dtype=torch.float64)
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        log_p = (logits[rows].double() + offset).log_softmax(1)
        target = _probabilities(batch, rows, n_classes)
        exact_loss -= (target * log_p).sum() / n_rows
        exact = (log_p.exp() * target.sum(1, keepdim=True) - target) * (upstream / n_rows)
        wrong_rows = (gradient[rows].double() - exact).square().sum(1)
        wrong += wrong_rows.sum()
        worst = torch.maximum(worst, wrong_rows.max())  # NaN where any is
        size += exact.square().sum()
    relative = (wrong / size).sqrt(), (worst / (size / n_rows)).sqrt()
    return Errors(float((loss.double() / exact_loss - 1).abs()), *map(float, relative))


def _errors_of_head(
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
    wrong, size = weight.new_zeros(2, dtype=torch.float64)
    exact_grad_features = torch.zeros_like(exact_features)
    for chunk in chunks:
        exact_grad_features += exact[:, chunk] @ weight[chunk].double()
        exact_grad_weight = exact[:, chunk].T @ exact_features
        wrong += (grad_weight[chunk].double() - exact_grad_weight).square().sum()
        size += exact_grad_weight.square().sum()
    others = ((grad_features, exact_grad_features), (grad_bias, exact.sum(0)))
    relative = [(wrong / size).sqrt(), *((got.double() - want).norm() / want.norm() for got, want in others)]
    return Errors(float((loss.double() / exact_loss - 1).abs()), max(map(float, relative)), 0.0)


def allowed(dtype: torch.dtype, rounds_loss: bool, of_eager: Errors = EXACT) -> Errors:
    """Float32 in between, a gradient rounded to the dtype of the inputs, and where that is said the loss as well.

    Eager's float32 loss and gradient are off by 1e-5 of themselves over 1,048,576 classes; a row may be off by 4 times
    what all are together. A head adds what its matrix products round: twice the errors of the eager head on the same
    input.
    """
    eps = torch.finfo(dtype).eps
    gradient = 2e-5 + eps
    return Errors(2e-5 + 2 * eps * rounds_loss + 2 * of_eager.loss, gradient + 2 * of_eager.gradient, 4 * gradient)
