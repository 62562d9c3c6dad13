"""Kernels as they are compiled: each once for its constants and the types of its arguments, then launched directly.

Triton's own launch binds and specialises every argument anew to find what it compiled: 10 us and more. Here the caller
knows what a kernel depends on, for no number is specialised (tiles.NUMBERS): the device, its constants, and of its
tensors the dtypes and whether they begin on 16-byte boundaries. That is the key of a `Variant`, which keeps what Triton
compiled at its first launch.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import triton
from triton import knobs
from triton.runtime import driver

from fused_la._triton.launch import AS_WRITTEN

MOST = 1024  # that are kept; of one that is dropped Triton finds what it compiled

# Of these versions it is known what a compiled kernel's own `run` takes; others launch by its index, as documented.
_RUN_IS_KNOWN = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)


class Variant:
    """A kernel with its constants, which are its last parameters, for one device and one choice of types."""

    __slots__ = ("_compiled", "constants", "kernel", "num_warps")

    def __init__(self, kernel: Any, constants: tuple[Any, ...], num_warps: int):
        self.kernel, self.constants, self.num_warps = kernel, constants, num_warps
        self._compiled: Any = None

    def launch(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        compiled = self._compiled
        if compiled is None:  # and in the interpreter, which compiles nothing
            options = {"num_warps": self.num_warps, **AS_WRITTEN}
            self._compiled = self.kernel[grid](*arguments, *self.constants, **options)
            return
        if not _RUN_IS_KNOWN or _is_set(knobs.runtime.launch_enter_hook) or _is_set(knobs.runtime.launch_exit_hook):
            compiled[grid](*arguments, *self.constants)
            return
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        compiled.run(
            *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *self.constants
        )


def _is_set(hook: Any) -> bool:
    """Whether a profiler listens: Triton has chains of hooks, which are empty mostly; any callable may stand there."""
    return hook is not None and bool(getattr(hook, "calls", True))


@functools.lru_cache(MOST)
def variant(kernel: Any, types: Hashable, constants: tuple[Any, ...], num_warps: int = 4) -> Variant:
    """The one variant of a kernel for these `types`: the device and all that is known of its tensors."""
    return Variant(kernel, constants, num_warps)
