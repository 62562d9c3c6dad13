"""Rows that fit on the chip: one program loads its row whole, and all that follows comes from registers.

    z_c  = scale_c * logits_c + tau * log_prior_c
    m    = max_c z_c,      e_c = exp(z_c - m),      rest = sum_c e_c - 1
    loss = sum_c t_c * (m - z_c) + A * log1p(rest),      A = sum_c t_c                                          (row.py)
    grad = g * A * e_c / (1 + rest), and at labels g * ((A - t_c) * p_c - t_c * (1 - p_c))

Each logit is read once and each gradient written once, with one exponential a class. As a forward pass the kernel makes
the loss and, with grad_logits, the gradient for an upstream gradient of 1; as a backward pass, with an upstream, it
makes the gradient from the row anew, unless the forward pass has made it and the upstream gradient is 1.

A row is FULL_C classes of its body, which every row of this length has; BLOCK_C classes that end with the body, of
which the first tile may have `taken` some already; and a small tile of what lies before and behind the body.

A confident row has a rest of 1e-9 or less beside its top class's 1, so that class must stay out of the sum. Where only
labels are asked for, this matters only if the top class is one of them, for else the loss is at least the distance from
the top to a label: the label that stands highest stays out, and if it is not the top, rest is its exponential + the sum
- 1. Keeping one class out costs a comparison a class; so the vector of VEC classes that holds it is kept out instead,
and the small tile has what else is in that vector. Where every class is asked for, by class probabilities or label
smoothing, each class that attains m stays out, and is counted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_la._triton.epilogue import Row, checked_rest, row_loss, store_gradient, store_label_gradients, tile_gradient
from fused_la._triton.softmax import exp, mass_of
from fused_la._triton.targets import dense_mass, read_label, shares
from fused_la._triton.tiles import (
    NUMBERS,
    Arguments,
    Tile,
    across,
    along,
    highest,
    load_logits,
    masked_tile,
    row_max,
    row_offsets,
    row_sum,
    rows_of,
    scalar,
    whole_tile,
    z_of,
)  # fmt: skip
from fused_la._triton.workspace import denominator_of, finish, table_place


@triton.jit
def highest_label(call, rows, single_label):
    """(class, z) of the label that stands highest in each row; one that does not count is class 0, as good as any."""
    if single_label is not None:
        return single_label[0].label, single_label[1].z
    else:
        first, stand = read_label(call, rows, 0)
        label, z = first.label, stand.z
        for k in range(1, call.n_labels):
            other, stand = read_label(call, rows, k)
            is_above = stand.z > z  # a NaN stays, and makes its row NaN
            label, z = tl.where(is_above, other.label, label), tl.where(is_above, stand.z, z)
        return label, z


@triton.jit
def small_tile(rows, n_classes, label, VEC: tl.constexpr):
    """The classes before the body, those behind it, and those of the label's vector in the body: 4 * VEC at most.

    `taken` is 0 for the first two, and past every class for the third, which the tiles of the body have as well.
    """
    lanes, col = tl.arange(0, 4 * VEC), label - rows.head
    classes = tl.where(lanes < VEC, lanes, rows.head + rows.body + lanes - VEC)
    classes = tl.where(lanes < 2 * VEC, classes, rows.head + (col & -VEC) + lanes - 2 * VEC)
    in_body = tl.where((col >= 0) & (col < rows.body), lanes < 3 * VEC, False)
    there = tl.where(lanes < 2 * VEC, classes < n_classes, in_body)
    there = tl.where(lanes < VEC, lanes < rows.head, there)
    return Tile(0, 0, classes, there, tl.where(lanes < 2 * VEC, 0, n_classes))


@triton.jit
def tile_of(rows, n_classes, label, i: tl.constexpr, VEC: tl.constexpr, FULL_C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The i-th tile of a row."""
    if FULL_C == 0:
        return masked_tile(rows, 0, BLOCK_C)
    elif i == 0:
        return Tile(rows.head, 0, tl.arange(0, FULL_C), tl.full((FULL_C,), True, tl.int1), 0)
    elif i == 1 and BLOCK_C > 0:
        return whole_tile(rows, FULL_C, VEC, BLOCK_C)
    else:
        return small_tile(rows, n_classes, label, VEC)


@triton.jit
def sums_without(e, tile, label, VEC: tl.constexpr):
    """The sums of a tile's vectors of VEC classes; 0 for the one that holds the label, and for those taken already."""
    col = tile.start + VEC * tl.arange(0, e.shape[0] // VEC)
    left_out = (col < tile.taken) | (col == ((label - tile.first) & -VEC))
    return tl.where(left_out, 0.0, tl.sum(tl.reshape(e, (e.shape[0] // VEC, VEC)), 1))


@triton.jit
def fold_max(x, N: tl.constexpr):
    return x if x.shape[0] == N else tl.max(tl.reshape(x, (x.shape[0] // N, N)), 0)


@triton.jit
def fold_sum(x, N: tl.constexpr):
    return x if x.shape[0] == N else tl.sum(tl.reshape(x, (x.shape[0] // N, N)), 0)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=["upstream"])
def _resident_kernel(
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
    TARGET_ADJACENT: tl.constexpr, COMPUTE: tl.constexpr, REDUCTION: tl.constexpr, HAS_TABLE: tl.constexpr,
    VEC: tl.constexpr, EDGES: tl.constexpr, BLOCK_ROWS: tl.constexpr, FULL_C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if upstream is not None:
        if for_one != 0:
            if tl.load(upstream) == 1.0:
                return
    HAS_MASS: tl.constexpr = HAS_SMOOTHING or N_LABELS == 0
    BODY_TILES: tl.constexpr = 1 if FULL_C == 0 or BLOCK_C == 0 else 2
    TILES: tl.constexpr = 1 if FULL_C == 0 else BODY_TILES + 1  # the last is the small one
    LANES: tl.constexpr = BLOCK_C if BLOCK_C > 0 else FULL_C
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
    rows = rows_of(
        tl.program_id(0), period, n_rows, n_inner, n_classes, shift, (logits_outer, logits_inner),
        (target_outer, target_inner), (grad_outer, grad_inner), VEC, EDGES, BLOCK_ROWS,
    )  # fmt: skip
    single_label = None
    if N_LABELS == 1:
        single_label = read_label(call, rows, 0)
    share, live = shares(call, rows, single_label)

    label, z_label = rows.head - 1, tl.full(rows.rows.shape, 0.0, COMPUTE)  # of no vector in the body
    if not HAS_MASS:
        label, z_label = highest_label(call, rows, single_label)

    # The row, whole before anything is made of it, and its maximum
    xs, zs = (), ()
    for i in tl.static_range(TILES):
        tile = tile_of(rows, n_classes, label, i, VEC, FULL_C, BLOCK_C)
        if i == BODY_TILES:
            tl.debug_barrier()  # no load of the body moves behind it, and no thread waits for what it loads
        xs += (load_logits(call, rows, tile, VEC if i < BODY_TILES else 1),)
    for i in tl.static_range(TILES):
        tile, prior = tile_of(rows, n_classes, label, i, VEC, FULL_C, BLOCK_C), None
        if HAS_TABLE and i < BODY_TILES:
            prior = tl.load(workspace + (table_place(scratch, table_step, rows.head) + tile.cols))
        zs += (z_of(call, rows, tile, xs[i], prior, live),)
    m = row_max(zs[0] if BODY_TILES == 1 else tl.maximum(fold_max(zs[0], LANES), fold_max(zs[1], LANES)))
    if FULL_C > 0:
        m = tl.maximum(m, row_max(zs[TILES - 1]))
    m = tl.maximum(m, -highest(COMPUTE))

    # One exponential a class, and their sum
    es = ()
    rest, tops = tl.zeros(rows.rows.shape, COMPUTE), tl.zeros(rows.rows.shape, COMPUTE)
    gap, total = tl.zeros(rows.rows.shape, COMPUTE), tl.zeros(rows.rows.shape, COMPUTE)
    for i in tl.static_range(TILES):
        tile, e = tile_of(rows, n_classes, label, i, VEC, FULL_C, BLOCK_C), exp(zs[i] - across(m))
        es += (e,)
        if HAS_MASS:
            new = along(tile.cols >= tile.taken, rows)
            top = (new & (zs[i] == across(m))).to(COMPUTE)
            rest += row_sum(tl.where(new, e, 0.0) - top)
            tops += row_sum(top)
        elif i >= BODY_TILES or FULL_C == 0:
            rest += row_sum(tl.where(along(tile.first + tile.cols, rows) == across(label), 0.0, e))
        elif i == 0:
            sums = fold_sum(sums_without(e, tile, label, VEC), LANES // VEC)
        else:
            sums += fold_sum(sums_without(e, tile, label, VEC), LANES // VEC)
        if HAS_MASS:
            mass = dense_mass(call, rows, tile, VEC if i < BODY_TILES else 1)
            mass = tl.where(across(live), tl.where(along(tile.cols >= tile.taken, rows), mass, 0.0), 0.0)
            gap_of_tile, total_of_tile = mass_of(zs[i], m, mass)
            gap += gap_of_tile
            total += total_of_tile
    if HAS_MASS:
        rest += tops - 1.0
        d = rest + 1.0
    else:
        if FULL_C > 0:
            rest += tl.sum(sums, 0)
        d = rest + exp(z_label - m)
        rest = tl.where(z_label == m, rest, tl.where(d < 1.0, 0.0, d - 1.0))
    rest = checked_rest(call, m, rest, d < 0.5)
    loss_rows, total = row_loss(call, rows, m, rest, gap, total, share, live, single_label)

    # The gradient
    inverse = tl.full((), 1.0, COMPUTE)
    if upstream is None:
        if REDUCTION == "mean":
            inverse = 1.0 / denominator_of(workspace, scratch, n_parts)
        g = inverse
    else:
        g = tl.load(upstream + row_offsets(rows.rows, n_inner, (upstream_outer, upstream_inner)), rows.there, other=0.0)
        if REDUCTION == "mean":
            g = g * tl.load(workspace + 3 * n_rows)
    if grad_logits is not None:
        g = g + tl.zeros(rows.rows.shape, COMPUTE)
        row = Row(m, rest, 1.0 / (1.0 + rest), total, share, live, g)
        for i in tl.static_range(TILES):
            tile = tile_of(rows, n_classes, label, i, VEC, FULL_C, BLOCK_C)
            if i >= BODY_TILES:  # what is in the body has been written
                tile = Tile(0, 0, tile.cols, tile.mask & (tile.taken == 0), 0)
            grad = tile_gradient(call, rows, row, tile, zs[i], es[i], VEC if i < BODY_TILES else 1)
            store_gradient(
                grad_logits, rows, tile, grad_class, grad, vectors.scale, VEC if i < BODY_TILES else 1
            )  # fmt: skip
        store_label_gradients(call, rows, row, grad_logits, grad_class, 0, rows.body, EDGES, single_label)

    # The loss
    if upstream is None:
        if grad_logits is None:
            tl.store(workspace + rows.rows, m, rows.there)
            tl.store(workspace + n_rows + rows.rows, rest, rows.there)
            tl.store(workspace + 2 * n_rows + rows.rows, total, rows.there)
        finish(
            loss,
            workspace,
            loss_rows,
            rows,
            tl.program_id(0),
            n_rows,
            n_groups,
            scratch,
            loss_parts,
            inverse,
            REDUCTION,
        )
