"""What the compiler makes of the kernels, for GPUs that need not be here: by `python -m benchmarks.disassemble`.

Every kernel compiles for each target; its loops over a row read and write 16 bytes at a time however the rows lie, keep
nothing in local memory, and stay within the budgets of `benchmarks/budgets.py`.
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

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
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
    return benchmarks("budgets")


@pytest.fixture(scope="module")
def command(benchmarks):
    return benchmarks("disassemble")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def bodies(rows, *kinds):
    """(kernel, body) of every loop of these kinds over a row."""
    return [(row, body) for row in rows for body in row.get("bodies", []) if body["name"].split(",")[0] in kinds]


# Every kernel and every target ----------------------------------------------------------------------------------------


def kernels_of(variant, dtype):
    """Not every step has a forward pass that makes the gradient: of float16 it would underflow, of images miss L2."""
    made = variant != "images" and dtype != "float16"
    step = ["_prepare_kernel", "_forward_kernel"]
    step += ["_forward_kernel + gradient"] * made + ["_grad_logits_kernel"]
    return [*step, "_grad_log_prior_kernel"] if variant == "learned prior" else step


@pytest.mark.parametrize(
    ("target", "dtype", "variants"),
    [
        ("sm_90", "bfloat16", FEW),
        *((target, "bfloat16", VARIANTS[:1]) for target in ("sm_80", "gfx942")),
        ("sm_100", "bfloat16", ("margin",)),
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
    compiled = benchmarks("compiled")
    launched = set()
    for variant in compiled.VARIANTS:
        for call in compiled.calls_of(compiled.make_problem(variant, 64, 300, torch.float32, None), variant, "sm_90"):
            launched.add(call.name)
            assert call.options["enable_fp_fusion"] is False, (variant, call.name)
    assert launched == {name for names in compiled.KERNELS.values() for name in names}


WORSE = {
    "regs": 250, "local": 24, "spills": 1, "exp2_per_element": 2.0, "wide_loads": 1, "narrow_row_loads": 1,
    "wide_stores": 9, "narrow_stores": 1, "narrow_loads": 3, "instructions_per_element": 30.0,
}  # fmt: skip


def test_whatever_a_kernel_takes_too_much_of_is_over_a_budget(disassembled, budgets):
    for row in disassembled("sm_90", "bfloat16", 8142, FEW):
        if row["variant"] == "learned prior" and row["kernel"].startswith(("_forward", "_grad_logits")):
            for name, figure in WORSE.items():
                bodies = [{**body, name: figure} if name in body else body for body in row["bodies"]]
                worse = {**row, "bodies": bodies} if name not in row else {**row, name: figure}
                assert budgets.violations(worse), (row["kernel"], name)
            assert budgets.violations({**row, "bodies": []})
    for row in disassembled("gfx942", "bfloat16", 8142, VARIANTS[:1]):
        assert budgets.violations({**row, "local": 4})
        assert budgets.violations({**row, "regs": 250})
        if row["kernel"].startswith(("_forward", "_grad_logits")):
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


# The loops over a row -------------------------------------------------------------------------------------------------

CLASSES = [1000, 8142, 8192, 50257, 99991]
QUICK = {("bfloat16", 8142, False), ("bfloat16", 50257, True), ("float32", 8142, False)}


ROW_CASES = [
    case if case in QUICK else slow(*case)
    for case in itertools.product(("bfloat16", "float16", "float32"), CLASSES, (False, True))
]


def steps_with_a_label(disassembled, dtype, n_classes, odd):
    if (dtype, n_classes, odd) == ("bfloat16", 8142, False):  # compiled already
        rows = disassembled("sm_90", dtype, n_classes, FEW)
        return [row for row in rows if row["variant"] == "learned prior" and "log_prior" not in row["kernel"]]
    return disassembled("sm_90", dtype, n_classes, ("label",), *(("--row-step", str(ODD_STEP)) if odd else ()))


@pytest.mark.parametrize(("dtype", "n_classes", "odd"), ROW_CASES)
def test_rows_are_read_and_written_16_bytes_at_a_time(disassembled, dtype, n_classes, odd):
    """However long they are and however far apart: a matrix of 8142 classes has rows at every even element."""
    rows = steps_with_a_label(disassembled, dtype, n_classes, odd)
    loops = bodies(rows, "rows", "gradient")
    assert len(loops) >= 4
    vec = 16 // ITEMSIZE[dtype]
    for row, body in loops:
        assert body["wide_loads"] * 16 >= body["row_bytes"], (row["kernel"], body)
        assert body["narrow_row_loads"] == 0, (row["kernel"], body)  # of 2 bytes
        offsets = body["row_bytes"] / 16 / row["block_rows"] * vec  # 4 bytes for each class of a thread
        assert body["narrow_loads"] in (0, offsets), (row["kernel"], body)
        assert body["narrow_stores"] == 0, (row["kernel"], body)
        writes = "gradient" in body["name"]
        assert body["wide_stores"] * 16 == (body["row_bytes"] if writes else 0), (row["kernel"], body)


@pytest.mark.parametrize(("dtype", "n_classes", "odd"), ROW_CASES)
def test_instructions_stay_within_budget(disassembled, budgets, dtype, n_classes, odd):
    rows = steps_with_a_label(disassembled, dtype, n_classes, odd)
    for row in rows:
        assert budgets.violations(row) == [], row
        if row["kernel"].endswith("+ gradient") and row["block_rows"] > 1:
            both = {body["name"]: body["instructions_per_element"] for body in row["bodies"]}
            assert both["rows"] + both["gradient"] <= 26 * budgets.SLACK, "both passes over a full tile"


@pytest.mark.parametrize("dtype", ["bfloat16", slow("float16"), slow("float32")])
def test_two_labels_cost_the_loops_nothing(disassembled, dtype):
    rows = disassembled("sm_90", dtype, 8142, FEW)
    one, two = (
        [body for row, body in bodies(rows, "rows", "gradient") if row["variant"] == variant]
        for variant in ("learned prior", "two labels")
    )
    assert [body["name"] for body in one] == [body["name"] for body in two]
    for a, b in zip(one, two, strict=True):
        assert b["instructions_per_element"] <= a["instructions_per_element"] + 0.75


@pytest.mark.parametrize("dtype", ["bfloat16", slow("float32")])
def test_a_split_row_is_read_16_bytes_at_a_time(disassembled, budgets, dtype):
    """64 rows of 50,257 classes: several programs a row."""
    rows = disassembled("sm_90", dtype, 50257, ("label",), "--rows", "64")
    (split,) = (row for row in rows if row["kernel"] == "_forward_kernel")
    assert split["splits"] > 1
    assert [row["kernel"] for row in rows] == ["_prepare_kernel", "_forward_kernel", "_grad_logits_kernel"]
    for row, body in bodies(rows, "rows", "gradient"):
        assert body["wide_loads"] * 16 == body["row_bytes"], row["kernel"]
        assert body["narrow_row_loads"] == body["narrow_stores"] == body["spills"] == row["local"] == 0
    for row in rows:
        assert budgets.violations(row) == [], row
