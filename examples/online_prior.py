"""Train on a stream whose class frequencies drift and to which classes come: the prior is counted as it goes.

    python examples/online_prior.py

The stream is scikit-learn's 8x8 digits (no download), drawn with replacement. It begins with four of the ten digits;
the others come two at a time, and each time the head grows and `RunningPrior.add_classes` follows. All the while the
frequencies drift: that of class c at step t is proportional to exp(2.5 cos(2 pi (t / 700 + c / 10))), so that the most
frequent class is up to 150 times as frequent as the rarest, and the rarest becomes the most frequent in turn.

Three losses see the same stream: plain cross entropy; the logit-adjusted loss with the prior of the first 100 steps,
where classes that come later have no examples, only the pseudocount; and the logit-adjusted loss with the log prior
that `RunningPrior.update` returns at every step. What is printed is the balanced error, in %, on test images of the
classes that have come: before each arrival, at the end, and its mean over evaluations every 50 steps.
"""

import argparse
import math
import statistics

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fused_la import logit_adjusted_cross_entropy
from fused_la.prior import RunningPrior

N_CLASSES, FIRST, ADDED, BATCH, TESTED = 10, 4, 2, 32, 50
PERIOD, FIXED_AFTER = 700, 100  # steps
METHODS = ("cross entropy", "adjusted, prior of the start", "adjusted, running prior")


def grow(head: nn.Linear, n: int) -> nn.Linear:
    """A head with n more outputs; the first ones keep their weights."""
    grown = nn.Linear(head.in_features, head.out_features + n)
    with torch.no_grad():
        grown.weight[: head.out_features] = head.weight
        grown.bias[: head.out_features] = head.bias
    return grown


class Learner:
    """A network with a head that grows, trained by SGD, and the prior of what it has seen."""

    def __init__(self, method: str, seed: int):
        torch.manual_seed(seed)
        self.method = method
        self.trunk, self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, FIRST)
        self.prior = RunningPrior(FIRST, decay=0.98)
        self.optimizer = self.new_optimizer()

    def new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([*self.trunk.parameters(), *self.head.parameters()], lr=0.1)  # has no state to lose

    def add_classes(self, n: int) -> None:
        self.head = grow(self.head, n)
        self.prior.add_classes(n)
        self.optimizer = self.new_optimizer()

    def step(self, images: Tensor, target: Tensor, step: int) -> None:
        is_counted = self.method != "adjusted, prior of the start" or step < FIXED_AFTER
        log_prior = self.prior.update(target) if is_counted else self.prior.log_prior
        logits = self.head(self.trunk(images))
        if self.method == "cross entropy":
            loss = F.cross_entropy(logits, target)
        else:
            loss = logit_adjusted_cross_entropy(logits, target, log_prior)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def balanced_error(self, images: Tensor, target: Tensor) -> float:
        """In %, over the classes that have come; each has the same number of test images, so no class weighs more."""
        seen = target < self.head.out_features
        predicted = self.head(self.trunk(images[seen])).argmax(1)
        return 100.0 * (predicted != target[seen]).float().mean().item()


def run(seed: int, n_steps: int) -> tuple[list[int], dict[str, list[float]], dict[str, float]]:
    """The numbers of classes, and of each method the balanced errors before they change and the mean of all."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16.0
    members = [(labels == c).nonzero().flatten() for c in torch.randperm(N_CLASSES, generator=generator).tolist()]
    members = [indices[torch.randperm(len(indices), generator=generator)] for indices in members]  # by order of arrival
    test_images = images[torch.cat([indices[:TESTED] for indices in members])]
    test_target = torch.arange(N_CLASSES).repeat_interleave(TESTED)

    learners = [Learner(method, seed) for method in METHODS]
    n_classes, n_parts = FIRST, 1 + (N_CLASSES - FIRST) // ADDED
    part_ends = {n_steps * part // n_parts for part in range(1, n_parts + 1)}
    numbers, errors, evaluated = [], {method: [] for method in METHODS}, {method: [] for method in METHODS}
    for step in range(n_steps):
        frequency = torch.tensor(
            [math.exp(2.5 * math.cos(2 * math.pi * (step / PERIOD + c / N_CLASSES))) for c in range(n_classes)]
        )
        target = torch.multinomial(frequency, BATCH, replacement=True, generator=generator)
        drawn = [members[c][torch.randint(TESTED, len(members[c]), (), generator=generator)] for c in target.tolist()]
        batch = images[torch.stack(drawn)]
        for learner in learners:
            learner.step(batch, target, step)
        if (step + 1) % 50 == 0 or step + 1 in part_ends:
            for learner in learners:
                error = learner.balanced_error(test_images, test_target)
                evaluated[learner.method].append(error)
                if step + 1 in part_ends:
                    errors[learner.method].append(error)
        if step + 1 in part_ends:
            numbers.append(n_classes)
            if n_classes < N_CLASSES:
                n_classes += ADDED
                for learner in learners:
                    learner.add_classes(ADDED)
    return numbers, errors, {method: statistics.mean(values) for method, values in evaluated.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of the stream (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="streams (default: %(default)s)")
    args = parser.parse_args()
    if args.steps < 4 or args.seeds < 1:
        parser.error(f"--steps must be at least 4 and --seeds at least 1, got {args.steps} and {args.seeds}")
    torch.set_num_threads(1)  # more cost time with a network and batches this small
    runs = [run(seed, args.steps) for seed in range(args.seeds)]
    print(f"balanced error in %, mean of {args.seeds} streams of {args.steps} steps\n")
    print(f"{'classes':30}" + "".join(f"{n:8}" for n in runs[0][0]) + f"{'mean':>10}")
    for method in METHODS:
        columns = zip(*(errors[method] for _, errors, _ in runs), strict=True)
        mean = statistics.mean(means[method] for _, _, means in runs)
        print(f"{method:30}" + "".join(f"{statistics.mean(column):8.1f}" for column in columns) + f"{mean:10.1f}")


if __name__ == "__main__":
    main()
