"""A head whose classes are spread over ranks: time, memory and bytes of a step, and what a model makes of more ranks.

    python -m benchmarks.parallel
    python -m benchmarks.parallel --rows 4096 --features 512 --classes 8142 --ranks 1 2

Each rank is a process with one thread, on a CPU with gloo; a step is forward + backward of
`class_parallel_linear_logit_adjusted_cross_entropy` in float32, all ranks with the same features. Times are medians of
steps that all ranks begin together, of the slowest rank. Bytes are what a rank sends if collectives go around a ring:
(R - 1) times its part for a gather, 2 (R - 1) / R times the tensor for a sum.

The model is t(R) = products / R + bytes sent / bandwidth. The products' time is that of one rank, which sends nothing;
the bandwidth is that of a gather and a sum of the same sizes, timed alone. It is compared with the other measured R,
and then read at 10^7 classes for 8 and 64 ranks with the same processors and network: a calculation, not a measurement.
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

FAR = (8, 64)  # ranks of the calculation
FAR_CLASSES = 10_000_000


def slice_of(rank: int, n_ranks: int, n_classes: int) -> slice:
    return slice(n_classes * rank // n_ranks, n_classes * (rank + 1) // n_ranks)


class Sent:
    """Bytes that this rank sends in the collectives within."""

    GATHERS, SUMS = ("all_gather_single", "all_gather_into_tensor"), ("all_reduce",)

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __enter__(self) -> Sent:
        self._originals = {name: getattr(dist, name) for name in self.GATHERS + self.SUMS if hasattr(dist, name)}
        for name, original in self._originals.items():
            setattr(dist, name, partial(self._call, name, original))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _call(self, name: str, original: Callable[..., Any], *tensors: Any, **options: Any) -> Any:
        given = tensors[0] if name in self.SUMS else tensors[1]
        self.calls.append((name, given.numel() * given.element_size()))
        return original(*tensors, **options)

    def n_bytes(self, n_ranks: int) -> int:
        return round(sum(ring_bytes(name, size, n_ranks) for name, size in self.calls))


def ring_bytes(name: str, size: int, n_ranks: int) -> float:
    return size * (n_ranks - 1) * (2 / n_ranks if name in Sent.SUMS else 1)


def times_of(step: Callable[[], object], seconds: float) -> float:
    """The median of steps that all ranks begin together, at least five."""
    found: list[float] = []
    step()
    goes_on = torch.ones(1)
    while goes_on.item() > 0:
        dist.barrier()
        began = time.perf_counter()
        step()
        found.append(time.perf_counter() - began)
        goes_on.fill_(float(len(found) < 5 or sum(found) < seconds))
        dist.broadcast(goes_on, 0)
    return statistics.median(found)


def rank_main(rank: int, n_ranks: int, given: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks)
    generator = torch.Generator().manual_seed(0)
    counts = (1000 * torch.arange(1, given.classes + 1, dtype=torch.float64) ** -0.7).clamp_min(2).round()
    features = torch.randn(given.rows, given.features, generator=generator).requires_grad_()
    target = torch.randint(0, given.classes, (given.rows,), generator=generator)
    own = slice_of(rank, n_ranks, given.classes)
    weight = (torch.randn(own.stop - own.start, given.features) / given.features**0.5).requires_grad_()
    log_prior = log_prior_from_counts(counts)[own]

    def step() -> None:
        features.grad = weight.grad = None
        loss = distributed.class_parallel_linear_logit_adjusted_cross_entropy(features, weight, target, log_prior)
        loss.backward()

    seconds = times_of(step, given.seconds)
    features.grad = weight.grad = None
    dist.barrier()
    peak = peak_memory(step, "cpu")
    with Sent() as sent:
        step()
    buffers = [(name, torch.zeros(max(1, size // 4))) for name, size in sent.calls]

    def collectives() -> None:
        for name, buffer in buffers:
            if name in Sent.SUMS:
                dist.all_reduce(buffer)
            else:
                dist.all_gather([torch.empty_like(buffer) for _ in range(n_ranks)], buffer)

    found = {
        "seconds": seconds,
        "peak_bytes_beyond_gradients": None if peak is None else peak - 4 * (weight.numel() + features.numel()),
        "bytes_sent": sent.n_bytes(n_ranks),
        "collectives": sent.calls,
        "seconds_of_collectives": times_of(collectives, given.seconds / 4),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(n_ranks: int, given: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        start_processes(rank_main, (n_ranks, given, folder), n_ranks)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(n_ranks)]
    peaks = [of_rank["peak_bytes_beyond_gradients"] for of_rank in found]
    return {
        "ranks": n_ranks,
        "seconds": max(of_rank["seconds"] for of_rank in found),
        "peak_bytes_beyond_gradients": None if None in peaks else max(peaks),
        "bytes_sent": max(of_rank["bytes_sent"] for of_rank in found),
        "collectives": found[0]["collectives"],
        "seconds_of_collectives": max(of_rank["seconds_of_collectives"] for of_rank in found),
    }


def modelled(measured: list[dict[str, Any]], given: argparse.Namespace) -> list[dict[str, Any]]:
    """The model at the measured ranks and far beyond, from one rank's time and the collectives of the most ranks."""
    alone, last = measured[0], measured[-1]
    bandwidth = last["bytes_sent"] / last["seconds_of_collectives"]

    def at(n_ranks: int, n_classes: int) -> dict[str, Any]:
        sent = sum(ring_bytes(name, size, n_ranks) for name, size in last["collectives"])
        products = alone["seconds"] * n_classes / given.classes / n_ranks
        head = 4 * given.features * -(-n_classes // n_ranks)
        return {
            "ranks": n_ranks,
            "classes": n_classes,
            "seconds": products + (sent / bandwidth if n_ranks > 1 else 0.0),
            "bytes_sent": round(sent),
            "head_bytes": head,
        }

    near = [at(found["ranks"], given.classes) | {"measured_seconds": found["seconds"]} for found in measured]
    return near + [at(n_ranks, FAR_CLASSES) for n_ranks in FAR]


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
    given = parser.parse_args(arguments)
    if min(given.rows, given.features, given.classes, *given.ranks) < 1 or given.ranks[0] != 1:
        parser.error("--rows, --features, --classes and --ranks must be at least 1, and --ranks must begin with 1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    measured = [measure(n_ranks, given) for n_ranks in given.ranks]
    report = {
        "settings": {name: value for name, value in vars(given).items() if name != "out"},
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "measured": measured,
        "model": modelled(measured, given),
    }
    folder = given.out / slug(report["cpu"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date.today()}-parallel"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(report))
    print(table(report))
    print(f"Written to {path}.json and .md")


if __name__ == "__main__":
    main()
