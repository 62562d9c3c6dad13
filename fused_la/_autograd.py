"""Where the implementations that compute their own gradient meet autograd and torch.compile.

An implementation is a module (`_blocked`, `_triton`) with the functions `forward`, `backward` and `forward_gradient`;
this file is the only one that calls them. First derivatives are theirs. Second derivatives come from
`reference.gradient`, the same gradient as differentiable PyTorch. Under torch.compile the two passes are opaque
operators, so a compiled graph holds the same kernels.

The transforms of torch.func and forward mode never come here, the door hands them to the reference formula: the rules
that PyTorch takes for an autograd.Function lose the outer of two nested tangents without a word, and hide from an inner
transform what an outer one differentiates.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor  # what torch.autograd.grad(is_grads_batched=True) passes

from fused_la import reference
from fused_la._problem import Problem

_N_FIELDS = len(Problem._fields)


def fused_loss(problem: Problem, reduction: str, impl: str) -> Tensor:
    """The reduced loss, or (N, P) rows, by the implementation named `impl`."""
    if torch.compiler.is_compiling():
        # An operator's float is a constant of the graph: multiplied outside, tau may change without a recompilation.
        return _forward_op(*problem._replace(log_prior=problem.offset(), tau=1.0), reduction, impl)[0]
    needs_gradient = torch.is_grad_enabled() and problem.logits.requires_grad
    learns_prior = problem.log_prior is not None and problem.log_prior.requires_grad
    with_gradient = needs_gradient and not learns_prior and implementation(impl).forward_gradient(problem, reduction)
    return _Loss.apply(impl, reduction, with_gradient, *problem)


def under_transform() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) is under way."""
    return torch._C._are_functorch_transforms_active()


def implementation(impl: str) -> ModuleType:
    return importlib.import_module(f"fused_la._{impl}")


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, impl: str, reduction: str, with_gradient: bool, *fields: Any) -> Tensor:
        problem = in_memory(Problem(*fields))
        loss, state, normalizer, gradient = implementation(impl).forward(problem, reduction, with_gradient)
        _save(ctx, fields, state, normalizer, impl, reduction)
        ctx.gradient = gradient if with_gradient else None
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        grads: list[Tensor | None] = [None] * (3 + _N_FIELDS)
        grad_loss = grad_outputs[0]
        differentiable = torch.is_grad_enabled() or under_transform() or is_legacy_batchedtensor(grad_loss)
        problem, state, normalizer = _saved(ctx)
        grad_rows = grad_loss if ctx.reduction == "none" else grad_loss.expand(state.shape[1:])
        if differentiable:
            grads[3], grads[4] = differentiable_gradient(problem, grad_rows, normalizer)
        else:
            # Handed over, not kept: a caller may write into it, and a second backward recomputes.
            made_for_one, ctx.gradient = ctx.gradient, None
            needs = ctx.needs_input_grad[3:5]
            run = implementation(ctx.impl).backward
            grads[3], grads[4] = run(
                in_memory(problem), state, grad_rows.resolve_neg(), normalizer, *needs, made_for_one
            )
        return tuple(grads)


def in_memory(problem: Problem) -> Problem:
    """The problem with every tensor as its memory has it: a lazy negation (`x.conj().imag`) carried out."""
    return Problem._make(field.resolve_neg() if isinstance(field, Tensor) else field for field in problem)


def _save(ctx: Any, fields: tuple, state: Tensor, normalizer: Tensor, impl: str, reduction: str) -> None:
    tensors = [field if isinstance(field, Tensor) else None for field in fields]
    ctx.scalars = [None if isinstance(field, Tensor) else field for field in fields]
    ctx.save_for_backward(*tensors, state, normalizer)
    ctx.impl, ctx.reduction = impl, reduction


def _saved(ctx: Any) -> tuple[Problem, Tensor, Tensor | None]:
    """What `_save` kept; the denominator of the mean only where it divides."""
    *tensors, state, normalizer = ctx.saved_tensors
    fields = [tensor if tensor is not None else value for tensor, value in zip(tensors, ctx.scalars, strict=True)]
    return Problem(*fields), state, normalizer if ctx.reduction == "mean" else None


def differentiable_gradient(
    problem: Problem, grad_rows: Tensor, normalizer: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    grad_rows = grad_rows if normalizer is None else grad_rows / normalizer
    grad_z = reference.gradient(problem, grad_rows)
    grad_logits = grad_z.to(problem.logits.dtype)
    if problem.log_prior is None:
        return grad_logits, None
    return grad_logits, (grad_z.sum((0, 1)) * problem.tau).to(problem.log_prior.dtype)


# torch.compile --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fused_la::loss_forward", mutates_args=())
def _forward_op(
    logits: Tensor,
    log_prior: Tensor | None,
    target: Tensor,
    target_weight: Tensor | None,
    weight: Tensor | None,
    smoothing_distribution: Tensor | None,
    tau: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(
        logits,
        log_prior,
        target,
        target_weight,
        weight,
        smoothing_distribution,
        tau,
        label_smoothing,
        ignore_index,
    )
    return implementation(impl).forward(in_memory(problem), reduction, False)[:3]


@_forward_op.register_fake
def _(logits, log_prior, target, target_weight, weight, smoothing_distribution, tau, label_smoothing, ignore_index,
      reduction, impl):  # fmt: skip
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[:2]
    loss = logits.new_empty(rows if reduction == "none" else (), dtype=dtype)
    normalizer = logits.new_empty(0 if reduction == "none" else (), dtype=dtype)
    return loss, logits.new_empty((3, *rows), dtype=dtype), normalizer


@torch.library.custom_op("fused_la::loss_backward", mutates_args=())
def _backward_op(
    logits: Tensor,
    log_prior: Tensor | None,
    target: Tensor,
    target_weight: Tensor | None,
    weight: Tensor | None,
    smoothing_distribution: Tensor | None,
    tau: float,
    label_smoothing: float,
    ignore_index: int,
    impl: str,
    state: Tensor,
    grad_loss: Tensor,
    normalizer: Tensor | None,
    needs_log_prior: bool,
) -> tuple[Tensor, Tensor]:
    problem = Problem(
        logits,
        log_prior,
        target,
        target_weight,
        weight,
        smoothing_distribution,
        tau,
        label_smoothing,
        ignore_index,
    )
    run = implementation(impl).backward
    grad_loss = grad_loss.resolve_neg()
    grad_logits, grad_prior = run(in_memory(problem), state, grad_loss, normalizer, True, needs_log_prior)
    return grad_logits, logits.new_empty(0) if grad_prior is None else grad_prior


@_backward_op.register_fake
def _(logits, log_prior, target, target_weight, weight, smoothing_distribution, tau, label_smoothing, ignore_index,
      impl, state, grad_loss, normalizer, needs_log_prior):  # fmt: skip
    return torch.empty_like(logits), torch.empty_like(log_prior) if needs_log_prior else logits.new_empty(0)


def _setup_op_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *fields, reduction, impl = inputs
    ctx.set_materialize_grads(False)
    _save(ctx, tuple(fields), output[1], output[2], impl, reduction)


def _op_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple:
    grads: list[Tensor | None] = [None] * (_N_FIELDS + 2)
    if grad_loss is None:
        return tuple(grads)
    problem, state, normalizer = _saved(ctx)
    grad_rows = grad_loss if ctx.reduction == "none" else grad_loss.expand(state.shape[1:])
    needs_log_prior = ctx.needs_input_grad[1]
    grads[0], grad_prior = _backward_op(*problem, ctx.impl, state, grad_rows, normalizer, needs_log_prior)
    grads[1] = grad_prior if needs_log_prior else None
    return tuple(grads)


_forward_op.register_autograd(_op_backward, setup_context=_setup_op_context)
