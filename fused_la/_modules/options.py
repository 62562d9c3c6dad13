"""What modules of a loss hold beside their parameters."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fused_la._call import checks
from fused_la._call.class_counts import check_pseudocount, counts_of_classes, log_prior_of
from fused_la._call.pairwise_margin import PairwiseMargin
from fused_la._call.values import is_fake, is_traced, read_value

_log = logging.getLogger("fused_la")
_ELSEWHERE = "what a loss holds of each class is not where the logits are; move the module there first, with .to()"


def per_class_option(name: str) -> Any:
    """A property of a module: one of its per-class options, which may be assigned."""
    return property(lambda self: self._per_class[name], lambda self, value: self._hold(name, value))


class LossOptions(nn.Module):
    """The options of a loss, its per-class ones as tensors that are neither parameters nor buffers.

    They follow from the constructor's arguments. So no checkpoint holds them and none replaces them, and what fills
    buffers with fresh memory (`to_empty`, loaders that build a model on the meta device) does not reach them. They keep
    their digits when the module is cast, and go where the module goes, or else where the logits are.
    """

    smoothing_distribution = per_class_option("smoothing_distribution")
    _weight_name = "weight"  # what the class weights are called, as an attribute and in messages

    def __init__(
        self,
        per_class: dict[str, Any],
        class_weight: Any,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
        smoothing_distribution: Any,
        impl: str,
        **of_module: Any,
    ):
        super().__init__(**of_module)
        self._per_class: dict[str, Any] = {}
        options = {self._weight_name: class_weight, "smoothing_distribution": smoothing_distribution}
        for name, value in (per_class | options).items():
            self._hold(name, value)
        self.ignore_index = checks.check_ignore_index(ignore_index)
        self.reduction = reduction
        self.label_smoothing = checks.check_label_smoothing(label_smoothing)
        self.impl = impl
        checks.check_choice("reduction", reduction, checks.REDUCTIONS)
        checks.check_choice("impl", impl, checks.IMPLEMENTATIONS)
        default = torch.get_default_device()
        if default.type not in ("cpu", "meta"):
            self._per_class = self._moved(default)

    def _loss(
        self, function: Callable[..., Tensor], *inputs: Any, reduction: str | None, num_items_in_batch: Any,
        **keywords: Any,
    ) -> Tensor:  # fmt: skip
        """A loss function of the inputs under the module's options; a mean over a number of items is a sum first."""
        reduction = self.reduction if reduction is None else reduction
        if num_items_in_batch is not None:
            _check_num_items(num_items_in_batch, reduction)
            reduction = "sum"
        loss = function(
            *inputs, **keywords, **self._placed(inputs[0]), ignore_index=self.ignore_index, reduction=reduction,
            label_smoothing=self.label_smoothing, impl=self.impl,
        )  # fmt: skip
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device).reshape(())
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    def _placed(self, like: Tensor) -> dict[str, Any]:
        """The per-class options where a tensor is."""
        per_class, device = self._per_class, like.device
        if type(like) is not Tensor and not torch.compiler.is_compiling() and hasattr(like, "fake_mode"):
            return _mapped(per_class, lambda _, tensor: _as_fake(tensor, like))
        for value in per_class.values():
            if not _is_on(value, device):
                on: Any = self._on
                if torch.compiler.is_compiling():
                    torch._dynamo.graph_break(msg=_ELSEWHERE)
                    on = torch.compiler.disable(on)
                per_class = on(device)
                break
        return per_class

    def _hold(self, name: str, value: Any) -> None:
        """Keep a per-class option: a tensor as it is, if it is where the others are, as a buffer would be."""
        others = [tensor for key, tensor in _tensors({**self._per_class, name: None})]
        n_classes = len(others[0]) if others else None
        if isinstance(value, PairwiseMargin):
            for field, vector in value.named_vectors():
                checks.check_class_vector(f"{name}.{field}", vector, n_classes or len(vector))
        elif value is not None:
            value = _as_vector(name, value, n_classes)
        with torch.inference_mode(False):
            held = _mapped({name: value}, lambda _, tensor: tensor.clone() if tensor.is_inference() else tensor)
            if others and not others[0].is_meta:
                move = _mover(others[0].device)
                held = _mapped(held, lambda key, tensor: tensor if tensor.is_meta else move(key, tensor))
        self._per_class[name] = held[name]

    def _on(self, device: torch.device) -> dict[str, Any]:
        """The per-class options on a device, and there from now on if they can stay."""
        moved = self._moved(device)
        if device.type != "meta" and not any(is_traced(tensor) for _, tensor in _tensors(moved)):
            self._per_class = moved
        return _mapped(moved, lambda name, tensor: tensor.to(device))  # what requires a gradient has not moved

    def _moved(self, device: torch.device) -> dict[str, Any]:
        """The per-class options on a device, but for those that require a gradient, which stay the caller's own."""
        with torch.inference_mode(False):
            return _mapped(self._per_class, _mover(device))

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)  # held as any tensor that requires a gradient, the caller's own
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LossOptions:
        super()._apply(fn, recurse)
        tensors = list(_tensors(self._per_class))
        if tensors:
            # Where fn takes a tensor. A dtype is not taken over, and values are not given up for the meta device.
            device = fn(torch.empty(0, device=tensors[0][1].device)).device
            has_values = not any(tensor.is_meta for _, tensor in tensors)
            if device.type != "meta" and has_values:
                self._per_class = self._moved(device)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # What was saved as a buffer once, or by torch.nn.CrossEntropyLoss(weight=...).
        for name in ("log_prior", self._weight_name, "smoothing_distribution"):
            saved, held = state_dict.pop(prefix + name, None), self._per_class.get(name)
            if isinstance(saved, Tensor) and not _agree(saved, held):
                _log.warning(
                    "%s%s of the checkpoint is not used: it differs from what the module was constructed with, which "
                    "stays", prefix, name,
                )  # fmt: skip
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        n_classes = next((len(tensor) for _, tensor in _tensors(self._per_class)), None)
        options = "" if n_classes is None else f"n_classes={n_classes}, "
        options += f"reduction={self.reduction!r}"
        if self.label_smoothing > 0.0:
            options += f", label_smoothing={self.label_smoothing}"
        return options


class CountedLossOptions(LossOptions):
    """The options of a loss that is adjusted by the log prior of class counts."""

    def __init__(
        self, class_counts: Any, tau: float, pseudocount: float, exclude_absent: bool, *options: Any, **of_module: Any
    ):
        counts = counts_of_classes(class_counts)
        log_prior = log_prior_of(counts, pseudocount, exclude_absent)
        if of_module:  # of a Linear
            of_module["out_features"] = len(log_prior)
        super().__init__({"log_prior": log_prior}, *options, **of_module)
        if exclude_absent and tau == 0.0:
            raise ValueError(
                "tau must be positive with exclude_absent=True, got 0: what is left out is log_prior times tau"
            )
        is_uniform = self.label_smoothing > 0.0 and self.smoothing_distribution is None
        if is_uniform and read_value((log_prior == -torch.inf).any()):
            raise ValueError(
                "smoothing_distribution must be given with label_smoothing and exclude_absent=True, such as the prior: "
                "the uniform one asks for absent classes"
            )
        self._class_counts = counts  # of NumPy, which no default device and no cast of tensors reaches
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
        """(C,) float32, what `log_prior_from_counts` makes of `class_counts`: one tensor, written to when these are
        assigned."""
        return self._per_class["log_prior"]

    @log_prior.setter
    def log_prior(self, value: Any) -> None:
        raise AttributeError("log_prior must not be assigned, it follows from class_counts: assign these")

    @property
    def class_counts(self) -> Tensor:
        """(C,) a copy of the counts, integer or float64, on the CPU. Others may be assigned, between any two steps."""
        counts = self._class_counts
        return counts.clone() if isinstance(counts, Tensor) else torch.from_numpy(counts.copy())

    @class_counts.setter
    def class_counts(self, value: Any) -> None:
        counts = counts_of_classes(value)
        log_prior, held = self._prior_of(counts), self.log_prior
        for name, n_classes in self._numbers_of_classes():
            if n_classes != len(log_prior):
                raise ValueError(f"class_counts must have shape ({n_classes},) as {name} has, got ({len(log_prior)},)")
        if held.shape == log_prior.shape and not held.is_meta:
            with torch.no_grad():
                held.copy_(log_prior)  # where CUDA graphs and compiled code look
        else:
            self._hold("log_prior", log_prior)
        self._class_counts = counts

    def _prior_of(self, counts: Any) -> Tensor:
        return log_prior_of(counts, self._pseudocount, self._exclude_absent)

    def _numbers_of_classes(self) -> list[tuple[str, int]]:
        """What beside the counts says how many classes there are."""
        return [(name, len(tensor)) for name, tensor in _tensors({**self._per_class, "log_prior": None})]

    def _moved(self, device: torch.device) -> dict[str, Any]:
        if self.log_prior.is_meta and isinstance(self._class_counts, np.ndarray):  # as torch.load(map_location=) does
            self._per_class = {**self._per_class, "log_prior": self._prior_of(self._class_counts)}
        return super()._moved(device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_per_class" not in self.__dict__:  # pickled when these were buffers, and the counts were not kept
            names = ("log_prior", self._weight_name, "smoothing_distribution")
            self._per_class = {name: self._buffers.pop(name, None) for name in names}
            self._class_counts = self.log_prior.detach().double().exp().cpu().numpy()
            self._pseudocount, self._exclude_absent = 0.0, False

    def extra_repr(self) -> str:
        return super().extra_repr().replace(", reduction", f", tau={self.tau}, reduction")


def _check_num_items(num_items_in_batch: Any, reduction: str) -> None:
    if reduction != "mean":
        raise ValueError(f"num_items_in_batch must be None unless reduction is 'mean', got it with {reduction!r}")
    is_number = isinstance(num_items_in_batch, numbers.Real) and not isinstance(num_items_in_batch, bool)
    if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel() == 1:
        is_number = not (num_items_in_batch.is_complex() or num_items_in_batch.dtype == torch.bool)
    if not is_number:
        raise TypeError(
            "num_items_in_batch must be a number or a tensor of one number, "
            f"got {type(num_items_in_batch).__name__}"
        )  # fmt: skip


# Per-class options ----------------------------------------------------------------------------------------------------


def _tensors(per_class: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in per_class.items():
        if isinstance(value, PairwiseMargin):
            for field, vector in value.named_vectors():
                yield f"{name}.{field}", vector
        elif value is not None:
            yield name, value


def _mapped(per_class: dict[str, Any], fn: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """Every tensor replaced."""
    result = {}
    for name, value in per_class.items():
        if isinstance(value, PairwiseMargin):
            result[name] = value.mapped(lambda field, vector, name=name: fn(f"{name}.{field}", vector))
        else:
            result[name] = None if value is None else fn(name, value)
    return result


def _as_fake(tensor: Tensor, like: Any) -> Tensor:
    """A tensor where fake logits are, and of their kind; while a graph is recorded, one of its constants."""
    if not hasattr(tensor, "fake_mode"):
        if is_fake(like):
            tensor = like.fake_mode.from_tensor(tensor)
        else:
            with torch._C._DisableTorchDispatch():
                values = tensor.detach().cpu().numpy()
            tensor = torch.tensor(values)
    return tensor.to(like.device)


def _is_on(value: Any, device: torch.device) -> bool:
    if isinstance(value, Tensor):
        return value.device == device
    if value is None:
        return True
    return all(vector.device == device for _, vector in value.named_vectors())


def _as_vector(name: str, value: Any, n_classes: int | None) -> Tensor:
    """A tensor as it is, float32 of a list or an array."""
    if not isinstance(value, Tensor):
        try:
            value = torch.from_numpy(np.array(value, dtype=np.float32))
        except (TypeError, ValueError):
            got = type(value).__name__
            raise TypeError(f"{name} must be a tensor, an array or a list of numbers, got {got}") from None
    if n_classes is None and value.dim() != 1:
        raise ValueError(f"{name} must have shape (C,), got {tuple(value.shape)}")
    checks.check_class_vector(name, value, n_classes or len(value))
    if name == "smoothing_distribution":
        checks.check_smoothing_distribution(value, len(value))
    return value


def _mover(device: torch.device) -> Callable[[str, Tensor], Tensor]:
    def move(name: str, tensor: Tensor) -> Tensor:
        if tensor.is_meta and device.type != "meta":
            raise ValueError(
                f"{name} must have values, got a tensor on the meta device; a list or an array has them everywhere"
            )
        return tensor if tensor.requires_grad else tensor.to(device)

    return move


def first_argument(name: str, value: Any, input: Any) -> Tensor:
    """What a module is called with first, by its own name or as the modules of torch.nn call it."""
    if input is not None:
        if value is not None:
            raise TypeError(f"{name} must be given once, got {name} and input")
        value = input
    if value is None:
        raise TypeError(f"{name} must be a torch.Tensor, got NoneType")
    return value


def _agree(saved: Tensor, held: Tensor | None) -> bool:
    if held is None or saved.shape != held.shape:
        return False
    if saved.is_meta or held.is_meta or is_traced(saved) or is_traced(held):
        return True  # as far as one can tell
    return torch.allclose(saved.to(held), held, rtol=1e-5, atol=1e-6)
