"""Which tile a kernel runs: one pure function of the shape, so that no result depends on a timing.

The order in which a row is summed follows from BLOCK_C and num_warps, so both are functions of the number of classes,
the dtype and whether classes are adjacent in memory; never of the number of rows.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Launch(NamedTuple):
    """A tile of BLOCK_ROWS rows by BLOCK_C classes for one program."""

    block_rows: int
    block_c: int
    num_warps: int


# Kernels run in Triton's interpreter, on a CPU: decided when they are defined, by TRITON_INTERPRET=1.
INTERPRETED: bool = triton.knobs.runtime.interpret

# Elements a program holds at a time: 16 a thread with 4 warps. Not tuned on a GPU yet.
TILE = 2048


def choose_launch(n_classes: int, dtype: torch.dtype, classes_adjacent: bool) -> Launch:
    """The tile for rows of `n_classes` logits.

    Adjacent classes are read along a row. Otherwise (images, (N, C, d1, ...)) neighbouring rows are adjacent, and the
    tile is tall so that a warp still reads neighbouring addresses.
    """
    tile = TILE // 2 if dtype == torch.float64 else TILE
    padded = triton.next_power_of_2(n_classes)
    block_c = min(padded, tile if classes_adjacent else 32)
    return Launch(block_rows=max(1, tile // block_c), block_c=block_c, num_warps=4)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; make it the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
