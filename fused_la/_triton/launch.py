"""Which tile a kernel runs: pure functions of the shape and the device, so that no result depends on a timing.

The order in which a row is summed follows from the fields VEC, BLOCK_C, CHUNK_TILES and the number of threads, and
those are functions of the number of classes, the dtype and the layout in memory. Who sums it (BLOCK_ROWS, SPLIT,
splits, period) may also depend on the number of rows and on the device: it changes no bit of a row. Of what a kernel is
compiled for, only BLOCK_ROWS and SPLIT do, and there are two choices of them: for few rows, and for many.
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
AS_WRITTEN: dict[str, Any] = {"enable_fp_fusion": False}

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


class Launch(NamedTuple):
    """A program passes over BLOCK_ROWS rows, BLOCK_C classes at a time."""

    vec: int  # classes in one load of a thread, and in the group that shares a running maximum
    edges: bool  # rows may begin or end between the boundaries of vectors
    block_rows: int
    block_c: int
    chunk_tiles: int  # tiles after which a row's partial sum is closed
    num_warps: int
    period: int = 1  # the rows of a program are so many apart: they lie alike towards the boundaries
    split: bool = False  # several programs may share a row, chunk by chunk
    splits: int = 1  # how many do

    def n_chunks(self, n_classes: int) -> int:
        return cdiv(cdiv(n_classes, self.block_c), self.chunk_tiles)

    def n_groups(self, n_rows: int) -> int:
        """Groups of rows, each one program's (or `splits` programs'); every group has a row."""
        blocks, rest = divmod(n_rows, self.block_rows * self.period)
        return blocks * self.period + min(rest, self.period)

    def tile_constants(self, n_classes: int) -> tuple[int, bool, bool, int, int]:
        """VEC, EDGES, ONE_TILE, BLOCK_ROWS and BLOCK_C of the kernels that pass over rows."""
        return self.vec, self.edges, n_classes <= self.block_c, self.block_rows, self.block_c


# None of the numbers below is tuned on a GPU yet.
CHUNK = 1 << 14  # classes of a partial sum, or more where a row would have over MAX_CHUNKS of them
MAX_CHUNKS = 32
ROWS = 2  # that share each load of the offset; with 4, kernels took up to 168 registers (sm_90, 1001 classes)
GRAD_TILES = 8  # tiles of a backward program, at most
FEW_THREADS = 128  # of a program; one that passes over a long row has more
NARROW_TILE = 1024  # elements of a tile without 16-byte vectors, whose addresses take more registers
PROGRAMS_A_MULTIPROCESSOR = 2  # fewer leave multiprocessors idle: rows are split, or fewer share a program
RESIDENT_THREADS = 768  # assumed on a multiprocessor: what fits with 85 registers a thread


def choose_launch(
    n_rows: int, n_classes: int, dtype: torch.dtype, layout: Layout, device: Device, read_twice: bool = False
) -> Launch:
    """The launch of a kernel over (n_rows, n_classes) logits.

    `read_twice` keeps the rows in flight few enough for L2 to hold them until their second pass; see `fits_l2`.
    """
    vec = VECTOR_BYTES // dtype.itemsize
    if not layout.adjacent or layout.shift is None or layout.row_step is None:
        wide = False
    else:
        # A short row is mostly edges: its neighbours in memory serve a warp as well.
        wide = layout.is_aligned(n_classes, vec) or n_classes >= 32 * vec
    if not wide:
        # Where classes are not adjacent (images, (N, C, d1, ...)) neighbouring rows are: the tile is tall.
        block_c = min(next_power_of_2(n_classes), NARROW_TILE if layout.adjacent else 16)
        tiles = _chunk_tiles(n_classes, block_c)
        rows = NARROW_TILE // block_c
        launch = Launch(1, False, rows, block_c, tiles, FEW_THREADS // device.warp_size)
        return _of_few_or_many(launch, launch, n_rows, n_classes, device)

    assert layout.row_step is not None
    edges = not layout.is_aligned(n_classes, vec)
    row_bytes = n_classes * dtype.itemsize
    n_threads = FEW_THREADS * (1 if row_bytes <= 1 << 15 else 2 if row_bytes <= 1 << 16 else 4)
    full_tile = vec * n_threads
    # The body of a row, without its edges, is one tile under a mask, or at least a full tile long.
    one_tile = n_classes < full_tile + 2 * vec - 1
    block_c = next_power_of_2(n_classes) if one_tile else full_tile
    period = vec // math.gcd(layout.row_step, vec)
    tiles = _chunk_tiles(n_classes, block_c)
    launch = Launch(vec, edges, 1, block_c, tiles, n_threads // device.warp_size)
    if one_tile:
        # Several short rows fill the threads; how many must not depend on the number of rows.
        return launch._replace(block_rows=max(1, ROWS * full_tile // block_c), period=period)
    taller = launch._replace(block_rows=ROWS, period=period)
    many = taller if not read_twice or fits_l2(taller, n_classes, dtype, device) else launch
    return _of_few_or_many(launch, many, n_rows, n_classes, device)


def _of_few_or_many(few: Launch, many: Launch, n_rows: int, n_classes: int, device: Device) -> Launch:
    """`many` where its programs fill the device; else programs share a row of `few`, if that has several chunks."""
    n_chunks = few.n_chunks(n_classes)
    if many.n_groups(n_rows) >= _n_programs(device):
        return many
    if n_chunks == 1:
        return few
    splits = min(n_chunks, cdiv(_n_programs(device), max(1, few.n_groups(n_rows))))
    return few._replace(split=True, splits=splits)


def fits_l2(launch: Launch, n_classes: int, dtype: torch.dtype, device: Device) -> bool:
    """Whether the rows in flight stay in L2 until they are read again."""
    programs = device.n_multiprocessors * max(1, RESIDENT_THREADS // (device.warp_size * launch.num_warps))
    return programs * launch.block_rows * n_classes * dtype.itemsize <= 0.6 * device.l2_bytes


def makes_gradient_in_forward(
    n_rows: int, n_classes: int, dtype: torch.dtype, layout: Layout, device: Device, reduction: str
) -> bool:
    """Whether the forward kernel writes the gradient as well: 2 bytes moved a byte of logits, where a recomputing
    backward pass makes it 3.

    Not for float16, whose gradients underflow unless they are made for the scale of the upstream gradient; not for
    reduction "none", whose upstream is not one number; and not where a row is split or would have left L2 by its
    second pass.
    """
    if dtype == torch.float16 or reduction == "none" or n_rows == 0:
        return False
    launch = choose_launch(n_rows, n_classes, dtype, layout, device, read_twice=True)
    return not launch.split and fits_l2(launch, n_classes, dtype, device)


def _chunk_tiles(n_classes: int, block_c: int) -> int:
    widest = next_power_of_2(cdiv(n_classes, MAX_CHUNKS))
    return max(1, max(CHUNK, widest) // block_c)


def _n_programs(device: Device) -> int:
    return PROGRAMS_A_MULTIPROCESSOR * device.n_multiprocessors


def choose_backward_launch(n_rows: int, n_classes: int, dtype: torch.dtype, layout: Layout, device: Device) -> Launch:
    """The launch of a backward pass, where classes need nothing of one another: a tile in any program will do."""
    launch = choose_launch(n_rows, n_classes, dtype, layout, device)
    if launch.num_warps * device.warp_size > FEW_THREADS:
        launch = launch._replace(num_warps=FEW_THREADS // device.warp_size, block_c=launch.vec * FEW_THREADS)
    n_tiles = cdiv(n_classes, launch.block_c)
    wanted = cdiv(_n_programs(device), max(1, launch.n_groups(n_rows)))
    return launch._replace(splits=min(n_tiles, max(wanted, cdiv(n_tiles, GRAD_TILES))))


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
