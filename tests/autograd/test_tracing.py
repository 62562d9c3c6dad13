"""Tensors without values and recorded graphs: fake tensors, `make_fx`, `aot_function`, PyTorch's estimators.

Every loss works wherever `F.cross_entropy(logits + log_prior, target)` does. The values that an implementation reads on
a CPU (labels, priors, whether every row counts) are missing there, and a graph must not bake in values of the tensors
that it was recorded with. So graphs are run on labels and priors that differ in kind from the recorded ones.
"""

import itertools
import math
import warnings

import pytest
import torch
from conftest import DEVICE
from functorch.compile import aot_function, nop
from oracle import truth
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fused_la import (
    LogitAdjustedCrossEntropyLoss,
    LogitAdjustedLinear,
    MarginCrossEntropyLoss,
    adjust_logits,
    count_classes,
    linear_logit_adjusted_cross_entropy,
    linear_margin_cross_entropy,
    log_prior_from_counts,
    logit_adjusted_cross_entropy,
    margin_cross_entropy,
    margins,
    normalize_classifier,
)
from fused_la.metrics import BalancedError
from fused_la.posthoc import TauSweep, divide_by_prior, estimate_prior

KINDS = ["labels", "several labels", "probabilities", "smoothing"]
TRACING = ["real", "fake", "symbolic"]


def problem_of(kind: str, n: int = 4, c: int = 5) -> dict:
    log_prior = torch.randn(c, device=DEVICE).log_softmax(0)
    arguments = dict(logits=torch.randn(n, c, device=DEVICE, requires_grad=True), log_prior=log_prior)
    if kind == "probabilities":
        return arguments | dict(target=torch.rand(n, c, device=DEVICE).softmax(1))
    if kind == "several labels":
        shares = torch.rand(n, 2, device=DEVICE)
        return arguments | dict(target=torch.randint(c, (n, 2), device=DEVICE), target_weight=shares)
    options = dict(label_smoothing=0.2, smoothing_distribution=log_prior.exp()) if kind == "smoothing" else {}
    return arguments | options | dict(target=torch.randint(c, (n,), device=DEVICE))


# Fake tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False], ids=["by name", "auto"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_fake_logits_have_the_shapes_of_real_ones(impl, named, kind, reduction):
    impl = impl if named else "auto"
    with FakeTensorMode():
        arguments = problem_of(kind)
        logits = arguments["logits"]
        loss = logit_adjusted_cross_entropy(**arguments, reduction=reduction, impl=impl)
        assert (loss.shape, loss.dtype) == ((4,) if reduction == "none" else (), torch.float32)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert (grad.shape, grad.dtype) == (logits.shape, logits.dtype)
        log_prior = arguments.pop("log_prior")
        margin = margins.vector_scaling(log_prior, 0.5, 1.0)
        margin_cross_entropy(margin=margin, **arguments, impl=impl).backward()
        assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_fake_heads_have_the_shapes_of_real_ones(impl, kind):
    with FakeTensorMode():
        arguments = problem_of(kind)
        del arguments["logits"]
        features, weight = (torch.randn(n, 8, device=DEVICE, requires_grad=True) for n in (4, 5))
        loss = linear_logit_adjusted_cross_entropy(features, weight, **arguments, impl=impl)
        loss.backward()
        assert (features.grad.shape, weight.grad.shape) == (features.shape, weight.shape)
        log_prior = arguments.pop("log_prior")
        linear_margin_cross_entropy(
            features, weight, margin=margins.logit_adjusted(log_prior), **arguments, impl=impl
        ).backward()


def test_fake_tensors_of_a_gpu_need_none():
    """Memory estimators use them on machines without a GPU; a module may have been built before."""
    before = LogitAdjustedCrossEntropyLoss([1] * 5)
    with FakeTensorMode():
        logits, target = torch.empty(4, 5, device="cuda"), torch.empty(4, dtype=torch.int64, device="cuda")
        log_prior = torch.empty(5, device="cuda")
        assert logit_adjusted_cross_entropy(logits, target, log_prior, reduction="none").shape == (4,)
        head = LogitAdjustedLinear(5, [5, 4, 3], device="cuda")
        assert head(logits, target).device.type == "cuda"
        criterion = LogitAdjustedCrossEntropyLoss([1] * 5)
        assert criterion(logits, target).device.type == "cuda"
        assert before(logits, target).device.type == "cuda"
    assert before.log_prior.device.type == "cpu"


def test_a_model_is_built_and_trained_under_a_fake_mode():
    with FakeTensorMode():
        trunk, head = torch.nn.Linear(8, 8), LogitAdjustedLinear(8, [900, 90, 10], cosine=True, class_weight=[1, 2, 3])
        features, target = trunk(torch.randn(4, 8)), torch.tensor([0, 1, 2, 0])
        criterion = LogitAdjustedCrossEntropyLoss(
            torch.tensor([900, 90, 10]), weight=torch.ones(3), label_smoothing=0.1
        )
        by_margin = MarginCrossEntropyLoss(margins.adaptive(criterion.log_prior))
        total = head(features, target) + criterion(head(features), target) + by_margin(head(features), target)
        total.backward()
        assert trunk.weight.grad.shape == (8, 8)
        assert head.predict(features).shape == (4,)
        criterion.class_counts = torch.tensor([1, 2, 3])


def test_a_module_that_was_built_before_takes_fake_logits_and_stays_real():
    """An estimator makes a model's parameters fake and leaves other tensors as they are."""
    target = torch.tensor([0, 1, 2, -100])
    for module in (
        LogitAdjustedCrossEntropyLoss([900, 90, 10], weight=[1, 2, 3]),
        MarginCrossEntropyLoss(margins.adaptive(torch.zeros(3))),
    ):
        logits = torch.randn(4, 3)
        want = module(logits, target)
        with FakeTensorMode() as mode:
            loss = module(mode.from_tensor(logits), mode.from_tensor(target))
            assert loss.shape == ()
        assert torch.equal(module(logits, target), want)


def test_fake_tensors_outlive_their_mode():
    with FakeTensorMode():
        arguments = problem_of("labels")
    assert logit_adjusted_cross_entropy(**arguments).shape == ()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # torchmetrics copies its states
def test_priors_metrics_and_posthoc_functions_take_fake_tensors():
    with FakeTensorMode():
        target = torch.tensor([0, 1, 2, 0])
        counts = count_classes(target, 3)
        assert (counts.shape, counts.dtype) == ((3,), torch.int64)
        log_prior, logits = log_prior_from_counts(counts), torch.randn(4, 3)
        assert (log_prior.shape, log_prior.dtype) == ((3,), torch.float32)
        assert adjust_logits(logits, log_prior, target_log_prior=log_prior).shape == (4, 3)
        assert divide_by_prior(logits, log_prior).shape == (4, 3)
        assert normalize_classifier(logits).shape == (4, 3)
        assert estimate_prior(logits, log_prior).shape == (3,)
        for make in (margins.balanced, margins.adaptive, margins.equalised, margins.logit_adjusted, margins.ldam):
            assert all(vector.shape == (3,) for _, vector in make(log_prior).named_vectors())
        margins.fisher_consistent(log_prior, log_prior)
        sweep = TauSweep(log_prior, [0.0, 1.0], split="val", class_counts=[9, 2, 1])
        sweep.update(logits, target)
        metric = BalancedError([9, 2, 1])
        metric.update(logits, target)
        assert metric.compute()["class_error"].shape == (3,)
        with pytest.raises(ValueError, match="logits must have values that TauSweep can look at, got a tensor that is"):
            sweep.best()
        with pytest.raises(ValueError, match="log_prior must have values that consistency can look at, got a tensor"):
            margins.consistency(margins.logit_adjusted(log_prior), log_prior)


def test_wrong_shapes_of_fake_tensors_are_refused_too():
    with FakeTensorMode(), pytest.raises(ValueError, match=r"log_prior must have shape \(5,\), got \(4,\)"):
        logit_adjusted_cross_entropy(torch.randn(4, 5), torch.zeros(4, dtype=torch.int64), torch.zeros(4))


def test_the_products_of_a_fake_head_are_counted():
    """A product has 2 * N * C * D floating-point operations: one product forward, three backward."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        features, weight = (torch.randn(n, 8, requires_grad=True) for n in (4, 5))
        linear_logit_adjusted_cross_entropy(
            features, weight, torch.zeros(4, dtype=torch.int64), torch.zeros(5)
        ).backward()
    assert counter.get_total_flops() == 2 * (4 * 5 * 8) * 4


# Graphs ---------------------------------------------------------------------------------------------------------------

# Graphs are recorded with labels that all count and a finite prior; these labels and this prior differ.
OTHER = dict(
    target=torch.tensor([2, -100, 0, 3], device=DEVICE),
    log_prior=torch.tensor([0.2, 0.0, 0.3, 0.5, 0.0], device=DEVICE).log(),
)


def gradient_of(impl):
    def gradient(logits, target, log_prior):
        loss = logit_adjusted_cross_entropy(logits, target, log_prior, impl=impl)
        return loss, torch.autograd.grad(loss, logits)[0]

    return gradient


@pytest.mark.parametrize("tracing", TRACING)
def test_a_graph_that_make_fx_records_bakes_in_no_values(impl, tracing):
    recorded = problem_of("labels")
    inputs = recorded["logits"], recorded["target"], recorded["log_prior"]
    graph = make_fx(gradient_of(impl), tracing_mode=tracing)(*inputs)
    for target, log_prior in [(OTHER["target"], OTHER["log_prior"]), (OTHER["target"], recorded["log_prior"])]:
        loss, grad = graph(recorded["logits"], target, log_prior)
        want = truth(recorded["logits"], target, log_prior)
        torch.testing.assert_close(loss.double(), want.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad.double(), want.grad_logits, rtol=1e-5, atol=1e-7)
    # In a graph a label out of range gives NaN, as on a GPU.
    assert graph(recorded["logits"], torch.full_like(OTHER["target"], 7), recorded["log_prior"])[0].isnan()


@pytest.mark.parametrize("tracing", TRACING)
def test_a_graph_of_a_head_bakes_in_no_values(impl, tracing):
    def gradient(features, weight, target, log_prior):
        loss = linear_logit_adjusted_cross_entropy(features, weight, target, log_prior, impl=impl)
        return loss, torch.autograd.grad(loss, features)[0]

    features, weight = (torch.randn(n, 8, device=DEVICE, requires_grad=True) for n in (4, 5))
    recorded = problem_of("labels")
    graph = make_fx(gradient, tracing_mode=tracing)(features, weight, recorded["target"], recorded["log_prior"])
    loss, grad = graph(features, weight, *OTHER.values())
    logits = features.detach().double() @ weight.detach().double().T
    want = truth(logits, *OTHER.values())
    torch.testing.assert_close(loss.double(), want.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), want.grad_logits @ weight.detach().double(), rtol=1e-5, atol=1e-6)


def test_aot_function_records_both_passes(impl):
    recorded = problem_of("labels")
    logits = recorded["logits"]
    compiled = aot_function(lambda x, y, p: logit_adjusted_cross_entropy(x, y, p, impl=impl), nop)
    for target, log_prior in [(recorded["target"], recorded["log_prior"]), tuple(OTHER.values())]:
        loss = compiled(logits, target, log_prior)
        (grad,) = torch.autograd.grad(loss, logits)
        want = truth(logits, target, log_prior)
        torch.testing.assert_close(loss.double(), want.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad.double(), want.grad_logits, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_target_is_recorded(impl, kind):
    arguments = problem_of(kind)
    tensor_names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    tensors = [arguments[name] for name in tensor_names]
    numbers = {name: value for name, value in arguments.items() if name not in tensor_names}

    def loss(*tensors):
        return logit_adjusted_cross_entropy(**dict(zip(tensor_names, tensors, strict=True)), **numbers, impl=impl)

    graph = make_fx(loss)(*tensors)
    want = truth(**{name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}).loss
    torch.testing.assert_close(graph(*tensors).double(), want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("tracing", TRACING)
def test_batches_of_gradients_are_recorded(tracing):
    batch = torch.randn(2, 4, 5, device=DEVICE), torch.randint(5, (2, 4), device=DEVICE)
    log_prior = torch.zeros(5, device=DEVICE)

    def gradients(logits, target, log_prior):
        one = torch.func.grad(lambda x, y: logit_adjusted_cross_entropy(x, y, log_prior))
        return torch.func.vmap(one)(logits, target)

    graph = make_fx(gradients, tracing_mode=tracing)(*batch, log_prior)
    other = torch.tensor([[1, -100, 2, 0], [0, 0, 0, -100]], device=DEVICE)
    got = graph(batch[0], other, log_prior)
    for logits, target, of_one in zip(batch[0], other, got, strict=True):
        want = truth(logits, target, log_prior).grad_logits
        torch.testing.assert_close(of_one.double(), want, rtol=1e-5, atol=1e-7)


def test_counts_and_priors_are_recorded():
    def prior(target):
        return log_prior_from_counts(count_classes(target, 3))

    graph = make_fx(prior)(torch.tensor([0, 1, 2]))
    got = graph(torch.tensor([2, 0, -100, 1, 1, 2, 2, 2])[:3])
    torch.testing.assert_close(got, torch.tensor([0.5, 0.0, 0.5]).log())
    with pytest.raises(RuntimeError, match="out of bounds"):
        graph(torch.tensor([0, 1, 3]))


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("tracing", TRACING)
def test_a_module_is_recorded(tracing, pre_dispatch):
    criterion = LogitAdjustedCrossEntropyLoss([900, 90, 10])
    graph = make_fx(criterion, tracing_mode=tracing, pre_dispatch=pre_dispatch)(
        torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    )
    logits, target = torch.randn(4, 3), torch.tensor([-100, 1, 2, 0])
    want = truth(logits, target, torch.tensor([math.log(p) for p in (0.9, 0.09, 0.01)])).loss
    torch.testing.assert_close(graph(logits, target).double(), want, rtol=1e-6, atol=1e-6)


def test_raw_logits_of_a_head_are_traced_by_torch_fx():
    """torchvision's create_feature_extractor traces models this way."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), LogitAdjustedLinear(3, [9, 5, 1]))
    x = torch.randn(4, 3)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, qualified_name):
            return False

    graph = torch.fx.GraphModule(model, Tracer().trace(model))
    assert torch.equal(graph(x), model(x))


def test_torch_jit_trace_takes_a_criterion():
    criterion = LogitAdjustedCrossEntropyLoss([900, 90, 10])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of tracing, and of the deprecation of torch.jit
        traced = torch.jit.trace(criterion, (torch.randn(4, 3), torch.tensor([0, 1, 2, 0])), check_trace=False)
    logits, target = torch.randn(4, 3), torch.tensor([-100, 1, 2, 0])
    torch.testing.assert_close(traced(logits, target), criterion(logits, target))


@pytest.mark.filterwarnings("ignore")  # PyTorch's warnings about its own code
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", ["logits", "head"])
def test_compiled_autograd_records_backward(kind, reduction):
    torch._dynamo.reset()
    features, weight = (torch.randn(n, 8, requires_grad=True) for n in (4, 5))
    target, log_prior = torch.tensor([0, 4, -100, 1]), torch.zeros(5)

    def loss():
        options = dict(reduction=reduction)
        if kind == "head":
            return linear_logit_adjusted_cross_entropy(features, weight, target, log_prior, **options).sum()
        return logit_adjusted_cross_entropy(features @ weight.T, target, log_prior, **options).sum()

    want = torch.autograd.grad(loss() * 2, weight)[0]
    with torch._dynamo.compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        (loss() * 2).backward()
    torch.testing.assert_close(weight.grad, want)


def test_functions_that_branch_on_values_cannot_be_recorded():
    with pytest.raises(ValueError, match="logits must have values that estimate_prior can look at, got a tensor that"):
        make_fx(lambda x, p: estimate_prior(x, p))(torch.randn(4, 3), torch.zeros(3))


def test_values_are_checked_again_after_a_trace():
    """A trace leaves no state behind: bad labels raise as before."""
    criterion = LogitAdjustedCrossEntropyLoss([900, 90, 10])
    for tracing, mode in itertools.product(TRACING[:1], [FakeTensorMode]):
        make_fx(criterion, tracing_mode=tracing)(torch.randn(1, 3), torch.tensor([0]))
        with mode():
            criterion(torch.randn(1, 3), torch.tensor([0]))
    with pytest.raises(IndexError, match="Target 3 is out of bounds"):
        criterion(torch.randn(1, 3), torch.tensor([3]))
