"""Compile the kernels with the arguments that the launchers pass, for a GPU that this machine need not have.

The launchers run with a recorder in place of the launch itself. Each recorded launch is a `Call`, and `ast_source`
specialises its kernel as Triton does at run time.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_la._call.problem import Problem
from fused_la._tiled.softmax import empty_state, prepare

# Imported by name: the package has functions with the names of some of these modules.
passes_module = importlib.import_module("fused_la._triton.loss")
launch_module = importlib.import_module("fused_la._triton.launch_config")
argmax_module = importlib.import_module("fused_la._triton.argmax")
head_module = importlib.import_module("fused_la._triton.head")
variants_module = importlib.import_module("fused_la._triton.variants")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
KERNELS = {
    passes_module: ("_prepare_kernel", "_resident_kernel", "_streamed_kernel", "_grad_log_prior_kernel"),
    argmax_module: ("_argmax_kernel",),
    head_module: ("_tile_state_kernel", "_merge_kernel", "_tile_gradient_kernel"),
}
KERNEL_NAMES = {getattr(module, name): name for module, names in KERNELS.items() for name in names}


class Call(NamedTuple):
    """A launch of a kernel: its grid, its arguments by name, and its options."""

    name: str
    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    options: dict[str, Any]  # of the compiler, with num_warps


# Problems -------------------------------------------------------------------------------------------------------------

# "learned prior" launches the kernels of "label" and one more.
COMMON_VARIANTS = ("learned prior", "two labels", "margin", "weights, smoothing", "probabilities", "images")
BY_GROUP = "learned priors by group"
RARE_VARIANTS = (
    "two labels, margin", "no prior", "sum", "none", BY_GROUP, "priors by group, smoothing", "label scale", "post hoc",
)  # fmt: skip
HEAD_VARIANTS = (
    "head", "head, two labels, margin", "head, weights, smoothing", "head, probabilities",
    "head, priors by group, smoothing", "head, label scale",
)  # fmt: skip
VARIANTS = ("label", *COMMON_VARIANTS, *RARE_VARIANTS, *HEAD_VARIANTS)


def make_problem(variant: str, n_rows: int, n_classes: int, dtype: torch.dtype, row_step: int | None) -> Problem:
    """A problem of a variant, with rows of logits row_step elements apart; values are never read."""
    variant = variant.removeprefix("head, ")
    if variant == "images":
        logits = torch.empty(n_rows, n_classes, 9, dtype=dtype).transpose(1, 2)
    else:
        step = n_classes if row_step is None else row_step
        logits = torch.empty(n_rows * step + n_classes, dtype=dtype).as_strided((n_rows, 1, n_classes), (step, step, 1))
    rows = logits.shape[:2]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    n_labels = 2 if variant.startswith("two labels") else 1
    target, weights = torch.zeros(*rows, n_labels, dtype=torch.int64), torch.empty(n_classes)
    if variant == "probabilities":
        target = torch.empty((*rows, n_classes), dtype=compute)
    smooth, margin, by_group = variant.endswith("smoothing"), variant.endswith("margin"), "by group" in variant
    prior = torch.empty(4, n_classes) if by_group else torch.empty(n_classes)
    return Problem(
        logits,
        None if variant == "no prior" else prior,
        target,
        torch.empty(*rows, 2) if n_labels == 2 else None,
        prior_index=torch.zeros(rows, dtype=torch.int64) if by_group else None,
        weight=weights if smooth else None,
        mean_weight=weights if smooth else None,
        smoothing_distribution=prior if smooth else None,
        target_offset=weights if margin else None,
        scale=weights if margin else None,
        label_scale=weights if variant == "label scale" else None,
        label_smoothing=0.1 if smooth else 0.0,
    )


@contextlib.contextmanager
def record_launches() -> Iterator[list[Call]]:
    """The list of kernel launches in this context; none of them runs."""
    calls: list[Call] = []

    def record(variant: Any, grid: Any, *arguments: Any) -> None:
        named = dict(zip(variant.kernel.arg_names, (*arguments, *variant.constants), strict=True))
        options = {"num_warps": variant.num_warps, **launch_module.NO_FP_FUSION}
        calls.append(Call(KERNEL_NAMES[variant.kernel], variant.kernel, grid, named, options))

    launch = variants_module.Variant.launch
    variants_module.Variant.launch = record
    try:
        yield calls
    finally:
        variants_module.Variant.launch = launch


@contextlib.contextmanager
def launching_for(target: GPUTarget) -> Iterator[None]:
    """Launch as on a GPU of this architecture, with the multiprocessors and level-2 cache of an H100."""
    device = launch_module.Device(132, 50 << 20, target.warp_size)
    modules = (passes_module, head_module)
    originals = [(module, module.device_of) for module in modules]
    for module, _ in originals:
        setattr(module, "device_of", lambda _: device)  # noqa: B010, type checkers do not know these modules' names
    clear_plan_cache()
    try:
        yield
    finally:
        for module, device_of in originals:
            setattr(module, "device_of", device_of)  # noqa: B010
        clear_plan_cache()


def clear_plan_cache() -> None:
    passes_module.plan_launches.cache_clear()


def calls_of(problem: Problem, variant: str, target_name: str) -> list[Call]:
    """Launches of training steps, each kernel once: forward with and without the gradient, and backward.

    For "post hoc" it is the launch that predicts with many tau.
    """
    if variant in HEAD_VARIANTS:
        with launching_for(TARGETS[target_name]):
            return head_calls(problem)
    reduction = variant if variant in ("sum", "none") else "mean"
    with launching_for(TARGETS[target_name]), record_launches() as calls:
        if variant == "post hoc":
            argmax_module.launch_argmax(problem.logits, None, torch.empty(32, problem.logits.shape[2]))
            return calls
        loss, workspace, _, signature = passes_module.forward(problem, reduction, False)
        upstream, learned, n_calls = torch.empty_like(loss), variant.startswith("learned"), len(calls)
        _, _, gradient, _ = passes_module.forward(problem, reduction, True)
        calls[n_calls:] = [] if gradient is None else calls[-1:]  # the prepare kernel is the same
        passes_module.backward(problem, reduction, workspace, upstream, True, learned, None, signature)
    return calls


def head_calls(problem: Problem) -> list[Call]:
    """Launches of a step for a tile of a head's logits with a bias; the tile has all classes of the problem."""
    rows, dtype = prepare(problem, tiled=True), problem.compute_dtype
    n_rows, _, n_classes = problem.logits.shape
    logits = torch.empty(n_rows, n_classes, dtype=dtype)
    state = empty_state(rows.candidates.z[..., 0])
    block, chunk = (slice(0, n_rows), slice(0, 1)), slice(0, n_classes)
    with record_launches() as calls:
        epilogue = head_module.Epilogue(rows, logits.numel(), torch.empty(n_classes), problem.logits.dtype)
        epilogue.update(block, chunk, logits, state)
        grad_candidates = torch.empty_like(rows.candidates.z)
        epilogue.gradient_of(state, state.m, grad_candidates)(block, chunk, logits)
    return calls


# Compilation ----------------------------------------------------------------------------------------------------------

POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


def ast_source(call: Call) -> ASTSource:
    """The kernel specialised for a call as Triton does at run time: for 1, for multiples of 16, for None."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def specialise(value: Any, path: tuple[int, ...], unspecialised: bool, by_alignment: bool) -> Any:
        if isinstance(value, tuple):
            types = [specialise(item, (*path, i), False, True) for i, item in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        if isinstance(value, Tensor):
            if by_alignment and value.data_ptr() % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return POINTERS[value.dtype]
        if isinstance(value, int) and not isinstance(value, bool) and (unspecialised or value != 1):
            if not unspecialised and value % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        constants[path] = value
        return "constexpr"

    signature = {}
    for index, parameter in enumerate(call.kernel.params):
        value = call.arguments[parameter.name]
        if parameter.is_constexpr:
            constants[(index,)] = value
            signature[parameter.name] = "constexpr"
        elif parameter.annotation_type and parameter.do_not_specialize:
            signature[parameter.name] = parameter.annotation_type
        else:
            signature[parameter.name] = specialise(
                value, (index,), parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment
            )
    return ASTSource(call.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_call(call: Call, target_name: str) -> Any:
    """The compiled kernel of a call for a target; its `.asm` has every stage."""
    return triton.compile(ast_source(call), target=TARGETS[target_name], options=call.options)
