"""Device functions that the kernels share: rows, tiles of classes, their offsets in memory, and the adjusted logits z.

A program computes one row, whose values are scalars, or BLOCK_ROWS rows, whose values are (BLOCK_ROWS,). A tile is some
classes of these rows: (N,) for one row, (BLOCK_ROWS, N) for several. Arithmetic is in the dtype of `Arguments.tau`:
float32, or float64 for float64 logits.

If the classes of a row are adjacent in memory, the row is cut at 16-byte boundaries, whatever its length and stride:
`prefix` classes before the first boundary, a body of whole vectors of VEC classes, and a tail. The body is read and
written 16 bytes a thread; prefix and tail are one tile of 2 * VEC classes, the edges. All rows of a program have the
same misalignment, so that they share one prefix.
"""

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Vectors(NamedTuple):
    """The tensor arguments of a kernel other than the logits; None for those that a problem does not have."""

    log_prior: Any  # (C,), or (G, C) with a prior_index
    target: Any  # (N, P, K) labels or (N, P, C) probabilities
    target_weight: Any  # (N, P, K)
    prior_index: Any  # (N, P)
    weight: Any  # (C,)
    mean_weight: Any  # (C,)
    smoothing_distribution: Any  # like log_prior
    target_offset: Any  # (C,)
    scale: Any  # (C,)
    label_scale: Any  # (C,)


# Kernel parameters that are numbers. None is specialised, and all but n_inner state their type, so that one compiled
# kernel serves every value. (Triton would make a constant of each 1, and mark multiples of 16.)
NUMBERS = [
    "logits_outer", "logits_inner", "logits_class", "target_outer", "target_inner", "target_class",
    "grad_outer", "grad_inner", "grad_class", "upstream_outer", "upstream_inner", "logits_row_stride",
    "n_rows", "n_inner", "n_classes", "n_priors", "n_groups", "n_chunks", "n_blocks", "n_weight_partials",
    "rows_per_partial", "n_taus", "period", "splits", "misalignment", "scratch_start", "table_stride",
    "losses_start", "unit_gradient", "first_row", "first_class", "width", "tau_bits", "smoothing_bits",
    "ignore_index",
]  # fmt: skip


class Arguments(NamedTuple):
    """The arguments of a loss that device functions pass on to one another."""

    logits: Any
    bias: Any  # (C,) bias of a head, added to the logits
    vectors: Any
    n_classes: Any
    logits_class: Any  # strides
    target_class: Any
    tau: Any
    smoothing: Any  # None without label smoothing
    ignore_index: Any
    n_labels: Any  # None for class probabilities
    same_alignment: Any  # None unless class probabilities have the misalignment of the logits in every row


class RowOperands(NamedTuple):
    """What each row has of its own beside its logits and target; 0 where a problem does not have it."""

    prior_start: Any  # where its prior starts in log_prior and smoothing_distribution
    has_prior: Any  # its prior_index is in range
    scale: Any  # of its logits: the label_scale of its label


class RowGroup(NamedTuple):
    """The rows of a program: their numbers, the offsets where they start, and the sizes of prefix and body."""

    index: Any
    in_bounds: Any  # a row out of bounds is read as the first one, and never stored
    logits_start: Any
    target_start: Any
    gradient_start: Any
    prefix: Any  # classes before the first 16-byte boundary
    body: Any  # classes in whole vectors
    operands: Any


class Tile(NamedTuple):
    """The classes first_class + cols of the rows of a program."""

    first_class: Any
    start: Any  # the lowest of cols
    cols: Any  # (N,)
    mask: Any  # (N,) in bounds
    first_new: Any  # cols below it are in the previous tile too


@functools.lru_cache(maxsize=1024)
def float_bits(value: float) -> int:
    """The bits of a Python float as an int64, for `from_bits`: a kernel's float arguments would be float32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def from_bits(bits, COMPUTE: tl.constexpr):
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)


# Shapes ---------------------------------------------------------------------------------------------------------------


@triton.jit
def per_row(values):
    """Values of rows, in a shape that broadcasts to a tile."""
    if len(values.shape) == 0:
        return values
    else:
        return values[:, None]


@triton.jit
def per_class(values, rows):
    """Values of classes, in a shape that broadcasts to a tile of these rows."""
    if len(rows.index.shape) == 0:
        return values
    else:
        return values[None, :]


@triton.jit
def row_sum(tile):
    return tl.sum(tile, len(tile.shape) - 1)


@triton.jit
def row_max(tile):
    """The maximum of each row; NaN is ignored."""
    return tl.max(tile, len(tile.shape) - 1)


# Rows and tiles -------------------------------------------------------------------------------------------------------


@triton.jit
def row_offsets(rows, n_inner, strides):
    """The offset of each of the (N, P) rows, in 64 bits: N * C may exceed 2^31. n_inner is P, None if P is 1."""
    rows = rows.to(tl.int64)
    if n_inner is None:
        return rows * strides[0]
    else:
        outer = rows // n_inner
        return outer * strides[0] + (rows - outer * n_inner) * strides[1]


@triton.jit
def whole_vectors(n, VEC: tl.constexpr):
    """n >= 0 rounded down to a multiple of VEC, in a form in which the compiler sees that it is a multiple."""
    if n.dtype == tl.int64:
        return (n.to(tl.uint64) // VEC * VEC).to(tl.int64)
    else:
        return (n.to(tl.uint32) // VEC * VEC).to(tl.int32)


@triton.jit
def load_row_operands(vectors, index, in_bounds, n_classes, n_priors, COMPUTE: tl.constexpr):
    """The `RowOperands` of rows. An index or a label out of range is read as 0."""
    prior_start, has_prior, scale = 0, 0, 0  # not None: Triton 3.6 returns no tuple with one
    if vectors.prior_index is not None:
        prior = tl.load(vectors.prior_index + index, in_bounds, other=0)
        has_prior = prior.to(tl.uint64) < n_priors.to(tl.uint64)
        prior_start = tl.where(has_prior, prior, 0) * n_classes
    if vectors.label_scale is not None:
        label = tl.load(vectors.target + index, in_bounds, other=0)
        label = tl.where(label.to(tl.uint64) < n_classes.to(tl.uint64), label, 0)
        scale = tl.load(vectors.label_scale + label).to(COMPUTE)
    return RowOperands(prior_start, has_prior, scale)


@triton.jit
def rows_of_group(
    group, period, n_rows, n_inner, n_classes, n_priors, misalignment, logits_strides, target_strides, grad_strides,
    vectors, VEC: tl.constexpr, EDGES: tl.constexpr, BLOCK_ROWS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The rows of a group. They are `period` apart, so that all have the same misalignment."""
    if BLOCK_ROWS == 1:
        rows = group.to(tl.int64)
        in_bounds = rows >= 0  # each group has a row
        safe_rows = rows
    else:
        first_row = (group // period).to(tl.int64) * (BLOCK_ROWS * period) + group % period
        rows = first_row + period * tl.arange(0, BLOCK_ROWS)
        in_bounds = rows < n_rows
        safe_rows = tl.where(in_bounds, rows, first_row)
    logits_start = misalignment + row_offsets(safe_rows, n_inner, logits_strides)
    prefix = 0
    if EDGES:
        start = logits_start
        if BLOCK_ROWS > 1:
            start = misalignment + row_offsets(first_row, n_inner, logits_strides)
        prefix = tl.minimum((-start).to(tl.int32) & (VEC - 1), n_classes)
    return RowGroup(
        rows, in_bounds, logits_start, row_offsets(safe_rows, n_inner, target_strides),
        misalignment + row_offsets(safe_rows, n_inner, grad_strides), prefix, whole_vectors(n_classes - prefix, VEC),
        load_row_operands(vectors, rows, in_bounds, n_classes, n_priors, COMPUTE),
    )  # fmt: skip


@triton.jit
def masked_tile(rows, start, BLOCK_C: tl.constexpr):
    """BLOCK_C classes of the body, from column `start` on."""
    cols = start + tl.arange(0, BLOCK_C)
    return Tile(rows.prefix, start, cols, cols < rows.body, start)


@triton.jit
def unmasked_tile(rows, start, VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """`masked_tile` without a mask, for a body of at least BLOCK_C classes. A tile that would end beyond the body
    starts earlier and repeats classes of the previous tile."""
    cols = whole_vectors(tl.minimum(start, rows.body - BLOCK_C), VEC)
    return Tile(rows.prefix, cols, cols + tl.arange(0, BLOCK_C), tl.full((BLOCK_C,), True, tl.int1), start)


@triton.jit
def edge_tile(rows, n_classes, VEC: tl.constexpr):
    """The classes before and after the body."""
    lanes = tl.arange(0, 2 * VEC)
    classes = tl.where(lanes < VEC, lanes, rows.prefix + rows.body + lanes - VEC)
    return Tile(0, 0, classes, tl.where(lanes < VEC, lanes < rows.prefix, classes < n_classes), 0)


@triton.jit
def tile_offsets(starts, tile, stride_class, VEC: tl.constexpr):
    """Offsets of a tile's classes in rows that start at `starts`; every VEC of them start on a 16-byte boundary."""
    bases = starts + tile.first_class * stride_class
    if VEC > 1:
        bases = whole_vectors(bases, VEC)
    return per_row(bases) + tile.cols.to(tl.int64) * stride_class


@triton.jit
def load_tile(pointer, offsets, tile, rows, other: tl.constexpr):
    # Added to the pointer in one step: otherwise the compiler forgets the alignment of `offsets`.
    return tl.load(pointer + offsets, per_class(tile.mask, rows), other=other)


@triton.jit
def load_classes(vector, tile):
    """The values of a (C,) vector at the classes of a tile, (N,); 0 out of bounds."""
    return tl.load(vector + tile.first_class + tile.cols, tile.mask, other=0.0)


@triton.jit
def load_prior(args, vector, rows, tile):
    """The values of log_prior or smoothing_distribution at the classes of a tile; 0 out of bounds."""
    if args.vectors.prior_index is None:
        return per_class(load_classes(vector, tile), rows)
    else:
        pointers = vector + per_row(rows.operands.prior_start) + per_class(tile.first_class + tile.cols, rows)
        return tl.load(pointers, per_class(tile.mask, rows), other=0.0)


@triton.jit
def load_prior_of_label(args, vector, rows, label):
    """The same at one class of each row."""
    if args.vectors.prior_index is None:
        return tl.load(vector + label, rows.in_bounds, other=0.0)
    else:
        return tl.load(vector + rows.operands.prior_start + label, rows.in_bounds, other=0.0)


# z --------------------------------------------------------------------------------------------------------------------


@triton.jit
def max_float(COMPUTE: tl.constexpr):
    return 1.7976931348623157e308 if COMPUTE == tl.float64 else 3.4028234663852886e38


@triton.jit
def adjust(logits, log_prior, scale, row_scale, live, tau):
    """z = scale * row_scale * logits + tau * log_prior, by the same operations in every kernel, so that all compute the
    same bits.

    A class at log_prior = -inf is excluded, whatever its logit, and so is every class of a row that is not live. In
    half precision a logit of inf or NaN becomes the highest float, which no other logit reaches: added to -inf it
    gives -inf.
    """
    if logits.dtype == tl.bfloat16:
        z = (logits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        z = logits.to(tau.dtype)
    if scale is not None:
        z = z * scale.to(tau.dtype)
    if row_scale is not None:
        z = z * row_scale
    if logits.dtype.primitive_bitwidth == 16:
        z = tl.minimum(z, tl.where(live, max_float(tau.dtype), float("-inf")))
        return z if log_prior is None else tl.fma(log_prior.to(tau.dtype), tau, z)
    elif log_prior is None:
        return tl.where(live, z, float("-inf"))
    else:
        log_prior = log_prior.to(tau.dtype)
        excluded = log_prior <= tl.where(live, float("-inf"), float("inf"))
        return tl.where(excluded, float("-inf"), tl.fma(log_prior, tau, z))


@triton.jit
def load_logits(args, rows, tile, VEC: tl.constexpr):
    offsets = tile_offsets(rows.logits_start, tile, args.logits_class, VEC)
    return load_tile(args.logits, offsets, tile, rows, float("-inf"))


@triton.jit
def scale_gradient(args, rows, tile, grad):
    """The gradient of the logits of a tile from that of z."""
    if args.vectors.scale is not None:
        grad = grad * per_class(load_classes(args.vectors.scale, tile).to(grad.dtype), rows)
    if args.vectors.label_scale is not None:
        grad = grad * per_row(rows.operands.scale)
    return grad


@triton.jit
def scale_label_gradient(args, rows, label, grad):
    """The same for one class of each row."""
    if args.vectors.scale is not None:
        grad = grad * tl.load(args.vectors.scale + label, rows.in_bounds, other=0.0).to(grad.dtype)
    if args.vectors.label_scale is not None:
        grad = grad * rows.operands.scale
    return grad


@triton.jit
def compute_z(args, rows, tile, logits, log_prior, live):
    """z of a tile, -inf out of bounds; `log_prior` is that of its classes, or None if it is to be loaded."""
    if args.bias is not None:
        logits = logits.to(args.tau.dtype) + per_class(load_classes(args.bias, tile).to(args.tau.dtype), rows)
    if log_prior is not None:
        log_prior = per_class(log_prior, rows)
    elif args.vectors.log_prior is not None:
        log_prior = load_prior(args, args.vectors.log_prior, rows, tile)
    scale, row_scale = None, None
    if args.vectors.scale is not None:
        scale = per_class(load_classes(args.vectors.scale, tile), rows)
    if args.vectors.label_scale is not None:
        row_scale = per_row(rows.operands.scale)
    z = adjust(logits, log_prior, scale, row_scale, per_row(live), args.tau)
    if scale is not None or row_scale is not None:
        z = tl.where(per_class(tile.mask, rows), z, float("-inf"))  # -inf * 0
    return z


@triton.jit
def load_z(args, rows, tile, live, VEC: tl.constexpr):
    return compute_z(args, rows, tile, load_logits(args, rows, tile, VEC), None, live)
