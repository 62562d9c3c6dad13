r"""Pairwise-margin losses, the family of the logit-adjusted loss; each is up to five vectors over the classes.

.. math:: \ell(y, f) = \alpha_y \log\Big[1 + \sum_{c \ne y} e^{\Delta_{yc} + f_c - f_y}\Big]

Every preset has :math:`\Delta_{yc} = u_c - v_y` and may scale the logits, by their class and by the row's label. With

    z_c = scale_c * f_c * label_scale_y + negative_offset_c        for the other classes
    z_y = scale_y * f_y * label_scale_y + target_offset_y          for the label

the loss is `alpha_y * log1p(sum of exp(z_c - z_y) over the other classes)`. `margin_cross_entropy` computes it.

Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 11.
"""

from fused_la._call.pairwise_margin import PairwiseMargin
from fused_la.margins.federated import fedlc, fedrs
from fused_la.margins.fisher_consistency import consistency
from fused_la.margins.presets import (
    adaptive,
    balanced,
    balanced_softmax,
    cdt,
    equalised,
    erm,
    fisher_consistent,
    immax,
    ldam,
    logit_adjusted,
    logit_adjusted_adaptive,
    vector_scaling,
)

__all__ = [
    "PairwiseMargin", "adaptive", "balanced", "balanced_softmax", "cdt", "consistency", "equalised", "erm", "fedlc",
    "fedrs", "fisher_consistent", "immax", "ldam", "logit_adjusted", "logit_adjusted_adaptive", "vector_scaling",
]  # fmt: skip
