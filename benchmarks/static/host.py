"""python -m benchmarks host: host time of a step, its launches, and what its first call compiles.

Kernels are compiled and not launched (`compile_only`), so that no GPU is needed or waited for. What is left of a step
is Python, PyTorch's operators on tiny CPU tensors, and Triton's launch up to the driver. All providers of a shape take
turns in one process with one thread. First steps run in fresh processes with an empty cache. On a GPU PyTorch's
operators launch kernels too, which costs more than here.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_la
from benchmarks.static.compile_only import compile_only
from benchmarks.timing import machine, report
from benchmarks.timing.cases import Batch, Case, make_batch
from benchmarks.timing.providers import PROVIDERS, Loss, Provider, UnavailableError

ROOT = Path(__file__).parents[2]
DESCRIPTION = "host time, launches and compilation of a step: kernels are compiled for a GPU and not launched"


def compiled_fused(case: Case, device: str) -> Loss:
    torch.compiler.reset()

    def loss(logits: Tensor, target: Tensor, log_prior: Tensor) -> Tensor:
        return fused_la.logit_adjusted_cross_entropy(logits, target, log_prior, impl="triton")

    function = torch.compile(loss, fullgraph=True)
    return lambda leaves, batch: function(leaves[0], batch.target, batch.log_prior)


def fused_head(case: Case, device: str) -> Loss:
    def loss(leaves: Sequence[Tensor], batch: Batch) -> Tensor:
        features, weight, bias = leaves
        return fused_la.linear_logit_adjusted_cross_entropy(
            features, weight, batch.target, batch.log_prior, bias=bias, impl="triton"
        )

    return loss


def compiled_fused_head(case: Case, device: str) -> Loss:
    function = torch.compile(fused_head(case, device), fullgraph=True)
    return lambda leaves, batch: function(leaves, batch)


def quack(case: Case, device: str) -> Loss:
    loss = PROVIDERS["QuACK"].load(case, device)
    batch = make_batch(case, device)
    try:
        loss(batch.leaves, batch)
    except Exception as error:
        reason = "its kernels are CuTe's, not Triton's, and take only tensors on a GPU"
        raise UnavailableError(f"{reason} ({type(error).__name__} on a CPU)") from error
    return loss


def on_any_device(provider: str, **changes: Any) -> Provider:
    return replace(PROVIDERS[provider], not_on={}, **changes)


COMPILED = "the same in a graph that torch.compile made, fullgraph, with Inductor"
HOST_PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        PROVIDERS["eager"],
        PROVIDERS["torch.compile"],
        on_any_device("fused_la triton"),
        on_any_device(
            "fused_la triton",
            name="fused_la triton, torch.compile",
            description=COMPILED,
            load=compiled_fused,
        ),
        on_any_device(
            "Liger-Kernel", description="liger_cross_entropy; offset folded into the logits beforehand, not timed"
        ),
        on_any_device("QuACK", load=quack),
        PROVIDERS["fused_la blocked"],
        PROVIDERS["eager head"],
        on_any_device("fused_la head", name="fused_la head triton", load=fused_head),
        on_any_device(
            "fused_la head",
            name="fused_la head triton, torch.compile",
            description=COMPILED,
            load=compiled_fused_head,
        ),
        on_any_device("Liger-Kernel linear"),
    )
}
CPU_PROVIDERS = ("eager", "fused_la blocked")  # providers of the last case; both compute it on the CPU
CASES = (Case(4, 64, "float32"), Case(4, 64, "float32", n_features=16), Case(239, 10, "float32"))
FIRST_STEP_CASES = (Case(256, 8142, "bfloat16"), Case(256, 8142, "bfloat16", n_features=64))
CALLS_PER_TURN = 10  # calls of a provider before the next provider's turn
MODES = {
    "inference": "the loss of logits (features, weight, bias) that do not require grad",
    "forward": "the loss of those that do",
    "both": "that and torch.autograd.grad of it",
}
UNITS = {
    "host_us": "microseconds that a call keeps the host busy: lower quartile; after ten calls it is the turn of the "
    "next provider. Tensors are on a CPU: eager code's operators compute in it, Triton's kernels do not run",
    **MODES,
    "launches": "Triton kernels launched by a forward and a backward pass",
    "first_s": "seconds of the first forward and backward pass in a fresh process, packages imported and nothing "
    "cached: median, and lowest and highest process",
    "kernels": "Triton kernels compiled for it; a kernel specialised twice counts twice",
}
Record = dict[str, Any]


def provider_names(case: Case) -> list[str]:
    """Names of the providers of a case: losses of logits, or of a head."""
    if case == CASES[2]:
        return list(CPU_PROVIDERS)
    return [
        name
        for name, provider in HOST_PROVIDERS.items()
        if provider.head == bool(case.n_features) and name != "fused_la blocked"
    ]


# In a fresh process ---------------------------------------------------------------------------------------------------


def make_steps(name: str, case: Case) -> dict[str, Callable[[], object]]:
    """The function to time in each mode."""
    provider, batch = HOST_PROVIDERS[name], make_batch(case, "cpu")
    loss = provider.load(case, "cpu")
    inputs = provider.inputs(batch.leaves, batch.log_prior)
    leaves = tuple(leaf.detach().requires_grad_() for leaf in inputs)
    return {
        "inference": lambda: loss(inputs, batch),
        "forward": lambda: loss(leaves, batch),
        "both": lambda: torch.autograd.grad(loss(leaves, batch), leaves),
    }


def reason_of(error: BaseException) -> str:
    if isinstance(error, UnavailableError):
        return str(error)
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def take_turns(case: Case, names: Sequence[str], target: str, rounds: int) -> Iterator[Record]:
    """Host time and launches of each provider, measured in this process."""
    torch.set_num_threads(1)
    with compile_only(target) as driver:
        steps: dict[str, dict[str, Callable[[], object]]] = {}
        launches: dict[str, int] = {}
        for name in names:
            try:
                steps[name] = make_steps(name, case)
                for step in steps[name].values():
                    for _ in range(min(30, rounds)):
                        step()
                driver.launched.clear()
                steps[name]["both"]()
                launches[name] = driver.launched.total()
            except Exception as error:
                steps.pop(name, None)
                yield {"provider": name, "status": "not available", "reason": reason_of(error)}
        times: dict[tuple[str, str], list[float]] = {(name, mode): [] for name in steps for mode in MODES}
        for _ in range(math.ceil(rounds / CALLS_PER_TURN)):
            for (name, mode), samples in times.items():
                step = steps[name][mode]
                for _ in range(CALLS_PER_TURN):
                    begin = time.perf_counter()
                    step()
                    samples.append(time.perf_counter() - begin)
        for name in steps:
            host_us = {mode: sorted(times[name, mode])[len(times[name, mode]) // 4] * 1e6 for mode in MODES}
            yield {"provider": name, "status": "timed", "host_us": host_us, "launches": launches[name]}


def first_step(case: Case, name: str, target: str) -> Record:
    """Seconds and compiled kernels of the first step in this process."""
    torch.set_num_threads(1)
    with compile_only(target) as driver:
        try:
            step = make_steps(name, case)["both"]
            begin = time.perf_counter()
            step()
        except Exception as error:
            return {"provider": name, "status": "not available", "reason": reason_of(error)}
        return {"provider": name, "status": "timed", "s": time.perf_counter() - begin, "compiled": driver.compiled}


def in_fresh_process(task: dict[str, Any], timeout: float = 600.0) -> list[Record]:
    """Records of a task in a fresh process without Triton's interpreter, with empty Triton and Inductor caches."""
    with tempfile.TemporaryDirectory() as cache:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"TRITON_CACHE_DIR": f"{cache}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "benchmarks.static.host", json.dumps(task)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return [failed(name, f"no result within {timeout:g} s: stopped") for name in task["names"]]
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [failed(name, reason) for name in task["names"]]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def failed(name: str, reason: str) -> Record:
    return {"provider": name, "status": "failed", "reason": reason}


def run_task(task: dict[str, Any]) -> Iterator[Record]:
    case = Case(**task["case"])
    if task["what"] == "first":
        yield from (first_step(case, name, task["target"]) for name in task["names"])
    else:
        yield from take_turns(case, task["names"], task["target"], task["rounds"])


# The command ----------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> Iterator[Record]:
    def names(case: Case) -> list[str]:
        return [name for name in provider_names(case) if not options.providers or name in options.providers]

    def task(what: str, case: Case, providers: list[str]) -> dict[str, Any]:
        return {
            "what": what,
            "case": vars(case),
            "names": providers,
            "target": options.target,
            "rounds": options.rounds,
        }

    for case in CASES:
        if names(case):
            for record in in_fresh_process(task("turns", case, names(case))):
                yield {"case": str(case), "what": "turns", **record}
    for case in FIRST_STEP_CASES:
        for name in names(case):
            runs = []
            for _ in range(options.processes):
                runs += in_fresh_process(task("first", case, [name]))
                if runs[-1]["status"] != "timed":
                    break
            yield {"case": str(case), "what": "first", **combine_runs(runs)}


def combine_runs(runs: list[Record]) -> Record:
    """Combine the records of a first step in several processes."""
    if runs[-1]["status"] != "timed":
        return runs[-1]
    seconds, compiled = [run["s"] for run in runs], runs[0]["compiled"]
    return {
        "provider": runs[0]["provider"],
        "status": "timed",
        "first_s": statistics.median(seconds),
        "first_s_low": min(seconds),
        "first_s_high": max(seconds),
        "compiled": compiled,
        "kernels": len(compiled),
    }


def format_record(record: Record) -> str:
    start = f"{record['case']:24} {record['provider']:36} "
    if record["status"] != "timed":
        return start + f"{record['status']}: {record['reason']}"
    if record["what"] == "first":
        return start + f"first step {record['first_s']:.2f} s, {record['kernels']} kernels compiled"
    times = ", ".join(f"{mode} {us:.0f} us" for mode, us in record["host_us"].items())
    return start + f"{times}; {record['launches']} launches"


def markdown(document: report.Document) -> str:
    records = document["results"]
    parts = report.heading(document)
    for case in dict.fromkeys(record["case"] for record in records):
        timed = [record for record in records if record["case"] == case and record["status"] == "timed"]
        turns = [record for record in timed if record["what"] == "turns"]
        first = [record for record in timed if record["what"] == "first"]
        if turns:
            rows = [
                (r["provider"], *(f"{r['host_us'][mode]:.0f}" for mode in MODES), str(r["launches"])) for r in turns
            ]
            header = ("provider", *(f"{mode}, us" for mode in MODES), "launches")
            parts.append(f"## Host time, {case}\n\n" + report.table(header, rows))
        if first:
            rows = [
                (
                    r["provider"],
                    f"{r['first_s']:.2f}",
                    f"{r['first_s_low']:.2f} to {r['first_s_high']:.2f}",
                    str(r["kernels"]),
                )
                for r in first
            ]
            parts.append(
                f"## First step, {case}\n\n" + report.table(("provider", "s", "range", "kernels compiled"), rows)
            )
    others = [record for record in records if record["status"] != "timed"]
    if others:
        rows = list(dict.fromkeys((r["provider"], r["case"], r["status"], r["reason"]) for r in others))
        parts.append("## Not timed\n\n" + report.table(("provider", "case", "", "why"), rows))
    parts.append("## Providers\n\n" + report.table(("provider", "what"), list(document["providers"].items())))
    parts.append("## What the figures mean\n\n" + report.table(("figure", "meaning"), list(document["units"].items())))
    return "\n".join(parts)


def listing() -> str:
    lines = [f"  host: {DESCRIPTION}", *(f"    {case}" for case in (*CASES, *FIRST_STEP_CASES))]
    lines += [f"    by {name}: {provider.description}" for name, provider in HOST_PROVIDERS.items()]
    return "\n".join(lines)


def parse(arguments: Sequence[str], results: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks host",
        description=f"{DESCRIPTION[0].upper()}{DESCRIPTION[1:]}. Of fused_la, and of what else there is under the same "
        "driver: tensors are on a CPU, and nothing but eager code computes. Results go to OUT/<processor>/<date>.json "
        "and .md.",
    )
    parser.add_argument("--list", action="store_true", help="list cases and providers, and stop")
    parser.add_argument("--out", type=Path, default=results, help=f"folder for results (default: {results.name}/ here)")
    parser.add_argument("--providers", nargs="+", metavar="NAME", choices=HOST_PROVIDERS, help="only these")
    parser.add_argument("--target", default="sm_90", choices=("sm_80", "sm_90", "sm_100"), help="GPU to compile for")
    parser.add_argument("--rounds", type=int, default=1000, help="calls of each provider in each mode (default: 1000)")
    parser.add_argument("--processes", type=int, default=3, help="fresh ones for each first step (default: 3)")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.processes) < 1:
        parser.error("--rounds and --processes must be at least 1")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: {options.out} is not a folder")
    return options


def main(arguments: Sequence[str], results: Path) -> int:
    options = parse(arguments, results)
    if options.list:
        print(listing())
        return 0
    now = datetime.datetime.now().astimezone()
    name = machine.cpu_name()
    path = options.out / machine.slug(name) / f"{now:%Y-%m-%d-%H%M%S}.json"
    document: report.Document = {
        "selection": "host",
        "command": machine.command(),
        "date": now.isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "device": {"name": name, "threads": 1, "cores": os.cpu_count(), "compiled_for": options.target},
        "versions": machine.versions(),
        "units": UNITS,
        "providers": {key: provider.description for key, provider in HOST_PROVIDERS.items()},
        "interrupted": True,  # until the end
        "results": [],
    }
    print(f"{name}: to {path}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        for record in measure(options):
            document["results"].append(record)
            report.write_json(path, document)
            print(format_record(record), flush=True)
        document["interrupted"] = False
    report.write_json(path, document)
    report.write_atomically(path.with_suffix(".md"), markdown(document))
    print(f"Wrote {path}, .md", flush=True)
    if document["interrupted"]:
        return 130
    return 0 if any(record["status"] == "timed" for record in document["results"]) else 1


if __name__ == "__main__":
    for record in run_task(json.loads(sys.argv[1])):
        print(json.dumps(record), flush=True)
