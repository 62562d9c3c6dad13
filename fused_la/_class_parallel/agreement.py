"""Checks that all ranks make the same call, and slices it to this rank's classes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fused_la._autograd.dispatch import choose_implementation, why_only_reference
from fused_la._autograd.loss import under_transform
from fused_la._call import checks
from fused_la._call.head_arguments import feature_rows, product_dtype
from fused_la._call.problem import Problem
from fused_la._call.values import check_has_values
from fused_la._class_parallel import exchange
from fused_la._class_parallel.exchange import Number, Ranks
from fused_la._class_parallel.loss import ShardedCall, sharded_loss
from fused_la._class_parallel.rank_call import RankCall

F = TypeVar("F", bound=Callable[..., Any])
_PRODUCT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MARGIN_VECTORS = ("alpha", "negative_offset", "target_offset", "scale")


def graph_break(function: F) -> F:
    """A function that is a graph break under torch.compile: the host reads what ranks exchange."""

    @functools.wraps(function)
    def run(*args: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **keywords)
        return function(*args, **keywords)

    return run  # pyright: ignore[reportReturnType]


@graph_break
def class_parallel_loss(caller: str, group: Any, read_call: Callable[..., RankCall], *arguments: Any) -> Tensor:
    """The loss of a group. Every rank calls it with its own arguments, which `read_call` checks."""
    ranks = exchange.ranks_of(group)
    check_has_values("logits", torch.empty(0), "ranks")  # a new tensor is fake or traced if the mode is

    def check() -> tuple[tuple[RankCall, str], dict[str, Number], list[Tensor]]:
        rank_call = read_call(*arguments)
        impl = _choose_implementation(ranks, rank_call)
        return (rank_call, impl), _header_numbers(ranks, rank_call), _rows_to_gather(rank_call)

    (rank_call, impl), headers, payloads = exchange.exchange_headers_and_rows(ranks, caller, check)
    _check_same_call(ranks, rank_call, headers)
    shard_sizes = [header["n_classes"] for header in headers]
    row_counts = [header["n_rows"] for header in headers] if rank_call.gather_features else None
    first_class, n_classes = sum(shard_sizes[: ranks.rank]), sum(shard_sizes)
    call, problem = rank_call.call, _flatten_rows(rank_call.call.problem)
    all_features = None
    if row_counts is not None:
        with torch.autocast(rank_call.inputs.device.type, enabled=False):  # it refuses float16 with bfloat16
            rows = _rows_to_gather(rank_call)
            all_features, target, *target_weight = exchange.rows_of_all_ranks(ranks, row_counts, rows, payloads)
        problem = problem._replace(target=target, target_weight=target_weight[0] if target_weight else None)
    del payloads
    if rank_call.weight is not None:
        inputs = feature_rows(rank_call.inputs)
        dtype = product_dtype(inputs, rank_call.weight)
    else:
        inputs, dtype = problem.logits, problem.compute_dtype
    global_classes = None if problem.has_probabilities else problem.target
    problem = _to_local_classes(problem, first_class, rank_call.n_classes, n_classes)
    sharded = ShardedCall(ranks, impl, call.reduction, row_counts, rank_call.average_over_ranks)
    loss = sharded_loss(sharded, inputs, all_features, rank_call.weight, rank_call.bias, dtype, global_classes, problem)
    if call.reduction != "none":
        return loss
    dim = checks.class_dim(rank_call.inputs) if rank_call.weight is None else rank_call.inputs.dim() - 1
    return loss.reshape(rank_call.inputs.shape[:dim] + rank_call.inputs.shape[dim + 1 :])


def _rows_to_gather(rank_call: RankCall) -> list[Tensor]:
    """The tensors whose rows every rank needs."""
    if not rank_call.gather_features:
        return []
    problem = _flatten_rows(rank_call.call.problem)
    rows = [feature_rows(rank_call.inputs), problem.target]
    return rows if problem.target_weight is None else [*rows, problem.target_weight]


def _choose_implementation(ranks: Ranks, rank_call: RankCall) -> str:
    is_head = rank_call.weight is not None
    exchange.check_device_type(ranks, "features" if is_head else "logits", rank_call.inputs)
    if rank_call.gather_features and rank_call.call.problem.has_probabilities:
        raise ValueError("target must be class indices with gather_features, got class probabilities")
    if rank_call.average_over_ranks and not rank_call.gather_features:
        raise ValueError("average_over_ranks must be False without gather_features, got True: where all ranks have the "
                         "same features their gradients are equal, and the mean of these is right")  # fmt: skip
    checks.check_choice("impl", rank_call.impl, checks.IMPLEMENTATIONS)
    if rank_call.impl == "reference":
        raise ValueError("impl must be 'auto', 'blocked' or 'triton' for classes over ranks, got 'reference'")
    if rank_call.margin.label_scale is not None:
        raise ValueError("margin.label_scale must be None for classes over ranks: a rank does not have that of a label "
                         "of another rank")  # fmt: skip
    reason = "a transform of torch.func" if under_transform() else why_only_reference(rank_call.call, transformed=False)
    if not reason:
        differentiable = (rank_call.inputs, rank_call.weight, rank_call.bias, rank_call.call.problem.log_prior)
        impl = choose_implementation(rank_call.impl, rank_call.call, differentiable, is_head)
        if impl != "reference":
            return impl
        reason = f"forward mode or, without triton, {rank_call.inputs.device}"
    raise ValueError(f"classes over ranks have no implementation for {reason}: use the loss of whole logits")


def _header_numbers(ranks: Ranks, rank_call: RankCall) -> dict[str, Number]:
    """The numbers of this rank's header. Tensors are not read: on a GPU that would be one more synchronisation."""
    call, problem, is_head = rank_call.call, rank_call.call.problem, rank_call.weight is not None
    target, target_weight, margin = problem.target, problem.target_weight, rank_call.margin
    lowest = highest = label_checksum = 0
    if not problem.has_probabilities:
        if target.numel() > 0:
            lowest, highest = torch.where(target == problem.ignore_index, 0, target).aminmax()
        if not rank_call.gather_features:
            label_checksum = exchange.checksum(target, target_weight)
    smoothing_min, smoothing_sum = 0.0, 1.0
    distribution = problem.smoothing_distribution
    if distribution is not None:
        distribution = distribution.detach()
        smoothing_min, smoothing_sum = distribution.amin().double(), distribution.sum(dtype=torch.float64)
    vector_bits = sum((getattr(margin, name) is not None) << i for i, name in enumerate(_MARGIN_VECTORS))
    dtype = product_dtype(rank_call.inputs, rank_call.weight) if rank_call.weight is not None else problem.compute_dtype
    return {
        "n_rows": problem.logits.shape[0] * problem.logits.shape[1],
        "n_classes": rank_call.n_classes,
        "dtype": checks.FLOATING.index(rank_call.inputs.dtype),
        "n_features": rank_call.inputs.shape[-1] if is_head else 0,
        "labels_per_row": 0 if problem.has_probabilities else target.shape[-1],
        "target_weight": target_weight is not None,
        "target_weight_dtype": 0 if target_weight is None else checks.FLOATING.index(target_weight.dtype),
        "device": ranks.device_types.index(rank_call.inputs.device.type),
        "class_weight": call.target_tensors[2] is not None,
        "smoothing_distribution": distribution is not None,
        "bias": rank_call.bias is not None,
        "margin": vector_bits + (margin.offsets_are_equal << 4),
        "scale": float(margin.scale) if isinstance(margin.scale, float | int) else 0.0,
        "reduction": checks.REDUCTIONS.index(call.reduction),
        "ignore_index": problem.ignore_index,
        "tau": rank_call.tau,
        "label_smoothing": problem.label_smoothing,
        "gather_features": rank_call.gather_features,
        "average_over_ranks": rank_call.average_over_ranks,
        "requires_grad": is_head and rank_call.inputs.requires_grad and torch.is_grad_enabled(),
        "product_dtype": _PRODUCT_DTYPES.index(dtype),
        "label_checksum": _as_number(label_checksum, torch.int64),
        "min_label": _as_number(lowest, torch.int64),
        "max_label": _as_number(highest, torch.int64),
        "max_log_prior": torch.zeros((), dtype=torch.float64) if problem.log_prior is None
        else problem.log_prior.detach().amax().double(),
        "smoothing_min": _as_number(smoothing_min, torch.float64),
        "smoothing_sum": _as_number(smoothing_sum, torch.float64),
    }  # fmt: skip


def _as_number(value: Any, dtype: torch.dtype) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)


def _check_same_call(ranks: Ranks, rank_call: RankCall, headers: list[dict[str, Any]]) -> None:
    """Check that the headers agree, and what depends on all classes; an error is the same on every rank."""

    def check(key: str, name: str, expected: str, describe: Callable[[Any], Any] = lambda value: value) -> None:
        exchange.check_same(name, expected, [describe(header[key]) for header in headers])

    def check_given(key: str, name: str) -> None:
        check(key, name, "given or None", lambda given: "a tensor" if given else "None")

    is_head = rank_call.weight is not None
    operand, weight = ("features", "class_weight") if is_head else ("logits", "weight")
    check("gather_features", "gather_features", "the same", bool)
    check("device", operand, "on one type of device", lambda i: ranks.device_types[i])
    check("dtype", operand, "of one dtype", lambda i: str(checks.FLOATING[i]))
    if not rank_call.gather_features:
        check("n_rows", operand, "of one number of rows", lambda n: f"{n} rows")
    if is_head:
        check("n_features", operand, "of one width", lambda n: f"D = {n}")
        check("product_dtype", operand, "cast by autocast to one dtype", lambda i: str(_PRODUCT_DTYPES[i]))
        check("requires_grad", "features.requires_grad", "the same", bool)
        check_given("bias", "bias")
    check("labels_per_row", "target", "of one kind", lambda k: f"{k} labels a row" if k else "class probabilities")
    check_given("target_weight", "target_weight")
    if rank_call.gather_features:
        check("target_weight_dtype", "target_weight", "of one dtype", lambda i: str(checks.FLOATING[i]))
    check_given("class_weight", weight)
    check_given("smoothing_distribution", "smoothing_distribution")
    check("margin", "margin", "of the same vectors", _margin_vector_names)
    check("scale", "margin.scale", "the same number")
    check("reduction", "reduction", "the same", lambda i: repr(checks.REDUCTIONS[i]))
    for option in ("ignore_index", "tau", "label_smoothing"):
        check(option, option, "the same")
    check("average_over_ranks", "average_over_ranks", "the same", bool)
    check("label_checksum", "target", "the same labels and weights",
          lambda bits: f"labels of checksum {bits % 2**64:x}")  # fmt: skip

    n_classes = sum(header["n_classes"] for header in headers)
    if n_classes == 0:
        raise ValueError(f"{'weight' if is_head else 'logits'} must have at least one class on some rank, got none")
    if not rank_call.call.problem.has_probabilities:
        for label in (min(h["min_label"] for h in headers), max(h["max_label"] for h in headers)):
            checks.check_label(label, n_classes, rank_call.call.problem.ignore_index)
    priors = [header["max_log_prior"] for header in headers]
    largest = math.nan if any(map(math.isnan, priors)) else max(priors)
    is_margin = rank_call.margin.negative_offset is not None
    checks.check_largest_prior(largest, rank_call.tau, "margin.negative_offset" if is_margin else "log_prior")
    if headers[0]["smoothing_distribution"]:
        smallest = min(header["smoothing_min"] for header in headers)
        checks.check_distribution(smallest, sum(header["smoothing_sum"] for header in headers))


def _margin_vector_names(bits: int) -> str:
    names = [name for i, name in enumerate(_MARGIN_VECTORS) if bits >> i & 1]
    return (" and ".join(names) or "none") + (" with one tensor for both offsets" if bits >> 4 and bits & 6 else "")


# This rank's classes --------------------------------------------------------------------------------------------------


def _flatten_rows(problem: Problem) -> Problem:
    """The problem with its (N, P) rows as (N * P, 1)."""
    n_rows = problem.logits.shape[0] * problem.logits.shape[1]

    def rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(n_rows, 1, values.shape[-1])

    logits, target = rows(problem.logits), rows(problem.target)
    assert logits is not None
    assert target is not None
    return problem._replace(logits=logits, target=target, target_weight=rows(problem.target_weight))


def _to_local_classes(problem: Problem, first_class: int, shard_size: int, n_classes: int) -> Problem:
    """Count labels from this rank's first class, and spread uniform smoothing over the classes of all ranks.

    An ignored label becomes -1, a label of another rank the index after the last class here.
    """
    if problem.label_smoothing > 0.0 and problem.smoothing_distribution is None:
        uniform = problem.logits.new_full((problem.logits.shape[-1],), 1.0 / n_classes if shard_size > 0 else 0.0,
                                          dtype=torch.float64)  # fmt: skip
        problem = problem._replace(smoothing_distribution=uniform)
    if problem.has_probabilities:
        return problem
    target, outside = problem.target, problem.logits.shape[-1]  # that of a placeholder is 1, not shard_size
    is_local = (target >= first_class) & (target < first_class + shard_size)
    local_target = torch.where(is_local, target - first_class, outside)
    return problem._replace(target=local_target.masked_fill_(target == problem.ignore_index, -1), ignore_index=-1)
