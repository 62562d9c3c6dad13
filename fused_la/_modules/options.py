"""Base classes of the loss modules: they hold the options of a loss, the per-class ones as tensors."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fused_la._call import checks
from fused_la._call.class_counts import check_pseudocount, counts_in_class_order, log_prior_of
from fused_la._call.pairwise_margin import PairwiseMargin
from fused_la._call.values import is_traced, read_value
from fused_la._modules import vectors

_log = logging.getLogger("fused_la")
_GRAPH_BREAK = "what a loss holds of each class is not where the logits are; move the module there first, with .to()"


def per_class_option(name: str) -> Any:
    """A property that reads and assigns one of a module's per-class options."""
    return property(lambda self: self._per_class[name], lambda self, value: self._set_per_class(name, value))


class LossOptions(nn.Module):
    """The options of a loss; the per-class ones are tensors, but neither parameters nor buffers.

    They follow from the constructor's arguments. So no checkpoint holds or replaces them, and they are not reached when
    buffers get fresh memory (`to_empty`, loaders that build a model on the meta device). They keep their digits when
    the module is cast. They move with the module, or to the device of the logits in a call.
    """

    smoothing_distribution = per_class_option("smoothing_distribution")
    _weight_name = "weight"  # name of the class weights, as an attribute and in messages

    def __init__(
        self, per_class: dict[str, Any], class_weight: Any, ignore_index: int, reduction: str, label_smoothing: float,
        smoothing_distribution: Any, impl: str, **base_kwargs: Any,
    ):  # fmt: skip
        super().__init__(**base_kwargs)
        self._per_class: dict[str, Any] = {}
        options = {self._weight_name: class_weight, "smoothing_distribution": smoothing_distribution}
        for name, value in (per_class | options).items():
            self._set_per_class(name, value)
        self.ignore_index = checks.check_ignore_index(ignore_index)
        self.reduction = reduction
        self.label_smoothing = checks.check_label_smoothing(label_smoothing)
        self.impl = impl
        checks.check_choice("reduction", reduction, checks.REDUCTIONS)
        checks.check_choice("impl", impl, checks.IMPLEMENTATIONS)
        default = torch.get_default_device()
        if default.type not in ("cpu", "meta"):
            self._per_class = self._per_class_on(default)

    def _call_loss(
        self, function: Callable[..., Tensor], *inputs: Any, reduction: str | None, num_items_in_batch: Any,
        **keywords: Any,
    ) -> Tensor:  # fmt: skip
        """Call a loss function with the module's options; with num_items_in_batch, divide its sum by that number."""
        reduction = self.reduction if reduction is None else reduction
        if num_items_in_batch is not None:
            num_items_in_batch = _checked_num_items(num_items_in_batch, reduction)
            reduction = "sum"
        loss = function(
            *inputs, **keywords, **self._per_class_for(inputs[0]), ignore_index=self.ignore_index, reduction=reduction,
            label_smoothing=self.label_smoothing, impl=self.impl,
        )  # fmt: skip
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device).reshape(())
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    def _per_class_for(self, input: Tensor) -> dict[str, Any]:
        """The per-class options on the device of an input, fake or graph constants if the input is fake."""
        per_class, device = self._per_class, input.device
        if type(input) is not Tensor and not torch.compiler.is_compiling() and hasattr(input, "fake_mode"):
            return vectors.map_tensors(per_class, lambda _, tensor: vectors.to_fake_or_constant(tensor, input))
        for value in per_class.values():
            if not vectors.is_on_device(value, device):
                move: Any = self._move_per_class
                if torch.compiler.is_compiling():
                    torch._dynamo.graph_break(msg=_GRAPH_BREAK)
                    move = torch.compiler.disable(move)
                per_class = move(device)
                break
        return per_class

    def _set_per_class(self, name: str, value: Any) -> None:
        """Set a per-class option, on the device of the others; a tensor that is there is kept, not copied."""
        others = [tensor for _, tensor in vectors.named_tensors({**self._per_class, name: None})]
        n_classes = others[0].shape[-1] if others else None
        if isinstance(value, PairwiseMargin):
            for field, vector in value.named_vectors():
                checks.check_class_vector(f"{name}.{field}", vector, n_classes or len(vector))
        elif value is not None and name != "log_prior":  # which follows from checked counts
            log_prior = self._per_class.get("log_prior")
            n_groups = len(log_prior) if log_prior is not None and log_prior.dim() == 2 else None
            value = vectors.to_class_vector(name, value, n_classes, n_groups)
        with torch.inference_mode(False):
            new = vectors.map_tensors({name: value}, lambda _, t: t.clone() if t.is_inference() else t)
            if others and not others[0].is_meta:
                device = others[0].device
                new = vectors.map_tensors(new, lambda key, t: t if t.is_meta else vectors.move_tensor(key, t, device))
        self._per_class[name] = new[name]

    def _move_per_class(self, device: torch.device) -> dict[str, Any]:
        """The per-class options on a device; the module keeps them there, unless they are traced or have no values."""
        moved = self._per_class_on(device)
        if device.type != "meta" and not any(is_traced(tensor) for _, tensor in vectors.named_tensors(moved)):
            self._per_class = moved
        return vectors.map_tensors(moved, lambda _, tensor: tensor.to(device))  # also those that require a gradient

    def _per_class_on(self, device: torch.device) -> dict[str, Any]:
        """The per-class options on a device, except tensors that require a gradient, which stay the caller's."""
        with torch.inference_mode(False):
            return vectors.map_tensors(self._per_class, lambda name, tensor: vectors.move_tensor(name, tensor, device))

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)  # as a per-class option, not as a parameter of the module
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LossOptions:
        super()._apply(fn, recurse)
        tensors = list(vectors.named_tensors(self._per_class))
        if tensors:
            # The device to which fn moves tensors. Casts are ignored, and values are not dropped for the meta device.
            device = fn(torch.empty(0, device=tensors[0][1].device)).device
            has_values = not any(tensor.is_meta for _, tensor in tensors)
            if device.type != "meta" and has_values:
                self._per_class = self._per_class_on(device)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # Saved by an older version, which had buffers, or by torch.nn.CrossEntropyLoss(weight=...).
        for name in ("log_prior", self._weight_name, "smoothing_distribution"):
            saved, current = state_dict.pop(prefix + name, None), self._per_class.get(name)
            if isinstance(saved, Tensor) and not vectors.same_values(saved, current):
                _log.warning(
                    "%s%s of the checkpoint is not used: it differs from what the module was constructed with, which "
                    "stays", prefix, name,
                )  # fmt: skip
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        n_classes = next((tensor.shape[-1] for _, tensor in vectors.named_tensors(self._per_class)), None)
        options = "" if n_classes is None else f"n_classes={n_classes}, "
        options += f"reduction={self.reduction!r}"
        if self.label_smoothing > 0.0:
            options += f", label_smoothing={self.label_smoothing}"
        return options


class CountedLossOptions(LossOptions):
    """The options of a loss that is adjusted by the log prior of class counts; that log prior is a per-class option.

    A smoothing_distribution of "prior" follows from the counts too.
    """

    _smooths_toward_prior = False

    def __init__(
        self, class_counts: Any, tau: float, pseudocount: float, exclude_absent: bool, *options: Any, **base_kwargs: Any
    ):
        counts = counts_in_class_order(class_counts)
        log_prior = log_prior_of(counts, pseudocount, exclude_absent)
        if base_kwargs:  # the other base class is nn.Linear
            base_kwargs["out_features"] = log_prior.shape[-1]
        super().__init__({"log_prior": log_prior}, *options, **base_kwargs)
        if exclude_absent and tau == 0.0:
            raise ValueError(
                "tau must be positive with exclude_absent=True, got 0: what is left out is log_prior times tau"
            )
        smooths_uniformly = self.label_smoothing > 0.0 and self.smoothing_distribution is None
        if smooths_uniformly and read_value((log_prior == -torch.inf).any()):
            raise ValueError(
                'smoothing_distribution must be given with label_smoothing and exclude_absent=True, such as "prior": '
                "the uniform one asks for absent classes"
            )
        self._class_counts = counts  # a NumPy array: default devices and casts do not change it
        self._pseudocount, self._exclude_absent = check_pseudocount(pseudocount, exclude_absent), exclude_absent
        self.tau = checks.check_tau(tau)

    @property
    def pseudocount(self) -> float:
        return self._pseudocount

    @property
    def exclude_absent(self) -> bool:
        return self._exclude_absent

    @property
    def log_prior(self) -> Tensor:
        """(C,) or (G, C) float32, `log_prior_from_counts` of `class_counts`. Assigning new counts writes to this
        tensor."""
        return self._per_class["log_prior"]

    @log_prior.setter
    def log_prior(self, value: Any) -> None:
        raise AttributeError("log_prior must not be assigned, it follows from class_counts: assign these")

    @property
    def class_counts(self) -> Tensor:
        """A copy of the counts, integer or float64, on the CPU. New ones may be assigned between any two steps."""
        counts = self._class_counts
        return counts.clone() if isinstance(counts, Tensor) else torch.from_numpy(counts.copy())

    @class_counts.setter
    def class_counts(self, value: Any) -> None:
        counts = counts_in_class_order(value)
        log_prior = self._log_prior_of(counts)
        for name, n_classes in self._n_classes_by_name():
            if n_classes != log_prior.shape[-1]:
                got = tuple(log_prior.shape)
                raise ValueError(f"class_counts must have shape ({n_classes},) as {name} has, got {got}")
        for name, value in self._follow_from(log_prior).items():
            current = self._per_class[name]
            if current.shape == value.shape and not current.is_meta:
                with torch.no_grad():
                    current.copy_(value)  # in place: CUDA graphs and compiled code use this tensor
            else:
                super()._set_per_class(name, value)
        self._class_counts = counts

    def _check_group(self, group: Any) -> None:
        """Check that a call gives groups if the counts are by group, and only then."""
        if (group is None) == (self.log_prior.dim() == 2):
            expected = "given for class_counts of shape (G, C)" if group is None else "None for class_counts (C,)"
            raise ValueError(f"group must be {expected}, got {type(group).__name__}")

    def _set_per_class(self, name: str, value: Any) -> None:
        toward_prior = name == "smoothing_distribution" and isinstance(value, str) and value == "prior"
        super()._set_per_class(name, self.log_prior.exp() if toward_prior else value)
        if name == "smoothing_distribution":
            self._smooths_toward_prior = toward_prior

    def _follow_from(self, log_prior: Tensor) -> dict[str, Tensor]:
        """The per-class options that follow from the counts."""
        options = {"log_prior": log_prior}
        return options | {"smoothing_distribution": log_prior.exp()} if self._smooths_toward_prior else options

    def _log_prior_of(self, counts: Any) -> Tensor:
        return log_prior_of(counts, self._pseudocount, self._exclude_absent)

    def _n_classes_by_name(self) -> list[tuple[str, int]]:
        """(name, number of classes) of everything per-class except the counts and their log prior."""
        others = {**self._per_class, **dict.fromkeys(self._follow_from(self.log_prior))}
        return [(name, tensor.shape[-1]) for name, tensor in vectors.named_tensors(others)]

    def _per_class_on(self, device: torch.device) -> dict[str, Any]:
        if self.log_prior.is_meta and isinstance(self._class_counts, np.ndarray):  # loaded to meta
            self._per_class = {**self._per_class, **self._follow_from(self._log_prior_of(self._class_counts))}
        return super()._per_class_on(device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_per_class" not in self.__dict__:  # pickled by a version that had buffers and no counts
            names = ("log_prior", self._weight_name, "smoothing_distribution")
            self._per_class = {name: self._buffers.pop(name, None) for name in names}
            self._class_counts = self.log_prior.detach().double().exp().cpu().numpy()
            self._pseudocount, self._exclude_absent = 0.0, False

    def extra_repr(self) -> str:
        return super().extra_repr().replace(", reduction", f", tau={self.tau}, reduction")


def _checked_num_items(num_items_in_batch: Any, reduction: str) -> Any:
    """One number, or a tensor of one; a tensor that repeats one is what transformers.Trainer has for several GPUs."""
    if reduction != "mean":
        raise ValueError(f"num_items_in_batch must be None unless reduction is 'mean', got it with {reduction!r}")
    if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel() > 1:
        sizes = zip(num_items_in_batch.shape, num_items_in_batch.stride(), strict=True)
        if all(size == 1 or stride == 0 for size, stride in sizes):
            num_items_in_batch = num_items_in_batch.flatten()[0]
    is_number = isinstance(num_items_in_batch, numbers.Real) and not isinstance(num_items_in_batch, bool)
    if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel() == 1:
        is_number = not (num_items_in_batch.is_complex() or num_items_in_batch.dtype == torch.bool)
    if not is_number:
        raise TypeError(
            "num_items_in_batch must be a number or a tensor of one number, "
            f"got {type(num_items_in_batch).__name__}"
        )  # fmt: skip
    return num_items_in_batch


def split_target(target: Any, target_weight: Any) -> tuple[Any, Any]:
    """The labels and their weights, which may be given as a pair, by loops that pass on one target."""
    if not isinstance(target, (tuple, list)) or len(target) != 2:
        return target, target_weight
    if target_weight is not None:
        raise TypeError("target_weight must be given once, got it and a pair of labels and weights as target")
    return target[0], target[1]


def argument_or_input(name: str, value: Any, input: Any) -> Tensor:
    """The first argument of a module, given under its own name or as `input`, as in the modules of torch.nn."""
    if input is not None:
        if value is not None:
            raise TypeError(f"{name} must be given once, got {name} and input")
        value = input
    if value is None:
        raise TypeError(f"{name} must be a torch.Tensor, got NoneType")
    return value
