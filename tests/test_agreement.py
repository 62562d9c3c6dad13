"""Agreement with `F.cross_entropy`: on PyTorch's own sample inputs and over all combinations of options."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import Tensor

from fused_la import LogitAdjustedCrossEntropyLoss, log_prior_from_counts, logit_adjusted_cross_entropy


def pytorch_samples() -> list[tuple[Tensor, tuple, dict]]:
    """(logits, args, kwargs) of every float64 sample that PyTorch tests its own cross entropy on."""
    try:
        with mock.patch("torch.backends.disable_global_flags"):  # later tests of this process may have to set flags
            from torch.testing._internal.common_methods_invocations import op_db
    except ImportError as error:
        pytest.skip(f"this PyTorch does not ship its operator samples: {error}")
    ops = [op for op in op_db if op.name == "nn.functional.cross_entropy"]
    if not ops:
        pytest.skip("this PyTorch has no samples for nn.functional.cross_entropy")
    return [(s.input, s.args, s.kwargs) for s in ops[0].sample_inputs(DEVICE, torch.float64, requires_grad=True)]


def outcome(function, logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    loss = function(logits)
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


def test_every_sample_input_of_pytorch(impl):
    samples = pytorch_samples()
    assert len(samples) >= 10
    for logits, args, kwargs in samples:
        (target,) = args
        n_classes = logits.shape[0 if logits.dim() == 1 else 1]
        prior = torch.zeros(n_classes, dtype=torch.float64, device=DEVICE)
        expected = outcome(lambda x, t=target, k=kwargs: F.cross_entropy(x, t, **k), logits)
        actual = outcome(
            lambda x, t=target, p=prior, k=kwargs: logit_adjusted_cross_entropy(x, t.detach(), p, impl=impl, **k),
            logits,
        )
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(
                a, e, equal_nan=True, msg=lambda m, k=kwargs, x=logits: f"{tuple(x.shape)} {k}: {m}"
            )


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 7, 2, 4)], ids=str)
def test_every_combination_of_options(impl, shape):
    """Compare with eager and the prior added, for reduction x weight x ignored labels x smoothing x kind of target."""
    dim = 0 if len(shape) == 1 else 1
    n_classes = shape[dim]
    prior = log_prior_from_counts([500, 200, 100, 40, 20, 6, 1]).double().to(DEVICE)
    offset = 1.7 * prior.view(-1, *[1] * (len(shape) - 2))
    logits = torch.randn(shape, dtype=torch.float64, device=DEVICE) * 3
    index = torch.randint(n_classes, shape[:dim] + shape[dim + 1 :], device=DEVICE)
    ignored = torch.where(torch.rand(index.shape, device=DEVICE) < 0.3, 2, index)
    probabilities = torch.softmax(torch.randn(shape, dtype=torch.float64, device=DEVICE), dim)
    weight = torch.rand(n_classes, dtype=torch.float64, device=DEVICE)
    targets = [(index, {}), (ignored, {"ignore_index": 2}), (probabilities, {})]
    for reduction, w, smoothing, (target, extra) in itertools.product(
        ("none", "mean", "sum"), (None, weight), (0.0, 0.15), targets
    ):
        options = {"reduction": reduction, "weight": w, "label_smoothing": smoothing} | extra
        expected = outcome(lambda x, t=target, o=options: F.cross_entropy(x + offset, t, **o), logits)
        actual = outcome(
            lambda x, t=target, o=options: logit_adjusted_cross_entropy(x, t, prior, 1.7, impl=impl, **o),
            logits,
        )
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, equal_nan=True, msg=lambda m, o=options: f"{o}: {m}")


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_negative_weights_and_probabilities_are_valid_and_nan_spreads_as_in_pytorch(impl, bad, smoothing, reduction):
    logits = torch.randn(4, 5, dtype=torch.float64, device=DEVICE)
    prior = torch.zeros(5, dtype=torch.float64, device=DEVICE)
    index = torch.tensor([0, 2, 2, 4], device=DEVICE)
    probabilities = torch.rand(4, 5, dtype=torch.float64, device=DEVICE)
    spoilt, weight = probabilities.clone(), torch.rand(5, dtype=torch.float64, device=DEVICE)
    spoilt[1, 3] = weight[2] = bad
    for target, w in [(index, weight), (probabilities, weight), (spoilt, None)]:
        options = {"reduction": reduction, "label_smoothing": smoothing, "weight": w}
        expected = outcome(lambda x, t=target, o=options: F.cross_entropy(x, t, **o), logits)
        actual = outcome(
            lambda x, t=target, o=options: logit_adjusted_cross_entropy(x, t, prior, impl=impl, **o), logits
        )
        torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_a_negative_label_weight_is_valid_and_nan_spreads_over_its_row(impl, bad):
    """The same as for class probabilities with the same values."""
    logits = torch.randn(4, 5, dtype=torch.float64, device=DEVICE)
    prior = torch.zeros(5, dtype=torch.float64, device=DEVICE)
    target, share = torch.tensor([[0, 1], [2, 3], [2, 4], [4, 0]], device=DEVICE), torch.rand(4, 2).double().to(DEVICE)
    share[1, 0] = bad
    dense = torch.zeros_like(logits).scatter_(1, target, share)
    expected = outcome(lambda x: F.cross_entropy(x, dense, reduction="none"), logits)
    actual = outcome(
        lambda x: logit_adjusted_cross_entropy(x, target, prior, target_weight=share, reduction="none", impl=impl),
        logits,
    )
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_labels_are_the_weighted_sum_of_single_labels(impl, reduction, smoothing):
    """The usual form of mixup: lam * loss(y1) + (1 - lam) * loss(y2)."""
    logits = torch.randn(6, 9, dtype=torch.float64, device=DEVICE)
    prior = torch.log_softmax(torch.randn(9, dtype=torch.float64, device=DEVICE), 0)
    first, second = torch.randint(9, (2, 6), device=DEVICE)
    lam = 0.3
    share = torch.tensor([lam, 1 - lam], dtype=torch.float64, device=DEVICE).expand(6, 2)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    expected = outcome(
        lambda x: (
            lam * F.cross_entropy(x + prior, first, **options)
            + (1 - lam) * F.cross_entropy(x + prior, second, **options)
        ),
        logits,
    )
    actual = outcome(
        lambda x: logit_adjusted_cross_entropy(
            x, torch.stack([first, second], 1), prior, target_weight=share, impl=impl, **options
        ),
        logits,
    )
    torch.testing.assert_close(actual, expected)


def test_a_mean_over_weighted_labels_counts_rows(impl):
    """A row whose weights do not add up to 1 still counts as one row, as with class probabilities."""
    logits = torch.randn(4, 5, dtype=torch.float64, device=DEVICE)
    prior = torch.zeros(5, dtype=torch.float64, device=DEVICE)
    target = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 1]], device=DEVICE)
    share = torch.rand(4, 2, dtype=torch.float64, device=DEVICE) * 3
    dense = torch.zeros(4, 5, dtype=torch.float64, device=DEVICE).scatter_add(1, target, share)
    actual = logit_adjusted_cross_entropy(logits, target, prior, target_weight=share, impl=impl)
    torch.testing.assert_close(actual, F.cross_entropy(logits, dense))


def test_expressions_that_the_readme_calls_equivalent_agree():
    """The expressions in the README come in pairs, the eager one first."""
    readme = Path(__file__).parents[1] / "README.md"
    lines = readme.read_text().split("Equivalent to:\n\n```python\n")[1].split("# priors")[0]
    class_counts = torch.tensor([500, 200, 100, 40, 20], device=DEVICE)
    names = dict(
        F=F, nn=torch.nn, torch=torch, tau=0.7, class_counts=class_counts, lam=0.3, eps=0.1,
        LogitAdjustedCrossEntropyLoss=LogitAdjustedCrossEntropyLoss,
        logit_adjusted_cross_entropy=logit_adjusted_cross_entropy,
        logits=torch.randn(6, 5, device=DEVICE), log_prior=log_prior_from_counts(class_counts),
        target=torch.tensor([0, 1, 2, 3, 4, 4], device=DEVICE), weight=torch.rand(5, device=DEVICE),
        log_priors=torch.randn(2, 5, device=DEVICE), group=torch.tensor([0, 1, 1, 0, 0, 1], device=DEVICE),
        y1=torch.tensor([0, 1, 2, 3, 4, 4], device=DEVICE), y2=torch.tensor([4, 1, 0, 0, 2, 3], device=DEVICE),
        q=torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1], device=DEVICE), ignore_index=3, reduction="mean", label_smoothing=0.2,
    )  # fmt: skip
    values = []
    for statement in ast.parse(lines).body:
        if isinstance(statement, ast.Expr):
            values.append(eval(ast.unparse(statement), names))
        else:
            exec(ast.unparse(statement), names)
    assert len(values) >= 10
    for eager, ours in zip(values[::2], values[1::2], strict=True):
        torch.testing.assert_close(ours, eager)


def readme_section(heading: str) -> str:
    """The code of a section of the README."""
    text = (Path(__file__).parents[1] / "README.md").read_text().partition(f"### {heading}\n")[2]
    return text.partition("```python\n")[2].partition("```")[0]


def test_the_readmes_sections_on_priors_and_row_losses_are_right():
    from fused_la import count_classes
    from fused_la.prior import RunningPrior

    labels, sites = torch.tensor([0, 0, 1, 2, 0, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    logits, target, site = torch.randn(3, 3).double(), torch.tensor([0, 2, 1]), torch.tensor([0, 1, 1])
    log_prior, tau, gamma, q = log_prior_from_counts([3, 2, 1]), 0.7, 2.0, 0.3
    names = dict(
        torch=torch, count_classes=count_classes, RunningPrior=RunningPrior, labels=labels, sites=sites, n_classes=3,
        LogitAdjustedCrossEntropyLoss=LogitAdjustedCrossEntropyLoss, logits=logits, target=target, site=site, tau=tau,
        logit_adjusted_cross_entropy=logit_adjusted_cross_entropy, log_prior=log_prior, gamma=gamma, q=q,
    )  # fmt: skip
    exec(readme_section("A prior for each group"), names)
    assert names["counts"].tolist() == [[2, 1, 0], [1, 1, 1]]
    by_site = names["counts"].double().log()[site]
    torch.testing.assert_close(names["loss"], F.cross_entropy(logits + by_site, target))
    exec(readme_section("A prior that changes"), names)
    torch.testing.assert_close(names["loss"], F.cross_entropy(logits + torch.tensor([2.0, 2.0, 2.0]).log(), target))
    exec(readme_section("Losses built on this one"), names)
    p = (logits + tau * log_prior.double()).softmax(1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(names["focal"], ((1 - p) ** gamma * -p.log()).mean())
    torch.testing.assert_close(names["generalized"], ((1 - p**q) / q).mean())


def test_the_module_is_the_function(impl):
    counts = [900, 90, 10, 3]
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0], device=DEVICE)
    smoothing_distribution = torch.tensor([0.4, 0.3, 0.2, 0.1], device=DEVICE)
    criterion = LogitAdjustedCrossEntropyLoss(
        counts, 0.7, pseudocount=1.0, weight=weight.cpu(), ignore_index=3, reduction="sum", label_smoothing=0.1,
        smoothing_distribution=smoothing_distribution.cpu(), impl=impl,
    ).to(DEVICE)  # fmt: skip
    logits = torch.randn(6, 4, device=DEVICE)
    prior = log_prior_from_counts(counts, pseudocount=1.0).to(DEVICE)
    options = dict(weight=weight, ignore_index=3, reduction="sum", label_smoothing=0.1, impl=impl)
    target = torch.tensor([0, 1, 2, 3, 3, 0], device=DEVICE)
    expected = logit_adjusted_cross_entropy(
        logits, target, prior, 0.7, smoothing_distribution=smoothing_distribution, **options
    )
    assert torch.equal(criterion(logits, target), expected)
    labels, share = torch.randint(3, (6, 2), device=DEVICE), torch.rand(6, 2, device=DEVICE)
    expected = logit_adjusted_cross_entropy(
        logits,
        labels,
        prior,
        0.7,
        target_weight=share,
        smoothing_distribution=smoothing_distribution,
        **options,
    )
    assert torch.equal(criterion(logits, labels, share), expected)


def test_auto_chooses_the_implementation_of_the_device(monkeypatch):
    """ "auto" is "triton" on a GPU and "blocked" on a CPU, but "reference" if the target requires grad."""
    import fused_la.loss

    chosen = []
    monkeypatch.setattr(
        fused_la.loss, "fused_loss", lambda problem, reduction, impl: chosen.append(impl) or torch.zeros(())
    )
    logits, target = torch.randn(3, 4, device=DEVICE), torch.tensor([0, 1, 2], device=DEVICE)
    prior = torch.zeros(4, device=DEVICE)
    logit_adjusted_cross_entropy(logits, target, prior)
    assert chosen == ["triton" if DEVICE == "cuda" else "blocked"]
    logit_adjusted_cross_entropy(logits, torch.softmax(logits, 1).requires_grad_(), prior)
    assert len(chosen) == 1


@pytest.mark.parametrize("negated", ["logits", "log_prior", "target", "target_weight", "probabilities", "upstream"])
def test_a_lazy_negation_is_resolved(impl, negated):
    """`x.conj().imag` is a view with the negative bit set: its memory holds the values with the opposite sign."""

    def lazily(name: str, x: Tensor) -> Tensor:
        return torch._neg_view(-x) if name == negated else x

    logits = lazily("logits", torch.randn(3, 4, dtype=torch.float64, device=DEVICE))
    prior = lazily("log_prior", torch.log_softmax(torch.randn(4, dtype=torch.float64, device=DEVICE), 0))
    options = {}
    if negated == "probabilities":
        target = plain = lazily(negated, torch.softmax(torch.randn(3, 4, dtype=torch.float64, device=DEVICE), 1))
    elif negated == "target_weight":
        plain = torch.tensor([0, 1, 3], device=DEVICE)
        target = torch.stack([plain, plain], 1)
        options["target_weight"] = lazily(negated, torch.full((3, 2), 0.5, dtype=torch.float64, device=DEVICE))
    else:
        target = plain = lazily("target", torch.tensor([0, 1, 3], device=DEVICE))
    upstream = lazily("upstream", torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64, device=DEVICE))
    results = []
    for function in (
        lambda x: logit_adjusted_cross_entropy(x, target, prior, reduction="none", impl=impl, **options),
        lambda x: F.cross_entropy(x + prior, plain, reduction="none"),
    ):
        x = logits.detach().requires_grad_()
        loss = function(x)
        results.append((loss.detach(), *torch.autograd.grad(loss, x, upstream)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("prior_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_learned_prior_may_have_another_dtype(impl, dtype, prior_dtype):
    logits = torch.randn(3, 5, device=DEVICE).to(dtype)
    prior = torch.tensor([-1.0, -2.0, -3.0, -0.5, -4.0], device=DEVICE).to(prior_dtype).requires_grad_()
    target = torch.tensor([0, 4, 2], device=DEVICE)
    (gradient,) = torch.autograd.grad(logit_adjusted_cross_entropy(logits, target, prior, impl=impl), prior)
    exact = prior.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(logits.double() + exact, target), exact)
    assert gradient.dtype == prior_dtype
    eps = max(torch.finfo(prior_dtype).eps, torch.finfo(torch.float32).eps * (dtype != torch.float64))
    torch.testing.assert_close(gradient.double(), expected, rtol=4 * eps, atol=4 * eps)


def test_a_tau_that_rounds_to_zero_keeps_classes_excluded(impl):
    logits = torch.randn(2, 3, device=DEVICE)
    prior = torch.tensor([-1.0, -2.0, -torch.inf], device=DEVICE)
    target = torch.tensor([0, 1], device=DEVICE)
    loss = logit_adjusted_cross_entropy(logits, target, prior, 1e-46, impl=impl)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :2], target))


def test_a_label_without_mass_may_be_an_excluded_class(impl):
    """With label_smoothing = 1 the label itself has no target mass."""
    logits = torch.randn(2, 3, device=DEVICE)
    prior = torch.tensor([0.0, 0.0, -torch.inf], device=DEVICE)
    q = torch.tensor([0.25, 0.75, 0.0], device=DEVICE)
    target = torch.tensor([2, 0], device=DEVICE)
    loss = logit_adjusted_cross_entropy(logits, target, prior, label_smoothing=1.0, smoothing_distribution=q, impl=impl)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :2], q[:2].expand(2, 2)))


@pytest.mark.skipif(DEVICE != "cpu", reason="memory that NumPy shares")
@pytest.mark.parametrize("impossible", [torch.nan, torch.inf])
def test_a_prior_is_checked_in_every_call_even_if_autograd_does_not_know_of_a_write(impl, impossible):
    logits, target, log_prior = torch.randn(3, 5), torch.tensor([0, 1, 2]), torch.zeros(5)
    logit_adjusted_cross_entropy(logits, target, log_prior, impl=impl)
    log_prior.data[4] = impossible  # does not change the tensor's version counter
    with pytest.raises(ValueError, match=f"^log_prior must be finite or -inf, got {impossible} for some class$"):
        logit_adjusted_cross_entropy(logits, target, log_prior, impl=impl)


def test_a_second_backward_pass_does_not_depend_on_writes_to_the_prior_in_between(impl):
    logits, target = torch.randn(3, 5, device=DEVICE, requires_grad=True), torch.tensor([0, 1, 2], device=DEVICE)
    log_prior = torch.zeros(5, device=DEVICE)
    loss = logit_adjusted_cross_entropy(logits, target, log_prior, impl=impl)
    loss.backward(retain_graph=True)
    log_prior.data[4] = -torch.inf  # unknown to autograd
    logits.grad = None
    loss.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.skipif(DEVICE != "cpu", reason="memory that NumPy shares")
def test_labels_and_a_prior_that_numpy_changes_between_calls_are_read_anew(impl):
    logits, target, log_prior = torch.randn(4, 5), torch.tensor([1, 2, 3, 4]), torch.zeros(5)
    logit_adjusted_cross_entropy(logits, target, log_prior, ignore_index=0, impl=impl)
    target.numpy()[2] = 0  # does not change the tensors' version counters
    log_prior.numpy()[1] = -torch.inf
    x = logits.clone().requires_grad_()
    loss = logit_adjusted_cross_entropy(x, target, log_prior, ignore_index=0, impl=impl, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient[2].eq(0).all()
    assert gradient[:, 1].eq(0).all()
    kept = logit_adjusted_cross_entropy(logits[[1, 3]], target[[1, 3]], log_prior, impl=impl, reduction="none")
    rows = logit_adjusted_cross_entropy(logits, target, log_prior, ignore_index=0, impl=impl, reduction="none")
    assert torch.equal(rows[[1, 3]], kept)
