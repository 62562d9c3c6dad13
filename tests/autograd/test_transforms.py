"""Derivatives through torch.func: its operators in every order, batches of losses, per-sample gradients.

Oracle: the same transform of `F.cross_entropy` in float64, on logits that the offset was added to. The package sees
three kinds of transform: reverse mode (a graph at its level), forward mode (a tangent) and vmap (a batch). Their
nesting is what breaks: a tangent that is not seen below a graph, a graph that is not seen below a batch.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.testing import assert_close

from fused_la import logit_adjusted_cross_entropy
from fused_la._autograd.implementations import implementation

# PyTorch scripts a few of its own formulas when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is")

TAU = 1.3
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64 on both sides
REDUCTIONS = ["none", "mean", "sum"]


@pytest.fixture
def log_prior(device):
    return torch.tensor([-0.1, -2.5, -6.0, -12.0, -8.0], dtype=torch.float64, device=device)


@pytest.fixture
def weight(device):
    return torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5], dtype=torch.float64, device=device)


@pytest.fixture
def logits(device):
    return torch.randn(3, 5, dtype=torch.float64, device=device)


@pytest.fixture
def target(device):
    return torch.tensor([0, 3, -100], device=device)


def losses(impl, reduction="mean", weight=None):
    """The loss and its oracle as functions of (logits, target, log_prior); logits are (C,), (N, C) or (N, C, d)."""

    def loss(logits, target, log_prior):
        return logit_adjusted_cross_entropy(
            logits, target, log_prior, TAU, weight=weight, reduction=reduction, impl=impl
        )

    def oracle(logits, target, log_prior):
        offset = TAU * log_prior.reshape(-1, *[1] * (logits.dim() - 2))
        return F.cross_entropy(logits + offset, target, weight, reduction=reduction)

    return loss, oracle


def compare(transform, functions):
    got, want = (transform(function) for function in functions)
    assert_close(got, want, **EXACT)


# Derivatives ----------------------------------------------------------------------------------------------------------

DERIVATIVES = {
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacrev of jacrev": lambda f: jacrev(jacrev(f)),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f)),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f)),
    "jacfwd of jacfwd of jacrev": lambda f: jacfwd(jacfwd(jacrev(f))),
    "jvp": lambda f: lambda x: jvp(f, (x,), (x.cos(),)),
    "vjp": lambda f: lambda x: [vjp(f, x)[1](torch.full_like(f(x), u))[0] for u in (1.0, 0.0, -2.5)],
    "jvp of vjp": lambda f: lambda x: jvp(lambda x: vjp(f, x)[1](torch.ones_like(f(x))), (x,), (x.cos(),)),
}


@pytest.mark.parametrize("name", DERIVATIVES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("argument", ["logits", "log_prior"])
def test_derivative_is_that_of_cross_entropy(logits, target, log_prior, weight, impl, name, reduction, argument):
    def derivative(function):
        if argument == "logits":
            return DERIVATIVES[name](lambda x: function(x, target, log_prior))(logits)
        return DERIVATIVES[name](lambda p: function(logits, target, p))(log_prior)

    compare(derivative, losses(impl, reduction, weight))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # linearize on any function
def test_linearization_is_that_of_cross_entropy(logits, target, log_prior, weight, impl):
    def products(function):
        loss, tangent = linearize(lambda x: function(x, target, log_prior), logits)
        return loss, tangent(logits.cos()), tangent(logits.sin())

    compare(products, losses(impl, "none", weight))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_grad_is_that_of_cross_entropy(logits, target, log_prior, weight, impl, reduction):
    compare(lambda f: grad_and_value(f, argnums=(0, 2))(logits, target, log_prior), losses(impl, reduction, weight))


def test_hessian_in_logits_and_log_prior_is_that_of_cross_entropy(logits, target, log_prior, impl):
    compare(lambda f: hessian(f, argnums=(0, 2))(logits, target, log_prior), losses(impl))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_hessian_vector_products_agree_in_every_order(logits, target, log_prior, weight, impl, reduction):
    direction = torch.randn_like(logits)

    def products(function):
        def loss(x):
            return function(x, target, log_prior).sum()

        return [
            jvp(grad(loss), (logits,), (direction,))[1],
            grad(lambda x: jvp(loss, (x,), (direction,))[1])(logits),
            vjp(grad(loss), logits)[1](direction)[0],
            torch.autograd.functional.hvp(loss, logits, direction)[1],
            torch.autograd.functional.vhp(loss, logits, direction)[1],
        ]

    compare(products, losses(impl, reduction, weight))


@pytest.mark.parametrize("name", ["jacrev", "hessian"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_derivative_is_the_same_inside_no_grad(logits, target, log_prior, impl, name, reduction):
    """torch.func also differentiates inside no_grad."""

    def derivative(function):
        with torch.no_grad():
            return DERIVATIVES[name](lambda x: function(x, target, log_prior))(logits)

    compare(derivative, losses(impl, reduction))


def test_jacobian_of_autograd_functional_may_be_vectorized(logits, target, log_prior, impl):
    compare(
        lambda f: torch.autograd.functional.jacobian(lambda x: f(x, target, log_prior), logits, vectorize=True),
        losses(impl, "none"),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_graph_built_before_may_be_differentiated_inside_a_batch(logits, target, log_prior, impl, reduction):
    upstream = torch.randn(4, *[3] * (reduction == "none"), dtype=torch.float64, device=logits.device)

    def gradients(function):
        x = logits.clone().requires_grad_()
        loss = function(x, target, log_prior)
        return vmap(lambda u: torch.autograd.grad(loss, x, u, retain_graph=True)[0])(upstream)

    compare(gradients, losses(impl, reduction))


@pytest.mark.parametrize("argument", ["logits", "log_prior"])
def test_tangents_of_the_loss_itself_survive_a_graph_below_them(logits, target, log_prior, impl, argument):
    """The loss that `grad_and_value` returns has second derivatives, as any other loss has."""

    def value(function):
        if argument == "logits":
            return lambda x: grad_and_value(lambda x: function(x, target, log_prior))(x)[1], logits
        return lambda p: grad_and_value(lambda x: function(x, target, p))(logits)[1], log_prior

    def second(function):
        loss, point = value(function)
        return jacfwd(jacfwd(loss))(point)

    compare(second, losses(impl))


@pytest.mark.parametrize("argument", ["logits", "log_prior"])
def test_tangent_of_the_loss_itself_survives_a_graph_below_it(logits, target, log_prior, impl, argument):
    def tangent(function):
        if argument == "logits":
            return jacfwd(lambda x: grad_and_value(lambda x: function(x, target, log_prior))(x)[1])(logits)
        return jacfwd(lambda p: grad_and_value(lambda x: function(x, target, p))(logits)[1])(log_prior)

    compare(tangent, losses(impl))


# Batches --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(device):
    """4 losses of 3 rows, one with an ignored row; each has its own log prior."""
    target = torch.tensor([[0, 3, 2], [1, -100, 4], [2, 2, 0], [4, 3, 1]], device=device)
    return (
        torch.randn(4, 3, 5, dtype=torch.float64, device=device),
        target,
        (3.0 * torch.randn(4, 5, dtype=torch.float64, device=device)).log_softmax(1),
    )


# in_dims of (logits, target, log_prior); None is not batched.
IN_DIMS = [
    (0, 0, None), (0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (1, 1, None), (2, 0, None),
    (-1, -1, -1), (0, 0, 1), (None, 1, 1),
]  # fmt: skip


@pytest.fixture(params=IN_DIMS, ids=str)
def batched(request, batch):
    """(in_dims, arguments): contiguous arguments with the batch dimension at in_dims."""
    arguments = [
        x[0] if dim is None else x.movedim(0, dim).contiguous() for x, dim in zip(batch, request.param, strict=True)
    ]
    return request.param, arguments


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_of_losses_is_each_of_them(batched, batch, impl, reduction, weight):
    in_dims, arguments = batched
    loss, oracle = losses(impl, reduction, weight)
    each = [oracle(*(x[0] if dim is None else x[i] for x, dim in zip(batch, in_dims, strict=True))) for i in range(4)]
    assert_close(vmap(loss, in_dims)(*arguments), torch.stack(each), **EXACT)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradient_of_a_batch_of_losses_is_that_of_cross_entropy(batched, impl, reduction, weight):
    """Both as grad of vmap and as backward through vmap."""
    in_dims, (logits, target, log_prior) = batched

    def gradients(function):
        def total(logits, log_prior):
            return vmap(function, in_dims)(logits, target, log_prior).square().sum()

        learned = [x.clone().requires_grad_() for x in (logits, log_prior)]
        total(*learned).backward()
        return grad(total, argnums=(0, 1))(logits, log_prior), tuple(x.grad for x in learned)

    compare(gradients, losses(impl, reduction, weight))


def test_gradient_of_each_loss_of_a_batch_is_that_of_cross_entropy(batched, impl, weight):
    """The vmap of grad, for the logits and for the log prior."""
    in_dims, arguments = batched
    compare(lambda f: vmap(grad(f, argnums=(0, 2)), in_dims)(*arguments), losses(impl, "mean", weight))


@pytest.mark.parametrize("transform", [grad, hessian, jacfwd], ids=lambda t: t.__name__)
def test_derivative_for_each_sample_is_that_of_cross_entropy(batch, impl, transform):
    """Rows as vectors (C,), as per-sample gradients of a model see them."""
    logits, target, log_prior = batch[0].flatten(0, 1), batch[1].flatten().clamp(min=0), batch[2][0]
    compare(lambda f: vmap(transform(f), (0, 0, None))(logits, target, log_prior), losses(impl))


def test_gradients_of_weights_for_each_sample_are_those_of_cross_entropy(batch, impl, device):
    """What differentially private training needs: a gradient of the classifier for each image."""
    features = torch.randn(12, 6, dtype=torch.float64, device=device)
    classifier = torch.randn(5, 6, dtype=torch.float64, device=device)
    target, log_prior = batch[1].flatten().clamp(min=0), batch[2][0]

    def gradients(function):
        def loss(classifier, features, target):
            return function((features @ classifier.T)[None], target[None], log_prior)

        return vmap(grad(loss), (None, 0, 0))(classifier, features, target)

    compare(gradients, losses(impl))


def test_images_may_be_batched_over_any_dimension(impl, device, log_prior):
    """Logits (N, C, d) have the batch in the middle, and the result has it in another dimension."""
    logits = torch.randn(2, 5, 4, 3, dtype=torch.float64, device=device)
    target = torch.randint(0, 5, (2, 3, 4), device=device)
    compare(lambda f: vmap(f, in_dims=(2, 2, None), out_dims=1)(logits, target, log_prior), losses(impl, "none"))


@pytest.fixture
def passes(impl, monkeypatch):
    """("forward" or "backward", number of rows) of each call of the implementation."""
    module, calls = implementation(impl), []

    def recorded(name, run):
        def call(problem, *arguments):
            calls.append((name, problem.logits.shape[0] * problem.logits.shape[1]))
            return run(problem, *arguments)

        return call

    for name in ("forward", "backward"):
        monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    return calls


@pytest.mark.parametrize("impl", ["blocked" if DEVICE == "cpu" else "triton", pytest.param("triton", id="kernels")])
@pytest.mark.parametrize("transform", ["gradient of each", "gradient of all", "Jacobian", "each of each"])
def test_batches_fold_into_the_rows_of_one_pass(batch, impl, passes, transform):
    logits, target, log_prior = batch  # (4, 3, 5), (4, 3)

    def gradients(function):
        if transform == "gradient of each":
            return vmap(grad(function), (0, 0, None))(logits, target, log_prior[0])
        if transform == "gradient of all":
            return grad(lambda x: vmap(function, (0, 0, None))(x, target, log_prior[0]).square().sum())(logits)
        if transform == "Jacobian":
            return jacrev(lambda x: vmap(function, (0, 0, None))(x, target, log_prior[0]))(logits)
        return vmap(vmap(grad(function), (0, 0, None)), (0, 0, None))(
            logits[:, :, None], target[:, :, None], log_prior[0]
        )

    compare(gradients, losses(impl))
    rows_of_gradient = {"Jacobian": 4 * 12}.get(transform, 12)
    assert passes == [("forward", 12), ("backward", rows_of_gradient)]


@pytest.mark.parametrize("inner", [(0, 0, None), (None, None, 0)], ids=["rows inside", "priors inside"])
def test_batches_may_be_nested(batch, impl, inner):
    outer = (None, None, 0) if inner[0] == 0 else (0, 0, None)

    def gradients(function):
        nested = vmap(vmap(function, inner), outer)
        return nested(*batch), vmap(vmap(grad(function), inner), outer)(*batch)

    compare(gradients, losses(impl))


def test_options_of_a_batch_may_be_batched(impl, device, batch, log_prior):
    """Weighted labels, class weights and smoothing, compared with one call for each element of the batch."""
    logits = batch[0]
    target = torch.tensor([[0, 3], [2, 2], [4, -100]], device=device)
    target_weight = torch.rand(4, 3, 2, dtype=torch.float64, device=device)
    weight = torch.rand(4, 5, dtype=torch.float64, device=device)

    def loss(logits, target_weight, weight, impl=impl):
        return logit_adjusted_cross_entropy(
            logits, target, log_prior, target_weight=target_weight, weight=weight, label_smoothing=0.1,
            smoothing_distribution=log_prior.softmax(0), impl=impl,
        )  # fmt: skip

    for in_dims in ((0, 0, 0), (0, 0, None), (None, 0, None), (None, None, 0)):
        arguments = [x if dim == 0 else x[0] for x, dim in zip((logits, target_weight, weight), in_dims, strict=True)]
        each = [loss(*(x[i] if dim == 0 else x for x, dim in zip(arguments, in_dims, strict=True)), impl="reference")
                for i in range(4)]  # fmt: skip
        assert_close(vmap(loss, in_dims)(*arguments), torch.stack(each), **EXACT)


def test_a_loss_of_a_batch_without_counting_labels_is_nan_and_no_other_is(batch, impl, log_prior):
    logits, target, _ = batch
    target = target.index_fill(0, torch.tensor(1, device=target.device), -100)
    loss = vmap(losses(impl)[0], (0, 0, None))(logits, target, log_prior)
    assert loss.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("transform", ["jvp", "hessian"])
def test_forward_mode_of_a_batch_of_losses_is_that_of_cross_entropy(batch, impl, log_prior, transform):
    logits, target, _ = batch

    def derivative(function):
        def total(logits):
            return vmap(function, (0, 0, None))(logits, target, log_prior).square().sum()

        return jvp(total, (logits,), (logits.cos(),)) if transform == "jvp" else hessian(total)(logits)

    compare(derivative, losses(impl))


def test_forward_mode_of_each_loss_of_a_batch_is_that_of_cross_entropy(batch, impl, log_prior):
    logits, target, _ = batch
    compare(
        lambda f: vmap(lambda x, y: jvp(lambda x: f(x, y, log_prior), (x,), (x.cos(),)))(logits, target),
        losses(impl),
    )


# Learned targets and weights ------------------------------------------------------------------------------------------


def weighted_losses(impl, log_prior):
    """The loss and its oracle as functions of (logits, target_weight), with two labels a row as in mixup."""
    target = torch.tensor([[0, 3], [2, 2], [4, 1]], device=log_prior.device)

    def loss(logits, target_weight):
        return logit_adjusted_cross_entropy(logits, target, log_prior, TAU, target_weight=target_weight, impl=impl)

    def oracle(logits, target_weight):
        probabilities = torch.zeros_like(logits).scatter_add(1, target, target_weight)
        return F.cross_entropy(logits + TAU * log_prior, probabilities)

    return loss, oracle


@pytest.fixture
def target_weight(device):
    return torch.rand(3, 2, dtype=torch.float64, device=device)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_mixed_derivatives_in_logits_and_label_weights_are_those_of_cross_entropy(
    logits, target_weight, log_prior, impl
):
    def derivatives(function):
        return [
            grad(function, argnums=(0, 1))(logits, target_weight),
            hessian(function, argnums=(0, 1))(logits, target_weight),
            grad(lambda w: grad(lambda x: function(x, w))(logits).square().sum())(target_weight),
            grad(lambda w: grad_and_value(lambda x: function(x, w))(logits)[1])(target_weight),
        ]

    compare(derivatives, weighted_losses(impl, log_prior))


def test_tangents_of_label_weights_are_those_of_cross_entropy(logits, target_weight, log_prior, impl):
    def derivatives(function):
        return [
            jvp(lambda w: function(logits, w), (target_weight,), (target_weight.cos(),)),
            jvp(lambda w: grad(lambda x: function(x, w))(logits), (target_weight,), (target_weight.cos(),)),
        ]

    compare(derivatives, weighted_losses(impl, log_prior))


def test_tangent_of_label_weights_survives_a_graph_below_it(logits, target_weight, log_prior, impl):
    compare(
        lambda f: jvp(lambda w: grad_and_value(lambda x: f(x, w))(logits)[1], (target_weight,), (target_weight.cos(),)),
        weighted_losses(impl, log_prior),
    )


def test_gradients_of_label_weights_through_a_batch_are_those_of_cross_entropy(logits, target_weight, log_prior, impl):
    compare(gradients_through_a_batch(logits, target_weight), weighted_losses(impl, log_prior))


def gradients_through_a_batch(logits, target_weight):
    weights = target_weight * torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64, device=logits.device).view(-1, 1, 1)

    def gradients(function):
        learned = weights.clone().requires_grad_()
        vmap(lambda w: function(logits, w))(learned).sum().backward()
        return grad(lambda w: vmap(lambda w: function(logits, w))(w).sum())(weights), learned.grad

    return gradients
