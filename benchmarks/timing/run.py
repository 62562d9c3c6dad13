"""Jobs in a process of their own: one that crashes, hangs or breaks its GPU costs its own results and no others."""

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


def work(connection: Connection, measure: Callable[[Any], Iterator[Record]] = measure) -> None:
    """Jobs from the connection, their records back to it and after each job whether this process can do another."""
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
    """A process that measures, started when it is needed and again after it has died."""

    def __init__(self, timeout: float, function: Callable[[Any], Iterator[Record]] = measure) -> None:
        self.timeout = timeout  # seconds between two records
        self.function = function  # of a job: its records
        self.process: SpawnProcess | None = None
        self.connection: Connection | None = None

    def measure(self, job: Job) -> Iterator[Record]:
        connection, process = self.started()
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

    def started(self) -> tuple[Connection, SpawnProcess]:
        if self.connection is None or self.process is None:
            self.connection, other = CONTEXT.Pipe()
            self.process = CONTEXT.Process(target=work, args=(other, self.function))
            self.process.start()
            other.close()
        return self.connection, self.process

    def stop(self) -> None:
        """Whatever it is doing."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
        if self.connection is not None:
            self.connection.close()
        self.process = self.connection = None

    def finish(self) -> None:
        """It is idle: let it end by itself."""
        if self.process is not None and self.connection is not None:
            with contextlib.suppress(OSError):
                self.connection.send(None)
            self.process.join(20)
        self.stop()


def in_one_process(jobs: Iterable[Job], timeout: float, minutes: float) -> Generator[Record, None, None]:
    """Records of jobs, one process for all unless one dies."""
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
    """Each job checked in one process and timed in several others: the median of their medians, and how far they go."""
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
            yield combined([{**record, **eager, "ms": record["eager_ms"]} for record in timed], {})
            yield combined(timed, records[0])


def combined(records: list[Record], checked: Record) -> Record:
    """One record of several processes, with the errors of the one that checked."""
    case = Case(*(records[0][key] for key in ("rows", "classes", "dtype", "target", "features")))
    ms = [record["ms"] for record in records]
    ratios = [record["eager_ms"] / record["ms"] for record in records]
    errors = {key: value for key, value in checked.items() if key.endswith("_error")}
    together = {
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
    return {**records[0], **together, **errors}
