"""Time and memory of one step.

On a GPU: `device_times`, by device events with the level-2 cache holding something else; `wall_times`, from the call
until the device has finished, caches as the last step left them; and a CUDA graph's replay by device events.

On a CPU: `alternating_times`, a step of eager cross entropy before each one that is timed. Much of a step there is page
faults, if the C library has handed the memory of the last step back to the system. It does or does not by what else is
on the heap, so both states are made: "held" as the process happens to be, "returned" with `malloc_trim` (glibc) before
every step, so that a step pays for each page that it touches. "fresh" is a process with nothing else on its heap.
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
    """A loss with its inputs, to be run again and again."""

    loss: Loss
    leaves: tuple[Tensor, ...]  # they require grad
    batch: Batch
    originals: tuple[Tensor, ...] | None = None  # of leaves that the loss overwrites
    upstream: float = 1.0  # what backward begins with

    def restore(self) -> None:
        """Put back what the loss overwrites."""
        for leaf, original in zip(self.leaves, self.originals or (), strict=False):
            leaf.detach().copy_(original)

    def reset(self) -> None:
        """As it was before the first run: without gradients, which may share memory with overwritten inputs."""
        for leaf in self.leaves:
            leaf.grad = None
        self.restore()

    def value(self) -> Tensor:
        """The loss with what its gradient needs."""
        return self.loss(self.leaves, self.batch)

    def forward(self) -> Tensor:
        """The loss alone, as in evaluation: no input requires grad."""
        return self.loss([leaf.detach() for leaf in self.leaves], self.batch)

    def both(self) -> Tensor:
        value = self.value()
        if value.requires_grad:  # not where it is a yardstick
            self.backward(value)
        return value.detach()

    def backward(self, value: Tensor) -> None:
        value.backward(None if self.upstream == 1.0 else torch.full_like(value, self.upstream))

    def mode(self, mode: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
        """What precedes each timed run of a mode, and the run, of what that returned."""

        def prepare_backward() -> Tensor:
            self.reset()
            return self.value()

        return {
            "forward": (self.reset, lambda _: self.forward()),
            "backward": (prepare_backward, self.backward),
            "both": (self.reset, lambda _: self.both()),
        }[mode]


def n_rounds(one_round: Callable[[], object], seconds: float, device: str) -> int:
    """An odd number of rounds for this time, by the second of two, which warm up too."""
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
    """Milliseconds from each call until the device has finished."""
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
    """Reads 4 times the level-2 cache, so that it holds clean lines of other data."""
    buffer = torch.zeros(max(4 * cache_bytes, 2**28) // 4, device="cuda")
    return buffer.amax


def captured(step: Step) -> Callable[[], object]:
    """Forward and backward as a CUDA graph; replays it."""
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
    """Hand all free memory back to the system."""
    ctypes.CDLL(None).malloc_trim(0)


def alternating_times(
    step: Step, eager: Step, mode: str, seconds: float, memory: str
) -> tuple[list[float], list[float]]:
    """Milliseconds of each run, and of the run of eager cross entropy before each."""

    def one(which: Step) -> float:
        prepare, run = which.mode(mode)
        which.reset()
        if memory == "returned":
            return_memory()
        prepared = prepare()
        if memory == "returned":
            return_memory()
        start = time.perf_counter()
        run(prepared)
        elapsed = (time.perf_counter() - start) * 1e3
        del prepared
        which.reset()
        return elapsed

    rounds = n_rounds(lambda: (one(eager), one(step)), seconds, "cpu")
    pairs = [(one(eager), one(step)) for _ in range(rounds)]
    return [pair[1] for pair in pairs], [pair[0] for pair in pairs]


# Both -----------------------------------------------------------------------------------------------------------------


def copy_bandwidth(device: str, n_bytes: int, flush: Callable[[], object] = lambda: None) -> float:
    """GB/s of one tensor copied into another, bytes read and bytes written."""
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
    """Bytes."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    available = re.search(r"MemAvailable: *(\d+) kB", _read("/proc/meminfo"))
    return int(available[1]) * 1024 if available else 2**62  # unknown


def peak_memory(run: Callable[[], object], device: str) -> int | None:
    """Bytes of one run beyond what was there before, its gradients included; None where it cannot be told.

    On a GPU what PyTorch's allocator handed out. On a CPU the growth of the resident set, all free memory having been
    returned to the system, by the peak that Linux keeps.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        return_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _resident("VmRSS")
        run()
        return _resident("VmHWM") - before
    except (AttributeError, OSError, TypeError):
        return None


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", _read("/proc/self/status"))
    assert found is not None
    return int(found[1]) * 1024


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median, lower and upper quartile in milliseconds, and how many they are of."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"ms": median, "ms_low": low, "ms_high": high, "rounds": len(times)}
