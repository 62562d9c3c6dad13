"""Losses and gradients with classes sharded over 2 and 3 gloo processes, against one process with all classes.

For each world size a pool of processes starts once and runs functions of this file, one call at a time, the same on
every rank. The pool continues after an error. That is tested too: a rank that still waited for another would receive
the next call's message. No rank waits longer than TIMEOUT, which is long because a process may take a minute to import
PyTorch on a busy machine.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any, NamedTuple

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import slow
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import fused_la
from fused_la import PairwiseMargin, margins
from fused_la import distributed as class_parallel

TIMEOUT = 120.0  # seconds for which a rank waits for another


# Processes ------------------------------------------------------------------------------------------------------------


def run_worker(rank: int, size: int, store: str, pipe: Any) -> None:
    """Loop of a process: call each function that arrives, and send back its result, or its error's type and message."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT)
    )
    while (message := pickle.loads(pipe.recv_bytes())) is not None:
        function, arguments = message
        try:
            answer = function(*arguments)
        except Exception as error:
            answer = Failed(type(error).__name__, str(error))
        pipe.send_bytes(pickle.dumps(answer))  # plain pickle sends tensors by value, not in shared memory
    dist.destroy_process_group()


class Failed(NamedTuple):
    kind: str
    message: str


class Pool:
    def __init__(self, size: int, store: str):
        self.size = size
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=run_worker, args=(rank, size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def __call__(self, function: Any, *arguments: Any) -> list[Any]:
        """The answer of every rank; an argument of type `PerRank` has one value for each rank."""
        self.send(function, *arguments)
        return [self.receive(rank) for rank in range(self.size)]

    def send(self, function: Any, *arguments: Any) -> None:
        for rank, pipe in enumerate(self.pipes):
            own = [argument[rank] if isinstance(argument, PerRank) else argument for argument in arguments]
            pipe.send_bytes(pickle.dumps((function, own)))

    def receive(self, rank: int) -> Any:
        assert self.pipes[rank].poll(TIMEOUT + 30.0), f"rank {rank} does not answer"
        return pickle.loads(self.pipes[rank].recv_bytes())

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(pickle.dumps(None))
        for process in self.processes:
            process.join(10)
            process.kill()


class PerRank(list):
    """The values of an argument that differs between ranks, one for each."""


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    made: dict[int, Pool] = {}

    def pool(size: int) -> Pool:
        if size not in made:
            made[size] = Pool(size, str(tmp_path_factory.mktemp("ranks") / "store"))
        return made[size]

    os.environ["OMP_NUM_THREADS"] = "1"
    yield pool
    for each in made.values():
        each.close()


@pytest.fixture(params=[2, 3], ids=["2 ranks", "3 ranks"])
def pool(request, pools) -> Pool:
    return pools(request.param)


# Cases ----------------------------------------------------------------------------------------------------------------

N, C, D = 7, 12, 5
WIDTHS = {2: [5, 7], 3: [4, 0, 8]}  # classes of each rank
PRIOR = torch.tensor([0.3, 0.2, 0.12, 0.1, 0.08, 0.06, 0.05, 0.04, 0.03, 0.01, 0.007, 0.003]).log()
PER_CLASS_OPTIONS = ("weight", "class_weight", "smoothing_distribution")


class Case(NamedTuple):
    """The arguments of a loss in one process; each rank slices them to its classes."""

    logits: Tensor
    target: Tensor
    prior: Tensor | PairwiseMargin = PRIOR
    keywords: dict[str, Any] = {}  # noqa: RUF012
    grad_loss: Tensor | float = 1.0


def slice_classes(value: Any, first: int, last: int, dim: int = 0) -> Any:
    if isinstance(value, PairwiseMargin):
        return value.of_classes(first, last)
    return value.narrow(dim, first, last - first).clone() if isinstance(value, Tensor) else value


def class_range(widths: list[int]) -> tuple[int, int]:
    rank = dist.get_rank()
    return sum(widths[:rank]), sum(widths[: rank + 1])


def shard_keywords(keywords: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    return {
        name: slice_classes(value, first, last) if name in PER_CLASS_OPTIONS else value
        for name, value in keywords.items()
    }


@contextlib.contextmanager
def small_tiles():
    """Make tiles so small that every case has several tiles of rows and classes."""
    from fused_la._tiled import head as tiled_head

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled_head, "choose_tile_shape", lambda rows, *_: tiled_head.TileShape(max(1, min(rows, 3)), 4))
        yield


def run_logits(case: Case, widths: list[int]) -> dict[str, Any]:
    """Loss and gradients of this rank."""
    first, last = class_range(widths)
    logits = slice_classes(case.logits, first, last, 1).requires_grad_()
    prior = slice_classes(case.prior, first, last)
    target = slice_classes(case.target, first, last, 1) if case.target.is_floating_point() else case.target
    is_margin = isinstance(prior, PairwiseMargin)
    if is_margin:
        loss_of = class_parallel.class_parallel_margin_cross_entropy
    else:
        loss_of = class_parallel.class_parallel_logit_adjusted_cross_entropy
        prior.requires_grad_()
    with small_tiles():
        loss = loss_of(logits, target, prior, **shard_keywords(case.keywords, first, last))
        loss.backward(torch.as_tensor(case.grad_loss, dtype=loss.dtype).expand_as(loss))
    answer = {"loss": loss.detach(), "logits": logits.grad}
    return answer if is_margin else {**answer, "log_prior": prior.grad}


def join_ranks(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Answers of all ranks as one process would give them: the loss, equal on all ranks, and gradients concatenated."""
    for answer in answers:
        assert not isinstance(answer, Failed), answer
        assert torch.equal(answer["loss"].nan_to_num(-7), answers[0]["loss"].nan_to_num(-7))
    whole = {"loss": answers[0]["loss"]}
    for name, dim in (("logits", 1), ("log_prior", 0), ("weight", 0), ("bias", 0)):
        if name in answers[0]:
            whole[name] = torch.cat([answer[name] for answer in answers], dim)
    return whole


def one_process(case: Case, dtype: torch.dtype | None = None, impl: str = "blocked") -> dict[str, Any]:
    logits = case.logits.to(dtype or case.logits.dtype, copy=True).requires_grad_()
    is_margin = isinstance(case.prior, PairwiseMargin)
    keywords = {**case.keywords, "impl": impl}
    if is_margin:
        loss = fused_la.margin_cross_entropy(logits, case.target, case.prior, **keywords)
    else:
        prior = case.prior.clone().requires_grad_()
        loss = fused_la.logit_adjusted_cross_entropy(logits, case.target, prior, **keywords)
    loss.backward(torch.as_tensor(case.grad_loss, dtype=loss.dtype).expand_as(loss))
    answer = {"loss": loss.detach(), "logits": logits.grad}
    return answer if is_margin else {**answer, "log_prior": prior.grad}


def assert_as_accurate(found: dict[str, Any], single: dict[str, Any], exact: dict[str, Any]) -> None:
    """Errors are at most twice those of one process, plus four ulps of the largest element."""
    assert found.keys() == exact.keys()
    for name, truth in exact.items():
        truth = truth.double()
        assert found[name].dtype == single[name].dtype, name
        assert found[name].shape == truth.shape, name
        if truth.numel() == 0:
            continue
        lost = (single[name].double() - truth).nan_to_num(0.0).abs().max()
        ulp = torch.finfo(found[name].dtype).eps * truth.nan_to_num(0.0).abs().max()
        error = (found[name].double() - truth).abs()
        assert torch.equal(found[name].isnan(), truth.isnan()), name
        assert error.nan_to_num(0.0).max() <= 2.0 * lost + 4.0 * ulp, (name, error, lost, ulp)


def exact_of(case: Case) -> dict[str, Any]:
    keywords = {name: value for name, value in case.keywords.items() if name != "impl"}
    truth = oracle.truth(case.logits, case.target, case.prior, grad_loss=case.grad_loss, **keywords)
    return {"loss": truth.loss, "logits": truth.grad_logits, "log_prior": truth.grad_log_prior}


def labels(seed: int = 0, n: int = N, low: int = 0, high: int = C) -> Tensor:
    return torch.randint(low, high, (n,), generator=torch.Generator().manual_seed(seed))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cases() -> dict[str, Case]:
    logits = 3.0 * random(N, C)
    several = torch.stack([labels(1), labels(2), labels(2)], 1)  # two labels of a row are equal
    several[0, 0], several[1] = -100, -100
    shares = torch.rand(N, 3, generator=torch.Generator().manual_seed(3))
    probabilities = random(N, C, seed=4).softmax(1)
    weight = torch.linspace(0.25, 2.0, C)
    some_ignored = labels(5)
    some_ignored[2:4] = -100
    first_out, last_out, inner = PRIOR.clone(), PRIOR.clone(), PRIOR.clone()
    first_out[:5], last_out[4:], inner[3:6] = -torch.inf, -torch.inf, -torch.inf
    confident = logits.clone()
    confident[torch.arange(N), labels()] = 40.0
    return {
        "one label": Case(logits, labels()),
        "half precision": Case(logits.bfloat16(), labels()),
        "double": Case(logits.double(), labels(), PRIOR.double()),
        "no label on the last rank": Case(logits, labels(high=4)),
        "no label on the first rank": Case(logits, labels(low=6)),
        "confident": Case(confident, labels()),
        "large logits": Case(10_000.0 * logits, labels()),
        "tau": Case(logits, labels(), keywords={"tau": 0.5}),
        "tau 0": Case(logits, labels(), keywords={"tau": 0.0}),
        "upstream": Case(logits, labels(), grad_loss=-3.0),
        "sum": Case(logits, some_ignored, keywords={"reduction": "sum"}),
        "none": Case(logits, some_ignored, keywords={"reduction": "none"}, grad_loss=torch.linspace(-1.0, 2.0, N)),
        "ignored": Case(logits, some_ignored),
        "all ignored": Case(logits, torch.full((N,), -100), keywords={"reduction": "sum"}),
        "mean over no rows": Case(logits, torch.full((N,), -100)),
        "a class is ignored": Case(logits, labels(), keywords={"ignore_index": int(labels()[0])}),
        "weight": Case(logits, some_ignored, keywords={"weight": weight}),
        "smoothing": Case(logits, some_ignored, keywords={"label_smoothing": 0.1}),
        "smoothing toward the prior": Case(
            logits, labels(),
            keywords={"label_smoothing": 0.3, "smoothing_distribution": PRIOR.exp() / PRIOR.exp().sum(),
                      "weight": weight},
        ),
        "smoothing alone": Case(logits, labels(), keywords={"label_smoothing": 1.0}),
        "several labels": Case(logits, several, keywords={"target_weight": shares}),
        "several labels, weight, smoothing": Case(
            logits, several, keywords={"target_weight": shares, "weight": weight, "label_smoothing": 0.2}
        ),
        "probabilities": Case(logits, probabilities),
        "probabilities, weight, smoothing": Case(
            logits, probabilities, keywords={"weight": weight, "label_smoothing": 0.2}
        ),
        "probabilities whose top class ties": Case(logits.round(), probabilities),
        "a rank's classes are out": Case(logits, labels(low=5), first_out),
        "another rank's classes are out": Case(logits, labels(high=4), last_out),
        "classes of two ranks are out": Case(logits, labels(low=6), inner),
        "classes are out, smoothing toward the prior": Case(
            logits, labels(low=5), first_out,
            {"label_smoothing": 0.1, "smoothing_distribution": first_out.exp() / first_out.exp().sum()},
        ),
        "classes are out, probabilities": Case(
            logits, probabilities.masked_fill(first_out == -torch.inf, 0.0), first_out
        ),
        "the label's class is out": Case(logits, labels(), first_out, {"reduction": "none"}),
        "no rows": Case(logits[:0], labels()[:0]),
        "pixels": Case(random(2, C, 3, 2), torch.stack([labels(n=6), labels(1, n=6)]).view(2, 3, 2)),
        "pixels, none": Case(
            random(2, C, 3), labels(n=6).view(2, 3), keywords={"reduction": "none"},
            grad_loss=torch.linspace(0.5, 2.0, 6).view(2, 3),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", [slow(name) if i % 2 else name for i, name in enumerate(cases())])
def test_logits_over_ranks_are_as_accurate_as_in_one_process(pool, name):
    case = cases()[name]
    found = join_ranks(pool(run_logits, case, WIDTHS[pool.size]))
    assert_as_accurate(found, one_process(case), exact_of(case))


def test_some_ranks_may_have_no_classes(pool):
    """Loss and gradients are right, and the gradient of such a rank's logits has shape (N, 0)."""
    widths = {2: [0, C], 3: [C, 0, 0]}[pool.size]
    chosen = ["one label", "tau 0", "smoothing", "smoothing toward the prior", "probabilities, weight, smoothing"]
    for name in chosen:
        case = cases()[name]
        answers = pool(run_logits, case, widths)
        assert_as_accurate(join_ranks(answers), one_process(case), exact_of(case))
        without = answers[widths.index(0)]
        assert without["logits"].shape == (N, 0)
        assert without["log_prior"].shape == (0,)


# Kernels and margins --------------------------------------------------------------------------------------------------


TRITON_CASES = (
    "one label",
    "half precision",
    "none",
    "several labels, weight, smoothing",
    "probabilities, weight, smoothing",
    "a rank's classes are out",
    "classes are out, smoothing toward the prior",
)


@pytest.mark.parametrize("name", TRITON_CASES)
def test_triton_kernels_run_with_classes_over_ranks(pools, name):
    """In Triton's interpreter, because the processes compute on the CPU."""
    case = cases()[name]
    case = case._replace(keywords={**case.keywords, "impl": "triton"})
    assert_as_accurate(join_ranks(pools(2)(run_logits, case, WIDTHS[2])), one_process(case), exact_of(case))


MARGINS = {
    "adaptive": margins.adaptive(PRIOR),
    "ldam": margins.ldam(PRIOR),
    "balanced": margins.balanced(PRIOR),
    "consistent": margins.logit_adjusted(PRIOR, 0.5, consistent=True),
    "vector scaling": margins.vector_scaling(PRIOR, 0.3, 1.0),
    "scaled and shifted": margins.cdt(PRIOR, 0.2) + margins.logit_adjusted_adaptive(PRIOR),
    "erm": margins.erm(),
}
K_LABELS = {"target_weight": torch.rand(N, 2, generator=torch.Generator().manual_seed(9))}


@pytest.mark.parametrize(
    ("name", "impl"),
    [*((name, "blocked") for name in MARGINS), ("consistent", "triton"), ("scaled and shifted", "triton")],
)
def test_margins_over_ranks_are_as_accurate_as_in_one_process(pools, name, impl):
    """Only the rank with a label's class has its alpha and offsets. The float64 reference is the exact result."""
    several = torch.stack([labels(1), labels(2)], 1)
    several[0] = several[0, 0]  # two equal labels
    weight = torch.linspace(0.5, 1.5, C)
    for target, keywords in (
        (labels(), {}),
        (labels(), {"weight": weight, "reduction": "sum"}),
        (several, K_LABELS | {"weight": weight, "ignore_index": int(several[2, 1])}),
    ):
        case = Case(2.0 * random(N, C), target, MARGINS[name], {**keywords, "impl": impl})
        for size in (2,) if impl == "triton" else (2, 3):
            found = join_ranks(pools(size)(run_logits, case, WIDTHS[size]))
            exact = one_process(case, torch.float64, "reference")
            assert_as_accurate(found, one_process(case, impl=impl), exact)


def test_a_margin_allows_a_rank_without_classes(pool):
    widths = {2: [C, 0], 3: [0, 5, 7]}[pool.size]
    for name in ("adaptive", "erm", "balanced", "scaled and shifted"):
        case = Case(2.0 * random(N, C), labels(), MARGINS[name])
        exact = one_process(case, torch.float64, "reference")
        assert_as_accurate(join_ranks(pool(run_logits, case, widths)), one_process(case), exact)


# Heads ----------------------------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """A case of a head's loss: features (N, D), weight (C, D), bias (C,)."""

    case: Case  # its logits are not used
    features: Tensor
    weight: Tensor
    bias: Tensor | None


def head_of(case: Case, dtype: torch.dtype = torch.float32, bias: bool = True) -> Head:
    n = len(case.target)
    weight = random(C, D, seed=7, dtype=dtype)
    return Head(case, random(n, D, seed=6, dtype=dtype), weight, random(C, seed=8, dtype=dtype) if bias else None)


def head_keywords(keywords: dict[str, Any]) -> dict[str, Any]:
    return {("class_weight" if name == "weight" else name): value for name, value in keywords.items()}


def run_head(head: Head, widths: list[int], counts: list[int] | None = None, average: bool = False) -> dict[str, Any]:
    first, last = class_range(widths)
    case = head.case
    features, weight = head.features.clone(), slice_classes(head.weight, first, last).requires_grad_()
    bias = None if head.bias is None else slice_classes(head.bias, first, last).requires_grad_()
    prior = slice_classes(case.prior, first, last)
    target = slice_classes(case.target, first, last, 1) if case.target.is_floating_point() else case.target
    keywords, grad_loss = shard_keywords(head_keywords(case.keywords), first, last), torch.as_tensor(case.grad_loss)
    if counts is not None:
        rank = dist.get_rank()
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        features, target = features[own], target[own]
        keywords |= {"gather_features": True, "average_over_ranks": average}
        if "target_weight" in keywords:
            keywords["target_weight"] = keywords["target_weight"][own]
        if grad_loss.dim() > 0:
            grad_loss = grad_loss[own]
    features.requires_grad_()
    is_margin = isinstance(prior, PairwiseMargin)
    if is_margin:
        loss_of = class_parallel.class_parallel_linear_margin_cross_entropy
    else:
        loss_of = class_parallel.class_parallel_linear_logit_adjusted_cross_entropy
        prior.requires_grad_()
    with small_tiles():
        loss = loss_of(features, weight, target, prior, bias=bias, **keywords)
        loss.backward(grad_loss.to(loss.dtype).expand_as(loss))
    answer = {"loss": loss.detach(), "features": features.grad, "weight": weight.grad}
    if bias is not None:
        answer["bias"] = bias.grad
    return answer if is_margin else {**answer, "log_prior": prior.grad}


def join_head_ranks(answers: list[dict[str, Any]], of_own_rows: bool = False) -> dict[str, Any]:
    """Answers of all ranks as one process would give them.

    With `of_own_rows` each rank has the features' gradient of its own rows only, and so unreduced losses.
    """
    for answer in answers:
        assert not isinstance(answer, Failed), answer
    rows_of = {
        name: torch.cat([answer[name] for answer in answers])
        for name in ("features", "loss")
        if of_own_rows and answers[0][name].dim() > 0
    }
    for name in {"features", "loss"} - rows_of.keys():
        assert all(answer[name].equal(answers[0][name]) or answer[name].isnan().all() for answer in answers), name
        rows_of[name] = answers[0][name]
    same = [{**answer, "loss": rows_of["loss"]} for answer in answers]
    return {**join_ranks(same), "features": rows_of["features"]}


def head_in_one_process(head: Head, impl: str = "blocked", dtype: torch.dtype | None = None) -> dict[str, Any]:
    case = head.case
    tensors = [None if t is None else t.to(dtype or t.dtype, copy=True).requires_grad_() for t in head[1:]]
    features, weight, bias = tensors
    keywords = {**head_keywords(case.keywords), "impl": impl}
    if isinstance(case.prior, PairwiseMargin):
        loss = fused_la.linear_margin_cross_entropy(features, weight, case.target, case.prior, bias=bias, **keywords)
    else:
        prior = case.prior.to(dtype or case.prior.dtype, copy=True).requires_grad_()
        loss = fused_la.linear_logit_adjusted_cross_entropy(features, weight, case.target, prior, bias=bias, **keywords)
    loss.backward(torch.as_tensor(case.grad_loss, dtype=loss.dtype).expand_as(loss))
    answer = {"loss": loss.detach(), "features": features.grad, "weight": weight.grad}
    if bias is not None:
        answer["bias"] = bias.grad
    return answer if isinstance(case.prior, PairwiseMargin) else {**answer, "log_prior": prior.grad}


def exact_of_head(head: Head) -> dict[str, Any]:
    """The exact result: the oracle's gradient of the logits, multiplied to those of features, weight and bias."""
    features, weight = head.features.double(), head.weight.double()
    logits = features @ weight.T + (0.0 if head.bias is None else head.bias.double())
    exact = exact_of(head.case._replace(logits=logits))
    grad = exact.pop("logits")
    exact |= {"features": grad @ weight, "weight": grad.T @ features}
    return exact if head.bias is None else {**exact, "bias": grad.sum(0)}


HEAD_CASES = (
    "one label",
    "no label on the last rank",
    "none",
    "ignored",
    "upstream",
    "smoothing",
    "smoothing toward the prior",
    "several labels, weight, smoothing",
    "probabilities, weight, smoothing",
    "a rank's classes are out",
    "no rows",
)


@pytest.mark.parametrize("name", HEAD_CASES)
def test_heads_over_ranks_are_as_accurate_as_in_one_process(pool, name):
    for bias, dtype in ((True, torch.float32), (False, torch.float64), (True, torch.bfloat16)):
        head = head_of(cases()[name], dtype, bias)
        found = join_head_ranks(pool(run_head, head, WIDTHS[pool.size]))
        assert_as_accurate(found, head_in_one_process(head), exact_of_head(head))


COUNTS = {2: [[5, 2], [0, 7]], 3: [[3, 4, 0], [2, 2, 3]]}  # rows of each rank


@pytest.mark.parametrize(
    "name",
    ["one label", "none", "ignored", "upstream", "several labels, weight, smoothing", "a rank's classes are out"],
)
def test_ranks_with_rows_of_their_own_share_a_head(pool, name):
    """Ranks have different numbers of rows, or none; one buffer holds 2-byte features and 8-byte labels."""
    for counts, dtype in zip(COUNTS[pool.size], (torch.float32, torch.bfloat16), strict=True):
        head = head_of(cases()[name], dtype)
        found = join_head_ranks(pool(run_head, head, WIDTHS[pool.size], counts), of_own_rows=True)
        assert_as_accurate(found, head_in_one_process(head), exact_of_head(head))


def strided_on_the_last_rank(head: Head, widths: list[int]) -> dict[str, Any]:
    if dist.get_rank() == len(widths) - 1:
        head = head._replace(features=head.features.T.contiguous().T, weight=head.weight.T.contiguous().T)
    return run_head(head, widths)


def test_strides_may_differ_between_ranks(pool):
    """A reduction over ranks adds up memory, whatever its strides."""
    head = head_of(cases()["one label"])
    found = join_head_ranks(pool(strided_on_the_last_rank, head, WIDTHS[pool.size]))
    assert_as_accurate(found, head_in_one_process(head), exact_of_head(head))


def under_autocast(head: Head, widths: list[int], counts: list[int] | None, everywhere: bool) -> dict[str, Any]:
    with torch.autocast("cpu", torch.bfloat16, enabled=everywhere or dist.get_rank() == 1):
        return run_head(head, widths, counts)


@pytest.mark.parametrize("everywhere", [True, False], ids=["everywhere", "on one rank"])
def test_autocast_changes_nothing_on_a_cpu(pool, everywhere):
    """PyTorch's autocast functions would refuse float16 beside bfloat16, after the other ranks have gone on."""
    head = head_of(cases()["one label"], torch.float16)
    widths = [12, 0, 0][: pool.size]  # rank 1 has no classes
    found = join_head_ranks(pool(under_autocast, head, widths, None, everywhere))
    assert_as_accurate(found, head_in_one_process(head), exact_of_head(head))
    found = join_head_ranks(pool(under_autocast, head, widths, COUNTS[pool.size][0], everywhere), of_own_rows=True)
    assert_as_accurate(found, head_in_one_process(head), exact_of_head(head))


def test_ranks_with_equal_numbers_of_rows_and_without_any_rows(pool):
    head = head_of(Case(random(6, C), labels(n=6)))
    found = join_head_ranks(pool(run_head, head, WIDTHS[pool.size], [6 // pool.size] * pool.size), of_own_rows=True)
    assert_as_accurate(found, head_in_one_process(head), exact_of_head(head))
    for reduction in ("mean", "none"):
        head = head_of(Case(random(0, C), labels(n=0), keywords={"reduction": reduction}))
        found = join_head_ranks(pool(run_head, head, WIDTHS[pool.size], [0] * pool.size), of_own_rows=True)
        assert found["loss"].isnan() if reduction == "mean" else found["loss"].shape == (0,)
        assert found["weight"].eq(0.0).all()


def test_averaging_over_ranks_multiplies_only_the_gradient_of_features(pool):
    head = head_of(cases()["one label"])
    counts = COUNTS[pool.size][0]
    plain, averaged = (
        join_head_ranks(pool(run_head, head, WIDTHS[pool.size], counts, average), of_own_rows=True)
        for average in (False, True)
    )
    assert torch.equal(averaged.pop("features"), pool.size * plain.pop("features"))
    assert all(torch.equal(averaged[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", MARGINS)
def test_heads_with_margins_are_as_accurate_as_in_one_process(pools, name):
    head = head_of(Case(random(N, C), labels(), MARGINS[name], {"weight": torch.linspace(0.5, 1.5, C)}))
    exact = head_in_one_process(head, "reference", torch.float64)
    for size, widths in ((2, [5, 7]), (3, [0, 4, 8])):
        assert_as_accurate(join_head_ranks(pools(size)(run_head, head, widths)), head_in_one_process(head), exact)
        found = join_head_ranks(pools(size)(run_head, head, widths, COUNTS[size][0]), of_own_rows=True)
        assert_as_accurate(found, head_in_one_process(head), exact)


def test_heads_run_the_kernels(pools):
    case = cases()["several labels, weight, smoothing"]
    head = head_of(case._replace(keywords={**case.keywords, "impl": "triton"}))
    assert_as_accurate(
        join_head_ranks(pools(2)(run_head, head, [5, 7])), head_in_one_process(head), exact_of_head(head)
    )
    found = join_head_ranks(pools(2)(run_head, head, [5, 7], [4, 3]), of_own_rows=True)
    assert_as_accurate(found, head_in_one_process(head), exact_of_head(head))


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


def in_a_smaller_group(case: Case) -> Any:
    """Ranks 0 and 2 hold the classes; rank 1 is not in the group."""
    group = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return None
    first, last = [(0, 5), None, (5, C)][dist.get_rank()]
    return class_parallel.class_parallel_logit_adjusted_cross_entropy(
        case.logits[:, first:last], case.target, case.prior[first:last], group=group
    )


def test_a_group_may_be_some_of_the_processes(pools):
    case = cases()["one label"]
    answers = pools(3)(in_a_smaller_group, case)
    assert_close(answers[0], exact_of(case)["loss"].float())
    assert torch.equal(answers[0], answers[2])


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


# DTensor --------------------------------------------------------------------------------------------------------------


class DTensorCase(NamedTuple):
    """A case whose logits are a DTensor on a mesh of this shape, with the classes sharded over `mesh_dim`."""

    case: Case
    mesh: tuple[int, ...]
    mesh_dim: int
    whole: bool = False  # vectors over the classes are plain tensors


def on_mesh(sharded: DTensorCase, value: Any, dim: int = 0) -> Any:
    mesh = init_device_mesh("cpu", sharded.mesh)
    placements = [Shard(dim) if i == sharded.mesh_dim else Replicate() for i in range(len(sharded.mesh))]
    return distribute_tensor(value, mesh, placements) if isinstance(value, Tensor) else value


def options_on_mesh(sharded: DTensorCase, keywords: dict[str, Any]) -> dict[str, Any]:
    return {
        name: on_mesh(sharded, value) if name in PER_CLASS_OPTIONS and not sharded.whole else value
        for name, value in keywords.items()
    }


def whole_gradients(sharded: DTensorCase, loss: Any, leaves: dict[str, Any]) -> dict[str, Any]:
    loss.backward(torch.ones_like(loss) * sharded.case.grad_loss)
    assert all(placement.is_replicate() for placement in loss.placements)
    answer = {"loss": loss.to_local().detach()}
    for name, leaf in leaves.items():
        if isinstance(leaf, DTensor):
            placed = zip(leaf.placements, sharded.mesh, strict=True)
            uneven = any(placement.is_shard() and leaf.shape[placement.dim] % n > 0 for placement, n in placed)
            gathers = torch.__version__.startswith("2.11.")  # it gathers every gradient of uneven shards
            assert leaf.grad.placements == leaf.placements or (uneven and gathers), name
        answer[name] = leaf.grad.full_tensor() if isinstance(leaf, DTensor) else leaf.grad
    return answer


def run_dtensor(sharded: DTensorCase) -> dict[str, Any]:
    case, is_margin = sharded.case, isinstance(sharded.case.prior, PairwiseMargin)
    logits = on_mesh(sharded, case.logits, 1).requires_grad_()
    target = on_mesh(sharded, case.target, 1) if case.target.is_floating_point() and not sharded.whole else case.target
    leaves = {"logits": logits}
    if is_margin:
        prior, loss_of = case.prior, fused_la.margin_cross_entropy
    else:
        prior = case.prior if sharded.whole else on_mesh(sharded, case.prior).requires_grad_()
        loss_of = fused_la.logit_adjusted_cross_entropy
        leaves |= {} if sharded.whole else {"log_prior": prior}
    loss = loss_of(logits, target, prior, **options_on_mesh(sharded, case.keywords))
    return whole_gradients(sharded, loss, leaves)


def run_head_dtensor(sharded: DTensorCase, head: Head) -> dict[str, Any]:
    case = sharded.case
    features = head.features.clone().requires_grad_()
    if not sharded.whole:
        features = distribute_tensor(
            head.features, init_device_mesh("cpu", sharded.mesh), [Replicate()] * len(sharded.mesh)
        )
        features.requires_grad_()
    weight = on_mesh(sharded, head.weight).requires_grad_()
    bias = on_mesh(sharded, head.bias).requires_grad_()
    keywords = options_on_mesh(sharded, head_keywords(case.keywords))
    leaves = {"features": features, "weight": weight, "bias": bias}
    if isinstance(case.prior, PairwiseMargin):
        loss = fused_la.linear_margin_cross_entropy(features, weight, case.target, case.prior, bias=bias, **keywords)
    else:
        prior = case.prior if sharded.whole else on_mesh(sharded, case.prior).requires_grad_()
        leaves |= {} if sharded.whole else {"log_prior": prior}
        loss = fused_la.linear_logit_adjusted_cross_entropy(features, weight, case.target, prior, bias=bias, **keywords)
    return whole_gradients(sharded, loss, leaves)


DTENSOR_CASES = (
    "one label", "none", "smoothing toward the prior", "several labels, weight, smoothing",
    "probabilities, weight, smoothing", "pixels, none",
)  # fmt: skip


def assert_of_dtensors(answers: list[dict[str, Any]], single: dict[str, Any], exact: dict[str, Any]) -> None:
    for answer in answers:
        assert not isinstance(answer, Failed), answer
        assert_as_accurate(answer, {k: single[k] for k in answer}, {k: exact[k] for k in answer})


@pytest.mark.parametrize("whole", [False, True], ids=["sharded vectors", "whole vectors"])
@pytest.mark.parametrize("name", DTENSOR_CASES)
def test_dtensor_logits_are_as_accurate_as_in_one_process(pools, name, whole):
    """2 ranks shard over the second of two mesh dimensions, 3 ranks over the only one."""
    for size, mesh, mesh_dim in ((2, (1, 2), 1), (3, (3,), 0)):
        case = cases()[name]
        case = case._replace(grad_loss=2.0)
        answers = pools(size)(run_dtensor, DTensorCase(case, mesh, mesh_dim, whole))
        assert_of_dtensors(answers, one_process(case), exact_of(case))


def test_dtensors_of_fewer_classes_than_ranks_and_of_a_margin(pools):
    case = Case(random(N, 2), labels(high=2), PRIOR[:2], {"label_smoothing": 0.1})
    assert_of_dtensors(pools(3)(run_dtensor, DTensorCase(case, (3,), 0)), one_process(case), exact_of(case))
    case = Case(random(N, 10), labels(high=10), margins.adaptive(PRIOR[:10]))
    exact = one_process(case, torch.float64, "reference")
    assert_of_dtensors(pools(3)(run_dtensor, DTensorCase(case, (3,), 0)), one_process(case), exact)


@pytest.mark.parametrize("name", ["one label", "none", "several labels, weight, smoothing"])
def test_heads_with_a_dtensor_as_weight_are_as_accurate_as_in_one_process(pools, name):
    case = cases()[name]._replace(grad_loss=2.0)
    head = head_of(case)
    for size, mesh, mesh_dim, whole in ((2, (2, 1), 0, False), (3, (1, 3), 1, True)):
        answers = pools(size)(run_head_dtensor, DTensorCase(case, mesh, mesh_dim, whole), head)
        assert_of_dtensors(answers, head_in_one_process(head), exact_of_head(head))
    head = head_of(Case(random(N, C), labels(), margins.adaptive(PRIOR)))
    answers = pools(2)(run_head_dtensor, DTensorCase(head.case, (2,), 0), head)
    assert_of_dtensors(answers, head_in_one_process(head), head_in_one_process(head, "reference", torch.float64))


def call_with_dtensors(kind: str) -> Any:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 1))
    one, both = [Shard(1), Replicate()], [Shard(1), Shard(1)]
    logits = distribute_tensor(random(N, 6), mesh, both if kind == "two dimensions" else one)
    if kind == "partial":
        logits = DTensor.from_local(random(N, 6), mesh, [Partial(), Replicate()])
    if kind == "rows":
        logits = distribute_tensor(random(6, 6), mesh, [Shard(0), Replicate()])
    prior = torch.zeros(5 if kind == "length on rank 1" and rank == 1 else 6)
    if kind == "learned":
        prior.requires_grad_()
    if kind == "sharded otherwise":
        prior = distribute_tensor(prior, mesh, [Replicate(), Shard(0)])
    fused_la.logit_adjusted_cross_entropy(logits, labels(high=6)[: len(logits)], prior)


WRONG_PLACEMENTS = (
    "logits must be a DTensor with Shard(1), its classes, on one mesh dimension and Replicate() on all others, got "
)


@pytest.mark.parametrize(
    ("kind", "messages"),
    [
        ("two dimensions", [WRONG_PLACEMENTS + "(Shard(dim=1), Shard(dim=1))"] * 2),
        ("partial", [WRONG_PLACEMENTS + "(Partial(sum), Replicate())"] * 2),
        ("rows", [WRONG_PLACEMENTS + "(Shard(dim=0), Replicate())"] * 2),
        ("learned", ["log_prior must be a DTensor that is sharded as logits is to get a gradient, got a "
                     "whole tensor"] * 2),
        ("sharded otherwise", ["log_prior must be sharded as the classes of logits are, (Shard(dim=0), Replicate()) on "
                               "their mesh, got (Replicate(), Shard(dim=0))"] * 2),
        ("length on rank 1", ["rank 1 raised an error in logit_adjusted_cross_entropy: log_prior must have 6 classes, "
                              "got shape (5,)", "log_prior must have 6 classes, got shape (5,)"]),
    ],
)  # fmt: skip
def test_other_dtensors_are_refused_on_every_rank(pools, kind, messages):
    assert pools(2)(call_with_dtensors, kind) == [Failed("ValueError", message) for message in messages]


# The rest of a model --------------------------------------------------------------------------------------------------


def make_trunk() -> torch.nn.Module:
    torch.manual_seed(11)
    return torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, D))


INPUTS = random(N, 3, seed=12)
STEPS = 3


def train(wrap: str | None, counts: list[int], widths: list[int]) -> dict[str, Tensor]:
    """A few steps of a trunk, whose gradients a wrapper averages over ranks, and a head with its classes over ranks."""
    rank = dist.get_rank()
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    first, last = class_range(widths)
    model = make_trunk()
    weight = torch.nn.Parameter(random(C, D, seed=7)[first:last].clone())
    if wrap == "DDP":
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD([*model.parameters(), weight], 0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = class_parallel.class_parallel_linear_logit_adjusted_cross_entropy(
            model(INPUTS[own]), weight, labels()[own], PRIOR[first:last], gather_features=True, average_over_ranks=True
        )
        loss.backward()
        optimizer.step()
    trunk_parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return {"loss": loss.detach(), "trunk": torch.cat([p.detach().flatten() for p in trunk_parameters]),
            "weight": weight.detach()}  # fmt: skip


def train_alone() -> dict[str, Tensor]:
    model, weight = make_trunk(), torch.nn.Parameter(random(C, D, seed=7))
    optimizer = torch.optim.SGD([*model.parameters(), weight], 0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(model(INPUTS), weight) + PRIOR, labels())
        loss.backward()
        optimizer.step()
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {"loss": loss.detach(), "trunk": parameters, "weight": weight.detach()}


@pytest.mark.parametrize("wrap", ["DDP", "FSDP2"])
def test_a_trunk_under_ddp_or_fsdp2_trains_as_in_one_process(pools, wrap):
    answers = pools(2)(train, wrap, [5, 2], [5, 7])
    alone = train_alone()
    for answer in answers:
        assert not isinstance(answer, Failed), answer
        assert_close(answer["loss"], alone["loss"])
        assert_close(answer["trunk"], alone["trunk"])
    assert_close(torch.cat([answer["weight"] for answer in answers]), alone["weight"])


# Heads as modules -----------------------------------------------------------------------------------------------------

HEAD_COUNTS = [400, 90, 10, 5, 3, 0, 2]


def sharded_head(cosine: bool, bias: bool) -> Any:
    """A head of 7 classes, the same head with its classes over the ranks, and the mesh."""
    torch.manual_seed(3)
    head = fused_la.LogitAdjustedLinear(D, HEAD_COUNTS, cosine=cosine, bias=bias, exclude_absent=True)
    with torch.no_grad():
        head.weight[5] *= 100  # an excluded class
    over_ranks = copy.deepcopy(head)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, parameter in list(head.named_parameters()):
        setattr(over_ranks, name, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    return head, over_ranks, mesh


def logits_and_predictions(cosine: bool, bias: bool) -> Any:
    head, over_ranks, mesh = sharded_head(cosine, bias)
    features = random(2, 9, D)
    copies = DTensor.from_local(features, mesh, [Replicate()], run_check=False)
    logits, predicted = over_ranks(copies), over_ranks.predict(copies)
    assert logits.placements == (Shard(2),)
    assert predicted.placements == (Replicate(),)
    logits.full_tensor().logsumexp(-1).sum().backward()
    head(features).logsumexp(-1).sum().backward()
    grads = [(a.grad.full_tensor(), b.grad) for a, b in zip(over_ranks.parameters(), head.parameters(), strict=True)]
    loss = over_ranks(features.flatten(0, 1), torch.arange(18) % 5)
    assert_close(loss.full_tensor(), head(features.flatten(0, 1), torch.arange(18) % 5))
    return logits.full_tensor(), head(features), predicted.to_local(), head.predict(features), grads


@pytest.mark.parametrize(("cosine", "bias"), [(False, True), (True, True), (False, False)])
def test_a_head_whose_classes_are_sharded_has_logits_and_predicts(pools, cosine, bias):
    for size in (2, 3):
        for answer in pools(size)(logits_and_predictions, cosine, bias):
            assert not isinstance(answer, Failed), answer
            logits, logits_of_one, predicted, predicted_of_one, grads = answer
            assert_close(logits, logits_of_one)
            assert torch.equal(predicted, predicted_of_one)
            assert torch.equal(predicted, logits.argmax(-1))
            for found, right in grads:
                assert_close(found, right)


def predict_with_few(n_classes: int) -> Any:
    torch.manual_seed(3)
    head = fused_la.LogitAdjustedLinear(D, [1] * n_classes)
    with torch.no_grad():
        head.bias -= 10.0  # below 0, which a rank without classes might report
    mesh, features = init_device_mesh("cpu", (dist.get_world_size(),)), random(9, D)
    want = head.predict(features)
    for name, parameter in list(head.named_parameters()):
        setattr(head, name, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    return head.predict(DTensor.from_local(features, mesh, [Replicate()], run_check=False)).to_local(), want


@pytest.mark.parametrize("n_classes", [1, 4])
def test_predictions_are_right_with_ranks_without_classes(pools, n_classes):
    for answer in pools(3)(predict_with_few, n_classes):
        assert not isinstance(answer, Failed), answer
        assert torch.equal(*answer)


def predict_ties_and_nan() -> Tensor:
    """Predictions for a largest logit that two ranks share, and for NaN on both."""
    _, over_ranks, mesh = sharded_head(False, False)
    weight = torch.zeros(7, D)
    weight[1, 0] = weight[6, 0] = 1.0  # a tie of two ranks
    weight[4, 1] = weight[6, 1] = float("nan")
    over_ranks.weight = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    features = DTensor.from_local(torch.eye(D)[:2], mesh, [Replicate()], run_check=False)
    return over_ranks.predict(features).to_local()


def test_ties_over_ranks_go_to_the_lowest_class_and_nan_is_the_largest(pools):
    for answer in pools(2)(predict_ties_and_nan):
        assert answer.tolist() == [4, 4]  # NaN times 0 is NaN


def with_plain_features(call: str) -> Any:
    _, over_ranks, _ = sharded_head(False, True)
    return over_ranks.predict(random(3, D)) if call == "predict" else over_ranks(random(3, D))


@pytest.mark.parametrize("call", ["predict", "logits"])
def test_a_sharded_head_refuses_plain_features(pools, call):
    for answer in pools(2)(with_plain_features, call):
        assert answer.kind == "TypeError"
        assert "features must be a DTensor with Replicate()" in answer.message
        assert 'register_fsdp_forward_method(head, "predict")' in answer.message


def train_from_meta_device(registered: bool) -> Any:
    """Shard a model on the meta device, allocate and initialise it; then a step, logits and predictions."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with torch.device("meta"):
        model = torch.nn.ModuleDict(
            {
                "trunk": torch.nn.Linear(D, D),
                "head": fused_la.LogitAdjustedLinear(D, HEAD_COUNTS, pseudocount=1, class_weight=[1.0] * 7),
                "criterion": fused_la.LogitAdjustedCrossEntropyLoss(HEAD_COUNTS, pseudocount=1, weight=[2.0] * 7),
            }
        )
    for name in ("trunk", "head"):
        fully_shard(model[name], mesh=mesh)
    if registered:
        register_fsdp_forward_method(model["head"], "predict")
    model.to_empty(device="cpu")
    torch.manual_seed(4)
    for module in model.children():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    whole = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    own = random(4, D, seed=dist.get_rank())
    features = model["trunk"](own)
    loss = model["head"](features, torch.tensor([0, 1, 2, 6]))
    by_logits = model["criterion"](model["head"](features), torch.tensor([0, 1, 2, 6]))
    (loss + by_logits).backward()
    predicted = model["head"].predict(features.detach())
    logits = F.linear(
        F.linear(own, whole["trunk.weight"], whole["trunk.bias"]), whole["head.weight"], whole["head.bias"]
    )
    return loss.detach(), by_logits.detach(), predicted, logits.detach()


def test_a_model_on_the_meta_device_is_sharded_and_initialised_by_fsdp2(pools):
    prior = [(n + 1) / (sum(HEAD_COUNTS) + 7) for n in HEAD_COUNTS]
    answers = pools(2)(train_from_meta_device, True)
    assert not torch.equal(answers[0][3], answers[1][3])  # ranks have rows of their own
    for loss, by_logits, predicted, logits in answers:
        want = oracle.truth(logits, torch.tensor([0, 1, 2, 6]), torch.tensor(prior, dtype=torch.float64).log()).loss
        assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
        assert_close(by_logits.double(), want, rtol=1e-5, atol=1e-6)
        assert torch.equal(predicted, logits.argmax(1))
    for answer in pools(2)(train_from_meta_device, False):
        assert answer.kind == "TypeError"
        assert 'register_fsdp_forward_method(head, "predict")' in answer.message


def compiled_step(case: Case, widths: list[int]) -> Any:
    """Compile a step around a call: (is its gradient right, number of graphs, is fullgraph refused)."""
    from torch._dynamo.testing import CompileCounter

    first, last = class_range(widths)
    weight = torch.linspace(0.5, 1.5, last - first).requires_grad_()
    logits, prior = case.logits[:, first:last], case.prior[first:last]

    def step(logits: Tensor) -> Tensor:
        z = (logits * weight).tanh()
        loss = class_parallel.class_parallel_logit_adjusted_cross_entropy(z, case.target, prior)
        return 2.0 * loss.square()

    expected = torch.autograd.grad(step(logits), weight)[0]
    counter = CompileCounter()
    loss = torch.compile(step, backend=counter)(logits)
    (found,) = torch.autograd.grad(loss, weight)
    try:
        torch.compile(step, backend="eager", fullgraph=True)(logits)
    except torch._dynamo.exc.Unsupported as error:
        return torch.equal(found, expected), counter.frame_count, "torch.compiler.disable" in str(error)


def test_a_compiled_step_breaks_its_graph_at_the_call_and_nowhere_else(pools):
    assert pools(2)(compiled_step, cases()["one label"], [5, 7]) == [(True, 2, True)] * 2


def test_importing_the_package_does_not_import_its_distributed_modules():
    script = (
        "import sys, fused_la; before = set(sys.modules); fused_la.distributed; "
        "print([m for m in before if m.startswith(('fused_la.distributed', 'fused_la._class_parallel.exchange', "
        "'torch.distributed.tensor'))], "
        "'torch._dynamo' in sys.modules)"
    )
    root = os.path.dirname(os.path.dirname(fused_la.__file__))
    environment = {**os.environ, "PYTHONPATH": root}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[] False"
