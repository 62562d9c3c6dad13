"""Margin losses against the paper's formula with an explicit (C, C) matrix of margins, and Theorem 1.

Oracle, in float64: alpha_y * log[1 + sum over c != y of exp(Delta[y, c] + (s_c f_c - s_y f_y) * r_y)], one label at a
time, with the scale s and the label_scale r.
"""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, one_in, slow
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

from fused_la import (
    PairwiseMargin,
    log_prior_from_counts,
    logit_adjusted_cross_entropy,
    margin_cross_entropy,
    margins,
)

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is")

PRESETS = {
    "erm": lambda prior: margins.erm(),
    "balanced": margins.balanced,
    "adaptive": margins.adaptive,
    "ldam": lambda prior: margins.ldam(prior, scale=8.0),
    "equalised": margins.equalised,
    "equalised, step": lambda prior: margins.equalised(prior, lambda pi: torch.where(pi > 0.01, 1.0, 0.1).double()),
    "logit_adjusted": margins.logit_adjusted,
    "logit_adjusted, tau = 2": lambda prior: margins.logit_adjusted(prior, 2.0),
    "logit_adjusted, consistent": lambda prior: margins.logit_adjusted(prior, 0.5, consistent=True),
    "logit_adjusted_adaptive": margins.logit_adjusted_adaptive,
    "balanced_softmax": margins.balanced_softmax,
    "vector_scaling": lambda prior: margins.vector_scaling(prior, 0.3, 1.2),
    "cdt": lambda prior: margins.cdt(prior, 0.3),
    "fisher_consistent": lambda prior: margins.fisher_consistent(prior, prior.cos()),
    "fedlc": lambda prior: margins.fedlc(1000.0 * prior.exp(), 3.0),
    "fedrs": lambda prior: margins.fedrs(prior >= prior.median(), 0.4),
    "immax": lambda prior: margins.immax(2.0 * (prior / 3.0).exp()),
    "immax, every field": lambda prior: margins.immax((prior / 12.0).exp()) + PRESETS["added"](prior),
    "added": lambda prior: margins.cdt(prior, 0.2) + margins.adaptive(prior) + margins.balanced(prior),
}
COVERED = {
    "balanced", "logit_adjusted", "logit_adjusted, consistent", "balanced_softmax", "fisher_consistent",
}  # fmt: skip


def make_prior(n_classes, device=DEVICE, dtype=torch.float64):
    counts = (400.0 * torch.arange(1, n_classes + 1, dtype=torch.float64) ** -1.5).clamp_min(1.0)
    return (counts / counts.sum()).log()[torch.randperm(n_classes)].to(device, dtype)


def as_vector(value, n_classes, default):
    if isinstance(value, torch.Tensor):
        return value.double().cpu()
    return torch.full((n_classes,), default if value is None else value, dtype=torch.float64)


def explicit(logits, target, margin):
    """(N,) losses by the explicit matrix, of (N, C) float64 logits on a CPU."""
    n_classes = logits.shape[1]
    u = as_vector(margin.negative_offset, n_classes, 0.0)
    v = as_vector(margin.target_offset, n_classes, 0.0)
    alpha, scale = as_vector(margin.alpha, n_classes, 1.0), as_vector(margin.scale, n_classes, 1.0)
    delta = u[None, :] - v[:, None]  # Delta[y, c]
    scaled = logits * scale * as_vector(margin.label_scale, n_classes, 1.0)[target][:, None]
    exponents = delta[target] + scaled - scaled.gather(1, target[:, None])
    others = exponents.masked_fill(F.one_hot(target, n_classes).bool(), -math.inf)
    return alpha[target] * F.softplus(others.logsumexp(1))


def tolerance(dtype):
    """Relative to the largest value: one ulp of the gradient's dtype, a few of float32 arithmetic at |z| up to 100."""
    return {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2e-5 + torch.finfo(dtype).eps)


def assert_near(got, want, dtype):
    largest = want.abs().max().item()
    assert_close(got.double().cpu(), want, rtol=0.0, atol=tolerance(dtype) * largest + 1e-30)


@pytest.mark.parametrize(("preset", "dtype"), one_in(3, list(PRESETS), [torch.float64, torch.float32, torch.bfloat16]))
def test_every_preset_is_the_explicit_matrix(impl, device, preset, dtype):
    for n_rows, n_classes in [(7, 5), (3, 1), (2, 130)]:
        margin = PRESETS[preset](make_prior(n_classes))
        logits = (4.0 * torch.randn(n_rows, n_classes, dtype=torch.float64)).to(device, dtype)
        target = torch.randint(n_classes, (n_rows,), device=device)
        upstream = torch.randn(n_rows, dtype=torch.float64)
        x, exact = logits.requires_grad_(), logits.detach().double().cpu().requires_grad_()
        loss = margin_cross_entropy(x, target, margin, reduction="none", impl=impl)
        want = explicit(exact, target.cpu(), margin)
        (gradient,) = torch.autograd.grad(loss, x, upstream.to(device, loss.dtype))
        (want_gradient,) = torch.autograd.grad(want, exact, upstream)
        loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        assert loss.dtype == loss_dtype
        assert_near(loss.detach(), want.detach(), loss_dtype)
        assert_near(gradient, want_gradient, dtype)


def test_presets_without_a_prior_are_their_papers_matrices():
    """(C, C) matrices Delta[y, c] and factors of f_c and f_y, written out by the formulas of the papers."""
    counts = torch.tensor([625.0, 81.0, 16.0, 1.0], dtype=torch.float64)
    fourth_roots = torch.tensor([5.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    present = torch.tensor([True, False, True, False])
    rho = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    none, ones = torch.zeros(4, 4, dtype=torch.float64), torch.ones(4, 4, dtype=torch.float64)
    restricted = torch.tensor([1.0, 0.3, 1.0, 0.3], dtype=torch.float64)
    logits, target = 3.0 * torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 4
    for margin, delta, of_c, of_y in (
        (margins.fedlc(counts, 2.0), 2.0 * (1.0 / fourth_roots[:, None] - 1.0 / fourth_roots[None, :]), ones, ones),
        (margins.fedrs(present, 0.3), none, restricted.expand(4, 4), restricted[:, None].expand(4, 4)),
        (margins.immax(rho), none, 1.0 / rho[:, None].expand(4, 4), 1.0 / rho[:, None].expand(4, 4)),
    ):
        exponents = delta[target] + of_c[target] * logits - of_y[target] * logits.gather(1, target[:, None])
        want = (exponents.exp() * (1 - F.one_hot(target, 4))).sum(1).log1p()
        assert_close(margin_cross_entropy(logits, target, margin, reduction="none"), want, rtol=1e-6, atol=0.0)


def test_a_class_without_examples_on_a_client_takes_no_part_under_fedlc_whatever_tau_is(impl, device):
    logits, target = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 3, 3, 1, 0])
    for tau in (0.0, 1.5):
        margin = margins.fedlc({0: 16, 1: 1, 2: 0, 3: 81}, tau).to(device)
        x, exact = logits.clone().to(device).requires_grad_(), logits.clone().requires_grad_()
        loss = margin_cross_entropy(x, target.to(device), margin, impl=impl)
        offset = -tau * torch.tensor([0.5, 1.0, 1.0 / 3.0], dtype=torch.float64)
        want = F.cross_entropy(exact[:, [0, 1, 3]] + offset, torch.tensor([0, 1, 2])[[0, 1, 2, 2, 1, 0]])
        assert_close(loss.detach().cpu(), want.detach(), rtol=1e-6, atol=0.0)
        loss.backward()
        want.backward()
        assert_near(x.grad, exact.grad, torch.float32)


def test_counts_and_masks_may_be_of_any_kind():
    tensor = margins.fedlc(torch.tensor([16, 1, 81]), 2.0)
    assert tensor.negative_offset is tensor.target_offset
    assert_close(tensor.negative_offset, torch.tensor([-1.0, -2.0, -2.0 / 3.0]))
    for counts in ([16, 1, 81], np.array([16.0, 1.0, 81.0]), Counter({2: 81, 0: 16, 1: 1}), pd.Series([16, 1, 81])):
        assert torch.equal(margins.fedlc(counts, 2.0).negative_offset, tensor.negative_offset)
    for present in ([True, False], np.array([True, False]), torch.tensor([3, 0]) > 0):
        assert margins.fedrs(present).scale.tolist() == [1.0, 0.5]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("preset", ["adaptive", "equalised", "vector_scaling", "balanced", "added"])
def test_reductions_weights_and_several_labels_weigh_losses_of_single_labels(impl, device, preset, reduction):
    """Labels of a row may be equal or ignored. Weights are in the mean's denominator, alpha is not."""
    n_rows, n_classes = 6, 9
    margin = PRESETS[preset](make_prior(n_classes))
    logits = 3.0 * torch.randn(n_rows, n_classes, dtype=torch.float64)
    target = torch.randint(3, (n_rows, 3))
    target[1, 2], target[4] = -100, -100
    shares, weight = torch.rand(n_rows, 3, dtype=torch.float64), torch.rand(n_classes, dtype=torch.float64) + 0.1
    x = logits.clone().to(device).requires_grad_()
    exact = logits.clone().requires_grad_()
    loss = margin_cross_entropy(
        x, target.to(device), margin, target_weight=shares.to(device), weight=weight.to(device), reduction=reduction,
        impl=impl,
    )  # fmt: skip
    counts = target >= 0
    labels = target.clamp_min(0)
    mass = torch.where(counts, shares * weight[labels], 0.0)
    losses = torch.stack([explicit(exact, labels[:, k], margin) for k in range(3)], 1)
    total = torch.where(counts, shares, 0.0).sum(1)
    row_weight = torch.where(total > 0, mass.sum(1) / total, 0.0)
    want = (mass * losses).sum() / (row_weight.sum() if reduction == "mean" else 1.0)
    assert_close(loss.detach().cpu(), want.detach(), rtol=1e-12, atol=0.0)
    (2.5 * loss).backward()
    (2.5 * want).backward()
    assert_near(x.grad, exact.grad, torch.float64)


@pytest.mark.parametrize("preset", ["balanced", "vector_scaling", "cdt", "logit_adjusted, consistent"])
def test_probabilities_and_smoothing_weigh_the_loss_of_every_class(impl, device, preset):
    n_rows, n_classes = 4, 6
    margin = PRESETS[preset](make_prior(n_classes))
    logits, target = torch.randn(n_rows, n_classes).double(), torch.randn(n_rows, n_classes).double().softmax(1)
    x, exact = logits.clone().to(device).requires_grad_(), logits.clone().requires_grad_()
    loss = margin_cross_entropy(x, target.to(device), margin, reduction="sum", label_smoothing=0.2, impl=impl)
    every = torch.stack([explicit(exact, torch.full((n_rows,), c), margin) for c in range(n_classes)], 1)
    want = ((0.8 * target + 0.2 / n_classes) * every).sum()
    assert_close(loss.detach().cpu(), want.detach(), rtol=1e-12, atol=0.0)
    loss.backward()
    want.backward()
    assert_near(x.grad, exact.grad, torch.float64)


def test_only_the_reference_takes_dense_targets_if_the_offsets_differ(device):
    margin = margins.adaptive(make_prior(5))
    logits, target = torch.randn(3, 5, device=device).double(), torch.rand(3, 5, device=device).double().softmax(1)
    loss = margin_cross_entropy(logits, target, margin, reduction="none")
    every = [explicit(logits.cpu(), torch.full((3,), c), margin) for c in range(5)]
    assert_close(loss.cpu(), (target.cpu() * torch.stack(every, 1)).sum(1), rtol=1e-12, atol=0.0)
    for impl in ["triton"] + ["blocked"] * (device == "cpu"):
        with pytest.raises(ValueError, match="'reference' or 'auto' for class probabilities or label smoothing"):
            margin_cross_entropy(logits, target, margin, impl=impl)
        with pytest.raises(ValueError, match="'reference' or 'auto' for class probabilities or label smoothing"):
            margin_cross_entropy(logits, target.argmax(1), margin, label_smoothing=0.1, impl=impl)


def test_only_the_reference_takes_several_labels_and_dense_targets_under_a_label_scale(device):
    """Every label then has a sum over the classes of its own."""
    margin = PRESETS["immax, every field"](make_prior(5))
    logits = torch.randn(3, 5, dtype=torch.float64)
    labels, shares = torch.tensor([[0, 1], [2, 2], [4, 3]]), torch.rand(3, 2, dtype=torch.float64)
    probabilities = torch.rand(3, 5, dtype=torch.float64).softmax(1)
    smoothed = 0.9 * F.one_hot(labels[:, 0], 5).double() + 0.1 / 5
    mass = torch.zeros(3, 5, dtype=torch.float64).scatter_add_(1, labels, shares)
    for target, options, expected_mass in (
        (labels, {"target_weight": shares.to(device)}, mass),
        (probabilities, {}, probabilities),
        (labels[:, 0], {"label_smoothing": 0.1}, smoothed),
    ):
        x, exact = logits.clone().to(device).requires_grad_(), logits.clone().requires_grad_()
        loss = margin_cross_entropy(x, target.to(device), margin, reduction="sum", **options)
        every = [explicit(exact, torch.full((3,), c), margin) for c in range(5)]
        want = (expected_mass * torch.stack(every, 1)).sum()
        assert_close(loss.detach().cpu(), want.detach(), rtol=1e-12, atol=0.0)
        loss.backward()
        want.backward()
        assert_near(x.grad, exact.grad, torch.float64)
        for impl in ["triton"] + ["blocked"] * (device == "cpu"):
            with pytest.raises(ValueError, match="'reference' or 'auto' for class probabilities"):
                margin_cross_entropy(logits.to(device), target.to(device), margin, impl=impl, **options)


@pytest.mark.parametrize("gap", [12.0, 30.0, 200.0])
@pytest.mark.parametrize(("shift", "label_scale"), [(-5.0, None), (5.0, None), (-5.0, 4.0)])
def test_a_confident_row_keeps_its_digits_under_a_margin(impl, device, gap, shift, label_scale):
    """Loss and target gradient are about exp(-gap - shift), too small to show beside 1 in float32."""
    factor = 1.0 if label_scale is None else label_scale
    margin = PairwiseMargin(
        target_offset=torch.tensor([shift, 0.0, 0.0], device=device),
        label_scale=None if label_scale is None else torch.tensor([factor, 1.0, 0.5], device=device),
    )
    logits = torch.tensor([[gap / factor, 0.0, -1.0 / factor]], device=device, requires_grad=True)
    loss = margin_cross_entropy(logits, torch.tensor([0], device=device), margin, impl=impl)
    loss.backward()
    others = (1.0 + math.exp(-1.0)) * math.exp(-gap - shift)
    eps = torch.finfo(torch.float32).eps
    tiny = 1e-37  # what the hardware may flush to 0
    assert_close(loss.item(), math.log1p(others), rtol=(gap + 16) * eps, atol=tiny)
    assert_close(logits.grad[0, 0].item(), -factor * others / (1.0 + others), rtol=(gap + 16) * eps, atol=4 * tiny)


@pytest.mark.parametrize("gap", [50.0, 1e4, 1e30])
def test_the_loss_of_a_label_far_below_the_others_is_the_distance(impl, device, gap):
    margin = PairwiseMargin(target_offset=torch.tensor([-3.0, 0.0], device=device))
    logits = torch.tensor([[-gap, 0.0]], device=device, requires_grad=True)
    loss = margin_cross_entropy(logits, torch.tensor([0], device=device), margin, impl=impl)
    loss.backward()
    assert_close(loss.item(), gap + 3.0, rtol=1e-6, atol=0.0)
    assert_close(logits.grad.cpu(), torch.tensor([[-1.0, 1.0]]))


def test_a_class_that_competes_with_nobody_may_still_be_a_label(impl, device):
    """negative_offset = -inf takes the class out of the sums of other labels, not out of its own sum."""
    margin = PairwiseMargin(negative_offset=torch.tensor([0.0, -math.inf, 0.0], device=device).double())
    logits = torch.randn(4, 3, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 1])
    x, exact = logits.clone().to(device).requires_grad_(), logits.clone().requires_grad_()
    loss = margin_cross_entropy(x, target.to(device), margin, reduction="none", impl=impl)
    want = explicit(exact, target, margin)
    assert_close(loss.detach().cpu(), want.detach())
    loss.sum().backward()
    want.sum().backward()
    assert_close(x.grad.cpu(), exact.grad)


@pytest.mark.parametrize("preset", ["balanced", "logit_adjusted, consistent", "fisher_consistent"])
def test_no_mass_on_a_class_without_examples_costs_nothing(impl, device, preset):
    """The alpha of that class is infinite; target mass 0 on it must add 0 to the loss, not 0 * inf."""
    seen = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    prior = torch.cat([seen, torch.zeros(1, dtype=torch.float64)]).log()
    log_delta = torch.tensor([0.5, 0.0, -1.0, 2.0], dtype=torch.float64)
    margin = margins.fisher_consistent(prior, log_delta) if preset == "fisher_consistent" else PRESETS[preset](prior)
    assert margin.alpha is not None
    assert margin.alpha[3] == math.inf
    logits = torch.randn(2, 4, dtype=torch.float64)
    mass = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.3, 0.0, 0.7, 0.0]], dtype=torch.float64)
    labels, shares = torch.tensor([[0, 3], [2, 0]]), torch.tensor([[1.0, 0.0], [0.7, 0.3]], dtype=torch.float64)
    toward = {"label_smoothing": 0.25, "smoothing_distribution": prior.exp().to(device)}
    for target, options, expected_mass in (
        (mass, {}, mass),
        (labels, {"target_weight": shares.to(device)}, mass),
        (mass, toward, 0.75 * mass + 0.25 * prior.exp()),
        (labels[:, 0], toward, 0.75 * F.one_hot(labels[:, 0], 4) + 0.25 * prior.exp()),
    ):
        x, exact = logits.clone().to(device).requires_grad_(), logits.clone().requires_grad_()
        loss = margin_cross_entropy(x, target.to(device), margin.to(device), reduction="sum", impl=impl, **options)
        every = torch.stack([explicit(exact, torch.full((2,), c), margin) for c in range(3)], 1)
        want = (expected_mass[:, :3] * every).sum()
        assert_close(loss.detach().cpu(), want.detach(), rtol=1e-12, atol=0.0)
        loss.backward()
        want.backward()
        assert_near(x.grad, exact.grad, torch.float64)


def test_weights_and_alpha_multiply_in_the_dtype_of_the_arithmetic(impl, device):
    """A product in bfloat16 would have 8 bits; a product in float32 has 24, too few for float64 logits."""
    weight = torch.linspace(0.3, 1.7, 5, dtype=torch.float64)
    for logits, given in ((torch.randn(4, 5), torch.bfloat16), (torch.randn(4, 5, dtype=torch.float64), torch.float32)):
        alpha, class_weight = weight.flip(0).sqrt().to(device, given), weight.to(device, given)
        logits, target = logits.to(device), torch.tensor([0, 1, 2, 4], device=device)
        loss = margin_cross_entropy(
            logits, target, PairwiseMargin(alpha=alpha), weight=class_weight, reduction="sum", impl=impl
        )
        rows = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
        exact = (rows * alpha[target].double() * class_weight[target].double()).sum()
        torch.testing.assert_close(loss.double(), exact, rtol=4 * torch.finfo(loss.dtype).eps, atol=0.0)


def test_margins_of_0_are_0_for_a_class_without_examples_too():
    margin = margins.ldam(torch.tensor([0.5, 0.5, 0.0]).log(), max_margin=0.0)
    assert torch.equal(margin.target_offset, torch.zeros(3))


def test_logit_adjusted_margin_has_the_bits_of_logit_adjusted_cross_entropy(impl, device):
    prior = make_prior(11, dtype=torch.float32)
    logits, target = torch.randn(5, 11, device=device), torch.randint(11, (5,), device=device)
    margin = margins.logit_adjusted(prior, 1.0)
    outcomes = []
    for loss in (
        lambda x: margin_cross_entropy(x, target, margin, impl=impl),
        lambda x: logit_adjusted_cross_entropy(x, target, margin.negative_offset, impl=impl),
    ):
        x = logits.clone().requires_grad_()
        value = loss(x)
        value.backward()
        outcomes.append((value.detach(), x.grad))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])


# Differentiation ------------------------------------------------------------------------------------------------------

DIFFERENTIATED = ["adaptive", "equalised", "vector_scaling", "added", "immax", "immax, every field"]


@pytest.mark.parametrize("preset", ["adaptive", slow("equalised"), slow("vector_scaling"), "added"])
def test_derivatives_agree_with_finite_differences(impl, device, preset):
    margin = PRESETS[preset](make_prior(5))
    target = torch.tensor([[0, 1], [2, 2], [4, -100]], device=device)
    shares = torch.tensor([[0.3, 0.7], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64, device=device)
    logits = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)

    def loss(x):
        return margin_cross_entropy(x, target, margin, target_weight=shares, impl=impl)

    interpreted = impl == "triton" and device == "cpu"
    assert gradcheck(loss, (logits,), check_forward_ad=True, fast_mode=interpreted)
    assert gradgradcheck(loss, (logits,), fast_mode=interpreted)


@pytest.mark.parametrize("preset", DIFFERENTIATED)
def test_batches_tangents_and_gradients_for_each_sample(impl, device, preset):
    margin = PRESETS[preset](make_prior(5))
    logits = torch.randn(4, 5, dtype=torch.float64, device=device)
    target = torch.tensor([0, 3, 1, 1], device=device)

    def loss(x, y):
        return margin_cross_entropy(x, y, margin, impl=impl)

    exact = logits.cpu().clone().requires_grad_()
    (want,) = torch.autograd.grad(explicit(exact, target.cpu(), margin).sum(), exact)
    assert_close(vmap(grad(loss))(logits, target).cpu(), want)
    direction = logits.cos()
    _, tangent = jvp(lambda x: 4.0 * loss(x, target), (logits,), (direction,))
    assert_close(tangent.cpu(), (want * direction.cpu()).sum())


def test_vectors_of_a_margin_may_be_learned(device):
    fields = [torch.rand(5, dtype=torch.float64, device=device).add(0.5).requires_grad_() for _ in range(5)]
    logits = torch.randn(3, 5, dtype=torch.float64, device=device)
    target = torch.tensor([0, 3, 3], device=device)

    def loss(alpha, negative_offset, target_offset, scale, label_scale):
        margin = PairwiseMargin(alpha, negative_offset, target_offset, scale, label_scale)
        return margin_cross_entropy(logits, target, margin, weight=logits[0].exp())

    assert gradcheck(loss, fields)
    for impl in ["triton"] + ["blocked"] * (device == "cpu"):
        for margin in (PairwiseMargin(scale=fields[0]), margins.immax(fields[0])):
            with pytest.raises(ValueError, match="gradient of alpha, an offset or a scale of a margin"):
                margin_cross_entropy(logits, target, margin, impl=impl)


@pytest.mark.parametrize("preset", ["adaptive", "vector_scaling", "immax, every field"])
def test_compiled_is_eager(impl, device, preset):
    torch._dynamo.reset()  # every case is another graph of one function, and their number is limited
    margin = PRESETS[preset](make_prior(5))
    logits = torch.randn(3, 5, dtype=torch.float64, device=device)
    target = torch.tensor([0, 3, -100], device=device)

    def gradient(function):
        x = logits.clone().requires_grad_()
        loss = function(x, target, margin, impl=impl)
        loss.backward()
        return loss.detach(), x.grad

    compiled = torch.compile(margin_cross_entropy, fullgraph=True, backend="aot_eager")
    assert_close(gradient(compiled), gradient(margin_cross_entropy))


# Consistency ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_consistency_is_that_of_the_table(preset):
    for dtype in (torch.float32, torch.float64):
        prior = make_prior(40, dtype=dtype)
        verdict = margins.consistency(PRESETS[preset](prior), prior)
        assert bool(verdict) == (preset in COVERED), str(verdict)
        assert (str(verdict) == "consistent for the balanced error (Theorem 1)") == bool(verdict)


@pytest.mark.parametrize(
    ("make", "unmet"),
    [
        (lambda prior: margins.logit_adjusted(prior, 1.5), r"alpha must be proportional .*alpha_y = pi_y\^\(tau - 1\)"),
        (lambda prior: margins.adaptive(prior), r"negative_offset and target_offset must be equal"),
        (lambda prior: margins.cdt(prior, 0.1) + margins.logit_adjusted(prior), r"scale must be one positive number"),
        (lambda prior: PairwiseMargin(scale=-1.0), r"scale must be one positive number"),
        (
            lambda prior: margins.logit_adjusted(prior) + margins.immax((prior / 3).exp()),
            r"^not covered by Theorem 1: label_scale must be one positive number for all classes, but lies between",
        ),
        (
            lambda prior: margins.logit_adjusted(prior) + PairwiseMargin(label_scale=-torch.ones_like(prior)),
            r"^not covered by Theorem 1: label_scale must be one positive number .* between -1 and -1$",
        ),
        (lambda prior: margins.fedlc(prior.exp(), 1.0), "alpha must be proportional"),
        (
            lambda prior: margins.fedrs(prior > prior.median()),
            r"^not covered by Theorem 1: scale must be one positive number .* lies between 0.5 and 1; alpha must",
        ),
        (lambda prior: PairwiseMargin(alpha=(-2 * prior).exp()), r"alpha must be proportional"),
        (lambda prior: PairwiseMargin(alpha=prior * 0.0), "alpha must be positive, but is 0 for class 0"),
        (
            lambda prior: PairwiseMargin(None, *2 * [prior.where(prior < -3, -math.inf)]),
            "must be finite, log delta, but are -inf",
        ),
        (lambda prior: PairwiseMargin(None, *2 * [1.01 * prior + 1e4]), r"a factor of up to 1\.0"),
        (lambda prior: PairwiseMargin(None, *2 * [1.00001 * prior]), r"a factor of up to 1\.0000"),
    ],
)
def test_a_verdict_names_the_condition_that_is_not_met(make, unmet):
    prior = make_prior(12)
    assert re.search(unmet, str(margins.consistency(make(prior), prior)))


def test_constants_that_change_no_minimum_change_no_verdict():
    prior = make_prior(12)
    one = margins.logit_adjusted(prior)
    seven, offset = torch.full_like(prior, 7.0), one.negative_offset + 3.0
    same = PairwiseMargin(seven, offset, offset.clone(), 30.0, seven)
    assert margins.consistency(same, prior - 5.0)
    unseen = torch.cat([prior, prior.new_tensor([-math.inf])])  # what a label without examples is scaled by is nothing
    unused = PairwiseMargin(None, unseen, unseen, None, torch.cat([seven, prior.new_tensor([9.0])]))
    assert margins.consistency(unused, unseen)
    apart = PairwiseMargin(None, one.negative_offset + 3.0, one.target_offset)
    assert not margins.consistency(apart, prior)


def test_two_classes_have_no_more_conditions_than_differences():
    """For two classes, equal offsets only mean Delta_01 = -Delta_10."""
    prior = torch.tensor([0.95, 0.05], dtype=torch.float64).log()
    u, v = prior - prior[0], prior - prior[0]
    assert margins.consistency(PairwiseMargin(None, u, v), prior)
    # The loss depends only on u_1 - v_0 and u_0 - v_1.
    shifted = PairwiseMargin(None, u + torch.tensor([1.0, 0.0]), v + torch.tensor([0.0, 1.0]))
    assert margins.consistency(shifted, prior)
    assert not margins.consistency(PairwiseMargin(None, u, v - 1.0), prior)


def test_the_minimiser_of_a_covered_loss_is_the_balanced_bayes_rule():
    """Given P(y | x) at one x, the logits of least expected loss rank classes as the balanced posterior does."""
    prior = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    likelihood = torch.tensor([0.2, 0.5, 0.45], dtype=torch.float64)  # of x under each class: the balanced posterior
    posterior = (prior * likelihood) / (prior * likelihood).sum()
    for preset in PRESETS:
        margin = PRESETS[preset](prior.log())
        logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=400, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def expected(logits=logits, optimizer=optimizer, margin=margin):
            optimizer.zero_grad()
            every = margin_cross_entropy(
                logits.expand(3, 3), torch.arange(3), margin, reduction="none", impl="reference"
            )
            risk = (posterior * every).sum()
            risk.backward()
            return risk

        optimizer.step(expected)
        if preset in COVERED:
            assert logits.argmax() == likelihood.argmax() == 1, preset
        if preset == "erm":
            assert logits.argmax() == posterior.argmax() == 0


# Bad input ------------------------------------------------------------------------------------------------------------

VECTOR = torch.zeros(3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PairwiseMargin(alpha=[1.0]), TypeError, "alpha must be a torch.Tensor, got list"),
        (lambda: PairwiseMargin(scale="30"), TypeError, "scale must be a number, got str"),
        (lambda: PairwiseMargin(scale=math.inf), ValueError, "scale must be finite, got inf"),
        (lambda: PairwiseMargin(alpha=VECTOR[None]), ValueError, r"alpha must have shape \(C,\), got \(1, 3\)"),
        (lambda: PairwiseMargin(alpha=VECTOR.long()), TypeError, "alpha must be float16, .* got torch.int64"),
        (lambda: PairwiseMargin(alpha=VECTOR - 1.0), ValueError, "alpha must be not negative, got -1.0 for class 0"),
        (
            lambda: PairwiseMargin(VECTOR, VECTOR[:2]),
            ValueError,
            r"negative_offset must have the shape of alpha, \(3,\), got \(2,\)",
        ),
        (
            lambda: PairwiseMargin(target_offset=VECTOR + math.nan),
            ValueError,
            "target_offset must be finite or -inf, got nan for class 0",
        ),
        (lambda: PairwiseMargin(negative_offset=VECTOR - math.inf), ValueError, "finite for some class"),
        (lambda: margins.cdt(VECTOR, 1.0) + margins.cdt(VECTOR, 1.0), ValueError, "scale must be None in one of two"),
        (lambda: margins.balanced([1, 2]), TypeError, "log_prior must be a torch.Tensor, got list"),
        (lambda: margins.balanced(torch.tensor([3, 4])), TypeError, "log_prior_from_counts"),
        (lambda: margins.balanced(VECTOR + math.nan), ValueError, "log_prior must be finite or -inf"),
        (lambda: margins.logit_adjusted(VECTOR, -1.0), ValueError, "tau must be finite and not negative, got -1.0"),
        (lambda: margins.cdt(VECTOR, -1.0), ValueError, "gamma must be finite and not negative"),
        (lambda: margins.ldam(VECTOR, scale=0.0), ValueError, "scale must be finite and positive"),
        (lambda: margins.equalised(VECTOR, lambda pi: pi + 1.0), ValueError, "transform must give 3 numbers between"),
        (lambda: margins.fisher_consistent(VECTOR, VECTOR[:2]), ValueError, r"log_delta must have shape \(3,\)"),
        (lambda: margins.fisher_consistent(VECTOR, VECTOR - math.inf), ValueError, "log_delta must be finite"),
        (lambda: margins.fedlc([4, -1], 1.0), ValueError, "class_counts must be non-negative, got -1 for class 1"),
        (
            lambda: margins.fedlc([[4, 1]], 1.0),
            ValueError,
            r"class_counts must have shape \(n_classes,\), got \(1, 2\)",
        ),
        (lambda: margins.fedlc([0, 0], 1.0), ValueError, "class_counts must have a positive count, got 0 for all 2"),
        (lambda: margins.fedlc([1, 2], -1.0), ValueError, "tau must be finite and not negative, got -1.0"),
        (lambda: margins.fedrs([3, 0]), TypeError, "present must be bool, as class_counts > 0 is, got int64"),
        (lambda: margins.fedrs(VECTOR), TypeError, "present must be bool, as class_counts > 0 is, got float32"),
        (lambda: margins.fedrs([[True]]), ValueError, r"present must have shape \(C,\), got \(1, 1\)"),
        (lambda: margins.fedrs([True, False], 1.5), ValueError, "alpha must be between 0 and 1, got 1.5"),
        (lambda: margins.immax([1.0]), TypeError, "class_margins must be a torch.Tensor, got list"),
        (lambda: margins.immax(VECTOR.long()), TypeError, "class_margins must be float16, .* got torch.int64"),
        (lambda: margins.immax(VECTOR[None]), ValueError, r"class_margins must have shape \(C,\), got \(1, 3\)"),
        (
            lambda: margins.immax(torch.tensor([1.0, 0.0])),
            ValueError,
            "class_margins must be finite and positive, got 0.0 for class 1",
        ),
        (lambda: margins.immax(VECTOR + math.inf), ValueError, "class_margins must be finite and positive, got inf"),
        (
            lambda: margins.immax(VECTOR + 1.0) + margins.immax(VECTOR + 1.0),
            ValueError,
            "label_scale must be None in one of two",
        ),
        (lambda: margins.consistency(VECTOR, VECTOR), TypeError, "margin must be a PairwiseMargin, got Tensor"),
        (lambda: margins.consistency(PairwiseMargin(VECTOR), VECTOR[:2]), ValueError, r"must have shape \(2,\)"),
        (
            lambda: margin_cross_entropy(torch.zeros(2, 4), torch.zeros(2).long(), PairwiseMargin(VECTOR)),
            ValueError,
            r"margin.alpha must have shape \(4,\), got \(3,\)",
        ),
        (
            lambda: margin_cross_entropy(torch.zeros(2, 3), torch.zeros(2).long(), VECTOR),
            TypeError,
            "margin must be a PairwiseMargin, got Tensor",
        ),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_margin_that_moves_or_is_added_keeps_equal_offsets_as_one_tensor():
    margin = margins.logit_adjusted(log_prior_from_counts([5, 3]))
    moved = margin.to(torch.float64)
    assert moved.negative_offset is moved.target_offset
    assert moved.negative_offset.dtype == torch.float64
    assert repr(moved) == "PairwiseMargin(negative_offset=(2,) float64, target_offset=(2,) float64)"
    twice = moved + moved
    assert twice.negative_offset is twice.target_offset
