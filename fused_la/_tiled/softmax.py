"""Partial softmax state of a row whose classes are processed in tiles, and how partial states merge.

Each tile of classes leaves a `SoftmaxState` of its rows:

    m     = the maximum of z_c
    rest  = the sum of exp(z_c - m) over all its classes but one that attains m
    total = the sum of its dense target mass t_c,    gap = sum_c t_c * (m - z_c)

`merge` makes one state of two. Labels are not part of the dense target mass: what the loss and the gradient need of
them is kept by label. All tensors here are as large as the rows, not as the classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_la._call.problem import Labels, Problem, ShardLabels, label_loss, resolve_labels, sum_by_group, sum_others
from fused_la._tiled import blocks
from fused_la._tiled.blocks import Block, row_sum

ALL_ROWS = (slice(None), slice(None))  # the block of all rows


class Candidates(NamedTuple):
    """The columns whose gradient is computed apart, in the form that keeps the digits of 1 - p.

    They are the labels; for class probabilities the top class, which is filled in as the tiles are processed.
    """

    classes: Tensor  # (N, P, K) int64
    used: Tensor  # (N, P, K) bool: it counts, and no earlier candidate of the row has the same class
    z: Tensor  # (N, P, K) adjusted logits
    one_per_row: bool  # K = 1, all are used, and a row's classes are one tile

    def in_block(self, block: Block) -> Candidates:
        return Candidates(self.classes[block], self.used[block], self.z[block], self.one_per_row)

    def in_chunk(self, chunk: slice) -> Candidates:
        """The candidates with only those used that lie in a chunk of the classes."""
        inside = (self.classes >= chunk.start) & (self.classes < chunk.stop)
        return self if self.one_per_row else self._replace(used=self.used & inside)


class PreparedRows(NamedTuple):
    """A problem with everything that needs no pass over its classes; both passes share it."""

    problem: Problem
    offset: Tensor | None  # (C,), or (G, C) by group
    excluded: Tensor | None  # bool, like offset: at -inf; None if no class is
    weight: Tensor | None  # (C,)
    smoothing: Tensor | None  # (C,) or (G, C) smoothing mass of each class in a row whose labels' weights sum to 1
    labels: Labels | None  # None for class probabilities
    all_live: bool  # every row counts
    candidates: Candidates
    z_as_label: Tensor | None  # (N, P, K) z of the labels with the target_offset; None without one
    scale: Tensor | None  # (C,)
    target_offset: Tensor | None  # (C,)
    groups: Tensor | None = None  # (N, P) int64, in range; None if all rows have one prior
    no_group: Tensor | None = None  # (N, P) bool: the row's group is out of range; None if none can be
    row_scale: Tensor | None = None  # (N, P) the label_scale of the row's label; None without one

    def in_tile(self, values: Tensor, block: Block, chunk: slice, out: Tensor | None = None) -> Tensor:
        """offset, excluded or smoothing for a block of rows and a chunk of classes: (c,), or (n, p, c) if the rows are
        of several groups, in the memory of `out` if that is given."""
        if values.dim() == 1 or self.groups is None:
            return values[chunk]
        groups = self.groups[block]
        if groups.device.type == "cpu":  # elsewhere nothing is read: it would synchronise
            lowest, highest = groups.aminmax()
            if lowest == highest:
                return values[int(lowest), chunk]
        if out is None:
            return values[:, chunk][groups]
        torch.index_select(values[:, chunk], 0, groups.flatten(), out=out.flatten(0, 1))
        return out

    def scale_in_place(self, z: Tensor, block: Block, chunk: slice) -> Tensor:
        """Multiply a tile (n, p, c), of logits or of the gradient of z, by the scales."""
        if self.scale is not None:
            z.mul_(self.scale[chunk])
        return z if self.row_scale is None else z.mul_(self.row_scale[block].unsqueeze(-1))


class SoftmaxState(NamedTuple):
    """Online-softmax state of each row, (N, P) or a block of it: of some classes (partial), or of all of them.

    Of all classes `total` is A, the sum of the whole target mass, labels included.
    """

    m: Tensor  # at least the lowest finite number, also if there was no class
    rest: Tensor  # -1 if there was no class, so that rest + 1, the whole sum, is 0
    total: Tensor
    gap: Tensor | None = None  # backward does not need it

    def in_block(self, block: Block) -> SoftmaxState:
        gap = None if self.gap is None else self.gap[block]
        return SoftmaxState(self.m[block], self.rest[block], self.total[block], gap)


# Preparation ----------------------------------------------------------------------------------------------------------


def prepare(problem: Problem, tiled: bool = False, shard: ShardLabels | None = None) -> PreparedRows:
    """Everything that needs no pass over the classes. If the logits come `tiled`, z of the labels is filled in later.

    With a `shard` the problem has some of the classes, and other ranks have the rest; its logits come tiled.
    """
    offset, weight, smoothing = problem.offset(), problem.computed(problem.weight), problem.smoothing_mass()
    scale, target_offset, z_as_label = problem.computed(problem.scale), problem.computed(problem.target_offset), None
    excluded, on_cpu = None, problem.logits.device.type == "cpu"  # elsewhere nothing is read: it would synchronise
    if offset is not None:
        # If every class is at -inf (in values that could not be read) the gradient must be NaN as the loss is, not 0.
        by_group = offset.dim() == 2
        lowest, highest = offset.aminmax(dim=-1, keepdim=True) if by_group else offset.aminmax()
        if not on_cpu or (lowest.amin() if by_group else lowest).item() == -math.inf:
            excluded = (offset == -math.inf) & ((highest > -math.inf) | (shard is not None))
    groups = no_group = row_scale = None
    if problem.prior_index is not None:
        groups, in_range = problem.groups()
        no_group = None if on_cpu and bool(in_range.all()) else ~in_range
    one_tile = not tiled and problem.logits.shape[-1] <= blocks.BLOCK_ELEMENTS
    if problem.has_probabilities:
        z = problem.logits.new_zeros((*problem.logits.shape[:2], 1), dtype=problem.compute_dtype)
        candidates = Candidates(z.long(), z == 0, z, one_tile)
        return PreparedRows(
            problem, offset, excluded, weight, smoothing, None, True, candidates, None, scale, None, groups, no_group
        )

    labels = resolve_labels(problem, shard)
    all_live = on_cpu and bool(labels.live.all())
    if problem.label_scale is not None:
        row_scale = problem.label_scale.to(problem.compute_dtype)[labels.classes[..., 0]]
    if tiled:
        z = torch.zeros_like(labels.mass)
        z_as_label = None if target_offset is None else torch.zeros_like(z)
    else:
        z = problem.logits.gather(-1, labels.classes).to(problem.compute_dtype)
        if scale is not None:
            z = z * scale[labels.classes]
        if row_scale is not None:
            z = z * row_scale.unsqueeze(-1)
        if target_offset is not None:
            z_as_label = z + target_offset[labels.classes]
        if offset is not None:
            z = z + problem.for_classes(offset, labels.classes)
        if excluded is not None:
            z = z.masked_fill_(problem.for_classes(excluded, labels.classes), -math.inf)
    one_label = labels.classes.shape[-1] == 1
    used = labels.is_local if one_label else labels.is_local & ~_same_class(labels).tril(-1).any(-1)
    candidates = Candidates(labels.classes, used, z, one_label and all_live and one_tile)
    per_class = offset, excluded, weight, smoothing
    return PreparedRows(
        problem, *per_class, labels, all_live, candidates, z_as_label, scale, target_offset, groups, no_group, row_scale
    )


def _same_class(labels: Labels) -> Tensor:
    """(N, P, K, K) bool: which counting labels of a row are of one class."""
    same = labels.global_classes.unsqueeze(-1) == labels.global_classes.unsqueeze(-2)
    return same & labels.counts.unsqueeze(-1) & labels.counts.unsqueeze(-2)


def label_mass_total(rows: PreparedRows, out: Tensor, smoothing: Tensor | None = None) -> Tensor:
    """A of every row with labels; for class probabilities the tiles sum it.

    `smoothing` is the smoothing mass of all classes, where the problem has only some of them.
    """
    if rows.labels is not None:
        torch.sum(rows.labels.mass, -1, out=out)
        if rows.smoothing is not None:
            if smoothing is None:
                smoothing = row_sum(rows.smoothing)
                smoothing = smoothing if smoothing.dim() == 0 or rows.groups is None else smoothing[rows.groups]
            out.addcmul_(rows.labels.share, smoothing)
    return out


# State ----------------------------------------------------------------------------------------------------------------


def empty_state(like: Tensor) -> SoftmaxState:
    """The state of no class."""
    lowest, none = torch.full_like(like, torch.finfo(like.dtype).min), torch.full_like(like, -1.0)
    return SoftmaxState(lowest, none, torch.zeros_like(like), torch.zeros_like(like))


def merge(one: SoftmaxState, two: SoftmaxState) -> SoftmaxState:
    """The state of the classes of both. Nothing cancels, and an empty state changes nothing."""
    m = torch.maximum(one.m, two.m)
    f = (torch.minimum(one.m, two.m) - m).exp()
    rest = torch.where(one.m >= two.m, one.rest + (two.rest + 1.0) * f, two.rest + (one.rest + 1.0) * f)
    return SoftmaxState(m, rest, one.total + two.total, _gap_from(one, m) + _gap_from(two, m))


def _gap_from(state: SoftmaxState, m: Tensor) -> Tensor:
    """The gap of a state's target mass to a maximum that is not below its own."""
    assert state.gap is not None
    return state.gap + torch.where(state.total == 0, 0.0, state.total * (m - state.m))


def finalize_rest(rows: PreparedRows, state: SoftmaxState, block: Block) -> Tensor:
    """The rest of whole rows: NaN where the maximum is infinite, no class takes part, or the group is out of range."""
    rest = torch.where(state.rest < 0.0, math.nan, state.rest) + (state.m - state.m)
    return rest if rows.no_group is None else rest.masked_fill(rows.no_group[block], math.nan)


# Candidates -----------------------------------------------------------------------------------------------------------


def scatter_candidates(out: Tensor, candidates: Candidates, chunk: slice, values: Tensor | float) -> None:
    """Write a number, or values (.., K), to the used candidates' columns in a chunk of an (.., C) tensor."""
    classes = candidates.classes
    if isinstance(values, Tensor):
        values = values.to(out.dtype)
    if candidates.one_per_row and out.dtype in (torch.float32, torch.float64):
        out.scatter_(-1, classes, values)  # in half precision it would make a float copy of the whole tensor
        return
    index = (candidates.used & (classes >= chunk.start) & (classes < chunk.stop)).nonzero(as_tuple=True)
    out[(*index[:-1], classes[index] - chunk.start)] = values[index] if isinstance(values, Tensor) else values


def candidate_sum_without_top(candidates: Candidates, m: Tensor) -> Tensor:
    """Sum of exp(z_k - m) over the used candidates, less the 1 of the row's top class.

    If a candidate is the top class it is left out, not subtracted. If none is, the top class has no label, and neither
    the loss nor a gradient shows the digits that the subtraction costs.
    """
    z, m = candidates.z, m.unsqueeze(-1)
    e = (z - m).exp()
    if candidates.one_per_row:
        return (e - 1.0).squeeze(-1)  # exactly 0 for the top class
    is_top = (z == m) & candidates.used
    is_top &= is_top.cumsum(-1) == 1
    e = torch.where(candidates.used & ~is_top, e, 0.0)
    return e.sum(-1) - torch.where(is_top.any(-1), 0.0, 1.0)


def add_to_offset_gradient(
    grad_offset: Tensor, rows: PreparedRows, block: Block, chunk: slice, grad: Tensor, dtype: torch.dtype
) -> None:
    """Add the gradient of z of a tile (n, p, c), summed in `dtype`, to that of the offset, (C,) or (G, C)."""
    if rows.groups is None:
        grad_offset[chunk] += grad.sum((0, 1), dtype=dtype)
    elif grad.device.type == "cpu":
        grad_offset[:, chunk].index_add_(0, rows.groups[block].flatten(), grad.flatten(0, 1).double())
    else:
        grad_offset[:, chunk] += sum_by_group(grad.to(dtype), rows.groups[block], len(grad_offset))


# Whole rows -----------------------------------------------------------------------------------------------------------


def margin_total(rows: PreparedRows, state: SoftmaxState, block: Block) -> Tensor:
    """(1 + rest) * sum_k t_k / d_k of a block: with a target_offset it takes the place of A.

    The gradient of a class is this times p_c. d_k, the other classes plus the label itself, is the denominator of the
    softmax in which label k has its target_offset.
    """
    assert rows.labels is not None
    _, d = _label_denominators(rows, state, block)
    return (1.0 + state.rest) * (rows.labels.mass[block] / d).sum(-1)


def _label_denominators(rows: PreparedRows, state: SoftmaxState, block: Block) -> tuple[Tensor, Tensor]:
    """(sum over the other classes, d) of the labels of a block with a target_offset, over exp(m), each (N, P, K)."""
    assert rows.z_as_label is not None
    m, rest = state.m.unsqueeze(-1), state.rest.unsqueeze(-1)
    others = sum_others(rows.candidates.z[block], m, rest)
    return others, others + (rows.z_as_label[block] - m).exp()


def row_losses(rows: PreparedRows, state: SoftmaxState) -> Tensor:
    """The loss of each row, (N, P)."""
    if rows.z_as_label is not None and rows.labels is not None:
        m, rest = state.m.unsqueeze(-1), state.rest.unsqueeze(-1)
        each = label_loss(m - rows.z_as_label, sum_others(rows.candidates.z, m, rest))
        each = each.masked_fill((rows.labels.mass == 0) & (each == math.inf), 0.0)
        return torch.where(rows.labels.live, (rows.labels.mass * each).sum(-1), 0.0)
    loss = state.total * state.rest.log1p()
    assert state.gap is not None
    if rows.labels is None:
        return loss + state.gap
    labels, label_gap = rows.labels, state.m.unsqueeze(-1) - rows.candidates.z
    if rows.weight is not None or rows.problem.target_weight is not None or rows.problem.label_smoothing == 1.0:
        label_gap = label_gap.masked_fill((labels.mass == 0) & (label_gap == math.inf), 0.0)
    loss = loss + (labels.mass * label_gap).sum(-1)
    if rows.smoothing is not None:
        loss = loss + labels.share * state.gap
    return loss if rows.all_live else torch.where(labels.live, loss, 0.0)


def candidate_gradient(rows: PreparedRows, state: SoftmaxState, grad_rows: Tensor) -> Tensor:
    """The gradient of the candidates' z, (N, P, K), in the form that keeps the digits of 1 - p."""
    m, rest, total, g = (values.unsqueeze(-1) for values in (state.m, state.rest, state.total, grad_rows))
    candidates = rows.candidates
    if rows.labels is None:
        t = rows.problem.target.gather(-1, candidates.classes).to(m.dtype) * (1.0 - rows.problem.label_smoothing)
        if rows.weight is not None:
            t = t * rows.weight[candidates.classes]
        if rows.smoothing is not None:
            t = t + rows.problem.for_classes(rows.smoothing, candidates.classes)
    else:
        t = rows.labels.mass
        if t.shape[-1] > 1:
            t = torch.where(_same_class(rows.labels), t.unsqueeze(-2), 0.0).sum(-1)
        if rows.smoothing is not None:
            smoothing = rows.problem.for_classes(rows.smoothing, candidates.classes)
            t = t + rows.labels.share.unsqueeze(-1) * smoothing
    if rows.z_as_label is None or rows.labels is None:
        d = 1.0 + rest
        p = (candidates.z - m).exp() / d
        not_p = torch.where(candidates.z == m, rest / d, 1.0 - p)
        grad = g * ((total - t) * p - t * not_p)
    else:
        others, d = _label_denominators(rows, state, ALL_ROWS)
        other_labels = ~_same_class(rows.labels)
        of_others = torch.where(other_labels, (rows.labels.mass / d).unsqueeze(-2), 0.0).sum(-1)
        grad = g * ((candidates.z - m).exp() * of_others - t * (others / d))
    if rows.excluded is not None and rows.z_as_label is None:
        grad = grad.masked_fill(rows.problem.for_classes(rows.excluded, candidates.classes), 0.0)
    return grad
