"""What a CPU does with a tile of a head's logits, in place: the steps of `_blocked.py`, with tiles for chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_la._cpu.loss import reduce_tile, take_dense_mass
from fused_la._tiled.blocks import Block, Scratch
from fused_la._tiled.softmax import Candidates, Part, Rows, State, join, put


class Epilogue:
    def __init__(self, rows: Rows, n_elements: int, bias: Tensor | None, product_dtype: torch.dtype):
        self._rows, self._offset = rows, rows.offset
        self._bias = None if bias is None else bias.to(rows.problem.compute_dtype)
        if self._bias is not None and rows.scale is None and rows.as_label is None:  # then one pass adds both
            self._offset = self._bias if self._offset is None else self._offset + self._bias
            self._bias = None
        self._scratch = Scratch(n_elements, rows.problem.compute_dtype)

    def absorb(self, block: Block, chunk: slice, logits: Tensor, part: Part) -> None:
        """Join what a tile leaves to the rows' part, and note what labels stand at, or the top class."""
        candidates = self._rows.candidates.of(block)
        at = self._label_places(block, chunk)
        z = self._adjusted(block, chunk, logits, at)
        before = Part(*(of[block] for of in part))
        of_tile = reduce_tile(self._rows, block, chunk, z, self._scratch, candidates, before)
        for of, joined in zip(before, join(before, of_tile), strict=True):
            of.copy_(joined)

    def gradient_of(
        self, state: State, upstream: Tensor, of_candidates: Tensor
    ) -> Callable[[Block, slice, Tensor], Tensor]:
        """A function that turns a tile of logits into the gradient of its z, labels included."""
        scales = upstream * state.total / (1.0 + state.rest)

        def gradient(block: Block, chunk: slice, logits: Tensor) -> Tensor:
            rows, candidates = self._rows, self._rows.candidates.of(block)
            grad = self._adjusted(block, chunk, logits, None)
            grad.sub_(state.m[block].unsqueeze(-1)).exp_().mul_(scales[block].unsqueeze(-1))
            take_dense_mass(rows, block, chunk, grad, upstream[block].unsqueeze(-1), self._scratch)
            put(grad, candidates.within(chunk), chunk, of_candidates[block])
            if rows.labels is not None and not rows.all_live:
                grad.masked_fill_(~rows.labels.live[block].unsqueeze(-1), 0.0)
            return grad.squeeze(1)

        return gradient

    def _label_places(self, block: Block, chunk: slice) -> tuple[Tensor, ...] | None:
        """Where in a block's (n, 1, K) labels those of this tile are; also labels that another of the row equals."""
        labels = self._rows.labels
        if labels is None:
            return None
        classes = labels.classes[block]
        return (labels.here[block] & (classes >= chunk.start) & (classes < chunk.stop)).nonzero(as_tuple=True)

    def _adjusted(self, block: Block, chunk: slice, logits: Tensor, labels_at: tuple[Tensor, ...] | None) -> Tensor:
        """z, (n, 1, c), where the logits stand."""
        rows, z = self._rows, logits.unsqueeze(1)
        candidates: Candidates = rows.candidates.of(block)
        if self._bias is not None:
            z.add_(self._bias[chunk])
        if rows.scale is not None:
            z.mul_(rows.scale[chunk])
        if labels_at is not None and rows.as_label is not None and rows.target_offset is not None:
            classes = candidates.classes[labels_at]
            offset = rows.target_offset[classes]
            rows.as_label[block][labels_at] = z[(*labels_at[:2], classes - chunk.start)] + offset
        if self._offset is not None:
            z.add_(self._offset[chunk])
        if rows.dropped is not None:
            z.masked_fill_(rows.dropped[chunk], -torch.inf)
        if labels_at is not None:
            candidates.z[labels_at] = z[(*labels_at[:2], candidates.classes[labels_at] - chunk.start)]
        return z
