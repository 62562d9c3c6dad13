"""Backward: the gradient of the logits (gradient.py), and of log_prior where it is learned.

    grad_log_prior_c = tau * sum over the rows of grad_logits_c

A gradient that the forward pass made for an upstream gradient of 1 is right if 1 is what came: the kernel reads the
upstream on the device and returns; otherwise it writes the gradient anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_la._problem import Problem
from fused_la._triton.gradient import full_form, read_shares, write_gradient
from fused_la._triton.launch import AS_WRITTEN, choose_backward_launch, device_of, layout_of, on_device_of
from fused_la._triton.operands import begin_earlier, grad_buffer, operands
from fused_la._triton.targets import dense_mass, load_label
from fused_la._triton.tiles import cut_row, group_rows, load_z, row_offsets, scalar


@triton.jit
def _load_rows(state, grad_loss, normalizer, rows, mask_rows, sizes, strides_grad_loss, COMPUTE: tl.constexpr):
    """(m, rest, A, g) of each row."""
    m = tl.load(state + rows, mask_rows, other=0.0)
    rest = tl.load(state + sizes.n_rows + rows, mask_rows, other=0.0)
    total = tl.load(state + 2 * sizes.n_rows.to(tl.int64) + rows, mask_rows, other=0.0)
    g = tl.load(grad_loss + row_offsets(rows, sizes.n_inner, strides_grad_loss), mask_rows, other=0.0).to(COMPUTE)
    if normalizer is not None:
        g = g / tl.load(normalizer)
    return m, rest, total, g


@triton.jit(do_not_specialize=["tau_bits", "smoothing_bits", "ignore_index"])
def _grad_logits_kernel(
    # in
    logits, vectors, state, grad_loss, normalizer,
    # out
    grad_logits,
    # strides
    strides_logits, strides_target, strides_grad_loss, strides_grad_logits,
    # sizes
    sizes, period, shift,
    # scalars
    tau_bits, smoothing_bits, ignore_index,
    # constants
    MADE_FOR_ONE: tl.constexpr,  # grad_logits is right already if the upstream gradient is 1
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, TARGET_ALIKE: tl.constexpr, COMPUTE: tl.constexpr,
    VEC: tl.constexpr, EDGES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    if MADE_FOR_ONE:
        if tl.load(grad_loss) == 1.0:
            return
    group, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    first_row, to_read, rows, mask_rows = group_rows(group, period, sizes.n_rows, BLOCK_ROWS)
    head, body = cut_row(shift + row_offsets(first_row, sizes.n_inner, strides_logits), sizes.n_classes, VEC, EDGES)
    n_tiles = (body - 1) // BLOCK_C + 1
    tiles_a_split = tl.cdiv((sizes.n_classes - 1) // BLOCK_C + 1, SPLITS)
    m, rest, total, g = _load_rows(
        state, grad_loss, normalizer, rows, mask_rows, sizes, strides_grad_loss, COMPUTE
    )  # fmt: skip
    write_gradient(
        logits, vectors, grad_logits, strides_logits, strides_target, strides_grad_logits, sizes,
        rows, mask_rows,
        shift + row_offsets(to_read, sizes.n_inner, strides_logits),
        row_offsets(to_read, sizes.n_inner, strides_target),
        shift + row_offsets(to_read, sizes.n_inner, strides_grad_logits),
        head, body, split * tiles_a_split, tl.minimum((split + 1) * tiles_a_split, n_tiles),
        m, rest, total, g, scalar(tau_bits), scalar(smoothing_bits), ignore_index,
        N_LABELS, HAS_SMOOTHING, TARGET_ALIKE, COMPUTE, VEC, EDGES, BLOCK_C,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tau_bits", "smoothing_bits", "ignore_index"])
def _grad_log_prior_kernel(
    # in
    logits, vectors, state, grad_loss, normalizer,
    # out
    grad_log_prior,
    # strides
    strides_logits, strides_target, strides_grad_loss,
    # sizes
    sizes,
    # scalars
    tau_bits, smoothing_bits, ignore_index,
    # constants
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_C classes over all rows, in order: the same inputs give the same bits."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_cols = cols < sizes.n_classes
    tau, smoothing = scalar(tau_bits), scalar(smoothing_bits)
    grad_sum = tl.zeros((BLOCK_ROWS, BLOCK_C), COMPUTE)
    for start in range(0, sizes.n_rows.to(tl.int64), BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask_rows = rows < sizes.n_rows
        starts = row_offsets(rows, sizes.n_inner, strides_logits)
        z = load_z(logits, vectors, starts, 0, cols, mask_rows, mask_cols, strides_logits[2], tau, COMPUTE)
        mass = dense_mass(
            vectors, row_offsets(rows, sizes.n_inner, strides_target), 0, cols, mask_rows, mask_cols,
            strides_target[2], sizes.n_classes, smoothing, N_LABELS, HAS_SMOOTHING, COMPUTE,
        )  # fmt: skip
        share, live = read_shares(vectors, rows, mask_rows, sizes.n_classes, smoothing, ignore_index, N_LABELS, COMPUTE)
        mass = mass * share[:, None]
        for k in range(N_LABELS):
            label, label_mass, _, _, counts = load_label(
                vectors, rows * N_LABELS + k, mask_rows, sizes.n_classes, smoothing, ignore_index, COMPUTE
            )
            here = (cols[None, :] == label[:, None]) & counts[:, None]
            mass += tl.where(here, label_mass[:, None], 0.0)
        m, rest, total, g = _load_rows(
            state, grad_loss, normalizer, rows, mask_rows, sizes, strides_grad_loss, COMPUTE
        )  # fmt: skip
        grad = full_form(z, m[:, None], rest[:, None], total[:, None], g[:, None], mass, COMPUTE)
        prior = tl.load(vectors.log_prior + cols, mask_cols, other=0.0)
        grad = tl.where(prior[None, :] == float("-inf"), (rest - rest)[:, None], grad)
        grad_sum += tl.where(live[:, None], grad, 0.0)
    tl.store(grad_log_prior + cols, tl.sum(grad_sum, 0) * tau.to(COMPUTE), mask_cols)


def launch_backward(
    problem: Problem,
    state: Tensor,
    grad_loss: Tensor,
    normalizer: Tensor | None,
    needs_logits: bool,
    needs_log_prior: bool,
    made_for_one: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of logits (N, P, C) and log_prior (C,), None where not needed.

    grad_loss is (N, P), or a scalar expanded to it; normalizer divides it. `made_for_one` is what the forward pass
    made of the logits' gradient, for a grad_loss of 1: it is put right where it stands.
    """
    logits, log_prior = problem.logits, problem.log_prior
    n_outer, n_inner, n_classes = logits.shape
    n_rows = n_outer * n_inner
    layout = layout_of(logits)
    launch = choose_backward_launch(n_rows, n_classes, logits.dtype, layout, device_of(logits))
    given = operands(problem, launch, layout)
    grad_logits = grad_log_prior = None
    with on_device_of(logits):
        if needs_logits:
            grad_logits = grad_buffer(logits, layout) if made_for_one is None else made_for_one
            constants = {name: value for name, value in given.constants.items() if name != "CHUNK_TILES"}
            if n_rows > 0:
                _grad_logits_kernel[(launch.n_groups(n_rows) * launch.splits,)](
                    given.logits, given.vectors, state, grad_loss, normalizer,
                    begin_earlier(grad_logits, given.shift),
                    logits.stride(), problem.target.stride(), grad_loss.stride(), grad_logits.stride(),
                    given.sizes, launch.period, given.shift,
                    *given.scalars,
                    MADE_FOR_ONE=made_for_one is not None, **constants, **AS_WRITTEN,
                )  # fmt: skip
        if needs_log_prior and log_prior is not None:
            grad_log_prior = torch.empty_like(log_prior, dtype=problem.compute_dtype)
            block_c = 32
            _grad_log_prior_kernel[(triton.cdiv(n_classes, block_c),)](
                logits, given.vectors, state, grad_loss, normalizer, grad_log_prior,
                logits.stride(), problem.target.stride(), grad_loss.stride(),
                given.sizes,
                *given.scalars,
                **{name: given.constants[name] for name in ("N_LABELS", "HAS_SMOOTHING", "COMPUTE")},
                BLOCK_ROWS=32, BLOCK_C=block_c, **AS_WRITTEN,
            )  # fmt: skip
            grad_log_prior = grad_log_prior.to(log_prior.dtype)
    return grad_logits, grad_log_prior
