"""Blocks of rows that fit a CPU's cache, chunks of classes, scratch memory, and sums in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_la._call.problem import Problem

# Elements of the scratch block: 8 MB in float32. On two cores of an AMD EPYC (512 KB L2 a core, 32 MB L3) the forward +
# backward at (512, 8142) float32 took 14.3 ms with 2**17 elements, 6.2 ms with 2**19, 5.3 ms with 2**20 and 4.9 ms with
# 2**21: smaller blocks stay in L2, but every operator call waits for all threads.
BLOCK_ELEMENTS = 1 << 21

Block = tuple[slice, slice]  # of the (N, P) rows
TileGradient = Callable[[Block, slice, Tensor], Tensor]  # of a block of rows, a chunk of classes, and their logits


class Blocking(NamedTuple):
    """The size of the largest block: rows, and classes at a time."""

    height: int
    width: int


def choose_blocking(problem: Problem, forward: bool, sums_gradient: bool = False) -> Blocking:
    """A block for which all buffers held at a time, PyTorch's own copies included, have BLOCK_ELEMENTS together.

    Only the height of a block may depend on the number of buffers, since a row's bits depend on the width.
    """
    # Buffers: z, PyTorch's copy of a gradient to be summed in float64, class probabilities, the product of target mass
    # and z, masks. For half precision half as much, since z has memory of its own, which may be fresh in each call: on
    # the machine above a bfloat16 step of 512 x 8142 took 4.72, 4.28 and 4.35 ms with all, half and a quarter.
    n_buffers = 1 + (problem.logits.element_size() == 2)
    if sums_gradient and problem.compute_dtype == torch.float32:
        n_buffers = 3
    if problem.has_probabilities:
        n_buffers += 1
    if problem.prior_index is not None:  # the priors of the rows, and what is smoothed toward
        n_buffers += 1 + (problem.label_smoothing > 0.0)
    if forward and (problem.has_probabilities or problem.label_smoothing > 0.0):
        n_buffers += 2
    width = min(problem.logits.shape[-1], BLOCK_ELEMENTS)
    return Blocking(max(4, BLOCK_ELEMENTS // (n_buffers * width)), width)


class Scratch:
    """Buffers of one block, allocated when first used and reused by every block."""

    def __init__(self, n_elements: int, dtype: torch.dtype):
        self._n_elements, self.dtype = n_elements, dtype
        self._buffers: dict[int, Tensor] = {}

    def view(self, which: int, shape: torch.Size) -> Tensor:
        if which not in self._buffers:
            self._buffers[which] = torch.empty(self._n_elements, dtype=self.dtype)
        return self._buffers[which][: shape.numel()].view(shape)


def row_blocks(n_outer: int, n_inner: int, height: int) -> Iterator[Block]:
    """Cover (N, P) by rectangles of at most `height` rows."""
    inner = max(1, min(n_inner, height))
    outer = max(1, height // inner)
    for i in range(0, n_outer, outer):
        for j in range(0, n_inner, inner):
            yield slice(i, min(i + outer, n_outer)), slice(j, min(j + inner, n_inner))


def class_chunks(n_classes: int, width: int) -> Iterator[slice]:
    for start in range(0, n_classes, width):
        yield slice(start, min(start + width, n_classes))


def combine_into(out: Tensor, logits: Tensor, vector: Tensor | None, operation: Callable[..., Tensor]) -> Tensor:
    """`operation`, a sum or a product, of logits and a vector over the classes, in the dtype of `out`.

    PyTorch would widen half-precision logits into memory that is fresh for each block. The bfloat16 sums of a step of
    512 x 8142 took 1.6 ms so, and take 0.4 ms with the copy (two cores of an AMD EPYC, `torch.profiler`).
    """
    if vector is None:
        return out.copy_(logits)
    return operation(logits if logits.dtype == out.dtype else out.copy_(logits), vector, out=out)


def row_sum(x: Tensor, keepdim: bool = False) -> Tensor:
    """Sum over the last dimension in an order that depends on its length alone.

    PyTorch splits a sum to a single number over its threads; a sum to two numbers runs along each row.
    """
    if x.numel() == x.shape[-1]:
        return x.expand(2, *x.shape).sum(-1, keepdim)[0]
    return x.sum(-1, keepdim)
