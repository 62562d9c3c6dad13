"""Epilogue of a head's tile of logits on a CPU: its softmax state and its gradient, in place, as in `loss.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_la._cpu.loss import reduce_tile, row_block, subtract_dense_mass
from fused_la._tiled.blocks import Block, Scratch, TileGradient
from fused_la._tiled.softmax import Candidates, PreparedRows, SoftmaxState, merge, scatter_candidates


class Epilogue:
    def __init__(self, rows: PreparedRows, n_elements: int, bias: Tensor | None, product_dtype: torch.dtype):
        self._rows, self._offset = rows, rows.offset
        self._bias = None if bias is None else bias.to(rows.problem.compute_dtype)
        plain = rows.scale is None and rows.row_scale is None and rows.z_as_label is None
        if self._bias is not None and plain:  # then one pass adds both
            self._offset = self._bias if self._offset is None else self._offset + self._bias
            self._bias = None
        self._scratch = Scratch(n_elements, rows.problem.compute_dtype)

    def update(self, block: Block, chunk: slice, logits: Tensor, state: SoftmaxState) -> None:
        """Merge a tile into the rows' state, and record z of the labels, or the top class."""
        z = self._adjusted(block, chunk, logits, self._labels_in(block, chunk))
        before = state.in_block(block)
        partial = reduce_tile(row_block(self._rows, block, self._scratch), chunk, z, before)
        for values, merged in zip(before, merge(before, partial), strict=True):
            if values is not None and merged is not None:
                values.copy_(merged)

    def gradient_of(self, state: SoftmaxState, upstream: Tensor, grad_candidates: Tensor) -> TileGradient:
        """A function that turns a tile of logits into the gradient of its z, labels included."""
        scales = upstream * state.total / (1.0 + state.rest)

        def gradient(block: Block, chunk: slice, logits: Tensor) -> Tensor:
            rows, part = self._rows, row_block(self._rows, block, self._scratch)
            grad = self._adjusted(block, chunk, logits, None)
            grad.sub_(state.m[block].unsqueeze(-1)).exp_().mul_(scales[block].unsqueeze(-1))
            subtract_dense_mass(part, chunk, grad, upstream[block].unsqueeze(-1))
            scatter_candidates(grad, part.candidates.in_chunk(chunk), chunk, grad_candidates[block])
            if rows.labels is not None and not rows.all_live:
                grad.masked_fill_(~rows.labels.live[block].unsqueeze(-1), 0.0)
            return grad.squeeze(1)

        return gradient

    def _labels_in(self, block: Block, chunk: slice) -> tuple[Tensor, ...] | None:
        """The indices, in a block's (n, 1, K) labels, of those in this tile, equal ones of a row included."""
        labels = self._rows.labels
        if labels is None:
            return None
        classes = labels.classes[block]
        return (labels.is_local[block] & (classes >= chunk.start) & (classes < chunk.stop)).nonzero(as_tuple=True)

    def _adjusted(self, block: Block, chunk: slice, logits: Tensor, labels: tuple[Tensor, ...] | None) -> Tensor:
        """z, (n, 1, c), in the memory of the logits."""
        rows, z = self._rows, logits.unsqueeze(1)
        candidates: Candidates = rows.candidates.in_block(block)
        if self._bias is not None:
            z.add_(self._bias[chunk])
        rows.scale_in_place(z, block, chunk)
        if labels is not None and rows.z_as_label is not None and rows.target_offset is not None:
            classes = candidates.classes[labels]
            offset = rows.target_offset[classes]
            rows.z_as_label[block][labels] = z[(*labels[:2], classes - chunk.start)] + offset
        if self._offset is not None:
            z.add_(rows.in_tile(self._offset, block, chunk))
        if rows.excluded is not None:
            z.masked_fill_(rows.in_tile(rows.excluded, block, chunk), -torch.inf)
        if labels is not None:
            candidates.z[labels] = z[(*labels[:2], candidates.classes[labels] - chunk.start)]
        return z
