"""A loss whose classes are spread over ranks: each passes over its own, and their parts are joined.

Forward: a rank's own classes leave a `Part` of each row, and what the labels among them stand at; one gather of these,
which every rank joins in rank order, to the same bits. Backward needs nothing from elsewhere: the state of a row is
whole. Only the features' gradient is a sum over ranks.

What a label has of its class, its z and its weights, only the rank that holds the class can say; the others send 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from fused_la._call.problem import Problem, Shard, read_labels
from fused_la._class_parallel.exchange import Ranks, all_gather, all_reduce, gather_rows, scatter_row_sums
from fused_la._tiled import head as tiled_head
from fused_la._tiled.blocks import Block, class_chunks
from fused_la._tiled.head import BY_CLASS, Head, Products, Saved, Source, absorb_tiles, finish, prepare_backward
from fused_la._tiled.softmax import Part, Rows, join, prepare


class Plan(NamedTuple):
    """How a loss is computed, and where the rows are."""

    ranks: Ranks
    impl: str
    reduction: str
    counts: list[int] | None  # rows of each rank, where the ranks have different ones
    average: bool  # whether what takes the features' gradient divides it by the number of ranks


class Given(Source):
    """Tiles of logits that exist, as (N, 1, C), in the dtype in which they are computed."""

    def __init__(self, logits: Tensor, dtype: torch.dtype):
        super().__init__(len(logits), logits.shape[-1], logits, dtype, by_class=False)
        self.product_dtype, self._given = dtype, logits.squeeze(1)

    def of_classes(self, chunk: slice) -> Tensor:
        return self._given[:, chunk]

    def logits(self, block: Block, of_chunk: Tensor) -> Tensor:
        rows = of_chunk[block[0]]
        return self.buffer(*rows.shape).copy_(rows)


def sharded_loss(
    plan: Plan,
    own: Tensor,
    everyones: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    product_dtype: torch.dtype,
    names: Tensor | None,
    problem: Problem,
) -> Tensor:
    """The reduced loss, or (N, 1) rows.

    `own` are logits (N, 1, C), or features (N, D) of a head with a weight (C, D); `everyones` the features of all ranks
    where these have different rows, which `problem` has. `names` as in `Shard`.
    """
    return _ShardedLoss.apply(plan, own, everyones, weight, bias, product_dtype, names, *problem[1:])


class _ShardedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *fields: Any) -> Tensor:
        head, names, problem = _of_fields(fields)
        shard = Shard(names)
        with torch.autocast(problem.logits.device.type, enabled=False):
            rows = prepare(problem, in_pieces=True, shard=shard)
            if head is None:
                source = Given(problem.logits, problem.compute_dtype)
            else:
                source = Products(head, problem.compute_dtype, by_class=plan.impl in BY_CLASS)
            part = absorb_tiles(source, rows, plan.impl)
            del source  # and its buffer
            rows, part, shard = _exchange(plan.ranks, rows, part, shard)
            loss, saved = finish(rows, part, plan.reduction, smoothing=part.total)
        ctx.plan, ctx.scalars = plan, [None if isinstance(field, Tensor) else field for field in fields]
        tensors = (field if isinstance(field, Tensor) else None for field in fields)
        ctx.save_for_backward(*tensors, *saved, shard.weight)
        if plan.reduction == "none" and plan.counts is not None:
            return loss.split(plan.counts)[plan.ranks.rank].clone()
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
        # PyTorch's once_differentiable would let a gradient pass for a constant where the upstream one is.
        inputs = [tensor for tensor in (*ctx.saved_tensors, grad_outputs[0]) if tensor is not None]
        return tuple(None if grad is None else _Last.apply(grad, *inputs) for grad in grads)


class _Last(torch.autograd.Function):
    """A gradient that has no derivative of its own, of whatever it was computed from."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        raise RuntimeError("a loss with classes over ranks has no second derivatives")


@torch.no_grad()
def _gradients(ctx: Any, grad_loss: Tensor) -> tuple:
    plan: Plan = ctx.plan
    *tensors, of_labels = ctx.saved_tensors
    n_saved = len(Saved._fields)
    fields = zip(tensors[:-n_saved], ctx.scalars, strict=True)
    fields = [tensor if tensor is not None else value for tensor, value in fields]
    saved = Saved(*tensors[-n_saved:])
    head, names, problem = _of_fields(fields)
    shard = Shard(names, of_labels)
    needs = ctx.needs_input_grad[1:]
    grad_own = grad_weight = grad_bias = None
    with torch.autocast(problem.logits.device.type, enabled=False):
        grad_rows = _over_rows(plan, grad_loss, saved)
        if head is None:
            grad_own, grad_prior = _backward_given(problem, saved, grad_rows, needs[0], needs[6], plan.impl, shard)
        else:
            wanted = (needs[0], needs[2], needs[3], needs[6])
            grads = tiled_head.backward(head, problem, saved, grad_rows, wanted, plan.impl, shard)
            grad_features, grad_weight, grad_bias, grad_prior = grads
            if grad_features is not None:
                grad_own = _summed(plan, grad_features).to(head.features.dtype)
    rest = (None,) * (len(fields) - 7)
    return None, grad_own, None, grad_weight, grad_bias, None, None, grad_prior, *rest


def _of_fields(fields: Any) -> tuple[Head | None, Tensor | None, Problem]:
    own, everyones, weight, bias, product_dtype, names, *others = fields
    if weight is None:
        return None, names, Problem(own, *others)
    head = Head(own if everyones is None else everyones, weight, bias, product_dtype)
    return head, names, Problem(tiled_head.rowless_logits(head), *others)


def _exchange(ranks: Ranks, rows: Rows, part: Part, shard: Shard) -> tuple[Rows, Part, Shard]:
    """The part of all classes of every row, and labels that know what they have of their classes."""
    problem, labels = rows.problem, rows.labels
    of_rows = [part.m, part.rest]
    if labels is None or rows.smoothing is not None:
        of_rows += [part.gap, part.total]
    of_labels = []
    if labels is not None:
        of_labels = [rows.candidates.z] if rows.as_label is None else [rows.candidates.z, rows.as_label]
        weights = [problem.weight]
        if problem.mean_weight is not problem.weight:
            weights.append(problem.mean_weight)
        for weight in map(problem.computed, weights):
            if weight is not None:
                of_labels.append(torch.where(labels.here, weight[labels.classes], 0.0))
    came = all_gather(ranks, torch.cat([*of_rows, *(values.squeeze(1) for values in of_labels)], 1))

    parts = [[column.unsqueeze(1) for column in of_rank.unbind(1)] for of_rank in came[..., : len(of_rows)]]
    none = torch.zeros_like(part.m)
    part = Part(*parts[0], *[none] * (4 - len(of_rows)))
    for of_rank in parts[1:]:
        part = join(part, Part(*of_rank, *[none] * (4 - len(of_rows))))
    if labels is None:
        return rows, part, shard
    owners = came[..., len(of_rows) :].sum(0).unsqueeze(1).tensor_split(len(of_labels), -1)
    owners = [values.contiguous() for values in owners]
    z, as_label = owners.pop(0), None if rows.as_label is None else owners.pop(0)
    if problem.weight is not None:
        shard = shard._replace(weight=owners.pop(0))
    if problem.mean_weight is not None and problem.mean_weight is not problem.weight:
        shard = shard._replace(mean_weight=owners.pop(0))
    candidates = rows.candidates._replace(z=z)
    return rows._replace(labels=read_labels(problem, shard), candidates=candidates, as_label=as_label), part, shard


def _over_rows(plan: Plan, grad_loss: Tensor, saved: Saved) -> Tensor:
    """The upstream gradient of every row, over the mean's denominator."""
    if plan.reduction != "none":
        grad_rows = grad_loss.expand(saved.state.shape[1:])
        return grad_rows / saved.normalizer if plan.reduction == "mean" else grad_rows
    grad_rows = grad_loss.resolve_neg()
    return grad_rows if plan.counts is None else gather_rows(plan.ranks, plan.counts, [grad_rows])[0]


def _summed(plan: Plan, grad_features: Tensor) -> Tensor:
    """The gradient of this rank's own rows, to which every rank's classes have added."""
    if plan.counts is None:
        grad_features = all_reduce(plan.ranks, grad_features)
    else:
        grad_features = scatter_row_sums(plan.ranks, plan.counts, grad_features)
    return grad_features * plan.ranks.size if plan.average else grad_features


def _backward_given(
    problem: Problem,
    saved: Saved,
    grad_rows: Tensor,
    needs_logits: bool,
    needs_log_prior: bool,
    impl: str,
    shard: Shard,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of logits (N, 1, C) and log_prior (C,)."""
    source = Given(problem.logits, problem.compute_dtype)
    rows, to_gradient = prepare_backward(source, problem, saved, grad_rows, impl, shard)
    grad_logits = torch.empty_like(problem.logits) if needs_logits else None
    # Summed in float64: over many rows a float32 sum would lose what the rows' gradients hold.
    grad_offset = problem.logits.new_zeros(source.n_classes, dtype=torch.float64) if needs_log_prior else None
    for chunk in class_chunks(source.n_classes, source.tiles.classes):
        of_chunk = source.of_classes(chunk)
        for block in source.blocks:
            grad = to_gradient(block, chunk, source.logits(block, of_chunk))
            if grad_offset is not None:
                grad_offset[chunk] += grad.sum(0, dtype=source.dtype)
            if grad_logits is not None:
                grad = grad if rows.scale is None else grad.mul_(rows.scale[chunk])
                grad_logits[block[0], 0, chunk].copy_(grad)
    if grad_offset is None or problem.log_prior is None:
        return grad_logits, None
    return grad_logits, (grad_offset * problem.tau).to(problem.log_prior.dtype)
