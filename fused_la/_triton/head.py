"""What a GPU does with a tile of a head's logits: the parts of its rows, and their gradient.

A program takes CHUNK classes of one row of the tile. Forward leaves the part of each (online.py), and a second kernel
joins the parts to what the rows have left so far, in order, and notes what labels stand at. Backward (gradient.py has
the equations) writes the gradient in the dtype of the products, and then the labels' columns over it, which are known
before any tile is. Both compute z by the same operations, so that both find the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_la._blocks import Block
from fused_la._rows import Part, Rows, State
from fused_la._triton.gradient import full_form
from fused_la._triton.launch import AS_WRITTEN, VECTOR_BYTES, device_of, on_device_of
from fused_la._triton.online import absorb, across_lanes, empty, join
from fused_la._triton.targets import dense_mass
from fused_la._triton.tiles import Vectors, adjust, exp, float_bits, load_classes, load_tile, scalar, triton_dtype

CHUNK = 4096  # classes of a program
BLOCK_C = 1024
THREADS = 128  # of a program that takes a chunk: 8 classes each, so that half precision is written 16 bytes at a time
JOINED_ROWS = 32  # of a program that joins parts


@triton.jit
def _load_z(logits, bias, vectors, base, first, cols, mask_rows, mask_cols, tau, COMPUTE: tl.constexpr):
    """(logits + bias, z) of classes first + cols of a row whose class `first` stands at `base`, -inf outside."""
    values = load_tile(logits, base, cols, 1, mask_rows, mask_cols, float("-inf")).to(COMPUTE)
    if bias is not None:
        values += load_classes(bias, first, cols, mask_cols).to(COMPUTE)[None, :]
    prior = None
    scale = None
    if vectors.log_prior is not None:
        prior = load_classes(vectors.log_prior, first, cols, mask_cols)[None, :]
    if vectors.scale is not None:
        scale = load_classes(vectors.scale, first, cols, mask_cols)[None, :]
    z = adjust(values, prior, scale, tau, COMPUTE)
    if vectors.scale is not None:  # -inf * 0
        z = tl.where(mask_cols[None, :], z, float("-inf"))
        if mask_rows is not None:
            z = tl.where(mask_rows[:, None], z, float("-inf"))
    return z


@triton.jit(do_not_specialize=["first", "tau_bits", "smoothing_bits"])
def _parts_kernel(
    # in
    logits, bias, vectors,
    # out
    parts,
    # strides
    row_step, strides_target,
    # sizes
    first_row, first, width, n_classes, n_rows,
    # scalars
    tau_bits, smoothing_bits,
    # constants
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, COMPUTE: tl.constexpr,
    VEC: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The part of each row and chunk of a tile, (4, n_chunks, n)."""
    HAS_MASS: tl.constexpr = HAS_SMOOTHING or N_LABELS == 0
    row, chunk = tl.program_id(0), tl.program_id(1)
    rows = row.to(tl.int64) + tl.arange(0, 1)
    tau, smoothing = scalar(tau_bits), scalar(smoothing_bits)
    target_base = (first_row + rows) * strides_target[0] + first.to(tl.int64) * strides_target[2]
    lanes = empty(1, BLOCK_C // VEC, COMPUTE)
    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, width), BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        mask_cols = cols < width
        z = _load_z(logits, bias, vectors, rows * row_step, first, cols, None, mask_cols, tau, COMPUTE)
        mass = dense_mass(
            vectors, target_base, first, cols, None, mask_cols, strides_target[2], n_classes, smoothing,
            N_LABELS, HAS_SMOOTHING, COMPUTE,
        )  # fmt: skip
        lanes = absorb(lanes, z, mass, VEC, HAS_MASS, COMPUTE)
    m, rest, gap, total = across_lanes(lanes, HAS_MASS, COMPUTE)
    step = tl.num_programs(1) * n_rows
    at = parts + (chunk * n_rows + rows)
    tl.store(at, m)
    tl.store(at + step, rest)
    tl.store(at + 2 * step, gap)
    tl.store(at + 3 * step, total)


@triton.jit(do_not_specialize=["first", "width", "tau_bits", "ignore_index"])
def _join_kernel(
    # in
    parts, logits, bias, vectors,
    # in and out
    m, rest, gap, total,
    # out
    label_z, as_label,
    # strides
    row_step,
    # sizes
    first_row, first, width, n_rows, n_chunks,
    # scalars
    tau_bits, ignore_index,
    # constants
    N_LABELS: tl.constexpr, HAS_MASS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Join a tile's parts to those of the rows, and note what the labels in the tile stand at."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    there = rows < n_rows
    at = first_row.to(tl.int64) + rows
    row = (
        tl.load(m + at, there, other=0.0),
        tl.load(rest + at, there, other=0.0),
        tl.load(gap + at, there, other=0.0),
        tl.load(total + at, there, other=0.0),
    )
    step = n_chunks * n_rows
    for chunk in range(0, n_chunks):
        of_chunk = parts + (chunk * n_rows + rows)
        part = (
            tl.load(of_chunk, there, other=0.0),
            tl.load(of_chunk + step, there, other=0.0),
            tl.load(of_chunk + 2 * step, there, other=0.0),
            tl.load(of_chunk + 3 * step, there, other=0.0),
        )
        row = join(row, part, HAS_MASS, COMPUTE)
    tl.store(m + at, row[0], there)
    tl.store(rest + at, row[1], there)
    tl.store(gap + at, row[2], there)
    tl.store(total + at, row[3], there)
    if N_LABELS > 0:
        tau = scalar(tau_bits)
        for k in range(N_LABELS):
            label = tl.load(vectors.target + at * N_LABELS + k, there, other=ignore_index)
            here = there & (label != ignore_index) & (label >= first) & (label < first + width)
            label = tl.where(here, label, first)
            value = tl.load(logits + rows.to(tl.int64) * row_step + (label - first), here, other=0.0).to(COMPUTE)
            if bias is not None:
                value += tl.load(bias + label).to(COMPUTE)
            prior = None
            scale = None
            if vectors.log_prior is not None:
                prior = tl.load(vectors.log_prior + label)
            if vectors.scale is not None:
                scale = tl.load(vectors.scale + label)
            tl.store(label_z + at * N_LABELS + k, adjust(value, prior, scale, tau, COMPUTE), here)
            if vectors.target_offset is not None:
                own = adjust(value, None, scale, tau, COMPUTE) + tl.load(vectors.target_offset + label).to(COMPUTE)
                tl.store(as_label + at * N_LABELS + k, own, here)


@triton.jit(do_not_specialize=["first", "tau_bits", "smoothing_bits", "ignore_index"])
def _gradient_kernel(
    # in
    logits, bias, vectors, m, rest, total, upstream, share, of_labels,
    # out
    grad,
    # strides
    row_step, strides_target,
    # sizes
    first_row, first, width, n_classes,
    # scalars
    tau_bits, smoothing_bits, ignore_index,
    # constants
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradient of z of each row and chunk of a tile; g = 0 marks a row that does not count."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    rows = row.to(tl.int64) + tl.arange(0, 1)
    at = first_row + rows
    tau, smoothing = scalar(tau_bits), scalar(smoothing_bits)
    m_row, rest_row, total_row = tl.load(m + at), tl.load(rest + at), tl.load(total + at)
    g = tl.load(upstream + at)
    live = None
    if share is not None:
        share_row = tl.load(share + at)
        live = share_row == share_row  # NaN marks a row that does not count
        share_row = tl.where(live, share_row, 0.0)
        m_row, rest_row = tl.where(live, m_row, 0.0), tl.where(live, rest_row, 0.0)
        total_row, g = tl.where(live, total_row, 0.0), tl.where(live, g, 0.0)
    target_base = at * strides_target[0] + first.to(tl.int64) * strides_target[2]
    last = tl.minimum((chunk + 1) * CHUNK, width)
    for start in range(chunk * CHUNK, last, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        mask_cols = cols < width
        z = _load_z(logits, bias, vectors, rows * row_step, first, cols, live, mask_cols, tau, COMPUTE)
        mass = dense_mass(
            vectors, target_base, first, cols, None, mask_cols, strides_target[2], n_classes, smoothing,
            N_LABELS, HAS_SMOOTHING, COMPUTE,
        )  # fmt: skip
        if N_LABELS == 0:
            of_z = full_form(
                z, m_row[:, None], rest_row[:, None], total_row[:, None], g[:, None], mass, COMPUTE
            )  # fmt: skip
        else:
            of_z = exp(z - m_row[:, None], COMPUTE) * (g * total_row / (1.0 + rest_row))[:, None]
            if HAS_SMOOTHING:
                of_z -= (g * share_row)[:, None] * mass
        if vectors.log_prior is not None and (N_LABELS == 0 or HAS_SMOOTHING):
            prior = load_classes(vectors.log_prior, first, cols, mask_cols)
            of_z = tl.where(prior[None, :] == float("-inf"), (rest_row - rest_row)[:, None], of_z)
        tl.store(
            grad + (rows * row_step)[:, None] + cols[None, :],
            of_z.to(grad.dtype.element_ty),
            mask_cols[None, :],
        )
    if N_LABELS > 0:
        tl.debug_barrier()  # the labels' columns are written after, and over, what other threads wrote there
        for k in range(N_LABELS):
            label = tl.load(vectors.target + at * N_LABELS + k)
            col = label - first
            here = (label != ignore_index) & (col >= chunk * CHUNK) & (col < last)
            value = tl.load(of_labels + at * N_LABELS + k)
            tl.store(grad + rows * row_step + col, value.to(grad.dtype.element_ty), here)


class Epilogue:
    def __init__(self, rows: Rows, n_elements: int, bias: Tensor | None, product_dtype: torch.dtype):
        problem = rows.problem
        self._rows, self._bias, self._product_dtype = rows, bias, product_dtype
        self._vectors = Vectors(**{name: getattr(problem, name) for name in Vectors._fields})
        self._n_elements = n_elements
        self._constants: dict[str, Any] = {
            "N_LABELS": 0 if problem.has_probabilities else problem.target.shape[2],
            "COMPUTE": triton_dtype(problem.compute_dtype),
        }
        self._of_tiles = {"BLOCK_C": BLOCK_C, "CHUNK": CHUNK, "HAS_SMOOTHING": problem.label_smoothing > 0.0}
        self._tau, self._smoothing = float_bits(problem.tau), float_bits(problem.label_smoothing)

    def absorb(self, block: Block, chunk: slice, logits: Tensor, part: Part) -> None:
        """Join what a tile leaves to the rows' part, and note what labels stand at."""
        rows, problem = self._rows, self._rows.problem
        n_rows, width = logits.shape
        n_chunks, num_warps = triton.cdiv(width, CHUNK), THREADS // device_of(logits).warp_size
        parts = logits.new_empty(4 * n_chunks * n_rows)
        with on_device_of(logits):
            _parts_kernel[(n_rows, n_chunks)](
                logits, self._bias, self._vectors, parts,
                logits.stride(0), problem.target.stride(),
                block[0].start, chunk.start, width, problem.logits.shape[-1], n_rows,
                self._tau, self._smoothing,
                VEC=VECTOR_BYTES // logits.element_size(), num_warps=num_warps,
                **self._of_tiles, **self._constants, **AS_WRITTEN,
            )  # fmt: skip
            _join_kernel[(triton.cdiv(n_rows, JOINED_ROWS),)](
                parts, logits, self._bias, self._vectors, *part, rows.candidates.z, rows.as_label,
                logits.stride(0), block[0].start, chunk.start, width, n_rows, n_chunks,
                self._tau, problem.ignore_index,
                HAS_MASS=problem.label_smoothing > 0.0 or problem.has_probabilities,
                BLOCK_ROWS=JOINED_ROWS, **self._constants, **AS_WRITTEN,
            )  # fmt: skip

    def gradient_of(
        self, state: State, upstream: Tensor, of_candidates: Tensor
    ) -> Callable[[Block, slice, Tensor], Tensor]:
        """A function that turns a tile of logits into the gradient of its z, labels included."""
        rows, problem = self._rows, self._rows.problem
        upstream, of_candidates = upstream.contiguous(), of_candidates.contiguous()
        share = None
        if rows.labels is not None:
            share = rows.labels.share.masked_fill(~rows.labels.live, torch.nan)
        buffer = upstream.new_empty(self._n_elements, dtype=self._product_dtype)

        def gradient(block: Block, chunk: slice, logits: Tensor) -> Tensor:
            n_rows, width = logits.shape
            grad, num_warps = buffer.as_strided(logits.shape, logits.stride()), THREADS // device_of(logits).warp_size
            with on_device_of(logits):
                _gradient_kernel[(n_rows, triton.cdiv(width, CHUNK))](
                    logits, self._bias, self._vectors, *state, upstream, share, of_candidates, grad,
                    logits.stride(0), problem.target.stride(),
                    block[0].start, chunk.start, width, problem.logits.shape[-1],
                    self._tau, self._smoothing, problem.ignore_index,
                    num_warps=num_warps, **self._of_tiles, **self._constants, **AS_WRITTEN,
                )  # fmt: skip
            return grad

        return gradient
