"""Figures of a compiled kernel: registers, local memory, memory accesses and instructions for each element.

For NVIDIA they are counted in the disassembly (SASS) of the cubin by `cuobjdump`, for AMD in the assembly text.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from typing import Any

from triton import knobs

from benchmarks.static.compiled import TARGETS, Call, compile_call


def tool_path(name: str) -> str:
    return str(getattr(knobs.nvidia, name).path)


def cuda_figures(cubin: bytes) -> tuple[dict[str, int], list[str]]:
    """({registers, local memory}, instructions in the order of their addresses) of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        usage = subprocess.run([tool_path("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True)
        sass = subprocess.run(
            [tool_path("cuobjdump"), "-sass", path], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}
    lines = [
        f"{int(address, 16):x} {text}"
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
        if not text.startswith("NOP")
    ]
    return {"regs": found["REG"], "local": found["STACK"] + found["LOCAL"]}, lines[:-1]  # the last one is never reached


def innermost_loops(lines: list[str]) -> list[list[str]]:
    """The instructions of each innermost loop: from the target of a backward branch to the branch."""
    index_of = {line.split(" ", 1)[0]: i for i, line in enumerate(lines)}
    spans = []
    for i, line in enumerate(lines):
        jump = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", line)
        if jump and index_of.get(f"{int(jump[1], 16):x}", len(lines)) < i:
            spans.append((index_of[f"{int(jump[1], 16):x}"], i))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [lines[first : last + 1] for first, last in inner]


HEAD_KERNELS = ("_tile_state_kernel", "_merge_kernel", "_tile_gradient_kernel")
WIDTHS = {"128": 16, "64": 8, "U16": 2, "U8": 1}


def loaded_bytes(loop: list[str]) -> int:
    """Bytes that a thread loads from global memory in the body of a loop."""
    modifiers = [re.search(r"\bLDG\.(\S+)", line) for line in loop]
    return sum(next((WIDTHS[w] for w in m[1].split(".") if w in WIDTHS), 4) for m in modifiers if m)


def tile_elements(call: Call) -> tuple[float, float]:
    """(elements, bytes loaded) of a tile for each thread: logits, vectors over the classes, and a dense target."""
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


def loop_kind(loop: list[str]) -> str | None:
    """The kind of a loop: "rows" and "gradient" process elements of a row, "join" does not; None for other loops."""
    text = "\n".join(loop)
    if not re.search(r"\b(MUFU\.EX2|DFMA)\b", text):
        return None
    if re.search(r"\bLDG\.\S*STRONG", text):
        return "join"  # merges the partial states of a split row
    return "gradient" if "STG" in text else "rows"


def row_loops(lines: list[str], call: Call) -> list[dict[str, Any]]:
    """Figures of each loop over a row, with its name."""
    loops = [(kind, loop) for loop in innermost_loops(lines) if (kind := loop_kind(loop)) in ("rows", "gradient")]
    bodies = []
    for kind, loop in loops:
        name = "sum over rows" if call.name == "_grad_log_prior_kernel" else kind
        bodies.append({"name": name, **loop_figures(loop, call)})
    return bodies


def loop_figures(loop: list[str], call: Call) -> dict[str, Any]:
    def count(pattern: str) -> int:
        return sum(1 for line in loop if re.search(pattern, line))

    elements, n_bytes = tile_elements(call)
    # The compiler may unroll a loop, so that its body has several tiles. This was not seen with tall tiles, of which a
    # thread may have any shape.
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
    """16-byte loads before the first barrier and before the first instruction that reads what one of them loaded."""
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
    """Figures of a whole kernel whose threads have n_elements of a row each."""

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
    """Warps that a multiprocessor holds: at most 64, with 65,536 registers allocated in units of 8 a thread."""
    registers_per_warp = 32 * (-(-regs // 8) * 8)
    return min(64, 65536 // registers_per_warp) // num_warps * num_warps


def kernel_name(call: Call) -> str:
    if call.arguments.get("upstream") is not None and call.name in ("_resident_kernel", "_streamed_kernel"):
        return f"{call.name} backward"
    return f"{call.name} + gradient" if call.arguments.get("grad_logits") is not None else call.name


def kernel_figures(call: Call, target_name: str) -> dict[str, Any]:
    """Compile a call for a target; returns the figures of its binary."""
    asm = compile_call(call, target_name).asm
    row: dict[str, Any] = {"kernel": kernel_name(call), "target": target_name, "vec": call.arguments.get("VEC", 1)}
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
    elif call.name in ("_tile_state_kernel", "_tile_gradient_kernel"):
        n_classes = min(call.arguments["BLOCK_C"], call.arguments["width"])
        row["whole"] = whole_figures(lines, n_classes / n_threads)
    elif call.name not in HEAD_KERNELS and "BLOCK_ROWS" in call.arguments:
        row["block_rows"] = call.arguments["BLOCK_ROWS"]
        row["bodies"] = row_loops(lines, call)
    return row
