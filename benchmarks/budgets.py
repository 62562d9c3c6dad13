"""What a compiled kernel may take: the figures of `benchmarks.disassemble` against budgets.

A budget is the largest figure measured with Triton 3.8 over `--all`, and a little: too small where code gets slower,
not where a compiler counts one register more. Of other versions' instructions and registers there may be `SLACK` times
as many.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton

MEASURED = triton.__version__.startswith("3.8.")
SLACK = 1.0 if MEASURED else 1.4  # over `--all`, 1.35 times was seen with Triton 3.6, 1.02 with 3.9

Row = dict[str, Any]  # of a kernel
Body = dict[str, Any]  # of a loop in it
VECTOR_BYTES = 16
ONE_SUM = ("label", "learned prior", "two labels", "sum", "none", "no prior")  # the loops know no target


def violations(row: Row) -> list[str]:
    """What of a kernel is more than it may be."""
    if row["target"].startswith("gfx"):
        return list(_of_amd(row))
    found = [*_of_threads(row)]
    for body in row.get("bodies", []):
        found += [f"{body['name']}: {what}" for what in _of_body(row, body)]
    return found


def on_rows(row: Row) -> bool:
    """Whether its loops take rows, class after class."""
    return row["kernel"].startswith(("_forward", "_grad_logits"))


def of_tile(row: Row) -> bool:
    """Whether it takes a tile of a head's logits."""
    return row["kernel"] in ("_parts_kernel", "_gradient_kernel")


def _of_width(row: Row) -> Iterator[str]:
    if row["wide_loads"] == 0:
        yield "no 16-byte load"
    if "grad" in row["kernel"] and row["wide_stores"] == 0:
        yield "no 16-byte store"


def _of_amd(row: Row) -> Iterator[str]:
    # 168: with which three waves fit on a SIMD unit; up to 151 were seen, and 236 of tall tiles in float64.
    most = int((240 if row["dtype"] == "float64" and row["vec"] == 1 else 168) * SLACK)
    if row["regs"] > most:
        yield f"{row['regs']} registers, more than {most}"
    if row["local"] > 0:
        yield f"{row['local']} bytes of local memory"
    if (on_rows(row) and row["vec"] > 1) or of_tile(row):
        yield from _of_width(row)


def _of_threads(row: Row) -> Iterator[str]:
    if row["regs"] > register_budget(row):
        yield f"{row['regs']} registers, more than {register_budget(row)}"
    if row["local"] > local_budget(row):
        yield f"{row['local']} bytes of local memory"
    one_tile = row.get("one_tile", False)
    if of_tile(row) or (one_tile and row["vec"] > 1):
        yield from _of_width(row)
    if one_tile:
        return  # no loop takes its classes
    bodies = row.get("bodies", [])
    if not bodies and ((on_rows(row) and row["vec"] > 1) or row["kernel"] == "_grad_log_prior_kernel"):
        yield "no loop over a row"
    if on_rows(row) and row["vec"] > 1 and not any(body["wide_loads"] for body in bodies):
        yield "no 16-byte load"


def local_budget(row: Row) -> int:
    """Bytes a thread keeps across the loops, outside them: seen with smoothing and probabilities, and of float64's
    weights; 16 with Triton 3.6 and 3.9."""
    if not MEASURED or row["target"] == "sm_80":  # 16 in loops over rows of 50,257 classes, one a program
        return 16
    return 0 if on_rows(row) and row["variant"] in ONE_SUM and row["target"] == "sm_90" else 8


def register_budget(row: Row) -> int:
    return min(int(_register_budget(row) * SLACK), 248)


def _register_budget(row: Row) -> int:
    """Of 255 a thread. Where 16 bytes are read at a time, sm_90 took up to 128, in float64 92, and sm_80 up to 168;
    tall tiles of short rows or of images have an address for each element."""
    if row["kernel"] == "_grad_log_prior_kernel":
        return 208 if row["dtype"] == "float64" else 144
    if row["vec"] == 1 and on_rows(row):
        return 232 if row["dtype"] == "float64" else 176
    smooth = row["variant"] == "weights, smoothing" and row["target"] != "sm_90"
    return 176 if smooth or row["variant"] == "two labels, margin" else 128


def _of_body(row: Row, body: Body) -> Iterator[str]:
    if body["spills"] > 0:
        yield f"{body['spills']} accesses of local memory"
    # A loop over labels looks like one over classes where it takes exponentials, and in float64.
    if not on_rows(row) or row["dtype"] == "float64" or row["variant"] == "two labels, margin":
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
    if row["variant"] not in ONE_SUM:
        return
    # Of offsets, 4 bytes for each class of a thread; a vector's alignment is not known where rows may begin anywhere.
    offsets = body["row_bytes"] / VECTOR_BYTES / row["block_rows"] * row["vec"]
    if body["narrow_loads"] not in (0, offsets):
        yield f"{body['narrow_loads']} narrow loads, not {offsets:g} of offsets"
    if body["instructions_per_element"] > instruction_budget(row, body):
        yield f"{body['instructions_per_element']} instructions an element, not {instruction_budget(row, body):g}"


def instruction_budget(row: Row, body: Body) -> float:
    return SLACK * _instruction_budget(row, body)


def _instruction_budget(row: Row, body: Body) -> float:
    """Instructions an element. Rows that share a program share the offset's loads: 4 bytes of it for each class."""
    if row["block_rows"] > 1:
        return 15
    if row["dtype"] == "float32":  # where a tile starts is found anew for each 4 elements of a thread
        return 20.5 if "rows" in body["name"] else 18.5
    return 18.5 if "rows" in body["name"] or row["target"] != "sm_90" else 15.5
