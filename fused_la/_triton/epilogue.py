"""Loss and gradient of rows from their softmax state; the gradient a tile at a time, then a label at a time.

    loss          = sum_c t_c * (m - z_c) + A * log1p(rest),      A = sum_c t_c
    p_c           = exp(z_c - m) / (1 + rest),    1 - p_c = rest / (1 + rest) for the class that attains m
    grad_logits_c = g * ((A - t_c) * p_c - t_c * (1 - p_c))

with g the row's upstream gradient (over the mean's denominator). No term cancels: the target of a confident row has
(A - t) = 0, and its 1 - p comes directly from `rest`. Most classes are no label, and their gradient is g * A * p_c
(less their smoothing mass). It is written for all classes of a tile, and then the labels' columns are overwritten. A
class at log_prior = -inf has gradient 0 (NaN in a row that is NaN). A row without a counting label has gradient 0,
whatever its logits are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_la._triton.softmax import exp, label_loss, log1p, sum_others
from fused_la._triton.targets import dense_mass, label_and_logit, label_smoothing_mass
from fused_la._triton.tiles import load_prior, max_float, per_class, per_row, scale_label_gradient, tile_offsets


class GradientInputs(NamedTuple):
    """The state of rows that their gradient needs; in rows without a counting label only `live` matters."""

    m: Any
    rest: Any
    inverse_sum: Any  # 1 / (1 + rest)
    total: Any  # A; with a target_offset (1 + rest) * sum_k t_k / d_k, d_k the softmax denominator of label k
    share: Any  # multiple of the smoothing mass
    live: Any
    g: Any


@triton.jit
def rest_or_nan(args, rows, m, rest, is_empty):
    """rest, or NaN if a row has no class, an infinite z, or a prior_index out of range."""
    if args.vectors.prior_index is not None:
        is_empty = is_empty | ~rows.operands.has_prior
    limit = max_float(m.dtype) if args.logits.dtype.element_ty.primitive_bitwidth == 16 else float("inf")  # as `adjust`
    return tl.where((m >= limit) | is_empty, float("nan"), rest)


@triton.jit
def row_loss(args, rows, m, rest, gap, total, share, live, single_label):
    """(loss, A) of each row; gap and total are those of its dense target mass. With a target_offset A is that of
    `GradientInputs`."""
    if args.n_labels is None:
        return gap + total * log1p(rest), total
    else:
        label_gap = tl.zeros(rows.index.shape, m.dtype)
        label_total = tl.zeros(rows.index.shape, m.dtype)
        for k in range(args.n_labels):
            label, logit = label_and_logit(args, rows, k, single_label)
            mass, margin = label.mass, m - logit.z_as_label
            if args.smoothing is not None:
                mass = mass * (1.0 - args.smoothing)
            if args.vectors.target_offset is None:
                label_gap += tl.where(mass == 0.0, 0.0, mass * margin)  # a NaN reaches the loss through the rest
                label_total += mass
            else:
                others = sum_others(logit.z, m, rest)
                label_gap += tl.where(mass == 0.0, 0.0, mass * label_loss(margin, others))
                label_total += mass * ((1.0 + rest) / (others + exp(-margin)))
        if args.vectors.target_offset is None:
            if args.smoothing is not None:
                label_gap += share * gap
                label_total += share * total
            label_gap += label_total * log1p(rest)
        return tl.where(live, label_gap, 0.0), label_total


@triton.jit
def class_gradient(p, not_p, total, g, mass):
    """g * ((A - t) * p - t * (1 - p)), accurate to the last digits for every class."""
    return g * ((total - mass) * p - mass * not_p)


@triton.jit
def tile_gradient(args, rows, state, tile, z, e, VEC: tl.constexpr):
    """The gradient of z of a tile's classes, as if none were a label; `e` is exp(z - m)."""
    if args.n_labels is None or args.smoothing is not None:
        p = e * per_row(state.inverse_sum)
        not_p = tl.where(z == per_row(state.m), per_row(state.rest * state.inverse_sum), 1.0 - p)
        mass = dense_mass(args, rows, tile, VEC) * per_row(state.share)
        grad = class_gradient(p, not_p, per_row(state.total), per_row(state.g), mass)
        grad = tl.where(per_row(state.live), grad, 0.0)
    else:
        grad = e * per_row(tl.where(state.live, state.g * state.total * state.inverse_sum, 0.0))
    if args.vectors.log_prior is not None and (args.n_labels is None or args.smoothing is not None):
        prior = load_prior(args, args.vectors.log_prior, rows, tile)
        grad = tl.where(prior == float("-inf"), per_row(tl.where(state.live, state.rest - state.rest, 0.0)), grad)
    return grad


@triton.jit
def store_gradient(grad_logits, rows, tile, grad_class, grad, VEC: tl.constexpr):
    """Store the gradient of a tile."""
    offsets = tile_offsets(rows.gradient_start, tile, grad_class, VEC)
    in_bounds = tl.where(per_row(rows.in_bounds), per_class(tile.mask, rows), False)
    tl.store(grad_logits + offsets, grad.to(grad_logits.dtype.element_ty), in_bounds)


@triton.jit
def store_label_gradients(
    args, rows, state, grad_logits, grad_class, first_col, last_col, HAS_EDGES: tl.constexpr, single_label
):
    """Overwrite the labels' columns in the tiles already stored: columns [first_col, last_col) of the body, and the
    edges if first_col is 0. Equal labels of a row get equal gradients."""
    if args.n_labels is not None:
        tl.debug_barrier()  # other threads stored these tiles
        for k in range(args.n_labels):
            label, logit = label_and_logit(args, rows, k, single_label)
            grad = label_gradient(args, rows, state, label, logit, single_label)
            col = label.index - rows.prefix
            in_range = (col >= first_col) & (col < last_col)
            if HAS_EDGES:
                in_range = in_range | tl.where((first_col == 0) & (last_col > 0), (col < 0) | (col >= rows.body), False)
            pointers = grad_logits + (rows.gradient_start + label.index.to(tl.int64) * grad_class)
            tl.store(pointers, grad.to(grad_logits.dtype.element_ty), rows.in_bounds & label.counts & in_range)


@triton.jit
def label_gradient(args, rows, state, label, logit, single_label):
    """The gradient of a label's class in each row."""
    m, rest, mass = state.m, state.rest, label.mass
    # With a target_offset: the sum of t / d over the labels of other classes.
    other_labels = tl.zeros(rows.index.shape, m.dtype)
    if single_label is None:
        mass = tl.zeros(rows.index.shape, m.dtype)
        for k in range(args.n_labels):
            other, other_logit = label_and_logit(args, rows, k, single_label)
            mass += tl.where(other.index == label.index, other.mass, 0.0)  # 0 for an ignored label
            if args.vectors.target_offset is not None:
                d = sum_others(other_logit.z, m, rest) + exp(other_logit.z_as_label - m)
                other_labels += tl.where((other.index != label.index) & other.counts, other.mass / d, 0.0)
    if args.vectors.target_offset is not None:
        others = sum_others(logit.z, m, rest)
        grad = state.g * (exp(logit.z - m) * other_labels - mass * (others / (others + exp(logit.z_as_label - m))))
    else:
        if args.smoothing is not None:
            mass = mass * (1.0 - args.smoothing) + state.share * label_smoothing_mass(args, rows, label.index)
        p = exp(logit.z - m) * state.inverse_sum
        grad = class_gradient(p, tl.where(logit.z == m, rest * state.inverse_sum, 1.0 - p), state.total, state.g, mass)
        grad = tl.where(logit.excluded, rest - rest, grad)  # 0, and NaN in a row that is NaN
    return scale_label_gradient(args, rows, label.index, grad)
