"""Forward and backward pass of a loss: launch plans, one for each signature and pass, and the launches."""

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
    MAX_PLANS,
    GradientLayout,
    Signature,
    aligned_vectors,
    gradient_layout,
    signature_of,
    strides_3d,
    view_from_boundary,
)
from fused_la._triton.prior_gradient import PRIOR_TILE, PRIOR_TILE_BY_GROUP, _grad_log_prior_kernel
from fused_la._triton.resident import _resident_kernel
from fused_la._triton.streamed import _streamed_kernel
from fused_la._triton.tiles import float_bits
from fused_la._triton.variants import Variant, variant
from fused_la._triton.workspace import (
    BLOCK_PREPARE,
    MAX_WEIGHT_PARTIALS,
    PREPARE_THREADS,
    TABLE_COPIES,
    _prepare_kernel,
    workspace_layout,
)

_LOSS_OF_NO_ROWS = {"mean": math.nan, "sum": 0.0}


class LaunchPlan(NamedTuple):
    """How one pass over every problem of one `Signature` is launched."""

    prepare_kernel: Variant | None
    prepare_grid: tuple[int, int, int]
    prepare_sizes: tuple[int, ...]
    row_kernel: Variant
    row_grid: tuple[int, int, int]
    strides: tuple[int, ...]
    sizes: tuple[int | None, ...]
    misalignment: int
    n_rows: int
    workspace_size: int
    gradient_layout: GradientLayout | None  # None if the row kernel is compiled without the gradient
    writes_gradient: bool  # False if rows are shared: the kernel has a pointer to other memory, and writes nothing
    prior_kernel: Variant | None
    prior_grid: tuple[int, int, int]


@functools.lru_cache(MAX_PLANS)
def plan_launches(
    signature: Signature, reduction: str, backward: bool, wants_gradient: bool, has_table: bool = True
) -> LaunchPlan:
    """The launch plan of a pass. `has_table`: whether a backward pass has the forward pass's whole workspace."""
    n_outer, n_inner, n_classes = signature.shape_3d
    n_rows, layout, device = n_outer * n_inner, signature.layout(), device_of(signature.device)
    by_group = signature.n_priors > 0
    config = choose_launch_config(
        n_rows, n_classes, signature.dtype, layout, device, signature.class_cost, shares_prior=not by_group
    )
    may_make = backward or may_make_gradient(config, n_classes, signature.dtype, device, reduction)
    may_write_gradient = wants_gradient and may_make
    grad_layout = gradient_layout(signature) if may_write_gradient else None
    n_groups, n_chunks = config.n_groups(n_rows), config.n_chunks(n_classes)
    misalignment = signature.misalignment if config.vec > 1 and signature.misalignment is not None else 0
    problem_constants, types = signature.row_constants(), signature.compile_key(config.vec)

    needs_prepare = not backward and (reduction != "none" or config.splits > 1)
    has_table &= config.resident and config.edges and reduction != "none"
    has_table &= signature.types.log_prior is not None and not by_group
    table_stride = (config.full_c + config.block_c + config.vec + 3) // 4 * 4 if has_table else 0
    workspace = workspace_layout(n_rows, n_groups, n_chunks if config.splits > 1 else 0, table_stride)
    rows_per_partial = cdiv(n_rows, MAX_WEIGHT_PARTIALS.value * BLOCK_PREPARE) * BLOCK_PREPARE
    n_weight_partials = cdiv(n_rows, max(1, rows_per_partial)) if reduction == "mean" else 1
    prepare_kernel = None
    if needs_prepare:
        constants = (signature.n_labels, problem_constants[-1], reduction, BLOCK_PREPARE)
        prepare_types, num_warps = (signature.types, signature.target_is_aligned), PREPARE_THREADS // device.warp_size
        prepare_kernel = variant(_prepare_kernel, signature.device, prepare_types, constants, num_warps)

    kernel = _resident_kernel if config.resident else _streamed_kernel
    row_constants = *problem_constants, reduction, *((has_table,) if config.resident else ()), *config.tile_constants()
    row_types = types, backward, None if grad_layout is None else config.vec > 1 or grad_layout.misalignment == 0
    n_labels, has_smoothing, _, adjacent, target_adjacent, compute = problem_constants
    strides, target_strides = strides_3d(signature.strides), strides_3d(signature.target_strides or (0, 0))
    prior_kernel, prior_tile = None, PRIOR_TILE_BY_GROUP if by_group else PRIOR_TILE
    if backward and signature.types.log_prior is not None:
        constants = n_labels, has_smoothing, adjacent, target_adjacent, compute, reduction, *prior_tile
        prior_types = signature.dtype, signature.types, signature.target_is_aligned, signature.n_inner is None
        prior_kernel = variant(_grad_log_prior_kernel, signature.device, prior_types, constants)
    return LaunchPlan(
        prepare_kernel,
        (n_weight_partials + cdiv(TABLE_COPIES.value * table_stride, BLOCK_PREPARE), 1, 1),
        (n_rows, n_classes, n_groups, n_weight_partials, rows_per_partial, *workspace.kernel_arguments, config.splits),
        variant(kernel, signature.device, row_types, row_constants, config.num_warps),
        (n_groups * config.splits, 1, 1),
        (*strides, *target_strides, *((0, 0, 1) if grad_layout is None else strides_3d(grad_layout.strides))),
        (
            n_rows, signature.n_inner, n_classes, signature.n_priors, n_groups, n_weight_partials, n_chunks,
            config.splits, config.period, misalignment, *workspace.kernel_arguments,
        ),
        misalignment,
        n_rows,
        workspace.size,
        grad_layout,
        grad_layout is not None and (backward or config.splits == 1),
        prior_kernel,
        (cdiv(n_classes, prior_tile[1]), 1, 1),
    )  # fmt: skip


def forward(problem: Problem, reduction: str, wants_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None, Signature]:
    """The loss, the workspace (backward needs its first numbers), the gradient for an upstream gradient of 1 if it is
    wanted and forward computes it, and the problem's signature."""
    logits = problem.logits
    if not is_on_current_device(logits):
        with torch.cuda.device(logits.device):
            return forward(problem, reduction, wants_gradient)
    signature, vectors = signature_of(problem), aligned_vectors(problem)
    plan = plan_launches(signature, reduction, False, wants_gradient)
    dtype, device = problem.compute_dtype, logits.device
    # A separate buffer: the caller may change the loss in place, which must not count as a change of the workspace.
    loss = torch.empty(logits.shape[:-1] if reduction == "none" else (), dtype=dtype, device=device)
    workspace = torch.empty(plan.workspace_size, dtype=dtype, device=device)
    grad_layout = plan.gradient_layout
    gradient = grad_layout.allocate(logits) if grad_layout is not None and plan.writes_gradient else None
    if plan.n_rows == 0:
        return loss if reduction == "none" else loss.fill_(_LOSS_OF_NO_ROWS[reduction]), workspace, gradient, signature
    if plan.prepare_kernel is not None:
        plan.prepare_kernel.launch(plan.prepare_grid, vectors, workspace, *plan.prepare_sizes, problem.ignore_index)
    logits_start = view_from_boundary(logits, plan.misalignment)
    written = logits_start if gradient is None else view_from_boundary(gradient, plan.misalignment)
    plan.row_kernel.launch(
        plan.row_grid, logits_start, vectors, None,
        loss, workspace, None if grad_layout is None else written,
        *plan.strides, 0, 0, *plan.sizes, int(gradient is not None),
        float_bits(problem.tau), float_bits(problem.label_smoothing), problem.ignore_index,
    )  # fmt: skip
    return loss, workspace, gradient, signature


def backward(
    problem: Problem, reduction: str, workspace: Tensor, upstream: Tensor, needs_logits: bool, needs_log_prior: bool,
    gradient: Tensor | None = None, signature: Signature | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of the logits and of log_prior, in their shapes; None for one that is not needed.

    `upstream` is one number, or with reduction "none" has the shape of the rows. `gradient` is the gradient that
    forward computed for an upstream gradient of 1: it is corrected in place. `signature` is that of forward. It differs
    from this call's if the tensors that autograd saved were moved in between.
    """
    logits, log_prior = problem.logits, problem.log_prior
    if not is_on_current_device(logits):
        with torch.cuda.device(logits.device):
            return backward(problem, reduction, workspace, upstream, needs_logits, needs_log_prior, gradient, signature)
    if signature is not None and not signature.matches(problem):
        # The gradient and the workspace of forward are for another memory layout.
        _, workspace, gradient, signature = forward(problem, reduction, False)
    has_forward_workspace = signature is not None
    plan = plan_launches(signature or signature_of(problem), reduction, True, True, has_forward_workspace)
    if upstream.dtype != workspace.dtype:
        upstream = upstream.to(workspace.dtype)
    numbers = float_bits(problem.tau), float_bits(problem.label_smoothing), problem.ignore_index
    upstream_strides = (*upstream.stride(), 0, 0)[:2]  # of one number, of (N,) or of (N, P)
    vectors, grad_logits, grad_log_prior = aligned_vectors(problem), None, None
    if needs_logits:
        assert plan.gradient_layout is not None
        grad_logits = plan.gradient_layout.allocate(logits) if gradient is None else gradient
        if plan.n_rows > 0:
            plan.row_kernel.launch(
                plan.row_grid, view_from_boundary(logits, plan.misalignment), vectors, upstream,
                None, workspace, view_from_boundary(grad_logits, plan.misalignment),
                *plan.strides, *upstream_strides, *plan.sizes, int(gradient is not None), *numbers,
            )  # fmt: skip
    if needs_log_prior and log_prior is not None and plan.prior_kernel is not None:
        if problem.prior_index is None:
            grad_log_prior = torch.empty_like(log_prior, dtype=workspace.dtype)
        else:
            grad_log_prior = torch.zeros_like(log_prior, dtype=torch.float64)
        plan.prior_kernel.launch(
            plan.prior_grid, logits, vectors, workspace, upstream, grad_log_prior,
            *plan.strides[:6], *upstream_strides, *plan.sizes[:4], *numbers,
        )  # fmt: skip
        grad_log_prior = grad_log_prior.to(log_prior.dtype)
    return grad_logits, grad_log_prior
