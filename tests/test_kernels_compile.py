"""What the compiler makes of the kernels, for GPUs that need not be here: by `python -m benchmarks.disassemble`.

Every kernel compiles for each target; its loops over a row read and write 16 bytes at a time however the rows lie, keep
nothing in local memory, and stay within budgets. A budget is the largest figure measured with Triton 3.8, for the cases
below, and a little: it fails where code gets slower, not where a compiler counts one register more.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
# "learned prior" is "label" and one kernel more.
VARIANTS = ("learned prior", "two labels", "weights, smoothing", "probabilities", "images")
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


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def bodies(rows, *kinds):
    """(kernel, body) of every loop of these kinds over a row."""
    return [(row, body) for row in rows for body in row.get("bodies", []) if body["name"].split(",")[0] in kinds]


# Every kernel and every target ----------------------------------------------------------------------------------------

STEP = ["_prepare_kernel", "_forward_kernel", "_forward_kernel + gradient", "_grad_logits_kernel"]


def kernels_of(variant, dtype):
    """Not every step has a forward pass that makes the gradient: of float16 it would underflow, of images miss L2."""
    step = [name for name in STEP if "+" not in name] if variant == "images" or dtype == "float16" else STEP
    return [*step, "_grad_log_prior_kernel"] if variant == "learned prior" else step


def register_budget(row):
    """Of 255 a thread; where 16 bytes are read at a time, sm_90 took up to 128, in float64 92, and sm_80 up to 168."""
    if row["kernel"] == "_grad_log_prior_kernel":
        return 208 if row["dtype"] == "float64" else 144
    if row["variant"] == "images":
        return 232 if row["dtype"] == "float64" else 176
    return 176 if row["variant"] == "weights, smoothing" and row["target"] != "sm_90" else 128


@pytest.mark.parametrize(
    ("target", "dtype", "variants"),
    [
        ("sm_90", "bfloat16", VARIANTS),
        *((target, "bfloat16", VARIANTS[:1]) for target in ("sm_80", "gfx942")),
        ("sm_100", "bfloat16", ("margin",)),
        slow("sm_90", "bfloat16", ("margin",)),
        *(slow("sm_90", dtype, VARIANTS) for dtype in ("float16", "float32", "float64")),
        *(slow(target, dtype, VARIANTS) for target in ("sm_80", "sm_100", "gfx942") for dtype in ITEMSIZE),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kernel_compiles_and_spills_nothing_that_matters(disassembled, target, dtype, variants):
    rows = disassembled(target, dtype, 8142, variants)
    for variant in variants:
        assert [row["kernel"] for row in rows if row["variant"] == variant] == kernels_of(variant, dtype)
    for row in rows:
        on_a_row = row["kernel"].startswith(("_forward", "_grad_logits"))
        if target == "gfx942":
            assert row["local"] == 0, row
            assert row["wide_loads"] > 0 or row["variant"] == "images" or not on_a_row, row
            continue
        assert row["regs"] <= register_budget(row), row
        # Two numbers a thread, kept across the loops: seen with smoothing and with probabilities.
        assert row["local"] <= (0 if row["variant"] in ("learned prior", "two labels") else 8), row
        assert bool(row.get("bodies")) == (row["kernel"] != "_prepare_kernel"), row
        for body in row.get("bodies", []):
            assert body["spills"] == 0, row
            assert body["exp2_per_element"] == (0 if dtype == "float64" else 1) or not on_a_row, row


# The loops over a row -------------------------------------------------------------------------------------------------

CLASSES = [1000, 8142, 8192, 50257, 99991]
QUICK = {("bfloat16", 8142, False), ("bfloat16", 50257, True), ("float32", 8142, False)}


ROW_CASES = [
    case if case in QUICK else slow(*case)
    for case in itertools.product(("bfloat16", "float16", "float32"), CLASSES, (False, True))
]


def steps_with_a_label(disassembled, dtype, n_classes, odd):
    if (dtype, n_classes, odd) == ("bfloat16", 8142, False):  # compiled already
        rows = disassembled("sm_90", dtype, n_classes, VARIANTS)
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


def instruction_budget(row, body):
    """Instructions an element. Rows that share a program share the offset's loads: 4 bytes of it for each class."""
    shared = row["block_rows"] > 1
    if "last tile" in body["name"]:  # once a row: its masks cost 2 to 8 more
        return 18 if shared else 23
    if shared:
        return 15
    return 18 if "rows" in body["name"] else 15.5


@pytest.mark.parametrize(("dtype", "n_classes", "odd"), ROW_CASES)
def test_instructions_stay_within_budget(disassembled, dtype, n_classes, odd):
    rows = steps_with_a_label(disassembled, dtype, n_classes, odd)
    for row, body in bodies(rows, "rows", "gradient"):
        assert body["instructions_per_element"] <= instruction_budget(row, body), (row["kernel"], body)
        assert body["exp2_per_element"] == 1, (row["kernel"], body)
    for row in rows:
        if row["kernel"].endswith("+ gradient") and row["block_rows"] > 1:
            both = {body["name"]: body["instructions_per_element"] for body in row["bodies"]}
            assert both["rows"] + both["gradient"] <= 26, "both passes over a full tile"


@pytest.mark.parametrize("dtype", ["bfloat16", slow("float16"), slow("float32")])
def test_two_labels_cost_the_loops_nothing(disassembled, dtype):
    rows = disassembled("sm_90", dtype, 8142, VARIANTS)
    one, two = (
        [body for row, body in bodies(rows, "rows", "gradient") if row["variant"] == variant]
        for variant in ("learned prior", "two labels")
    )
    assert [body["name"] for body in one] == [body["name"] for body in two]
    for a, b in zip(one, two, strict=True):
        assert b["instructions_per_element"] <= a["instructions_per_element"] + 0.75


@pytest.mark.parametrize("dtype", ["bfloat16", slow("float32")])
def test_a_split_row_is_read_16_bytes_at_a_time(disassembled, dtype):
    """64 rows of 50,257 classes: several programs a row."""
    rows = disassembled("sm_90", dtype, 50257, ("label",), "--rows", "64")
    (split,) = (row for row in rows if row["kernel"] == "_forward_kernel")
    assert split["splits"] > 1
    assert [row["kernel"] for row in rows] == ["_prepare_kernel", "_forward_kernel", "_grad_logits_kernel"]
    for row, body in bodies(rows, "rows", "gradient"):
        assert body["wide_loads"] * 16 == body["row_bytes"], row["kernel"]
        assert body["narrow_row_loads"] == body["narrow_stores"] == body["spills"] == row["local"] == 0
        assert body["instructions_per_element"] <= instruction_budget(row, body), (row["kernel"], body)
