"""One provider on one case: checked against float64, then timed. Every figure is a record of its own."""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.timing import clocks
from benchmarks.timing.cases import MODES, Batch, Case, head_flops, least_bytes, make_batch
from benchmarks.timing.check import BLOCK, EXACT, Errors, allowed, errors
from benchmarks.timing.clocks import Step
from benchmarks.timing.providers import PROVIDERS, Provider, UnavailableError, as_they_are, baseline, folded

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One provider on one case, as it goes to a process of its own."""

    case: Case
    provider: str
    device: str
    cache_bytes: int  # of the GPU's level-2 cache
    memory: tuple[str, ...] = ("held",)  # states of a CPU's memory
    modes: tuple[str, ...] = MODES
    seconds: float = 1.0
    check: bool = True
    time: bool = True

    def record(self, status: str, reason: str = "", **figures: Any) -> Record:
        return {
            "provider": self.provider,
            "case": str(self.case),
            "rows": self.case.n_rows,
            "classes": self.case.n_classes,
            "features": self.case.n_features,
            "dtype": self.case.dtype,
            "target": self.case.target,
            "status": status,
            "reason": reason,
            **figures,
        }


class GpuBrokenError(Exception):
    """The process cannot use its GPU any more."""


def bytes_needed(case: Case, provider: Provider, device: str, check: bool = True) -> int:
    """An upper bound of the memory of a step and its check, by what each provider allocates."""
    elements = case.n_rows * case.n_classes
    others = baseline(case).buffers if device == "cpu" else 0  # which runs in turn there
    buffers = 4 * elements * max(provider.buffers, others)
    targets = 4 * elements if case.target == "soft" else 0
    if case.n_features:
        size = case.torch_dtype.itemsize
        inputs = 3 * size * (case.n_classes + case.n_rows) * (case.n_features + 64)  # folded too, and gradients
        exact = (24 * elements + 8 * BLOCK[device] * 4) if check else 0
        return inputs + buffers + targets + exact
    kept = 2 if provider.inputs is as_they_are else 4  # logits and gradient; folded logits, for the check too
    exact = 8 * max(BLOCK[device], case.n_classes) * 6 if check else 0
    return kept * case.logits_bytes + buffers + targets + exact


def make_step(provider: Provider, case: Case, batch: Batch, device: str) -> Step:
    leaves = provider.inputs(batch.leaves, batch.log_prior)
    originals = None
    if provider.overwrites:
        originals, leaves = leaves, tuple(leaf.clone() for leaf in leaves)
    leaves = tuple(leaf.detach().requires_grad_(provider.is_loss) for leaf in leaves)
    return Step(provider.load(case, device), leaves, batch, originals, case.upstream)


def check(provider: Provider, case: Case, batch: Batch, step: Step, device: str) -> tuple[Record, str]:
    """Its errors, and what is wrong with them, "" if nothing is."""
    has_offset = provider.inputs is as_they_are
    # The input that it gets: the raw logits and the offset, or the folded ones.
    own = batch.leaves if has_offset else folded(batch.leaves, batch.log_prior)
    offset = batch.log_prior if has_offset else None

    def errors_of(step: Step, provider: Provider) -> tuple[Errors, Errors]:
        step.reset()
        evaluated = step.forward()
        step.reset()
        value = step.both()
        gradients = [leaf.grad for leaf in step.leaves if leaf.grad is not None]
        if len(gradients) != len(step.leaves):
            raise RuntimeError("an input has no gradient")
        gradients = provider.gradients(gradients, case)
        for loss in (evaluated, value):
            if loss.shape != ():
                raise RuntimeError(f"the loss has shape {tuple(loss.shape)}")
        found = errors(own, offset, batch, value, gradients, step.upstream)
        exact = value.double() / (1 + found.loss)  # close enough for the loss of evaluation
        apart = float((evaluated.double() - value.double()).abs() / exact.abs())
        of_folding = EXACT
        if not has_offset:
            of_folding = errors(batch.leaves, batch.log_prior, batch, value, gradients, step.upstream)
        step.reset()
        return found._replace(loss=found.loss + apart), of_folding

    of_eager = EXACT
    if case.n_features and provider is not baseline(case):
        of_eager, _ = errors_of(make_step(baseline(case), case, batch, device), baseline(case))
    found, of_folding = errors_of(step, provider)
    limits = allowed(case.torch_dtype, provider.rounds_loss, of_eager)
    record = {
        "loss_error": found.loss,
        "gradient_error": found.gradient,
        "row_error": found.row,
        "folding_error": None if has_offset else of_folding.gradient,
    }
    wrong = [
        f"{name} is off by {error:.2g} of itself, more than {limit:.2g}"
        for name, error, limit in zip(("loss", "gradient", "gradient of a row"), found, limits, strict=True)
        if not error <= limit  # NaN is wrong too
    ]
    return record, "; ".join(wrong)


def measure(job: Job, provider: Provider | None = None) -> Iterator[Record]:
    """Records of a job. What fails is a record too; only an unusable GPU raises."""
    provider = provider or PROVIDERS[job.provider]
    reason = provider.reason_against(job.case, job.device)
    if reason:
        yield job.record("not available", reason)
        return
    needed, free = bytes_needed(job.case, provider, job.device, job.check), clocks.free_memory(job.device)
    if needed > free:
        yield job.record("skipped", f"needs {needed:,} bytes, {free:,} are free", bytes_needed=needed)
        return
    try:
        batch = make_batch(job.case, job.device)
        step = make_step(provider, job.case, batch, job.device)
        checked: Record = {}
        if job.check and provider.is_loss:
            checked, wrong = check(provider, job.case, batch, step, job.device)
            if wrong:
                yield job.record("wrong", wrong, **checked)
                return
            if not job.time:
                yield job.record("checked", **checked)
    except UnavailableError as error:
        yield job.record("not available", str(error))
        return
    except ImportError as error:
        yield job.record("not available", f"not installed, or not for this device: {error}")
        return
    except Exception as error:
        yield failure(job, error)
        _raise_if_broken(job.device)
        return
    if not job.time:
        return
    for setting in settings(job, provider):
        try:
            yield job.record("timed", **setting, **figures(job, step, provider, **setting), **checked)
        except Exception as error:
            step.reset()
            yield failure(job, error, **setting)
            if setting["timer"] == "graph":
                raise GpuBrokenError("a capture that failed may leave the allocator in a state of its own") from error
            _raise_if_broken(job.device)


def settings(job: Job, provider: Provider) -> list[dict[str, str]]:
    """What is timed: on a CPU every mode as it is and both together in other states of memory, on a GPU every mode by
    device events, and where the logits fit in the cache both together by the clock and as a CUDA graph."""
    modes = job.modes if provider.is_loss else ("both",)
    if job.device == "cpu":
        return [
            {"mode": mode, "timer": "alternating", "memory": memory}
            for memory in job.memory
            for mode in modes
            if (memory == job.memory[0] or mode == "both") and (memory != "returned" or clocks.can_return_memory())
        ]
    timers = ("events", "wall", "graph") if job.case.logits_bytes < job.cache_bytes else ("events",)
    return [
        {"mode": mode, "timer": timer, "memory": ""}
        for timer in timers
        for mode in modes
        if timer == "events" or mode == "both"
    ]


def figures(job: Job, step: Step, provider: Provider, mode: str, timer: str, memory: str) -> Record:
    prepare, run = step.mode(mode)
    found: Record = {}
    if job.device == "cpu":
        eager = make_step(baseline(job.case), job.case, step.batch, job.device)
        times, eager_times = clocks.alternating_times(step, eager, mode, job.seconds, memory)
        found["eager_ms"] = statistics.median(eager_times)
    else:
        flush = clocks.cache_flush(job.cache_bytes) if timer != "wall" else (lambda: None)
        if timer == "graph":
            replay = clocks.captured(step)
            # Resetting puts overwritten inputs back; it must leave the gradient that the graph writes.
            prepare, run = (step.restore, lambda _: replay())
        rounds = clocks.n_rounds(lambda: (run(prepare()), flush()), job.seconds / 3, job.device)
        if timer == "wall":
            times = clocks.wall_times(prepare, run, rounds)
        else:
            times = clocks.device_times(prepare, run, flush, rounds)
    found |= clocks.summary(times)
    if job.case.n_features:
        found["tflop_per_s"] = head_flops(job.case, mode) / found["ms"] / 1e9
    else:
        found["gb_per_s"] = least_bytes(job.case, mode) / found["ms"] / 1e6
    step.reset()
    if mode != "backward" and timer in ("alternating", "events") and memory != "returned":
        found["peak_bytes"] = clocks.peak_memory(lambda: run(prepare()), job.device)
    step.reset()
    return found


def failure(job: Job, error: BaseException, **settings: Any) -> Record:
    text = "".join(traceback.format_exception(error))
    last = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {last[0] if last else ''}"
    return job.record("failed", reason, traceback=text, **settings)


def _raise_if_broken(device: str) -> None:
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.zeros(1, device="cuda").add_(1).item()
    except Exception as error:
        raise GpuBrokenError(str(error)) from error
