"""Losses built on the rows of the logit-adjusted loss: focal and generalized cross entropy, adjusted for the prior.

    python examples/row_losses.py

With `reduction="none"` the logit-adjusted loss is -log p of each row, where p = softmax(f + tau * log pi)_y is the
adjusted probability of the label. So every function of p is one of these rows, and autograd has its gradient:

    p = exp(-rows)    1 - p = -expm1(-rows)    1 - p^q = -expm1(-q * rows)

Where p is near 1, `expm1` keeps the digits that `1 - exp(-rows)` loses. The script trains both losses on long-tailed
digits, beside cross entropy and the logit-adjusted loss, and prints their balanced errors.

Sources: Lin et al., "Focal loss for dense object detection", ICCV 2017; Zhang and Sabuncu, "Generalized cross entropy
loss for training deep neural networks with noisy labels", NeurIPS 2018; Menon et al., ICLR 2021, equation 10.
"""

import argparse
import functools
import statistics

import torch
import torch.nn.functional as F
from loops import digits
from torch import Tensor

from fused_la import log_prior_from_counts, logit_adjusted_cross_entropy


def adjusted_focal_loss(
    logits: Tensor, target: Tensor, log_prior: Tensor, tau: float = 1.0, gamma: float = 2.0, *,
    ignore_index: int = -100, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """The mean of (1 - p)^gamma * (-log p) over the rows that count, gamma >= 0."""
    rows = logit_adjusted_cross_entropy(
        logits, target, log_prior, tau, ignore_index=ignore_index, reduction="none", impl=impl
    )
    rows = rows.clamp_min(torch.finfo(rows.dtype).tiny)  # at 0 the derivative of a power below 1 is infinite
    losses = (-torch.expm1(-rows)) ** gamma * rows
    return losses.sum() / (target != ignore_index).sum()


def adjusted_generalized_cross_entropy(
    logits: Tensor, target: Tensor, log_prior: Tensor, tau: float = 1.0, q: float = 0.7, *,
    ignore_index: int = -100, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """The mean of (1 - p^q) / q over the rows that count, 0 < q <= 1."""
    rows = logit_adjusted_cross_entropy(
        logits, target, log_prior, tau, ignore_index=ignore_index, reduction="none", impl=impl
    )
    losses = -torch.expm1(-q * rows) / q
    return losses.sum() / (target != ignore_index).sum()


# The gradient of generalized cross entropy is p^q times that of -log p, and p of a rare class starts near its prior:
# with q = 0.7, as in the paper on balanced data, rare classes are hardly learned.
LOSSES = {
    "cross entropy": lambda logits, target, log_prior: F.cross_entropy(logits, target),
    "logit-adjusted": logit_adjusted_cross_entropy,
    "focal, adjusted": adjusted_focal_loss,
    "generalized cross entropy, adjusted": functools.partial(adjusted_generalized_cross_entropy, q=0.3),
}


def train(loss_of, data: digits.Digits, seed: int, epochs: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model, log_prior = digits.network(), log_prior_from_counts(data.class_counts)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_labels)).split(32):
            loss = loss_of(model(data.train_images[batch]), data.train_labels[batch], log_prior)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many times to train (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=60, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # more cost time with a network and batches this small
    for name, loss_of in LOSSES.items():
        data = [digits.load(seed) for seed in range(args.seeds)]
        errors = [digits.balanced_error(train(loss_of, d, s, args.epochs), d) for s, d in enumerate(data)]
        spread = f" ± {statistics.stdev(errors):.1f}" if len(errors) > 1 else ""
        print(f"{name}: balanced error {statistics.mean(errors):.1f}{spread} % over {len(errors)} seeds", flush=True)


if __name__ == "__main__":
    main()
