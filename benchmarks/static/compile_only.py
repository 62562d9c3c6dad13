"""A Triton driver that compiles kernels and launches nothing, for machines without a GPU.

Triton's interpreter runs a kernel's Python: it specialises no argument, compiles nothing, and says nothing of what a
launch costs the host. Under this driver a call takes the path that it takes on a GPU, up to the launch itself:

    with compile_only("sm_90") as driver:  # TRITON_INTERPRET must not be set
        loss = logit_adjusted_cross_entropy(logits, target, log_prior, impl="triton")  # of tensors on a CPU
    driver.launches()  # how often each kernel was launched, by name
    driver.compiled  # the name of a kernel for each of its variants that was compiled, or found compiled on disk

It shows which calls cannot compile as Triton specialises them (a size of 1 is a constant, multiples of 16 are hints),
which calls compile anew, how many launches a step makes, and how long they keep the host busy. It computes nothing:
every result is what memory happened to hold.

With `front_end_only` a kernel is specialised and lowered from Python to Triton's intermediate representation, which is
where almost all faults of a kernel's source are found, and the rest of the compiler is left out.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends import backends
from triton.backends.compiler import GPUTarget

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
# What Triton asks of a device before it launches a kernel: an H100's.
PROPERTIES = {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


class Variant(NamedTuple):
    """A kernel as it was specialised for some calls; `number` is its place among all that were compiled."""

    name: str
    number: int


def name_of(source: Any) -> str:
    """The kernel's, and whether it is the one of a loss's two passes that takes an upstream gradient."""
    of_loss = "loss" in source.signature and source.signature.get("upstream", "constexpr") != "constexpr"
    return f"{source.fn.__name__}{' backward' * of_loss}"


class CompileOnlyDriver:
    """What Triton asks of a driver, and a record of what happened under it."""

    def __init__(self, target: str) -> None:
        self.target = TARGETS[target]
        self.compiled: list[str] = []
        self.launched: collections.Counter[Variant] = collections.Counter()
        self.utils = self

    def launches(self) -> collections.Counter[str]:
        """How often each kernel was launched, by its name."""
        by_name: collections.Counter[str] = collections.Counter()
        for variant, n in self.launched.items():
            by_name[variant.name] += n
        return by_name

    # Of the driver --------------------------------------------------------------------------------------------------

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(int(self.target.arch), 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What launches a compiled kernel; Triton makes one for each variant."""
        variant, launched = Variant(name_of(source), len(self.compiled)), self.launched
        self.compiled.append(variant.name)

        def launch(*_: Any) -> None:
            launched[variant] += 1

        return launch

    # Of its utilities -----------------------------------------------------------------------------------------------

    def get_device_properties(self, device: int) -> dict[str, int]:
        return PROPERTIES

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass


@contextlib.contextmanager
def compile_only(target: str = "sm_90", *, front_end_only: bool = False) -> Iterator[CompileOnlyDriver]:
    """Triton compiles for the target and launches nothing, and impl="triton" takes tensors on a CPU.

    What is compiled within stays with its kernel after: one process, one target, one of the two ways to compile.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    launch_module: Any = importlib.import_module("fused_la._triton.launch_config")
    config: Any = triton.runtime.driver
    driver = CompileOnlyDriver(target)
    before = config._active, launch_module.INTERPRETED
    config.set_active(driver)
    launch_module.INTERPRETED = True
    try:
        with without_back_end() if front_end_only else contextlib.nullcontext():
            yield driver
    finally:
        config._active, launch_module.INTERPRETED = before


@contextlib.contextmanager
def without_back_end() -> Iterator[None]:
    """Kernels are lowered to Triton's intermediate representation and verified, and no further; binaries are empty.

    They are cached in a folder of their own, for Triton knows its own binaries by their source.
    """
    compiler: Any = backends["nvidia"].compiler
    original = compiler.add_stages

    def empty_binary(_: Any, metadata: dict[str, Any]) -> bytes:
        metadata.update(name="no_kernel", shared=0, tmem_size=0, tensordesc_meta=None)
        metadata.update(global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1)
        return b""

    def add_stages(self: Any, stages: dict[str, Any], options: Any, language: Any) -> None:
        stages["ttir"] = lambda _, metadata: ""
        stages[self.binary_ext] = empty_binary

    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope():
        knobs.cache.dir = cache
        compiler.add_stages = add_stages
        try:
            yield
        finally:
            compiler.add_stages = original
