"""Registers, memory accesses and instructions of the compiled kernels, for a GPU that this machine need not have.

    python -m benchmarks.disassemble
    python -m benchmarks.disassemble --classes 50257 99991 --dtypes bfloat16 --targets sm_90 --json
    python -m benchmarks.disassemble --all --check --jobs 2

The last command compiles every variant for every target, in two processes; its exit status is 1 if one does not compile
or a figure is over its budget (`static.budgets`). The kernels are compiled with the arguments that the launchers pass
for real problems (`static.compiled`) and disassembled (`static.disassembly`). One line a kernel:

    regs      registers a thread;  warps: resident warps of a multiprocessor with these registers
    local     bytes of local memory a thread (0: nothing spills)
    whole     a whole kernel, if it reads each row once
    rows      in a forward pass the loop over the tiles of a longer row;  gradient: the loop that writes the gradient
    16B ld/st 16-byte loads and stores in the kernel or in the body of a loop;  narrow: other accesses of a body
    inst/el   instructions for each element of a thread
    exp2/el   evaluations of 2^x by the hardware for each element (none in float64)

A thread's elements are BLOCK_ROWS * C / threads of a whole row, BLOCK_ROWS * BLOCK_C / threads in the body of a loop,
or more if the compiler unrolls it. `--peers` adds the kernels of Liger-Kernel and QuACK, which have no offset, if they
are installed. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from triton import knobs

from benchmarks.static.budgets import violations
from benchmarks.static.compiled import (
    BY_GROUP,
    COMMON_VARIANTS,
    DTYPES,
    HEAD_VARIANTS,
    RARE_VARIANTS,
    TARGETS,
    VARIANTS,
    calls_of,
    make_problem,
)
from benchmarks.static.disassembly import kernel_figures
from benchmarks.static.peer_kernels import PEERS, figures_of_peer


class Task(NamedTuple):
    target: str
    dtype: str
    classes: int
    variant: str
    rows: int = 4096
    row_step: int | None = None


def compile_task(task: Task) -> list[dict[str, Any]]:
    problem = make_problem(task.variant, task.rows, task.classes, DTYPES[task.dtype], task.row_step)
    described = {"dtype": task.dtype, "classes": task.classes, "variant": task.variant}
    try:
        return [described | kernel_figures(call, task.target) for call in calls_of(problem, task.variant, task.target)]
    except Exception as error:
        raise RuntimeError(f"{task} does not compile") from error


def every_task() -> Iterator[Task]:
    """The tasks of --all: every common variant for every target and dtype at an unaligned C.

    Rare options come once a target, and so do, for one label, rows that are aligned, an odd step apart, shorter than a
    tile, too short for vectors, and split; and by group, rows that stream.
    """
    for target, dtype in itertools.product(TARGETS, DTYPES):
        yield from (Task(target, dtype, 8142, variant) for variant in COMMON_VARIANTS)
    for target in TARGETS:
        yield from (Task(target, "bfloat16", 8142, variant) for variant in RARE_VARIANTS)
        yield from (
            Task(target, dtype, 8192, variant, 512) for variant in HEAD_VARIANTS for dtype in ("bfloat16", "float32")
        )
        for dtype in ("bfloat16", "float32"):
            yield from (Task(target, dtype, n_classes, "label") for n_classes in (100, 1000, 4097, 8192, 16384))
            yield Task(target, dtype, 50257, "label", row_step=100_003)
            yield Task(target, dtype, 50257, "label", rows=64)
            yield Task(target, dtype, 50257, BY_GROUP)


def rows_of(tasks: Iterable[Task], n_jobs: int) -> Iterator[dict[str, Any]]:
    if n_jobs == 1:
        yield from itertools.chain.from_iterable(map(compile_task, tasks))
        return
    with ProcessPoolExecutor(n_jobs, multiprocessing.get_context("spawn")) as pool:
        yield from itertools.chain.from_iterable(pool.map(compile_task, tasks))


def peer_rows(tasks: Iterable[Task]) -> Iterator[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, context, max_tasks_per_child=1)
        if sys.version_info >= (3, 11)
        else ProcessPoolExecutor(1, context) as pool
    ):
        for task, peer in itertools.product(tasks, PEERS):
            yield pool.submit(figures_of_peer, peer, task.target, task.dtype, task.rows, task.classes).result()


def format_row(row: dict[str, Any]) -> str:
    if "reason" in row:
        return (
            f"{row['target']:7} {row['dtype']:9} {row['classes']:8} {row['variant']:26} not compiled: {row['reason']}"
        )
    line = (
        f"{row['target']:7} {row['dtype']:9} {row['classes']:8} {row['variant']:26} {row['kernel']:27} "
        f"regs {row['regs']:3} local {row['local']}"
    )
    if "warps" in row:
        line += f" warps {row['warps']}"
    if "whole" in row:
        whole = row["whole"]
        line += (
            f" | whole: 16B {whole['wide_loads']} ld {whole['wide_stores']} st, "
            f"{whole['instructions_per_element']:.2f} inst/el, {whole['exp2_per_element']:.2f} exp2/el"
        )
    for body in row.get("bodies", []):
        line += (
            f" | {body['name']}: 16B {body['wide_loads']} ld {body['wide_stores']} st, "
            f"narrow {body['narrow_loads']} ld {body['narrow_stores']} st, "
            f"{body['instructions_per_element']:.2f} inst/el, "
            f"{body['exp2_per_element']:.2f} exp2/el"
        )
    if "wide_loads" in row:
        line += f" | 16B {row['wide_loads']} ld {row['wide_stores']} st (whole kernel)"
    return line


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.disassemble", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["sm_90"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--classes", nargs="+", type=int, default=[8142, 8192], metavar="C")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["label"])
    parser.add_argument("--rows", type=int, default=4096, metavar="N", help="rows: few are split over programs")
    parser.add_argument("--row-step", type=int, metavar="S", help="elements from row to row (default: C)")
    parser.add_argument("--all", action="store_true", help="every variant for every target, in place of all the above")
    parser.add_argument("--peers", action="store_true", help="the kernels of other libraries too")
    parser.add_argument("--json", action="store_true", help="one JSON object a line in place of the table")
    parser.add_argument("--check", action="store_true", help="exit status 1 where a figure passes its budget")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="processes (default: 1)")
    options = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        sys.exit("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    if min(options.rows, options.jobs, *options.classes) < 1 or not max(options.classes) <= (
        options.row_step or math.inf
    ):
        parser.error("--rows, --jobs and --classes must be at least 1, --row-step at least the number of classes")
    chosen = itertools.product(options.targets, options.dtypes, options.classes, options.variants)
    tasks = list(every_task()) if options.all else [Task(*task, options.rows, options.row_step) for task in chosen]
    n_rows, wrong = 0, []
    peers = {task._replace(variant="") for task in tasks if options.peers and TARGETS[task.target].backend == "cuda"}
    for row in itertools.chain(rows_of(tasks, options.jobs), peer_rows(sorted(peers))):
        print(json.dumps(row) if options.json else format_row(row), flush=True)
        if row["variant"] in PEERS:
            continue
        n_rows += 1
        wrong += [f"{format_row(row)}\n  {violation}" for violation in violations(row)]
    if options.check:
        print(*wrong, f"{n_rows} kernels compiled, {len(wrong)} figures over their budgets", sep="\n", file=sys.stderr)
    return 1 if options.check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
