"""What the compiler makes of the kernels, for GPUs that need not be here.

    python -m benchmarks.disassemble
    python -m benchmarks.disassemble --classes 50257 99991 --dtypes bfloat16 --targets sm_90 --json

The launchers are called for real problems, with a recorder in the place of each kernel; what they would have launched
is compiled for each target and disassembled. One line a kernel:

    regs      registers a thread;  local: bytes of local memory a thread (0: nothing spills anywhere)
    rows      the loop over the full tiles of a row, in a forward pass;  gradient: the loop that writes their gradient
    last tile the same under a mask, run for the last tile of a row
    16B ld/st wide loads and stores in the body of a loop;  narrow: its other accesses (offsets of odd rows, and rows)
    inst/el   instructions in a body, for each element that it takes
    exp2/el   evaluations of 2^x by the hardware, likewise (none in float64)

A body's elements a thread are BLOCK_ROWS * BLOCK_C / threads, or more where the compiler unrolls it. Run it without
TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_la._problem import Problem

# Modules, where the package holds functions of the same names.
forward_module = importlib.import_module("fused_la._triton.forward")
backward_module = importlib.import_module("fused_la._triton.backward")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
KERNELS = {
    forward_module: ("_prepare_kernel", "_forward_kernel"),
    backward_module: ("_grad_logits_kernel", "_grad_log_prior_kernel"),
}


class Call(NamedTuple):
    """A kernel as a launcher calls it."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    num_warps: int


# Problems -------------------------------------------------------------------------------------------------------------

VARIANTS = ("label", "two labels", "margin", "weights, smoothing", "probabilities", "images", "learned prior")


def make_problem(variant: str, n_rows: int, n_classes: int, dtype: torch.dtype, row_step: int | None) -> Problem:
    """Rows of logits, row_step elements apart, and the arguments that a variant has; no value is ever read."""
    if variant == "images":
        logits = torch.empty(n_rows, n_classes, 9, dtype=dtype).transpose(1, 2)
    else:
        step = n_classes if row_step is None else row_step
        logits = torch.empty(n_rows * step + n_classes, dtype=dtype).as_strided((n_rows, 1, n_classes), (step, step, 1))
    rows = logits.shape[:2]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    n_labels = 2 if variant == "two labels" else 1
    target, weights = torch.empty(*rows, n_labels, dtype=torch.int64), torch.empty(n_classes)
    if variant == "probabilities":
        target = torch.empty((*rows, n_classes), dtype=compute)
    smooth = variant == "weights, smoothing"
    return Problem(
        logits,
        torch.empty(n_classes),
        target,
        torch.empty(*rows, 2) if variant == "two labels" else None,
        weight=weights if smooth else None,
        mean_weight=weights if smooth else None,
        smoothing_distribution=weights if smooth else None,
        target_offset=weights if variant == "margin" else None,
        scale=weights if variant == "margin" else None,
        label_smoothing=0.1 if smooth else 0.0,
    )


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Calls of the kernels within, none of which runs."""
    calls: list[Call] = []

    class Recorder:
        def __init__(self, name: str, kernel: Any):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            def call(*args: Any, num_warps: int = 4, **kwargs: Any) -> None:
                arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
                calls.append(Call(self.name, self.kernel, arguments, num_warps))

            return call

    originals = [(module, name, getattr(module, name)) for module, names in KERNELS.items() for name in names]
    for module, name, kernel in originals:
        setattr(module, name, Recorder(name, kernel))
    try:
        yield calls
    finally:
        for module, name, kernel in originals:
            setattr(module, name, kernel)


def calls_of(problem: Problem, variant: str) -> list[Call]:
    """What a training step launches, each kernel once: forward with and without the gradient, and backward."""
    with recorded() as calls:
        _, state, normalizer, _ = forward_module.launch_forward(problem, "mean", False)
        if forward_module.forward_gradient(problem, "mean"):
            forward_module.launch_forward(problem, "mean", True)
            calls[:] = [*calls[:2], calls[-1]]  # what prepares is the same
        upstream = normalizer.expand(problem.logits.shape[:2])
        backward_module.launch_backward(problem, state, upstream, normalizer, True, variant == "learned prior")
    return calls


# Compilation ----------------------------------------------------------------------------------------------------------

POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


def source(call: Call) -> ASTSource:
    """The kernel specialised for a call, as Triton does at run time: for 1, for multiples of 16, for None."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def specialise(value: Any, path: tuple[int, ...], frozen: bool) -> Any:
        if isinstance(value, tuple):
            types = [specialise(item, (*path, i), frozen) for i, item in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        if isinstance(value, Tensor):
            if value.data_ptr() % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return POINTERS[value.dtype]
        if isinstance(value, int) and not isinstance(value, bool) and (frozen or value != 1):
            if not frozen and value % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        constants[path] = value
        return "constexpr"

    signature = {}
    for at, parameter in enumerate(call.kernel.params):
        value = call.arguments[parameter.name]
        if parameter.is_constexpr:
            constants[(at,)] = value
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = specialise(value, (at,), parameter.do_not_specialize)
    return ASTSource(call.kernel, signature=signature, constexprs=constants, attrs=attributes)


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
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    return {"regs": found["REG"], "local": found["STACK"] + found["LOCAL"]}, [
        f"{int(address, 16):x} {text}" for address, text in lines
    ]


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


WIDTHS = {"128": 16, "64": 8, "U16": 2, "U8": 1}


def loaded_bytes(loop: list[str]) -> int:
    """Bytes that a thread loads from global memory in a body."""
    modifiers = [re.search(r"\bLDG\.(\S+)", line) for line in loop]
    return sum(next((WIDTHS[w] for w in m[1].split(".") if w in WIDTHS), 4) for m in modifiers if m)


def tile_elements(call: Call) -> tuple[float, float]:
    """Elements of a tile for each thread, and the bytes that it loads for them: logits and what is added to them."""
    n_threads = 32 * call.num_warps
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
    """The figures of each loop over a row, by name; of a kind, the last in the code is the one for the last tile."""
    loops = [(kind, loop) for loop in innermost_loops(lines) if (kind := kind_of(loop)) in ("rows", "gradient")]
    bodies = []
    for i, (kind, loop) in enumerate(loops):
        is_last = kind not in [later for later, _ in loops[i + 1 :]]
        name = f"{kind}, last tile" if is_last else kind
        if call.name == "_grad_log_prior_kernel":
            name = "sum over rows"
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


def figures(call: Call, target_name: str) -> dict[str, Any]:
    """Compile a call for a target; what its binary holds."""
    target = TARGETS[target_name]
    compiled = triton.compile(source(call), target=target, options={"num_warps": call.num_warps})
    row: dict[str, Any] = {"kernel": call.name, "target": target_name}
    if call.name == "_forward_kernel":
        row["kernel"] += " + gradient" if call.arguments["grad_logits"] is not None else ""
        row["splits"] = call.arguments["SPLITS"]
    if target.backend != "cuda":
        text = compiled.asm["amdgcn"]
        row["regs"] = int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0])
        row["local"] = int(re.findall(r"\.private_segment_fixed_size:\s*(\d+)", text)[0])
        row["wide_loads"] = text.count("_load_dwordx4")
        row["wide_stores"] = text.count("_store_dwordx4")
        return row
    usage, lines = cuda_figures(compiled.asm["cubin"])
    row |= usage
    if "BLOCK_C" in call.arguments:
        row["block_rows"] = call.arguments["BLOCK_ROWS"]
        row["bodies"] = bodies_of(lines, call)
    return row


def table(targets: list[str], dtypes: list[str], classes: list[int], variants: list[str], n_rows: int,
          row_step: int | None) -> Iterator[dict[str, Any]]:  # fmt: skip
    for target in targets:
        for dtype in dtypes:
            for n_classes in classes:
                for variant in variants:
                    problem = make_problem(variant, n_rows, n_classes, DTYPES[dtype], row_step)
                    for call in calls_of(problem, variant):
                        yield {"dtype": dtype, "classes": n_classes, "variant": variant, **figures(call, target)}


def show(row: dict[str, Any]) -> str:
    line = (
        f"{row['target']:7} {row['dtype']:9} {row['classes']:8} {row['variant']:19} {row['kernel']:26} "
        f"regs {row['regs']:3} local {row['local']}"
    )
    for body in row.get("bodies", []):
        line += (
            f" | {body['name']}: 16B {body['wide_loads']} ld {body['wide_stores']} st, "
            f"narrow {body['narrow_loads']} ld {body['narrow_stores']} st, "
            f"{body['instructions_per_element']:.2f} inst/el, "
            f"{body['exp2_per_element']:.2f} exp2/el"
        )
    if "bodies" not in row and "wide_loads" in row:
        line += f" | 16B {row['wide_loads']} ld {row['wide_stores']} st (whole kernel)"
    return line


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.disassemble", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["sm_90"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--classes", nargs="+", type=int, default=[8142, 8192], metavar="C")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["label"])
    parser.add_argument("--rows", type=int, default=4096, metavar="N", help="rows: few are split over programs")
    parser.add_argument("--row-step", type=int, metavar="S", help="elements from row to row (default: C)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line in place of the table")
    given = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        sys.exit("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    if given.rows < 1 or min(given.classes) < 1 or (given.row_step is not None and given.row_step < max(given.classes)):
        parser.error("--rows and --classes must be at least 1, --row-step at least the number of classes")
    for row in table(given.targets, given.dtypes, given.classes, given.variants, given.rows, given.row_step):
        print(json.dumps(row) if given.json else show(row), flush=True)


if __name__ == "__main__":
    main()
