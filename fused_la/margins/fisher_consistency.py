"""What Theorem 1 says about a margin."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_la._call import checks
from fused_la._call.pairwise_margin import PairwiseMargin, checked_margin, normalized_prior
from fused_la._call.values import check_has_values


@dataclass(frozen=True)
class Consistency:
    """Whether Theorem 1 covers a margin, which condition fails if not; true or false, and prints as a sentence."""

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

    up to a constant factor of alpha, for one positive scale of all logits. Classes without examples (log_prior = -inf)
    play no part. Numbers are compared to the precision of float32.

    Args:
        margin: the loss.
        log_prior: (C,) log class frequencies, up to a constant.

    Returns:
        Consistency: true if the theorem covers the margin; `str()` says what is not met.

    Raises:
        TypeError, ValueError: margin is no PairwiseMargin; log_prior is no floating vector, not finite or -inf, or
            not of the margin's length.

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
    prior = normalized_prior(log_prior)
    check_has_values("log_prior", prior, "consistency")
    seen = prior > -math.inf
    prior, n_seen = prior[seen], int(seen.sum())

    def of(vector: Tensor | float | None, default: float) -> Tensor:
        if vector is None or not isinstance(vector, Tensor):
            return torch.full_like(prior, default if vector is None else float(vector))
        checks.check_class_vector("margin", vector, len(seen))
        return vector.detach().to(prior.device, torch.float64)[seen]

    alpha, scale = of(margin.alpha, 1.0), of(margin.scale, 1.0)
    negative, target = of(margin.negative_offset, 0.0), of(margin.target_offset, 0.0)
    sizes = torch.stack([negative, target, prior]).abs()
    close = 1e-5 + 1e-6 * sizes[sizes.isfinite()].amax()  # of a logarithm; float32 rounds to 6e-8 of its size
    unmet = []
    if bool((scale <= 0.0).any()) or bool((scale.amax() - scale.amin()) > 1e-5 * scale.abs().amax()):
        unmet.append(
            "scale must be one positive number for all classes, "
            f"but lies between {scale.amin().item():.4g} and {scale.amax().item():.4g}"
        )
    log_delta, apart = negative, (negative - target).abs()
    if not bool((torch.stack([negative, target]) > -math.inf).all()):
        unmet.append("negative_offset and target_offset must be finite, log delta, but are -inf for some class")
        return Consistency(tuple(unmet))
    if n_seen == 2:  # then only the two differences between a class and the other one count
        apart = (negative.sum() - target.sum()).abs().expand(2)
        log_delta = torch.stack([target[0], negative[1]])
    if not bool(apart.amax() <= close):
        where = int(seen.nonzero()[apart.argmax()])
        unmet.append(
            "negative_offset and target_offset must be equal, log delta, "
            f"but are {apart.amax().item():.4g} apart for class {where}"
        )
    elif not bool((alpha > 0.0).all()):
        unmet.append(f"alpha must be positive, but is 0 for class {int(seen.nonzero()[alpha.argmin()])}")
    else:
        ratio = alpha.log() + prior - log_delta
        spread = (ratio.amax() - ratio.amin()).item()
        if not spread <= close:
            unmet.append(
                "alpha must be proportional to delta / pi with delta = exp(negative_offset), but alpha * pi / delta "
                f"differs between classes by a factor of up to {math.exp(min(spread, 700.0)):.6g} "
                "(for tau * log pi as offsets: alpha_y = pi_y^(tau - 1))"
            )
    return Consistency(tuple(unmet))
