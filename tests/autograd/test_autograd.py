"""Derivatives through torch.autograd: first and second order, reverse and forward mode, as training loops use them.

Oracles: `F.cross_entropy` in float64 on logits that the offset was added to, and finite differences. The oracle gives
a class at -inf the logit -1e30, so that its probability is 0.

Grid: every regime of the target (see REGIMES) with each reduction, learning the logits, the log prior or both, since
an implementation takes different paths for them: `blocked` computes the gradient in the forward pass if only the
logits are learned and the loss is a scalar. Log priors reach -12, so an offset that is counted twice, dropped or
rounded shows. Finite differences in Triton's interpreter are random projections of the Jacobian: a kernel takes tens
of milliseconds there.
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, one_in, slow
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fused_la._cpu
import fused_la._cpu.single_label
import fused_la._triton
import fused_la.reference
from fused_la import logit_adjusted_cross_entropy

# PyTorch scripts a few of its own formulas when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is")

TAU = 1.3
LOG_PRIOR = torch.tensor([-0.1, -2.5, -6.0, -12.0], dtype=torch.float64)
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)
REDUCTIONS = ["none", "mean", "sum"]
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64 on both sides
IMPL_OPTIONS = "impl must be 'reference' or 'auto' for a gradient of target, target_weight, weight"


# Regimes --------------------------------------------------------------------------------------------------------------


class Regime(NamedTuple):
    """The arguments of a loss except its reduction; float64."""

    logits: Tensor
    log_prior: Tensor  # finite, also for a dropped class
    target: Tensor
    options: dict
    dropped: Tensor  # (C,) bool: classes at -inf


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


REGIMES = {
    "labels": ((3, 4), torch.tensor([0, 3, 2]), {}),
    "ignored rows": ((4, 4), torch.tensor([3, -100, 0, -100]), {}),
    "class weight": ((4, 4), torch.tensor([0, 3, 1, 2]), {"weight": WEIGHT, "ignore_index": 1}),
    "uniform smoothing": ((3, 4), torch.tensor([1, 3, -100]), {"label_smoothing": 0.2, "weight": WEIGHT}),
    "prior smoothing": (
        (3, 4),
        torch.tensor([0, -100, 3]),
        {"label_smoothing": 0.2, "smoothing_distribution": LOG_PRIOR.softmax(0)},
    ),
    "weighted labels": (
        (3, 4),
        torch.tensor([[0, 3, 1], [2, 2, 1], [3, -100, 0]]),
        {
            "target_weight": double([0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.25, 0.5, 0.25]),
            "weight": WEIGHT,
            "label_smoothing": 0.1,
        },
    ),
    "probabilities": (
        (3, 4),
        double([0.7, 0.3, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.0, 1.0]),
        {"weight": WEIGHT, "label_smoothing": 0.1},
    ),
    "dropped class": (
        (3, 4),
        torch.tensor([0, 3, 2]),
        {"label_smoothing": 0.2, "smoothing_distribution": double(0.5, 0.0, 0.25, 0.25)},
    ),
    "dropped class and probabilities": ((2, 4), double([0.7, 0.0, 0.3, 0.0], [0.0, 0.0, 0.0, 1.0]), {}),
    "images": ((2, 4, 3), torch.tensor([[0, 3, 2], [1, -100, 3]]), {"weight": WEIGHT}),
    "images of weighted labels": (
        (2, 4, 2),
        torch.tensor([[[0, 3], [1, 3]], [[2, 2], [0, 1]]]),
        {"target_weight": double([[0.4, 0.9], [0.6, 0.1]], [[0.3, 1.0], [0.7, 0.0]])},
    ),
    "images of probabilities": ((2, 4, 1, 2), double(0.6, 0.1, 0.2, 0.1).view(4, 1, 1).expand(2, 4, 1, 2), {}),
    "one row": ((4,), torch.tensor(2), {}),
    "one class": ((2, 1), torch.tensor([0, 0]), {}),
    "tied classes": ((3, 4), torch.tensor([0, 3, 2]), {}),
}


@pytest.fixture(params=REGIMES)
def regime(request, device) -> Regime:
    shape, target, options = REGIMES[request.param]
    n_classes = shape[min(1, len(shape) - 1)]
    logits = 2.0 * torch.randn(shape, dtype=torch.float64)
    log_prior = LOG_PRIOR[:n_classes]
    if request.param == "tied classes":
        logits, log_prior = torch.zeros_like(logits), torch.zeros_like(log_prior)
    dropped = torch.zeros(n_classes, dtype=torch.bool)
    dropped[1:2] = request.param.startswith("dropped")
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    return Regime(logits.to(device), log_prior.to(device), target.to(device), options, dropped.to(device))


def loss_of(regime: Regime, reduction: str, impl: str):
    """The loss as a function of logits and log prior."""

    def loss(logits, log_prior):
        log_prior = log_prior.masked_fill(regime.dropped, -torch.inf)
        return logit_adjusted_cross_entropy(
            logits, regime.target, log_prior, TAU, reduction=reduction, impl=impl, **regime.options
        )

    return loss


def oracle_of(regime: Regime, reduction: str):
    def loss(logits, log_prior):
        offset = (TAU * log_prior).view(-1, *[1] * (logits.dim() - 2))
        dropped = regime.dropped.view_as(offset)
        return cross_entropy((logits + offset).masked_fill(dropped, -1e30), regime.target, reduction, **regime.options)

    return loss


def cross_entropy(z, target, reduction, *, target_weight=None, smoothing_distribution=None, **options):
    """`F.cross_entropy`; options that it does not have are written out as class probabilities for it."""
    if target_weight is None and smoothing_distribution is None:
        return F.cross_entropy(z, target, reduction=reduction, **options)
    n_classes, eps = z.shape[1], options.get("label_smoothing", 0.0)
    by_class = (-1, *[1] * (z.dim() - 2))
    weight = options.get("weight", z.new_ones(n_classes))
    q = z.new_full((n_classes,), 1 / n_classes) if smoothing_distribution is None else smoothing_distribution
    label = target.unsqueeze(1) if target_weight is None else target
    share = torch.ones_like(label, dtype=z.dtype) if target_weight is None else target_weight
    share = share * (label != -100)
    label = label.clamp(min=0)
    mass = torch.zeros_like(z).scatter_add(1, label, share * (1 - eps))
    mass = (mass + eps * q.view(by_class) * share.sum(1, keepdim=True)) * weight.view(by_class)
    rows = F.cross_entropy(z, mass, reduction="none")
    if reduction == "none":
        return rows
    total = share.sum(1)
    row_weight = (share * weight[label]).sum(1) / total.where(total > 0, 1.0)
    return rows.sum() if reduction == "sum" else rows.sum() / row_weight.sum()


def leaf(tensor: Tensor, requires_grad: bool = True) -> Tensor:
    return tensor.detach().clone().requires_grad_(requires_grad)


# First and second derivatives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("regime", "reduction"), one_in(3, list(REGIMES), REDUCTIONS), indirect=["regime"])
def test_gradients_are_those_of_cross_entropy(regime, reduction, impl):
    upstream = torch.randn_like(oracle_of(regime, reduction)(*regime[:2]))
    for learned in ([0], [1], [0, 1]):
        results = []
        for function in (loss_of(regime, reduction, impl), oracle_of(regime, reduction)):
            inputs = [leaf(x, i in learned) for i, x in enumerate(regime[:2])]
            loss = function(*inputs)
            loss.backward(upstream)
            assert all((x.grad is not None) == x.requires_grad for x in inputs)
            results.append((loss.detach(), [inputs[i].grad for i in learned]))
        assert_close(*results, **EXACT)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_hessian_vector_products_are_those_of_cross_entropy(regime, reduction, impl):
    upstream = torch.randn_like(oracle_of(regime, reduction)(*regime[:2]))
    directions = [torch.randn_like(x) for x in regime[:2]]
    results = []
    for function in (loss_of(regime, reduction, impl), oracle_of(regime, reduction)):
        inputs = [leaf(upstream), *map(leaf, regime[:2])]
        gradients = torch.autograd.grad(function(*inputs[1:]), inputs[1:], inputs[0], create_graph=True)
        results.append(torch.autograd.grad(gradients, inputs, directions))
    assert_close(*results, **EXACT)


# Float64 rounds a loss of about 10 at 1e-15; dividing by steps of 1e-6 makes that 1e-9.
EVERY_OTHER_REGIME = [slow(name) if i % 2 else name for i, name in enumerate(REGIMES)]
DIFFERENCES = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-6}


@pytest.mark.parametrize("regime", EVERY_OTHER_REGIME, indirect=True)
def test_gradients_agree_with_finite_differences(regime, impl):
    logits, log_prior = map(leaf, regime[:2])
    options = {"fast_mode": impl == "triton", **DIFFERENCES}
    total, rows = loss_of(regime, "sum", impl), loss_of(regime, "none", impl)
    assert gradcheck(lambda x: total(x, log_prior.detach()), (logits,), **options)
    assert gradcheck(rows, (logits, log_prior), check_forward_ad=True, **options)


@pytest.mark.parametrize("regime", EVERY_OTHER_REGIME, indirect=True)
@pytest.mark.parametrize("impl", ["reference", "blocked" if DEVICE == "cpu" else "triton"])
def test_second_derivatives_agree_with_finite_differences(regime, impl):
    """All fused implementations share one formula, so one of them is enough."""
    loss, inputs = loss_of(regime, "mean", impl), tuple(map(leaf, regime[:2]))
    assert gradgradcheck(loss, inputs, check_fwd_over_rev=True, **DIFFERENCES)


def test_dual_numbers_carry_the_tangents_of_loss_and_gradient(device, impl):
    """Dual numbers through `torch.autograd`: the tangent of the loss and that of its gradient."""
    logits, direction = torch.randn(2, 3, 4, dtype=torch.float64, device=device)
    target, log_prior = torch.tensor([0, 3, 2], device=device), LOG_PRIOR.to(device)
    results = []
    for function in (
        lambda x: logit_adjusted_cross_entropy(x, target, log_prior, TAU, impl=impl),
        lambda x: F.cross_entropy(x + TAU * log_prior, target),
    ):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaf(logits), direction)
            loss = function(dual)
            (gradient,) = torch.autograd.grad(loss, dual, create_graph=True)
            results.append([forward_ad.unpack_dual(x).tangent.detach() for x in (loss, gradient)])
    assert_close(*results, **EXACT)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_batched_upstream_gradients_are_those_of_cross_entropy(device, impl, reduction):
    logits = torch.randn(3, 4, dtype=torch.float64, device=device)
    target, log_prior = torch.tensor([0, 3, 2], device=device), LOG_PRIOR.to(device)
    upstream = torch.randn(5, *[3] * (reduction == "none"), dtype=torch.float64, device=device)
    results = []
    for function in (
        lambda x: logit_adjusted_cross_entropy(x, target, log_prior, reduction=reduction, impl=impl),
        lambda x: F.cross_entropy(x + log_prior, target, reduction=reduction),
    ):
        x = leaf(logits)
        results.append(torch.autograd.grad(function(x), x, upstream, is_grads_batched=True))
    assert_close(*results, **EXACT)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_of_a_row_or_class_that_does_not_count_have_no_derivative(device, impl, bad):
    """The logits of an ignored row and of a class at -inf are NaN or infinite."""
    logits = torch.randn(3, 4, dtype=torch.float64, device=device)
    target = torch.tensor([0, -100, 2], device=device)
    log_prior = LOG_PRIOR.to(device).index_fill(0, torch.tensor(1, device=device), -torch.inf)
    counts = (target != -100).unsqueeze(1) & (log_prior > -torch.inf)
    results = []
    for filler in (bad, 0.0):
        x, p = leaf(logits.where(counts, filler)), leaf(log_prior)
        loss = logit_adjusted_cross_entropy(x, target, p, TAU, impl=impl)
        plain = torch.autograd.grad(loss, (x, p), retain_graph=True)
        first = torch.autograd.grad(loss, (x, p), create_graph=True)
        second = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (x, p))
        alone = leaf(x)  # an implementation may have computed this gradient in the forward pass
        logit_adjusted_cross_entropy(alone, target, p.detach(), TAU, impl=impl).backward()
        of_logits, of_log_prior = zip(plain, first, second, strict=True)
        results.append((loss, [alone.grad, *of_logits], of_log_prior))
    assert_close(*results, rtol=0, atol=0)
    for gradient in results[0][1]:
        assert (gradient[~counts] == 0).all()
        assert (gradient[counts] != 0).all()


def test_a_label_of_a_dropped_class_has_an_infinite_loss_and_a_finite_gradient(device, impl):
    """Nothing can raise the probability of that class; the gradient lowers the logits of the others."""
    logits = torch.randn(2, 4, dtype=torch.float64, device=device)
    target = torch.tensor([1, 2], device=device)
    log_prior = LOG_PRIOR.to(device).index_fill(0, torch.tensor(1, device=device), -torch.inf)
    p = (logits + TAU * log_prior).softmax(1)
    want = p - F.one_hot(target, 4) * (log_prior > -torch.inf)
    for create_graph in (False, True):
        for learns_prior in (False, True):
            x = leaf(logits)
            prior = leaf(log_prior, learns_prior)
            loss = logit_adjusted_cross_entropy(x, target, prior, TAU, reduction="sum", impl=impl)
            assert loss.item() == torch.inf
            (gradient,) = torch.autograd.grad(loss, x, create_graph=create_graph)
            assert_close(gradient.detach(), want, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_have_the_dtype_of_their_inputs(device, impl, dtype):
    x = torch.randn(3, 4, device=device).to(dtype).requires_grad_()
    p = leaf(LOG_PRIOR.to(device))
    loss = logit_adjusted_cross_entropy(x, torch.tensor([0, 3, 2], device=device), p, impl=impl)
    first = torch.autograd.grad(loss, (x, p), create_graph=True)
    second = torch.autograd.grad(first[0].double().square().sum() + first[1].square().sum(), (x, p))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for gradients in (first, second):
        assert [(g.dtype, g.shape) for g in gradients] == [(dtype, x.shape), (torch.float64, p.shape)]


@pytest.mark.parametrize(
    "view",
    [
        lambda base: base[:, :4],  # padded rows
        lambda base: base[::2, ::3],
        lambda base: base[:4].T,
        lambda base: base[:, :1].expand(-1, 4),
        lambda base: base[:1, :4].expand(4, -1),
    ],
    ids=["padded", "steps", "transposed", "one logit for all classes", "one row for all rows"],
)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradient_reaches_the_storage_behind_any_strides(device, impl, view, reduction):
    values = torch.randn(6, 10, dtype=torch.float64, device=device)
    log_prior = LOG_PRIOR.to(device)
    results = []
    for function in (
        lambda x, y: logit_adjusted_cross_entropy(x, y, log_prior, reduction=reduction, impl=impl),
        lambda x, y: F.cross_entropy(x + log_prior, y, reduction=reduction),
    ):
        base = leaf(values)
        logits = view(base)
        function(logits, torch.arange(len(logits), device=device) % 4).sum().backward()
        results.append(base.grad)
    assert_close(*results, **EXACT)


# Upstream gradients ---------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(device):
    """Logits, target and log prior of 3 rows."""
    logits = torch.randn(3, 4, dtype=torch.float64, device=device)
    return logits, torch.tensor([0, 3, 2], device=device), LOG_PRIOR.to(device)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [1.0, 0.0, -2.5, 65536.0])
def test_gradient_is_proportional_to_a_scalar_upstream(rows, impl, reduction, scale):
    logits, target, log_prior = rows
    x, want = leaf(logits), leaf(logits)
    (scale * logit_adjusted_cross_entropy(x, target, log_prior, reduction=reduction, impl=impl)).backward()
    F.cross_entropy(want + log_prior, target, reduction=reduction).backward()
    assert_close(x.grad, scale * want.grad, **EXACT)
    assert scale == 0 or (x.grad != 0).all()


UPSTREAMS = {
    "stride 0": lambda device: torch.full((), -1.5, dtype=torch.float64, device=device).expand(2, 3),
    "transposed": lambda device: torch.randn(3, 2, dtype=torch.float64, device=device).T,
    "every third": lambda device: torch.randn(2, 9, dtype=torch.float64, device=device)[:, ::3],
    "one for each column": lambda device: torch.randn(3, dtype=torch.float64, device=device).expand(2, 3),
    "zeros among them": lambda device: torch.tensor([[0.0, 1, 0], [-1, 0, 2]], dtype=torch.float64, device=device),
}


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("learned", [[0], [1], [0, 1]], ids=["logits", "log_prior", "both"])
def test_upstream_of_rows_may_have_any_strides(device, impl, upstream, learned):
    values = torch.randn(2, 4, 3, dtype=torch.float64, device=device), LOG_PRIOR.to(device)
    target = torch.tensor([[0, 3, 2], [1, 1, 0]], device=device)
    grad_loss = UPSTREAMS[upstream](device)
    results = []
    for function in (
        lambda x, p: logit_adjusted_cross_entropy(x, target, p, TAU, reduction="none", impl=impl),
        lambda x, p: F.cross_entropy(x + TAU * p[:, None], target, reduction="none"),
    ):
        inputs = [leaf(v, i in learned) for i, v in enumerate(values)]
        results.append(torch.autograd.grad(function(*inputs), [inputs[i] for i in learned], grad_loss))
    assert_close(*results, **EXACT)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_gradients_under_a_loss_scale_keep_their_digits(device, impl, reduction):
    """Gradients down to 1e-8 are 0 in float16; times 65536 they are not, if they are scaled before they are rounded."""
    n_rows, n_classes, scale = 16, 12, 65536.0
    logits = torch.randn(n_rows, n_classes, device=device).half()
    target = torch.arange(n_rows, device=device) % n_classes
    log_prior = torch.linspace(-12.0, -0.5, n_classes, device=device)

    def gradient(function, logits):
        x = leaf(logits)
        loss = function(x)
        loss = loss if reduction == "mean" else loss.sum() / n_rows
        return torch.autograd.grad(loss * scale, x)[0].double() / scale

    want = gradient(lambda x: F.cross_entropy(x + log_prior.double(), target, reduction=reduction), logits.double())
    eager = gradient(lambda x: F.cross_entropy(x + log_prior, target, reduction=reduction), logits)
    got = gradient(lambda x: logit_adjusted_cross_entropy(x, target, log_prior, reduction=reduction, impl=impl), logits)

    def relative_error(value):
        return ((value - want) / want).abs().max().item()

    assert relative_error(want.half().double()) > 0.1  # the regime in which an early rounding shows
    assert want.abs().min() * scale > torch.finfo(torch.float16).smallest_normal
    assert relative_error(got) <= 2 * relative_error(eager) + 2**-11  # half an ulp at most


# More than one backward pass ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_second_backward_gives_the_same_gradient(rows, impl, reduction, dtype):
    """Also after the caller wrote into the first gradient, which belongs to the caller."""
    logits, target, log_prior = rows
    x = leaf(logits.to(dtype))
    loss = logit_adjusted_cross_entropy(x, target, log_prior, reduction=reduction, impl=impl).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, x, torch.full_like(loss, 3.0), retain_graph=True)
    second_kept = second.clone()
    second.fill_(torch.nan)
    (third,) = torch.autograd.grad(loss, x)
    want = leaf(x.double())
    F.cross_entropy(want + log_prior, target, reduction=reduction).sum().backward()
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-12 if dtype == torch.float64 else 1e-7}
    for gradient, factor in ((kept, 1.0), (second_kept, 3.0), (third, 1.0)):
        assert_close(gradient.double(), factor * want.grad, **tolerance)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_two_losses_and_two_passes_add_up(rows, impl, reduction):
    logits, target, log_prior = rows

    def accumulate(loss):
        x = leaf(logits)
        first, second = loss(x, log_prior), loss(x, 0.5 * log_prior)
        first.sum().backward(retain_graph=True)
        first.sum().backward()
        x.grad.mul_(0.5)  # as clipping does
        (second * 3.0).sum().backward()
        return x.grad

    got = accumulate(lambda x, p: logit_adjusted_cross_entropy(x, target, p, reduction=reduction, impl=impl))
    want = accumulate(lambda x, p: F.cross_entropy(x + p, target, reduction=reduction))
    assert_close(got, want, **EXACT)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_after_a_differentiable_backward_gives_the_same_gradient(rows, impl, reduction):
    logits, target, log_prior = rows
    x = leaf(logits)
    loss = logit_adjusted_cross_entropy(x, target, log_prior, reduction=reduction, impl=impl).sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(loss, x, retain_graph=True)
    (penalty,) = torch.autograd.grad(first.square().sum(), x)
    assert_close(second, first.detach(), **EXACT)
    want = leaf(logits)
    (gradient,) = torch.autograd.grad(
        F.cross_entropy(want + log_prior, target, reduction=reduction).sum(), want, create_graph=True
    )
    assert_close(first, gradient, **EXACT)
    assert_close(penalty, torch.autograd.grad(gradient.square().sum(), want)[0], **EXACT)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_backward_through_a_freed_graph_raises(rows, impl, reduction):
    logits, target, log_prior = rows
    loss = logit_adjusted_cross_entropy(leaf(logits), target, log_prior, reduction=reduction, impl=impl).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


# In-place changes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inputs_are_never_written(device, impl, reduction, dtype):
    inputs = [
        torch.randn(3, 4, device=device).to(dtype).requires_grad_(),
        LOG_PRIOR.float().to(device).requires_grad_(),
        torch.tensor([[0, 1], [3, 3], [2, -100]], device=device),
        torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]], device=device),
        WEIGHT.float().to(device),
        torch.tensor([0.4, 0.3, 0.2, 0.1], device=device),
    ]
    before = [(x.detach().clone(), x._version) for x in inputs]
    logits, log_prior, target, target_weight, weight, smoothing_distribution = inputs
    for learned in ([logits], [log_prior], [logits, log_prior]):
        loss = logit_adjusted_cross_entropy(
            logits if learned[0] is logits else logits.detach(),
            target,
            log_prior if learned[-1] is log_prior else log_prior.detach(),
            target_weight=target_weight,
            weight=weight,
            label_smoothing=0.1,
            smoothing_distribution=smoothing_distribution,
            reduction=reduction,
            impl=impl,
        ).sum()
        torch.autograd.grad(loss, learned, retain_graph=True)
        torch.autograd.grad(2 * loss, learned, retain_graph=True)
        torch.autograd.grad(loss, learned, create_graph=True)
    for x, (values, version) in zip(inputs, before, strict=True):
        assert torch.equal(x, values)
        assert x._version == version


@pytest.mark.parametrize("changed", ["logits", "target", "log_prior", "weight"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("passes", [1, 2])
def test_an_input_changed_after_the_forward_pass_never_gives_a_wrong_gradient(
    rows, device, impl, changed, reduction, passes
):
    """The gradient is that of the values that the loss was computed from, or backward raises."""
    logits, target, log_prior = rows
    weight = WEIGHT.to(device)
    want = leaf(logits)
    F.cross_entropy(want + log_prior, target, weight, reduction=reduction).sum().backward()

    x = leaf(logits)
    inputs = {"logits": x * 1.0, "target": target.clone(), "log_prior": log_prior.clone(), "weight": weight.clone()}
    loss = logit_adjusted_cross_entropy(reduction=reduction, impl=impl, **inputs).sum()
    inputs[changed].fill_(1)

    def gradient_or_error():
        try:
            return torch.autograd.grad(loss, x, retain_graph=True)[0]
        except RuntimeError as error:
            return str(error)

    for _ in range(passes):
        outcome = gradient_or_error()
        if isinstance(outcome, str):
            assert "modified by an inplace operation" in outcome
        else:
            assert_close(outcome, want.grad, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, dict(label_smoothing=0.1)], ids=["labels", "smoothing"])
def test_logits_may_be_written_to_once_their_gradient_is_made(impl, device, dtype, reduction, scale, options):
    """As with a loss written in PyTorch operations, `logits.clamp_(-1, 1)` is allowed before backward. Half precision
    has fewer digits if the upstream gradient is not 1."""
    x = torch.randn(5, 4, device=device).to(dtype).requires_grad_()
    target, log_prior = torch.tensor([0, 3, 2, -100, 1], device=device), LOG_PRIOR.to(device, torch.float32)
    logits = x * 1.0
    loss = logit_adjusted_cross_entropy(logits, target, log_prior, reduction=reduction, impl=impl, **options)
    loss = loss * scale
    kept = x.detach().double().requires_grad_()
    want = F.cross_entropy(kept + log_prior.double(), target, reduction=reduction, **options) * scale
    logits.clamp_(-0.1, 0.1)
    want.backward()
    loss.backward()
    eps = torch.finfo(dtype).eps
    assert_close(x.grad.double(), kept.grad, rtol=2 * eps, atol=8e-7 if dtype != torch.float64 else 1e-12)


def test_an_error_in_a_hook_of_saved_tensors_is_not_lost(impl, device):
    class Lost(RuntimeError):
        pass

    def unpack(tensor):
        raise Lost

    x = torch.randn(3, 4, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        loss = logit_adjusted_cross_entropy(x, torch.tensor([0, 1, 2], device=device), torch.zeros(4, device=device),
                                            impl=impl)  # fmt: skip
    with pytest.raises(Lost):
        loss.backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("learned", [[0], [1], [0, 1]], ids=["logits", "log_prior", "both"])
def test_loss_may_be_changed_in_place_before_backward(device, impl, reduction, learned):
    values = torch.randn(2, 4, 3, dtype=torch.float64, device=device), LOG_PRIOR.to(device)
    target = torch.tensor([[0, 3, 2], [1, 1, 0]], device=device)
    results = []
    for function in (
        lambda x, p: logit_adjusted_cross_entropy(x, target, p, reduction=reduction, impl=impl),
        lambda x, p: F.cross_entropy(x + p[:, None], target, reduction=reduction),
    ):
        inputs = [leaf(v, i in learned) for i, v in enumerate(values)]
        loss = function(*inputs)
        loss *= 2.0
        loss += 1.0
        with torch.no_grad():
            seen = loss.clone()
            loss.zero_()  # backward does not need the values of the loss
        results.append([seen, *torch.autograd.grad(loss.sum(), [inputs[i] for i in learned])])
    assert_close(*results, **EXACT)


# With and without a graph ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_loss_has_a_graph_only_if_something_is_learned(rows, impl, reduction):
    logits, target, log_prior = rows

    def loss(*learned):
        return logit_adjusted_cross_entropy(
            leaf(logits, "logits" in learned),
            target,
            leaf(log_prior, "log_prior" in learned),
            reduction=reduction,
            impl=impl,
        )

    want = F.cross_entropy(logits + log_prior, target, reduction=reduction)
    for learned in (["logits"], ["log_prior"], ["logits", "log_prior"]):
        assert loss(*learned).requires_grad
        assert_close(loss(*learned).detach(), want, **EXACT)
        with torch.no_grad():
            assert not loss(*learned).requires_grad
            assert_close(loss(*learned), want, **EXACT)
        with torch.inference_mode():
            assert loss(*learned).is_inference()
            assert_close(loss(*learned), want, **EXACT)
    assert not loss().requires_grad
    assert_close(loss(), want, **EXACT)


def test_no_prior_is_learned_without_an_adjustment(rows, impl):
    """At tau = 0 the gradient is 0, not None, and a class at -inf takes part in the sum again."""
    logits, target, log_prior = rows
    x, p = leaf(logits), leaf(log_prior.index_fill(0, torch.tensor(1, device=logits.device), -torch.inf))
    want = leaf(logits)
    logit_adjusted_cross_entropy(x, target, p, 0.0, impl=impl).backward()
    F.cross_entropy(want, target).backward()
    assert_close(x.grad, want.grad, **EXACT)
    assert torch.equal(p.grad, torch.zeros_like(p))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradient_is_the_same_under_activation_checkpointing(rows, impl, reduction, use_reentrant):
    logits, target, log_prior = rows
    x, want = leaf(logits), leaf(logits)

    def loss(x):
        return logit_adjusted_cross_entropy(3.0 * x, target, log_prior, reduction=reduction, impl=impl)

    checkpoint(loss, x, use_reentrant=use_reentrant).sum().backward()
    F.cross_entropy(3.0 * want + log_prior, target, reduction=reduction).sum().backward()
    assert_close(x.grad, want.grad, **EXACT)


def test_backward_reads_saved_tensors_through_their_hooks(rows, impl):
    """Offloading and activation compression use such hooks."""
    logits, target, log_prior = rows
    x, want = leaf(logits), leaf(logits)
    unpacked = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: unpacked.append(t) or t):
        loss = logit_adjusted_cross_entropy(x, target, log_prior, reduction="none", impl=impl)
    loss.sum().backward()
    F.cross_entropy(want + log_prior, target, reduction="sum").backward()
    assert_close(x.grad, want.grad, **EXACT)
    assert any(t.numel() == logits.numel() for t in unpacked)


# Mixed precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast_changes_neither_loss_nor_gradient(device, impl, reduction, dtype):
    target = torch.tensor([0, 3, 2], device=device)
    log_prior = LOG_PRIOR.float().to(device)
    for logits_dtype in (dtype, torch.float32):
        logits = torch.randn(3, 4, device=device).to(logits_dtype)
        results = []
        for enabled in (False, True):
            x, p = leaf(logits), leaf(log_prior)
            with torch.autocast(device, dtype, enabled=enabled):
                loss = logit_adjusted_cross_entropy(x, target, p, reduction=reduction, impl=impl)
            loss.sum().backward()
            assert loss.dtype == torch.float32
            results.append((loss.detach(), x.grad, p.grad))
        assert_close(*results, rtol=0, atol=0)


def test_a_step_under_autocast_and_a_grad_scaler_is_the_step_without(device, impl):
    """float16 logits of a linear model; the error of the new weights against float64 is at most twice eager's."""
    features = torch.randn(16, 8, device=device)
    target = torch.arange(16, device=device) % 6
    log_prior = torch.linspace(-12.0, -0.5, 6, device=device)
    start = 0.1 * torch.randn(6, 8, device=device)

    def step(loss, autocast=True):
        weight = leaf(start if autocast else start.double())
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scaler = torch.amp.GradScaler(device, init_scale=65536.0, enabled=autocast)
        with torch.autocast(device, torch.float16, enabled=autocast):
            value = loss(F.linear(features.to(weight.dtype), weight))
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        assert not autocast or scaler.get_scale() == 65536.0  # a gradient that overflows would halve it
        return weight.detach().double()

    want = step(lambda z: F.cross_entropy(z + log_prior.double(), target), autocast=False)
    eager = step(lambda z: F.cross_entropy(z + log_prior, target))
    got = step(lambda z: logit_adjusted_cross_entropy(z, target, log_prior, impl=impl))
    length = (want - start).norm()
    error, eager_error = (got - want).norm() / length, (eager - want).norm() / length
    assert error <= 2 * eager_error + torch.finfo(torch.float16).eps


def test_grad_scaler_skips_a_step_whose_gradient_overflows(rows, device, impl):
    logits, target, log_prior = rows
    x = leaf(logits.float())
    optimizer = torch.optim.SGD([x], lr=1.0)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**20)
    scaler.scale(logit_adjusted_cross_entropy(x.half(), target, log_prior, impl=impl)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(x, logits.float())
    assert scaler.get_scale() == 2.0**19


# Learned targets and weights ------------------------------------------------------------------------------------------

# {argument that is learned: the arguments}; float64
LEARNED = {
    "target": {"target": double([0.6, 0.2, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.5, 0.5])},
    "target_weight": {
        "target": torch.tensor([[0, 3], [2, 2], [3, -100]]),
        "target_weight": double([0.2, 0.8], [0.6, 0.1], [0.25, 0.5]),
    },
    "weight": {"target": torch.tensor([0, 3, 2]), "weight": WEIGHT, "smoothing_distribution": double(*[0.25] * 4)},
    "smoothing_distribution": {
        "target": torch.tensor([0, -100, 2]),
        "smoothing_distribution": double(0.1, 0.2, 0.3, 0.4),
    },
}


@pytest.fixture(params=LEARNED)
def learned(request, device):
    """The name of the argument that is learned, and the arguments of the loss."""
    options = {"weight": WEIGHT, "label_smoothing": 0.1, **LEARNED[request.param]}
    return request.param, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}


def oracle_for_learned(logits, target, log_prior, tau, reduction, **options):
    return cross_entropy(logits + tau * log_prior, target, reduction, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_gradients_of_targets_and_weights_are_those_of_cross_entropy(rows, impl, reduction, learned):
    name, options = learned
    logits, _, log_prior = rows
    common = {"log_prior": log_prior, "tau": TAU, "reduction": reduction}
    results = []
    for function in (
        lambda x, **kw: logit_adjusted_cross_entropy(x, **kw, **common, impl=impl),
        lambda x, **kw: oracle_for_learned(x, **kw, **common),
    ):
        x, constant = leaf(logits), leaf(options[name])
        loss = function(x, **{**options, name: constant}).sum()
        first = torch.autograd.grad(loss, (constant, x), create_graph=True)
        second = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (constant, x))
        results.append([g.detach() for g in (loss, *first, *second)])
    assert_close(*results, **EXACT)


def test_gradient_of_a_target_at_a_dropped_class_is_finite(rows):
    """Target mass on that class would have an infinite loss, so no gradient may move mass there."""
    logits, _, log_prior = rows
    log_prior = log_prior.index_fill(0, torch.tensor(1, device=logits.device), -torch.inf)
    target = leaf(torch.tensor([[0.5, 0.0, 0.25, 0.25]] * 3, dtype=torch.float64, device=logits.device))
    logit_adjusted_cross_entropy(logits, target, log_prior).backward()
    keep = log_prior > -torch.inf
    want = -(logits + log_prior)[:, keep].log_softmax(1) / 3
    assert_close(target.grad[:, keep], want, **EXACT)
    assert torch.isfinite(target.grad).all()


def test_only_the_reference_differentiates_targets_and_weights(rows, impl, learned):
    name, options = learned
    logits, _, log_prior = rows
    options = {**options, name: leaf(options[name])}
    for x in (logits, leaf(logits)):
        if impl == "reference":
            assert logit_adjusted_cross_entropy(x, log_prior=log_prior, impl=impl, **options).requires_grad
            continue
        with pytest.raises(ValueError, match=f"{IMPL_OPTIONS} or smoothing_distribution, got '{impl}'"):
            logit_adjusted_cross_entropy(x, log_prior=log_prior, impl=impl, **options)
        with torch.no_grad():
            logit_adjusted_cross_entropy(x, log_prior=log_prior, impl=impl, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_forward_mode_tangents_of_targets_and_weights_are_those_of_cross_entropy(rows, impl, reduction, learned):
    name, options = learned
    logits, _, log_prior = rows
    directions = torch.randn_like(options[name]), torch.randn_like(logits)
    common = {"log_prior": log_prior, "tau": TAU, "reduction": reduction}
    results = []
    for function in (
        lambda x, **kw: logit_adjusted_cross_entropy(x, **kw, **common, impl=impl),
        lambda x, **kw: oracle_for_learned(x, **kw, **common),
    ):
        with forward_ad.dual_level():
            constant = forward_ad.make_dual(options[name], directions[0])
            alone = function(logits, **{**options, name: constant})
            both = function(forward_ad.make_dual(logits, directions[1]), **{**options, name: constant})
            results.append([forward_ad.unpack_dual(loss).tangent for loss in (alone, both)])
    assert_close(*results, **EXACT)


# Which code runs ------------------------------------------------------------------------------------------------------


def count_calls(monkeypatch, module, name):
    calls = []
    function = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(args) or function(*args, **kwargs))
    return calls


def test_a_named_implementation_is_the_one_that_runs(rows, monkeypatch, impl):
    logits, target, log_prior = rows
    calls = {
        "reference": count_calls(monkeypatch, fused_la.reference, "loss_rows"),
        "blocked": count_calls(monkeypatch, fused_la._cpu, "forward"),
        "triton": count_calls(monkeypatch, fused_la._triton, "forward"),
    }
    logit_adjusted_cross_entropy(leaf(logits), target, log_prior, impl=impl).backward()
    assert {name: len(made) for name, made in calls.items()} == {name: int(name == impl) for name in calls}


@pytest.fixture
def backward_passes(monkeypatch, device):
    """For each backward of `blocked`: the gradient that the forward pass computed, or None."""
    if device != "cpu":
        pytest.skip("impl='blocked' runs on a CPU")
    given, backward = [], fused_la._cpu.backward
    monkeypatch.setattr(fused_la._cpu, "backward", lambda *args: given.append(args[6]) or backward(*args))
    return given


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("impl", ["auto", "blocked"])
def test_blocked_makes_the_gradient_of_a_scalar_in_the_forward_pass(rows, backward_passes, impl, dtype, reduction):
    logits, target, log_prior = rows
    x = leaf(logits.to(dtype))
    loss = logit_adjusted_cross_entropy(x, target, log_prior, reduction=reduction, impl=impl)
    (2.0 * loss).backward(retain_graph=True)
    loss.backward()  # the first backward gave its gradient away
    from_forward, recomputed = backward_passes
    assert from_forward.shape == (3, 4)
    assert recomputed is None


@pytest.mark.parametrize("case", ["reduction none", "float16", "learned prior", "prior alone"])
def test_blocked_waits_for_the_upstream_gradient_if_it_needs_it(rows, backward_passes, case):
    logits, target, log_prior = rows
    x = leaf(logits.half() if case == "float16" else logits, case != "prior alone")
    p = leaf(log_prior, "prior" in case)
    reduction = "none" if case == "reduction none" else "mean"
    logit_adjusted_cross_entropy(x, target, p, reduction=reduction, impl="blocked").sum().backward()
    assert backward_passes == [None]


def test_blocked_makes_no_gradient_that_is_not_needed(rows, monkeypatch, device):
    if device != "cpu":
        pytest.skip("impl='blocked' runs on a CPU")
    logits, target, log_prior = rows
    calls = count_calls(monkeypatch, fused_la._cpu.single_label, "_write_gradient")
    logit_adjusted_cross_entropy(logits, target, log_prior, impl="blocked")
    with torch.no_grad():
        logit_adjusted_cross_entropy(leaf(logits), target, log_prior, impl="blocked")
    assert len(calls) == 0
    logit_adjusted_cross_entropy(leaf(logits), target, log_prior, impl="blocked")
    assert len(calls) == 1


@pytest.mark.parametrize("impl", ["blocked", "triton"])
def test_second_derivatives_and_tangents_are_the_reference_formulas(rows, monkeypatch, device, impl):
    if impl == "blocked" and device != "cpu":
        pytest.skip("impl='blocked' runs on a CPU")
    logits, target, log_prior = rows
    gradients = count_calls(monkeypatch, fused_la.reference, "gradient")
    forwards = count_calls(monkeypatch, fused_la.reference, "loss_rows")
    x = leaf(logits)
    loss = logit_adjusted_cross_entropy(x, target, log_prior, impl=impl)
    torch.autograd.grad(loss, x, create_graph=True)
    assert (len(gradients), len(forwards)) == (1, 0)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, torch.ones_like(logits))
        logit_adjusted_cross_entropy(dual, target, log_prior, impl=impl)
    assert (len(gradients), len(forwards)) == (1, 1)


def test_a_log_prior_made_in_inference_mode_may_be_trained_with(impl, device):
    """`F.cross_entropy(logits + log_prior, target)` allows that too."""
    with torch.inference_mode():
        log_prior = torch.tensor([0.5, 0.25, 0.25], device=device).log()
    logits, target = torch.randn(2, 3, device=device, requires_grad=True), torch.tensor([0, 2], device=device)
    gradients = []
    for prior in (log_prior, log_prior.clone()):
        loss = logit_adjusted_cross_entropy(logits, target, prior, impl=impl)
        gradients.append(torch.autograd.grad(loss, logits)[0])
    assert torch.equal(*gradients)
