"""The launches of a loss: its forward and its backward pass, each planned once for what it follows from."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_la._call.problem import Problem
from fused_la._triton.launch_config import (
    cdiv,
    choose_launch_config,
    device_of,
    is_on_current_device,
    may_make_gradient,
)
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
from fused_la._triton.prior_gradient import PRIOR_TILE, _grad_log_prior_kernel
from fused_la._triton.resident import _resident_kernel
from fused_la._triton.streamed import _streamed_kernel
from fused_la._triton.tiles import float_bits
from fused_la._triton.variants import Variant, variant
from fused_la._triton.workspace import (
    BLOCK_PREPARE,
    COPIES,
    PREPARE_THREADS,
    WEIGHT_PARTS,
    _prepare_kernel,
    workspace_of,
)

_OF_NO_ROWS = {"mean": math.nan, "sum": 0.0}


class Plan(NamedTuple):
    """How one pass over every problem of one `Signature` is launched."""

    prepare: Variant | None
    prepare_grid: tuple[int, int, int]
    prepare_sizes: tuple[int, ...]
    rows: Variant
    grid: tuple[int, int, int]
    strides: tuple[int, ...]
    sizes: tuple[int | None, ...]
    shift: int
    n_rows: int
    workspace_size: int
    gradient: Buffer | None  # where a pass may make it
    makes_gradient: bool  # this one does; one of shared rows is handed other memory, where it writes nothing
    prior: Variant | None


@functools.lru_cache(PLANS)
def plan(signature: Signature, reduction: str, backward: bool, wants_gradient: bool, has_table: bool = True) -> Plan:
    """`has_table`: of a backward pass, whether its workspace is the whole of the forward pass's."""
    n_outer, n_inner, n_classes = signature.rows
    n_rows, layout, device = n_outer * n_inner, signature.layout(), device_of(signature.device)
    launch = choose_launch_config(n_rows, n_classes, signature.dtype, layout, device, signature.class_cost)
    may_write = wants_gradient and (
        backward or may_make_gradient(launch, n_classes, signature.dtype, device, reduction)
    )
    buffer = gradient_buffer(signature) if may_write else None
    n_groups, n_chunks = launch.n_groups(n_rows), launch.n_chunks(n_classes)
    shift = signature.shift if launch.vec > 1 and signature.shift is not None else 0
    row_constants, types = signature.row_constants(), signature.compiled_for(launch.vec)

    is_prepared = not backward and (reduction != "none" or launch.splits > 1)
    has_table &= launch.resident and launch.edges and reduction != "none" and signature.types[0] is not None
    table_step = (launch.full_c + launch.block_c + launch.vec + 3) // 4 * 4 if has_table else 0
    work = workspace_of(n_rows, n_groups, n_chunks if launch.splits > 1 else 0, table_step)
    rows_a_part = cdiv(n_rows, WEIGHT_PARTS.value * BLOCK_PREPARE) * BLOCK_PREPARE
    n_parts = cdiv(n_rows, max(1, rows_a_part)) if reduction == "mean" else 1
    prepare = None
    if is_prepared:
        constants = (signature.n_labels, row_constants[-1], reduction, BLOCK_PREPARE)
        of_prepare, num_warps = (signature.types, signature.target_is_aligned), PREPARE_THREADS // device.warp_size
        prepare = variant(_prepare_kernel, signature.device, of_prepare, constants, num_warps)

    kernel = _resident_kernel if launch.resident else _streamed_kernel
    of_rows = *row_constants, reduction, *((has_table,) if launch.resident else ()), *launch.tile_constants()
    of_types = types, backward, None if buffer is None else launch.vec > 1 or buffer.shift == 0
    n_labels, has_smoothing, _, adjacent, target_adjacent, compute = row_constants
    strides, target_strides = steps(signature.strides), steps(signature.target_strides or (0, 0))
    prior = None
    if backward and signature.types[0] is not None:
        constants = n_labels, has_smoothing, adjacent, target_adjacent, compute, reduction, PRIOR_TILE, PRIOR_TILE
        of_prior = signature.dtype, signature.types, signature.target_is_aligned, signature.n_inner is None
        prior = variant(_grad_log_prior_kernel, signature.device, of_prior, constants)
    return Plan(
        prepare,
        (n_parts + cdiv(COPIES.value * table_step, BLOCK_PREPARE), 1, 1),
        (n_rows, n_classes, n_groups, n_parts, rows_a_part, *work.numbers, launch.splits),
        variant(kernel, signature.device, of_types, of_rows, launch.num_warps),
        (n_groups * launch.splits, 1, 1),
        (*strides, *target_strides, *((0, 0, 1) if buffer is None else steps(buffer.strides))),
        (
            n_rows, signature.n_inner, n_classes, n_groups, n_parts, n_chunks, launch.splits, launch.period, shift,
            *work.numbers,
        ),
        shift,
        n_rows,
        work.size,
        buffer,
        buffer is not None and (backward or launch.splits == 1),
        prior,
    )  # fmt: skip


def forward(problem: Problem, reduction: str, wants_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None, Signature]:
    """The loss, the workspace, of which backward needs the first numbers, the gradient for an upstream of 1, where it
    is wanted and this pass is the one to make it, and the problem's signature."""
    logits = problem.logits
    if not is_on_current_device(logits):
        with torch.cuda.device(logits.device):
            return forward(problem, reduction, wants_gradient)
    signature, vectors = signature_of(problem), vectors_of(problem)
    to_do = plan(signature, reduction, False, wants_gradient)
    dtype, device = problem.compute_dtype, logits.device
    # Apart, for the loss is the caller's: an in-place change of it must not look like one of what backward needs.
    loss = torch.empty(logits.shape[:-1] if reduction == "none" else (), dtype=dtype, device=device)
    workspace = torch.empty(to_do.workspace_size, dtype=dtype, device=device)
    gradient = to_do.gradient.make(logits) if to_do.gradient is not None and to_do.makes_gradient else None
    if to_do.n_rows == 0:
        return loss if reduction == "none" else loss.fill_(_OF_NO_ROWS[reduction]), workspace, gradient, signature
    if to_do.prepare is not None:
        to_do.prepare.launch(to_do.prepare_grid, vectors, workspace, *to_do.prepare_sizes, problem.ignore_index)
    logits_start = begin_earlier(logits, to_do.shift)
    written = logits_start if gradient is None else begin_earlier(gradient, to_do.shift)
    to_do.rows.launch(
        to_do.grid, logits_start, vectors, None,
        loss, workspace, None if to_do.gradient is None else written,
        *to_do.strides, 0, 0, *to_do.sizes, int(gradient is not None),
        float_bits(problem.tau), float_bits(problem.label_smoothing), problem.ignore_index,
    )  # fmt: skip
    return loss, workspace, gradient, signature


def backward(
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
            return backward(
                problem, reduction, workspace, upstream, needs_logits, needs_log_prior, made_for_one, signature
            )
    if signature is not None and not signature.lies_as(problem):
        # What the forward pass has made, and the state that it has left, are for another layout.
        _, workspace, made_for_one, signature = forward(problem, reduction, False)
    is_whole = signature is not None
    to_do = plan(signature or signature_of(problem), reduction, True, True, is_whole)
    if upstream.dtype != workspace.dtype:
        upstream = upstream.to(workspace.dtype)
    numbers = float_bits(problem.tau), float_bits(problem.label_smoothing), problem.ignore_index
    upstream_strides = (*upstream.stride(), 0, 0)[:2]  # of one number, of (N,) or of (N, P)
    vectors, grad_logits, grad_log_prior = vectors_of(problem), None, None
    if needs_logits:
        assert to_do.gradient is not None
        grad_logits = to_do.gradient.make(logits) if made_for_one is None else made_for_one
        if to_do.n_rows > 0:
            to_do.rows.launch(
                to_do.grid, begin_earlier(logits, to_do.shift), vectors, upstream,
                None, workspace, begin_earlier(grad_logits, to_do.shift),
                *to_do.strides, *upstream_strides, *to_do.sizes, int(made_for_one is not None), *numbers,
            )  # fmt: skip
    if needs_log_prior and log_prior is not None and to_do.prior is not None:
        grad_log_prior = torch.empty_like(log_prior, dtype=workspace.dtype)
        to_do.prior.launch(
            (cdiv(log_prior.numel(), PRIOR_TILE), 1, 1), logits, vectors, workspace, upstream, grad_log_prior,
            *to_do.strides[:6], *upstream_strides, *to_do.sizes[:3], *numbers,
        )  # fmt: skip
        grad_log_prior = grad_log_prior.to(log_prior.dtype)
    return grad_logits, grad_log_prior
