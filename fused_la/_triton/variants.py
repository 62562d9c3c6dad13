"""Compiled variants of kernels: compiled once for their constants and argument types, then launched directly.

Triton's own launch binds and specialises every argument at each launch to find the compiled kernel. Here the caller
knows all that a compiled kernel depends on, because no number is specialised (tiles.NUMBERS): the device, the
constants, the dtypes of the tensors, and whether they start on 16-byte boundaries. These are the key of a `Variant`,
which keeps the kernel that Triton compiled at its first launch.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import triton
from triton import knobs
from triton.runtime import driver

from fused_la._triton.launch_config import NO_FP_FUSION

MAX_VARIANTS = 1024  # kept; for a dropped one, Triton finds the kernel that it compiled

# For these versions the arguments of a compiled kernel's `run` are known; others use the documented compiled[grid].
_RUN_IS_KNOWN = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)


class Variant:
    """A kernel with its constants, which are its last parameters, for one device and one choice of types."""

    __slots__ = ("_compiled", "_launch_prefix", "constants", "device", "kernel", "num_warps")

    def __init__(self, kernel: Any, device: int, constants: tuple[Any, ...], num_warps: int):
        self.kernel, self.device, self.constants, self.num_warps = kernel, device, constants, num_warps
        self._compiled: Any = None
        self._launch_prefix: tuple[Any, ...] | None = None  # arguments of `run` after the stream

    def launch(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launch on the current stream of the device, which must be the current device."""
        compiled = self._compiled
        if compiled is None:  # the first launch, and every one in the interpreter, which compiles nothing
            options = {"num_warps": self.num_warps, **NO_FP_FUSION}
            compiled = self.kernel[grid](*arguments, *self.constants, **options)
            if compiled is not None and _RUN_IS_KNOWN:
                self._launch_prefix = compiled.function, compiled.packed_metadata, None, None, None
            self._compiled = compiled
        elif self._launch_prefix is None or _launch_hooks(knobs.runtime):
            compiled[grid](*arguments, *self.constants)
        else:
            stream = driver.active.get_current_stream(self.device)
            compiled.run(*grid, stream, *self._launch_prefix, *arguments, *self.constants)


def _launch_hooks(runtime: Any) -> Any:
    """The launch hooks of a profiler, if any: each hook is a chain of calls, any callable, or None."""
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return getattr(enter, "calls", enter) or getattr(leave, "calls", leave)


@functools.lru_cache(MAX_VARIANTS)
def variant(kernel: Any, device: int, types: Hashable, constants: tuple[Any, ...], num_warps: int = 4) -> Variant:
    """The variant of a kernel for a device, its constants, and `types`, all that is known of its tensors."""
    return Variant(kernel, device, constants, num_warps)
