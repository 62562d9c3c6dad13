"""Argmax kernel for many post-hoc corrections at once: each logit is read once for all of them.

    prediction_t = argmax_c  f_c * scale_tc + offset_tc

With groups of rows, each has a scale and an offset of its own. A class at offset_tc = -inf is excluded, whatever its
logit. Ties go to the lowest class, and NaN is the highest value,
as in `torch.argmax`: the kernel compares integer keys in the order of the values, with NaN on top. One program takes a
row and keeps, for each correction and each of BLOCK_C lanes, the highest key so far and its class; the lanes are
reduced at the end of the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_la._triton.launch_config import cdiv, is_on_current_device, next_power_of_2
from fused_la._triton.tiles import NUMBERS, row_offsets, triton_dtype
from fused_la._triton.variants import variant

MAX_TAUS = 32  # corrections of a program; for more the logits are read again
TILE = 2048  # elements of a tile: 32 registers a thread for the state. Not tuned on a GPU yet


@triton.jit
def _ordered(z, KEY: tl.constexpr, HIGHEST: tl.constexpr):
    """Integer keys in the order of the values; -0 is 0, and NaN is HIGHEST."""
    bits = tl.where(z == 0.0, 0.0, z).to(KEY, bitcast=True)
    key = tl.where(bits < 0, bits ^ HIGHEST, bits)
    return tl.where(z != z, HIGHEST, key)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=["logits", "scale", "offset", "group"])
def _argmax_kernel(
    # in
    logits, scale, offset, group,
    # out
    predictions,
    # strides
    logits_outer: tl.int64, logits_inner: tl.int64, logits_class: tl.int64,
    # sizes
    n_rows: tl.int64, n_inner, n_classes: tl.int32, n_taus: tl.int32, n_priors: tl.int32,
    # constants
    ADJACENT: tl.constexpr, COMPUTE: tl.constexpr, KEY: tl.constexpr, HIGHEST: tl.constexpr,
    TAUS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if ADJACENT:
        logits_class = 1
    row = tl.program_id(0).to(tl.int64)
    taus = tl.program_id(1) * TAUS + tl.arange(0, TAUS)
    table_rows = tl.where(taus < n_taus, taus, 0).to(tl.int64)[:, None] * n_classes
    if group is not None:  # one out of range is read as the first
        of_row = tl.load(group + row)
        of_row = tl.where(of_row.to(tl.uint64) < n_priors.to(tl.uint64), of_row, 0)
        table_rows += of_row * n_taus * n_classes
    start = row_offsets(row, n_inner, (logits_outer, logits_inner))

    lowest = -HIGHEST - 1  # below the key of -inf
    best = tl.full([TAUS, BLOCK_C], lowest, KEY)
    best_class = tl.full([TAUS, BLOCK_C], 0, tl.int32)
    for first in range(0, n_classes, BLOCK_C):
        cols = first + tl.arange(0, BLOCK_C)
        mask = (cols < n_classes)[None, :]
        z = tl.load(logits + start + cols.to(tl.int64)[None, :] * logits_class, mask, other=0.0).to(COMPUTE)
        if scale is not None:
            z = z * tl.load(scale + table_rows + cols[None, :], mask, other=1.0)
        if offset is not None:
            o = tl.load(offset + table_rows + cols[None, :], mask, other=0.0)
            z = tl.where(o == float("-inf"), float("-inf"), z + o)
        key = tl.where(mask, _ordered(z, KEY, HIGHEST), lowest)
        better = key > best  # not >=: of equal keys the lowest class stays
        best = tl.where(better, key, best)
        best_class = tl.where(better, cols[None, :], best_class)

    top = tl.max(best, 1)
    predicted = tl.min(tl.where(best == top[:, None], best_class, n_classes), 1)
    tl.store(predictions + taus.to(tl.int64) * n_rows + row, predicted.to(tl.int64), taus < n_taus)


def launch_argmax(logits: Tensor, scale: Tensor | None, offset: Tensor | None, group: Tensor | None = None) -> Tensor:
    """Predicted classes, (T, N, P) int64, of (N, P, C) logits. scale and offset are contiguous (T, C) in the compute
    dtype, or (G, T, C) with a contiguous group (N, P); one may be None."""
    if not is_on_current_device(logits):
        with torch.cuda.device(logits.device):
            return launch_argmax(logits, scale, offset, group)
    table = scale if scale is not None else offset
    assert table is not None
    n_taus, n_classes = table.shape[-2:]
    n_outer, n_inner, _ = logits.shape
    n_rows = n_outer * n_inner
    predictions = torch.empty((n_taus, n_outer, n_inner), dtype=torch.int64, device=logits.device)
    if n_rows == 0:
        return predictions
    taus = min(next_power_of_2(n_taus), MAX_TAUS)
    block_c = min(next_power_of_2(n_classes), TILE // taus)
    wide = table.dtype == torch.float64
    constants = (
        logits.stride(2) == 1 or n_classes == 1, triton_dtype(table.dtype), tl.int64 if wide else tl.int32,
        2**63 - 1 if wide else 2**31 - 1, taus, block_c,
    )  # fmt: skip
    types = logits.dtype, scale is None, offset is None, group is None, n_inner == 1
    variant(_argmax_kernel, logits.get_device(), types, constants).launch(
        (n_rows, cdiv(n_taus, taus), 1), logits, scale, offset, group,
        predictions,
        *logits.stride(),
        n_rows, None if n_inner == 1 else n_inner, n_classes, n_taus, len(table),
    )  # fmt: skip
    return predictions
