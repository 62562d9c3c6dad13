"""Losses of logits, and of classifier heads, whose classes are sharded over the ranks of a process group.

Rank r holds C_r of the C classes, those that follow the classes of rank r - 1. C_r may differ between ranks, and be 0.
All ranks of the group call a function at the same point. Its loss is the same on all of them, to the last bit, and is
the loss that one process with all classes would compute. Per-class tensors hold this rank's classes, labels are global.

A call first exchanges a header of 768 bytes that describes each rank's arguments. If the arguments of two ranks do not
fit, or one rank refuses its own, every rank raises the same error; none waits. The host reads the header, so on a GPU
it waits for the device. A second collective gathers, from each rank, 2 to 4 numbers a row and 1 to 4 a label. Backward
is local for logits. For a head it sums the features' gradient over the ranks, and with reduction "none" and
gather_features it gathers the upstream gradient first.

With gather_features the features and their labels follow the header as a payload, if they fit. The group keeps a
payload as large as its last such call needed, up to twice that, and every call on the group sends it. A call that needs
more, as the first does, gathers its rows in a third collective. Use another group for calls that must not send the
payload.

If a rank dies or hangs after the header, the others raise PyTorch's own error (RuntimeError, DistBackendError): at once
if the backend sees the connection close, as gloo does, else after the process group's timeout, which is
`init_process_group(timeout=...)`.

Second derivatives, forward mode, torch.func and impl="reference" are not supported. Nor is what only the reference
computes: gradients of target, class weights, smoothing_distribution or a margin, and class probabilities or label
smoothing under a margin whose two offsets differ. Under torch.compile a call is a graph break.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fused_la._call.arguments import Options, ScaledPrior
from fused_la._call.pairwise_margin import PairwiseMargin
from fused_la._class_parallel.agreement import class_parallel_loss
from fused_la._class_parallel.rank_call import read_head_call, read_logits_call

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def class_parallel_logit_adjusted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    log_prior: Tensor,
    tau: float = 1.0,
    *,
    group: ProcessGroup | None = None,
    target_weight: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing_distribution: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""`logit_adjusted_cross_entropy` of logits whose classes are sharded over ranks.

    .. math::
        \ell(y, f) = -\log \mathrm{softmax}(f + \tau \log \pi)_y, \qquad f = (f^{(0)}, f^{(1)}, \dots), f^{(r)}
        \text{ on rank } r

    Equivalent to: ``logit_adjusted_cross_entropy(torch.cat(logits_of_ranks, 1), target, torch.cat(log_priors_of_ranks),
    tau, ...)``, with the gradients of the logits and the log prior of this rank.

    Args:
        logits: (N, C_r), (C_r,) or (N, C_r, d1, ..., dk) of this rank's classes; the same rows on all ranks.
        target: int64 labels among all C classes, the same on all ranks, (N, K) with `target_weight`; or class
            probabilities (N, C_r) of this rank's classes.
        log_prior: (C_r,) of this rank's classes, up to a constant that all ranks share. All of them may be -inf.
        tau: strength of the adjustment, >= 0.
        group: the process group that holds the classes; None is the default one.
        target_weight: of the shape of `target`, the same on all ranks.
        weight: (C_r,) class weights of this rank's classes.
        ignore_index, reduction, label_smoothing: as in `logit_adjusted_cross_entropy`.
        smoothing_distribution: (C_r,) this rank's part of the probabilities; None is 1 / C for each class.
        impl: "auto", "blocked" (CPU) or "triton" (GPU).

    Returns:
        float32 (float64 for float64 logits), the same on all ranks: a scalar, or with reduction "none" one loss a row.

    Raises:
        TypeError, ValueError: an argument that is wrong here, or does not fit another rank's; raised on every rank.
        IndexError: a label outside [0, C) that is not ignore_index; raised on every rank, whatever the device.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from fused_la.distributed import class_parallel_logit_adjusted_cross_entropy
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> log_prior = torch.tensor([0.9, 0.09, 0.01]).log()  # of rank 0, which is alone here
        >>> logits = torch.tensor([[2.0, 1.0, 1.5], [0.5, 0.0, 1.0]], requires_grad=True)
        >>> loss = class_parallel_logit_adjusted_cross_entropy(logits, torch.tensor([0, 2]), log_prior)
        >>> loss.backward()
        >>> round(loss.item(), 4), logits.grad.shape
        (2.0592, torch.Size([2, 3]))
        >>> dist.destroy_process_group()

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 10. The partial maximum and sum
    of each rank are those of Shoeybi et al., "Megatron-LM", 2019, section 3.
    """

    options = Options(target_weight, weight, ignore_index, reduction, label_smoothing, smoothing_distribution)
    return class_parallel_loss(
        "class_parallel_logit_adjusted_cross_entropy", group, read_logits_call, logits, target,
        ScaledPrior(log_prior, tau), options, impl,
    )  # fmt: skip


def class_parallel_margin_cross_entropy(
    logits: Tensor,
    target: Tensor,
    margin: PairwiseMargin,
    *,
    group: ProcessGroup | None = None,
    target_weight: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing_distribution: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""`margin_cross_entropy` of logits whose classes are sharded over ranks.

    .. math:: \ell(y, f) = \alpha_y \log\Big[1 + \sum_{c \ne y} e^{(s_c f_c + u_c) - (s_y f_y + v_y)}\Big]

    Equivalent to: ``margin_cross_entropy(torch.cat(logits_of_ranks, 1), target, margin, ...)``, where this rank passes
    ``margin.of_classes(first, last)``. Make the margin from the prior of all classes: most presets need its constant.

    Args:
        logits, target: as in `class_parallel_logit_adjusted_cross_entropy`.
        margin: (C_r,) vectors of this rank's classes; the same set of vectors on every rank.
        group, target_weight, weight: as there; weights count in the denominator of a mean, alpha does not.
        ignore_index, reduction, label_smoothing, smoothing_distribution, impl: as there.

    Returns:
        As `class_parallel_logit_adjusted_cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as there.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from fused_la import margins
        >>> from fused_la.distributed import class_parallel_margin_cross_entropy
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> margin = margins.adaptive(torch.tensor([0.9, 0.09, 0.01]).log()).of_classes(0, 3)
        >>> logits = torch.tensor([[2.0, 1.0, 1.5], [0.5, 0.0, 1.0]])
        >>> loss = class_parallel_margin_cross_entropy(logits, torch.tensor([0, 2]), margin)
        >>> round(loss.item(), 4)
        2.2464
        >>> dist.destroy_process_group()

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 11.
    """

    options = Options(target_weight, weight, ignore_index, reduction, label_smoothing, smoothing_distribution)
    return class_parallel_loss(
        "class_parallel_margin_cross_entropy", group, read_logits_call, logits, target, margin, options, impl
    )


def class_parallel_linear_logit_adjusted_cross_entropy(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    log_prior: Tensor,
    tau: float = 1.0,
    *,
    bias: Tensor | None = None,
    group: ProcessGroup | None = None,
    gather_features: bool = False,
    average_over_ranks: bool = False,
    target_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing_distribution: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""`linear_logit_adjusted_cross_entropy` of a classifier whose classes are sharded over ranks.

    .. math::
        \ell(y, h) = -\log \mathrm{softmax}(W h + b + \tau \log \pi)_y, \qquad W = (W^{(0)}, W^{(1)}, \dots), W^{(r)}
        \text{ on rank } r

    All ranks have the same features, or with `gather_features` each rank has different rows, as data-parallel ranks do.
    Then the loss is that of all rows, and this rank gets the gradient of its own rows. Gradients are the true
    derivatives of the loss: backward must be called on every rank, with the same upstream gradient. A model under DDP
    or FSDP2 averages its gradients over the ranks, but their sum is the derivative. `average_over_ranks` makes up for
    that by multiplying the features' gradient by the number of ranks; the group has to be the one that is averaged
    over. Keep the head's weight, bias and log prior out of the averaging, since they differ between ranks::

        trunk = DistributedDataParallel(trunk)                      # or fully_shard(trunk)
        weight = nn.Parameter(weight[first:last])                   # this rank's classes
        loss = class_parallel_linear_logit_adjusted_cross_entropy(
            trunk(images), weight, target, log_prior[first:last], gather_features=True, average_over_ranks=True)
        loss.backward()

    Args:
        features: (N, D) or (..., D); the same on all ranks (only shape and dtype are compared), or with
            `gather_features` this rank's rows, any number of them.
        weight: (C_r, D) of this rank's classes.
        target: int64 labels of the rows among all C classes, (N, K) with `target_weight`; or, if the features are the
            same on all ranks, class probabilities (N, C_r).
        log_prior: (C_r,) of this rank's classes, up to a constant that all ranks share.
        tau: strength of the adjustment, >= 0.
        bias: (C_r,) of this rank's classes.
        group: the process group that holds the classes; None is the default one.
        gather_features: whether each rank has different rows.
        average_over_ranks: whether the features' gradient is averaged over the ranks later; needs `gather_features`.
        target_weight: of the shape of `target`.
        class_weight: (C_r,) class weights of this rank's classes.
        ignore_index, reduction, label_smoothing: as in `linear_logit_adjusted_cross_entropy`.
        smoothing_distribution: (C_r,) this rank's part of the probabilities; None is 1 / C for each class.
        impl: "auto", "blocked" (CPU) or "triton" (GPU).

    Returns:
        float32 (float64 for float64 features): a scalar that is the same on all ranks, or with reduction "none" one
        loss for each row of the features that this rank passed.

    Raises:
        TypeError, ValueError: an argument that is wrong here, or does not fit another rank's; raised on every rank.
        IndexError: a label outside [0, C) that is not ignore_index; raised on every rank, whatever the device.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from fused_la.distributed import class_parallel_linear_logit_adjusted_cross_entropy
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> log_prior = torch.tensor([0.9, 0.09, 0.01]).log()  # of rank 0, which is alone here
        >>> weight = torch.tensor([[2.0, 0.5], [1.0, 0.0], [1.5, 1.0]], requires_grad=True)
        >>> loss = class_parallel_linear_logit_adjusted_cross_entropy(
        ...     torch.eye(2), weight, torch.tensor([0, 2]), log_prior, gather_features=True
        ... )
        >>> loss.backward()
        >>> round(loss.item(), 4), weight.grad.shape
        (2.0592, torch.Size([3, 2]))
        >>> dist.destroy_process_group()

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 10. The sharded head of
    data-parallel ranks is that of An et al., "Partial FC", CVPR 2022.
    """

    options = Options(target_weight, class_weight, ignore_index, reduction, label_smoothing, smoothing_distribution)
    return class_parallel_loss(
        "class_parallel_linear_logit_adjusted_cross_entropy", group, read_head_call, features, weight, bias, target,
        ScaledPrior(log_prior, tau), options, impl, gather_features, average_over_ranks,
    )  # fmt: skip


def class_parallel_linear_margin_cross_entropy(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: PairwiseMargin,
    *,
    bias: Tensor | None = None,
    group: ProcessGroup | None = None,
    gather_features: bool = False,
    average_over_ranks: bool = False,
    target_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing_distribution: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""`linear_margin_cross_entropy` of a classifier whose classes are sharded over ranks.

    .. math:: \ell(y, h) = \alpha_y \log\Big[1 + \sum_{c \ne y} e^{(s_c f_c + u_c) - (s_y f_y + v_y)}\Big], f = W h + b

    Args:
        features, weight, target: as in `class_parallel_linear_logit_adjusted_cross_entropy`.
        margin: (C_r,) vectors of this rank's classes, ``margin.of_classes(first, last)``; the same set on every rank.
        bias, group, gather_features, average_over_ranks: as there.
        target_weight, class_weight: as there; weights count in the denominator of a mean, alpha does not.
        ignore_index, reduction, label_smoothing, smoothing_distribution, impl: as there.

    Returns:
        As `class_parallel_linear_logit_adjusted_cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as there.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from fused_la import margins
        >>> from fused_la.distributed import class_parallel_linear_margin_cross_entropy
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> margin = margins.adaptive(torch.tensor([0.9, 0.09, 0.01]).log()).of_classes(0, 3)
        >>> weight = torch.tensor([[2.0, 0.5], [1.0, 0.0], [1.5, 1.0]])
        >>> loss = class_parallel_linear_margin_cross_entropy(torch.eye(2), weight, torch.tensor([0, 2]), margin)
        >>> round(loss.item(), 4)
        2.2464
        >>> dist.destroy_process_group()

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 11.
    """

    options = Options(target_weight, class_weight, ignore_index, reduction, label_smoothing, smoothing_distribution)
    return class_parallel_loss(
        "class_parallel_linear_margin_cross_entropy", group, read_head_call, features, weight, bias, target,
        margin, options, impl, gather_features, average_over_ranks,
    )  # fmt: skip
