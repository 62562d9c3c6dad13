"""Rows whose classes come in pieces: what is prepared, what a piece leaves, and what labels have of their own.

A piece, a tile or chunk of the classes, leaves a `Part` of each row: m its maximum, rest the sum of exp(z_c - m) over
all its classes but one that attains m, and of its dense target mass the total and the gap sum_c t_c * (m - z_c). `join`
makes one part of two. Everything here is as large as the rows, not as the classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_la._call.problem import Labels, Problem, Shard, others_than, past, read_labels
from fused_la._tiled import blocks
from fused_la._tiled.blocks import Block, row_sum

ALL = (slice(None), slice(None))  # the block of all rows


class Candidates(NamedTuple):
    """The columns with a gradient of their own: the labels, or the top class, which is filled in as the blocks pass."""

    classes: Tensor  # (N, P, K) int64
    uses: Tensor  # (N, P, K) bool: it counts, and no earlier one of the row is equal
    z: Tensor  # (N, P, K) adjusted logits
    one_each: bool  # K = 1, all are used, and all classes come at once

    def of(self, block: Block) -> Candidates:
        return Candidates(self.classes[block], self.uses[block], self.z[block], self.one_each)

    def within(self, chunk: slice) -> Candidates:
        """The candidates with only those in use that lie in a chunk of the classes."""
        here = (self.classes >= chunk.start) & (self.classes < chunk.stop)
        return self if self.one_each else self._replace(uses=self.uses & here)


class Rows(NamedTuple):
    """What the passes share, prepared once a call."""

    problem: Problem
    offset: Tensor | None  # (C,)
    dropped: Tensor | None  # (C,) bool, None where no class is at -inf
    weight: Tensor | None  # (C,)
    smoothing: Tensor | None  # (C,) mass that a row of share 1 gives each class
    labels: Labels | None  # None for class probabilities
    all_live: bool  # every row counts
    candidates: Candidates
    as_label: Tensor | None  # (N, P, K) what labels stand at, where that is not z
    scale: Tensor | None  # (C,)
    target_offset: Tensor | None  # (C,)


class Part(NamedTuple):
    """What some of the classes leave of each row, (N, P) or a block of it."""

    m: Tensor  # at least the lowest finite number, also where no class is left
    rest: Tensor  # -1 where no class is left: the first top takes the place of one that was never there
    gap: Tensor
    total: Tensor


class State(NamedTuple):
    """A row's result: all that its gradient needs. Each (N, P), or a block of it."""

    m: Tensor
    rest: Tensor
    total: Tensor  # A, the sum of the target mass

    def of(self, block: Block) -> State:
        return State(self.m[block], self.rest[block], self.total[block])


# Preparation ----------------------------------------------------------------------------------------------------------


def prepare(problem: Problem, in_pieces: bool = False, shard: Shard | None = None) -> Rows:
    """All that needs no pass over the classes. Where they come `in_pieces`, what labels stand at is filled in later.

    A `shard` comes in pieces. Of one that has no class left there are others that have.
    """
    offset, weight, smoothing = problem.offset(), problem.computed(problem.weight), problem.smoothing_mass()
    scale, target_offset, as_label = problem.computed(problem.scale), problem.computed(problem.target_offset), None
    dropped, on_cpu = None, problem.logits.device.type == "cpu"  # elsewhere nothing is read: it would synchronise
    if offset is not None:
        # Where no class is left (values that the door could not read) the gradient must be NaN as the loss is, not 0.
        lowest, highest = offset.aminmax()
        if not on_cpu:
            dropped = (offset == -math.inf) & ((highest > -math.inf) | (shard is not None))
        elif lowest.item() == -math.inf and (shard is not None or highest.item() > -math.inf):
            dropped = offset == -math.inf
    one_chunk = not in_pieces and problem.logits.shape[-1] <= blocks.BLOCK_ELEMENTS
    if problem.has_probabilities:
        z = problem.logits.new_zeros((*problem.logits.shape[:2], 1), dtype=problem.compute_dtype)
        candidates = Candidates(z.long(), z == 0, z, one_chunk)
        return Rows(problem, offset, dropped, weight, smoothing, None, True, candidates, None, scale, None)

    labels = read_labels(problem, shard)
    all_live = on_cpu and bool(labels.live.all())
    if in_pieces:
        z = torch.zeros_like(labels.mass)
        as_label = None if target_offset is None else torch.zeros_like(z)
    else:
        z = problem.logits.gather(-1, labels.classes).to(problem.compute_dtype)
        if scale is not None:
            z = z * scale[labels.classes]
        if target_offset is not None:
            as_label = z + target_offset[labels.classes]
        if offset is not None:
            z = z + offset[labels.classes]
        if dropped is not None:
            z = z.masked_fill_(dropped[labels.classes], -math.inf)
    one_label = labels.classes.shape[-1] == 1
    uses = labels.here if one_label else labels.here & ~_same_label(labels).tril(-1).any(-1)
    candidates = Candidates(labels.classes, uses, z, one_label and all_live and one_chunk)
    return Rows(
        problem, offset, dropped, weight, smoothing, labels, all_live, candidates, as_label, scale, target_offset
    )


def _same_label(labels: Labels) -> Tensor:
    """(N, P, K, K) bool: which counting labels of a row are equal."""
    same = labels.names.unsqueeze(-1) == labels.names.unsqueeze(-2)
    return same & labels.counts.unsqueeze(-1) & labels.counts.unsqueeze(-2)


def label_total(rows: Rows, out: Tensor, smoothing: Tensor | None = None) -> Tensor:
    """A of every row with labels; that of class probabilities is summed as their blocks pass.

    `smoothing` is what smoothing asks of all classes, where the problem has only some of them.
    """
    if rows.labels is not None:
        torch.sum(rows.labels.mass, -1, out=out)
        if rows.smoothing is not None:
            out.addcmul_(rows.labels.share, row_sum(rows.smoothing) if smoothing is None else smoothing)
    return out


# Parts ----------------------------------------------------------------------------------------------------------------


def empty_part(like: Tensor) -> Part:
    lowest, none = torch.full_like(like, torch.finfo(like.dtype).min), torch.full_like(like, -1.0)
    return Part(lowest, none, torch.zeros_like(like), torch.zeros_like(like))


def join(one: Part, two: Part) -> Part:
    """Two parts of each row as one. Nothing cancels, and an empty part changes nothing."""
    m = torch.maximum(one.m, two.m)
    f = (torch.minimum(one.m, two.m) - m).exp()
    rest = torch.where(one.m >= two.m, one.rest + (two.rest + 1.0) * f, two.rest + (one.rest + 1.0) * f)
    gaps = [part.gap + torch.where(part.total == 0, 0.0, part.total * (m - part.m)) for part in (one, two)]
    return Part(m, rest, gaps[0] + gaps[1], one.total + two.total)


def settled(part: Part) -> Tensor:
    """The rest of whole rows: NaN where the maximum is infinite or no class is left."""
    return torch.where(part.rest < 0.0, math.nan, part.rest) + (part.m - part.m)


# Candidates -----------------------------------------------------------------------------------------------------------


def put(into: Tensor, candidates: Candidates, chunk: slice, values: Tensor | float) -> None:
    """Write a number, or values (.., K), to the used candidates' columns in a chunk of an (.., C) tensor."""
    classes = candidates.classes
    if isinstance(values, Tensor):
        values = values.to(into.dtype)
    if candidates.one_each and into.dtype in (torch.float32, torch.float64):
        into.scatter_(-1, classes, values)  # in half precision it would make a float copy of all of `into`
        return
    at = (candidates.uses & (classes >= chunk.start) & (classes < chunk.stop)).nonzero(as_tuple=True)
    into[(*at[:-1], classes[at] - chunk.start)] = values[at] if isinstance(values, Tensor) else values


def candidates_but_top(candidates: Candidates, m: Tensor) -> Tensor:
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


# All rows -------------------------------------------------------------------------------------------------------------


def margin_total(rows: Rows, state: State, block: Block) -> Tensor:
    """(1 + rest) * sum_k t_k / d_k of a block, what A is without a target_offset: p_c times it is a class's gradient.

    d_k, others plus the label itself, is the denominator of label k's own softmax.
    """
    assert rows.labels is not None
    _, d = _label_terms(rows, state, block)
    return (1.0 + state.rest) * (rows.labels.mass[block] / d).sum(-1)


def _label_terms(rows: Rows, state: State, block: Block) -> tuple[Tensor, Tensor]:
    """(others, d) of the labels of a block with a target_offset, over exp(m), each (N, P, K)."""
    assert rows.as_label is not None
    m, rest = state.m.unsqueeze(-1), state.rest.unsqueeze(-1)
    others = others_than(rows.candidates.z[block], m, rest)
    return others, others + (rows.as_label[block] - m).exp()


def row_losses(rows: Rows, state: State, gap: Tensor) -> Tensor:
    if rows.as_label is not None and rows.labels is not None:
        m, rest = state.m.unsqueeze(-1), state.rest.unsqueeze(-1)
        each = past(m - rows.as_label, others_than(rows.candidates.z, m, rest))
        each = each.masked_fill((rows.labels.mass == 0) & (each == math.inf), 0.0)
        return torch.where(rows.labels.live, (rows.labels.mass * each).sum(-1), 0.0)
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


def candidate_gradient(rows: Rows, state: State, grad_rows: Tensor) -> Tensor:
    """The gradient of the candidates' z, (N, P, K), in the form that keeps the digits of 1 - p."""
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
    if rows.as_label is None or rows.labels is None:
        d = 1.0 + rest
        p = (candidates.z - m).exp() / d
        not_p = torch.where(candidates.z == m, rest / d, 1.0 - p)
        grad = g * ((total - t) * p - t * not_p)
    else:
        others, d = _label_terms(rows, state, ALL)
        other_labels = ~_same_label(rows.labels)
        of_others = torch.where(other_labels, (rows.labels.mass / d).unsqueeze(-2), 0.0).sum(-1)
        grad = g * ((candidates.z - m).exp() * of_others - t * (others / d))
    if rows.dropped is not None and rows.as_label is None:
        grad = grad.masked_fill(rows.dropped[candidates.classes], 0.0)
    return grad
