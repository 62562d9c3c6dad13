"""DTensors sharded over their classes, heads whose parameters are such DTensors, and models under DDP and FSDP2."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing import assert_close

import fused_la
from fused_la import PairwiseMargin, margins
from fused_la import distributed as class_parallel

from .ranks import (
    PER_CLASS_OPTIONS,
    PRIOR,
    C,
    Case,
    D,
    Failed,
    Head,
    N,
    assert_as_accurate,
    cases,
    class_range,
    exact_of,
    exact_of_head,
    head_in_one_process,
    head_keywords,
    head_of,
    labels,
    one_process,
    random,
)

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
