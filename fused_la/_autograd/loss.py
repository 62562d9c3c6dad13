"""Losses of logits as autograd Functions, and as operators under torch.compile.

An implementation is a package (`_cpu`, `_triton`) with two functions, which this file and `transforms.py` call:

    forward(problem, reduction, wants_gradient) -> loss, state, gradient, memo
    backward(problem, reduction, state, upstream, needs_logits, needs_log_prior, gradient, memo)
        -> grad_logits, grad_log_prior

The state begins with m, rest and A of every row and the mean's denominator, (3 * N * P + 1,) or more. The gradient is
for an upstream gradient of 1; it is None if the forward pass does not make it. The memo is no tensor. Backward can do
without the memo and without the gradient. The implementation computes first derivatives. Second derivatives come from
`reference.gradient`, the same gradient as differentiable PyTorch. Under torch.compile, other tracers and fake tensors
the two passes are opaque operators, so a graph holds the same kernels.

Transforms of torch.func are in `transforms.py`, and forward mode runs the reference formula: PyTorch's own rules for an
autograd.Function lose the outer of two nested tangents without a word, and hide from an inner transform what an outer
one differentiates.
"""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor  # what torch.autograd.grad(is_grads_batched=True) passes

from fused_la import reference
from fused_la._autograd.fields import save_fields, saved_fields, schema_of
from fused_la._call.problem import Problem, resolve_labels
from fused_la._call.values import is_compiled_or_traced

_N_FIELDS = len(Problem._fields)
_N_TENSORS = Problem._fields.index("tau")  # the numbers come last
_PACKAGES = {"blocked": "fused_la._cpu", "triton": "fused_la._triton"}


def fused_loss(problem: Problem, reduction: str, impl: str) -> Tensor:
    """The reduced loss, or that of the rows, by the implementation named `impl`."""
    if is_compiled_or_traced(problem.logits):
        # An operator's float is a constant of the graph: multiplied outside, tau may change without a recompilation.
        return _forward_op(*problem._replace(log_prior=problem.offset(), tau=1.0), reduction, impl)[0]
    if not torch.is_grad_enabled():
        return implementation(impl).forward(problem, reduction, False)[0]
    return _Loss.apply(problem.logits, problem.log_prior, (problem, reduction, implementation(impl)))


def under_transform() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, ...) is under way."""
    return torch._C._are_functorch_transforms_active()


@functools.cache
def implementation(impl: str) -> ModuleType:
    """The package of an implementation, imported when first used: Triton may not be installed."""
    return importlib.import_module(_PACKAGES[impl])


class _Loss(torch.autograd.Function):
    """The loss as a function of logits and log_prior, the only tensors of a problem that get a gradient here."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_prior: Tensor | None, call: tuple[Problem, str, ModuleType]) -> Tensor:
        problem, reduction, run = call
        needs_logits, needs_log_prior, _ = ctx.needs_input_grad
        loss, state, ctx.gradient, memo = run.forward(problem, reduction, needs_logits and not needs_log_prior)
        ctx.save_for_backward(*problem[:_N_TENSORS])
        # The state is no output, so it need not be saved as a tensor.
        ctx.others = problem[_N_TENSORS:], reduction, run, state, memo
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        upstream = grad_outputs[0]
        numbers, reduction, run, state, memo = ctx.others
        # Given away, not kept: the caller may write to it, and a second backward computes it again.
        made_for_one, ctx.gradient = ctx.gradient, None
        by_formula = (
            torch.compiler.is_compiling()  # compiled autograd
            or torch.is_grad_enabled()
            or under_transform()
            or is_legacy_batchedtensor(upstream)
        )
        try:
            problem = Problem(*ctx.saved_tensors, *numbers)
        except RuntimeError as error:  # the logits were written to since, for example by `clamp_`
            if made_for_one is None or by_formula or "modified by an inplace operation" not in str(error):
                raise
            return made_for_one.mul_(upstream), None, None
        if by_formula:
            return *differentiable_gradient(problem, upstream, reduction), None
        needs_logits, needs_log_prior, _ = ctx.needs_input_grad
        grad_logits, grad_log_prior = run.backward(
            problem, reduction, state, upstream.resolve_neg(), needs_logits, needs_log_prior, made_for_one, memo
        )
        return grad_logits, grad_log_prior, None


def in_memory(problem: Problem) -> Problem:
    """The problem with every lazy negation (as of `x.conj().imag`) carried out in memory."""
    return Problem._make(field.resolve_neg() if isinstance(field, Tensor) else field for field in problem)


def differentiable_gradient(problem: Problem, upstream: Tensor, reduction: str) -> tuple[Tensor, Tensor | None]:
    """The gradients of logits and log_prior as operations that autograd and torch.func differentiate in turn."""
    shape, problem = problem.logits.shape, problem.with_inner()
    n_outer, n_inner, _ = problem.logits.shape
    grad_rows = upstream.reshape(n_outer, n_inner) if reduction == "none" else upstream.expand(n_outer, n_inner)
    if reduction == "mean":
        row_weight = torch.ones_like(grad_rows) if problem.has_probabilities else resolve_labels(problem).row_weight
        grad_rows = grad_rows / row_weight.sum()
    if problem.target_offset is not None:

        def losses(logits: Tensor) -> Tensor:
            return reference.loss_rows(problem._replace(logits=logits))[0]

        (grad_logits,) = torch.func.vjp(losses, problem.logits)[1](grad_rows)
        return grad_logits.reshape(shape), None
    grad_z = reference.gradient(problem, grad_rows)
    grad_logits = (grad_z if problem.scale is None else grad_z * problem.scale).to(problem.logits.dtype).reshape(shape)
    if problem.log_prior is None:
        return grad_logits, None
    return grad_logits, (grad_z.sum((0, 1)) * problem.tau).to(problem.log_prior.dtype)


# torch.compile --------------------------------------------------------------------------------------------------------


def _state_size(logits: Tensor, reduction: str) -> int:
    return 3 * math.prod(logits.shape[:-1]) + int(reduction == "mean")


_FIELDS = ", ".join(schema_of(Problem))


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, reduction, impl = arguments
    problem = in_memory(Problem(*fields))
    loss, state, *_ = implementation(impl).forward(problem, reduction, False)
    return loss, state[: _state_size(problem.logits, reduction)]


def _backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, reduction, impl, state, upstream, needs_log_prior = arguments
    problem = in_memory(Problem(*fields))
    grad_logits, grad_prior = implementation(impl).backward(
        problem, reduction, state, upstream.resolve_neg(), True, needs_log_prior
    )
    return grad_logits, grad_logits.new_empty(0) if grad_prior is None else grad_prior


_forward_op = torch.library.custom_op(
    "fused_la::loss_forward", _forward, mutates_args=(),
    schema=f"({_FIELDS}, str reduction, str impl) -> (Tensor, Tensor)",
)  # fmt: skip
_backward_op = torch.library.custom_op(
    "fused_la::loss_backward", _backward, mutates_args=(),
    schema=f"({_FIELDS}, str reduction, str impl, Tensor state, Tensor upstream, bool needs_log_prior)"
           " -> (Tensor, Tensor)",
)  # fmt: skip


@_forward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, reduction, _ = arguments
    logits, dtype = fields[0], Problem(*fields).compute_dtype
    loss = logits.new_empty(logits.shape[:-1] if reduction == "none" else (), dtype=dtype)
    return loss, logits.new_empty(_state_size(logits, reduction), dtype=dtype)


@_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    logits, log_prior, needs_log_prior = arguments[0], arguments[1], arguments[-1]
    return torch.empty_like(logits), torch.empty_like(log_prior) if needs_log_prior else logits.new_empty(0)


def _setup_op_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *fields, ctx.reduction, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    save_fields(ctx, fields, output[1])


def _op_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple:
    grads: list[Tensor | None] = [None] * (_N_FIELDS + 2)
    if grad_loss is None:
        return tuple(grads)
    fields, (state,) = saved_fields(ctx)
    needs_log_prior = ctx.needs_input_grad[1]
    grads[0], grad_prior = _backward_op(*fields, ctx.reduction, ctx.impl, state, grad_loss, needs_log_prior)
    grads[1] = grad_prior if needs_log_prior else None
    return tuple(grads)


_forward_op.register_autograd(_op_backward, setup_context=_setup_op_context)
