"""Run jobs in several worker processes until a deadline; a job that crashes or hangs loses only its own results."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Protocol

from benchmarks.timing.measure import GpuBrokenError
from benchmarks.timing.run import Worker

Record = dict[str, Any]


class RunnableJob(Protocol):
    """A job that is pickled to a worker process and runs there."""

    def record(self, status: str, reason: str = "", **figures: Any) -> Record: ...

    def run(self) -> Iterator[Record]: ...


def run_job(job: RunnableJob) -> Iterator[Record]:
    """Records of a job. An exception is a record too, unless the process can no longer be used."""
    try:
        yield from job.run()
    except GpuBrokenError:
        raise
    except Exception as error:
        last = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {last[0] if last else ''}"
        yield job.record("failed", reason, traceback="".join(traceback.format_exception(error)))


class Running(NamedTuple):
    worker: Worker
    job: RunnableJob
    stop_at: float


def in_processes(
    jobs: Iterable[RunnableJob], n_processes: int, deadline: float, timeout: float, min_seconds: float = 0.0
) -> Generator[Record, None, None]:
    """Records of jobs as they arrive; with one process, in the order of the jobs.

    No job begins later than `min_seconds` before `deadline` (a time of `time.monotonic`), and none runs after it. A job
    without a record for `timeout` seconds is stopped. A process that still works is kept for the next job.
    """
    waiting = deque(jobs)
    idle = [Worker(timeout, run_job) for _ in range(min(n_processes, len(waiting)))]
    workers = tuple(idle)
    running: dict[Connection, Running] = {}
    try:
        while waiting or running:
            while waiting and idle:
                if time.monotonic() + min_seconds > deadline:
                    yield from (job.record("skipped", "not begun: too little time was left") for job in waiting)
                    waiting.clear()
                    break
                worker, job = idle.pop(), waiting.popleft()
                connection, _ = worker.ensure_started()
                running[connection] = Running(worker, job, min(deadline, time.monotonic() + timeout))
                try:
                    connection.send(job)
                except OSError:
                    yield crash_record(running.pop(connection))
                    idle.append(worker)
            if not running:
                continue
            first = min(running_job.stop_at for running_job in running.values())
            for connection in wait(list(running), max(0.0, first - time.monotonic())):
                assert isinstance(connection, Connection)
                worker, job, _ = running[connection]
                try:
                    received = connection.recv()
                except (EOFError, OSError):
                    yield crash_record(running.pop(connection))
                    idle.append(worker)
                    continue
                if not isinstance(received, bool):  # a record
                    running[connection] = Running(worker, job, min(deadline, time.monotonic() + timeout))
                    yield received
                    continue
                del running[connection]
                if not received:
                    worker.stop()
                idle.append(worker)
            for connection, (worker, job, stop_at) in list(running.items()):
                if time.monotonic() < stop_at:
                    continue
                del running[connection]
                worker.stop()
                idle.append(worker)
                if stop_at == deadline:
                    yield job.record("unfinished", "stopped: the time of its stage was over")
                else:
                    yield job.record("failed", f"no result within {timeout:g} s: stopped")
        for worker in workers:  # tell all of them to end before waiting for the first
            if worker.connection is not None:
                with contextlib.suppress(OSError):
                    worker.connection.send(None)
        for worker in workers:
            if time.monotonic() < deadline:
                worker.finish()
    finally:
        for worker in workers:
            worker.stop()


def crash_record(running_job: Running) -> Record:
    process = running_job.worker.process
    assert process is not None
    process.join(5)
    code = process.exitcode
    running_job.worker.stop()
    return running_job.job.record("crashed", f"its process ended with exit code {code}")
