"""Eager cross entropy and fused_la in turn, as a training script of its own would run them.

    python -m benchmarks.alternate

Every case runs in five processes with nothing else on their heaps, so that the C library does with the memory of a step
what it does in a plain script; how much it hands back to the system, and so how many page faults a step pays
for, differs from process to process. Both are checked against float64 on the same rows in another process. Printed: the
median over processes of each one's median of 31 alternating forward + backward passes, and the ratios from the lowest
to the highest.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.context import SpawnContext
from multiprocessing.queues import Queue

import torch

from benchmarks.bench_loss import CASES, Case, check_against_float64, eager, fused, make_inputs, step


def check(case: Case) -> None:
    logits, target, log_prior = make_inputs(case)
    logits.requires_grad_()
    for loss in (eager, fused):
        check_against_float64(loss, logits, target, log_prior)


def alternate(case: Case, results: Queue) -> None:
    logits, target, log_prior = make_inputs(case)
    logits.requires_grad_()
    seconds: dict[str, list[float]] = {"eager": [], "fused_la": []}
    for _ in range(34):
        for name, loss in (("eager", eager), ("fused_la", fused)):
            start = time.perf_counter()
            step(loss, logits, target, log_prior)
            seconds[name].append(time.perf_counter() - start)
    results.put([statistics.median(times[3:]) * 1e3 for times in seconds.values()])


def run(context: SpawnContext, function: Callable, *args: object) -> None:
    process = context.Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"{function.__name__} failed: {args[0]}")


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    context = multiprocessing.get_context("spawn")
    results: Queue = context.Queue()
    for case in CASES:
        run(context, check, case)
        medians = []
        for _ in range(5):
            run(context, alternate, case, results)
            medians.append(results.get())
        eager_ms, fused_ms = (statistics.median(times) for times in zip(*medians, strict=True))
        ratios = sorted(one / other for one, other in medians)
        print(
            f"{case!s:20} eager {eager_ms:7.2f} ms, fused_la {fused_ms:6.2f} ms, "
            f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
