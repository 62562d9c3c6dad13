"""Losses of logits as an autograd Function.

The implementation computes first derivatives. Second derivatives come from `reference.gradient`, the same gradient as
differentiable PyTorch. Under torch.compile, other tracers and fake tensors the two passes are the opaque operators of
`operators.py`, so a graph holds the same kernels.

Transforms of torch.func are in `transforms.py`, and forward mode runs the reference formula: PyTorch's own rules for an
autograd.Function silently drop the outer of two nested tangents, and hide from an inner transform what an outer one
differentiates.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor  # what torch.autograd.grad(is_grads_batched=True) passes

from fused_la import reference
from fused_la._autograd import operators
from fused_la._autograd.implementations import implementation
from fused_la._call.problem import Problem, resolve_labels, sum_by_group
from fused_la._call.values import is_compiled_or_traced

_N_TENSORS = Problem._fields.index("tau")  # the numbers come last


def fused_loss(problem: Problem, reduction: str, impl: str) -> Tensor:
    """The reduced loss, or that of the rows, by the implementation named `impl`."""
    if is_compiled_or_traced(problem.logits):
        return operators.loss_op(problem, reduction, impl)
    if not torch.is_grad_enabled():
        return implementation(impl).forward(problem, reduction, False)[0]
    return _Loss.apply(problem.logits, problem.log_prior, (problem, reduction, implementation(impl)))


def under_transform() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) is under way."""
    return torch._C._are_functorch_transforms_active()


class _Loss(torch.autograd.Function):
    """The loss as a function of logits and log_prior, the only tensors of a problem that get a gradient here."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_prior: Tensor | None, call: tuple[Problem, str, ModuleType]) -> Tensor:
        problem, reduction, kernels = call
        needs_logits, needs_log_prior, _ = ctx.needs_input_grad
        loss, state, ctx.gradient, memo = kernels.forward(problem, reduction, needs_logits and not needs_log_prior)
        ctx.save_for_backward(*problem[:_N_TENSORS])
        ctx.others = problem[_N_TENSORS:], reduction, kernels, state, memo  # no output among them: they need no saving
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        upstream = grad_outputs[0]
        numbers, reduction, kernels, state, memo = ctx.others
        # Drop the reference: the caller may write to the gradient, and a second backward computes it again.
        unit_gradient, ctx.gradient = ctx.gradient, None
        by_formula = (
            torch.compiler.is_compiling()  # compiled autograd
            or torch.is_grad_enabled()
            or under_transform()
            or is_legacy_batchedtensor(upstream)
        )
        try:
            problem = Problem(*ctx.saved_tensors, *numbers)
        except RuntimeError as error:  # the logits were written to since, for example by `clamp_`
            if unit_gradient is None or by_formula or "modified by an inplace operation" not in str(error):
                raise
            return unit_gradient.mul_(upstream), None, None
        if by_formula:
            return *differentiable_gradient(problem, upstream, reduction), None
        needs_logits, needs_log_prior, _ = ctx.needs_input_grad
        grad_logits, grad_log_prior = kernels.backward(
            problem, reduction, state, upstream.resolve_neg(), needs_logits, needs_log_prior, unit_gradient, memo
        )
        return grad_logits, grad_log_prior, None


def differentiable_gradient(problem: Problem, upstream: Tensor, reduction: str) -> tuple[Tensor, Tensor | None]:
    """The gradients of logits and log_prior as operations that autograd and torch.func differentiate in turn."""
    shape, problem = problem.logits.shape, problem.as_3d()
    n_outer, n_inner, _ = problem.logits.shape
    grad_rows = upstream.reshape(n_outer, n_inner) if reduction == "none" else upstream.expand(n_outer, n_inner)
    if reduction == "mean":
        row_weight = torch.ones_like(grad_rows) if problem.has_probabilities else resolve_labels(problem).row_weight
        grad_rows = grad_rows / row_weight.sum()
    if problem.target_offset is not None or problem.label_scale is not None:

        def losses(*values: Tensor) -> Tensor:
            return reference.loss_rows(problem._replace(**dict(zip(("logits", "log_prior"), values, strict=False))))[0]

        values = [t for t in (problem.logits, problem.log_prior) if t is not None]
        grad_logits, *grad_prior = torch.func.vjp(losses, *values)[1](grad_rows)
        return grad_logits.reshape(shape), grad_prior[0] if grad_prior and problem.target_offset is None else None
    grad_z = reference.gradient(problem, grad_rows)
    grad_logits = (grad_z if problem.scale is None else grad_z * problem.scale).to(problem.logits.dtype).reshape(shape)
    if problem.log_prior is None:
        return grad_logits, None
    if problem.prior_index is None:
        grad_offset = grad_z.sum((0, 1))
    else:
        grad_offset = sum_by_group(grad_z, problem.groups()[0], problem.n_groups)
    return grad_logits, (grad_offset * problem.tau).to(problem.log_prior.dtype)
