"""Losses of a head as an autograd Function; see `loss.py` for those of logits.

Second derivatives come from the reference formula, over whole logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from fused_la import reference
from fused_la._autograd import operators
from fused_la._autograd.fields import save_fields, saved_fields
from fused_la._autograd.loss import differentiable_gradient, under_transform
from fused_la._call.problem import Problem
from fused_la._call.values import is_compiled_or_traced
from fused_la._tiled.head import Gradients, Head, Saved, grad_of_rows

_N_FIELDS = len(Problem._fields) - 1  # but for the logits


def fused_head_loss(head: Head, problem: Problem, reduction: str, impl: str) -> Tensor:
    """The reduced loss, or (N, 1) rows, by the implementation named `impl`."""
    if is_compiled_or_traced(head.features):
        return operators.head_loss_op(head, problem, reduction, impl)
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
        head, problem = operators.head_of_fields(fields)
        loss, saved = operators.run_forward(head, problem, reduction, impl)
        save_fields(ctx, fields, *saved)
        ctx.reduction, ctx.impl = reduction, impl
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        fields, tensors = saved_fields(ctx)
        (head, problem), saved = operators.head_of_fields(fields), Saved(*tensors)
        grad_rows = grad_of_rows(grad_outputs[0], saved, ctx.reduction)
        needs = ctx.needs_input_grad[2:]
        wanted = (needs[0], needs[1], needs[2], needs[4])
        recorded = torch.compiler.is_compiling() or torch.is_grad_enabled()  # compiled autograd; second derivatives
        if recorded or under_transform() or is_legacy_batchedtensor(grad_rows):
            grads = _differentiable_gradients(head, problem, grad_rows, wanted)
        else:
            grads = operators.run_backward(head, problem, saved, grad_rows, wanted, ctx.impl)
        return None, None, *grads[:3], None, grads.log_prior, *(None,) * (_N_FIELDS - 1)


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
