"""Backward: the gradient of the logits (gradient.py), and of log_prior where it is learned.

    grad_log_prior_c = tau * sum over the rows of grad_logits_c

A gradient that the forward pass made for an upstream gradient of 1 is right if 1 is what came: the kernel reads the
upstream on the device and returns; otherwise it writes the gradient anew.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_la._problem import Problem
from fused_la._triton.gradient import full_form, read_shares, write_gradient
from fused_la._triton.launch import cdiv, choose_backward_launch, device_of, is_on_current_device
from fused_la._triton.operands import (
    PLANS,
    Buffer,
    Signature,
    begin_earlier,
    gradient_buffer,
    signature_of,
    steps,
    vectors_of,
)
from fused_la._triton.targets import dense_mass, load_label, read_label
from fused_la._triton.tiles import (
    NUMBERS,
    cut_row,
    float_bits,
    group_rows,
    load_z,
    row_offsets,
    scalar,
)
from fused_la._triton.variants import Variant, variant

PRIOR_TILE = 32  # rows and classes of a tile of what is summed for log_prior


@triton.jit
def _load_rows(workspace, upstream, rows, mask_rows, n_rows, n_inner, upstream_strides, MEAN: tl.constexpr):
    """(m, rest, A, g) of each row."""
    m = tl.load(workspace + rows, mask_rows, other=0.0)
    rest = tl.load(workspace + n_rows + rows, mask_rows, other=0.0)
    total = tl.load(workspace + 2 * n_rows + rows, mask_rows, other=0.0)
    g = tl.load(upstream + row_offsets(rows, n_inner, upstream_strides), mask_rows, other=0.0)
    if MEAN:
        g = g / tl.load(workspace + 3 * n_rows)
    return m, rest, total, g


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=["upstream"])
def _grad_logits_kernel(
    # in
    logits, vectors, workspace, upstream,
    # out
    grad_logits,
    # strides
    logits_outer: tl.int64, logits_inner: tl.int64, logits_class: tl.int64,
    target_outer: tl.int64, target_inner: tl.int64, target_class: tl.int64,
    grad_outer: tl.int64, grad_inner: tl.int64, grad_class: tl.int64,
    upstream_outer: tl.int64, upstream_inner: tl.int64,
    # sizes
    n_rows: tl.int64, n_inner, n_classes: tl.int32, period: tl.int32, splits: tl.int32, shift: tl.int32,
    # scalars
    made_for_one: tl.int32,  # 1: grad_logits is right already if the upstream gradient is 1
    tau_bits: tl.int64, smoothing_bits: tl.int64, ignore_index: tl.int64,
    # constants
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, TARGET_ALIKE: tl.constexpr, ADJACENT: tl.constexpr,
    TARGET_ADJACENT: tl.constexpr, COMPUTE: tl.constexpr, REDUCTION: tl.constexpr,
    VEC: tl.constexpr, EDGES: tl.constexpr, ONE_TILE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if made_for_one != 0:
        if tl.load(upstream) == 1.0:
            return
    if ADJACENT:
        logits_class = 1
        grad_class = 1
    if TARGET_ADJACENT:
        target_class = 1
    strides_logits = (logits_outer, logits_inner)
    group, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    first_row, to_read, rows, mask_rows = group_rows(group, period, n_rows, BLOCK_ROWS)
    head, body = cut_row(shift + row_offsets(first_row, n_inner, strides_logits), n_classes, VEC, EDGES)
    n_tiles = (body - 1) // BLOCK_C + 1
    tiles_a_split = tl.cdiv((n_classes - 1) // BLOCK_C + 1, splits)
    m, rest, total, g = _load_rows(
        workspace, upstream, rows, mask_rows, n_rows, n_inner, (upstream_outer, upstream_inner), REDUCTION == "mean"
    )  # fmt: skip
    starts, lone_label = shift + row_offsets(to_read, n_inner, strides_logits), None
    if N_LABELS == 1:
        lone_label = read_label(
            logits, vectors, starts, rows, 0, mask_rows, logits_class, n_classes, scalar(tau_bits), ignore_index,
            1, COMPUTE,
        )  # fmt: skip
        _, _, share, live, _, _, _ = lone_label
    else:
        share, live = read_shares(vectors, rows, mask_rows, n_classes, ignore_index, N_LABELS, COMPUTE)
    write_gradient(
        logits, vectors, grad_logits, logits_class, target_class, grad_class,
        rows, mask_rows, live, share, starts,
        row_offsets(to_read, n_inner, (target_outer, target_inner)),
        shift + row_offsets(to_read, n_inner, (grad_outer, grad_inner)),
        head, body, split * tiles_a_split, tl.minimum((split + 1) * tiles_a_split, n_tiles), n_classes,
        m, rest, total, g, lone_label, scalar(tau_bits), scalar(smoothing_bits), ignore_index,
        N_LABELS, HAS_SMOOTHING, TARGET_ALIKE, COMPUTE, VEC, EDGES, ONE_TILE, BLOCK_C,
    )  # fmt: skip


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
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_cols = cols < n_classes
    tau, smoothing = scalar(tau_bits), scalar(smoothing_bits)
    grad_sum = tl.zeros((BLOCK_ROWS, BLOCK_C), COMPUTE)
    for start in range(0, n_rows, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask_rows = rows < n_rows
        starts = row_offsets(rows, n_inner, (logits_outer, logits_inner))
        z = load_z(logits, vectors, starts, 0, cols, mask_rows, mask_cols, logits_class, tau, COMPUTE)
        mass = dense_mass(
            vectors, row_offsets(rows, n_inner, (target_outer, target_inner)), 0, cols, mask_rows, mask_cols,
            target_class, n_classes, smoothing, N_LABELS, HAS_SMOOTHING, COMPUTE,
        )  # fmt: skip
        share, live = read_shares(vectors, rows, mask_rows, n_classes, ignore_index, N_LABELS, COMPUTE)
        mass = mass * share[:, None]
        for k in range(N_LABELS):
            label, label_mass, _, _, counts = load_label(
                vectors, rows * N_LABELS + k, mask_rows, n_classes, ignore_index, COMPUTE
            )
            if HAS_SMOOTHING:
                label_mass = label_mass * (1.0 - smoothing).to(COMPUTE)
            here = (cols[None, :] == label[:, None]) & counts[:, None]
            mass += tl.where(here, label_mass[:, None], 0.0)
        m, rest, total, g = _load_rows(
            workspace, upstream, rows, mask_rows, n_rows, n_inner, (upstream_outer, upstream_inner), REDUCTION == "mean"
        )  # fmt: skip
        grad = full_form(z, m[:, None], rest[:, None], total[:, None], g[:, None], mass, COMPUTE)
        prior = tl.load(vectors.log_prior + cols, mask_cols, other=0.0)
        grad = tl.where(prior[None, :] == float("-inf"), (rest - rest)[:, None], grad)
        grad_sum += tl.where(live[:, None], grad, 0.0)
    tl.store(grad_log_prior + cols, tl.sum(grad_sum, 0) * tau.to(COMPUTE), mask_cols)


# Launches -------------------------------------------------------------------------------------------------------------


class BackwardPlan(NamedTuple):
    """How the backward pass of every problem of one `Signature` is launched."""

    grad_logits: Variant
    grid: tuple[int, int, int]
    strides: tuple[int, ...]
    sizes: tuple[int | None, ...]
    shift: int
    n_rows: int
    gradient: Buffer
    grad_log_prior: Variant
    prior_grid: tuple[int, int, int]
    prior_strides: tuple[int, ...]
    prior_sizes: tuple[int | None, ...]


@functools.lru_cache(PLANS)
def plan_backward(signature: Signature, reduction: str) -> BackwardPlan:
    n_outer, n_inner, n_classes = signature.rows
    n_rows, device = n_outer * n_inner, device_of(signature.device)
    launch = choose_backward_launch(n_rows, n_classes, signature.dtype, signature.layout(), device)
    shift = signature.shift if launch.vec > 1 and signature.shift is not None else 0
    buffer, row_constants, types = (
        gradient_buffer(signature), signature.row_constants(), signature.compiled_for(launch.vec),
    )  # fmt: skip
    n_labels, has_smoothing, _, adjacent, target_adjacent, compute = row_constants
    logits_strides, target_strides = steps(signature.strides), steps(signature.target_strides or (0, 0))
    return BackwardPlan(
        variant(
            _grad_logits_kernel, signature.device, (types, launch.vec > 1 or buffer.shift == 0),
            (*row_constants, reduction, *launch.tile_constants(n_classes)), launch.num_warps,
        ),
        (launch.n_groups(n_rows) * launch.splits, 1, 1),
        (*logits_strides, *target_strides, *steps(buffer.strides)),
        (n_rows, signature.n_inner, n_classes, launch.period, launch.splits, shift),
        shift,
        n_rows,
        buffer,
        variant(
            _grad_log_prior_kernel, signature.device,
            (signature.dtype, signature.types, signature.target_is_aligned, signature.n_inner is None),
            (n_labels, has_smoothing, adjacent, target_adjacent, compute, reduction, PRIOR_TILE, PRIOR_TILE),
        ),
        (cdiv(n_classes, PRIOR_TILE), 1, 1),
        (*logits_strides, *target_strides),
        (n_rows, signature.n_inner, n_classes),
    )  # fmt: skip


def launch_backward(
    problem: Problem,
    reduction: str,
    workspace: Tensor,
    upstream: Tensor,
    needs_logits: bool,
    needs_log_prior: bool,
    made_for_one: Tensor | None = None,
    signature: Signature | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of logits, in their shape, and log_prior (C,), None where not needed.

    `upstream` is one number, or with reduction "none" of the shape of the rows. `made_for_one` is what the forward pass
    made of the logits' gradient: it is put right where it stands. `signature` is the forward pass's, which is not this
    one's where what autograd saved was elsewhere in between.
    """
    logits, log_prior = problem.logits, problem.log_prior
    if not is_on_current_device(logits):
        with torch.cuda.device(logits.device):
            return launch_backward(
                problem, reduction, workspace, upstream, needs_logits, needs_log_prior, made_for_one, signature
            )
    if signature is None or not signature.lies_as(problem):
        signature, made_for_one = signature_of(problem), None  # which lies as the logits did
    plan = plan_backward(signature, reduction)
    if upstream.dtype != workspace.dtype:
        upstream = upstream.to(workspace.dtype)
    numbers = float_bits(problem.tau), float_bits(problem.label_smoothing), problem.ignore_index
    upstream_strides = (*upstream.stride(), 0, 0)[:2]  # of one number, of (N,) or of (N, P)
    vectors, grad_logits, grad_log_prior = vectors_of(problem), None, None
    if needs_logits:
        grad_logits = plan.gradient.make(logits) if made_for_one is None else made_for_one
        if plan.n_rows > 0:
            plan.grad_logits.launch(
                plan.grid, begin_earlier(logits, plan.shift), vectors, workspace, upstream,
                begin_earlier(grad_logits, plan.shift),
                *plan.strides, *upstream_strides, *plan.sizes, int(made_for_one is not None), *numbers,
            )  # fmt: skip
    if needs_log_prior and log_prior is not None:
        grad_log_prior = torch.empty_like(log_prior, dtype=workspace.dtype)
        plan.grad_log_prior.launch(
            plan.prior_grid, logits, vectors, workspace, upstream, grad_log_prior,
            *plan.prior_strides, *upstream_strides, *plan.prior_sizes, *numbers,
        )  # fmt: skip
        grad_log_prior = grad_log_prior.to(log_prior.dtype)
    return grad_logits, grad_log_prior
