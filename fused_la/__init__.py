"""The logit-adjusted loss for long-tailed classification (Menon et al., ICLR 2021), fused, for PyTorch."""

from fused_la import margins
from fused_la.loss import LogitAdjustedCrossEntropyLoss, logit_adjusted_cross_entropy, margin_cross_entropy
from fused_la.margins import PairwiseMargin
from fused_la.prior import count_classes, log_prior_from_counts

__version__ = "0.1.0"

__all__ = [
    "LogitAdjustedCrossEntropyLoss",
    "PairwiseMargin",
    "count_classes",
    "log_prior_from_counts",
    "logit_adjusted_cross_entropy",
    "margin_cross_entropy",
    "margins",
]
