"""Long-tailed digits: Table 3 and Figures 1 and 3 of Menon et al. (ICLR 2021) on real images, in a minute on a CPU.

    python examples/digits_lt.py
    python examples/digits_lt.py --seeds 30 --imb-factor 0.1 --out /tmp/digits

scikit-learn's bundled 8x8 scans of handwritten digits are made long-tailed; nothing is downloaded. Every class holds
out the same number of images, half of what the scarcest digit has: a third of them for validation ("val"), the others
for testing ("test"). No image is in two of these sets or trained on. From the remaining images the class of rank i of K
keeps int(n_max * imb_factor ** (i / (K - 1))) for training. Each seed shuffles which digit has which rank, draws the
images and initialises the models anew.

A method is either a loss to train with, or a correction of a trained model of plain cross entropy (ERM). The
corrections are weight normalisation (a class's weight over its norm^tau with the bias kept, or its score over its
frequency^tau) and logit adjustment post hoc. tau = 1 needs no choice; tau* is each model's best on "val". The table,
three figures and all numbers per seed (JSON) report for each method on "test":

    balanced error     mean over classes of the error of a class: mean and standard deviation over seeds, and a 95 %
                       interval (Student's t) for what the mean over many seeds would be
    long-tailed error  top-1 error if the images were as long-tailed as the training images
    many, medium, few  mean error of the classes of > 100, 20 to 100, < 20 training images ("-": none)

Learning rate, momentum and weight decay are those of Menon et al. for ImageNet-LT, with enough steps to converge.
"""

import argparse
import io
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import scipy.stats
import sklearn
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, because it looks for a display
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import fused_la
from fused_la import count_classes, log_prior_from_counts, margin_cross_entropy, margins
from fused_la.margins import PairwiseMargin
from fused_la.metrics import BalancedError
from fused_la.posthoc import TauSweep

N_CLASSES = 10
N_STEPS, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 500, 0.4, 0.9, 5e-4  # a step sees all training images
ADAM_LEARNING_RATE = 0.03

# The last module of a model is its classifier head.
MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "linear": lambda: nn.Sequential(nn.Linear(64, N_CLASSES)),
    "MLP": lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, N_CLASSES)),
}

ERM = "ERM"


def balanced(log_prior: Tensor) -> PairwiseMargin:
    """alpha_y = 1 / (C pi_y), of mean 1 over training images: step size and weight decay mean the same as for ERM."""
    margin = margins.balanced(log_prior)
    assert margin.alpha is not None
    return PairwiseMargin(alpha=margin.alpha / len(log_prior))


LOSS_TAUS = (0.5, 1.0, 1.5, 2.0)
LOSSES: dict[str, Callable[[Tensor], PairwiseMargin]] = {
    ERM: lambda log_prior: margins.erm(),
    "adaptive": margins.adaptive,
    "equalised": margins.equalised,
    "balanced": balanced,
    **{
        f"adjusted loss, tau = {tau:g}": lambda log_prior, tau=tau: margins.logit_adjusted(log_prior, tau)
        for tau in LOSS_TAUS
    },
}
BY_NORM, BY_PRIOR, POST_HOC = "normalised by norm", "normalised by prior", "post hoc"
TAUS = [round(0.1 * i, 1) for i in range(31)]
METHODS = [  # lines of the table
    ERM,
    f"{BY_NORM}, tau = 1",
    f"{BY_NORM}, tau*",
    f"{BY_PRIOR}, tau = 1",
    f"{BY_PRIOR}, tau*",
    "adaptive",
    "equalised",
    "balanced",
    f"{POST_HOC}, tau = 1",
    f"{POST_HOC}, tau*",
    "adjusted loss, tau = 1",
]
FIGURE_METHODS = [ERM, f"{BY_NORM}, tau*", "balanced", f"{POST_HOC}, tau = 1", "adjusted loss, tau = 1"]


# ---- Data


class Split(NamedTuple):
    train: Tensor  # indices of images
    val: Tensor
    test: Tensor
    class_of_rank: Tensor  # the digit with the most training images first


def split_digits(target: Tensor, profile: list[int], n_val: int, n_test: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    class_of_rank = torch.randperm(N_CLASSES, generator=generator)
    train, val, test = [], [], []
    for c, n_train in zip(class_of_rank.tolist(), profile, strict=True):
        members = (target == c).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        test.append(members[:n_test])
        val.append(members[n_test : n_test + n_val])
        train.append(members[n_test + n_val : n_test + n_val + n_train])
    return Split(torch.cat(train), torch.cat(val), torch.cat(test), class_of_rank)


# ---- Training: the models of all seeds and losses are trained as one batch of models


def margin_vectors(margin: PairwiseMargin) -> list[Tensor]:
    """alpha and both offsets of a margin as (C,) vectors, with defaults filled in, so that margins can be stacked."""
    zero = torch.zeros(N_CLASSES)
    vectors = (margin.alpha, margin.negative_offset, margin.target_offset)
    return [default if given is None else given for given, default in zip(vectors, (zero + 1, zero, zero), strict=True)]


def loss_of_models(
    template: nn.Module, parameters: dict[str, Tensor], images: Tensor, target: Tensor, vectors: list[Tensor]
) -> Tensor:
    """The loss of each model, (n_models,), from stacked parameters, images, targets and margins."""

    def loss(parameters: dict[str, Tensor], images: Tensor, target: Tensor, vectors: list[Tensor]) -> Tensor:
        logits = torch.func.functional_call(template, parameters, (images,))
        return margin_cross_entropy(logits, target, PairwiseMargin(*vectors))

    return torch.vmap(loss)(parameters, images, target, vectors)


def train(
    models: list[nn.Sequential],
    images: Tensor,  # (n_models, N, 64)
    target: Tensor,  # (n_models, N)
    loss_margins: list[PairwiseMargin],
    new_optimizer: Callable[[Any], torch.optim.Optimizer],
    n_steps: int,
    progress: tqdm,
) -> list[nn.Sequential]:
    """Train all models at once, each as if alone: neither the sum of losses nor the optimizer mixes parameters."""
    parameters, _ = torch.func.stack_module_state(models)
    vectors = [torch.stack(column) for column in zip(*map(margin_vectors, loss_margins), strict=True)]
    optimizer = new_optimizer(parameters.values())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(n_steps):
        loss = loss_of_models(models[0], parameters, images, target, vectors).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update()
    for i, model in enumerate(models):
        model.load_state_dict({name: stacked[i].detach() for name, stacked in parameters.items()})
    return models


# ---- Evaluation of the methods on a split: rates in %, and the error of each class


Rates = dict[str, Any]
RATES = ("balanced_error", "top1_accuracy", "many_error", "medium_error", "few_error")


def rates(computed: dict[str, Tensor], class_error: Tensor, class_counts: Tensor, class_of_rank: Tensor) -> Rates:
    frequency = class_counts / class_counts.sum()
    return {name: 100 * float(computed[name]) for name in RATES} | {
        "long_tailed_error": 100 * float((class_error * frequency).sum()),
        "class_error_by_rank": (100 * class_error[class_of_rank]).tolist(),
    }


def raw_rates(logits: Tensor, target: Tensor, class_counts: Tensor, class_of_rank: Tensor) -> Rates:
    metric = BalancedError(class_counts, n_bootstrap=0)  # no bootstrap: the intervals here are over seeds
    metric.update(logits, target)
    computed = metric.compute()
    return rates(computed, computed["class_error"], class_counts, class_of_rank)


def sweeps(
    model: nn.Sequential, images: Tensor, target: Tensor, class_counts: Tensor, split: str
) -> dict[str, TauSweep]:
    """Every correction of a model that was trained with plain cross entropy, at every tau."""
    log_prior, head = log_prior_from_counts(class_counts), model[-1]
    assert isinstance(head, nn.Linear)
    options = {"split": split, "class_counts": class_counts}
    corrections = {
        BY_NORM: TauSweep.normalize_classifier(head.weight, TAUS, bias=head.bias, **options),
        BY_PRIOR: TauSweep.divide_by_prior(log_prior, TAUS, **options),
        POST_HOC: TauSweep(log_prior, TAUS, **options),
    }
    for sweep in corrections.values():
        sweep.update(model(images), target)
    return corrections


def choose_taus(model: nn.Sequential, images: Tensor, target: Tensor, split: Split) -> dict[str, float]:
    """tau* of every correction. This reads only the images of "val" and the class counts of "train"."""
    class_counts = count_classes(target[split.train], N_CLASSES)
    on_val = sweeps(model, images[split.val], target[split.val], class_counts, "val")
    return {name: sweep.best() for name, sweep in on_val.items()}


def evaluate(
    models: dict[str, nn.Sequential], tau_star: dict[str, float], images: Tensor, target: Tensor, split: Split
) -> dict[str, Rates]:
    """Evaluate every method on "test". A correction at a tau is named "NAME, tau = T"."""
    class_counts = count_classes(target[split.train], N_CLASSES)
    images, target = images[split.test], target[split.test]
    results = {
        name: raw_rates(model(images), target, class_counts, split.class_of_rank) for name, model in models.items()
    }
    for name, sweep in sweeps(models[ERM], images, target, class_counts, "test").items():
        computed, class_error = sweep.compute(), sweep.class_error()
        for t, tau in enumerate(sweep.taus):
            at_tau = {key: values[t] for key, values in computed.items()}
            results[f"{name}, tau = {tau:g}"] = rates(at_tau, class_error[t], class_counts, split.class_of_rank)
        results[f"{name}, tau*"] = results[f"{name}, tau = {tau_star[name]:g}"]
    return results


# ---- Output. The first axis of `results[model][method][rate]` is the seed.

Results = dict[str, dict[str, dict[str, np.ndarray]]]


def deviation(values: np.ndarray) -> np.ndarray:
    """Standard deviation over seeds; NaN for one seed."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval for the mean over seeds; NaN for one seed."""
    if len(values) < 2:
        return np.nan, np.nan
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - half), float(values.mean() + half)


def format_table(results: Results) -> str:
    def show(value: float, width: int) -> str:
        return ("-" if np.isnan(value) else f"{value:.2f}").rjust(width)

    lines = []
    for model in MODELS:
        lines.append(f"{model:29} balanced error   95 % interval  long-tailed error     many   medium      few")
        for method in METHODS:
            rates_of_method = results[model][method]
            error = rates_of_method["balanced_error"]
            low, high = interval(error)
            others = zip(("long_tailed_error", "many_error", "medium_error", "few_error"), (17, 7, 7, 7), strict=True)
            lines.append(
                f"{method:29} {show(float(error.mean()), 6)} ± {show(float(deviation(error)), 5)}  "
                f"{show(low, 5)} to {show(high, 5)}  "
                + "  ".join(show(float(rates_of_method[name].mean()), width) for name, width in others)
            )
        lines.append("")
    return "\n".join(lines)


# Okabe and Ito's colours, which colour-blind readers can tell apart; markers and dashes tell lines apart in grey.
STYLES: list[dict[str, Any]] = [
    {"color": color, "marker": marker, "linestyle": linestyle}
    for color, marker, linestyle in zip(
        ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"),
        "osD^vPX",
        ("-", "--", "-.", ":", "-", "--", "-."),
        strict=True,
    )
]
STYLE_OF = {
    ERM: STYLES[0],
    f"{POST_HOC}, tau = 1": STYLES[1],
    "adjusted loss, tau = 1": STYLES[2],
    f"{BY_NORM}, tau*": STYLES[3],
    "balanced": STYLES[4],
}


def standard_error(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(deviation(values)) / len(values) ** 0.5  # for one seed the bars have no height


def panels_of(title: str, y_label: str, x_label: str, sharey: bool = True) -> tuple[Figure, dict[str, Axes]]:
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = dict(zip(MODELS, figure.subplots(1, len(MODELS), sharey=sharey), strict=True))
    for model, panel in panels.items():
        panel.set_title(model)
        panel.set_xlabel(x_label)
        panel.grid(alpha=0.3)
    next(iter(panels.values())).set_ylabel(y_label)
    figure.suptitle(title)
    return figure, panels


BY_RANK = "training images of the class, by class rank"


def plot_error_by_rank(results: Results, profile: list[int], title: str) -> Figure:
    figure, panels = panels_of(title, 'error on "test" (%)', BY_RANK)
    for model, panel in panels.items():
        for i, method in enumerate(FIGURE_METHODS):
            error = results[model][method]["class_error_by_rank"]
            x = np.arange(N_CLASSES) + 0.12 * (i - (len(FIGURE_METHODS) - 1) / 2)  # so that no bar hides another
            style = STYLE_OF[method] | {"label": method, "markersize": 5}
            panel.errorbar(x, error.mean(axis=0), standard_error(error), capsize=2, **style)
        panel.set_xticks(range(N_CLASSES), [str(n_train) for n_train in profile])
        panel.set_ylim(bottom=0)
    panels["linear"].legend()
    return figure


def plot_error_against_tau(results: Results, title: str) -> Figure:
    """Figure 3 of the paper. At tau = 0 every curve equals ERM."""
    figure, panels = panels_of(title, 'balanced error on "test" (%)', "tau")
    curves = {name: [f"{name}, tau = {tau:g}" for tau in TAUS] for name in (POST_HOC, BY_NORM, BY_PRIOR)}
    curves["adjusted loss"] = [ERM] + [f"adjusted loss, tau = {tau:g}" for tau in LOSS_TAUS]
    for model, panel in panels.items():
        erm = results[model][ERM]["balanced_error"].mean()
        panel.axhline(erm, color=STYLES[0]["color"], linewidth=1, label=ERM)
        for style, (name, methods) in zip((STYLES[1], STYLES[3], STYLES[5], STYLES[2]), curves.items(), strict=True):
            taus = (0.0, *LOSS_TAUS) if name == "adjusted loss" else TAUS
            error = np.stack([results[model][method]["balanced_error"] for method in methods], axis=1)
            mean, bar = error.mean(axis=0), standard_error(error)
            every = 1 if name == "adjusted loss" else 5  # tau values between markers
            panel.plot(taus, mean, label=name, markersize=4, markevery=every, **style)
            panel.fill_between(taus, mean - bar, mean + bar, color=style["color"], alpha=0.2, linewidth=0)
        panel.axvline(1, color="0.5", linewidth=1, linestyle=":")  # where logit adjustment is Fisher-consistent
        panel.set_ylim(bottom=0)
    panels["linear"].legend(loc="upper left")
    return figure


def plot_weight_norms(norms: dict[str, dict[str, np.ndarray]], profile: list[int], title: str) -> Figure:
    """Figure 1 of the paper: norm of each class's weight over the mean of all classes, against the class rank."""
    figure, panels = panels_of(title, "norm of a class's weight / mean over classes", BY_RANK)
    for model, panel in panels.items():
        for style, (optimizer, by_seed) in zip((STYLES[2], STYLES[5]), norms[model].items(), strict=True):
            relative = by_seed / by_seed.mean(axis=1, keepdims=True)
            panel.errorbar(
                range(N_CLASSES), relative.mean(axis=0), standard_error(relative), capsize=2, label=optimizer, **style
            )
        panel.set_xticks(range(N_CLASSES), [str(n_train) for n_train in profile])
        panel.set_ylim(bottom=0)
    panels["linear"].legend(loc="lower left")
    return figure


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # stdout may be ASCII, and --out may be any name
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="number of repetitions (default: %(default)s)")
    parser.add_argument(
        "--imb-factor",
        type=float,
        default=0.02,
        help="training images of the rarest class over those of the most frequent one (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=N_STEPS, help="of training (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("digits_lt_results"),
        help="folder to write to (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if not 0 < args.imb_factor <= 1:
        parser.error(f"--imb-factor must be in (0, 1], got {args.imb_factor:g}")

    pixels, digits = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels / 16).float()  # grey levels are 0 to 16
    target = torch.from_numpy(digits)
    n_smallest = int(count_classes(target, N_CLASSES).min())
    n_val = n_smallest // 6  # of each class
    n_test = n_smallest // 2 - n_val
    n_max = n_smallest - n_val - n_test  # what every digit has left, because any of them may come first
    depth = [rank / (N_CLASSES - 1) for rank in range(N_CLASSES)]  # 0 at the head, 1 at the end of the tail
    profile = [int(n_max * args.imb_factor**d) for d in depth]  # training images by class rank
    if min(profile) < 1:
        empty = ", ".join(str(rank + 1) for rank, n_train in enumerate(profile) if n_train < 1)
        parser.error(
            f"--imb-factor must leave every class a training image, as 1 / {n_max} and more do, "
            f"got {args.imb_factor:g}, which leaves none to the class of rank {empty} of {N_CLASSES}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # fastest for matrices this small, and sums do not depend on the number of cores

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, ADAM_LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    splits = [split_digits(target, profile, n_val, n_test, seed) for seed in range(args.seeds)]
    by_seed: dict[str, list[dict[str, Rates]]] = {model: [] for model in MODELS}
    tau_star: dict[str, list[dict[str, float]]] = {model: [] for model in MODELS}
    norms: dict[str, dict[str, np.ndarray]] = {model: {} for model in MODELS}
    with tqdm(total=2 * len(MODELS) * args.steps, desc="training", unit="step") as progress:
        for name, new_model in MODELS.items():
            for optimizer, new_optimizer, losses in (
                ("SGD with momentum", sgd, LOSSES),
                ("Adam", adam, {ERM: LOSSES[ERM]}),  # only for Figure 1
            ):
                models, loss_margins = [], []
                for seed, split in enumerate(splits):
                    log_prior = log_prior_from_counts(count_classes(target[split.train], N_CLASSES))
                    for new_margin in losses.values():
                        torch.manual_seed(seed)  # every loss starts from the same weights
                        models.append(new_model())
                        loss_margins.append(new_margin(log_prior))
                rows = torch.stack([split.train for split in splits for _ in losses])
                train(models, images[rows], target[rows], loss_margins, new_optimizer, args.steps, progress)
                trained = [
                    dict(zip(losses, models[i : i + len(losses)], strict=True))
                    for i in range(0, len(models), len(losses))
                ]
                with torch.no_grad():
                    norms[name][optimizer] = np.array(
                        [
                            torch.linalg.vector_norm(by_loss[ERM][-1].weight, dim=1)[split.class_of_rank].tolist()
                            for by_loss, split in zip(trained, splits, strict=True)
                        ]
                    )
                    if losses is LOSSES:
                        for by_loss, split in zip(trained, splits, strict=True):
                            tau_star[name].append(choose_taus(by_loss[ERM], images, target, split))
                            by_seed[name].append(evaluate(by_loss, tau_star[name][-1], images, target, split))
    results = {
        name: {
            method: {rate: np.array([run[method][rate] for run in runs]) for rate in runs[0][method]}
            for method in runs[0]
        }
        for name, runs in by_seed.items()
    }

    title = f"Digits with {profile[0]} down to {profile[-1]} training images a class"
    over_seeds = f"over {args.seeds} seed" + ("s" if args.seeds > 1 else "")
    print(
        f"\n{title}; {n_test} test images of each, {n_val} to choose tau*: %, mean ± standard deviation {over_seeds}\n"
    )
    print(format_table(results))
    for model, chosen in tau_star.items():
        means = ", ".join(f"{name} {np.mean([taus[name] for taus in chosen]):.2f}" for name in chosen[0])
        print(f'{model}: mean tau*, chosen on "val": {means}')
    title = f"{title}: mean ± standard error {over_seeds}"
    figures = {
        "error_by_rank.png": plot_error_by_rank(results, profile, title),
        "balanced_error_by_tau.png": plot_error_against_tau(results, title),
        "weight_norm_by_rank.png": plot_weight_norms(norms, profile, title),
    }
    for name, figure in figures.items():
        figure.savefig(args.out / name, dpi=90)

    def json_list(values: np.ndarray) -> list:
        return values.tolist() if not np.isnan(values).any() else [None] * len(values)  # JSON has no NaN

    report = {
        "settings": {
            "seeds": args.seeds,
            "imb_factor": args.imb_factor,
            "training_images_by_rank": profile,
            "val_images_per_class": n_val,
            "test_images_per_class": n_test,
            "results_on": "test",
            "tau_star_chosen_on": "val",
            "taus": TAUS,
            "optimizer": "SGD, cosine learning rate, full batch",
            "steps": args.steps,
            "learning_rate": LEARNING_RATE,
            "momentum": MOMENTUM,
            "weight_decay": WEIGHT_DECAY,
            "adam_learning_rate": ADAM_LEARNING_RATE,
        },
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (fused_la, torch, np, scipy, sklearn, matplotlib)},
        "table": METHODS,
        "interval_of_balanced_error": {
            model: {
                method: json_list(np.array(interval(results[model][method]["balanced_error"]))) for method in METHODS
            }
            for model in MODELS
        },
        "tau_star": {model: {n: [t[n] for t in by_run] for n in by_run[0]} for model, by_run in tau_star.items()},
        "weight_norm_by_rank": {
            model: {o: v.tolist() for o, v in by_optimizer.items()} for model, by_optimizer in norms.items()
        },
        "results": {
            model: {
                method: {rate: json_list(v) for rate, v in by_rate.items()} for method, by_rate in by_method.items()
            }
            for model, by_method in results.items()
        },
    }
    (args.out / "results.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(f"Written to {args.out}: {', '.join(figures)}, results.json")


if __name__ == "__main__":
    main()
