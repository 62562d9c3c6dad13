"""Public losses on logits, as functions and modules: validate, dispatch, reduce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fused_la import reference
from fused_la._autograd.dispatch import choose_implementation
from fused_la._autograd.loss import fused_loss, under_transform
from fused_la._autograd.transforms import folded_loss
from fused_la._call import checks
from fused_la._call.arguments import Adjustment, Options, ScaledPrior, read_call
from fused_la._call.pairwise_margin import PairwiseMargin, checked_margin
from fused_la._call.problem import reduce_rows
from fused_la._modules.options import (
    CountedLossOptions,
    LossOptions,
    argument_or_input,
    per_class_option,
    split_target,
)


def logit_adjusted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    log_prior: Tensor,
    tau: float = 1.0,
    *,
    group: Tensor | None = None,
    target_weight: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing_distribution: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Cross entropy of logits with `tau * log_prior` added: its minimiser has the least balanced error.

    .. math::
        \ell(y, f) = -\log \mathrm{softmax}(f + \tau \log \pi)_y
                   = \log\Big[1 + \sum_{c \ne y} \Big(\frac{\pi_c}{\pi_y}\Big)^{\tau} e^{f_c - f_y}\Big]

    Equivalent to: ``F.cross_entropy(z, target)`` with ``z = logits.float() + tau * log_prior`` (float64 logits stay
    float64). The other arguments mean the same as in `torch.nn.functional.cross_entropy`. With a
    `smoothing_distribution` q and eps = `label_smoothing`, if every row counts and without `weight`:
    ``(1 - eps) * F.cross_entropy(z, target) + eps * F.cross_entropy(z, q.expand_as(z))``. The logits are not modified,
    and a confident row keeps the digits of its loss and gradient.

    Train with this loss and predict with the raw logits, `logits.argmax(1)`: a post-hoc adjustment would correct twice.

    With a mean or a sum, the forward pass usually computes the gradient of the logits too. The logits may then be
    modified in place, as by `clamp_`, before the first backward. In the other cases (reduction "none", float16, a
    learned prior, `torch.compile`, rows that do not fit in a GPU's L2) autograd raises if they were modified.

    Args:
        logits: (C,), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64; any strides; N may be 0.
            Or a DTensor with its classes sharded over one mesh dimension: per-class arguments are then DTensors with
            the same sharding, or whole tensors, and the loss is a replicated DTensor (see `distributed`).
        target: int64 or uint8 class indices of shape (), (N,) or (N, d1, ..., dk); or class probabilities, floating, of
            the shape of the logits; or with `target_weight` indices of shape (N, K) ((K,), (N, K, d1, ..., dk)).
        log_prior: (C,) floating, log class frequencies up to any constant, as from `log_prior_from_counts`. A class at
            -inf has probability 0 and gradient 0. The tensor gets a gradient if it requires one. With `group` (G, C).
        tau: strength of the adjustment, >= 0. 1 is consistent for the balanced error, 0 is plain cross entropy.
        group: the group (hospital, site, client, domain) of each row, for a log_prior of shape (G, C) with a prior for
            each group: int64 or uint8 in [0, G), one for each row, or of shape (N,) for logits (N, C, d1, ..., dk). A
            row that does not count may have any. The smoothing_distribution is then (C,) or (G, C).
        target_weight: floating, of the shape of `target`: weights of the K labels of a row, as from mixup and cutmix.
            The row's loss is ``sum_k target_weight[:, k] * loss(target[:, k])``. A mean counts such a row as one (with
            `weight`: as the mean weight of its labels).
        weight: (C,) floating, a factor for each class. The values of `weight`, `target_weight` and class probabilities
            are not checked, as in `torch.nn.functional.cross_entropy`: negative ones count, NaN spreads.
        ignore_index: label that does not count: its row (its part of a row of K labels) has loss and gradient 0.
        reduction: "none", "mean" (over rows that count, weighted by `weight`; NaN if there are none) or "sum".
        label_smoothing: share in [0, 1] of the target moved to `smoothing_distribution`.
        smoothing_distribution: (C,) probabilities; None is uniform, which makes the loss inconsistent on long-tailed
            data and infinite if a class is at -inf. `log_prior.exp()` smooths toward the prior and keeps it consistent.
        impl: "auto" is "triton" on a GPU, "blocked" on a CPU, and "reference" for anything else: while torch.compile
            traces a CPU graph, if Triton is not installed, or if a target or a weight requires grad. A named
            implementation works or raises; `vmap` and `grad` of torch.func run it too. With any choice, second
            derivatives, forward mode (`jvp`) and transforms under torch.compile use the reference formula.

    Returns:
        float32 (float64 for float64 logits): a scalar, or with reduction "none" one loss a row, in the shape of index
        labels.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or range; the message names it.
        IndexError: a label outside [0, C) that is not ignore_index, or a group outside [0, G), on a CPU. On a GPU, or
            if a transform or torch.compile hides the value, nothing outside the row is read and the loss and gradient
            of the row are NaN. An invalid `log_prior` or `smoothing_distribution` then makes those of all rows NaN.

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
    options = Options(target_weight, weight, ignore_index, reduction, label_smoothing, smoothing_distribution)
    return _loss(logits, target, ScaledPrior(log_prior, tau, group), options, impl)


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

    .. math:: \ell(y, f) = \alpha_y \log\Big[1 + \sum_{c \ne y} e^{(r_y s_c f_c + u_c) - (r_y s_y f_y + v_y)}\Big]

    with alpha, the negative offset u, the target offset v, the scale s and the label scale r of the margin. For class
    probabilities, K labels and smoothing, the loss is the weighted sum over the classes as labels:
    ``sum_c t_c * loss(c)``.

    Args:
        logits, target: as in `logit_adjusted_cross_entropy`.
        margin: its vectors have the number of classes of the logits and are on their device.
        target_weight: as in `logit_adjusted_cross_entropy`.
        weight: as in `logit_adjusted_cross_entropy`. It counts in the denominator of a mean; the margin's alpha does
            not.
        ignore_index, reduction, label_smoothing, smoothing_distribution: as in `logit_adjusted_cross_entropy`.
        impl: as in `logit_adjusted_cross_entropy`. Only the reference computes gradients of the margin's vectors. If
            the two offsets differ, only the reference supports class probabilities and label smoothing. With a
            label_scale, the same, and several labels a row.

    Returns:
        As `logit_adjusted_cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as `logit_adjusted_cross_entropy`, and for a margin whose length or device
            differs from that of the logits.

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
    options = Options(target_weight, weight, ignore_index, reduction, label_smoothing, smoothing_distribution)
    return _loss(logits, target, margin, options, impl)


def _loss(logits: Any, target: Any, prior: Adjustment, options: Options, impl: Any) -> Tensor:
    """The loss for a log prior with its tau, or for a margin."""
    if checks.is_dtensor(logits):
        from fused_la._class_parallel.dtensor import loss_of_logits  # here: some PyTorch builds lack DTensor

        return loss_of_logits(logits, target, prior, options, impl)
    checks.check_logits(logits)
    call = read_call(logits, prior, target, options)
    impl = choose_implementation(impl, call, (logits, call.problem.log_prior))
    if impl == "reference":
        loss, row_weight = reference.loss_rows(call.problem.as_3d())
        loss = reduce_rows(loss, row_weight.sum(), call.reduction)
    else:
        loss = (folded_loss if under_transform() else fused_loss)(call.problem, call.reduction, impl)
    if call.reduction != "none":
        return loss
    dim = checks.class_dim(logits)
    return loss.reshape(logits.shape[:dim] + logits.shape[dim + 1 :])


class _LogitsLoss(LossOptions):
    """Base of the loss modules on logits. Subclasses define `_loss_function`."""

    weight = per_class_option("weight")

    def _loss_of_logits(self, logits: Any, target: Any, target_weight: Any, input: Any, **keywords: Any) -> Tensor:
        """The loss of logits, or of a model output that has them; `input` is another name for the logits."""
        logits = argument_or_input("logits", getattr(logits, "logits", logits), input)
        checks.check_tensor("logits", logits)
        target, target_weight = split_target(target, target_weight)
        return self._call_loss(self._loss_function, logits, target, target_weight=target_weight, **keywords)

    _loss_function: Callable[..., Tensor]


class LogitAdjustedCrossEntropyLoss(_LogitsLoss, CountedLossOptions):
    r"""`logit_adjusted_cross_entropy` as a module that holds the class counts of its training data.

    .. math:: \ell(y, f) = -\log \mathrm{softmax}(f + \tau \log \pi)_y, \qquad \pi_c = n_c / \sum_k n_k

    Equivalent to: ``nn.CrossEntropyLoss()(logits.float() + tau * (class_counts / class_counts.sum()).log(), target)``
    (float64 logits stay float64).

    The module's per-class tensors follow from these arguments, and none is a parameter or a buffer. So they are in no
    `state_dict`, checkpoints load as with `nn.CrossEntropyLoss()`, and a model that is built on the meta device has the
    right prior on every device. An older checkpoint that holds a prior loads too: its prior is not used, and the logger
    "fused_la" warns if it differs.

    Args:
        class_counts: (C,) training examples a class: a list, an array or a tensor, integer or floating; or counts by
            class: `collections.Counter(labels)`, a dict or a pandas Series. Or (G, C), as from `count_classes(labels,
            n_classes, groups=...)`, for a prior for each group: a call then needs `group`. See `log_prior_from_counts`.
        tau: strength of the adjustment, >= 0.
        pseudocount: added to every count. It is needed if a class has no example and `exclude_absent` is False.
        exclude_absent: give classes without examples a log prior of -inf: probability 0, gradient 0.
        weight: as in `logit_adjusted_cross_entropy`; or an array or a list.
        ignore_index, reduction, label_smoothing: as in `logit_adjusted_cross_entropy`.
        smoothing_distribution: as in `logit_adjusted_cross_entropy`; or an array or a list; or "prior", which follows
            the counts, by group for counts (G, C).
        impl: as in `logit_adjusted_cross_entropy`.

    Attributes:
        class_counts: the given counts, in the order of the classes. New counts may be assigned between any two steps;
            CUDA graphs and compiled code then use them.
        log_prior: (C,) or (G, C) float32, `log_prior_from_counts` of the counts. It stays one tensor: assigning new
            counts writes to it.
        weight, smoothing_distribution: (C,) tensors, or None. New ones may be assigned; a CUDA graph keeps using the
            old tensors, so write into these. One that requires a gradient stays the caller's tensor and is no parameter
            of the module. These two and `log_prior` keep their digits when the module is cast to half precision: at
            log_prior = -12 a step of bfloat16 is 0.0625.

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

    def __init__(
        self,
        class_counts: Any,
        tau: float = 1.0,
        *,
        pseudocount: float = 0.0,
        exclude_absent: bool = False,
        weight: Any = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        smoothing_distribution: Any = None,
        impl: str = "auto",
    ):
        super().__init__(
            class_counts, tau, pseudocount, exclude_absent, weight, ignore_index, reduction, label_smoothing,
            smoothing_distribution, impl,
        )  # fmt: skip

    def forward(
        self,
        logits: Any = None,
        target: Any = None,
        target_weight: Tensor | None = None,
        *,
        group: Tensor | None = None,
        input: Tensor | None = None,
        reduction: str | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            logits, target, target_weight, group: as in `logit_adjusted_cross_entropy`. `logits` may also be a model
                output with an attribute `logits`, as Hugging Face models return. `target` may also be a pair of labels
                and target_weight, for loops that pass on one target.
            input: another name for `logits`, as in the losses of `torch.nn`.
            reduction: replaces the module's reduction in this call.
            num_items_in_batch: a mean divides the sum of the losses by this number, not by the number of rows of this
                batch. `transformers.Trainer` passes it to its `compute_loss_func` when it accumulates gradients. It is
                not corrected for labels that it counts and `ignore_index` excludes.
        """
        self._check_group(group)
        return self._loss_of_logits(
            logits, target, target_weight, input, group=group, reduction=reduction,
            num_items_in_batch=num_items_in_batch,
        )  # fmt: skip

    def _loss_function(self, *inputs: Any, **options: Any) -> Tensor:
        return logit_adjusted_cross_entropy(*inputs, tau=self.tau, **options)


class MarginCrossEntropyLoss(_LogitsLoss):
    r"""`margin_cross_entropy` as a module that moves its `PairwiseMargin` with it between devices.

    .. math:: \ell(y, f) = \alpha_y \log\Big[1 + \sum_{c \ne y} e^{(r_y s_c f_c + u_c) - (r_y s_y f_y + v_y)}\Big]

    Args:
        margin: one of `fused_la.margins`, or one of your own.
        weight: as in `margin_cross_entropy`; or an array or a list.
        ignore_index, reduction, label_smoothing: as in `margin_cross_entropy`.
        smoothing_distribution: as in `margin_cross_entropy`; or an array or a list.
        impl: as in `margin_cross_entropy`.

    Attributes:
        margin, weight, smoothing_distribution: as given. New ones may be assigned, as deferred reweighting does. As in
            `LogitAdjustedCrossEntropyLoss` they are neither parameters nor buffers, a tensor that requires a gradient
            stays the caller's, and none loses digits when the module is cast.

    Shape:
        As `LogitAdjustedCrossEntropyLoss`.

    Raises:
        TypeError, ValueError: on construction for unusable options, in a call for unusable inputs.

    Example:
        >>> import torch
        >>> from fused_la import MarginCrossEntropyLoss, log_prior_from_counts, margins
        >>> criterion = MarginCrossEntropyLoss(margins.adaptive(log_prior_from_counts([900, 90, 10])))
        >>> logits = torch.tensor([[2.0, 1.0, 1.5], [0.5, 0.0, 1.0]])
        >>> round(criterion(logits, torch.tensor([0, 2])).item(), 4)
        2.2464

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 11.
    """

    def __init__(
        self,
        margin: PairwiseMargin,
        *,
        weight: Any = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        smoothing_distribution: Any = None,
        impl: str = "auto",
    ):
        super().__init__(
            {"margin": checked_margin(margin)}, weight, ignore_index, reduction, label_smoothing,
            smoothing_distribution, impl,
        )  # fmt: skip

    def forward(
        self,
        logits: Any = None,
        target: Any = None,
        target_weight: Tensor | None = None,
        *,
        input: Tensor | None = None,
        reduction: str | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            logits, target, target_weight, input, reduction, num_items_in_batch: as in
                `LogitAdjustedCrossEntropyLoss.forward`.
        """
        return self._loss_of_logits(
            logits, target, target_weight, input, reduction=reduction, num_items_in_batch=num_items_in_batch
        )  # fmt: skip

    @property
    def margin(self) -> PairwiseMargin:
        return self._per_class["margin"]

    @margin.setter
    def margin(self, value: PairwiseMargin) -> None:
        self._set_per_class("margin", checked_margin(value))

    def _loss_function(self, *inputs: Any, **options: Any) -> Tensor:
        return margin_cross_entropy(*inputs, **options)
