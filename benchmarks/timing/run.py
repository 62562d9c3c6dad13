"""Worker processes for jobs: a job that crashes, hangs or breaks its GPU loses only its own results."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from benchmarks.timing.cases import Case, least_bytes
from benchmarks.timing.measure import GpuBrokenError, Job, measure
from benchmarks.timing.providers import baseline

Record = dict[str, Any]
CONTEXT = multiprocessing.get_context("spawn")


def worker_main(connection: Connection, measure: Callable[[Any], Iterator[Record]] = measure) -> None:
    """Main function of a worker: receives jobs, sends their records and, after each job, whether it is still usable."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends this one
    usable = True
    while usable and (job := connection.recv()) is not None:
        try:
            for record in measure(job):
                connection.send(record)
        except GpuBrokenError:
            usable = False
        connection.send(usable)


class Worker:
    """A worker process, started on first use and again after it has died."""

    def __init__(self, timeout: float, function: Callable[[Any], Iterator[Record]] = measure) -> None:
        self.timeout = timeout  # the most seconds between two records
        self.function = function  # function(job) yields the job's records
        self.process: SpawnProcess | None = None
        self.connection: Connection | None = None

    def measure(self, job: Job) -> Iterator[Record]:
        connection, process = self.ensure_started()
        try:
            connection.send(job)
            while True:
                if not connection.poll(self.timeout):
                    self.stop()
                    yield job.record("failed", f"no result within {self.timeout:g} s: stopped")
                    return
                received = connection.recv()
                if not isinstance(received, bool):
                    yield received
                    continue
                if not received:
                    self.stop()
                return
        except (EOFError, ConnectionError):
            process.join(5)
            code = process.exitcode
            self.stop()
            yield job.record("crashed", f"its process ended with exit code {code}")

    def ensure_started(self) -> tuple[Connection, SpawnProcess]:
        if self.connection is None or self.process is None:
            self.connection, worker_end = CONTEXT.Pipe()
            self.process = CONTEXT.Process(target=worker_main, args=(worker_end, self.function))
            self.process.start()
            worker_end.close()
        return self.connection, self.process

    def stop(self) -> None:
        """Kill the process, whatever it is doing."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
        if self.connection is not None:
            self.connection.close()
        self.process = self.connection = None

    def finish(self) -> None:
        """Let an idle process end by itself."""
        if self.process is not None and self.connection is not None:
            with contextlib.suppress(OSError):
                self.connection.send(None)
            self.process.join(20)
        self.stop()


def in_one_process(jobs: Iterable[Job], timeout: float, minutes: float) -> Generator[Record, None, None]:
    """Records of jobs, all from one process, or from a new one after a process has died."""
    worker = Worker(timeout)
    deadline = time.monotonic() + 60 * minutes
    try:
        for job in jobs:
            if time.monotonic() > deadline:
                yield job.record("skipped", f"not begun within the {minutes:g} minutes of this selection")
            else:
                yield from worker.measure(job)
        worker.finish()
    finally:
        worker.stop()


def in_fresh_processes(jobs: Iterable[Job], timeout: float, n_processes: int) -> Generator[Record, None, None]:
    """Check each job in one process and time it in several others; records have the medians' median and range."""
    for job in jobs:
        records = []
        plan = [replace(job, time=False), *[replace(job, check=False)] * n_processes]
        for part in plan:
            records += in_one_process([part], timeout, minutes=float("inf"))
            if records[0]["status"] != "checked":
                break
        timed = [record for record in records if record["status"] == "timed"]
        yield from (record for record in records if record["status"] not in ("timed", "checked"))
        if timed:
            eager = {"provider": baseline(job.case).name, "peak_bytes": None}
            yield combine_records([{**record, **eager, "ms": record["eager_ms"]} for record in timed], {})
            yield combine_records(timed, records[0])


def combine_records(records: list[Record], check_record: Record) -> Record:
    """Combine the records of several processes; the errors are those of the process that checked."""
    case = Case(*(records[0][key] for key in ("rows", "classes", "dtype", "target", "features")))
    ms = [record["ms"] for record in records]
    ratios = [record["eager_ms"] / record["ms"] for record in records]
    errors = {key: value for key, value in check_record.items() if key.endswith("_error")}
    combined = {
        "ms": statistics.median(ms),
        "ms_low": min(ms),
        "ms_high": max(ms),
        "eager_ms": statistics.median(record["eager_ms"] for record in records),
        "times_faster_than_eager": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "processes": len(records),
        "gb_per_s": least_bytes(case, records[0]["mode"]) / statistics.median(ms) / 1e6,
    }
    return {**records[0], **combined, **errors}
