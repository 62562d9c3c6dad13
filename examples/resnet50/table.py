"""One table of several runs: mean and standard deviation over seeds, in %.

    for seed in 0 1 2; do for loss in erm logit_adjusted; do
        python examples/resnet50/train.py --loss $loss --seed $seed; done; done
    python examples/resnet50/table.py runs/*

Runs whose settings differ only in the seed share a line, one for each evaluation method. A run is reported by the model
that its validation split chose, or by the last one if it has no validation split.
"""

import argparse
import io
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

COLUMNS = {"balanced_error": "balanced error", "many_error": "many", "medium_error": "medium", "few_error": "few",
           "ece": "ECE"}  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    file = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(file.read_text())
        return {name: report[name] for name in ("dataset", "model", "loss", "settings", "splits", "models")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: {file} is no report of a finished run: {type(error).__name__}: {error}")


def table(reports: list[dict[str, Any]]) -> str:
    groups = defaultdict(list)
    for report in reports:
        settings = {name: value for name, value in report["settings"].items() if name != "seed"}
        groups[json.dumps(settings, sort_keys=True)].append(report)
    lines = ["| data set, reported split | model | loss | evaluated | runs | " + " | ".join(COLUMNS.values()) + " |"]
    lines += ["|---" * (5 + len(COLUMNS)) + "|"]
    for runs in groups.values():
        first = runs[0]
        seeds = [run["settings"]["seed"] for run in runs]
        if len(set(seeds)) != len(seeds):
            sys.exit(
                f"error: {first['model']} on {first['dataset']}, loss {first['loss']}: two runs have one seed: {seeds}"
            )
        chosen = [next(iter(run["models"].values()))["results"] for run in runs]
        for method in chosen[0]:
            cells = [mean_and_deviation([results[method][column] for results in chosen]) for column in COLUMNS]
            dataset_and_split = f"{first['dataset']}, {first['splits']['reported']['name']}"
            lines.append(
                "| "
                + " | ".join([dataset_and_split, first["model"], first["loss"], method, str(len(runs)), *cells])
                + " |"
            )
    return "\n".join(lines)


def mean_and_deviation(values: list[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if len(known) < len(values):
        return "-"  # no class is in this group (many, medium or few)
    return f"{statistics.mean(known):.1f}" + (f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else "")


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # stdout may be ASCII
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs")
    print(table([read(path) for path in parser.parse_args().runs]))


if __name__ == "__main__":
    main()
