"""What the compiler makes of the kernels, for GPUs that need not be here.

    python -m benchmarks.disassemble
    python -m benchmarks.disassemble --classes 50257 99991 --dtypes bfloat16 --targets sm_90 --json
    python -m benchmarks.disassemble --all --check --jobs 2

The last compiles every variant for every target, in two processes; its exit status is 1 if one does not compile or a
figure is over its budget (`budgets.py`). What the launchers would launch for real problems is compiled (`compiled.py`)
and disassembled. One line a kernel:

    regs      registers a thread;  warps: that are resident a multiprocessor with them
    local     bytes of local memory a thread (0: nothing spills anywhere)
    whole     all of a kernel, from its first instruction to its last, where a row is read once
    rows      the loop over the tiles of a longer row, in a forward pass;  gradient: the loop that writes their gradient
    16B ld/st wide loads and stores in the kernel or in the body of a loop;  narrow: other accesses of a body
    inst/el   instructions, for each element of a thread
    exp2/el   evaluations of 2^x by the hardware, likewise (none in float64)

A thread's elements are BLOCK_ROWS * C / threads of a whole row, BLOCK_ROWS * BLOCK_C / threads in a body, or more where
the compiler unrolls it. `--peers` adds the kernels of Liger-Kernel and QuACK, which have no offset, where they are
installed. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from triton import knobs

from benchmarks.static.budgets import violations
from benchmarks.static.compiled import (
    COMMON,
    DTYPES,
    HEADS,
    OTHERS,
    TARGETS,
    VARIANTS,
    Call,
    calls_of,
    compiled,
    make_problem,
)
from benchmarks.static.peer_kernels import PEERS, figures_of_peer

# Figures --------------------------------------------------------------------------------------------------------------


def tool(name: str) -> str:
    return str(getattr(knobs.nvidia, name).path)


def cuda_figures(cubin: bytes) -> tuple[dict[str, int], list[str]]:
    """Registers and local memory, and the instructions in the order of their addresses."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True)
        sass = subprocess.run([tool("cuobjdump"), "-sass", path], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}
    lines = [
        f"{int(address, 16):x} {text}"
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
        if not text.startswith("NOP")
    ]
    return {"regs": found["REG"], "local": found["STACK"] + found["LOCAL"]}, lines[:-1]  # what follows is never reached


def innermost_loops(lines: list[str]) -> list[list[str]]:
    """The instructions between each backward branch and its target that hold no other such loop."""
    at = {line.split(" ", 1)[0]: i for i, line in enumerate(lines)}
    spans = []
    for i, line in enumerate(lines):
        jump = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", line)
        if jump and at.get(f"{int(jump[1], 16):x}", len(lines)) < i:
            spans.append((at[f"{int(jump[1], 16):x}"], i))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [lines[first : last + 1] for first, last in inner]


HEAD_KERNELS = ("_parts_kernel", "_join_kernel", "_gradient_kernel")
WIDTHS = {"128": 16, "64": 8, "U16": 2, "U8": 1}


def loaded_bytes(loop: list[str]) -> int:
    """Bytes that a thread loads from global memory in a body."""
    modifiers = [re.search(r"\bLDG\.(\S+)", line) for line in loop]
    return sum(next((WIDTHS[w] for w in m[1].split(".") if w in WIDTHS), 4) for m in modifiers if m)


def tile_elements(call: Call) -> tuple[float, float]:
    """Elements of a tile for each thread, and the bytes that it loads for them: logits and what is added to them."""
    n_threads = 32 * call.options["num_warps"]
    elements = call.arguments["BLOCK_ROWS"] * call.arguments["BLOCK_C"] / n_threads
    vectors, dense = call.arguments["vectors"], call.arguments["N_LABELS"] == 0
    per_class = [vectors.log_prior, vectors.scale]
    if dense or call.arguments["HAS_SMOOTHING"]:
        per_class += [vectors.weight, vectors.smoothing_distribution]
    columns = max(call.arguments.get("VEC", 1), call.arguments["BLOCK_C"] / n_threads)
    n_bytes = elements * call.arguments["logits"].element_size()
    n_bytes += sum(columns * vector.element_size() for vector in per_class if vector is not None)
    return elements, n_bytes + (elements * vectors.target.element_size() if dense else 0)


def kind_of(loop: list[str]) -> str | None:
    """What a loop does: only "rows" and "gradient" take elements of a row; None: nothing that matters."""
    text = "\n".join(loop)
    if not re.search(r"\b(MUFU\.EX2|DFMA)\b", text):
        return None
    if re.search(r"\bLDG\.\S*STRONG", text):
        return "join"  # the parts of a split row
    return "gradient" if "STG" in text else "rows"


def bodies_of(lines: list[str], call: Call) -> list[dict[str, Any]]:
    """The figures of each loop over a row, by name."""
    loops = [(kind, loop) for loop in innermost_loops(lines) if (kind := kind_of(loop)) in ("rows", "gradient")]
    bodies = []
    for kind, loop in loops:
        name = "sum over rows" if call.name == "_grad_log_prior_kernel" else kind
        bodies.append({"name": name, **body_figures(loop, call)})
    return bodies


def body_figures(loop: list[str], call: Call) -> dict[str, Any]:
    def count(pattern: str) -> int:
        return sum(1 for line in loop if re.search(pattern, line))

    elements, n_bytes = tile_elements(call)
    # Tiles in one body: the compiler may unroll a loop (not seen of tall tiles, of which a thread has any shape).
    unrolled = max(1, round(loaded_bytes(loop) / n_bytes)) if call.arguments.get("VEC", 1) > 1 else 1
    n_elements = unrolled * elements
    return {
        "unrolled": unrolled,
        "row_bytes": n_elements * call.arguments["logits"].element_size(),
        "wide_loads": count(r"\bLDG\.\S*\.?128"),
        "narrow_loads": count(r"\bLDG\b(?!\S*128)"),
        "narrow_row_loads": count(r"\bLDG\.E(\.\w+)*\.(U16|U8)\b"),
        "wide_stores": count(r"\bSTG\.\S*\.?128"),
        "narrow_stores": count(r"\bSTG\b(?!\S*128)"),
        "spills": count(r"\b(LDL|STL)\b"),
        "barriers": count(r"\bBAR\b"),
        "instructions_per_element": round(len(loop) / n_elements, 2),
        "exp2_per_element": round(count(r"\bMUFU\.EX2") / n_elements, 2),
    }


def wide_loads_before_use(lines: list[str]) -> int:
    """How many 16-byte loads come before the first barrier, and before what reads that which one of them has loaded."""
    loaded: set[str] = set()
    n_loads = 0
    for line in lines:
        if re.search(r"\bBAR\b", line):
            break
        registers = re.findall(r"\bR(\d+)\b", line)
        if re.search(r"\bLDG\.\S*\.?128", line):
            first = int(registers[0])
            if loaded.intersection(registers[1:]):  # an address
                break
            loaded |= {str(first + i) for i in range(4)}
            n_loads += 1
        elif registers and loaded.intersection(registers[0 if "ST" in line else 1 :]):
            break
        elif registers:
            loaded.discard(registers[0])
    return n_loads


def whole_figures(lines: list[str], n_elements: float) -> dict[str, Any]:
    """Those of a kernel whose threads have so many elements of a row each."""

    def count(pattern: str) -> int:
        return sum(1 for line in lines if re.search(pattern, line))

    return {
        "elements": round(n_elements, 2),
        "wide_loads": count(r"\bLDG(STS)?\.\S*\.?128"),
        "loads_before_use": wide_loads_before_use(lines),
        "wide_stores": count(r"\bSTG\.\S*\.?128"),
        "spills": count(r"\b(LDL|STL)\b"),
        "barriers": count(r"\bBAR\b"),
        "instructions_per_element": round(len(lines) / n_elements, 2),
        "exp2_per_element": round(count(r"\bMUFU\.EX2") / n_elements, 2),
    }


def resident_warps(regs: int, num_warps: int) -> int:
    """How many warps a multiprocessor holds: of 65,536 registers, given out by 8 a thread, at most 64 warps."""
    of_warp = 32 * (-(-regs // 8) * 8)
    return min(64, 65536 // of_warp) // num_warps * num_warps


def name_of(call: Call) -> str:
    if call.arguments.get("upstream") is not None and call.name in ("_resident_kernel", "_streamed_kernel"):
        return f"{call.name} backward"
    return f"{call.name} + gradient" if call.arguments.get("grad_logits") is not None else call.name


def figures(call: Call, target_name: str) -> dict[str, Any]:
    """Compile a call for a target; what its binary holds."""
    asm = compiled(call, target_name).asm
    row: dict[str, Any] = {"kernel": name_of(call), "target": target_name, "vec": call.arguments.get("VEC", 1)}
    if call.name == "_streamed_kernel":
        row["splits"] = call.arguments["splits"]
    if TARGETS[target_name].backend != "cuda":
        text = asm["amdgcn"]
        row["regs"] = int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0])
        row["local"] = int(re.findall(r"\.private_segment_fixed_size:\s*(\d+)", text)[0])
        row["wide_loads"], row["wide_stores"] = (
            len(re.findall(rf"\b(?:global|flat|buffer)_{access}_dwordx4\b", text)) for access in ("load", "store")
        )
        return row
    usage, lines = cuda_figures(asm["cubin"])
    row |= usage
    row["warps"] = resident_warps(row["regs"], call.options["num_warps"])
    n_threads = 32 * call.options["num_warps"]
    if call.name == "_resident_kernel":
        row["block_rows"] = call.arguments["BLOCK_ROWS"]
        row["whole"] = whole_figures(lines, row["block_rows"] * call.arguments["n_classes"] / n_threads)
    elif call.name in ("_parts_kernel", "_gradient_kernel"):
        n_classes = min(call.arguments["CHUNK"], call.arguments["width"])
        row["whole"] = whole_figures(lines, n_classes / n_threads)
    elif call.name not in HEAD_KERNELS and "BLOCK_ROWS" in call.arguments:
        row["block_rows"] = call.arguments["BLOCK_ROWS"]
        row["bodies"] = bodies_of(lines, call)
    return row


# The command ----------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    target: str
    dtype: str
    classes: int
    variant: str
    rows: int = 4096
    row_step: int | None = None


def figures_of(task: Task) -> list[dict[str, Any]]:
    problem = make_problem(task.variant, task.rows, task.classes, DTYPES[task.dtype], task.row_step)
    described = {"dtype": task.dtype, "classes": task.classes, "variant": task.variant}
    try:
        return [described | figures(call, task.target) for call in calls_of(problem, task.variant, task.target)]
    except Exception as error:
        raise RuntimeError(f"{task} does not compile") from error


def every_task() -> Iterator[Task]:
    """Every variant for every target and dtype at an unaligned C; what a variant shares with all others once a target:
    rarer options, and rows that are aligned, odd steps apart, shorter than a tile, too short for vectors, and split."""
    for target, dtype in itertools.product(TARGETS, DTYPES):
        yield from (Task(target, dtype, 8142, variant) for variant in COMMON)
    for target in TARGETS:
        yield from (Task(target, "bfloat16", 8142, variant) for variant in OTHERS)
        yield from (Task(target, dtype, 8192, variant, 512) for variant in HEADS for dtype in ("bfloat16", "float32"))
        for dtype in ("bfloat16", "float32"):
            yield from (Task(target, dtype, n_classes, "label") for n_classes in (100, 1000, 4097, 8192, 16384))
            yield Task(target, dtype, 50257, "label", row_step=100_003)
            yield Task(target, dtype, 50257, "label", rows=64)


def rows_of(tasks: Iterable[Task], n_jobs: int) -> Iterator[dict[str, Any]]:
    if n_jobs == 1:
        yield from itertools.chain.from_iterable(map(figures_of, tasks))
        return
    with ProcessPoolExecutor(n_jobs, multiprocessing.get_context("spawn")) as pool:
        yield from itertools.chain.from_iterable(pool.map(figures_of, tasks))


def rows_of_peers(tasks: Iterable[Task]) -> Iterator[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, context, max_tasks_per_child=1)
        if sys.version_info >= (3, 11)
        else ProcessPoolExecutor(1, context) as pool
    ):
        for task, peer in itertools.product(tasks, PEERS):
            yield pool.submit(figures_of_peer, peer, task.target, task.dtype, task.rows, task.classes).result()


def show(row: dict[str, Any]) -> str:
    if "reason" in row:
        return (
            f"{row['target']:7} {row['dtype']:9} {row['classes']:8} {row['variant']:19} not compiled: {row['reason']}"
        )
    line = (
        f"{row['target']:7} {row['dtype']:9} {row['classes']:8} {row['variant']:19} {row['kernel']:27} "
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
    given = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        sys.exit("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    if min(given.rows, given.jobs, *given.classes) < 1 or not max(given.classes) <= (given.row_step or math.inf):
        parser.error("--rows, --jobs and --classes must be at least 1, --row-step at least the number of classes")
    chosen = itertools.product(given.targets, given.dtypes, given.classes, given.variants)
    tasks = list(every_task()) if given.all else [Task(*task, given.rows, given.row_step) for task in chosen]
    n_rows, wrong = 0, []
    peers = {task._replace(variant="") for task in tasks if given.peers and TARGETS[task.target].backend == "cuda"}
    for row in itertools.chain(rows_of(tasks, given.jobs), rows_of_peers(sorted(peers))):
        print(json.dumps(row) if given.json else show(row), flush=True)
        if row["variant"] in PEERS:
            continue
        n_rows += 1
        wrong += [f"{show(row)}\n  {violation}" for violation in violations(row)]
    if given.check:
        print(*wrong, f"{n_rows} kernels compiled, {len(wrong)} figures over their budgets", sep="\n", file=sys.stderr)
    return 1 if given.check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
