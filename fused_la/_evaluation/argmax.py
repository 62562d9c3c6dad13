"""Predicted classes of many post-hoc corrections at once, in PyTorch: for CPUs, and for GPUs without Triton.

    prediction_t = argmax_c  f_c * scale_tc + offset_tc

With groups of rows, each has a scale and an offset of its own. A class at offset_tc = -inf is never predicted, whatever
its logit. Ties go to the lowest class, and a NaN is above all numbers, as in `torch.argmax`. `_triton/argmax.py`
computes the same on a GPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_la._call.values import is_compiled_or_traced
from fused_la._tiled.blocks import BLOCK_ELEMENTS, row_blocks


def predict(logits: Tensor, scale: Tensor | None, offset: Tensor | None, group: Tensor | None = None) -> Tensor:
    """Predicted classes (T, N, P), int64, of logits (N, P, C).

    `scale` and `offset` are (T, C), in the dtype of the arithmetic, or (G, T, C) with a group (N, P) in range; one of
    them may be None.
    """
    if group is not None:
        scale, offset = (None if table is None else table.transpose(0, 1) for table in (scale, offset))  # (T, G, C)
    per_tau = scale if scale is not None else offset
    assert per_tau is not None
    n_outer, n_inner, n_classes = logits.shape
    predictions = torch.empty((len(per_tau), n_outer, n_inner), dtype=torch.int64, device=logits.device)
    excluded = None if offset is None else offset == -math.inf
    any_excluded = [excluded is not None] * len(per_tau)  # for each tau; True if the values cannot be read
    if excluded is not None and not is_compiled_or_traced(excluded):
        any_excluded = excluded.flatten(1).any(1).tolist()
    n_rows = max(1, BLOCK_ELEMENTS // (2 * n_classes))  # two buffers, the logits and z
    for outer, inner in row_blocks(n_outer, n_inner, n_rows):
        block = logits[outer, inner].to(per_tau.dtype)
        z = torch.empty(block.shape, dtype=per_tau.dtype, device=logits.device)
        rows = (...,) if group is None else (group[outer, inner],)
        for t in range(len(per_tau)):
            if scale is not None:
                torch.mul(block, scale[t][rows], out=z)
            if offset is not None:
                torch.add(block if scale is None else z, offset[t][rows], out=z)
            if excluded is not None and any_excluded[t]:
                z.masked_fill_(excluded[t][rows], -math.inf)
            predictions[t, outer, inner] = z.argmax(-1)
    return predictions
