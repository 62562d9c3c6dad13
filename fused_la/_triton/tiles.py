"""Device functions that the kernels share: z, a label, and the target mass.

A tile is BLOCK_ROWS rows by BLOCK_C classes. Arithmetic is in COMPUTE: float32, or float64 for float64 logits. Scalars
come as the bits of a Python float, since a kernel's own float arguments are float32.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl


def float_bits(value: float) -> int:
    """A Python float as an int64, for `scalar` to undo on the device."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def scalar(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def row_offsets(rows, n_inner, stride_outer, stride_inner):
    """Where each of the (N, P) rows begins, in 64 bits: N * C may pass 2^31."""
    rows = rows.to(tl.int64)
    outer = rows // n_inner
    return outer * stride_outer + (rows - outer * n_inner) * stride_inner


@triton.jit
def adjust(logits, log_prior, tau, COMPUTE: tl.constexpr):
    """z = logits + tau * log_prior in one rounding, so that every kernel finds the same bits.

    A class at -inf stays out, whatever its logit.
    """
    z = logits.to(COMPUTE)
    if log_prior is None:
        return z
    else:
        log_prior = log_prior.to(COMPUTE)
        z = tl.fma(log_prior, tau.to(COMPUTE), z)
        return tl.where(log_prior == float("-inf"), float("-inf"), z)


@triton.jit
def load_z(logits, log_prior, bases, cols, mask_rows, mask_cols, stride_class, tau, COMPUTE: tl.constexpr):
    """z of a tile: rows that begin at `bases`, classes `cols`; -inf outside."""
    mask = mask_rows[:, None] & mask_cols[None, :]
    values = tl.load(logits + bases[:, None] + cols.to(tl.int64)[None, :] * stride_class, mask, other=float("-inf"))
    prior = None
    if log_prior is not None:
        prior = tl.load(log_prior + cols, mask_cols, other=0.0)[None, :]
    return adjust(values, prior, tau, COMPUTE)


@triton.jit
def load_label_z(logits, log_prior, bases, label, mask_rows, stride_class, tau, COMPUTE: tl.constexpr):
    """z of one class of each row, the same bits as in a tile."""
    values = tl.load(logits + bases + label * stride_class, mask_rows, other=0.0)
    prior = None
    if log_prior is not None:
        prior = tl.load(log_prior + label, mask_rows, other=0.0)
    return adjust(values, prior, tau, COMPUTE)


@triton.jit
def load_label(
    target, target_weight, weight, at, mask, n_classes, smoothing, ignore_index, COMPUTE: tl.constexpr
):  # fmt: skip
    """One label of each row: (class, mass, mass of a mean's denominator, share of the smoothing, whether it counts).

    A label that does not count has mass 0; one outside [0, n_classes) has mass NaN. Both come as class 0.
    """
    label = tl.load(target + at, mask, other=ignore_index).to(tl.int64)
    counts = label != ignore_index
    in_range = (label >= 0) & (label < n_classes)
    label = tl.where(counts & in_range, label, 0)
    share = tl.full(label.shape, 1.0, COMPUTE)
    if target_weight is not None:
        share = tl.load(target_weight + at, mask, other=0.0).to(COMPUTE)
    share = tl.where(counts, tl.where(in_range, share, float("nan")), 0.0)
    row_weight = share
    if weight is not None:
        row_weight = share * tl.load(weight + label, mask, other=0.0).to(COMPUTE)
    return label, row_weight * (1.0 - smoothing).to(COMPUTE), row_weight, share, counts


@triton.jit
def smoothing_mass(smoothing_distribution, weight, cols, mask_cols, n_classes, smoothing, COMPUTE: tl.constexpr):
    """eps * q_c * weight_c of a tile's classes, (1, BLOCK_C)."""
    if smoothing_distribution is None:
        mass = tl.where(mask_cols, (smoothing / n_classes).to(COMPUTE), 0.0)
    else:
        mass = tl.load(smoothing_distribution + cols, mask_cols, other=0.0).to(COMPUTE) * smoothing.to(COMPUTE)
    if weight is not None:
        mass = mass * tl.load(weight + cols, mask_cols, other=0.0).to(COMPUTE)
    return mass[None, :]


@triton.jit
def probability_mass(
    target, weight, bases, cols, mask_rows, mask_cols, stride_class, smoothing, COMPUTE: tl.constexpr
):  # fmt: skip
    """(1 - eps) * target_c * weight_c of a tile."""
    mask = mask_rows[:, None] & mask_cols[None, :]
    mass = tl.load(target + bases[:, None] + cols.to(tl.int64)[None, :] * stride_class, mask, other=0.0).to(COMPUTE)
    mass = mass * (1.0 - smoothing).to(COMPUTE)
    if weight is not None:
        mass = mass * tl.load(weight + cols, mask_cols, other=0.0).to(COMPUTE)[None, :]
    return mass


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, right to a few ulp however small x is."""
    u = 1.0 + x
    # u rounds x away, and log(u) is the log of the rounded one: x / (u - 1) puts it right.
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))
