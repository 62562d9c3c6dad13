"""The gradient of a learned log_prior: grad_log_prior_c = tau * sum of the gradient of z_c over the rows (of a group).

With one prior a program keeps the sums of its classes in registers. With a prior for each group it takes a row at a
time, and adds it to the sums of the row's group in memory, in float64: no other program has these classes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_la._triton.epilogue import class_gradient
from fused_la._triton.softmax import exp
from fused_la._triton.targets import dense_mass, load_label, share_and_live
from fused_la._triton.tiles import (
    NUMBERS,
    Arguments,
    RowGroup,
    Tile,
    from_bits,
    load_prior,
    load_row_operands,
    load_z,
    per_row,
    row_offsets,
)

# Rows and classes of a tile; by group. Neither has been timed on a GPU.
PRIOR_TILE = (32, 32)
PRIOR_TILE_BY_GROUP = (1, 128)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=["upstream", "logits"])
def _grad_log_prior_kernel(
    # in
    logits, vectors, workspace, upstream,
    # out
    grad_log_prior,
    # strides
    logits_outer: tl.int64, logits_inner: tl.int64, logits_class: tl.int64,
    target_outer: tl.int64, target_inner: tl.int64, target_class: tl.int64,
    upstream_outer: tl.int64, upstream_inner: tl.int64,
    # sizes
    n_rows: tl.int64, n_inner, n_classes: tl.int32, n_priors: tl.int32,
    # scalars
    tau_bits: tl.int64, smoothing_bits: tl.int64, ignore_index: tl.int64,
    # constants
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, ADJACENT: tl.constexpr, TARGET_ADJACENT: tl.constexpr,
    COMPUTE: tl.constexpr, REDUCTION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_C classes over all rows, in order: the same inputs give the same bits."""
    if ADJACENT:
        logits_class = 1
    if TARGET_ADJACENT:
        target_class = 1
    args = Arguments(
        logits, None, vectors, n_classes, logits_class, target_class, from_bits(tau_bits, COMPUTE),
        from_bits(smoothing_bits, COMPUTE) if HAS_SMOOTHING else None, ignore_index,
        None if N_LABELS == 0 else N_LABELS, None,
    )  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = Tile(0, 0, cols, cols < n_classes, 0)
    grad_sum = tl.zeros((BLOCK_ROWS, BLOCK_C), COMPUTE)
    for start in range(0, n_rows, BLOCK_ROWS):
        index = start + tl.arange(0, BLOCK_ROWS)
        in_bounds = index < n_rows
        safe_rows = tl.where(in_bounds, index, 0)
        rows = RowGroup(
            safe_rows, in_bounds, row_offsets(safe_rows, n_inner, (logits_outer, logits_inner)),
            row_offsets(safe_rows, n_inner, (target_outer, target_inner)), 0, 0, 0,
            load_row_operands(vectors, safe_rows, in_bounds, n_classes, n_priors, COMPUTE),
        )  # fmt: skip
        share, live = share_and_live(args, rows, None)
        z = load_z(args, rows, tile, live, 1)
        mass = dense_mass(args, rows, tile, 1) * per_row(share)
        if N_LABELS > 0:
            for k in range(N_LABELS):
                label = load_label(args, rows, k)
                label_mass = label.mass
                if HAS_SMOOTHING:
                    label_mass = label_mass * (1.0 - args.smoothing)
                is_label = (cols[None, :] == label.index[:, None]) & label.counts[:, None]
                mass += tl.where(is_label, label_mass[:, None], 0.0)
        m = tl.load(workspace + safe_rows)
        rest = tl.load(workspace + n_rows + safe_rows)
        total = tl.load(workspace + 2 * n_rows + safe_rows)
        g = tl.load(upstream + row_offsets(safe_rows, n_inner, (upstream_outer, upstream_inner)))
        if REDUCTION == "mean":
            g = g * tl.load(workspace + 3 * n_rows)
        inverse_sum = 1.0 / (1.0 + rest)
        p = exp(z - per_row(m)) * per_row(inverse_sum)
        not_p = tl.where(z == per_row(m), per_row(rest * inverse_sum), 1.0 - p)
        grad = class_gradient(p, not_p, per_row(total), per_row(g), mass)
        excluded = load_prior(args, vectors.log_prior, rows, tile) == float("-inf")
        grad = tl.where(excluded, per_row(rest - rest), grad)
        grad = tl.where(per_row(tl.where(in_bounds, live, False)), grad, 0.0)
        if vectors.prior_index is None:
            grad_sum += grad
        else:  # BLOCK_ROWS is 1
            pointers = grad_log_prior + per_row(rows.operands.prior_start) + cols[None, :]
            total = tl.load(pointers, tile.mask[None, :], other=0.0) + grad.to(tl.float64) * args.tau.to(tl.float64)
            tl.store(pointers, total, tile.mask[None, :])
            tl.debug_barrier()  # the next row may be of the same group
    if vectors.prior_index is None:
        tl.store(grad_log_prior + cols, tl.sum(grad_sum, 0) * args.tau, tile.mask)
