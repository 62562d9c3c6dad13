"""Launch configurations of kernels: pure functions of the shape and the device, so that no result depends on timing.

The order in which a row is summed follows from VEC, FULL_C, BLOCK_C, CHUNK_TILES and the number of threads. These are
functions of the number of classes, the dtype, the layout in memory and the kind of target. Which programs sum a row
(BLOCK_ROWS of streamed rows, period, splits) may also depend on the device, and splits on the number of rows; this
changes no bit of a row. A compiled kernel does not depend on the number of rows.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# Whether kernels run in Triton's interpreter, on a CPU: TRITON_INTERPRET=1 decides it when they are defined.
INTERPRETED: bool = triton.knobs.runtime.interpret

# For every launch: the compiler fuses no operations; only an explicit tl.fma is rounded once. A row's bits then do not
# depend on how the rest of a program is compiled. (Whether compilers fuse depends on their version.)
NO_FP_FUSION: dict[str, Any] = {"enable_fp_fusion": False}

VECTOR_BYTES = 16


class Layout(NamedTuple):
    """The memory layout of rows with respect to 16-byte vectors, in elements."""

    adjacent: bool  # the stride of the classes is 1
    misalignment: int | None  # elements from a boundary to the first one; None if no boundary is in its storage
    row_stride: int | None  # None if rows are not evenly spaced

    def is_aligned(self, n_classes: int, vec: int) -> bool:
        """Whether every row starts and ends on a boundary of a vector."""
        row_stride = self.row_stride
        return self.misalignment == 0 and row_stride is not None and row_stride % vec == 0 and n_classes % vec == 0


class Device(NamedTuple):
    n_multiprocessors: int
    l2_bytes: int
    warp_size: int = 32  # 64 on some AMD GPUs: the same threads are half as many warps


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


class LaunchConfig(NamedTuple):
    """How a kernel is launched. A program has BLOCK_ROWS rows, whole or BLOCK_C classes at a time."""

    vec: int  # classes in one load of a thread
    edges: bool  # rows may start or end between the boundaries of vectors
    block_rows: int
    full_c: int  # classes that every row has in its body; 0 if a row is one masked tile, or streams
    block_c: int
    num_warps: int
    resident: bool  # a row is read once and stays on the chip
    chunk_tiles: int = 1  # tiles of a streamed row that make one partial state
    period: int = 1  # distance between the rows of a program, so that all have the same misalignment
    splits: int = 1  # programs that share the chunks of a row

    def n_chunks(self, n_classes: int) -> int:
        return 1 if self.resident else cdiv(cdiv(n_classes, self.block_c), self.chunk_tiles)

    def n_groups(self, n_rows: int) -> int:
        """The number of groups of rows; a group is one program's (or `splits` programs'), and has at least one row."""
        blocks, remainder = divmod(n_rows, self.block_rows * self.period)
        return blocks * self.period + min(remainder, self.period)

    def tile_constants(self) -> tuple[int | bool, ...]:
        """VEC, EDGES, BLOCK_ROWS, and FULL_C, BLOCK_C (resident kernel) or BLOCK_C, CHUNK_TILES (streamed kernel)."""
        tile_fields = (self.full_c, self.block_c) if self.resident else (self.block_c, self.chunk_tiles)
        return self.vec, self.edges, self.block_rows, *tile_fields


# None of the numbers below is tuned on a GPU yet. With them the kernels of labels mostly need at most 128 registers a
# thread, so that 16 warps fit on a multiprocessor (budgets: `benchmarks/static/budgets.py`).
#
# Bytes of the longest resident row with labels: 32,768 classes in half precision, 16,384 in float32. Half of that for a
# margin with a scale, a quarter for class probabilities or label smoothing: longer rows would spill registers.
RESIDENT_ROW_BYTES = 1 << 16
RESIDENT_THREAD_BYTES = 128  # bytes of a resident row with labels for each thread; half of that for other targets
STREAM_THREADS = 512  # threads of a streaming program; each has one vector of a tile
STREAM_ROWS = 2  # rows of a streaming program; they share each load of the offset
CHUNK_CLASSES = 1 << 14  # classes of a chunk of a streamed row; a chunk has more if a row would exceed MAX_CHUNKS
MAX_CHUNKS = 32
CHUNK_TILES = 16  # tiles of a chunk without 16-byte vectors
NARROW_TILE = 1024  # elements of a tile without 16-byte vectors, whose addresses take more registers
TALL_CLASSES = 16  # classes of a tile if they are not adjacent
NARROW_THREADS = 128
PROGRAMS_PER_SM = 2  # with fewer, multiprocessors are idle: rows are split
STREAM_THREADS_PER_SM = 768  # assumed for streaming programs: as many fit with 85 registers a thread


def choose_launch_config(
    n_rows: int, n_classes: int, dtype: torch.dtype, layout: Layout, device: Device, class_cost: int,
    shares_prior: bool = True,
) -> LaunchConfig:  # fmt: skip
    """The launch configuration of a kernel over (n_rows, n_classes) logits; `class_cost` is as in `Signature`.

    Unless all rows share one prior, a streaming program has one row.
    """
    vec = VECTOR_BYTES // dtype.itemsize
    # Not for short rows, which are mostly edges: a warp reads them as well together with adjacent rows.
    wide = layout.adjacent and None not in (layout.misalignment, layout.row_stride) and n_classes >= 32 * vec
    if not wide:
        # If classes are not adjacent (images, (N, C, d1, ...)), consecutive rows are: the tile is tall.
        block_c, num_warps = next_power_of_2(n_classes), NARROW_THREADS // device.warp_size
        tile = NARROW_TILE // (2 if dtype == torch.float64 else 1)
        widest = tile if layout.adjacent else TALL_CLASSES
        resident, block_c = block_c <= widest, min(block_c, widest)
        config = LaunchConfig(1, False, tile // block_c, 0, block_c, num_warps, resident)
        if config.resident:
            return config
        tiles = max(CHUNK_TILES, next_power_of_2(cdiv(n_classes, widest * MAX_CHUNKS)))
        return _split_rows_if_few(config._replace(chunk_tiles=tiles), n_rows, n_classes, device)

    assert layout.row_stride is not None
    edges = not layout.is_aligned(n_classes, vec)
    row_bytes = n_classes * dtype.itemsize
    if row_bytes * class_cost <= RESIDENT_ROW_BYTES:
        # The same for aligned rows: an aligned row of a misaligned matrix has the bits that it has alone.
        shortest = (n_classes - 2 * (vec - 1) + vec - 1) // vec * vec  # shortest body; the longest has one vector more
        full_c = 1 << (shortest.bit_length() - 1)
        remainder = n_classes // vec * vec - full_c
        n_threads = max(device.warp_size, next_power_of_2(cdiv(row_bytes * min(class_cost, 2), RESIDENT_THREAD_BYTES)))
        block_c = 0 if remainder == 0 else min(full_c, max(next_power_of_2(remainder), vec * n_threads))
        return LaunchConfig(vec, edges, 1, full_c, block_c, n_threads // device.warp_size, True)

    block_c, num_warps = vec * STREAM_THREADS, STREAM_THREADS // device.warp_size
    tiles = max(1, max(CHUNK_CLASSES, next_power_of_2(cdiv(n_classes, MAX_CHUNKS))) // block_c)
    one_row = LaunchConfig(vec, edges, 1, 0, block_c, num_warps, False, tiles)
    config = one_row._replace(block_rows=STREAM_ROWS, period=vec // math.gcd(layout.row_stride, vec))
    if not shares_prior or (
        fits_l2(one_row, n_classes, dtype, device) and not fits_l2(config, n_classes, dtype, device)
    ):
        config = one_row
    return _split_rows_if_few(config, n_rows, n_classes, device)


def _split_rows_if_few(config: LaunchConfig, n_rows: int, n_classes: int, device: Device) -> LaunchConfig:
    """Let programs share a row if there are too few to fill the device, and the row has several chunks."""
    wanted = PROGRAMS_PER_SM * device.n_multiprocessors
    return config._replace(splits=min(config.n_chunks(n_classes), cdiv(wanted, max(1, config.n_groups(n_rows)))))


def fits_l2(config: LaunchConfig, n_classes: int, dtype: torch.dtype, device: Device) -> bool:
    """Whether all rows being streamed stay in L2 until they are read again."""
    programs = device.n_multiprocessors * max(1, STREAM_THREADS_PER_SM // (device.warp_size * config.num_warps))
    return programs * config.block_rows * n_classes * dtype.itemsize <= 0.6 * device.l2_bytes


def may_make_gradient(config: LaunchConfig, n_classes: int, dtype: torch.dtype, device: Device, reduction: str) -> bool:
    """Whether the forward kernel also writes the gradient, unless programs share a row. That moves 2 bytes for each
    byte of logits; a backward pass that computes it moves 3.

    Not for float16, whose gradients underflow unless they are computed with the scale of the upstream gradient. Not for
    reduction "none", whose upstream gradient is not one number. Not for streamed rows that would leave L2 before their
    second pass.
    """
    if dtype == torch.float16 or reduction == "none":
        return False
    return config.resident or fits_l2(config, n_classes, dtype, device)


# Tensors and devices --------------------------------------------------------------------------------------------------


def layout_of(shape: tuple[int, int, int], strides: tuple[int, int, int], misalignment: int | None) -> Layout:
    """The layout of (N, P, C) logits."""
    n_outer, n_inner, n_classes = shape
    outer, inner, of_class = strides
    row_stride = outer if n_inner == 1 else inner if n_outer == 1 or outer == n_inner * inner else None
    return Layout(of_class == 1 or n_classes == 1, misalignment, row_stride)


@functools.lru_cache
def device_of(index: int) -> Device:
    """The GPU with this index; for -1, a CPU with the interpreter, an H100."""
    if index < 0:
        return Device(132, 50 << 20)
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.multi_processor_count, properties.L2_cache_size, properties.warp_size)


def is_on_current_device(tensor: Tensor) -> bool:
    """Whether the tensor is on the current device, on which Triton launches."""
    return not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device()
