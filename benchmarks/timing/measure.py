"""Measure one provider on one case: check it against float64, then time it. Each figure is one record."""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.timing import clocks
from benchmarks.timing.cases import MODES, Batch, Case, head_flops, least_bytes, make_batch
from benchmarks.timing.check import BLOCK, EXACT, Errors, error_limits, errors
from benchmarks.timing.clocks import Step
from benchmarks.timing.providers import PROVIDERS, Provider, UnavailableError, baseline, fold_offset, unchanged_inputs

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One provider on one case, as it is sent to a worker process."""

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
    """The process can no longer use its GPU."""


def bytes_needed(case: Case, provider: Provider, device: str, check: bool = True) -> int:
    """An upper bound of the memory of a step and its check, from the provider's `buffers`."""
    elements = case.n_rows * case.n_classes
    eager_buffers = baseline(case).buffers if device == "cpu" else 0  # eager runs in turn on a CPU
    buffers = 4 * elements * max(provider.buffers, eager_buffers)
    targets = 4 * elements if case.target == "soft" else 0
    if case.n_features:
        size = case.torch_dtype.itemsize
        inputs = 3 * size * (case.n_classes + case.n_rows) * (case.n_features + 64)  # inputs, folded inputs, gradients
        exact = (24 * elements + 8 * BLOCK[device] * 4) if check else 0
        return inputs + buffers + targets + exact
    n_copies = (
        2 if provider.inputs is unchanged_inputs else 4
    )  # logits and gradient; also folded logits, for step and check
    exact = 8 * max(BLOCK[device], case.n_classes) * 6 if check else 0
    return n_copies * case.logits_bytes + buffers + targets + exact


def make_step(provider: Provider, case: Case, batch: Batch, device: str) -> Step:
    leaves = provider.inputs(batch.leaves, batch.log_prior)
    originals = None
    if provider.overwrites:
        originals, leaves = leaves, tuple(leaf.clone() for leaf in leaves)
    leaves = tuple(leaf.detach().requires_grad_(provider.is_loss) for leaf in leaves)
    return Step(provider.load(case, device), leaves, batch, originals, case.upstream)


def check(provider: Provider, case: Case, batch: Batch, step: Step, device: str) -> tuple[Record, str]:
    """A record of the provider's errors, and which of them exceed their limits ("" if none does)."""
    has_offset = provider.inputs is unchanged_inputs
    # The input that the provider gets: raw logits and the offset, or folded logits without one.
    inputs = batch.leaves if has_offset else fold_offset(batch.leaves, batch.log_prior)
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
        found = errors(inputs, offset, batch, value, gradients, step.upstream)
        exact = value.double() / (1 + found.loss)  # close enough to judge the loss of evaluation
        evaluation_error = float((evaluated.double() - value.double()).abs() / exact.abs())
        folding_errors = EXACT
        if not has_offset:
            folding_errors = errors(batch.leaves, batch.log_prior, batch, value, gradients, step.upstream)
        step.reset()
        return found._replace(loss=found.loss + evaluation_error), folding_errors

    eager_errors = EXACT
    if case.n_features and provider is not baseline(case):
        eager_errors, _ = errors_of(make_step(baseline(case), case, batch, device), baseline(case))
    found, folding_errors = errors_of(step, provider)
    limits = error_limits(case.torch_dtype, provider.rounds_loss, eager_errors)
    record = {
        "loss_error": found.loss,
        "gradient_error": found.gradient,
        "row_error": found.row,
        "folding_error": None if has_offset else folding_errors.gradient,
    }
    wrong = [
        f"{name} is off by {error:.2g} of itself, more than {limit:.2g}"
        for name, error, limit in zip(("loss", "gradient", "gradient of a row"), found, limits, strict=True)
        if not error <= limit  # NaN is wrong too
    ]
    return record, "; ".join(wrong)


def measure(job: Job, provider: Provider | None = None) -> Iterator[Record]:
    """Records of a job. A failure is a record too; only an unusable GPU raises."""
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
        raise_if_gpu_broken(job.device)
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
            raise_if_gpu_broken(job.device)


def settings(job: Job, provider: Provider) -> list[dict[str, str]]:
    """Combinations of mode, timer and memory state to time.

    On a CPU: every mode in the first memory state, and forward + backward in the others. On a GPU: every mode by device
    events; if the logits fit in the cache, also forward + backward by wall time and as a CUDA graph.
    """
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
            # `restore`, not `reset`: the gradients that the graph writes must stay.
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


def raise_if_gpu_broken(device: str) -> None:
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.zeros(1, device="cuda").add_(1).item()
    except Exception as error:
        raise GpuBrokenError(str(error)) from error
