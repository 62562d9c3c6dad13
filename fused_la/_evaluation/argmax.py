"""The predicted classes of many post-hoc corrections at once, in PyTorch: on a CPU, and where Triton is missing.

    prediction_t = argmax_c  f_c * scale_tc + offset_tc

A class at offset_tc = -inf is out, whatever its logit. Ties go to the lowest class, and a NaN is above all, as in
`torch.argmax`. `_triton/argmax.py` computes the same on a GPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_la._call.values import is_compiled_or_traced
from fused_la._tiled.blocks import BLOCK_ELEMENTS, row_blocks


def predict(logits: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """Classes, (T, N, P) int64, of (N, P, C) logits; scale and offset are (T, C) in the dtype to compute in, not both
    None."""
    table = scale if scale is not None else offset
    assert table is not None
    n_outer, n_inner, n_classes = logits.shape
    predictions = torch.empty((len(table), n_outer, n_inner), dtype=torch.int64, device=logits.device)
    out = None if offset is None else offset == -math.inf
    any_out = [out is not None] * len(table) if out is None or is_compiled_or_traced(out) else out.any(1).tolist()
    height = max(1, BLOCK_ELEMENTS // (2 * n_classes))  # of two buffers: the logits and z
    for outer, inner in row_blocks(n_outer, n_inner, height):
        block = logits[outer, inner].to(table.dtype)
        z = torch.empty(block.shape, dtype=table.dtype, device=logits.device)
        for t in range(len(table)):
            if scale is not None:
                torch.mul(block, scale[t], out=z)
            if offset is not None:
                torch.add(block if scale is None else z, offset[t], out=z)
            if out is not None and any_out[t]:
                z.masked_fill_(out[t], -math.inf)
            predictions[t, outer, inner] = z.argmax(-1)
    return predictions
