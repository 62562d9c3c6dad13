"""Forward and backward on a CPU: a block of rows at a time, in one scratch buffer that stays in the cache.

The equations are those of `reference.py`. A block of logits becomes z, exp(z - m) and then its gradient in place, so
the only (N, C) memory ever touched is the logits, read once, and their gradient, written once. Rows wider than a block
are processed in chunks of classes, whose states are merged in order.

The top class of a row must stay out of its sum (`rest`), but an argmax costs as much as the exponentials. That matters
only if the top class has target mass. So with labels the *labels'* columns are kept out, and added as scalars; only
class probabilities need the argmax. Both are called candidates: the columns whose gradient is computed apart, and
written after all blocks.

A row's bits do not depend on its block: every reduction runs along one row, in an order set by its length.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_la._call.problem import Problem, reduce_rows
from fused_la._cpu import single_label
from fused_la._cpu.single_label import has_single_label
from fused_la._tiled import softmax
from fused_la._tiled.blocks import Block, Scratch, choose_blocking, class_chunks, combine_into, row_blocks, row_sum
from fused_la._tiled.softmax import Candidates, PreparedRows, SoftmaxState


def forward(
    problem: Problem, reduction: str, wants_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    """The loss; m, rest and A of each row and the mean's denominator; the gradient for an upstream gradient of 1.

    For a mean or a sum the gradient is made in this pass, from the same exponentials. Not for float16: a gradient that
    is written before a GradScaler's factor reaches it underflows.
    """
    wants_gradient = wants_gradient and reduction != "none" and problem.logits.dtype != torch.float16
    if has_single_label(problem):
        return *single_label.forward(problem, reduction, wants_gradient), None
    shape, problem = problem.logits.shape, problem.as_3d()
    rows = softmax.prepare(problem)
    n_outer, n_inner, _ = problem.logits.shape
    n_rows = n_outer * n_inner
    flat = torch.empty(3 * n_rows + 1, dtype=problem.compute_dtype)
    m, rest, total = flat[:-1].view(3, n_outer, n_inner)
    state = SoftmaxState(m, rest, softmax.label_mass_total(rows, out=total), gap=torch.zeros_like(m))
    row_weight = torch.ones_like(state.m) if rows.labels is None else rows.labels.row_weight
    denominator = row_weight.sum()
    flat[-1] = denominator
    grad_logits, grad_rows = None, state.m
    if wants_gradient:
        grad_logits = torch.empty_like(problem.logits)
        scale = denominator.reciprocal() if reduction == "mean" else torch.ones_like(denominator)
        grad_rows = scale.expand(n_outer, n_inner)

    blocking = choose_blocking(problem, forward=True)
    scratch = Scratch(min(blocking.height, n_rows) * blocking.width, problem.compute_dtype)
    for block in row_blocks(n_outer, n_inner, blocking.height):
        out = None if grad_logits is None else grad_logits[block]
        of_block, part = state.in_block(block), row_block(rows, block, scratch)
        e = _reduce_block(part, blocking.width, of_block, out)
        if rows.z_as_label is not None:
            of_block.total.copy_(softmax.margin_total(rows, of_block, block))
        if grad_logits is not None:
            _write_gradient(part, blocking.width, of_block, grad_rows[block], out, None, e)
    if grad_logits is not None:
        _write_candidate_gradient(rows, state, grad_rows, grad_logits, None)
        grad_logits = grad_logits.view(shape)
    loss = reduce_rows(softmax.row_losses(rows, state), denominator, reduction)
    if len(shape) == 2 and reduction == "none":
        loss = loss.squeeze_(1)  # not as a view, which the caller could not change
    return loss, flat, grad_logits, None


def backward(
    problem: Problem, reduction: str, saved: Tensor | None, upstream: Tensor, needs_logits: bool, needs_log_prior: bool,
    unit_gradient: Tensor | None = None, memo: None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of logits and log_prior (C,), None where not needed, for one upstream number or with "none" one a row.

    `unit_gradient` is the gradient that forward made for an upstream of 1; it is scaled in place if another came.
    """
    if unit_gradient is not None:
        is_one = unit_gradient.numel() == 0 or upstream.item() == 1.0
        return unit_gradient if is_one else unit_gradient.mul_(upstream), None
    shape, grad_rows = problem.logits.shape, upstream.to(problem.compute_dtype)
    # Nothing is saved if forward took the single-label path and made its gradient. The same path must then run again,
    # even if a prior with -inf has been written since.
    if saved is None or (needs_logits and not needs_log_prior and has_single_label(problem)):
        return single_label.backward(problem, reduction, saved, grad_rows), None
    if reduction == "mean":
        grad_rows = grad_rows / saved[3 * shape[:-1].numel()]
    problem = problem.as_3d()
    n_outer, n_inner, _ = problem.logits.shape
    grad_rows = grad_rows.reshape(n_outer, n_inner) if reduction == "none" else grad_rows.expand(n_outer, n_inner)
    rows, state = softmax.prepare(problem), SoftmaxState(*saved[: 3 * n_outer * n_inner].view(3, n_outer, n_inner))
    grad_logits = torch.empty_like(problem.logits) if needs_logits else None
    # Summed in float64: over many rows a float32 sum would lose what the rows' gradients hold.
    grad_offset = None
    if needs_log_prior and problem.log_prior is not None:
        grad_offset = torch.zeros(problem.log_prior.shape, dtype=torch.float64)
    blocking = choose_blocking(problem, forward=False, sums_gradient=needs_log_prior)
    scratch = Scratch(min(blocking.height, n_outer * n_inner) * blocking.width, problem.compute_dtype)
    for block in row_blocks(n_outer, n_inner, blocking.height):
        out = None if grad_logits is None else grad_logits[block]
        part, of_block = row_block(rows, block, scratch), state.in_block(block)
        _write_gradient(part, blocking.width, of_block, grad_rows[block], out, grad_offset, None)
    _write_candidate_gradient(rows, state, grad_rows, grad_logits, grad_offset)
    if grad_logits is not None:
        grad_logits = grad_logits.view(shape)
    if grad_offset is None or problem.log_prior is None:
        return grad_logits, None
    return grad_logits, (grad_offset * problem.tau).to(problem.log_prior.dtype)


# A block --------------------------------------------------------------------------------------------------------------


class RowBlock(NamedTuple):
    """A block of prepared rows, and the scratch memory that all blocks share."""

    rows: PreparedRows
    block: Block
    candidates: Candidates  # of the block
    scratch: Scratch


def row_block(rows: PreparedRows, block: Block, scratch: Scratch) -> RowBlock:
    return RowBlock(rows, block, rows.candidates.in_block(block), scratch)


def _reduce_block(part: RowBlock, width: int, state: SoftmaxState, grad_logits: Tensor | None) -> Tensor | None:
    """Fill in the state of a block's rows.

    It works in the memory of the block's gradient if that fits, otherwise in scratch. It returns exp(z - m), 0 in the
    candidates' columns, if that holds whole rows.
    """
    rows = part.rows
    n_classes = rows.problem.logits.shape[-1]
    e = merged = None
    for chunk in class_chunks(n_classes, width):
        is_whole = chunk.stop - chunk.start == n_classes
        z = _adjusted(part, chunk, grad_logits if is_whole else None)
        partial = reduce_tile(part, chunk, z, merged)
        merged = partial if merged is None else softmax.merge(merged, partial)
        e = z if is_whole else None
    assert merged is not None
    state.m.copy_(merged.m)
    state.rest.copy_(softmax.finalize_rest(rows, merged, part.block))
    if rows.labels is None:
        state.total.copy_(merged.total)
        part.candidates.z.copy_(merged.m.unsqueeze(-1))
    if state.gap is not None and merged.gap is not None and (rows.labels is None or rows.smoothing is not None):
        state.gap.copy_(merged.gap)
    return e


def reduce_tile(part: RowBlock, chunk: slice, z: Tensor, before: SoftmaxState | None) -> SoftmaxState:
    """The partial state of a tile of z. It leaves exp(z - m) in z, 0 for candidates.

    With class probabilities the candidate is the row's top class: the tile's own if it is higher than in the state
    `before` this tile.
    """
    rows, candidates, scratch = part.rows, part.candidates, part.scratch
    if rows.labels is None:
        m, top = z.max(-1, keepdim=True)
    else:
        m, top = z.amax(-1, keepdim=True), None
    m.clamp_(min=torch.finfo(z.dtype).min)  # a tile that is -inf throughout adds nothing
    z.sub_(m)
    mass = _dense_mass(part, chunk)
    total = gap = torch.zeros_like(m.squeeze(-1))
    if mass is not None:
        product = torch.mul(z, mass, out=scratch.view(2, z.shape)).neg_()
        product.masked_fill_((mass == 0) & (z == -math.inf), 0.0)
        gap, total = row_sum(product), row_sum(mass.expand_as(z))
    e = z.exp_()
    if top is None:
        in_chunk = candidates.in_chunk(chunk)
        softmax.scatter_candidates(e, in_chunk, chunk, 0.0)
        m = m.squeeze(-1)
        return SoftmaxState(m, row_sum(e) + softmax.candidate_sum_without_top(in_chunk, m), total, gap)
    # The top's exponential, 1, is left out. If no class takes part it is 0, and the rest -1.
    of_top = e.gather(-1, top).squeeze(-1)
    e.scatter_(-1, top, 0.0)
    m = m.squeeze(-1)
    top += chunk.start
    candidates.classes.copy_(
        top if before is None else torch.where((m > before.m).unsqueeze(-1), top, candidates.classes)
    )
    return SoftmaxState(m, row_sum(e) + (of_top - 1.0), total, gap)


def _adjusted(part: RowBlock, chunk: slice, out: Tensor | None = None) -> Tensor:
    """z of a block, written to `out` if its dtype and strides allow that, otherwise to scratch."""
    rows = part.rows
    logits = rows.problem.logits[part.block][..., chunk]
    if out is not None and out.dtype == rows.problem.compute_dtype and out.is_contiguous():
        z = out
    else:
        z = part.scratch.view(0, logits.shape)
    offset = _in_tile(part, rows.offset, chunk)
    if rows.scale is None and rows.row_scale is None:
        combine_into(z, logits, offset, torch.add)
    else:
        combine_into(z, logits, None if rows.scale is None else rows.scale[chunk], torch.mul)
        if rows.row_scale is not None:
            z.mul_(rows.row_scale[part.block].unsqueeze(-1))
        if offset is not None:
            z.add_(offset)
    return z if rows.excluded is None else z.masked_fill_(rows.in_tile(rows.excluded, part.block, chunk), -math.inf)


def _in_tile(part: RowBlock, values: Tensor | None, chunk: slice) -> Tensor | None:
    """offset or smoothing for a block; for rows of several groups in scratch memory, which the next call overwrites."""
    if values is None or values.dim() == 1:
        return None if values is None else values[chunk]
    rows = part.candidates.classes.shape[:2]
    return part.rows.in_tile(
        values, part.block, chunk, part.scratch.view(3, torch.Size((*rows, chunk.stop - chunk.start)))
    )


def _dense_mass(part: RowBlock, chunk: slice) -> Tensor | None:
    """The dense target mass, broadcastable to the block: probabilities, or smoothing for labels that weigh 1 in all."""
    rows = part.rows
    smoothing = _in_tile(part, rows.smoothing, chunk)
    if rows.labels is not None:
        return smoothing
    target = rows.problem.target[part.block][..., chunk]
    mass = part.scratch.view(1, target.shape).copy_(target).mul_(1.0 - rows.problem.label_smoothing)
    if rows.weight is not None:
        mass.mul_(rows.weight[chunk])
    return mass if smoothing is None else mass.add_(smoothing)


def _write_gradient(
    part: RowBlock, width: int, state: SoftmaxState, grad_rows: Tensor, grad_logits: Tensor | None,
    grad_offset: Tensor | None, e: Tensor | None,
) -> None:  # fmt: skip
    """Write g * (A * p_c - t_c) for every class of a block but the candidates, and add it to the offset's gradient.

    `e` is what `_reduce_block` returned for this block; without it the exponentials are computed again.
    """
    rows, candidates = part.rows, part.candidates
    m, rest, total, g = (values.unsqueeze(-1) for values in (state.m, state.rest, state.total, grad_rows))
    scale = g * total / (1.0 + rest)
    find_top = rows.labels is None and e is None
    if find_top:
        candidates.used.fill_(False)
        candidates.z.copy_(m)
    for chunk in class_chunks(rows.problem.logits.shape[-1], width):
        values = e
        if values is None:
            values = _adjusted(part, chunk)
            if find_top:
                top = values.argmax(-1, keepdim=True)
                is_top = (values.gather(-1, top) == m) & ~candidates.used
                candidates.classes.copy_(torch.where(is_top, top + chunk.start, candidates.classes))
                candidates.used.logical_or_(is_top)
            values.sub_(m).exp_()
        grad = values
        if grad_logits is not None and grad_logits.dtype == values.dtype and grad_offset is None:
            grad = grad_logits[..., chunk]
        torch.mul(values, scale, out=grad)
        subtract_dense_mass(part, chunk, grad, g)
        if grad_offset is not None:
            softmax.scatter_candidates(grad, candidates, chunk, 0.0)
            if not rows.all_live and rows.labels is not None:
                grad.masked_fill_(~rows.labels.live[part.block].unsqueeze(-1), 0.0)
            softmax.add_to_offset_gradient(grad_offset, rows, part.block, chunk, grad, torch.float64)
        if grad_logits is not None:
            rows.scale_in_place(grad, part.block, chunk)
        if grad_logits is not None and grad is values:
            grad_logits[..., chunk].copy_(grad)


def subtract_dense_mass(part: RowBlock, chunk: slice, grad: Tensor, g: Tensor) -> None:
    """Subtract g * t_c, smoothing or probabilities, from a tile of g * A * p_c; a class at -inf keeps gradient 0."""
    rows, mass = part.rows, _dense_mass(part, chunk)
    if mass is None:
        return
    grad.addcmul_(mass, g if rows.labels is None else g * rows.labels.share[part.block].unsqueeze(-1), value=-1.0)
    if rows.excluded is not None:
        grad.masked_fill_(rows.in_tile(rows.excluded, part.block, chunk), 0.0)


def _write_candidate_gradient(
    rows: PreparedRows, state: SoftmaxState, grad_rows: Tensor, grad_logits: Tensor | None, grad_offset: Tensor | None
) -> None:
    """Write the candidates' columns, and zeros to rows that do not count."""
    candidates, grad = rows.candidates, softmax.candidate_gradient(rows, state, grad_rows)
    if grad_logits is not None:
        scaled = grad if rows.scale is None else grad * rows.scale[candidates.classes]
        if rows.row_scale is not None:
            scaled = scaled * rows.row_scale.unsqueeze(-1)
        softmax.scatter_candidates(grad_logits, candidates, slice(0, grad_logits.shape[-1]), scaled)
        if not rows.all_live and rows.labels is not None:
            grad_logits.masked_fill_(~rows.labels.live.unsqueeze(-1), 0.0)
    if grad_offset is not None:
        at, index = candidates.used.nonzero(as_tuple=True), candidates.classes
        if rows.groups is not None:
            index = index + rows.groups.unsqueeze(-1) * grad_offset.shape[-1]
        grad_offset.view(-1).index_add_(0, index[at], grad[at].double())
