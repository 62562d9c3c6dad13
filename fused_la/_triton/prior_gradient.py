"""The gradient of log_prior, where it is learned: grad_log_prior_c = tau * sum over the rows of grad_logits_c."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_la._triton.epilogue import full_form
from fused_la._triton.softmax import exp
from fused_la._triton.targets import dense_mass, load_label, shares
from fused_la._triton.tiles import NUMBERS, Arguments, Rows, Tile, across, load_classes, load_z, row_offsets, scalar

PRIOR_TILE = 32  # rows and classes of a tile of what is summed


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
    n_rows: tl.int64, n_inner, n_classes: tl.int32,
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
    call = Arguments(
        logits, None, vectors, n_classes, logits_class, target_class, scalar(tau_bits, COMPUTE),
        scalar(smoothing_bits, COMPUTE) if HAS_SMOOTHING else None, ignore_index,
        None if N_LABELS == 0 else N_LABELS, None,
    )  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = Tile(0, 0, cols, cols < n_classes, 0)
    is_out = load_classes(vectors.log_prior, tile) == float("-inf")
    grad_sum = tl.zeros((BLOCK_ROWS, BLOCK_C), COMPUTE)
    for start in range(0, n_rows, BLOCK_ROWS):
        at = start + tl.arange(0, BLOCK_ROWS)
        there = at < n_rows
        to_read = tl.where(there, at, 0)
        rows = Rows(
            to_read, there, row_offsets(to_read, n_inner, (logits_outer, logits_inner)),
            row_offsets(to_read, n_inner, (target_outer, target_inner)), 0, 0, 0,
        )  # fmt: skip
        share, live = shares(call, rows, None)
        z = load_z(call, rows, tile, live, 1)
        mass = dense_mass(call, rows, tile, 1) * across(share)
        if N_LABELS > 0:
            for k in range(N_LABELS):
                label = load_label(call, rows, k)
                label_mass = label.mass
                if HAS_SMOOTHING:
                    label_mass = label_mass * (1.0 - call.smoothing)
                here = (cols[None, :] == label.label[:, None]) & label.counts[:, None]
                mass += tl.where(here, label_mass[:, None], 0.0)
        m = tl.load(workspace + to_read)
        rest = tl.load(workspace + n_rows + to_read)
        total = tl.load(workspace + 2 * n_rows + to_read)
        g = tl.load(upstream + row_offsets(to_read, n_inner, (upstream_outer, upstream_inner)))
        if REDUCTION == "mean":
            g = g * tl.load(workspace + 3 * n_rows)
        inverse = 1.0 / (1.0 + rest)
        p = exp(z - across(m)) * across(inverse)
        not_p = tl.where(z == across(m), across(rest * inverse), 1.0 - p)
        grad = full_form(p, not_p, across(total), across(g), mass)
        grad = tl.where(is_out[None, :], across(rest - rest), grad)
        grad_sum += tl.where(across(tl.where(there, live, False)), grad, 0.0)
    tl.store(grad_log_prior + cols, tl.sum(grad_sum, 0) * call.tau, tile.mask)
