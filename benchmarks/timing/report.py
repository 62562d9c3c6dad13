"""Reports of a run: JSON with all records, Markdown tables, and a plot of bandwidth against the number of classes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Document = dict[str, Any]

UNITS = {
    "status": "timed; not available: not for this device, dtype or target, or not installed; skipped: does not fit in "
    "free memory, or no time left; wrong: its loss or gradient is off, so it is not timed; failed: an exception, whose "
    "traceback is in the JSON, or no result in time; crashed: its process died",
    "rows, classes, features": "shape of the logits (rows, classes); features of a head, 0 without one",
    "mode": "forward: the loss where no input requires grad; backward: loss.backward() after a forward pass that is "
    "not timed; both: one training step. In float16 backward begins with a loss scale, a power of two near the number "
    "of rows. A provider that computes the gradient in its forward pass has little left in backward: compare it in "
    "both",
    "timer": "alternating: wall time, eager before each run, in one process; events: device events, the level-2 cache "
    "filled with other data; wall: from the call until the device has finished, caches warm; graph: a CUDA graph's "
    "replay by device events, the cache filled with other data",
    "memory": "state of a CPU's memory. held: as the process keeps it; returned: free memory handed back to the system "
    "before each step (malloc_trim); fresh: processes with nothing else on their heaps, median of their medians",
    "ms, ms_low, ms_high": "milliseconds: median and quartiles over rounds (fresh: lowest and highest process)",
    "gb_per_s": "10^9 bytes a second, counting the least that any implementation moves: of an element of e bytes e in "
    "forward, 2e in backward, 2e in both; a dense soft target 4 more in each",
    "tflop_per_s": "10^12 operations a second of a head's matrix products: 1 in forward, 2 in backward, 3 in both",
    "share_of_copy": "gb_per_s over the device's copy bandwidth (bytes read and written) measured in the same run",
    "eager_ms": "median of the runs of eager that alternate with this provider's",
    "times_faster_than_eager": "median of eager over this median: of the alternating runs, or on a GPU of eager's row",
    "peak_bytes": "bytes of one run beyond its inputs, gradients included. GPU: peak of PyTorch's allocator; CPU: "
    "growth of the peak resident set after free memory was returned to the system",
    "loss_error, gradient_error, row_error": "relative error against float64 on the same input: of the loss, of the "
    "gradient (its norm), and of the row of the gradient that is off most (against rows as they are); the strings nan "
    "or inf where that is what it is",
    "folding_error": "of a provider whose offset was folded: relative error of its gradient against float64 of logits "
    "and offset before the fold",
}
SETTING_KEYS = ("case", "mode", "timer", "memory")
TIMED = "timed"


def add_ratios(records: Iterable[Record], copy_gb_per_s: float | None) -> None:
    """Fill in share_of_copy and times_faster_than_eager, which follow from other records."""
    timed = [record for record in records if record["status"] == TIMED]
    eager = {
        tuple(record[key] for key in SETTING_KEYS): record["ms"]
        for record in timed
        if record["provider"] in ("eager", "eager head")
    }
    for record in timed:
        if "gb_per_s" in record and copy_gb_per_s:
            record["share_of_copy"] = record["gb_per_s"] / copy_gb_per_s
        eager_ms = record.get("eager_ms", eager.get(tuple(record[key] for key in SETTING_KEYS)))
        if eager_ms and "times_faster_than_eager" not in record:
            record["times_faster_than_eager"] = eager_ms / record["ms"]


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json(path: Path, document: Document) -> None:
    write_atomically(path, json.dumps(json_safe(document), indent=1, allow_nan=False, default=str) + "\n")


def json_safe(value: Any) -> Any:
    """The value with NaN and infinities as strings: JSON has none, but errors of a wrong loss may be."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    return [json_safe(item) for item in value] if isinstance(value, (list, tuple)) else value


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def format_value(record: Record, key: str, form: str) -> str:
    value = record.get(key)
    return "" if value is None else format(value, form)


def heading(document: Document) -> list[str]:
    """Title and lines with the selection, date, command, commit, versions and device."""
    device = document["device"]
    return [
        f"# {device['name']}: {document['selection']}, {document['date']}\n",
        f"{'Interrupted. ' if document['interrupted'] else ''}{document['command']}; commit {document['commit']}.\n",
        "; ".join(f"{key} {value}" for key, value in document["versions"].items() if value) + ".\n",
        "; ".join(f"{key}: {value}" for key, value in device.items() if value is not None) + ".\n",
    ]


def markdown(document: Document) -> str:
    records = document["results"]
    sections = heading(document)
    timed = [record for record in records if record["status"] == TIMED]
    for group in dict.fromkeys((r["case"], r["mode"], r["timer"], r["memory"]) for r in timed):
        members = [r for r in timed if tuple(r[key] for key in SETTING_KEYS) == group]
        name = ", ".join(part for part in (group[0], group[1], group[2], group[3] and f"memory {group[3]}") if part)
        speed = "TFLOP/s" if members[0]["features"] else "GB/s"
        sections.append(
            f"## {name}\n\n"
            + table(
                ("provider", "ms", "range", speed, "of copy", "x eager", "peak MB"),
                [
                    (
                        r["provider"],
                        format_value(r, "ms", ".4g"),
                        f"{r['ms_low']:.4g} to {r['ms_high']:.4g}",
                        format_value(r, "tflop_per_s" if r["features"] else "gb_per_s", ".4g"),
                        format_value(r, "share_of_copy", ".0%"),
                        format_value(r, "times_faster_than_eager", ".2f") + ratio_range(r),
                        "" if r.get("peak_bytes") is None else f"{r['peak_bytes'] / 1e6:.4g}",
                    )
                    for r in members
                ],
            )
        )
    untimed = dict.fromkeys(
        (r["provider"], "all" if r["status"] == "not available" else r["case"], r["status"], r["reason"])
        for r in records
        if r["status"] not in (TIMED, "checked")
    )
    if untimed:
        sections.append("## Not timed\n\n" + table(("provider", "case", "", "why"), list(untimed)))
    errors: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if "loss_error" in record:
            errors.setdefault((record["provider"], record["dtype"]), []).append(record)
    if errors:
        sections.append(
            "## Largest relative errors against float64\n\n"
            + table(
                ("provider", "dtype", "loss", "gradient", "gradient, of folding too"),
                [
                    (*key, *(worst_error(found, name) for name in ("loss_error", "gradient_error", "folding_error")))
                    for key, found in errors.items()
                ],
            )
        )
    sections.append("## Providers\n\n" + table(("provider", "what"), list(document["providers"].items())))
    sections.append("## What the figures mean\n\n" + table(("figure", "meaning"), list(document["units"].items())))
    return "\n".join(sections)


def ratio_range(record: Record) -> str:
    low, high = record.get("ratio_low"), record.get("ratio_high")
    return "" if low is None else f" ({low:.2f} to {high:.2f})"


def worst_error(records: Iterable[Record], key: str) -> str:
    values = [record[key] for record in records if record.get(key) is not None]
    return f"{max(values):.1e}" if values else ""


def bandwidth_points(records: Iterable[Record]) -> dict[tuple[str, str], dict[str, list[tuple[int, float]]]]:
    """{(dtype, memory): {provider: [(classes, GB/s), ...]}} of forward + backward with one label a row.

    If a number of classes has cases of different numbers of rows, the largest counts.
    """
    chosen = [
        r
        for r in records
        if r["status"] == TIMED
        and (r["mode"], r["target"], r["features"]) == ("both", "hard", 0)
        and r["timer"] in ("events", "alternating")
    ]
    rows: dict[tuple[str, int], int] = {}
    for r in chosen:
        rows[r["dtype"], r["classes"]] = max(r["rows"], rows.get((r["dtype"], r["classes"]), 0))
    panels: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for r in chosen:
        if r["rows"] == rows[r["dtype"], r["classes"]]:
            panel = panels.setdefault((r["dtype"], r["memory"]), {})
            panel.setdefault(r["provider"], []).append((r["classes"], r["gb_per_s"]))
    return panels


def draw(path: Path, document: Document) -> bool:
    """Draw the plot; returns whether there was anything to draw."""
    panels = bandwidth_points(document["results"])
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ceiling = document["device"]["copy_gb_per_s"]
    names = [name for name in document["providers"] if any(name in panel for panel in panels.values())]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(1 + 5 * len(panels), 5), squeeze=False, sharey=True)
    for axis, ((dtype, memory), lines) in zip(axes[0], panels.items(), strict=True):
        for index, name in enumerate(names):
            values = sorted(lines.get(name, ()))
            axis.plot([x for x, _ in values], [y for _, y in values], marker="o", color=f"C{index}", label=name)
        axis.axhline(ceiling, color="black", linestyle="--", label="the device's copy")
        axis.set(xscale="log", xlabel="classes", title=", ".join(filter(None, (dtype, memory and f"memory {memory}"))))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("GB/s: logits read once, gradient written once")
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(f"Forward + backward, {document['device']['name']}")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return True
