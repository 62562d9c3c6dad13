"""Every check that needs a GPU, in a few minutes: `bash benchmarks/on_gpu.sh [seconds] [--dry-run]`.

Stages, the most valuable first:

1. accuracy: every dtype and option on small inputs against extended precision (`accuracy`), in as many processes as
   there are cores, which share compiled kernels; then what will be timed is compiled and checked.
2. speed: copy bandwidth, then forward and forward + backward of this package, eager cross entropy, `torch.compile` and
   other libraries (`timing.speed`).
3. profile: counters of one step's kernels, read by `ncu` if it is installed (`timing.profiled`).
4. tests: those marked gpu.

A stage, and a job in it, begins only if enough time is left to be worth while. Each job runs in a process with a time
limit: a job that crashes or hangs, or a stage that raises, loses only its own results. Results go to $OUT (else to a
folder of benchmarks/results) as they come: `results.jsonl` has all records, `summary.md` the text printed last,
`ncu-<classes>.csv` and `tests.txt` the output of these tools. The exit status is 1 if anything was wrong, except in
libraries that are only compared with.

--dry-run needs no GPU: kernels run in Triton's interpreter on tiny shapes, a CPU's clock replaces the device's, a
sample replaces ncu's output, and tests are only collected. Its times mean nothing. It also fails if anything was
skipped for lack of time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import accuracy
from benchmarks.timing import machine, profiled, speed
from benchmarks.timing.pool import in_processes
from benchmarks.timing.report import json_safe, table, write_atomically

Record = dict[str, Any]
ROOT = Path(__file__).parents[1]
WHEELS = ROOT / "benchmarks" / "wheels"
SECONDS = 420.0
WRAP_UP_SECONDS = 5.0  # seconds to stop what still runs and to write the summary
MAX_PROCESSES = 16
BAD_STATUSES = ("wrong", "failed", "crashed")
COUNT = re.compile(r"\b(\d+) ([a-z]+)\b")


# The run --------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """State of the whole run; records are written to results.jsonl as they come."""

    out: Path
    seconds: float
    dry: bool
    started: float = field(default_factory=time.monotonic)
    records: list[Record] = field(default_factory=list)

    @property
    def deadline(self) -> float:
        return self.started + self.seconds - WRAP_UP_SECONDS

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def add(self, stage: str, record: Record) -> None:
        record = {"stage": stage, **record, "at": round(time.monotonic() - self.started, 1)}
        self.records.append(record)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(json_safe(record), default=str) + "\n")
        if record["status"] != "skipped" or len(self.of(stage)) == 1:  # print one skipped job of a stage, not hundreds
            print(format_record(record), flush=True)

    def of(self, stage: str, *statuses: str) -> list[Record]:
        return [r for r in self.records if r["stage"] == stage and (r["status"] in statuses or not statuses)]


@dataclass(frozen=True)
class Stage:
    name: str
    min_seconds: float  # seconds; with less time left the stage is not begun
    share: float  # the most of the whole time that the stage may take
    run: Callable[[Run, float], Iterable[Record]]  # run(run, until), a time of time.monotonic


def run_stages(run: Run, stages: Sequence[Stage]) -> None:
    for stage in stages:
        left = run.deadline - time.monotonic()
        if left < stage.min_seconds:
            run.add(stage.name, {"status": "skipped", "reason": f"not begun: {max(left, 0):.0f} s were left"})
            continue
        start = time.monotonic()
        try:
            # A dry run must reach the end of a stage, however slow the interpreter is.
            deadline = run.deadline if run.dry else min(run.deadline, start + stage.share * run.seconds)
            for record in stage.run(run, deadline):
                run.add(stage.name, record)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            text = "".join(traceback.format_exception(error))
            run.add(stage.name, {"status": "failed", "reason": reason, "traceback": text})
            print(text, file=sys.stderr, flush=True)
        n_skipped = len(run.of(stage.name, "skipped"))
        if n_skipped:
            print(f"         {stage.name}: {n_skipped} not begun, in results.jsonl")
        run.add(stage.name, {"status": "ended", "seconds": round(time.monotonic() - start, 1)})
        write_atomically(run.out / "summary.md", summary(run))


def run_command(command: Sequence[str], path: Path, deadline: float, **environment: str) -> int | None:
    """Exit code of a command whose output goes to a file; None if it and its children were stopped at `deadline`."""
    with path.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


# Wheels ---------------------------------------------------------------------------------------------------------------


def install_wheels(folder: Path, target: Path) -> Iterator[Record]:
    """Install each wheel of a folder offline into its own folder, then merge these folders into `target/site`."""
    options = ("--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check", "--quiet")

    def install(numbered: tuple[int, Path]) -> tuple[Path, str]:
        number, wheel = numbered
        part = target / str(number)
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(part), str(wheel)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            return part, "pip took more than 120 s"
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        return part, "" if done.returncode == 0 else (errors or [f"pip ended with {done.returncode}"])[0]

    wheels = sorted(folder.glob("*.whl"))
    with ThreadPoolExecutor(8) as threads:
        for wheel, (part, error) in zip(wheels, threads.map(install, enumerate(wheels)), strict=True):
            if not error:  # several wheels may have files in one folder
                shutil.copytree(part, target / "site", dirs_exist_ok=True)
            shutil.rmtree(part, ignore_errors=True)
            yield {"wheel": wheel.name, "status": "failed" if error else "installed", "reason": error}


def add_to_path(site: Path) -> None:
    """Add a site folder, with the paths of its .pth files, to the path of this process and its children."""
    script = "import json, site, sys; old = set(sys.path); site.addsitedir(sys.argv[1]); "
    script += "print(json.dumps([path for path in sys.path if path not in old]))"
    done = subprocess.run([sys.executable, "-c", script, str(site)], capture_output=True, text=True, check=True)
    paths = json.loads(done.stdout.splitlines()[-1])
    sys.path[1:1] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), *paths, os.environ.get("PYTHONPATH", "")]))


# Stages ---------------------------------------------------------------------------------------------------------------


def n_processes() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, MAX_PROCESSES)


def cache_bytes(run: Run) -> int:
    return 0 if run.dry else torch.cuda.get_device_properties(0).L2_cache_size


def speed_jobs(run: Run) -> list[speed.SpeedJob]:
    return speed.dry_run_jobs() if run.dry else speed.jobs(cache_bytes(run))


def accuracy_stage(run: Run, deadline: float) -> Iterator[Record]:
    compile_jobs = [replace(job, time=False) for job in speed_jobs(run) if job.provider in speed.COMPILED_PROVIDERS]
    jobs = [*(accuracy.dry_run_jobs() if run.dry else accuracy.jobs(run.device)), *compile_jobs]
    yield from in_processes(jobs, n_processes(), deadline, timeout=90.0, min_seconds=1.0 if run.dry else 12.0)


def speed_stage(run: Run, deadline: float) -> Iterator[Record]:
    jobs = [speed.CopyJob(run.device, cache_bytes(run)), *speed_jobs(run)]
    yield from in_processes(jobs, 1, deadline, timeout=60.0, min_seconds=1.0 if run.dry else 5.0)


def profile_stage(run: Run, deadline: float) -> Iterator[Record]:
    ncu = "ncu" if run.dry else profiled.find_ncu()
    if ncu is None:
        yield {"status": "not available", "reason": "ncu is not installed"}
        return
    for classes in (37,) if run.dry else profiled.CLASSES:
        path = run.out / f"ncu-{classes}.csv"
        script = [sys.executable, "-m", "benchmarks.timing.profiled", "--classes", str(classes)]
        kernels: list[Record] = []
        code, text = None, ""
        for metrics in (
            profiled.METRICS,
            profiled.BASIC_METRICS,
        ):  # the few, if this ncu does not know one of the others
            if deadline - time.monotonic() < (1.0 if run.dry else 15.0):
                break
            command = profiled.command(ncu, list(metrics), script)
            code = run_command(script if run.dry else command, path, deadline)
            text = path.read_text(errors="replace")
            kernels = profiled.parse(profiled.SAMPLE if run.dry else text)
            if code is None or (code == 0 and kernels):
                break
        if code == 0 and kernels:
            yield from ({"classes": classes, "status": "profiled", **kernel} for kernel in kernels)
        elif code is None:
            yield {"classes": classes, "status": "unfinished", "reason": "too little time was left"}
        else:
            yield {
                "classes": classes,
                "status": "failed",
                "reason": f"exit code {code}: {profiled.error_summary(text)}",
            }


def tests_stage(run: Run, deadline: float) -> Iterator[Record]:
    path = run.out / "tests.txt"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/triton/test_gpu.py", "-q", "-p", "no:cacheprovider"]
    command += ["--collect-only"] if run.dry else ["--tb=short"]
    # Installed plugins may warn, and in these tests a warning is an error.
    code = run_command(command, path, deadline, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    counts = counts_of_tests(path.read_text(errors="replace"))
    if code is None:
        yield {"status": "wrong" if counts["failed"] else "unfinished", "reason": "stopped: no time left", **counts}
    else:
        wrong = f"pytest ended with {code}" if code else ""
        if not counts["collected" if run.dry else "passed"]:
            wrong = wrong or "no test ran"
        yield {"status": "wrong" if wrong else "passed", "reason": wrong, **counts}


def counts_of_tests(text: str) -> Counter[str]:
    """Counts of outcomes in the output of pytest -q, also if it was stopped before its last line."""
    names = {"error": "errors", "test": "collected", "tests": "collected"}
    last = text.rstrip().rpartition("\n")[2]
    counts: Counter[str] = Counter()
    for n, name in COUNT.findall(last):
        counts[names.get(name, str(name))] = int(n)
    if counts:
        return counts
    letters = "".join(re.findall(r"^([.FEsxX]+)(?: +\[ *\d+%\])?$", text, re.MULTILINE))
    return Counter({"passed": letters.count("."), "failed": letters.count("F"), "errors": letters.count("E")})


STAGES = (
    Stage("accuracy", 35.0, 0.30, accuracy_stage),
    Stage("speed", 25.0, 0.40, speed_stage),
    Stage("profile", 25.0, 0.18, profile_stage),
    Stage("tests", 20.0, 1.0, tests_stage),
)


# Summary --------------------------------------------------------------------------------------------------------------


def format_record(record: Record) -> str:
    """A record as one line of text."""
    keys = ("wheel", "option", "case", "provider", "kernel", "mode", "timer", "dtype")
    hidden = ("dtype",) if "case" in record else ()  # the case's name has it
    what = [str(record[key]) for key in keys if record.get(key) and key not in hidden]
    what += [f"{record['classes']} classes"] if "kernel" in record else []
    figures = [f"{record['ms']:.4g} ms"] if "ms" in record else []
    figures += [f"{record['gb_per_s']:.4g} GB/s"] if "gb_per_s" in record else []
    figures += [f"{record['part_of_allowed']:.0%} of the error allowed"] if "part_of_allowed" in record else []
    line = " ".join([*what, record["status"]]) + "".join(f", {figure}" for figure in figures)
    line += f": {record['reason']}" if record.get("reason") else ""
    return f"{record['at']:6.1f} s {record['stage']}: {line}"


def is_peer(record: Record) -> bool:
    return record.get("provider") in speed.PEERS or record["stage"] == "wheels"


def problems(run: Run) -> list[Record]:
    """Records that make the exit status 1."""
    bad = BAD_STATUSES if not run.dry else (*BAD_STATUSES, "skipped", "unfinished")
    return [r for r in run.records if r["status"] in bad and not is_peer(r)]


def format_cell(value: float | None, form: str = ".4g") -> str:
    return "" if value is None else format(value, form)


def microseconds(*milliseconds: float | None) -> str:
    found = [f"{1e3 * ms:.3g}" if ms else "-" for ms in milliseconds]
    return ", ".join(found) if any(milliseconds) else ""


def speed_tables(run: Run) -> list[str]:
    """Tables of milliseconds with many rows, and of microseconds with few (host time: lower quartile)."""
    everything = run.of("speed", "timed")
    copy = next((r["gb_per_s"] for r in everything if r["provider"] == "copy"), None)
    timed = {(r["case"], r["mode"], r["timer"], r["provider"]): r for r in everything if r["provider"] != "copy"}
    providers = [name for name in (*speed.MAIN_PROVIDERS, *speed.PEERS) if any(key[3] == name for key in timed)]
    cases = {(r["dtype"], r["classes"], r["case"]) for r in timed.values()}
    many, few = [], []
    for dtype, _, case in sorted(cases):

        def figures(mode: str, timer: str, name: str = "ms", case: str = case) -> list[float | None]:
            return [timed.get((case, mode, timer, provider), {}).get(name) for provider in providers]

        for mode in ("forward", "both"):
            found, ours = figures(mode, "events"), timed.get((case, mode, "events", speed.OURS))
            share = ours["gb_per_s"] / copy if ours and copy else None
            if any(found):
                many.append((case, mode, format_cell(share, ".0%"), *map(format_cell, found)))
        replayed, host = figures("both", "graph"), figures("both", "host", "ms_low")
        if any((*replayed, *host)) and dtype == "bfloat16":  # the others are in results.jsonl
            few.append((case, *(microseconds(g, h) for g, h in zip(replayed, host, strict=True))))
    parts = [f"Copy: {copy:.4g} GB/s\n"] if copy else []
    parts += [table(("rows x classes", "ms of", "fused_la, of copy", *providers), many)] if many else []
    parts += [table(("us: graph, host", *providers), few)] if few else []
    return parts


def profile_table(run: Run) -> list[str]:
    found = run.of("profile", "profiled")
    kernels = sorted(found, key=lambda r: -r.get("time_ns", 0.0))[:6]
    names = [name for name in profiled.METRICS.values() if any(name in r for r in kernels)]
    stalls = sorted((n for n in names if n.startswith("stall_")), key=lambda n: -max(r.get(n, 0.0) for r in kernels))
    names = [name for name in names if name not in stalls[5:]]  # the five largest
    rows = [(name, *(format_cell(r.get(name), ".4g") for r in kernels)) for name in names]
    return [table(("metric", *(f"{r['classes']}: {r['kernel']}" for r in kernels)), rows)] if rows else []


def summary(run: Run) -> str:
    """The most important results in about 60 lines."""
    facts = next(iter(run.of("run")), {})
    named = ("name", "driver", "torch", "triton", "commit", "date")
    lines = ["# " + "; ".join(str(facts[key]) for key in named if facts.get(key))]
    lines += ["", "Dry run: nothing here was measured on a GPU."] if run.dry else []
    stages = []
    for stage in STAGES:
        counts = Counter(r["status"] for r in run.of(stage.name) if r["status"] != "ended")
        seconds = next((r["seconds"] for r in run.of(stage.name, "ended")), None)
        outcome = ", ".join(f"{n} {status}" for status, n in counts.items())
        if stage.name == "tests":
            keys = ("collected", "passed", "failed", "errors", "skipped")
            found = [f"{r[key]} {key}" for r in run.of("tests") for key in keys if r.get(key)]
            outcome = f"{outcome} ({', '.join(found)})" if found else outcome
        stages.append((stage.name, format_cell(seconds, ".0f"), outcome))
    parts = ["\n".join(lines) + "\n", table(("stage", "s", "outcome"), stages)]
    listed = [*problems(run), *(r for r in run.records if is_peer(r) and r["status"] in BAD_STATUSES)]
    parts += ["\n".join(f"- {format_record(r)[:240]}" for r in listed[:8]) + "\n"] if listed else []
    parts += [f"and {len(listed) - 8} more in results.jsonl\n"] if len(listed) > 8 else []
    return "\n".join([*parts, *speed_tables(run), *profile_table(run)])


# The command ----------------------------------------------------------------------------------------------------------


def facts(run: Run) -> Record:
    name = machine.cpu_name() if run.dry else torch.cuda.get_device_name(0)
    found = {"status": "begun", "name": name, "date": f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M:%S}"}
    if not run.dry:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "cache_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "processors": properties.multi_processor_count,
            "driver": machine.first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found | machine.versions() | {"commit": machine.commit(), "seconds": run.seconds, "dry_run": run.dry}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bash benchmarks/on_gpu.sh", description="All that only a GPU can tell, in a few minutes of one."
    )
    parser.add_argument("seconds", nargs="?", type=float, default=SECONDS, help=f"in all (default: {SECONDS:g})")
    parser.add_argument("--dry-run", action="store_true", help="every stage but the device's, without a GPU")
    parser.add_argument(
        "--wheels", type=Path, default=WHEELS, help="folder of wheels to compare with (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"seconds must be positive, got {options.seconds:g}")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("this PyTorch finds no GPU; --dry-run goes through all that needs none")
    return options


def folder_of_results(dry: bool) -> Path:
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"]).absolute()
    if dry:
        return Path(tempfile.mkdtemp(prefix="on-gpu-dry-run-"))
    name = machine.slug(torch.cuda.get_device_name(0))
    return ROOT / "benchmarks" / "results" / name / f"on-gpu-{datetime.datetime.now():%Y-%m-%d-%H%M%S}"


def set_environment(dry: bool) -> None:
    """Environment of child processes: one thread each, and in a dry run Triton's interpreter."""
    os.environ.pop("TRITON_INTERPRET", None)
    if dry:
        os.environ |= {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore::RuntimeWarning:triton.runtime.interpreter"}
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    before = time.time() - float(os.environ.pop("ON_GPU_BEGAN", time.time()))  # seconds in the shell and for imports
    started = time.monotonic() - before
    options = parse(arguments)
    set_environment(options.dry_run)
    out = folder_of_results(options.dry_run)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.jsonl").unlink(missing_ok=True)
    run = Run(out, options.seconds, options.dry_run, started)
    signal.signal(signal.SIGTERM, raise_interrupt)  # like Ctrl-C: results so far are kept, and no process is left
    interrupted = False
    try:
        run.add("run", facts(run))
        with tempfile.TemporaryDirectory() as folder:
            for record in install_wheels(options.wheels, Path(folder)):
                run.add("wheels", record)
            if run.of("wheels", "installed"):
                add_to_path(Path(folder) / "site")
            run_stages(run, stages)
    except KeyboardInterrupt:
        interrupted = True
    text = summary(run)
    write_atomically(out / "summary.md", text)
    print(f"\n{text}\n{'Interrupted: ' if interrupted else ''}{time.monotonic() - started:.0f} s; results in {out}")
    return 130 if interrupted else 1 if problems(run) else 0


if __name__ == "__main__":
    sys.exit(main())
