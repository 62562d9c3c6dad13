"""What ranks exchange and agree on: the number of collectives, and errors, which are raised on every rank.

A rank may differ from the others, refuse its arguments, make no call, or die.
"""

from __future__ import annotations

import os
import re
import signal
import time
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import fused_la
from fused_la import distributed as class_parallel
from fused_la import margins

from .ranks import PRIOR, WIDTHS, C, Case, D, Failed, N, PerRank, Pool, cases, class_range, labels, random

# Collectives ----------------------------------------------------------------------------------------------------------


class RecordedCollectives(TorchDispatchMode):
    """Records the names of all collectives that PyTorch runs, whichever function starts them."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func.__name__.partition(".")[0].strip("_"))
        return func(*args, **(kwargs or {}))


def count_collectives(reduction: str) -> dict[str, list[str]]:
    """The collectives of a second step: the first step enlarges the buffer for the features."""
    rank, size = dist.get_rank(), dist.get_world_size()
    logits, features, weight = random(N, 4), random(N, D), random(4, D, seed=1 + rank)
    target, prior = labels(high=4 * size), torch.zeros(4)
    counted = {}
    for name, loss_of in (
        ("logits", lambda: class_parallel.class_parallel_logit_adjusted_cross_entropy(
            logits.requires_grad_(), target, prior.requires_grad_(), reduction=reduction)),
        ("head", lambda: class_parallel.class_parallel_linear_logit_adjusted_cross_entropy(
            features.requires_grad_(), weight.requires_grad_(), target, prior, reduction=reduction)),
        ("gather", lambda: class_parallel.class_parallel_linear_logit_adjusted_cross_entropy(
            features.requires_grad_(), weight.requires_grad_(), target, prior, reduction=reduction,
            gather_features=True)),
        ("frozen trunk", lambda: class_parallel.class_parallel_linear_logit_adjusted_cross_entropy(
            features.detach(), weight.requires_grad_(), target, prior, reduction=reduction)),
    ):  # fmt: skip
        loss_of()
        with RecordedCollectives() as forward:
            loss = loss_of()
        with RecordedCollectives() as backward:
            loss.sum().backward()
        counted[name] = [forward.names, backward.names]
    return counted


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_collectives_forward_and_at_most_one_reduction_backward(pool, reduction):
    gather, reduce, scatter = "allgather_base", "allreduce", "reduce_scatter_base"
    upstream = [gather] if reduction == "none" else []  # the upstream gradient of the other ranks' rows
    for counted in pool(count_collectives, reduction):
        assert counted == {
            "logits": [[gather] * 2, []],
            "head": [[gather] * 2, [reduce]],
            "gather": [[gather] * 2, [*upstream, scatter]],
            "frozen trunk": [[gather] * 2, []],
        }


class Step(NamedTuple):
    """One call of ranks with rows of their own: its number of forward collectives, and its error if it fails."""

    does: str
    counts: list[int]  # rows of each rank; a third rank has 2
    collectives: int
    error: str = ""
    dtype: torch.dtype = torch.float32


GATHER_STEPS = (
    Step("first", [5, 2], 3),
    Step("as before", [5, 2], 2),
    Step("most rows on another rank", [1, 5], 2),
    Step("fewer", [3, 4], 2),
    Step("far fewer", [0, 2], 2),
    Step("more", [3, 4], 3),
    Step("rank 1 refuses", [3, 4], 1, "log_prior must have shape"),
    Step("rank 1 refuses", [9, 9], 1, "log_prior must have shape"),
    Step("as before", [3, 4], 2),
    Step("all refuse", [3, 4], 1, "log_prior must have shape"),
    Step("rank 1 has other columns", [3, 4], 1, "features must be of one width on every rank, got "),
    Step("as before", [4, 3], 2),
    Step("rank 1 counts", [3, 4], 1, "The call must be of the same function on every rank, got "),
    Step("all count", [3, 4], 2),
    Step("as before", [3, 4], 2),
    Step("another dtype", [3, 4], 3, dtype=torch.float64),
    Step("half precision", [3, 4], 2, dtype=torch.bfloat16),
    Step("as before", [4, 4], 2, dtype=torch.bfloat16),
)


def run_step(step: Step, widths: list[int], group: Any) -> Tensor:
    rank = dist.get_rank()
    counts = [*step.counts, 2][: len(widths)]
    own, (first, last) = slice(sum(counts[:rank]), sum(counts[: rank + 1])), class_range(widths)
    features, weight, target = rows_of_step(step, len(widths))
    if step.does == "all count" or (step.does == "rank 1 counts" and rank == 1):
        return fused_la.count_classes(target[own], C, group=group)
    if step.does == "rank 1 has other columns" and rank == 1:
        features, weight = features[:, 1:], weight[:, 1:]
    refuses = step.does == "all refuse" or (step.does == "rank 1 refuses" and rank == 1)
    return class_parallel.class_parallel_linear_logit_adjusted_cross_entropy(
        features[own], weight[first:last], target[own], PRIOR[:1] if refuses else PRIOR[first:last],
        group=group, gather_features=True,
    )  # fmt: skip


def rows_of_step(step: Step, size: int) -> tuple[Tensor, Tensor, Tensor]:
    n = sum([*step.counts, 2][:size])
    return random(n, D, seed=n, dtype=step.dtype), random(C, D, dtype=step.dtype), labels(n, n)


def run_steps(widths: list[int]) -> list[tuple[int, Any]]:
    """The number of collectives of each step, and its loss or error, on a group that has no buffer for rows yet."""
    group, found = dist.new_group(), []
    for step in GATHER_STEPS:
        with RecordedCollectives() as counted:
            try:
                answer: Any = run_step(step, widths, group)
            except ValueError as error:
                answer = str(error)
        found.append((len(counted.names), answer))
    return found


def test_features_are_gathered_with_the_header_if_they_fit(pool):
    """The size of the buffer follows from calls that all ranks agreed on, so an error leaves no rank waiting."""
    widths = [4, 8] if pool.size == 2 else [4, 3, 5]
    for answers in pool(run_steps, widths):
        for step, (collectives, answer) in zip(GATHER_STEPS, answers, strict=True):
            assert collectives == step.collectives, step
            if step.error:
                assert step.error in answer, step
            elif step.does == "all count":
                assert answer.sum() == len(rows_of_step(step, pool.size)[2])
            else:
                features, weight, target = rows_of_step(step, pool.size)
                expected = fused_la.linear_logit_adjusted_cross_entropy(features, weight, target, PRIOR)
                assert_close(answer, expected)


# Errors ---------------------------------------------------------------------------------------------------------------


def call(name: str, arguments: tuple, keywords: dict[str, Any], learns: bool = False) -> Tensor:
    if learns:
        arguments[0].requires_grad_()
    return getattr(class_parallel, f"class_parallel_{name}")(*arguments, **keywords)


LOGITS, HEAD = "logit_adjusted_cross_entropy", "linear_logit_adjusted_cross_entropy"


def good_arguments(name: str) -> tuple:
    prior = torch.zeros(5)
    return (random(N, 5), labels(), prior) if name == LOGITS else (random(N, D), random(5, D), labels(), prior)


def swap(index: int, value: Any) -> Any:
    """A change that replaces one positional argument."""
    return lambda arguments: (*arguments[:index], value, *arguments[index + 1 :])


TWO_LABELS = torch.stack([labels(1), labels(2)], 1)
SHARES = torch.full((N, 2), 0.5)
# function, change of the arguments on rank 1, keywords on rank 1, error message on every rank
DIFFERENCES = {
    "dtype": (LOGITS, swap(0, random(N, 5).double()), {}, "logits must be of one dtype on every rank, got "
              "torch.float32 on {others}, torch.float64 on rank 1"),
    "rows": (LOGITS, lambda a: (a[0][1:], a[1][1:], a[2]), {}, "logits must be of one number of rows on every rank, "
             "got 7 rows on {others}, 6 rows on rank 1"),
    "labels": (LOGITS, swap(1, labels(1)), {}, "target must be the same labels and weights on every rank, got "),
    "order of labels": (LOGITS, swap(1, labels().roll(1)), {}, "target must be the same labels and weights on every "
                        "rank, got "),
    "kind of target": (LOGITS, swap(1, random(N, 5).softmax(1)), {}, "target must be of one kind on every rank, got "
                       "1 labels a row on {others}, class probabilities on rank 1"),
    "number of labels": (LOGITS, swap(1, TWO_LABELS), {"target_weight": SHARES}, "target must be of one kind on every "
                         "rank, got 1 labels a row on {others}, 2 labels a row on rank 1"),
    "weight": (LOGITS, None, {"weight": torch.ones(5)}, "weight must be given or None on every rank, got None on "
               "{others}, a tensor on rank 1"),
    "reduction": (LOGITS, None, {"reduction": "sum"}, "reduction must be the same on every rank, got 'mean' on "
                  "{others}, 'sum' on rank 1"),
    "tau": (LOGITS, swap(2, torch.zeros(5)), {"tau": 0.5}, "tau must be the same on every rank, got 1.0 on {others}, "
            "0.5 on rank 1"),
    "smoothing": (LOGITS, None, {"label_smoothing": 0.1}, "label_smoothing must be the same on every rank, got 0.0 on "
                  "{others}, 0.1 on rank 1"),
    "ignore_index": (LOGITS, None, {"ignore_index": -1}, "ignore_index must be the same on every rank, got -100 on "
                     "{others}, -1 on rank 1"),
    "width of features": (HEAD, lambda a: (a[0][:, 1:], a[1][:, 1:], *a[2:]), {}, "features must be of one width on "
                          "every rank, got D = 5 on {others}, D = 4 on rank 1"),
    "bias": (HEAD, None, {"bias": torch.zeros(5)}, "bias must be given or None on every rank, got None on {others}, "
             "a tensor on rank 1"),
    "gather": (HEAD, None, {"gather_features": True}, "gather_features must be the same on every rank, got False on "
               "{others}, True on rank 1"),
    "gradient": (HEAD, swap(0, random(N, D).requires_grad_()), {}, "features.requires_grad must be the same on every "
                 "rank, got False on {others}, True on rank 1"),
}  # fmt: skip


def others_of(size: int) -> str:
    return "rank 0" if size == 2 else "ranks 0, 2"


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_rank_that_differs_is_an_error_on_every_rank(pool, difference):
    name, change, keywords, message = DIFFERENCES[difference]
    arguments = good_arguments(name)
    changed = arguments if change is None else change(arguments)
    each = [changed if rank == 1 else arguments for rank in range(pool.size)]
    answers = pool(call, name, PerRank(each), PerRank([keywords if rank == 1 else {} for rank in range(pool.size)]))
    assert {answer[:1] for answer in answers} == {("ValueError",)}, answers
    assert len({answer.message for answer in answers}) == 1, "the same on every rank"
    assert answers[0].message.startswith(message.format(others=others_of(pool.size))), answers[0].message


def test_gathered_label_weights_must_have_one_dtype(pool):
    """If they are not gathered, one rank may have float64: they are compared as float64."""
    _, weight, _, prior = good_arguments(HEAD)
    arguments = (random(N, D), weight, TWO_LABELS % 5, prior)
    keywords = PerRank([{"target_weight": SHARES.double() if rank == 1 else SHARES} for rank in range(pool.size)])
    assert len({loss.item() for loss in pool(call, HEAD, arguments, keywords)}) == 1
    answers = pool(call, HEAD, arguments, PerRank([each | {"gather_features": True} for each in keywords]))
    message = (
        f"target_weight must be of one dtype on every rank, got torch.float32 on {others_of(pool.size)}, "
        "torch.float64 on rank 1"
    )
    assert answers == [Failed("ValueError", message)] * pool.size


def test_ranks_that_call_different_functions_raise_an_error(pool):
    margin = margins.adaptive(PRIOR).of_classes(0, 5)
    names = ["margin_cross_entropy" if rank == 1 else LOGITS for rank in range(pool.size)]
    priors = [margin if rank == 1 else torch.zeros(5) for rank in range(pool.size)]
    answers = pool(call, PerRank(names), PerRank([(random(N, 5), labels(), prior) for prior in priors]), {})
    assert answers == [
        Failed("ValueError", f"The call must be of the same function on every rank, got class_parallel_{LOGITS} on "
                             f"{others_of(pool.size)}, class_parallel_margin_cross_entropy on rank 1")
    ] * pool.size  # fmt: skip


REFUSED = {
    "shape": (LOGITS, swap(2, torch.zeros(4)), {}, "ValueError", r"log_prior must have shape \(5,\), got \(4,\)"),
    "kind": (LOGITS, swap(1, [0] * N), {}, "TypeError", "target must be a torch.Tensor, got list"),
    "option": (LOGITS, None, {"label_smoothing": 2.0}, "ValueError", "label_smoothing must be between 0 and 1, got 2"),
    "implementation": (LOGITS, None, {"impl": "reference"}, "ValueError", "impl must be 'auto', 'blocked' or 'triton'"),
    "gradient of weights": (LOGITS, None, {"weight": torch.ones(5, requires_grad=True)}, "ValueError",
                            "classes over ranks have no implementation for a gradient of target, "),
    "weight": (HEAD, swap(1, torch.zeros(5, D + 1)), {}, "ValueError", r"weight must have shape \(C, 5\), got "),
    "probabilities of own rows": (HEAD, swap(2, random(N, 5).softmax(1)), {"gather_features": True}, "ValueError",
                                  "target must be class indices with gather_features, got class probabilities"),
    "average without gather": (HEAD, None, {"average_over_ranks": True}, "ValueError",
                               "average_over_ranks must be False without gather_features, got True"),
    "flag": (HEAD, None, {"gather_features": 1}, "TypeError", "gather_features must be True or False, got int"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSED)
def test_an_error_on_one_rank_raises_on_all(pool, mistake):
    name, change, keywords, kind, message = REFUSED[mistake]
    arguments = good_arguments(name)
    changed = arguments if change is None else change(arguments)
    each = [changed if rank == 1 else arguments for rank in range(pool.size)]
    answers = pool(call, name, PerRank(each), PerRank([keywords if rank == 1 else {} for rank in range(pool.size)]))
    assert {answer[:1] for answer in answers} == {(kind,)}, answers
    for rank, answer in enumerate(answers):
        told = "" if rank == 1 else f"rank 1 raised an error in class_parallel_{name}: "
        assert re.match(told + message, answer.message), answer


def test_errors_that_depend_on_all_ranks_raise_on_all(pool):
    """Labels out of range, also in one rank's own rows; a prior that excludes every class; a wrong distribution."""
    n_classes = 5 * pool.size
    target = labels().index_fill(0, torch.tensor([3]), n_classes)
    outside = f"Target {n_classes} is out of bounds: target must hold class indices in [0, {n_classes}) or ignore_index"
    logits, _, prior = good_arguments(LOGITS)
    features, weight, fine, _ = good_arguments(HEAD)
    own = PerRank([(features, weight, target if rank == 1 else fine, prior) for rank in range(pool.size)])
    parts = [prior + 0.2, torch.tensor([-0.5, 0.5, 0.0, 0.0, 0.0]), prior][: pool.size]  # negative on one rank alone
    smoothings = PerRank([{"label_smoothing": 0.1, "smoothing_distribution": part} for part in parts])
    for answers, kind, message in (
        (pool(call, LOGITS, (logits, fine, prior), smoothings), "ValueError",
         "smoothing_distribution must hold probabilities that add up to 1, got a smallest value of -0.5 "),
        (pool(call, LOGITS, (logits, target, prior), {}), "IndexError", outside),
        (pool(call, HEAD, own, {"gather_features": True}), "IndexError", outside),
        (pool(call, LOGITS, (logits, labels() - 9, prior), {}), "IndexError", "Target -9 is out of bounds"),
        (pool(call, LOGITS, (logits, fine, prior - torch.inf), {}), "ValueError",
         "log_prior must be finite for some class, got -inf for every class"),
        (pool(call, LOGITS, (logits, fine, PerRank([prior, prior / 0.0, prior])[1]), {}), "ValueError",
         "log_prior must be finite or -inf, got nan for some class"),
        (pool(call, LOGITS, (logits, fine, prior), {"label_smoothing": 0.1, "smoothing_distribution": prior + 0.2}),
         "ValueError", "smoothing_distribution must hold probabilities that add up to 1, got a smallest value of 0.2 "),
        (pool(call, LOGITS, (logits[:, :0], fine, prior[:0]), {}), "ValueError",
         "logits must have at least one class on some rank, got none"),
    ):  # fmt: skip
        assert len(set(answers)) == 1, answers
        assert answers[0].kind == kind
        assert answers[0].message.startswith(message), answers[0]


def on_fake_tensors() -> None:
    with FakeTensorMode():
        class_parallel.class_parallel_logit_adjusted_cross_entropy(
            torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), torch.zeros(3)
        )


def in_batches() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = class_parallel.class_parallel_logit_adjusted_cross_entropy(
        logits, torch.zeros(4, dtype=torch.int64), torch.zeros(3), reduction="none"
    )
    torch.autograd.grad(loss, logits, torch.eye(4), is_grads_batched=True)


def test_fake_tensors_and_batched_gradients_are_refused(pools):
    for answer in pools(2)(on_fake_tensors):
        message = "logits must have values that ranks can look at, got a tensor that is fake or is traced"
        assert answer == Failed("ValueError", message)
    for answer in pools(2)(in_batches):
        assert answer.kind == "RuntimeError"
        assert "no gradients in batches (is_grads_batched): backward communicates" in answer.message


def test_a_group_that_is_none_is_named():
    arguments = good_arguments(LOGITS)
    with pytest.raises(ValueError, match=r"^group must be a process group, or None after .*, got None before it$"):
        call(LOGITS, arguments, {})
    with pytest.raises(TypeError, match=r"^group must be a torch.distributed ProcessGroup or None, got str$"):
        call(LOGITS, arguments, {"group": "gloo"})


def differentiate_twice() -> None:
    logits = random(N, 5).requires_grad_()
    loss = class_parallel.class_parallel_logit_adjusted_cross_entropy(logits, labels(high=5), torch.zeros(5))
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert torch.equal(grad, torch.autograd.grad(loss, logits)[0])
    grad.square().sum().backward()


def in_a_transform() -> None:
    torch.func.grad(
        lambda x: class_parallel.class_parallel_logit_adjusted_cross_entropy(x, labels(high=5), torch.zeros(5))
    )(random(N, 5))


def test_second_derivatives_and_transforms_are_refused(pool):
    twice = Failed("RuntimeError", "a loss with classes over ranks has no second derivatives")
    assert pool(differentiate_twice) == [twice] * pool.size
    why = "classes over ranks have no implementation for a transform of torch.func: use the loss of whole logits"
    for answer in pool(in_a_transform):
        assert answer.message.endswith(why), answer


def count(target: Any, n_classes: int, keywords: dict[str, Any]) -> list[int]:
    return fused_la.count_classes(target, n_classes, group=dist.group.WORLD, **keywords).tolist()


def test_counting_classes_fails_on_all_ranks_or_on_none(pool):
    targets = PerRank([[0, 2], [1, 1], [0]][: pool.size])
    assert pool(count, targets, 3, {}) == [[1 + (pool.size == 3), 2, 1]] * pool.size
    message = "target must have entries in [0, 3) or equal to ignore_index = -100, got 3 at flat index 1"
    answers = pool(count, PerRank([[0], [0, 3], [0]][: pool.size]), 3, {})
    assert answers[1] == Failed("IndexError", message)
    assert set(answers) == {answers[1], Failed("IndexError", f"rank 1 raised an error in count_classes: {message}")}
    answers = pool(count, [0], PerRank([3, 4, 3][: pool.size]), {})
    others = others_of(pool.size)
    assert set(answers) == {
        Failed("ValueError", f"n_classes must be the same on every rank, got 3 on {others}, 4 on rank 1")
    }


# A rank that dies -----------------------------------------------------------------------------------------------------

SHORT_TIMEOUT = 3.0  # seconds, the timeout of the groups that lose a rank


def call_without_a_rank(case: Case, widths: list[int], lost: int, how: str) -> Any:
    """The error of a call that one rank does not join, and the seconds until it is raised."""
    group = dist.new_group(timeout=timedelta(seconds=SHORT_TIMEOUT))
    dist.barrier()
    if dist.get_rank() == lost:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return None
    first, last = class_range(widths)
    start = time.monotonic()
    try:
        class_parallel.class_parallel_logit_adjusted_cross_entropy(
            case.logits[:, first:last], case.target, case.prior[first:last], group=group
        )
    except RuntimeError as error:
        return type(error).__name__, time.monotonic() - start
    return "no error", 0.0


@pytest.mark.slow
def test_a_killed_rank_raises_an_error_on_the_others(tmp_path):
    """At once, because gloo notices the closed connection, and never later than the timeout of the group."""
    pool = Pool(3, str(tmp_path / "store"))
    try:
        pool.send(call_without_a_rank, cases()["one label"], WIDTHS[3], 2, "dies")
        for rank in range(2):
            kind, seconds = pool.receive(rank)
            assert kind != "no error"
            assert seconds < SHORT_TIMEOUT + 2.0
    finally:
        pool.close()


def test_a_rank_that_makes_no_call_raises_an_error_on_the_others_after_the_timeout(pools):
    answers = pools(2)(call_without_a_rank, cases()["one label"], WIDTHS[2], 1, "stays away")
    kind, seconds = answers[0]
    assert kind != "no error"
    assert SHORT_TIMEOUT / 2 < seconds < SHORT_TIMEOUT + 5.0
