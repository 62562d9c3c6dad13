"""The maximum and sum of a row's exponentials, of a tile and of parts that are joined.

    m     = max_c z_c
    rest  = sum of exp(z_c - m) over all classes but one that attains m
    total = sum_c t_c,   gap = sum_c t_c * (m - z_c)          (dense target mass only)

The top class never enters a sum that a small rest must be told from. A row that streams is read into many lanes, each
with an (m, rest) of its own; to take z into a lane, or to join lanes, whatever is not the new top joins the rest:

    m' = max(m, z),   rest' = rest * exp(m - m') + exp(min(m, z) - m')

A lane that has seen no class starts with m the lowest float and rest = -1: the first top then takes the place of one
that was never there, (rest + 1) * exp(m - z) = 0, and no infinity is subtracted from another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_la._triton.tiles import across, highest, row_max, row_sum

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """exp(x); in float32 by the hardware's 2^x, to a few ulp for the small |x| that carry a sum."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, right to a few ulp however small x is."""
    u = 1.0 + x
    return tl.log(u) + (x - (u - 1.0)) * (1.0 / u)  # what u rounds away of x, put back


@triton.jit
def label_loss(margin, others):
    """log(1 + others * exp(margin)), however large the margin is."""
    near = margin < 40.0
    large = tl.where(near, 1.0, margin)
    return tl.where(
        near, log1p(others * exp(tl.where(near, margin, 0.0))), large + tl.log(others + exp(-large))
    )  # fmt: skip


@triton.jit
def smaller(a, b):
    """The minimum, NaN if either is: maxima pass over a NaN, so what joins the rest has to keep it."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def groups(x, N: tl.constexpr):
    """(..., K * N) as (..., K, N)."""
    if len(x.shape) == 1:
        return tl.reshape(x, (x.shape[0] // N, N))
    else:
        return tl.reshape(x, (x.shape[0], x.shape[1] // N, N))


@triton.jit
def knock_out(z):
    """The larger and the smaller of every two neighbours, each half as wide as z."""
    left, right = tl.split(groups(z, 2))
    return tl.maximum(left, right), smaller(left, right)


@triton.jit
def spread(m, z):
    """Each lane's m beside its classes in z."""
    wide = tl.expand_dims(m, len(m.shape))
    if len(m.shape) == 1:
        return tl.reshape(tl.broadcast_to(wide, (m.shape[0], z.shape[0] // m.shape[0])), z.shape)
    else:
        return tl.reshape(tl.broadcast_to(wide, (m.shape[0], m.shape[1], z.shape[1] // m.shape[1])), z.shape)


@triton.jit
def empty(like):
    """What has seen no class: (m, rest, gap, total)."""
    zeros = tl.zeros(like.shape, like.dtype)
    return zeros - highest(like.dtype), zeros - 1.0, zeros, zeros


@triton.jit
def mass_of(z, m, mass):
    """(gap, total) of a tile's dense target mass."""
    gap = row_sum(tl.where(mass == 0.0, 0.0, mass * (across(m) - z)))
    return gap, row_sum(tl.broadcast_to(mass, z.shape))


@triton.jit
def absorb(lanes, z, mass, VEC: tl.constexpr, HAS_MASS: tl.constexpr):
    """Take a tile of z into the lanes, VEC neighbours into each.

    The VEC classes play a knock-out tournament: its winner meets the lane's top, and every loser joins the rest, one
    exponential a class.
    """
    m, rest, gap, total = lanes
    top = z
    if VEC >= 2:
        top, losers_1 = knock_out(top)
    if VEC >= 4:
        top, losers_2 = knock_out(top)
    if VEC >= 8:
        top, losers_3 = knock_out(top)
    m_new = tl.maximum(m, top)
    f = exp(smaller(m, top) - m_new)
    rest = tl.fma(rest, tl.where(top > m, f, 1.0), f)
    if VEC >= 2:
        rest += row_sum(groups(exp(losers_1 - spread(m_new, losers_1)), VEC // 2))
    if VEC >= 4:
        rest += row_sum(groups(exp(losers_2 - spread(m_new, losers_2)), VEC // 4))
    if VEC >= 8:
        rest += exp(losers_3 - m_new)
    if HAS_MASS:
        # All terms are non-negative, and move up with m.
        gap += tl.where(total == 0.0, 0.0, total * (m_new - m))
        gap += row_sum(groups(tl.where(mass == 0.0, 0.0, mass * (spread(m_new, z) - z)), VEC))
        total += row_sum(groups(tl.broadcast_to(mass, z.shape), VEC))
    return m_new, rest, gap, total


@triton.jit
def across_lanes(lanes, HAS_MASS: tl.constexpr):
    """The lanes of each row as one part."""
    m, rest, gap, total = lanes
    m_row = row_max(m)
    is_top, below = m == across(m_row), across(m_row) - m
    parts = tl.where(is_top, rest, (rest + 1.0) * exp(-below))
    rest_row = row_sum(parts) + (row_sum(is_top.to(m.dtype)) - 1.0)
    gap_row, total_row = tl.zeros(m_row.shape, m.dtype), tl.zeros(m_row.shape, m.dtype)
    if HAS_MASS:
        gap_row = row_sum(gap + tl.where(total == 0.0, 0.0, total * below))
        total_row = row_sum(total)
    return m_row, rest_row, gap_row, total_row


@triton.jit
def part_of(z, mass, VEC: tl.constexpr, HAS_MASS: tl.constexpr):
    """The part that a tile makes of each row: (m, rest, gap, total)."""
    return across_lanes(absorb(empty(row_max(groups(z, VEC))), z, mass, VEC, HAS_MASS), HAS_MASS)


@triton.jit
def merge(part_1, part_2, HAS_MASS: tl.constexpr):
    """Two parts of each row as one; joining an empty part changes no bit."""
    m_1, rest_1, gap_1, total_1 = part_1
    m_2, rest_2, gap_2, total_2 = part_2
    m = tl.maximum(m_1, m_2)
    f = exp(smaller(m_1, m_2) - m)
    rest = tl.where(m_1 >= m_2, rest_1 + (rest_2 + 1.0) * f, rest_2 + (rest_1 + 1.0) * f)
    if HAS_MASS:
        gap_1 += tl.where(total_1 == 0.0, 0.0, total_1 * (m - m_1))
        gap_2 += tl.where(total_2 == 0.0, 0.0, total_2 * (m - m_2))
    return m, rest, gap_1 + gap_2, total_1 + total_2


@triton.jit
def store_part(at, step, part, there):
    for i in tl.static_range(4):
        tl.store(at + i * step, part[i], there)


@triton.jit
def load_part(at, step, there):
    """What `store_part` left, from L2 (.cg), where the stores of other programs are."""
    return (
        tl.load(at, there, other=0.0, cache_modifier=".cg"),
        tl.load(at + step, there, other=0.0, cache_modifier=".cg"),
        tl.load(at + 2 * step, there, other=0.0, cache_modifier=".cg"),
        tl.load(at + 3 * step, there, other=0.0, cache_modifier=".cg"),
    )


@triton.jit
def sum_others(z, m, rest):
    """The sum of exp(z_k - m) over all classes but one that stands at z: rest for a top class, at least 1 besides."""
    return tl.where(z == m, rest, 1.0 + rest - exp(z - m))
