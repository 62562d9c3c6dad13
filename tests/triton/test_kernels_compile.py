"""What the compiler makes of the kernels, for GPUs that need not be here: by `python -m benchmarks.disassemble`.

Every kernel compiles for each target; rows are read and written 16 bytes at a time however they lie, whole or in loops,
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
from conftest import slow

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
# "learned prior" is "label" and one kernel more.
VARIANTS = ("learned prior", "two labels", "weights, smoothing", "probabilities", "images")
FEW = ("learned prior", "two labels")
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
ODD_STEP = 100_003  # elements from row to row: every head and tail occurs


@pytest.fixture(scope="module")
def disassembled(tmp_path_factory):
    """What the command prints, from a process whose kernels are not interpreted and with a cache of its own."""
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
    """The folder as a package, whatever is installed."""
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
    """(kernel, body) of every loop of these kinds over a row."""
    return [(row, body) for row in rows for body in row.get("bodies", []) if body["name"].split(",")[0] in kinds]


# Every kernel and every target ----------------------------------------------------------------------------------------


def kernels_of(variant, dtype):
    """Not every step has a forward pass that makes the gradient: of float16 it would underflow, of images miss L2."""
    made, kernel = variant != "images" and dtype != "float16", "_streamed" if variant == "images" else "_resident"
    step = ["_prepare_kernel", f"{kernel}_kernel"]
    step += [f"{kernel}_kernel + gradient"] * made + [f"{kernel}_kernel backward"]
    return [*step, "_grad_log_prior_kernel"] if variant == "learned prior" else step


@pytest.mark.parametrize(
    ("target", "dtype", "variants"),
    [
        ("sm_90", "bfloat16", FEW),
        *(slow(target, "bfloat16", VARIANTS[:1]) for target in ("sm_80", "gfx942")),
        slow("sm_100", "bfloat16", ("margin",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kernel_compiles_and_stays_within_its_budget(disassembled, budgets, target, dtype, variants):
    """All variants take minutes; `.ci/run` has them, by `--all --check`."""
    rows = disassembled(target, dtype, 8142, variants)
    for variant in variants:
        assert [row["kernel"] for row in rows if row["variant"] == variant] == kernels_of(variant, dtype)
    for row in rows:
        assert budgets.violations(row) == [], row


def test_no_kernel_leaves_it_to_the_compiler_what_is_rounded_once(benchmarks):
    """Triton 3.9 warns where a launch does not say whether to fuse, and later ones no longer do it unasked."""
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


def made_worse(row, name, figure):
    """The same kernel with this figure, in each place that has one."""
    worse = {**row, name: figure} if name in row else dict(row)
    for part in ("whole", "bodies"):
        if part in row:
            of_part = [{**body, name: figure} if name in body else body for body in [row[part]] * (part == "whole")]
            of_part = of_part or [{**body, name: figure} if name in body else body for body in row[part]]
            worse[part] = of_part[0] if part == "whole" else of_part
    return worse


@pytest.mark.parametrize("n_classes", [8142, slow(50257)])
def test_whatever_a_kernel_takes_too_much_of_is_over_a_budget(disassembled, budgets, n_classes):
    variants = FEW if n_classes == 8142 else ("label",)
    rows = [row for row in disassembled("sm_90", "bfloat16", n_classes, variants) if budgets.processes_rows(row)]
    names_of = {name for row in rows for name in WORSE if made_worse(row, name, WORSE[name]) != row}
    assert names_of == set(WORSE) - (
        {"narrow_row_loads", "narrow_stores", "narrow_loads"} if n_classes == 8142 else set()
    )
    for row in rows:
        for name, figure in WORSE.items():
            worse = made_worse(row, name, figure)
            assert worse == row or budgets.violations(worse), (row["kernel"], name)
        if "bodies" in row:
            assert budgets.violations({**row, "bodies": []})


@pytest.mark.slow
def test_whatever_a_kernel_for_amd_takes_too_much_of_is_over_a_budget(disassembled, budgets):
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
    assert command.main([]) == 0  # only a table
    capsys.readouterr()
    assert command.main(["--check"]) == 1
    assert "250 registers, more than" in capsys.readouterr().err


def test_all_is_every_variant_for_every_target(command):
    tasks = list(command.every_task())
    assert len(set(tasks)) == len(tasks)
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        of_target = [task for task in tasks if task.target == target]
        assert {task.variant for task in of_target} == set(command.VARIANTS)
        for dtype in ITEMSIZE:
            assert {*VARIANTS, "margin"} <= {task.variant for task in of_target if task.dtype == dtype}


# Rows that are read once ----------------------------------------------------------------------------------------------


def label_step(disassembled, dtype, n_classes, odd=False):
    if (dtype, n_classes, odd) == ("bfloat16", 8142, False):  # compiled already
        rows = disassembled("sm_90", dtype, n_classes, FEW)
        rows = [row for row in rows if row["variant"] == "learned prior" and "log_prior" not in row["kernel"]]
    else:
        rows = disassembled("sm_90", dtype, n_classes, ("label",), *(("--row-step", str(ODD_STEP)) if odd else ()))
    return {row["kernel"]: row for row in rows}


def test_a_training_step_at_8142_classes_takes_at_most_18_6_instructions_an_element(disassembled):
    """All of the kernel, with every supported Triton: one 2^x a class, 16 bytes a thread, 16 warps a multiprocessor."""
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
def test_a_whole_row_is_loaded_16_bytes_a_thread_before_anything_is_made_of_it(disassembled, dtype, n_classes):
    rows = label_step(disassembled, dtype, n_classes)
    kernels = [row for name, row in rows.items() if name.startswith("_resident")]
    assert len(kernels) == (2 if dtype == "float16" else 3)
    for row in kernels:
        vectors = 128 // 16  # of a thread
        assert row["whole"]["loads_before_use"] == vectors, row  # those of log_prior come behind a barrier
        assert row["whole"]["wide_stores"] == (vectors if row["kernel"] != "_resident_kernel" else 0)
        assert row["whole"]["exp2_per_element"] <= 1.2
        assert row["local"] == 0
        assert row["warps"] >= 16


# The loops over a row -------------------------------------------------------------------------------------------------

CLASSES = [50257, 99991]
QUICK = {("bfloat16", 50257, True)}


ROW_CASES = [
    case if case in QUICK else slow(*case)
    for case in itertools.product(("bfloat16", "float16", "float32"), CLASSES, (False, True))
]


@pytest.mark.parametrize(("dtype", "n_classes", "odd"), ROW_CASES)
def test_rows_are_read_and_written_16_bytes_at_a_time(disassembled, budgets, dtype, n_classes, odd):
    """However long they are and however far apart."""
    rows = label_step(disassembled, dtype, n_classes, odd).values()
    loops = bodies(rows, "rows", "gradient")
    assert len(loops) >= 2
    vec = 16 // ITEMSIZE[dtype]
    for row, body in loops:
        assert body["wide_loads"] * 16 >= body["row_bytes"], (row["kernel"], body)
        assert body["narrow_row_loads"] == 0, (row["kernel"], body)  # of 2 bytes
        offsets = body["row_bytes"] / 16 / row["block_rows"] * vec  # 4 bytes for each class of a thread
        assert body["narrow_loads"] in (0, offsets), (row["kernel"], body)
        assert body["narrow_stores"] == 0, (row["kernel"], body)
        writes = "gradient" in body["name"]
        assert body["wide_stores"] * 16 == (body["row_bytes"] if writes else 0), (row["kernel"], body)
    for row in rows:
        assert budgets.violations(row) == [], row


def test_two_labels_cost_a_whole_row_no_second_exponential_and_no_memory(disassembled):
    of = {}
    for row in disassembled("sm_90", "bfloat16", 8142, FEW):
        if row["kernel"].startswith("_resident"):
            of[row["variant"], row["kernel"]] = row["whole"]
    for (variant, kernel), whole in of.items():
        if variant == "two labels":
            one = of["learned prior", kernel]
            assert whole["exp2_per_element"] <= 1.2
            assert whole["wide_loads"] == one["wide_loads"]
            assert whole["wide_stores"] == one["wide_stores"]
            assert whole["instructions_per_element"] <= one["instructions_per_element"] + 4.5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_shared_row_is_read_by_the_kernel_of_whole_rows(disassembled, budgets, dtype):
    """64 rows of 50,257 classes: several programs a row."""
    few = disassembled("sm_90", dtype, 50257, ("label",), "--rows", "64")
    many = disassembled("sm_90", dtype, 50257, ("label",))
    assert [row["kernel"] for row in few] == ["_prepare_kernel", "_streamed_kernel", "_streamed_kernel backward"]
    assert all(row["splits"] > 1 for row in few[1:])
    whole = {row["kernel"]: row for row in many}
    for row in few:
        assert {**row, "splits": 1} == {**whole[row["kernel"]], "splits": 1}, "what is compiled is the same"
    for row in few:
        assert budgets.violations(row) == [], row


# The table ------------------------------------------------------------------------------------------------------------


def test_loads_are_counted_up_to_the_first_use_of_what_one_of_them_loads(disassembly):
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
    """65,536 registers, given out by 8 a thread, to whole programs."""
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
