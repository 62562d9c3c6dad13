"""The online maximum and sum: what a row keeps of the classes it has seen.

    m     = max_c z_c
    rest  = sum of exp(z_c - m) over all classes but one that attains m
    total = sum_c t_c,   gap = sum_c t_c * (m - z_c)          (dense target mass only)

The top class never enters a sum that a small rest must be told from. A row is read into many lanes, each with an (m,
rest) of its own; to take z into a lane, or to join lanes, whatever is not the new top joins the rest:

    m' = max(m, z),   rest' = rest * exp(m - m') + exp(min(m, z) - m')

A lane that has seen no class starts with m the lowest float and rest = -1: the first top then takes the place of one
that was never there, (rest + 1) * exp(m - z) = 0, and no infinity is subtracted from another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_la._triton.tiles import exp


@triton.jit
def lowest(COMPUTE: tl.constexpr):
    return -1.7976931348623157e308 if COMPUTE == tl.float64 else -3.4028234663852886e38


@triton.jit
def empty(ROWS: tl.constexpr, LANES: tl.constexpr, COMPUTE: tl.constexpr):
    """Lanes that have seen no class: (m, rest, gap, total)."""
    zeros = tl.zeros((ROWS, LANES), COMPUTE)
    return tl.full((ROWS, LANES), lowest(COMPUTE), COMPUTE), zeros - 1.0, zeros, zeros


@triton.jit
def empty_part(ROWS: tl.constexpr, COMPUTE: tl.constexpr):
    """The part of no class of each row: (m, rest, gap, total), (ROWS,) each."""
    zeros = tl.zeros((ROWS,), COMPUTE)
    return tl.full((ROWS,), lowest(COMPUTE), COMPUTE), zeros - 1.0, zeros, zeros


@triton.jit
def smaller(a, b):
    """The minimum, NaN if either is: maxima pass over a NaN, so what joins the rest has to keep it."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def knock_out(z):
    """The larger and the smaller of every two neighbours, each half as wide as z."""
    left, right = tl.split(tl.reshape(z, (z.shape[0], z.shape[1] // 2, 2)))
    return tl.maximum(left, right), smaller(left, right)


@triton.jit
def lane_sum(x, LANES: tl.constexpr):
    """(ROWS, LANES * n) summed to (ROWS, LANES)."""
    return tl.sum(tl.reshape(x, (x.shape[0], LANES, x.shape[1] // LANES)), 2)


@triton.jit
def absorb(lanes, z, mass, VEC: tl.constexpr, HAS_MASS: tl.constexpr, COMPUTE: tl.constexpr):
    """Take a tile of z (ROWS, LANES * VEC) into the lanes, VEC neighbours into each.

    The VEC classes play a knock-out tournament: its winner meets the lane's top, and every loser joins the rest, one
    exponential a class.
    """
    m, rest, gap, total = lanes
    ROWS: tl.constexpr = m.shape[0]
    LANES: tl.constexpr = m.shape[1]
    top = z
    if VEC >= 2:
        top, losers_1 = knock_out(top)
    if VEC >= 4:
        top, losers_2 = knock_out(top)
    if VEC >= 8:
        top, losers_3 = knock_out(top)
    m_new = tl.maximum(m, top)
    f = exp(smaller(m, top) - m_new, COMPUTE)
    rest = tl.fma(rest, tl.where(top > m, f, 1.0), f)
    if VEC >= 2:
        rest += lane_sum(exp(losers_1 - _spread(m_new, VEC // 2), COMPUTE), LANES)
    if VEC >= 4:
        rest += lane_sum(exp(losers_2 - _spread(m_new, VEC // 4), COMPUTE), LANES)
    if VEC >= 8:
        rest += lane_sum(exp(losers_3 - m_new, COMPUTE), LANES)
    if HAS_MASS:
        # All terms are non-negative, and move up with m.
        gap += tl.where(total == 0.0, 0.0, total * (m_new - m))
        gap += lane_sum(tl.where(mass == 0.0, 0.0, mass * (_spread(m_new, VEC) - z)), LANES)
        total += lane_sum(tl.broadcast_to(mass, (ROWS, LANES * VEC)), LANES)
    return m_new, rest, gap, total


@triton.jit
def _spread(m, N: tl.constexpr):
    """(ROWS, LANES) repeated to (ROWS, LANES * N), N neighbours each."""
    return tl.reshape(tl.broadcast_to(m[:, :, None], (m.shape[0], m.shape[1], N)), (m.shape[0], m.shape[1] * N))


@triton.jit
def join(part_1, part_2, HAS_MASS: tl.constexpr, COMPUTE: tl.constexpr):
    """Two parts of each row as one, (ROWS,) each; joining an empty part changes no bit."""
    m_1, rest_1, gap_1, total_1 = part_1
    m_2, rest_2, gap_2, total_2 = part_2
    m = tl.maximum(m_1, m_2)
    f = exp(smaller(m_1, m_2) - m, COMPUTE)
    rest = tl.where(m_1 >= m_2, rest_1 + (rest_2 + 1.0) * f, rest_2 + (rest_1 + 1.0) * f)
    if HAS_MASS:
        gap_1 += tl.where(total_1 == 0.0, 0.0, total_1 * (m - m_1))
        gap_2 += tl.where(total_2 == 0.0, 0.0, total_2 * (m - m_2))
    return m, rest, gap_1 + gap_2, total_1 + total_2


@triton.jit
def across_lanes(lanes, HAS_MASS: tl.constexpr, COMPUTE: tl.constexpr):
    """The lanes of each row as one part, (ROWS,)."""
    m, rest, gap, total = lanes
    m_row = tl.max(m, 1)
    is_top = m == m_row[:, None]
    below = m_row[:, None] - m
    parts = tl.where(is_top, rest, (rest + 1.0) * exp(-below, COMPUTE))
    rest_row = tl.sum(parts, 1) + (tl.sum(is_top.to(COMPUTE), 1) - 1.0)
    gap_row = tl.zeros(m_row.shape, COMPUTE)
    total_row = tl.zeros(m_row.shape, COMPUTE)
    if HAS_MASS:
        gap_row = tl.sum(gap + tl.where(total == 0.0, 0.0, total * below), 1)
        total_row = tl.sum(total, 1)
    return m_row, rest_row, gap_row, total_row


@triton.jit
def others_than(z, m, rest, COMPUTE: tl.constexpr):
    """The sum of exp(z_k - m) over all classes but one that stands at z: rest for a top class, at least 1 besides."""
    return tl.where(z == m, rest, 1.0 + rest - exp(z - m, COMPUTE))
