"""Rows whose m and rest are known: their loss, and their gradient, a tile at a time and a label at a time.

    loss          = sum_c t_c * (m - z_c) + A * log1p(rest),      A = sum_c t_c
    p_c           = exp(z_c - m) / (1 + rest),    1 - p_c = rest / (1 + rest) for the class that attains m
    grad_logits_c = g * ((A - t_c) * p_c - t_c * (1 - p_c))

with g the row's upstream gradient (over the mean's denominator). No term cancels: a confident row's target has
(A - t) = 0 and 1 - p straight from `rest`. Most classes are no label, and theirs is g * A * p_c (less their smoothing
mass): that is written for all classes of a tile, and then the labels' columns over it. A class at log_prior = -inf has
gradient 0 (NaN in a row that is NaN), and so has a row without a counting label, whatever stands there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_la._triton.softmax import exp, label_loss, log1p, sum_others
from fused_la._triton.targets import dense_mass, label_of, label_smoothing_mass
from fused_la._triton.tiles import Tile, across, along, highest, load_classes, places


class Row(NamedTuple):
    """What the gradient of rows needs to know; of those without a counting label only `live` matters."""

    m: Any
    rest: Any
    inverse: Any  # 1 / (1 + rest)
    total: Any  # A; of labels with a target_offset (1 + rest) * sum_k t_k / d_k, d_k the denominator of k's own softmax
    share: Any  # of the smoothing mass
    live: Any
    g: Any


@triton.jit
def checked_rest(call, m, rest, is_empty):
    """rest, NaN where a row has no class, or an infinite one."""
    most = highest(m.dtype) if call.logits.dtype.element_ty.primitive_bitwidth == 16 else float("inf")  # as `adjust`
    return tl.where((m >= most) | is_empty, float("nan"), rest)


@triton.jit
def row_loss(call, rows, m, rest, gap, total, share, live, single_label):
    """(loss, A) of each row; gap and total are those of its dense target mass."""
    if call.n_labels is None:
        return gap + total * log1p(rest), total
    else:
        label_gap = tl.zeros(rows.rows.shape, m.dtype)
        label_total = tl.zeros(rows.rows.shape, m.dtype)
        for k in range(call.n_labels):
            label, at = label_of(call, rows, k, single_label)
            mass, above = label.mass, m - at.as_label
            if call.smoothing is not None:
                mass = mass * (1.0 - call.smoothing)
            if call.vectors.target_offset is None:
                label_gap += tl.where(mass == 0.0, 0.0, mass * above)  # a row of NaN is NaN by its rest
                label_total += mass
            else:
                others = sum_others(at.z, m, rest)
                label_gap += tl.where(mass == 0.0, 0.0, mass * label_loss(above, others))
                label_total += mass * ((1.0 + rest) / (others + exp(-above)))
        if call.vectors.target_offset is None:
            if call.smoothing is not None:
                label_gap += share * gap
                label_total += share * total
            label_gap += label_total * log1p(rest)
        return tl.where(live, label_gap, 0.0), label_total


@triton.jit
def full_form(p, not_p, total, g, mass):
    """g * ((A - t) * p - t * (1 - p)), to the last digits for every class."""
    return g * ((total - mass) * p - mass * not_p)


@triton.jit
def tile_gradient(call, rows, row, tile, z, e, VEC: tl.constexpr):
    """The gradient of z of a tile's classes as if none were a label; `e` is exp(z - m)."""
    if call.n_labels is None or call.smoothing is not None:
        p = e * across(row.inverse)
        not_p = tl.where(z == across(row.m), across(row.rest * row.inverse), 1.0 - p)
        mass = dense_mass(call, rows, tile, VEC) * across(row.share)
        grad = tl.where(across(row.live), full_form(p, not_p, across(row.total), across(row.g), mass), 0.0)
    else:
        grad = e * across(tl.where(row.live, row.g * row.total * row.inverse, 0.0))
    if call.vectors.log_prior is not None and (call.n_labels is None or call.smoothing is not None):
        prior = along(load_classes(call.vectors.log_prior, tile), rows)
        grad = tl.where(prior == float("-inf"), across(tl.where(row.live, row.rest - row.rest, 0.0)), grad)
    return grad


@triton.jit
def store_gradient(grad_logits, rows, tile, grad_class, grad, scale, VEC: tl.constexpr):
    """Write that of the logits: the gradient of z, times the scale of a margin."""
    if scale is not None:
        grad = grad * along(load_classes(scale, tile).to(grad.dtype), rows)
    at = places(rows.gradient, tile, grad_class, VEC)
    there = tl.where(across(rows.there), along(tile.mask, rows), False)
    tl.store(grad_logits + at, grad.to(grad_logits.dtype.element_ty), there)


@triton.jit
def store_label_gradients(
    call, rows, row, grad_logits, grad_class, first_col, last_col, HAS_EDGES: tl.constexpr, single_label
):
    """Write the labels' columns over what was written of their tiles: classes [first_col, last_col) of the body, and
    with the first of them the edges. Equal labels of a row get equal gradients."""
    if call.n_labels is not None:
        tl.debug_barrier()  # other threads wrote there
        for k in range(call.n_labels):
            label, stand = label_of(call, rows, k, single_label)
            grad = label_gradient(call, rows, row, label, stand, single_label)
            col = label.label - rows.head
            mine = (col >= first_col) & (col < last_col)
            if HAS_EDGES:
                mine = mine | tl.where((first_col == 0) & (last_col > 0), (col < 0) | (col >= rows.body), False)
            at = grad_logits + (rows.gradient + label.label.to(tl.int64) * grad_class)
            tl.store(at, grad.to(grad_logits.dtype.element_ty), rows.there & label.counts & mine)


@triton.jit
def label_gradient(call, rows, row, label, at, single_label):
    """The gradient of a label's class in each row."""
    m, rest, mass = row.m, row.rest, label.mass
    of_others = tl.zeros(rows.rows.shape, m.dtype)  # with a target_offset: sum of t / d over labels of other classes
    if single_label is None:
        mass = tl.zeros(rows.rows.shape, m.dtype)
        for k in range(call.n_labels):
            other, other_at = label_of(call, rows, k, single_label)
            mass += tl.where(other.label == label.label, other.mass, 0.0)  # 0 of one that does not count
            if call.vectors.target_offset is not None:
                d = sum_others(other_at.z, m, rest) + exp(other_at.as_label - m)
                of_others += tl.where((other.label != label.label) & other.counts, other.mass / d, 0.0)
    if call.vectors.target_offset is not None:
        others = sum_others(at.z, m, rest)
        grad = row.g * (exp(at.z - m) * of_others - mass * (others / (others + exp(at.as_label - m))))
    else:
        if call.smoothing is not None:
            mass = mass * (1.0 - call.smoothing) + row.share * label_smoothing_mass(call, label.label)
        p = exp(at.z - m) * row.inverse
        grad = full_form(p, tl.where(at.z == m, rest * row.inverse, 1.0 - p), row.total, row.g, mass)
        grad = tl.where(at.is_out, rest - rest, grad)
    if call.vectors.scale is not None:
        grad = grad * load_classes(call.vectors.scale, Tile(0, 0, label.label, label.label >= 0, 0)).to(m.dtype)
    return grad
