"""Public losses of a classifier head, whose logits never exist as a whole, as functions and as a module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_la._autograd.dispatch import choose_implementation
from fused_la._autograd.head import fused_head_loss, head_formula
from fused_la._call import checks
from fused_la._call.arguments import Options, read_call
from fused_la._call.head_arguments import (
    check_head,
    check_sharded_alike,
    feature_rows,
    placeholder_logits,
    product_dtype,
    unit_vectors,
)
from fused_la._call.pairwise_margin import PairwiseMargin
from fused_la._call.problem import reduce_rows
from fused_la._modules.options import CountedLossOptions, first_argument, per_class_option
from fused_la._tiled.head import Head, predict


def linear_logit_adjusted_cross_entropy(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    log_prior: Tensor,
    tau: float = 1.0,
    *,
    bias: Tensor | None = None,
    target_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing_distribution: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""`logit_adjusted_cross_entropy` of a linear classifier's logits, which never exist as a whole.

    .. math::
        \ell(y, h) = -\log \mathrm{softmax}(W h + b + \tau \log \pi)_y

    Equivalent to: ``logit_adjusted_cross_entropy(F.linear(features, weight, bias), target, log_prior, tau,
    weight=class_weight, ...)`` for features of shape (N, D), in loss and in the gradients of features, weight, bias and
    log_prior. Both passes go over tiles of classes: the memory beside the arguments and their gradients is one tile
    and what the rows need, never N * C. Backward computes the logits again, so there are four products of
    the size of the logits where the formula has three. Logits are float32 (float64), also those of half-precision
    features, and gradients add up in float32.

    It is for many classes: with few, or a head that is a small part of the model, the logits of one product are the
    faster way. On a GPU, and in the last bits, a row's result depends on the other rows, as that of `F.linear` does.

    Args:
        features: (D,) or (..., D), floating; N rows in all, which may be 0.
        weight: (C, D), of the dtype of the features. Under autocast both are cast for products as `F.linear` casts
            them, except on a CPU, whose products are float32 (float64). Or a DTensor with its classes sharded over one
            mesh dimension, as the logits of `logit_adjusted_cross_entropy` may be.
        target: int64 class indices of shape (...); or class probabilities (..., C); or with `target_weight` indices
            (..., K).
        log_prior, tau: as in `logit_adjusted_cross_entropy`.
        bias: (C,) floating.
        target_weight: floating, of the shape of `target`: weights of K labels a row.
        class_weight: (C,) floating: what is `weight` there.
        ignore_index, reduction, label_smoothing, smoothing_distribution: as there.
        impl: "auto" is "triton" on a GPU, "blocked" on a CPU, also under torch.compile; "reference", which makes whole
            logits, for anything else: other devices, transforms of torch.func, forward mode, and gradients of a target
            or a weight of classes. A named one works or raises. Second derivatives make whole logits, too.

    Returns:
        float32 (float64 for float64 features): a scalar, or with reduction "none" one loss a row, (...).

    Raises:
        TypeError, ValueError, IndexError: as `logit_adjusted_cross_entropy`, and for a weight or bias that does not fit
            the features.

    Example:
        >>> import torch
        >>> from fused_la import linear_logit_adjusted_cross_entropy, log_prior_from_counts
        >>> log_prior = log_prior_from_counts([900, 90, 10])
        >>> weight = torch.tensor([[2.0, 0.5], [1.0, 0.0], [1.5, 1.0]], requires_grad=True)
        >>> loss = linear_logit_adjusted_cross_entropy(torch.eye(2), weight, torch.tensor([0, 2]), log_prior)
        >>> loss.backward()
        >>> round(loss.item(), 4), weight.grad.shape
        (2.0592, torch.Size([3, 2]))

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 10.
    """
    options = Options(target_weight, class_weight, ignore_index, reduction, label_smoothing, smoothing_distribution)
    return _loss(features, weight, bias, target, log_prior, tau, options, impl)


def linear_margin_cross_entropy(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: PairwiseMargin,
    *,
    bias: Tensor | None = None,
    target_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing_distribution: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""`margin_cross_entropy` of a linear classifier's logits, which never exist as a whole.

    .. math:: \ell(y, h) = \alpha_y \log\Big[1 + \sum_{c \ne y} e^{(s_c f_c + u_c) - (s_y f_y + v_y)}\Big], f = W h + b

    Equivalent to: ``margin_cross_entropy(F.linear(features, weight, bias), target, margin, weight=class_weight, ...)``.

    Args:
        features, weight, target: as in `linear_logit_adjusted_cross_entropy`.
        margin: vectors of as many classes as the weight has rows, on the device of the features.
        bias, target_weight, class_weight: as there; class weights count in the denominator of a mean, alpha does not.
        ignore_index, reduction, label_smoothing, smoothing_distribution: as there.
        impl: as there. Where a margin's two offsets differ, class probabilities and label smoothing are the
            reference's alone, as gradients of the margin's vectors are.

    Returns:
        As `linear_logit_adjusted_cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as there, and for a margin of another length or device.

    Example:
        >>> import torch
        >>> from fused_la import linear_margin_cross_entropy, log_prior_from_counts, margins
        >>> margin = margins.adaptive(log_prior_from_counts([900, 90, 10]))
        >>> weight = torch.tensor([[2.0, 0.5], [1.0, 0.0], [1.5, 1.0]])
        >>> loss = linear_margin_cross_entropy(torch.eye(2), weight, torch.tensor([0, 2]), margin)
        >>> round(loss.item(), 4)
        2.2464

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 11.
    """
    options = Options(target_weight, class_weight, ignore_index, reduction, label_smoothing, smoothing_distribution)
    return _loss(features, weight, bias, target, margin, None, options, impl)


class LogitAdjustedLinear(CountedLossOptions, nn.Linear):
    r"""A classifier head that is trained by the logit-adjusted loss and predicts by its raw logits.

    .. math:: f = W h + b, \qquad \text{or with cosine:}\quad f_c = s \, \frac{w_c \cdot h}{\|w_c\| \, \|h\|} + b_c

    It is a `torch.nn.Linear`, to whoever initialises, counts or groups layers by their kind.

    Args:
        in_features: D.
        class_counts: (C,) training examples a class, as `LogitAdjustedCrossEntropyLoss` takes them.
        tau: strength of the adjustment, >= 0.
        bias: whether there is one.
        cosine: make features and weights unit vectors first; of a row of zeros, zeros.
        scale: s > 0 of a cosine head.
        pseudocount: added to every count; needed if a class has no example, unless `exclude_absent` says that such
            classes take no part.
        exclude_absent: classes without examples have a log prior of -inf in the loss and raw logits of -inf, so that
            none is predicted.
        class_weight: as in `linear_logit_adjusted_cross_entropy`; or an array or a list.
        ignore_index, reduction, label_smoothing: as there.
        smoothing_distribution: as there; or an array or a list.
        impl: as there.
        device, dtype: of weight and bias, as in `torch.nn.Linear`.

    Attributes:
        weight, bias: (C, D) and (C,) parameters, initialised as those of `torch.nn.Linear` (and again by
            `reset_parameters()`, which a head that was built on the meta device needs after `to_empty`).
        class_counts, log_prior, class_weight, smoothing_distribution: as of `LogitAdjustedCrossEntropyLoss`, neither
            parameters nor buffers.

    Shape:
        features (..., D), target as in `linear_logit_adjusted_cross_entropy`; with a target the loss, without one the
        raw logits (..., C).

    Under FSDP2 give the head a `fully_shard(head)` of its own, and for `predict` call
    `torch.distributed.fsdp.register_fsdp_forward_method(head, "predict")` once: the weight is gathered only then. With
    a weight whose classes are sharded (a DTensor), the raw logits and `predict` need features that are a DTensor with
    Replicate(). The logits are sharded as the weight is, the predictions replicated.

    Raises:
        TypeError, ValueError: on construction for unusable sizes, counts and options, in a call for unusable inputs.

    Example:
        >>> import torch
        >>> from fused_la import LogitAdjustedLinear
        >>> head = LogitAdjustedLinear(16, [900, 90, 10])
        >>> features = torch.randn(4, 16)
        >>> head(features, torch.tensor([0, 0, 1, 2])).backward()
        >>> head(features).shape, head.predict(features).shape
        (torch.Size([4, 3]), torch.Size([4]))

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 10; the cosine head is that of
    Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", NeurIPS 2019.
    """

    class_weight = per_class_option("class_weight")
    _weight_name = "class_weight"

    def __init__(
        self,
        in_features: int,
        class_counts: Any,
        tau: float = 1.0,
        *,
        bias: bool = True,
        cosine: bool = False,
        scale: float = 30.0,
        pseudocount: float = 0.0,
        exclude_absent: bool = False,
        class_weight: Any = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        smoothing_distribution: Any = None,
        impl: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        cosine, scale = bool(cosine), checks.check_number("scale", scale, 1e-30, 1e30, "positive and finite")
        super().__init__(
            class_counts, tau, pseudocount, exclude_absent, class_weight, ignore_index, reduction, label_smoothing,
            smoothing_distribution, impl, in_features=checks.check_int("in_features", in_features, 1), bias=bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.cosine, self.scale = cosine, scale
        if device is not None and not self.weight.is_meta:
            self._per_class = self._moved(self.weight.device)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        features: Tensor | None = None,
        target: Tensor | None = None,
        target_weight: Tensor | None = None,
        *,
        input: Tensor | None = None,
        reduction: str | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Tensor:
        """The loss, or without a target the raw logits.

        Args:
            features, target, target_weight: as in `linear_logit_adjusted_cross_entropy`.
            input: another name for `features`, as `torch.nn.Linear` has it.
            reduction, num_items_in_batch: of the loss, as in `LogitAdjustedCrossEntropyLoss.forward`.
        """
        features = first_argument("features", features, input)
        if target is None:
            for name, value in (("target_weight", target_weight), ("reduction", reduction),
                                ("num_items_in_batch", num_items_in_batch)):  # fmt: skip
                if value is not None:
                    raise TypeError(f"{name} must be None without a target, got it for raw logits")
            features, weight = self._operands(features)
            check_sharded_alike(features, weight)
            return F.linear(features, weight, self._bias(features))
        checks.check_tensor("features", features)
        features, weight = self._operands(features)
        return self._loss(
            linear_logit_adjusted_cross_entropy, features, weight, target, tau=self.tau, bias=self.bias,
            target_weight=target_weight, reduction=reduction, num_items_in_batch=num_items_in_batch,
        )  # fmt: skip

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """The class of the largest raw logit of each row, (...) int64, computed a tile of classes at a time."""
        features, weight = self._operands(features)
        check_sharded_alike(features, weight)
        bias = self._bias(features)
        if checks.is_dtensor(weight):
            from fused_la._class_parallel.dtensor import predict_sharded

            return predict_sharded(features, weight, bias)
        check_head(features, weight, bias)
        rows = feature_rows(features)
        return predict(Head(rows, weight, bias, product_dtype(rows, weight))).classes.reshape(features.shape[:-1])

    def _bias(self, features: Tensor) -> Tensor | None:
        """The bias of raw logits: -inf for classes that take no part."""
        if not self.exclude_absent:
            return self.bias
        absent = self._placed(features)["log_prior"] == -torch.inf
        if checks.is_dtensor(self.weight):
            from fused_la._class_parallel.dtensor import sharded_as

            absent = sharded_as(self.weight, absent)
        bias = torch.zeros_like(absent, dtype=self.weight.dtype) if self.bias is None else self.bias
        return bias.masked_fill(absent, -torch.inf)

    def _numbers_of_classes(self) -> list[tuple[str, int]]:
        return [*super()._numbers_of_classes(), ("weight", self.out_features)]

    def _operands(self, features: Tensor) -> tuple[Tensor, Tensor]:
        if not self.cosine:
            return features, self.weight
        return unit_vectors(features, self.scale), unit_vectors(self.weight)

    def extra_repr(self) -> str:
        head = f"in_features={self.in_features}, bias={self.bias is not None}, "
        return head + (f"cosine=True, scale={self.scale}, " if self.cosine else "") + super().extra_repr()


def _loss(
    features: Any, weight: Any, bias: Any, target: Any, prior: Any, tau: Any, options: Options, impl: Any
) -> Tensor:
    """The loss for a log prior and its tau, or for a margin if tau is None."""
    if checks.is_dtensor(weight):
        from fused_la._class_parallel.dtensor import loss_of_head  # here: not every PyTorch was built for it

        return loss_of_head(features, weight, bias, target, prior, tau, options, impl)
    logits, target, target_weight = placeholder_logits(features, weight, bias, target, options.target_weight)
    options = options._replace(target_weight=target_weight)
    call = read_call(logits, prior, tau, target, options, weight_name="class_weight")
    differentiable = (features, weight, bias, call.problem.log_prior)
    impl = choose_implementation(impl, call, differentiable, of_head=True)
    rows, problem = feature_rows(features), call.problem.with_inner()
    if impl == "reference":
        loss, row_weight = head_formula(rows, weight, bias, problem)
        loss = reduce_rows(loss, row_weight.sum(), call.reduction)
    else:
        head = Head(rows, weight, bias, product_dtype(rows, weight))
        loss = fused_head_loss(head, problem, call.reduction, impl)
    return loss.reshape(features.shape[:-1]) if call.reduction == "none" else loss
