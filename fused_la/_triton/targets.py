"""Device functions for the target mass t_c: labels, class probabilities, class weights and label smoothing.

    labels         t_c = sum_k target_weight_k * weight_c * ((1 - eps) * [c = target_k] + eps * q_c)
    probabilities  t_c = weight_c * ((1 - eps) * target_c + eps * q_c)

What labels ask of their classes is added a label at a time (`load_label`), the rest a tile at a time (`dense_mass`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_la._triton.tiles import Tile, adjust, along, load_classes, load_tile, places


class Label(NamedTuple):
    """One label of each row. One that does not count has mass 0; one outside [0, C) has mass NaN; both are class 0."""

    label: Any
    mass: Any  # but for smoothing
    row_weight: Any  # mass of a mean's denominator
    share: Any  # of the smoothing
    counts: Any


@triton.jit
def load_label(call, rows, k):
    """Label k of each row."""
    vectors = call.vectors
    COMPUTE: tl.constexpr = call.tau.dtype
    at = rows.rows * call.n_labels + k
    label = tl.load(vectors.target + at, rows.there, other=call.ignore_index).to(tl.int64)
    counts = label != call.ignore_index
    in_range = label.to(tl.uint64) < call.n_classes.to(tl.uint64)
    label = tl.where(counts & in_range, label, 0).to(tl.int32)
    share = tl.where(counts, tl.where(in_range, 1.0, float("nan")), 0.0).to(COMPUTE)
    if vectors.target_weight is not None:
        share = tl.where(counts, share * tl.load(vectors.target_weight + at, rows.there, other=0.0).to(COMPUTE), 0.0)
    mass, row_weight = share, share
    if vectors.weight is not None:
        mass = share * tl.load(vectors.weight + label, rows.there, other=0.0).to(COMPUTE)
    if vectors.mean_weight is not None:
        row_weight = share * tl.load(vectors.mean_weight + label, rows.there, other=0.0).to(COMPUTE)
    return Label(label, mass, row_weight, share, counts)


class Stand(NamedTuple):
    """Where a label's class stands in each row."""

    z: Any  # the same bits as in a tile
    as_label: Any  # as the label itself, if there is a target_offset
    is_out: Any  # at log_prior = -inf


@triton.jit
def read_label(call, rows, k):
    """(Label, Stand) of label k of each row."""
    label, vectors = load_label(call, rows, k), call.vectors
    at = rows.logits + label.label.to(tl.int64) * call.logits_class
    logits = tl.load(call.logits + at, rows.there, other=0.0)
    prior, scale, is_out = None, None, label.label < 0
    if vectors.log_prior is not None:
        prior = tl.load(vectors.log_prior + label.label, rows.there, other=0.0)
        is_out = prior == float("-inf")
    if vectors.scale is not None:
        scale = tl.load(vectors.scale + label.label, rows.there, other=0.0)
    z = adjust(logits, prior, scale, True, call.tau)
    as_label = z
    if vectors.target_offset is not None:
        as_label = adjust(logits, None, scale, True, call.tau)
        as_label += tl.load(vectors.target_offset + label.label, rows.there, other=0.0).to(call.tau.dtype)
    return label, Stand(z, as_label, is_out)


@triton.jit
def label_of(call, rows, k, single_label):
    """The same; `single_label` is what was read where a row has one label."""
    if single_label is None:
        return read_label(call, rows, k)
    else:
        return single_label


@triton.jit
def shares(call, rows, single_label):
    """(share of the smoothing mass, whether any label counts) of each row."""
    if call.n_labels is None:
        return tl.full(rows.rows.shape, 1.0, call.tau.dtype), rows.rows >= 0
    elif single_label is not None:
        return single_label[0].share, single_label[0].counts
    else:
        share = tl.zeros(rows.rows.shape, call.tau.dtype)
        live = tl.zeros(rows.rows.shape, tl.int1)
        for k in range(call.n_labels):
            found = load_label(call, rows, k)
            share += found.share
            live = live | found.counts
        return share, live


@triton.jit
def row_weights(call, rows):
    """What each row counts for in the denominator of a mean: the mean class weight of its labels."""
    if call.n_labels is None:
        return tl.where(rows.there, 1.0, 0.0).to(call.tau.dtype)
    else:
        total = tl.zeros(rows.rows.shape, call.tau.dtype)
        share = tl.zeros(rows.rows.shape, call.tau.dtype)
        for k in range(call.n_labels):
            found = load_label(call, rows, k)
            total += found.row_weight
            share += found.share
        return tl.where(share == 0.0, 0.0, total / tl.where(share == 0.0, 1.0, share))


@triton.jit
def smoothing_mass(call, tile):
    """eps * q_c * weight_c of a tile's classes, 0 outside."""
    COMPUTE: tl.constexpr = call.tau.dtype
    if call.vectors.smoothing_distribution is None:
        mass = tl.full(tile.cols.shape, 1.0, COMPUTE) * (call.smoothing / call.n_classes)
    else:
        mass = load_classes(call.vectors.smoothing_distribution, tile).to(COMPUTE) * call.smoothing
    if call.vectors.weight is not None:
        mass = mass * load_classes(call.vectors.weight, tile).to(COMPUTE)
    return tl.where(tile.mask, mass, 0.0)


@triton.jit
def label_smoothing_mass(call, label):
    """The same of a label's class."""
    return smoothing_mass(call, Tile(0, 0, label, label >= 0, 0))


@triton.jit
def dense_mass(call, rows, tile, VEC: tl.constexpr):
    """t_c of a tile's classes but for labels; with labels it is what a row asks for whose labels share 1 in all."""
    COMPUTE: tl.constexpr = call.tau.dtype
    mass = along(tl.zeros(tile.cols.shape, COMPUTE), rows)
    if call.smoothing is not None:
        mass = along(smoothing_mass(call, tile), rows)
    if call.n_labels is None:
        at = places(rows.target, tile, call.target_class, 1 if call.target_alike is None else VEC)
        of_target = load_tile(call.vectors.target, at, tile, rows, 0.0).to(COMPUTE)
        if call.smoothing is not None:
            of_target = of_target * (1.0 - call.smoothing)
        if call.vectors.weight is not None:
            of_target = of_target * along(load_classes(call.vectors.weight, tile).to(COMPUTE), rows)
        mass = mass + of_target
    return mass
