"""Kernels as they are compiled: each once for its constants and the types of its arguments, then launched directly.

Triton's own launch binds and specialises every argument anew to find what it compiled. Here the caller knows what a
kernel depends on, for no number is specialised (tiles.NUMBERS): the device, its constants, and of its tensors the
dtypes and whether they begin on 16-byte boundaries. That is the key of a `Variant`, which keeps what Triton compiled at
its first launch.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import triton
from triton import knobs
from triton.runtime import driver

from fused_la._triton.launch_config import NO_FP_FUSION

MOST = 1024  # that are kept; of one that is dropped Triton finds what it compiled

# Of these versions it is known what a compiled kernel's own `run` takes; others launch by its index, as documented.
_RUN_IS_KNOWN = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)


class Variant:
    """A kernel with its constants, which are its last parameters, for one device and one choice of types."""

    __slots__ = ("_begin", "_compiled", "constants", "device", "kernel", "num_warps")

    def __init__(self, kernel: Any, device: int, constants: tuple[Any, ...], num_warps: int):
        self.kernel, self.device, self.constants, self.num_warps = kernel, device, constants, num_warps
        self._compiled: Any = None
        self._begin: tuple[Any, ...] | None = None  # what a direct launch is handed between the stream and arguments

    def launch(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """On the device, which is the current one, and its current stream."""
        compiled = self._compiled
        if compiled is None:  # and in the interpreter, which compiles nothing
            options = {"num_warps": self.num_warps, **NO_FP_FUSION}
            compiled = self.kernel[grid](*arguments, *self.constants, **options)
            if compiled is not None and _RUN_IS_KNOWN:
                self._begin = compiled.function, compiled.packed_metadata, None, None, None
            self._compiled = compiled
        elif self._begin is None or _listeners(knobs.runtime):
            compiled[grid](*arguments, *self.constants)
        else:
            stream = driver.active.get_current_stream(self.device)
            compiled.run(*grid, stream, *self._begin, *arguments, *self.constants)


def _listeners(runtime: Any) -> Any:
    """What a profiler has hung on launches, if anything: in each place a chain of calls, or any callable, or None."""
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return getattr(enter, "calls", enter) or getattr(leave, "calls", leave)


@functools.lru_cache(MOST)
def variant(kernel: Any, device: int, types: Hashable, constants: tuple[Any, ...], num_warps: int = 4) -> Variant:
    """The one variant of a kernel for a device and these `types`, all that is known of its tensors."""
    return Variant(kernel, device, constants, num_warps)
