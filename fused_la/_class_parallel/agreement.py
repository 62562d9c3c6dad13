"""Checks that all ranks make the same call, then slices it to this rank's classes."""

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
from fused_la._class_parallel.exchange import (
    Number,
    Ranks,
    check_device_type,
    check_same,
    checksum,
    exchange_headers_and_rows,
    gathered_rows,
    ranks_of,
)
from fused_la._class_parallel.loss import ShardedCall, sharded_loss
from fused_la._class_parallel.rank_call import RankCall

F = TypeVar("F", bound=Callable[..., Any])
_PRODUCT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MARGIN_VECTORS = ("alpha", "negative_offset", "target_offset", "scale")


def not_compiled(function: F) -> F:
    """Break the graph of torch.compile here, since the host reads what ranks exchange."""

    @functools.wraps(function)
    def run(*args: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **keywords)
        return function(*args, **keywords)

    return run  # pyright: ignore[reportReturnType]


@not_compiled
def class_parallel_loss(caller: str, group: Any, read_call: Callable[..., RankCall], *arguments: Any) -> Tensor:
    """The loss that all ranks of the group call, each with its own arguments, which `read_call` checks."""
    ranks = ranks_of(group)
    check_has_values("logits", torch.empty(0), "ranks")  # of every kind that a mode makes

    def check() -> tuple[tuple[RankCall, str], dict[str, Number], list[Tensor]]:
        rank_call = read_call(*arguments)
        impl = _choose_implementation(ranks, rank_call)
        return (rank_call, impl), _numbers(ranks, rank_call), _rows_to_gather(rank_call)

    (rank_call, impl), of_ranks, came = exchange_headers_and_rows(ranks, caller, check)
    _check_one_loss(ranks, rank_call, of_ranks)
    widths = [numbers["classes"] for numbers in of_ranks]
    counts = [numbers["rows"] for numbers in of_ranks] if rank_call.gather_features else None
    first, n_classes = sum(widths[: ranks.rank]), sum(widths)
    call, problem = rank_call.call, _as_rows(rank_call.call.problem)
    gathered = None
    if counts is not None:
        with torch.autocast(rank_call.own.device.type, enabled=False):  # which refuses float16 beside bfloat16
            gathered, target, *target_weight = gathered_rows(ranks, counts, _rows_to_gather(rank_call), came)
        problem = problem._replace(target=target, target_weight=target_weight[0] if target_weight else None)
    del came
    if rank_call.weight is not None:
        own = feature_rows(rank_call.own)
        dtype = product_dtype(own, rank_call.weight)
    else:
        own, dtype = problem.logits, problem.compute_dtype
    global_classes = None if problem.has_probabilities else problem.target
    problem = _of_these_classes(problem, first, rank_call.n_classes, n_classes)
    sharded_call = ShardedCall(ranks, impl, call.reduction, counts, rank_call.average_over_ranks)
    loss = sharded_loss(sharded_call, own, gathered, rank_call.weight, rank_call.bias, dtype, global_classes, problem)
    if call.reduction != "none":
        return loss
    dim = checks.class_dim(rank_call.own) if rank_call.weight is None else rank_call.own.dim() - 1
    return loss.reshape(rank_call.own.shape[:dim] + rank_call.own.shape[dim + 1 :])


def _rows_to_gather(rank_call: RankCall) -> list[Tensor]:
    """What every rank has to have of this one's rows."""
    if not rank_call.gather_features:
        return []
    problem = _as_rows(rank_call.call.problem)
    rows = [feature_rows(rank_call.own), problem.target]
    return rows if problem.target_weight is None else [*rows, problem.target_weight]


def _choose_implementation(ranks: Ranks, rank_call: RankCall) -> str:
    of_head = rank_call.weight is not None
    check_device_type(ranks, "features" if of_head else "logits", rank_call.own)
    if rank_call.gather_features and rank_call.call.problem.has_probabilities:
        raise ValueError("target must be class indices with gather_features, got class probabilities")
    if rank_call.average_over_ranks and not rank_call.gather_features:
        raise ValueError("average_over_ranks must be False without gather_features, got True: where all ranks have the "
                         "same features their gradients are equal, and the mean of these is right")  # fmt: skip
    checks.check_choice("impl", rank_call.impl, checks.IMPLEMENTATIONS)
    if rank_call.impl == "reference":
        raise ValueError("impl must be 'auto', 'blocked' or 'triton' for classes over ranks, got 'reference'")
    why = "a transform of torch.func" if under_transform() else why_only_reference(rank_call.call, transformed=False)
    if not why:
        differentiable = (rank_call.own, rank_call.weight, rank_call.bias, rank_call.call.problem.log_prior)
        impl = choose_implementation(rank_call.impl, rank_call.call, differentiable, of_head)
        if impl != "reference":
            return impl
        why = f"forward mode or, without triton, {rank_call.own.device}"
    raise ValueError(f"classes over ranks have no implementation for {why}: use the loss of whole logits")


def _numbers(ranks: Ranks, rank_call: RankCall) -> dict[str, Number]:
    """What a rank tells of its call; tensors are not read, on a GPU that would be one synchronisation more."""
    call, problem, of_head = rank_call.call, rank_call.call.problem, rank_call.weight is not None
    target, margin = problem.target, rank_call.margin
    shares = problem.target_weight
    lowest = highest = same_labels = 0
    if not problem.has_probabilities:
        if target.numel() > 0:
            lowest, highest = torch.where(target == problem.ignore_index, 0, target).aminmax()
        if not rank_call.gather_features:
            same_labels = checksum(target, shares)
    least, total = 0.0, 1.0
    distribution = problem.smoothing_distribution
    if distribution is not None:
        least, total = distribution.detach().amin().double(), distribution.detach().sum(dtype=torch.float64)
    given = sum((getattr(margin, name) is not None) << i for i, name in enumerate(_MARGIN_VECTORS))
    dtype = product_dtype(rank_call.own, rank_call.weight) if rank_call.weight is not None else problem.compute_dtype
    return {
        "rows": problem.logits.shape[0] * problem.logits.shape[1],
        "classes": rank_call.n_classes,
        "dtype": checks.FLOATING.index(rank_call.own.dtype),
        "features": rank_call.own.shape[-1] if of_head else 0,
        "labels": 0 if problem.has_probabilities else target.shape[-1],
        "target_weight": shares is not None,
        "share_dtype": 0 if shares is None else checks.FLOATING.index(shares.dtype),
        "device": ranks.device_types.index(rank_call.own.device.type),
        "weight": call.target_tensors[2] is not None,
        "smoothing_distribution": distribution is not None,
        "bias": rank_call.bias is not None,
        "margin": given + (margin.offsets_are_equal << 4),
        "scale": float(margin.scale) if isinstance(margin.scale, float | int) else 0.0,
        "reduction": checks.REDUCTIONS.index(call.reduction),
        "ignore_index": problem.ignore_index,
        "tau": rank_call.tau,
        "label_smoothing": problem.label_smoothing,
        "gather_features": rank_call.gather_features,
        "average_over_ranks": rank_call.average_over_ranks,
        "requires_grad": of_head and rank_call.own.requires_grad and torch.is_grad_enabled(),
        "product_dtype": _PRODUCT_DTYPES.index(dtype),
        "same_labels": _as_number(same_labels, torch.int64),
        "lowest": _as_number(lowest, torch.int64),
        "highest": _as_number(highest, torch.int64),
        "prior": torch.zeros((), dtype=torch.float64) if problem.log_prior is None
        else problem.log_prior.detach().amax().double(),
        "least": _as_number(least, torch.float64),
        "total": _as_number(total, torch.float64),
    }  # fmt: skip


def _as_number(value: Any, dtype: torch.dtype) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)


def _check_one_loss(ranks: Ranks, rank_call: RankCall, of_ranks: list[dict[str, Any]]) -> None:
    """Equal headers, and what it takes all classes to know: the same error on every rank."""

    def check(number: str, name: str, what: str, show: Callable[[Any], Any] = lambda value: value) -> None:
        check_same(name, what, [show(numbers[number]) for numbers in of_ranks])

    def check_given(number: str, name: str) -> None:
        check(number, name, "given or None", lambda given: "a tensor" if given else "None")

    of_head = rank_call.weight is not None
    operand, weight = ("features", "class_weight") if of_head else ("logits", "weight")
    check("gather_features", "gather_features", "the same", bool)
    check("device", operand, "on one type of device", lambda i: ranks.device_types[i])
    check("dtype", operand, "of one dtype", lambda i: str(checks.FLOATING[i]))
    if not rank_call.gather_features:
        check("rows", operand, "of one number of rows", lambda n: f"{n} rows")
    if of_head:
        check("features", operand, "of one width", lambda n: f"D = {n}")
        check("product_dtype", operand, "cast by autocast to one dtype", lambda i: str(_PRODUCT_DTYPES[i]))
        check("requires_grad", "features.requires_grad", "the same", bool)
        check_given("bias", "bias")
    check("labels", "target", "of one kind", lambda k: f"{k} labels a row" if k else "class probabilities")
    check_given("target_weight", "target_weight")
    if rank_call.gather_features:
        check("share_dtype", "target_weight", "of one dtype", lambda i: str(checks.FLOATING[i]))
    check_given("weight", weight)
    check_given("smoothing_distribution", "smoothing_distribution")
    check("margin", "margin", "of the same vectors", _vectors_of)
    check("scale", "margin.scale", "the same number")
    check("reduction", "reduction", "the same", lambda i: repr(checks.REDUCTIONS[i]))
    for option in ("ignore_index", "tau", "label_smoothing"):
        check(option, option, "the same")
    check("average_over_ranks", "average_over_ranks", "the same", bool)
    check("same_labels", "target", "the same labels and weights", lambda bits: f"labels of checksum {bits % 2**64:x}")

    n_classes = sum(numbers["classes"] for numbers in of_ranks)
    if n_classes == 0:
        raise ValueError(f"{'weight' if of_head else 'logits'} must have at least one class on some rank, got none")
    if not rank_call.call.problem.has_probabilities:
        for label in (min(numbers["lowest"] for numbers in of_ranks), max(numbers["highest"] for numbers in of_ranks)):
            checks.check_label(label, n_classes, rank_call.call.problem.ignore_index)
    priors = [numbers["prior"] for numbers in of_ranks]
    largest = math.nan if any(map(math.isnan, priors)) else max(priors)
    is_margin = rank_call.margin.negative_offset is not None
    checks.check_largest_prior(largest, rank_call.tau, "margin.negative_offset" if is_margin else "log_prior")
    if of_ranks[0]["smoothing_distribution"]:
        least = min(numbers["least"] for numbers in of_ranks)
        checks.check_distribution(least, sum(numbers["total"] for numbers in of_ranks))


def _vectors_of(bits: int) -> str:
    names = [name for i, name in enumerate(_MARGIN_VECTORS) if bits >> i & 1]
    return (" and ".join(names) or "none") + (" with one tensor for both offsets" if bits >> 4 and bits & 6 else "")


# This rank's part -----------------------------------------------------------------------------------------------------


def _as_rows(problem: Problem) -> Problem:
    """The problem of (N, P) rows as one of (N * P, 1)."""
    n_rows = problem.logits.shape[0] * problem.logits.shape[1]

    def rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(n_rows, 1, values.shape[-1])

    logits, target = rows(problem.logits), rows(problem.target)
    assert logits is not None
    assert target is not None
    return problem._replace(logits=logits, target=target, target_weight=rows(problem.target_weight))


def _of_these_classes(problem: Problem, first: int, width: int, n_classes: int) -> Problem:
    """Labels count from the first class here, -1 is an ignored one, and uniform smoothing knows of all classes."""
    if problem.label_smoothing > 0.0 and problem.smoothing_distribution is None:
        uniform = problem.logits.new_full((problem.logits.shape[-1],), 1.0 / n_classes if width > 0 else 0.0,
                                          dtype=torch.float64)  # fmt: skip
        problem = problem._replace(smoothing_distribution=uniform)
    if problem.has_probabilities:
        return problem
    target, held = problem.target, problem.logits.shape[-1]
    here = (target >= first) & (target < first + width)
    local = torch.where(here, target - first, held)
    return problem._replace(target=local.masked_fill_(target == problem.ignore_index, -1), ignore_index=-1)
