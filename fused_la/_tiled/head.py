"""A classifier head and its loss: the logits of a tile at a time, never those of all rows and classes.

    logits = features @ weight.T + bias                      (N, D), (C, D), (C,)
    grad_features = grad_logits @ weight,   grad_weight = grad_logits.T @ features,   grad_bias = grad_logits.sum(0)

Forward passes once over the classes and keeps a `Part` of every row. Backward makes each tile of logits again, turns it
into their gradient and uses it in both products. Tiles of classes are the outer loop: the weight is read once a pass,
and each block of its gradient is written once, however many the rows are. Splitting the rows first would turn the
products of a vision head, with fewer rows than features, into products with vectors.

Products are the vendor's library's. What makes a part of a tile of logits, or a gradient, is an implementation's
`Epilogue`. Gradients add up in the compute dtype, float32 or float64, whatever the dtype of the operands.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_la._call.problem import Problem, Shard, reduce_rows
from fused_la._tiled.blocks import Block, class_chunks
from fused_la._tiled.softmax import (
    ALL,
    Part,
    Rows,
    State,
    candidate_gradient,
    empty_part,
    label_total,
    margin_total,
    prepare,
    row_losses,
    settled,
)

_EPILOGUES = {"blocked": "fused_la._cpu.head", "triton": "fused_la._triton.head"}
# Whose tiles lie class by class: a CPU's products are faster so, and its reductions over classes as fast.
BY_CLASS = {"blocked"}


class Head(NamedTuple):
    features: Tensor  # (N, D)
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)
    product_dtype: torch.dtype  # of the operands of products


class Saved(NamedTuple):
    """What backward needs of a forward pass, all as large as the rows."""

    state: Tensor  # (3, N, 1): m, rest, A
    classes: Tensor  # (N, 1, K) candidates: the labels, or the top class of class probabilities
    z: Tensor  # (N, 1, K) what they stand at
    as_label: Tensor  # (N, 1, K) with a target_offset, else empty
    normalizer: Tensor  # the mean's denominator, empty for "none"


class Gradients(NamedTuple):
    """Of features, weight, bias and log_prior; None where not asked for."""

    features: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    log_prior: Tensor | None


class Tiles(NamedTuple):
    """Rows and classes of a tile of logits."""

    rows: int
    classes: int


# Elements of a tile, and the most rows it takes. Forward + backward in float32 on two cores of an AMD EPYC (32 MB L3)
# took, relative to whole logits in eager PyTorch (805 and 942 ms), at 256 x 512 x 100,000 (rows, features, classes)
# 1.00 with 2**20 elements, 0.99 with 2**21, 0.98 with 2**22 and 1.01 with 2**24; at 4096 x 512 x 8142, with 1024 rows,
# 1.01, 0.96, 0.95 and 0.94, and there with 2**22 elements 1.01 with 256 rows and 0.98 with 4096.
_CPU_TILE = (1 << 22, 1 << 10)
_GPU_TILE = (1 << 23, 1 << 12)  # not measured yet: 32 MB in float32, what L2 holds


def choose_tiles(n_rows: int, n_classes: int, device_type: str) -> Tiles:
    """The tile of logits: as many elements as a cache holds, in as many rows as there are, up to a limit."""
    elements, most_rows = _CPU_TILE if device_type == "cpu" else _GPU_TILE
    rows = max(1, min(n_rows, most_rows))
    return Tiles(rows, min(n_classes, max(128, elements // rows // 128 * 128)))


def rowless_logits(head: Head) -> Tensor:
    """Logits (N, 1, C) in shape, dtype and device, of one element in memory: what a `Problem` knows of a head's."""
    return head.features.new_empty(1).expand(head.features.shape[0], 1, head.weight.shape[0])


def forward(head: Head, problem: Problem, reduction: str, impl: str) -> tuple[Tensor, Saved]:
    rows = prepare(problem, in_pieces=True)
    part = absorb_tiles(Products(head, problem.compute_dtype, by_class=impl in BY_CLASS), rows, impl)
    return finish(rows, part, reduction)


def absorb_tiles(source: Source, rows: Rows, impl: str) -> Part:
    """The part of all classes of every row, (N, 1); fills in what labels stand at, or the top class."""
    epilogue = make_epilogue(rows, source, impl)
    part = empty_part(rows.candidates.z[..., 0])
    for chunk in class_chunks(source.n_classes, source.tiles.classes):
        of_chunk = source.of_classes(chunk)
        for block in source.blocks:
            epilogue.absorb(block, chunk, source.logits(block, of_chunk), part)
    if rows.labels is None:
        rows.candidates.z.copy_(part.m.unsqueeze(-1))
    return part


def finish(rows: Rows, part: Part, reduction: str, smoothing: Tensor | None = None) -> tuple[Tensor, Saved]:
    """The loss of rows whose classes have all been seen; `smoothing` as in `label_total`."""
    total = part.total if rows.labels is None else label_total(rows, torch.empty_like(part.m), smoothing)
    stacked = torch.stack([part.m, settled(part), total])
    state = State(*stacked)
    if rows.as_label is not None and rows.labels is not None:
        for stands in (rows.candidates.z, rows.as_label):  # no tile has said it of a label that does not count
            stands.copy_(torch.where(rows.labels.counts, stands, part.m.unsqueeze(-1)))
        state.total.copy_(margin_total(rows, state, ALL))
    row_weight = torch.ones_like(part.m) if rows.labels is None else rows.labels.row_weight
    normalizer = row_weight.sum()
    loss = reduce_rows(row_losses(rows, state, part.gap), normalizer, reduction)
    if reduction == "none":
        normalizer = normalizer.new_empty(0)
    as_label = part.m.new_empty(0) if rows.as_label is None else rows.as_label
    return loss, Saved(stacked, rows.candidates.classes, rows.candidates.z, as_label, normalizer)


def backward(
    head: Head,
    problem: Problem,
    saved: Saved,
    grad_rows: Tensor,
    wanted: tuple[bool, bool, bool, bool],
    impl: str,
    shard: Shard | None = None,
) -> Gradients:
    """Gradients for grad_rows (N, 1), which is over the mean's denominator already; the features' as they added up."""
    products = Products(head, problem.compute_dtype, by_class=impl in BY_CLASS)
    rows, to_gradient = prepare_backward(products, problem, saved, grad_rows, impl, shard)
    features, weight, bias, log_prior = wanted
    grad_features = torch.zeros_like(head.features, dtype=products.dtype) if features else None
    grad_weight = torch.empty_like(head.weight) if weight else None
    # Summed in float64: over many rows a float32 sum would lose what the rows' gradients hold.
    grad_offset = head.weight.new_zeros(len(head.weight), dtype=torch.float64) if bias or log_prior else None
    for chunk in class_chunks(len(head.weight), products.tiles.classes):
        weight_block = products.of_classes(chunk)
        of_weight = None if grad_weight is None else products.accumulator(grad_weight[chunk])
        for block in products.blocks:
            grad = to_gradient(block, chunk, products.logits(block, weight_block))
            if grad_offset is not None:
                grad_offset[chunk] += grad.sum(0, dtype=products.dtype)
            if rows.scale is not None:
                grad.mul_(rows.scale[chunk])
            if grad_features is not None:
                add_product(grad_features[block[0]], grad, weight_block)
            if of_weight is not None:
                add_product(of_weight, grad.T, products.features[block[0]], first=block[0].start == 0)
        if of_weight is not None and not products.blocks:
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
    source: Source, problem: Problem, saved: Saved, grad_rows: Tensor, impl: str, shard: Shard | None
) -> tuple[Rows, Callable[[Block, slice, Tensor], Tensor]]:
    """The rows of a forward pass, and what turns a tile of their logits into the gradient of its z."""
    rows = prepare(problem, in_pieces=True, shard=shard)
    rows = rows._replace(
        candidates=rows.candidates._replace(classes=saved.classes, z=saved.z),
        as_label=None if rows.as_label is None else saved.as_label,
    )
    state, grad_rows = State(*saved.state), grad_rows.to(problem.compute_dtype)
    of_candidates = candidate_gradient(rows, state, grad_rows)
    return rows, make_epilogue(rows, source, impl).gradient_of(state, grad_rows, of_candidates)


class Predictions(NamedTuple):
    """Of each row, (N,)."""

    classes: Tensor  # int64
    logits: Tensor  # theirs, float32 or float64


@torch.no_grad()
def predict(head: Head) -> Predictions:
    """The class of the largest logit of each row: the lowest of equal ones, and a NaN comes before any number."""
    dtype = torch.promote_types(head.features.dtype, torch.float32)
    products = Products(head, dtype, by_class=head.features.device.type == "cpu")
    best = head.features.new_full((len(head.features),), -torch.inf, dtype=dtype)
    classes = torch.zeros_like(best, dtype=torch.int64)
    for chunk in class_chunks(len(head.weight), products.tiles.classes or 1):  # 0 where a rank has no classes
        weight = products.of_classes(chunk)
        for block in products.blocks:
            rows = block[0]
            logits = products.logits(block, weight)
            value, at = (logits if head.bias is None else logits.add_(head.bias[chunk])).max(1)
            better = (value > best[rows]) | (value.isnan() & ~best[rows].isnan())
            classes[rows] = torch.where(better, at + chunk.start, classes[rows])
            best[rows] = torch.where(better, value, best[rows])
    return Predictions(classes, best)


def make_epilogue(rows: Rows, source: Source, impl: str) -> Any:
    module = importlib.import_module(_EPILOGUES[impl])
    return module.Epilogue(rows, source.tiles.rows * source.tiles.classes, source.bias, source.product_dtype)


class Source(ABC):
    """Tiles of logits for one pass over them, one after the other in a buffer that every tile reuses."""

    bias: Tensor | None = None  # (C,) what they lack
    product_dtype: torch.dtype  # that gradients of tiles may come in

    def __init__(self, n_rows: int, n_classes: int, like: Tensor, dtype: torch.dtype, by_class: bool):
        self.n_classes, self.dtype, self._by_class = n_classes, dtype, by_class
        self.tiles = choose_tiles(n_rows, n_classes, like.device.type)
        starts = range(0, n_rows, self.tiles.rows)
        self.blocks: list[Block] = [(slice(i, min(i + self.tiles.rows, n_rows)), slice(0, 1)) for i in starts]
        self._logits = like.new_empty(self.tiles.rows * self.tiles.classes, dtype=dtype)

    @abstractmethod
    def of_classes(self, chunk: slice) -> Tensor:
        """What the tiles of a chunk of the classes share."""

    @abstractmethod
    def logits(self, block: Block, of_chunk: Tensor) -> Tensor:
        """(n, c) logits of a tile, without bias."""

    def buffer(self, n: int, c: int) -> Tensor:
        """Where a tile stands. Its rows, where it lies by rows, are as far apart as any tile's."""
        return self._logits.as_strided((n, c), (1, n) if self._by_class else (self.tiles.classes, 1))


class Products(Source):
    """The products of a head."""

    def __init__(self, head: Head, dtype: torch.dtype, by_class: bool):
        super().__init__(len(head.features), len(head.weight), head.features, dtype, by_class)
        self.head, self.bias, self.product_dtype = head, head.bias, head.product_dtype
        self.features = head.features.to(head.product_dtype)

    def of_classes(self, chunk: slice) -> Tensor:
        return self.head.weight[chunk].to(self.product_dtype)

    def logits(self, block: Block, of_chunk: Tensor) -> Tensor:
        features = self.features[block[0]]
        logits = self.buffer(len(features), len(of_chunk))
        add_product(logits, features, of_chunk.T, first=True)
        return logits

    def accumulator(self, grad_weight: Tensor) -> Tensor:
        """Where a block of the weight's gradient adds up: where it will stand, unless several products have to meet in
        more digits than it has."""
        once = len(self.blocks) == 1 and grad_weight.dtype == self.head.product_dtype
        return (
            grad_weight if once or grad_weight.dtype == self.dtype else torch.empty_like(grad_weight, dtype=self.dtype)
        )


def add_product(out: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """out += a @ b, or out = a @ b the first time, adding up in the dtype of out or a wider one."""
    if out.stride(0) == 1 and out.stride(1) != 1:
        out, a, b = out.T, b.T, a.T  # libraries write rows
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=0.0 if first else 1.0, out=out)
    elif first:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)
