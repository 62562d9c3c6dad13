"""What a GPU does with a tile of a head's logits: the parts of its rows, and their gradient.

A program takes CHUNK classes of one row of the tile. Forward leaves the part of each (softmax.py), and a second kernel
joins the parts to what the rows have left so far, in order, and notes what labels stand at. Backward (row.py has the
equations) writes the gradient in the dtype of the products, and then the labels' columns over it, which are known
before any tile is. Both compute z by the same operations, so that both find the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_la._tiled.blocks import Block
from fused_la._tiled.softmax import PreparedRows, SoftmaxState
from fused_la._triton import tiles
from fused_la._triton.epilogue import Row, store_gradient, tile_gradient
from fused_la._triton.launch_config import VECTOR_BYTES, cdiv, device_of, is_on_current_device
from fused_la._triton.operands import vectors_of
from fused_la._triton.softmax import exp, load_part, merge, part_of, store_part
from fused_la._triton.targets import dense_mass
from fused_la._triton.tiles import (
    NUMBERS,
    Arguments,
    Tile,
    adjust,
    float_bits,
    load_z,
    scalar,
    triton_dtype,
    whole_vectors,
)
from fused_la._triton.variants import variant

CHUNK = 2048  # classes of a program
WIDE = tl.constexpr(8)  # classes in the widest vector
THREADS = 128  # of a program that takes a chunk
JOINED_ROWS = 32  # of a program that joins parts
# Pointers that may stand anywhere: of rows, a part of a larger tensor, and of the caller's bias.
OF_ROWS = ["bias", "m", "rest", "gap", "total", "upstream", "share", "of_labels", "label_z", "as_label"]


@triton.jit
def _chunk_of_row(
    logits_step, target_outer, first_row, first, width, ALIGNED: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """(rows, tile, number of the row in its tile of logits) of a program."""
    row = tl.program_id(0).to(tl.int64)
    at = first_row + row
    rows = tiles.Rows(at, row >= 0, row * logits_step - first, at * target_outer, row * logits_step - first, first, 0)
    if ALIGNED:
        width = whole_vectors(width, WIDE)
    start = tl.program_id(1) * CHUNK
    cols = start + tl.arange(0, CHUNK)
    return rows, Tile(first, start, cols, cols < width, start), row


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=OF_ROWS)
def _parts_kernel(
    # in
    logits, bias, vectors,
    # out
    parts,
    # strides
    logits_step: tl.int64, target_outer: tl.int64, target_class: tl.int64,
    # sizes
    first_row: tl.int64, first: tl.int32, width: tl.int32, n_classes: tl.int32, n_rows: tl.int64,
    # scalars
    tau_bits: tl.int64, smoothing_bits: tl.int64,
    # constants
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows of the tile are whole vectors, as far apart as they are wide
    VEC: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The part of each row and chunk of a tile, (4, n_chunks, n)."""
    HAS_MASS: tl.constexpr = HAS_SMOOTHING or N_LABELS == 0
    call = Arguments(
        logits, bias, vectors, n_classes, 1, target_class, scalar(tau_bits, COMPUTE),
        scalar(smoothing_bits, COMPUTE) if HAS_SMOOTHING else None, None, None if N_LABELS == 0 else N_LABELS, None,
    )  # fmt: skip
    rows, tile, row = _chunk_of_row(logits_step, target_outer, first_row, first, width, ALIGNED, CHUNK)
    z = load_z(call, rows, tile, rows.there, VEC if ALIGNED else 1)
    part = part_of(z, dense_mass(call, rows, tile, 1) if HAS_MASS else None, VEC, HAS_MASS)
    step = tl.num_programs(1) * n_rows
    store_part(parts + (tl.program_id(1) * n_rows + row), step, part, rows.there)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=OF_ROWS)
def _join_kernel(
    # in
    parts, logits, bias, vectors,
    # in and out
    m, rest, gap, total,
    # out
    label_z, z_as_label,
    # strides
    logits_step: tl.int64,
    # sizes
    first_row: tl.int64, first: tl.int32, width: tl.int32, n_rows: tl.int64, n_chunks: tl.int32,
    # scalars
    tau_bits: tl.int64, ignore_index: tl.int64,
    # constants
    N_LABELS: tl.constexpr, HAS_MASS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Join a tile's parts to those of the rows, and note what the labels in the tile stand at."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    there = rows < n_rows
    at = first_row + rows
    row = (tl.load(m + at, there), tl.load(rest + at, there), tl.load(gap + at, there), tl.load(total + at, there))
    for chunk in range(0, n_chunks):
        row = merge(row, load_part(parts + (chunk * n_rows + rows), n_chunks * n_rows, there), HAS_MASS)
    tl.store(m + at, row[0], there)
    tl.store(rest + at, row[1], there)
    tl.store(gap + at, row[2], there)
    tl.store(total + at, row[3], there)
    if N_LABELS > 0:
        tau = scalar(tau_bits, COMPUTE)
        for k in range(N_LABELS):
            label = tl.load(vectors.target + at * N_LABELS + k, there, other=ignore_index)
            here = there & (label != ignore_index) & (label >= first) & (label < first + width)
            label = tl.where(here, label, first)
            value = tl.load(logits + rows.to(tl.int64) * logits_step + (label - first), here, other=0.0).to(COMPUTE)
            if bias is not None:
                value += tl.load(bias + label).to(COMPUTE)
            prior, scale = None, None
            if vectors.log_prior is not None:
                prior = tl.load(vectors.log_prior + label)
            if vectors.scale is not None:
                scale = tl.load(vectors.scale + label)
            tl.store(label_z + at * N_LABELS + k, adjust(value, prior, scale, True, tau), here)
            if vectors.target_offset is not None:
                own = adjust(value, None, scale, True, tau) + tl.load(vectors.target_offset + label).to(COMPUTE)
                tl.store(z_as_label + at * N_LABELS + k, own, here)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=OF_ROWS)
def _gradient_kernel(
    # in
    logits, bias, vectors, m, rest, total, upstream, share, of_labels,
    # out
    grad,
    # strides
    logits_step: tl.int64, target_outer: tl.int64, target_class: tl.int64,
    # sizes
    first_row: tl.int64, first: tl.int32, width: tl.int32, n_classes: tl.int32,
    # scalars
    tau_bits: tl.int64, smoothing_bits: tl.int64, ignore_index: tl.int64,
    # constants
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr, VEC: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradient of z of each row and chunk of a tile."""
    call = Arguments(
        logits, bias, vectors, n_classes, 1, target_class, scalar(tau_bits, COMPUTE),
        scalar(smoothing_bits, COMPUTE) if HAS_SMOOTHING else None, None, None if N_LABELS == 0 else N_LABELS, None,
    )  # fmt: skip
    rows, tile, _ = _chunk_of_row(logits_step, target_outer, first_row, first, width, ALIGNED, CHUNK)
    at = rows.rows
    m_row, rest_row = tl.load(m + at), tl.load(rest + at)
    share_row, live = tl.full((), 1.0, COMPUTE), rows.there
    if share is not None:
        share_row = tl.load(share + at)
        live = share_row == share_row  # NaN marks a row that does not count
    row = Row(m_row, rest_row, 1.0 / (1.0 + rest_row), tl.load(total + at), share_row, live, tl.load(upstream + at))
    z = load_z(call, rows, tile, live, VEC if ALIGNED else 1)
    of_z = tile_gradient(call, rows, row, tile, z, exp(z - m_row), 1)
    store_gradient(grad, rows, tile, 1, of_z, None, WIDE if ALIGNED else 1)
    if N_LABELS > 0:
        tl.debug_barrier()  # the labels' columns are written after, and over, what other threads wrote there
        for k in range(N_LABELS):
            label = tl.load(vectors.target + at * N_LABELS + k)
            col = label - first
            here = (label != ignore_index) & (col >= tile.start) & (col < tl.minimum(tile.start + CHUNK, width))
            value = tl.load(of_labels + at * N_LABELS + k)
            tl.store(grad + (rows.gradient + label), value.to(grad.dtype.element_ty), here)


class Epilogue:
    def __init__(self, rows: PreparedRows, n_elements: int, bias: Tensor | None, product_dtype: torch.dtype):
        problem = rows.problem
        self._rows, self._bias, self._product_dtype = rows, bias, product_dtype
        self._n_elements = n_elements
        self._vectors = vectors_of(problem)
        types = tuple([None if vector is None else vector.dtype for vector in self._vectors])
        self._n_labels = 0 if problem.has_probabilities else problem.n_labels
        self._has_smoothing, self._compute = problem.label_smoothing > 0.0, triton_dtype(problem.compute_dtype)
        self._target_strides = problem.target.stride(0), problem.target.stride(-1)
        self._tau, self._smoothing = float_bits(problem.tau), float_bits(problem.label_smoothing)
        self._device = problem.logits.get_device()
        self._num_warps = THREADS // device_of(self._device).warp_size
        target_is_aligned = problem.target.data_ptr() % VECTOR_BYTES == 0
        self._types = types, None if bias is None else bias.dtype, product_dtype, target_is_aligned

    def update(self, block: Block, chunk: slice, logits: Tensor, state: SoftmaxState) -> None:
        """Merge a tile into the rows' state, and record z of the labels."""
        if not is_on_current_device(logits):
            with torch.cuda.device(logits.device):
                return self.update(block, chunk, logits, state)
        rows, problem = self._rows, self._rows.problem
        n_rows, width = logits.shape
        n_chunks, step = cdiv(width, CHUNK), logits.stride(0)
        parts = logits.new_empty(4 * n_chunks * n_rows)
        vec = VECTOR_BYTES // logits.element_size()
        constants = (
            self._n_labels, self._has_smoothing, self._compute, _is_aligned(step, width), vec, CHUNK,
        )  # fmt: skip
        variant(_parts_kernel, self._device, self._types, constants, self._num_warps).launch(
            (n_rows, n_chunks, 1), logits, self._bias, self._vectors, parts,
            step, *self._target_strides,
            block[0].start, chunk.start, width, problem.logits.shape[-1], n_rows,
            self._tau, self._smoothing,
        )  # fmt: skip
        has_mass = self._has_smoothing or self._n_labels == 0
        types = self._types, rows.z_as_label is None
        constants = self._n_labels, has_mass, self._compute, JOINED_ROWS
        variant(_join_kernel, self._device, types, constants).launch(
            (cdiv(n_rows, JOINED_ROWS), 1, 1), parts, logits, self._bias, self._vectors,
            state.m, state.rest, state.gap, state.total, rows.candidates.z, rows.z_as_label,
            step,
            block[0].start, chunk.start, width, n_rows, n_chunks,
            self._tau, problem.ignore_index,
        )  # fmt: skip

    def gradient_of(
        self, state: SoftmaxState, upstream: Tensor, of_candidates: Tensor
    ) -> Callable[[Block, slice, Tensor], Tensor]:
        """A function that turns a tile of logits into the gradient of its z, labels included."""
        rows, problem = self._rows, self._rows.problem
        upstream, of_candidates = upstream.contiguous(), of_candidates.contiguous()
        share = None
        if rows.labels is not None:
            share = rows.labels.share.masked_fill(~rows.labels.live, torch.nan)
        buffer = upstream.new_empty(self._n_elements, dtype=self._product_dtype)

        def gradient(block: Block, chunk: slice, logits: Tensor) -> Tensor:
            if not is_on_current_device(logits):
                with torch.cuda.device(logits.device):
                    return gradient(block, chunk, logits)
            n_rows, width = logits.shape
            step, grad = logits.stride(0), buffer.as_strided(logits.shape, logits.stride())
            constants = (
                self._n_labels, self._has_smoothing, self._compute, _is_aligned(step, width),
                VECTOR_BYTES // logits.element_size(), CHUNK,
            )  # fmt: skip
            variant(_gradient_kernel, self._device, self._types, constants, self._num_warps).launch(
                (n_rows, cdiv(width, CHUNK), 1),
                logits, self._bias, self._vectors, state.m, state.rest, state.total, upstream, share, of_candidates,
                grad,
                step, *self._target_strides,
                block[0].start, chunk.start, width, problem.logits.shape[-1],
                self._tau, self._smoothing, problem.ignore_index,
            )  # fmt: skip
            return grad

        return gradient


def _is_aligned(step: int, width: int) -> bool:
    return step % WIDE.value == 0 and width % WIDE.value == 0
