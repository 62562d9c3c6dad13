"""Forward and backward on a CPU for the common case, one label a row and no other option, in few operator calls.

    loss        = log1p(rest) - (z_y - m),     rest = sum over c != y of exp(z_c - m), and exp(z_y - m) - 1
    gradient    = g * exp(z_c - m) / d,       for the label -g * (sum over c != y of exp(z_c - m)) / d,    d = 1 + rest

If the label is the row's top class, exp(z_y - m) - 1 is exactly 0: neither the loss nor a gradient cancels. Blocks and
scratch are as in `loss.py`, whose preparation for the other options takes too long for a few hundred rows of a few
classes. Here, too, a row's bits do not depend on the rows beside it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_la._call.problem import Problem
from fused_la._call.values import smallest
from fused_la._tiled import blocks
from fused_la._tiled.blocks import Scratch, choose_blocking, combine_into, row_blocks, row_sum

_FIRST_OPTION, _AFTER_OPTIONS = Problem._fields.index("target_weight"), Problem._fields.index("tau")
_OPTIONS = [i for i in range(_FIRST_OPTION, _AFTER_OPTIONS) if Problem._fields[i] != "prior_index"]


class _NoClassError(Exception):
    """A label that is none of the classes: ignored, or out of range."""


class _Labels(NamedTuple):
    """The labels of all rows, (..., 1)."""

    classes: Tensor
    mass: Tensor | None  # 0 if ignored, NaN if out of range; None if all are 1
    n_counting: float


def has_single_label(problem: Problem) -> bool:
    """Whether a problem has one label a row and no other option, and a row fits into a block."""
    if problem.has_probabilities or problem.n_labels != 1 or problem.label_smoothing > 0.0:
        return False
    for i in _OPTIONS:
        if problem[i] is not None:
            return False
    # A dispatch mode may trace the operations here, and would keep the values that are read as constants.
    if problem.logits.shape[-1] > blocks.BLOCK_ELEMENTS or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if problem.prior_index is not None and not bool(problem.groups()[1].all()):
        return False
    # Read in every call, since NumPy may have changed it, which no version counter shows.
    return problem.log_prior is None or smallest(problem.log_prior) > -math.inf


def _labels_of(problem: Problem, *, read: bool) -> _Labels:
    """The labels. Unless they are `read`, all are assumed to be classes that count, if ignore_index is no class."""
    target, n_classes, ignored = problem.target, problem.logits.shape[-1], problem.ignore_index
    if target.dim() < problem.logits.dim():
        target = target.unsqueeze(-1)
    if not read and not 0 <= ignored < n_classes:
        return _Labels(target, None, float(target.numel()))
    counts = target != ignored
    usable = counts & (target >= 0) & (target < n_classes)
    mass = counts.to(problem.compute_dtype).masked_fill_(counts != usable, math.nan)
    return _Labels(target * usable, mass, mass.sum().item())


def forward(problem: Problem, reduction: str, wants_gradient: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, the state, and the gradient for an upstream gradient of 1, as in `loss.py`; no state with a gradient.

    Should backward have to recompute it starts from the logits.
    """
    try:
        return _forward(problem, _labels_of(problem, read=False), reduction, wants_gradient)
    except _NoClassError:
        return _forward(problem, _labels_of(problem, read=True), reduction, wants_gradient)


def _forward(
    problem: Problem, labels: _Labels, reduction: str, wants_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    logits = problem.logits
    grad_logits = torch.empty_like(logits) if wants_gradient else None
    g: float | Tensor = 1.0
    if reduction == "mean":
        g = 1.0 / labels.n_counting if labels.n_counting else math.nan
    blocks, scratch = _blocks_of(problem)
    offset, parts = problem.offset(), []
    for block in blocks:
        label, mass, out = (_in_block(block, t) for t in (labels.classes, labels.mass, grad_logits))
        e = _adjusted(problem, block, offset, scratch, out)
        m = e.amax(-1, keepdim=True)
        z_label, others, rest = _sums(e.sub_(m), label)
        parts.append((rest.log1p().sub_(z_label), m, rest))
        if out is not None:
            _write_gradient(e, label, others, rest, g if mass is None else mass * g, out)
    losses, m, rest = parts[0] if len(parts) == 1 else _concatenated(parts, logits)
    state = None
    if grad_logits is None:
        total = torch.ones_like(m) if labels.mass is None else labels.mass
        state = torch.cat([*(t.flatten() for t in (m, rest, total)), m.new_full((1,), labels.n_counting)])
    if labels.mass is not None:
        losses = torch.where(labels.mass == 0.0, 0.0, losses * labels.mass)
        _clear_ignored(grad_logits, labels.mass)
    if reduction == "none":
        return losses.squeeze_(-1), state, grad_logits
    if reduction == "mean" and labels.mass is None:
        return losses.mean(), state, grad_logits
    return losses.sum() if reduction == "sum" else losses.sum() / labels.n_counting, state, grad_logits


def backward(problem: Problem, reduction: str, state: Tensor | None, grad_rows: Tensor) -> Tensor:
    """The gradient of the logits for one upstream gradient, or one a row, by the operations of `forward`."""
    try:
        return _backward(problem, _labels_of(problem, read=False), reduction, state, grad_rows)
    except _NoClassError:
        return _backward(problem, _labels_of(problem, read=True), reduction, state, grad_rows)


def _backward(problem: Problem, labels: _Labels, reduction: str, state: Tensor | None, grad_rows: Tensor) -> Tensor:
    logits = problem.logits
    if reduction == "mean":
        grad_rows = grad_rows / labels.n_counting
    rows, n_rows = (*logits.shape[:-1], 1), logits.shape[:-1].numel()
    m_all = rest_all = None
    if state is not None:
        m_all, rest_all = state[: 2 * n_rows].view(2, *rows).unbind()
    g_all = grad_rows.expand(rows[:-1]).unsqueeze(-1)
    g_all = g_all if labels.mass is None else labels.mass * g_all
    grad_logits = torch.empty_like(logits)
    blocks, scratch = _blocks_of(problem)
    offset = problem.offset()
    for block in blocks:
        label, m, rest, g, out = (_in_block(block, t) for t in (labels.classes, m_all, rest_all, g_all, grad_logits))
        e = _adjusted(problem, block, offset, scratch, out)
        _, others, found = _sums(e.sub_(e.amax(-1, keepdim=True) if m is None else m), label)
        _write_gradient(e, label, others, found if rest is None else rest, g, out)
    if labels.mass is not None:
        _clear_ignored(grad_logits, labels.mass)
    return grad_logits


# A block --------------------------------------------------------------------------------------------------------------


def _blocks_of(problem: Problem) -> tuple[list[tuple[slice, ...] | None], Scratch]:
    """The blocks of rows ([None] if all rows are one block), and scratch memory for a block."""
    rows = problem.logits.shape[:-1]
    n_rows, (height, width) = rows.numel(), choose_blocking(problem, forward=True)
    blocks: list[tuple[slice, ...] | None] = [None]
    if n_rows > height:
        n_outer, n_inner = (*rows, 1)[:2]
        blocks = [block[: len(rows)] for block in row_blocks(n_outer, n_inner, height)]
    return blocks, Scratch(min(height, n_rows) * width, problem.compute_dtype)


def _in_block(block: tuple[slice, ...] | None, tensor: Any) -> Any:
    return tensor if block is None or tensor is None else tensor[block]


def _concatenated(parts: list[tuple[Tensor, Tensor, Tensor]], logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The results of the blocks as those of all rows, which the blocks cover in order."""
    shape = (*logits.shape[:-1], 1)
    columns = zip(*parts, strict=True)
    losses, m, rest = (torch.cat([each.flatten() for each in column]).view(shape) for column in columns)
    return losses, m, rest


def _adjusted(
    problem: Problem, block: tuple[slice, ...] | None, offset: Tensor | None, scratch: Scratch, out: Tensor | None
) -> Tensor:
    """z of a block, written to the memory of its gradient if dtype and strides allow that, otherwise to scratch."""
    logits = _in_block(block, problem.logits)
    if problem.prior_index is not None and offset is not None:
        of_rows = scratch.view(1, logits.shape)
        groups = _in_block(block, problem.prior_index).flatten()
        torch.index_select(offset, 0, groups, out=of_rows.view(-1, logits.shape[-1]))
        offset = of_rows
    fits = out is not None and out.dtype == scratch.dtype and out.is_contiguous()
    z = out if fits and out is not None else scratch.view(0, logits.shape)
    return combine_into(z, logits, offset, torch.add)


def _sums(z: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From z - m: the label's, the sum of exp over the other classes, and rest. Leaves exp(z - m), 0 for the label."""
    try:
        z_label = z.gather(-1, label)
    except RuntimeError as error:
        raise _NoClassError from error
    others = row_sum(z.exp_().scatter_(-1, label, 0.0), keepdim=True)
    return z_label, others, others + z_label.expm1()


def _write_gradient(e: Tensor, label: Tensor, others: Tensor, rest: Tensor, g: Tensor | float, out: Tensor) -> None:
    """Turn exp(z - m) into the gradient, in place, and copy it to `out` if that is another tensor."""
    e.scatter_(-1, label, others.neg_()).mul_((rest + 1.0).reciprocal_().mul_(g))
    if e is not out:
        out.copy_(e)


def _clear_ignored(grad_logits: Tensor | None, mass: Tensor) -> None:
    """Set the gradient of rows that do not count to 0, whatever their logits are."""
    if grad_logits is not None:
        grad_logits.masked_fill_(mass == 0.0, 0.0)
