"""Speed jobs of `benchmarks.on_gpu`: forward, and forward + backward, of each provider, the most valuable first.

Many rows (logits of 4 times the level-2 cache) are timed by device events, with the cache filled with other data. 256
rows are timed in three ways, forward + backward: as a CUDA graph by device events; by wall time until the device has
finished; and as "host", the time in which Python launches a step without waiting for the device. "host" is the lower
quartile of steps in short batches; the device is idle before each batch, so that no step waits for room in the queue.

Rows that the package keeps on the chip are timed a second time with the kernel that streams longer rows.

Providers, inputs, the check against float64 and the timers are those of `python -m benchmarks`. On a CPU stand-ins
replace the device's timers: they show that this code runs, and measure nothing.
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
MAIN_PROVIDERS = (OURS, STREAMED, "eager", "torch.compile")
PEERS = ("Liger-Kernel", "QuACK")
COMPILED_PROVIDERS = (OURS, STREAMED, "torch.compile", *PEERS)  # compiled and checked before anything is timed
CLASSES = ((8142, 8192), (131072, 1000, 32768))  # in order of value
FEW_ROWS = 256
STEPS_IN_QUEUE = 8  # a step is a few launches; a queue holds about a thousand


@dataclass(frozen=True)
class Clock:
    """The timers of a device, named as in `clocks`."""

    device_times: Callable[..., list[float]]
    cache_flush: Callable[[int], Callable[[], object]]
    captured: Callable[[Step], Callable[[], object]]


def cpu_times(
    prepare: Callable[[], Any], run: Callable[[Any], object], flush: Callable[[], object], rounds: int
) -> list[float]:
    return clocks.wall_times(lambda: (prepare(), flush())[0], run, rounds, "cpu")


CLOCKS = {
    "cuda": Clock(clocks.device_times, clocks.cache_flush, clocks.captured),
    "cpu": Clock(cpu_times, lambda cache_bytes: lambda: None, lambda step: step.both),
}


def host_times(step: Step, batches: int, device: str) -> list[float]:
    """Milliseconds in which the host makes the calls of each step; `Step.reset` is not counted."""
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
    """Within this context rows of any length are streamed."""
    launch_config: Any = importlib.import_module("fused_la._triton.launch_config")
    loss_module: Any = importlib.import_module("fused_la._triton.loss")
    row_bytes = launch_config.RESIDENT_ROW_BYTES
    launch_config.RESIDENT_ROW_BYTES = 0
    loss_module.plan_launches.cache_clear()
    try:
        yield
    finally:
        launch_config.RESIDENT_ROW_BYTES = row_bytes
        loss_module.plan_launches.cache_clear()


def is_resident(case: Case) -> bool:
    """Whether the package keeps rows of this length on the chip, if there are many rows."""
    launch_config = importlib.import_module("fused_la._triton.launch_config")
    return case.n_classes * case.torch_dtype.itemsize <= launch_config.RESIDENT_ROW_BYTES


@dataclass(frozen=True)
class CopyJob:
    """Measures the bandwidth of the device's copy, which all other bandwidths are compared with."""

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
    """One provider on one case of many rows or `few`; with time=False it is only compiled and checked."""

    few: bool = False

    def run(self) -> Iterator[Record]:
        with streaming() if self.provider == STREAMED else contextlib.nullcontext():
            yield from self.records()

    def records(self) -> Iterator[Record]:
        provider = PROVIDERS[OURS if self.provider == STREAMED else self.provider]
        if self.device == "cpu" and provider.name == OURS:
            provider = replace(provider, not_on={})  # runs in Triton's interpreter
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
            measure.raise_if_gpu_broken(self.device)
            return
        if wrong or not self.time:
            yield self.record("wrong" if wrong else "checked", wrong, **checked)
            return
        for mode, timer in self.modes_and_timers():
            try:
                figures = self.figure(step, provider, mode, timer)
            except Exception as error:
                step.reset()
                yield measure.failure(self, error, mode=mode, timer=timer)
                if timer == "graph":  # a failed capture may leave the allocator unusable
                    raise measure.GpuBrokenError(str(error)) from error
                measure.raise_if_gpu_broken(self.device)
                continue
            yield self.record("timed", mode=mode, timer=timer, **figures, **checked)

    def modes_and_timers(self) -> tuple[tuple[str, str], ...]:
        """(mode, timer) pairs to time. A graph capture may break the process, so it comes last."""
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
            prepare, run = (step.restore, lambda _: replay())  # no `reset`: the graph writes the gradients that exist
        times = clock.device_times(prepare, run, clock.cache_flush(self.cache_bytes), rounds)
        found = clocks.summary(times)
        found["gb_per_s"] = least_bytes(self.case, mode) / found["ms"] / 1e6
        if timer == "events":
            step.reset()
            found["peak_bytes"] = clocks.peak_memory(lambda: run(prepare()), self.device)
        step.reset()
        return found


def jobs(cache_bytes: int, dtypes: Sequence[str] = ("bfloat16", "float32")) -> list[SpeedJob]:
    """All jobs, the most valuable first: the first tuple of CLASSES before the second, FIRST before PEERS."""
    return [
        SpeedJob(with_rows(Case(rows, c, dtype), cache_bytes), provider, "cuda", cache_bytes, seconds=0.6, few=rows > 0)
        for dtype in dtypes
        for classes in CLASSES
        for providers in (MAIN_PROVIDERS, PEERS)
        for rows in (BIG, FEW_ROWS)
        for c in classes
        for provider in providers
        if provider != STREAMED or (rows == BIG and is_resident(Case(rows, c, dtype)))
    ]


def dry_run_jobs() -> list[SpeedJob]:
    """Tiny jobs for a CPU: every kind of figure, and every reason why there is none."""
    return [
        SpeedJob(Case(rows, 37, "bfloat16"), provider, "cpu", 0, seconds=0.01, few=few)
        for rows, few in ((7, False), (5, True))
        for provider in (*MAIN_PROVIDERS, *PEERS)
    ]
