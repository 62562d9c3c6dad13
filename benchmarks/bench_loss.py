"""Forward + backward of the loss against what users write today.

    pytest benchmarks/bench_loss.py --benchmark-columns=median,iqr,rounds --benchmark-group-by=param:case

Every provider's loss and gradient are checked against float64 before it is timed. Each timed round is preceded by one
of eager cross entropy, so that `extra_info["times_faster_than_eager"]` compares medians of alternating runs in one
process. Bytes: the least that any implementation moves, logits read once and their gradient written once.

On a CPU much of a step is page faults, if the C library has handed the memory of the last step back to the system. It
does or does not by what else is on the heap, so both states are made: "held" as the process happens to be, "returned"
with `malloc_trim` (glibc) before every step, so that a step pays for each page that it touches.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_la import log_prior_from_counts, logit_adjusted_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """Logits of (n_rows, n_classes)."""

    n_rows: int
    n_classes: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.n_rows}x{self.n_classes}-{str(self.dtype).removeprefix('torch.')}"


CASES = [Case(512, 8142, torch.float32), Case(512, 8142, torch.bfloat16), Case(64, 262144, torch.float32)]


def eager(logits: Tensor, target: Tensor, log_prior: Tensor) -> Tensor:
    return F.cross_entropy(logits + log_prior, target)


def fused(logits: Tensor, target: Tensor, log_prior: Tensor) -> Tensor:
    return logit_adjusted_cross_entropy(logits, target, log_prior)


def reference(logits: Tensor, target: Tensor, log_prior: Tensor) -> Tensor:
    return logit_adjusted_cross_entropy(logits, target, log_prior, impl="reference")


PROVIDERS: dict[str, Loss] = {
    "eager": eager,
    "torch.compile": torch.compile(eager, dynamic=False),
    "fused_la": fused,
    "fused_la reference": reference,
}


def make_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, target and the log prior of counts that fall from 1000 to 2."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, case.n_classes + 1, dtype=torch.float64)
    log_prior = log_prior_from_counts((1000 * ranks**-0.7).clamp_min(2).round())
    logits = torch.randn(case.n_rows, case.n_classes, generator=generator) * 3
    target = torch.randint(case.n_classes, (case.n_rows,), generator=generator)
    return logits.to(DEVICE, case.dtype), target.to(DEVICE), log_prior.to(DEVICE)


def step(loss: Loss, logits: Tensor, target: Tensor, log_prior: Tensor) -> tuple[Tensor, Tensor]:
    """One forward and backward pass, as a training step runs it; ends when the device has finished."""
    logits.grad = None
    value = loss(logits, target, log_prior)
    value.backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert logits.grad is not None
    return value.detach(), logits.grad


def check_against_float64(loss: Loss, logits: Tensor, target: Tensor, log_prior: Tensor) -> None:
    exact = logits.detach().double().requires_grad_()
    expected, expected_gradient = step(eager, exact, target, log_prior.double())
    value, gradient = step(loss, logits, target, log_prior)
    # Float32 in between, and a gradient rounded to the dtype of the logits. Eager's float32 loss over 262,144 classes
    # is off by 2e-6 of itself.
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0.0)
    eps = torch.finfo(logits.dtype).eps
    assert (gradient.double() - expected_gradient).norm() <= (eps + 1e-5) * expected_gradient.norm()


def return_memory() -> None:
    """Hand all free memory back to the system."""
    ctypes.CDLL(None).malloc_trim(0)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("memory", ["held", "returned"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_forward_backward(benchmark, case: Case, provider: str, memory: str):
    if memory == "returned" and (DEVICE != "cpu" or not hasattr(ctypes.CDLL(None), "malloc_trim")):
        pytest.skip("memory is returned to the system on a CPU with glibc")
    logits, target, log_prior = make_inputs(case)
    logits.requires_grad_()
    loss = PROVIDERS[provider]
    check_against_float64(loss, logits, target, log_prior)

    eager_seconds = []

    def one_of_eager() -> None:
        logits.grad = None
        if memory == "returned":
            return_memory()
        start = time.perf_counter()
        step(eager, logits, target, log_prior)
        eager_seconds.append(time.perf_counter() - start)
        logits.grad = None
        if memory == "returned":
            return_memory()

    benchmark.pedantic(step, (loss, logits, target, log_prior), setup=one_of_eager, rounds=21, warmup_rounds=3)
    median = benchmark.stats.stats.median
    n_bytes = 2 * logits.numel() * logits.element_size()
    benchmark.extra_info |= {
        "gigabytes_per_second": round(n_bytes / median / 1e9, 2),
        "times_faster_than_eager": round(statistics.median(eager_seconds) / median, 2),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    times = benchmark.extra_info["times_faster_than_eager"]
    print(f"\n{case} {provider}, memory {memory}: {median * 1e3:.2f} ms, {times}x eager")
