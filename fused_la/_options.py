"""What modules of a loss hold beside their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_la import _checks
from fused_la.prior import log_prior_from_counts


class LossOptions(nn.Module):
    """The options of a loss, its per-class ones as buffers that stay exact when the module is cast to half precision.

    `weight_name` is what the class weights are called, as a buffer and in messages.
    """

    log_prior: Tensor
    smoothing_distribution: Tensor | None

    def __init__(
        self,
        class_counts: Any,
        tau: float,
        pseudocount: float,
        class_weight: Tensor | None,
        weight_name: str,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
        smoothing_distribution: Tensor | None,
        impl: str,
    ):
        super().__init__()
        log_prior = log_prior_from_counts(class_counts, pseudocount=pseudocount)
        if class_weight is not None:
            _checks.check_class_vector(weight_name, class_weight, len(log_prior))
        if smoothing_distribution is not None:
            _checks.check_smoothing_distribution(smoothing_distribution, len(log_prior))
        self.register_buffer("log_prior", log_prior)
        self.register_buffer(weight_name, class_weight)
        self.register_buffer("smoothing_distribution", smoothing_distribution)
        self._weight_name = weight_name
        self.tau = _checks.check_tau(tau)
        self.ignore_index = _checks.check_ignore_index(ignore_index)
        self.reduction = reduction
        self.label_smoothing = _checks.check_label_smoothing(label_smoothing)
        self.impl = impl
        _checks.check_choice("reduction", reduction, _checks.REDUCTIONS)
        _checks.check_choice("impl", impl, _checks.IMPLEMENTATIONS)

    def keywords(self) -> dict[str, Any]:
        """The options as a loss function takes them."""
        names = (self._weight_name, "ignore_index", "reduction", "label_smoothing", "smoothing_distribution", "impl")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        options = f"n_classes={self.log_prior.numel()}, tau={self.tau}, reduction={self.reduction!r}"
        if self.label_smoothing > 0.0:
            options += f", label_smoothing={self.label_smoothing}"
        return options

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LossOptions:
        exact = {name: self._buffers[name] for name in ("log_prior", self._weight_name, "smoothing_distribution")}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            cast = self._buffers[name]
            if buffer is not None and cast is not None and cast.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = buffer.to(cast.device)
        return self
