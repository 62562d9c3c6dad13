"""Device functions for the target mass t_c: labels, class probabilities, class weights and label smoothing.

    labels         t_c = sum_k target_weight_k * weight_c * ((1 - eps) * [c = target_k] + eps * q_c)
    probabilities  t_c = weight_c * ((1 - eps) * target_c + eps * q_c)

What labels ask of their classes is added a label at a time (`load_label`), the rest a tile at a time (`dense_mass`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_la._triton.tiles import load_classes, load_label_z, load_tile


@triton.jit
def load_label(vectors, at, mask, n_classes, ignore_index, COMPUTE: tl.constexpr):
    """One label of each row: (class, mass but for smoothing, mass of a mean's denominator, share of the smoothing,
    whether it counts).

    A label that does not count has mass 0; one outside [0, n_classes) has mass NaN. Both come as class 0.
    """
    label = tl.load(vectors.target + at, mask, other=ignore_index).to(tl.int64)
    counts = label != ignore_index
    in_range = (label >= 0) & (label < n_classes)
    label = tl.where(counts & in_range, label, 0)
    share = tl.full(label.shape, 1.0, COMPUTE)
    if vectors.target_weight is not None:
        share = tl.load(vectors.target_weight + at, mask, other=0.0).to(COMPUTE)
    share = tl.where(counts, tl.where(in_range, share, float("nan")), 0.0)
    mass = share
    row_weight = share
    if vectors.weight is not None:
        mass = share * tl.load(vectors.weight + label, mask, other=0.0).to(COMPUTE)
    if vectors.mean_weight is not None:
        row_weight = share * tl.load(vectors.mean_weight + label, mask, other=0.0).to(COMPUTE)
    return label, mass, row_weight, share, counts


@triton.jit
def read_label(
    logits, vectors, starts, rows, k, mask_rows, stride_class, n_classes, tau, ignore_index,
    N_LABELS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Label k of each row: (class, mass but for smoothing, share of the smoothing, whether it counts), and of its class
    (z, what it stands at as the label, whether it is out)."""
    label, mass, _, share, counts = load_label(
        vectors, rows * N_LABELS + k, mask_rows, n_classes, ignore_index, COMPUTE
    )
    z, as_label, is_out = load_label_z(logits, vectors, starts, label, mask_rows, stride_class, tau, COMPUTE)
    return label, mass, share, counts, z, as_label, is_out


@triton.jit
def row_weights(vectors, rows, mask_rows, n_classes, ignore_index, N_LABELS: tl.constexpr, COMPUTE: tl.constexpr):
    """What each row counts for in the denominator of a mean: the mean class weight of its labels."""
    if N_LABELS == 0:
        return tl.where(mask_rows, 1.0, 0.0).to(COMPUTE)
    else:
        total = tl.zeros(rows.shape, COMPUTE)
        shares = tl.zeros(rows.shape, COMPUTE)
        for k in range(N_LABELS):
            _, _, row_weight, share, _ = load_label(
                vectors, rows * N_LABELS + k, mask_rows, n_classes, ignore_index, COMPUTE
            )
            total += row_weight
            shares += share
        return tl.where(shares == 0.0, 0.0, total / tl.where(shares == 0.0, 1.0, shares))


@triton.jit
def smoothing_mass(vectors, first, cols, mask, n_classes, smoothing, COMPUTE: tl.constexpr):
    """eps * q_c * weight_c of the classes first + cols, 0 outside the mask."""
    if vectors.smoothing_distribution is None:
        mass = tl.full(cols.shape, 1.0, COMPUTE) * (smoothing / n_classes).to(COMPUTE)
    else:
        mass = load_classes(vectors.smoothing_distribution, first, cols, mask).to(COMPUTE) * smoothing.to(COMPUTE)
    if vectors.weight is not None:
        mass = mass * load_classes(vectors.weight, first, cols, mask).to(COMPUTE)
    return mass if mask is None else tl.where(mask, mass, 0.0)


@triton.jit
def dense_mass(
    vectors, bases, first, cols, mask_rows, mask_cols, stride_class, n_classes, smoothing,
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """t_c of a tile's classes first + cols but for labels, (1 or BLOCK_ROWS, BLOCK_C).

    With labels it is what a row whose labels have a share of 1 in all asks for. `bases` is where class `first` of each
    row of probabilities stands.
    """
    mass = tl.zeros((1, cols.shape[0]), COMPUTE)
    if HAS_SMOOTHING:
        mass = smoothing_mass(vectors, first, cols, mask_cols, n_classes, smoothing, COMPUTE)[None, :]
    if N_LABELS == 0:
        probability = load_tile(vectors.target, bases, cols, stride_class, mask_rows, mask_cols, 0.0)
        of_target = probability.to(COMPUTE) * (1.0 - smoothing).to(COMPUTE)
        if vectors.weight is not None:
            of_target = of_target * load_classes(vectors.weight, first, cols, mask_cols).to(COMPUTE)[None, :]
        mass = mass + of_target
    return mass
