"""The loss and its gradient from the paper's formula, in extended precision and without a line of the package.

    loss = sum_c t_c * log(sum_k exp(z_k - z_c)),    dloss/dz_c = sum_{k != c} (t_k * p_c - t_c * p_k)

NumPy's longdouble has a mantissa of 64 bits or more on Linux: errors of cancellation here are far below float32 and
float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Truth(NamedTuple):
    loss: Tensor  # float64, reduced
    grad_logits: Tensor  # float64, of the shape of logits
    grad_log_prior: Tensor  # float64, of the shape of log_prior


def _exact(x: Tensor | None) -> np.ndarray | None:
    return None if x is None else x.detach().cpu().double().numpy().astype(np.longdouble)


def truth(
    logits: Tensor,
    target: Tensor,
    log_prior: Tensor,
    tau: float = 1.0,
    *,
    group: Tensor | None = None,
    target_weight: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing_distribution: Tensor | None = None,
    grad_loss: Tensor | float = 1.0,
) -> Truth:
    """The loss and both gradients of a call, for its inputs as they are (half-precision values count as exact)."""
    dim = 0 if logits.dim() == 1 else 1
    x = np.moveaxis(_exact(logits), dim, -1)
    n_classes = x.shape[-1]
    row_shape = x.shape[:-1]
    x = x.reshape(-1, n_classes)
    groups = np.zeros(len(x), dtype=int) if group is None else group.cpu().numpy().reshape(-1)
    prior = _exact(log_prior).reshape(-1, n_classes)[groups]  # (rows, C), like q
    excluded = prior == -np.inf if tau > 0 else np.zeros(prior.shape, dtype=bool)
    with np.errstate(all="ignore"):
        z = np.where(excluded, -np.inf, x + np.longdouble(tau) * np.where(excluded, 0, prior))
    q = (
        np.full(n_classes, np.longdouble(1) / n_classes)
        if smoothing_distribution is None
        else _exact(smoothing_distribution)
    )
    q = np.broadcast_to(q, (1 + groups.max(initial=0), n_classes))[groups] if q.ndim == 1 else q[groups]
    w = np.ones(n_classes, dtype=np.longdouble) if weight is None else _exact(weight)
    eps = np.longdouble(label_smoothing)

    # t (rows, C), whether a row counts, and its weight in a mean
    t = np.zeros_like(z)
    if target.is_floating_point():
        probabilities = np.moveaxis(_exact(target), dim, -1).reshape(-1, n_classes)
        t = w * ((1 - eps) * probabilities + eps * q)
        live = np.ones(len(z), dtype=bool)
        row_weight = np.ones(len(z), dtype=np.longdouble)
    else:
        labels = target.cpu().numpy()
        if target_weight is None:
            labels = labels.reshape(-1, 1)
            shares = np.ones(labels.shape, dtype=np.longdouble)
        else:
            labels = np.moveaxis(labels, dim, -1).reshape(len(z), -1)
            shares = np.moveaxis(_exact(target_weight), dim, -1).reshape(len(z), -1)
        live = (labels != ignore_index).any(1)
        row_weight = np.zeros(len(z), dtype=np.longdouble)
        for row, (row_labels, row_shares) in enumerate(zip(labels, shares, strict=True)):
            counting = [(y, s) for y, s in zip(row_labels, row_shares, strict=True) if y != ignore_index]
            for y, share in counting:
                t[row] += share * w * eps * q[row]
                t[row, y] += share * w[y] * (1 - eps)
            share_sum = sum(s for _, s in counting)
            if counting and share_sum != 0:
                row_weight[row] = sum(s * w[y] for y, s in counting) / share_sum

    rows = np.zeros(len(z), dtype=np.longdouble)
    grad_z = np.zeros_like(z)
    with np.errstate(all="ignore"):
        for row in np.flatnonzero(live):
            m = z[row].max()
            e = np.exp(z[row] - m)
            top = int(z[row].argmax())
            rest = np.delete(e, top).sum()
            nll = (m - z[row]) + np.log1p(rest)
            rows[row] = np.where((t[row] == 0) & (nll == np.inf), 0, t[row] * nll).sum()
            p = e / (1 + rest)
            not_p = 1 - p
            not_p[top] = rest / (1 + rest)
            grad_z[row] = (t[row].sum() - t[row]) * p - t[row] * not_p
        grad_z[excluded] = 0

        denominator = row_weight.sum()
        if reduction == "none":
            loss = rows.reshape(row_shape)
            upstream = np.broadcast_to(_exact(torch.as_tensor(grad_loss)), row_shape).reshape(-1, 1)
        else:
            loss = rows.sum() / (denominator if reduction == "mean" else 1)
            upstream = _exact(torch.as_tensor(grad_loss)) / (denominator if reduction == "mean" else 1)
        grad_z = np.where(live[:, None], grad_z * upstream, 0)
    grad_prior = np.zeros(np.atleast_2d(_exact(log_prior)).shape, dtype=np.longdouble)
    np.add.at(grad_prior, groups, grad_z * tau)
    grad_logits = np.moveaxis(grad_z.reshape(*row_shape, n_classes), -1, dim)
    return Truth(
        torch.from_numpy(np.asarray(loss, dtype=np.float64)),
        torch.from_numpy(np.ascontiguousarray(grad_logits, dtype=np.float64)),
        torch.from_numpy(np.asarray(grad_prior, dtype=np.float64)).view(log_prior.shape),
    )
