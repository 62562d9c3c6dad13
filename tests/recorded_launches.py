"""Records the kernels that tests launch in Triton's interpreter, and compiles each as Triton would specialise it.

    FUSED_LA_RECORD_LAUNCHES=launches python -m pytest        # each process adds a file to that folder
    python tests/recorded_launches.py launches --jobs 2       # exit status 1 if a recorded launch does not compile

The interpreter accepts any argument. A compiler sees types, which integers are 1 (constants) or multiples of 16
(hints), which pointers are aligned to 16 bytes, and the values of constants. Two launches that agree in these are one
`Launch`; only the first is kept, with the name of its test. The command specialises them as Triton does and runs
Triton's front end on each resulting variant of a kernel, or on the first `--most` of them. Variants are ordered so that
those with new combinations of two values come first.

Kernels outside `fused_la`, and processes that do not import `conftest.py`, are not recorded.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import functools
import heapq
import importlib
import itertools
import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = "FUSED_LA_RECORD_LAUNCHES"  # the environment variable that names the folder


class Pointer(NamedTuple):
    """What the compiler knows of a tensor."""

    dtype: torch.dtype
    aligned: bool  # to 16 bytes


class Launch(NamedTuple):
    """A launch of a kernel, with each argument reduced to what a compiler sees."""

    module: str
    name: str
    arguments: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]  # of the compiler

    def kernel(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)


# Recording ------------------------------------------------------------------------------------------------------------


def reduced(value: Any) -> Any:
    """A `Pointer` for a tensor, and one integer for all integers that Triton specialises alike."""
    if isinstance(value, torch.Tensor):
        return Pointer(value.dtype, value.data_ptr() % 16 == 0)
    if isinstance(value, tuple):
        items = [reduced(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, int) and not isinstance(value, bool) and value != 1:
        wide = 0 if -(2**31) <= value < 2**31 else 2**40 if value < 2**63 else 2**63
        return wide + (16 if value % 16 == 0 else 17)
    return 0.5 if isinstance(value, float) else value


def launch_of(kernel: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Launch:
    annotations = kernel.fn.__annotations__
    named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    arguments = {
        name: value if "constexpr" in str(annotations.get(name)) else reduced(value)
        for name, value in named.items()
        if name in kernel.arg_names
    }
    options = {name: value for name, value in named.items() if name not in arguments}
    return Launch(
        kernel.fn.__module__, kernel.fn.__qualname__, tuple(arguments.items()), tuple(sorted(options.items()))
    )


def record(folder: Path) -> None:
    """From now on, append each new launch of this process to the process's file in a folder."""
    from triton.runtime import interpreter

    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    run = interpreter.InterpretedFunction.run

    @functools.wraps(run)
    def recorded(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if self.fn.__module__.startswith("fused_la."):
            launch = launch_of(self, args, kwargs)
            if repr(launch) not in seen:
                seen.add(repr(launch))
                with (folder / f"{os.getpid()}.launches").open("ab") as file:
                    pickle.dump((launch, os.environ.get("PYTEST_CURRENT_TEST", "")), file)
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    interpreter.InterpretedFunction.run = recorded


# Compiling ------------------------------------------------------------------------------------------------------------


def recorded_in(folder: Path) -> dict[Launch, str]:
    """{launch: a test that made it}, in a deterministic order."""
    found: dict[str, tuple[Launch, str]] = {}
    for path in sorted(folder.glob("*.launches")):
        with path.open("rb") as file:
            while True:
                try:
                    launch, test = pickle.load(file)
                except EOFError:
                    break
                known = found.setdefault(repr(launch), (launch, test))
                found[repr(launch)] = min(known, (launch, test), key=lambda item: item[1])
    return {launch: test for _, (launch, test) in sorted(found.items())}


def argument(value: Any) -> Any:
    if isinstance(value, Pointer):
        return torch.empty(32, dtype=value.dtype)[0 if value.aligned else 1 :]
    if isinstance(value, tuple):
        items = [argument(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def specialised(launch: Launch) -> tuple[tuple[str, str], ...]:
    """(path, specialisation) of each argument, of each member of a tuple, and of the compiler's options.

    Launches with equal results run the same compiled kernel.
    """

    def leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, (tuple, list)):
            for i, item in enumerate(value):
                yield from leaves(f"{path}.{i}", item)
        else:
            yield path, repr(value)

    kernel, path = launch.kernel(), f"{launch.module}.{launch.name}"
    *_, bind = kernel.device_caches[0]
    _, specialization, _ = bind(**{name: argument(value) for name, value in launch.arguments}, **dict(launch.options))
    return *leaves(path, specialization), *leaves(f"{path} options", launch.options)


def covering_order(variants: Sequence[Sequence[tuple[str, str]]]) -> tuple[list[int], int]:
    """An order of all variants, by index, and how many of the first ones hold every combination of two values.

    Greedy: the next variant is the one that adds most combinations which no earlier variant holds.
    """
    uses = collections.Counter(itertools.chain.from_iterable(variants))
    kernels = collections.Counter(variant[0][0] for variant in variants)  # by kernel: the path of its first argument
    numbers = {leaf: i for i, leaf in enumerate(uses)}
    new = []  # combinations of each that no earlier one holds; values that a kernel's variants all share are left out
    for variant in variants:
        distinguishing = sorted(numbers[leaf] for leaf in variant if uses[leaf] < kernels[variant[0][0]])
        new.append({a * len(numbers) + b for a, b in itertools.combinations_with_replacement(distinguishing, 2)})
    heap = [(-len(combinations), i) for i, combinations in enumerate(new)]
    heapq.heapify(heap)
    order: list[int] = []
    seen: set[int] = set()
    while heap:
        _, i = heapq.heappop(heap)
        new[i] -= seen
        if heap and -len(new[i]) > heap[0][0]:  # another variant may add more
            heapq.heappush(heap, (-len(new[i]), i))
        elif new[i] or not order:
            seen |= new[i]
            order.append(i)
        else:
            return [*order, i, *sorted(i for _, i in heap)], len(order)
    return order, len(order)


def compile_launches(launches: Sequence[Launch], target: str) -> list[tuple[Launch, str]]:
    """The launches that Triton's front end refuses, and why."""
    from every_call import innermost_cause

    from benchmarks.static.compile_only import compile_only

    refused = []
    with compile_only(target, front_end_only=True):
        for launch in launches:
            arguments = {name: argument(value) for name, value in launch.arguments}
            try:
                launch.kernel().run(**arguments, grid=(1,), warmup=True, **dict(launch.options))
            except Exception as error:
                refused.append((launch, innermost_cause(error)))
    return refused


def variants_of(launches: Sequence[Launch], target: str) -> tuple[list[Launch], int]:
    """A launch for each variant of a kernel, in `covering_order`, and how many of the first hold all combinations."""
    from benchmarks.static.compile_only import compile_only

    with compile_only(target, front_end_only=True):
        by_variant = {specialised(launch): launch for launch in reversed(launches)}  # of equal ones the first launch
    order, n_needed = covering_order(list(by_variant))
    of_variants = list(by_variant.values())
    return [of_variants[i] for i in order], n_needed


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/recorded_launches.py", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--most", type=int, default=sys.maxsize, metavar="N", help="variants to compile (default: all)")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="processes (default: 1)")
    parser.add_argument("--target", default="sm_90")
    options = parser.parse_args()
    sys.path.append(
        str(Path(__file__).parent.parent)
    )  # so that this process and its children find the folder benchmarks
    started = time.perf_counter()
    recorded = recorded_in(options.folder)
    if not recorded:
        sys.exit(f"{options.folder} holds no launches: run the tests with {FOLDER}={options.folder}")
    variants, n_needed = variants_of(list(recorded), options.target)
    launches = variants[: options.most]
    parts = [launches[i :: options.jobs] for i in range(options.jobs)]
    with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        refused = list(
            itertools.chain.from_iterable(pool.map(compile_launches, parts, [options.target] * options.jobs))
        )
    for launch, cause in refused:
        values = ", ".join(f"{name}={value}" for name, value in launch.arguments)
        print(f"{launch.name} does not compile: {cause}\n    of {recorded[launch]}\n    {values}")
    print(
        f"{len(recorded)} launches recorded, {len(variants)} variants of kernels, of which {n_needed} hold any two "
        f"values together; {len(launches)} compiled by Triton's front end, {len(refused)} refused, "
        f"{time.perf_counter() - started:.0f} s"
    )
    return 1 if refused else 0


if __name__ == "__main__":
    from recorded_launches import main as main_of_module  # its classes are those that were pickled

    sys.exit(main_of_module())
