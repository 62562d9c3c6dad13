"""python -m benchmarks [selection]: measure a selection of cases; writes JSON, Markdown and a plot.

`python -m benchmarks host` goes to `benchmarks.static.host`.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.static import host
from benchmarks.timing import machine, report
from benchmarks.timing.cases import DTYPES, MODES, SELECTIONS, Case, Selection, with_axes, with_rows
from benchmarks.timing.measure import Job
from benchmarks.timing.providers import PROVIDERS, baseline
from benchmarks.timing.run import in_fresh_processes, in_one_process

RESULTS = Path(__file__).parent / "results"


def one_of(what: str, names: Sequence[str]) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"no {what} {text!r}; there are {', '.join(map(repr, names))}")
        return text

    return check


def positive(kind: type) -> Callable[[str], float]:
    def check(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:
            raise argparse.ArgumentTypeError(
                f"must be a positive {'number' if kind is float else 'integer'}, got {text!r}"
            )
        return value

    return check


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time and memory of the logit-adjusted cross entropy: fused_la and what else there is. Every "
        "provider is checked against float64 before it is timed; one that cannot run here is listed with the reason. "
        "Results go to OUT/<device>/<date>.json, .md and .png, the JSON every few seconds: Ctrl-C keeps what is done.",
        epilog="selections: "
        + "; ".join(f"{name}: {selection.description}" for name, selection in SELECTIONS.items())
        + f"; host, which has options of its own (`python -m benchmarks host --help`): {host.DESCRIPTION}",
    )
    selection_name = one_of("selection", list(SELECTIONS))
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "selection",
        nargs="?",
        default="quick",
        type=selection_name,
        help=f"what to measure: {', '.join(SELECTIONS)} (default: quick)",
    )
    which.add_argument("--quick", dest="selection", action="store_const", const="quick", help="the selection quick")
    parser.add_argument("--list", action="store_true", help="list selections, their cases and the providers, and stop")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one (default)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder for results (default: {RESULTS.name}/ here)")
    parser.add_argument(
        "--providers",
        nargs="+",
        metavar="NAME",
        type=one_of("provider", list(PROVIDERS)),
        help="only these, and eager, which ratios are against",
    )
    axis: dict[str, Any] = dict(nargs="+", default=())
    parser.add_argument(
        "--classes",
        metavar="C",
        type=positive(int),
        help="these numbers of classes in place of the selection's",
        **axis,
    )
    parser.add_argument(
        "--rows", metavar="N", type=positive(int), help="these numbers of rows in place of the selection's", **axis
    )
    parser.add_argument(
        "--dtypes",
        metavar="DTYPE",
        type=one_of("dtype", DTYPES),
        help=f"of {', '.join(DTYPES)}, in place of the selection's",
        **axis,
    )
    parser.add_argument("--seconds", type=positive(float), help="to spend on each figure, instead of the selection's")
    parser.add_argument(
        "--timeout",
        type=positive(float),
        help="seconds without a figure after which a provider is stopped (default: 60 in quick, else 600)",
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no GPU")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: {options.out} is not a folder")
    options.timeout = options.timeout or (60.0 if SELECTIONS[options.selection].minutes < 60 else 600.0)
    options.cases = chosen_cases(SELECTIONS[options.selection], options)
    if not options.cases and not options.list:
        parser.error(f"the selection {options.selection} has no cases on this device ({options.device})")
    if not options.list and not any(chosen_providers(case, options) for case in options.cases):
        parser.error(
            f"none of --providers fits the cases of {options.selection}: some take logits, some a head's features"
        )
    return options


def chosen_cases(selection: Selection, options: argparse.Namespace) -> list[Case]:
    cases = selection.cpu if options.device == "cpu" else selection.gpu
    return with_axes(cases, options.rows, options.classes, options.dtypes)


def chosen_providers(case: Case, options: argparse.Namespace) -> list[str]:
    """Names of the providers of a case, the baseline first.

    The selection "script" has fused_la alone: its processes hold the memory of two steps, and eager is one of them.
    """
    names = options.providers or (["fused_la blocked"] if options.selection == "script" else list(PROVIDERS))
    fitting = [name for name in names if PROVIDERS[name].head == bool(case.n_features)]
    baseline_name = baseline(case).name
    if not fitting or options.selection == "script":
        return fitting
    return [baseline_name, *(name for name in fitting if name != baseline_name)]


def make_jobs(options: argparse.Namespace, cache_bytes: int) -> list[Job]:
    selection = SELECTIONS[options.selection]
    return [
        Job(
            case=case,
            provider=name,
            device=options.device,
            cache_bytes=cache_bytes,
            memory=selection.memory,
            modes=("both",) if selection.processes else MODES,
            seconds=options.seconds or selection.seconds,
        )
        for case in dict.fromkeys(with_rows(case, cache_bytes) for case in options.cases)
        for name in chosen_providers(case, options)
    ]


def listing(options: argparse.Namespace) -> str:
    lines = [f"Selections on this device ({options.device}):"]
    for name, selection in SELECTIONS.items():
        lines.append(f"  {name}: {selection.description}")
        lines += [f"    {case}" for case in chosen_cases(selection, options)] or ["    nothing on this device"]
    lines += [host.listing(), "Providers:"]
    for provider in PROVIDERS.values():
        reason = provider.not_on.get(options.device)
        lines.append(f"  {provider.name}: {provider.description}" + (f" [{reason}]" if reason else ""))
    return "\n".join(lines)


def format_record(record: report.Record) -> str:
    setting = " ".join(filter(None, (record.get(key, "") for key in ("mode", "timer", "memory"))))
    start = f"{record['case']:28} {record['provider']:24} {setting:26} "
    if record["status"] == "timed":
        ratio = record.get("times_faster_than_eager")
        return start + f"{record['ms']:10.4f} ms" + (f"  {ratio:6.2f}x eager" if ratio else "")
    return start + f"{record['status']}: {record['reason']}"


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["host"]:
        return host.main(arguments[1:], RESULTS)
    options = parse(arguments)
    if options.list:
        print(listing(options))
        return 0
    selection = SELECTIONS[options.selection]
    now = datetime.datetime.now().astimezone()
    device = machine.device_facts(options.device)
    path = options.out / machine.slug(device["name"]) / f"{now:%Y-%m-%d-%H%M%S}.json"
    jobs = make_jobs(options, device["cache_bytes"])
    document: report.Document = {
        "selection": options.selection,
        "command": machine.command(),
        "date": now.isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "device": device,
        "versions": machine.versions(),
        "units": report.UNITS,
        "providers": {name: PROVIDERS[name].description for name in dict.fromkeys(job.provider for job in jobs)},
        "interrupted": True,  # until the end
        "results": [],
    }
    print(f"{device['name']}: copy {device['copy_gb_per_s']:.4g} GB/s; {len(jobs)} measurements to {path}", flush=True)
    if selection.processes:
        records = in_fresh_processes(jobs, options.timeout, selection.processes)
    else:
        records = in_one_process(jobs, options.timeout, selection.minutes)
    written = 0.0
    try:
        for record in records:
            document["results"].append(record)
            report.add_ratios(document["results"], device["copy_gb_per_s"])
            if time.monotonic() - written > 2:
                report.write_json(path, document)
                written = time.monotonic()
            print(format_record(record), flush=True)
        document["interrupted"] = False
    except KeyboardInterrupt:
        print("Interrupted: what is done is kept.", flush=True)
    finally:
        records.close()
        write_results(path, document)
    if document["interrupted"]:
        return 130
    return 0 if any(record["status"] == "timed" for record in document["results"]) else 1


def write_results(path: Path, document: report.Document) -> None:
    report.write_json(path, document)
    report.write_atomically(path.with_suffix(".md"), report.markdown(document))
    try:
        report.draw(path.with_suffix(".png"), document)
    except ImportError as error:
        print(f"No picture: {error}")
    print(f"Wrote {path}, .md, .png", flush=True)


if __name__ == "__main__":
    sys.exit(main())
