"""The logit-adjusted loss for long-tailed classification (Menon et al., ICLR 2021), fused, for PyTorch."""

import typing

from fused_la import margins
from fused_la.linear import LogitAdjustedLinear, linear_logit_adjusted_cross_entropy, linear_margin_cross_entropy
from fused_la.loss import (
    LogitAdjustedCrossEntropyLoss,
    MarginCrossEntropyLoss,
    logit_adjusted_cross_entropy,
    margin_cross_entropy,
)
from fused_la.margins import PairwiseMargin
from fused_la.posthoc import adjust_logits, normalize_classifier
from fused_la.prior import count_classes, log_prior_from_counts

__version__ = "0.1.0"

__all__ = [
    "LogitAdjustedCrossEntropyLoss",
    "LogitAdjustedLinear",
    "MarginCrossEntropyLoss",
    "PairwiseMargin",
    "adjust_logits",
    "count_classes",
    "linear_logit_adjusted_cross_entropy",
    "linear_margin_cross_entropy",
    "log_prior_from_counts",
    "logit_adjusted_cross_entropy",
    "margin_cross_entropy",
    "margins",
    "normalize_classifier",
]

if typing.TYPE_CHECKING:
    from fused_la import distributed as distributed
    from fused_la import metrics as metrics
else:

    def __getattr__(name: str):
        if name == "metrics":  # imported on first use: it needs torchmetrics, which nothing else does
            import fused_la.metrics

            return fused_la.metrics
        if name == "distributed":  # some PyTorch builds lack torch.distributed
            import fused_la.distributed

            return fused_la.distributed
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
