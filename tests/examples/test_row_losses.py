"""Tests of examples/row_losses.py: values and gradients of both losses against their formulas in float64.

The formulas are written out with log p, the `log_softmax` of adjusted logits. Regimes: rows of ordinary and of large
loss; a confident row, whose 1 - p a subtraction in float32 would round away; a row of loss 0; ignored rows; a class
without examples.
"""

import contextlib
import importlib.util
import io
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch.testing import assert_close

EXAMPLES = Path(__file__).parents[2] / "examples"
LOG_PRIOR = torch.tensor([0.6, 0.25, 0.1, 0.04, 0.01], dtype=torch.float64).log()
TARGET = torch.tensor([0, 4, 2, -100, 3, 1])


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))  # where the script finds loops/digits.py
        spec = importlib.util.spec_from_file_location("row_losses", EXAMPLES / "row_losses.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def log_p_and_rest(logits, target, log_prior, tau):
    """log p and log(1 - p) of the labels, in float64, both without a subtraction from 1."""
    z, is_label = logits + tau * log_prior, F.one_hot(target, logits.shape[1]).bool()
    ahead = z[is_label] - z.masked_fill(is_label, -math.inf).logsumexp(1)
    assert_close(F.logsigmoid(ahead), z.log_softmax(1)[is_label], rtol=1e-10, atol=1e-15)
    return F.logsigmoid(ahead), F.logsigmoid(-ahead)


def focal(logits, target, log_prior, tau, gamma):
    log_p, log_rest = log_p_and_rest(logits, target, log_prior, tau)
    return ((gamma * log_rest).exp() * -log_p).mean()


def generalized(logits, target, log_prior, tau, q):
    log_p, _ = log_p_and_rest(logits, target, log_prior, tau)
    return (-torch.expm1(q * log_p) / q).mean()


CASES = [("adjusted_focal_loss", focal, gamma) for gamma in (0.0, 0.5, 1.0, 2.0)]
CASES += [("adjusted_generalized_cross_entropy", generalized, q) for q in (0.3, 0.7, 1.0)]


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize(("name", "formula", "parameter"), CASES)
def test_value_and_gradient_are_those_of_the_formula(example, impl, name, formula, parameter, tau):
    logits = 3.0 * torch.randn(6, 5, dtype=torch.float64)
    counts = TARGET >= 0
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        x = logits.to(DEVICE, dtype, copy=True).requires_grad_()
        loss = getattr(example, name)(x, TARGET.to(DEVICE), LOG_PRIOR.to(DEVICE, dtype), tau, parameter, impl=impl)
        loss.backward()
        exact = x.detach().double().cpu().clone().requires_grad_()
        want = formula(exact[counts], TARGET[counts], LOG_PRIOR.to(dtype).double(), tau, parameter)
        want.backward()
        assert loss.dtype == dtype
        assert_close(loss.detach().double().cpu(), want.detach(), rtol=rtol, atol=0.0)
        assert_close(x.grad.double().cpu(), exact.grad, rtol=rtol, atol=rtol * exact.grad.abs().max().item())
        assert (x.grad[3] == 0.0).all()


@pytest.mark.parametrize("gap", [5.0, 12.0, 20.0, 40.0])
@pytest.mark.parametrize(("name", "formula", "parameter"), CASES)
def test_a_confident_row_keeps_its_digits(example, impl, name, formula, parameter, gap):
    """1 - p is about exp(-gap): of 6e-6 a subtraction from 1 in float32 keeps two digits, of 2e-9 none."""
    logits = torch.tensor([[gap, 0.0, -1.0]], dtype=torch.float64)
    target, log_prior = torch.tensor([0]), torch.zeros(3, dtype=torch.float64)
    x, exact = logits.float().to(DEVICE).requires_grad_(), logits.clone().requires_grad_()
    loss = getattr(example, name)(x, target.to(DEVICE), log_prior.float().to(DEVICE), 1.0, parameter, impl=impl)
    want = formula(exact, target, log_prior, 1.0, parameter)
    loss.backward()
    want.backward()
    rtol, smallest = 20 * gap * torch.finfo(torch.float32).eps, 1e-37  # what is smaller may be flushed to 0
    assert_close(loss.detach().double().cpu(), want.detach(), rtol=rtol, atol=smallest)
    assert_close(x.grad.double().cpu(), exact.grad, rtol=rtol, atol=smallest)


@pytest.mark.parametrize(("name", "formula", "parameter"), CASES)
def test_a_row_of_loss_0_has_a_finite_gradient(example, impl, name, formula, parameter):
    x = torch.tensor([[200.0, 0.0, 0.0], [0.0, 1.0, 0.0]], device=DEVICE, requires_grad=True)
    target = torch.tensor([0, 1], device=DEVICE)
    getattr(example, name)(x, target, torch.zeros(3, device=DEVICE), 1.0, parameter, impl=impl).backward()
    exact = x.detach()[1:].double().cpu().requires_grad_()
    formula(exact, target[1:].cpu(), torch.zeros(3, dtype=torch.float64), 1.0, parameter).mul(0.5).backward()
    assert (x.grad[0] == 0.0).all()
    assert_close(x.grad[1:].double().cpu(), exact.grad, rtol=1e-5, atol=1e-7)


def test_a_class_without_examples_takes_no_part(example, impl):
    log_prior = torch.cat([LOG_PRIOR, torch.tensor([-math.inf]).double()]).to(DEVICE)
    logits, counts = torch.randn(6, 6, dtype=torch.float64), TARGET >= 0
    for name, formula, parameter in CASES:
        loss = getattr(example, name)(logits.to(DEVICE), TARGET.to(DEVICE), log_prior, 1.0, parameter, impl=impl)
        want = formula(logits[counts, :5], TARGET[counts], LOG_PRIOR, 1.0, parameter)
        assert_close(loss.cpu(), want, rtol=1e-12, atol=0.0)


@pytest.mark.slow
def test_adjusted_losses_have_a_lower_balanced_error_than_cross_entropy(example, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["row_losses.py", "--seeds", "2"])
    n_threads = torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            example.main()
    finally:
        torch.set_num_threads(n_threads)
    printed = re.findall(r"^(.+): balanced error ([\d.]+) ± [\d.]+ % over 2 seeds$", stdout.getvalue(), re.MULTILINE)
    assert [name for name, _ in printed] == [
        "cross entropy", "logit-adjusted", "focal, adjusted", "generalized cross entropy, adjusted",
    ]  # fmt: skip
    plain, *adjusted = (float(error) for _, error in printed)
    assert max(adjusted) < plain - 2
