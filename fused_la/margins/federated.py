"""Preset losses of federated learning: each makes a `PairwiseMargin` from the classes that one client has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fused_la._call import checks
from fused_la._call.class_counts import checked_counts, dtype_name, to_array
from fused_la._call.pairwise_margin import PairwiseMargin
from fused_la._call.values import holds_or_unknown


def fedlc(class_counts: Tensor | np.ndarray | Sequence[float] | Mapping[int, float], tau: float) -> PairwiseMargin:
    r"""FedLC, logits calibrated by the counts of one client: alpha = 1, Delta_yc = tau * (n_y^(-1/4) - n_c^(-1/4)).

    .. math:: \ell(y, f) = -\log \frac{e^{f_y - \tau n_y^{-1/4}}}{\sum_c e^{f_c - \tau n_c^{-1/4}}}

    A class without examples has the offset -inf, also at tau = 0: it takes no part. Not consistent.

    Args:
        class_counts: (C,) examples of each class on the client, or counts by class, as in `log_prior_from_counts`.
        tau: strength of the calibration, >= 0.

    Raises:
        TypeError, ValueError: counts that are not numbers, not one-dimensional, negative, not finite, or 0 for all
            classes; tau is negative.

    Example:
        >>> from fused_la import margins
        >>> margins.fedlc([10000, 16, 0], tau=1.0).negative_offset
        tensor([-0.1000, -0.5000,    -inf])

    Source: Zhang et al., "Federated learning with label distribution skew via logits calibration", ICML 2022.
    """
    tau, counts = checks.check_tau(tau), torch.as_tensor(checked_counts(class_counts))
    if not holds_or_unknown((counts > 0).any()):
        raise ValueError(f"class_counts must have a positive count, got 0 for all {len(counts)} classes")
    offset = torch.where(counts > 0, -tau * counts**-0.25, -math.inf).float()
    offset = offset.to(class_counts.device if isinstance(class_counts, Tensor) else "cpu")
    return PairwiseMargin(negative_offset=offset, target_offset=offset)


def fedrs(present: Tensor | np.ndarray | Sequence[bool], alpha: float = 0.5) -> PairwiseMargin:
    r"""FedRS, a softmax restricted to the classes of one client: logits of missing classes are scaled by alpha.

    .. math:: \ell(y, f) = \log\Big[1 + \sum_{c \ne y} e^{s_c f_c - s_y f_y}\Big],
              \qquad s_c = 1 \text{ if class } c \text{ is present, else } \alpha

    Not consistent. The factor of a row's loss, which `PairwiseMargin` calls alpha, is 1.

    Args:
        present: (C,) bool, the classes of which the client has examples, such as `class_counts > 0`.
        alpha: scale of the logits of missing classes, in [0, 1]. 1 is plain cross entropy.

    Raises:
        TypeError, ValueError: present is no vector of bools; alpha is not in [0, 1].

    Example:
        >>> import torch
        >>> from fused_la import margins
        >>> margins.fedrs(torch.tensor([900, 90, 0]) > 0).scale
        tensor([1.0000, 1.0000, 0.5000])

    Source: Li and Zhan, "FedRS: Federated learning with restricted softmax for label distribution non-IID data", KDD
    2021.
    """
    alpha, expected = checks.check_number("alpha", alpha, 0.0, 1.0, "between 0 and 1"), "bool, as class_counts > 0 is"
    if not isinstance(present, Tensor):
        present = np.empty(0, bool) if isinstance(present, (list, tuple)) and len(present) == 0 else present
        present = torch.from_numpy(to_array(present, "present", "b", expected).copy())
    checks.check_tensor("present", present)
    if present.dtype != torch.bool:
        raise TypeError(f"present must be {expected}, got {dtype_name(present)}")
    if present.dim() != 1 or len(present) == 0:
        raise ValueError(f"present must have shape (C,), got {tuple(present.shape)}")
    return PairwiseMargin(scale=torch.where(present, 1.0, alpha).float())
