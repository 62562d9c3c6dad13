"""Budgets of a compiled kernel's registers, local memory, accesses and instructions (`benchmarks.disassemble`).

A budget is slightly more than the largest figure that Triton 3.8 gave over `--all`: slower code exceeds it, one more
register does not. With other versions of Triton instructions and registers may be `SLACK` times the budget, except in
the training step, whose budget is the same for all versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton

MEASURED = triton.__version__.startswith("3.8.")
SLACK = 1.0 if MEASURED else 1.4  # over `--all`, 1.35 times was seen with Triton 3.6, 1.02 with 3.9
# The whole kernel of one label, mean and gradient, 8142 classes in bfloat16, sm_90, with any version of Triton.
TRAINING_BUDGET = {"instructions_per_element": 18.6, "exp2_per_element": 1.1}

Row = dict[str, Any]  # figures of a kernel
Body = dict[str, Any]  # figures of a loop in a kernel, or of a whole kernel
VECTOR_BYTES = 16
# Every class has a target mass.
DENSE_VARIANTS = ("weights, smoothing", "priors by group, smoothing", "probabilities")
ROW_VARIANTS = ("learned priors by group", "label scale")  # a row has an offset or a scale of its own
# No target mass in loops.
ONE_SUM_VARIANTS = ("label", "learned prior", "two labels", "sum", "none", "no prior", *ROW_VARIANTS)


def violations(row: Row) -> list[str]:
    """What of a kernel exceeds its budget, as text."""
    if row["target"].startswith("gfx"):
        return list(_amd_violations(row))
    found = [*_register_violations(row)]
    if row["kernel"].startswith("_resident"):
        found += _resident_violations(row, row["whole"])
    for body in row.get("bodies", []):
        found += [f"{body['name']}: {what}" for what in _loop_violations(row, body)]
    return found


def processes_rows(row: Row) -> bool:
    """Whether the kernel processes rows of logits."""
    return row["kernel"].startswith(("_resident", "_streamed"))


def processes_head_tile(row: Row) -> bool:
    """Whether the kernel processes a tile of a head's logits."""
    return row["kernel"] in ("_tile_state_kernel", "_tile_gradient_kernel")


def writes_gradient(row: Row) -> bool:
    return row["kernel"].endswith(("+ gradient", "backward", "_tile_gradient_kernel"))


def _amd_violations(row: Row) -> Iterator[str]:
    # With 168 registers three waves fit on a SIMD unit; rows with a prior of their own take some more.
    limit = 184 if row["variant"] in ROW_VARIANTS else 168
    limit = int((240 if row["dtype"] == "float64" and row["vec"] == 1 else limit) * SLACK)
    if row["regs"] > limit:
        yield f"{row['regs']} registers, more than {limit}"
    if row["local"] > 0:
        yield f"{row['local']} bytes of local memory"
    if (processes_rows(row) and row["vec"] > 1) or processes_head_tile(row):
        if row["wide_loads"] == 0:
            yield "no 16-byte load"
        if writes_gradient(row) and row["wide_stores"] == 0:
            yield "no 16-byte store"


def _register_violations(row: Row) -> Iterator[str]:
    if row["regs"] > register_budget(row):
        yield f"{row['regs']} registers, more than {register_budget(row)}"
    if row["local"] > local_budget(row):
        yield f"{row['local']} bytes of local memory"
    looped = row["kernel"].startswith("_streamed")
    if (looped and row["vec"] > 1) or row["kernel"] == "_grad_log_prior_kernel":
        bodies = row.get("bodies", [])
        if not bodies:
            yield "no loop over a row"
        elif looped and not any(body["wide_loads"] for body in bodies):
            yield "no 16-byte load"


def local_budget(row: Row) -> int:
    """Bytes of local memory a thread, outside the loops.

    They were seen with a dense target mass, in float64, on sm_80, and in streamed rows with Triton 3.6.
    """
    if row["variant"] in DENSE_VARIANTS:
        return 40
    if row["dtype"] == "float64":
        return 16
    if row["target"] == "sm_80":
        return 8
    return 0 if MEASURED or (row["kernel"].startswith("_resident") and row["variant"] in ONE_SUM_VARIANTS) else 16


def register_budget(row: Row) -> int:
    return min(int(_register_budget(row) * SLACK), 255)


def _register_budget(row: Row) -> int:
    """Registers a thread, of 255. 512 threads have 128 each at most; narrow tiles keep an address for each element."""
    if row["kernel"] == "_grad_log_prior_kernel":
        return 208 if row["dtype"] == "float64" else 144
    if row["vec"] == 1 and processes_rows(row):
        return 240 if row["dtype"] == "float64" else 176
    if row["variant"] in DENSE_VARIANTS and row["kernel"].startswith("_resident"):
        return 208  # these kernels have 256 threads
    return 136 if processes_rows(row) and row["target"] == "sm_100" else 128


def _resident_violations(row: Row, whole: Body) -> Iterator[str]:
    """Violations of a kernel that reads each row once."""
    if row["vec"] == 1:
        return
    if whole["spills"] > local_budget(row) // 2:
        yield f"{whole['spills']} accesses of local memory"
    if whole["wide_loads"] < 4:
        yield f"{whole['wide_loads']} 16-byte loads"
    if whole["wide_stores"] == 0 and writes_gradient(row):
        yield "no 16-byte store"
    if whole["wide_stores"] > 8:  # 128 bytes a thread
        yield f"{whole['wide_stores']} 16-byte stores"
    if row["dtype"] == "float64" or row["variant"] not in ONE_SUM_VARIANTS:
        return
    if whole["exp2_per_element"] > 1.2:
        yield f"{whole['exp2_per_element']} exp2 an element"
    for name, limit in whole_budget(row).items():
        if whole[name] > limit:
            yield f"{whole[name]} {name.replace('_', ' ')}, not {limit:g}"


def is_training(row: Row) -> bool:
    return (
        row["kernel"] == "_resident_kernel + gradient"
        and (row["dtype"], row["classes"], row["target"]) == ("bfloat16", 8142, "sm_90")
        and row["variant"] in ("label", "learned prior")
    )


def whole_budget(row: Row) -> dict[str, float]:
    """Budget for each element; what a thread does once is shared by its elements (at most 64, in half precision)."""
    if is_training(row):
        return TRAINING_BUDGET
    elements = row["whole"]["elements"]
    each, once = (15, 620) if row["variant"] == "two labels" else (13, 520)
    if row["variant"] in ROW_VARIANTS:
        each += 2.5
    return {"instructions_per_element": SLACK * (each + once / elements)}


def _loop_violations(row: Row, body: Body) -> Iterator[str]:
    if body["spills"] > 0:
        yield f"{body['spills']} accesses of local memory"
    # A loop over labels looks like one over classes if it takes exponentials, and in float64.
    if not processes_rows(row) or row["dtype"] == "float64" or row["variant"] == "two labels, margin":
        return
    if body["exp2_per_element"] != 1:
        yield f"{body['exp2_per_element']} exp2 an element"
    if row["vec"] == 1:
        return
    if body["wide_loads"] * VECTOR_BYTES < body["row_bytes"] or body["narrow_row_loads"] > 0:
        yield f"{body['wide_loads']} 16-byte loads and {body['narrow_row_loads']} of 2 bytes or less"
    written = body["row_bytes"] if "gradient" in body["name"] else 0
    if body["wide_stores"] * VECTOR_BYTES != written or body["narrow_stores"] > 0:
        yield f"{body['wide_stores']} 16-byte stores and {body['narrow_stores']} narrower ones"
    if row["variant"] not in ONE_SUM_VARIANTS:
        return
    # Offsets are 4 bytes for each class of a thread. Their alignment is unknown if rows may begin anywhere.
    offsets = body["row_bytes"] / VECTOR_BYTES / row["block_rows"] * row["vec"]
    if body["narrow_loads"] not in (0, offsets):
        yield f"{body['narrow_loads']} narrow loads, not {offsets:g} of offsets"
    if body["instructions_per_element"] > instruction_budget(row):
        yield f"{body['instructions_per_element']} instructions an element, not {instruction_budget(row):g}"


def instruction_budget(row: Row) -> float:
    """Instructions for each element in a loop. Rows that share a program and a prior share the loads of the offset."""
    each = 18.5 if row["dtype"] == "float32" else 15 if row["target"] == "sm_90" else 16
    return SLACK * (each + 1.5 * (row["variant"] in ROW_VARIANTS))
