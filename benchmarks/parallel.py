"""A head whose classes are spread over ranks: time, memory and bytes sent, measured and modelled for more ranks.

    python -m benchmarks.parallel
    python -m benchmarks.parallel --rows 4096 --features 512 --classes 8142 --ranks 1 2

Each rank is a process with one thread, on a CPU with gloo. A step is forward + backward of
`class_parallel_linear_logit_adjusted_cross_entropy` in float32; all ranks have the same features. All ranks begin a
step together; times are medians over steps, of the slowest rank. Bytes are what a rank sends if collectives go around
a ring: (R - 1) times its own tensor for a gather, 2 (R - 1) / R times the tensor for a sum.

The model is t(R) = products / R + bytes sent / bandwidth. The products' time is that of one rank, which sends nothing.
The bandwidth is that of the step's collectives at the same sizes, timed alone. The model is compared with the other
measured R. Its values at 10^7 classes for 8 and 64 ranks, with the same processors and network, are calculated, not
measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from benchmarks.timing.clocks import peak_memory
from benchmarks.timing.machine import cpu_name, slug
from fused_la import distributed, log_prior_from_counts

MODEL_RANKS = (8, 64)  # ranks of the model beyond those measured
MODEL_CLASSES = 10_000_000


def shard_slice(rank: int, n_ranks: int, n_classes: int) -> slice:
    return slice(n_classes * rank // n_ranks, n_classes * (rank + 1) // n_ranks)


class CollectiveRecorder:
    """Records the collectives of this rank in a context, and the bytes it sends in them."""

    GATHERS, SUMS = ("all_gather_single", "all_gather_into_tensor"), ("all_reduce",)

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __enter__(self) -> CollectiveRecorder:
        self._originals = {name: getattr(dist, name) for name in self.GATHERS + self.SUMS if hasattr(dist, name)}
        for name, original in self._originals.items():
            setattr(dist, name, partial(self._call, name, original))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _call(self, name: str, original: Callable[..., Any], *tensors: Any, **options: Any) -> Any:
        local = tensors[0] if name in self.SUMS else tensors[1]
        self.calls.append((name, local.numel() * local.element_size()))
        return original(*tensors, **options)

    def n_bytes(self, n_ranks: int) -> int:
        return round(sum(ring_bytes(name, size, n_ranks) for name, size in self.calls))


def ring_bytes(name: str, size: int, n_ranks: int) -> float:
    return size * (n_ranks - 1) * (2 / n_ranks if name in CollectiveRecorder.SUMS else 1)


def median_seconds(step: Callable[[], object], seconds: float) -> float:
    """Median seconds of at least five steps that all ranks begin together."""
    found: list[float] = []
    step()
    keep_going = torch.ones(1)
    while keep_going.item() > 0:
        dist.barrier()
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
        keep_going.fill_(float(len(found) < 5 or sum(found) < seconds))
        dist.broadcast(keep_going, 0)
    return statistics.median(found)


def rank_main(rank: int, n_ranks: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks)
    generator = torch.Generator().manual_seed(0)
    counts = (1000 * torch.arange(1, options.classes + 1, dtype=torch.float64) ** -0.7).clamp_min(2).round()
    features = torch.randn(options.rows, options.features, generator=generator).requires_grad_()
    target = torch.randint(0, options.classes, (options.rows,), generator=generator)
    local_classes = shard_slice(rank, n_ranks, options.classes)
    weight = (
        torch.randn(local_classes.stop - local_classes.start, options.features) / options.features**0.5
    ).requires_grad_()
    log_prior = log_prior_from_counts(counts)[local_classes]

    def step() -> None:
        features.grad = weight.grad = None
        loss = distributed.class_parallel_linear_logit_adjusted_cross_entropy(features, weight, target, log_prior)
        loss.backward()

    seconds = median_seconds(step, options.seconds)
    features.grad = weight.grad = None
    dist.barrier()
    peak = peak_memory(step, "cpu")
    with CollectiveRecorder() as sent:
        step()
    buffers = [(name, torch.zeros(max(1, size // 4))) for name, size in sent.calls]

    def collectives() -> None:
        for name, buffer in buffers:
            if name in CollectiveRecorder.SUMS:
                dist.all_reduce(buffer)
            else:
                dist.all_gather([torch.empty_like(buffer) for _ in range(n_ranks)], buffer)

    found = {
        "seconds": seconds,
        "peak_bytes_beyond_gradients": None if peak is None else peak - 4 * (weight.numel() + features.numel()),
        "bytes_sent": sent.n_bytes(n_ranks),
        "collectives": sent.calls,
        "seconds_of_collectives": median_seconds(collectives, options.seconds / 4),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(n_ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        start_processes(rank_main, (n_ranks, options, folder), n_ranks)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(n_ranks)]
    peaks = [rank_result["peak_bytes_beyond_gradients"] for rank_result in found]
    return {
        "ranks": n_ranks,
        "seconds": max(rank_result["seconds"] for rank_result in found),
        "peak_bytes_beyond_gradients": None if None in peaks else max(peaks),
        "bytes_sent": max(rank_result["bytes_sent"] for rank_result in found),
        "collectives": found[0]["collectives"],
        "seconds_of_collectives": max(rank_result["seconds_of_collectives"] for rank_result in found),
    }


def model(measured: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The model at the measured ranks and at FAR ones, from one rank's time and the collectives of the most ranks."""
    alone, last = measured[0], measured[-1]
    bandwidth = last["bytes_sent"] / last["seconds_of_collectives"]

    def predict(n_ranks: int, n_classes: int) -> dict[str, Any]:
        sent = sum(ring_bytes(name, size, n_ranks) for name, size in last["collectives"])
        products = alone["seconds"] * n_classes / options.classes / n_ranks
        head = 4 * options.features * -(-n_classes // n_ranks)
        return {
            "ranks": n_ranks,
            "classes": n_classes,
            "seconds": products + (sent / bandwidth if n_ranks > 1 else 0.0),
            "bytes_sent": round(sent),
            "head_bytes": head,
        }

    measured_points = [
        predict(found["ranks"], options.classes) | {"measured_seconds": found["seconds"]} for found in measured
    ]
    return measured_points + [predict(n_ranks, MODEL_CLASSES) for n_ranks in MODEL_RANKS]


def table(report: dict[str, Any]) -> str:
    shape = "{rows} x {features} x {classes}".format(**report["settings"])
    lines = [
        f"# Classes over ranks: {shape} (rows, features, classes), float32, {report['cpu']}, one thread a rank, gloo",
        "",
        "| ranks | forward + backward | peak beyond head and gradients | sent by a rank | collectives alone |",
        "|---|---|---|---|---|",
    ]
    for found in report["measured"]:
        peak = found["peak_bytes_beyond_gradients"]
        lines.append(
            f"| {found['ranks']} | {1e3 * found['seconds']:.0f} ms | "
            f"{'unknown' if peak is None else f'{peak / 1e6:.0f} MB'} | {found['bytes_sent'] / 1e6:.2f} MB | "
            f"{1e3 * found['seconds_of_collectives']:.1f} ms |"
        )
    lines += [
        "",
        "The model, t(R) = products / R + bytes sent / bandwidth; beyond the measured ranks a calculation:",
        "",
        "| ranks | classes | modelled | measured | head of a rank | sent by a rank |",
        "|---|---|---|---|---|---|",
    ]
    for point in report["model"]:
        took = f"{1e3 * point['measured_seconds']:.0f} ms" if "measured_seconds" in point else "-"
        lines.append(
            f"| {point['ranks']} | {point['classes']:,} | {1e3 * point['seconds']:.0f} ms | {took} | "
            f"{point['head_bytes'] / 1e6:.0f} MB | {point['bytes_sent'] / 1e6:.2f} MB |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=(__doc__ or "").split("\n\n")[0])
    for name, default in (("rows", 256), ("features", 512), ("classes", 100_000)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="R", help="1 first (default: 1 2)")
    parser.add_argument("--seconds", type=float, default=10.0, help="to spend on each figure (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="(default: results/ here)")
    options = parser.parse_args(arguments)
    if min(options.rows, options.features, options.classes, *options.ranks) < 1 or options.ranks[0] != 1:
        parser.error("--rows, --features, --classes and --ranks must be at least 1, and --ranks must begin with 1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    measured = [measure(n_ranks, options) for n_ranks in options.ranks]
    report = {
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "measured": measured,
        "model": model(measured, options),
    }
    folder = options.out / slug(report["cpu"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date.today()}-parallel"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(report))
    print(table(report))
    print(f"Written to {path}.json and .md")


if __name__ == "__main__":
    main()
