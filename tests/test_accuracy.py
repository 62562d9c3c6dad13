"""Accuracy of the loss and gradients of every implementation against the oracle, in every numerical regime.

Each test varies one thing from a common case: a full product of shapes, layouts, dtypes, priors and targets would be
thousands of cases that fail together. The regimes are those in which kernels of this kind have gone wrong: class counts
at the edges of a tile (1, 3, one below, at and above), padded and misaligned rows, offsets as large as real log priors
(-5 to -12), classes at -inf, rows whose label has a probability near 1, rows whose logits are huge or all far below 0.

A tolerance is twice the error of eager float32 cross entropy on the same input, plus two ulps. In confident rows eager
loses all digits, so there the tolerance follows from the rounding of z itself.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, one_in, slow
from oracle import Truth, truth
from torch import Tensor

from fused_la import log_prior_from_counts, logit_adjusted_cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Class counts at which the kernels read a row in a different way: one vector of 16 bytes (`vec` classes), the shortest
# rows that are read in whole vectors, and one tile.
EDGES = {
    dtype: sorted({1, 2, 3, 8142, *(n + k for n in (vec, 32 * vec, 128 * vec) for k in (-1, 0, 1))})
    for dtype, vec in ((torch.float32, 4), (torch.bfloat16, 8))
}
EDGE_CASES = [(dtype, n_classes) for dtype in EDGES for n_classes in EDGES[dtype]]


def long_tail(n_classes: int) -> Tensor:
    """The log prior of counts that fall from 1000 to 2 by a power law, as iNaturalist's do: about -5 to -12."""
    ranks = torch.arange(1, n_classes + 1, dtype=torch.float64)
    return log_prior_from_counts((1000 * ranks**-0.7).clamp_min(2).round()).to(DEVICE)


def measure(impl: str, logits: Tensor, target: Tensor, log_prior: Tensor, tau: float = 1.0, **options) -> Truth:
    """Loss and both gradients of one call, in the form of the oracle; with learned=False the prior is a constant.

    Only with a constant prior may the kernels compute the gradient of the logits in the forward pass. A wide prior is
    always constant in the interpreter, because its gradient would take longer than everything else there.
    """
    grad_loss = options.pop("grad_loss", None)
    learned = options.pop("learned", True) and not (impl == "triton" and DEVICE == "cpu" and len(log_prior) > 600)
    x = logits.detach().requires_grad_()
    prior = log_prior.detach().requires_grad_(learned)
    loss = logit_adjusted_cross_entropy(x, target, prior, tau, impl=impl, **options)
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    upstream = torch.ones_like(loss) if grad_loss is None else torch.as_tensor(grad_loss, device=loss.device).to(loss)
    grads = torch.autograd.grad(loss, (x, prior) if learned else x, upstream)
    assert grads[0].dtype == logits.dtype
    assert grads[0].shape == logits.shape
    values = [value.detach().cpu().double() for value in (loss, *grads)]
    return Truth(*values, *([] if learned else [torch.empty(0)]))


def eager(logits: Tensor, target: Tensor, log_prior: Tensor, tau: float = 1.0, **options) -> Truth:
    """The loss in plain PyTorch, in float32 (float64 for float64 logits): the baseline of every tolerance."""
    grad_loss = options.pop("grad_loss", 1.0)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    x = logits.detach().requires_grad_()
    prior = log_prior.detach().requires_grad_()
    offset = tau * prior.to(dtype)
    loss = F.cross_entropy(x.to(dtype) + offset.view(-1, *[1] * (logits.dim() - 2)), target, **options)
    grads = torch.autograd.grad(
        loss, (x, prior), torch.as_tensor(grad_loss, device=loss.device).to(loss).expand_as(loss)
    )
    return Truth(*(t.detach().cpu().double() for t in (loss, *grads)))


def assert_as_accurate(actual: Truth, exact: Truth, baseline: Truth, dtype: torch.dtype) -> None:
    """The loss and each gradient are within twice the baseline's error plus two ulps of their largest element."""
    eps_loss = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for name, eps in (
        ("loss", eps_loss),
        ("grad_logits", torch.finfo(dtype).eps),
        ("grad_log_prior", eps_loss),
    ):
        a, e, b = getattr(actual, name), getattr(exact, name), getattr(baseline, name)
        if name == "grad_log_prior" and a.shape == (0,):  # a constant
            continue
        assert a.shape == e.shape, name
        assert torch.equal(a.isnan(), e.isnan()), name
        finite = e.isfinite()
        assert torch.equal(a[~finite & ~e.isnan()], e[~finite & ~e.isnan()]), name
        if not finite.any():
            continue
        scale = e[finite].abs().max()
        baseline_error = (b - e)[finite].abs().nan_to_num(0.0, 0.0, 0.0).max()
        assert (a - e)[finite].abs().max() <= 2 * baseline_error + 2 * eps * scale, name


def check(impl: str, logits: Tensor, target: Tensor, log_prior: Tensor, tau: float = 1.0, **options) -> None:
    """Compare with the oracle; the baseline is eager if eager takes the same arguments.

    The prior is learned with reduction "none", and constant with upstream gradients of 1 and of another value.
    """
    for reduction, grad_loss in (("none", torch.randn(_rows_of(logits))), ("mean", 1.0), ("sum", torch.randn(()))):
        given = {"reduction": reduction, "grad_loss": grad_loss, **options}
        exact = truth(logits, target, log_prior, tau, **given)
        actual = measure(impl, logits, target, log_prior, tau, learned=reduction == "none", **given)
        if options.keys() & {"target_weight", "smoothing_distribution"}:
            # Eager lacks these options. The reference replaces it; all other cases compare the reference with eager.
            baseline = measure("reference", logits, target, log_prior, tau, **given)
        else:
            baseline = eager(logits, target, log_prior, tau, **given)
        assert_as_accurate(actual, exact, baseline, logits.dtype)


def _rows_of(logits: Tensor) -> tuple[int, ...]:
    dim = 0 if logits.dim() == 1 else 1
    return tuple(logits.shape[:dim] + logits.shape[dim + 1 :])


def labels_for(logits: Tensor) -> Tensor:
    """Random labels of the rows of some logits, including the first and the last class."""
    dim = 0 if logits.dim() == 1 else 1
    target = torch.randint(logits.shape[dim], _rows_of(logits))
    flat = target.view(-1)
    if flat.numel() > 1:
        flat[0], flat[-1] = 0, logits.shape[dim] - 1
    return target.to(DEVICE)


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(DEVICE, dtype)


# Shapes, layouts, dtypes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "n_classes"), [case if i % 2 else slow(*case) for i, case in enumerate(EDGE_CASES)], ids=str
)
def test_class_counts_at_the_edges_of_a_tile(impl, n_classes, dtype):
    logits = randn(3 if n_classes < 8142 else 2, n_classes, dtype=dtype)
    check(impl, logits, labels_for(logits), long_tail(n_classes))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("n_classes", [3, 33, 100])
def test_a_learned_prior_in_a_mean_and_a_sum(impl, n_classes, reduction):
    """The kernel that sums over rows has tiles of 32 rows by 32 classes, so these shapes need more than one."""
    logits = randn(37, n_classes)
    given = {"reduction": reduction, "grad_loss": -0.7, "weight": torch.rand(n_classes, device=DEVICE)}
    arguments = logits, labels_for(logits), long_tail(n_classes)
    actual = measure(impl, *arguments, **given)
    assert actual.grad_log_prior.shape == (n_classes,)
    assert_as_accurate(actual, truth(*arguments, **given), eager(*arguments, **given), torch.float32)


@pytest.mark.parametrize(("tau", "dtype"), one_in(3, [1.0, 0.3, 3.0], DTYPES), ids=str)
def test_dtypes_and_tau(impl, dtype, tau):
    logits = randn(5, 100, dtype=dtype)
    check(impl, logits, labels_for(logits), long_tail(100), tau)


@pytest.mark.parametrize("n_rows", [1, 2, 7, 33])
def test_row_counts(impl, n_rows):
    logits = randn(n_rows, 50)
    check(impl, logits, labels_for(logits), long_tail(50))


def test_no_rows(impl):
    logits, target, prior = randn(0, 5), torch.empty(0, dtype=torch.int64, device=DEVICE), long_tail(5)
    assert measure(impl, logits, target, prior, reduction="none").loss.shape == (0,)
    assert measure(impl, logits, target, prior, reduction="sum").loss == 0
    assert measure(impl, logits, target, prior, reduction="mean").loss.isnan()


LAYOUTS = {
    "padded rows": lambda: randn(4, 120)[:, :101],
    "misaligned": lambda: randn(4 * 100 + 1).view(-1)[1:].view(4, 100),
    "every third row": lambda: randn(12, 100)[::3],
    "every other class": lambda: randn(4, 200)[:, ::2],
    "classes outermost": lambda: randn(100, 4).t(),
    "one row repeated": lambda: randn(1, 100).expand(4, 100),
    "a single row": lambda: randn(100),
    "images": lambda: randn(2, 40, 3, 5),
    "images, channels last": lambda: randn(2, 40, 3, 5).to(memory_format=torch.channels_last),
    "images, transposed": lambda: randn(2, 40, 5, 3).transpose(2, 3),
    "sequences": lambda: randn(3, 40, 7),
    "no pixels": lambda: randn(2, 40, 0),
    "volumes": lambda: randn(2, 6, 2, 3, 2),
    "many pixels": lambda: randn(1, 3, 70, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(impl, layout):
    logits = LAYOUTS[layout]()
    n_classes = logits.shape[0 if logits.dim() == 1 else 1]
    before = logits.clone()
    check(impl, logits, labels_for(logits), long_tail(n_classes))
    assert torch.equal(logits, before)  # never written


def test_a_row_wider_than_a_block_of_classes(monkeypatch):
    """Such a row is processed in chunks of classes; the top class, the label and -inf classes may lie in any chunk."""
    monkeypatch.setattr("fused_la._tiled.blocks.BLOCK_ELEMENTS", 16)
    logits = randn(6, 100)
    logits[0, :40] = -math.inf  # whole chunks whose classes are all excluded
    logits[1, 99] = 50.0
    logits[2, 0] = 50.0
    target = labels_for(logits)
    prior = long_tail(100)
    prior[50:70] = -math.inf
    target = torch.where((target >= 50) & (target < 70), 99, target)
    check("blocked", logits, target, prior)
    check("blocked", logits, target, prior, label_smoothing=0.1, smoothing_distribution=prior.softmax(0))
    probabilities = torch.softmax(randn(6, 100), 1)
    probabilities[:, 50:70] = 0.0
    probabilities[0, :40] = 0.0
    check_dense_with_holes("blocked", logits, probabilities, prior)


# Targets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weighted", "smoothing", "dtype"),
    one_in(3, [False, True], [0.0, 0.1, 1.0], [torch.float32, torch.bfloat16, torch.float64]),
    ids=str,
)
def test_labels_with_smoothing_and_class_weights(impl, dtype, smoothing, weighted):
    logits = randn(6, 37, dtype=dtype)
    target = labels_for(logits)
    target[2] = -100
    weight = torch.rand(37, device=DEVICE) if weighted else None
    options = {"label_smoothing": smoothing} | ({"weight": weight.to(_wide(dtype))} if weighted else {})
    check(impl, logits, target, long_tail(37), **options)


@pytest.mark.parametrize(
    ("weighted", "smoothing", "dtype"),
    one_in(3, [False, True], [0.0, 0.1], [torch.float32, torch.bfloat16, torch.float64]),
    ids=str,
)
def test_class_probabilities(impl, dtype, smoothing, weighted):
    logits = randn(4, 37, dtype=dtype)
    target = torch.softmax(randn(4, 37), 1).to(_wide(dtype))
    options = {"label_smoothing": smoothing} | (
        {"weight": torch.rand(37, device=DEVICE).to(_wide(dtype))} if weighted else {}
    )
    check(impl, logits, target, long_tail(37), **options)


def test_class_probabilities_of_images(impl):
    logits = randn(2, 9, 3, 4)
    target = torch.softmax(randn(2, 3, 4, 9), -1).movedim(-1, 1)  # other strides than the logits
    check(impl, logits, target, long_tail(9), weight=torch.rand(9, device=DEVICE), label_smoothing=0.2)


@pytest.mark.parametrize(("weighted", "smoothing", "n_labels"), one_in(3, [False, True], [0.0, 0.1], [1, 2, 5]))
def test_weighted_labels(impl, n_labels, smoothing, weighted):
    logits = randn(6, 23)
    target = torch.randint(23, (6, n_labels), device=DEVICE)
    target[0] = target[0, 0]  # one class several times
    target[1, -1] = -100
    target[2] = -100
    options = {"weight": torch.rand(23, device=DEVICE)} if weighted else {}
    target_weight = torch.rand(6, n_labels, device=DEVICE)
    check(impl, logits, target, long_tail(23), target_weight=target_weight, label_smoothing=smoothing, **options)


def test_weighted_labels_of_images(impl):
    logits = randn(2, 11, 3, 4)
    target = torch.randint(11, (2, 2, 3, 4), device=DEVICE)
    target_weight = torch.rand(2, 2, 3, 4, device=DEVICE)
    check(impl, logits, target, long_tail(11), target_weight=target_weight)


@pytest.mark.parametrize("weighted", [False, True])
def test_smoothing_toward_the_prior(impl, weighted):
    logits = randn(5, 41)
    prior = long_tail(41)
    options = {"weight": torch.rand(41, device=DEVICE)} if weighted else {}
    options |= {"label_smoothing": 0.2, "smoothing_distribution": prior.exp()}
    check(impl, logits, labels_for(logits), prior, **options)
    check(impl, logits, torch.softmax(randn(5, 41), 1), prior, **options)


# Excluded classes ----------------------------------------------------------------------------------------------------


def check_dense_with_holes(impl: str, logits: Tensor, probabilities: Tensor, prior: Tensor) -> None:
    """Check probabilities that are 0 on excluded classes. The baseline is the reference: eager multiplies 0 by inf."""
    for reduction in ("none", "mean", "sum"):
        exact = truth(logits, probabilities, prior, reduction=reduction)
        actual = measure(impl, logits, probabilities, prior, reduction=reduction)
        baseline = measure("reference", logits, probabilities, prior, reduction=reduction)
        assert exact.grad_logits.isfinite().all()
        assert_as_accurate(actual, exact, baseline, logits.dtype)


def test_a_class_at_minus_infinity_stays_out_whatever_its_logit(impl):
    logits = randn(5, 30)
    logits[0, 3], logits[1, 3], logits[2, 3], logits[3, 3] = math.inf, math.nan, -math.inf, 1e30
    prior = long_tail(30)
    prior[3] = prior[20] = -math.inf
    target = torch.tensor([0, 1, 2, 4, 29], device=DEVICE)
    exact = truth(logits, target, prior, reduction="none")
    actual = measure(impl, logits, target, prior, reduction="none")
    assert_as_accurate(actual, exact, exact, logits.dtype)
    assert actual.loss.isfinite().all()
    assert (actual.grad_logits[:, [3, 20]] == 0).all()
    assert (actual.grad_log_prior[[3, 20]] == 0).all()


def test_a_label_at_minus_infinity_has_infinite_loss_and_finite_gradients(impl):
    logits, prior = randn(3, 10), long_tail(10)
    prior[4] = -math.inf
    target = torch.tensor([4, 1, 4], device=DEVICE)
    actual = measure(impl, logits, target, prior, reduction="none")
    assert actual.loss.isinf().tolist() == [True, False, True]
    exact = truth(logits, target, prior, reduction="none")
    assert_as_accurate(actual, exact, exact, logits.dtype)
    assert actual.grad_logits.isfinite().all()
    assert (actual.grad_logits[:, 4] == 0).all()


def test_smoothing_toward_a_prior_with_empty_classes_is_finite(impl):
    logits, prior = randn(3, 10), long_tail(10)
    prior[4] = -math.inf
    target = torch.tensor([0, 1, 9], device=DEVICE)
    check(impl, logits, target, prior, label_smoothing=0.1, smoothing_distribution=prior.softmax(0))
    loss = logit_adjusted_cross_entropy(
        logits, target, prior, label_smoothing=0.1, smoothing_distribution=prior.softmax(0), impl=impl
    )
    assert loss.isfinite()


def test_probabilities_that_avoid_empty_classes_are_finite(impl):
    logits, prior = randn(3, 10), long_tail(10)
    prior[4] = -math.inf
    probabilities = torch.softmax(randn(3, 10), 1)
    probabilities[:, 4] = 0.0
    check_dense_with_holes(impl, logits, probabilities, prior)


@pytest.mark.parametrize("first", [0, 512, 1024])
def test_a_whole_tile_of_minus_infinity(impl, first):
    """Masked logits: a running maximum that sees -inf first, or nothing else, must not make NaN."""
    logits = randn(2, 1540)
    logits[0, first : first + 512] = -math.inf
    target = torch.tensor([1539, 3], device=DEVICE)
    check(impl, logits, target, long_tail(1540))


def test_a_row_without_any_class_is_nan(impl):
    logits = randn(2, 5)
    logits[0] = -math.inf
    target = torch.tensor([1, 2], device=DEVICE)
    actual = measure(impl, logits, target, long_tail(5), reduction="none")
    assert actual.loss.isnan().tolist() == [True, False]
    assert actual.grad_logits[1].isfinite().all()


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("column", [0, 7, 1100])
def test_an_infinite_or_nan_logit_makes_its_row_nan(impl, value, column):
    logits = randn(3, 1200)
    logits[1, column] = value
    target = torch.tensor([5, 7, 0], device=DEVICE)
    actual = measure(impl, logits, target, long_tail(1200), reduction="none")
    assert actual.loss.isnan().tolist() == [False, True, False]
    assert actual.grad_logits[1].isnan().any()
    assert actual.grad_logits[[0, 2]].isfinite().all()
    total = measure(impl, logits, target, long_tail(1200), reduction="sum", learned=False)
    assert total.loss.isnan()
    assert total.grad_logits[1].isnan().any()
    assert total.grad_logits[[0, 2]].isfinite().all()


@pytest.mark.parametrize("content", [math.nan, math.inf, -math.inf])
def test_an_ignored_row_is_zero_whatever_its_logits(impl, content):
    logits = randn(4, 12)
    logits[1] = content
    target = torch.tensor([3, -100, 0, 11], device=DEVICE)
    for options in ({}, {"label_smoothing": 0.1}, {"weight": torch.rand(12, device=DEVICE)}):
        actual = measure(impl, logits, target, long_tail(12), reduction="none", **options)
        assert actual.loss[1] == 0
        assert (actual.grad_logits[1] == 0).all()
        assert actual.grad_log_prior.isfinite().all()
        mean = measure(impl, logits, target, long_tail(12), reduction="mean", **options)
        assert mean.loss.isfinite()
        assert (mean.grad_logits[1] == 0).all()


def test_all_rows_ignored(impl):
    logits, target = randn(3, 6), torch.full((3,), -100, device=DEVICE)
    for reduction, expected in (("mean", math.nan), ("sum", 0.0)):
        actual = measure(impl, logits, target, long_tail(6), reduction=reduction)
        assert actual.loss.isnan() if math.isnan(expected) else actual.loss == 0
        assert (actual.grad_logits == 0).all()


# Magnitudes -----------------------------------------------------------------------------------------------------------


def z_bound(logits: Tensor, prior: Tensor) -> Tensor:
    """The relative error of exp(z_c - z_y), in eps, from rounding z and the exponent to float32; (N, 1)."""
    z = (logits.double() + prior.double()).masked_fill(prior == -math.inf, 0.0)
    return 16 + 4 * z.abs().amax(1, keepdim=True).cpu()


@pytest.mark.parametrize(
    ("n_classes", "dtype"), one_in(2, [3, 500], [torch.float32, torch.float64, torch.bfloat16]), ids=str
)
def test_labels_far_below_other_classes_among_rows_that_are_not(impl, n_classes, dtype):
    """exp(z_c - z_y) fits float32 in some rows, overflows it in others, and overflows even float64 in one."""
    behind = torch.tensor([0.0, 20.0, 43.0, 46.0, 60.0, 87.0, 90.0, 800.0, 3.0], dtype=torch.float64)
    logits, target, prior = randn(9, n_classes, dtype=torch.float64), torch.arange(9) % n_classes, long_tail(n_classes)
    target = target.to(DEVICE)
    at = target[:, None]
    top = (logits + prior.double()).scatter(1, at, -math.inf).amax(1, keepdim=True)
    logits = logits.scatter(1, at, top - prior.double()[at] - behind.to(DEVICE)[:, None]).to(dtype)
    check(impl, logits, target, prior)
    exact = truth(logits, target, prior, reduction="sum")
    actual = measure(impl, logits, target, prior, reduction="sum", learned=False)
    bound = (z_bound(logits, prior) * torch.finfo(torch.float32).eps + 2 * torch.finfo(dtype).eps).clamp_max(0.05)
    normal = exact.grad_logits.abs() > 1e-37
    assert ((actual.grad_logits - exact.grad_logits).abs() <= bound * exact.grad_logits.abs())[normal].all()


@pytest.mark.parametrize(("n_classes", "lead"), one_in(3, [3, 500, 8142], [5.0, 12.0, 20.0, 40.0, 80.0]))
def test_a_confident_row_keeps_its_digits(impl, n_classes, lead):
    """p_y -> 1: loss log1p(others), gradient -others / d, d = 1 + others, others the sum over the other classes.

    Eager float32 gives 0 for both at a lead of 17.
    """
    logits = randn(4, n_classes, scale=1.0)
    target = torch.tensor([0, n_classes - 1, n_classes // 2, 1], device=DEVICE)
    prior = long_tail(n_classes)
    logits.scatter_add_(1, target[:, None], (lead + math.log(n_classes) - prior[target])[:, None])
    exact = truth(logits, target, prior, reduction="none")
    actual = measure(impl, logits, target, prior, reduction="none")
    eps = torch.finfo(torch.float32).eps * z_bound(logits, prior)
    assert exact.loss.max() < 2 * math.exp(-lead + 4)
    assert ((actual.loss - exact.loss).abs() <= eps[:, 0] * exact.loss).all()
    normal = exact.grad_logits.abs() > 1e-37  # below this, float32 is subnormal and has fewer digits
    assert ((actual.grad_logits - exact.grad_logits).abs() <= eps * exact.grad_logits.abs())[normal].all()
    assert normal[torch.arange(4), target.cpu()].all() or lead > 60


def test_a_confident_row_keeps_its_digits_in_a_gradient_that_is_differentiated_again(impl):
    """With create_graph the gradient is the reference's closed form."""
    logits, target, prior = randn(4, 300, scale=1.0), torch.tensor([0, 299, 150, 1], device=DEVICE), long_tail(300)
    logits.scatter_add_(1, target[:, None], (25 - prior[target])[:, None])
    exact = truth(logits, target, prior, reduction="none")
    x = logits.detach().requires_grad_()
    loss = logit_adjusted_cross_entropy(x, target, prior, reduction="none", impl=impl)
    (gradient,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    eps = torch.finfo(torch.float32).eps * z_bound(logits, prior)
    at_label = torch.arange(4), target.cpu()
    error = (gradient.detach().cpu().double() - exact.grad_logits).abs()
    assert (error <= eps * exact.grad_logits.abs())[at_label].all()


@pytest.mark.parametrize("form", ["two equal labels", "label and nothing", "one-hot probabilities"])
def test_a_confident_row_keeps_its_digits_for_every_kind_of_target(impl, form):
    logits = randn(4, 300, scale=1.0)
    label = torch.tensor([0, 299, 150, 1], device=DEVICE)
    prior = long_tail(300)
    logits.scatter_add_(1, label[:, None], (25 - prior[label])[:, None])
    options = {}
    if form == "one-hot probabilities":
        target = F.one_hot(label, 300).float()
    else:
        other = label if form == "two equal labels" else (label + 7) % 300
        target = torch.stack([label, other], 1)
        shares = [0.25, 0.75] if form == "two equal labels" else [1.0, 0.0]
        options["target_weight"] = torch.tensor([shares] * 4, device=DEVICE)
    exact = truth(logits, target, prior, reduction="none", **options)
    actual = measure(impl, logits, target, prior, reduction="none", **options)
    eps = torch.finfo(torch.float32).eps * z_bound(logits, prior)
    assert ((actual.loss - exact.loss).abs() <= eps[:, 0] * exact.loss).all()
    at_label = torch.arange(4), label.cpu()
    assert ((actual.grad_logits - exact.grad_logits).abs() <= eps * exact.grad_logits.abs())[at_label].all()


@pytest.mark.parametrize("shift", [-3e4, -1e4, 1e4, 3e4])
def test_rows_far_from_zero(impl, shift):
    """Far below 0, a running maximum that starts at 0 underflows. Far above, a rounded logsumexp loses the log."""
    logits = randn(4, 200) + shift
    check(impl, logits, labels_for(logits), long_tail(200))


def test_logits_masked_with_the_lowest_float(impl):
    logits = randn(3, 60)
    logits[0, 10:] = torch.finfo(torch.float32).min
    logits[1] = torch.finfo(torch.float32).min  # all equal: uniform probabilities
    target = torch.tensor([3, 8, 59], device=DEVICE)
    prior = torch.zeros(60, device=DEVICE)
    exact = truth(logits, target, prior, reduction="none")
    actual = measure(impl, logits, target, prior, reduction="none")
    assert_as_accurate(actual, exact, eager(logits, target, prior, reduction="none"), torch.float32)


def test_equal_logits_share_the_top(impl):
    logits = torch.zeros(3, 50, device=DEVICE)
    logits[1, 10:20] = 30.0
    logits[2, [5, 45]] = 30.0
    target = torch.tensor([7, 12, 45], device=DEVICE)
    check(impl, logits, target, torch.zeros(50, device=DEVICE))


def test_the_offset_is_added_in_float32_to_bfloat16_logits(impl):
    """At |z| = 8 to 16 a bfloat16 step is 0.0625: an offset added in bfloat16 moves every probability by percents."""
    logits = (randn(8, 100) + 10).bfloat16()
    target, prior = labels_for(logits), long_tail(100)
    exact = truth(logits, target, prior, reduction="none")
    actual = measure(impl, logits, target, prior, reduction="none")
    rounded = F.cross_entropy(logits + prior.bfloat16(), target, reduction="none").cpu().double()
    assert (rounded - exact.loss).abs().max() > 1e-3
    assert (actual.loss - exact.loss).abs().max() < 1e-5


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
