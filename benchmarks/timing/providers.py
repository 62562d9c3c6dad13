"""Providers, the implementations that are compared: plain PyTorch, fused losses of other libraries, and fused_la.

A loss that takes no offset gets logits to which the offset was already added, in the dtype of the logits ("folded"),
as the bias of a classifier could do. The time of this sum is not counted, which is a fair comparison if the classifier
is linear. The error that rounding of the folded logits adds is in the results as `folding_error`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_la
from benchmarks.timing.cases import DTYPES, SHARE, TARGETS, Batch, Case

Loss = Callable[[Sequence[Tensor], Batch], Tensor]  # loss(leaves, batch); the leaves may be copies of the batch's
NEEDS_GPU = {"cpu": "needs a GPU"}


class UnavailableError(Exception):
    """A provider cannot run here; the message says why."""


def unchanged_inputs(leaves: Sequence[Tensor], log_prior: Tensor) -> tuple[Tensor, ...]:
    return tuple(leaves)


def fold_offset(leaves: Sequence[Tensor], log_prior: Tensor) -> tuple[Tensor, ...]:
    """The leaves with the offset added to the last one (logits, or the bias of a head), in its dtype."""
    *others, last = leaves
    return (*others, (last + log_prior).to(last.dtype))


def append_bias_feature(leaves: Sequence[Tensor], log_prior: Tensor) -> tuple[Tensor, ...]:
    """(features, weight) of a head without bias and with the same logits.

    The folded bias becomes the weight of an added feature that is always 1. Zeros pad the features to a multiple of 64.
    """
    features, weight, bias = fold_offset(leaves, log_prior)
    padding = -(features.shape[1] + 1) % 64
    one = features.new_ones(len(features), 1)
    return F.pad(torch.cat([features, one], 1), (0, padding)), F.pad(
        torch.cat([weight, bias[:, None]], 1), (0, padding)
    )


def unchanged_gradients(gradients: Sequence[Tensor], case: Case) -> tuple[Tensor, ...]:
    return tuple(gradients)


def gradients_without_bias_feature(gradients: Sequence[Tensor], case: Case) -> tuple[Tensor, ...]:
    features, weight = gradients
    return features[:, : case.n_features], weight[:, : case.n_features], weight[:, case.n_features]


@dataclass(frozen=True)
class Provider:
    """One way of computing the loss and its gradient."""

    name: str
    description: str
    load: Callable[[Case, str], Loss]  # load(case, device) imports what the loss needs; may raise UnavailableError
    head: bool = False  # takes features, weight and bias instead of logits
    inputs: Callable[[Sequence[Tensor], Tensor], tuple[Tensor, ...]] = unchanged_inputs
    gradients: Callable[[Sequence[Tensor], Case], tuple[Tensor, ...]] = unchanged_gradients
    overwrites: bool = False  # overwrites its inputs: they are restored before every run, not timed
    rounds_loss: bool = False  # computes its loss, or the logits of its head, in the dtype of the inputs
    targets: tuple[str, ...] = TARGETS
    dtypes: tuple[str, ...] = DTYPES
    not_on: dict[str, str] = field(default_factory=dict)  # {device: why the provider is not timed on it}
    buffers: int = 0  # (N, C) float32 tensors at peak, besides logits and gradient; an estimate of what fits in memory
    is_loss: bool = True  # False: a lower bound of the time, with no result to check
    distribution: str = ""  # name of the installed distribution, to report its version

    def reason_against(self, case: Case, device: str) -> str:
        """Why the provider is not measured on this case, "" if it is; `load` may find further reasons."""
        if device in self.not_on:
            return self.not_on[device]
        if case.target not in self.targets:
            return f"takes no {case.target} targets"
        if case.dtype not in self.dtypes:
            return f"not for {case.dtype} logits"
        return ""


def adjusted_cross_entropy(logits: Tensor, log_prior: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
    return weighted_label_loss(F.cross_entropy, logits + log_prior, targets)


def weighted_label_loss(
    loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: tuple[Tensor, ...]
) -> Tensor:
    """The loss of labels or probabilities (one call) or of two weighted labels (two calls)."""
    if len(targets) == 1:
        return loss(logits, targets[0])
    first, second = targets
    return SHARE * loss(logits, first) + (1 - SHARE) * loss(logits, second)


# Losses of logits -----------------------------------------------------------------------------------------------------


def eager(case: Case, device: str) -> Loss:
    return lambda leaves, batch: adjusted_cross_entropy(leaves[0], batch.log_prior, batch.targets)


def eager_autocast(case: Case, device: str) -> Loss:
    def loss(leaves: Sequence[Tensor], batch: Batch) -> Tensor:
        with torch.autocast(device, case.torch_dtype):
            return adjusted_cross_entropy(leaves[0], batch.log_prior, batch.targets)

    return loss


def eager_folded(case: Case, device: str) -> Loss:
    return lambda leaves, batch: weighted_label_loss(F.cross_entropy, leaves[0], batch.targets)


def compiled(case: Case, device: str) -> Loss:
    torch.compiler.reset()  # graphs of earlier cases count against the recompile limit, beyond which it runs eagerly
    function = torch.compile(adjusted_cross_entropy, dynamic=False, fullgraph=True)
    return lambda leaves, batch: function(leaves[0], batch.log_prior, batch.targets)


def liger(case: Case, device: str) -> Loss:
    function = import_module("liger_kernel.transformers.functional").liger_cross_entropy
    return lambda leaves, batch: function(leaves[0], batch.target)


def quack(case: Case, device: str) -> Loss:
    function = import_module("quack.cross_entropy").cross_entropy
    return lambda leaves, batch: weighted_label_loss(function, leaves[0], batch.targets)


def flash_attention(case: Case, device: str) -> Loss:
    function = import_module("flash_attn.ops.triton.cross_entropy").cross_entropy_loss
    return lambda leaves, batch: weighted_label_loss(lambda z, y: function(z, y)[0].mean(), leaves[0], batch.targets)


def fused(impl: str) -> Callable[[Case, str], Loss]:
    def loss(leaves: Sequence[Tensor], batch: Batch) -> Tensor:
        return fused_la.logit_adjusted_cross_entropy(
            leaves[0], batch.target, batch.log_prior, target_weight=batch.shares, impl=impl
        )

    return lambda case, device: loss


# Losses of features ---------------------------------------------------------------------------------------------------


def eager_head(case: Case, device: str) -> Loss:
    return lambda leaves, batch: adjusted_cross_entropy(F.linear(*leaves), batch.log_prior, batch.targets)


def eager_head_folded(case: Case, device: str) -> Loss:
    return lambda leaves, batch: F.cross_entropy(F.linear(*leaves), batch.target)


def compiled_head(case: Case, device: str) -> Loss:
    torch.compiler.reset()
    function = torch.compile(eager_head(case, device), dynamic=False, fullgraph=True)
    return lambda leaves, batch: function(leaves, batch)


def torch_linear(case: Case, device: str, chunked: bool = True) -> Loss:
    function = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise UnavailableError(f"needs torch >= 2.13, this is {torch.__version__}")

    def loss(leaves: Sequence[Tensor], batch: Batch) -> Tensor:
        features, weight, bias = leaves
        return function(features, weight, batch.target, linear_bias=bias, options=options() if chunked else None)

    return loss


def liger_linear(case: Case, device: str) -> Loss:
    function = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy

    def loss(leaves: Sequence[Tensor], batch: Batch) -> Tensor:
        features, weight, bias = leaves
        return function(features, weight, batch.target, bias)

    return loss


def cut_cross_entropy(case: Case, device: str) -> Loss:
    function = import_module("cut_cross_entropy").linear_cross_entropy
    return lambda leaves, batch: function(*leaves, batch.target)


def fused_head(case: Case, device: str) -> Loss:
    function = getattr(fused_la, "linear_logit_adjusted_cross_entropy", None)
    if function is None:
        raise UnavailableError(f"not available in fused_la {fused_la.__version__}")

    def loss(leaves: Sequence[Tensor], batch: Batch) -> Tensor:
        features, weight, bias = leaves
        return function(features, weight, batch.target, batch.log_prior, bias=bias, target_weight=batch.shares)

    return loss


def four_products(case: Case, device: str) -> Loss:
    def products(leaves: Sequence[Tensor], batch: Batch) -> Tensor:
        features, weight, _ = leaves
        logits = features @ weight.T
        torch.mm(features, weight.T, out=logits)
        _grad_features = logits @ weight
        return logits.T @ features

    return products


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("eager", "F.cross_entropy(logits + log_prior, target)", eager, buffers=5),
        Provider(
            "eager, autocast",
            "the same under torch.autocast, on the half-precision logits that it makes",
            eager_autocast,
            dtypes=("bfloat16", "float16"),
            buffers=5,
        ),
        Provider(
            "eager, folded",
            "F.cross_entropy(logits, target); offset folded into the logits beforehand, not timed",
            eager_folded,
            inputs=fold_offset,
            rounds_loss=True,
            buffers=5,
        ),
        Provider("torch.compile", "eager compiled for its shape, fullgraph", compiled, buffers=5),
        Provider(
            "Liger-Kernel",
            "liger_cross_entropy; offset folded into the logits beforehand, not timed; it overwrites the logits, so "
            "each run gets a fresh copy, not timed",
            liger,
            inputs=fold_offset,
            overwrites=True,
            rounds_loss=True,
            targets=("hard",),
            not_on=NEEDS_GPU,
            distribution="liger-kernel",
        ),
        Provider(
            "QuACK",
            "quack.cross_entropy; offset folded into the logits beforehand, not timed; two labels in two calls",
            quack,
            inputs=fold_offset,
            targets=("hard", "two-label"),
            not_on=NEEDS_GPU,
            distribution="quack-kernels",
        ),
        Provider(
            "flash-attention",
            "its Triton cross_entropy_loss and a mean; offset folded into the logits beforehand, not timed; two labels "
            "in two calls",
            flash_attention,
            inputs=fold_offset,
            targets=("hard", "two-label"),
            not_on=NEEDS_GPU,
            distribution="flash-attn",
        ),
        Provider("fused_la reference", "the formula in plain PyTorch", fused("reference"), buffers=8),
        Provider(
            "fused_la blocked",
            "blocks of rows on a CPU",
            fused("blocked"),
            not_on={"cuda": "an implementation for CPUs"},
        ),
        Provider(
            "fused_la triton",
            "Triton kernels",
            fused("triton"),
            not_on={"cpu": "interpreter: not timed"},
        ),
        Provider(
            "eager head",
            "F.cross_entropy(F.linear(features, weight, bias) + log_prior, target)",
            eager_head,
            head=True,
            rounds_loss=True,
            buffers=5,
        ),
        Provider(
            "eager head, folded",
            "F.cross_entropy(F.linear(features, weight, bias), target); offset folded into the bias",
            eager_head_folded,
            head=True,
            inputs=fold_offset,
            rounds_loss=True,
            targets=("hard",),
            buffers=5,
        ),
        Provider(
            "torch.compile head",
            "the eager head compiled for its shape, fullgraph",
            compiled_head,
            head=True,
            rounds_loss=True,
            buffers=5,
        ),
        Provider(
            "F.linear_cross_entropy, whole",
            "PyTorch's own without options, which makes whole logits; offset folded into the bias",
            partial(torch_linear, chunked=False),
            head=True,
            inputs=fold_offset,
            rounds_loss=True,
            targets=("hard",),
            buffers=5,
        ),
        Provider(
            "F.linear_cross_entropy",
            "PyTorch's own in chunks of rows (LinearCrossEntropyOptions()); offset folded into the bias",
            torch_linear,
            head=True,
            inputs=fold_offset,
            targets=("hard",),
            buffers=5,
        ),
        Provider(
            "Liger-Kernel linear",
            "liger_fused_linear_cross_entropy; offset folded into the bias",
            liger_linear,
            head=True,
            inputs=fold_offset,
            rounds_loss=True,
            targets=("hard",),
            not_on=NEEDS_GPU,
            buffers=1,
            distribution="liger-kernel",
        ),
        Provider(
            "cut-cross-entropy",
            "linear_cross_entropy, small gradients dropped as by default; bias and offset are the weight of a feature "
            "that is always 1, concatenated beforehand, not timed",
            cut_cross_entropy,
            head=True,
            inputs=append_bias_feature,
            gradients=gradients_without_bias_feature,
            targets=("hard",),
            not_on=NEEDS_GPU,
            distribution="cut-cross-entropy",
        ),
        Provider(
            "fused_la head",
            "linear_logit_adjusted_cross_entropy",
            fused_head,
            head=True,
            buffers=1,
        ),
        Provider(
            "four bare products",
            "a yardstick, no loss: logits twice, gradients of features and weight, nothing else",
            four_products,
            head=True,
            buffers=1,
            is_loss=False,
        ),
    )
}


def baseline(case: Case) -> Provider:
    """The provider that ratios compare with."""
    return PROVIDERS["eager head" if case.n_features else "eager"]
