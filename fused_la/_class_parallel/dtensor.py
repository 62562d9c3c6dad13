"""Logits, or the weight of a head, that are a DTensor whose classes are sharded: the losses of `distributed.py`.

Of all other mesh dimensions every rank has a copy. What is wrong with one rank's arguments alone still raises on all:
a rank that fails before it calls the loss sends its header, which says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fused_la._call import checks
from fused_la._call.arguments import Options
from fused_la._call.head_arguments import check_head, feature_rows, product_dtype
from fused_la._call.pairwise_margin import PairwiseMargin
from fused_la._class_parallel.agreement import class_parallel_loss
from fused_la._class_parallel.exchange import exchange_headers, ranks_of
from fused_la._class_parallel.rank_call import read_head_call, read_logits_call
from fused_la._tiled.head import Head, predict

T = TypeVar("T")


class _Layout(NamedTuple):
    """Where the classes are."""

    name: str  # of the tensor that says so
    mesh: DeviceMesh
    mesh_dim: int
    first: int
    last: int
    n_classes: int

    @property
    def group(self) -> ProcessGroup:
        return self.mesh.get_group(self.mesh_dim)


def loss_of_logits(logits: DTensor, target: Any, prior: Any, tau: Any, options: Options, impl: Any) -> Tensor:
    """The loss of sharded logits, for a log prior with its tau, or for a margin if tau is None."""
    dim = checks.class_dim(logits)
    layout = _layout("logits", logits, dim)
    caller = "margin_cross_entropy" if tau is None else "logit_adjusted_cross_entropy"

    def local_arguments() -> tuple[Any, ...]:
        labels = _target(layout, target, dim, logits.dim())
        local_options = _local_options(layout, options, "weight")
        return _here(logits), labels, _prior(layout, prior, tau), tau, local_options, impl

    arguments = _or_tell_all(layout, caller, local_arguments)
    loss = class_parallel_loss(f"class_parallel_{caller}", layout.group, read_logits_call, *arguments)
    return _everywhere(layout, loss)


def loss_of_head(
    features: Any, weight: DTensor, bias: Any, target: Any, prior: Any, tau: Any, options: Options, impl: Any
) -> Tensor:
    """The loss of a head with a sharded weight, for a log prior with its tau, or for a margin if tau is None."""
    layout = _layout("weight", weight, 0)
    caller = "linear_margin_cross_entropy" if tau is None else "linear_logit_adjusted_cross_entropy"

    def local_arguments() -> tuple[Any, ...]:
        rows = _copy("features", features)
        checks.check_tensor("features", rows)
        labels = _target(layout, target, rows.dim() - 1, rows.dim())
        local_bias, local_options = _classes(layout, "bias", bias), _local_options(layout, options, "class_weight")
        return rows, _here(weight), local_bias, labels, _prior(layout, prior, tau), tau, local_options, impl

    arguments = _or_tell_all(layout, caller, local_arguments)
    loss = class_parallel_loss(f"class_parallel_{caller}", layout.group, read_head_call, *arguments)
    return _everywhere(layout, loss)


def _local_options(layout: _Layout, options: Options, weight_name: str) -> Options:
    """The options with this rank's classes of what is per class."""
    return options._replace(
        target_weight=_copy("target_weight", options.target_weight),
        weight=_classes(layout, weight_name, options.weight),
        smoothing_distribution=_classes(layout, "smoothing_distribution", options.smoothing_distribution),
    )


def predict_sharded(features: Any, weight: DTensor, bias: Any) -> Tensor:
    """The class of the largest raw logit of each row, of classes that are sharded."""
    layout = _layout("weight", weight, 0)
    all_classes, here, of_bias = _copy("features", features), _here(weight), _classes(layout, "bias", bias)
    check_head(all_classes, weight, bias)
    rows = feature_rows(all_classes)
    found = predict(Head(rows, here, of_bias, product_dtype(rows, here)))
    logits = [torch.empty_like(found.logits) for _ in range(layout.group.size())]
    classes = [torch.empty_like(found.classes) for _ in logits]
    dist.all_gather(logits, found.logits, layout.group)
    dist.all_gather(classes, found.classes + layout.first, layout.group)
    best = torch.stack(logits).argmax(0, keepdim=True)
    return _everywhere(layout, torch.stack(classes).gather(0, best)[0].reshape(all_classes.shape[:-1]))


def sharded_as(weight: DTensor, of_classes: Tensor) -> Tensor:
    """A whole (C,) tensor, sharded as the classes of a weight are."""
    layout = _layout("weight", weight, 0)
    placements = [Replicate() if i != layout.mesh_dim else Shard(0) for i in range(layout.mesh.ndim)]
    here = _classes(layout, "log_prior", of_classes)
    return DTensor.from_local(
        here, layout.mesh, placements, run_check=False, shape=of_classes.shape, stride=of_classes.stride()
    )


def _layout(name: str, value: DTensor, dim: int) -> _Layout:
    sharded = [i for i, placement in enumerate(value.placements) if not placement.is_replicate()]
    if len(sharded) != 1 or value.placements[sharded[0]] != Shard(dim):
        raise ValueError(
            f"{name} must be a DTensor with Shard({dim}), its classes, on one mesh dimension and Replicate() on all "
            f"others, got {tuple(value.placements)}"
        )
    mesh, mesh_dim, n_classes = value.device_mesh, sharded[0], value.shape[dim]
    most = -(-n_classes // mesh.size(mesh_dim))  # as torch.chunk splits
    first = min(n_classes, most * mesh.get_local_rank(mesh_dim))
    last = min(n_classes, first + most)
    if _here(value).shape[dim] != last - first:
        raise ValueError(f"{name} must be sharded as torch.chunk splits {n_classes} classes, {last - first} on this "
                         f"rank, got {_here(value).shape[dim]}")  # fmt: skip
    return _Layout(name, mesh, mesh_dim, first, last, n_classes)


def _or_tell_all(layout: _Layout, caller: str, local: Callable[[], T]) -> T:
    try:
        return local()
    except Exception as error:
        raised = error

    def fail() -> Any:
        raise raised

    exchange_headers(ranks_of(layout.group), caller, fail)
    raise raised


def _here(value: DTensor) -> Tensor:
    local: Any = value.to_local()
    return local


def _everywhere(layout: _Layout, loss: Tensor) -> Tensor:
    placements = [Replicate()] * layout.mesh.ndim
    return DTensor.from_local(loss, layout.mesh, placements, run_check=False)


def _copy(name: str, value: Any) -> Any:
    """What every rank has as a whole."""
    if not isinstance(value, DTensor):
        return value
    if not all(placement.is_replicate() for placement in value.placements):
        raise ValueError(f"{name} must be a tensor or a DTensor with Replicate() alone, got {tuple(value.placements)}")
    return _here(value)


def _classes(layout: _Layout, name: str, value: Any, dim: int = 0, n_dims: int = 1) -> Any:
    """This rank's classes of a DTensor that is sharded as the classes are, or of a whole tensor."""
    if isinstance(value, DTensor) and not all(placement.is_replicate() for placement in value.placements):
        expected = [Replicate() if i != layout.mesh_dim else Shard(dim) for i in range(layout.mesh.ndim)]
        if value.device_mesh != layout.mesh or list(value.placements) != expected:
            raise ValueError(
                f"{name} must be sharded as the classes of {layout.name} are, {tuple(expected)} on their mesh, "
                f"got {tuple(value.placements)}"
            )
        if value.shape[dim] != layout.n_classes:
            raise ValueError(f"{name} must have {layout.n_classes} classes, got shape {tuple(value.shape)}")
        return _here(value)
    if not isinstance(value, Tensor):
        return value
    if value.dim() != n_dims or value.shape[dim] != layout.n_classes:
        raise ValueError(f"{name} must have {layout.n_classes} classes, got shape {tuple(value.shape)}")
    if value.requires_grad:
        raise ValueError(f"{name} must be a DTensor that is sharded as {layout.name} is to get a gradient, got a whole "
                         "tensor")  # fmt: skip
    all_classes = _here(value) if isinstance(value, DTensor) else value
    return all_classes.narrow(dim, layout.first, layout.last - layout.first)


def _target(layout: _Layout, target: Any, dim: int, n_dims: int) -> Any:
    if isinstance(target, Tensor) and target.is_floating_point():
        return _classes(layout, "target", target, dim, n_dims)
    return _copy("target", target)


def _prior(layout: _Layout, prior: Any, tau: Any) -> Any:
    if tau is not None:
        return _classes(layout, "log_prior", prior)
    if not isinstance(prior, PairwiseMargin):
        return prior
    return prior.mapped(lambda name, value: _classes(layout, f"margin.{name}", value))
