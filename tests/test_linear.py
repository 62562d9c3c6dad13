"""Losses of a linear head against the oracle, on tiles of a few rows and classes.

Small tiles put tile boundaries everywhere. The oracle gives the gradients of logits and prior; the gradients of
features, weight and bias follow from that of the logits in float64.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, one_in
from oracle import truth
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import fused_la
from fused_la import (
    LogitAdjustedLinear,
    linear_logit_adjusted_cross_entropy,
    linear_margin_cross_entropy,
    log_prior_from_counts,
    margin_cross_entropy,
    margins,
)
from fused_la._tiled import head as tiled_head

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64 on both sides


@pytest.fixture
def unwritten_is_nan():
    """Fill uninitialized memory with NaN; fresh pages would hold zeros."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # with torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch, request):
    """Tiles of 3 rows and 7 classes; of 13 classes for the kernels, because their interpreter is slow per tile."""
    widest = 13 if "triton" in request.node.name else 7
    monkeypatch.setattr(
        tiled_head, "choose_tile_shape", lambda n, c, device: tiled_head.TileShape(max(1, min(n, 3)), min(c, widest))
    )


def make_head(
    n: int, d: int, c: int, dtype=torch.float64, spread: float = 3.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, weight, bias and log prior; all require grad."""
    tensors = torch.randn(n, d), torch.randn(c, d) * spread, torch.randn(c), torch.randn(c).mul(2).log_softmax(0)
    return tuple(t.to(DEVICE, dtype).requires_grad_() for t in tensors)


def make_target(kind: str, n: int, c: int, avoid: int | None = None) -> dict:
    """Labels, one of them ignored; two labels a row, some equal or ignored; or probabilities. No target is `avoid`."""
    if kind == "probabilities":
        target = torch.rand(n, c, dtype=torch.float64)
        if avoid is not None:
            target[:, avoid] = 0.0
        return {"target": (target / target.sum(1, keepdim=True)).to(DEVICE)}
    shape = (n,) if kind == "labels" else (n, 2)
    target = torch.randint(0, c, shape)
    if avoid is not None:
        target[target == avoid] = avoid - 1
    if n > 2:
        target[1] = -100
    if kind == "labels":
        return {"target": target.to(DEVICE)}
    target[0, 1] = target[0, 0]
    if n > 3:
        target[3, 0] = -100
    return {"target": target.to(DEVICE), "target_weight": torch.rand(n, 2, dtype=torch.float64, device=DEVICE)}


def expected(features, weight, bias, log_prior, tau, upstream, **options) -> tuple[Tensor, ...]:
    """Exact loss and gradients of features, weight, bias and log_prior, in float64."""
    x, w = features.detach().cpu().double(), weight.detach().cpu().double()
    logits = x @ w.T if bias is None else x @ w.T + bias.detach().cpu().double()
    options = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    options["weight"] = options.pop("class_weight", None)
    exact = truth(logits, log_prior=log_prior.detach().cpu(), tau=tau, grad_loss=upstream.cpu(), **options)
    g = exact.grad_logits
    return exact.loss, g @ w, g.T @ x, g.sum(0), exact.grad_log_prior


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("shape", "smoothing", "kind"),
    one_in(
        3,
        [(5, 3, 17), (1, 4, 7), (7, 2, 2), (4, 6, 30)],
        ["none", "uniform", "prior"],
        ["labels", "two labels", "probabilities"],
    ),
    ids=str,
)
def test_loss_and_gradients_agree_with_the_formula(impl, kind, smoothing, shape):
    n, d, c = shape
    features, weight, bias, log_prior = make_head(n, d, c)
    excluded = 3 if c > 7 and smoothing != "uniform" else None
    if excluded is not None:
        with torch.no_grad():
            log_prior[excluded] = -math.inf
    options = make_target(kind, n, c, avoid=excluded)
    if smoothing != "none":
        options |= {"label_smoothing": 0.2}
    if smoothing == "prior":
        options |= {"smoothing_distribution": log_prior.detach().softmax(0)}
    for reduction, class_weight in (("mean", torch.rand(c)), ("sum", None), ("none", None)):
        options |= {"reduction": reduction, "class_weight": None if class_weight is None else class_weight.to(weight)}
        upstream = torch.randn(n) if reduction == "none" else torch.tensor(-1.7)
        loss = linear_logit_adjusted_cross_entropy(
            features, weight, log_prior=log_prior, tau=1.3, bias=bias, impl=impl, **options
        )
        grads = torch.autograd.grad(loss, (features, weight, bias, log_prior), upstream.to(loss))
        truths = expected(features, weight, bias, log_prior, 1.3, upstream.double(), **options)
        for actual, exact in zip((loss, *grads), truths, strict=True):
            assert_close(actual.detach().cpu(), exact, **EXACT)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["labels", "two labels"])
@pytest.mark.parametrize("preset", ["ldam", "adaptive", "cdt", "vector_scaling", "balanced", "logit_adjusted_adaptive"])
def test_margins_agree_with_the_loss_of_whole_logits(impl, preset, kind):
    n, c = 5, 17
    features, weight, bias, log_prior = make_head(n, 3, c, spread=0.3)
    more = {"cdt": (0.3,), "vector_scaling": (0.2, 1.0)}.get(preset, ())
    margin = getattr(margins, preset)(log_prior.detach(), *more)
    options = make_target(kind, n, c)
    leaves = (features, weight, bias)
    loss = linear_margin_cross_entropy(features, weight, margin=margin, bias=bias, impl=impl, **options)
    whole = margin_cross_entropy(F.linear(*leaves), margin=margin, impl="reference", **options)
    assert_close(loss, whole, **EXACT)
    for actual, exact in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(whole, leaves), strict=True):
        assert_close(actual, exact, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradients_are_as_accurate_as_with_whole_logits(impl, dtype, monkeypatch):
    """Half precision is even more accurate: logits are not rounded, and gradients are summed in float32 over tiles."""
    monkeypatch.setattr(tiled_head, "choose_tile_shape", lambda n, c, device: tiled_head.TileShape(4, 32))
    n, d, c = 9, 16, 150
    features, weight, bias, log_prior = (t.detach().to(dtype).requires_grad_() for t in make_head(n, d, c, spread=0.5))
    log_prior = log_prior.detach().float().requires_grad_()
    target = torch.randint(0, c, (n,), device=DEVICE)
    leaves = (features, weight, bias, log_prior)
    loss = linear_logit_adjusted_cross_entropy(features, weight, target, log_prior, bias=bias, impl=impl)
    eager = F.cross_entropy(F.linear(features, weight, bias).float() + log_prior, target)
    truths = expected(features, weight, bias, log_prior, 1.0, torch.tensor(1.0), target=target)
    assert loss.dtype == torch.float32
    ours, theirs = (torch.autograd.grad(of, leaves) for of in (loss, eager))
    for leaf, actual, baseline, exact in zip((loss, *leaves), (loss, *ours), (eager, *theirs), truths, strict=True):
        assert actual.dtype == leaf.dtype
        ulp = torch.finfo(actual.dtype).eps * exact.abs().max()
        error, allowed = ((t.detach().cpu().double() - exact).abs().max() for t in (actual, baseline))
        assert error <= 2 * allowed + 2 * ulp


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("label", [0, 6, 7, 29])
def test_a_confident_row_keeps_its_digits_whichever_tile_its_label_is_in(impl, label):
    if impl == "reference":
        pytest.skip("has whole logits, whose accuracy is tested elsewhere")
    weight = torch.zeros(30, 1, device=DEVICE)
    weight[label] = 60.0
    weight.requires_grad_()
    features, log_prior = torch.ones(1, 1, device=DEVICE), torch.zeros(30, device=DEVICE)
    loss = linear_logit_adjusted_cross_entropy(
        features, weight, torch.tensor([label], device=DEVICE), log_prior, impl=impl
    )
    (grad,) = torch.autograd.grad(loss, weight)
    exact = 29 * math.exp(-60)
    assert loss.item() == pytest.approx(exact, rel=1e-5)
    assert grad[label].item() == pytest.approx(-exact, rel=1e-5)
    assert grad.sum().item() == pytest.approx(0.0, abs=1e-4 * exact)


@pytest.mark.usefixtures("small_tiles")
def test_tiles_of_excluded_classes_and_rows_of_nan(impl):
    features, weight, bias, log_prior = make_head(4, 3, 21)
    with torch.no_grad():
        log_prior[:14] = -math.inf  # the first two tiles
    target = torch.tensor([15, 20, 14, 16], device=DEVICE)
    leaves = (features, weight, bias, log_prior)
    loss = linear_logit_adjusted_cross_entropy(features, weight, target, log_prior, bias=bias, impl=impl)
    grads = torch.autograd.grad(loss, leaves)
    truths = expected(*leaves, 1.0, torch.tensor(1.0), target=target)
    assert_close(grads[2].cpu()[:14], torch.zeros(14).double())
    for actual, exact in zip((loss, *grads), truths, strict=True):
        assert_close(actual.detach().cpu(), exact, **EXACT)

    with torch.no_grad():
        features[2] = math.nan
    loss = linear_logit_adjusted_cross_entropy(
        features, weight, target, log_prior, bias=bias, impl=impl, reduction="none"
    )
    assert loss.isnan().tolist() == [False, False, True, False]
    kept = torch.tensor([0, 1, 3], device=DEVICE)
    grads = torch.autograd.grad(loss[kept].sum(), leaves)
    truths = expected(
        features[kept], weight, bias, log_prior, 1.0, torch.ones(3), target=target[kept], reduction="none"
    )
    assert_close(grads[0][kept].cpu(), truths[1], **EXACT)


@pytest.mark.usefixtures("small_tiles")
def test_infinity_and_nan_matter_only_in_rows_and_classes_that_count(impl):
    features, weight, bias, log_prior = (t.detach() for t in make_head(4, 3, 17))
    features, log_prior = features.abs(), log_prior.index_fill(0, torch.tensor([5], device=DEVICE), -math.inf)
    target = torch.tensor([0, -100, 16, 8], device=DEVICE)
    leaves = (features, weight.index_fill(0, torch.tensor([5], device=DEVICE), math.inf), bias)
    leaves[0][1] = math.nan  # an ignored row
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    loss = linear_logit_adjusted_cross_entropy(*leaves[:2], target, log_prior, bias=bias, impl=impl)
    kept = [c for c in range(17) if c != 5]
    counting = [0, 2, 3]
    x, w, b = features[counting], weight[kept], bias.detach()[kept].requires_grad_()
    labels = torch.tensor([0, 15, 7], device=DEVICE)
    exact = F.cross_entropy(F.linear(x, w, b) + log_prior[kept], labels)
    assert_close(loss, exact, **EXACT)
    (grad,), (grad_of_kept,) = torch.autograd.grad(loss, bias), torch.autograd.grad(exact, b)
    assert_close(grad[kept], grad_of_kept, **EXACT)
    assert grad[5] == 0

    for value in (math.inf, -math.inf):  # a class at +inf, then all classes at -inf
        classes = [4] if value > 0 else list(range(17))
        infinite = weight.index_fill(0, torch.tensor(classes, device=DEVICE), value)
        loss = linear_logit_adjusted_cross_entropy(x.detach(), infinite, target[counting], log_prior, impl=impl)
        assert loss.isnan()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["labels", "two labels"])
def test_an_ignored_label_costs_nothing_however_low_the_logits_are(impl, kind):
    """No tile sets z of an ignored label, so it stays 0. It must not count: here exp(0 - z) overflows float32."""
    margin = margins.ldam(torch.tensor([0.9, 0.07, 0.03], device=DEVICE).log())
    features = torch.ones(3, 1, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[-7.0], [-8.0], [-9.0]], device=DEVICE, requires_grad=True)
    if kind == "labels":
        options = {"target": torch.tensor([0, -100, 2], device=DEVICE)}
    else:
        target = torch.tensor([[0, -100], [-100, -100], [1, 2]], device=DEVICE)
        options = {"target": target, "target_weight": torch.full((3, 2), 0.5, device=DEVICE)}
    found, exact = (
        (loss.detach(), *torch.autograd.grad(loss, (features, weight)))
        for loss in (
            linear_margin_cross_entropy(features, weight, margin=margin, impl=which, **options)
            for which in (impl, "reference")
        )
    )
    assert not exact[0].isnan()
    for actual, wanted in zip(found, exact, strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_bias_may_be_of_another_dtype(impl, dtype):
    """The bias is added in the compute dtype, in every implementation."""
    features, weight, bias, log_prior = (t.detach().to(dtype).requires_grad_() for t in make_head(4, 3, 17, spread=0.5))
    bias = bias.detach().to(torch.float32 if dtype != torch.float32 else torch.float64).requires_grad_()
    target = torch.arange(4, device=DEVICE)
    loss = linear_logit_adjusted_cross_entropy(features, weight, target, log_prior, bias=bias, impl=impl)
    leaves = (features, weight, bias, log_prior)
    grads = torch.autograd.grad(loss, leaves, create_graph=impl != "triton")
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    exact = expected(*leaves, 1.0, torch.tensor(1.0), target=target)
    for actual, wanted, like in zip((loss, *grads), exact, (loss, *leaves), strict=True):
        assert actual.dtype == like.dtype
        close = {"rtol": 2e-2, "atol": 2e-3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        assert_close(actual.detach().cpu().double(), wanted, **close)


def test_without_features_the_logits_are_the_bias(impl):
    _, _, bias, log_prior = make_head(4, 1, 17)
    features, weight = bias.new_empty(4, 0), bias.new_empty(17, 0)
    target = torch.tensor([0, 16, 7, -100], device=DEVICE)
    loss = linear_logit_adjusted_cross_entropy(features, weight, target, log_prior, bias=bias, impl=impl)
    exact = F.cross_entropy(bias.expand(4, -1) + log_prior, target)
    assert_close(loss, exact, **EXACT)
    assert_close(torch.autograd.grad(loss, bias), torch.autograd.grad(exact, bias), **EXACT)


@pytest.mark.usefixtures("small_tiles", "unwritten_is_nan")
def test_no_rows_and_no_counting_rows(impl):
    features, weight, bias, log_prior = make_head(3, 2, 9)
    for x, target in ((features[:0], torch.empty(0, dtype=torch.int64)), (features, torch.full((3,), -100))):
        for reduction, value in (("mean", math.nan), ("sum", 0.0)):
            loss = linear_logit_adjusted_cross_entropy(
                x, weight, target.to(DEVICE), log_prior, bias=bias, reduction=reduction, impl=impl
            )
            assert_close(loss.item(), value, equal_nan=True)
            (grad,) = torch.autograd.grad(loss, weight)
            if reduction == "sum":
                assert_close(grad, torch.zeros_like(weight))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives_agree_with_finite_differences(impl, reduction):
    features, weight, bias, log_prior = make_head(4, 2, 9, spread=1.0)
    target = torch.tensor([0, 8, -100, 3], device=DEVICE)

    def loss(*leaves):
        features, weight, bias, log_prior = leaves
        return linear_logit_adjusted_cross_entropy(
            features, weight, target, log_prior, 0.7, bias=bias, reduction=reduction, label_smoothing=0.1, impl=impl
        )

    interpreted = impl == "triton" and DEVICE == "cpu"
    assert torch.autograd.gradcheck(loss, (features, weight, bias, log_prior), fast_mode=interpreted)
    if reduction == "mean":
        assert torch.autograd.gradgradcheck(loss, (features, weight, bias, log_prior), fast_mode=interpreted)


@pytest.mark.usefixtures("small_tiles")
def test_a_second_backward_gives_equal_gradients_and_they_accumulate(impl):
    features, weight, bias, log_prior = make_head(5, 3, 17)
    target = torch.randint(0, 17, (5,), device=DEVICE)
    loss = linear_logit_adjusted_cross_entropy(features, weight, target, log_prior, bias=bias, impl=impl)
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight, retain_graph=True)
    assert_close(first, second, rtol=0, atol=0)
    loss.backward()
    linear_logit_adjusted_cross_entropy(features, weight, target, log_prior, bias=bias, impl=impl).backward()
    assert_close(weight.grad, 2 * first, **EXACT)


# Memory ---------------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Records the number of elements of every storage that operators allocate."""

    def __init__(self, *given: Tensor):
        super().__init__()
        self._known = {self._key(t) for t in given}
        self.n_elements: list[int] = []

    @staticmethod
    def _key(tensor: Tensor) -> tuple[int, int]:
        """Identifies a storage; memory that is reused for the same size counts once."""
        return tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and self._key(tensor) not in self._known:
                self._known.add(self._key(tensor))
                self.n_elements.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("kind", ["labels", "two labels"])
def test_no_tensor_is_larger_than_a_tile_or_a_gradient(impl, kind, monkeypatch):
    if impl == "reference":
        pytest.skip("makes whole logits, as it says")
    monkeypatch.setattr(tiled_head, "choose_tile_shape", lambda n, c, device: tiled_head.TileShape(min(n, 8), 16))
    n, d, c = 10, 3, 150
    features, weight, bias, log_prior = make_head(n, d, c)
    options = make_target(kind, n, c)
    leaves = (features, weight, bias, log_prior)
    with Allocations(*leaves) as allocations:
        loss = linear_logit_adjusted_cross_entropy(
            features, weight, log_prior=log_prior, bias=bias, impl=impl, **options
        )
        torch.autograd.grad(loss, leaves)
    assert sum(size > c for size in allocations.n_elements) == 1  # the weight's gradient
    assert max(allocations.n_elements) == c * d
    assert any(size == 8 * 16 for size in allocations.n_elements)  # a tile


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "wanted", [(True, False, False, False), (False, True, False, False), (False, False, True, True)]
)
def test_only_the_needed_gradients_are_computed(impl, wanted):
    leaves = [t.detach().requires_grad_(want) for t, want in zip(make_head(5, 3, 17), wanted, strict=True)]
    features, weight, bias, log_prior = leaves
    target = torch.randint(0, 17, (5,), device=DEVICE)
    with Allocations(*leaves) as allocations:
        loss = linear_logit_adjusted_cross_entropy(features, weight, target, log_prior, bias=bias, impl=impl)
        loss.backward()
    assert [leaf.grad is not None for leaf in leaves] == list(wanted)
    truths = expected(features, weight, bias, log_prior, 1.0, torch.tensor(1.0), target=target)[1:]
    for leaf, exact in zip(leaves, truths, strict=True):
        if leaf.grad is not None:
            assert_close(leaf.grad.cpu(), exact, **EXACT)
    if impl != "reference":
        assert (17 * 3 in allocations.n_elements) == wanted[1]


def test_tile_shapes_stay_in_their_budget_and_within_the_logits():
    for device, (elements, most_rows) in (("cpu", tiled_head._CPU_TILE), ("cuda", tiled_head._GPU_TILE)):
        for n in (0, 1, 2, 63, 64, 256, 1000, 1024, 1025, 4096, 100_000):
            for c in (1, 127, 128, 1000, 8142, 100_000, 10_000_000):
                rows, classes = tiled_head.choose_tile_shape(n, c, device)
                assert 1 <= rows <= max(1, min(n, most_rows))
                assert 1 <= classes <= c
                assert rows * classes <= elements
                assert rows == max(1, min(n, most_rows))  # as many rows as allowed, whatever that leaves for classes
                assert classes == c or classes % 128 == 0
                assert classes == c or rows * (classes + 128) > elements


def test_the_default_tiles_split_a_wide_head(impl):
    """The head is wider than one tile of the CPU, so its default tile shape has a boundary between tiles."""
    if impl != "blocked":
        pytest.skip("the interpreter would take minutes")
    n, c = 3, 1_500_001
    assert tiled_head.choose_tile_shape(n, c, "cpu").classes < c
    features, weight, _, log_prior = make_head(n, 2, c, torch.float32, spread=1.0)
    target = torch.tensor([0, 1_500_000, 1_398_100])
    loss = linear_logit_adjusted_cross_entropy(features, weight, target, log_prior)
    leaves = [t.detach().double().requires_grad_() for t in (features, weight, log_prior)]
    whole = F.cross_entropy(F.linear(*leaves[:2]) + leaves[2], target)
    assert_close(loss.double(), whole, rtol=1e-6, atol=0)
    eager = F.cross_entropy(F.linear(features, weight) + log_prior, target)
    exact = torch.autograd.grad(whole, leaves[:2])
    ours, theirs = (torch.autograd.grad(of, (features, weight)) for of in (loss, eager))
    for a, baseline, b in zip(ours, theirs, exact, strict=True):
        ulp = torch.finfo(torch.float32).eps * b.abs().max()
        assert (a.double() - b).abs().max() <= 2 * (baseline.double() - b).abs().max() + 2 * ulp


# Shapes, dtypes, transforms -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["labels", "two labels", "probabilities"])
@pytest.mark.parametrize("shape", [(), (2, 3), (2, 1, 2)])
def test_leading_dimensions_are_rows(impl, shape, kind):
    n, c = max(1, math.prod(shape)), 9
    features, weight, bias, log_prior = make_head(n, 3, c)
    options = make_target(kind, n, c)
    flat = linear_logit_adjusted_cross_entropy(
        features, weight, log_prior=log_prior, bias=bias, reduction="none", impl=impl, **options
    )
    shaped = {k: v.reshape(shape + v.shape[1:]) for k, v in options.items()}
    loss = linear_logit_adjusted_cross_entropy(
        features.reshape(*shape, 3), weight, log_prior=log_prior, bias=bias, reduction="none", impl=impl, **shaped
    )
    assert_close(loss, flat.reshape(shape), rtol=0, atol=0)


@pytest.mark.usefixtures("small_tiles")
def test_autocast_allows_mixed_dtypes_and_changes_no_dtype_of_a_gradient(impl):
    features, weight, bias, log_prior = make_head(5, 3, 17, torch.float32, spread=0.5)
    half = features.detach().bfloat16().requires_grad_()
    target = torch.randint(0, 17, (5,), device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = linear_logit_adjusted_cross_entropy(half, weight, target, log_prior, bias=bias, impl=impl)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, (half, weight))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    truths = expected(half, weight, bias, log_prior, 1.0, torch.tensor(1.0), target=target)
    for actual, exact in zip((loss, *grads), truths, strict=False):
        assert_close(actual.detach().cpu().double(), exact, rtol=0.05, atol=0.02 * exact.abs().max().item())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")  # PyTorch warns when forward mode is first used
@pytest.mark.usefixtures("small_tiles")
def test_transforms_and_forward_mode_agree_with_the_formula(impl):
    features, weight, bias, log_prior = (t.detach() for t in make_head(4, 3, 9))
    target = torch.tensor([0, 8, 7, 3], device=DEVICE)

    def loss(x, w):
        return linear_logit_adjusted_cross_entropy(x, w, target, log_prior, bias=bias, impl=impl)

    def formula(x, w):
        return F.cross_entropy(F.linear(x, w, bias) + log_prior, target)

    for transform in (
        lambda f: torch.func.grad(f, (0, 1))(features, weight),
        lambda f: torch.func.vmap(torch.func.grad(f), (0, None))(torch.stack([features, -features]), weight),
        lambda f: torch.func.jvp(f, (features, weight), (torch.ones_like(features), torch.ones_like(weight))),
    ):
        assert_close(transform(loss), transform(formula), **EXACT)


@pytest.mark.usefixtures("small_tiles")
def test_compiles_into_one_operator_and_does_not_recompile_for_each_tau_or_row_count(impl):
    torch._dynamo.reset()
    _, weight, bias, log_prior = make_head(4, 3, 17)
    graphs = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=graphs)
    def loss(x, target, tau):
        return linear_logit_adjusted_cross_entropy(x, weight, target, log_prior, tau, bias=bias, impl=impl)

    for n, tau in ((4, 1.0), (5, 0.5), (7, 1.5), (9, 2.0)):
        features = make_head(n, 3, 17)[0]
        target = torch.randint(0, 17, (n,), device=DEVICE)
        leaves = (features, weight, bias, log_prior)
        value = loss(features, target, tau)
        grads = torch.autograd.grad(value, leaves)
        truths = expected(features, weight, bias, log_prior, tau, torch.tensor(1.0), target=target)
        for actual, exact in zip((value, *grads), truths, strict=True):
            assert_close(actual.detach().cpu(), exact, **EXACT)
    assert graphs.frame_count <= 2
    if impl != "reference":
        calls = [node.target for graph in graphs.graphs for node in graph.graph.nodes if node.op == "call_function"]
        assert torch.ops.fused_la.head_forward.default in calls
        assert F.linear not in calls


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck raises it
@pytest.mark.usefixtures("small_tiles")
def test_the_operator_passes_opcheck():
    features, weight, bias, log_prior = make_head(4, 3, 17)
    target = torch.randint(0, 17, (4, 1, 1), device=DEVICE)
    impl = "blocked" if DEVICE == "cpu" else "triton"
    torch.library.opcheck(
        torch.ops.fused_la.head_forward.default,
        (features, weight, bias, torch.float64, log_prior, target, *[None] * 8, 1.0, 0.0, -100, "mean", impl),
    )  # fmt: skip


# Errors ---------------------------------------------------------------------------------------------------------------

BAD = [
    (dict(features=[1.0]), TypeError, "features must be a torch.Tensor, got list"),
    (dict(features=torch.ones(4, 3, dtype=torch.int64)), TypeError, "features must be float16, .*, got torch.int64"),
    (dict(features=torch.tensor(1.0)), ValueError, r"features must have shape \(D,\) or \(..., D\), got \(\)"),
    (dict(weight=torch.ones(9)), ValueError, r"weight must have shape \(C, n_features\) with C >= 1, got \(9,\)"),
    (dict(weight=torch.ones(0, 3)), ValueError, r"weight must have shape \(C, n_features\) with C >= 1, got \(0, 3\)"),
    (dict(weight=torch.ones(9, 4)), ValueError, r"weight must have shape \(C, 3\), got \(9, 4\)"),
    (
        dict(weight=torch.ones(9, 3).double()),
        TypeError,
        "weight must have the dtype of features, torch.float32, outside",
    ),
    (
        dict(weight=torch.ones(9, 3, device="meta")),
        ValueError,
        "weight must be on the device of features, cpu, got meta",
    ),
    (dict(bias=torch.ones(8)), ValueError, r"bias must have shape \(9,\), got \(8,\)"),
    (dict(bias=torch.ones(9).long()), TypeError, "bias must be float16, .*, got torch.int64"),
    (dict(target=torch.zeros(5).long()), ValueError, r"target must have shape \(4,\) for class indices, got \(5,\)"),
    (dict(target=torch.full((4,), 9)), IndexError, r"Target 9 is out of bounds: .* \[0, 9\)"),
    (dict(log_prior=torch.zeros(8)), ValueError, r"log_prior must have shape \(9,\), got \(8,\)"),
    (dict(tau=-1.0), ValueError, "tau must be finite and not negative, got -1"),
    (dict(class_weight=torch.ones(8)), ValueError, r"class_weight must have shape \(9,\), got \(8,\)"),
    (dict(reduction="max"), ValueError, "reduction must be 'none', 'mean' or 'sum', got 'max'"),
    (dict(impl="cuda"), ValueError, "impl must be 'auto', 'triton', 'blocked' or 'reference', got 'cuda'"),
    (
        dict(features=torch.ones(2, 2, 3), target=torch.zeros(4).long()),
        ValueError,
        r"target must have shape \(2, 2\), got \(4,\)",
    ),
    (
        dict(features=torch.ones(2, 2, 3), target=torch.ones(2, 2, 8)),
        ValueError,
        r"target must have shape \(4, 9\) for class probabilities, got \(4, 8\)",
    ),
]


@pytest.mark.skipif(DEVICE != "cpu", reason="values on a GPU are not read")
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[next(iter(change)) for change, _, _ in BAD])
def test_bad_input_is_named(change, error, message):
    arguments = dict(
        features=torch.ones(4, 3), weight=torch.ones(9, 3), target=torch.zeros(4).long(), log_prior=torch.zeros(9)
    )
    with pytest.raises(error, match=message):
        linear_logit_adjusted_cross_entropy(**(arguments | change))


def test_gradients_that_only_the_reference_has_are_refused_by_other_implementations():
    features, weight, _, log_prior = make_head(4, 3, 9)
    target = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    class_weight = torch.ones(9, device=DEVICE, requires_grad=True)
    named = "blocked" if DEVICE == "cpu" else "triton"
    with pytest.raises(ValueError, match="impl must be 'reference' or 'auto' for a gradient of target"):
        linear_logit_adjusted_cross_entropy(features, weight, target, log_prior, class_weight=class_weight, impl=named)
    loss = linear_logit_adjusted_cross_entropy(features, weight, target, log_prior, class_weight=class_weight)
    assert torch.autograd.grad(loss, class_weight)[0].isfinite().all()


# The module -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cosine", [False, True])
def test_the_module_is_a_linear_layer_and_its_loss(cosine):
    head = LogitAdjustedLinear(5, [90, 9, 3, 1], tau=0.8, cosine=cosine, scale=7.0, dtype=torch.float64, device=DEVICE)
    features = torch.randn(6, 5, dtype=torch.float64, device=DEVICE)
    target = torch.tensor([0, 1, 2, 3, 0, -100], device=DEVICE)
    logits = F.linear(features, head.weight, head.bias)
    if cosine:
        cosines = F.normalize(features) @ F.normalize(head.weight).T
        logits = 7.0 * cosines + head.bias
    assert_close(head(features), logits, **EXACT)
    log_prior = log_prior_from_counts([90, 9, 3, 1]).to(DEVICE)
    expected_loss = F.cross_entropy(logits + 0.8 * log_prior.double(), target)
    loss = head(features, target)
    assert_close(loss, expected_loss, **EXACT)
    grads, exact = (torch.autograd.grad(of, (head.weight, head.bias)) for of in (loss, expected_loss))
    assert_close(grads, exact, **EXACT)
    assert_close(head.predict(features), logits.argmax(1))
    assert_close(head.predict(features[0]), logits[0].argmax())
    assert ("cosine=True, scale=7.0" in repr(head)) == cosine


def test_prediction_is_tiled_and_takes_the_first_of_equal_logits_and_of_nan(monkeypatch):
    monkeypatch.setattr(tiled_head, "choose_tile_shape", lambda n, c, device: tiled_head.TileShape(2, 4))
    head = LogitAdjustedLinear(2, torch.ones(11), bias=False, device=DEVICE)
    with torch.no_grad():
        head.weight.copy_(torch.randn(11, 2))
        head.weight[9] = head.weight[2]
    features = torch.randn(50, 2, device=DEVICE)
    features[7] = math.nan
    classes = head.predict(features)
    logits = head(features)
    finite = ~logits.isnan().any(1)
    assert_close(classes[finite], logits[finite].argmax(1))
    assert not (classes == 9).any()
    assert logits[7, classes[7]].isnan()
    with Allocations(features, head.weight) as allocations:
        head.predict(features)
    assert max(allocations.n_elements) <= 50


def test_the_module_keeps_its_log_prior_exact_and_repr_shows_its_options():
    head = LogitAdjustedLinear(4, [50, 5, 1], class_weight=torch.rand(3), bias=False, label_smoothing=0.1)
    cast = copy.deepcopy(head).bfloat16()
    assert cast.weight.dtype == torch.bfloat16
    assert cast.log_prior.dtype == cast.class_weight.dtype == torch.float32
    assert_close(cast.log_prior, head.log_prior, rtol=0, atol=0)
    assert "in_features=4, bias=False, n_classes=3, tau=1.0, reduction='mean', label_smoothing=0.1" in repr(head)
    loss = cast(torch.randn(2, 4).bfloat16(), torch.tensor([0, 2]))
    assert loss.dtype == torch.float32


COSINE = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", COSINE.values(), ids=COSINE)
@pytest.mark.parametrize("zeros", ["features", "weight", "both"])
def test_a_cosine_head_of_zeros_has_a_loss_and_gradients(dtype, zeros):
    """F.normalize divides by at least 1e-12, which is 0 in float16, and its inverse is infinite there."""
    head = LogitAdjustedLinear(8, [900, 90, 10], cosine=True, dtype=dtype).to(DEVICE)
    features = torch.randn(2, 8, device=DEVICE).to(dtype)
    with torch.no_grad():
        if zeros != "weight":
            features[0] = 0.0
        if zeros != "features":
            head.weight[1] = 0.0
    features.requires_grad_()
    logits = head(features)
    assert (logits[0] == head.bias).all() or zeros == "weight"
    loss = head(features, torch.tensor([0, 1], device=DEVICE))
    loss.backward()
    assert loss.isfinite()
    for leaf in (features, head.weight, head.bias):
        assert leaf.grad.isfinite().all()
        assert leaf.grad.abs().max() < 1e3
    assert head.predict(features).tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize("size", [1e-13, 1e-20, 1e-23, 1e-38])
def test_a_cosine_head_of_tiny_vectors_has_finite_gradients(size):
    """The squares inside a norm underflow before the norm does."""
    head = LogitAdjustedLinear(8, [900, 90, 10], cosine=True).to(DEVICE)
    features = torch.full((3, 8), size, device=DEVICE)
    features[2] = 1.0
    features.requires_grad_()
    with torch.no_grad():
        head.weight[1] = size
    head(features, torch.tensor([-100, 1, 2], device=DEVICE)).backward()
    assert features.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()
    assert (features.grad[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_cosine_head_under_autocast_has_a_loss_of_zeros(dtype):
    head = LogitAdjustedLinear(8, [900, 90, 10], cosine=True).to(DEVICE)
    features = torch.zeros(1, 8, device=DEVICE, dtype=dtype, requires_grad=True)
    with torch.autocast(DEVICE, dtype=dtype):
        loss = head(features, torch.tensor([0], device=DEVICE))
        assert head(features).isfinite().all()
    loss.backward()
    assert loss.isfinite()
    assert features.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_a_cosine_head_rounds_its_unit_vectors_once(dtype, size):
    """Also for features whose squares underflow or overflow in float16."""
    head = LogitAdjustedLinear(8, [900, 90, 10], cosine=True, scale=16.0, bias=False, dtype=dtype).to(DEVICE)
    features = (torch.randn(50, 8, device=DEVICE) * size).to(dtype)

    def unit(vectors):
        wide = vectors.detach().double()
        return wide / wide.square().sum(-1, keepdim=True).sqrt()

    want = 16.0 * unit(features) @ unit(head.weight).T
    # Each factor is rounded once, and so is the logit: three relative errors of at most half a step.
    bound = 16.0 * 1.6 * torch.finfo(dtype).eps
    assert (head(features).double() - want).abs().max() <= bound


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", ["labels", "several labels", "probabilities"])
@pytest.mark.parametrize("margin", [None, "two offsets", "scale"])
def test_gradients_of_a_head_can_be_batched(small_tiles, impl, kind, reduction, margin):
    """torch.autograd.grad(is_grads_batched=True), which gradcheck and jacobian(vectorize=True) use."""
    if margin == "two offsets" and kind == "probabilities" and impl != "reference":
        pytest.skip("the reference's alone")
    features, weight, bias, log_prior = make_head(4, 5, 9)
    options = make_target(kind, 4, 9)
    if margin is None:
        loss = linear_logit_adjusted_cross_entropy(
            features, weight, log_prior=log_prior, bias=bias, reduction=reduction, impl=impl, **options
        )
        leaves = [features, weight, bias, log_prior]
    else:
        prior = log_prior.detach()
        chosen = margins.adaptive(prior) if margin == "two offsets" else margins.vector_scaling(prior, 0.3, 1.0)
        loss = linear_margin_cross_entropy(
            features, weight, margin=chosen, bias=bias, reduction=reduction, impl=impl, **options
        )
        leaves = [features, weight, bias]
    upstream = torch.randn(3, *loss.shape, dtype=torch.float64, device=DEVICE)
    batched = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for i, one_upstream in enumerate(upstream):
        for got, want in zip(batched, torch.autograd.grad(loss, leaves, one_upstream, retain_graph=True), strict=True):
            assert_close(got[i], want, **EXACT)


def test_second_derivatives_of_a_head_under_autocast():
    """Features in half precision and a weight in float32: autograd runs outside of autocast."""
    features = torch.randn(3, 4, device=DEVICE).bfloat16().requires_grad_()
    weight, log_prior = torch.randn(5, 4, device=DEVICE, requires_grad=True), torch.zeros(5, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = linear_logit_adjusted_cross_entropy(
            features, weight, torch.tensor([0, 4, 2], device=DEVICE), log_prior, impl="auto"
        )
    of_features, of_weight = torch.autograd.grad(loss, (features, weight), create_graph=True)
    (of_weight.square().sum() + of_features.float().square().sum()).backward()
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(in_features=0), ValueError, "in_features must be at least 1, got 0"),
        (dict(in_features=2.5), TypeError, "in_features must be an int, got float"),
        (dict(class_counts=[3, 0]), ValueError, "class_counts must have examples of every class"),
        (dict(scale=0.0), ValueError, "scale must be positive and finite, got 0.0"),
        (dict(class_weight=torch.ones(3)), ValueError, r"class_weight must have shape \(2,\), got \(3,\)"),
    ],
)
def test_the_module_refuses_what_it_cannot_use(change, error, message):
    with pytest.raises(error, match=message):
        LogitAdjustedLinear(**(dict(in_features=4, class_counts=[3, 1]) | change))


def test_the_losses_of_heads_are_public():
    for name in ("linear_logit_adjusted_cross_entropy", "linear_margin_cross_entropy", "LogitAdjustedLinear"):
        assert name in fused_la.__all__
