"""Which tile a kernel runs: pure functions of the shape and the device, so that no result depends on a timing.

The order in which a row is summed follows from the fields VEC, FULL_C, BLOCK_C, CHUNK_TILES and the number of threads,
and those are functions of the number of classes, the dtype, the layout in memory and the kind of target. Who sums it
(BLOCK_ROWS of streamed rows, period, splits) may also depend on the device, and splits on the number of rows: it
changes no bit of a row. Of what a kernel is compiled for, nothing depends on the number of rows.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# Kernels run in Triton's interpreter, on a CPU: decided when they are defined, by TRITON_INTERPRET=1.
INTERPRETED: bool = triton.knobs.runtime.interpret

# For every launch: each operation is rounded as it is written, and what is to be rounded once is a tl.fma, so that a
# row's bits do not depend on what a compiler makes of the program it is in. (Compilers fuse, or not, by their version.)
NO_FP_FUSION: dict[str, Any] = {"enable_fp_fusion": False}

VECTOR_BYTES = 16


class Layout(NamedTuple):
    """How rows lie in memory, as far as 16-byte vectors are concerned; counts are elements."""

    adjacent: bool  # neighbouring classes are neighbours in memory
    shift: int | None  # from a 16-byte boundary to the first element; None where no pointer may stand on that boundary
    row_step: int | None  # from every row to the next; None where they are not evenly spaced

    def is_aligned(self, n_classes: int, vec: int) -> bool:
        """Whether every row begins and ends on a vector's boundary."""
        return self.shift == 0 and self.row_step is not None and self.row_step % vec == 0 and n_classes % vec == 0


class Device(NamedTuple):
    n_multiprocessors: int
    l2_bytes: int
    warp_size: int = 32  # 64 on some AMD GPUs, where as many threads are half as many warps


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


class LaunchConfig(NamedTuple):
    """A program has BLOCK_ROWS rows, whole or BLOCK_C classes at a time."""

    vec: int  # classes in one load of a thread
    edges: bool  # rows may begin or end between the boundaries of vectors
    block_rows: int
    full_c: int  # classes that every row has in its body; 0 where a row is one masked tile, or streams
    block_c: int
    num_warps: int
    resident: bool  # a row is read once, and kept
    chunk_tiles: int = 1  # tiles of a streamed row after which its partial sum is closed
    period: int = 1  # the rows of a program are so many apart: they lie alike towards the boundaries
    splits: int = 1  # programs that share a row, chunk by chunk

    def n_chunks(self, n_classes: int) -> int:
        return 1 if self.resident else cdiv(cdiv(n_classes, self.block_c), self.chunk_tiles)

    def n_groups(self, n_rows: int) -> int:
        """Groups of rows, each one program's (or `splits` programs'); every group has a row."""
        blocks, rest = divmod(n_rows, self.block_rows * self.period)
        return blocks * self.period + min(rest, self.period)

    def tile_constants(self) -> tuple[int | bool, ...]:
        """VEC, EDGES and BLOCK_ROWS of both kernels, FULL_C and BLOCK_C of the resident or BLOCK_C and CHUNK_TILES."""
        of_tile = (self.full_c, self.block_c) if self.resident else (self.block_c, self.chunk_tiles)
        return self.vec, self.edges, self.block_rows, *of_tile


# None of the numbers below is tuned on a GPU yet. They are what the compilers for sm_80, sm_90, sm_100 and gfx942 keep
# in 128 registers a thread, so that 16 warps fit on a multiprocessor (`python -m benchmarks.disassemble --all`).
ROW_BYTES = 1 << 16  # of the longest resident row of labels: 32,768 classes in half precision, 16,384 in float32. Of a
# margin with a scale half of that, of class probabilities or label smoothing a quarter: with more, registers spill
THREAD_BYTES = 128  # of such a row of labels for each thread, else half of that
STREAM_THREADS = 512  # of a streaming program, with a vector of a tile each
ROWS = 2  # of a streaming program, which share each load of the offset
CHUNK = 1 << 14  # classes of a streamed row after which its partial sum is closed, or more where it would have
MAX_CHUNKS = 32  # over so many of them
CHUNK_TILES = 16  # of a chunk without 16-byte vectors
NARROW_TILE = 1024  # elements of a tile without 16-byte vectors, whose addresses take more registers
TALL_CLASSES = 16  # of a tile whose classes are not neighbours
NARROW_THREADS = 128
PROGRAMS_A_MULTIPROCESSOR = 2  # fewer leave multiprocessors idle: rows are split
RESIDENT_THREADS = 768  # of streaming programs, assumed on a multiprocessor: what fits with 85 registers a thread


def choose_launch_config(
    n_rows: int, n_classes: int, dtype: torch.dtype, layout: Layout, device: Device, class_cost: int
) -> LaunchConfig:
    """The launch of a kernel over (n_rows, n_classes) logits; `class_cost` is as in `Signature`."""
    vec = VECTOR_BYTES // dtype.itemsize
    # A short row is mostly edges: its neighbours in memory serve a warp as well.
    wide = layout.adjacent and layout.shift is not None and layout.row_step is not None and n_classes >= 32 * vec
    if not wide:
        # Where classes are not adjacent (images, (N, C, d1, ...)) neighbouring rows are: the tile is tall.
        block_c, num_warps = next_power_of_2(n_classes), NARROW_THREADS // device.warp_size
        tile = NARROW_TILE // (2 if dtype == torch.float64 else 1)
        widest = tile if layout.adjacent else TALL_CLASSES
        launch = LaunchConfig(
            1, False, tile // min(block_c, widest), 0, min(block_c, widest), num_warps, block_c <= widest
        )
        if launch.resident:
            return launch
        tiles = max(CHUNK_TILES, next_power_of_2(cdiv(n_classes, widest * MAX_CHUNKS)))
        return _shared_if_few(launch._replace(chunk_tiles=tiles), n_rows, n_classes, device)

    assert layout.row_step is not None
    edges = not layout.is_aligned(n_classes, vec)
    row_bytes = n_classes * dtype.itemsize
    if row_bytes * class_cost <= ROW_BYTES:
        # Of aligned rows too: one that is aligned in a misaligned matrix is summed as it is alone.
        shortest = (n_classes - 2 * (vec - 1) + vec - 1) // vec * vec  # body; the longest has a vector more
        full_c = 1 << (shortest.bit_length() - 1)
        rest = n_classes // vec * vec - full_c
        n_threads = max(device.warp_size, next_power_of_2(cdiv(row_bytes * min(class_cost, 2), THREAD_BYTES)))
        block_c = 0 if rest == 0 else min(full_c, max(next_power_of_2(rest), vec * n_threads))
        return LaunchConfig(vec, edges, 1, full_c, block_c, n_threads // device.warp_size, True)

    block_c, num_warps = vec * STREAM_THREADS, STREAM_THREADS // device.warp_size
    tiles = max(1, max(CHUNK, next_power_of_2(cdiv(n_classes, MAX_CHUNKS))) // block_c)
    alone = LaunchConfig(vec, edges, 1, 0, block_c, num_warps, False, tiles)
    launch = alone._replace(block_rows=ROWS, period=vec // math.gcd(layout.row_step, vec))
    if fits_l2(alone, n_classes, dtype, device) and not fits_l2(launch, n_classes, dtype, device):
        launch = alone
    return _shared_if_few(launch, n_rows, n_classes, device)


def _shared_if_few(launch: LaunchConfig, n_rows: int, n_classes: int, device: Device) -> LaunchConfig:
    """Programs share a row where there are too few of them to fill the device, and the row has several chunks."""
    wanted = PROGRAMS_A_MULTIPROCESSOR * device.n_multiprocessors
    return launch._replace(splits=min(launch.n_chunks(n_classes), cdiv(wanted, max(1, launch.n_groups(n_rows)))))


def fits_l2(launch: LaunchConfig, n_classes: int, dtype: torch.dtype, device: Device) -> bool:
    """Whether the streaming rows in flight stay in L2 until they are read again."""
    programs = device.n_multiprocessors * max(1, RESIDENT_THREADS // (device.warp_size * launch.num_warps))
    return programs * launch.block_rows * n_classes * dtype.itemsize <= 0.6 * device.l2_bytes


def may_make_gradient(launch: LaunchConfig, n_classes: int, dtype: torch.dtype, device: Device, reduction: str) -> bool:
    """Whether the forward kernel writes the gradient as well, unless programs share a row: 2 bytes moved a byte of
    logits, where a recomputing backward pass makes it 3.

    Not for float16, whose gradients underflow unless they are made for the scale of the upstream gradient, and not for
    reduction "none", whose upstream is not one number. Of streamed rows not where one would have left L2 by its second
    pass.
    """
    if dtype == torch.float16 or reduction == "none":
        return False
    return launch.resident or fits_l2(launch, n_classes, dtype, device)


# Tensors and devices --------------------------------------------------------------------------------------------------


def layout_of(shape: tuple[int, int, int], strides: tuple[int, int, int], shift: int | None) -> Layout:
    """The layout of (N, P, C) logits."""
    n_outer, n_inner, n_classes = shape
    outer, inner, of_class = strides
    row_step = outer if n_inner == 1 else inner if n_outer == 1 or outer == n_inner * inner else None
    return Layout(of_class == 1 or n_classes == 1, shift, row_step)


@functools.lru_cache
def device_of(index: int) -> Device:
    """The GPU with this index; -1, a CPU, stands for an H100, for the interpreter."""
    if index < 0:
        return Device(132, 50 << 20)
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.multi_processor_count, properties.L2_cache_size, properties.warp_size)


def is_on_current_device(tensor: Tensor) -> bool:
    """Whether Triton, which launches on the current device, launches where the tensor is."""
    return not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device()
