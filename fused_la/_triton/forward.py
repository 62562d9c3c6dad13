"""Forward: every row's loss, its mean or sum, and, where it pays, the gradient in the same pass.

    z_c  = logits_c + tau * log_prior_c
    loss = sum_c t_c * (m - z_c) + A * log1p(rest),      A = sum_c t_c         (m, rest: see online.py)

A program passes over BLOCK_ROWS rows and joins, in this order, the edges of a row and its chunks of CHUNK_TILES tiles
each, whose lanes are joined when they are full. SPLITS programs may share the chunks of a row: each leaves the parts it
made in memory, and the one that comes last joins them in the same order, so no bit depends on it. In the same way the
last group of rows to be done sums the losses of all. Saved for backward, (3, N, P): m, rest, A. An infinite m or a NaN
makes the row NaN.

With grad_logits the kernel reads its rows a second time, from L2, and writes their gradient for an upstream gradient
of 1 (gradient.py); backward has then nothing to do if that is what comes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_la._problem import Problem
from fused_la._triton.gradient import write_gradient
from fused_la._triton.launch import (
    AS_WRITTEN,
    choose_launch,
    device_of,
    layout_of,
    makes_gradient_in_forward,
    on_device_of,
)
from fused_la._triton.online import absorb, across_lanes, empty, join, others_than
from fused_la._triton.operands import begin_earlier, grad_buffer, operands
from fused_la._triton.targets import dense_mass, load_label, row_weights
from fused_la._triton.tiles import (
    cut_row,
    edge_classes,
    exp,
    group_rows,
    load_label_z,
    load_z,
    log1p,
    past,
    row_offsets,
    scalar,
    triton_dtype,
    whole_vectors,
)

MAX_PARTS = 128  # parts in which the weights of the rows are summed, read by every program
_OF_NO_ROWS = {"mean": math.nan, "sum": 0.0}
BLOCK_SUM = tl.constexpr(2048)  # numbers that the last program adds up at a time


@triton.jit(do_not_specialize=["n_counters", "rows_a_part", "smoothing_bits", "ignore_index"])
def _prepare_kernel(
    # in
    vectors,
    # out
    counters, row_weight_parts,
    # sizes
    sizes, n_counters, rows_a_part,
    # scalars
    smoothing_bits, ignore_index,
    # constants
    N_LABELS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the counters to 0, and sum the weights of the rows in a mean: a part a program."""
    part = tl.program_id(0).to(tl.int64)
    if part == 0:
        for first in range(0, n_counters, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tl.store(counters + at, tl.zeros((BLOCK,), tl.int32), at < n_counters)
    if row_weight_parts is not None:
        weight_sum = tl.zeros((BLOCK,), COMPUTE)
        end = tl.minimum((part + 1) * rows_a_part, sizes.n_rows)
        for first in range(part * rows_a_part, end, BLOCK):
            rows = first + tl.arange(0, BLOCK)
            weight_sum += row_weights(
                vectors, rows, rows < end, sizes.n_classes, scalar(smoothing_bits), ignore_index, N_LABELS, COMPUTE
            )
        tl.store(row_weight_parts + part, tl.sum(weight_sum, 0))


@triton.jit(do_not_specialize=["n_groups", "n_row_weight_parts", "tau_bits", "smoothing_bits", "ignore_index"])
def _forward_kernel(
    # in
    logits, vectors, row_weight_parts,
    # out
    loss, state, loss_parts, reduced, normalizer, grad_logits, parts, counters,
    # strides
    strides_logits, strides_target, strides_grad_logits,
    # sizes
    sizes, period, shift, n_chunks, n_groups, n_row_weight_parts,
    # scalars
    tau_bits, smoothing_bits, ignore_index,
    # constants
    N_LABELS: tl.constexpr,  # 0: class probabilities
    HAS_SMOOTHING: tl.constexpr, TARGET_ALIKE: tl.constexpr, REDUCTION: tl.constexpr, MAX_PARTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr, EDGES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    CHUNK_TILES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    HAS_MASS: tl.constexpr = HAS_SMOOTHING or N_LABELS == 0
    n_classes = sizes.n_classes
    tau, smoothing = scalar(tau_bits), scalar(smoothing_bits)
    group, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    first_row, to_read, rows, mask_rows = group_rows(group, period, sizes.n_rows, BLOCK_ROWS)
    starts = shift + row_offsets(to_read, sizes.n_inner, strides_logits)
    target_starts = row_offsets(to_read, sizes.n_inner, strides_target)
    head, body = cut_row(shift + row_offsets(first_row, sizes.n_inner, strides_logits), n_classes, VEC, EDGES)
    n_tiles = (body - 1) // BLOCK_C + 1
    bases = whole_vectors(starts + head, VEC)
    target_bases = bases if TARGET_ALIKE else target_starts + head * strides_target[2]

    row = across_lanes(empty(BLOCK_ROWS, 1, COMPUTE), HAS_MASS, COMPUTE)
    if EDGES:
        classes, there = edge_classes(head, body, n_classes, VEC)
        lanes = _absorb_classes(
            empty(BLOCK_ROWS, 2 * VEC, COMPUTE), logits, vectors, starts, target_starts, 0, classes,
            tl.where(split == 0, there, False), strides_logits[2], strides_target[2], n_classes, tau, smoothing,
            N_LABELS, HAS_SMOOTHING, COMPUTE, 1,
        )  # fmt: skip
        row = across_lanes(lanes, HAS_MASS, COMPUTE)

    chunks_a_split = tl.cdiv(n_chunks, SPLITS)
    for chunk in range(split * chunks_a_split, tl.minimum((split + 1) * chunks_a_split, n_chunks)):
        lanes_of_chunk = empty(BLOCK_ROWS, BLOCK_C // VEC, COMPUTE)
        last_tile = tl.minimum((chunk + 1) * CHUNK_TILES, n_tiles)
        n_full = tl.minimum(last_tile, body // BLOCK_C)
        for tile in range(chunk * CHUNK_TILES, n_full):
            cols = tile * BLOCK_C + tl.arange(0, BLOCK_C)
            lanes_of_chunk = _absorb_classes(
                lanes_of_chunk, logits, vectors, bases, target_bases, head, cols, None,
                strides_logits[2], strides_target[2], n_classes, tau, smoothing,
                N_LABELS, HAS_SMOOTHING, COMPUTE, VEC,
            )  # fmt: skip
        for tile in range(tl.maximum(chunk * CHUNK_TILES, n_full), last_tile):  # the last, if the body ends in it
            cols = tile * BLOCK_C + tl.arange(0, BLOCK_C)
            lanes_of_chunk = _absorb_classes(
                lanes_of_chunk, logits, vectors, bases, target_bases, head, cols, cols < body,
                strides_logits[2], strides_target[2], n_classes, tau, smoothing,
                N_LABELS, HAS_SMOOTHING, COMPUTE, VEC,
            )  # fmt: skip
        part = across_lanes(lanes_of_chunk, HAS_MASS, COMPUTE)
        if SPLITS == 1:
            row = join(row, part, HAS_MASS, COMPUTE)
        else:
            # Chunk 0 takes the edges along, as it does where one program passes over the row.
            _store_part(parts, join(row, part, HAS_MASS, COMPUTE), chunk, rows, mask_rows, sizes.n_rows, n_chunks)
            row = across_lanes(empty(BLOCK_ROWS, 1, COMPUTE), HAS_MASS, COMPUTE)

    if SPLITS > 1:
        if _arrive(counters + 1 + group) < SPLITS - 1:
            return
        for chunk in range(0, n_chunks):
            stored = _load_part(parts, chunk, rows, mask_rows, sizes.n_rows, n_chunks)
            row = join(row, stored, HAS_MASS, COMPUTE)

    m, rest, gap, total = row
    rest = tl.where((m == float("inf")) | (rest < 0.0), float("nan"), rest)  # no class at all: rest is still -1
    loss_row, total = _row_loss(
        logits, vectors, rows, mask_rows, starts, strides_logits[2], n_classes, m, rest, gap, total,
        tau, smoothing, ignore_index, N_LABELS, COMPUTE,
    )  # fmt: skip
    tl.store(loss + rows, loss_row, mask_rows)
    _store_state(state, rows, mask_rows, sizes.n_rows, m, rest, total)

    g = tl.full((BLOCK_ROWS,), 1.0, COMPUTE)
    if REDUCTION == "mean":
        at = tl.arange(0, MAX_PARTS)
        denominator = tl.sum(tl.load(row_weight_parts + at, at < n_row_weight_parts, other=0.0), 0)
        g = g / denominator
    if grad_logits is not None:
        write_gradient(
            logits, vectors, grad_logits, strides_logits, strides_target, strides_grad_logits, sizes,
            rows, mask_rows, starts, target_starts, shift + row_offsets(to_read, sizes.n_inner, strides_grad_logits),
            head, body, 0, n_tiles, m, rest, total, g, tau, smoothing, ignore_index,
            N_LABELS, HAS_SMOOTHING, TARGET_ALIKE, COMPUTE, VEC, EDGES, BLOCK_C,
        )  # fmt: skip

    if REDUCTION != "none":
        tl.store(loss_parts + group, tl.sum(tl.where(mask_rows, loss_row, 0.0), 0))
        if _arrive(counters) == n_groups - 1:
            total_loss = _sum(loss_parts, n_groups, COMPUTE)
            if REDUCTION == "mean":
                tl.store(normalizer, denominator)
                total_loss = total_loss / denominator
            tl.store(reduced, total_loss)


@triton.jit
def _absorb_classes(
    lanes, logits, vectors, bases, target_bases, first, cols, mask_cols,
    stride_class, stride_target_class, n_classes, tau, smoothing,
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, COMPUTE: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Take the classes first + cols of some rows, whose class `first` stands at `bases`, into their lanes."""
    z = load_z(logits, vectors, bases, first, cols, None, mask_cols, stride_class, tau, COMPUTE)
    mass = dense_mass(
        vectors, target_bases, first, cols, None, mask_cols, stride_target_class, n_classes, smoothing,
        N_LABELS, HAS_SMOOTHING, COMPUTE,
    )  # fmt: skip
    return absorb(lanes, z, mass, VEC, HAS_SMOOTHING or N_LABELS == 0, COMPUTE)


@triton.jit
def _arrive(counter):
    """Count this program, after all it has stored is there for whoever counts after it: those that came before."""
    tl.debug_barrier()  # the stores of all threads come before the one that counts
    return tl.atomic_add(counter, 1, sem="acq_rel")


@triton.jit
def _sum(numbers, n_numbers, COMPUTE: tl.constexpr):
    """The sum of numbers that other programs stored, in an order that their count alone sets."""
    total = tl.zeros((BLOCK_SUM,), COMPUTE)
    for first in range(0, n_numbers, BLOCK_SUM):
        at = first + tl.arange(0, BLOCK_SUM)
        total += tl.load(numbers + at, at < n_numbers, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def _store_part(parts, part, chunk, rows, mask_rows, n_rows, n_chunks):
    """Keep what a chunk of some rows makes; parts is (4, n_chunks, N * P)."""
    step = n_chunks * n_rows.to(tl.int64)
    at = parts + (chunk * n_rows.to(tl.int64) + rows)
    m, rest, gap, total = part
    tl.store(at, m, mask_rows)
    tl.store(at + step, rest, mask_rows)
    tl.store(at + 2 * step, gap, mask_rows)
    tl.store(at + 3 * step, total, mask_rows)


@triton.jit
def _load_part(parts, chunk, rows, mask_rows, n_rows, n_chunks):
    """What another program kept, from L2 (.cg), where its stores are."""
    step = n_chunks * n_rows.to(tl.int64)
    at = parts + (chunk * n_rows.to(tl.int64) + rows)
    m = tl.load(at, mask_rows, other=0.0, cache_modifier=".cg")
    rest = tl.load(at + step, mask_rows, other=0.0, cache_modifier=".cg")
    gap = tl.load(at + 2 * step, mask_rows, other=0.0, cache_modifier=".cg")
    return m, rest, gap, tl.load(at + 3 * step, mask_rows, other=0.0, cache_modifier=".cg")


@triton.jit
def _store_state(state, rows, mask_rows, n_rows, m, rest, total):
    tl.store(state + rows, m, mask_rows)
    tl.store(state + n_rows + rows, rest, mask_rows)
    tl.store(state + 2 * n_rows.to(tl.int64) + rows, total, mask_rows)


@triton.jit
def _row_loss(
    logits, vectors, rows, mask_rows, starts, stride_class, n_classes, m, rest, gap, total,
    tau, smoothing, ignore_index,
    N_LABELS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The loss and A of each row, with its labels; gap and total are those of its dense target mass.

    Of labels with a target_offset A is (1 + rest) * sum_k t_k / d_k, d_k the denominator of label k's own softmax.
    """
    if N_LABELS == 0:
        return gap + total * log1p(rest), total
    else:
        label_gap = tl.zeros(rows.shape, COMPUTE)
        label_total = tl.zeros(rows.shape, COMPUTE)
        share_row = tl.zeros(rows.shape, COMPUTE)
        live = tl.zeros(rows.shape, tl.int1)
        for k in range(N_LABELS):
            label, mass, _, share, counts = load_label(
                vectors, rows * N_LABELS + k, mask_rows, n_classes, smoothing, ignore_index, COMPUTE
            )
            z, as_label = load_label_z(logits, vectors, starts, label, mask_rows, stride_class, tau, COMPUTE)
            above = m - as_label
            if vectors.target_offset is None:
                free = (mass == 0.0) & (above == float("inf"))
                label_gap += mass * tl.where(free, 0.0, above)
                label_total += mass
            else:
                others = others_than(z, m, rest, COMPUTE)
                label_gap += tl.where(mass == 0.0, 0.0, mass * past(above, others, COMPUTE))
                label_total += mass * ((1.0 + rest) / (others + exp(-above, COMPUTE)))
            share_row += share
            live = live | counts
        if vectors.target_offset is None:
            total = label_total + share_row * total
            label_gap += share_row * gap + total * log1p(rest)
            return tl.where(live, label_gap, 0.0), total
        else:
            return tl.where(live, label_gap, 0.0), label_total


def forward_gradient(problem: Problem, reduction: str) -> bool:
    """Whether the forward pass makes the gradient as well, or backward recomputes."""
    logits = problem.logits
    n_outer, n_inner, n_classes = logits.shape
    return makes_gradient_in_forward(
        n_outer * n_inner, n_classes, logits.dtype, layout_of(logits), device_of(logits), reduction
    )


def launch_forward(
    problem: Problem, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Loss, row state (3, N, P), the mean's denominator, and the gradient for an upstream of 1 if asked for."""
    logits = problem.logits
    n_outer, n_inner, n_classes = logits.shape
    n_rows = n_outer * n_inner
    dtype = problem.compute_dtype
    # Apart, for the loss is the caller's: an in-place change of it must not look like one of what backward saved.
    loss = logits.new_empty((n_outer, n_inner), dtype=dtype)
    state = logits.new_empty((3, n_outer, n_inner), dtype=dtype)
    reduced, normalizer = loss.new_empty(()), loss.new_empty(0 if reduction == "none" else ())
    layout = layout_of(logits)
    gradient = grad_buffer(logits, layout) if with_gradient else None
    if n_rows == 0:
        return loss if reduction == "none" else reduced.fill_(_OF_NO_ROWS[reduction]), state, normalizer, gradient

    launch = choose_launch(n_rows, n_classes, logits.dtype, layout, device_of(logits), read_twice=with_gradient)
    n_groups, n_chunks = launch.n_groups(n_rows), launch.n_chunks(n_classes)
    rows_a_part = triton.cdiv(n_rows, MAX_PARTS * 1024) * 1024
    n_parts = triton.cdiv(n_rows, rows_a_part)
    split_parts = counters = loss_parts = weight_parts = None
    n_counters = 1 + n_groups * (launch.splits > 1)
    given = operands(problem, launch, layout)
    with on_device_of(logits):
        if launch.splits > 1:
            split_parts = loss.new_empty(4 * n_chunks * n_rows)
        if reduction != "none":
            loss_parts = loss.new_empty(n_groups)
        if reduction == "mean":
            weight_parts = loss.new_empty(n_parts)
        if reduction != "none" or launch.splits > 1:
            counters = logits.new_empty(n_counters, dtype=torch.int32)
            _prepare_kernel[(n_parts if reduction == "mean" else 1,)](
                given.vectors, counters, weight_parts, given.sizes, n_counters, rows_a_part,
                *given.scalars[1:],
                N_LABELS=given.constants["N_LABELS"], COMPUTE=triton_dtype(dtype), BLOCK=1024, **AS_WRITTEN,
            )  # fmt: skip
        _forward_kernel[(n_groups * launch.splits,)](
            given.logits, given.vectors, weight_parts,
            loss, state, loss_parts, reduced, normalizer,
            None if gradient is None else begin_earlier(gradient, given.shift), split_parts, counters,
            logits.stride(), problem.target.stride(), (0, 0, 1) if gradient is None else gradient.stride(),
            given.sizes, launch.period, given.shift, n_chunks, n_groups, n_parts,
            *given.scalars,
            REDUCTION=reduction, MAX_PARTS=MAX_PARTS, **given.constants, **AS_WRITTEN,
        )  # fmt: skip
    return loss if reduction == "none" else reduced, state, normalizer, gradient
