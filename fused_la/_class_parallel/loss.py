"""The loss with classes sharded over ranks: each rank reduces its own classes, and their states are merged.

Forward: a rank's classes leave a `SoftmaxState` of each row, and z of the labels among them. One gather exchanges
these, and every rank merges them in rank order, to the same bits. Backward of logits needs nothing from other ranks,
since the state of a row is whole; only the features' gradient is a sum over ranks.

Only the rank that holds a label's class knows its z and its weights; the others send 0.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from fused_la._autograd.fields import save_fields, saved_fields
from fused_la._autograd.loss import implementation
from fused_la._call.problem import Problem, ShardLabels, resolve_labels
from fused_la._class_parallel.exchange import Ranks, all_gather, all_reduce, gather_rows, scatter_row_sums
from fused_la._tiled import head as tiled_head
from fused_la._tiled.blocks import Block, class_chunks
from fused_la._tiled.head import Head, HeadTiles, LogitTiles, Saved, finalize, prepare_backward, reduce_tiles
from fused_la._tiled.softmax import PreparedRows, SoftmaxState, merge, prepare


class ShardedCall(NamedTuple):
    """What a loss over ranks needs beside its tensors."""

    ranks: Ranks
    impl: str
    reduction: str
    counts: list[int] | None  # rows of each rank, if each rank has rows of its own
    average: bool  # whether the features' gradient is divided by the number of ranks later


class MaterializedTiles(LogitTiles):
    """Tiles of logits (N, 1, C) that exist, copied to the compute dtype."""

    def __init__(self, logits: Tensor, dtype: torch.dtype):
        super().__init__(len(logits), logits.shape[-1], logits, dtype, class_major=False)
        self.product_dtype, self._logits_of_rows = dtype, logits.squeeze(1)

    def chunk_operand(self, chunk: slice) -> Tensor:
        return self._logits_of_rows[:, chunk]

    def logits(self, block: Block, operand: Tensor) -> Tensor:
        rows = operand[block[0]]
        return self.buffer(*rows.shape).copy_(rows)


def sharded_loss(
    call: ShardedCall,
    own: Tensor,
    gathered: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    product_dtype: torch.dtype,
    global_classes: Tensor | None,
    problem: Problem,
) -> Tensor:
    """The reduced loss, or (N, 1) rows.

    `own` are logits (N, 1, C), or the features (N, D) of a head with a weight (C, D). `gathered` are the features of
    all ranks, whose rows `problem` has, if each rank has rows of its own. `global_classes` is as in `ShardLabels`.
    """
    return _ShardedLoss.apply(call, own, gathered, weight, bias, product_dtype, global_classes, *problem[1:])


class _ShardedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: ShardedCall, *fields: Any) -> Tensor:
        head, global_classes, problem = _of_fields(fields)
        shard, kernels = ShardLabels(global_classes), implementation(call.impl)
        with torch.autocast(problem.logits.device.type, enabled=False):
            rows = prepare(problem, tiled=True, shard=shard)
            if head is None:
                source = MaterializedTiles(problem.logits, problem.compute_dtype)
            else:
                source = HeadTiles(head, problem.compute_dtype, kernels.CLASS_MAJOR)
            state = reduce_tiles(source, rows, kernels)
            del source  # to free its buffer
            rows, state, shard = _exchange(call.ranks, rows, state, shard)
            loss, saved = finalize(rows, state, call.reduction, smoothing=state.total)
        ctx.call = call
        save_fields(ctx, fields, *saved, shard.weight)
        if call.reduction == "none" and call.counts is not None:
            return loss.split(call.counts)[call.ranks.rank].clone()
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
        # Not once_differentiable, which treats the gradient as a constant if the upstream gradient is one.
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
    head, global_classes, problem = _of_fields(fields)
    shard = ShardLabels(global_classes, label_weight)
    needs = ctx.needs_input_grad[1:]
    grad_own = grad_weight = grad_bias = None
    with torch.autocast(problem.logits.device.type, enabled=False):
        grad_rows = _over_rows(call, grad_loss, saved)
        if head is None:
            grad_own, grad_prior = _backward_logits(problem, saved, grad_rows, needs[0], needs[6], kernels, shard)
        else:
            wanted = (needs[0], needs[2], needs[3], needs[6])
            grads = tiled_head.backward(head, problem, saved, grad_rows, wanted, kernels, shard)
            grad_features, grad_weight, grad_bias, grad_prior = grads
            if grad_features is not None:
                grad_own = _sum_over_ranks(call, grad_features).to(head.features.dtype)
    rest = (None,) * (len(fields) - 7)
    return None, grad_own, None, grad_weight, grad_bias, None, None, grad_prior, *rest


def _of_fields(fields: Any) -> tuple[Head | None, Tensor | None, Problem]:
    own, gathered, weight, bias, product_dtype, global_classes, *others = fields
    if weight is None:
        return None, global_classes, Problem(own, *others)
    head = Head(own if gathered is None else gathered, weight, bias, product_dtype)
    return head, global_classes, Problem(tiled_head.logits_placeholder(head), *others)


def _exchange(
    ranks: Ranks, rows: PreparedRows, state: SoftmaxState, shard: ShardLabels
) -> tuple[PreparedRows, SoftmaxState, ShardLabels]:
    """The state of each row over all ranks, and labels with their z and weights from the ranks that hold them."""
    problem, labels = rows.problem, rows.labels
    of_rows = [state.m, state.rest]
    if labels is None or rows.smoothing is not None:
        of_rows += [part for part in (state.total, state.gap) if part is not None]
    of_labels = []
    if labels is not None:
        of_labels = [rows.candidates.z] if rows.z_as_label is None else [rows.candidates.z, rows.z_as_label]
        weights = [problem.weight]
        if problem.mean_weight is not problem.weight:
            weights.append(problem.mean_weight)
        for weight in map(problem.computed, weights):
            if weight is not None:
                of_labels.append(torch.where(labels.is_local, weight[labels.classes], 0.0))
    came = all_gather(ranks, torch.cat([*of_rows, *(values.squeeze(1) for values in of_labels)], 1))

    parts = [[column.unsqueeze(1) for column in of_rank.unbind(1)] for of_rank in came[..., : len(of_rows)]]
    none = torch.zeros_like(state.m)
    state = SoftmaxState(*parts[0], *[none] * (4 - len(of_rows)))
    for of_rank in parts[1:]:
        state = merge(state, SoftmaxState(*of_rank, *[none] * (4 - len(of_rows))))
    if labels is None:
        return rows, state, shard
    of_owners = came[..., len(of_rows) :].sum(0).unsqueeze(1).tensor_split(len(of_labels), -1)
    of_owners = [values.contiguous() for values in of_owners]
    z, z_as_label = of_owners.pop(0), None if rows.z_as_label is None else of_owners.pop(0)
    if problem.weight is not None:
        shard = shard._replace(weight=of_owners.pop(0))
    if problem.mean_weight is not None and problem.mean_weight is not problem.weight:
        shard = shard._replace(mean_weight=of_owners.pop(0))
    candidates = rows.candidates._replace(z=z)
    labels = resolve_labels(problem, shard)
    return rows._replace(labels=labels, candidates=candidates, z_as_label=z_as_label), state, shard


def _over_rows(call: ShardedCall, grad_loss: Tensor, saved: Saved) -> Tensor:
    """The upstream gradient of every row, over the mean's denominator."""
    if call.reduction != "none":
        grad_rows = grad_loss.expand(saved.state.shape[1:])
        return grad_rows / saved.normalizer if call.reduction == "mean" else grad_rows
    grad_rows = grad_loss.resolve_neg()
    return grad_rows if call.counts is None else gather_rows(call.ranks, call.counts, [grad_rows])[0]


def _sum_over_ranks(call: ShardedCall, grad_features: Tensor) -> Tensor:
    """The gradient of this rank's own rows, to which every rank's classes have added."""
    if call.counts is None:
        grad_features = all_reduce(call.ranks, grad_features)
    else:
        grad_features = scatter_row_sums(call.ranks, call.counts, grad_features)
    return grad_features * call.ranks.size if call.average else grad_features


def _backward_logits(
    problem: Problem,
    saved: Saved,
    grad_rows: Tensor,
    needs_logits: bool,
    needs_log_prior: bool,
    kernels: ModuleType,
    shard: ShardLabels,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of logits (N, 1, C) and log_prior (C,)."""
    source = MaterializedTiles(problem.logits, problem.compute_dtype)
    rows, to_gradient = prepare_backward(source, problem, saved, grad_rows, kernels, shard)
    grad_logits = torch.empty_like(problem.logits) if needs_logits else None
    # Summed in float64: over many rows a float32 sum would lose what the rows' gradients hold.
    grad_offset = problem.logits.new_zeros(source.n_classes, dtype=torch.float64) if needs_log_prior else None
    for chunk in class_chunks(source.n_classes, source.tiles.classes):
        operand = source.chunk_operand(chunk)
        for block in source.blocks:
            grad = to_gradient(block, chunk, source.logits(block, operand))
            if grad_offset is not None:
                grad_offset[chunk] += grad.sum(0, dtype=source.dtype)
            if grad_logits is not None:
                grad = grad if rows.scale is None else grad.mul_(rows.scale[chunk])
                grad_logits[block[0], 0, chunk].copy_(grad)
    if grad_offset is None or problem.log_prior is None:
        return grad_logits, None
    return grad_logits, (grad_offset * problem.tau).to(problem.log_prior.dtype)
