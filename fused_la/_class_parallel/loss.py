"""The loss with classes sharded over ranks: each rank reduces its own classes, and their states are merged.

Forward: each rank computes a partial `SoftmaxState` of every row over its classes, and z of the labels among them. One
gather exchanges these, and every rank merges the states in rank order, to the same bits. Backward of logits needs
nothing from other ranks, since the merged state covers all classes. Only the features' gradient is a sum over ranks.

Only the rank that holds a label's class knows the label's z and weights. The other ranks send 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from fused_la._autograd.fields import save_fields, saved_fields
from fused_la._autograd.implementations import implementation
from fused_la._call.problem import Problem, ShardLabels, resolve_labels
from fused_la._class_parallel.exchange import Ranks, all_gather, all_reduce, gather_rows, reduce_scatter_rows
from fused_la._tiled import head as tiled_head
from fused_la._tiled.blocks import Block
from fused_la._tiled.head import Head, HeadTiles, LogitTiles, Saved
from fused_la._tiled.softmax import PreparedRows, SoftmaxState, merge, prepare


class ShardedCall(NamedTuple):
    """The arguments of a loss over ranks that are not tensors."""

    ranks: Ranks
    impl: str
    reduction: str
    row_counts: list[int] | None  # the number of rows of each rank; None if all ranks have the same rows
    average_over_ranks: bool  # the features' gradient is averaged later, so multiply it by the number of ranks


class MaterializedTiles(LogitTiles):
    """Tiles of logits (N, 1, C) in memory, copied to the compute dtype."""

    grad_logits: Tensor | None = None  # to write in a backward pass

    def __init__(self, logits: Tensor, dtype: torch.dtype):
        super().__init__(len(logits), logits.shape[-1], logits, dtype, class_major=False)
        self.product_dtype, self._logits_of_rows = dtype, logits.squeeze(1)

    def chunk_operand(self, chunk: slice) -> Tensor:
        return self._logits_of_rows[:, chunk]

    def logits(self, block: Block, operand: Tensor) -> Tensor:
        rows = operand[block[0]]
        return self.buffer(*rows.shape).copy_(rows)

    def take_gradient(self, block: Block, chunk: slice, operand: Tensor, grad: Tensor) -> None:
        if self.grad_logits is not None:
            self.grad_logits[block[0], 0, chunk].copy_(grad)


def sharded_loss(
    call: ShardedCall, inputs: Tensor, all_features: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    product_dtype: torch.dtype, global_classes: Tensor | None, problem: Problem,
) -> Tensor:  # fmt: skip
    """The reduced loss, or (N, 1) rows.

    `inputs` are logits (N, 1, C), or the features (N, D) of a head with a weight (C, D). If each rank has different
    rows, `all_features` are the features of all ranks, and `problem` has all rows; else `all_features` is None.
    `global_classes` is as in `ShardLabels`.
    """
    return _ShardedLoss.apply(call, inputs, all_features, weight, bias, product_dtype, global_classes, *problem[1:])


class _ShardedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: ShardedCall, *fields: Any) -> Tensor:
        head, global_classes, problem = _unpack_fields(fields)
        shard, kernels = ShardLabels(global_classes), implementation(call.impl)
        with torch.autocast(problem.logits.device.type, enabled=False):
            rows = prepare(problem, tiled=True, shard=shard)
            if head is None:
                source = MaterializedTiles(problem.logits, problem.compute_dtype)
            else:
                source = HeadTiles(head, problem.compute_dtype, kernels.CLASS_MAJOR)
            state = tiled_head.reduce_tiles(source, rows, kernels)
            del source  # free its buffer
            rows, state, shard = _merge_over_ranks(call.ranks, rows, state, shard)
            loss, saved = tiled_head.finalize(rows, state, call.reduction, smoothing=state.total)
        ctx.call = call
        save_fields(ctx, fields, *saved, shard.weight)
        if call.reduction == "none" and call.row_counts is not None:
            return loss.split(call.row_counts)[call.ranks.rank].clone()
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        if is_legacy_batchedtensor(grad_outputs[0]):
            raise RuntimeError(
                "a loss over ranks has no gradients in batches (is_grads_batched): backward communicates"
            )
        grads = _gradients(ctx, grad_outputs[0])
        if not torch.is_grad_enabled():
            return grads
        # `once_differentiable` would treat the gradient as a constant if the upstream gradient is one.
        inputs = [tensor for tensor in (*ctx.saved_tensors, grad_outputs[0]) if tensor is not None]
        return tuple(None if grad is None else _NotDifferentiable.apply(grad, *inputs) for grad in grads)


class _NotDifferentiable(torch.autograd.Function):
    """A gradient that raises if it is differentiated with respect to anything that it was computed from."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        raise RuntimeError("a loss with classes over ranks has no second derivatives")


@torch.no_grad()
def _gradients(ctx: Any, grad_loss: Tensor) -> tuple:
    call: ShardedCall = ctx.call
    fields, (*saved, label_weight) = saved_fields(ctx)
    saved, kernels = Saved(*saved), implementation(call.impl)
    head, global_classes, problem = _unpack_fields(fields)
    shard = ShardLabels(global_classes, label_weight)
    needs = ctx.needs_input_grad[1:]
    grad_inputs = grad_weight = grad_bias = None
    with torch.autocast(problem.logits.device.type, enabled=False):
        grad_rows = tiled_head.grad_of_rows(grad_loss, saved, call.reduction)
        if call.reduction == "none" and call.row_counts is not None:
            (grad_rows,) = gather_rows(call.ranks, call.row_counts, [grad_rows])
        if head is None:
            tiles = MaterializedTiles(problem.logits, problem.compute_dtype)
            tiles.grad_logits = torch.empty_like(problem.logits) if needs[0] else None
            grad_prior = tiled_head.backward_tiles(tiles, problem, saved, grad_rows, needs[6], kernels, shard)
            grad_inputs = tiles.grad_logits
        else:
            wanted = (needs[0], needs[2], needs[3], needs[6])
            grads = tiled_head.backward(head, problem, saved, grad_rows, wanted, kernels, shard)
            grad_features, grad_weight, grad_bias, grad_prior = grads
            if grad_features is not None:
                grad_inputs = _sum_feature_gradient(call, grad_features).to(head.features.dtype)
    others = (None,) * (len(fields) - 7)
    return None, grad_inputs, None, grad_weight, grad_bias, None, None, grad_prior, *others


def _unpack_fields(fields: Any) -> tuple[Head | None, Tensor | None, Problem]:
    inputs, all_features, weight, bias, product_dtype, global_classes, *problem_fields = fields
    if weight is None:
        return None, global_classes, Problem(inputs, *problem_fields)
    head = Head(inputs if all_features is None else all_features, weight, bias, product_dtype)
    return head, global_classes, Problem(tiled_head.logits_placeholder(head), *problem_fields)


def _merge_over_ranks(
    ranks: Ranks, rows: PreparedRows, state: SoftmaxState, shard: ShardLabels
) -> tuple[PreparedRows, SoftmaxState, ShardLabels]:
    """Merge the states of all ranks, and fill in the labels' z and weights from the ranks that hold their classes."""
    problem, labels = rows.problem, rows.labels
    state_columns = [state.m, state.rest]
    if labels is None or rows.smoothing is not None:
        state_columns += [values for values in (state.total, state.gap) if values is not None]
    label_columns = []
    if labels is not None:
        label_columns = [rows.candidates.z] if rows.z_as_label is None else [rows.candidates.z, rows.z_as_label]
        weights = [problem.weight]
        if problem.mean_weight is not problem.weight:
            weights.append(problem.mean_weight)
        for weight in map(problem.computed, weights):
            if weight is not None:
                label_columns.append(torch.where(labels.is_local, weight[labels.classes], 0.0))
    gathered = all_gather(ranks, torch.cat([*state_columns, *(values.squeeze(1) for values in label_columns)], 1))

    n_sent = len(state_columns)
    partials = [[column.unsqueeze(1) for column in of_rank.unbind(1)] for of_rank in gathered[..., :n_sent]]
    not_sent = [torch.zeros_like(state.m)] * (4 - n_sent)
    state = SoftmaxState(*partials[0], *not_sent)
    for partial in partials[1:]:
        state = merge(state, SoftmaxState(*partial, *not_sent))
    if labels is None:
        return rows, state, shard
    label_values = gathered[..., n_sent:].sum(0).unsqueeze(1).tensor_split(len(label_columns), -1)
    label_values = [values.contiguous() for values in label_values]
    z, z_as_label = label_values.pop(0), None if rows.z_as_label is None else label_values.pop(0)
    if problem.weight is not None:
        shard = shard._replace(weight=label_values.pop(0))
    if problem.mean_weight is not None and problem.mean_weight is not problem.weight:
        shard = shard._replace(mean_weight=label_values.pop(0))
    candidates = rows.candidates._replace(z=z)
    labels = resolve_labels(problem, shard)
    return rows._replace(labels=labels, candidates=candidates, z_as_label=z_as_label), state, shard


def _sum_feature_gradient(call: ShardedCall, grad_features: Tensor) -> Tensor:
    """The gradient of this rank's features, summed over the classes of all ranks."""
    if call.row_counts is None:
        grad_features = all_reduce(call.ranks, grad_features)
    else:
        grad_features = reduce_scatter_rows(call.ranks, call.row_counts, grad_features)
    return grad_features * call.ranks.size if call.average_over_ranks else grad_features
