"""Accuracy jobs of `benchmarks.on_gpu`: every dtype and option on small inputs against extended precision.

A job is an option in a dtype, and makes a few calls of public functions. The loss and all gradients of each call are
compared with the tests' oracle, the paper's formula in extended precision. The limit of an error is that of the tests:
twice the baseline's error on the same input and dtype, plus two units in the last place of the largest element. The
baseline is `F.cross_entropy` in float32 (float64) if it takes the arguments, else the package's reference formula.

The implementation is "triton", on a CPU in Triton's interpreter (TRITON_INTERPRET=1) and on smaller shapes.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_la import (
    LogitAdjustedCrossEntropyLoss,
    PairwiseMargin,
    linear_logit_adjusted_cross_entropy,
    linear_margin_cross_entropy,
    log_prior_from_counts,
    logit_adjusted_cross_entropy,
    margin_cross_entropy,
    margins,
)
from fused_la.posthoc import TauSweep, adjust_logits

Record = dict[str, Any]
ORACLE = Path(__file__).parents[1] / "tests" / "oracle.py"
DTYPES = ("bfloat16", "float32", "float16", "float64")  # the most valuable first


class Trial(NamedTuple):
    """One call, its exact results, and a baseline."""

    what: str
    actual: Callable[[], Sequence[Tensor]]  # the loss, then gradients
    exact: Sequence[Tensor]  # float64, on the CPU
    baseline: Callable[[], Sequence[Tensor]]
    eps: Sequence[float]  # a unit in the last place of 1, for the loss and each gradient
    by_norm: bool = False  # compare norms, not largest elements: for gradients that are sums of products
    slack: float = 0.0  # relative error of the loss that is allowed in addition


# Judging --------------------------------------------------------------------------------------------------------------


def judge(trial: Trial) -> tuple[float, str]:
    """The largest error as a fraction of its limit, and what is wrong ("" if nothing is)."""
    actual, baseline = ([part.detach().cpu().double() for part in parts()] for parts in (trial.actual, trial.baseline))
    if not len(actual) == len(baseline) == len(trial.exact) == len(trial.eps):
        return math.inf, f"{trial.what}: {len(actual)} results, not {len(trial.exact)}"
    worst, wrong = 0.0, []
    for i, (got, want, base, eps) in enumerate(zip(actual, trial.exact, baseline, trial.eps, strict=True)):
        name = f"{trial.what}: " + ("loss" if i == 0 else f"gradient {i}")
        if got.shape != want.shape:
            wrong.append(f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
            continue
        finite = want.isfinite()
        same = torch.equal(got.isnan(), want.isnan()) and torch.equal(got[want.isinf()], want[want.isinf()])
        if not same or not got[finite].isfinite().all():
            wrong.append(f"{name} is NaN or infinite where it should not be, or not where it should be")
            continue
        if not finite.any():
            continue
        norm = torch.linalg.vector_norm if trial.by_norm else (lambda part: part.abs().max())
        error, scale = norm((got - want)[finite]), norm(want[finite])
        baseline_error = norm((base - want)[finite].nan_to_num(0.0, 0.0, 0.0))
        limit = 2 * baseline_error + (2 * eps + (trial.slack if i == 0 else 0.0)) * scale
        ratio = 0.0 if error == 0 else float(error / limit)
        worst = max(worst, ratio)
        if not ratio <= 1:
            wrong.append(f"{name} is off by {float(error):.2g}, {float(limit):.2g} is allowed")
    return math.inf if wrong and worst <= 1 else worst, "; ".join(wrong)


def oracle() -> ModuleType:
    """The module tests/oracle.py."""
    spec = importlib.util.spec_from_file_location("oracle", ORACLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Inputs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Random tensors in one dtype on one device, the same on every device."""

    dtype: torch.dtype
    device: str
    small: bool  # small shapes, for the interpreter

    @cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)

    @cached_property
    def truth(self) -> Callable[..., Any]:
        return oracle().truth

    @property
    def wide(self) -> torch.dtype:
        """The dtype in which the loss is computed."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def shape(self, *shape: int, small: tuple[int, ...]) -> tuple[int, ...]:
        return small if self.small else shape

    def randn(self, *shape: int, scale: float = 3.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return values.to(self.device, dtype or self.dtype)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self.device, self.wide)

    def labels(self, n_classes: int, *shape: int) -> Tensor:
        """Random labels, with the first and the last class among them."""
        labels = torch.randint(n_classes, shape, generator=self.generator)
        if labels.numel() > 1:
            labels.view(-1)[0], labels.view(-1)[-1] = 0, n_classes - 1
        return labels.to(self.device)

    def probabilities(self, n_rows: int, n_classes: int) -> Tensor:
        return self.randn(n_rows, n_classes, dtype=self.wide).softmax(1)

    def log_prior(self, n_classes: int) -> Tensor:
        """The log prior of counts that fall from 1000 to 2."""
        ranks = torch.arange(1, n_classes + 1, dtype=torch.float64)
        return log_prior_from_counts((1000 * ranks**-0.7).clamp_min(2).round()).to(self.device)

    def upstream(self, loss_shape: tuple[int, ...]) -> Tensor:
        return self.randn(*loss_shape, scale=1.0, dtype=torch.float64)


def gradients_of(loss: Tensor, leaves: Sequence[Tensor], upstream: Tensor | float) -> tuple[Tensor, ...]:
    given = torch.as_tensor(upstream, device=loss.device).to(loss.dtype).expand_as(loss)
    return (loss, *torch.autograd.grad(loss, leaves, given))


def leaf(tensor: Tensor, requires_grad: bool = True) -> Tensor:
    return tensor.detach().requires_grad_(requires_grad)


def row_shape(logits: Tensor) -> tuple[int, ...]:
    return tuple(logits.shape[:1] + logits.shape[2:])


# Trials of logits, margins and heads ----------------------------------------------------------------------------------


def logits_trial(
    x: Inputs,
    logits: Tensor,
    target: Tensor,
    log_prior: Tensor,
    tau: float = 1.0,
    *,
    reduction: str = "mean",
    upstream: Tensor | float = 1.0,
    learned: bool = False,
    loss: Callable[..., Tensor] = logit_adjusted_cross_entropy,
    **options: Any,
) -> Trial:
    """A trial of `logit_adjusted_cross_entropy`, or of `loss`, a function with the same arguments."""

    def actual(impl: str = "triton", loss: Callable[..., Tensor] = loss) -> Sequence[Tensor]:
        z, prior = leaf(logits), leaf(log_prior, learned)
        value = loss(z, target, prior, tau, reduction=reduction, impl=impl, **options)
        assert value.dtype == x.wide
        return gradients_of(value, (z, prior) if learned else (z,), upstream)

    def eager() -> Sequence[Tensor]:
        z, prior = leaf(logits), leaf(log_prior, learned)
        adjusted = z.to(x.wide) + (tau * prior.to(x.wide)).view(-1, *[1] * (logits.dim() - 2))
        value = F.cross_entropy(adjusted, target, reduction=reduction, **options)
        return gradients_of(value, (z, prior) if learned else (z,), upstream)

    def reference() -> Sequence[Tensor]:
        return actual("reference", logit_adjusted_cross_entropy)

    # Eager cross entropy multiplies 0 by infinity if a class is excluded.
    only_reference = {"target_weight", "smoothing_distribution", "group"}
    has_eager = not (options.keys() & only_reference or log_prior.isinf().any())
    exact = x.truth(logits, target, log_prior, tau, reduction=reduction, grad_loss=upstream, **options)
    eps = torch.finfo(x.wide).eps
    prior_eps = max(eps, torch.finfo(log_prior.dtype).eps)
    return Trial(
        f"{tuple(logits.shape)}, {reduction}{', learned prior' if learned else ''}",
        actual,
        exact if learned else exact[:2],
        eager if has_eager else reference,
        (eps, torch.finfo(x.dtype).eps, prior_eps)[: 3 if learned else 2],
    )


def every_reduction(x: Inputs, logits: Tensor, target: Tensor, log_prior: Tensor, **options: Any) -> Iterator[Trial]:
    """Trials of a mean, as in training; of rows with their own upstream gradients and a learned prior; of a sum."""
    rows = x.upstream(row_shape(logits))
    yield logits_trial(x, logits, target, log_prior, **options)
    yield logits_trial(x, logits, target, log_prior, reduction="none", upstream=rows, learned=True, **options)
    yield logits_trial(x, logits, target, log_prior, reduction="sum", upstream=-1.7, **options)


def margin_rows(
    x: Inputs, logits: Tensor, target: Tensor, margin: PairwiseMargin, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """Exact losses (N,) and gradient (N, C) of a margin on (N, C) logits; the offsets of each row are added first."""
    n_classes = logits.shape[1]

    def vector(value: Tensor | float | None, default: float) -> Tensor:
        given = torch.as_tensor(default if value is None else value, dtype=torch.float64)
        return given.detach().cpu().expand(n_classes)

    alpha, scale = vector(margin.alpha, 1.0), vector(margin.scale, 1.0)
    scale = scale * vector(margin.label_scale, 1.0)[target.cpu()][:, None]  # of each row
    scaled, label = logits.detach().cpu().double() * scale, target.cpu()[:, None]
    z = scaled + vector(margin.negative_offset, 0.0)
    z = z.scatter(1, label, (scaled + vector(margin.target_offset, 0.0)).gather(1, label))
    weight = alpha[target.cpu()]
    exact = x.truth(
        z, target, torch.zeros(n_classes), 0.0, reduction="none", grad_loss=upstream.cpu().double() * weight
    )
    return exact.loss * weight, exact.grad_logits * scale


def margin_trial(x: Inputs, margin: PairwiseMargin, logits: Tensor, target: Tensor, reduction: str) -> Trial:
    n_rows = len(logits)
    rows = x.upstream((n_rows,)) if reduction == "none" else torch.full((n_rows,), 1.0 / n_rows, dtype=torch.float64)

    def loss_of(impl: str) -> Sequence[Tensor]:
        z = leaf(logits)
        value = margin_cross_entropy(z, target, margin, reduction=reduction, impl=impl)
        return gradients_of(value, (z,), rows if reduction == "none" else 1.0)

    loss, gradient = margin_rows(x, logits, target, margin, rows)
    return Trial(
        f"{tuple(logits.shape)}, {reduction}",
        lambda: loss_of("triton"),
        (loss if reduction == "none" else loss.mean(), gradient),
        lambda: loss_of("reference"),
        (torch.finfo(x.wide).eps, torch.finfo(x.dtype).eps),
    )


def head_trial(x: Inputs, n_rows: int, n_features: int, n_classes: int, kind: str, reduction: str) -> Trial:
    """A trial of a head: with one label a row, two, a prior for each group, or a margin with a target_offset."""
    features = x.randn(n_rows, n_features, scale=1.0)
    weight = x.randn(n_classes, n_features, scale=2.0 / math.sqrt(n_features))
    bias, log_prior = x.randn(n_classes, scale=1.0), x.log_prior(n_classes)
    target = x.labels(n_classes, n_rows)
    options: dict[str, Any] = {}
    margin = margins.logit_adjusted_adaptive(log_prior)
    if kind == "two labels":
        target = torch.stack([target, target.flip(0)], 1)
        options = {"target_weight": x.rand(n_rows, 2)}
    if kind == "by group":
        log_prior, options = priors_by_group(x, n_classes), {"group": x.labels(3, n_rows)}
    rows = x.upstream((n_rows,)) if reduction == "none" else torch.full((n_rows,), 1.0 / n_rows, dtype=torch.float64)
    upstream = rows if reduction == "none" else 1.0

    def actual() -> Sequence[Tensor]:
        f, w, b = leaves = [leaf(tensor) for tensor in (features, weight, bias)]
        options_of_call: dict[str, Any] = dict(bias=b, reduction=reduction, impl="triton", **options)
        if kind == "margin":
            value = linear_margin_cross_entropy(f, w, target, margin, **options_of_call)
        else:
            value = linear_logit_adjusted_cross_entropy(f, w, target, log_prior, **options_of_call)
        return gradients_of(value, leaves, upstream)

    def whole() -> Sequence[Tensor]:
        """The baseline: logits of a head, then the reference formula."""
        leaves = [leaf(tensor) for tensor in (features, weight, bias)]
        logits = F.linear(*leaves)
        if kind == "margin":
            value = margin_cross_entropy(logits, target, margin, reduction=reduction, impl="reference")
        else:
            value = logit_adjusted_cross_entropy(
                logits, target, log_prior, reduction=reduction, impl="reference", **options
            )
        return gradients_of(value, leaves, upstream)

    f, w, b = (tensor.cpu().double() for tensor in (features, weight, bias))
    logits = f @ w.T + b
    if kind == "margin":
        loss, gradient = margin_rows(x, logits, target, margin, rows)
    else:
        loss, gradient, _ = x.truth(logits, target, log_prior, reduction="none", grad_loss=rows, **options)
    eps = torch.finfo(x.dtype).eps
    return Trial(
        f"{n_rows} x {n_features} x {n_classes}, {kind}, {reduction}",
        actual,
        (loss if reduction == "none" else loss.mean(), gradient @ w, gradient.T @ f, gradient.sum(0)),
        whole,
        (torch.finfo(x.wide).eps, eps, eps, eps),
        by_norm=True,
        slack=1e-12 if x.dtype == torch.float64 else 1e-5,  # in a mean the baseline's errors may cancel
    )


# Options --------------------------------------------------------------------------------------------------------------


def one_label(x: Inputs) -> Iterator[Trial]:
    logits = x.randn(*x.shape(37, 8142, small=(5, 37)))
    yield from every_reduction(x, logits, x.labels(logits.shape[1], len(logits)), x.log_prior(logits.shape[1]))


def aligned_rows(x: Inputs) -> Iterator[Trial]:
    logits = x.randn(*x.shape(37, 8192, small=(5, 256)))
    yield logits_trial(x, logits, x.labels(logits.shape[1], len(logits)), x.log_prior(logits.shape[1]))


def long_rows(x: Inputs) -> Iterator[Trial]:
    """Rows that are split over several programs."""
    logits = x.randn(*x.shape(3, 200_003, small=(1, 33_003)))
    n_rows, n_classes = logits.shape
    target, log_prior = x.labels(n_classes, n_rows), x.log_prior(n_classes)
    yield logits_trial(x, logits, target, log_prior)
    if not x.small:
        rows = x.upstream((n_rows,))
        yield logits_trial(x, logits, target, log_prior, reduction="none", upstream=rows, learned=True)


def middle_rows(x: Inputs) -> Iterator[Trial]:
    """Rows with more than one partial sum, and enough rows for one program each."""
    logits = x.randn(*x.shape(300, 20_001, small=(2, 1_201)))
    yield logits_trial(x, logits, x.labels(logits.shape[1], len(logits)), x.log_prior(logits.shape[1]))


def short_rows(x: Inputs) -> Iterator[Trial]:
    for shape in ((600, 17), (5, 1), (300, 3), (64, 1000)) if not x.small else ((9, 17), (3, 1)):
        logits = x.randn(*shape)
        yield logits_trial(x, logits, x.labels(shape[1], shape[0]), x.log_prior(shape[1]))


def one_row(x: Inputs) -> Iterator[Trial]:
    (n_classes,) = x.shape(8142, small=(70,))
    logits, log_prior = x.randn(1, n_classes), x.log_prior(n_classes)
    yield logits_trial(x, logits, x.labels(n_classes, 1), log_prior)


def default_inputs(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and log prior of most options; rows do not end on the boundary of a vector."""
    n_rows, n_classes = x.shape(37, 1003, small=(5, 37))
    return x.randn(n_rows, n_classes), x.labels(n_classes, n_rows), x.log_prior(n_classes)


def several_labels(x: Inputs) -> Iterator[Trial]:
    logits, _, log_prior = default_inputs(x)
    n_rows, n_classes = logits.shape
    for n_labels in (2, 5):
        target = x.labels(n_classes, n_rows, n_labels)
        target[0] = target[0, 0]  # one class several times
        target[1, -1], target[2] = -100, -100
        yield from every_reduction(x, logits, target, log_prior, target_weight=x.rand(n_rows, n_labels))


def class_probabilities(x: Inputs) -> Iterator[Trial]:
    logits, _, log_prior = default_inputs(x)
    yield from every_reduction(x, logits, x.probabilities(*logits.shape), log_prior)


def ignored_rows(x: Inputs) -> Iterator[Trial]:
    logits, target, log_prior = default_inputs(x)
    target[::3] = -100
    logits[3] = math.nan
    yield logits_trial(x, logits, target, log_prior)
    yield logits_trial(x, logits[:1], target[:1], log_prior)  # a mean over no rows


def class_weights(x: Inputs) -> Iterator[Trial]:
    logits, target, log_prior = default_inputs(x)
    yield from every_reduction(x, logits, target, log_prior, weight=x.rand(logits.shape[1]))


def label_smoothing(x: Inputs) -> Iterator[Trial]:
    logits, target, log_prior = default_inputs(x)
    yield from every_reduction(x, logits, target, log_prior, label_smoothing=0.1)
    weight = x.rand(logits.shape[1])
    yield logits_trial(x, logits, target, log_prior, label_smoothing=0.1, weight=weight)


def smoothing_distribution(x: Inputs) -> Iterator[Trial]:
    logits, target, log_prior = default_inputs(x)
    options: dict[str, Any] = dict(label_smoothing=0.2, smoothing_distribution=log_prior.exp())
    yield from every_reduction(x, logits, target, log_prior, **options)
    yield logits_trial(x, logits, x.probabilities(*logits.shape), log_prior, **options)


def priors_by_group(x: Inputs, n_classes: int) -> Tensor:
    """Log priors of three groups, (3, C)."""
    log_prior = x.log_prior(n_classes)
    return torch.stack([log_prior, log_prior.flip(0), 0.5 * log_prior])


def groups(x: Inputs) -> Iterator[Trial]:
    logits, target, _ = default_inputs(x)
    n_rows, n_classes = logits.shape
    log_prior, group = priors_by_group(x, n_classes), x.labels(3, n_rows)
    yield from every_reduction(x, logits, target, log_prior, group=group)
    options: dict[str, Any] = dict(label_smoothing=0.2, smoothing_distribution=log_prior.softmax(1), group=group)
    yield logits_trial(x, logits, target, log_prior, **options)
    logits = x.randn(*x.shape(5, 50_003, small=(1, 1_201)))
    n_rows, n_classes = logits.shape
    group = x.labels(3, n_rows)
    yield logits_trial(x, logits, x.labels(n_classes, n_rows), priors_by_group(x, n_classes), group=group)


def classes_without_prior(x: Inputs) -> Iterator[Trial]:
    logits, target, log_prior = default_inputs(x)
    log_prior[5:25] = -math.inf
    target = torch.where((target >= 5) & (target < 25), 2, target)
    logits[0, 6], logits[1, 7] = math.inf, math.nan
    yield logits_trial(x, logits, target, log_prior)
    rows = x.upstream((len(logits),))
    yield logits_trial(x, logits, target, log_prior, reduction="none", upstream=rows, learned=True)


def another_tau(x: Inputs) -> Iterator[Trial]:
    logits, target, log_prior = default_inputs(x)
    for tau in (0.0, 1.7):
        yield logits_trial(x, logits, target, log_prior, tau)


def confident_rows(x: Inputs) -> Iterator[Trial]:
    """Each row is a trial, so that its small loss and gradient are judged by their own size."""
    logits, target, log_prior = default_inputs(x)
    lead = torch.linspace(5, 40, len(logits), device=x.device).to(logits)
    logits = logits.scatter_add(1, target[:, None], lead[:, None] + 10)
    for row in range(0, len(logits), 9 if not x.small else 2):
        yield logits_trial(x, logits[row : row + 1], target[row : row + 1], log_prior)


def learned_prior(x: Inputs) -> Iterator[Trial]:
    logits, target, log_prior = default_inputs(x)
    yield logits_trial(x, logits, target, log_prior, learned=True)
    yield logits_trial(x, logits, target, log_prior, reduction="sum", learned=True, weight=x.rand(logits.shape[1]))


def upstream_gradients(x: Inputs) -> Iterator[Trial]:
    logits, target, log_prior = default_inputs(x)
    for upstream in (0.0, -3.25):
        yield logits_trial(x, logits, target, log_prior, upstream=upstream)


def loss_scale(x: Inputs) -> Iterator[Trial]:
    """Without a loss scale most float16 gradients of so many rows are 0."""
    logits = x.randn(*x.shape(4096, 1003, small=(40, 37)))
    n_rows, n_classes = logits.shape
    yield logits_trial(x, logits, x.labels(n_classes, n_rows), x.log_prior(n_classes), upstream=2.0**12)


def images(x: Inputs) -> Iterator[Trial]:
    shape = x.shape(2, 19, 15, 17, small=(2, 6, 3, 2))
    logits, target, log_prior = x.randn(*shape), x.labels(shape[1], shape[0], *shape[2:]), x.log_prior(shape[1])
    yield from every_reduction(x, logits, target, log_prior)
    yield logits_trial(x, logits.contiguous(memory_format=torch.channels_last), target, log_prior)


def rows_in_memory(x: Inputs) -> Iterator[Trial]:
    """Rows that begin and end anywhere in memory, with foreign columns between them; classes that are not adjacent."""
    n_rows, n_classes = x.shape(37, 1000, small=(5, 40))
    target, log_prior = x.labels(n_classes, n_rows), x.log_prior(n_classes)
    for first, padding in ((1, 0), (3, 4), (0, 24), (8, 17)):
        whole = x.randn(n_rows, first + n_classes + padding)
        yield logits_trial(x, whole[:, first : first + n_classes], target, log_prior)
    yield logits_trial(x, x.randn(n_classes, n_rows).T, target, log_prior)


def preset_trials(
    preset: Callable[[Tensor], PairwiseMargin], scale: float = 3.0
) -> Callable[[Inputs], Iterator[Trial]]:
    def trials(x: Inputs) -> Iterator[Trial]:
        logits, target, log_prior = default_inputs(x)
        logits, margin = x.randn(*logits.shape, scale=scale), preset(log_prior)
        yield margin_trial(x, margin, logits, target, "mean")
        yield margin_trial(x, margin, logits, target, "none")

    return trials


def heads(x: Inputs) -> Iterator[Trial]:
    n, d, c = x.shape(70, 48, 5003, small=(4, 6, 13))
    for kind, reduction in (("one label", "mean"), ("two labels", "none"), ("margin", "mean"), ("by group", "mean")):
        yield head_trial(x, n, d, c, kind, reduction)


def module(x: Inputs) -> Iterator[Trial]:
    logits, target, _ = default_inputs(x)
    counts = torch.arange(logits.shape[1], 0, -1)
    criterion = LogitAdjustedCrossEntropyLoss(counts, tau=1.3).to(x.device)
    log_prior = log_prior_from_counts(counts).to(x.device)

    def loss(logits: Tensor, target: Tensor, *_: Any, **__: Any) -> Tensor:
        return criterion(logits, target)

    yield logits_trial(x, logits, target, log_prior, 1.3, loss=loss)


def compiled(x: Inputs) -> Iterator[Trial]:
    """The loss in a graph of `torch.compile`, between operators that it fuses."""
    logits, target, log_prior = default_inputs(x)

    @torch.compile(fullgraph=True)
    def graph(logits: Tensor, target: Tensor, log_prior: Tensor, tau: float, reduction: str, impl: str) -> Tensor:
        return logit_adjusted_cross_entropy(logits * 1, target, log_prior * 1, tau, reduction=reduction, impl=impl) * 1

    def loss(logits: Tensor, target: Tensor, log_prior: Tensor, tau: float, *, reduction: str, impl: str) -> Tensor:
        return graph(logits, target, log_prior, tau, reduction, impl)

    yield logits_trial(x, logits, target, log_prior, loss=loss)


def post_hoc(x: Inputs) -> Iterator[Trial]:
    """Predictions for many tau, their counts and the metric. Sums of the inputs are exact, so counts must be too."""
    n_rows, n_classes = x.shape(500, 1003, small=(12, 19))
    logits = x.randn(n_rows, n_classes, scale=8.0).clamp(-100, 100).round().div(4)
    log_prior = x.randn(n_classes, scale=8.0, dtype=torch.float32).round().div(8) - 8
    log_prior[3] = -math.inf
    target, taus = x.labels(n_classes, n_rows), (0.0, 0.5, 1.0, 2.0)
    z, prior = logits.double().cpu(), log_prior.double().cpu()
    predictions = [(z - tau * prior.nan_to_num(neginf=0.0)) for tau in taus]
    for tau, scores in zip(taus, predictions, strict=True):
        if tau > 0:
            scores[:, 3] = -math.inf
    right = torch.stack([scores.argmax(1) == target.cpu() for scores in predictions])
    n_correct = torch.zeros(len(taus), n_classes, dtype=torch.float64)
    n_correct.index_add_(1, target.cpu(), right.double())
    n_examples = torch.bincount(target.cpu(), minlength=n_classes).double()

    def sweep() -> Sequence[Tensor]:
        found = TauSweep(log_prior, taus, split="accuracy")
        for rows in torch.arange(n_rows, device=x.device).split(math.ceil(n_rows / 2)):
            found.update(logits[rows], target[rows])
        return found.counts()

    yield Trial("TauSweep", sweep, (n_correct, n_examples), lambda: (n_correct, n_examples), (0.0, 0.0))
    adjusted = predictions[2]
    yield Trial("adjust_logits", lambda: (adjust_logits(logits, log_prior),), (adjusted,), lambda: (adjusted,), (0.0,))

    def metric() -> Sequence[Tensor]:
        from fused_la.metrics import BalancedError

        found = BalancedError([1] * n_classes, n_bootstrap=0).to(x.device)
        found.update(logits, target)
        result = found.compute()
        return result["balanced_error"], result["top1_accuracy"]

    present = n_examples > 0
    rates = (1 - n_correct[0, present] / n_examples[present]).mean(), right[0].double().mean()
    yield Trial("BalancedError", metric, rates, lambda: rates, (torch.finfo(torch.float32).eps,) * 2)


OPTIONS: dict[str, Callable[[Inputs], Iterator[Trial]]] = {  # the most valuable first
    "one label": one_label,
    "long rows": long_rows,
    "rows in memory": rows_in_memory,
    "aligned rows": aligned_rows,
    "short rows": short_rows,
    "one row": one_row,
    "several labels": several_labels,
    "head": heads,
    "class probabilities": class_probabilities,
    "ignored rows": ignored_rows,
    "class weights": class_weights,
    "label smoothing": label_smoothing,
    "classes without prior": classes_without_prior,
    "learned prior": learned_prior,
    "groups": groups,
    "loss scale": loss_scale,
    "upstream gradients": upstream_gradients,
    "vector scaling": preset_trials(lambda prior: margins.vector_scaling(prior, 0.3, 1.2)),
    "ldam": preset_trials(margins.ldam, scale=0.5),
    "images": images,
    "rows of middle length": middle_rows,
    "torch.compile": compiled,
    "smoothing distribution": smoothing_distribution,
    "another tau": another_tau,
    "confident rows": confident_rows,
    "post hoc": post_hoc,
    "module": module,
    "adaptive": preset_trials(margins.adaptive),
    "balanced": preset_trials(margins.balanced),
    "equalised": preset_trials(margins.equalised),
    "logit adjusted, consistent": preset_trials(lambda prior: margins.logit_adjusted(prior, 0.5, consistent=True)),
    "immax": preset_trials(lambda prior: margins.immax((prior / 3).exp() * 5)),
    "cdt": preset_trials(lambda prior: margins.cdt(prior, 0.3)),
    "fisher consistent": preset_trials(lambda prior: margins.fisher_consistent(prior, prior.cos())),
}
ONLY_DTYPES = {"loss scale": ("float16",), "torch.compile": ("bfloat16", "float32")}


@dataclass(frozen=True)
class AccuracyJob:
    """One option in one dtype, as it is sent to a worker process."""

    option: str
    dtype: str
    device: str

    def record(self, status: str, reason: str = "", **figures: Any) -> Record:
        return {"option": self.option, "dtype": self.dtype, "status": status, "reason": reason, **figures}

    def run(self) -> Iterator[Record]:
        """One record: "right", "wrong" with what is wrong, or "not available"."""
        start = time.monotonic()
        x = Inputs(getattr(torch, self.dtype), self.device, small=self.device == "cpu")
        worst, wrong, n_calls = 0.0, [], 0
        try:
            for trial in OPTIONS[self.option](x):
                fraction, what = judge(trial)
                worst, n_calls = max(worst, fraction), n_calls + 1
                wrong += [what] if what else []
        except ImportError as error:
            yield self.record("not available", f"not installed: {error}")
            return
        yield self.record(
            "wrong" if wrong else "right",
            "; ".join(wrong),
            part_of_allowed=worst,
            calls=n_calls,
            seconds=round(time.monotonic() - start, 3),
        )


def jobs(device: str) -> list[AccuracyJob]:
    """All jobs, the most valuable first: every dtype of an option before the next option."""
    return [
        AccuracyJob(option, dtype, device)
        for option in OPTIONS
        for dtype in DTYPES
        if dtype in ONLY_DTYPES.get(option, DTYPES)
    ]


def dry_run_jobs() -> list[AccuracyJob]:
    """Every option, but the less valuable half only in bfloat16 and float32."""
    half = list(OPTIONS)[len(OPTIONS) // 2 :]
    return [job for job in jobs("cpu") if job.option not in half or job.dtype in DTYPES[:2]]
