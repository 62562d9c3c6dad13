"""The one buffer that a loss of R rows, in groups, needs beside its results, in the dtype that it computes in.

m, rest, A      3 * R          of each row, what backward needs again
denominator     1              of a mean, likewise
weight_parts    WEIGHT_PARTS   sums of row weights, which make the denominator
loss_parts      groups         sums of the losses of a group of rows
counters        1 + groups     int32, each in the place of one number: groups that are done; programs of a group
parts           4 * chunks * R of rows that several programs share: m, rest, gap, total of each chunk
"""

from __future__ import annotations

import triton
import triton.language as tl

WEIGHT_PARTS = tl.constexpr(128)  # each read by every program


def workspace_size(n_rows: int, n_groups: int, n_shared_chunks: int) -> int:
    """How many numbers it holds; n_shared_chunks is 0 where no rows are shared."""
    return 3 * n_rows + 1 + WEIGHT_PARTS.value + 2 * n_groups + 1 + 4 * n_shared_chunks * n_rows


@triton.jit
def places(workspace, n_rows, n_groups):
    """Where the (counters, loss_parts, weight_parts, parts) begin."""
    weight_parts = workspace + (3 * n_rows + 1)
    loss_parts = weight_parts + WEIGHT_PARTS
    counters = loss_parts + n_groups
    parts = counters + (1 + n_groups)
    return counters.to(tl.pointer_type(tl.int32), bitcast=True), loss_parts, weight_parts, parts
