"""Forward: every row's loss, and the three numbers its gradient needs.

    z_c  = logits_c + tau * log_prior_c
    m    = max_c z_c
    rest = sum of exp(z_c - m) over all classes but one that attains m
    loss = sum_c t_c * (m - z_c) + A * log1p(rest),      A = sum_c t_c

One program passes over BLOCK_ROWS rows, BLOCK_C classes at a time. Each lane of the tile keeps its own running m and
rest with one exponential an element: with f = exp(-|z - m|),

    z >  m:  the old top joins the rest,  rest = (rest + 1) * f,  m = z
    z <= m:  z joins the rest,            rest = rest + f

and the lanes join by the same rule at the end, so the top class is never in a sum that a small rest must be told from.
Saved for backward, (3, N, P): m, rest, A. An infinite m or a NaN makes the row NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_la._problem import Problem
from fused_la._triton.launch import choose_launch, on_device_of
from fused_la._triton.tiles import (
    float_bits,
    load_label,
    load_label_z,
    load_z,
    log1p,
    probability_mass,
    row_offsets,
    scalar,
    smoothing_mass,
    triton_dtype,
)


@triton.jit(do_not_specialize=["tau_bits", "smoothing_bits", "ignore_index"])
def _forward_kernel(
    # in
    logits,
    log_prior,
    target,
    target_weight,
    weight,
    smoothing_distribution,
    # out
    loss,
    row_weight,
    state,
    # strides
    stride_logits_outer,
    stride_logits_inner,
    stride_logits_class,
    stride_target_outer,
    stride_target_inner,
    stride_target_class,
    # sizes
    n_rows,
    n_inner,
    n_classes,
    # scalars
    tau_bits,
    smoothing_bits,
    ignore_index,
    # constants
    N_LABELS: tl.constexpr,  # 0: class probabilities
    HAS_SMOOTHING: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask_rows = rows < n_rows
    bases = row_offsets(rows, n_inner, stride_logits_outer, stride_logits_inner)
    target_bases = row_offsets(rows, n_inner, stride_target_outer, stride_target_inner)
    tau = scalar(tau_bits)
    smoothing = scalar(smoothing_bits)
    HAS_MASS: tl.constexpr = HAS_SMOOTHING or N_LABELS == 0

    m = tl.full((BLOCK_ROWS, BLOCK_C), float("-inf"), COMPUTE)
    rest = tl.zeros((BLOCK_ROWS, BLOCK_C), COMPUTE)
    gap = tl.zeros((BLOCK_ROWS, BLOCK_C), COMPUTE)
    total = tl.zeros((BLOCK_ROWS, BLOCK_C), COMPUTE)
    for start in range(0, tl.cast(n_classes, tl.int64), BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        mask_cols = cols < n_classes
        z = load_z(logits, log_prior, bases, cols, mask_rows, mask_cols, stride_logits_class, tau, COMPUTE)
        f = tl.where(z == float("-inf"), 0.0, tl.exp(-tl.abs(z - m)))
        m_new = tl.maximum(m, z)
        if HAS_MASS:
            mass = tl.zeros((1, BLOCK_C), COMPUTE)
            if HAS_SMOOTHING:
                mass = smoothing_mass(smoothing_distribution, weight, cols, mask_cols, n_classes, smoothing, COMPUTE)
            if N_LABELS == 0:
                mass = mass + probability_mass(
                    target, weight, target_bases, cols, mask_rows, mask_cols, stride_target_class, smoothing, COMPUTE
                )  # fmt: skip
            # sum of t_c * (m - z_c): all terms are non-negative, and move up with m.
            above = tl.where(m_new == float("-inf"), 0.0, m_new) - z
            gap += tl.where(mass == 0.0, 0.0, mass * above)
            gap += tl.where(total == 0.0, 0.0, total * (m_new - m))
            total += mass
        rest = rest * tl.where(z > m, f, 1.0) + f
        m = m_new

    m_row = tl.max(m, 1)
    below = m_row[:, None] - m
    is_top = below == 0.0
    rest = tl.where(is_top, rest, (rest + 1.0) * tl.where(m == float("-inf"), 0.0, tl.exp(-below)))
    rest_row = tl.sum(rest, 1) + (tl.sum(is_top.to(COMPUTE), 1) - 1.0)
    rest_row = tl.where(tl.abs(m_row) == float("inf"), float("nan"), rest_row)
    gap_row = tl.zeros((BLOCK_ROWS,), COMPUTE)
    total_row = tl.zeros((BLOCK_ROWS,), COMPUTE)
    if HAS_MASS:
        gap_row = tl.sum(gap + tl.where(total == 0.0, 0.0, total * below), 1)
        total_row = tl.sum(total, 1)

    if N_LABELS == 0:
        loss_row = gap_row + total_row * log1p(rest_row)
        weight_row = tl.full((BLOCK_ROWS,), 1.0, COMPUTE)
    else:
        label_loss = tl.zeros((BLOCK_ROWS,), COMPUTE)
        label_total = tl.zeros((BLOCK_ROWS,), COMPUTE)
        share_row = tl.zeros((BLOCK_ROWS,), COMPUTE)
        weight_row = tl.zeros((BLOCK_ROWS,), COMPUTE)
        live = tl.zeros((BLOCK_ROWS,), tl.int1)
        for k in range(N_LABELS):
            label, label_mass, label_weight, share, counts = load_label(
                target, target_weight, weight, rows * N_LABELS + k, mask_rows, n_classes, smoothing, ignore_index,
                COMPUTE,
            )  # fmt: skip
            z = load_label_z(logits, log_prior, bases, label, mask_rows, stride_logits_class, tau, COMPUTE)
            above = m_row - z
            free = (label_mass == 0.0) & (above == float("inf"))
            label_loss += label_mass * tl.where(free, 0.0, above)
            label_total += label_mass
            weight_row += label_weight
            share_row += share
            live = live | counts
        total_row = label_total + share_row * total_row
        loss_row = tl.where(live, label_loss + share_row * gap_row + total_row * log1p(rest_row), 0.0)
        weight_row = tl.where(share_row == 0.0, 0.0, weight_row / tl.where(share_row == 0.0, 1.0, share_row))

    tl.store(loss + rows, loss_row, mask_rows)
    tl.store(row_weight + rows, weight_row, mask_rows)
    tl.store(state + rows, m_row, mask_rows)
    tl.store(state + n_rows + rows, rest_row, mask_rows)
    tl.store(state + 2 * tl.cast(n_rows, tl.int64) + rows, total_row, mask_rows)


@triton.jit
def _reduce_kernel(
    loss, row_weight, reduced, normalizer, n_rows,
    MEAN: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum or average the rows in an order that their number alone sets; one program."""
    loss_sum = tl.zeros((BLOCK,), COMPUTE)
    weight_sum = tl.zeros((BLOCK,), COMPUTE)
    for start in range(0, tl.cast(n_rows, tl.int64), BLOCK):
        rows = start + tl.arange(0, BLOCK)
        mask = rows < n_rows
        loss_sum += tl.load(loss + rows, mask, other=0.0)
        weight_sum += tl.load(row_weight + rows, mask, other=0.0)
    total = tl.sum(loss_sum, 0)
    denominator = tl.sum(weight_sum, 0)
    if MEAN:
        total = total / denominator
    tl.store(reduced, total)
    tl.store(normalizer, denominator)


def forward_gradient(problem: Problem, reduction: str) -> bool:
    """Whether the forward pass makes the gradient as well: not in these kernels, backward recomputes."""
    return False


def launch_forward(problem: Problem, reduction: str, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, row state (3, N, P), the mean's denominator, and no gradient: backward computes it."""
    logits, target = problem.logits, problem.target
    n_outer, n_inner, n_classes = logits.shape
    n_rows = n_outer * n_inner
    dtype = problem.compute_dtype
    # Apart, for the loss is the caller's: an in-place change of it must not look like one of what backward saved.
    loss = logits.new_empty((n_outer, n_inner), dtype=dtype)
    saved = logits.new_empty((4, n_outer, n_inner), dtype=dtype)
    state, row_weight = saved[:3], saved[3]
    launch = choose_launch(n_classes, logits.dtype, logits.stride(2) == 1)
    no_gradient = logits.new_empty(0)
    reduced, normalizer = loss.new_empty(()), loss.new_empty(())
    with on_device_of(logits):
        if n_rows > 0:
            _forward_kernel[(triton.cdiv(n_rows, launch.block_rows),)](
                logits, problem.log_prior, target, problem.target_weight, problem.weight,
                problem.smoothing_distribution,
                loss, row_weight, state,
                *logits.stride(), *target.stride(),
                n_rows, n_inner, n_classes,
                float_bits(problem.tau), float_bits(problem.label_smoothing), problem.ignore_index,
                N_LABELS=0 if problem.has_probabilities else target.shape[2],
                HAS_SMOOTHING=problem.label_smoothing > 0.0,
                COMPUTE=triton_dtype(dtype),
                BLOCK_ROWS=launch.block_rows, BLOCK_C=launch.block_c, num_warps=launch.num_warps,
            )  # fmt: skip
        if reduction == "none":
            return loss, state, loss.new_empty(0), no_gradient
        _reduce_kernel[(1,)](
            loss, row_weight, reduced, normalizer, n_rows,
            MEAN=reduction == "mean", COMPUTE=triton_dtype(dtype), BLOCK=1024,
        )  # fmt: skip
    return reduced, state, normalizer, no_gradient
