"""Backward: the gradient of the logits, and of log_prior where it is learned.

    p_c              = exp(z_c - m) / (1 + rest),     1 - p_c = rest / (1 + rest) for the class that attains m
    grad_logits_c    = g * ((A - t_c) * p_c - t_c * (1 - p_c))
    grad_log_prior_c = tau * sum over the rows of grad_logits_c

with g the row's upstream gradient (over the mean's denominator) and m, rest, A as the forward pass saved them. No term
cancels: a confident row's target has (A - t) = 0 and 1 - p straight from `rest`. A class at log_prior = -inf and a row
without a counting label have gradient 0, whatever stands there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_la._problem import Problem
from fused_la._triton.launch import choose_launch, on_device_of
from fused_la._triton.tiles import (
    float_bits,
    load_label,
    load_z,
    probability_mass,
    row_offsets,
    scalar,
    smoothing_mass,
    triton_dtype,
)


@triton.jit
def _gradient_tile(
    logits, log_prior, target, target_weight, weight, smoothing_distribution, grad_loss, normalizer, state,
    stride_logits_outer, stride_logits_inner, stride_logits_class,
    stride_target_outer, stride_target_inner, stride_target_class,
    stride_grad_loss_outer, stride_grad_loss_inner,
    n_rows, n_inner, n_classes,
    tau_bits, smoothing_bits, ignore_index,
    rows, cols,
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gradient with respect to z of a tile of rows and cols, in COMPUTE; 0 outside."""
    mask_rows, mask_cols = rows < n_rows, cols < n_classes
    bases = row_offsets(rows, n_inner, stride_logits_outer, stride_logits_inner)
    tau, smoothing = scalar(tau_bits), scalar(smoothing_bits)
    z = load_z(logits, log_prior, bases, cols, mask_rows, mask_cols, stride_logits_class, tau, COMPUTE)
    m = tl.load(state + rows, mask_rows, other=0.0)[:, None]
    rest = tl.load(state + n_rows + rows, mask_rows, other=0.0)[:, None]
    total = tl.load(state + 2 * tl.cast(n_rows, tl.int64) + rows, mask_rows, other=0.0)[:, None]
    g = tl.load(
        grad_loss + row_offsets(rows, n_inner, stride_grad_loss_outer, stride_grad_loss_inner),
        mask_rows,
        other=0.0,
    )
    g = g.to(COMPUTE)
    if normalizer is not None:
        g = g / tl.load(normalizer)

    mass = tl.zeros(z.shape, COMPUTE)
    if HAS_SMOOTHING:
        mass += smoothing_mass(smoothing_distribution, weight, cols, mask_cols, n_classes, smoothing, COMPUTE)
    if N_LABELS == 0:
        target_bases = row_offsets(rows, n_inner, stride_target_outer, stride_target_inner)
        mass += probability_mass(
            target, weight, target_bases, cols, mask_rows, mask_cols, stride_target_class, smoothing, COMPUTE
        )  # fmt: skip
        live = mask_rows
    else:
        live = tl.zeros(rows.shape, tl.int1)
        share_row = tl.zeros(rows.shape, COMPUTE)
        label_mass = tl.zeros(z.shape, COMPUTE)
        for k in range(N_LABELS):
            label, mass_k, _, share, counts = load_label(
                target, target_weight, weight, rows * N_LABELS + k, mask_rows, n_classes, smoothing, ignore_index,
                COMPUTE,
            )  # fmt: skip
            here = (cols[None, :] == label[:, None]) & counts[:, None]
            label_mass += tl.where(here, mass_k[:, None], 0.0)
            share_row += share
            live = live | counts
        mass = mass * share_row[:, None] + label_mass

    scale = 1.0 / (1.0 + rest)
    p = tl.exp(z - m) * scale
    not_p = tl.where(z == m, rest * scale, 1.0 - p)
    grad = g[:, None] * ((total - mass) * p - mass * not_p)
    if log_prior is not None:
        grad = tl.where(tl.load(log_prior + cols, mask_cols, other=0.0)[None, :] == float("-inf"), 0.0, grad)
    return tl.where(live[:, None], grad, 0.0)


@triton.jit(do_not_specialize=["tau_bits", "smoothing_bits", "ignore_index"])
def _grad_logits_kernel(
    # in
    logits, log_prior, target, target_weight, weight, smoothing_distribution, grad_loss, normalizer, state,
    # out
    grad_logits,
    # strides
    stride_logits_outer, stride_logits_inner, stride_logits_class,
    stride_target_outer, stride_target_inner, stride_target_class,
    stride_grad_loss_outer, stride_grad_loss_inner,
    stride_grad_logits_outer, stride_grad_logits_inner, stride_grad_logits_class,
    # sizes
    n_rows, n_inner, n_classes,
    # scalars
    tau_bits, smoothing_bits, ignore_index,
    # constants
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    n_col_tiles = tl.cdiv(tl.cast(n_classes, tl.int64), BLOCK_C)
    rows = (tile // n_col_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = (tile % n_col_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    grad = _gradient_tile(
        logits, log_prior, target, target_weight, weight, smoothing_distribution, grad_loss, normalizer, state,
        stride_logits_outer, stride_logits_inner, stride_logits_class,
        stride_target_outer, stride_target_inner, stride_target_class,
        stride_grad_loss_outer, stride_grad_loss_inner,
        n_rows, n_inner, n_classes,
        tau_bits, smoothing_bits, ignore_index,
        rows, cols,
        N_LABELS, HAS_SMOOTHING, COMPUTE,
    )  # fmt: skip
    bases = row_offsets(rows, n_inner, stride_grad_logits_outer, stride_grad_logits_inner)
    at = grad_logits + bases[:, None] + cols.to(tl.int64)[None, :] * stride_grad_logits_class
    tl.store(at, grad.to(grad_logits.dtype.element_ty), (rows < n_rows)[:, None] & (cols < n_classes)[None, :])


@triton.jit(do_not_specialize=["tau_bits", "smoothing_bits", "ignore_index"])
def _grad_log_prior_kernel(
    # in
    logits, log_prior, target, target_weight, weight, smoothing_distribution, grad_loss, normalizer, state,
    # out
    grad_log_prior,
    # strides
    stride_logits_outer, stride_logits_inner, stride_logits_class,
    stride_target_outer, stride_target_inner, stride_target_class,
    stride_grad_loss_outer, stride_grad_loss_inner,
    # sizes
    n_rows, n_inner, n_classes,
    # scalars
    tau_bits, smoothing_bits, ignore_index,
    # constants
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_C classes over all rows, in order: the same inputs give the same bits."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    grad_sum = tl.zeros((BLOCK_ROWS, BLOCK_C), COMPUTE)
    for start in range(0, tl.cast(n_rows, tl.int64), BLOCK_ROWS):
        grad_sum += _gradient_tile(
            logits, log_prior, target, target_weight, weight, smoothing_distribution, grad_loss, normalizer, state,
            stride_logits_outer, stride_logits_inner, stride_logits_class,
            stride_target_outer, stride_target_inner, stride_target_class,
            stride_grad_loss_outer, stride_grad_loss_inner,
            n_rows, n_inner, n_classes,
            tau_bits, smoothing_bits, ignore_index,
            start + tl.arange(0, BLOCK_ROWS), cols,
            N_LABELS, HAS_SMOOTHING, COMPUTE,
        )  # fmt: skip
    grad = tl.sum(grad_sum, 0) * scalar(tau_bits).to(COMPUTE)
    tl.store(grad_log_prior + cols, grad, cols < n_classes)


def launch_backward(
    problem: Problem,
    state: Tensor,
    grad_loss: Tensor,
    normalizer: Tensor | None,
    needs_logits: bool,
    needs_log_prior: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of logits (N, P, C) and log_prior (C,), None where not needed.

    grad_loss is (N, P), or a scalar expanded to it; normalizer divides it.
    """
    logits, log_prior, target = problem.logits, problem.log_prior, problem.target
    n_outer, n_inner, n_classes = logits.shape
    n_rows = n_outer * n_inner
    launch = choose_launch(n_classes, logits.dtype, logits.stride(2) == 1)
    tensors = (logits, log_prior, target, problem.target_weight, problem.weight, problem.smoothing_distribution,
               grad_loss, normalizer, state)  # fmt: skip
    strides = (*logits.stride(), *target.stride(), *grad_loss.stride())
    sizes = (n_rows, n_inner, n_classes)
    scalars = (float_bits(problem.tau), float_bits(problem.label_smoothing), problem.ignore_index)
    constants = dict(
        N_LABELS=0 if problem.has_probabilities else target.shape[2],
        HAS_SMOOTHING=problem.label_smoothing > 0.0,
        COMPUTE=triton_dtype(problem.compute_dtype),
        BLOCK_ROWS=launch.block_rows, BLOCK_C=launch.block_c, num_warps=launch.num_warps,
    )  # fmt: skip
    n_col_tiles = triton.cdiv(n_classes, launch.block_c)

    grad_logits = grad_log_prior = None
    with on_device_of(logits):
        if needs_logits:
            grad_logits = torch.empty_like(logits)
            if n_rows > 0:
                grid = (triton.cdiv(n_rows, launch.block_rows) * n_col_tiles,)
                outs = (grad_logits, *strides, *grad_logits.stride())
                _grad_logits_kernel[grid](*tensors, *outs, *sizes, *scalars, **constants)
        if needs_log_prior and log_prior is not None:
            grad_log_prior = torch.empty_like(log_prior, dtype=problem.compute_dtype)
            _grad_log_prior_kernel[(n_col_tiles,)](*tensors, grad_log_prior, *strides, *sizes, *scalars, **constants)
            grad_log_prior = grad_log_prior.to(log_prior.dtype)
    return grad_logits, grad_log_prior
