"""What the loops of this folder share: long-tailed digits, a small network, and the comparison that each ends with.

The data are scikit-learn's 8x8 scans of handwritten digits (no download): 100 down to 3 training images a class, 50
test images of each. Every loop defines

    train(criterion, digits, seed, max_steps) -> (model, losses)

which trains as its library does, with any criterion, and returns the loss of every step (a loop may add gradient
norms). `main` calls it with plain cross entropy and with the logit-adjusted loss on the same seeds and prints the
balanced error of both; with `--check` it compares these values of a few steps with those of the formula
`F.cross_entropy(logits.float() + log_prior, target)`.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fused_la import count_classes
from fused_la.metrics import BalancedError

N_CLASSES, MOST, FEWEST, TESTED = 10, 100, 3, 50
TOLERANCE = 1e-5  # relative to the loss of a step


class Digits(NamedTuple):
    """Images (n, 1, 8, 8) float32 in [0, 1], and labels (n,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def class_counts(self) -> Tensor:
        return count_classes(self.train_labels, N_CLASSES)


def load(seed: int) -> Digits:
    """Long-tailed training images and balanced test images; the seed decides which digit is how frequent."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(images).float().div(16.0).view(-1, 1, 8, 8), torch.from_numpy(labels).long()
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for rank, digit in enumerate(torch.randperm(N_CLASSES, generator=generator).tolist()):
        members = (labels == digit).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        test.append(members[:TESTED])
        train.append(members[TESTED : TESTED + round(MOST * (FEWEST / MOST) ** (rank / (N_CLASSES - 1)))])
    of_train, of_test = torch.cat(train), torch.cat(test)
    return Digits(images[of_train], labels[of_train], images[of_test], labels[of_test])


def save_images(digits: Digits, folder: str) -> None:
    """Write the training images as `folder/train/<digit>/<number>.png`, as image folders lie on a disk."""
    for number, (image, label) in enumerate(zip(digits.train_images, digits.train_labels.tolist(), strict=True)):
        path = Path(folder, "train", str(label), f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].mul(255.0).round().to(torch.uint8).numpy()).save(path)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(),
        nn.Linear(64, N_CLASSES),
    )  # fmt: skip


class Formula(nn.Module):
    """The logit-adjusted loss as people write it by hand, with which `--check` compares."""

    log_prior: Tensor

    def __init__(self, class_counts: Tensor, **options: Any):
        super().__init__()
        log_prior = (class_counts.double() / class_counts.sum()).log().float()
        self.register_buffer("log_prior", log_prior, persistent=False)
        self.options = options

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.float() + self.log_prior, target, **self.options)


Criterion = Callable[..., Any]
Train = Callable[..., tuple[Any, list[float]]]


def grad_norm(model: nn.Module) -> float:
    """The norm of all gradients; beside losses it shows a gradient that is wrong by a factor, which Adam would hide."""
    return float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


@torch.no_grad()
def balanced_error(model: Callable[[Tensor], Tensor], digits: Digits) -> float:
    """The mean over classes of the error on test images, in %; by the raw logits."""
    metric = BalancedError(digits.class_counts)
    metric.update(model(digits.test_images).float().cpu(), digits.test_labels)
    return 100.0 * float(metric.compute()["balanced_error"])


def main(
    loop: str,
    train: Train,
    adjusted: Criterion,
    plain: Callable[[], Any] = nn.CrossEntropyLoss,
    formula: Criterion = Formula,
    class_counts: Callable[[Digits], Tensor] = lambda digits: digits.class_counts,
    flags: dict[str, str] | None = None,
) -> None:
    """Compare balanced errors, or with `--check` losses.

    `adjusted` and `formula` make criteria from class counts, which `class_counts` takes from the library's data set.
    `flags` are switches of the command line, name: help; `train` gets each as a keyword argument, True or False.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="how many times to train (default: 3)")
    parser.add_argument("--check", action="store_true", help="compare the losses of a few steps with the formula's")
    for name, help in (flags or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=help)
    args = parser.parse_args()
    torch.set_num_threads(1)  # in networks this small, threads mostly wait for each other
    train = functools.partial(train, **{name: getattr(args, name) for name in flags or {}})
    is_first = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
    if args.check:
        digits = load(0)
        counts = class_counts(digits)
        if not torch.equal(counts, digits.class_counts):
            sys.exit(f"{loop}: class counts {counts.tolist()} differ from the digits', {digits.class_counts.tolist()}")
        (_, losses), (_, expected) = (train(make(counts), digits, 0, 6) for make in (adjusted, formula))
        if not losses or len(losses) != len(expected):
            sys.exit(f"{loop}: {len(losses)} losses, {len(expected)} of the formula")
        worst = max(abs(one - two) / abs(two) for one, two in zip(losses, expected, strict=True))
        if is_first:
            print(f"{loop}: {len(losses)} values, {losses[0]:.6f} to {losses[-1]:.6f}, at most {worst:.1e} apart")
        if not worst <= TOLERANCE:
            sys.exit(f"{loop}: losses {losses} differ from the formula's, {expected}")
        return
    errors: dict[str, list[float]] = {"cross entropy": [], "logit-adjusted": []}
    for seed in range(args.seeds):
        digits = load(seed)
        for name, criterion in (("cross entropy", plain()), ("logit-adjusted", adjusted(class_counts(digits)))):
            model, _ = train(criterion, digits, seed, None)
            errors[name].append(balanced_error(model, digits))
    if is_first:
        for name, values in errors.items():
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            print(f"{loop}, {name}: balanced error {statistics.mean(values):.1f}{spread} % over {len(values)} seeds")
