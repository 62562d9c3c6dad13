"""Loss of a classifier head: logits are computed a tile at a time, and the (N, C) matrix is never stored.

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
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_la._call.problem import Problem, ShardLabels, reduce_rows
from fused_la._tiled import softmax
from fused_la._tiled.blocks import Block, class_chunks
from fused_la._tiled.softmax import PreparedRows, SoftmaxState


class Head(NamedTuple):
    """A linear classifier and its input."""

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
    denominator: Tensor  # the mean's denominator, empty for "none"


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
    rows = softmax.prepare(problem, tiled=True)
    tiles = HeadTiles(head, problem.compute_dtype, kernels.CLASS_MAJOR)
    return finalize(rows, reduce_tiles(tiles, rows, kernels), reduction)


def reduce_tiles(source: LogitTiles, rows: PreparedRows, kernels: ModuleType) -> SoftmaxState:
    """The state of each row over all classes, (N, 1); z of the labels, or the top class, is filled in."""
    epilogue = make_epilogue(rows, source, kernels)
    state = softmax.empty_state(rows.candidates.z[..., 0])
    for chunk in class_chunks(source.n_classes, source.tile_shape.classes):
        operand = source.chunk_operand(chunk)
        for block in source.blocks:
            epilogue.update(block, chunk, source.logits(block, operand), state)
    if rows.labels is None:
        rows.candidates.z.copy_(state.m.unsqueeze(-1))
    return state


def finalize(
    rows: PreparedRows, merged: SoftmaxState, reduction: str, smoothing: Tensor | None = None
) -> tuple[Tensor, Saved]:
    """The loss from the state over all classes; `smoothing` as in `softmax.label_mass_total`."""
    like = torch.empty_like(merged.m)
    total = merged.total if rows.labels is None else softmax.label_mass_total(rows, like, smoothing)
    stacked = torch.stack([merged.m, softmax.finalize_rest(rows, merged, softmax.ALL_ROWS), total])
    state = SoftmaxState(*stacked, gap=merged.gap)
    if rows.z_as_label is not None and rows.labels is not None:
        for z in (rows.candidates.z, rows.z_as_label):  # no tile has filled in a label that does not count
            z.copy_(torch.where(rows.labels.counts, z, merged.m.unsqueeze(-1)))
        state.total.copy_(softmax.margin_total(rows, state, softmax.ALL_ROWS))
    row_weight = torch.ones_like(merged.m) if rows.labels is None else rows.labels.row_weight
    denominator = row_weight.sum()
    loss = reduce_rows(softmax.row_losses(rows, state), denominator, reduction)
    if reduction == "none":
        denominator = denominator.new_empty(0)
    z_as_label = merged.m.new_empty(0) if rows.z_as_label is None else rows.z_as_label
    return loss, Saved(stacked, rows.candidates.classes, rows.candidates.z, z_as_label, denominator)


def grad_of_rows(grad_loss: Tensor, saved: Saved, reduction: str) -> Tensor:
    """The upstream gradient of each row, divided by the mean's denominator."""
    grad_rows = grad_loss.resolve_neg() if reduction == "none" else grad_loss.expand(saved.state.shape[1:])
    return grad_rows / saved.denominator if reduction == "mean" else grad_rows


def backward(
    head: Head, problem: Problem, saved: Saved, grad_rows: Tensor, wanted: tuple[bool, bool, bool, bool],
    kernels: ModuleType, shard: ShardLabels | None = None,
) -> Gradients:  # fmt: skip
    """Gradients for grad_rows (N, 1), already divided by the mean's denominator; the features' in the compute dtype."""
    features, weight, bias, log_prior = wanted
    tiles = HeadTiles(head, problem.compute_dtype, kernels.CLASS_MAJOR)
    tiles.grad_features = torch.zeros_like(head.features, dtype=tiles.dtype) if features else None
    if weight:
        tiles.grad_weight = torch.empty_like(head.weight) if tiles.blocks else torch.zeros_like(head.weight)
    # Summed in float64: over many rows a float32 sum would lose what the rows' gradients hold.
    tiles.grad_bias = None if not bias or head.bias is None else torch.zeros_like(head.bias, dtype=torch.float64)
    grad_prior = backward_tiles(tiles, problem, saved, grad_rows, log_prior, kernels, shard)
    grad_bias = None if tiles.grad_bias is None or head.bias is None else tiles.grad_bias.to(head.bias.dtype)
    return Gradients(tiles.grad_features, tiles.grad_weight, grad_bias, grad_prior)


def backward_tiles(
    source: LogitTiles, problem: Problem, saved: Saved, grad_rows: Tensor, needs_prior: bool, kernels: ModuleType,
    shard: ShardLabels | None,
) -> Tensor | None:  # fmt: skip
    """Give every tile's gradient of the logits to the source. Returns that of log_prior if it is needed."""
    rows = softmax.prepare(problem, tiled=True, shard=shard)
    rows = rows._replace(
        candidates=rows.candidates._replace(classes=saved.classes, z=saved.z),
        z_as_label=None if rows.z_as_label is None else saved.z_as_label,
    )
    state, grad_rows = SoftmaxState(*saved.state), grad_rows.to(problem.compute_dtype)
    grad_candidates = softmax.candidate_gradient(rows, state, grad_rows)
    to_gradient = make_epilogue(rows, source, kernels).gradient_of(state, grad_rows, grad_candidates)
    grad_offset = None
    if needs_prior and problem.log_prior is not None:
        grad_offset = torch.zeros_like(problem.log_prior, dtype=torch.float64)  # as that of the bias
    for chunk in class_chunks(source.n_classes, source.tile_shape.classes):
        operand = source.chunk_operand(chunk)
        for block in source.blocks:
            grad = to_gradient(block, chunk, source.logits(block, operand))
            if grad_offset is not None:
                tile = grad.unsqueeze(1)
                softmax.add_to_offset_gradient(grad_offset, rows, block, chunk, tile, source.dtype)
            if rows.scale is not None or rows.row_scale is not None:
                rows.scale_in_place(grad.unsqueeze(1), block, chunk)
            source.take_gradient(block, chunk, operand, grad)
    if grad_offset is None or problem.log_prior is None:
        return None
    return (grad_offset * problem.tau).to(problem.log_prior.dtype)


class Predictions(NamedTuple):
    """The predicted class of each row and its logit, both (N,)."""

    classes: Tensor  # int64
    logits: Tensor  # float32 or float64


@torch.no_grad()
def predict(head: Head) -> Predictions:
    """The class of the largest logit of each row: the lowest of equal ones, and a NaN comes before any number."""
    dtype = torch.promote_types(head.features.dtype, torch.float32)
    tiles = HeadTiles(head, dtype, class_major=head.features.device.type == "cpu")
    best = head.features.new_full((len(head.features),), -torch.inf, dtype=dtype)
    classes = torch.zeros_like(best, dtype=torch.int64)
    for chunk in class_chunks(len(head.weight), tiles.tile_shape.classes or 1):  # 0 on a rank without classes
        weight = tiles.chunk_operand(chunk)
        for block in tiles.blocks:
            rows = block[0]
            logits = tiles.logits(block, weight)
            value, column = (logits if head.bias is None else logits.add_(head.bias[chunk])).max(1)
            better = (value > best[rows]) | (value.isnan() & ~best[rows].isnan())
            classes[rows] = torch.where(better, column + chunk.start, classes[rows])
            best[rows] = torch.where(better, value, best[rows])
    return Predictions(classes, best)


def make_epilogue(rows: PreparedRows, source: LogitTiles, kernels: ModuleType) -> Any:
    return kernels.Epilogue(rows, source.tile_shape.rows * source.tile_shape.classes, source.bias, source.product_dtype)


class LogitTiles(ABC):
    """Tiles of logits for one pass over them, one after the other in a buffer that every tile reuses.

    `class_major` tiles lie class by class, which makes a CPU's matrix products faster and its reductions as fast.
    """

    bias: Tensor | None = None  # (C,) that the epilogue adds
    product_dtype: torch.dtype  # dtype in which the gradient of a tile may be returned

    def __init__(self, n_rows: int, n_classes: int, like: Tensor, dtype: torch.dtype, class_major: bool):
        self.n_classes, self.dtype, self._class_major = n_classes, dtype, class_major
        self.tile_shape = choose_tile_shape(n_rows, n_classes, like.device.type)
        starts = range(0, n_rows, self.tile_shape.rows)
        self.blocks: list[Block] = [(slice(i, min(i + self.tile_shape.rows, n_rows)), slice(0, 1)) for i in starts]
        self._logits = like.new_empty(self.tile_shape.rows * self.tile_shape.classes, dtype=dtype)

    @abstractmethod
    def chunk_operand(self, chunk: slice) -> Tensor:
        """The operand of all tiles of a chunk of the classes."""

    @abstractmethod
    def logits(self, block: Block, operand: Tensor) -> Tensor:
        """(n, c) logits of a tile, without bias."""

    @abstractmethod
    def take_gradient(self, block: Block, chunk: slice, operand: Tensor, grad: Tensor) -> None:
        """Use the (n, c) gradient of a tile's logits."""

    def buffer(self, n: int, c: int) -> Tensor:
        """The memory of a tile. Row-major tiles have one row stride, whatever their width."""
        return self._logits.as_strided((n, c), (1, n) if self._class_major else (self.tile_shape.classes, 1))


class HeadTiles(LogitTiles):
    """Tiles of the logits of a head: products of its features and weight."""

    grad_features: Tensor | None = None  # to add to in a backward pass
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    _weight_sum: Tensor  # of the chunk

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

    def take_gradient(self, block: Block, chunk: slice, operand: Tensor, grad: Tensor) -> None:
        rows = block[0]
        if self.grad_bias is not None:
            self.grad_bias[chunk] += grad.sum(0, dtype=self.dtype)
        if self.grad_features is not None:
            accumulate_matmul(self.grad_features[rows], grad, operand)
        if self.grad_weight is not None:
            if rows.start == 0:
                self._weight_sum = self._accumulator(self.grad_weight[chunk])
            accumulate_matmul(self._weight_sum, grad.T, self.features[rows], first=rows.start == 0)
            if rows.stop == len(self.features) and self._weight_sum.dtype != self.grad_weight.dtype:
                self.grad_weight[chunk].copy_(self._weight_sum)

    def _accumulator(self, grad_weight: Tensor) -> Tensor:
        """The memory that sums a chunk of the weight's gradient: its own, or wider if several products are added."""
        one_product = len(self.blocks) == 1 and grad_weight.dtype == self.head.product_dtype
        in_place = one_product or grad_weight.dtype == self.dtype
        return grad_weight if in_place else torch.empty_like(grad_weight, dtype=self.dtype)


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
