"""The loss of rows whose m and rest are known, with what their labels add to the dense target mass.

loss = sum_c t_c * (m - z_c) + A * log1p(rest),      A = sum_c t_c
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_la._triton.online import others_than
from fused_la._triton.targets import read_label
from fused_la._triton.tiles import exp, log1p, past


@triton.jit
def row_loss(
    logits, vectors, rows, mask_rows, starts, stride_class, n_classes, m, rest, gap, total, lone_label,
    tau, smoothing, ignore_index,
    N_LABELS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """(loss, A, share of the smoothing mass, whether any label counts) of each row; gap and total are those of its
    dense target mass.

    Of labels with a target_offset A is (1 + rest) * sum_k t_k / d_k, d_k the denominator of label k's own softmax.
    """
    if N_LABELS == 0:
        return gap + total * log1p(rest), total, tl.full(rows.shape, 1.0, COMPUTE), mask_rows
    else:
        label_gap = tl.zeros(rows.shape, COMPUTE)
        label_total = tl.zeros(rows.shape, COMPUTE)
        share_row = tl.zeros(rows.shape, COMPUTE)
        live = tl.zeros(rows.shape, tl.int1)
        for k in range(N_LABELS):
            if N_LABELS == 1:
                _label, mass, share, counts, z, as_label, _is_out = lone_label
            else:
                _label, mass, share, counts, z, as_label, _is_out = read_label(
                    logits, vectors, starts, rows, k, mask_rows, stride_class, n_classes, tau, ignore_index,
                    N_LABELS, COMPUTE,
                )  # fmt: skip
            if HAS_SMOOTHING:
                mass = mass * (1.0 - smoothing).to(COMPUTE)
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
            if HAS_SMOOTHING:
                label_gap += share_row * gap
                label_total += share_row * total
            label_gap += label_total * log1p(rest)
        return tl.where(live, label_gap, 0.0), label_total, share_row, live
