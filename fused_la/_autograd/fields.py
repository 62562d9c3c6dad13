"""The fields of a `Problem` or a `Head`: how operators declare them and how autograd contexts keep them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_type_hints

import torch
from torch import Tensor

_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", torch.dtype: "ScalarType", float: "float", int: "int"}


def schema_of(fields: type) -> list[str]:
    """The fields of a NamedTuple as parameters in the schema of an operator: "Tensor? log_prior", "float tau", ..."""
    return [f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in get_type_hints(fields).items()]


def save_fields(ctx: Any, fields: Iterable[Any], *others: Tensor | None) -> None:
    """Save fields, tensors among them, and other tensors in the context of an autograd Function."""
    fields = list(fields)
    ctx.scalars = [None if isinstance(field, Tensor) else field for field in fields]
    ctx.save_for_backward(*(field if isinstance(field, Tensor) else None for field in fields), *others)


def saved_fields(ctx: Any) -> tuple[list[Any], list[Any]]:
    """The fields and the other tensors that `save_fields` saved."""
    tensors, n_fields = ctx.saved_tensors, len(ctx.scalars)
    fields = zip(tensors[:n_fields], ctx.scalars, strict=True)
    return [scalar if tensor is None else tensor for tensor, scalar in fields], list(tensors[n_fields:])
