"""Where the rows and classes of a program lie in memory, and z: device functions that the kernels share.

A program has one row, whose numbers are scalars, or BLOCK_ROWS rows, whose numbers are (BLOCK_ROWS,). A tile is some
classes of them: (N,) of one row, (BLOCK_ROWS, N) of several. Arithmetic is in the dtype of `Arguments.tau`: float32, or
float64 for float64 logits.

A row of classes that are neighbours in memory is cut at 16-byte boundaries, whatever its length and the step to the
next row: `head` classes before the first boundary, a body of whole vectors of VEC classes, and a tail. The body is read
and written 16 bytes a thread; head and tail together are one tile of 2 * VEC classes, the edges. The rows of a program
lie alike towards the boundaries, so that they share one head.
"""

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


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
    "period", "splits", "shift", "scratch", "table_step", "loss_parts", "for_one", "first_row", "first", "width",
    "tau_bits", "smoothing_bits", "ignore_index",
]  # fmt: skip


class Arguments(NamedTuple):
    """What a launch is asked for, handed from one device function to the next."""

    logits: Any
    bias: Any  # (C,) to add to the logits, of a head
    vectors: Any
    n_classes: Any
    logits_class: Any  # strides
    target_class: Any
    tau: Any
    smoothing: Any  # None where there is none
    ignore_index: Any
    n_labels: Any  # None: class probabilities
    target_alike: Any  # None unless probabilities lie towards 16-byte boundaries as the logits do


class Rows(NamedTuple):
    """Which rows a program has, where they begin, and where they are cut."""

    rows: Any
    there: Any  # one that is not there is read as the first, and never stored
    logits: Any
    target: Any
    gradient: Any
    head: Any
    body: Any


class Tile(NamedTuple):
    """Classes first + cols of the rows of a program."""

    first: Any
    start: Any  # the lowest of cols
    cols: Any  # (N,)
    mask: Any  # (N,), those that there are
    taken: Any  # cols below it are in the tile before as well


@functools.lru_cache(maxsize=1024)
def float_bits(value: float) -> int:
    """A Python float as an int64, for `scalar` to undo on the device, whose float arguments are float32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def scalar(bits, COMPUTE: tl.constexpr):
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)


# Shapes ---------------------------------------------------------------------------------------------------------------


@triton.jit
def across(of_rows):
    """Numbers of rows, to meet those of a tile."""
    if len(of_rows.shape) == 0:
        return of_rows
    else:
        return of_rows[:, None]


@triton.jit
def along(of_classes, rows):
    """Numbers of classes, to meet those of a tile of these rows."""
    if len(rows.rows.shape) == 0:
        return of_classes
    else:
        return of_classes[None, :]


@triton.jit
def row_sum(tile):
    return tl.sum(tile, len(tile.shape) - 1)


@triton.jit
def row_max(tile):
    """It passes over a NaN."""
    return tl.max(tile, len(tile.shape) - 1)


# Where rows lie -------------------------------------------------------------------------------------------------------


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
    """n >= 0 rounded down to a multiple of VEC, so that the compiler knows it for one."""
    if n.dtype == tl.int64:
        return (n.to(tl.uint64) // VEC * VEC).to(tl.int64)
    else:
        return (n.to(tl.uint32) // VEC * VEC).to(tl.int32)


@triton.jit
def rows_of(
    group, period, n_rows, n_inner, n_classes, shift, logits_strides, target_strides, grad_strides,
    VEC: tl.constexpr, EDGES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """The rows of a group, `period` apart, so that they lie alike."""
    if BLOCK_ROWS == 1:
        rows = group.to(tl.int64)
        there = rows >= 0  # each group has a row
        to_read = rows
    else:
        first_row = (group // period).to(tl.int64) * (BLOCK_ROWS * period) + group % period
        rows = first_row + period * tl.arange(0, BLOCK_ROWS)
        there = rows < n_rows
        to_read = tl.where(there, rows, first_row)
    logits = shift + row_offsets(to_read, n_inner, logits_strides)
    head = 0
    if EDGES:
        start = logits
        if BLOCK_ROWS > 1:
            start = shift + row_offsets(first_row, n_inner, logits_strides)
        head = tl.minimum((-start).to(tl.int32) & (VEC - 1), n_classes)
    return Rows(
        rows, there, logits, row_offsets(to_read, n_inner, target_strides),
        shift + row_offsets(to_read, n_inner, grad_strides), head, whole_vectors(n_classes - head, VEC),
    )  # fmt: skip


@triton.jit
def masked_tile(rows, start, BLOCK_C: tl.constexpr):
    """BLOCK_C classes of the body from its class `start` on."""
    cols = start + tl.arange(0, BLOCK_C)
    return Tile(rows.head, start, cols, cols < rows.body, start)


@triton.jit
def whole_tile(rows, start, VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """The same where the body has BLOCK_C classes at least. A tile that would pass its end begins earlier, and takes
    classes of the one before once more: no such tile needs a mask."""
    cols = whole_vectors(tl.minimum(start, rows.body - BLOCK_C), VEC)
    return Tile(rows.head, cols, cols + tl.arange(0, BLOCK_C), tl.full((BLOCK_C,), True, tl.int1), start)


@triton.jit
def edge_tile(rows, n_classes, VEC: tl.constexpr):
    """The classes before and behind the body."""
    lanes = tl.arange(0, 2 * VEC)
    classes = tl.where(lanes < VEC, lanes, rows.head + rows.body + lanes - VEC)
    return Tile(0, 0, classes, tl.where(lanes < VEC, lanes < rows.head, classes < n_classes), 0)


@triton.jit
def places(starts, tile, stride_class, VEC: tl.constexpr):
    """Where the classes of a tile stand in rows that begin at `starts`; VEC of them begin on a 16-byte boundary."""
    bases = starts + tile.first * stride_class
    if VEC > 1:
        bases = whole_vectors(bases, VEC)
    return across(bases) + tile.cols.to(tl.int64) * stride_class


@triton.jit
def load_tile(pointer, at, tile, rows, other: tl.constexpr):
    # Added to the pointer in one step: the compiler keeps what it knows of `at` only so.
    return tl.load(pointer + at, along(tile.mask, rows), other=other)


@triton.jit
def load_classes(vector, tile):
    """(N,) of a (C,) vector, 0 outside."""
    return tl.load(vector + tile.first + tile.cols, tile.mask, other=0.0)


# z --------------------------------------------------------------------------------------------------------------------


@triton.jit
def highest(COMPUTE: tl.constexpr):
    return 1.7976931348623157e308 if COMPUTE == tl.float64 else 3.4028234663852886e38


@triton.jit
def adjust(logits, log_prior, scale, live, tau):
    """z = scale * logits + tau * log_prior, by the same operations in every kernel, so that all find the same bits.

    A class at -inf stays out, whatever its logit, and so does every class of a row that is not live. Of half precision
    a logit of inf or NaN counts as the highest float, which no other reaches: -inf and that is -inf.
    """
    if logits.dtype == tl.bfloat16:
        z = (logits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        z = logits.to(tau.dtype)
    if scale is not None:
        z = z * scale.to(tau.dtype)
    if logits.dtype.primitive_bitwidth == 16:
        z = tl.minimum(z, tl.where(live, highest(tau.dtype), float("-inf")))
        return z if log_prior is None else tl.fma(log_prior.to(tau.dtype), tau, z)
    elif log_prior is None:
        return tl.where(live, z, float("-inf"))
    else:
        log_prior = log_prior.to(tau.dtype)
        is_out = log_prior <= tl.where(live, float("-inf"), float("inf"))
        return tl.where(is_out, float("-inf"), tl.fma(log_prior, tau, z))


@triton.jit
def load_logits(call, rows, tile, VEC: tl.constexpr):
    return load_tile(call.logits, places(rows.logits, tile, call.logits_class, VEC), tile, rows, float("-inf"))


@triton.jit
def z_of(call, rows, tile, logits, log_prior, live):
    """z of a tile, -inf outside; `log_prior` is its own, None where it is to be loaded."""
    if call.bias is not None:
        logits = logits.to(call.tau.dtype) + along(load_classes(call.bias, tile).to(call.tau.dtype), rows)
    if log_prior is None and call.vectors.log_prior is not None:
        log_prior = load_classes(call.vectors.log_prior, tile)
    if log_prior is not None:
        log_prior = along(log_prior, rows)
    scale = None
    if call.vectors.scale is not None:
        scale = along(load_classes(call.vectors.scale, tile), rows)
    z = adjust(logits, log_prior, scale, across(live), call.tau)
    if call.vectors.scale is not None:
        z = tl.where(along(tile.mask, rows), z, float("-inf"))  # -inf * 0
    return z


@triton.jit
def load_z(call, rows, tile, live, VEC: tl.constexpr):
    return z_of(call, rows, tile, load_logits(call, rows, tile, VEC), None, live)
