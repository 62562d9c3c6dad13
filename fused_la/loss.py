"""The door of the losses of logits: check, choose an implementation, shape the result."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_la import _checks, reference
from fused_la._autograd import fused_loss, under_transform
from fused_la._call import Call, read_call, read_margin, read_prior
from fused_la._choice import choose_implementation
from fused_la._margin import PairwiseMargin
from fused_la._options import LossOptions
from fused_la._problem import reduce_rows
from fused_la._transforms import folded_loss


def logit_adjusted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    log_prior: Tensor,
    tau: float = 1.0,
    *,
    target_weight: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing_distribution: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Cross entropy of logits with `tau * log_prior` added: the loss whose minimiser has the least balanced error.

    .. math::
        \ell(y, f) = -\log \mathrm{softmax}(f + \tau \log \pi)_y
                   = \log\Big[1 + \sum_{c \ne y} \Big(\frac{\pi_c}{\pi_y}\Big)^{\tau} e^{f_c - f_y}\Big]

    Equivalent to: ``F.cross_entropy(z, target)`` with ``z = logits.float() + tau * log_prior`` (float64 logits stay
    float64), every other argument of `torch.nn.functional.cross_entropy` meaning what it means there. With a
    `smoothing_distribution` q and eps = `label_smoothing`, where every row counts and without `weight`:
    ``(1 - eps) * F.cross_entropy(z, target) + eps * F.cross_entropy(z, q.expand_as(z))``. The logits are never written,
    and a confident row keeps the digits of its loss and gradient.

    Train with it and predict with the raw logits, `logits.argmax(1)`: adjusting again post hoc corrects twice.

    Args:
        logits: (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64; any strides; N may be 0.
            Or a DTensor with its classes sharded over one mesh dimension: what is per class is then a DTensor that is
            sharded alike, or a whole tensor, and the loss a DTensor that is the same everywhere (see `distributed`).
        target: int64 class indices of shape (), (N,) or (N, d1, ..., dk); or class probabilities, floating, of the
            shape of the logits; or with `target_weight` indices of shape (N, K) ((K,), (N, K, d1, ..., dk)).
        log_prior: (C,) floating, log class frequencies up to any constant, as `log_prior_from_counts` makes them. A
            class at -inf has probability 0 and gradient 0. It gets a gradient if it requires one.
        tau: strength of the adjustment, >= 0. 1 is consistent for the balanced error, 0 is plain cross entropy.
        target_weight: floating, of the shape of `target`: weights of K labels a row, as mixup and cutmix make them.
            The row's loss is ``sum_k target_weight[:, k] * loss(target[:, k])``. A mean counts such a row as one (with
            `weight`: as the mean weight of its labels).
        weight: (C,) floating, a factor for each class. Its values, those of `target_weight` and class probabilities
            are taken as they are, as in `torch.nn.functional.cross_entropy`: negative ones count, NaN spreads.
        ignore_index: label that does not count: its row (its part of a row of K labels) has loss and gradient 0.
        reduction: "none", "mean" (over rows that count, weighted by `weight`; NaN if there are none) or "sum".
        label_smoothing: share in [0, 1] of the target moved to `smoothing_distribution`.
        smoothing_distribution: (C,) probabilities; None is uniform, which makes the loss inconsistent on long-tailed
            data and infinite if a class is at -inf. `log_prior.exp()` smooths toward the prior and keeps it consistent.
        impl: "auto" is "triton" on a GPU, "blocked" on a CPU, and "reference" for anything else: while torch.compile
            traces a CPU graph, where Triton is not installed, or when a target or a weight requires grad. A named
            one works or raises; `vmap` and `grad` of torch.func run it too. Whichever is named, second derivatives,
            forward mode (`jvp`) and transforms under torch.compile compute by the reference formula.

    Returns:
        float32 (float64 for float64 logits): a scalar, or with reduction "none" one loss a row in the shape that index
        labels have.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or range; the message names it.
        IndexError: a label outside [0, C) that is not ignore_index, on a CPU. On a GPU, and where a transform or
            torch.compile hides the value, nothing outside the row is read and the row's loss and gradient are NaN; so
            are all rows' for an impossible `log_prior` or `smoothing_distribution`.

    Example:
        >>> import torch
        >>> from fused_la import log_prior_from_counts, logit_adjusted_cross_entropy
        >>> log_prior = log_prior_from_counts([900, 90, 10])
        >>> logits = torch.tensor([[2.0, 1.0, 1.5], [0.5, 0.0, 1.0]])
        >>> loss = logit_adjusted_cross_entropy(logits, torch.tensor([0, 2]), log_prior)
        >>> round(loss.item(), 4)
        2.0592

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 10.
    """
    if _checks.is_dtensor(logits):
        from fused_la._dtensor import loss_of_logits  # here, because not every PyTorch was built for it

        return loss_of_logits(
            logits, target, log_prior, (tau,), target_weight=target_weight, weight=weight,
            smoothing_distribution=smoothing_distribution, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, impl=impl,
        )  # fmt: skip
    _checks.check_logits(logits)
    offset, tau = read_prior(log_prior, tau, logits)
    call = read_call(
        logits, offset, tau, None, target, target_weight, weight, ignore_index,
        reduction, label_smoothing, smoothing_distribution,
    )  # fmt: skip
    return _loss_of(call, logits, impl)


def margin_cross_entropy(
    logits: Tensor,
    target: Tensor,
    margin: PairwiseMargin,
    *,
    target_weight: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing_distribution: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""The loss of any `PairwiseMargin`: one of `fused_la.margins`, or one of your own.

    .. math:: \ell(y, f) = \alpha_y \log\Big[1 + \sum_{c \ne y} e^{(s_c f_c + u_c) - (s_y f_y + v_y)}\Big]

    with alpha, the negative offset u, the target offset v and the scale s of the margin. Class probabilities, K labels
    and smoothing weigh these losses of the single classes as labels: ``sum_c t_c * loss(c)``.

    Args:
        logits, target: as in `logit_adjusted_cross_entropy`.
        margin: vectors of as many classes as the logits have, on their device.
        target_weight: as there.
        weight: as there; it counts in the denominator of a mean, the margin's alpha does not.
        ignore_index, reduction, label_smoothing, smoothing_distribution: as there.
        impl: as there. Where a margin's two offsets differ, class probabilities and label smoothing are the
            reference's alone, as gradients of the margin's vectors are.

    Returns:
        As `logit_adjusted_cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as there, and for a margin of another length or device than the logits.

    Example:
        >>> import torch
        >>> from fused_la import log_prior_from_counts, margin_cross_entropy, margins
        >>> log_prior = log_prior_from_counts([900, 90, 10])
        >>> logits = torch.tensor([[2.0, 1.0, 1.5], [0.5, 0.0, 1.0]])
        >>> loss = margin_cross_entropy(logits, torch.tensor([0, 2]), margins.adaptive(log_prior))
        >>> round(loss.item(), 4)
        2.2464

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 11.
    """
    if _checks.is_dtensor(logits):
        from fused_la._dtensor import loss_of_logits

        return loss_of_logits(
            logits, target, margin, (), target_weight=target_weight, weight=weight,
            smoothing_distribution=smoothing_distribution, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, impl=impl,
        )  # fmt: skip
    _checks.check_logits(logits)
    call = read_call(
        logits, read_margin(margin, logits), 1.0, margin, target, target_weight, weight, ignore_index,
        reduction, label_smoothing, smoothing_distribution,
    )  # fmt: skip
    return _loss_of(call, logits, impl)


def _loss_of(call: Call, logits: Tensor, impl: str) -> Tensor:
    impl = choose_implementation(impl, call, (logits, call.problem.log_prior))
    if impl == "reference":
        loss, row_weight = reference.loss_rows(call.problem.with_inner())
        loss = reduce_rows(loss, row_weight.sum(), call.reduction)
    else:
        loss = (folded_loss if under_transform() else fused_loss)(call.problem, call.reduction, impl)
    if call.reduction != "none":
        return loss
    dim = _checks.class_dim(logits)
    return loss.reshape(logits.shape[:dim] + logits.shape[dim + 1 :])


class LogitAdjustedCrossEntropyLoss(LossOptions):
    r"""`logit_adjusted_cross_entropy` as a module that holds the log prior of its training counts.

    .. math:: \ell(y, f) = -\log \mathrm{softmax}(f + \tau \log \pi)_y, \qquad \pi_c = n_c / \sum_k n_k

    Equivalent to: ``nn.CrossEntropyLoss()(logits.float() + tau * (class_counts / class_counts.sum()).log(), target)``
    (float64 logits stay float64).

    Args:
        class_counts: (C,) training examples a class: a list, an array or a tensor, integer or floating.
        tau: strength of the adjustment, >= 0.
        pseudocount: added to every count; needed if a class has no example.
        weight, ignore_index, reduction, label_smoothing, smoothing_distribution, impl: as in
            `logit_adjusted_cross_entropy`.

    Attributes:
        log_prior: (C,) float32 buffer. It moves with the module, as the buffers `weight` and `smoothing_distribution`
            do, and all three stay as they are when the module is cast to half precision: at log_prior = -12 a step of
            bfloat16 is 0.0625.

    Shape:
        logits (N, C), target (N,), and the other shapes of `logit_adjusted_cross_entropy`; a scalar unless reduction
        is "none".

    Raises:
        TypeError, ValueError: on construction for unusable counts and options, in a call for unusable inputs.

    Example:
        >>> import torch
        >>> from fused_la import LogitAdjustedCrossEntropyLoss
        >>> criterion = LogitAdjustedCrossEntropyLoss([900, 90, 10])
        >>> logits = torch.tensor([[2.0, 1.0, 1.5], [0.5, 0.0, 1.0]], requires_grad=True)
        >>> loss = criterion(logits, torch.tensor([0, 2]))
        >>> loss.backward()
        >>> round(loss.item(), 4), logits.grad.shape
        (2.0592, torch.Size([2, 3]))

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 10.
    """

    weight: Tensor | None

    def __init__(
        self,
        class_counts: Any,
        tau: float = 1.0,
        *,
        pseudocount: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        smoothing_distribution: Tensor | None = None,
        impl: str = "auto",
    ):
        super().__init__(
            class_counts, tau, pseudocount, weight, "weight", ignore_index, reduction, label_smoothing,
            smoothing_distribution, impl,
        )  # fmt: skip

    def forward(self, logits: Tensor, target: Tensor, target_weight: Tensor | None = None) -> Tensor:
        return logit_adjusted_cross_entropy(
            logits, target, self.log_prior, self.tau, target_weight=target_weight, **self.keywords()
        )
