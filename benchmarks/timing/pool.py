"""Jobs in several processes at once, until a deadline; one that crashes or hangs costs its own results alone."""

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


class AnyJob(Protocol):
    """It is pickled to a process, where it runs."""

    def record(self, status: str, reason: str = "", **figures: Any) -> Record: ...

    def run(self) -> Iterator[Record]: ...


def run_job(job: AnyJob) -> Iterator[Record]:
    """Its records; what it raises is one too, unless its process cannot be used any more."""
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
    job: AnyJob
    stop_at: float


def in_processes(
    jobs: Iterable[AnyJob], n_processes: int, until: float, timeout: float, least: float = 0.0
) -> Generator[Record, None, None]:
    """Records of jobs as they come, in order of the jobs where there is one process.

    No job begins with less than `least` seconds before `until` (of `time.monotonic`), and none runs on after it. One
    that gives no record for `timeout` seconds is stopped. Processes are kept from job to job, as long as they live.
    """
    waiting = deque(jobs)
    idle = [Worker(timeout, run_job) for _ in range(min(n_processes, len(waiting)))]
    workers = tuple(idle)
    running: dict[Connection, Running] = {}
    try:
        while waiting or running:
            while waiting and idle:
                if time.monotonic() + least > until:
                    yield from (job.record("skipped", "not begun: too little time was left") for job in waiting)
                    waiting.clear()
                    break
                worker, job = idle.pop(), waiting.popleft()
                connection, _ = worker.started()
                running[connection] = Running(worker, job, min(until, time.monotonic() + timeout))
                try:
                    connection.send(job)
                except OSError:
                    yield crashed(running.pop(connection))
                    idle.append(worker)
            if not running:
                continue
            first = min(one.stop_at for one in running.values())
            for connection in wait(list(running), max(0.0, first - time.monotonic())):
                assert isinstance(connection, Connection)
                worker, job, _ = running[connection]
                try:
                    received = connection.recv()
                except (EOFError, OSError):
                    yield crashed(running.pop(connection))
                    idle.append(worker)
                    continue
                if not isinstance(received, bool):  # a record
                    running[connection] = Running(worker, job, min(until, time.monotonic() + timeout))
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
                if stop_at == until:
                    yield job.record("unfinished", "stopped: the time of its stage was over")
                else:
                    yield job.record("failed", f"no result within {timeout:g} s: stopped")
        for worker in workers:  # all at once, before any is waited for
            if worker.connection is not None:
                with contextlib.suppress(OSError):
                    worker.connection.send(None)
        for worker in workers:
            if time.monotonic() < until:
                worker.finish()
    finally:
        for worker in workers:
            worker.stop()


def crashed(one: Running) -> Record:
    process = one.worker.process
    assert process is not None
    process.join(5)
    code = process.exitcode
    one.worker.stop()
    return one.job.record("crashed", f"its process ended with exit code {code}")
