"""A classifier head and its loss: the logits of a tile at a time, never those of all rows and classes.

    logits = features @ weight.T + bias                      (N, D), (C, D), (C,)
    grad_features = grad_logits @ weight,   grad_weight = grad_logits.T @ features,   grad_bias = grad_logits.sum(0)

Forward passes once over the classes and keeps the `SoftmaxState` of every row. Backward computes each tile of logits
again, turns it into their gradient and uses that in both products. Tiles of classes are the outer loop: the weight is
read once a pass, and each block of its gradient is written once, whatever the number of rows. If the rows were split
first, the products of a vision head, which has fewer rows than features, would become products with vectors.

The vendor's library computes the products. The `Epilogue` of an implementation turns a tile of logits into a state, or
into a gradient. Gradients are summed in the compute dtype, float32 or float64, whatever the dtype of the operands.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_la._call.problem import Problem, ShardLabels, reduce_rows
from fused_la._tiled.blocks import Block, class_chunks
from fused_la._tiled.softmax import (
    ALL_ROWS,
    PreparedRows,
    SoftmaxState,
    candidate_gradient,
    empty_state,
    finalize_rest,
    label_mass_total,
    margin_total,
    prepare,
    row_losses,
)


class Head(NamedTuple):
    features: Tensor  # (N, D)
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)
    product_dtype: torch.dtype  # of the operands of products


class Saved(NamedTuple):
    """What backward needs of a forward pass, all as large as the rows."""

    state: Tensor  # (3, N, 1): m, rest, A
    classes: Tensor  # (N, 1, K) candidates: the labels, or the top class of class probabilities
    z: Tensor  # (N, 1, K) their adjusted logits
    z_as_label: Tensor  # (N, 1, K) with a target_offset, else empty
    normalizer: Tensor  # the mean's denominator, empty for "none"


class Gradients(NamedTuple):
    """The gradients of features, weight, bias and log_prior; None if not wanted."""

    features: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    log_prior: Tensor | None


class TileShape(NamedTuple):
    """How many rows and classes a tile of logits has."""

    rows: int
    classes: int


# Elements of a tile, and the most rows it takes. Forward + backward in float32 on two cores of an AMD EPYC (32 MB L3)
# took, relative to whole logits in eager PyTorch (805 and 942 ms), at 256 x 512 x 100,000 (rows, features, classes)
# 1.00 with 2**20 elements, 0.99 with 2**21, 0.98 with 2**22 and 1.01 with 2**24; at 4096 x 512 x 8142, with 1024 rows,
# 1.01, 0.96, 0.95 and 0.94, and there with 2**22 elements 1.01 with 256 rows and 0.98 with 4096.
_CPU_TILE = (1 << 22, 1 << 10)
_GPU_TILE = (1 << 23, 1 << 12)  # not measured yet: 32 MB in float32, what L2 holds


def choose_tile_shape(n_rows: int, n_classes: int, device_type: str) -> TileShape:
    """The tile of logits: as many elements as a cache holds, in as many rows as there are, up to a limit."""
    elements, most_rows = _CPU_TILE if device_type == "cpu" else _GPU_TILE
    rows = max(1, min(n_rows, most_rows))
    return TileShape(rows, min(n_classes, max(128, elements // rows // 128 * 128)))


def logits_placeholder(head: Head) -> Tensor:
    """A placeholder for a head's logits in its `Problem`: (N, 1, C) in shape, but one element in memory."""
    return head.features.new_empty(1).expand(head.features.shape[0], 1, head.weight.shape[0])


def forward(head: Head, problem: Problem, reduction: str, kernels: ModuleType) -> tuple[Tensor, Saved]:
    """The reduced loss, or (N, 1) rows. `kernels` is the implementation, `_cpu` or `_triton`."""
    rows = prepare(problem, tiled=True)
    tiles = HeadTiles(head, problem.compute_dtype, kernels.CLASS_MAJOR)
    return finalize(rows, reduce_tiles(tiles, rows, kernels), reduction)


def reduce_tiles(source: LogitTiles, rows: PreparedRows, kernels: ModuleType) -> SoftmaxState:
    """The state of each row over all classes, (N, 1); z of the labels, or the top class, is filled in."""
    epilogue = make_epilogue(rows, source, kernels)
    state = empty_state(rows.candidates.z[..., 0])
    for chunk in class_chunks(source.n_classes, source.tiles.classes):
        operand = source.chunk_operand(chunk)
        for block in source.blocks:
            epilogue.update(block, chunk, source.logits(block, operand), state)
    if rows.labels is None:
        rows.candidates.z.copy_(state.m.unsqueeze(-1))
    return state


def finalize(
    rows: PreparedRows, merged: SoftmaxState, reduction: str, smoothing: Tensor | None = None
) -> tuple[Tensor, Saved]:
    """The loss from the state over all classes; `smoothing` as in `label_mass_total`."""
    total = merged.total if rows.labels is None else label_mass_total(rows, torch.empty_like(merged.m), smoothing)
    stacked = torch.stack([merged.m, finalize_rest(merged), total])
    state = SoftmaxState(*stacked, gap=merged.gap)
    if rows.z_as_label is not None and rows.labels is not None:
        for z in (rows.candidates.z, rows.z_as_label):  # no tile has filled in a label that does not count
            z.copy_(torch.where(rows.labels.counts, z, merged.m.unsqueeze(-1)))
        state.total.copy_(margin_total(rows, state, ALL_ROWS))
    row_weight = torch.ones_like(merged.m) if rows.labels is None else rows.labels.row_weight
    normalizer = row_weight.sum()
    loss = reduce_rows(row_losses(rows, state), normalizer, reduction)
    if reduction == "none":
        normalizer = normalizer.new_empty(0)
    z_as_label = merged.m.new_empty(0) if rows.z_as_label is None else rows.z_as_label
    return loss, Saved(stacked, rows.candidates.classes, rows.candidates.z, z_as_label, normalizer)


def backward(
    head: Head,
    problem: Problem,
    saved: Saved,
    grad_rows: Tensor,
    wanted: tuple[bool, bool, bool, bool],
    kernels: ModuleType,
    shard: ShardLabels | None = None,
) -> Gradients:
    """Gradients for grad_rows (N, 1), already divided by the mean's denominator; the features' in the compute dtype."""
    tiles = HeadTiles(head, problem.compute_dtype, kernels.CLASS_MAJOR)
    rows, to_gradient = prepare_backward(tiles, problem, saved, grad_rows, kernels, shard)
    features, weight, bias, log_prior = wanted
    grad_features = torch.zeros_like(head.features, dtype=tiles.dtype) if features else None
    grad_weight = torch.empty_like(head.weight) if weight else None
    # Summed in float64: over many rows a float32 sum would lose what the rows' gradients hold.
    grad_offset = head.weight.new_zeros(len(head.weight), dtype=torch.float64) if bias or log_prior else None
    for chunk in class_chunks(len(head.weight), tiles.tiles.classes):
        weight_block = tiles.chunk_operand(chunk)
        of_weight = None if grad_weight is None else tiles.accumulator(grad_weight[chunk])
        for block in tiles.blocks:
            grad = to_gradient(block, chunk, tiles.logits(block, weight_block))
            if grad_offset is not None:
                grad_offset[chunk] += grad.sum(0, dtype=tiles.dtype)
            if rows.scale is not None:
                grad.mul_(rows.scale[chunk])
            if grad_features is not None:
                accumulate_matmul(grad_features[block[0]], grad, weight_block)
            if of_weight is not None:
                accumulate_matmul(of_weight, grad.T, tiles.features[block[0]], first=block[0].start == 0)
        if of_weight is not None and not tiles.blocks:
            of_weight.zero_()  # no rows
        if grad_weight is not None and of_weight is not None and of_weight.dtype != grad_weight.dtype:
            grad_weight[chunk].copy_(of_weight)
    grad_bias = grad_prior = None
    if grad_offset is not None and bias and head.bias is not None:
        grad_bias = (grad_offset if rows.scale is None else grad_offset * rows.scale).to(head.bias.dtype)
    if grad_offset is not None and log_prior and problem.log_prior is not None:
        grad_prior = (grad_offset * problem.tau).to(problem.log_prior.dtype)
    return Gradients(grad_features, grad_weight, grad_bias, grad_prior)


def prepare_backward(
    source: LogitTiles,
    problem: Problem,
    saved: Saved,
    grad_rows: Tensor,
    kernels: ModuleType,
    shard: ShardLabels | None,
) -> tuple[PreparedRows, Callable[[Block, slice, Tensor], Tensor]]:
    """The rows as forward left them, and a function that turns a tile of their logits into the gradient of its z."""
    rows = prepare(problem, tiled=True, shard=shard)
    rows = rows._replace(
        candidates=rows.candidates._replace(classes=saved.classes, z=saved.z),
        z_as_label=None if rows.z_as_label is None else saved.z_as_label,
    )
    state, grad_rows = SoftmaxState(*saved.state), grad_rows.to(problem.compute_dtype)
    of_candidates = candidate_gradient(rows, state, grad_rows)
    return rows, make_epilogue(rows, source, kernels).gradient_of(state, grad_rows, of_candidates)


class Predictions(NamedTuple):
    """Of each row, (N,)."""

    classes: Tensor  # int64
    logits: Tensor  # theirs, float32 or float64


@torch.no_grad()
def predict(head: Head) -> Predictions:
    """The class of the largest logit of each row: the lowest of equal ones, and a NaN comes before any number."""
    dtype = torch.promote_types(head.features.dtype, torch.float32)
    tiles = HeadTiles(head, dtype, class_major=head.features.device.type == "cpu")
    best = head.features.new_full((len(head.features),), -torch.inf, dtype=dtype)
    classes = torch.zeros_like(best, dtype=torch.int64)
    for chunk in class_chunks(len(head.weight), tiles.tiles.classes or 1):  # 0 where a rank has no classes
        weight = tiles.chunk_operand(chunk)
        for block in tiles.blocks:
            rows = block[0]
            logits = tiles.logits(block, weight)
            value, at = (logits if head.bias is None else logits.add_(head.bias[chunk])).max(1)
            better = (value > best[rows]) | (value.isnan() & ~best[rows].isnan())
            classes[rows] = torch.where(better, at + chunk.start, classes[rows])
            best[rows] = torch.where(better, value, best[rows])
    return Predictions(classes, best)


def make_epilogue(rows: PreparedRows, source: LogitTiles, kernels: ModuleType) -> Any:
    return kernels.Epilogue(rows, source.tiles.rows * source.tiles.classes, source.bias, source.product_dtype)


class LogitTiles(ABC):
    """Tiles of logits for one pass over them, one after the other in a buffer that every tile reuses.

    `class_major` tiles lie class by class, which makes a CPU's matrix products faster and its reductions as fast.
    """

    bias: Tensor | None = None  # (C,) that the epilogue adds
    product_dtype: torch.dtype  # dtype in which the gradient of a tile may be returned

    def __init__(self, n_rows: int, n_classes: int, like: Tensor, dtype: torch.dtype, class_major: bool):
        self.n_classes, self.dtype, self._class_major = n_classes, dtype, class_major
        self.tiles = choose_tile_shape(n_rows, n_classes, like.device.type)
        starts = range(0, n_rows, self.tiles.rows)
        self.blocks: list[Block] = [(slice(i, min(i + self.tiles.rows, n_rows)), slice(0, 1)) for i in starts]
        self._logits = like.new_empty(self.tiles.rows * self.tiles.classes, dtype=dtype)

    @abstractmethod
    def chunk_operand(self, chunk: slice) -> Tensor:
        """The operand of all tiles of a chunk of the classes."""

    @abstractmethod
    def logits(self, block: Block, operand: Tensor) -> Tensor:
        """(n, c) logits of a tile, without bias."""

    def buffer(self, n: int, c: int) -> Tensor:
        """The memory of a tile. Row-major tiles have one row stride, whatever their width."""
        return self._logits.as_strided((n, c), (1, n) if self._class_major else (self.tiles.classes, 1))


class HeadTiles(LogitTiles):
    """Tiles of the logits of a head: products of its features and weight."""

    def __init__(self, head: Head, dtype: torch.dtype, class_major: bool):
        super().__init__(len(head.features), len(head.weight), head.features, dtype, class_major)
        self.head, self.bias, self.product_dtype = head, head.bias, head.product_dtype
        self.features = head.features.to(head.product_dtype)

    def chunk_operand(self, chunk: slice) -> Tensor:
        return self.head.weight[chunk].to(self.product_dtype)

    def logits(self, block: Block, operand: Tensor) -> Tensor:
        features = self.features[block[0]]
        logits = self.buffer(len(features), len(operand))
        accumulate_matmul(logits, features, operand.T, first=True)
        return logits

    def accumulator(self, grad_weight: Tensor) -> Tensor:
        """The memory in which a block of the weight's gradient is summed: its own, or wider if several products are
        added."""
        once = len(self.blocks) == 1 and grad_weight.dtype == self.head.product_dtype
        return (
            grad_weight if once or grad_weight.dtype == self.dtype else torch.empty_like(grad_weight, dtype=self.dtype)
        )


def accumulate_matmul(out: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """out += a @ b, or out = a @ b the first time, summed in the dtype of out or a wider one."""
    if out.stride(0) == 1 and out.stride(1) != 1:
        out, a, b = out.T, b.T, a.T  # the libraries write row-major results
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=0.0 if first else 1.0, out=out)
    elif first:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)
