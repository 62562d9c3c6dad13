"""Compile every kernel for GPUs that are not here; run as a script, without TRITON_INTERPRET.

Prints one JSON object a line: kernel, target, dtype, variant, the bytes of the binary, and for CUDA the number of
16-byte loads and stores in its PTX.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_la._triton.backward import _grad_log_prior_kernel, _grad_logits_kernel
from fused_la._triton.forward import _forward_kernel, _reduce_kernel
from fused_la._triton.launch import choose_launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = (_forward_kernel, _reduce_kernel, _grad_logits_kernel, _grad_log_prior_kernel)
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}


class Variant(NamedTuple):
    """Which arguments a call has."""

    name: str
    n_labels: int  # 0: class probabilities
    smoothing: bool
    given: frozenset[str]
    adjacent: bool = True  # classes adjacent in memory, one row of logits an image
    n_classes: int = 8192


VARIANTS = (
    Variant("label", 1, False, frozenset({"log_prior", "normalizer"})),
    Variant("two labels", 2, False, frozenset({"log_prior", "target_weight", "normalizer"})),
    Variant("label, weight, smoothing", 1, True, frozenset({"log_prior", "weight", "smoothing_distribution"})),
    Variant("probabilities", 0, True, frozenset({"log_prior", "weight", "normalizer"})),
    Variant("images", 1, False, frozenset({"log_prior"}), adjacent=False, n_classes=21),
)


def source(kernel: Any, dtype: torch.dtype, variant: Variant) -> tuple[ASTSource, int]:
    """The kernel specialised as its launcher would for aligned contiguous tensors, and its number of warps."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    launch = choose_launch(variant.n_classes, dtype, variant.adjacent)
    constants: dict[str, Any] = {
        "N_LABELS": variant.n_labels,
        "HAS_SMOOTHING": variant.smoothing,
        "COMPUTE": tl.float64 if compute == torch.float64 else tl.float32,
        "BLOCK_ROWS": launch.block_rows,
        "BLOCK_C": launch.block_c,
        "BLOCK": 1024,
        "MEAN": True,
    }
    if variant.adjacent:
        constants |= dict.fromkeys(("stride_logits_class", "stride_grad_logits_class", "n_inner"), 1)
    optional = {
        "log_prior",
        "target_weight",
        "weight",
        "smoothing_distribution",
        "normalizer",
    } - variant.given
    if kernel is not _reduce_kernel:
        constants |= dict.fromkeys(optional)
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_bits") or name == "ignore_index":
            signature[name] = "i64"
        elif name.startswith(("stride_", "n_")):
            signature[name] = "i32"
        elif name in ("logits", "grad_logits"):
            signature[name] = POINTERS[dtype]
        elif name == "target" and variant.n_labels > 0:
            signature[name] = "*i64"
        elif name in (
            "log_prior",
            "target",
            "target_weight",
            "weight",
            "smoothing_distribution",
        ):
            signature[name] = "*fp32"
        else:
            signature[name] = POINTERS[compute]
        divisible = name in ("n_classes", "stride_logits_outer", "stride_grad_logits_outer") and variant.adjacent
        if signature[name].startswith("*") or divisible:
            attributes[(at,)] = [["tt.divisibility", 16]]
    fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items() if name in kernel.arg_names}
    return ASTSource(kernel, signature=signature, constexprs=fixed, attrs=attributes), launch.num_warps


def main() -> None:
    for target_name, target in TARGETS.items():
        for kernel in KERNELS:
            for dtype in POINTERS if target_name == "sm_90" else (torch.bfloat16, torch.float64):
                for variant in VARIANTS[:1] if kernel is _reduce_kernel or target_name != "sm_90" else VARIANTS:
                    src, num_warps = source(kernel, dtype, variant)
                    compiled = triton.compile(src, target=target, options={"num_warps": num_warps})
                    row = {
                        "kernel": kernel.fn.__name__,
                        "target": target_name,
                        "dtype": str(dtype),
                        "variant": variant.name,
                        "binary_bytes": len(compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]),
                    }
                    if target.backend == "cuda":
                        ptx = compiled.asm["ptx"]
                        row["wide_loads"] = len(re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", ptx))
                        row["wide_stores"] = len(re.findall(r"st\.global\S*\.v4\.b32|st\.global\S*\.v2\.b64", ptx))
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
