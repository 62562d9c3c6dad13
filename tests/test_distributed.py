"""Classes over ranks against one process that has them all: 2 and 3 processes on gloo, their loss and every gradient.

A pool of processes for each world size runs one function of this file after the other, the same on every rank, so each
test is a call of its own and the processes start once. After an error the pool goes on: that it does is part of what
is tested, for a rank that still waited for another would get its next message. Nobody waits longer than TIMEOUT.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import time
from datetime import timedelta
from typing import Any, NamedTuple

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import fused_la
from fused_la import PairwiseMargin, margins
from fused_la import distributed as class_parallel

TIMEOUT = 30.0  # seconds for which a rank waits for another


# Processes ------------------------------------------------------------------------------------------------------------


def serve(rank: int, size: int, store: str, timeout: float, pipe: Any) -> None:
    """What a process does: call what it is sent, and send back the result, or the error's type and words."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    while (message := pickle.loads(pipe.recv_bytes())) is not None:
        function, arguments = message
        try:
            answer = function(*arguments)
        except Exception as error:
            answer = Failed(type(error).__name__, str(error))
        pipe.send_bytes(pickle.dumps(answer))  # plain pickle: tensors by value, not in shared memory
    dist.destroy_process_group()


class Failed(NamedTuple):
    kind: str
    message: str


class Pool:
    def __init__(self, size: int, store: str, timeout: float = TIMEOUT):
        self.size, self.timeout = size, timeout
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, size, store, timeout, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def __call__(self, function: Any, *arguments: Any) -> list[Any]:
        """The answer of every rank; arguments in a list of as many as there are ranks are one for each."""
        self.send(function, *arguments)
        return [self.receive(rank) for rank in range(self.size)]

    def send(self, function: Any, *arguments: Any) -> None:
        for rank, pipe in enumerate(self.pipes):
            own = [argument[rank] if isinstance(argument, Each) else argument for argument in arguments]
            pipe.send_bytes(pickle.dumps((function, own)))

    def receive(self, rank: int) -> Any:
        assert self.pipes[rank].poll(2 * self.timeout + 30), f"rank {rank} does not answer"
        return pickle.loads(self.pipes[rank].recv_bytes())

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(pickle.dumps(None))
        for process in self.processes:
            process.join(10)
            process.kill()


class Each(list):
    """Arguments that differ from rank to rank."""


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
OF_CLASSES = ("weight", "class_weight", "smoothing_distribution")


class Case(NamedTuple):
    """The arguments of one process; a rank takes its classes of them."""

    logits: Tensor
    target: Tensor
    prior: Tensor | PairwiseMargin = PRIOR
    keywords: dict[str, Any] = {}  # noqa: RUF012
    grad_loss: Tensor | float = 1.0


def of_rank(value: Any, first: int, last: int, dim: int = 0) -> Any:
    if isinstance(value, PairwiseMargin):
        return value.of_classes(first, last)
    return value.narrow(dim, first, last - first).clone() if isinstance(value, Tensor) else value


def classes_of(widths: list[int]) -> tuple[int, int]:
    rank = dist.get_rank()
    return sum(widths[:rank]), sum(widths[: rank + 1])


def shard_keywords(keywords: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    return {name: of_rank(value, first, last) if name in OF_CLASSES else value for name, value in keywords.items()}


def small_tiles() -> Any:
    """Several tiles of rows and classes in every case."""
    return pytest.MonkeyPatch.context()


def run_logits(case: Case, widths: list[int], small: bool = True) -> dict[str, Any]:
    """Loss and gradients on one rank."""
    from fused_la import _head

    first, last = classes_of(widths)
    logits = of_rank(case.logits, first, last, 1).requires_grad_()
    prior = of_rank(case.prior, first, last)
    target = of_rank(case.target, first, last, 1) if case.target.is_floating_point() else case.target
    is_margin = isinstance(prior, PairwiseMargin)
    loss_of = (
        class_parallel.class_parallel_margin_cross_entropy
        if is_margin
        else class_parallel.class_parallel_logit_adjusted_cross_entropy
    )
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(_head, "choose_tiles", lambda rows, classes, *_: _head.Tiles(max(1, min(rows, 3)), 4))
        loss = loss_of(
            logits, target, prior if is_margin else prior.requires_grad_(), **shard_keywords(case.keywords, first, last)
        )
        loss.backward(torch.as_tensor(case.grad_loss, dtype=loss.dtype).expand_as(loss))
    answer = {"loss": loss.detach(), "logits": logits.grad}
    return answer if is_margin else {**answer, "log_prior": prior.grad}


def joined(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """What one process would have: the ranks' losses, which are one, and their gradients side by side."""
    for answer in answers:
        assert not isinstance(answer, Failed), answer
        assert torch.equal(answer["loss"].nan_to_num(-7), answers[0]["loss"].nan_to_num(-7))
    whole = {"loss": answers[0]["loss"]}
    for name, dim in (("logits", 1), ("log_prior", 0), ("weight", 0), ("bias", 0)):
        if name in answers[0]:
            whole[name] = torch.cat([a[name] for a in answers if a[name] is not None], dim)
    return whole


def one_process(case: Case, dtype: torch.dtype | None = None, impl: str = "blocked") -> dict[str, Any]:
    logits = case.logits.to(dtype or case.logits.dtype).requires_grad_()
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


def assert_as_good(found: dict[str, Any], single: dict[str, Any], exact: dict[str, Any]) -> None:
    """No further from the truth than twice what one process is, and a few roundings of the largest number."""
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
    several = torch.stack([labels(1), labels(2), labels(2)], 1)  # two of a row are one class
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


@pytest.mark.parametrize("name", cases())
def test_logits_over_ranks_are_as_good_as_in_one_process(pool, name):
    case = cases()[name]
    found = joined(pool(run_logits, case, WIDTHS[pool.size]))
    assert_as_good(found, one_process(case), exact_of(case))
