"""Preset losses of the pairwise-margin family: each makes a `PairwiseMargin` from a log prior or from margins."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fused_la._call import checks
from fused_la._call.pairwise_margin import PairwiseMargin, normalized_log_prior, to_prior_dtype
from fused_la._call.values import holds_or_unknown


def erm() -> PairwiseMargin:
    r"""Plain cross entropy: alpha = 1, Delta = 0. Not consistent for the balanced error.

    .. math:: \ell(y, f) = \log\Big[1 + \sum_{c \ne y} e^{f_c - f_y}\Big]

    Example:
        >>> from fused_la import margins
        >>> margins.erm()
        PairwiseMargin()

    Source: Menon et al., ICLR 2021, section 2.
    """
    return PairwiseMargin()


def balanced(log_prior: Tensor) -> PairwiseMargin:
    r"""Cross entropy with each row weighted by its label: alpha_y = 1 / pi_y, Delta = 0. Consistent.

    .. math:: \ell(y, f) = \frac{1}{\pi_y} \log\Big[1 + \sum_{c \ne y} e^{f_c - f_y}\Big]

    Args:
        log_prior: (C,) log class frequencies, up to a constant; the constant is restored here.

    Raises:
        TypeError, ValueError: log_prior is no floating vector, or not finite or -inf.

    Example:
        >>> from fused_la import log_prior_from_counts, margins
        >>> margins.balanced(log_prior_from_counts([900, 90, 10])).alpha
        tensor([  1.1111,  11.1111, 100.0000])

    Source: Menon et al., ICLR 2021, equation 4.
    """
    return PairwiseMargin(alpha=to_prior_dtype((-normalized_log_prior(log_prior)).exp(), log_prior))


def adaptive(log_prior: Tensor) -> PairwiseMargin:
    r"""The paper's form of LDAM, with larger margins for rarer classes: alpha = 1, Delta_yc = pi_y^(-1/4).

    .. math:: \ell(y, f) = \log\Big[1 + \sum_{c \ne y} e^{\pi_y^{-1/4} + f_c - f_y}\Big]

    Not consistent. `ldam` is LDAM as its authors train it, on cosines.

    Args:
        log_prior: (C,) log class frequencies, up to a constant; the constant is restored here.

    Raises:
        TypeError, ValueError: log_prior is no floating vector, or not finite or -inf.

    Example:
        >>> from fused_la import log_prior_from_counts, margins
        >>> margins.adaptive(log_prior_from_counts([900, 90, 10])).target_offset
        tensor([-1.0267, -1.8257, -3.1623])

    Source: Menon et al., ICLR 2021, equation 5, after Cao et al., NeurIPS 2019.
    """
    return PairwiseMargin(target_offset=to_prior_dtype(-(-0.25 * normalized_log_prior(log_prior)).exp(), log_prior))


def ldam(log_prior: Tensor, max_margin: float = 0.5, scale: float = 30.0) -> PairwiseMargin:
    r"""Label-distribution-aware margins on cosine logits: alpha = 1, Delta_yc = scale * m_y.

    .. math:: \ell(y, f) = \log\Big[1 + \sum_{c \ne y} e^{s (f_c - f_y + m_y)}\Big],
              \qquad m_y = m_{\max} (n_{\min} / n_y)^{1/4}

    The logits are cosines, of normalised features and class weights. Not consistent.

    Args:
        log_prior: (C,) log class frequencies, up to a constant.
        max_margin: margin of the rarest class, >= 0, in cosines.
        scale: s, > 0.

    Raises:
        TypeError, ValueError: log_prior is no floating vector, or not finite or -inf; a number out of its range.

    Example:
        >>> from fused_la import log_prior_from_counts, margins
        >>> margins.ldam(log_prior_from_counts([160, 10])).target_offset
        tensor([ -7.5000, -15.0000])

    Source: Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", NeurIPS 2019.
    """
    max_margin = checks.check_number("max_margin", max_margin, 0.0, 1e30, "finite and not negative")
    scale = checks.check_number("scale", scale, 1e-30, 1e30, "finite and positive")
    log_pi = normalized_log_prior(log_prior)
    rarest = log_pi.masked_fill(log_pi == -math.inf, math.inf).amin()
    class_margin = max_margin * ((rarest - log_pi) / 4.0).exp() if max_margin > 0.0 else torch.zeros_like(log_pi)
    return PairwiseMargin(target_offset=to_prior_dtype(-scale * class_margin, log_prior), scale=scale)


def equalised(log_prior: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> PairwiseMargin:
    r"""Equalised loss, where examples of other classes suppress rare classes less: alpha = 1, Delta_yc = log F(pi_c).

    .. math:: \ell(y, f) = \log\Big[1 + \sum_{c \ne y} F(\pi_c) \, e^{f_c - f_y}\Big]

    Not consistent.

    Args:
        log_prior: (C,) log class frequencies, up to a constant; the constant is restored here.
        transform: F, a non-decreasing function of the frequencies (C,), float64, into [0, 1]; None is F(pi) = pi.

    Raises:
        TypeError, ValueError: log_prior is no floating vector, or not finite or -inf; F leaves [0, 1].

    Example:
        >>> from fused_la import log_prior_from_counts, margins
        >>> log_prior = log_prior_from_counts([900, 90, 10])
        >>> margins.equalised(log_prior, lambda pi: (pi > 0.05).double().clamp_min(1e-3)).negative_offset
        tensor([ 0.0000,  0.0000, -6.9078])

    Source: Menon et al., ICLR 2021, equation 6, after Tan et al., "Equalization loss", CVPR 2020.
    """
    log_pi = normalized_log_prior(log_prior)
    if transform is None:
        return PairwiseMargin(negative_offset=to_prior_dtype(log_pi, log_prior))
    values = transform(log_pi.exp())
    checks.check_tensor("transform(pi)", values)
    if values.shape != log_pi.shape or not holds_or_unknown(((values >= 0.0) & (values <= 1.0)).all()):
        raise ValueError(f"transform must give {len(log_pi)} numbers between 0 and 1, got {values}")
    return PairwiseMargin(negative_offset=to_prior_dtype(values.double().log(), log_prior))


def logit_adjusted(log_prior: Tensor, tau: float = 1.0, consistent: bool = False) -> PairwiseMargin:
    r"""The logit-adjusted loss: Delta_yc = tau * log(pi_c / pi_y), alpha = 1 or, if `consistent`, pi_y^(tau - 1).

    .. math:: \ell(y, f) = \alpha_y \log\Big[1 + \sum_{c \ne y} \Big(\frac{\pi_c}{\pi_y}\Big)^{\tau} e^{f_c - f_y}\Big]

    Consistent for the balanced error at tau = 1, and with `consistent` at any tau.

    Args:
        log_prior: (C,) log class frequencies, up to a constant.
        tau: strength of the adjustment, >= 0.
        consistent: use the alpha that Theorem 1 requires for consistency at this tau.

    Raises:
        TypeError, ValueError: log_prior is no floating vector, or not finite or -inf; tau is negative.

    Example:
        >>> from fused_la import log_prior_from_counts, margins
        >>> margin = margins.logit_adjusted(log_prior_from_counts([900, 90, 10]), tau=2.0, consistent=True)
        >>> margin.alpha
        tensor([0.9000, 0.0900, 0.0100])

    Source: Menon et al., ICLR 2021, equations 10 and 11, Theorem 1.
    """
    tau, log_pi = checks.check_tau(tau), normalized_log_prior(log_prior)
    offset = to_prior_dtype(tau * log_pi, log_prior) if tau > 0.0 else None
    alpha = to_prior_dtype(((tau - 1.0) * log_pi).exp(), log_prior) if consistent and tau != 1.0 else None
    return PairwiseMargin(alpha=alpha, negative_offset=offset, target_offset=offset)


def logit_adjusted_adaptive(log_prior: Tensor) -> PairwiseMargin:
    r"""The sum of the margins `logit_adjusted` and `adaptive`: alpha = 1, Delta_yc = log(pi_c / pi_y) + pi_y^(-1/4).

    .. math:: \ell(y, f) = \log\Big[1 + \sum_{c \ne y} \frac{\pi_c}{\pi_y} e^{\pi_y^{-1/4} + f_c - f_y}\Big]

    Args:
        log_prior: (C,) log class frequencies, up to a constant; the constant is restored here.

    Raises:
        TypeError, ValueError: log_prior is no floating vector, or not finite or -inf.

    Example:
        >>> from fused_la import log_prior_from_counts, margins
        >>> margins.logit_adjusted_adaptive(log_prior_from_counts([900, 90, 10])).target_offset
        tensor([-1.1321, -4.2337, -7.7674])

    Source: Menon et al., ICLR 2021, section 5.2.
    """
    log_pi = normalized_log_prior(log_prior)
    return PairwiseMargin(
        negative_offset=to_prior_dtype(log_pi, log_prior),
        target_offset=to_prior_dtype(log_pi - (-0.25 * log_pi).exp(), log_prior),
    )


def balanced_softmax(log_prior: Tensor) -> PairwiseMargin:
    r"""Balanced softmax. It is the logit-adjusted loss at tau = 1: log n_c differs from log pi_c by a constant.

    .. math:: \ell(y, f) = -\log \frac{n_y e^{f_y}}{\sum_c n_c e^{f_c}}

    Args:
        log_prior: (C,) log class frequencies, up to a constant.

    Raises:
        TypeError, ValueError: log_prior is no floating vector, or not finite or -inf.

    Example:
        >>> from fused_la import log_prior_from_counts, margins
        >>> margins.balanced_softmax(log_prior_from_counts([900, 90, 10])).negative_offset
        tensor([-0.1054, -2.4079, -4.6052])

    Source: Ren et al., "Balanced meta-softmax for long-tailed visual recognition", NeurIPS 2020.
    """
    return logit_adjusted(log_prior)


def _relative_frequency(log_prior: Tensor, gamma: float) -> Tensor:
    """(n_c / n_max)^gamma; at gamma = 0 it is 1 also for a class without examples."""
    gamma = checks.check_number("gamma", gamma, 0.0, 1e30, "finite and not negative")
    log_pi = normalized_log_prior(log_prior)
    ratio = ((log_pi - log_pi.amax()) * gamma).exp() if gamma > 0.0 else torch.ones_like(log_pi)
    return to_prior_dtype(ratio, log_prior)


def vector_scaling(log_prior: Tensor, gamma: float, tau: float) -> PairwiseMargin:
    r"""Vector-scaling loss: logits scaled by (n_c / n_max)^gamma and adjusted by tau * log pi_c.

    .. math:: \ell(y, f) = \log\Big[1 + \sum_{c \ne y}
              e^{(s_c f_c + \tau \log \pi_c) - (s_y f_y + \tau \log \pi_y)}\Big], \qquad s_c = (n_c / n_{\max})^{\gamma}

    Args:
        log_prior: (C,) log class frequencies, up to a constant.
        gamma: exponent of the scale, >= 0.
        tau: strength of the adjustment, >= 0.

    Raises:
        TypeError, ValueError: log_prior is no floating vector, or not finite or -inf; a negative number.

    Example:
        >>> from fused_la import log_prior_from_counts, margins
        >>> margins.vector_scaling(log_prior_from_counts([900, 90, 10]), gamma=0.5, tau=1.0).scale
        tensor([1.0000, 0.3162, 0.1054])

    Source: Kini et al., "Label-imbalanced and group-sensitive classification under overparameterization", NeurIPS 2021.
    """
    return replace(logit_adjusted(log_prior, tau), scale=_relative_frequency(log_prior, gamma))


def cdt(log_prior: Tensor, gamma: float) -> PairwiseMargin:
    r"""Class-dependent temperatures (CDT): logits scaled by (n_c / n_max)^gamma, alpha = 1, no offsets. Not consistent.

    .. math:: \ell(y, f) = \log\Big[1 + \sum_{c \ne y} e^{s_c f_c - s_y f_y}\Big],
              \qquad s_c = (n_c / n_{\max})^{\gamma}

    Args:
        log_prior: (C,) log class frequencies, up to a constant.
        gamma: exponent of the scale, >= 0.

    Raises:
        TypeError, ValueError: log_prior is no floating vector, or not finite or -inf; gamma is negative.

    Example:
        >>> from fused_la import log_prior_from_counts, margins
        >>> margins.cdt(log_prior_from_counts([900, 90, 10]), gamma=0.5).scale
        tensor([1.0000, 0.3162, 0.1054])

    Source: Ye et al., "Identifying and compensating for feature deviation in imbalanced deep learning", 2020.
    """
    return PairwiseMargin(scale=_relative_frequency(log_prior, gamma))


def fisher_consistent(log_prior: Tensor, log_delta: Tensor) -> PairwiseMargin:
    r"""Any loss that Theorem 1 proves consistent: alpha_y = delta_y / pi_y, Delta_yc = log(delta_c / delta_y).

    .. math:: \ell(y, f) = \frac{\delta_y}{\pi_y}
              \log\Big[1 + \sum_{c \ne y} \frac{\delta_c}{\delta_y} e^{f_c - f_y}\Big]

    delta = pi gives `logit_adjusted` at tau = 1, delta = 1 gives `balanced`.

    Args:
        log_prior: (C,) log class frequencies, up to a constant; the constant is restored here.
        log_delta: (C,) floating and finite, the logarithm of any delta > 0.

    Raises:
        TypeError, ValueError: log_prior is no floating vector, or not finite or -inf; log_delta is not finite or does
            not have the shape of log_prior.

    Example:
        >>> from fused_la import log_prior_from_counts, margins
        >>> log_prior = log_prior_from_counts([900, 90, 10])
        >>> print(margins.consistency(margins.fisher_consistent(log_prior, 0.3 * log_prior), log_prior))
        consistent for the balanced error (Theorem 1)

    Source: Menon et al., ICLR 2021, Theorem 1.
    """
    log_pi = normalized_log_prior(log_prior)
    checks.check_class_vector("log_delta", log_delta, len(log_pi))
    if not holds_or_unknown(log_delta.isfinite().all()):
        raise ValueError(f"log_delta must be finite, got {log_delta}")
    offset = to_prior_dtype(log_delta.double(), log_prior)
    alpha = to_prior_dtype((log_delta.double() - log_pi).exp(), log_prior)
    return PairwiseMargin(alpha=alpha, negative_offset=offset, target_offset=offset)


def immax(class_margins: Tensor) -> PairwiseMargin:
    r"""IMMAX, a confidence margin rho_y for each class: all logits of a row are divided by that of its label.

    .. math:: \ell(y, f) = \log\Big[1 + \sum_{c \ne y} e^{(f_c - f_y) / \rho_y}\Big]

    The margins are hyperparameters. A choice to start from is a constant times `(log_prior / 3).exp()`: for a fixed sum
    of the margins, rho_c proportional to n_c^(1/3) minimises sum_c n_c / rho_c^2. Not covered by Theorem 1 unless all
    rho are equal.

    Args:
        class_margins: (C,) floating, finite and > 0: rho, in units of the logits.

    Raises:
        TypeError, ValueError: class_margins is no floating vector, or not finite and positive.

    Example:
        >>> from fused_la import log_prior_from_counts, margins
        >>> log_prior = log_prior_from_counts([1000, 125, 8])
        >>> margins.immax(2.0 * (log_prior / 3).exp()).label_scale
        tensor([0.5213, 1.0425, 2.6063])

    Source: Cortes, Mao, Mohri and Zhong, "Balancing the scales: A theoretical and algorithmic framework for learning
    from imbalanced data", ICML 2025.
    """
    checks.check_tensor("class_margins", class_margins)
    if class_margins.dim() != 1 or len(class_margins) == 0:
        raise ValueError(f"class_margins must have shape (C,), got {tuple(class_margins.shape)}")
    checks.check_class_vector("class_margins", class_margins, len(class_margins))
    label_scale = to_prior_dtype(class_margins.double().reciprocal(), class_margins)
    allowed = (class_margins > 0.0) & label_scale.isfinite() & (label_scale > 0.0)
    if not holds_or_unknown(allowed.all()):
        bad = int((~allowed).nonzero()[0])
        got = f"{class_margins[bad].item()} for class {bad}, with a reciprocal of {label_scale[bad].item()}"
        raise ValueError(f"class_margins must be finite and positive, got {got}")
    return PairwiseMargin(label_scale=label_scale)
