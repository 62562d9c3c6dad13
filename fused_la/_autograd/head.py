"""Losses of a head as an autograd Function, and as operators under torch.compile; see `loss.py` for those of logits.

Second derivatives come from the reference formula, over whole logits.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from fused_la import reference
from fused_la._autograd.fields import save_fields, saved_fields, schema_of
from fused_la._autograd.loss import differentiable_gradient, implementation, under_transform
from fused_la._call.problem import Problem
from fused_la._call.values import is_compiled_or_traced
from fused_la._tiled import head as tiled_head
from fused_la._tiled.head import Gradients, Head, Saved, logits_placeholder

_N_FIELDS = len(Problem._fields) - 1  # but for the logits


def fused_head_loss(head: Head, problem: Problem, reduction: str, impl: str) -> Tensor:
    """The reduced loss, or (N, 1) rows, by the implementation named `impl`."""
    if is_compiled_or_traced(head.features):
        if not torch.compiler.is_compiling() and "torch.utils.flop_counter" in sys.modules:
            _count_products()
        # An operator's float is a constant of the graph: multiplied outside, tau may change without a recompilation.
        fields = problem._replace(log_prior=problem.offset(), tau=1.0)[1:]
        return _forward_op(*head, *fields, reduction, impl)[0]
    return _HeadLoss.apply(impl, reduction, *head, *problem[1:])


def head_formula(features: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem) -> tuple[Tensor, Tensor]:
    """Losses (N, 1) and row weights of whole logits, by the reference."""
    return reference.loss_rows(problem._replace(logits=head_logits(features, weight, bias).unsqueeze(1)))


def head_logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None or bias.dtype == features.dtype or torch.is_autocast_enabled(features.device.type):
        return F.linear(features, weight, bias)
    # F.linear refuses a bias of another dtype.
    logits, wide = F.linear(features, weight), torch.promote_types(features.dtype, torch.float32)
    return logits.to(wide) + bias.to(wide)


class _HeadLoss(torch.autograd.Function):
    """The loss of (impl, reduction, *head, *problem without logits)."""

    @staticmethod
    def forward(ctx: Any, impl: str, reduction: str, *fields: Any) -> Tensor:
        head, problem = _of_fields(fields)
        loss, saved = _run_forward(head, problem, reduction, impl)
        save_fields(ctx, fields, *saved)
        ctx.reduction, ctx.impl = reduction, impl
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        fields, tensors = saved_fields(ctx)
        (head, problem), saved = _of_fields(fields), Saved(*tensors)
        grad_rows = _over_rows(grad_outputs[0], saved, ctx.reduction)
        needs = ctx.needs_input_grad[2:]
        wanted = (needs[0], needs[1], needs[2], needs[4])
        recorded = torch.compiler.is_compiling() or torch.is_grad_enabled()  # compiled autograd; second derivatives
        if recorded or under_transform() or is_legacy_batchedtensor(grad_rows):
            grads = _differentiable_gradients(head, problem, grad_rows, wanted)
        else:
            grads = _run_backward(head, problem, saved, grad_rows, wanted, ctx.impl)
        return None, None, *grads[:3], None, grads.log_prior, *(None,) * (_N_FIELDS - 1)


def _of_fields(fields: Any) -> tuple[Head, Problem]:
    head = Head(*fields[:4])
    return head, Problem(logits_placeholder(head), *fields[4:])


def _run_forward(head: Head, problem: Problem, reduction: str, impl: str) -> tuple[Tensor, Saved]:
    with torch.autocast(head.features.device.type, enabled=False):  # the product's dtype has been chosen
        return tiled_head.forward(head, problem, reduction, implementation(impl))


def _run_backward(
    head: Head, problem: Problem, saved: Saved, grad_rows: Tensor, wanted: tuple[bool, bool, bool, bool], impl: str
) -> Gradients:
    with torch.autocast(head.features.device.type, enabled=False):
        grads = tiled_head.backward(head, problem, saved, grad_rows, wanted, implementation(impl))
    features = grads.features
    return grads if features is None else grads._replace(features=features.to(head.features.dtype))


def _over_rows(grad_loss: Tensor, saved: Saved, reduction: str) -> Tensor:
    """The upstream gradient of each row, divided by the mean's denominator."""
    grad_rows = grad_loss.resolve_neg() if reduction == "none" else grad_loss.expand(saved.state.shape[1:])
    return grad_rows / saved.normalizer if reduction == "mean" else grad_rows


def _differentiable_gradients(
    head: Head, problem: Problem, grad_rows: Tensor, wanted: tuple[bool, bool, bool, bool]
) -> Gradients:
    """The gradients by the reference formula, as PyTorch operations that autograd and batches pass through."""
    features, weight, bias, dtype = head
    operands = features.to(dtype), weight.to(dtype)
    logits = head_logits(*operands, bias)
    of_logits, of_prior = differentiable_gradient(problem._replace(logits=logits.unsqueeze(1)), grad_rows, "none")
    of_logits = of_logits.squeeze(1)
    of_features, of_weight, of_bias, _ = wanted
    return Gradients(
        (of_logits @ weight.to(of_logits.dtype)).to(features.dtype) if of_features else None,
        (of_logits.mT @ features.to(of_logits.dtype)).to(weight.dtype) if of_weight else None,
        of_logits.sum(0).to(bias.dtype) if of_bias and bias is not None else None,
        of_prior,
    )


# torch.compile --------------------------------------------------------------------------------------------------------


# A head has a weight, so the weight of a problem is called class_weight here.
_FIELDS = ", ".join([*schema_of(Head), *(f.replace(" weight", " class_weight") for f in schema_of(Problem)[1:])])


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *fields, reduction, impl = arguments
    loss, saved = _run_forward(*_of_fields(fields), reduction, impl)
    return loss, *saved


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    *fields, impl, state, classes, z, z_as_label, grad_rows, wanted = arguments
    saved = Saved(state, classes, z, z_as_label, z.new_empty(0))
    grads = _run_backward(*_of_fields(fields), saved, grad_rows, tuple(wanted), impl)
    return tuple(grad_rows.new_empty(0, dtype=fields[0].dtype) if grad is None else grad for grad in grads)


_forward_op = torch.library.custom_op(
    "fused_la::head_forward", _forward, mutates_args=(),
    schema=f"({_FIELDS}, str reduction, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
_backward_op = torch.library.custom_op(
    "fused_la::head_backward", _backward, mutates_args=(),
    schema=f"({_FIELDS}, str impl, Tensor state, Tensor classes, Tensor z, Tensor z_as_label, Tensor grad_rows, "
           "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip


@_forward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    *fields, reduction, _ = arguments
    head, problem = _of_fields(fields)
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


@_backward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    (features, weight, bias, _, log_prior), wanted = arguments[:5], arguments[-1]
    leaves = (features, weight, bias, log_prior)
    return tuple(
        torch.empty_like(leaf) if want else features.new_empty(0) for leaf, want in zip(leaves, wanted, strict=True)
    )


def _setup_op_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *fields, ctx.reduction, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    save_fields(ctx, fields, *output[1:])


def _op_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple:
    if grad_loss is None:
        return (None,) * (4 + _N_FIELDS + 2)
    fields, saved = saved_fields(ctx)
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[2], needs[4]]
    grad_rows = _over_rows(grad_loss, Saved(*saved), ctx.reduction)
    grads = _backward_op(*fields, ctx.impl, *saved[:4], grad_rows, wanted)
    grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    return *grads[:3], None, grads[3], *(None,) * (_N_FIELDS - 1 + 2)


_forward_op.register_autograd(_op_backward, setup_context=_setup_op_context)


@functools.cache
def _count_products() -> None:
    """Register the matrix products of the two operators with PyTorch's counter of floating-point operations."""
    from torch.utils.flop_counter import register_flop_formula  # imported only by who counts

    def product(features: Any, weight: Any) -> int:
        return 2 * features[0] * weight[0] * features[1]

    register_flop_formula(torch.ops.fused_la.head_forward)(
        lambda features, weight, *_, out_shape=None, **__: product(features, weight)
    )
    register_flop_formula(torch.ops.fused_la.head_backward)(
        lambda features, weight, *others, out_shape=None, **__: product(features, weight) * (1 + sum(others[-1][:2]))
    )
