"""Kernel for rows that do not fit on the chip: a program reads them tile by tile, and again for their gradient.

    z_c  = scale_c * logits_c + tau * log_prior_c
    m, rest: merged from those of the tiles                                                               (softmax.py)
    loss = sum_c t_c * (m - z_c) + A * log1p(rest),      A = sum_c t_c                                   (epilogue.py)

A row is its edges and chunks of CHUNK_TILES tiles, merged in this order. Several programs may share the chunks of a
row: each stores its partial states, and the last program merges them in the same order, so that no bit depends on the
sharing. Kept for backward: m, rest and A of each row, and the mean's denominator.

As a forward pass the kernel computes the loss and, with grad_logits, the gradient for an upstream gradient of 1, for
which it reads the rows again from L2. As a backward pass, with an upstream, it computes the gradient of a program's
chunks.
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
from fused_la._triton.softmax import empty_state, exp, load_state, merge, reduce_lanes, store_state, update_lanes
from fused_la._triton.targets import dense_mass, load_label_and_logit, share_and_live
from fused_la._triton.tiles import (
    NUMBERS,
    Arguments,
    Tile,
    edge_tile,
    from_bits,
    load_z,
    masked_tile,
    per_class,
    per_row,
    row_offsets,
    rows_of_group,
    scale_gradient,
)  # fmt: skip
from fused_la._triton.workspace import counters_pointer, load_denominator, partials_pointer, store_loss, take_ticket


@triton.jit
def rows_by_lanes(rows, lanes, COMPUTE: tl.constexpr):
    """Values in the shape of rows by lanes; only the shape and the dtype matter."""
    return (per_row(rows.index) + per_class(lanes, rows)).to(COMPUTE)


@triton.jit
def _update_with_tile(lanes, args, rows, tile, live, VEC: tl.constexpr, HAS_MASS: tl.constexpr):
    z, mass = load_z(args, rows, tile, live, VEC), None
    if HAS_MASS:
        mass = tl.where(per_row(live), dense_mass(args, rows, tile, VEC), 0.0)
    return update_lanes(lanes, z, mass, VEC, HAS_MASS)


@triton.jit
def _write_gradient(args, rows, state, tile, grad_logits, grad_class, VEC: tl.constexpr):
    z = load_z(args, rows, tile, state.live, VEC)
    grad = tile_gradient(args, rows, state, tile, z, exp(z - per_row(state.m)), VEC)
    store_gradient(grad_logits, rows, tile, grad_class, scale_gradient(args, rows, tile, grad), VEC)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=["upstream"])
def _streamed_kernel(
    # in
    logits, vectors, upstream,  # None in a forward pass
    # out
    loss, workspace, grad_logits,
    # strides
    logits_outer: tl.int64, logits_inner: tl.int64, logits_class: tl.int64,
    target_outer: tl.int64, target_inner: tl.int64, target_class: tl.int64,
    grad_outer: tl.int64, grad_inner: tl.int64, grad_class: tl.int64,
    upstream_outer: tl.int64, upstream_inner: tl.int64,
    # sizes
    n_rows: tl.int64, n_inner, n_classes: tl.int32, n_priors: tl.int32, n_groups: tl.int32,
    n_weight_partials: tl.int32, n_chunks: tl.int32, splits: tl.int32, period: tl.int32, misalignment: tl.int32,
    scratch_start: tl.int64, table_stride: tl.int32, losses_start: tl.int64,
    # scalars
    unit_gradient: tl.int32,  # 1: forward computes the gradient for an upstream gradient of 1, or has computed it
    tau_bits: tl.int64, smoothing_bits: tl.int64, ignore_index: tl.int64,
    # constants
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, SAME_ALIGNMENT: tl.constexpr, ADJACENT: tl.constexpr,
    TARGET_ADJACENT: tl.constexpr, COMPUTE: tl.constexpr, REDUCTION: tl.constexpr,
    VEC: tl.constexpr, EDGES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK_TILES: tl.constexpr,
):  # fmt: skip
    if upstream is not None:
        if unit_gradient != 0:
            if tl.load(upstream) == 1.0:
                return
    HAS_MASS: tl.constexpr = HAS_SMOOTHING or N_LABELS == 0
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
    group, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    rows = rows_of_group(
        group, period, n_rows, n_inner, n_classes, n_priors, misalignment, (logits_outer, logits_inner),
        (target_outer, target_inner), (grad_outer, grad_inner), vectors, VEC, EDGES, BLOCK_ROWS, COMPUTE,
    )  # fmt: skip
    chunks_per_split = tl.cdiv(n_chunks, splits)
    first_chunk, last_chunk = split * chunks_per_split, tl.minimum((split + 1) * chunks_per_split, n_chunks)
    n_tiles = (rows.body - 1) // BLOCK_C + 1
    single_label = None
    if N_LABELS == 1:
        single_label = load_label_and_logit(args, rows, 0)
    share, live = share_and_live(args, rows, single_label)
    inverse_denominator = tl.full((), 1.0, COMPUTE)

    if upstream is None:
        partials = partials_pointer(workspace, losses_start, n_groups)
        empty = empty_state(tl.zeros(rows.index.shape, COMPUTE))
        partial = empty
        if EDGES:
            edges = edge_tile(rows, n_classes, VEC)
            edges = Tile(0, 0, edges.cols, tl.where(split == 0, edges.mask, False), 0)
            lanes = empty_state(rows_by_lanes(rows, edges.cols, COMPUTE))
            partial = reduce_lanes(_update_with_tile(lanes, args, rows, edges, live, 1, HAS_MASS), HAS_MASS)
        for chunk in range(first_chunk, last_chunk):
            chunk_lanes = empty_state(rows_by_lanes(rows, tl.arange(0, BLOCK_C // VEC), COMPUTE))
            for i in range(chunk * CHUNK_TILES, tl.minimum((chunk + 1) * CHUNK_TILES, n_tiles)):
                tile = masked_tile(rows, i * BLOCK_C, BLOCK_C)
                chunk_lanes = _update_with_tile(chunk_lanes, args, rows, tile, live, VEC, HAS_MASS)
            partial = merge(partial, reduce_lanes(chunk_lanes, HAS_MASS), HAS_MASS)
            if splits > 1:  # chunk 0 includes the edges, as it does if one program reads the whole row
                store_state(partials + chunk * n_rows + rows.index, n_chunks * n_rows, partial, rows.in_bounds)
                partial = empty
        ticket = splits - 1
        if splits > 1:
            ticket = take_ticket(counters_pointer(workspace, scratch_start) + 1 + group)
        if ticket < splits - 1:
            return
        for chunk in range(0, tl.where(splits > 1, n_chunks, 0)):
            stored = load_state(partials + chunk * n_rows + rows.index, n_chunks * n_rows, rows.in_bounds)
            partial = merge(partial, stored, HAS_MASS)
        m, rest, gap, total = partial
        rest = rest_or_nan(args, rows, m, rest, rest < 0.0)
        loss_rows, total = row_loss(args, rows, m, rest, gap, total, share, live, single_label)
        tl.store(workspace + rows.index, m, rows.in_bounds)
        tl.store(workspace + n_rows + rows.index, rest, rows.in_bounds)
        tl.store(workspace + 2 * n_rows + rows.index, total, rows.in_bounds)
        if REDUCTION == "mean":
            inverse_denominator = 1.0 / load_denominator(workspace, scratch_start, n_weight_partials)
        g = inverse_denominator + tl.zeros(rows.index.shape, COMPUTE)
    else:
        m = tl.load(workspace + rows.index, rows.in_bounds, other=0.0)
        rest = tl.load(workspace + n_rows + rows.index, rows.in_bounds, other=0.0)
        total = tl.load(workspace + 2 * n_rows + rows.index, rows.in_bounds, other=0.0)
        offsets = row_offsets(rows.index, n_inner, (upstream_outer, upstream_inner))
        g = tl.load(upstream + offsets, rows.in_bounds, other=0.0)
        if REDUCTION == "mean":
            g = g * tl.load(workspace + 3 * n_rows)

    if grad_logits is not None:
        state = GradientInputs(m, rest, 1.0 / (1.0 + rest), total, share, live, g)
        first_tile, last_tile = first_chunk * CHUNK_TILES, tl.minimum(last_chunk * CHUNK_TILES, n_tiles)
        if upstream is None:
            last_tile = tl.where(unit_gradient != 0, last_tile, first_tile)
        for i in range(first_tile, last_tile):
            _write_gradient(args, rows, state, masked_tile(rows, i * BLOCK_C, BLOCK_C), grad_logits, grad_class, VEC)
        if EDGES:
            if (split == 0) & (last_tile > first_tile):
                _write_gradient(args, rows, state, edge_tile(rows, n_classes, VEC), grad_logits, grad_class, 1)
        store_label_gradients(
            args, rows, state, grad_logits, grad_class, first_tile * BLOCK_C,
            tl.minimum(last_tile * BLOCK_C, rows.body), EDGES, single_label,
        )  # fmt: skip
    if upstream is None:
        store_loss(
            loss, workspace, loss_rows, rows, group, n_rows, n_groups, scratch_start, losses_start,
            inverse_denominator, REDUCTION,
        )  # fmt: skip
