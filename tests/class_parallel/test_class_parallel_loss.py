"""Losses of logits and of heads with classes over 2 and 3 ranks, against one process with all classes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import slow
from torch import Tensor
from torch.testing import assert_close

import fused_la
from fused_la import PairwiseMargin, margins
from fused_la import distributed as class_parallel

from .ranks import (
    PRIOR,
    WIDTHS,
    C,
    Case,
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
    shard_keywords,
    slice_classes,
)

# Logits ---------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", [slow(name) if i % 2 else name for i, name in enumerate(TRITON_CASES)])
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
    [*((name, "blocked") for name in MARGINS), ("consistent", "triton"), slow("scaled and shifted", "triton")],
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


# Groups, torch.compile and imports ------------------------------------------------------------------------------------


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
