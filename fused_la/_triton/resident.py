"""Kernel for rows that fit on the chip: a program loads its whole row once, and computes the rest from registers.

    z_c  = scale_c * logits_c + tau * log_prior_c
    m    = max_c z_c,      e_c = exp(z_c - m),      rest = sum_c e_c - 1
    loss = sum_c t_c * (m - z_c) + A * log1p(rest),      A = sum_c t_c                                     (epilogue.py)
    grad = g * A * e_c / (1 + rest), and at labels g * ((A - t_c) * p_c - t_c * (1 - p_c))

Each logit is read once and each gradient written once, with one exponential a class. As a forward pass the kernel
computes the loss and, with grad_logits, the gradient for an upstream gradient of 1. As a backward pass, with an
upstream, it computes the gradient from the row again, unless forward has computed it and the upstream gradient is 1.

A row has up to three tiles: FULL_C classes of its body, which every row of this length has; BLOCK_C classes that end
with the body and may repeat some of the first tile (`first_new`); a small tile of the classes before and after it.

A confident row has a rest of 1e-9 or less beside the 1 of its top class, so that the top class must not be part of the
sum. If only labels have target mass, this matters only if the top class is a label: otherwise the loss is at least the
distance from the top to a label. Therefore the label with the highest z is left out of the sum, and if it is not the
top, rest is its exponential + the sum - 1. To leave out one class would cost a comparison a class. Instead the whole
vector of VEC classes that holds it is left out, and the small tile has the other classes of that vector. If every class
has target mass (class probabilities or label smoothing), each class that attains m is left out, and counted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_la._triton.epilogue import (
    GradientInputs,
    rest_or_nan,
    row_loss,
    store_gradient,
    store_label_gradients,
    tile_gradient,
)
from fused_la._triton.softmax import exp, gap_and_total
from fused_la._triton.targets import dense_mass, load_label_and_logit, share_and_live
from fused_la._triton.tiles import (
    NUMBERS,
    Arguments,
    Tile,
    compute_z,
    from_bits,
    load_logits,
    masked_tile,
    max_float,
    per_class,
    per_row,
    row_max,
    row_offsets,
    row_sum,
    rows_of_group,
    scale_gradient,
    unmasked_tile,
)  # fmt: skip
from fused_la._triton.workspace import load_denominator, store_loss, table_offset


@triton.jit
def highest_label(args, rows, single_label):
    """(class, z) of the label with the highest z in each row. An ignored label is class 0, which is as good as any."""
    if single_label is not None:
        return single_label[0].index, single_label[1].z
    else:
        first, logit = load_label_and_logit(args, rows, 0)
        label, z = first.index, logit.z
        for k in range(1, args.n_labels):
            other, logit = load_label_and_logit(args, rows, k)
            is_above = logit.z > z  # a NaN is kept, and makes its row NaN
            label, z = tl.where(is_above, other.index, label), tl.where(is_above, logit.z, z)
        return label, z


@triton.jit
def edge_and_label_tile(rows, n_classes, label, VEC: tl.constexpr):
    """The classes before the body, those after it, and those of the label's vector in the body: at most 4 * VEC.

    `first_new` is 0 for the first two, and n_classes for the third, which the tiles of the body have too.
    """
    lanes, col = tl.arange(0, 4 * VEC), label - rows.prefix
    classes = tl.where(lanes < VEC, lanes, rows.prefix + rows.body + lanes - VEC)
    classes = tl.where(lanes < 2 * VEC, classes, rows.prefix + (col & -VEC) + lanes - 2 * VEC)
    in_body = tl.where((col >= 0) & (col < rows.body), lanes < 3 * VEC, False)
    mask = tl.where(lanes < 2 * VEC, classes < n_classes, in_body)
    mask = tl.where(lanes < VEC, lanes < rows.prefix, mask)
    return Tile(0, 0, classes, mask, tl.where(lanes < 2 * VEC, 0, n_classes))


@triton.jit
def row_tile(rows, n_classes, label, i: tl.constexpr, VEC: tl.constexpr, FULL_C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The i-th tile of a row."""
    if FULL_C == 0:
        return masked_tile(rows, 0, BLOCK_C)
    elif i == 0:
        return Tile(rows.prefix, 0, tl.arange(0, FULL_C), tl.full((FULL_C,), True, tl.int1), 0)
    elif i == 1 and BLOCK_C > 0:
        return unmasked_tile(rows, FULL_C, VEC, BLOCK_C)
    else:
        return edge_and_label_tile(rows, n_classes, label, VEC)


@triton.jit
def vector_sums_without(e, tile, label, VEC: tl.constexpr):
    """The sums of a tile's vectors of VEC classes; 0 for the label's vector, and for those in the previous tile."""
    col = tile.start + VEC * tl.arange(0, e.shape[0] // VEC)
    excluded = (col < tile.first_new) | (col == ((label - tile.first_class) & -VEC))
    return tl.where(excluded, 0.0, tl.sum(tl.reshape(e, (e.shape[0] // VEC, VEC)), 1))


@triton.jit
def block_max(x, N: tl.constexpr):
    """The maximum of x, (K * N,), over K: (N,)."""
    return x if x.shape[0] == N else tl.max(tl.reshape(x, (x.shape[0] // N, N)), 0)


@triton.jit
def block_sum(x, N: tl.constexpr):
    """The sum of x, (K * N,), over K: (N,)."""
    return x if x.shape[0] == N else tl.sum(tl.reshape(x, (x.shape[0] // N, N)), 0)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=["upstream"])
def _resident_kernel(
    # in
    logits, vectors, upstream,  # None in a forward pass
    # out
    loss, workspace, grad_logits,
    # strides
    logits_outer: tl.int64, logits_inner: tl.int64, logits_class: tl.int64,
    target_outer: tl.int64, target_inner: tl.int64, target_class: tl.int64,
    grad_outer: tl.int64, grad_inner: tl.int64, grad_class: tl.int64,
    upstream_outer: tl.int64, upstream_inner: tl.int64,
    # sizes, those that only the streamed kernel needs included
    n_rows: tl.int64, n_inner, n_classes: tl.int32, n_priors: tl.int32, n_groups: tl.int32,
    n_weight_partials: tl.int32, n_chunks: tl.int32, splits: tl.int32, period: tl.int32, misalignment: tl.int32,
    scratch_start: tl.int64, table_stride: tl.int32, losses_start: tl.int64,
    # scalars
    unit_gradient: tl.int32,  # 1: forward computes the gradient for an upstream gradient of 1, or has computed it
    tau_bits: tl.int64, smoothing_bits: tl.int64, ignore_index: tl.int64,
    # constants
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, SAME_ALIGNMENT: tl.constexpr, ADJACENT: tl.constexpr,
    TARGET_ADJACENT: tl.constexpr, COMPUTE: tl.constexpr, REDUCTION: tl.constexpr, HAS_TABLE: tl.constexpr,
    VEC: tl.constexpr, EDGES: tl.constexpr, BLOCK_ROWS: tl.constexpr, FULL_C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if upstream is not None:
        if unit_gradient != 0:
            if tl.load(upstream) == 1.0:
                return
    HAS_MASS: tl.constexpr = HAS_SMOOTHING or N_LABELS == 0
    BODY_TILES: tl.constexpr = 1 if FULL_C == 0 or BLOCK_C == 0 else 2
    TILES: tl.constexpr = 1 if FULL_C == 0 else BODY_TILES + 1  # the last is the small tile
    LANES: tl.constexpr = BLOCK_C if BLOCK_C > 0 else FULL_C
    if ADJACENT:
        logits_class = 1
        grad_class = 1
    if TARGET_ADJACENT:
        target_class = 1
    args = Arguments(
        logits, None, vectors, n_classes, logits_class, target_class, from_bits(tau_bits, COMPUTE),
        from_bits(smoothing_bits, COMPUTE) if HAS_SMOOTHING else None, ignore_index,
        None if N_LABELS == 0 else N_LABELS, 1 if SAME_ALIGNMENT else None,
    )  # fmt: skip
    rows = rows_of_group(
        tl.program_id(0), period, n_rows, n_inner, n_classes, n_priors, misalignment, (logits_outer, logits_inner),
        (target_outer, target_inner), (grad_outer, grad_inner), vectors, VEC, EDGES, BLOCK_ROWS, COMPUTE,
    )  # fmt: skip
    single_label = None
    if N_LABELS == 1:
        single_label = load_label_and_logit(args, rows, 0)
    share, live = share_and_live(args, rows, single_label)

    label, z_label = rows.prefix - 1, tl.full(rows.index.shape, 0.0, COMPUTE)  # a class in no vector of the body
    if not HAS_MASS:
        label, z_label = highest_label(args, rows, single_label)

    # Load the whole row before any of it is used, and find its maximum
    logits_tiles, z_tiles = (), ()
    for i in tl.static_range(TILES):
        tile = row_tile(rows, n_classes, label, i, VEC, FULL_C, BLOCK_C)
        if i == BODY_TILES:
            tl.debug_barrier()  # keeps the loads of the body before it; no thread waits for their results here
        logits_tiles += (load_logits(args, rows, tile, VEC if i < BODY_TILES else 1),)
    for i in tl.static_range(TILES):
        tile, prior = row_tile(rows, n_classes, label, i, VEC, FULL_C, BLOCK_C), None
        if HAS_TABLE and i < BODY_TILES:
            prior = tl.load(workspace + (table_offset(scratch_start, table_stride, rows.prefix) + tile.cols))
        z_tiles += (compute_z(args, rows, tile, logits_tiles[i], prior, live),)
    z = z_tiles[0] if BODY_TILES == 1 else tl.maximum(block_max(z_tiles[0], LANES), block_max(z_tiles[1], LANES))
    m = row_max(z)
    if FULL_C > 0:
        m = tl.maximum(m, row_max(z_tiles[TILES - 1]))
    m = tl.maximum(m, -max_float(COMPUTE))

    # One exponential a class, and their sum
    exp_tiles = ()
    rest, n_tops = tl.zeros(rows.index.shape, COMPUTE), tl.zeros(rows.index.shape, COMPUTE)
    gap, total = tl.zeros(rows.index.shape, COMPUTE), tl.zeros(rows.index.shape, COMPUTE)
    for i in tl.static_range(TILES):
        tile, e = row_tile(rows, n_classes, label, i, VEC, FULL_C, BLOCK_C), exp(z_tiles[i] - per_row(m))
        exp_tiles += (e,)
        if HAS_MASS:
            is_new = per_class(tile.cols >= tile.first_new, rows)
            is_top = (is_new & (z_tiles[i] == per_row(m))).to(COMPUTE)
            rest += row_sum(tl.where(is_new, e, 0.0) - is_top)
            n_tops += row_sum(is_top)
        elif i >= BODY_TILES or FULL_C == 0:
            rest += row_sum(tl.where(per_class(tile.first_class + tile.cols, rows) == per_row(label), 0.0, e))
        elif i == 0:
            sums = block_sum(vector_sums_without(e, tile, label, VEC), LANES // VEC)
        else:
            sums += block_sum(vector_sums_without(e, tile, label, VEC), LANES // VEC)
        if HAS_MASS:
            mass = dense_mass(args, rows, tile, VEC if i < BODY_TILES else 1)
            mass = tl.where(per_row(live), tl.where(per_class(tile.cols >= tile.first_new, rows), mass, 0.0), 0.0)
            tile_gap, tile_total = gap_and_total(z_tiles[i], m, mass)
            gap += tile_gap
            total += tile_total
    if HAS_MASS:
        rest += n_tops - 1.0
        d = rest + 1.0
    else:
        if FULL_C > 0:
            rest += tl.sum(sums, 0)
        d = rest + exp(z_label - m)
        rest = tl.where(z_label == m, rest, tl.where(d < 1.0, 0.0, d - 1.0))
    rest = rest_or_nan(args, rows, m, rest, d < 0.5)
    loss_rows, total = row_loss(args, rows, m, rest, gap, total, share, live, single_label)

    # The gradient
    inverse_denominator = tl.full((), 1.0, COMPUTE)
    if upstream is None:
        if REDUCTION == "mean":
            inverse_denominator = 1.0 / load_denominator(workspace, scratch_start, n_weight_partials)
        g = inverse_denominator
    else:
        offsets = row_offsets(rows.index, n_inner, (upstream_outer, upstream_inner))
        g = tl.load(upstream + offsets, rows.in_bounds, other=0.0)
        if REDUCTION == "mean":
            g = g * tl.load(workspace + 3 * n_rows)
    if grad_logits is not None:
        g = g + tl.zeros(rows.index.shape, COMPUTE)
        state = GradientInputs(m, rest, 1.0 / (1.0 + rest), total, share, live, g)
        for i in tl.static_range(TILES):
            tile = row_tile(rows, n_classes, label, i, VEC, FULL_C, BLOCK_C)
            if i >= BODY_TILES:  # columns of the body are stored already
                tile = Tile(0, 0, tile.cols, tile.mask & (tile.first_new == 0), 0)
            grad = tile_gradient(args, rows, state, tile, z_tiles[i], exp_tiles[i], VEC if i < BODY_TILES else 1)
            grad = scale_gradient(args, rows, tile, grad)
            store_gradient(grad_logits, rows, tile, grad_class, grad, VEC if i < BODY_TILES else 1)
        store_label_gradients(args, rows, state, grad_logits, grad_class, 0, rows.body, EDGES, single_label)

    # The loss
    if upstream is None:
        if grad_logits is None:
            tl.store(workspace + rows.index, m, rows.in_bounds)
            tl.store(workspace + n_rows + rows.index, rest, rows.in_bounds)
            tl.store(workspace + 2 * n_rows + rows.index, total, rows.in_bounds)
        store_loss(
            loss, workspace, loss_rows, rows, tl.program_id(0), n_rows, n_groups, scratch_start, losses_start,
            inverse_denominator, REDUCTION,
        )  # fmt: skip
