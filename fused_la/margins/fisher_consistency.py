"""Checks whether a `PairwiseMargin` meets the conditions of Theorem 1 for Fisher consistency."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_la._call import checks
from fused_la._call.pairwise_margin import PairwiseMargin, checked_margin, normalized_log_prior
from fused_la._call.values import check_has_values


@dataclass(frozen=True)
class Consistency:
    """Whether Theorem 1 covers a margin, as a truth value; `unmet` are the conditions that fail, `str()` a sentence."""

    unmet: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.unmet

    def __str__(self) -> str:
        if not self.unmet:
            return "consistent for the balanced error (Theorem 1)"
        return "not covered by Theorem 1: " + "; ".join(self.unmet)


def consistency(margin: PairwiseMargin, log_prior: Tensor) -> Consistency:
    r"""Whether Theorem 1 proves a loss consistent for the balanced error, and if not, which condition fails.

    .. math:: \alpha_y = \delta_y / \pi_y, \qquad \Delta_{yc} = \log(\delta_c / \delta_y)
              \qquad \text{for some } \delta > 0

    up to a constant factor of alpha, with one positive scale for all logits: scale and label_scale are each the same
    for all classes. Classes without examples (log_prior = -inf) are ignored. Numbers are compared to the precision of
    float32.

    Args:
        margin: the loss.
        log_prior: (C,) log class frequencies, up to a constant.

    Returns:
        Consistency: true if the theorem covers the margin; `str()` names the conditions that fail.

    Raises:
        TypeError, ValueError: margin is no PairwiseMargin; log_prior is no floating vector, not finite or -inf, or
            does not have the margin's length.

    Example:
        >>> from fused_la import log_prior_from_counts, margins
        >>> log_prior = log_prior_from_counts([900, 90, 10])
        >>> bool(margins.consistency(margins.logit_adjusted(log_prior), log_prior))
        True
        >>> margins.consistency(margins.logit_adjusted(log_prior, tau=2.0), log_prior).unmet[0][:45]
        'alpha must be proportional to delta / pi with'

    Source: Menon et al., ICLR 2021, Theorem 1.
    """
    checked_margin(margin)
    log_pi = normalized_log_prior(log_prior)
    check_has_values("log_prior", log_pi, "consistency")
    seen = log_pi > -math.inf
    log_pi, n_seen = log_pi[seen], int(seen.sum())

    def values_of_seen(vector: Tensor | float | None, default: float) -> Tensor:
        """A field of the margin for the classes with examples, in float64; a number or None is expanded."""
        if vector is None or not isinstance(vector, Tensor):
            return torch.full_like(log_pi, default if vector is None else float(vector))
        checks.check_class_vector("margin", vector, len(seen))
        return vector.detach().to(log_pi.device, torch.float64)[seen]

    alpha = values_of_seen(margin.alpha, 1.0)
    negative, target = values_of_seen(margin.negative_offset, 0.0), values_of_seen(margin.target_offset, 0.0)
    magnitudes = torch.stack([negative, target, log_pi]).abs()
    # Logarithms are compared; float32 rounds them to 6e-8 of their size.
    tolerance = 1e-5 + 1e-6 * magnitudes[magnitudes.isfinite()].amax()
    unmet = []
    for name in ("scale", "label_scale"):
        scale = values_of_seen(getattr(margin, name), 1.0)
        if bool((scale <= 0.0).any()) or bool((scale.amax() - scale.amin()) > 1e-5 * scale.abs().amax()):
            unmet.append(
                f"{name} must be one positive number for all classes, "
                f"but lies between {scale.amin().item():.4g} and {scale.amax().item():.4g}"
            )
    log_delta, difference = negative, (negative - target).abs()
    if not bool((torch.stack([negative, target]) > -math.inf).all()):
        unmet.append("negative_offset and target_offset must be finite, log delta, but are -inf for some class")
        return Consistency(tuple(unmet))
    if n_seen == 2:  # then the loss has only the two differences between a class and the other class
        difference = (negative.sum() - target.sum()).abs().expand(2)
        log_delta = torch.stack([target[0], negative[1]])
    if not bool(difference.amax() <= tolerance):
        class_index = int(seen.nonzero()[difference.argmax()])
        unmet.append(
            "negative_offset and target_offset must be equal, log delta, "
            f"but are {difference.amax().item():.4g} apart for class {class_index}"
        )
    elif not bool((alpha > 0.0).all()):
        unmet.append(f"alpha must be positive, but is 0 for class {int(seen.nonzero()[alpha.argmin()])}")
    else:
        ratio = alpha.log() + log_pi - log_delta
        spread = (ratio.amax() - ratio.amin()).item()
        if not spread <= tolerance:
            unmet.append(
                "alpha must be proportional to delta / pi with delta = exp(negative_offset), but alpha * pi / delta "
                f"differs between classes by a factor of up to {math.exp(min(spread, 700.0)):.6g} "
                "(for tau * log pi as offsets: alpha_y = pi_y^(tau - 1))"
            )
    return Consistency(tuple(unmet))
