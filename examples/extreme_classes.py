"""Train a head of 10^5 to 10^6 long-tailed classes without storing all its logits, on one process or several.

    python examples/extreme_classes.py                                       # 100,000 classes, a minute on a CPU
    python examples/extreme_classes.py --classes 1000000 --steps 10
    torchrun --nproc_per_node=2 examples/extreme_classes.py                  # half of the classes on each

The features are Gaussians of standard deviation 1 whose means are known: class c = i * p + j, species j of genus i, has
the mean m_c = (a_i + b_j) / sqrt(2) with standard normal a and b. Counts fall from 1000 to 2 by a power law. The head
with weights m_c and biases -|m_c|^2 / 2 gives the log density of each class up to a term that all classes share. It has
the least logit-adjusted loss and the least balanced error: it is the optimum in the table.

Training starts from a head of zeros, whose loss is that of guessing by the prior. It uses Adam on batches drawn by the
prior. An epoch over so many classes would take too long: the table says how far a few steps come. The loss is measured
on fresh features of the training distribution, the balanced error on features of classes drawn uniformly. Under
torchrun every rank holds a slice of the classes, their optimizer state and their prior, and all ranks see the same
batches. The losses are those of one process, up to rounding. A run writes extreme_classes.json and extreme_classes.png
to --out.
"""

import argparse
import contextlib
import ctypes
import io
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn  # if an optimizer imported it later, it would keep the group and its threads to the end
from matplotlib.figure import Figure  # not pyplot, because it looks for a display
from torch import Tensor
from tqdm import trange

from fused_la import distributed, linear_logit_adjusted_cross_entropy, log_prior_from_counts


class GaussianMixture(NamedTuple):
    """The data: means and frequencies of the classes, each a Gaussian of standard deviation 1."""

    log_prior: Tensor  # (C,) of all classes
    genus: Tensor  # (p, D)
    species: Tensor  # (p, D)
    device: torch.device

    def means(self, classes: Tensor) -> Tensor:
        p = len(self.species)
        return (self.genus[classes // p] + self.species[classes % p]) / math.sqrt(2)

    def draw(self, classes: Tensor, generator: torch.Generator) -> Tensor:
        means = self.means(classes)
        return means + torch.randn(means.shape, generator=generator, device=self.device)


def power_law_counts(n_classes: int) -> Tensor:
    return (1000 * torch.arange(1, n_classes + 1, dtype=torch.float64) ** -0.7).clamp_min(2).round().long()


def make_mixture(n_classes: int, n_features: int, device: torch.device) -> GaussianMixture:
    generator = torch.Generator(device).manual_seed(0)
    p = math.isqrt(n_classes - 1) + 1
    genus, species = (torch.randn(p, n_features, generator=generator, device=device) for _ in range(2))
    log_prior = log_prior_from_counts(power_law_counts(n_classes)).to(device)
    return GaussianMixture(log_prior, genus, species, device)


def optimal_head(means: Tensor) -> tuple[Tensor, Tensor]:
    """The head m . h - |m|^2 / 2: the log density of each class at h, up to a term that all classes share."""
    return means, -0.5 * means.square().sum(1)


def loss_of(
    mixture: GaussianMixture, shard: slice, features: Tensor, weight: Tensor, bias: Tensor, target: Tensor
) -> Tensor:
    if not dist.is_initialized():
        return linear_logit_adjusted_cross_entropy(features, weight, target, mixture.log_prior, bias=bias)
    return distributed.class_parallel_linear_logit_adjusted_cross_entropy(
        features, weight, target, mixture.log_prior[shard], bias=bias
    )


@torch.no_grad()
def balanced_error(shard: slice, features: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> float:
    """The error on classes drawn uniformly. Each rank finds the best class of its shard; the best over ranks counts."""
    best = torch.full((len(features),), -math.inf, device=features.device)
    classes = torch.zeros_like(target)
    for start in range(0, len(weight), 16384):
        chunk = slice(start, start + 16384)
        value, index = torch.addmm(bias[chunk], features, weight[chunk].T).max(1)
        classes = torch.where(value > best, index + shard.start + start, classes)
        best = torch.maximum(best, value)
    if dist.is_initialized():
        values = [torch.empty_like(best) for _ in range(dist.get_world_size())]
        rank_classes = [torch.empty_like(classes) for _ in values]
        dist.all_gather(values, best)
        dist.all_gather(rank_classes, classes)
        classes = torch.stack(rank_classes).gather(0, torch.stack(values).argmax(0, keepdim=True))[0]
    return (classes != target).double().mean().item()


class PeakMemory:
    """Peak memory from construction on, beyond what was allocated then: of the GPU, or of the process on Linux."""

    def __init__(self, device: torch.device):
        self._before: int | None
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system, so that using it again counts
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self._before = process_memory("VmRSS")

    def peak(self) -> int | None:
        before = self._before
        peak = torch.cuda.max_memory_allocated() if self._on_gpu else process_memory("VmHWM")
        return None if peak is None or before is None else peak - before


def process_memory(name: str) -> int | None:
    """A field of /proc/self/status in bytes, such as VmRSS; None if the system has no such file."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return 1024 * int(dict(line.split(":", 1) for line in status.read_text().splitlines())[name].split()[0])


def run(args: argparse.Namespace, rank: int, n_ranks: int, device: torch.device) -> dict:
    bounds = [args.classes * r // n_ranks for r in range(n_ranks + 1)]
    shard = slice(bounds[rank], bounds[rank + 1])
    mixture = make_mixture(args.classes, args.features, device)
    generator = torch.Generator(device).manual_seed(2**40)
    cumulative = mixture.log_prior.double().exp().cumsum(0)

    def batch(n: int) -> tuple[Tensor, Tensor]:
        drawn = torch.rand(n, generator=generator, device=device, dtype=torch.float64) * cumulative[-1]
        classes = torch.searchsorted(cumulative, drawn).clamp_max(args.classes - 1)
        return mixture.draw(classes, generator), classes

    prior_sample = batch(args.eval)
    uniform_classes = torch.randint(0, args.classes, (args.eval,), generator=generator, device=device)
    uniform_sample = mixture.draw(uniform_classes, generator), uniform_classes

    def evaluate(weight: Tensor, bias: Tensor) -> dict[str, float]:
        with torch.no_grad():
            loss = loss_of(mixture, shard, prior_sample[0], weight, bias, prior_sample[1]).item()
        return {
            "loss": loss,
            "balanced_error": balanced_error(shard, uniform_sample[0], weight, bias, uniform_sample[1]),
        }

    results = {"optimum": evaluate(*optimal_head(mixture.means(torch.arange(shard.start, shard.stop, device=device))))}
    weight = torch.zeros(shard.stop - shard.start, args.features, device=device, requires_grad=True)
    bias = torch.zeros(shard.stop - shard.start, device=device, requires_grad=True)
    results["start"] = evaluate(weight, bias)
    optimizer = torch.optim.Adam([weight, bias], lr=args.lr, fused=True)

    losses, seconds, peak = [], [], None
    for _ in trange(args.steps, desc="training", unit="step", disable=rank > 0):
        features, target = batch(args.batch)
        optimizer.zero_grad()
        # Measured in the first step: evaluation has already loaded everything that is loaded once.
        memory = None if losses else PeakMemory(device)
        began = time.perf_counter()
        loss = loss_of(mixture, shard, features, weight, bias, target)
        loss.backward()
        losses.append(loss.item())  # waits for a GPU
        seconds.append(time.perf_counter() - began)
        peak = peak if memory is None else memory.peak()
        optimizer.step()
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of step {len(losses)} is {losses[-1]}")
    results["trained"] = evaluate(weight, bias)
    gradients = 4 * (weight.numel() + bias.numel())
    return {
        "settings": vars(args) | {"out": str(args.out), "ranks": n_ranks, "device": str(device)},
        "torch": torch.__version__,
        "results": results,
        "losses": losses,
        "seconds_per_step": sorted(seconds)[len(seconds) // 2],
        "classes_of_rank_0": shard.stop - shard.start,
        "head_bytes": gradients,
        "peak_bytes_beyond_gradients": None if peak is None else peak - gradients,
        "whole_logits_bytes": 4 * args.batch * (shard.stop - shard.start),
    }


def plot(report: dict) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(report["losses"]) + 1), report["losses"], color="0.6", linewidth=1, label="batches")
    steps = (0, len(report["losses"]))
    axes.plot(steps, [report["results"][name]["loss"] for name in ("start", "trained")], "o-", label="fresh features")
    axes.axhline(report["results"]["optimum"]["loss"], color="black", linestyle=":", label="optimum")
    axes.set_xlabel("step")
    axes.set_ylabel("logit-adjusted loss")
    axes.set_title(f"{report['settings']['classes']:,} classes")
    axes.legend()
    return figure


def print_report(report: dict) -> None:
    settings, megabyte = report["settings"], 1e6
    shape = f"{settings['classes']:,} classes, {settings['features']} features, batches of {settings['batch']}"
    print(f"\n{shape}, {settings['ranks']} process{'es' * (settings['ranks'] > 1)} on {settings['device']}\n")
    print(f"{'':8} {'loss':>8} {'balanced error':>15}")
    for name in ("start", "trained", "optimum"):
        result = report["results"][name]
        print(f"{name:8} {result['loss']:8.4f} {100 * result['balanced_error']:14.2f}%")
    logits_mb = report["whole_logits_bytes"] / megabyte
    print(f"\na step (forward + backward)          {report['seconds_per_step']:8.2f} s")
    print(f"head of this process, as its gradient {report['head_bytes'] / megabyte:7.0f} MB")
    peak = report["peak_bytes_beyond_gradients"]
    print(f"peak beyond head and gradient         {'unknown' if peak is None else f'{peak / megabyte:7.0f} MB'}")
    print(f"eager PyTorch: logits, their log-softmax and its gradient at once: 3 x {logits_mb:.0f} MB")


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # stdout may be ASCII, and --out may be any name
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    positive = {"type": int, "metavar": "N"}
    parser.add_argument("--classes", default=100_000, help="(default: %(default)s)", **positive)
    parser.add_argument("--features", default=64, help="(default: %(default)s)", **positive)
    parser.add_argument("--batch", default=1024, help="examples of a step (default: %(default)s)", **positive)
    parser.add_argument("--steps", default=100, help="(default: %(default)s)", **positive)
    parser.add_argument("--eval", default=2000, help="examples of each evaluation (default: %(default)s)", **positive)
    parser.add_argument("--lr", type=float, default=0.03, help="of Adam (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("extreme_classes_results"), help="(default: %(default)s)")
    args = parser.parse_args()
    for name in ("features", "batch", "steps", "eval"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    n_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if args.classes < max(2, n_ranks):
        parser.error(f"--classes must be at least {max(2, n_ranks)}, got {args.classes}")

    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if n_ranks > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        rank = dist.get_rank() if n_ranks > 1 else 0
        report = run(args, rank, n_ranks, device)
        if rank == 0:
            print_report(report)
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "extreme_classes.json").write_text(json.dumps(report, indent=1) + "\n")
            plot(report).savefig(args.out / "extreme_classes.png", dpi=80)
            print(f"Written to {args.out}: extreme_classes.png, extreme_classes.json")
    finally:
        if n_ranks > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
