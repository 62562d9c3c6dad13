"""Clocks and memory meters for one step on a GPU or a CPU.

On a GPU: `device_times` uses device events, with the level-2 cache filled with other data; `wall_times` lasts from the
call until the device has finished, with caches as the last step left them; a CUDA graph's replay uses device events.

On a CPU: `alternating_times` runs a step of eager cross entropy before each timed step. Much of a step is page faults
if the C library has returned the memory of the last step to the system, which depends on what else is on the heap. So
there are two states: "held" is the process as it is; "returned" calls `malloc_trim` (glibc) before every step, so that
a step pays for each page that it touches. "fresh" is a process with nothing else on its heap.
"""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing.cases import Batch
from benchmarks.timing.providers import Loss

MIN_ROUNDS, MAX_ROUNDS = 5, 101


@dataclass
class Step:
    """A loss with its inputs, which can run many times."""

    loss: Loss
    leaves: tuple[Tensor, ...]  # they require grad
    batch: Batch
    originals: tuple[Tensor, ...] | None = None  # copies of the leaves, if the loss overwrites them
    upstream: float = 1.0  # upstream gradient of the loss

    def restore(self) -> None:
        """Restore the inputs that the loss overwrites."""
        for leaf, original in zip(self.leaves, self.originals or (), strict=False):
            leaf.detach().copy_(original)

    def reset(self) -> None:
        """Return to the state before the first run. Gradients go too: they may share memory with overwritten inputs."""
        for leaf in self.leaves:
            leaf.grad = None
        self.restore()

    def value(self) -> Tensor:
        """The loss, with its graph for backward."""
        return self.loss(self.leaves, self.batch)

    def forward(self) -> Tensor:
        """The loss alone, as in evaluation: no input requires grad."""
        return self.loss([leaf.detach() for leaf in self.leaves], self.batch)

    def both(self) -> Tensor:
        value = self.value()
        if value.requires_grad:  # a provider that is no loss has no gradient
            self.backward(value)
        return value.detach()

    def backward(self, value: Tensor) -> None:
        value.backward(None if self.upstream == 1.0 else torch.full_like(value, self.upstream))

    def mode(self, mode: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
        """(prepare, run) of a mode: each timed run(prepared) follows an untimed prepared = prepare()."""

        def prepare_backward() -> Tensor:
            self.reset()
            return self.value()

        return {
            "forward": (self.reset, lambda _: self.forward()),
            "backward": (prepare_backward, self.backward),
            "both": (self.reset, lambda _: self.both()),
        }[mode]


def n_rounds(one_round: Callable[[], object], seconds: float, device: str) -> int:
    """An odd number of rounds that take about `seconds`, estimated from the second of two warm-up rounds."""
    one_round()
    synchronize(device)
    start = time.perf_counter()
    one_round()
    synchronize(device)
    rounds = int(seconds / (time.perf_counter() - start))
    return min(max(rounds, MIN_ROUNDS), MAX_ROUNDS) | 1


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# GPU ------------------------------------------------------------------------------------------------------------------


def device_times(
    prepare: Callable[[], Any], run: Callable[[Any], object], flush: Callable[[], object], rounds: int
) -> list[float]:
    """Milliseconds between device events around each run."""
    events = []
    for _ in range(rounds):
        prepared = prepare()
        flush()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(prepared)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def wall_times(
    prepare: Callable[[], Any], run: Callable[[Any], object], rounds: int, device: str = "cuda"
) -> list[float]:
    """Milliseconds from the begin of each run until the device has finished."""
    times = []
    for _ in range(rounds):
        prepared = prepare()
        synchronize(device)
        start = time.perf_counter()
        run(prepared)
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def cache_flush(cache_bytes: int) -> Callable[[], object]:
    """A function that reads 4 times the level-2 cache, which then holds clean lines of other data."""
    buffer = torch.zeros(max(4 * cache_bytes, 2**28) // 4, device="cuda")
    return buffer.amax


def captured(step: Step) -> Callable[[], object]:
    """Capture forward and backward as a CUDA graph; returns its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step.reset()
            step.both()
    torch.cuda.current_stream().wait_stream(stream)
    step.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.both()
    return graph.replay


# CPU ------------------------------------------------------------------------------------------------------------------


def can_return_memory() -> bool:
    return hasattr(ctypes.CDLL(None), "malloc_trim")


def return_memory() -> None:
    """Return all free memory to the system."""
    ctypes.CDLL(None).malloc_trim(0)


def alternating_times(
    step: Step, eager: Step, mode: str, seconds: float, memory: str
) -> tuple[list[float], list[float]]:
    """Milliseconds of each run of the step, and of the eager run before it."""

    def timed_run(measured_step: Step) -> float:
        prepare, run = measured_step.mode(mode)
        measured_step.reset()
        if memory == "returned":
            return_memory()
        prepared = prepare()
        if memory == "returned":
            return_memory()
        start = time.perf_counter()
        run(prepared)
        elapsed = (time.perf_counter() - start) * 1e3
        del prepared
        measured_step.reset()
        return elapsed

    rounds = n_rounds(lambda: (timed_run(eager), timed_run(step)), seconds, "cpu")
    pairs = [(timed_run(eager), timed_run(step)) for _ in range(rounds)]
    return [pair[1] for pair in pairs], [pair[0] for pair in pairs]


# Both -----------------------------------------------------------------------------------------------------------------


def copy_bandwidth(device: str, n_bytes: int, flush: Callable[[], object] = lambda: None) -> float:
    """GB/s of copying one tensor into another, counting bytes read and bytes written."""
    source = torch.zeros(n_bytes // 4, device=device)
    destination = torch.zeros_like(source)

    def copy(_: object) -> Tensor:
        return destination.copy_(source)

    for _ in range(3):
        copy(None)
    if device == "cuda":
        times = device_times(lambda: None, copy, flush, 21)
    else:
        times = wall_times(lambda: None, copy, 21, device)
    return 2 * n_bytes / statistics.median(times) / 1e6


def free_memory(device: str) -> int:
    """Free bytes of the device, or of the machine for a CPU."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    available = re.search(r"MemAvailable: *(\d+) kB", _read_text("/proc/meminfo"))
    return int(available[1]) * 1024 if available else 2**62  # unknown


def peak_memory(run: Callable[[], object], device: str) -> int | None:
    """Peak bytes of one run above those before it, gradients included; None if they cannot be measured.

    On a GPU these are the bytes that PyTorch's allocator gave out. On a CPU all free memory is returned to the system
    first, and the result is the growth of the resident set to the peak that Linux records.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        return_memory()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _resident_bytes("VmRSS")
        run()
        return _resident_bytes("VmHWM") - before
    except (AttributeError, OSError, TypeError):
        return None


def _resident_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", _read_text("/proc/self/status"))
    assert found is not None
    return int(found[1]) * 1024


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles in milliseconds, and the number of rounds."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"ms": median, "ms_low": low, "ms_high": high, "rounds": len(times)}
