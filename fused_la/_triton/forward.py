"""Forward: every row's loss, its mean or sum, and, where it pays, the gradient in the same pass.

    z_c  = logits_c + tau * log_prior_c
    loss = sum_c t_c * (m - z_c) + A * log1p(rest),      A = sum_c t_c         (m, rest: see online.py)

A program passes over BLOCK_ROWS rows and joins, in this order, the edges of a row and its chunks of CHUNK_TILES tiles
each, whose lanes are joined when they are full. Several programs may share the chunks of a row (SPLIT): each leaves the
parts it made in memory, and the one that comes last joins them in the same order, so no bit depends on it. In the same
way the last group of rows to be done sums the losses of all. Kept for backward: m, rest and A of each row, and the
mean's denominator. An infinite m or a NaN makes the row NaN.

With grad_logits the kernel reads its rows a second time, from L2, and writes their gradient for an upstream gradient
of 1 (gradient.py); backward has then nothing to do if that is what comes.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_la._problem import Problem
from fused_la._triton.gradient import write_gradient
from fused_la._triton.launch import cdiv, choose_launch, device_of, is_on_current_device, makes_gradient_in_forward
from fused_la._triton.online import absorb, across_lanes, empty, empty_part, join
from fused_la._triton.operands import (
    PLANS,
    Buffer,
    Signature,
    begin_earlier,
    gradient_buffer,
    signature_of,
    steps,
    vectors_of,
)
from fused_la._triton.row_loss import row_loss
from fused_la._triton.targets import dense_mass, read_label, row_weights
from fused_la._triton.tiles import (
    NUMBERS,
    cut_row,
    edge_classes,
    float_bits,
    group_rows,
    load_z,
    row_offsets,
    scalar,
    tile_start,
    whole_vectors,
)
from fused_la._triton.variants import Variant, variant
from fused_la._triton.workspace import WEIGHT_PARTS, places, workspace_size

_OF_NO_ROWS = {"mean": math.nan, "sum": 0.0}
BLOCK_SUM = tl.constexpr(2048)  # numbers that the last program adds up at a time
BLOCK_PREPARE = 1024


@triton.jit(do_not_specialize=NUMBERS)
def _prepare_kernel(
    # in
    vectors,
    # out
    workspace,
    # sizes
    n_rows: tl.int64, n_classes: tl.int32, n_groups: tl.int32, rows_a_part: tl.int64,
    # scalars
    ignore_index: tl.int64,
    # constants
    N_LABELS: tl.constexpr, COMPUTE: tl.constexpr, REDUCTION: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the counters to 0, and sum the weights of the rows in a mean: a part a program."""
    part = tl.program_id(0).to(tl.int64)
    counters, _, weight_parts, _ = places(workspace, n_rows, n_groups)
    if part == 0:
        n_counters = 1 + n_groups if SPLIT else 1
        for first in range(0, n_counters, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tl.store(counters + at, tl.zeros((BLOCK,), tl.int32), at < n_counters)
    if REDUCTION == "mean":
        weight_sum = tl.zeros((BLOCK,), COMPUTE)
        end = tl.minimum((part + 1) * rows_a_part, n_rows)
        for first in range(part * rows_a_part, end, BLOCK):
            rows = first + tl.arange(0, BLOCK)
            weight_sum += row_weights(vectors, rows, rows < end, n_classes, ignore_index, N_LABELS, COMPUTE)
        tl.store(weight_parts + part, tl.sum(weight_sum, 0))


@triton.jit(do_not_specialize=NUMBERS)
def _forward_kernel(
    # in
    logits, vectors,
    # out
    loss, workspace, grad_logits,
    # strides
    logits_outer: tl.int64, logits_inner: tl.int64, logits_class: tl.int64,
    target_outer: tl.int64, target_inner: tl.int64, target_class: tl.int64,
    grad_outer: tl.int64, grad_inner: tl.int64, grad_class: tl.int64,
    # sizes
    n_rows: tl.int64, n_inner, n_classes: tl.int32, n_groups: tl.int32, n_chunks: tl.int32, n_parts: tl.int32,
    period: tl.int32, splits: tl.int32, shift: tl.int32,
    # scalars
    tau_bits: tl.int64, smoothing_bits: tl.int64, ignore_index: tl.int64,
    # constants
    N_LABELS: tl.constexpr,  # 0: class probabilities
    HAS_SMOOTHING: tl.constexpr, TARGET_ALIKE: tl.constexpr, ADJACENT: tl.constexpr, TARGET_ADJACENT: tl.constexpr,
    COMPUTE: tl.constexpr, REDUCTION: tl.constexpr, CHUNK_TILES: tl.constexpr,  # 0: a row is one chunk
    SPLIT: tl.constexpr,
    VEC: tl.constexpr, EDGES: tl.constexpr, ONE_TILE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    HAS_MASS: tl.constexpr = HAS_SMOOTHING or N_LABELS == 0
    if ADJACENT:
        logits_class = 1
        grad_class = 1
    if TARGET_ADJACENT:
        target_class = 1
    strides_logits = (logits_outer, logits_inner)
    tau, smoothing = scalar(tau_bits), scalar(smoothing_bits)
    group, split = tl.program_id(0), 0
    if SPLIT:
        group, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    first_row, to_read, rows, mask_rows = group_rows(group, period, n_rows, BLOCK_ROWS)
    starts = shift + row_offsets(to_read, n_inner, strides_logits)
    target_starts = row_offsets(to_read, n_inner, (target_outer, target_inner))
    head, body = cut_row(shift + row_offsets(first_row, n_inner, strides_logits), n_classes, VEC, EDGES)
    n_tiles = 1 if ONE_TILE else (body - 1) // BLOCK_C + 1
    bases = whole_vectors(starts + head, VEC)
    target_bases = bases if TARGET_ALIKE else target_starts + head * target_class

    row = empty_part(BLOCK_ROWS, COMPUTE)
    if EDGES:
        classes, there = edge_classes(head, body, n_classes, VEC)
        lanes = _absorb_classes(
            empty(BLOCK_ROWS, 2 * VEC, COMPUTE), logits, vectors, starts, target_starts, 0, classes,
            tl.where(split == 0, there, False), None, logits_class, target_class, n_classes, tau, smoothing,
            N_LABELS, HAS_SMOOTHING, COMPUTE, 1,
        )  # fmt: skip
        row = across_lanes(lanes, HAS_MASS, COMPUTE)

    if CHUNK_TILES == 0:
        part = _absorb_tiles(
            logits, vectors, bases, target_bases, head, body, 0, n_tiles, logits_class, target_class, n_classes,
            tau, smoothing, N_LABELS, HAS_SMOOTHING, COMPUTE, VEC, ONE_TILE, BLOCK_ROWS, BLOCK_C,
        )  # fmt: skip
        row = join(row, part, HAS_MASS, COMPUTE) if EDGES else part
    else:
        chunks_a_split = n_chunks
        if SPLIT:
            chunks_a_split = tl.cdiv(n_chunks, splits)
        for chunk in range(split * chunks_a_split, tl.minimum((split + 1) * chunks_a_split, n_chunks)):
            part = _absorb_tiles(
                logits, vectors, bases, target_bases, head, body,
                chunk * CHUNK_TILES, tl.minimum((chunk + 1) * CHUNK_TILES, n_tiles),
                logits_class, target_class, n_classes,
                tau, smoothing, N_LABELS, HAS_SMOOTHING, COMPUTE, VEC, ONE_TILE, BLOCK_ROWS, BLOCK_C,
            )  # fmt: skip
            row = join(row, part, HAS_MASS, COMPUTE)
            if SPLIT:
                # Chunk 0 takes the edges along, as it does where one program passes over the row.
                _store_part(workspace, row, chunk, rows, mask_rows, n_rows, n_groups, n_chunks)
                row = empty_part(BLOCK_ROWS, COMPUTE)

    counters, loss_parts, weight_parts, _ = places(workspace, n_rows, n_groups)
    if SPLIT:
        if _arrive(counters + 1 + group) < splits - 1:
            return
        for chunk in range(0, n_chunks):
            stored = _load_part(workspace, chunk, rows, mask_rows, n_rows, n_groups, n_chunks)
            row = join(row, stored, HAS_MASS, COMPUTE)

    m, rest, gap, total = row
    rest = tl.where((m == float("inf")) | (rest < 0.0), float("nan"), rest)  # no class at all: rest is still -1
    lone_label = None
    if N_LABELS == 1:
        lone_label = read_label(
            logits, vectors, starts, rows, 0, mask_rows, logits_class, n_classes, tau, ignore_index, 1, COMPUTE
        )
    loss_row, total, share, live = row_loss(
        logits, vectors, rows, mask_rows, starts, logits_class, n_classes, m, rest, gap, total, lone_label,
        tau, smoothing, ignore_index, N_LABELS, HAS_SMOOTHING, COMPUTE,
    )  # fmt: skip
    tl.store(workspace + rows, m, mask_rows)
    tl.store(workspace + n_rows + rows, rest, mask_rows)
    tl.store(workspace + 2 * n_rows + rows, total, mask_rows)

    g = tl.full((BLOCK_ROWS,), 1.0, COMPUTE)
    if REDUCTION == "mean":
        at = tl.arange(0, WEIGHT_PARTS)
        denominator = tl.sum(tl.load(weight_parts + at, at < n_parts, other=0.0), 0)
        g = g / denominator
    if grad_logits is not None:
        write_gradient(
            logits, vectors, grad_logits, logits_class, target_class, grad_class,
            rows, mask_rows, live, share, starts, target_starts,
            shift + row_offsets(to_read, n_inner, (grad_outer, grad_inner)), head, body, 0, n_tiles, n_classes,
            m, rest, total, g, lone_label, tau, smoothing, ignore_index,
            N_LABELS, HAS_SMOOTHING, TARGET_ALIKE, COMPUTE, VEC, EDGES, ONE_TILE, BLOCK_C,
        )  # fmt: skip

    if REDUCTION == "none":
        tl.store(loss + rows, loss_row, mask_rows)
    else:
        tl.store(loss_parts + group, tl.sum(tl.where(mask_rows, loss_row, 0.0), 0))
        if _arrive(counters) == n_groups - 1:
            total_loss = _sum(loss_parts, n_groups, COMPUTE)
            if REDUCTION == "mean":
                tl.store(workspace + 3 * n_rows, denominator)
                total_loss = total_loss / denominator
            tl.store(loss, total_loss)


@triton.jit
def _absorb_tiles(
    logits, vectors, bases, target_bases, head, body, first_tile, last_tile, stride_class, target_class, n_classes,
    tau, smoothing,
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, COMPUTE: tl.constexpr,
    VEC: tl.constexpr, ONE_TILE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The part of each row that the tiles [first_tile, last_tile) of its body make."""
    HAS_MASS: tl.constexpr = HAS_SMOOTHING or N_LABELS == 0
    lanes = empty(BLOCK_ROWS, BLOCK_C // VEC, COMPUTE)
    if ONE_TILE:
        cols = tl.arange(0, BLOCK_C)
        lanes = _absorb_classes(
            lanes, logits, vectors, bases, target_bases, head, cols, cols < body, None,
            stride_class, target_class, n_classes, tau, smoothing, N_LABELS, HAS_SMOOTHING, COMPUTE, VEC,
        )  # fmt: skip
    else:
        for tile in range(first_tile, last_tile):
            start = tile_start(tile, body, VEC, BLOCK_C)
            # Of the vectors of the last tile, those that the tile before has taken already are left out.
            is_new = start + VEC * tl.arange(0, BLOCK_C // VEC) >= tile * BLOCK_C
            lanes = _absorb_classes(
                lanes, logits, vectors, bases, target_bases, head, start + tl.arange(0, BLOCK_C), None, is_new,
                stride_class, target_class, n_classes, tau, smoothing, N_LABELS, HAS_SMOOTHING, COMPUTE, VEC,
            )  # fmt: skip
    return across_lanes(lanes, HAS_MASS, COMPUTE)


@triton.jit
def _absorb_classes(
    lanes, logits, vectors, bases, target_bases, first, cols, mask_cols, is_new,
    stride_class, target_class, n_classes, tau, smoothing,
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, COMPUTE: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Take the classes first + cols of some rows, whose class `first` stands at `bases`, into their lanes."""
    z = load_z(logits, vectors, bases, first, cols, None, mask_cols, stride_class, tau, COMPUTE)
    mass = dense_mass(
        vectors, target_bases, first, cols, None, mask_cols, target_class, n_classes, smoothing,
        N_LABELS, HAS_SMOOTHING, COMPUTE,
    )  # fmt: skip
    if is_new is not None:
        each = tl.reshape(tl.broadcast_to(is_new[:, None], (is_new.shape[0], VEC)), (1, is_new.shape[0] * VEC))
        z = tl.where(each, z, float("-inf"))
        if HAS_SMOOTHING or N_LABELS == 0:
            mass = tl.where(each, mass, 0.0)
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
def _store_part(workspace, part, chunk, rows, mask_rows, n_rows, n_groups, n_chunks):
    """Keep what a chunk of some rows makes."""
    _, _, _, parts = places(workspace, n_rows, n_groups)
    step = n_chunks * n_rows
    at = parts + (chunk * n_rows + rows)
    m, rest, gap, total = part
    tl.store(at, m, mask_rows)
    tl.store(at + step, rest, mask_rows)
    tl.store(at + 2 * step, gap, mask_rows)
    tl.store(at + 3 * step, total, mask_rows)


@triton.jit
def _load_part(workspace, chunk, rows, mask_rows, n_rows, n_groups, n_chunks):
    """What another program kept, from L2 (.cg), where its stores are."""
    _, _, _, parts = places(workspace, n_rows, n_groups)
    step = n_chunks * n_rows
    at = parts + (chunk * n_rows + rows)
    m = tl.load(at, mask_rows, other=0.0, cache_modifier=".cg")
    rest = tl.load(at + step, mask_rows, other=0.0, cache_modifier=".cg")
    gap = tl.load(at + 2 * step, mask_rows, other=0.0, cache_modifier=".cg")
    return m, rest, gap, tl.load(at + 3 * step, mask_rows, other=0.0, cache_modifier=".cg")


# Launches -------------------------------------------------------------------------------------------------------------


class ForwardPlan(NamedTuple):
    """How the forward pass of every problem of one `Signature` is launched."""

    prepare: Variant | None
    prepare_grid: tuple[int, int, int]
    prepare_sizes: tuple[int, ...]
    forward: Variant
    grid: tuple[int, int, int]
    strides_and_sizes: tuple[int | None, ...]
    shift: int
    n_rows: int
    workspace_size: int
    gradient: Buffer | None  # where the pass makes it


@functools.lru_cache(PLANS)
def plan_forward(signature: Signature, reduction: str, wants_gradient: bool) -> ForwardPlan:
    n_outer, n_inner, n_classes = signature.rows
    n_rows, layout, device = n_outer * n_inner, signature.layout(), device_of(signature.device)
    makes_gradient = wants_gradient and makes_gradient_in_forward(
        n_rows, n_classes, signature.dtype, layout, device, reduction
    )
    buffer = gradient_buffer(signature) if makes_gradient else None
    launch = choose_launch(n_rows, n_classes, signature.dtype, layout, device, read_twice=makes_gradient)
    n_groups, n_chunks = launch.n_groups(n_rows), launch.n_chunks(n_classes)
    shift = signature.shift if launch.vec > 1 and signature.shift is not None else 0

    row_constants, types = signature.row_constants(), signature.compiled_for(launch.vec)
    prepare, rows_a_part = None, cdiv(n_rows, WEIGHT_PARTS.value * BLOCK_PREPARE) * BLOCK_PREPARE
    n_parts = cdiv(n_rows, max(1, rows_a_part)) if reduction == "mean" else 1
    if reduction != "none" or launch.split:
        constants = (signature.n_labels, row_constants[-1], reduction, launch.split, BLOCK_PREPARE)
        prepare = variant(_prepare_kernel, signature.device, (signature.types, signature.target_is_aligned), constants)
    constants = (
        *row_constants, reduction, launch.chunk_tiles if n_chunks > 1 else 0, launch.split,
        *launch.tile_constants(n_classes),
    )  # fmt: skip
    grad_types = None if buffer is None else launch.vec > 1 or buffer.shift == 0
    return ForwardPlan(
        prepare,
        (n_parts, 1, 1),
        (n_rows, n_classes, n_groups, rows_a_part),
        variant(_forward_kernel, signature.device, (types, grad_types), constants, launch.num_warps),
        (n_groups * launch.splits, 1, 1),
        (
            *steps(signature.strides), *steps(signature.target_strides or (0, 0)),
            *((0, 0, 1) if buffer is None else steps(buffer.strides)),
            n_rows, signature.n_inner, n_classes, n_groups, n_chunks, n_parts, launch.period, launch.splits, shift,
        ),
        shift,
        n_rows,
        workspace_size(n_rows, n_groups, n_chunks if launch.split else 0),
        buffer,
    )  # fmt: skip


def launch_forward(
    problem: Problem, reduction: str, wants_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None, Signature]:
    """The loss, the workspace, of which backward needs the first numbers, the gradient for an upstream of 1, where it
    is wanted and this pass is the one to make it, and the problem's signature."""
    logits = problem.logits
    if not is_on_current_device(logits):
        with torch.cuda.device(logits.device):
            return launch_forward(problem, reduction, wants_gradient)
    signature, vectors = signature_of(problem), vectors_of(problem)
    plan = plan_forward(signature, reduction, wants_gradient)
    dtype, device = problem.compute_dtype, logits.device
    # Apart, for the loss is the caller's: an in-place change of it must not look like one of what backward needs.
    loss = torch.empty(logits.shape[:-1] if reduction == "none" else (), dtype=dtype, device=device)
    workspace = torch.empty(plan.workspace_size, dtype=dtype, device=device)
    gradient = None if plan.gradient is None else plan.gradient.make(logits)
    if plan.n_rows == 0:
        return loss if reduction == "none" else loss.fill_(_OF_NO_ROWS[reduction]), workspace, gradient, signature
    if plan.prepare is not None:
        plan.prepare.launch(plan.prepare_grid, vectors, workspace, *plan.prepare_sizes, problem.ignore_index)
    plan.forward.launch(
        plan.grid, begin_earlier(logits, plan.shift), vectors,
        loss, workspace, None if gradient is None else begin_earlier(gradient, plan.shift),
        *plan.strides_and_sizes,
        float_bits(problem.tau), float_bits(problem.label_smoothing), problem.ignore_index,
    )  # fmt: skip
    return loss, workspace, gradient, signature
