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
from typing import NamedTuple

import torch
from torch import Tensor

from fused_la import _blocks
from fused_la._blocks import Block, Scratch, class_chunks, row_blocks, row_sum, sum_in_order
from fused_la._problem import Labels, Problem, read_labels, reduce_rows


class _Candidates(NamedTuple):
    """The columns with a gradient of their own: the labels, or the top class, which is filled in as the blocks pass."""

    classes: Tensor  # (N, P, K) int64
    uses: Tensor  # (N, P, K) bool: it counts, and no earlier one of the row is equal
    z: Tensor  # (N, P, K) adjusted logits
    one_each: bool  # K = 1, all are used, and no chunk is less than a row

    def of(self, block: Block) -> _Candidates:
        return _Candidates(self.classes[block], self.uses[block], self.z[block], self.one_each)


class _Rows(NamedTuple):
    """What the passes share, prepared once a call."""

    problem: Problem
    offset: Tensor | None  # (C,)
    dropped: Tensor | None  # (C,) bool, None where no class is at -inf
    weight: Tensor | None  # (C,)
    smoothing: Tensor | None  # (C,) mass that a row of share 1 gives each class
    labels: Labels | None  # None for class probabilities
    all_live: bool  # every row counts
    candidates: _Candidates


class _State(NamedTuple):
    """A row's result: all that its gradient needs. Each (N, P), or a block of it."""

    m: Tensor
    rest: Tensor
    total: Tensor  # A, the sum of the target mass

    def of(self, block: Block) -> _State:
        return _State(self.m[block], self.rest[block], self.total[block])


def forward_gradient(problem: Problem, reduction: str) -> bool:
    """Whether the forward pass makes the gradient as well, from exponentials that it has at hand.

    Not for float16: a gradient written before a GradScaler's factor reaches it underflows.
    """
    return reduction != "none" and problem.logits.dtype != torch.float16


def forward(problem: Problem, reduction: str, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, row state (3, N, P), the mean's denominator (empty for "none"), the gradient for an upstream of 1."""
    rows = _prepare(problem)
    n_outer, n_inner, _ = problem.logits.shape
    stacked = torch.empty(3, n_outer, n_inner, dtype=problem.compute_dtype)
    state = _State(stacked[0], stacked[1], _label_total(rows, out=stacked[2]))
    gap = torch.zeros_like(state.m)
    row_weight = torch.ones_like(state.m) if rows.labels is None else rows.labels.row_weight
    normalizer = row_weight.sum()
    scale = normalizer.reciprocal() if reduction == "mean" else torch.ones_like(normalizer)
    grad_rows = scale.expand(n_outer, n_inner)
    grad_logits = torch.empty_like(problem.logits) if with_gradient else problem.logits.new_empty(0)

    scratch = Scratch(problem, forward=True)
    for block in row_blocks(n_outer, n_inner, scratch.height):
        out = grad_logits[block] if with_gradient else None
        part, candidates = state.of(block), rows.candidates.of(block)
        e = _reduce_block(rows, block, scratch, part, candidates, gap[block], out)
        if with_gradient:
            _spread_gradient(rows, block, scratch, part, candidates, grad_rows[block], out, None, e)
    if with_gradient:
        _finish_gradient(rows, state, grad_rows, grad_logits, None)
    loss = reduce_rows(_loss(rows, state, gap), normalizer, reduction)
    if reduction == "none":
        normalizer = normalizer.new_empty(0)
    return loss, stacked, normalizer, grad_logits


def backward(
    problem: Problem,
    stacked: Tensor,
    grad_loss: Tensor,
    normalizer: Tensor | None,
    needs_logits: bool,
    needs_log_prior: bool,
    made_for_one: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of logits (N, P, C) and log_prior (C,), None where not needed; grad_loss (N, P) over normalizer.

    `made_for_one` is what forward made of the logits', for a grad_loss of 1: scaled where it stands unless 1 came.
    """
    if made_for_one is not None:
        upstream = grad_loss[:1, :1]  # a scalar expanded, or of no rows
        is_one = upstream.numel() == 0 or upstream.item() == 1.0
        return made_for_one if is_one else made_for_one.mul_(upstream), None
    grad_rows = grad_loss.to(problem.compute_dtype)
    grad_rows = grad_rows if normalizer is None else grad_rows / normalizer
    rows = _prepare(problem)
    state = _State(stacked[0], stacked[1], stacked[2])
    grad_logits = torch.empty_like(problem.logits) if needs_logits else None
    # Summed in float64: over many rows a float32 sum would lose what the rows' gradients hold.
    grad_offset = torch.zeros(problem.logits.shape[-1], dtype=torch.float64) if needs_log_prior else None
    scratch = Scratch(problem, forward=False, sums_gradient=needs_log_prior)
    for block in row_blocks(state.m.shape[0], state.m.shape[1], scratch.height):
        out = None if grad_logits is None else grad_logits[block]
        part, candidates = state.of(block), rows.candidates.of(block)
        _spread_gradient(rows, block, scratch, part, candidates, grad_rows[block], out, grad_offset, None)
    _finish_gradient(rows, state, grad_rows, grad_logits, grad_offset)
    if grad_offset is None or problem.log_prior is None:
        return grad_logits, None
    return grad_logits, (grad_offset * problem.tau).to(problem.log_prior.dtype)


# Preparation ----------------------------------------------------------------------------------------------------------


def _prepare(problem: Problem) -> _Rows:
    offset, weight, smoothing = problem.offset(), problem.class_weight(), problem.smoothing_mass()
    dropped = None
    if offset is not None:
        lowest, highest = offset.aminmax()
        # Where no class is left (values that the door could not read) the gradient must be NaN as the loss is, not 0.
        dropped = offset == -math.inf if lowest.item() == -math.inf < highest.item() else None
    one_chunk = problem.logits.shape[-1] <= _blocks.BLOCK_ELEMENTS
    if problem.has_probabilities:
        z = torch.zeros(*problem.logits.shape[:2], 1, dtype=problem.compute_dtype)
        candidates = _Candidates(z.long(), z == 0, z, one_chunk)
        return _Rows(problem, offset, dropped, weight, smoothing, None, True, candidates)

    labels = read_labels(problem)
    all_live = bool(labels.live.all())
    z = problem.logits.gather(-1, labels.classes).to(problem.compute_dtype)
    if offset is not None:
        z = z + offset[labels.classes]
    if dropped is not None:
        z = z.masked_fill_(dropped[labels.classes], -math.inf)
    one_label = labels.classes.shape[-1] == 1
    uses = labels.counts if one_label else labels.counts & ~_same_label(labels).tril(-1).any(-1)
    candidates = _Candidates(labels.classes, uses, z, one_label and all_live and one_chunk)
    return _Rows(problem, offset, dropped, weight, smoothing, labels, all_live, candidates)


def _same_label(labels: Labels) -> Tensor:
    """(N, P, K, K) bool: which counting labels of a row are equal."""
    same = labels.classes.unsqueeze(-1) == labels.classes.unsqueeze(-2)
    return same & labels.counts.unsqueeze(-1) & labels.counts.unsqueeze(-2)


def _label_total(rows: _Rows, out: Tensor) -> Tensor:
    """A of every row with labels; that of class probabilities is summed as their blocks pass."""
    if rows.labels is not None:
        torch.sum(rows.labels.mass, -1, out=out)
        if rows.smoothing is not None:
            out.addcmul_(rows.labels.share, row_sum(rows.smoothing))
    return out


# A block --------------------------------------------------------------------------------------------------------------


def _reduce_block(
    rows: _Rows,
    block: Block,
    scratch: Scratch,
    state: _State,
    candidates: _Candidates,
    gap: Tensor,
    grad_logits: Tensor | None,
) -> Tensor | None:
    """Fill in a block's m and rest, and of its dense target mass the total and the gap sum_c t_c * (m - z_c).

    Works where the gradient will stand if it can, and in scratch otherwise. Returns exp(z - m), 0 in the candidates'
    columns, where whole rows of it are left.
    """
    maxima, sums, gaps, masses, tops = [], [], [], [], []
    e = None
    for chunk in class_chunks(rows.problem.logits.shape[-1], scratch.width):
        whole = chunk.stop - chunk.start == rows.problem.logits.shape[-1]
        z = _adjusted(rows, block, chunk, scratch, grad_logits if whole else None)
        if rows.labels is None:
            m, top = z.max(-1, keepdim=True)
            tops.append(top + chunk.start)
        else:
            m, top = z.amax(-1, keepdim=True), None
        # A chunk that is -inf throughout adds nothing; a row that is so throughout is NaN.
        z.sub_(m if whole else m.masked_fill(m == -math.inf, 0.0))
        mass = _dense_mass(rows, block, chunk, scratch)
        if mass is not None:
            product = torch.mul(z, mass, out=scratch.view(2, z.shape)).neg_()
            product.masked_fill_((mass == 0) & (z == -math.inf), 0.0)
            gaps.append(row_sum(product))
            masses.append(row_sum(mass.expand_as(z)))
        e = z.exp_()
        if top is None:
            _put(e, candidates, chunk, 0.0)
        else:
            e.scatter_(-1, top, 0.0)
        sums.append(row_sum(e))
        maxima.append(m.squeeze(-1))

    if len(maxima) == 1:
        m, rest = maxima[0], sums[0]
    else:
        e = None
        m = torch.stack(maxima).amax(0)
        shifts = [torch.where(part == -math.inf, -math.inf, part - m) for part in maxima]
        rest = sum_in_order([part * shift.exp() for part, shift in zip(sums, shifts, strict=True)])
        if masses:
            gaps += [torch.where(mass == 0, 0.0, -mass * by) for mass, by in zip(masses, shifts, strict=True)]
    if rows.labels is None:
        every = torch.stack(maxima, -1)
        first = every.argmax(-1, keepdim=True)
        candidates.classes.copy_(torch.cat(tops, -1).gather(-1, first))
        candidates.z.copy_(m.unsqueeze(-1))
        rest = rest + (every - m.unsqueeze(-1)).exp().scatter(-1, first, 0.0).sum(-1)
        state.total.copy_(sum_in_order(masses))
    else:
        rest = rest + _candidates_but_top(candidates, m)
    state.m.copy_(m)
    torch.add(rest, m - m, out=state.rest)  # an infinite maximum makes the row NaN
    if gaps:
        gap.copy_(sum_in_order(gaps))
    return e


def _adjusted(rows: _Rows, block: Block, chunk: slice, scratch: Scratch, into: Tensor | None = None) -> Tensor:
    """z of a block, written into a tensor of its shape if that is fit for it, else into scratch."""
    logits = rows.problem.logits[block][..., chunk]
    if into is not None and into.dtype == rows.problem.compute_dtype and into.is_contiguous():
        z = into
    else:
        z = scratch.view(0, logits.shape)
    if rows.offset is None:
        z.copy_(logits)
    else:
        torch.add(logits, rows.offset[chunk], out=z)
    if rows.dropped is not None:
        z.masked_fill_(rows.dropped[chunk], -math.inf)
    return z


def _dense_mass(rows: _Rows, block: Block, chunk: slice, scratch: Scratch) -> Tensor | None:
    """Target mass over all classes, broadcastable to the block: smoothing (for a share of 1) or probabilities."""
    smoothing = None if rows.smoothing is None else rows.smoothing[chunk]
    if rows.labels is not None:
        return smoothing
    target = rows.problem.target[block][..., chunk]
    mass = scratch.view(1, target.shape).copy_(target).mul_(1.0 - rows.problem.label_smoothing)
    if rows.weight is not None:
        mass.mul_(rows.weight[chunk])
    return mass if smoothing is None else mass.add_(smoothing)


def _put(into: Tensor, candidates: _Candidates, chunk: slice, values: Tensor | float) -> None:
    """Write a number, or values (.., K), to the used candidates' columns in a chunk of an (.., C) tensor."""
    classes = candidates.classes
    if isinstance(values, Tensor):
        values = values.to(into.dtype)
    if candidates.one_each and into.dtype in (torch.float32, torch.float64):
        into.scatter_(-1, classes, values)  # in half precision it would make a float copy of all of `into`
        return
    at = (candidates.uses & (classes >= chunk.start) & (classes < chunk.stop)).nonzero(as_tuple=True)
    into[(*at[:-1], classes[at] - chunk.start)] = values[at] if isinstance(values, Tensor) else values


def _candidates_but_top(candidates: _Candidates, m: Tensor) -> Tensor:
    """Sum of exp(z_k - m) over the used candidates, less the 1 of the row's top class.

    Where a candidate is the top class it is left out, not subtracted. Elsewhere the top class has no label, and neither
    the loss nor a gradient shows the digits that the subtraction costs.
    """
    z, m = candidates.z, m.unsqueeze(-1)
    e = (z - m).exp()
    if candidates.one_each:
        return (e - 1.0).squeeze(-1)  # exactly 0 for the top class
    is_top = (z == m) & candidates.uses
    is_top &= is_top.cumsum(-1) == 1
    e = torch.where(candidates.uses & ~is_top, e, 0.0)
    return e.sum(-1) - torch.where(is_top.any(-1), 0.0, 1.0)


def _spread_gradient(
    rows: _Rows,
    block: Block,
    scratch: Scratch,
    state: _State,
    candidates: _Candidates,
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
    for chunk in class_chunks(rows.problem.logits.shape[-1], scratch.width):
        part = e
        if part is None:
            part = _adjusted(rows, block, chunk, scratch)
            if find_top:
                top = part.argmax(-1, keepdim=True)
                is_top = (part.gather(-1, top) == m) & ~candidates.uses
                candidates.classes.copy_(torch.where(is_top, top + chunk.start, candidates.classes))
                candidates.uses.logical_or_(is_top)
            part.sub_(m).exp_()
        mass = _dense_mass(rows, block, chunk, scratch)
        grad = part
        if grad_logits is not None and grad_logits.dtype == part.dtype and grad_offset is None:
            grad = grad_logits[..., chunk]
        torch.mul(part, scale, out=grad)
        if mass is not None:
            grad.addcmul_(mass, g if rows.labels is None else g * rows.labels.share[block].unsqueeze(-1), value=-1.0)
            if rows.dropped is not None:
                grad.masked_fill_(rows.dropped[chunk], 0.0)
        if grad_offset is not None:
            _put(grad, candidates, chunk, 0.0)
            if not rows.all_live and rows.labels is not None:
                grad.masked_fill_(~rows.labels.live[block].unsqueeze(-1), 0.0)
            grad_offset[chunk] += grad.sum((0, 1), dtype=torch.float64)
        if grad_logits is not None and grad is part:
            grad_logits[..., chunk].copy_(grad)


# All rows -------------------------------------------------------------------------------------------------------------


def _loss(rows: _Rows, state: _State, gap: Tensor) -> Tensor:
    loss = state.total * state.rest.log1p()
    if rows.labels is None:
        return loss + gap
    labels, label_gap = rows.labels, state.m.unsqueeze(-1) - rows.candidates.z
    if rows.weight is not None or rows.problem.target_weight is not None or rows.problem.label_smoothing == 1.0:
        label_gap = label_gap.masked_fill((labels.mass == 0) & (label_gap == math.inf), 0.0)
    loss = loss + (labels.mass * label_gap).sum(-1)
    if rows.smoothing is not None:
        loss = loss + labels.share * gap
    return loss if rows.all_live else torch.where(labels.live, loss, 0.0)


def _finish_gradient(
    rows: _Rows, state: _State, grad_rows: Tensor, grad_logits: Tensor | None, grad_offset: Tensor | None
) -> None:
    """The candidates' columns, in the form that keeps the digits of 1 - p, and zeros where a row does not count."""
    m, rest, total, g = (part.unsqueeze(-1) for part in (*state, grad_rows))
    candidates = rows.candidates
    if rows.labels is None:
        t = rows.problem.target.gather(-1, candidates.classes).to(m.dtype) * (1.0 - rows.problem.label_smoothing)
        if rows.weight is not None:
            t = t * rows.weight[candidates.classes]
        if rows.smoothing is not None:
            t = t + rows.smoothing[candidates.classes]
    else:
        t = rows.labels.mass
        if t.shape[-1] > 1:
            t = torch.where(_same_label(rows.labels), t.unsqueeze(-2), 0.0).sum(-1)
        if rows.smoothing is not None:
            t = t + rows.labels.share.unsqueeze(-1) * rows.smoothing[candidates.classes]
    d = 1.0 + rest
    p = (candidates.z - m).exp() / d
    not_p = torch.where(candidates.z == m, rest / d, 1.0 - p)
    grad = g * ((total - t) * p - t * not_p)
    if rows.dropped is not None:
        grad.masked_fill_(rows.dropped[candidates.classes], 0.0)

    if grad_logits is not None:
        _put(grad_logits, candidates, slice(0, grad_logits.shape[-1]), grad)
        if not rows.all_live and rows.labels is not None:
            grad_logits.masked_fill_(~rows.labels.live.unsqueeze(-1), 0.0)
    if grad_offset is not None:
        at = candidates.uses.nonzero(as_tuple=True)
        grad_offset.index_add_(0, candidates.classes[at], grad[at].double())
