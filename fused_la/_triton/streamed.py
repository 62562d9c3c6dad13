"""Rows that do not fit on the chip: a program passes over them a tile at a time, and once more for their gradient.

    z_c  = scale_c * logits_c + tau * log_prior_c
    m, rest: joined from those of the tiles                                                               (softmax.py)
    loss = sum_c t_c * (m - z_c) + A * log1p(rest),      A = sum_c t_c                                        (row.py)

A row is its edges and chunks of CHUNK_TILES tiles, joined in this order. Several programs may share the chunks of a
row: each leaves the parts it made in memory, and the one that comes last joins them in the same order, so no bit
depends on it. Kept for backward: m, rest and A of each row, and the mean's denominator.

As a forward pass the kernel makes the loss and, with grad_logits, the gradient for an upstream gradient of 1, which
reads the rows again from L2. As a backward pass, with an upstream, it makes the gradient of the chunks of a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_la._triton.epilogue import Row, checked_rest, row_loss, store_gradient, store_label_gradients, tile_gradient
from fused_la._triton.softmax import absorb, across_lanes, empty, exp, load_part, merge, store_part
from fused_la._triton.targets import dense_mass, read_label, shares
from fused_la._triton.tiles import (
    NUMBERS,
    Arguments,
    Tile,
    across,
    along,
    edge_tile,
    load_z,
    masked_tile,
    row_offsets,
    rows_of,
    scalar,
)  # fmt: skip
from fused_la._triton.workspace import arrive, counters_of, denominator_of, finish, parts_of


@triton.jit
def lanes_of(rows, lanes, COMPUTE: tl.constexpr):
    """Numbers of the shape of rows by lanes."""
    return (across(rows.rows) + along(lanes, rows)).to(COMPUTE)


@triton.jit
def _absorb(lanes, call, rows, tile, live, VEC: tl.constexpr, HAS_MASS: tl.constexpr):
    z, mass = load_z(call, rows, tile, live, VEC), None
    if HAS_MASS:
        mass = tl.where(across(live), dense_mass(call, rows, tile, VEC), 0.0)
    return absorb(lanes, z, mass, VEC, HAS_MASS)


@triton.jit
def _write(call, rows, row, tile, grad_logits, grad_class, VEC: tl.constexpr):
    z = load_z(call, rows, tile, row.live, VEC)
    grad = tile_gradient(call, rows, row, tile, z, exp(z - across(row.m)), VEC)
    store_gradient(grad_logits, rows, tile, grad_class, grad, call.vectors.scale, VEC)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=["upstream"])
def _streamed_kernel(
    # in
    logits, vectors, upstream,  # None: a forward pass
    # out
    loss, workspace, grad_logits,
    # strides
    logits_outer: tl.int64, logits_inner: tl.int64, logits_class: tl.int64,
    target_outer: tl.int64, target_inner: tl.int64, target_class: tl.int64,
    grad_outer: tl.int64, grad_inner: tl.int64, grad_class: tl.int64,
    upstream_outer: tl.int64, upstream_inner: tl.int64,
    # sizes
    n_rows: tl.int64, n_inner, n_classes: tl.int32, n_groups: tl.int32, n_parts: tl.int32, n_chunks: tl.int32,
    splits: tl.int32, period: tl.int32, shift: tl.int32, scratch: tl.int64, table_step: tl.int32, loss_parts: tl.int64,
    # scalars
    for_one: tl.int32,  # 1: forward makes the gradient for an upstream of 1, or backward finds that it is made
    tau_bits: tl.int64, smoothing_bits: tl.int64, ignore_index: tl.int64,
    # constants
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, TARGET_ALIKE: tl.constexpr, ADJACENT: tl.constexpr,
    TARGET_ADJACENT: tl.constexpr, COMPUTE: tl.constexpr, REDUCTION: tl.constexpr,
    VEC: tl.constexpr, EDGES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK_TILES: tl.constexpr,
):  # fmt: skip
    if upstream is not None:
        if for_one != 0:
            if tl.load(upstream) == 1.0:
                return
    HAS_MASS: tl.constexpr = HAS_SMOOTHING or N_LABELS == 0
    if ADJACENT:
        logits_class = 1
        grad_class = 1
    if TARGET_ADJACENT:
        target_class = 1
    call = Arguments(
        logits, None, vectors, n_classes, logits_class, target_class, scalar(tau_bits, COMPUTE),
        scalar(smoothing_bits, COMPUTE) if HAS_SMOOTHING else None, ignore_index,
        None if N_LABELS == 0 else N_LABELS, 1 if TARGET_ALIKE else None,
    )  # fmt: skip
    group, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    rows = rows_of(
        group, period, n_rows, n_inner, n_classes, shift, (logits_outer, logits_inner),
        (target_outer, target_inner), (grad_outer, grad_inner), VEC, EDGES, BLOCK_ROWS,
    )  # fmt: skip
    chunks_a_split = tl.cdiv(n_chunks, splits)
    first_chunk, last_chunk = split * chunks_a_split, tl.minimum((split + 1) * chunks_a_split, n_chunks)
    n_tiles = (rows.body - 1) // BLOCK_C + 1
    single_label = None
    if N_LABELS == 1:
        single_label = read_label(call, rows, 0)
    share, live = shares(call, rows, single_label)
    inverse = tl.full((), 1.0, COMPUTE)

    if upstream is None:
        parts = parts_of(workspace, loss_parts, n_groups)
        nothing = empty(tl.zeros(rows.rows.shape, COMPUTE))
        part = nothing
        if EDGES:
            edges = edge_tile(rows, n_classes, VEC)
            edges = Tile(0, 0, edges.cols, tl.where(split == 0, edges.mask, False), 0)
            lanes = empty(lanes_of(rows, edges.cols, COMPUTE))
            part = across_lanes(_absorb(lanes, call, rows, edges, live, 1, HAS_MASS), HAS_MASS)
        for chunk in range(first_chunk, last_chunk):
            of_chunk = empty(lanes_of(rows, tl.arange(0, BLOCK_C // VEC), COMPUTE))
            for i in range(chunk * CHUNK_TILES, tl.minimum((chunk + 1) * CHUNK_TILES, n_tiles)):
                tile = masked_tile(rows, i * BLOCK_C, BLOCK_C)
                of_chunk = _absorb(of_chunk, call, rows, tile, live, VEC, HAS_MASS)
            part = merge(part, across_lanes(of_chunk, HAS_MASS), HAS_MASS)
            if splits > 1:  # chunk 0 takes the edges along, as it does where one program passes over the row
                store_part(parts + chunk * n_rows + rows.rows, n_chunks * n_rows, part, rows.there)
                part = nothing
        ticket = splits - 1
        if splits > 1:
            ticket = arrive(counters_of(workspace, scratch) + 1 + group)
        if ticket < splits - 1:
            return
        for chunk in range(0, tl.where(splits > 1, n_chunks, 0)):
            stored = load_part(parts + chunk * n_rows + rows.rows, n_chunks * n_rows, rows.there)
            part = merge(part, stored, HAS_MASS)
        m, rest, gap, total = part
        rest = checked_rest(call, m, rest, rest < 0.0)
        loss_rows, total = row_loss(call, rows, m, rest, gap, total, share, live, single_label)
        tl.store(workspace + rows.rows, m, rows.there)
        tl.store(workspace + n_rows + rows.rows, rest, rows.there)
        tl.store(workspace + 2 * n_rows + rows.rows, total, rows.there)
        if REDUCTION == "mean":
            inverse = 1.0 / denominator_of(workspace, scratch, n_parts)
        g = inverse + tl.zeros(rows.rows.shape, COMPUTE)
    else:
        m = tl.load(workspace + rows.rows, rows.there, other=0.0)
        rest = tl.load(workspace + n_rows + rows.rows, rows.there, other=0.0)
        total = tl.load(workspace + 2 * n_rows + rows.rows, rows.there, other=0.0)
        g = tl.load(upstream + row_offsets(rows.rows, n_inner, (upstream_outer, upstream_inner)), rows.there, other=0.0)
        if REDUCTION == "mean":
            g = g * tl.load(workspace + 3 * n_rows)

    if grad_logits is not None:
        row = Row(m, rest, 1.0 / (1.0 + rest), total, share, live, g)
        first_tile, last_tile = first_chunk * CHUNK_TILES, tl.minimum(last_chunk * CHUNK_TILES, n_tiles)
        if upstream is None:
            last_tile = tl.where(for_one != 0, last_tile, first_tile)
        for i in range(first_tile, last_tile):
            _write(call, rows, row, masked_tile(rows, i * BLOCK_C, BLOCK_C), grad_logits, grad_class, VEC)
        if EDGES:
            if (split == 0) & (last_tile > first_tile):
                _write(call, rows, row, edge_tile(rows, n_classes, VEC), grad_logits, grad_class, 1)
        store_label_gradients(
            call, rows, row, grad_logits, grad_class, first_tile * BLOCK_C, tl.minimum(last_tile * BLOCK_C, rows.body),
            EDGES, single_label,
        )  # fmt: skip
    if upstream is None:
        finish(loss, workspace, loss_rows, rows, group, n_rows, n_groups, scratch, loss_parts, inverse, REDUCTION)
