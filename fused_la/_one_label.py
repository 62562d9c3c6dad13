"""The common case on a CPU: one label a row and no other option, in few operator calls.

    others      sum over c != y of exp(z_c - z_y)
    loss        log1p(others)
    gradient    g * exp(z_c - z_y) / (1 + others), for the label -g * others / (1 + others)

Nothing cancels, and no maximum is looked for. Rows whose `others` become too large for that, or are no number, are
done once more as those of any other problem are: where the label stands far below another class or is at -inf, and
where logits are not finite. Blocks and scratch are those of `_blocked.py`, whose preparation a few hundred rows of a
few classes do not repay. A row's bits do not depend on the rows beside it here either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_la import _blocks
from fused_la._blocks import Scratch, choose_blocking, row_blocks, row_sum
from fused_la._problem import Problem
from fused_la._values import smallest


class AnyProblem(NamedTuple):
    """The two passes that take any problem, as an implementation's."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor | None, None]]
    backward: Callable[..., tuple[Tensor | None, Tensor | None]]


class _NoClassError(Exception):
    """A label is none of the classes: it is to be ignored, or out of range."""


class _Labels(NamedTuple):
    """The labels of all rows, (..., 1)."""

    classes: Tensor
    mass: Tensor | None  # 0 of one that does not count, NaN of one out of range; None where all are 1
    n_counting: float


def is_one_label(problem: Problem) -> bool:
    """Whether all that a problem asks for is one label a row, and a row fits into a block."""
    if problem.has_probabilities or problem.n_labels != 1 or problem.label_smoothing > 0.0:
        return False
    for option in problem[3:9]:
        if option is not None:
            return False
    if problem.logits.shape[-1] > _blocks.BLOCK_ELEMENTS:
        return False
    # Read in every call: NumPy may have changed it, which no version tells. No bit may depend on the logit of a class
    # at -inf, which might be one for which a row is done again.
    return problem.log_prior is None or smallest(problem.log_prior) > -math.inf


def _labels_of(problem: Problem, *, read: bool) -> _Labels:
    """The labels; not `read`, all are taken to count and to be classes, unless one that is a class is to be ignored."""
    target, n_classes, ignored = problem.target, problem.logits.shape[-1], problem.ignore_index
    if target.dim() < problem.logits.dim():
        target = target.unsqueeze(-1)
    if not read and not 0 <= ignored < n_classes:
        return _Labels(target, None, float(target.numel()))
    counts = target != ignored
    usable = counts & (target >= 0) & (target < n_classes)
    mass = counts.to(problem.compute_dtype).masked_fill_(counts != usable, math.nan)
    return _Labels(target * usable, mass, mass.sum().item())


def forward(
    problem: Problem, reduction: str, wants_gradient: bool, any_problem: AnyProblem
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, reduced or of each row, the state, and the gradient for an upstream of 1, as `_blocked.forward`. With a
    gradient there is no state: should backward have to recompute, it begins anew."""
    try:
        return _forward(problem, _labels_of(problem, read=False), reduction, wants_gradient, any_problem)
    except _NoClassError:
        return _forward(problem, _labels_of(problem, read=True), reduction, wants_gradient, any_problem)


def _forward(
    problem: Problem, labels: _Labels, reduction: str, wants_gradient: bool, any_problem: AnyProblem
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    logits = problem.logits
    grad_logits = torch.empty_like(logits) if wants_gradient else None
    g = 1.0
    if reduction == "mean":
        g = 1.0 / labels.n_counting if labels.n_counting else math.nan
    label_z, others = _pass(problem, labels, g, grad_logits)
    losses, state = others.log1p(), None
    if labels.mass is not None:
        losses = torch.where(labels.mass == 0.0, 0.0, losses * labels.mass)
    if grad_logits is None:
        total = torch.ones_like(losses) if labels.mass is None else labels.mass
        state = torch.cat([*(t.flatten() for t in (label_z, others, total)), total.new_full((1,), labels.n_counting)])
    rows = _rows_to_redo(others)
    if rows is not None:
        some = _some(problem, rows)
        loss, state_of_some, _, _ = any_problem.forward(some, "none", False)
        losses[rows] = loss.unsqueeze(-1)
        if state is not None:
            state[:-1].view(3, *losses.shape[:-1])[(slice(None), *rows)] = state_of_some[:-1].view(3, -1)
        if grad_logits is not None:
            _redo_gradient(some, rows, state_of_some, torch.full_like(loss, g), grad_logits, any_problem)
    if reduction == "none":
        return losses.squeeze_(-1), state, grad_logits
    if reduction == "mean" and labels.mass is None:
        return losses.mean(), state, grad_logits
    return losses.sum() if reduction == "sum" else losses.sum() / labels.n_counting, state, grad_logits


def backward(problem: Problem, reduction: str, grad_rows: Tensor, any_problem: AnyProblem) -> Tensor:
    """The gradient of the logits, for one upstream number or one a row; by the operations of `forward`."""
    try:
        return _backward(problem, _labels_of(problem, read=False), reduction, grad_rows, any_problem)
    except _NoClassError:
        return _backward(problem, _labels_of(problem, read=True), reduction, grad_rows, any_problem)


def _backward(problem: Problem, labels: _Labels, reduction: str, grad_rows: Tensor, any_problem: AnyProblem) -> Tensor:
    logits = problem.logits
    if reduction == "mean":
        grad_rows = grad_rows / labels.n_counting
    grad_rows = grad_rows.expand(logits.shape[:-1])
    grad_logits = torch.empty_like(logits)
    _, others = _pass(problem, labels, grad_rows.unsqueeze(-1), grad_logits)
    rows = _rows_to_redo(others)
    if rows is not None:
        some = _some(problem, rows)
        _, state, _, _ = any_problem.forward(some, "none", False)
        _redo_gradient(some, rows, state, grad_rows[rows], grad_logits, any_problem)
    return grad_logits


def _pass(problem: Problem, labels: _Labels, g: Tensor | float, grad_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """z of the label of each row and its `others`, (..., 1); the gradient for an upstream of g where it is wanted."""
    logits, scaled = problem.logits, g if labels.mass is None else labels.mass * g
    offset, blocks, scratch = _blocks_of(problem)
    parts = []
    for block in blocks:
        label, out = _of(block, labels.classes), _of(block, grad_logits)
        e = _adjusted(_of(block, logits), offset, scratch, out)
        label_z, others = _sums(e, label)
        parts.append((label_z, others))
        if out is not None:
            _spread(e, label, others, _of(block, scaled) if isinstance(scaled, Tensor) else scaled, out)
    if grad_logits is not None and labels.mass is not None:
        grad_logits.masked_fill_(labels.mass == 0.0, 0.0)  # whatever stands in a row that does not count
    return parts[0] if len(parts) == 1 else _joined(parts, logits)


# Rows that are done again ---------------------------------------------------------------------------------------------


def _rows_to_redo(others: Tensor) -> tuple[Tensor, ...] | None:
    """The indices of rows whose `others` are too large, or no number; None where there is none, as a rule."""
    most = torch.finfo(others.dtype).max ** 0.5  # far from where 1 / others loses digits
    if others.sum().item() < most:
        return None
    rows = (others < most).logical_not_().squeeze(-1).nonzero(as_tuple=True)
    return rows if rows[0].numel() > 0 else None


def _some(problem: Problem, rows: tuple[Tensor, ...]) -> Problem:
    return problem._replace(logits=problem.logits[rows], target=problem.target[rows])


def _redo_gradient(
    some: Problem, rows: tuple[Tensor, ...], state: Tensor, g: Tensor, grad_logits: Tensor, any_problem: AnyProblem
) -> None:
    grad_logits[rows], _ = any_problem.backward(some, "none", state, g, True, False)


# A block --------------------------------------------------------------------------------------------------------------


def _blocks_of(problem: Problem) -> tuple[Tensor | None, list[tuple[slice, ...] | None], Scratch]:
    """(the offset, the blocks of rows or None for all rows at once, scratch for one)."""
    shape = problem.logits.shape
    n_outer, n_inner = (*shape[:-1], 1)[:2]
    blocking = choose_blocking(problem, forward=True)
    scratch = Scratch(min(blocking.height, n_outer * n_inner) * blocking.width, problem.compute_dtype)
    blocks: list[tuple[slice, ...] | None] = [None]
    if n_outer * n_inner > blocking.height:
        blocks = [block[: len(shape) - 1] for block in row_blocks(n_outer, n_inner, blocking.height)]
    return problem.offset(), blocks, scratch


def _of(block: tuple[slice, ...] | None, tensor: Any) -> Any:
    return tensor if block is None or tensor is None else tensor[block]


def _joined(parts: list[tuple[Tensor, Tensor]], logits: Tensor) -> tuple[Tensor, Tensor]:
    """What blocks left, as of all rows; blocks cover them in order."""
    shape = (*logits.shape[:-1], 1)
    label_z, others = (
        torch.cat([each.flatten() for each in of_blocks]).view(shape) for of_blocks in zip(*parts, strict=True)
    )
    return label_z, others


def _adjusted(logits: Tensor, offset: Tensor | None, scratch: Scratch, into: Tensor | None) -> Tensor:
    """z of a block, written where its gradient will stand if that is fit for it, else into scratch."""
    fits = into is not None and into.dtype == scratch.dtype and into.is_contiguous()
    z = into if fits and into is not None else scratch.view(0, logits.shape)
    return z.copy_(logits) if offset is None else torch.add(logits, offset, out=z)


def _sums(z: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """(z of the label, the sum of exp(z_c - z_y) over the other classes). Leaves these in z, 0 for the label."""
    try:
        label_z = z.gather(-1, label)
    except RuntimeError as error:
        raise _NoClassError from error
    z.sub_(label_z).exp_()
    z.scatter_(-1, label, label_z - label_z)  # NaN where it is infinite
    return label_z, row_sum(z, keepdim=True)


def _spread(e: Tensor, label: Tensor, others: Tensor, g: Tensor | float, out: Tensor) -> None:
    """Turn exp(z_c - z_y) into the gradient."""
    e.scatter_(-1, label, others.neg()).mul_((others + 1.0).reciprocal_().mul_(g))
    if e is not out:
        out.copy_(e)
