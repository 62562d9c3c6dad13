"""Time of forward, and of forward + backward, of each provider on a GPU, in order of value.

Many rows (logits of 4 times the level-2 cache): by device events, the cache filled with other data. 256 rows: forward +
backward as a CUDA graph, by device events; by the clock until the device has finished; and "host", the microseconds in
which Python hands a step to the device, without waiting for it. The lower quartile of steps in short batches, with the
device idle before each batch, so that no step waits for room in its queue.

Rows that the package keeps on the chip are timed a second time as it streams longer ones.

Providers, inputs, the check against float64 and the timers are those of `python -m benchmarks`. On a CPU stand-ins take
the place of the device's timers: they show that all of this runs, and measure nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.timing import clocks, measure
from benchmarks.timing.cases import BIG, Case, least_bytes, make_batch, with_rows
from benchmarks.timing.clocks import Step
from benchmarks.timing.providers import PROVIDERS, Provider, UnavailableError

Record = dict[str, Any]
OURS = "fused_la triton"
STREAMED = "fused_la, streaming"
FIRST = (OURS, STREAMED, "eager", "torch.compile")
PEERS = ("Liger-Kernel", "QuACK")
COMPILED = (OURS, STREAMED, "torch.compile", *PEERS)  # worth compiling beforehand
CLASSES = ((8142, 8192), (131072, 1000, 32768))  # in order of value
FEW_ROWS = 256
STEPS_IN_QUEUE = 8  # a step is a few launches; a queue holds about a thousand


@dataclass(frozen=True)
class Clock:
    """The timers of a device, by the names they have in `timing`."""

    device_times: Callable[..., list[float]]
    cache_flush: Callable[[int], Callable[[], object]]
    captured: Callable[[Step], Callable[[], object]]


def clock_times(
    prepare: Callable[[], Any], run: Callable[[Any], object], flush: Callable[[], object], rounds: int
) -> list[float]:
    return clocks.wall_times(lambda: (prepare(), flush())[0], run, rounds, "cpu")


CLOCKS = {
    "cuda": Clock(clocks.device_times, clocks.cache_flush, clocks.captured),
    "cpu": Clock(clock_times, lambda cache_bytes: lambda: None, lambda step: step.both),
}


def host_times(step: Step, batches: int, device: str) -> list[float]:
    """Milliseconds of the calls of each step; what precedes a step in `Step.reset` is not counted."""
    times = []
    for _ in range(batches):
        clocks.synchronize(device)
        for _ in range(STEPS_IN_QUEUE):
            step.reset()
            start = time.perf_counter()
            step.both()
            times.append((time.perf_counter() - start) * 1e3)
    clocks.synchronize(device)
    return times


@contextlib.contextmanager
def streaming() -> Iterator[None]:
    """Rows of any length are streamed within."""
    launch: Any = importlib.import_module("fused_la._triton.launch_config")
    passes: Any = importlib.import_module("fused_la._triton.loss")
    row_bytes = launch.ROW_BYTES
    launch.ROW_BYTES = 0
    passes.plan.cache_clear()
    try:
        yield
    finally:
        launch.ROW_BYTES = row_bytes
        passes.plan.cache_clear()


def is_resident(case: Case) -> bool:
    """Whether the package keeps its rows on the chip, if they are many."""
    launch = importlib.import_module("fused_la._triton.launch_config")
    return case.n_classes * case.torch_dtype.itemsize <= launch.ROW_BYTES


@dataclass(frozen=True)
class CopyJob:
    """The device's own copy, which all bandwidths are compared with."""

    device: str
    cache_bytes: int

    def record(self, status: str, reason: str = "", **figures: Any) -> Record:
        return {"provider": "copy", "status": status, "reason": reason, **figures}

    def run(self) -> Iterator[Record]:
        size = min(2**30 if self.device == "cuda" else 2**24, clocks.free_memory(self.device) // 8)
        flush = CLOCKS[self.device].cache_flush(self.cache_bytes)
        yield self.record("timed", gb_per_s=clocks.copy_bandwidth(self.device, size, flush), bytes=size)


@dataclass(frozen=True)
class SpeedJob(measure.Job):
    """One provider on one case, of many rows or of few; with time=False it is compiled and checked only."""

    few: bool = False

    def run(self) -> Iterator[Record]:
        with streaming() if self.provider == STREAMED else contextlib.nullcontext():
            yield from self.records()

    def records(self) -> Iterator[Record]:
        provider = PROVIDERS[OURS if self.provider == STREAMED else self.provider]
        if self.device == "cpu" and provider.name == OURS:
            provider = replace(provider, not_on={})  # in Triton's interpreter
        reason = provider.reason_against(self.case, self.device)
        if reason:
            yield self.record("not available", reason)
            return
        needed, free = measure.bytes_needed(self.case, provider, self.device), clocks.free_memory(self.device)
        if needed > free:
            yield self.record("skipped", f"needs {needed:,} bytes, {free:,} are free")
            return
        checked: Record = {}
        try:
            step = measure.make_step(provider, self.case, make_batch(self.case, self.device), self.device)
            checked, wrong = measure.check(provider, self.case, step.batch, step, self.device)
        except (UnavailableError, ImportError) as error:
            yield self.record("not available", f"not installed, or not for this device: {error}")
            return
        except Exception as error:
            yield measure.failure(self, error)
            measure._raise_if_broken(self.device)
            return
        if wrong or not self.time:
            yield self.record("wrong" if wrong else "checked", wrong, **checked)
            return
        for mode, timer in self.figures_wanted():
            try:
                figures = self.figure(step, provider, mode, timer)
            except Exception as error:
                step.reset()
                yield measure.failure(self, error, mode=mode, timer=timer)
                if timer == "graph":  # the allocator may be in a state of its own
                    raise measure.GpuBrokenError(str(error)) from error
                measure._raise_if_broken(self.device)
                continue
            yield self.record("timed", mode=mode, timer=timer, **figures, **checked)

    def figures_wanted(self) -> tuple[tuple[str, str], ...]:
        """Mode and timer; a capture, which may break the process, last."""
        if not self.few:
            return (("both", "events"), ("forward", "events"))
        return (("both", "host"), ("both", "wall"), ("both", "graph"))

    def figure(self, step: Step, provider: Provider, mode: str, timer: str) -> Record:
        clock = CLOCKS[self.device]
        prepare, run = step.mode(mode)
        rounds = clocks.n_rounds(lambda: run(prepare()), self.seconds / 3, self.device)
        if timer == "host":
            return clocks.summary(host_times(step, 1 + rounds // STEPS_IN_QUEUE, self.device))
        if timer == "wall":
            return clocks.summary(clocks.wall_times(prepare, run, rounds, self.device))
        if timer == "graph":
            replay = clock.captured(step)
            prepare, run = (step.restore, lambda _: replay())  # the graph writes the gradient that is there
        times = clock.device_times(prepare, run, clock.cache_flush(self.cache_bytes), rounds)
        found = clocks.summary(times)
        found["gb_per_s"] = least_bytes(self.case, mode) / found["ms"] / 1e6
        if timer == "events":
            step.reset()
            found["peak_bytes"] = clocks.peak_memory(lambda: run(prepare()), self.device)
        step.reset()
        return found


def jobs(cache_bytes: int, dtypes: Sequence[str] = ("bfloat16", "float32")) -> list[SpeedJob]:
    """In order of value: the first numbers of classes before the others, this package and PyTorch before the peers."""
    return [
        SpeedJob(with_rows(Case(rows, c, dtype), cache_bytes), provider, "cuda", cache_bytes, seconds=0.6, few=rows > 0)
        for dtype in dtypes
        for classes in CLASSES
        for providers in (FIRST, PEERS)
        for rows in (BIG, FEW_ROWS)
        for c in classes
        for provider in providers
        if provider != STREAMED or (rows == BIG and is_resident(Case(rows, c, dtype)))
    ]


def jobs_without_a_gpu() -> list[SpeedJob]:
    """Tiny ones for a CPU: each kind of figure, and each reason for none."""
    return [
        SpeedJob(Case(rows, 37, "bfloat16"), provider, "cpu", 0, seconds=0.01, few=few)
        for rows, few in ((7, False), (5, True))
        for provider in (*FIRST, *PEERS)
    ]
