"""The forward and backward passes as operators: opaque to torch.compile, make_fx and fake tensors.

Their schemas list the fields of `Problem` and `Head`. A float argument is a constant of the graph, so tau is multiplied
in before: another tau does not recompile.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_la._autograd.fields import save_fields, saved_fields, schema_of
from fused_la._autograd.implementations import implementation, in_memory
from fused_la._call.problem import Problem
from fused_la._tiled import head as tiled_head
from fused_la._tiled.head import Gradients, Head, Saved, grad_of_rows, logits_placeholder


def _operator(name: str, function: Callable[..., Any], parameters: str, n_results: int) -> Any:
    schema = f"({parameters}) -> ({', '.join(['Tensor'] * n_results)})"
    return torch.library.custom_op(f"fused_la::{name}", function, mutates_args=(), schema=schema)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *fields, ctx.reduction, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    save_fields(ctx, fields, *output[1:])


# Losses of logits -----------------------------------------------------------------------------------------------------


def loss_op(problem: Problem, reduction: str, impl: str) -> Tensor:
    """The reduced loss, or that of the rows."""
    return _loss_forward_op(*problem._replace(log_prior=problem.offset(), tau=1.0), reduction, impl)[0]


def _state_size(logits: Tensor, reduction: str) -> int:
    return 3 * math.prod(logits.shape[:-1]) + int(reduction == "mean")


_LOSS_FIELDS = ", ".join(schema_of(Problem))


def _loss_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, reduction, impl = arguments
    problem = in_memory(Problem(*fields))
    loss, state, *_ = implementation(impl).forward(problem, reduction, False)
    return loss, state[: _state_size(problem.logits, reduction)]


def _loss_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, reduction, impl, state, upstream, needs_log_prior = arguments
    problem, kernels = in_memory(Problem(*fields)), implementation(impl)
    grad_logits, grad_prior = kernels.backward(problem, reduction, state, upstream.resolve_neg(), True, needs_log_prior)
    return grad_logits, grad_logits.new_empty(0) if grad_prior is None else grad_prior


_loss_forward_op = _operator("loss_forward", _loss_forward, f"{_LOSS_FIELDS}, str reduction, str impl", 2)
_loss_backward_op = _operator(
    "loss_backward", _loss_backward,
    f"{_LOSS_FIELDS}, str reduction, str impl, Tensor state, Tensor upstream, bool needs_log_prior", 2,
)  # fmt: skip


@_loss_forward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, reduction, _ = arguments
    logits, dtype = fields[0], Problem(*fields).compute_dtype
    loss = logits.new_empty(logits.shape[:-1] if reduction == "none" else (), dtype=dtype)
    return loss, logits.new_empty(_state_size(logits, reduction), dtype=dtype)


@_loss_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    logits, log_prior, needs_log_prior = arguments[0], arguments[1], arguments[-1]
    return torch.empty_like(logits), torch.empty_like(log_prior) if needs_log_prior else logits.new_empty(0)


def _differentiate_loss(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple:
    grads: list[Tensor | None] = [None] * (len(Problem._fields) + 2)
    if grad_loss is None:
        return tuple(grads)
    fields, (state,) = saved_fields(ctx)
    needs_log_prior = ctx.needs_input_grad[1]
    grads[0], grad_prior = _loss_backward_op(*fields, ctx.reduction, ctx.impl, state, grad_loss, needs_log_prior)
    grads[1] = grad_prior if needs_log_prior else None
    return tuple(grads)


_loss_forward_op.register_autograd(_differentiate_loss, setup_context=_setup_context)


# Losses of a head -----------------------------------------------------------------------------------------------------


def head_loss_op(head: Head, problem: Problem, reduction: str, impl: str) -> Tensor:
    """The reduced loss, or (N, 1) rows."""
    if not torch.compiler.is_compiling() and "torch.utils.flop_counter" in sys.modules:
        _count_products()
    fields = problem._replace(log_prior=problem.offset(), tau=1.0)[1:]
    return _head_forward_op(*head, *fields, reduction, impl)[0]


def head_of_fields(fields: Any) -> tuple[Head, Problem]:
    """The head and the problem of (*head, *problem without logits)."""
    head = Head(*fields[:4])
    return head, Problem(logits_placeholder(head), *fields[4:])


def run_forward(head: Head, problem: Problem, reduction: str, impl: str) -> tuple[Tensor, Saved]:
    with torch.autocast(head.features.device.type, enabled=False):  # the product's dtype has been chosen
        return tiled_head.forward(head, problem, reduction, implementation(impl))


def run_backward(
    head: Head, problem: Problem, saved: Saved, grad_rows: Tensor, wanted: tuple[bool, bool, bool, bool], impl: str
) -> Gradients:
    with torch.autocast(head.features.device.type, enabled=False):
        grads = tiled_head.backward(head, problem, saved, grad_rows, wanted, implementation(impl))
    features = grads.features
    return grads if features is None else grads._replace(features=features.to(head.features.dtype))


_N_HEAD_FIELDS = len(Problem._fields) - 1  # without the logits
# A head has a weight, so the weight of a problem is called class_weight here.
_HEAD_FIELDS = ", ".join([*schema_of(Head), *(f.replace(" weight", " class_weight") for f in schema_of(Problem)[1:])])


def _head_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *fields, reduction, impl = arguments
    loss, saved = run_forward(*head_of_fields(fields), reduction, impl)
    return loss, *saved


def _head_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *fields, impl, state, classes, z, z_as_label, grad_rows, wanted = arguments
    saved = Saved(state, classes, z, z_as_label, z.new_empty(0))
    grads = run_backward(*head_of_fields(fields), saved, grad_rows, tuple(wanted), impl)
    return tuple(grad_rows.new_empty(0, dtype=fields[0].dtype) if grad is None else grad for grad in grads)


_head_forward_op = _operator("head_forward", _head_forward, f"{_HEAD_FIELDS}, str reduction, str impl", 6)
_head_backward_op = _operator(
    "head_backward", _head_backward, f"{_HEAD_FIELDS}, str impl, Tensor state, Tensor classes, Tensor z, "
    "Tensor z_as_label, Tensor grad_rows, bool[] wanted", 4,
)  # fmt: skip


@_head_forward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    *fields, reduction, _ = arguments
    head, problem = head_of_fields(fields)
    features, target, dtype = head.features, problem.target, problem.compute_dtype
    n_rows, n_labels = features.shape[0], 1 if target.is_floating_point() else target.shape[-1]
    of_labels = features.new_empty((n_rows, 1, n_labels), dtype=dtype)
    return (
        features.new_empty((n_rows, 1) if reduction == "none" else (), dtype=dtype),
        features.new_empty((3, n_rows, 1), dtype=dtype),
        torch.empty_like(of_labels, dtype=torch.int64),
        of_labels,
        features.new_empty(0, dtype=dtype) if problem.target_offset is None else torch.empty_like(of_labels),
        features.new_empty(0 if reduction == "none" else (), dtype=dtype),
    )


@_head_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    (features, weight, bias, _, log_prior), wanted = arguments[:5], arguments[-1]
    leaves = zip((features, weight, bias, log_prior), wanted, strict=True)
    return tuple(torch.empty_like(leaf) if want else features.new_empty(0) for leaf, want in leaves)


def _differentiate_head(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple:
    if grad_loss is None:
        return (None,) * (4 + _N_HEAD_FIELDS + 2)
    fields, saved = saved_fields(ctx)
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[2], needs[4]]
    grad_rows = grad_of_rows(grad_loss, Saved(*saved), ctx.reduction)
    grads = _head_backward_op(*fields, ctx.impl, *saved[:4], grad_rows, wanted)
    grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    return *grads[:3], None, grads[3], *(None,) * (_N_HEAD_FIELDS - 1 + 2)


_head_forward_op.register_autograd(_differentiate_head, setup_context=_setup_context)


@functools.cache
def _count_products() -> None:
    """Register the matrix products of the two operators with PyTorch's counter of floating-point operations."""
    from torch.utils.flop_counter import register_flop_formula  # imported only by who counts

    def product(features: Any, weight: Any) -> int:
        return 2 * features[0] * weight[0] * features[1]

    forward = torch.ops.fused_la.head_forward
    register_flop_formula(forward)(lambda features, weight, *_, out_shape=None, **__: product(features, weight))
    register_flop_formula(torch.ops.fused_la.head_backward)(
        lambda features, weight, *others, out_shape=None, **__: product(features, weight) * (1 + sum(others[-1][:2]))
    )
