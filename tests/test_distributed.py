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
from datetime import timedelta
from typing import Any, NamedTuple

import oracle
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

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


@contextlib.contextmanager
def small_tiles():
    """Several tiles of rows and classes in every case."""
    from fused_la import _head

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_head, "choose_tiles", lambda rows, *_: _head.Tiles(max(1, min(rows, 3)), 4))
        yield


def run_logits(case: Case, widths: list[int]) -> dict[str, Any]:
    """Loss and gradients on one rank."""
    first, last = classes_of(widths)
    logits = of_rank(case.logits, first, last, 1).requires_grad_()
    prior = of_rank(case.prior, first, last)
    target = of_rank(case.target, first, last, 1) if case.target.is_floating_point() else case.target
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


def test_the_part_of_a_rank_without_labels_or_classes_is_not_a_special_case(pool):
    """Ranks without classes: loss, gradients, and their own gradients of shape (N, 0)."""
    widths = {2: [0, C], 3: [C, 0, 0]}[pool.size]
    chosen = ["one label", "tau 0", "smoothing", "smoothing toward the prior", "probabilities, weight, smoothing"]
    for name in chosen:
        case = cases()[name]
        answers = pool(run_logits, case, widths)
        assert_as_good(joined(answers), one_process(case), exact_of(case))
        without = answers[widths.index(0)]
        assert without["logits"].shape == (N, 0)


# The kernels, and the family ------------------------------------------------------------------------------------------


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
def test_the_kernels_serve_ranks_as_well(pools, name):
    """In Triton's interpreter; the pool has a device only where there is none."""
    case = cases()[name]
    case = case._replace(keywords={**case.keywords, "impl": "triton"})
    assert_as_good(joined(pools(2)(run_logits, case, WIDTHS[2])), one_process(case), exact_of(case))


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


@pytest.mark.parametrize("impl", ["blocked", "triton"])
@pytest.mark.parametrize("name", MARGINS)
def test_margins_over_ranks_are_those_of_one_process(pools, name, impl):
    """Alpha and offsets of a label are with the rank that holds its class; the float64 reference is the truth."""
    several = torch.stack([labels(1), labels(2)], 1)
    several[0] = several[0, 0]  # the two are one class
    weight = torch.linspace(0.5, 1.5, C)
    for target, keywords in (
        (labels(), {}),
        (labels(), {"weight": weight, "reduction": "sum"}),
        (several, K_LABELS | {"weight": weight, "ignore_index": int(several[2, 1])}),
    ):
        case = Case(2.0 * random(N, C), target, MARGINS[name], {**keywords, "impl": impl})
        for size in (2,) if impl == "triton" else (2, 3):
            found = joined(pools(size)(run_logits, case, WIDTHS[size]))
            exact = one_process(case, torch.float64, "reference")
            assert_as_good(found, one_process(case, impl=impl), exact)


def test_a_margin_serves_a_rank_without_classes(pool):
    widths = {2: [C, 0], 3: [0, 5, 7]}[pool.size]
    for name in ("adaptive", "erm", "balanced", "scaled and shifted"):
        case = Case(2.0 * random(N, C), labels(), MARGINS[name])
        exact = one_process(case, torch.float64, "reference")
        assert_as_good(joined(pool(run_logits, case, widths)), one_process(case), exact)


# Heads ----------------------------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """A case at head level: features (N, D), weight (C, D), bias (C,)."""

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
    first, last = classes_of(widths)
    case = head.case
    features, weight = head.features.clone(), of_rank(head.weight, first, last).requires_grad_()
    bias = None if head.bias is None else of_rank(head.bias, first, last).requires_grad_()
    prior = of_rank(case.prior, first, last)
    target = of_rank(case.target, first, last, 1) if case.target.is_floating_point() else case.target
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


def joined_head(answers: list[dict[str, Any]], of_own_rows: bool = False) -> dict[str, Any]:
    """Features' gradients are whole on every rank, or those of its own rows, as losses then may be."""
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
    return {**joined(same), "features": rows_of["features"]}


def head_in_one(head: Head, impl: str = "blocked", dtype: torch.dtype | None = None) -> dict[str, Any]:
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
    """The oracle's gradient of the logits, and what the product makes of it."""
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
def test_heads_over_ranks_are_as_good_as_in_one_process(pool, name):
    for bias, dtype in ((True, torch.float32), (False, torch.float64), (True, torch.bfloat16)):
        head = head_of(cases()[name], dtype, bias)
        found = joined_head(pool(run_head, head, WIDTHS[pool.size]))
        assert_as_good(found, head_in_one(head), exact_of_head(head))


COUNTS = {2: [[5, 2], [0, 7]], 3: [[3, 4, 0], [2, 2, 3]]}  # rows of each rank


@pytest.mark.parametrize(
    "name",
    ["one label", "none", "ignored", "upstream", "several labels, weight, smoothing", "a rank's classes are out"],
)
def test_ranks_with_rows_of_their_own_share_a_head(pool, name):
    """Rows are uneven, a rank may have none; 2-byte features travel with 8-byte labels."""
    for counts, dtype in zip(COUNTS[pool.size], (torch.float32, torch.bfloat16), strict=True):
        head = head_of(cases()[name], dtype)
        found = joined_head(pool(run_head, head, WIDTHS[pool.size], counts), of_own_rows=True)
        assert_as_good(found, head_in_one(head), exact_of_head(head))


def test_features_of_even_ranks_and_of_no_rows_at_all(pool):
    head = head_of(Case(random(6, C), labels(n=6)))
    found = joined_head(pool(run_head, head, WIDTHS[pool.size], [6 // pool.size] * pool.size), of_own_rows=True)
    assert_as_good(found, head_in_one(head), exact_of_head(head))
    head = head_of(Case(random(0, C), labels(n=0)))
    found = joined_head(pool(run_head, head, WIDTHS[pool.size], [0] * pool.size), of_own_rows=True)
    assert found["loss"].isnan()
    assert found["weight"].eq(0.0).all()


def test_averaging_over_ranks_multiplies_the_features_gradient_alone(pool):
    head = head_of(cases()["one label"])
    counts = COUNTS[pool.size][0]
    plain, averaged = (
        joined_head(pool(run_head, head, WIDTHS[pool.size], counts, average), of_own_rows=True)
        for average in (False, True)
    )
    assert torch.equal(averaged.pop("features"), pool.size * plain.pop("features"))
    assert all(torch.equal(averaged[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", MARGINS)
def test_heads_with_margins_are_those_of_one_process(pools, name):
    head = head_of(Case(random(N, C), labels(), MARGINS[name], {"weight": torch.linspace(0.5, 1.5, C)}))
    exact = head_in_one(head, "reference", torch.float64)
    for size, widths in ((2, [5, 7]), (3, [0, 4, 8])):
        assert_as_good(joined_head(pools(size)(run_head, head, widths)), head_in_one(head), exact)
        found = joined_head(pools(size)(run_head, head, widths, COUNTS[size][0]), of_own_rows=True)
        assert_as_good(found, head_in_one(head), exact)


def test_heads_run_the_kernels(pools):
    case = cases()["several labels, weight, smoothing"]
    head = head_of(case._replace(keywords={**case.keywords, "impl": "triton"}))
    assert_as_good(joined_head(pools(2)(run_head, head, [5, 7])), head_in_one(head), exact_of_head(head))
    found = joined_head(pools(2)(run_head, head, [5, 7], [4, 3]), of_own_rows=True)
    assert_as_good(found, head_in_one(head), exact_of_head(head))
