"""Online-softmax state of a row: how a tile updates it, and how partial states merge.

    m     = max_c z_c
    rest  = sum of exp(z_c - m) over all classes but one that attains m
    total = sum_c t_c,   gap = sum_c t_c * (m - z_c)          (dense target mass only)

The top class is never part of a sum, so that a small rest keeps its digits. A row that streams is read into many
lanes, each with its own (m, rest). To add z to a lane, or to merge lanes, all but the new top is added to the rest:

    m' = max(m, z),   rest' = rest * exp(m - m') + exp(min(m, z) - m')

An empty lane has m = the lowest float and rest = -1: the first top then replaces one that never existed,
(rest + 1) * exp(m - z) = 0, and no infinity is subtracted from another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_la._triton.tiles import max_float, per_row, row_max, row_sum

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """exp(x); in float32 by the hardware's 2^x, exact to a few ulp for the small |x| that dominate a sum."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, exact to a few ulp however small x is."""
    u = 1.0 + x
    return tl.log(u) + (x - (u - 1.0)) * (1.0 / u)  # adds back what rounding u removed of x


@triton.jit
def label_loss(gap, others):
    """log(1 + others * exp(gap)), however large the gap is."""
    near = gap < 40.0
    large = tl.where(near, 1.0, gap)
    return tl.where(near, log1p(others * exp(tl.where(near, gap, 0.0))), large + tl.log(others + exp(-large)))


@triton.jit
def minimum_or_nan(a, b):
    """The minimum, or NaN if either is NaN: maxima ignore a NaN, so that the rest has to keep it."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def split_last_dim(x, N: tl.constexpr):
    """(..., K * N) as (..., K, N)."""
    if len(x.shape) == 1:
        return tl.reshape(x, (x.shape[0] // N, N))
    else:
        return tl.reshape(x, (x.shape[0], x.shape[1] // N, N))


@triton.jit
def pairwise_max_min(z):
    """The maximum and the minimum of every two adjacent values, each half as wide as z."""
    left, right = tl.split(split_last_dim(z, 2))
    return tl.maximum(left, right), minimum_or_nan(left, right)


@triton.jit
def broadcast_lanes(m, z):
    """m of each lane, repeated for each of its classes in z."""
    wide = tl.expand_dims(m, len(m.shape))
    if len(m.shape) == 1:
        return tl.reshape(tl.broadcast_to(wide, (m.shape[0], z.shape[0] // m.shape[0])), z.shape)
    else:
        return tl.reshape(tl.broadcast_to(wide, (m.shape[0], m.shape[1], z.shape[1] // m.shape[1])), z.shape)


@triton.jit
def empty_state(like):
    """The state of no class: (m, rest, gap, total)."""
    zeros = tl.zeros(like.shape, like.dtype)
    return zeros - max_float(like.dtype), zeros - 1.0, zeros, zeros


@triton.jit
def gap_and_total(z, m, mass):
    """(gap, total) of a tile's dense target mass."""
    gap = row_sum(tl.where(mass == 0.0, 0.0, mass * (per_row(m) - z)))
    return gap, row_sum(tl.broadcast_to(mass, z.shape))


@triton.jit
def update_lanes(lanes, z, mass, VEC: tl.constexpr, HAS_MASS: tl.constexpr):
    """Add a tile of z to the lanes' states, VEC adjacent classes to each lane.

    A tree of pairwise maxima finds the highest of the VEC classes, which is compared with the lane's m. Each minimum
    is added to the rest, so that a class costs one exponential.
    """
    m, rest, gap, total = lanes
    top = z
    if VEC >= 2:
        top, minima_1 = pairwise_max_min(top)
    if VEC >= 4:
        top, minima_2 = pairwise_max_min(top)
    if VEC >= 8:
        top, minima_3 = pairwise_max_min(top)
    m_new = tl.maximum(m, top)
    f = exp(minimum_or_nan(m, top) - m_new)
    rest = tl.fma(rest, tl.where(top > m, f, 1.0), f)
    if VEC >= 2:
        rest += row_sum(split_last_dim(exp(minima_1 - broadcast_lanes(m_new, minima_1)), VEC // 2))
    if VEC >= 4:
        rest += row_sum(split_last_dim(exp(minima_2 - broadcast_lanes(m_new, minima_2)), VEC // 4))
    if VEC >= 8:
        rest += exp(minima_3 - m_new)
    if HAS_MASS:
        # All terms are non-negative, and grow with m.
        gap += tl.where(total == 0.0, 0.0, total * (m_new - m))
        gap += row_sum(split_last_dim(tl.where(mass == 0.0, 0.0, mass * (broadcast_lanes(m_new, z) - z)), VEC))
        total += row_sum(split_last_dim(tl.broadcast_to(mass, z.shape), VEC))
    return m_new, rest, gap, total


@triton.jit
def reduce_lanes(lanes, HAS_MASS: tl.constexpr):
    """Merge the lanes of each row to one state."""
    m, rest, gap, total = lanes
    m_row = row_max(m)
    is_top, below = m == per_row(m_row), per_row(m_row) - m
    sums = tl.where(is_top, rest, (rest + 1.0) * exp(-below))
    rest_row = row_sum(sums) + (row_sum(is_top.to(m.dtype)) - 1.0)
    gap_row, total_row = tl.zeros(m_row.shape, m.dtype), tl.zeros(m_row.shape, m.dtype)
    if HAS_MASS:
        gap_row = row_sum(gap + tl.where(total == 0.0, 0.0, total * below))
        total_row = row_sum(total)
    return m_row, rest_row, gap_row, total_row


@triton.jit
def tile_state(z, mass, VEC: tl.constexpr, HAS_MASS: tl.constexpr):
    """The state of each row over the classes of a tile: (m, rest, gap, total)."""
    return reduce_lanes(update_lanes(empty_state(row_max(split_last_dim(z, VEC))), z, mass, VEC, HAS_MASS), HAS_MASS)


@triton.jit
def merge(state_1, state_2, HAS_MASS: tl.constexpr):
    """Merge two states of each row; merging an empty state changes no bit."""
    m_1, rest_1, gap_1, total_1 = state_1
    m_2, rest_2, gap_2, total_2 = state_2
    m = tl.maximum(m_1, m_2)
    f = exp(minimum_or_nan(m_1, m_2) - m)
    rest = tl.where(m_1 >= m_2, rest_1 + (rest_2 + 1.0) * f, rest_2 + (rest_1 + 1.0) * f)
    if HAS_MASS:
        gap_1 += tl.where(total_1 == 0.0, 0.0, total_1 * (m - m_1))
        gap_2 += tl.where(total_2 == 0.0, 0.0, total_2 * (m - m_2))
    return m, rest, gap_1 + gap_2, total_1 + total_2


@triton.jit
def store_state(pointers, stride, state, in_bounds):
    for i in tl.static_range(4):
        tl.store(pointers + i * stride, state[i], in_bounds)


@triton.jit
def load_state(pointers, stride, in_bounds):
    """Load what `store_state` stored, from L2 (.cg), where the stores of other programs are."""
    return (
        tl.load(pointers, in_bounds, other=0.0, cache_modifier=".cg"),
        tl.load(pointers + stride, in_bounds, other=0.0, cache_modifier=".cg"),
        tl.load(pointers + 2 * stride, in_bounds, other=0.0, cache_modifier=".cg"),
        tl.load(pointers + 3 * stride, in_bounds, other=0.0, cache_modifier=".cg"),
    )


@triton.jit
def sum_others(z, m, rest):
    """The sum of exp(z_k - m) over all classes but one with this z: rest for a top class, otherwise at least 1."""
    return tl.where(z == m, rest, 1.0 + rest - exp(z - m))
