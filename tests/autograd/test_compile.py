"""torch.compile, torch.export and the package's operators in their graphs.

Oracles: the paper's formula in extended precision (`oracle.truth`), and `F.cross_entropy` in float64. Only Dynamo
decides what is traced and how often, so those tests run the traced graph eagerly ("aot_eager"). One test uses Inductor,
which compiles C++ on a CPU and takes seconds.
"""

import io

import pytest
import torch
import torch.nn.functional as F
from conftest import one_in
from oracle import truth
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

from fused_la import LogitAdjustedCrossEntropyLoss, logit_adjusted_cross_entropy

# PyTorch scripts a few of its own formulas when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is")

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64 on both sides


@pytest.fixture(params=["auto", "reference", "blocked", "triton"])
def any_impl(request, device):
    """Every `impl`, and "auto", whose graph holds the formula on a CPU and the kernels on a GPU."""
    if request.param == "blocked" and device != "cpu":
        pytest.skip("impl='blocked' runs on a CPU")
    return request.param


@pytest.fixture(autouse=True)
def _no_memory_of_other_tests():
    torch._dynamo.reset()


def is_opaque(impl, device):
    """Whether the graph holds an operator of the package instead of the formula."""
    return impl in ("blocked", "triton") or (impl == "auto" and device == "cuda")


@pytest.fixture
def log_prior(device):
    return torch.tensor([-0.1, -2.5, -6.0, -12.0, -8.0], dtype=torch.float64, device=device)


@pytest.fixture
def logits(device):
    return torch.randn(3, 5, dtype=torch.float64, device=device)


@pytest.fixture
def target(device):
    return torch.tensor([0, 3, -100], device=device)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


# (n_rows, tau) of calls that differ in everything that may change from step to step.
STEPS = [(4, 1.0), (5, 1.5), (9, 0.5), (3, 2.25), (16, 1.0)]


def step_inputs(n_rows, n_classes, device, dtype=torch.float64):
    return (
        torch.randn(n_rows, n_classes, device=device, dtype=dtype),
        torch.arange(n_rows, device=device) % n_classes,
        torch.linspace(-0.1, -12.0, n_classes, device=device, dtype=dtype),
    )


def test_rows_and_tau_change_with_one_recompilation(device, any_impl):
    """The first call is traced with its sizes as constants, the second for any number of rows and any tau."""
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def loss(logits, target, log_prior, tau):
        return logit_adjusted_cross_entropy(logits, target, log_prior, tau, impl=any_impl)

    for n_rows, tau in STEPS:
        x, y, p = step_inputs(n_rows, 7, device)
        x, want = leaf(x), leaf(x)
        value, expected = loss(x, y, p, tau), F.cross_entropy(want + tau * p, y)
        value.backward()
        expected.backward()
        assert_close((value, x.grad), (expected, want.grad), **EXACT)
    assert counter.frame_count <= 2


def test_every_size_may_be_dynamic(device, impl):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def loss(logits, target, log_prior, tau):
        return logit_adjusted_cross_entropy(logits, target, log_prior, tau, label_smoothing=0.1, impl=impl)

    frames = []
    for (n_rows, tau), n_classes in zip(STEPS, (5, 7, 6, 40, 11), strict=True):
        x, y, p = step_inputs(n_rows, n_classes, device)
        x, want = leaf(x), leaf(x)
        value = loss(x, y, p, tau)
        expected = F.cross_entropy(want + tau * p, y, label_smoothing=0.1)
        value.backward()
        expected.backward()
        assert_close((value, x.grad), (expected, want.grad), **EXACT)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


def test_inductor_computes_float32_losses_and_gradients(device, impl):
    """At most twice eager float32's error; a Python float must not make Inductor compute in float64."""
    counter = CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def loss(logits, target, log_prior, tau):
        return logit_adjusted_cross_entropy(logits, target, log_prior, tau, impl=impl)

    frames, errors, eager_errors = [], [], []
    for n_rows, tau in STEPS:
        x, y, p = step_inputs(n_rows, 7, device, torch.float32)
        x, eager = leaf(x), leaf(x)
        value, eager_value = loss(x, y, p, tau), F.cross_entropy(eager + tau * p, y)
        value.backward()
        eager_value.backward()
        assert value.dtype == x.grad.dtype == torch.float32
        frames.append(counter.frame_count)
        want = truth(x, y, p, tau)
        for results, into in (((value, x.grad), errors), ((eager_value, eager.grad), eager_errors)):
            into.append([(r.double().cpu() - w).abs().max().item() for r, w in zip(results, want[:2], strict=True)])
    assert len(set(frames)) == 1
    ulps = (torch.finfo(torch.float32).eps * 8, torch.finfo(torch.float32).eps)  # of a loss up to 16; of a gradient
    for error, eager_error, ulp in zip(zip(*errors, strict=True), zip(*eager_errors, strict=True), ulps, strict=True):
        assert max(error) <= 2 * max(eager_error) + ulp


def every_kind_of_target(device):
    """(target, options) over 3 rows of 5 classes."""
    weight = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5], dtype=torch.float64, device=device)
    distribution = torch.tensor([0.4, 0.3, 0.2, 0.0, 0.1], dtype=torch.float64, device=device)
    probabilities = torch.tensor([[0.7, 0.3, 0, 0, 0], [0.1, 0.2, 0.3, 0, 0.4], [0, 0, 1, 0, 0]], dtype=torch.float64)
    labels = torch.tensor([0, 2, -100], device=device)
    weighted = torch.tensor([[0, 2], [1, 1], [4, -100]], device=device)
    target_weight = torch.tensor([[0.3, 0.7], [0.5, 0.25], [0.6, 0.4]], dtype=torch.float64, device=device)
    return [
        (labels, dict(reduction="none")),
        (labels, dict(weight=weight)),
        (labels, dict(label_smoothing=0.1, smoothing_distribution=distribution, reduction="sum")),
        (weighted, dict(target_weight=target_weight, weight=weight)),
        (probabilities.to(device), dict(weight=weight)),
    ]


def test_every_kind_of_target_compiles(device, impl, logits, log_prior):
    """Class 3 is at -inf, and no target has mass on it."""
    log_prior = log_prior.index_fill(0, torch.tensor(3, device=device), -torch.inf)
    kinds = every_kind_of_target(device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def losses(logits, log_prior):
        return [
            logit_adjusted_cross_entropy(logits, target, log_prior, 1.3, impl=impl, **options).sum()
            for target, options in kinds
        ]

    x, p = leaf(logits), leaf(log_prior)
    for value, (target, options) in zip(losses(x, p), kinds, strict=True):
        want = truth(logits, target, log_prior, 1.3, **options)
        gradients = torch.autograd.grad(value, (x, p), retain_graph=True)
        got = [value.detach(), *gradients]
        assert_close([t.cpu() for t in got], [want.loss.sum(), *want[1:]], **EXACT)


@pytest.mark.parametrize("shape", [(5,), (2, 5, 3), (0, 5)], ids=str)
def test_every_shape_compiles(device, impl, log_prior, shape):
    """The logits are also transposed in memory."""
    logits = torch.randn(shape[::-1], dtype=torch.float64, device=device).permute(*range(len(shape))[::-1])
    target = torch.randint(0, 5, shape[:-1][:1] + shape[2:] if len(shape) > 1 else (), device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(logits):
        return logit_adjusted_cross_entropy(logits, target, log_prior, reduction="none", impl=impl)

    x = logits.detach().requires_grad_()
    value = loss(x)
    upstream = torch.randn_like(value)
    (gradient,) = torch.autograd.grad(value, x, upstream)
    want = truth(logits, target, log_prior, reduction="none", grad_loss=upstream)
    assert_close((value.detach().cpu(), gradient.cpu()), want[:2], **EXACT)


def test_no_adjustment_compiles_beside_a_small_one(device, impl, logits, target, log_prior):
    """At tau = 0 a class at -inf takes part in the sum again, which needs a separate graph."""
    log_prior = log_prior.index_fill(0, torch.tensor(1, device=device), -torch.inf)
    loss = torch.compile(logit_adjusted_cross_entropy, fullgraph=True, backend="aot_eager")
    for tau in (0.0, 1e-3, 0.0):
        want = F.cross_entropy(logits + tau * log_prior if tau > 0 else logits, target)
        assert_close(loss(logits, target, log_prior, tau, impl=impl), want, **EXACT)


def test_training_step_under_autocast_compiles_as_one_graph(device, impl):
    """Model, loss and reduction; the half-precision logits never leave the graph."""
    features = torch.randn(6, 8, device=device)
    target = torch.arange(6, device=device)
    log_prior = torch.linspace(-12.0, -0.1, 6, device=device)
    weight = 0.1 * torch.randn(6, 8, device=device)

    def step(weight, loss):
        with torch.autocast(device, torch.bfloat16):
            return loss(F.linear(features, weight))

    def gradient(loss, weight, compiled=False):
        weight = leaf(weight)
        function = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        value = function(weight, loss)
        value.backward()
        assert value.dtype == torch.float32
        return weight.grad

    got = gradient(lambda z: logit_adjusted_cross_entropy(z, target, log_prior, impl=impl), weight, compiled=True)
    eager = gradient(lambda z: F.cross_entropy(z + log_prior, target), weight)
    exact = weight.double().requires_grad_()
    F.cross_entropy(features.double() @ exact.T + log_prior, target).backward()
    error, eager_error = ((g - exact.grad).norm() / exact.grad.norm() for g in (got, eager))
    assert error <= 2 * eager_error + torch.finfo(torch.bfloat16).eps


def test_learned_label_weights_compile_or_are_refused(device, impl, logits, log_prior):
    target = torch.tensor([[0, 3], [2, 2], [4, 1]], device=device)
    target_weight = torch.rand(3, 2, dtype=torch.float64, device=device).requires_grad_()

    @torch.compile(backend="aot_eager")
    def loss(target_weight):
        return logit_adjusted_cross_entropy(logits, target, log_prior, target_weight=target_weight, impl=impl)

    if impl in ("blocked", "triton"):
        with pytest.raises(ValueError, match="for a gradient of target, target_weight"):
            loss(target_weight)
        return
    loss(target_weight).backward()
    want = -(logits + log_prior).log_softmax(1).gather(1, target) / 3
    assert_close(target_weight.grad, want, **EXACT)


# Modules and export ---------------------------------------------------------------------------------------------------


class Classifier(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.head = torch.nn.Linear(4, 5)
        self.criterion = LogitAdjustedCrossEntropyLoss([5000, 900, 60, 7, 1], tau=1.3, **options)

    def forward(self, features, target):
        return self.criterion(self.head(features), target)

    def oracle(self, features, target):
        model = self.double()
        return F.cross_entropy(model.head(features.double()) + 1.3 * model.criterion.log_prior, target)


def test_module_compiles_with_one_recompilation(device, impl):
    model = Classifier(impl=impl).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    calls = [(torch.randn(n, 4, device=device), torch.arange(n, device=device) % 5) for n in (4, 9, 3, 17)]
    values = []
    for features, target in calls:
        values.append(compiled(features, target))
        values[-1].backward()
    assert counter.frame_count <= 2
    gradient = model.head.weight.grad.double()
    model.zero_grad()
    oracles = [model.oracle(*call) for call in calls]
    sum(oracles).backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-6}  # float32, sums of a few terms of about 1
    assert_close(torch.stack(values).double(), torch.stack(oracles), **tolerance)
    assert_close(gradient, model.head.weight.grad, **tolerance)


def test_module_exports_saves_and_loads_for_any_number_of_rows(device, impl):
    model = Classifier(impl=impl).to(device)
    n_rows = torch.export.Dim("n_rows", min=2)
    features, target = torch.randn(4, 4, device=device), torch.arange(4, device=device)
    program = torch.export.export(model, (features, target), dynamic_shapes=({0: n_rows}, {0: n_rows}))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (4, 2, 11):
        features, target = torch.randn(n, 4, device=device), torch.arange(n, device=device) % 5
        value = loaded(features, target)
        assert value.dtype == torch.float32
        with torch.no_grad():
            want = model.double().oracle(features, target)
        model.float()
        assert_close(value.double(), want, rtol=1e-5, atol=1e-6)


# Graphs and operators -------------------------------------------------------------------------------------------------


def test_graph_holds_the_operator_or_the_formula(device, any_impl, logits, target, log_prior):
    backend = EagerAndRecordGraphs()
    torch.compile(logit_adjusted_cross_entropy, fullgraph=True, backend=backend)(
        logits, target, log_prior, impl=any_impl
    )
    (graph,) = backend.graphs
    targets = [str(node.target) for node in graph.graph.nodes]
    assert any("fused_la" in t for t in targets) == is_opaque(any_impl, device)
    assert any("log1p" in t for t in targets) == (not is_opaque(any_impl, device))


# (logits in the operator's shape (N, P, C), reduction)
OPERANDS = {
    "float16 rows": (lambda device: torch.randn(3, 1, 5, device=device).half(), "mean"),
    "float32 transposed": (lambda device: torch.randn(5, 3, device=device).T.unsqueeze(1), "none"),
    "float64 images": (
        lambda device: torch.randn(2, 5, 3, dtype=torch.float64, device=device).transpose(1, 2),
        "sum",
    ),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from opcheck
@pytest.mark.parametrize(("impl", "operands"), one_in(2, ["blocked", "triton"], list(OPERANDS)))
def test_operators_are_what_they_declare(device, log_prior, impl, operands):
    """Schema, fake tensors, autograd registration and AOTAutograd, by PyTorch's own checks."""
    if impl == "blocked" and device != "cpu":
        pytest.skip("impl='blocked' runs on a CPU")
    make_logits, reduction = OPERANDS[operands]
    logits = make_logits(device)
    target = torch.randint(0, 5, (*logits.shape[:2], 1), device=device)
    for learned in ((True, False), (False, True), (True, True)):
        x, p = (t.detach().requires_grad_(flag) for t, flag in zip((logits, log_prior), learned, strict=True))
        arguments = (x, p, target, *[None] * 8, 1.3, 0.0, -100)
        torch.library.opcheck(torch.ops.fused_la.loss_forward.default, (*arguments, reduction, impl))
    loss, state = torch.ops.fused_la.loss_forward(*arguments, reduction, impl)
    torch.library.opcheck(
        torch.ops.fused_la.loss_backward.default,
        (logits.detach(), log_prior, *arguments[2:], reduction, impl, state.detach(), torch.ones_like(loss), True),
    )


# torch.func inside torch.compile --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_forward_mode_is_that_of_cross_entropy(device, impl, logits, target, log_prior):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def tangent(x, direction):
        return jvp(lambda x: logit_adjusted_cross_entropy(x, target, log_prior, impl=impl), (x,), (direction,))

    want = jvp(lambda x: F.cross_entropy(x + log_prior, target), (logits,), (logits.cos(),))
    assert_close(tangent(logits, logits.cos()), want, **EXACT)


def test_compiled_dual_numbers_carry_their_tangent(impl, logits, target, log_prior):
    @torch.compile(backend="aot_eager")
    def tangent(x, direction):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, direction)
            return forward_ad.unpack_dual(logit_adjusted_cross_entropy(dual, target, log_prior, impl=impl)).tangent

    got = tangent(logits, logits.cos())
    assert got is not None
    assert_close(got, jvp(lambda x: F.cross_entropy(x + log_prior, target), (logits,), (logits.cos(),))[1], **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["vmap", "vmap of grad"])
def test_compiled_transform_is_that_of_cross_entropy(device, impl, logits, log_prior, transform):
    target = torch.tensor([0, 3, 2], device=device)

    def transformed(loss):
        each = vmap(loss) if transform == "vmap" else vmap(grad(loss))
        return lambda x: each(x, target)

    got = torch.compile(
        transformed(lambda x, y: logit_adjusted_cross_entropy(x, y, log_prior, impl=impl)),
        fullgraph=True,
        backend="aot_eager",
    )
    want = transformed(lambda x, y: F.cross_entropy(x + log_prior, y))
    assert_close(got(logits), want(logits), **EXACT)
