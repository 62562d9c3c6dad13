"""The gradient of rows whose m, rest and A are known: the second half of the forward kernel, and the backward kernel.

    p_c           = exp(z_c - m) / (1 + rest),    1 - p_c = rest / (1 + rest) for the class that attains m
    grad_logits_c = g * ((A - t_c) * p_c - t_c * (1 - p_c))

with g the row's upstream gradient (over the mean's denominator). No term cancels: a confident row's target has
(A - t) = 0 and 1 - p straight from `rest`. Most classes are no label, and theirs is g * A * p_c (less their smoothing
mass): `write_gradient` writes that for all classes of a tile, and then the labels' columns over it. A class at
log_prior = -inf has gradient 0 (NaN in a row that is NaN), and so has a row without a counting label, whatever stands
there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_la._triton.online import others_than
from fused_la._triton.targets import dense_mass, load_label, read_label, smoothing_mass
from fused_la._triton.tiles import edge_classes, exp, load_classes, load_z, tile_start, whole_vectors


@triton.jit
def full_form(z, m, rest, total, g, mass, COMPUTE: tl.constexpr):
    """g * ((A - t) * p - t * (1 - p)), to the last digits for every class."""
    scale = 1.0 / (1.0 + rest)
    p = exp(z - m, COMPUTE) * scale
    not_p = tl.where(z == m, rest * scale, 1.0 - p)
    return g * ((total - mass) * p - mass * not_p)


@triton.jit
def read_shares(vectors, rows, mask_rows, n_classes, ignore_index, N_LABELS: tl.constexpr, COMPUTE: tl.constexpr):
    """(share of the smoothing mass, whether any label counts) of each row."""
    if N_LABELS == 0:
        return tl.full(rows.shape, 1.0, COMPUTE), mask_rows
    else:
        share_row = tl.zeros(rows.shape, COMPUTE)
        live = tl.zeros(rows.shape, tl.int1)
        for k in range(N_LABELS):
            _, _, _, share, counts = load_label(
                vectors, rows * N_LABELS + k, mask_rows, n_classes, ignore_index, COMPUTE
            )
            share_row += share
            live = live | counts
        return share_row, live


@triton.jit
def write_gradient(
    logits, vectors, grad_logits, stride_class, target_class, grad_class,
    rows, mask_rows, live, share, starts, target_starts, grad_starts, head, body, first_tile, last_tile, n_classes,
    m, rest, total, g, lone_label,
    tau, smoothing, ignore_index,
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, TARGET_ALIKE: tl.constexpr, COMPUTE: tl.constexpr,
    VEC: tl.constexpr, EDGES: tl.constexpr, ONE_TILE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the body's tiles [first_tile, last_tile), and with tile 0 that of the edges."""
    # Nothing of a row that does not count is read: with these, its gradient comes out as 0.
    m, rest = tl.where(live, m, 0.0), tl.where(live, rest, 0.0)
    total, g = tl.where(live, total, 0.0), tl.where(live, g, 0.0)
    bases = whole_vectors(starts + head, VEC)
    grad_bases = whole_vectors(grad_starts + head, VEC)
    target_bases = bases if TARGET_ALIKE else target_starts + head * target_class
    if ONE_TILE:
        cols = tl.arange(0, BLOCK_C)
        _write_classes(
            logits, vectors, grad_logits, bases, target_bases, grad_bases, head, cols, mask_rows, live, cols < body,
            stride_class, target_class, grad_class, n_classes, m, rest, total, g, share, tau, smoothing,
            N_LABELS, HAS_SMOOTHING, COMPUTE,
        )  # fmt: skip
    else:
        for tile in range(first_tile, last_tile):
            cols = tile_start(tile, body, VEC, BLOCK_C) + tl.arange(0, BLOCK_C)
            _write_classes(
                logits, vectors, grad_logits, bases, target_bases, grad_bases, head, cols, mask_rows, live, None,
                stride_class, target_class, grad_class, n_classes, m, rest, total, g, share, tau, smoothing,
                N_LABELS, HAS_SMOOTHING, COMPUTE,
            )  # fmt: skip
    if EDGES:
        classes, there = edge_classes(head, body, n_classes, VEC)
        _write_classes(
            logits, vectors, grad_logits, starts, target_starts, grad_starts, 0, classes,
            mask_rows, live, tl.where(first_tile == 0, there, False),
            stride_class, target_class, grad_class, n_classes, m, rest, total, g, share, tau, smoothing,
            N_LABELS, HAS_SMOOTHING, COMPUTE,
        )  # fmt: skip
    if N_LABELS > 0:
        tl.debug_barrier()  # the labels' columns are written after, and over, what other threads wrote there
        # Of all columns that were written here: the last tile takes some that another program may have written too.
        first_col, last_col = first_tile * BLOCK_C, tl.minimum(last_tile * BLOCK_C, body)
        if not ONE_TILE:
            first_col = tl.minimum(first_col, body - BLOCK_C)
        for k in range(N_LABELS):
            label, grad, counts = label_gradient(
                logits, vectors, rows, mask_rows, starts, stride_class, n_classes, k, m, rest, total, g, lone_label,
                share, tau, smoothing, ignore_index, N_LABELS, HAS_SMOOTHING, COMPUTE,
            )  # fmt: skip
            col = label - head
            mine = (col >= first_col) & (col < last_col)
            if EDGES:
                mine = mine | tl.where(first_tile == 0, (col < 0) | (col >= body), False)
            tl.store(
                grad_logits + (grad_starts + label * grad_class),
                grad.to(grad_logits.dtype.element_ty),
                mask_rows & counts & mine,
            )


@triton.jit
def _write_classes(
    logits, vectors, grad_logits, bases, target_bases, grad_bases, first, cols, mask_rows, live, mask_cols,
    stride_class, target_class, grad_class, n_classes,
    m, rest, total, g, share, tau, smoothing,
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gradient of the classes first + cols of some rows, as if none were a label."""
    z = load_z(logits, vectors, bases, first, cols, live, mask_cols, stride_class, tau, COMPUTE)
    mass = dense_mass(
        vectors, target_bases, first, cols, None, mask_cols, target_class, n_classes, smoothing,
        N_LABELS, HAS_SMOOTHING, COMPUTE,
    )  # fmt: skip
    if N_LABELS == 0:
        grad = full_form(z, m[:, None], rest[:, None], total[:, None], g[:, None], mass, COMPUTE)
    else:
        grad = exp(z - m[:, None], COMPUTE) * (g * total / (1.0 + rest))[:, None]
        if HAS_SMOOTHING:
            grad -= (g * share)[:, None] * mass
    if vectors.log_prior is not None and (N_LABELS == 0 or HAS_SMOOTHING):
        prior = load_classes(vectors.log_prior, first, cols, mask_cols)
        grad = tl.where(prior[None, :] == float("-inf"), (rest - rest)[:, None], grad)
    if vectors.scale is not None:
        grad = grad * load_classes(vectors.scale, first, cols, mask_cols).to(COMPUTE)[None, :]
    tl.store(
        grad_logits + (grad_bases[:, None] + cols.to(tl.int64)[None, :] * grad_class),
        grad.to(grad_logits.dtype.element_ty),
        mask_rows[:, None] if mask_cols is None else mask_rows[:, None] & mask_cols[None, :],
    )


@triton.jit
def label_gradient(
    logits, vectors, rows, mask_rows, starts, stride_class, n_classes, k, m, rest, total, g, lone_label, share,
    tau, smoothing, ignore_index,
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """(class, gradient, whether it counts) of each row's label k; equal labels of a row get equal gradients."""
    if N_LABELS == 1:
        label, mass, _share, counts, z, as_label, is_out = lone_label
    else:
        label, mass, _share, counts, z, as_label, is_out = read_label(
            logits, vectors, starts, rows, k, mask_rows, stride_class, n_classes, tau, ignore_index, N_LABELS, COMPUTE
        )
    of_others = tl.zeros(rows.shape, COMPUTE)  # with a target_offset: sum of t / d over the labels of other classes
    if N_LABELS > 1:
        mass = tl.zeros(rows.shape, COMPUTE)
        for other in range(N_LABELS):
            other_label, other_mass, _other_share, other_counts, other_z, other_as, _other_out = read_label(
                logits, vectors, starts, rows, other, mask_rows, stride_class, n_classes, tau, ignore_index,
                N_LABELS, COMPUTE,
            )  # fmt: skip
            mass += tl.where(other_label == label, other_mass, 0.0)  # 0 of one that does not count
            if vectors.target_offset is not None:
                d = others_than(other_z, m, rest, COMPUTE) + exp(other_as - m, COMPUTE)
                of_others += tl.where((other_label != label) & other_counts, other_mass / d, 0.0)
    if vectors.target_offset is not None:
        others = others_than(z, m, rest, COMPUTE)
        grad = g * (exp(z - m, COMPUTE) * of_others - mass * (others / (others + exp(as_label - m, COMPUTE))))
    else:
        if HAS_SMOOTHING:
            mass = mass * (1.0 - smoothing).to(COMPUTE)
            mass += share * smoothing_mass(vectors, 0, label, None, n_classes, smoothing, COMPUTE)
        grad = full_form(z, m, rest, total, g, mass, COMPUTE)
        if vectors.log_prior is not None:
            grad = tl.where(is_out, rest - rest, grad)
    if vectors.scale is not None:
        grad = grad * load_classes(vectors.scale, 0, label, None).to(COMPUTE)
    return label, grad, counts
