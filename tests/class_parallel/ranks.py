"""Pools of gloo processes, and cases of losses with classes over their ranks, with exact results and tolerances.

The processes of a pool start once and run functions of this folder's files, one call at a time, the same on every rank.
A pool continues after an error. That is tested too: a rank that still waited for another would receive the next call's
message. No rank waits longer than TIMEOUT, which is long because a process may take a minute to import PyTorch on a
busy machine.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
from datetime import timedelta
from typing import Any, NamedTuple

import oracle
import torch
import torch.distributed as dist
from torch import Tensor

import fused_la
from fused_la import PairwiseMargin

TIMEOUT = 120.0  # seconds for which a rank waits for another


# Processes ------------------------------------------------------------------------------------------------------------


def run_worker(rank: int, size: int, store: str, pipe: Any) -> None:
    """Loop of a process: call each function that arrives, and send back its result, or its error's type and message."""
    import conftest  # noqa: F401 - it sets up Triton's interpreter

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
