"""Public losses of a linear classifier head, as functions and as a module; the full logits are never stored."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_la._autograd.dispatch import choose_implementation
from fused_la._autograd.head import fused_head_loss, head_formula
from fused_la._call import checks, head_arguments
from fused_la._call.arguments import Adjustment, Options, ScaledPrior, read_call
from fused_la._call.pairwise_margin import PairwiseMargin
from fused_la._call.problem import reduce_rows
from fused_la._modules.options import CountedLossOptions, argument_or_input, per_class_option, split_target
from fused_la._tiled.head import Head, predict


def linear_logit_adjusted_cross_entropy(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    log_prior: Tensor,
    tau: float = 1.0,
    *,
    bias: Tensor | None = None,
    group: Tensor | None = None,
    target_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing_distribution: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""`logit_adjusted_cross_entropy` of the logits of a linear classifier, without storing all logits.

    .. math::
        \ell(y, h) = -\log \mathrm{softmax}(W h + b + \tau \log \pi)_y

    Equivalent to: ``logit_adjusted_cross_entropy(F.linear(features, weight, bias), target, log_prior, tau,
    weight=class_weight, ...)`` for features of shape (N, D), in loss and in the gradients of features, weight, bias and
    log_prior. Both passes process tiles of classes: beside the arguments and their gradients, memory is one tile and
    the vectors over the rows, never N * C. Backward computes the logits again, so there are four matrix products of
    the size of the logits; the formula has three. Logits are float32 (float64), also for half-precision features,
    and gradients are summed in float32.

    It is for many classes. With few classes, or if the head is a small part of the model, it is faster to compute the
    logits in one product. On a GPU, the last bits of a row's result depend on the other rows, as with `F.linear`.

    Args:
        features: (D,) or (..., D), floating; N rows in all, which may be 0.
        weight: (C, D), of the dtype of the features. Under autocast both are cast for the products as in `F.linear`,
            except on a CPU, where products are float32 (float64). Or a DTensor with its classes sharded over one mesh
            dimension, as for the logits of `logit_adjusted_cross_entropy`.
        target: int64 class indices of shape (...); or class probabilities (..., C); or with `target_weight` indices
            (..., K).
        log_prior, tau: as in `logit_adjusted_cross_entropy`.
        bias: (C,) floating.
        group: as in `logit_adjusted_cross_entropy`: of shape (...), or one for each index of its first dimension.
        target_weight: floating, of the shape of `target`: weights of the K labels of a row.
        class_weight: (C,) floating, a factor for each class: `weight` of `logit_adjusted_cross_entropy`.
        ignore_index, reduction, label_smoothing, smoothing_distribution: as in `logit_adjusted_cross_entropy`.
        impl: "auto" is "triton" on a GPU and "blocked" on a CPU, also under torch.compile. It is "reference", which
            stores all logits, for anything else: other devices, transforms of torch.func, forward mode, and gradients
            of a target or of class weights. A named implementation works or raises. Second derivatives store all logits
            too.

    Returns:
        float32 (float64 for float64 features): a scalar, or with reduction "none" one loss a row, (...).

    Raises:
        TypeError, ValueError, IndexError: as `logit_adjusted_cross_entropy`, and for a weight or bias that does not
            match the features.

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
    return _loss(features, weight, bias, target, ScaledPrior(log_prior, tau, group), options, impl)


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
    r"""`margin_cross_entropy` of the logits of a linear classifier, without storing all logits.

    .. math::
        \ell(y, h) = \alpha_y \log\Big[1 + \sum_{c \ne y} e^{(r_y s_c f_c + u_c) - (r_y s_y f_y + v_y)}\Big],
        \qquad f = W h + b

    Equivalent to: ``margin_cross_entropy(F.linear(features, weight, bias), target, margin, weight=class_weight, ...)``.

    Args:
        features, weight, target: as in `linear_logit_adjusted_cross_entropy`.
        margin: its vectors have as many classes as the weight has rows and are on the device of the features.
        bias, target_weight, class_weight: as in `linear_logit_adjusted_cross_entropy`. Class weights count in the
            denominator of a mean; alpha does not.
        ignore_index, reduction, label_smoothing, smoothing_distribution: as in `linear_logit_adjusted_cross_entropy`.
        impl: as in `linear_logit_adjusted_cross_entropy`. Only the reference computes gradients of the margin's
            vectors. If the two offsets differ, only the reference supports class probabilities and label smoothing;
            with a label_scale, the same, and several labels a row.

    Returns:
        As `linear_logit_adjusted_cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as `linear_logit_adjusted_cross_entropy`, and for a margin of another length
            or device.

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
    return _loss(features, weight, bias, target, margin, options, impl)


class LogitAdjustedLinear(CountedLossOptions, nn.Linear):
    r"""A linear classifier head that trains with the logit-adjusted loss and predicts with its raw logits.

    .. math:: f = W h + b, \qquad \text{or with cosine:}\quad f_c = s \, \frac{w_c \cdot h}{\|w_c\| \, \|h\|} + b_c

    It is a subclass of `torch.nn.Linear`, so code that initialises, counts or groups layers by type treats it as one.

    Args:
        in_features: D.
        class_counts: (C,) training examples a class, or (G, C), as `LogitAdjustedCrossEntropyLoss` takes them.
        tau: strength of the adjustment, >= 0.
        bias: whether the head has a bias.
        cosine: normalise features and weights to unit vectors first; a row of zeros stays zeros.
        scale: s > 0 of a cosine head.
        pseudocount: added to every count. It is needed if a class has no example and `exclude_absent` is False.
        exclude_absent: classes without examples have a log prior of -inf in the loss and, if no group has examples of
            them, raw logits of -inf, so that none is predicted.
        class_weight: as in `linear_logit_adjusted_cross_entropy`; or an array or a list.
        ignore_index, reduction, label_smoothing: as in `linear_logit_adjusted_cross_entropy`.
        smoothing_distribution: as in `linear_logit_adjusted_cross_entropy`; or an array or a list; or "prior", which
            follows the counts, by group for counts (G, C).
        impl: as in `linear_logit_adjusted_cross_entropy`.
        device, dtype: of weight and bias, as in `torch.nn.Linear`.

    Attributes:
        weight, bias: (C, D) and (C,) parameters, initialised as in `torch.nn.Linear`. `reset_parameters()` initialises
            them again; a head that was built on the meta device needs that after `to_empty`.
        class_counts, log_prior, class_weight, smoothing_distribution: as in `LogitAdjustedCrossEntropyLoss`, neither
            parameters nor buffers.

    Shape:
        features (..., D), target as in `linear_logit_adjusted_cross_entropy`. The result is the loss with a target, and
        the raw logits (..., C) without one.

    Under FSDP2 call `fully_shard(head)` for the head alone, and for `predict` call
    `torch.distributed.fsdp.register_fsdp_forward_method(head, "predict")` once; otherwise the weight is not gathered.
    If the weight is a DTensor with sharded classes, the raw logits and `predict` need features that are a DTensor with
    Replicate(). The logits then have the sharding of the weight, and the predictions are replicated.

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
            self._per_class = self._per_class_on(self.weight.device)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        features: Tensor | None = None,
        target: Any = None,
        target_weight: Tensor | None = None,
        *,
        group: Tensor | None = None,
        input: Tensor | None = None,
        reduction: str | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Tensor:
        """The loss, or the raw logits if there is no target.

        Args:
            features, target, target_weight, group: as in `linear_logit_adjusted_cross_entropy`. `target` may also be a
                pair of labels and target_weight.
            input: another name for `features`, as in `torch.nn.Linear`.
            reduction, num_items_in_batch: of the loss, as in `LogitAdjustedCrossEntropyLoss.forward`.
        """
        features = argument_or_input("features", features, input)
        target, target_weight = split_target(target, target_weight)
        if target is None:
            for name, value in (("target_weight", target_weight), ("group", group), ("reduction", reduction),
                                ("num_items_in_batch", num_items_in_batch)):  # fmt: skip
                if value is not None:
                    raise TypeError(f"{name} must be None without a target, got it for raw logits")
            features, weight = self._operands(features)
            head_arguments.check_dtensor_features(features, weight)
            return F.linear(features, weight, self._raw_logit_bias(features))
        self._check_group(group)
        checks.check_tensor("features", features)
        features, weight = self._operands(features)
        return self._call_loss(
            linear_logit_adjusted_cross_entropy, features, weight, target, tau=self.tau, bias=self.bias,
            target_weight=target_weight, group=group, reduction=reduction, num_items_in_batch=num_items_in_batch,
        )  # fmt: skip

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """The class of the largest raw logit of each row, (...) int64, computed over tiles of classes."""
        features, weight = self._operands(features)
        head_arguments.check_dtensor_features(features, weight)
        bias = self._raw_logit_bias(features)
        if checks.is_dtensor(weight):
            from fused_la._class_parallel.dtensor import predict_sharded

            return predict_sharded(features, weight, bias)
        head_arguments.check_head(features, weight, bias)
        rows = head_arguments.feature_rows(features)
        head = Head(rows, weight, bias, head_arguments.product_dtype(rows, weight))
        return predict(head).classes.reshape(features.shape[:-1])

    def _raw_logit_bias(self, features: Tensor) -> Tensor | None:
        """The bias of raw logits: -inf for excluded classes."""
        if not self.exclude_absent:
            return self.bias
        absent = self._per_class_for(features)["log_prior"] == -torch.inf
        absent = absent if absent.dim() == 1 else absent.all(0)
        if checks.is_dtensor(self.weight):
            from fused_la._class_parallel.dtensor import shard_like

            absent = shard_like(self.weight, absent)
        bias = torch.zeros_like(absent, dtype=self.weight.dtype) if self.bias is None else self.bias
        return bias.masked_fill(absent, -torch.inf)

    def _n_classes_by_name(self) -> list[tuple[str, int]]:
        return [*super()._n_classes_by_name(), ("weight", self.out_features)]

    def _operands(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features and weight of the matrix product: unit vectors, those of the features times `scale`, if `cosine`."""
        if not self.cosine:
            return features, self.weight
        return head_arguments.unit_vectors(features, self.scale), head_arguments.unit_vectors(self.weight)

    def extra_repr(self) -> str:
        head = f"in_features={self.in_features}, bias={self.bias is not None}, "
        return head + (f"cosine=True, scale={self.scale}, " if self.cosine else "") + super().extra_repr()


def _loss(features: Any, weight: Any, bias: Any, target: Any, prior: Adjustment, options: Options, impl: Any) -> Tensor:
    """The loss for a log prior with its tau, or for a margin."""
    if checks.is_dtensor(weight):
        from fused_la._class_parallel.dtensor import loss_of_head  # here: some PyTorch builds lack DTensor

        return loss_of_head(features, weight, bias, target, prior, options, impl)
    logits, target, target_weight = head_arguments.placeholder_logits(
        features, weight, bias, target, options.target_weight
    )
    options = options._replace(target_weight=target_weight)
    if isinstance(prior, ScaledPrior) and prior.group is not None:
        group = checks.rows_of_groups(prior.group, features.shape[:-1], features)
        prior = prior._replace(group=group.flatten() if features.dim() > 1 else group)
    call = read_call(logits, prior, target, options, weight_name="class_weight")
    differentiable = (features, weight, bias, call.problem.log_prior)
    impl = choose_implementation(impl, call, differentiable, of_head=True)
    rows, problem = head_arguments.feature_rows(features), call.problem.as_3d()
    if impl == "reference":
        loss, row_weight = head_formula(rows, weight, bias, problem)
        loss = reduce_rows(loss, row_weight.sum(), call.reduction)
    else:
        head = Head(rows, weight, bias, head_arguments.product_dtype(rows, weight))
        loss = fused_head_loss(head, problem, call.reduction, impl)
    return loss.reshape(features.shape[:-1]) if call.reduction == "none" else loss
