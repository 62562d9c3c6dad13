"""Losses and corrections on Gaussians of known optimum: Figure 2 of Menon et al. (ICLR 2021), and iNaturalist's scale.

    python examples/figure2.py                                 # the paper's: under a minute on a CPU
    python examples/figure2.py --prior 0.2 --trials 20
    python examples/figure2.py --classes 3 --prior 0.02
    python examples/figure2.py --inaturalist                   # 8,142 classes, minutes on a CPU
    python examples/figure2.py --inaturalist --epochs 1

Figure 2. Isotropic Gaussians of standard deviation 1, at -(1, 1) and +(1, 1), the second with 5 % of the examples;
with `--classes 3` a third completes an equilateral triangle, and the class frequencies fall geometrically to `--prior`.
Each trial draws 10,000 examples to train on, 10,000 to choose tau on ("val") and 10,000 to test on. Affine scores are
trained from 0 to convergence with every loss of the family that takes affine scores; all losses are convex in them. The
best balanced error is that of the nearest mean. It is an integral of a normal density, which SciPy computes; for two
classes it is Phi(-sqrt 2) = 7.86 %. "excess" compares with the nearest mean on the same test examples, so the luck of
drawing them cancels. tau = 1 needs no choice; tau* is the best of the taus on "val".

Weight normalisation comes in two forms. Two classes that are trained from 0 end at w_0 = -w_1 and b_0 = -b_1, so
dividing each class's (w, b) by its norm cannot change a prediction. Dividing w and keeping b moves the boundary.

iNaturalist's scale. 8,142 Gaussians in 32 dimensions, standard deviation 1, whose means are drawn with standard
deviation 0.9 in each dimension; 1000 down to 2 training examples a class on a shifted power law, 437,513 in all, as
iNaturalist 2018 has. The nearest of the true means is Bayes-optimal for the balanced error. Its error is counted on the
test examples, 10 of each class, and printed with its standard error. A linear head is trained with Adam. It does not
converge: the table says how far two epochs come with each loss. No method can know the mean of a class from its two
examples. "nearest training mean" is told the form of the problem and estimates the means: it says what that costs.
"""

import argparse
import io
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import scipy
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, because it looks for a display
from scipy.optimize import bisect, brentq
from scipy.stats import multivariate_normal
from torch import Tensor, nn
from tqdm import tqdm, trange

import fused_la
from fused_la import (
    adjust_logits,
    count_classes,
    log_prior_from_counts,
    margin_cross_entropy,
    margins,
    normalize_classifier,
)
from fused_la.margins import PairwiseMargin
from fused_la.metrics import BalancedError
from fused_la.posthoc import TauSweep

# Without ldam, whose logits are cosines, and without balanced_softmax, which equals logit_adjusted.
LOSSES: dict[str, Callable[[Tensor], PairwiseMargin]] = {
    "ERM": lambda log_prior: margins.erm(),
    "adaptive": margins.adaptive,
    "equalised": margins.equalised,
    "CDT, gamma = 0.25": lambda log_prior: margins.cdt(log_prior, gamma=0.25),
    "balanced": margins.balanced,
    "logit-adjusted": margins.logit_adjusted,
    "consistent, delta = pi^0.5": lambda log_prior: margins.fisher_consistent(log_prior, 0.5 * log_prior),
    "logit-adjusted + adaptive": margins.logit_adjusted_adaptive,
    "vector scaling, gamma = 0.25": lambda log_prior: margins.vector_scaling(log_prior, gamma=0.25, tau=1.0),
}
POST_HOC, NORM_ALL, NORM_WEIGHT, NORM_PRIOR = (
    "post hoc",
    "weight norm of (w, b)",
    "weight norm of w, b kept",
    "division by the prior",
)
TAUS = [round(0.1 * i, 1) for i in range(21)]
N_EXAMPLES = 10_000

LARGE_LOSSES = {name: LOSSES[name] for name in ("ERM", "balanced", "logit-adjusted")}
LARGE_TAUS = [0.25 * i for i in range(9)]
N_FEATURES, SPREAD, N_TEST, N_VAL = 32, 0.9, 10, 3
BATCH, LEARNING_RATE = 256, 0.05  # the best of 0.005, 0.02, 0.05 with 800 and 2,500 classes

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ["#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]


# ---- Figure 2


def gaussian_means(n_classes: int) -> Tensor:
    corners = [[-1.0, -1.0], [1.0, 1.0], [-math.sqrt(3.0), math.sqrt(3.0)]]
    return torch.tensor(corners[:n_classes], dtype=torch.float64)


def geometric_prior(n_classes: int, rarest: float) -> np.ndarray:
    """pi_c proportional to r^c, with r such that the last class has `rarest`."""

    def last(log_r: float) -> float:
        return float(np.exp(log_r * (n_classes - 1)) / np.exp(log_r * np.arange(n_classes)).sum())

    log_r: Any = brentq(lambda x: last(x) - rarest, -50, 50, xtol=1e-14)
    pi = np.exp(log_r * np.arange(n_classes))
    return pi / pi.sum()


def bayes_balanced_error(means: Tensor) -> float:
    """1 - mean_c P(x is nearest to mu_c | c); nearest: (x - mu_c) . (mu_k - mu_c) < |mu_k - mu_c|^2 / 2 for all k."""
    correct = []
    for c in range(len(means)):
        directions = np.delete((means - means[c]).numpy(), c, axis=0)
        thresholds = (directions**2).sum(axis=1) / 2
        correct.append(multivariate_normal.cdf(thresholds, cov=directions @ directions.T, allow_singular=True))
    return 1.0 - float(np.mean(correct))


def nearest_mean(features: Tensor, means: Tensor) -> Tensor:
    """Scores of the Bayes rule: the log density of each class, up to a constant of the row that argmax ignores."""
    return features @ means.T - 0.5 * (means**2).sum(1)


def draw(means: Tensor, prior: np.ndarray, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    target = torch.multinomial(torch.from_numpy(prior), N_EXAMPLES, replacement=True, generator=generator)
    noise = torch.randn(N_EXAMPLES, means.shape[1], dtype=means.dtype, generator=generator)
    return means[target] + noise, target


def fit(features: Tensor, target: Tensor, margin: PairwiseMargin, n_classes: int) -> nn.Linear:
    head = nn.Linear(features.shape[1], n_classes, dtype=features.dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=1000, tolerance_grad=1e-7, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = margin_cross_entropy(head(features), target, margin)
        loss.backward()
        return loss

    optimizer.step(closure)
    max_grad = max(float(p.grad.abs().max()) for p in head.parameters() if p.grad is not None)
    if max_grad > 1e-6:
        raise RuntimeError(f"a loss has not converged: its gradient is {max_grad:.1e} after {optimizer.state_dict()}")
    return head


def balanced_error(scores: Tensor, target: Tensor, class_counts: Tensor) -> float:
    metric = BalancedError(class_counts, n_bootstrap=0)
    metric.update(scores, target)
    return float(metric.compute()["balanced_error"])


def sweeps(head: nn.Linear, log_prior: Tensor, taus: list[float], split: str) -> dict[str, TauSweep]:
    joint_weight = torch.cat([head.weight, head.bias[:, None]], dim=1)  # the bias is the weight of a constant feature 1
    return {
        POST_HOC: TauSweep(log_prior, taus, split=split),
        NORM_ALL: TauSweep.normalize_classifier(joint_weight, taus, bias=None, split=split),
        NORM_WEIGHT: TauSweep.normalize_classifier(head.weight, taus, bias=head.bias, split=split),
        NORM_PRIOR: TauSweep.divide_by_prior(log_prior, taus, split=split),
    }


def corrected(head: nn.Linear, log_prior: Tensor, name: str, tau: float, features: Tensor) -> Tensor:
    """The scores of one correction of `sweeps` at one tau."""
    if name == POST_HOC:
        return adjust_logits(head(features), log_prior, tau)
    if name == NORM_WEIGHT:
        return nn.functional.linear(features, normalize_classifier(head.weight, tau), head.bias)
    joint_weight = torch.cat([head.weight, head.bias[:, None]], dim=1)
    return nn.functional.pad(features, (0, 1), value=1.0) @ normalize_classifier(joint_weight, tau).T


def run_trial(seed: int, means: Tensor, prior: np.ndarray) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    train, val, test = (draw(means, prior, generator) for _ in range(3))
    counts = count_classes(train[1], len(means))
    log_prior = log_prior_from_counts(counts)
    heads = {name: fit(*train, make_margin(log_prior), len(means)) for name, make_margin in LOSSES.items()}
    with torch.no_grad():
        errors = {"Bayes rule": balanced_error(nearest_mean(test[0], means), test[1], counts)}
        errors |= {name: balanced_error(head(test[0]), test[1], counts) for name, head in heads.items()}
        erm = heads["ERM"]
        on_val, on_test = sweeps(erm, log_prior, TAUS, "val"), sweeps(erm, log_prior, TAUS, "test")
        curves, tau_star = {}, {}
        for name in on_test:
            on_val[name].update(erm(val[0]), val[1])
            on_test[name].update(erm(test[0]), test[1])
            curves[name] = on_test[name].compute()["balanced_error"].tolist()
            tau_star[name] = on_val[name].best()
            errors[f"{name}, tau = 1"] = curves[name][TAUS.index(1.0)]
            errors[f"{name}, tau*"] = curves[name][TAUS.index(tau_star[name])]
        predicted = erm(test[0]).argmax(1)
        changed = {
            name: [int((corrected(erm, log_prior, name, tau, test[0]).argmax(1) != predicted).sum()) for tau in taus]
            for name, taus in ((NORM_ALL, TAUS), (NORM_WEIGHT, [1.0]))
        }
    return {"errors": errors, "curves": curves, "tau_star": tau_star, "changed": changed, "heads": heads, "test": test}


def format_table(errors: dict[str, np.ndarray], bayes: float) -> str:
    lines = [f"{'':34}   mean     sd  mean - Bayes  excess on the same examples"]
    for name, error in errors.items():
        error, rule = 100 * error, 100 * errors["Bayes rule"]
        sd = error.std(ddof=1) if len(error) > 1 else math.nan
        mean, excess = error.mean(), (error - rule).mean()
        lines.append(f"{name:34} {mean:6.2f} {sd:6.2f} {mean - 100 * bayes:+13.2f} {excess:+28.2f}")
    return "\n".join(lines)


def draw_separators(panel: Axes, trial: dict[str, Any], means: Tensor) -> None:
    features, target = (tensor.numpy() for tensor in trial["test"])
    for c in range(len(means)):
        points_of_class = features[target == c][:150]
        panel.scatter(*points_of_class.T, s=4, alpha=0.35, color=("#999999", "#CC79A7", "#56B4E9")[c], linewidths=0)
    low, high = means.numpy().min(axis=0) - 3, means.numpy().max(axis=0) + 3
    x, y = np.meshgrid(np.linspace(low[0], high[0], 300), np.linspace(low[1], high[1], 300))
    grid = torch.from_numpy(np.stack([x.ravel(), y.ravel()], axis=1))
    heads = trial["heads"]
    lines: dict[str, Callable[[Tensor], Tensor]] = {
        "Bayes rule": lambda points: nearest_mean(points, means),
        **{name: heads[name] for name in ("ERM", "adaptive", "balanced", "logit-adjusted")},
    }
    for (name, scores), color, style in zip(
        lines.items(), ("#000000", "#D55E00", "#E69F00", "#009E73", "#0072B2"), ("-", "-", "--", "--", ":"), strict=True
    ):
        with torch.no_grad():
            z = scores(grid).numpy()
        for c in range(len(means)):  # where the scores of class c and of the best other class are equal
            ahead = z[:, c] - np.delete(z, c, axis=1).max(axis=1)
            panel.contour(x, y, ahead.reshape(x.shape), [0.0], colors=color, linestyles=style, linewidths=1.8)
        panel.plot([], [], color=color, linestyle=style, label=name)
    panel.set_xlim(low[0], high[0])
    panel.set_ylim(low[1], high[1])
    panel.set_title("separators of one trial, test examples")
    panel.legend(fontsize=8)


def plot_figure2(errors: dict[str, np.ndarray], trials: list[dict], means: Tensor, bayes: float, title: str) -> Figure:
    figure = Figure(figsize=(14, 5), layout="constrained")
    boxes, separators, against_tau = figure.subplots(1, 3)
    shown = {name: 100 * error for name, error in errors.items() if "tau*" not in name}
    boxes.boxplot(list(shown.values())[::-1], orientation="horizontal", widths=0.6)
    boxes.set_yticks(range(1, len(shown) + 1), list(shown)[::-1], fontsize=8)
    boxes.axvline(100 * bayes, color="0.5", linestyle=":", label="Bayes-optimal")
    boxes.set_xlabel("balanced error on test examples (%)")
    boxes.set_title(f"{len(trials)} trials")
    boxes.legend(fontsize=8)
    draw_separators(separators, trials[0], means)
    curves = {name: 100 * np.array([trial["curves"][name] for trial in trials]) for name in trials[0]["curves"]}
    for (name, curve), color, style in zip(curves.items(), COLORS[1:], ("-", "-", "--", ":"), strict=False):
        against_tau.plot(TAUS, curve.mean(axis=0), color=color, linestyle=style, label=name)
    against_tau.axhline(100 * errors["ERM"].mean(), color="#000000", linewidth=5, alpha=0.25, label="ERM")
    against_tau.axhline(100 * bayes, color="0.5", linestyle=":", label="Bayes-optimal")
    against_tau.set_xlabel("tau")
    against_tau.set_ylabel("balanced error on test examples (%)")
    against_tau.set_title("corrections of the model of ERM")
    against_tau.legend(fontsize=8)
    figure.suptitle(title)
    return figure


def figure2(n_trials: int, n_classes: int, rarest: float, out: Path) -> None:
    torch.set_num_threads(1)  # fastest for such small tensors, and sums then do not depend on the number of cores
    means, prior = gaussian_means(n_classes), geometric_prior(n_classes, rarest)
    bayes = bayes_balanced_error(means)
    started = time.perf_counter()
    trials = [run_trial(seed, means, prior) for seed in trange(n_trials, desc="trials")]
    errors = {name: np.array([trial["errors"][name] for trial in trials]) for name in trials[0]["errors"]}
    rule = errors["Bayes rule"]
    # Standard error of a mean over trials: binomial, with n_c = pi_c N examples of class c on average.
    sampling = math.sqrt(sum(bayes * (1 - bayes) / (p * N_EXAMPLES) for p in prior) / n_trials) / n_classes

    frequencies = ", ".join(f"{100 * p:.3g}" for p in prior)
    title = f"{n_classes} Gaussians with {frequencies} % of the examples: balanced error (%) over {n_trials} trials"
    print(f"\n{title}\n")
    print(format_table(errors, bayes))
    off = 100 * (rule.mean() - bayes)
    print(f"\nBayes-optimal: {100 * bayes:.2f} %, by integration. Drawing the test examples moves the means by")
    print(f"a standard error of {100 * sampling:.2f} points; it moves the Bayes rule's by {off:+.2f}.")
    changed = {name: [max(trial["changed"][name]) for trial in trials] for name in trials[0]["changed"]}
    print(
        f"Of {N_EXAMPLES} predictions of ERM, weight normalisation of (w, b) changes {max(changed[NORM_ALL])} at most,"
    )
    print(f"at any tau; that of w alone, at tau = 1, {np.mean(changed[NORM_WEIGHT]):.0f} on average.")
    tau_star = {name: [trial["tau_star"][name] for trial in trials] for name in trials[0]["tau_star"]}
    print("Mean tau*, chosen on 'val': " + ", ".join(f"{name} {np.mean(taus):.2f}" for name, taus in tau_star.items()))
    print(f"{time.perf_counter() - started:.0f} s")

    plot_figure2(errors, trials, means, bayes, title).savefig(out / "figure2.png", dpi=72)
    report = {
        "settings": {
            "trials": n_trials,
            "class_frequencies": prior.tolist(),
            "means": means.tolist(),
            "examples": dict.fromkeys(("train", "val", "test"), N_EXAMPLES),
            "tau_star_chosen_on": "val",
            "taus": TAUS,
        },
        "versions": versions(),
        "bayes_balanced_error": bayes,
        "standard_error_of_a_mean_by_drawing_test_examples": sampling,
        "balanced_error": {name: error.tolist() for name, error in errors.items()},
        "balanced_error_by_tau": {
            name: np.mean([trial["curves"][name] for trial in trials], axis=0).tolist() for name in trials[0]["curves"]
        },
        "tau_star": tau_star,
        "predictions_changed": changed,
    }
    write(report, out / "figure2.json")
    print(f"Written to {out}: figure2.png, figure2.json")


# ---- iNaturalist's scale


def power_law_counts(n_classes: int, most: int, least: int, total: int) -> Tensor:
    """n_i = round(most * ((i + q) / (1 + q))^-a), i = 1 .. n_classes; a sets the last count, q the total."""
    rank = np.arange(n_classes)

    def counts(log_q: float) -> np.ndarray:
        stretch = 1 + rank / (1 + math.exp(log_q))
        exponent = math.log(most / least) / math.log(stretch[-1])
        return np.rint(most * stretch**-exponent).astype(int)

    # The total is a step function of q with steps of one example. Bisection stops at a q that meets it.
    log_q: Any = bisect(lambda x: int(counts(x).sum()) - total, -10, 20, maxiter=200, xtol=1e-15)
    found = counts(log_q)
    if found.sum() != total:
        raise ValueError(f"no power law from {most} to {least} has {total} examples in {n_classes} classes")
    return torch.from_numpy(found)


def draw_classes(target: Tensor, means: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return means[target] + torch.randn(len(target), means.shape[1], generator=generator), target


def train_head(
    data: tuple[Tensor, Tensor], margin: PairwiseMargin, n_classes: int, epochs: int, progress: tqdm
) -> nn.Linear:
    features, target = data
    generator = torch.Generator().manual_seed(0)  # every loss sees the same batches
    head = nn.Linear(features.shape[1], n_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.Adam(head.parameters(), LEARNING_RATE)
    n_steps = epochs * math.ceil(len(target) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(target), generator=generator).split(BATCH):
            loss = margin_cross_entropy(head(features[rows]), target[rows], margin)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
    return head


@torch.no_grad()
def evaluate(scores: Callable[[Tensor], Tensor], data: tuple[Tensor, Tensor], counts: Tensor) -> dict[str, Tensor]:
    metric = BalancedError(counts)
    for features, target in zip(*(tensor.split(1024) for tensor in data), strict=True):
        metric.update(scores(features), target)
    return metric.compute()


def plot_inaturalist(
    results: dict[str, dict[str, Tensor]], curves: dict[str, list[float]], counts: Tensor, title: str
) -> Figure:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    by_rank, against_tau = figure.subplots(1, 2)
    groups = np.array_split(np.arange(len(counts)), 10)
    methods = ["Bayes rule", "nearest training mean", *LARGE_LOSSES, f"{POST_HOC}, tau = 1", f"{NORM_ALL}, tau*"]
    for name, color, marker in zip(methods, COLORS, "osD^vPX", strict=True):
        result = results[name]
        error = [100 * float(result["class_error"][torch.from_numpy(group)].mean()) for group in groups]
        by_rank.plot(range(10), error, color=color, marker=marker, markersize=5, label=name)
    labels = [f"{int(counts[group[0]])}-{int(counts[group[-1]])}" for group in groups]
    by_rank.set_xticks(range(10), labels, fontsize=7, rotation=30)
    by_rank.set_xlabel("training examples of a class, ten groups of classes by rank")
    by_rank.set_ylabel("error on test examples (%)")
    by_rank.legend(fontsize=8)
    for (name, curve), color, style in zip(curves.items(), COLORS[1:], ("-", "-", "--", ":"), strict=False):
        against_tau.plot(LARGE_TAUS, 100 * np.array(curve), color=color, linestyle=style, label=name)
    against_tau.axhline(
        100 * float(results["Bayes rule"]["balanced_error"]), color="0.5", linestyle=":", label="Bayes rule"
    )
    against_tau.set_xlabel("tau")
    against_tau.set_ylabel("balanced error on validation examples (%)")
    against_tau.set_title("corrections of the model of ERM")
    against_tau.legend(fontsize=8)
    figure.suptitle(title)
    return figure


def inaturalist(n_classes: int, epochs: int, out: Path) -> None:
    started = time.perf_counter()
    counts = power_law_counts(n_classes, 1000, 2, round(437_513 * n_classes / 8142))
    log_prior = log_prior_from_counts(counts)
    generator = torch.Generator().manual_seed(0)
    means = SPREAD * torch.randn(n_classes, N_FEATURES, generator=generator)
    all_classes = torch.arange(n_classes)
    train = draw_classes(all_classes.repeat_interleave(counts), means, generator)
    val = draw_classes(all_classes.repeat(N_VAL), means, generator)
    test = draw_classes(all_classes.repeat(N_TEST), means, generator)

    results = {"Bayes rule": evaluate(lambda features: nearest_mean(features, means), test, counts)}
    training_means = torch.zeros_like(means).index_add(0, train[1], train[0]) / counts[:, None]
    results["nearest training mean"] = evaluate(lambda features: nearest_mean(features, training_means), test, counts)
    heads = {}
    with tqdm(total=len(LARGE_LOSSES) * epochs * math.ceil(len(train[1]) / BATCH), desc="training", unit="step") as bar:
        for name, make_margin in LARGE_LOSSES.items():
            heads[name] = train_head(train, make_margin(log_prior), n_classes, epochs, bar)
    for name, head in heads.items():
        results[name] = evaluate(head, test, counts)
    erm = heads["ERM"]
    on_val = sweeps(erm, log_prior, LARGE_TAUS, "val")
    with torch.no_grad():
        for features, target in zip(*(tensor.split(1024) for tensor in val), strict=True):
            logits = erm(features)
            for sweep in on_val.values():
                sweep.update(logits, target)
    tau_star = {name: sweep.best() for name, sweep in on_val.items()}
    for name in (NORM_ALL, NORM_WEIGHT, POST_HOC):
        for form, tau in (("tau = 1", 1.0), ("tau*", tau_star[name])):
            results[f"{name}, {form}"] = evaluate(partial(corrected, erm, log_prior, name, tau), test, counts)
    seconds = time.perf_counter() - started

    title = f"{n_classes:,} Gaussians with {counts[0]} down to {counts[-1]} training examples, {len(train[1]):,} in all"
    print(f"\n{title}, {epochs} epochs: errors in % on {N_TEST} test examples of each class\n")
    print(f"{'':34} balanced error  95 % interval    many  medium     few")
    columns = ("balanced_error", "balanced_error_low", "balanced_error_high", "many_error", "medium_error", "few_error")
    for name, result in results.items():
        error, low, high, many, medium, few = (100 * float(result[key]) for key in columns)
        print(f"{name:34} {error:14.2f}  {low:5.2f} to {high:5.2f} {many:7.2f} {medium:7.2f} {few:7.2f}")
    error = float(results["Bayes rule"]["balanced_error"])
    standard_error = math.sqrt(error * (1 - error) / len(test[1]))  # an upper bound: the errors of classes differ
    print(
        f"\nThe Bayes rule, nearest true mean: {100 * error:.2f} %, standard error at most {100 * standard_error:.2f}."
    )
    print("tau* chosen on 'val': " + ", ".join(f"{name} {tau:g}" for name, tau in tau_star.items()))
    print(f"{seconds:.0f} s")

    curves = {name: sweep.compute()["balanced_error"].tolist() for name, sweep in on_val.items()}
    plot_inaturalist(results, curves, counts, title).savefig(out / "figure2_inaturalist.png", dpi=80)
    report = {
        "settings": {
            "classes": n_classes,
            "training_examples": len(train[1]),
            "class_counts": counts.tolist(),
            "features": N_FEATURES,
            "spread_of_means": SPREAD,
            "examples_per_class": {"val": N_VAL, "test": N_TEST},
            "optimizer": "Adam, cosine learning rate",
            "learning_rate": LEARNING_RATE,
            "batch": BATCH,
            "epochs": epochs,
            "taus": LARGE_TAUS,
            "tau_star_chosen_on": "val",
        },
        "versions": versions(),
        "seconds": seconds,
        "bayes_standard_error": standard_error,
        "tau_star": tau_star,
        "balanced_error_by_tau_on_val": curves,
        "results": {
            name: {key: number(value) for key, value in result.items() if value.dim() == 0}
            for name, result in results.items()
        },
    }
    write(report, out / "figure2_inaturalist.json")
    print(f"Written to {out}: figure2_inaturalist.png, figure2_inaturalist.json")


# ---- Shared by both


def number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()  # JSON has no NaN


def versions() -> dict[str, str]:
    modules = (fused_la, torch, np, scipy, matplotlib)
    return {"python": platform.python_version()} | {module.__name__: module.__version__ for module in modules}


def write(report: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # stdout may be ASCII, and --out may be any name
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="repetitions of Figure 2 (default: %(default)s)")
    parser.add_argument("--prior", type=float, default=0.05, help="share of the last class (default: %(default)s)")
    parser.add_argument("--classes", type=int, help="2 or 3 (default: 2); with --inaturalist from 100 (default: 8142)")
    parser.add_argument("--inaturalist", action="store_true", help="8,142 classes instead of Figure 2")
    parser.add_argument("--epochs", type=int, default=2, help="of training with --inaturalist (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("figure2_results"), help="folder to write to (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.trials < 1:
        parser.error(f"--trials must be at least 1, got {args.trials}")
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    if not 0.002 <= args.prior <= 0.998:
        parser.error(f"--prior must be between 0.002 and 0.998, for examples of every class, got {args.prior:g}")
    if args.classes is None:
        args.classes = 8142 if args.inaturalist else 2
    if args.inaturalist and args.classes < 100:
        parser.error(f"--classes must be at least 100 with --inaturalist, got {args.classes}")
    if not args.inaturalist and args.classes not in (2, 3):
        parser.error(f"--classes must be 2 or 3, got {args.classes}")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.inaturalist:
        inaturalist(args.classes, args.epochs, args.out)
    else:
        figure2(args.trials, args.classes, args.prior, args.out)


if __name__ == "__main__":
    main()
