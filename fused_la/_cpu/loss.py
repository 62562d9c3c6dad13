"""The loss and its gradient on a CPU: a block of rows at a time, in one scratch buffer that stays in the cache.

The equations are those of `reference.py`. A block of logits becomes z, exp(z - m) and then its gradient in place, so
the only (N, C) memory ever touched is the logits, read once, and their gradient, written once. Rows wider than a block
are passed in chunks of classes, whose maxima and sums are combined in order.

The top class of a row must stay out of its sum (`rest`), but an argmax costs as much as the exponentials. It matters
only where that class carries target mass, so with labels the *labels'* columns are kept out instead and join as
scalars; only class probabilities need the argmax. Both are called candidates below: the columns of a row whose
gradient has a form of its own, written once all blocks have passed.

A row's bits do not depend on its block: every reduction runs along one row, in an order set by its length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_la._call.problem import Problem, reduce_rows
from fused_la._cpu import single_label
from fused_la._cpu.single_label import is_one_label
from fused_la._tiled.blocks import Block, Scratch, choose_blocking, class_chunks, combine, row_blocks, row_sum
from fused_la._tiled.softmax import (
    Candidates,
    Part,
    Rows,
    State,
    candidate_gradient,
    candidates_but_top,
    join,
    label_total,
    margin_total,
    prepare,
    put,
    row_losses,
    settled,
)


def forward(
    problem: Problem, reduction: str, wants_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    """Loss, state (m, rest and A of each row, the mean's denominator), the gradient for an upstream of 1.

    The gradient is made in this pass, from exponentials that are at hand, for a mean or sum. Not for float16: a
    gradient written before a GradScaler's factor reaches it underflows.
    """
    wants_gradient = wants_gradient and reduction != "none" and problem.logits.dtype != torch.float16
    if is_one_label(problem):
        return *single_label.forward(problem, reduction, wants_gradient), None
    shape, problem = problem.logits.shape, problem.with_inner()
    rows = prepare(problem)
    n_outer, n_inner, _ = problem.logits.shape
    n_rows = n_outer * n_inner
    flat = torch.empty(3 * n_rows + 1, dtype=problem.compute_dtype)
    stacked = flat[:-1].view(3, n_outer, n_inner)
    state = State(stacked[0], stacked[1], label_total(rows, out=stacked[2]))
    gap = torch.zeros_like(state.m)
    row_weight = torch.ones_like(state.m) if rows.labels is None else rows.labels.row_weight
    normalizer = row_weight.sum()
    flat[-1] = normalizer
    grad_logits, grad_rows = None, state.m
    if wants_gradient:
        grad_logits = torch.empty_like(problem.logits)
        scale = normalizer.reciprocal() if reduction == "mean" else torch.ones_like(normalizer)
        grad_rows = scale.expand(n_outer, n_inner)

    blocking = choose_blocking(problem, forward=True)
    scratch = Scratch(min(blocking.height, n_rows) * blocking.width, problem.compute_dtype)
    for block in row_blocks(n_outer, n_inner, blocking.height):
        out = None if grad_logits is None else grad_logits[block]
        part, candidates = state.of(block), rows.candidates.of(block)
        e = _reduce_block(rows, block, blocking.width, scratch, part, candidates, gap[block], out)
        if rows.as_label is not None:
            part.total.copy_(margin_total(rows, part, block))
        if grad_logits is not None:
            _spread_gradient(rows, block, blocking.width, scratch, part, candidates, grad_rows[block], out, None, e)
    if grad_logits is not None:
        _finish_gradient(rows, state, grad_rows, grad_logits, None)
        grad_logits = grad_logits.view(shape)
    loss = reduce_rows(row_losses(rows, state, gap), normalizer, reduction)
    if len(shape) == 2 and reduction == "none":
        loss = loss.squeeze_(1)  # not as a view, which the caller could not change
    return loss, flat, grad_logits, None


def backward(
    problem: Problem,
    reduction: str,
    state: Tensor | None,
    upstream: Tensor,
    needs_logits: bool,
    needs_log_prior: bool,
    made_for_one: Tensor | None = None,
    memo: None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of logits and log_prior (C,), None where not needed, for one upstream number or with "none" one a row.

    `made_for_one` is what forward made of the logits', for an upstream of 1: scaled where it stands unless 1 came.
    """
    if made_for_one is not None:
        is_one = made_for_one.numel() == 0 or upstream.item() == 1.0
        return made_for_one if is_one else made_for_one.mul_(upstream), None
    shape, grad_rows = problem.logits.shape, upstream.to(problem.compute_dtype)
    # Without a state it was one label when the gradient was made, whatever has been written into its prior since.
    if state is None or (needs_logits and not needs_log_prior and is_one_label(problem)):
        return single_label.backward(problem, reduction, state, grad_rows), None
    if reduction == "mean":
        grad_rows = grad_rows / state[3 * shape[:-1].numel()]
    problem = problem.with_inner()
    n_outer, n_inner, _ = problem.logits.shape
    stacked = state[: 3 * n_outer * n_inner].view(3, n_outer, n_inner)
    grad_rows = grad_rows.reshape(n_outer, n_inner) if reduction == "none" else grad_rows.expand(n_outer, n_inner)
    rows, parts = prepare(problem), State(stacked[0], stacked[1], stacked[2])
    grad_logits = torch.empty_like(problem.logits) if needs_logits else None
    # Summed in float64: over many rows a float32 sum would lose what the rows' gradients hold.
    grad_offset = torch.zeros(problem.logits.shape[-1], dtype=torch.float64) if needs_log_prior else None
    blocking = choose_blocking(problem, forward=False, sums_gradient=needs_log_prior)
    scratch = Scratch(min(blocking.height, n_outer * n_inner) * blocking.width, problem.compute_dtype)
    for block in row_blocks(n_outer, n_inner, blocking.height):
        out = None if grad_logits is None else grad_logits[block]
        part, candidates = parts.of(block), rows.candidates.of(block)
        _spread_gradient(
            rows, block, blocking.width, scratch, part, candidates, grad_rows[block], out, grad_offset, None
        )
    _finish_gradient(rows, parts, grad_rows, grad_logits, grad_offset)
    if grad_logits is not None:
        grad_logits = grad_logits.view(shape)
    if grad_offset is None or problem.log_prior is None:
        return grad_logits, None
    return grad_logits, (grad_offset * problem.tau).to(problem.log_prior.dtype)


# A block --------------------------------------------------------------------------------------------------------------


def _reduce_block(
    rows: Rows,
    block: Block,
    width: int,
    scratch: Scratch,
    state: State,
    candidates: Candidates,
    gap: Tensor,
    grad_logits: Tensor | None,
) -> Tensor | None:
    """Fill in a block's m and rest, and of its dense target mass the total and the gap sum_c t_c * (m - z_c).

    Works where the gradient will stand if it can, and in scratch otherwise. Returns exp(z - m), 0 in the candidates'
    columns, where whole rows of it are left.
    """
    n_classes = rows.problem.logits.shape[-1]
    e = found = None
    for chunk in class_chunks(n_classes, width):
        whole = chunk.stop - chunk.start == n_classes
        z = _adjusted(rows, block, chunk, scratch, grad_logits if whole else None)
        part = reduce_tile(rows, block, chunk, z, scratch, candidates, found)
        found = part if found is None else join(found, part)
        e = z if whole else None
    assert found is not None
    state.m.copy_(found.m)
    state.rest.copy_(settled(found))
    if rows.labels is None:
        state.total.copy_(found.total)
        candidates.z.copy_(found.m.unsqueeze(-1))
    if rows.labels is None or rows.smoothing is not None:
        gap.copy_(found.gap)
    return e


def reduce_tile(
    rows: Rows, block: Block, chunk: slice, z: Tensor, scratch: Scratch, candidates: Candidates, found: Part | None
) -> Part:
    """What a tile of z leaves of its rows; `found` is what came before it. Leaves exp(z - m) in z, 0 for candidates.

    Of class probabilities the candidate is the row's top class: it becomes this tile's where that is higher.
    """
    if rows.labels is None:
        m, top = z.max(-1, keepdim=True)
    else:
        m, top = z.amax(-1, keepdim=True), None
    m.clamp_(min=torch.finfo(z.dtype).min)  # a tile that is -inf throughout adds nothing
    z.sub_(m)
    mass = _dense_mass(rows, block, chunk, scratch)
    total = gap = torch.zeros_like(m.squeeze(-1))
    if mass is not None:
        product = torch.mul(z, mass, out=scratch.view(2, z.shape)).neg_()
        product.masked_fill_((mass == 0) & (z == -math.inf), 0.0)
        gap, total = row_sum(product), row_sum(mass.expand_as(z))
    e = z.exp_()
    if top is None:
        here = candidates.within(chunk)
        put(e, here, chunk, 0.0)
        m = m.squeeze(-1)
        return Part(m, row_sum(e) + candidates_but_top(here, m), gap, total)
    # What stands for the top, 1, is left out; where no class is left it is 0, and the rest -1.
    of_top = e.gather(-1, top).squeeze(-1)
    e.scatter_(-1, top, 0.0)
    m = m.squeeze(-1)
    top += chunk.start
    candidates.classes.copy_(
        top if found is None else torch.where((m > found.m).unsqueeze(-1), top, candidates.classes)
    )
    return Part(m, row_sum(e) + (of_top - 1.0), gap, total)


def _adjusted(rows: Rows, block: Block, chunk: slice, scratch: Scratch, into: Tensor | None = None) -> Tensor:
    """z of a block, written into a tensor of its shape if that is fit for it, else into scratch."""
    logits = rows.problem.logits[block][..., chunk]
    if into is not None and into.dtype == rows.problem.compute_dtype and into.is_contiguous():
        z = into
    else:
        z = scratch.view(0, logits.shape)
    offset = None if rows.offset is None else rows.offset[chunk]
    if rows.scale is None:
        combine(z, logits, offset, torch.add)
    else:
        combine(z, logits, rows.scale[chunk], torch.mul)
        if offset is not None:
            z.add_(offset)
    if rows.dropped is not None:
        z.masked_fill_(rows.dropped[chunk], -math.inf)
    return z


def _dense_mass(rows: Rows, block: Block, chunk: slice, scratch: Scratch) -> Tensor | None:
    """Target mass over all classes, broadcastable to the block: smoothing (for a share of 1) or probabilities."""
    smoothing = None if rows.smoothing is None else rows.smoothing[chunk]
    if rows.labels is not None:
        return smoothing
    target = rows.problem.target[block][..., chunk]
    mass = scratch.view(1, target.shape).copy_(target).mul_(1.0 - rows.problem.label_smoothing)
    if rows.weight is not None:
        mass.mul_(rows.weight[chunk])
    return mass if smoothing is None else mass.add_(smoothing)


def _spread_gradient(
    rows: Rows,
    block: Block,
    width: int,
    scratch: Scratch,
    state: State,
    candidates: Candidates,
    grad_rows: Tensor,
    grad_logits: Tensor | None,
    grad_offset: Tensor | None,
    e: Tensor | None,
) -> None:
    """g * (A * p_c - t_c) for every class of a block but the candidates, for logits and added up for the offset.

    `e` is what `_reduce_block` left in scratch for this block; without it the exponentials are made again.
    """
    m, rest, total, g = (part.unsqueeze(-1) for part in (*state, grad_rows))
    scale = g * total / (1.0 + rest)
    find_top = rows.labels is None and e is None
    if find_top:
        candidates.uses.fill_(False)
        candidates.z.copy_(m)
    for chunk in class_chunks(rows.problem.logits.shape[-1], width):
        part = e
        if part is None:
            part = _adjusted(rows, block, chunk, scratch)
            if find_top:
                top = part.argmax(-1, keepdim=True)
                is_top = (part.gather(-1, top) == m) & ~candidates.uses
                candidates.classes.copy_(torch.where(is_top, top + chunk.start, candidates.classes))
                candidates.uses.logical_or_(is_top)
            part.sub_(m).exp_()
        grad = part
        if grad_logits is not None and grad_logits.dtype == part.dtype and grad_offset is None:
            grad = grad_logits[..., chunk]
        torch.mul(part, scale, out=grad)
        take_dense_mass(rows, block, chunk, grad, g, scratch)
        if grad_offset is not None:
            put(grad, candidates, chunk, 0.0)
            if not rows.all_live and rows.labels is not None:
                grad.masked_fill_(~rows.labels.live[block].unsqueeze(-1), 0.0)
            grad_offset[chunk] += grad.sum((0, 1), dtype=torch.float64)
        if grad_logits is not None and rows.scale is not None:
            grad.mul_(rows.scale[chunk])
        if grad_logits is not None and grad is part:
            grad_logits[..., chunk].copy_(grad)


def take_dense_mass(rows: Rows, block: Block, chunk: slice, grad: Tensor, g: Tensor, scratch: Scratch) -> None:
    """Subtract g * t_c, smoothing or probabilities, from a tile of g * A * p_c; a class at -inf keeps its 0."""
    mass = _dense_mass(rows, block, chunk, scratch)
    if mass is None:
        return
    grad.addcmul_(mass, g if rows.labels is None else g * rows.labels.share[block].unsqueeze(-1), value=-1.0)
    if rows.dropped is not None:
        grad.masked_fill_(rows.dropped[chunk], 0.0)


def _finish_gradient(
    rows: Rows, state: State, grad_rows: Tensor, grad_logits: Tensor | None, grad_offset: Tensor | None
) -> None:
    """Write the candidates' columns, and zeros where a row does not count."""
    candidates, grad = rows.candidates, candidate_gradient(rows, state, grad_rows)
    if grad_logits is not None:
        scaled = grad if rows.scale is None else grad * rows.scale[candidates.classes]
        put(grad_logits, candidates, slice(0, grad_logits.shape[-1]), scaled)
        if not rows.all_live and rows.labels is not None:
            grad_logits.masked_fill_(~rows.labels.live.unsqueeze(-1), 0.0)
    if grad_offset is not None:
        at = candidates.uses.nonzero(as_tuple=True)
        grad_offset.index_add_(0, candidates.classes[at], grad[at].double())
