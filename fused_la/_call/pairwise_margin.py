"""`PairwiseMargin`: a loss of the pairwise-margin family as five vectors over the classes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fused_la._call import checks


@dataclass(frozen=True, eq=False)
class PairwiseMargin:
    r"""The factor alpha, two offsets and two scales of a loss; each (C,) floating, or None for 1, 0, 0, 1 and 1.

    .. math:: \ell(y, f) = \alpha_y \log\Big[1 + \sum_{c \ne y} e^{(r_y s_c f_c + u_c) - (r_y s_y f_y + v_y)}\Big]

    Args:
        alpha: factor of a row's loss, by its label. It does not count in the denominator of a mean.
        negative_offset: u, added to the logits of the other classes. A class at -inf competes with no label.
        target_offset: v, added to the logit of the label.
        scale: s, (C,) or one number for all classes.
        label_scale: r, a factor of all logits of a row, by its label: an inverse temperature.

    Attributes:
        alpha, negative_offset, target_offset, scale, label_scale: as given. One tensor for both offsets costs less than
            two equal tensors.

    Shape:
        (C,) for every vector, with C the number of classes of the logits.

    Raises:
        TypeError, ValueError: a vector of the wrong kind, dtype or shape, or vectors that differ in length or device;
            a value out of range.

    Example:
        >>> import torch
        >>> from fused_la.margins import PairwiseMargin
        >>> PairwiseMargin(target_offset=torch.tensor([-0.5, -1.0]), scale=30.0)
        PairwiseMargin(target_offset=(2,) float32, scale=30.0)

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 11.
    """

    alpha: Tensor | None = None
    negative_offset: Tensor | None = None
    target_offset: Tensor | None = None
    scale: Tensor | float | None = None
    label_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and not isinstance(self.scale, Tensor):
            scale = checks.check_number("scale", self.scale, -math.inf, math.inf, "a number")
            if not math.isfinite(scale):
                raise ValueError(f"scale must be finite, got {scale}")
        vectors = {name: value for name, value in self._given_fields() if name != "scale" or isinstance(value, Tensor)}
        for name, value in vectors.items():
            checks.check_tensor(name, value)
            if value.dim() != 1 or len(value) == 0:
                raise ValueError(f"{name} must have shape (C,), got {tuple(value.shape)}")
            checks.check_class_vector(name, value, len(value))
        first = next(iter(vectors.items()), None)
        for name, value in vectors.items():
            if first is not None and value.shape != first[1].shape:
                raise ValueError(
                    f"{name} must have the shape of {first[0]}, {tuple(first[1].shape)}, got {tuple(value.shape)}"
                )
            _check_values(name, value)
            if first is not None and value.device != first[1].device:
                raise ValueError(f"{name} must be on the device of {first[0]}, {first[1].device}, got {value.device}")

    def to(self, *args: Any, **kwargs: Any) -> PairwiseMargin:
        """The same margin with its tensors moved or cast as `torch.Tensor.to` does."""
        moved: dict[int, Tensor] = {}  # a tensor shared by two fields stays shared: that marks the offsets as equal
        for _, value in self.named_vectors():
            moved.setdefault(id(value), value.to(*args, **kwargs))
        return replace(self, **{name: moved[id(value)] for name, value in self.named_vectors()})

    def __add__(self, other: PairwiseMargin) -> PairwiseMargin:
        """Combine two margins: offsets add, alphas multiply, and each scale may be that of one of the two at most."""
        if not isinstance(other, PairwiseMargin):
            return NotImplemented
        for name in ("scale", "label_scale"):
            if getattr(self, name) is not None and getattr(other, name) is not None:
                raise ValueError(f"{name} must be None in one of two margins that are added, got {self} and {other}")

        def combine(name: str) -> Any:
            one, two = getattr(self, name), getattr(other, name)
            if one is None or two is None:
                return two if one is None else one
            return one * two if name == "alpha" else one + two

        values = {field.name: combine(field.name) for field in fields(self)}
        if self.offsets_are_equal and other.offsets_are_equal:
            values["target_offset"] = values["negative_offset"]
        return PairwiseMargin(**values)

    def of_classes(self, first: int, last: int) -> PairwiseMargin:
        """The margin of the classes `first` to `last - 1`, for the rank that holds them. Its vectors are views; they
        may be empty, and -inf for every class."""
        return self.mapped(lambda name, value: value[first:last])

    def mapped(self, fn: Callable[[str, Tensor], Tensor]) -> PairwiseMargin:
        """A margin with `fn(name, vector)` for each vector, unchecked; called once for a tensor in two fields."""
        mapped: dict[int, Tensor] = {}
        result = copy.copy(self)
        for name, value in self.named_vectors():
            if id(value) not in mapped:
                mapped[id(value)] = fn(name, value)
            object.__setattr__(result, name, mapped[id(value)])
        return result

    @property
    def offsets_are_equal(self) -> bool:
        """Whether both offsets are the same tensor or both None: a label then needs no separate offset."""
        return self.negative_offset is self.target_offset

    def label_offset(self, logits: Tensor) -> Tensor | None:
        """(C,) the offset of each class as label, or None if it equals the negative offset."""
        if self.offsets_are_equal:
            return None
        if self.target_offset is None:
            n_classes = logits.shape[checks.class_dim(logits)]
            return logits.new_zeros(n_classes, dtype=torch.promote_types(logits.dtype, torch.float32))
        return self.target_offset.resolve_neg().contiguous()

    def scale_of(self, logits: Tensor) -> Tensor | None:
        """(C,) the scale of each class, or None if it is 1."""
        if self.scale is None or isinstance(self.scale, Tensor):
            return None if self.scale is None else self.scale.resolve_neg().contiguous()
        n_classes = logits.shape[checks.class_dim(logits)]
        return logits.new_full((n_classes,), self.scale, dtype=torch.promote_types(logits.dtype, torch.float32))

    def named_vectors(self) -> list[tuple[str, Tensor]]:
        """The fields that are tensors, as (name, vector)."""
        return [(name, value) for name, value in self._given_fields() if isinstance(value, Tensor)]

    def only_of_reference(self) -> list[Tensor]:
        """The vectors whose gradient only the reference computes: all except a tensor shared by both offsets."""
        shared = ("negative_offset", "target_offset") if self.offsets_are_equal else ()
        return [vector for name, vector in self.named_vectors() if name not in shared]

    def _given_fields(self) -> list[tuple[str, Any]]:
        items = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, value) for name, value in items if value is not None]

    def __repr__(self) -> str:
        def show(value: Tensor | float) -> str:
            return f"{tuple(value.shape)} {str(value.dtype)[6:]}" if isinstance(value, Tensor) else str(value)

        return f"PairwiseMargin({', '.join(f'{name}={show(value)}' for name, value in self._given_fields())})"


def checked_margin(margin: Any) -> PairwiseMargin:
    """The margin, or a TypeError if it is something else."""
    if not isinstance(margin, PairwiseMargin):
        raise TypeError(f"margin must be a PairwiseMargin, got {type(margin).__name__}")
    return margin


def _check_values(name: str, value: Tensor) -> None:
    """Check the values on a CPU, where reading needs no synchronisation; elsewhere NaN makes loss and gradient NaN."""
    if name == "alpha":
        allowed, expected = value >= 0.0, "not negative"
    elif name in ("scale", "label_scale"):
        allowed, expected = value.isfinite(), "finite"
    else:
        allowed, expected = value < math.inf, "finite or -inf"
    if checks.read_value(allowed.all()) is False:
        bad = value.detach()[~allowed][0].item()
        raise ValueError(f"{name} must be {expected}, got {bad} for class {int((~allowed).nonzero()[0])}")
    if name == "negative_offset" and checks.read_value((value > -math.inf).any()) is False:
        raise ValueError("negative_offset must be finite for some class, got -inf for every class")


def normalized_log_prior(log_prior: Any) -> Tensor:
    """log pi in float64: the log prior with the constant that makes pi sum to 1."""
    checks.check_tensor("log_prior", log_prior)
    if log_prior.dim() != 1 or len(log_prior) == 0:
        raise ValueError(f"log_prior must have shape (C,), got {tuple(log_prior.shape)}")
    checks.check_class_vector("log_prior", log_prior, len(log_prior))
    checks.check_prior_values(log_prior)
    return log_prior.double().log_softmax(0)


def to_prior_dtype(values: Tensor, log_prior: Tensor) -> Tensor:
    """The values rounded once, to the dtype of the log prior but at least float32."""
    return values.to(torch.promote_types(log_prior.dtype, torch.float32))
