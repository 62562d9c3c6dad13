"""A prior for each group of rows: `log_prior` and `smoothing_distribution` of shape (G, C), with a group for each row;
and a factor of the logits for each row, `label_scale`, in heads.

Losses and gradients are compared with the oracle, which looks up the prior of every row. The tolerances are those of
`test_accuracy.py`. Groups are neither sorted nor all present, and a class may be excluded in one group alone.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, slow
from oracle import Truth, truth
from test_accuracy import assert_as_accurate, randn
from torch import Tensor, nn

import fused_la
from fused_la import (
    LogitAdjustedCrossEntropyLoss,
    LogitAdjustedLinear,
    adjust_logits,
    linear_logit_adjusted_cross_entropy,
    logit_adjusted_cross_entropy,
)
from fused_la.posthoc import TauSweep, divide_by_prior

INF = math.inf
WIDER = [((5, 300), torch.bfloat16), ((3, 1030), torch.float32), ((6, 37), torch.float64)]
TARGETS = ("label", "two labels", "probabilities", "class weights", "smoothing", "smoothing toward the prior")


def priors_of(n_groups: int, n_classes: int, excluded: bool = True) -> Tensor:
    """Random log priors (G, C); with three or more classes, some are excluded in one group each."""
    log_prior = (2.0 * torch.randn(n_groups, n_classes)).log_softmax(1)
    if excluded and n_classes >= 3:
        log_prior[0, 1] = log_prior[-1, n_classes - 1] = -INF
    return log_prior.to(DEVICE)


def groups_of(n_rows: int, n_groups: int) -> Tensor:
    return torch.randint(n_groups, (n_rows,)).to(DEVICE)


def labels_of(log_prior: Tensor, group: Tensor) -> Tensor:
    """A label for each row that is not excluded in its group."""
    return log_prior[group].exp().multinomial(1).squeeze(1)


def call_of(kind: str, n_rows: int, n_classes: int, n_groups: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """(log_prior, group, target, options) of one of TARGETS; with labels, one row does not count."""
    log_prior = priors_of(n_groups, n_classes, excluded=kind != "smoothing")
    group = groups_of(n_rows, n_groups)
    target, options = labels_of(log_prior, group), {}
    if n_rows > 2:
        target[1] = -100
    if kind == "two labels":
        target = torch.stack([target, labels_of(log_prior, group)], 1)
        options["target_weight"] = torch.rand(n_rows, 2, device=DEVICE)
    elif kind == "probabilities":
        target = torch.rand(n_rows, n_classes, device=DEVICE) * (log_prior[group] > -INF)
        target = target / target.sum(1, keepdim=True)
    elif kind == "class weights":
        options["weight"] = torch.rand(n_classes, device=DEVICE) + 0.5
    elif kind.startswith("smoothing"):
        options["label_smoothing"] = 0.1
        if kind != "smoothing":
            options["smoothing_distribution"] = log_prior.softmax(1)
    return log_prior, group, target, options


def measure(loss: Tensor, leaves: list[Tensor], upstream: Tensor | float) -> list[Tensor]:
    upstream = torch.as_tensor(upstream, device=loss.device).to(loss).expand_as(loss)
    return [value.detach().cpu().double() for value in (loss, *torch.autograd.grad(loss, leaves, upstream))]


def check(impl: str, logits: Tensor, target: Tensor, log_prior: Tensor, group: Tensor, **options: Any) -> None:
    """Compare with the oracle: a learned prior with reduction "none", a constant one with "mean" and "sum"."""
    rows = logits.shape[:1] + logits.shape[2:]
    given, group = group, group.view(*group.shape, *[1] * (len(rows) - group.dim())).expand(rows)
    baseline = "reference" if options.keys() & {"target_weight", "smoothing_distribution"} else "eager"
    for reduction, upstream in (("none", torch.randn(rows)), ("mean", 1.0), ("sum", torch.randn(()))):
        found = {}
        for who in (impl, baseline):
            x = logits.detach().requires_grad_()
            prior = log_prior.detach().requires_grad_(reduction == "none")
            if who == "eager":
                wide = x.double() if x.dtype == torch.float64 else x.float()
                z = wide + 0.7 * prior[group].movedim(-1, 1)
                given_weight = {"weight": options["weight"].to(wide.dtype)} if "weight" in options else {}
                loss = F.cross_entropy(z, target, reduction=reduction, **(options | given_weight))
            else:
                loss = logit_adjusted_cross_entropy(
                    x, target, prior, 0.7, group=given, reduction=reduction, impl=who, **options
                )
            values = measure(loss, [x, prior] if reduction == "none" else [x], upstream)
            found[who] = Truth(*values, *[torch.empty(0)] * (3 - len(values)))
        exact = truth(logits, target, log_prior, 0.7, group=group, reduction=reduction, grad_loss=upstream, **options)
        assert_as_accurate(found[impl], exact, found[baseline], logits.dtype)


# Losses of logits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((7, 10), torch.float32), *(slow(*case) for case in WIDER)],
    ids=str,
)
def test_every_row_has_the_prior_of_its_group(impl, kind, shape, dtype):
    log_prior, group, target, options = call_of(kind, *shape, n_groups=3)
    check(impl, randn(*shape, dtype=dtype), target, log_prior, group, **options)


@pytest.mark.parametrize(("n_classes", "n_groups"), [(1, 2), (2, 1), (3, 5), (256, 2), (1030, 3)])
def test_numbers_of_groups_and_classes(impl, n_classes, n_groups):
    log_prior, group, target, _ = call_of("label", 9, n_classes, n_groups)
    check(impl, randn(9, n_classes), target, log_prior, group)


def test_a_wide_row_streams(impl):
    log_prior, group, target, _ = call_of("label", 3, 17_000, 2)
    logits = randn(3, 17_000)
    x = logits.requires_grad_()
    loss = logit_adjusted_cross_entropy(x, target, log_prior, group=group, impl=impl)
    exact = truth(logits, target, log_prior, group=group)
    torch.testing.assert_close(loss.double().cpu(), exact.loss, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0].double().cpu(), exact.grad_logits, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("per_sample", [True, False])
def test_images_have_a_group_a_sample_or_a_position(impl, per_sample):
    logits, n_groups = randn(4, 11, 2, 3), 3
    log_prior = priors_of(n_groups, 11, excluded=False)
    group = torch.randint(n_groups, (4,) if per_sample else (4, 2, 3)).to(DEVICE)
    target = torch.randint(11, (4, 2, 3)).to(DEVICE)
    target[0, 1, 2] = -100
    check(impl, logits, target, log_prior, group)


def test_one_vector_of_logits_has_one_group(impl):
    log_prior, logits = priors_of(3, 5, excluded=False), randn(5)
    loss = logit_adjusted_cross_entropy(
        logits, torch.tensor(4, device=DEVICE), log_prior, group=torch.tensor(2, device=DEVICE), impl=impl
    )
    torch.testing.assert_close(loss, F.cross_entropy(logits + log_prior[2], torch.tensor(4, device=DEVICE)))


def test_the_gradient_of_many_rows_of_few_groups_is_summed_exactly(impl):
    """On a CPU over several blocks; in the kernel row after row."""
    n_rows = 600 if impl != "triton" or DEVICE != "cpu" else 60
    log_prior, group, target, _ = call_of("label", n_rows, 10, 3)
    check(impl, randn(n_rows, 10), target, log_prior, group)


def test_tau_0_adds_nothing_and_excludes_nothing(impl):
    log_prior, group, _, _ = call_of("label", 6, 5, 2)
    logits, target = randn(6, 5), torch.randint(5, (6,), device=DEVICE)
    options = dict(label_smoothing=0.2, smoothing_distribution=log_prior.softmax(1))
    for prior in (log_prior, log_prior.clone().requires_grad_()):
        loss = logit_adjusted_cross_entropy(logits, target, prior, 0.0, group=group, impl=impl, **options)
        exact = truth(logits, target, torch.zeros_like(log_prior), group=group, **options)
        torch.testing.assert_close(loss.detach().double().cpu(), exact.loss, rtol=1e-6, atol=0.0)


def test_smoothing_toward_one_distribution_for_all_groups(impl):
    log_prior, group, target, _ = call_of("smoothing toward the prior", 6, 9, 2)
    log_prior = log_prior.clamp_min(-5.0)
    check(
        impl, randn(6, 9), target, log_prior, group, label_smoothing=0.3, smoothing_distribution=log_prior[0].softmax(0)
    )


def test_a_row_has_the_bits_of_a_call_with_its_prior_alone(impl):
    """Also where rows share a program; a kernel's row has the bits that it has with one prior."""
    for n_classes in (10, 1030):
        log_prior, group, target, _ = call_of("label", 5, n_classes, 3)
        logits = randn(5, n_classes)
        x = logits.clone().requires_grad_()
        rows = logit_adjusted_cross_entropy(x, target, log_prior, group=group, reduction="none", impl=impl)
        (grad,) = torch.autograd.grad(rows.sum(), x)
        for i in range(5):
            y = logits[i : i + 1].detach().requires_grad_()  # where it is: the bits depend on the alignment
            for prior, g in ((log_prior, group[i : i + 1]), (log_prior[group[i]], None))[: 1 + (impl == "triton")]:
                alone = logit_adjusted_cross_entropy(y, target[i : i + 1], prior, group=g, reduction="none", impl=impl)
                assert torch.equal(alone, rows[i : i + 1])
                assert torch.equal(torch.autograd.grad(alone.sum(), y)[0], grad[i : i + 1])


# Autograd, transforms, torch.compile ----------------------------------------------------------------------------------


def test_second_derivatives(impl):
    log_prior, group, target, _ = call_of("label", 4, 5, 2)
    logits = randn(4, 5, dtype=torch.float64).requires_grad_()
    prior = log_prior.double().clamp_min(-6.0).requires_grad_()

    def loss(x: Tensor, p: Tensor) -> Tensor:
        return logit_adjusted_cross_entropy(x, target, p, 0.7, group=group, impl=impl)

    assert torch.autograd.gradgradcheck(loss, (logits, prior))


def test_a_batch_under_vmap_folds_its_groups(impl, monkeypatch):
    if impl != "reference":  # the batch must be rows of one call
        monkeypatch.setattr("fused_la.reference.loss_rows", lambda problem: pytest.fail("the formula ran"))
    log_prior, group, target, _ = call_of("label", 6, 7, 3)
    logits = randn(6, 7)

    def loss(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
        return logit_adjusted_cross_entropy(x, y, log_prior, group=g, impl=impl)

    batched = torch.func.vmap(torch.func.grad(loss))(logits.view(3, 2, 7), target.view(3, 2), group.view(3, 2))
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        exact = truth(logits[rows], target[rows], log_prior, group=group[rows])
        torch.testing.assert_close(batched[i].double().cpu(), exact.grad_logits, rtol=1e-5, atol=1e-7)


def test_torch_compile_serves_other_groups_without_compiling_anew(impl):
    if impl == "triton" and DEVICE == "cpu":
        pytest.skip("the interpreter does not run compiled graphs' kernels")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x: Tensor, y: Tensor, prior: Tensor, group: Tensor) -> Tensor:
        return logit_adjusted_cross_entropy(x, y, prior, group=group, impl=impl)

    for i in range(3):
        log_prior, group, target, _ = call_of("label", 6, 7, 3)
        x = randn(6, 7).requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            value = loss(x, target, log_prior, group)
        exact = truth(x, target, log_prior, group=group)
        torch.testing.assert_close(value.detach().double().cpu(), exact.loss, rtol=1e-6, atol=0.0)
        grad = torch.autograd.grad(value, x)[0].double().cpu()
        torch.testing.assert_close(grad, exact.grad_logits, rtol=1e-5, atol=1e-7)


# Groups out of range --------------------------------------------------------------------------------------------------


def hidden(function: Any, *arguments: Tensor) -> Any:
    """The function under vmap, where no value can be read."""
    return tuple(t.squeeze(0) for t in torch.func.vmap(function)(*(a.unsqueeze(0) for a in arguments)))


@pytest.mark.parametrize("bad", [3, -1, 2**40])
@pytest.mark.parametrize("kind", ["label", "label, all classes", "probabilities", "smoothing toward the prior"])
def test_a_group_out_of_range_is_an_error_or_makes_its_row_nan(impl, kind, bad):
    log_prior, group, target, options = call_of(kind.removesuffix(", all classes"), 4, 6, 3)
    if kind.endswith("all classes"):
        log_prior = log_prior.clamp_min(-5.0)
    group[2] = bad
    logits = randn(4, 6)
    if DEVICE == "cpu":
        with pytest.raises(IndexError, match=rf"group must hold indices of the 3 rows of log_prior.*got {bad}$"):
            logit_adjusted_cross_entropy(logits, target, log_prior, group=group, impl=impl, **options)

    def rows_and_gradient(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        def loss(x: Tensor) -> Tensor:
            return logit_adjusted_cross_entropy(x, target, log_prior, group=g, reduction="none", impl=impl, **options)

        rows, pull = torch.func.vjp(loss, x)
        return rows, pull(torch.ones_like(rows))[0]

    rows, grad = hidden(rows_and_gradient, logits, group)
    assert rows.isnan().tolist() == [False, False, True, False]
    assert grad.isnan().any(1).tolist() == [False, False, True, False]


def test_a_row_that_does_not_count_may_have_any_group(impl):
    log_prior, group, target, _ = call_of("label", 5, 6, 3)
    group[1] = -100
    x = randn(5, 6).requires_grad_()
    loss = logit_adjusted_cross_entropy(x, target, log_prior, group=group, impl=impl)
    counts = target != -100
    exact = truth(x[counts], target[counts], log_prior, group=group[counts])
    torch.testing.assert_close(loss.detach().double().cpu(), exact.loss, rtol=1e-6, atol=0.0)
    assert (torch.autograd.grad(loss, x)[0][1] == 0.0).all()


def test_a_head_refuses_or_marks_a_group_out_of_range(impl):
    log_prior, group, target, _ = call_of("label", 4, 6, 3)
    features, weight = randn(4, 3), randn(6, 3)
    group[2] = 3
    call = dict(target=target, log_prior=log_prior, impl=impl, reduction="none")
    if DEVICE == "cpu":
        with pytest.raises(IndexError, match="group must hold indices of the 3 rows of log_prior"):
            linear_logit_adjusted_cross_entropy(features, weight, group=group, **call)
    else:
        assert linear_logit_adjusted_cross_entropy(features, weight, group=group, **call)[2].isnan()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"group": None}, ValueError, r"log_prior must have shape \(6,\), got \(3, 6\);.* group must be given"),
        ({"log_prior": torch.zeros(6)}, ValueError, r"log_prior must have shape \(G, 6\) with group, .* got \(6,\)"),
        ({"log_prior": torch.zeros(0, 6)}, ValueError, r"log_prior must have shape \(G, 6\) with group, .* \(0, 6\)"),
        ({"log_prior": torch.zeros(3, 5)}, ValueError, r"log_prior must have shape \(G, 6\) with group, .* \(3, 5\)"),
        ({"group": torch.zeros(5).long()}, ValueError, r"group must have shape \(4,\), a group for .* got \(5,\)"),
        ({"group": torch.zeros(4)}, TypeError, r"group must be int64, got torch.float32$"),
        ({"group": torch.zeros(4).int()}, TypeError, r"group must be int64, got torch.int32; group.long\(\) makes"),
        ({"group": [0, 1, 2, 0]}, TypeError, r"group must be a torch.Tensor, got list"),
        (
            {"log_prior": torch.tensor([[0.0] * 6, [-INF] * 6])},
            ValueError,
            r"log_prior must be finite for some class of group 1, got -inf for every class",
        ),
        (
            {"label_smoothing": 0.1, "smoothing_distribution": torch.full((2, 6), 1 / 6)},
            ValueError,
            r"smoothing_distribution must have a row for each of the 3 rows of log_prior, .* got \(2, 6\)",
        ),
        (
            {"label_smoothing": 0.1, "smoothing_distribution": torch.tensor([[1 / 6] * 6, [0.5] * 6, [1 / 6] * 6])},
            ValueError,
            r"smoothing_distribution must hold probabilities that add up to 1 for group 1, .* a sum of 3",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_argument(changes, error, message):
    given = dict(
        logits=torch.zeros(4, 6), target=torch.zeros(4).long(), log_prior=torch.zeros(3, 6),
        group=torch.tensor([0, 1, 2, 0]),
    )  # fmt: skip
    with pytest.raises(error, match=message):
        logit_adjusted_cross_entropy(**(given | changes))


def test_a_margin_and_classes_over_ranks_have_one_prior():
    criterion = fused_la.MarginCrossEntropyLoss(fused_la.margins.erm())
    with pytest.raises(TypeError, match="group"):
        criterion(torch.zeros(2, 3), torch.zeros(2).long(), group=torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"log_prior must have shape \(3,\), got \(2, 3\)"):
        fused_la.posthoc.estimate_prior(torch.zeros(4, 3), torch.zeros(2, 3))


# Heads ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TARGETS)
def test_a_head_uses_the_prior_of_each_rows_group(impl, kind):
    log_prior, group, target, options = call_of(kind, 6, 9, 3)
    if "weight" in options:
        options["class_weight"] = options.pop("weight")
    leaves = [randn(6, 4), randn(9, 4), randn(9), log_prior.clone()]
    features, weight, bias, prior = (leaf.requires_grad_() for leaf in leaves)
    loss = linear_logit_adjusted_cross_entropy(
        features, weight, target, prior, 0.7, bias=bias, group=group, impl=impl, **options
    )
    grads = torch.autograd.grad(loss, (features, weight, bias, prior))
    logits = features.double() @ weight.double().T + bias.double()
    of_logits = {("weight" if name == "class_weight" else name): value for name, value in options.items()}
    exact = truth(logits.detach(), target, log_prior, 0.7, group=group, **of_logits)
    torch.testing.assert_close(loss.detach().double().cpu(), exact.loss, rtol=2e-6, atol=0.0)
    expected = torch.autograd.grad(logits, (features, weight, bias), exact.grad_logits.to(logits))
    for grad, want in zip(grads, (*expected, exact.grad_log_prior), strict=True):
        torch.testing.assert_close(grad.double().cpu(), want.double().cpu(), rtol=1e-5, atol=1e-6)


def test_a_head_of_sequences_has_a_group_a_sequence():
    features, weight, log_prior = torch.randn(3, 4, 5), torch.randn(6, 5), priors_of(2, 6, excluded=False).cpu()
    target, group = torch.randint(6, (3, 4)), torch.tensor([1, 0, 1])
    loss = linear_logit_adjusted_cross_entropy(features, weight, target, log_prior, group=group)
    z = features @ weight.T + log_prior[group].unsqueeze(1)
    torch.testing.assert_close(loss, F.cross_entropy(z.flatten(0, 1), target.flatten()))


# Modules --------------------------------------------------------------------------------------------------------------


COUNTS = torch.tensor([[900, 90, 10], [5, 50, 0]])


def test_modules_take_counts_by_group():
    logits, target, group = torch.randn(4, 3), torch.tensor([0, 2, 1, 0]), torch.tensor([0, 0, 1, 1])
    criterion = LogitAdjustedCrossEntropyLoss(COUNTS, exclude_absent=True)
    log_prior = (COUNTS / COUNTS.sum(1, keepdim=True)).log()
    torch.testing.assert_close(criterion.log_prior, log_prior)
    expected = F.cross_entropy(logits + log_prior[group], target)
    torch.testing.assert_close(criterion(logits, target, group=group), expected)
    torch.testing.assert_close(criterion(input=logits, target=target, group=group), expected)
    assert criterion.state_dict() == {}
    assert torch.equal(criterion.class_counts, COUNTS)
    assert "n_classes=3" in repr(criterion)
    with pytest.raises(ValueError, match=r"group must be given for class_counts of shape \(G, C\), got NoneType"):
        criterion(logits, target)
    with pytest.raises(ValueError, match=r"group must be None for class_counts \(C,\), got Tensor"):
        LogitAdjustedCrossEntropyLoss([3, 2, 1])(logits, target, group=group)


def test_counts_by_group_may_change_between_steps():
    logits, target, group = torch.randn(2, 3), torch.tensor([0, 2]), torch.tensor([1, 0])
    criterion = LogitAdjustedCrossEntropyLoss([[1, 1, 1], [1, 1, 1]], smoothing_distribution=[[0.2, 0.3, 0.5]] * 2)
    kept = criterion.log_prior
    criterion.class_counts = COUNTS + 1
    assert criterion.log_prior is kept
    log_prior = ((COUNTS + 1) / (COUNTS + 1).sum(1, keepdim=True)).log()
    torch.testing.assert_close(
        criterion(logits, target, group=group), F.cross_entropy(logits + log_prior[group], target)
    )
    with pytest.raises(ValueError, match=r"class_counts must have shape \(3,\) as smoothing_distribution has"):
        criterion.class_counts = [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match=r"smoothing_distribution must have shape \(2, 3\) or \(C,\), got \(3, 3\)"):
        criterion.smoothing_distribution = torch.full((3, 3), 1 / 3)


def test_a_head_module_excludes_what_no_group_has():
    head = LogitAdjustedLinear(4, [[3, 0, 1, 0], [2, 0, 0, 5]], exclude_absent=True)
    assert isinstance(head, nn.Linear)
    assert head.out_features == 4
    features, target, group = torch.randn(3, 4), torch.tensor([0, 2, 3]), torch.tensor([0, 0, 1])
    logits = F.linear(features, head.weight, head.bias)
    torch.testing.assert_close(
        head(features, target, group=group), F.cross_entropy(logits + head.log_prior[group], target)
    )
    assert head(features).isinf().any(0).tolist() == [False, True, False, False]
    with pytest.raises(TypeError, match="group must be None without a target"):
        head(features, group=group)


# Post hoc -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [adjust_logits, divide_by_prior])
@pytest.mark.parametrize("positions", [(), (2, 3)])
def test_corrections_use_the_prior_of_each_rows_group(function, positions):
    log_prior, logits = priors_of(3, 5), randn(4, 5, *positions)
    group = torch.randint(3, (4, *positions)).to(DEVICE)
    rows = function(logits, log_prior, 0.7, group=group)
    for g in range(3):
        alone = function(logits, log_prior[g], 0.7)
        assert torch.equal(rows.movedim(1, -1)[group == g], alone.movedim(1, -1)[group == g])
    with pytest.raises(ValueError, match="group must be given"):
        function(logits, log_prior)


def test_either_prior_of_adjust_logits_may_be_by_group():
    one, many, logits = priors_of(1, 5)[0], priors_of(3, 5), randn(4, 5)
    group = torch.tensor([2, 0, 1, 2], device=DEVICE)
    for prior, target_prior in ((one, many), (many, one), (many, many.roll(1, 0))):
        rows = adjust_logits(logits, prior, 0.7, target_log_prior=target_prior, group=group)
        for i, g in enumerate(group.tolist()):
            of_row = [p if p.dim() == 1 else p[g] for p in (prior, target_prior)]
            assert torch.equal(rows[i], adjust_logits(logits[i], of_row[0], 0.7, target_log_prior=of_row[1]))
    with pytest.raises(ValueError, match="target_log_prior must have 3 groups, got 2"):
        adjust_logits(logits, many, target_log_prior=many[:2], group=group)


def test_an_adjustment_by_a_group_out_of_range():
    log_prior, group = priors_of(2, 3), torch.tensor([0, 2], device=DEVICE)
    if DEVICE == "cpu":
        with pytest.raises(IndexError, match="group must hold indices of the 2 rows"):
            adjust_logits(torch.zeros(2, 3), log_prior, group=group)
    (rows,) = hidden(lambda g: (adjust_logits(torch.zeros(2, 3, device=DEVICE), log_prior, group=g),), group)
    assert rows.isnan().all(1).tolist() == [False, True]


def expected_counts(sweep_of: Any, taus: list[float], logits: Tensor, target: Tensor, log_prior: Tensor, group: Tensor):
    """The counts of a sweep for each group alone, added up."""
    total = None
    for g in range(len(log_prior)):
        sweep = sweep_of(log_prior[g], taus, split="val")
        sweep.update(logits[group == g], target[group == g])
        total = sweep if total is None else total.merge(sweep)
    return total.counts()


@pytest.mark.parametrize("sweep_of", [TauSweep, TauSweep.divide_by_prior])
@pytest.mark.parametrize("kernel", [False, True])
def test_a_sweep_by_group_counts_as_sweeps_of_its_groups(monkeypatch, sweep_of, kernel):
    if kernel:
        argmax = pytest.importorskip("fused_la._triton.argmax")
        monkeypatch.setattr("fused_la._evaluation.tau_sweep._predict", argmax.launch_argmax)
    taus, log_prior = [0.0, 0.5, 1.0, 2.0], priors_of(3, 5)
    logits, target = randn(40, 5), torch.randint(5, (40,)).to(DEVICE)
    target[7], group = -100, groups_of(40, 3)
    sweep = sweep_of(log_prior, taus, split="val", class_counts=[500, 50, 5, 5, 5])
    sweep.update(logits[:16], target[:16], group[:16])
    sweep.update(logits[16:], target[16:], group[16:])
    n_correct, n_examples = expected_counts(sweep_of, taus, logits, target, log_prior, group)
    assert torch.equal(sweep.counts()[0], n_correct)
    assert torch.equal(sweep.counts()[1], n_examples)
    assert len(set(map(tuple, n_correct.tolist()))) > 1  # tau matters here


def test_a_sweep_refuses_groups_that_do_not_fit():
    by_group, plain = TauSweep(torch.zeros(2, 3), [1.0], split="val"), TauSweep(torch.zeros(3), [1.0], split="val")
    logits, target = torch.zeros(4, 3), torch.zeros(4).long()
    with pytest.raises(ValueError, match=r"group must be given for a log_prior of shape \(G, C\), got NoneType"):
        by_group.update(logits, target)
    with pytest.raises(ValueError, match=r"group must be None for a log_prior of shape \(C,\), got Tensor"):
        plain.update(logits, target, target)
    with pytest.raises(IndexError, match="group must hold indices of the 2 rows"):
        by_group.update(logits, target, target + 2)


# A factor of the row's label ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [0, 5])
def test_a_head_with_a_label_scale(impl, n_rows):
    """The bias's gradient is not that of the offset here: every row has another factor."""
    features, weight, bias, offset = (t.requires_grad_() for t in (randn(n_rows, 3), randn(7, 3), randn(7), randn(7)))
    scale, label_scale = torch.rand(7, device=DEVICE) + 0.5, torch.linspace(-1.0, 2.0, 7, device=DEVICE)
    target = torch.tensor([6, 0, -100, 3, 3], device=DEVICE)[:n_rows]
    margin = fused_la.PairwiseMargin(negative_offset=offset, target_offset=offset, scale=scale, label_scale=label_scale)
    leaves = [features, weight, bias, offset]
    loss = fused_la.linear_margin_cross_entropy(features, weight, target, margin, bias=bias, reduction="sum", impl=impl)
    grads = torch.autograd.grad(loss, leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    of_rows = (scale.double() * label_scale.double()[target.clamp_min(0)][:, None]) * (exact[0] @ exact[1].T + exact[2])
    expected = F.cross_entropy(of_rows + exact[3], target, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for grad, want in zip(grads, torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-5)
