"""Forward + backward of every provider with pytest-benchmark, on the cases of the selection "quick".

    pytest benchmarks/bench_loss.py --benchmark-columns=median,iqr,rounds --benchmark-group-by=param:case

Providers, cases, check and step are those of `python -m benchmarks`. A round of eager cross entropy precedes each timed
round, so `extra_info["times_faster_than_eager"]` compares medians of alternating runs in one process. On a GPU a round
lasts until the device has finished; `python -m benchmarks` also times by device events. Bytes are the least that any
implementation moves: logits read once, their gradient written once.
"""

from __future__ import annotations

import statistics

import pytest
import torch

from benchmarks.timing import clocks
from benchmarks.timing.cases import SELECTIONS, Case, least_bytes, make_batch, with_rows
from benchmarks.timing.measure import bytes_needed, check, make_step
from benchmarks.timing.providers import PROVIDERS, Provider, UnavailableError, baseline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CACHE_BYTES = torch.cuda.get_device_properties(0).L2_cache_size if DEVICE == "cuda" else 0
QUICK = SELECTIONS["quick"]
CASES = [with_rows(case, CACHE_BYTES) for case in (QUICK.cpu if DEVICE == "cpu" else QUICK.gpu)]
PAIRS = [
    (case, provider) for case in CASES for provider in PROVIDERS.values() if provider.head == bool(case.n_features)
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("memory", QUICK.memory if DEVICE == "cpu" else ("held",))
@pytest.mark.parametrize(("case", "provider"), PAIRS, ids=lambda value: getattr(value, "name", str(value)))
def bench_forward_backward(benchmark, case: Case, provider: Provider, memory: str):
    reason = provider.reason_against(case, DEVICE)
    if memory == "returned" and not clocks.can_return_memory():
        reason = "memory is returned to the system with glibc"
    if bytes_needed(case, provider, DEVICE) > clocks.free_memory(DEVICE):
        reason = "needs more memory than is free"
    if reason:
        pytest.skip(reason)
    batch = make_batch(case, DEVICE)
    try:
        step = make_step(provider, case, batch, DEVICE)
    except (ImportError, UnavailableError) as error:
        pytest.skip(str(error))
    if provider.is_loss:
        _, wrong = check(provider, case, batch, step, DEVICE)
        assert not wrong
    eager = make_step(baseline(case), case, batch, DEVICE)

    def prepare() -> None:
        step.reset()
        if memory == "returned":
            clocks.return_memory()

    def run_eager() -> None:
        times = clocks.wall_times(prepare, lambda _: eager.both(), 1, DEVICE)
        eager_times.extend(times)
        eager.reset()
        prepare()

    def run() -> None:
        step.both()
        clocks.synchronize(DEVICE)

    eager_times: list[float] = []
    benchmark.pedantic(run, setup=run_eager, rounds=21, warmup_rounds=3)
    step.reset()
    median = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "times_faster_than_eager": round(statistics.median(eager_times) / median / 1e3, 2),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if not case.n_features:
        benchmark.extra_info["gigabytes_per_second"] = round(least_bytes(case, "both") / median / 1e9, 2)
    times = benchmark.extra_info["times_faster_than_eager"]
    print(f"\n{case} {provider.name}, memory {memory}: {median * 1e3:.2f} ms, {times}x eager")
