"""Long-tailed digits: logit adjustment against plain cross entropy on real images, in a minute on a CPU.

    python examples/digits_lt.py
    python examples/digits_lt.py --seeds 30 --imb-factor 0.1 --out /tmp/digits

scikit-learn's bundled 8x8 scans of handwritten digits (nothing is downloaded) are made long-tailed: half of
the images are held out for testing, equally many of every class, and of the rest the class of rank i of K
keeps int(n_max * imb_factor ** (i / (K - 1))) for training. Each seed shuffles which digit has which rank,
draws the images and initialises the models anew.

The table, two figures and all numbers per seed (JSON) say how each method does on the held-out images:

    balanced error     mean over classes of the error of a class, and its standard deviation over seeds
    top-1 accuracy     held-out images are as many of every class, so this is 100 - balanced error
    long-tailed error  top-1 error if the held-out images were as long-tailed as the training images
    many, medium, few  mean error of the classes of > 100, 20 to 100, < 20 training images ("-": none)

Nothing is tuned: learning rate, its cosine, momentum and weight decay are those of Menon et al. (ICLR 2021)
for ImageNet-LT, the table has tau = 1, and the figure against tau shows every tau instead of the best one.
"""

import argparse
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import sklearn
import torch
from matplotlib.figure import Figure  # not pyplot, which looks for a display
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import fused_la
from fused_la import LogitAdjustedCrossEntropyLoss, count_classes, log_prior_from_counts

N_CLASSES = 10
N_STEPS, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 250, 0.4, 0.9, 5e-4  # a step sees all training images

# The last module of a model is its classifier head.
MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "linear": lambda: nn.Sequential(nn.Linear(64, N_CLASSES)),
    "MLP": lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, N_CLASSES)),
}


# ---- Methods. One more entry in METHODS is one more line in the table, the figure and the JSON.


class Method(NamedTuple):
    name: str
    loss: Callable[[Tensor], nn.Module]  # class_counts -> training loss; methods of one loss share its model
    scores: Callable[[nn.Sequential, Tensor, Tensor], Tensor]  # model, images, log_prior -> what argmax sees


def cross_entropy(class_counts: Tensor) -> nn.Module:
    return nn.CrossEntropyLoss()


def logits(model: nn.Sequential, images: Tensor, log_prior: Tensor) -> Tensor:
    return model(images)


def adjusted_logits(model: nn.Sequential, images: Tensor, log_prior: Tensor, tau: float) -> Tensor:
    return model(images) - tau * log_prior


ERM = Method("ERM", cross_entropy, logits)
POST_HOC = {
    tau: Method(f"post hoc, tau = {tau:g}", cross_entropy, partial(adjusted_logits, tau=tau))
    for tau in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
}
LOSS = {
    tau: Method(f"adjusted loss, tau = {tau:g}", partial(LogitAdjustedCrossEntropyLoss, tau=tau), logits)
    for tau in (0.5, 1.0, 1.5, 2.0)
}
CURVES: dict[str, dict[float, Method]] = {  # against tau; at tau = 0 both are ERM
    "logit adjustment, post hoc": {0.0: ERM, **POST_HOC},
    "logit adjustment, loss": {0.0: ERM, **LOSS},
}
METHODS = [ERM, POST_HOC[1.0], LOSS[1.0]]


# ---- Data, training, testing


class Split(NamedTuple):
    train_images: Tensor
    train_target: Tensor
    test_images: Tensor
    test_target: Tensor
    class_of_rank: Tensor  # the digit with the most training images first


def split_digits(images: Tensor, target: Tensor, profile: list[int], n_test: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    class_of_rank = torch.randperm(N_CLASSES, generator=generator)
    train, test = [], []
    for c, n_train in zip(class_of_rank.tolist(), profile, strict=True):
        members = (target == c).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        test.append(members[:n_test])
        train.append(members[n_test : n_test + n_train])
    train, test = torch.cat(train), torch.cat(test)
    return Split(images[train], target[train], images[test], target[test], class_of_rank)


def train(new_model: Callable[[], nn.Sequential], loss_fn: nn.Module, split: Split, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)  # every loss starts from the same weights
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, N_STEPS)
    for _ in range(N_STEPS):
        loss = loss_fn(model(split.train_images), split.train_target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def count_wrong(scores: Tensor, split: Split) -> list[int]:
    """Wrong predictions of each class, the most frequent class first."""
    wrong = scores.argmax(dim=1) != split.test_target
    return count_classes(split.test_target[wrong], N_CLASSES)[split.class_of_rank].tolist()


# ---- Metrics: sums of wrong predictions, (n_seeds, K) by class rank, divided once; in %, (n_seeds,)


def mean_error(wrong: np.ndarray, n_test: int, class_weight: np.ndarray) -> np.ndarray:
    if not class_weight.any():
        return np.full(len(wrong), np.nan)  # no class has no error, which is not an error of 0
    return 100 * (wrong * class_weight).sum(axis=1) / (n_test * class_weight.sum())


def balanced_error(wrong: np.ndarray, n_test: int) -> np.ndarray:
    return mean_error(wrong, n_test, np.ones(N_CLASSES))


def metrics(wrong: np.ndarray, n_test: int, profile: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "balanced_error": balanced_error(wrong, n_test),
        "top1_accuracy": 100 - 100 * wrong.sum(axis=1) / (n_test * N_CLASSES),
        "long_tailed_error": mean_error(wrong, n_test, profile),
        "many_error": mean_error(wrong, n_test, profile > 100),
        "medium_error": mean_error(wrong, n_test, (profile >= 20) & (profile <= 100)),
        "few_error": mean_error(wrong, n_test, profile < 20),
    }


def deviation(values: np.ndarray) -> np.ndarray:
    """Standard deviation over seeds, the first axis; one seed has none."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)


# ---- Output. `wrong[model][method]` is what the metrics take.

Wrong = dict[str, dict[str, np.ndarray]]


def format_table(wrong: Wrong, n_test: int, profile: np.ndarray) -> str:
    def show(value: float, width: int) -> str:
        return ("-" if np.isnan(value) else f"{value:.2f}").rjust(width)

    columns = "balanced error  top-1 accuracy  long-tailed error     many   medium      few"
    lines = []
    for model in MODELS:
        lines.append(f"{model:24} {columns}")
        for method in METHODS:
            values = metrics(wrong[model][method.name], n_test, profile)
            balanced, top1, *others = (float(value.mean()) for value in values.values())
            spread = float(deviation(values["balanced_error"]))
            lines.append(
                f"{method.name:24} {show(balanced, 6)} ± {show(spread, 5)}  {show(top1, 14)}  "
                + "  ".join(show(value, width) for value, width in zip(others, (17, 7, 7, 7), strict=True))
            )
        lines.append("")
    return "\n".join(lines)


# Okabe and Ito's colours, which colour-blind readers can tell apart; markers and dashes do the same in grey.
STYLES = [
    {"color": color, "marker": marker, "linestyle": linestyle}
    for color, marker, linestyle in zip(
        ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"),
        "osD^vPX",
        ("-", "--", "-.", ":", "-", "--", "-."),
        strict=True,
    )
]


def standard_error(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(deviation(values)) / len(values) ** 0.5  # one seed: bars of no height


def plot_error_by_rank(wrong: Wrong, n_test: int, profile: np.ndarray, title: str) -> Figure:
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, len(MODELS), sharey=True)
    for panel, model in zip(panels, MODELS, strict=True):
        for i, method in enumerate(METHODS):
            error = 100 * wrong[model][method.name] / n_test
            x = np.arange(N_CLASSES) + 0.12 * (i - (len(METHODS) - 1) / 2)  # so that no bar hides another
            style = STYLES[i % len(STYLES)] | {"label": method.name, "markersize": 5}
            panel.errorbar(x, error.mean(axis=0), standard_error(error), capsize=2, **style)
        panel.set_title(model)
        panel.set_xticks(range(N_CLASSES), [str(n_train) for n_train in profile])
        panel.set_xlabel("training images of the class, by class rank")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("error on held-out images (%)")
    panels[0].legend()
    figure.suptitle(title)
    return figure


def plot_error_against_tau(wrong: Wrong, n_test: int, title: str) -> Figure:
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, len(MODELS), sharey=True)
    for panel, model in zip(panels, MODELS, strict=True):
        erm = balanced_error(wrong[model][ERM.name], n_test).mean()
        panel.axhline(erm, color=STYLES[0]["color"], linewidth=1, label="ERM")
        for style, (name, curve) in zip(STYLES[1:], CURVES.items(), strict=False):
            taus = list(curve)
            errors = [balanced_error(wrong[model][method.name], n_test) for method in curve.values()]
            error = np.stack(errors, axis=1)  # (n_seeds, n_taus)
            mean, bar = error.mean(axis=0), standard_error(error)
            panel.plot(taus, mean, label=name, markersize=5, **style)
            panel.fill_between(taus, mean - bar, mean + bar, color=style["color"], alpha=0.2, linewidth=0)
        panel.axvline(1, color="0.5", linewidth=1, linestyle=":")  # where the method is Fisher-consistent
        panel.set_title(model)
        panel.set_xlabel("tau")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("balanced error on held-out images (%)")
    panels[0].legend(loc="lower left")
    figure.suptitle(title)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="number of repetitions (default: %(default)s)")
    parser.add_argument(
        "--imb-factor",
        type=float,
        default=0.02,
        help="training images of the rarest class over those of the most frequent one (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("digits_lt_results"),
        help="folder to write to (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    if not 0 < args.imb_factor <= 1:
        parser.error(f"--imb-factor must be in (0, 1], got {args.imb_factor:g}")

    pixels, digits = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels / 16).float()  # grey levels are 0 to 16
    target = torch.from_numpy(digits)
    n_smallest = int(count_classes(target, N_CLASSES).min())
    n_test = n_smallest // 2  # of each class
    n_max = n_smallest - n_test  # the most that every digit can give, because any of them may come first
    depth = [rank / (N_CLASSES - 1) for rank in range(N_CLASSES)]  # 0 at the head, 1 at the end of the tail
    profile = np.array([int(n_max * args.imb_factor**d) for d in depth])  # training images by class rank
    if profile.min() < 1:
        empty = ", ".join(str(rank + 1) for rank in np.flatnonzero(profile < 1))
        parser.error(
            f"--imb-factor must leave every class a training image, as 1 / {n_max} and more do, "
            f"got {args.imb_factor:g}, which leaves none to the class of rank {empty} of {N_CLASSES}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # fastest for matrices this small, and sums do not depend on the number of cores

    every_method = list(dict.fromkeys([*METHODS, *POST_HOC.values(), *LOSS.values()]))  # each once, in order
    every_loss = list(dict.fromkeys(method.loss for method in every_method))
    counted: dict[str, dict[str, list]] = {model: {m.name: [] for m in every_method} for model in MODELS}
    with tqdm(total=args.seeds * len(MODELS) * len(every_loss), desc="training", unit="model") as progress:
        for seed in range(args.seeds):
            split = split_digits(images, target, profile.tolist(), n_test, seed)
            class_counts = count_classes(split.train_target, N_CLASSES)
            log_prior = log_prior_from_counts(class_counts)
            for model, new_model in MODELS.items():
                trained = {}
                for loss in every_loss:
                    trained[loss] = train(new_model, loss(class_counts), split, seed)
                    progress.update()
                for method in every_method:
                    with torch.no_grad():
                        scores = method.scores(trained[method.loss], split.test_images, log_prior)
                    counted[model][method.name].append(count_wrong(scores, split))
    wrong = {model: {m.name: np.array(counted[model][m.name]) for m in every_method} for model in MODELS}

    title = f"Digits with {profile[0]} down to {profile[-1]} training images a class"
    over_seeds = f"over {args.seeds} seed" + ("s" if args.seeds > 1 else "")
    print(f"\n{title}, {n_test} held-out images of each: %, mean ± standard deviation {over_seeds}\n")
    print(format_table(wrong, n_test, profile))
    title = f"{title}: mean ± standard error {over_seeds}"
    plot_error_by_rank(wrong, n_test, profile, title).savefig(args.out / "error_by_rank.png", dpi=150)
    plot_error_against_tau(wrong, n_test, title).savefig(args.out / "balanced_error_by_tau.png", dpi=150)

    results = {
        model: {
            method.name: {"wrong_by_rank": wrong[model][method.name].tolist()}
            | {
                metric: [None if np.isnan(value) else value for value in by_seed.tolist()]  # JSON has no NaN
                for metric, by_seed in metrics(wrong[model][method.name], n_test, profile).items()
            }
            for method in every_method
        }
        for model in MODELS
    }
    report = {
        "settings": {
            "seeds": args.seeds,
            "imb_factor": args.imb_factor,
            "training_images_by_rank": profile.tolist(),
            "test_images_per_class": n_test,
            "optimizer": "SGD, cosine learning rate, full batch",
            "steps": N_STEPS,
            "learning_rate": LEARNING_RATE,
            "momentum": MOMENTUM,
            "weight_decay": WEIGHT_DECAY,
        },
        "versions": {
            "python": platform.python_version(),
            "fused_la": fused_la.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
            "matplotlib": matplotlib.__version__,
        },
        "table": [method.name for method in METHODS],
        "results": results,
    }
    (args.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"Written to {args.out}: error_by_rank.png, balanced_error_by_tau.png, results.json")


if __name__ == "__main__":
    main()
