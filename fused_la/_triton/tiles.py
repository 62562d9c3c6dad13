"""Device functions that the kernels share: where rows lie, and z.

A tile is BLOCK_ROWS rows by BLOCK_C classes. Arithmetic is in COMPUTE: float32, or float64 for float64 logits. Scalars
come as the bits of a Python float, since a kernel's own float arguments are float32.

A row of classes that are neighbours in memory is cut at 16-byte boundaries, whatever its length and the step to the
next row: `head` classes before the first boundary, a body of whole vectors of VEC classes, and a tail. The body is read
and written 16 bytes a thread; head and tail together are one tile of 2 * VEC classes, `edge_classes`. The rows of a
program lie alike towards the boundaries, so that they share one head.
"""

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


class Vectors(NamedTuple):
    """The tensors beside the logits, as kernels take them: None where there is none."""

    log_prior: Any  # (C,)
    target: Any  # (N, P, K) labels or (N, P, C) probabilities
    target_weight: Any  # (N, P, K)
    weight: Any  # (C,)
    mean_weight: Any  # (C,)
    smoothing_distribution: Any  # (C,)
    target_offset: Any  # (C,)
    scale: Any  # (C,)


# Arguments of kernels that are numbers. None is specialised, and all but n_inner say their type: one compiled kernel
# then serves every value. (Triton would make a constant of each 1, and mark multiples of 16.)
NUMBERS = [
    "logits_outer", "logits_inner", "logits_class", "target_outer", "target_inner", "target_class",
    "grad_outer", "grad_inner", "grad_class", "upstream_outer", "upstream_inner", "logits_step",
    "n_rows", "n_inner", "n_classes", "n_groups", "n_chunks", "n_parts", "rows_a_part", "n_taus",
    "period", "splits", "shift", "made_for_one", "first_row", "first", "width",
    "tau_bits", "smoothing_bits", "ignore_index",
]  # fmt: skip


@functools.lru_cache(maxsize=1024)
def float_bits(value: float) -> int:
    """A Python float as an int64, for `scalar` to undo on the device."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def scalar(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


# Where rows lie -------------------------------------------------------------------------------------------------------


@triton.jit
def group_rows(group, period, n_rows, BLOCK_ROWS: tl.constexpr):
    """(first row, rows to read, rows, which of them there are) of a program's group.

    What stands in for a row that is not there is the first: its result is never stored, and reading needs no mask.
    """
    if BLOCK_ROWS == 1:
        first_row = group.to(tl.int64)
    else:
        first_row = (group // period).to(tl.int64) * (BLOCK_ROWS * period) + group % period
    rows = first_row + period * tl.arange(0, BLOCK_ROWS)
    there = rows < n_rows
    return first_row, tl.where(there, rows, first_row), rows, there


@triton.jit
def row_offsets(rows, n_inner, strides):
    """Where each of the (N, P) rows begins, in 64 bits: N * C may pass 2^31. n_inner is P, None where that is 1."""
    rows = rows.to(tl.int64)
    if n_inner is None:
        return rows * strides[0]
    else:
        outer = rows // n_inner
        return outer * strides[0] + (rows - outer * n_inner) * strides[1]


@triton.jit
def whole_vectors(n, VEC: tl.constexpr):
    """n rounded down to a multiple of VEC, so that the compiler knows it for one."""
    return n // VEC * VEC


@triton.jit
def cut_row(start, n_classes, VEC: tl.constexpr, EDGES: tl.constexpr):
    """(head, body) of the rows that lie as the one at `start`: classes before the first boundary, and in vectors."""
    if EDGES:
        head = tl.minimum((VEC - start % VEC) % VEC, n_classes).to(tl.int32)
        return head, whole_vectors(n_classes - head, VEC)
    else:
        return 0, whole_vectors(n_classes, VEC)


@triton.jit
def tile_start(tile, body, VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where a tile of a body of at least BLOCK_C classes begins. The last tile ends with the body: it takes classes of
    the tile before once more, so that no tile needs a mask."""
    return whole_vectors(tl.minimum(tile * BLOCK_C, body - BLOCK_C), VEC).to(tl.int64)


@triton.jit
def edge_classes(head, body, n_classes, VEC: tl.constexpr):
    """The classes before and behind the body, and which of them there are."""
    lanes = tl.arange(0, 2 * VEC)
    classes = tl.where(lanes < VEC, lanes, head + body + lanes - VEC)
    return classes, tl.where(lanes < VEC, lanes < head, classes < n_classes)


# z --------------------------------------------------------------------------------------------------------------------


@triton.jit
def exp(x, COMPUTE: tl.constexpr):
    """exp(x); in float32 by the hardware's 2^x, to a few ulp for the small |x| that carry a sum."""
    if COMPUTE == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def adjust(logits, log_prior, scale, tau, COMPUTE: tl.constexpr):
    """z = scale * logits + tau * log_prior, by the same operations in every kernel, so that all find the same bits.

    A class at -inf stays out, whatever its logit.
    """
    z = logits.to(COMPUTE)
    if scale is not None:
        z = z * scale.to(COMPUTE)
    if log_prior is None:
        return z
    else:
        log_prior = log_prior.to(COMPUTE)
        z = tl.fma(log_prior, tau.to(COMPUTE), z)
        return tl.where(log_prior == float("-inf"), float("-inf"), z)


@triton.jit
def load_tile(pointer, bases, cols, stride_class, mask_rows, mask_cols, other: tl.constexpr):
    """Values of rows and classes, `other` outside the masks (None: all are there)."""
    # Added to the pointer in one step: the compiler keeps what it knows of `bases` and `cols` only so.
    at = pointer + (bases[:, None] + cols.to(tl.int64)[None, :] * stride_class)
    if mask_rows is None and mask_cols is None:
        return tl.load(at)
    elif mask_rows is None:
        return tl.load(at, mask_cols[None, :], other=other)
    elif mask_cols is None:
        return tl.load(at, mask_rows[:, None], other=other)
    else:
        return tl.load(at, mask_rows[:, None] & mask_cols[None, :], other=other)


@triton.jit
def load_classes(vector, first, cols, mask_cols):
    """Elements first + cols of a (C,) vector, 0 outside."""
    if mask_cols is None:
        return tl.load(vector + first + cols)
    else:
        return tl.load(vector + first + cols, mask_cols, other=0.0)


@triton.jit
def load_z(logits, vectors, bases, first, cols, mask_rows, mask_cols, stride_class, tau, COMPUTE: tl.constexpr):
    """z of a tile, -inf outside: classes first + cols of rows whose class `first` stands at `bases`."""
    values = load_tile(logits, bases, cols, stride_class, mask_rows, mask_cols, float("-inf"))
    prior = None
    scale = None
    if vectors.log_prior is not None:
        prior = load_classes(vectors.log_prior, first, cols, mask_cols)[None, :]
    if vectors.scale is not None:
        scale = load_classes(vectors.scale, first, cols, mask_cols)[None, :]
    z = adjust(values, prior, scale, tau, COMPUTE)
    if vectors.scale is not None and mask_cols is not None:
        z = tl.where(mask_cols[None, :], z, float("-inf"))  # -inf * 0
    if vectors.scale is not None and mask_rows is not None:
        z = tl.where(mask_rows[:, None], z, float("-inf"))
    return z


@triton.jit
def load_label_z(logits, vectors, starts, label, mask_rows, stride_class, tau, COMPUTE: tl.constexpr):
    """Of one class of each row: (z, the same bits as in a tile; what it stands at as the label; whether it is out)."""
    values = tl.load(logits + (starts + label * stride_class), mask_rows, other=0.0)
    prior = None
    scale = None
    if vectors.log_prior is not None:
        prior = tl.load(vectors.log_prior + label, mask_rows, other=0.0)
    if vectors.scale is not None:
        scale = tl.load(vectors.scale + label, mask_rows, other=0.0)
    z = adjust(values, prior, scale, tau, COMPUTE)
    as_label = z
    if vectors.target_offset is not None:
        as_label = adjust(values, None, scale, tau, COMPUTE)
        as_label += tl.load(vectors.target_offset + label, mask_rows, other=0.0).to(COMPUTE)
    if vectors.log_prior is None:
        return z, as_label, label < 0
    else:
        return z, as_label, prior == float("-inf")


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, right to a few ulp however small x is."""
    u = 1.0 + x
    # u rounds x away, and log(u) is the log of the rounded one: x / (u - 1) puts it right.
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def past(margin, others, COMPUTE: tl.constexpr):
    """log(1 + others * exp(margin)), however large the margin is."""
    near = margin < 40.0
    large = tl.where(near, 1.0, margin)
    return tl.where(
        near,
        log1p(others * exp(tl.where(near, margin, 0.0), COMPUTE)),
        large + tl.log(others + exp(-large, COMPUTE)),
    )
