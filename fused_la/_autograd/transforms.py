"""Losses of logits under torch.func: batches fold into rows, so that `vmap(grad(loss))` runs the same kernels.

Every row is a loss of its own, so a batch of problems is one problem with more rows. `_RowLosses` and `_RowGradients`
(separate, since vmap may act on the backward pass alone) each have a rule that folds a batch and calls the
implementation once. The reference formula computes what does not fold: vectors over the
classes that differ within a batch, and the gradient of a learned prior in a batch. It also computes the derivatives of
target and weights and all second derivatives.

Forward mode never comes here: `dispatch.py` gives it to the reference formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from fused_la import reference
from fused_la._autograd.fields import save_fields, saved_fields
from fused_la._autograd.implementations import implementation, in_memory
from fused_la._autograd.loss import differentiable_gradient
from fused_la._call.problem import Problem, reduce_rows, resolve_labels

_N_FIELDS = len(Problem._fields)
_PER_ROW = ("logits", "target", "target_weight", "prior_index")
_PER_CLASS = tuple(name for name in Problem._fields[: Problem._fields.index("tau")] if name not in _PER_ROW)


def transforms_fold() -> bool:
    """Whether all active transforms are batches (vmap) or reverse mode, so that a batch folds into rows."""
    stack = get_interpreter_stack() or []
    forward_mode = forward_ad._current_level >= 0
    return not forward_mode and all(layer.key() in (TransformType.Vmap, TransformType.Grad) for layer in stack)


def folded_loss(problem: Problem, reduction: str, impl: str) -> Tensor:
    """The reduced loss, or (N, P) rows, under transforms of torch.func."""
    problem = problem.as_3d()
    loss, _ = _RowLosses.apply(impl, *problem)
    weight = torch.ones_like(loss) if problem.has_probabilities else resolve_labels(problem).row_weight
    return reduce_rows(loss, weight.sum(), reduction)


class _RowLosses(torch.autograd.Function):
    """Maps (impl, *problem) to the losses of the rows, (N, P), and their state, (3, N, P)."""

    @staticmethod
    def forward(impl: str, *fields: Any) -> tuple[Tensor, Tensor]:
        loss, state, *_ = implementation(impl).forward(in_memory(Problem(*fields)), "none", False)
        return loss, state[: 3 * loss.numel()].view(3, *loss.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        impl, *fields = inputs
        ctx.mark_non_differentiable(output[1])
        save_fields(ctx, fields, output[1])
        ctx.impl = impl

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        grad_loss = grad_outputs[0]
        fields, (state,) = saved_fields(ctx)
        needs = ctx.needs_input_grad[1:]
        grads: list[Tensor | None] = [None] * _N_FIELDS
        prior_is_differentiated = Problem(*fields).target_offset is None
        if needs[0] or (needs[1] and prior_is_differentiated):
            needs_log_prior = needs[1] and prior_is_differentiated
            grads[0], of_prior = _RowGradients.apply(ctx.impl, needs_log_prior, state, grad_loss, *fields)
            grads[1] = of_prior if needs_log_prior else None
        by_formula = [i for i in range(2 if prior_is_differentiated else 1, _N_FIELDS) if needs[i]]
        if by_formula:

            def losses(*values: Tensor) -> Tensor:
                return reference.loss_rows(_replaced(fields, by_formula, values))[0]

            pull = torch.func.vjp(losses, *(fields[i] for i in by_formula))[1]
            for i, grad in zip(by_formula, pull(grad_loss), strict=True):
                grads[i] = grad
        return (None, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        impl, *fields = arguments
        problem, rows = _fold(info.batch_size, in_dims[1:], fields), _rows_of(fields, in_dims[1:])
        if problem is None:
            loss = torch.vmap(lambda *f: reference.loss_rows(Problem._make(f))[0], in_dims[1:])(*fields)
            # A batch that does not fold here does not fold in backward either, so nobody reads this state.
            return (loss, loss.new_tensor(torch.nan).expand(3, *rows)), (0, None)
        loss, state = _RowLosses.apply(impl, *problem)
        return (loss.reshape(info.batch_size, *rows), state.reshape(3, info.batch_size, *rows)), (0, 1)


class _RowGradients(torch.autograd.Function):
    """Maps (impl, needs_log_prior, state, grad_rows, *problem) to the gradients of logits and log_prior (or empty)."""

    @staticmethod
    def forward(impl: str, needs_log_prior: bool, state: Tensor, grad_rows: Tensor, *fields: Any) -> tuple:
        problem = in_memory(Problem(*fields))
        grad_logits, grad_log_prior = implementation(impl).backward(
            problem, "none", state.contiguous().view(-1), grad_rows.resolve_neg(), True, needs_log_prior
        )
        return grad_logits, state.new_empty(0) if grad_log_prior is None else grad_log_prior

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, needs_log_prior, _, grad_rows, *fields = inputs
        save_fields(ctx, fields, grad_rows)
        ctx.needs_log_prior = needs_log_prior

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        fields, (grad_rows,) = saved_fields(ctx)
        wanted = [i for i in range(_N_FIELDS) if ctx.needs_input_grad[4 + i]]

        def gradients(grad_rows: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            grad_logits, grad_log_prior = differentiable_gradient(_replaced(fields, wanted, values), grad_rows, "none")
            if grad_log_prior is None or not ctx.needs_log_prior:
                return (grad_logits,)
            return grad_logits, grad_log_prior

        pull = torch.func.vjp(gradients, grad_rows, *(fields[i] for i in wanted))[1]
        of_rows, *field_grads = pull(grad_outputs[: 1 + ctx.needs_log_prior])
        grads: list[Tensor | None] = [None] * _N_FIELDS
        for i, grad in zip(wanted, field_grads, strict=True):
            grads[i] = grad
        return (None, None, None, of_rows, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        impl, needs_log_prior, state, grad_rows, *fields = arguments
        _, _, state_dim, grad_dim, *field_dims = in_dims
        problem = None if needs_log_prior else _fold(info.batch_size, field_dims, fields)
        if problem is None:

            def gradients(grad_rows: Tensor, *fields: Any) -> tuple[Tensor, Tensor]:
                grad_logits, grad_log_prior = differentiable_gradient(Problem(*fields), grad_rows, "none")
                return grad_logits, grad_logits.new_empty(0) if grad_log_prior is None else grad_log_prior

            return torch.vmap(gradients, (grad_dim, *field_dims))(grad_rows, *fields), (0, 0)
        rows = _rows_of(fields, field_dims)
        state = _batch_first(state, state_dim, info.batch_size).movedim(0, 1).flatten(1).contiguous()
        state = state.view(3, *problem.logits.shape[:2])
        grad_rows = _batch_first(grad_rows, grad_dim, info.batch_size).reshape(problem.logits.shape[:2])
        grad_logits, empty = _RowGradients.apply(impl, False, state, grad_rows, *problem)
        return (grad_logits.reshape(info.batch_size, *rows, -1), empty), (0, None)


# Batches --------------------------------------------------------------------------------------------------------------


def _fold(batch_size: int, in_dims: Any, fields: list) -> Problem | None:
    """A batch of problems as one with batch_size * N * P rows, or None if vectors over the classes differ in it."""
    if any(in_dims[Problem._fields.index(name)] is not None for name in _PER_CLASS):
        return None
    folded = list(fields)
    for i, name in enumerate(Problem._fields):
        if name in _PER_ROW and fields[i] is not None:
            values = _batch_first(fields[i], in_dims[i], batch_size)  # (B, N, P, ...)
            one = values.shape[2] == 1  # then (B, N, ...) takes no copy, whatever the strides
            folded[i] = values.squeeze(2) if one else values.flatten(0, 1)
            if name != "logits" and not Problem(*fields).has_probabilities:
                folded[i] = folded[i].contiguous()
    return Problem(*folded)


def _batch_first(tensor: Tensor, dim: int | None, batch_size: int) -> Tensor:
    return tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _rows_of(fields: list, in_dims: Any) -> tuple[int, int]:
    """(N, P) of each problem of a batch."""
    shape = list(fields[0].shape)
    if in_dims[0] is not None:
        del shape[in_dims[0]]
    return shape[0], shape[1]


def _replaced(fields: list, which: list[int], values: tuple[Tensor, ...]) -> Problem:
    fields = list(fields)
    for i, value in zip(which, values, strict=True):
        fields[i] = value
    return Problem(*fields)
