"""The workspace of a loss of R rows, in groups: one buffer in the compute dtype, and the functions that use it.

m, rest, A       3 * R                   of each row, kept for backward
1 / denominator  1                       of a mean, kept for backward
                                         (padded to a multiple of 4: `scratch_start`)
weight partials  MAX_WEIGHT_PARTIALS     sums of row weights, whose total is the denominator
counters         4, or groups + 1        int32, one in the space of each number: finished groups; programs of a group
table            TABLE_COPIES * stride   log_prior from class 0, 1, ... TABLE_COPIES - 1 on, then zeros: for any
                                         first class of a body, one copy has it on a 16-byte boundary
loss partials    groups                  sum of the losses of each group of rows, padded with 0 to a multiple of 4
state partials   4 * chunks * R          m, rest, gap, total of each chunk, of rows that several programs share
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fused_la._triton.targets import row_weights
from fused_la._triton.tiles import NUMBERS, Arguments, RowGroup, whole_vectors

MAX_WEIGHT_PARTIALS = tl.constexpr(32)  # every program reads them all
TABLE_COPIES = tl.constexpr(4)
BLOCK_SUM = tl.constexpr(1024)  # numbers that the last program adds at a time
BLOCK_PREPARE = 2048
PREPARE_THREADS = 256


class WorkspaceLayout(NamedTuple):
    """The size of a workspace, and the offsets of its parts."""

    size: int
    scratch_start: int
    table_stride: int  # 0 if there is no table
    losses_start: int

    @property
    def kernel_arguments(self) -> tuple[int, int, int]:
        """In the order of the kernels' parameters."""
        return self.scratch_start, self.table_stride, self.losses_start


def workspace_layout(n_rows: int, n_groups: int, n_shared_chunks: int, table_stride: int) -> WorkspaceLayout:
    """n_shared_chunks is the number of chunks of a row if programs share rows, otherwise 0."""
    scratch_start = _round_up_to_4(3 * n_rows + 1)
    counters = _round_up_to_4(1 + n_groups) if n_shared_chunks > 0 else 4
    losses_start = scratch_start + MAX_WEIGHT_PARTIALS.value + counters + TABLE_COPIES.value * table_stride
    size = losses_start + _round_up_to_4(n_groups) + 4 * n_shared_chunks * n_rows
    return WorkspaceLayout(size, scratch_start, table_stride, losses_start)


def _round_up_to_4(n: int) -> int:
    return (n + 3) // 4 * 4


@triton.jit
def counters_pointer(workspace, scratch_start):
    return (workspace + (scratch_start + MAX_WEIGHT_PARTIALS)).to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def partials_pointer(workspace, losses_start, n_groups):
    return workspace + (losses_start + (n_groups + 3) // 4 * 4)


@triton.jit
def table_offset(scratch_start, table_stride, first_class):
    """The offset of first_class in the copy of the table that has it on a 16-byte boundary."""
    copy = first_class % TABLE_COPIES
    offset = scratch_start + (MAX_WEIGHT_PARTIALS + 4 + copy * table_stride + (first_class - copy))
    return whole_vectors(offset, TABLE_COPIES)


@triton.jit(do_not_specialize=NUMBERS)
def _prepare_kernel(
    # in
    vectors,
    # out
    workspace,
    # sizes
    n_rows: tl.int64, n_classes: tl.int32, n_groups: tl.int32, n_weight_partials: tl.int32, rows_per_partial: tl.int64,
    scratch_start: tl.int64, table_stride: tl.int32, losses_start: tl.int64, splits: tl.int32,
    # scalars
    ignore_index: tl.int64,
    # constants
    N_LABELS: tl.constexpr, COMPUTE: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the counters to 0, sum row weights for a mean, one partial sum a program, and copy log_prior to the table."""
    partial, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    if partial >= n_weight_partials:
        if vectors.log_prior is not None:
            offsets = (partial - n_weight_partials) * BLOCK + lanes
            copy = offsets // table_stride
            classes = offsets - copy * table_stride + copy
            values = tl.load(vectors.log_prior + classes, classes < n_classes, other=0.0).to(COMPUTE)
            tl.store(workspace + (scratch_start + MAX_WEIGHT_PARTIALS + 4) + offsets, values, copy < TABLE_COPIES)
        return
    if partial == 0:
        n_counters = tl.where(splits > 1, 1 + n_groups, 1)
        for first in range(0, n_counters, BLOCK):
            counters = counters_pointer(workspace, scratch_start) + first
            tl.store(counters + lanes, tl.zeros((BLOCK,), tl.int32), first + lanes < n_counters)
        tl.store(workspace + losses_start + n_groups + lanes, tl.zeros((BLOCK,), COMPUTE), lanes < (-n_groups & 3))
    if REDUCTION == "mean":
        args = Arguments(
            None, None, vectors, n_classes, None, None, tl.zeros((), COMPUTE), None, ignore_index,
            None if N_LABELS == 0 else N_LABELS, None,
        )  # fmt: skip
        weight_sum = tl.zeros((BLOCK,), COMPUTE)
        end = tl.minimum((partial + 1) * rows_per_partial, n_rows)
        for first in range(partial * rows_per_partial, end, BLOCK):
            rows = first + lanes
            weight_sum += row_weights(args, RowGroup(rows, rows < end, None, None, None, None, None, None))
        tl.store(workspace + scratch_start + partial, tl.sum(weight_sum, 0))


@triton.jit
def load_denominator(workspace, scratch_start, n_weight_partials):
    lanes = tl.arange(0, MAX_WEIGHT_PARTIALS)
    return tl.sum(tl.load(workspace + scratch_start + lanes, lanes < n_weight_partials, other=0.0), 0)


@triton.jit
def take_ticket(counter):
    """Count this program; return the number of programs before it. Its stores are visible to those that come later."""
    tl.debug_barrier()  # all threads store before the program is counted
    return tl.atomic_add(counter, 1, sem="acq_rel")


@triton.jit
def store_loss(
    loss, workspace, loss_rows, rows, group, n_rows, n_groups, scratch_start, losses_start, inverse_denominator,
    REDUCTION: tl.constexpr,
):  # fmt: skip
    """Store the losses of a group's rows; with a reduction their sum, and the last group stores the reduced loss."""
    if REDUCTION == "none":
        tl.store(loss + rows.index, loss_rows, rows.in_bounds)
    else:
        losses = tl.where(rows.in_bounds, loss_rows, 0.0)
        tl.store(workspace + losses_start + group, losses if len(rows.index.shape) == 0 else tl.sum(losses, 0))
        if take_ticket(counters_pointer(workspace, scratch_start)) == n_groups - 1:
            sums, lanes = tl.zeros((BLOCK_SUM,), loss_rows.dtype), tl.arange(0, BLOCK_SUM)
            end = whole_vectors(n_groups + 3, 4)
            for first in range(0, end, BLOCK_SUM):  # in an order that depends on the number of groups alone
                pointers = workspace + (whole_vectors(losses_start + first, 4) + lanes)
                sums += tl.load(pointers, first + lanes < end, other=0.0, cache_modifier=".cg")
                tl.debug_barrier()  # keeps the compiler from unrolling the loop
            total = tl.sum(sums, 0)
            if REDUCTION == "mean":
                tl.store(workspace + 3 * n_rows, inverse_denominator)
                total = total * inverse_denominator
            tl.store(loss, total)
