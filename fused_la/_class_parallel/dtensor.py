"""Losses of logits, or of a head's weight, that are DTensors sharded over the classes; `distributed.py` has the losses.

The classes are sharded over one mesh dimension, and replicated over the others. An error in one rank's arguments is
raised on all ranks: a rank that fails before it calls the loss sends a header with the error.
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
from fused_la._call.arguments import Adjustment, Options, ScaledPrior
from fused_la._call.head_arguments import check_head, feature_rows, product_dtype
from fused_la._call.pairwise_margin import PairwiseMargin
from fused_la._class_parallel.agreement import class_parallel_loss
from fused_la._class_parallel.exchange import exchange_headers, ranks_of
from fused_la._class_parallel.rank_call import read_head_call, read_logits_call
from fused_la._tiled.head import Head, predict

T = TypeVar("T")


class _ClassSharding(NamedTuple):
    """How the classes are sharded, and which of them this rank has."""

    name: str  # of the argument that is sharded so
    mesh: DeviceMesh
    mesh_dim: int
    first: int  # this rank has the classes from first to end - 1
    end: int
    n_classes: int  # of all ranks

    @property
    def group(self) -> ProcessGroup:
        return self.mesh.get_group(self.mesh_dim)


def loss_of_logits(logits: DTensor, target: Any, prior: Adjustment, options: Options, impl: Any) -> Tensor:
    """The loss of sharded logits. `prior` is a log prior with its tau, or a margin."""
    dim = checks.class_dim(logits)
    sharding = _class_sharding("logits", logits, dim)
    caller = "logit_adjusted_cross_entropy" if isinstance(prior, ScaledPrior) else "margin_cross_entropy"

    def local_arguments() -> tuple[Any, ...]:
        labels = _local_target(sharding, target, dim, logits.dim())
        local_options = _local_options(sharding, options, "weight")
        return _local_tensor(logits), labels, _local_prior(sharding, prior), local_options, impl

    arguments = _run_or_raise_on_all_ranks(sharding, caller, local_arguments)
    loss = class_parallel_loss(f"class_parallel_{caller}", sharding.group, read_logits_call, *arguments)
    return _replicated(sharding, loss)


def loss_of_head(
    features: Any, weight: DTensor, bias: Any, target: Any, prior: Adjustment, options: Options, impl: Any,
) -> Tensor:  # fmt: skip
    """The loss of a head with a sharded weight. `prior` is a log prior with its tau, or a margin."""
    sharding = _class_sharding("weight", weight, 0)
    caller = "linear_logit_adjusted_cross_entropy" if isinstance(prior, ScaledPrior) else "linear_margin_cross_entropy"

    def local_arguments() -> tuple[Any, ...]:
        rows = _local_copy("features", features)
        checks.check_tensor("features", rows)
        labels = _local_target(sharding, target, rows.dim() - 1, rows.dim())
        local_bias, local_prior = _local_classes(sharding, "bias", bias), _local_prior(sharding, prior)
        local_options = _local_options(sharding, options, "class_weight")
        return rows, _local_tensor(weight), local_bias, labels, local_prior, local_options, impl

    arguments = _run_or_raise_on_all_ranks(sharding, caller, local_arguments)
    loss = class_parallel_loss(f"class_parallel_{caller}", sharding.group, read_head_call, *arguments)
    return _replicated(sharding, loss)


def _local_options(sharding: _ClassSharding, options: Options, weight_name: str) -> Options:
    """The options, with the per-class ones sliced to this rank's classes."""
    return options._replace(
        target_weight=_local_copy("target_weight", options.target_weight),
        weight=_local_classes(sharding, weight_name, options.weight),
        smoothing_distribution=_local_classes(sharding, "smoothing_distribution", options.smoothing_distribution),
    )


def predict_sharded(features: Any, weight: DTensor, bias: Any) -> Tensor:
    """The class of the largest raw logit of each row, for a sharded weight."""
    sharding = _class_sharding("weight", weight, 0)
    local_features, local_weight = _local_copy("features", features), _local_tensor(weight)
    local_bias = _local_classes(sharding, "bias", bias)
    check_head(local_features, weight, bias)
    rows = feature_rows(local_features)
    top = predict(Head(rows, local_weight, local_bias, product_dtype(rows, local_weight)))
    logits = [torch.empty_like(top.logits) for _ in range(sharding.group.size())]
    classes = [torch.empty_like(top.classes) for _ in logits]
    dist.all_gather(logits, top.logits, sharding.group)
    dist.all_gather(classes, top.classes + sharding.first, sharding.group)
    best_rank = torch.stack(logits).argmax(0, keepdim=True)
    return _replicated(sharding, torch.stack(classes).gather(0, best_rank)[0].reshape(local_features.shape[:-1]))


def shard_like(weight: DTensor, vector: Tensor) -> Tensor:
    """A whole (C,) tensor, sharded as the classes of a weight are."""
    sharding = _class_sharding("weight", weight, 0)
    placements = [Replicate() if i != sharding.mesh_dim else Shard(0) for i in range(sharding.mesh.ndim)]
    local = _local_classes(sharding, "log_prior", vector)
    shape, stride = vector.shape, vector.stride()
    return DTensor.from_local(local, sharding.mesh, placements, run_check=False, shape=shape, stride=stride)


def _class_sharding(name: str, value: DTensor, dim: int) -> _ClassSharding:
    sharded = [i for i, placement in enumerate(value.placements) if not placement.is_replicate()]
    if len(sharded) != 1 or value.placements[sharded[0]] != Shard(dim):
        raise ValueError(
            f"{name} must be a DTensor with Shard({dim}), its classes, on one mesh dimension and Replicate() on all "
            f"others, got {tuple(value.placements)}"
        )
    mesh, mesh_dim, n_classes = value.device_mesh, sharded[0], value.shape[dim]
    shard_size = -(-n_classes // mesh.size(mesh_dim))  # as torch.chunk splits
    first = min(n_classes, shard_size * mesh.get_local_rank(mesh_dim))
    end = min(n_classes, first + shard_size)
    if _local_tensor(value).shape[dim] != end - first:
        raise ValueError(f"{name} must be sharded as torch.chunk splits {n_classes} classes, {end - first} on this "
                         f"rank, got {_local_tensor(value).shape[dim]}")  # fmt: skip
    return _ClassSharding(name, mesh, mesh_dim, first, end, n_classes)


def _run_or_raise_on_all_ranks(sharding: _ClassSharding, caller: str, read_arguments: Callable[[], T]) -> T:
    """Run `read_arguments`. If it raises, send its error to the other ranks, which wait for this rank's header."""
    try:
        return read_arguments()
    except Exception as error:
        raised = error

    def fail() -> Any:
        raise raised

    exchange_headers(ranks_of(sharding.group), caller, fail)
    raise raised


def _local_tensor(value: DTensor) -> Tensor:
    local: Any = value.to_local()
    return local


def _replicated(sharding: _ClassSharding, loss: Tensor) -> Tensor:
    placements = [Replicate()] * sharding.mesh.ndim
    return DTensor.from_local(loss, sharding.mesh, placements, run_check=False)


def _local_copy(name: str, value: Any) -> Any:
    """This rank's copy of a replicated DTensor; anything else is returned."""
    if not isinstance(value, DTensor):
        return value
    if not all(placement.is_replicate() for placement in value.placements):
        raise ValueError(f"{name} must be a tensor or a DTensor with Replicate() alone, got {tuple(value.placements)}")
    return _local_tensor(value)


def _local_classes(sharding: _ClassSharding, name: str, value: Any, dim: int = 0, n_dims: int = 1) -> Any:
    """This rank's classes of a DTensor that is sharded as the classes are, or of a whole tensor."""
    if isinstance(value, DTensor) and not all(placement.is_replicate() for placement in value.placements):
        expected = [Replicate() if i != sharding.mesh_dim else Shard(dim) for i in range(sharding.mesh.ndim)]
        if value.device_mesh != sharding.mesh or list(value.placements) != expected:
            raise ValueError(
                f"{name} must be sharded as the classes of {sharding.name} are, {tuple(expected)} on their mesh, "
                f"got {tuple(value.placements)}"
            )
        if value.shape[dim] != sharding.n_classes:
            raise ValueError(f"{name} must have {sharding.n_classes} classes, got shape {tuple(value.shape)}")
        return _local_tensor(value)
    if not isinstance(value, Tensor):
        return value
    if value.dim() != n_dims or value.shape[dim] != sharding.n_classes:
        raise ValueError(f"{name} must have {sharding.n_classes} classes, got shape {tuple(value.shape)}")
    if value.requires_grad:
        raise ValueError(
            f"{name} must be a DTensor that is sharded as {sharding.name} is to get a gradient, got a whole tensor"
        )
    whole = _local_tensor(value) if isinstance(value, DTensor) else value
    return whole.narrow(dim, sharding.first, sharding.end - sharding.first)


def _local_target(sharding: _ClassSharding, target: Any, dim: int, n_dims: int) -> Any:
    if isinstance(target, Tensor) and target.is_floating_point():
        return _local_classes(sharding, "target", target, dim, n_dims)
    return _local_copy("target", target)


def _local_prior(sharding: _ClassSharding, prior: Adjustment) -> Any:
    if isinstance(prior, ScaledPrior):
        if prior.group is not None:
            raise ValueError("group must be None for classes over ranks, whose prior is (C,), got one")
        return ScaledPrior(_local_classes(sharding, "log_prior", prior.log_prior), prior.tau)
    if not isinstance(prior, PairwiseMargin):
        return prior
    return prior.mapped(lambda name, value: _local_classes(sharding, f"margin.{name}", value))
