"""A Triton driver that compiles kernels and launches nothing, for machines without a GPU.

Triton's interpreter runs a kernel as Python: it specialises no argument, compiles nothing, and does not show what a
launch costs the host. Under this driver a call takes the same path as on a GPU, up to the launch itself:

    with compile_only("sm_90") as driver:  # TRITON_INTERPRET must not be set
        loss = logit_adjusted_cross_entropy(logits, target, log_prior, impl="triton")  # tensors on a CPU
    driver.launches()  # how often each kernel was launched, by name
    driver.compiled  # a kernel's name for each variant that was compiled or found in the cache on disk

It shows which calls do not compile once Triton has specialised them (a size of 1 is a constant, multiples of 16 are
hints), which calls compile again, how many launches a step makes, and how long they keep the host busy. It computes
nothing: results are uninitialised memory.

With `front_end_only` a kernel is specialised and lowered from Python to Triton's intermediate representation, which
finds almost all faults of a kernel's source. The rest of the compiler is skipped.
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
# The device properties that Triton reads before a launch: those of an H100.
PROPERTIES = {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


class Variant(NamedTuple):
    """A kernel specialised for some calls; `number` is its index among all compiled variants."""

    name: str
    number: int


def kernel_name(source: Any) -> str:
    """The kernel's name, with " backward" if it is a pass of a loss with an upstream gradient."""
    of_loss = "loss" in source.signature and source.signature.get("upstream", "constexpr") != "constexpr"
    return f"{source.fn.__name__}{' backward' * of_loss}"


class CompileOnlyDriver:
    """The interface of a Triton driver; it records compilations and launches."""

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

    # Driver interface -------------------------------------------------------------------------------------------------

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
        """The launcher of a compiled kernel; Triton makes one for each variant."""
        variant, launched = Variant(kernel_name(source), len(self.compiled)), self.launched
        self.compiled.append(variant.name)

        def launch(*_: Any) -> None:
            launched[variant] += 1

        return launch

    # Driver utilities -------------------------------------------------------------------------------------------------

    def get_device_properties(self, device: int) -> dict[str, int]:
        return PROPERTIES

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass


@contextlib.contextmanager
def compile_only(target: str = "sm_90", *, front_end_only: bool = False) -> Iterator[CompileOnlyDriver]:
    """Triton compiles for the target and launches nothing, and impl="triton" takes tensors on a CPU.

    Kernels keep what was compiled in this context: use one target and one of the two ways to compile in a process.
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
    """Kernels are lowered to Triton's intermediate representation and verified; their binaries are empty.

    Empty binaries go to a separate cache folder, because Triton finds real binaries by the same source.
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
