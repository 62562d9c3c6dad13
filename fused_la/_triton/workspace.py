"""The one buffer that a loss of R rows, in groups, needs beside its results, in the dtype that it computes in.

m, rest, A      3 * R            of each row, what backward needs again
1 / denominator 1                of a mean, likewise
                                 (up to a multiple of 4: `scratch`)
weight_parts    WEIGHT_PARTS     sums of row weights, which make the denominator
counters        4 or groups      int32, each in the place of one number: groups that are done; programs of a group
table           COPIES * step    log_prior from its class 0, 1, ... COPIES - 1 on, with 0 behind it: whatever class a
                                 body begins with, one copy has it on a 16-byte boundary
loss_parts      groups           sums of the losses of a group of rows, with 0 up to a multiple of 4
parts           4 * chunks * R   of rows that several programs share: m, rest, gap, total of each chunk
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fused_la._triton.targets import row_weights
from fused_la._triton.tiles import NUMBERS, Arguments, Rows, whole_vectors

WEIGHT_PARTS = tl.constexpr(32)  # each read by every program
COPIES = tl.constexpr(4)
BLOCK_SUM = tl.constexpr(1024)  # numbers that the last program adds up at a time
BLOCK_PREPARE = 2048
PREPARE_THREADS = 256


class Workspace(NamedTuple):
    """Where the parts of the buffer begin."""

    size: int
    scratch: int
    table_step: int  # 0 where there is no table
    loss_parts: int

    @property
    def numbers(self) -> tuple[int, int, int]:
        """As kernels take them."""
        return self.scratch, self.table_step, self.loss_parts


def workspace_of(n_rows: int, n_groups: int, n_shared_chunks: int, table_step: int) -> Workspace:
    """n_shared_chunks is 0 where no rows are shared."""
    scratch = _up(3 * n_rows + 1)
    counters = _up(1 + n_groups) if n_shared_chunks > 0 else 4
    loss_parts = scratch + WEIGHT_PARTS.value + counters + COPIES.value * table_step
    size = loss_parts + _up(n_groups) + 4 * n_shared_chunks * n_rows
    return Workspace(size, scratch, table_step, loss_parts)


def _up(n: int) -> int:
    return (n + 3) // 4 * 4


@triton.jit
def counters_of(workspace, scratch):
    return (workspace + (scratch + WEIGHT_PARTS)).to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def parts_of(workspace, loss_parts, n_groups):
    return workspace + (loss_parts + (n_groups + 3) // 4 * 4)


@triton.jit
def table_place(scratch, table_step, first):
    """Where class `first` stands in the one copy that has it on a boundary."""
    copy = first % COPIES
    return whole_vectors(scratch + (WEIGHT_PARTS + 4 + copy * table_step + (first - copy)), COPIES)


@triton.jit(do_not_specialize=NUMBERS)
def _prepare_kernel(
    # in
    vectors,
    # out
    workspace,
    # sizes
    n_rows: tl.int64, n_classes: tl.int32, n_groups: tl.int32, n_parts: tl.int32, rows_a_part: tl.int64,
    scratch: tl.int64, table_step: tl.int32, loss_parts: tl.int64, splits: tl.int32,
    # scalars
    ignore_index: tl.int64,
    # constants
    N_LABELS: tl.constexpr, COMPUTE: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the counters to 0, sum the weights of the rows in a mean, a part a program, and copy log_prior."""
    part, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    if part >= n_parts:
        if vectors.log_prior is not None:
            at = (part - n_parts) * BLOCK + lanes
            copy = at // table_step
            classes = at - copy * table_step + copy
            values = tl.load(vectors.log_prior + classes, classes < n_classes, other=0.0).to(COMPUTE)
            tl.store(workspace + (scratch + WEIGHT_PARTS + 4) + at, values, copy < COPIES)
        return
    if part == 0:
        n_counters = tl.where(splits > 1, 1 + n_groups, 1)
        for first in range(0, n_counters, BLOCK):
            counters = counters_of(workspace, scratch) + first
            tl.store(counters + lanes, tl.zeros((BLOCK,), tl.int32), first + lanes < n_counters)
        tl.store(workspace + loss_parts + n_groups + lanes, tl.zeros((BLOCK,), COMPUTE), lanes < (-n_groups & 3))
    if REDUCTION == "mean":
        call = Arguments(
            None, None, vectors, n_classes, None, None, tl.zeros((), COMPUTE), None, ignore_index,
            None if N_LABELS == 0 else N_LABELS, None,
        )  # fmt: skip
        weight_sum = tl.zeros((BLOCK,), COMPUTE)
        end = tl.minimum((part + 1) * rows_a_part, n_rows)
        for first in range(part * rows_a_part, end, BLOCK):
            rows = first + lanes
            weight_sum += row_weights(call, Rows(rows, rows < end, None, None, None, None, None))
        tl.store(workspace + scratch + part, tl.sum(weight_sum, 0))


@triton.jit
def denominator_of(workspace, scratch, n_parts):
    at = tl.arange(0, WEIGHT_PARTS)
    return tl.sum(tl.load(workspace + scratch + at, at < n_parts, other=0.0), 0)


@triton.jit
def arrive(counter):
    """Count this program, after all it has stored is there for whoever counts after it: those that came before."""
    tl.debug_barrier()  # the stores of all threads come before the one that counts
    return tl.atomic_add(counter, 1, sem="acq_rel")


@triton.jit
def finish(
    loss, workspace, loss_rows, rows, group, n_rows, n_groups, scratch, loss_parts, inverse, REDUCTION: tl.constexpr
):
    """Store the losses of a group's rows; or, as the last group to come here, the reduced loss of all."""
    if REDUCTION == "none":
        tl.store(loss + rows.rows, loss_rows, rows.there)
    else:
        mine = tl.where(rows.there, loss_rows, 0.0)
        tl.store(workspace + loss_parts + group, mine if len(rows.rows.shape) == 0 else tl.sum(mine, 0))
        if arrive(counters_of(workspace, scratch)) == n_groups - 1:
            sums, lanes = tl.zeros((BLOCK_SUM,), loss_rows.dtype), tl.arange(0, BLOCK_SUM)
            end = whole_vectors(n_groups + 3, 4)
            for first in range(0, end, BLOCK_SUM):  # in an order that the number of groups alone sets
                at = workspace + (whole_vectors(loss_parts + first, 4) + lanes)
                sums += tl.load(at, first + lanes < end, other=0.0, cache_modifier=".cg")
                tl.debug_barrier()  # or the compiler unrolls the loop
            total = tl.sum(sums, 0)
            if REDUCTION == "mean":
                tl.store(workspace + 3 * n_rows, inverse)
                total = total * inverse
            tl.store(loss, total)
