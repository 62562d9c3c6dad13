"""Compile the cross-entropy kernels of other libraries, for a GPU that this machine need not have.

Each kernel computes the loss of one label a row, without an offset, and the gradient. Call `figures_of_peer` in a fresh
process: Triton keeps what it compiled for one target, and CuTe reads its target from the environment.
"""

from __future__ import annotations

import importlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.static.compile_only import compile_only
from benchmarks.static.disassembly import cuda_figures, resident_warps, whole_figures

PEERS = ("Liger-Kernel", "QuACK")


class Compiled(NamedTuple):
    kernel: str
    cubin: bytes
    n_threads: int  # threads of a program
    elements: float  # elements of a row for each thread


def compile_liger(target: str, dtype: str, n_rows: int, n_classes: int) -> Compiled:
    module: Any = importlib.import_module("liger_kernel.ops.cross_entropy")
    kernel, compiled_kernels = module.liger_cross_entropy_kernel, []
    run = type(kernel).run

    def run_and_keep(self: Any, *args: Any, **options: Any) -> Any:
        compiled_kernels.append(run(self, *args, **options))
        return compiled_kernels[-1]

    logits = torch.zeros(n_rows, n_classes, dtype=getattr(torch, dtype), requires_grad=True)
    with compile_only(target):
        type(kernel).run = run_and_keep
        try:
            function = module.LigerCrossEntropyFunction
            function.apply(logits, torch.zeros(n_rows, dtype=torch.int64), None, -100, 0.0, 0.0, "mean", None, False)
        finally:
            type(kernel).run = run
    n_threads = 32 * compiled_kernels[0].metadata.num_warps
    return Compiled(kernel.__name__, compiled_kernels[0].asm["cubin"], n_threads, n_classes / n_threads)


def compile_quack(target: str, dtype: str, n_rows: int, n_classes: int) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "CUTE_DSL_ARCH": f"{target}a", "CUTE_DSL_DUMP_DIR": folder,
            "CUTE_DSL_KEEP_CUBIN": "1", "CUTE_DSL_KEEP_PTX": "1",
        }  # fmt: skip
        cutlass: Any = importlib.import_module("cutlass")
        kernel: Any = importlib.import_module("quack.cross_entropy").CrossEntropy
        element_type = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16, "float32": cutlass.Float32}[dtype]
        kernel.compile.__wrapped__(element_type, cutlass.Int64, element_type, n_classes, True, True, None, 2)
        (cubin,), (ptx,) = Path(folder).glob("*.cubin"), Path(folder).glob("*.ptx")
        n_threads = int(re.findall(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx.read_text())[0])
        operation = kernel(element_type, n_classes, online_softmax=False)
        operation._set_cluster_n()
        return Compiled(
            "CrossEntropy",
            cubin.read_bytes(),
            n_threads,
            n_classes / (operation._threads_per_row() * operation.cluster_n),
        )


COMPILERS = {"Liger-Kernel": compile_liger, "QuACK": compile_quack}


def figures_of_peer(peer: str, target: str, dtype: str, n_rows: int, n_classes: int) -> dict[str, Any]:
    """A row of the table of `benchmarks.disassemble`; with a reason in place of figures if nothing compiles."""
    described = {"target": target, "dtype": dtype, "classes": n_classes, "variant": peer}
    try:
        compiled = COMPILERS[peer](target, dtype, n_rows, n_classes)
    except Exception as error:
        return described | {
            "kernel": "",
            "reason": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        }
    usage, lines = cuda_figures(compiled.cubin)
    warps = resident_warps(usage["regs"], compiled.n_threads // 32)
    return (
        described
        | usage
        | {"kernel": compiled.kernel, "warps": warps, "whole": whole_figures(lines, compiled.elements)}
    )
