"""Device functions for the target mass t_c: labels, class probabilities, class weights and label smoothing.

    labels         t_c = sum_k target_weight_k * weight_c * ((1 - eps) * [c = target_k] + eps * q_c)
    probabilities  t_c = weight_c * ((1 - eps) * target_c + eps * q_c)

The mass of labels is computed a label at a time (`load_label`), the rest of t_c a tile at a time (`dense_mass`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_la._triton.tiles import (
    adjust,
    load_classes,
    load_prior,
    load_prior_of_label,
    load_tile,
    per_class,
    tile_offsets,
)


class Label(NamedTuple):
    """One label of each row. An ignored label has mass 0, one outside [0, C) mass NaN; both have index 0."""

    index: Any
    mass: Any  # target mass without smoothing
    row_weight: Any  # its term of a mean's denominator
    share: Any  # its multiple of the smoothing mass
    counts: Any


@triton.jit
def load_label(args, rows, k):
    """Label k of each row."""
    vectors = args.vectors
    COMPUTE: tl.constexpr = args.tau.dtype
    offsets = rows.index * args.n_labels + k
    label = tl.load(vectors.target + offsets, rows.in_bounds, other=args.ignore_index).to(tl.int64)
    counts = label != args.ignore_index
    in_range = label.to(tl.uint64) < args.n_classes.to(tl.uint64)
    label = tl.where(counts & in_range, label, 0).to(tl.int32)
    share = tl.where(counts, tl.where(in_range, 1.0, float("nan")), 0.0).to(COMPUTE)
    if vectors.target_weight is not None:
        target_weight = tl.load(vectors.target_weight + offsets, rows.in_bounds, other=0.0).to(COMPUTE)
        share = tl.where(counts, share * target_weight, 0.0)
    mass, row_weight = share, share
    if vectors.weight is not None:
        mass = share * tl.load(vectors.weight + label, rows.in_bounds, other=0.0).to(COMPUTE)
    if vectors.mean_weight is not None:
        row_weight = share * tl.load(vectors.mean_weight + label, rows.in_bounds, other=0.0).to(COMPUTE)
    return Label(label, mass, row_weight, share, counts)


class LabelLogit(NamedTuple):
    """The adjusted logit of a label in each row."""

    z: Any  # the same bits as z of its class in a tile
    z_as_label: Any  # with the target_offset in place of tau * log_prior; z without one
    excluded: Any  # at log_prior = -inf


@triton.jit
def load_label_and_logit(args, rows, k):
    """(Label, LabelLogit) of label k of each row."""
    label, vectors = load_label(args, rows, k), args.vectors
    offsets = rows.logits_start + label.index.to(tl.int64) * args.logits_class
    logits = tl.load(args.logits + offsets, rows.in_bounds, other=0.0)
    prior, scale, row_scale, excluded = None, None, None, label.index < 0
    if vectors.log_prior is not None:
        prior = load_prior_of_label(args, vectors.log_prior, rows, label.index)
        excluded = prior == float("-inf")
    if vectors.scale is not None:
        scale = tl.load(vectors.scale + label.index, rows.in_bounds, other=0.0)
    if vectors.label_scale is not None:
        row_scale = rows.operands.scale
    z = adjust(logits, prior, scale, row_scale, True, args.tau)
    z_as_label = z
    if vectors.target_offset is not None:
        z_as_label = adjust(logits, None, scale, row_scale, True, args.tau)
        z_as_label += tl.load(vectors.target_offset + label.index, rows.in_bounds, other=0.0).to(args.tau.dtype)
    return label, LabelLogit(z, z_as_label, excluded)


@triton.jit
def label_and_logit(args, rows, k, single_label):
    """(Label, LabelLogit) of label k of each row; `single_label` is the pair already loaded if rows have one label."""
    if single_label is None:
        return load_label_and_logit(args, rows, k)
    else:
        return single_label


@triton.jit
def share_and_live(args, rows, single_label):
    """(multiple of the smoothing mass, whether any label counts) of each row."""
    if args.n_labels is None:
        return tl.full(rows.index.shape, 1.0, args.tau.dtype), rows.index >= 0
    elif single_label is not None:
        return single_label[0].share, single_label[0].counts
    else:
        share = tl.zeros(rows.index.shape, args.tau.dtype)
        live = tl.zeros(rows.index.shape, tl.int1)
        for k in range(args.n_labels):
            label = load_label(args, rows, k)
            share += label.share
            live = live | label.counts
        return share, live


@triton.jit
def row_weights(args, rows):
    """The weight of each row in the denominator of a mean: the mean class weight of its labels."""
    if args.n_labels is None:
        return tl.where(rows.in_bounds, 1.0, 0.0).to(args.tau.dtype)
    else:
        total = tl.zeros(rows.index.shape, args.tau.dtype)
        share = tl.zeros(rows.index.shape, args.tau.dtype)
        for k in range(args.n_labels):
            label = load_label(args, rows, k)
            total += label.row_weight
            share += label.share
        return tl.where(share == 0.0, 0.0, total / tl.where(share == 0.0, 1.0, share))


@triton.jit
def smoothing_mass(args, rows, tile):
    """eps * q_c * weight_c of a tile's classes, 0 out of bounds."""
    COMPUTE: tl.constexpr = args.tau.dtype
    if args.vectors.smoothing_distribution is None:
        mass = per_class(tl.full(tile.cols.shape, 1.0, COMPUTE) * (args.smoothing / args.n_classes), rows)
    else:
        mass = load_prior(args, args.vectors.smoothing_distribution, rows, tile).to(COMPUTE) * args.smoothing
    if args.vectors.weight is not None:
        mass = mass * per_class(load_classes(args.vectors.weight, tile).to(COMPUTE), rows)
    return tl.where(per_class(tile.mask, rows), mass, 0.0)


@triton.jit
def label_smoothing_mass(args, rows, label):
    """eps * q_c * weight_c of a label's class."""
    COMPUTE: tl.constexpr = args.tau.dtype
    if args.vectors.smoothing_distribution is None:
        mass = args.smoothing / args.n_classes
    else:
        mass = load_prior_of_label(args, args.vectors.smoothing_distribution, rows, label).to(COMPUTE)
        mass = mass * args.smoothing
    if args.vectors.weight is not None:
        mass = mass * tl.load(args.vectors.weight + label, rows.in_bounds, other=0.0).to(COMPUTE)
    return mass


@triton.jit
def dense_mass(args, rows, tile, VEC: tl.constexpr):
    """t_c of a tile's classes without the mass of labels; with labels it is that of a row whose share is 1."""
    COMPUTE: tl.constexpr = args.tau.dtype
    mass = per_class(tl.zeros(tile.cols.shape, COMPUTE), rows)
    if args.smoothing is not None:
        mass = smoothing_mass(args, rows, tile)
    if args.n_labels is None:
        offsets = tile_offsets(rows.target_start, tile, args.target_class, 1 if args.same_alignment is None else VEC)
        probabilities = load_tile(args.vectors.target, offsets, tile, rows, 0.0).to(COMPUTE)
        if args.smoothing is not None:
            probabilities = probabilities * (1.0 - args.smoothing)
        if args.vectors.weight is not None:
            probabilities = probabilities * per_class(load_classes(args.vectors.weight, tile).to(COMPUTE), rows)
        mass = mass + probabilities
    return mass
