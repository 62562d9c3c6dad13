"""Post-hoc corrections of a trained model for rare classes or another prior, and the choice of their tau.

    adjust_logits          f_c - tau * log pi_c
    divide_by_prior        f_c / pi_c^tau
    normalize_classifier   w_c / ||w_c||^tau
    estimate_prior         the class prior of examples without labels
    TauSweep               error rates by tau, and the best tau, for each of the first three

They are for models trained with plain cross entropy. A model trained with the logit-adjusted loss predicts with its raw
logits: adjusting again corrects twice.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_la._call import checks
from fused_la._call.problem import rows_by_classes
from fused_la._call.values import check_has_values, is_fake
from fused_la._evaluation.tau_sweep import TauSweep

__all__ = ["TauSweep", "adjust_logits", "divide_by_prior", "estimate_prior", "normalize_classifier"]


def adjust_logits(
    logits: Tensor,
    log_prior: Tensor,
    tau: float = 1.0,
    *,
    target_log_prior: Tensor | None = None,
    group: Tensor | None = None,
) -> Tensor:
    r"""Remove the training prior from the logits of a trained model, or replace it by another one.

    .. math:: z_c = f_c - \tau \, (\log \pi_c - \log \pi'_c)

    with pi the prior that the model was trained on and pi' the prior at test time, uniform unless `target_log_prior` is
    given. ``z.argmax(1)`` then has the least balanced error, ``z.softmax(1)`` is the posterior under pi' (tau = 1, and
    f a calibrated log posterior under pi).

    tau multiplies both priors. It is the scale of the logits (f = tau * log posterior), and tuning tau finds that
    scale, so the tau found on one test prior holds for another. At pi' = pi nothing changes, whatever tau is.

    Args:
        logits: (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        log_prior: (C,) floating, log class frequencies of training up to any constant, as `log_prior_from_counts`
            returns them. A class at -inf was never seen, so its logit means nothing: its result is -inf for every
            tau > 0. (The formula gives +inf, which would always predict it.)
        tau: strength of the adjustment, >= 0; 0 changes nothing.
        target_log_prior: (C,) floating, log class frequencies at test time up to any constant; a class at -inf does
            not occur there, and its result is -inf. None is uniform.
        group: the group of each row, for a log_prior or a target_log_prior of shape (G, C) with a prior for each group,
            as in `logit_adjusted_cross_entropy`.

    Returns:
        float32 (float64 for float64 logits), of the shape of the logits; differentiable in logits and priors. Half
        precision is not kept: between 8 and 16 a step of bfloat16 is 0.0625, and the adjustment decides
        differences of that size.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or range; the message names it.
        IndexError: a group outside [0, G), on a CPU; on a GPU, or if the value cannot be read, the row is NaN.

    Example:
        >>> import torch
        >>> from fused_la import adjust_logits, log_prior_from_counts
        >>> log_prior = log_prior_from_counts([900, 90, 10])
        >>> logits = torch.tensor([[2.0, 1.0, 1.5], [9.0, 0.0, 1.0]])
        >>> logits.argmax(1), adjust_logits(logits, log_prior).argmax(1)
        (tensor([0, 0]), tensor([2, 0]))

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 9; the change of priors is
        that of Saerens, Latinne and Decaestecker, Neural Computation 14 (2002).
    """
    tau = checks.check_tau(tau)
    checks.check_logits(logits)
    target_by_group = group is not None and getattr(target_log_prior, "ndim", 1) == 2
    by_group = group is not None and not (target_by_group and getattr(log_prior, "ndim", 2) == 1)
    checks.check_log_prior(log_prior, logits, tau, by_group=by_group)
    compute_dtype = _compute_dtype(logits)
    shift = log_prior.to(torch.promote_types(log_prior.dtype, compute_dtype))
    excluded = log_prior == -math.inf
    if target_log_prior is not None:
        checks.check_log_prior(target_log_prior, logits, tau, "target_log_prior", by_group=target_by_group)
        if by_group and target_by_group and len(log_prior) != len(target_log_prior):
            raise ValueError(f"target_log_prior must have {len(log_prior)} groups, got {len(target_log_prior)}")
        shift = shift - target_log_prior.to(torch.promote_types(target_log_prior.dtype, compute_dtype))
        excluded = excluded | (target_log_prior == -math.inf)
    groups = _groups(group, len(shift), logits)
    if tau == 0.0:
        return logits.to(compute_dtype, copy=True)
    adjusted = logits.to(compute_dtype) - _for_rows((shift * tau).to(compute_dtype), groups, logits)
    return _finish(adjusted, excluded, groups, logits)


def divide_by_prior(logits: Tensor, log_prior: Tensor, tau: float = 1.0, *, group: Tensor | None = None) -> Tensor:
    r"""Divide the scores of a trained model by a power of the training prior, the older form of the adjustment.

    .. math:: z_c = f_c / \pi_c^{\tau}

    Use it for comparison with published results. It is not optimal: a score below 0 is divided as well, so a rare class
    with a negative score only falls further behind. `adjust_logits` has no such case. (Dividing *probabilities* by the
    prior is `adjust_logits` of their logarithm.)

    Args:
        logits: scores, (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64.
        log_prior: (C,) floating, log class frequencies of training; a constant added to it multiplies every score by
            the same positive number. A class at -inf was never seen: its result is -inf for every tau > 0.
        tau: the power, >= 0; 0 changes nothing.
        group: as in `adjust_logits`, for a log_prior of shape (G, C).

    Returns:
        float32 (float64 for float64 logits), of the shape of the logits; differentiable in logits and prior.

    Raises:
        TypeError, ValueError, IndexError: as `adjust_logits`.

    Example:
        >>> import torch
        >>> from fused_la.posthoc import divide_by_prior
        >>> divide_by_prior(torch.tensor([3.0, 1.0, -1.0]), torch.tensor([0.5, 0.25, 0.25]).log())
        tensor([ 6.,  4., -4.])

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 5 with nu the class prior.
    """
    tau = checks.check_tau(tau)
    checks.check_logits(logits)
    checks.check_log_prior(log_prior, logits, tau, by_group=group is not None)
    compute_dtype, groups = _compute_dtype(logits), _groups(group, len(log_prior), logits)
    if tau == 0.0:
        return logits.to(compute_dtype, copy=True)
    excluded = log_prior == -math.inf
    wide = log_prior.to(torch.promote_types(log_prior.dtype, compute_dtype))
    factor = (-tau * wide.masked_fill(excluded, 0.0)).exp().to(compute_dtype)
    return _finish(logits.to(compute_dtype) * _for_rows(factor, groups, logits), excluded, groups, logits)


def normalize_classifier(weight: Tensor, tau: float = 1.0) -> Tensor:
    r"""Divide each class's row of a linear classifier by a power of its norm.

    .. math:: \hat w_c = w_c / \lVert w_c \rVert_2^{\tau}

    The bias is not part of the weight, and is used as trained: ``F.linear(features, normalize_classifier(weight,
    tau), bias)``. (Kang et al. train classifiers without one; leaving a trained bias out is another model.) It helps
    if norms follow the class frequencies, as they do under SGD with momentum, and less or not at all under Adam.

    Args:
        weight: (C, n_features) floating, one row a class.
        tau: the power, >= 0; 1 gives every class the same norm, 0 changes nothing.

    Returns:
        (C, n_features), in the dtype of `weight`; differentiable. Norms are computed in float32 (float64 for float64).
        A row of zeros stays zeros.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or range; the message names it.

    Example:
        >>> import torch
        >>> from fused_la import normalize_classifier
        >>> normalize_classifier(torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000],
                [0.0000, 0.0000]])

    Source: Kang et al., "Decoupling representation and classifier for long-tailed recognition", ICLR 2020 (tau-
        normalised classifier).
    """
    tau = checks.check_tau(tau)
    checks.check_classifier(weight)
    wide = weight.to(_compute_dtype(weight))
    norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return (wide * norm.masked_fill(norm == 0, 1.0) ** -tau).to(weight.dtype)


def estimate_prior(logits: Tensor, log_prior: Tensor, *, tolerance: float = 1e-6, max_iterations: int = 1000) -> Tensor:
    r"""Estimate the class prior of examples without labels from a model's logits on them.

    .. math:: \pi'_c \leftarrow \frac1N \sum_i \frac{\pi'_c \, p_i(c) / \pi_c}{\sum_k \pi'_k \, p_i(k) / \pi_k},
        \qquad p_i = \mathrm{softmax}(f_i)

    until pi' maximises the likelihood of the examples: expectation maximisation, started at the training prior pi. The
    log likelihood is concave in pi', so there is one maximum. An iterate is below it by at most the log of the largest
    factor by which a class still grows, and the last iterate by no more than `tolerance`.

    The estimate is as good as the model's calibration. Use it as ``adjust_logits(logits, log_prior, target_log_prior=
    estimate_prior(logits, log_prior))``. It reads values: on a GPU it waits for the device.

    Args:
        logits: of all examples at once, (N, C), (C,) or (N, C, d1, ..., dk), finite or -inf, of a model trained with
            plain cross entropy. They are copied in float64.
        log_prior: (C,) floating, log class frequencies of training up to any constant. A class at -inf was never seen
            and is estimated as -inf.
        tolerance: > 0, on the mean log likelihood of an example, in nats.
        max_iterations: >= 1; if they do not suffice, it warns and returns the last iterate.

    Returns:
        Log prior of the examples, (C,), float32 (float64 for float64 logits), computed in float64, without gradient.
        The prior of a class that no example supports tends to 0, its log to -inf.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or range, no rows, or a row with a
            NaN, an infinity or no class above -inf.

    Example:
        >>> import torch
        >>> from fused_la.posthoc import estimate_prior
        >>> logits = torch.tensor([[8.0, 0.0], [8.0, 0.0], [0.0, 8.0], [8.0, 0.0]])
        >>> estimate_prior(logits, torch.tensor([0.5, 0.5]).log()).exp()
        tensor([0.7502, 0.2498])

    Source: Saerens, Latinne and Decaestecker, "Adjusting the outputs of a classifier to new a priori probabilities",
        Neural Computation 14 (2002).
    """
    tolerance = checks.check_number("tolerance", tolerance, 5e-324, 1e308, "positive and finite")
    max_iterations = checks.check_int("max_iterations", max_iterations, 1)
    checks.check_logits(logits)
    checks.check_log_prior(log_prior, logits, 1.0)
    prior = log_prior.detach().double().softmax(0)
    if is_fake(logits):
        return prior.log().to(_compute_dtype(logits))  # only its shape matters
    check_has_values("logits", logits, "estimate_prior")
    ratio = rows_by_classes(logits.detach()).flatten(0, 1).double() - log_prior.detach().double()
    if len(ratio) == 0:
        raise ValueError(f"logits must have at least one row, got shape {tuple(logits.shape)}")
    ratio.masked_fill_(log_prior == -math.inf, -math.inf)
    row_max = ratio.amax(1, keepdim=True)
    if not row_max.isfinite().all():
        row = int((~row_max.isfinite()).flatten().nonzero()[0])
        raise ValueError(
            "logits must be finite or -inf, and finite for some class with a prior in every row, "
            f"got a largest of {row_max[row].item()} in row {row}"
        )
    ratio = ratio.sub_(row_max).exp_()  # p_i(c) / pi_c up to a factor a row, which cancels in the iteration

    def growth() -> Tensor:
        return (ratio @ prior).reciprocal_() @ ratio / len(ratio)

    factor = growth()
    for _ in range(max_iterations):
        if factor.max() - 1.0 <= tolerance:
            break
        prior = prior * factor
        factor = growth()
    else:
        gap = float(factor.max()) - 1.0
        if gap > tolerance:
            warnings.warn(
                f"estimate_prior has not converged in max_iterations = {max_iterations}: the mean log likelihood may "
                f"be {gap:.2g} below its maximum, tolerance is {tolerance:g}",
                RuntimeWarning,
                stacklevel=2,
            )
    return prior.log().to(_compute_dtype(logits))


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _groups(group: Any, n_groups: int, logits: Tensor) -> Tensor | None:
    """The checked group of each row, in the shape of the logits without their classes."""
    if group is None:
        return None
    dim = checks.class_dim(logits)
    groups = checks.rows_of_groups(group, logits.shape[:dim] + logits.shape[dim + 1 :], logits)
    checks.check_groups_in_range(groups, n_groups)
    return groups


def _for_rows(values: Tensor, groups: Tensor | None, logits: Tensor) -> Tensor:
    """(C,) values, or those of each row's group of (G, C), in a shape that broadcasts over the logits."""
    dim = checks.class_dim(logits)
    if groups is None:
        return values.view(-1, *[1] * (logits.dim() - 1 - dim))
    groups = groups.clamp(0, len(values) - 1)
    return (values[groups] if values.dtype == torch.bool else F.embedding(groups, values)).movedim(-1, dim)


def _finish(scores: Tensor, excluded: Tensor, groups: Tensor | None, logits: Tensor) -> Tensor:
    """The scores, -inf for excluded classes and NaN for rows whose group is out of range."""
    scores = scores.masked_fill(_for_rows(excluded, groups, logits), -math.inf)
    if groups is None:
        return scores
    in_range = (groups >= 0) & (groups < len(excluded))
    return scores.masked_fill(~in_range.unsqueeze(checks.class_dim(logits)), math.nan)
