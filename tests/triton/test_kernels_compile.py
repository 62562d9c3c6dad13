"""Compiled code of the kernels, for GPUs that need not be present, by `python -m benchmarks.disassemble`.

Every kernel compiles for each target. Rows are read and written 16 bytes at a time at any alignment, whole or in loops,
with nothing in local memory and within the budgets of `benchmarks/static/budgets.py`.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import large, slow

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
# "learned prior" is "label" with one more kernel.
VARIANTS = ("learned prior", "two labels", "weights, smoothing", "probabilities", "images")
FEW = ("learned prior", "two labels")
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
ODD_STEP = 100_003  # elements between rows, so that every head and tail occurs


@pytest.fixture(scope="module")
def disassembled(tmp_path_factory):
    """Runs the command in a process that does not interpret kernels, with a separate cache; gives its JSON lines."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}

    @functools.cache
    def run(target: str, dtype: str, n_classes: int, variants: tuple[str, ...], *options: str) -> list[dict]:
        chosen = ["--targets", target, "--dtypes", dtype, "--classes", str(n_classes), "--variants", *variants]
        command = [sys.executable, "-m", "benchmarks.disassemble", "--json", *chosen, *options]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.fixture(scope="module")
def benchmarks():
    """Imports modules of the `benchmarks` folder as a package."""
    sys.path.insert(0, str(ROOT))
    try:
        yield lambda name: importlib.import_module(f"benchmarks.{name}")
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def budgets(benchmarks):
    return benchmarks("static.budgets")


@pytest.fixture(scope="module")
def command(benchmarks):
    return benchmarks("disassemble")


@pytest.fixture(scope="module")
def disassembly(benchmarks):
    return benchmarks("static.disassembly")


def bodies(rows, *kinds):
    """(kernel, body) of every loop over a row whose kind is one of `kinds`."""
    return [(row, body) for row in rows for body in row.get("bodies", []) if body["name"].split(",")[0] in kinds]


# Every kernel and every target ----------------------------------------------------------------------------------------


def kernels_of(variant, dtype):
    """The forward pass computes no gradient in float16, where it would underflow, or of images, which miss L2."""
    has_gradient = variant != "images" and dtype != "float16"
    kernel = "_streamed" if variant == "images" else "_resident"
    step = ["_prepare_kernel", f"{kernel}_kernel"]
    step += [f"{kernel}_kernel + gradient"] * has_gradient + [f"{kernel}_kernel backward"]
    return [*step, "_grad_log_prior_kernel"] if variant == "learned prior" else step


@pytest.mark.parametrize(
    ("target", "dtype", "variants"),
    [
        slow("sm_90", "bfloat16", FEW),
        *(large(target, "bfloat16", VARIANTS[:1]) for target in ("sm_80", "gfx942")),
        large("sm_100", "bfloat16", ("margin",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kernel_compiles_and_stays_within_its_budget(disassembled, budgets, target, dtype, variants):
    """All variants take minutes; `.ci/run` checks them with `--all --check`."""
    rows = disassembled(target, dtype, 8142, variants)
    for variant in variants:
        assert [row["kernel"] for row in rows if row["variant"] == variant] == kernels_of(variant, dtype)
    for row in rows:
        assert budgets.violations(row) == [], row


def test_no_kernel_leaves_fusing_of_products_and_sums_to_the_compiler(benchmarks):
    """Triton 3.9 warns if a launch does not say whether to fuse, and later ones do not fuse by default."""
    compiled = benchmarks("static.compiled")
    launched = set()
    for variant in compiled.VARIANTS:
        for call in compiled.calls_of(compiled.make_problem(variant, 64, 300, torch.float32, None), variant, "sm_90"):
            launched.add(call.name)
            assert call.options["enable_fp_fusion"] is False, (variant, call.name)
    assert launched == {name for names in compiled.KERNELS.values() for name in names}


WORSE = {
    "regs": 250, "local": 24, "spills": 1, "exp2_per_element": 2.0, "wide_loads": 1, "narrow_row_loads": 1,
    "wide_stores": 9, "narrow_stores": 1, "narrow_loads": 3, "instructions_per_element": 40.0,
}  # fmt: skip


def with_figure(row, name, figure):
    """The row with this figure in each place that has a figure of that name."""
    worse = {**row, name: figure} if name in row else dict(row)
    for part in ("whole", "bodies"):
        if part in row:
            changed = [{**body, name: figure} if name in body else body for body in [row[part]] * (part == "whole")]
            changed = changed or [{**body, name: figure} if name in body else body for body in row[part]]
            worse[part] = changed[0] if part == "whole" else changed
    return worse


@pytest.mark.parametrize("n_classes", [8142, slow(50257)])
def test_every_figure_that_gets_worse_is_over_a_budget(disassembled, budgets, n_classes):
    variants = FEW if n_classes == 8142 else ("label",)
    rows = [row for row in disassembled("sm_90", "bfloat16", n_classes, variants) if budgets.processes_rows(row)]
    names_found = {name for row in rows for name in WORSE if with_figure(row, name, WORSE[name]) != row}
    assert names_found == set(WORSE) - (
        {"narrow_row_loads", "narrow_stores", "narrow_loads"} if n_classes == 8142 else set()
    )
    for row in rows:
        for name, figure in WORSE.items():
            worse = with_figure(row, name, figure)
            assert worse == row or budgets.violations(worse), (row["kernel"], name)
        if "bodies" in row:
            assert budgets.violations({**row, "bodies": []})


@pytest.mark.slow
def test_every_figure_of_an_amd_kernel_that_gets_worse_is_over_a_budget(disassembled, budgets):
    for row in disassembled("gfx942", "bfloat16", 8142, VARIANTS[:1]):
        assert budgets.violations({**row, "local": 4})
        assert budgets.violations({**row, "regs": 257})
        if budgets.processes_rows(row):
            assert budgets.violations({**row, "wide_loads": 0})


def test_a_figure_over_its_budget_ends_the_command_with_1(disassembled, command, monkeypatch, capsys):
    rows = disassembled("sm_90", "bfloat16", 8142, FEW)
    monkeypatch.setattr(command.knobs.runtime, "interpret", False)
    monkeypatch.setattr(command, "rows_of", lambda tasks, n_jobs: iter(rows))
    assert command.main(["--check"]) == 0
    assert f"{len(rows)} kernels compiled, 0 figures over their budgets" in capsys.readouterr().err
    rows = [*rows[:-1], {**rows[-1], "regs": 250}]
    assert command.main([]) == 0  # without --check it only prints a table
    capsys.readouterr()
    assert command.main(["--check"]) == 1
    assert "250 registers, more than" in capsys.readouterr().err


def test_all_is_every_variant_for_every_target(command):
    tasks = list(command.every_task())
    assert len(set(tasks)) == len(tasks)
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        target_tasks = [task for task in tasks if task.target == target]
        assert {task.variant for task in target_tasks} == set(command.VARIANTS)
        for dtype in ITEMSIZE:
            assert {*VARIANTS, "margin"} <= {task.variant for task in target_tasks if task.dtype == dtype}


# Rows that are read once ----------------------------------------------------------------------------------------------


def label_step(disassembled, dtype, n_classes, odd=False):
    if (dtype, n_classes, odd) == ("bfloat16", 8142, False):  # compiled already
        rows = disassembled("sm_90", dtype, n_classes, FEW)
        rows = [row for row in rows if row["variant"] == "learned prior" and "log_prior" not in row["kernel"]]
    else:
        rows = disassembled("sm_90", dtype, n_classes, ("label",), *(("--row-step", str(ODD_STEP)) if odd else ()))
    return {row["kernel"]: row for row in rows}


def test_a_training_step_at_8142_classes_takes_at_most_18_6_instructions_an_element(disassembled):
    """With every supported Triton the kernel has one 2^x a class, 16-byte accesses, 16 warps a multiprocessor."""
    row = label_step(disassembled, "bfloat16", 8142)["_resident_kernel + gradient"]
    assert row["whole"]["instructions_per_element"] <= 18.6
    assert row["whole"]["exp2_per_element"] <= 1.1
    assert row["local"] == row["whole"]["spills"] == 0
    assert row["warps"] >= 16
    assert row["whole"]["wide_stores"] == 8  # 64 elements of 2 bytes a thread
    assert row["whole"]["loads_before_use"] == 8


RESIDENT = [("bfloat16", 8142), ("bfloat16", 8192), ("float16", 32767), ("float32", 8142), ("float32", 16384)]


@pytest.mark.parametrize(
    ("dtype", "n_classes"),
    [case if case == ("bfloat16", 8142) else slow(*case) for case in RESIDENT],
)
def test_a_whole_row_is_loaded_16_bytes_a_thread_before_its_first_use(disassembled, dtype, n_classes):
    rows = label_step(disassembled, dtype, n_classes)
    kernels = [row for name, row in rows.items() if name.startswith("_resident")]
    assert len(kernels) == (2 if dtype == "float16" else 3)
    for row in kernels:
        vectors = 128 // 16  # per thread
        assert row["whole"]["loads_before_use"] == vectors, row  # loads of log_prior come after a barrier
        assert row["whole"]["wide_stores"] == (vectors if row["kernel"] != "_resident_kernel" else 0)
        assert row["whole"]["exp2_per_element"] <= 1.2
        assert row["local"] == 0
        assert row["warps"] >= 16


# The loops over a row -------------------------------------------------------------------------------------------------

CLASSES = [50257, 99991]
QUICK = ("bfloat16", 50257, True)
# `.ci/run` compiles the large ones with `--all --check`, which refuses a loop without 16-byte loads.
ROW_CASES = [
    case if case == QUICK else slow(*case) if case == ("float32", 99991, False) else large(*case)
    for case in itertools.product(("bfloat16", "float16", "float32"), CLASSES, (False, True))
]


@pytest.mark.parametrize(("dtype", "n_classes", "odd"), ROW_CASES)
def test_rows_are_read_and_written_16_bytes_at_a_time(disassembled, budgets, dtype, n_classes, odd):
    """For any length of a row and any distance between rows."""
    rows = label_step(disassembled, dtype, n_classes, odd).values()
    loops = bodies(rows, "rows", "gradient")
    assert len(loops) >= 2
    vec = 16 // ITEMSIZE[dtype]
    for row, body in loops:
        assert body["wide_loads"] * 16 >= body["row_bytes"], (row["kernel"], body)
        assert body["narrow_row_loads"] == 0, (row["kernel"], body)  # 2-byte loads
        offsets = body["row_bytes"] / 16 / row["block_rows"] * vec  # one 4-byte load for each class of a thread
        assert body["narrow_loads"] in (0, offsets), (row["kernel"], body)
        assert body["narrow_stores"] == 0, (row["kernel"], body)
        writes = "gradient" in body["name"]
        assert body["wide_stores"] * 16 == (body["row_bytes"] if writes else 0), (row["kernel"], body)
    for row in rows:
        assert budgets.violations(row) == [], row


def test_a_second_label_adds_no_exponential_and_no_memory_access_to_a_whole_row(disassembled):
    figures = {}
    for row in disassembled("sm_90", "bfloat16", 8142, FEW):
        if row["kernel"].startswith("_resident"):
            figures[row["variant"], row["kernel"]] = row["whole"]
    for (variant, kernel), whole in figures.items():
        if variant == "two labels":
            one = figures["learned prior", kernel]
            assert whole["exp2_per_element"] <= 1.2
            assert whole["wide_loads"] == one["wide_loads"]
            assert whole["wide_stores"] == one["wide_stores"]
            assert whole["instructions_per_element"] <= one["instructions_per_element"] + 4.5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_shared_row_is_read_by_the_kernel_of_whole_rows(disassembled, budgets, dtype):
    """64 rows of 50,257 classes have several programs a row."""
    few = disassembled("sm_90", dtype, 50257, ("label",), "--rows", "64")
    many = disassembled("sm_90", dtype, 50257, ("label",))
    assert [row["kernel"] for row in few] == ["_prepare_kernel", "_streamed_kernel", "_streamed_kernel backward"]
    assert all(row["splits"] > 1 for row in few[1:])
    whole = {row["kernel"]: row for row in many}
    for row in few:
        assert {**row, "splits": 1} == {**whole[row["kernel"]], "splits": 1}, "the compiled code is the same"
    for row in few:
        assert budgets.violations(row) == [], row


# The table ------------------------------------------------------------------------------------------------------------


def test_loads_are_counted_up_to_the_first_use_of_a_loaded_value(disassembly):
    lines = [
        "0 IMAD.WIDE R2, R4, 0x2, R6",
        "10 LDG.E.128 R8, desc[UR4][R2.64]",
        "20 @!P0 LDG.E.128.CONSTANT R12, desc[UR4][R2.64+0x800]",
        "30 LDG.E R20, desc[UR4][R2.64]",
        "40 FADD R21, R20, R22",
        "50 SHF.L.U32 R23, {}, 0x10, RZ",
        "60 LDG.E.128 R16, desc[UR4][R2.64+0x1000]",
    ]
    for register, n_loads in (("R8", 2), ("R15", 2), ("R16", 3), ("R22", 3)):
        assert disassembly.wide_loads_before_use([line.format(register) for line in lines]) == n_loads
    stored = [*lines[:3], "40 STG.E.128 desc[UR4][R2.64], R12", lines[-1]]
    assert disassembly.wide_loads_before_use(stored) == 2
    assert disassembly.wide_loads_before_use([*lines[:2], "20 BAR.SYNC.DEFER_BLOCKING 0x0", *lines[2:4]]) == 1


@pytest.mark.parametrize(
    ("regs", "num_warps", "warps"), [(96, 4, 20), (97, 4, 16), (128, 16, 16), (129, 4, 12), (32, 4, 64), (255, 8, 8)]
)
def test_warps_that_a_multiprocessor_holds(disassembly, regs, num_warps, warps):
    """65,536 registers, allocated in units of 8 a thread to whole programs."""
    assert disassembly.resident_warps(regs, num_warps) == warps


def test_a_peer_that_does_not_compile_is_in_the_table_with_its_reason(benchmarks, command, monkeypatch):
    peers = benchmarks("static.peer_kernels")

    def missing(*_):
        raise ImportError("no such library")

    monkeypatch.setitem(peers.COMPILERS, "QuACK", missing)
    row = peers.figures_of_peer("QuACK", "sm_90", "bfloat16", 64, 8142)
    assert "not compiled: ImportError: no such library" in command.format_row(row)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["liger_kernel", "quack"])
def test_a_peer_is_measured_as_a_whole(disassembled, library):
    pytest.importorskip(library)
    name = {"liger_kernel": "Liger-Kernel", "quack": "QuACK"}[library]
    rows = disassembled("sm_90", "bfloat16", 8192, ("label",), "--peers", "--rows", "64")
    (row,) = (row for row in rows if row["variant"] == name)
    assert row["whole"]["wide_stores"] >= 8
    assert 10 < row["whole"]["instructions_per_element"] < 100
    assert row["whole"]["exp2_per_element"] >= 1
