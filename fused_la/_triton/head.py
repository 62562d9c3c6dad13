"""Epilogue kernels for a tile of a head's logits: the softmax state of its rows, and their gradient.

A program takes BLOCK_C classes of one row of the tile. Forward stores the partial state of each block (softmax.py). A
second kernel merges these into the state of the rows, in order, and stores z of the labels in the tile. Backward
(epilogue.py has the equations) writes the gradient in the dtype of the products, and then overwrites the labels'
columns, whose gradient is known before any tile is computed. Both compute z by the same operations, so that both have
the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_la._tiled.blocks import Block, TileGradient
from fused_la._tiled.softmax import PreparedRows, SoftmaxState
from fused_la._triton import tiles
from fused_la._triton.epilogue import GradientInputs, store_gradient, tile_gradient
from fused_la._triton.launch_config import VECTOR_BYTES, cdiv, device_of, is_on_current_device
from fused_la._triton.operands import aligned_vectors
from fused_la._triton.softmax import exp, load_state, merge, store_state, tile_state
from fused_la._triton.targets import dense_mass
from fused_la._triton.tiles import (
    NUMBERS,
    Arguments,
    Tile,
    adjust,
    float_bits,
    from_bits,
    load_prior_of_label,
    load_z,
    triton_dtype,
    whole_vectors,
)
from fused_la._triton.variants import variant

BLOCK_C = 2048  # classes of a program
MAX_VEC = tl.constexpr(8)  # classes in the widest vector
BLOCK_THREADS = 128  # threads of a program that takes a block
ROWS_PER_MERGE = 32  # rows of a program that merges partial states
# Pointers of any alignment: to values of rows, which may be part of a larger tensor, and to the caller's bias.
UNALIGNED = ["bias", "m", "rest", "gap", "total", "upstream", "share", "label_grads", "label_z", "z_as_label"]


@triton.jit
def _block_of_row(
    stride, target_outer, first_row, first_class, width, n_classes, n_priors, vectors,
    ALIGNED: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """(rows, tile, index of the row in its tile of logits) of a program."""
    row = tl.program_id(0).to(tl.int64)
    index = first_row + row
    rows = tiles.RowGroup(
        index, row >= 0, row * stride - first_class, index * target_outer,
        row * stride - first_class, first_class, 0,
        tiles.load_row_operands(vectors, index, row >= 0, n_classes, n_priors, COMPUTE),
    )  # fmt: skip
    if ALIGNED:
        width = whole_vectors(width, MAX_VEC)
    start = tl.program_id(1) * BLOCK_C
    cols = start + tl.arange(0, BLOCK_C)
    return rows, Tile(first_class, start, cols, cols < width, start), row


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=UNALIGNED)
def _tile_state_kernel(
    # in
    logits, bias, vectors,
    # out
    partials,
    # strides
    logits_row_stride: tl.int64, target_outer: tl.int64, target_class: tl.int64,
    # sizes
    first_row: tl.int64, first_class: tl.int32, width: tl.int32, n_classes: tl.int32, n_priors: tl.int32,
    n_rows: tl.int64,
    # scalars
    tau_bits: tl.int64, smoothing_bits: tl.int64,
    # constants
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows of the tile are whole vectors, and so is their stride
    VEC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the state of each row and block of a tile, (4, n_blocks, n_rows)."""
    HAS_MASS: tl.constexpr = HAS_SMOOTHING or N_LABELS == 0
    args = Arguments(
        logits, bias, vectors, n_classes, 1, target_class, from_bits(tau_bits, COMPUTE),
        from_bits(smoothing_bits, COMPUTE) if HAS_SMOOTHING else None, None, None if N_LABELS == 0 else N_LABELS, None,
    )  # fmt: skip
    rows, tile, row = _block_of_row(
        logits_row_stride, target_outer, first_row, first_class, width, n_classes, n_priors, vectors,
        ALIGNED, BLOCK_C, COMPUTE,
    )  # fmt: skip
    z = load_z(args, rows, tile, rows.in_bounds, VEC if ALIGNED else 1)
    state = tile_state(z, dense_mass(args, rows, tile, 1) if HAS_MASS else None, VEC, HAS_MASS)
    stride = tl.num_programs(1) * n_rows
    store_state(partials + (tl.program_id(1) * n_rows + row), stride, state, rows.in_bounds)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=UNALIGNED)
def _merge_kernel(
    # in
    partials, logits, bias, vectors,
    # in and out
    m, rest, gap, total,
    # out
    label_z, z_as_label,
    # strides
    logits_row_stride: tl.int64,
    # sizes
    first_row: tl.int64, first_class: tl.int32, width: tl.int32, n_classes: tl.int32, n_priors: tl.int32,
    n_rows: tl.int64, n_blocks: tl.int32,
    # scalars
    tau_bits: tl.int64, ignore_index: tl.int64,
    # constants
    N_LABELS: tl.constexpr, HAS_MASS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Merge a tile's partial states into the state of the rows, and store z of the labels in the tile."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_bounds = rows < n_rows
    index = first_row + rows
    state = (
        tl.load(m + index, in_bounds), tl.load(rest + index, in_bounds), tl.load(gap + index, in_bounds),
        tl.load(total + index, in_bounds),
    )  # fmt: skip
    for block in range(0, n_blocks):
        partial = load_state(partials + (block * n_rows + rows), n_blocks * n_rows, in_bounds)
        state = merge(state, partial, HAS_MASS)
    tl.store(m + index, state[0], in_bounds)
    tl.store(rest + index, state[1], in_bounds)
    tl.store(gap + index, state[2], in_bounds)
    tl.store(total + index, state[3], in_bounds)
    if N_LABELS > 0:
        tau = from_bits(tau_bits, COMPUTE)
        operands = tiles.load_row_operands(vectors, index, in_bounds, n_classes, n_priors, COMPUTE)
        rows_of_tile = tiles.RowGroup(index, in_bounds, None, None, None, None, None, operands)
        args = Arguments(None, None, vectors, n_classes, None, None, tau, None, None, None, None)
        for k in range(N_LABELS):
            label = tl.load(vectors.target + index * N_LABELS + k, in_bounds, other=ignore_index)
            in_tile = in_bounds & (label != ignore_index) & (label >= first_class) & (label < first_class + width)
            label = tl.where(in_tile, label, first_class)
            pointers = logits + rows.to(tl.int64) * logits_row_stride + (label - first_class)
            logit = tl.load(pointers, in_tile, other=0.0).to(COMPUTE)
            if bias is not None:
                logit += tl.load(bias + label).to(COMPUTE)
            prior, scale, row_scale = None, None, None
            if vectors.log_prior is not None:
                prior = load_prior_of_label(args, vectors.log_prior, rows_of_tile, label)
            if vectors.scale is not None:
                scale = tl.load(vectors.scale + label)
            if vectors.label_scale is not None:
                row_scale = operands.scale
            tl.store(label_z + index * N_LABELS + k, adjust(logit, prior, scale, row_scale, True, tau), in_tile)
            if vectors.target_offset is not None:
                value = adjust(logit, None, scale, row_scale, True, tau) + tl.load(vectors.target_offset + label).to(
                    COMPUTE
                )
                tl.store(z_as_label + index * N_LABELS + k, value, in_tile)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=UNALIGNED)
def _tile_gradient_kernel(
    # in
    logits, bias, vectors, m, rest, total, upstream, share, label_grads,
    # out
    grad,
    # strides
    logits_row_stride: tl.int64, target_outer: tl.int64, target_class: tl.int64,
    # sizes
    first_row: tl.int64, first_class: tl.int32, width: tl.int32, n_classes: tl.int32, n_priors: tl.int32,
    # scalars
    tau_bits: tl.int64, smoothing_bits: tl.int64, ignore_index: tl.int64,
    # constants
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr, VEC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the gradient of z of each row and block of a tile."""
    args = Arguments(
        logits, bias, vectors, n_classes, 1, target_class, from_bits(tau_bits, COMPUTE),
        from_bits(smoothing_bits, COMPUTE) if HAS_SMOOTHING else None, None, None if N_LABELS == 0 else N_LABELS, None,
    )  # fmt: skip
    rows, tile, _ = _block_of_row(
        logits_row_stride, target_outer, first_row, first_class, width, n_classes, n_priors, vectors,
        ALIGNED, BLOCK_C, COMPUTE,
    )  # fmt: skip
    index = rows.index
    m_row, rest_row = tl.load(m + index), tl.load(rest + index)
    share_row, live = tl.full((), 1.0, COMPUTE), rows.in_bounds
    if share is not None:
        share_row = tl.load(share + index)
        live = share_row == share_row  # NaN marks a row that does not count
    total_row, g = tl.load(total + index), tl.load(upstream + index)
    state = GradientInputs(m_row, rest_row, 1.0 / (1.0 + rest_row), total_row, share_row, live, g)
    z = load_z(args, rows, tile, live, VEC if ALIGNED else 1)
    grad_z = tile_gradient(args, rows, state, tile, z, exp(z - m_row), 1)
    store_gradient(grad, rows, tile, 1, grad_z, MAX_VEC if ALIGNED else 1)
    if N_LABELS > 0:
        tl.debug_barrier()  # other threads stored the columns that are overwritten
        for k in range(N_LABELS):
            label = tl.load(vectors.target + index * N_LABELS + k)
            col = label - first_class
            in_block = (label != ignore_index) & (col >= tile.start) & (col < tl.minimum(tile.start + BLOCK_C, width))
            label_grad = tl.load(label_grads + index * N_LABELS + k)
            tl.store(grad + (rows.gradient_start + label), label_grad.to(grad.dtype.element_ty), in_block)


class Epilogue:
    """Launches the kernels over the tiles of logits of one head."""

    def __init__(self, rows: PreparedRows, n_elements: int, bias: Tensor | None, product_dtype: torch.dtype):
        problem = rows.problem
        self._rows, self._bias, self._product_dtype = rows, bias, product_dtype
        self._n_elements = n_elements
        self._vectors = aligned_vectors(problem)
        types = tuple([None if vector is None else vector.dtype for vector in self._vectors])
        self._n_labels = 0 if problem.has_probabilities else problem.n_labels
        self._has_smoothing, self._compute = problem.label_smoothing > 0.0, triton_dtype(problem.compute_dtype)
        self._target_strides = problem.target.stride(0), problem.target.stride(-1)
        self._tau, self._smoothing = float_bits(problem.tau), float_bits(problem.label_smoothing)
        self._device = problem.logits.get_device()
        self._num_warps = BLOCK_THREADS // device_of(self._device).warp_size
        target_is_aligned = problem.target.data_ptr() % VECTOR_BYTES == 0
        self._types = types, None if bias is None else bias.dtype, product_dtype, target_is_aligned

    def update(self, block: Block, chunk: slice, logits: Tensor, state: SoftmaxState) -> None:
        """Merge a tile into the rows' state, and record z of the labels."""
        if not is_on_current_device(logits):
            with torch.cuda.device(logits.device):
                return self.update(block, chunk, logits, state)
        rows, problem = self._rows, self._rows.problem
        n_rows, width = logits.shape
        n_blocks, row_stride = cdiv(width, BLOCK_C), logits.stride(0)
        partials = logits.new_empty(4 * n_blocks * n_rows)
        vec = VECTOR_BYTES // logits.element_size()
        constants = self._n_labels, self._has_smoothing, self._compute, _is_aligned(row_stride, width), vec, BLOCK_C
        variant(_tile_state_kernel, self._device, self._types, constants, self._num_warps).launch(
            (n_rows, n_blocks, 1), logits, self._bias, self._vectors, partials,
            row_stride, *self._target_strides,
            block[0].start, chunk.start, width, problem.logits.shape[-1], problem.n_groups, n_rows,
            self._tau, self._smoothing,
        )  # fmt: skip
        has_mass = self._has_smoothing or self._n_labels == 0
        types = self._types, rows.z_as_label is None
        constants = self._n_labels, has_mass, self._compute, ROWS_PER_MERGE
        variant(_merge_kernel, self._device, types, constants).launch(
            (cdiv(n_rows, ROWS_PER_MERGE), 1, 1), partials, logits, self._bias, self._vectors,
            state.m, state.rest, state.gap, state.total, rows.candidates.z, rows.z_as_label,
            row_stride,
            block[0].start, chunk.start, width, problem.logits.shape[-1], problem.n_groups, n_rows, n_blocks,
            self._tau, problem.ignore_index,
        )  # fmt: skip

    def gradient_of(self, state: SoftmaxState, upstream: Tensor, candidate_grads: Tensor) -> TileGradient:
        """A function that turns a tile of logits into the gradient of its z, labels included."""
        rows, problem = self._rows, self._rows.problem
        upstream, candidate_grads = upstream.contiguous(), candidate_grads.contiguous()
        share = None
        if rows.labels is not None:
            share = rows.labels.share.masked_fill(~rows.labels.live, torch.nan)
        buffer = upstream.new_empty(self._n_elements, dtype=self._product_dtype)

        def gradient(block: Block, chunk: slice, logits: Tensor) -> Tensor:
            if not is_on_current_device(logits):
                with torch.cuda.device(logits.device):
                    return gradient(block, chunk, logits)
            n_rows, width = logits.shape
            row_stride, grad = logits.stride(0), buffer.as_strided(logits.shape, logits.stride())
            constants = (
                self._n_labels, self._has_smoothing, self._compute, _is_aligned(row_stride, width),
                VECTOR_BYTES // logits.element_size(), BLOCK_C,
            )  # fmt: skip
            variant(_tile_gradient_kernel, self._device, self._types, constants, self._num_warps).launch(
                (n_rows, cdiv(width, BLOCK_C), 1),
                logits, self._bias, self._vectors, state.m, state.rest, state.total, upstream, share, candidate_grads,
                grad,
                row_stride, *self._target_strides,
                block[0].start, chunk.start, width, problem.logits.shape[-1], problem.n_groups,
                self._tau, self._smoothing, problem.ignore_index,
            )  # fmt: skip
            return grad

        return gradient


def _is_aligned(row_stride: int, width: int) -> bool:
    """Whether the rows of a tile start and end on boundaries of the widest vector."""
    return row_stride % MAX_VEC.value == 0 and width % MAX_VEC.value == 0
