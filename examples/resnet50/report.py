"""The final report of a run: evaluation of its models, report.json, report.md and figures."""

import io
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from checkpoint import write_atomically
from data import Data
from evaluation import FAMILIES, TAUS, Evaluation, Result, evaluate, make_corrections
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which looks for a display
from model import Classifier
from options import args_as_json
from states import load_model
from torch import Tensor
from torch.utils.data import DataLoader
from world import World

COLUMNS = {
    "balanced_error": "balanced error", "top1_error": "top-1 error", "many_error": "many", "medium_error": "medium",
    "few_error": "few", "worst_class_error": "worst class", "ece": "ECE",
}  # fmt: skip


def final_report(
    args: Any, data: Data, model: Classifier, states: dict[str, tuple[int, dict[str, Tensor]]],
    val: DataLoader | None, test: DataLoader, world: World, autocast: Any,
) -> dict[str, Any]:  # fmt: skip
    """The content of report.json. `states` has the epoch and the weights of each model, by name.

    Nothing in it depends on when or where the run was made.
    """
    models = {}
    for name, (epoch, state) in states.items():
        load_model(model, state)
        models[name] = evaluate_model(args, data, model, val, test, world, autocast) | {"epoch": epoch}
    excluded = {"data", "train_list", "val_list", "test_list", "workers", "download", "check_images"}
    return {
        "dataset": args.dataset,
        "model": args.model,
        "loss": args.loss,
        "settings": {name: value for name, value in args_as_json(args).items() if name not in excluded},
        "splits": {
            "train": {"name": data.train.name, "n_images": len(data.train.images)},
            "chosen_on": None if data.val is None else {"name": data.val.name, "n_images": len(data.val.images)},
            "reported": {"name": data.test.name, "n_images": len(data.test.images)},
        },
        "class_names": data.class_names,
        "class_counts": data.class_counts.tolist(),
        "notes": data.notes,
        "models": models,
    }


def evaluate_model(
    args: Any, data: Data, model: Classifier, val: DataLoader | None, test: DataLoader, world: World, autocast: Any
) -> dict[str, Any]:
    """Evaluate one model on the reported split. Each tau* is chosen on the validation split alone."""

    def evaluate_split(split: str, batches: Iterable[Any], taus: dict[str, dict[str, float]]) -> Evaluation:
        corrections = make_corrections(model.whole_head(), data, taus)
        return evaluate(args, model, batches, split, data, world, autocast, corrections, args.posthoc)

    taus: dict[str, dict[str, float]] = {}
    on_val = None
    if args.posthoc:
        if val is not None and data.val is not None:
            on_val = evaluate_split(data.val.name, val, {})
        for family in FAMILIES:
            taus[family] = {"tau = 1": 1.0}
            if on_val is not None:
                taus[family]["tau*"] = on_val.sweeps[family].best()
    on_test = evaluate_split(data.test.name, test, taus)
    norms = torch.linalg.vector_norm(model.whole_head().weight.float(), dim=1)
    curves = {
        family: {
            "taus": list(TAUS),
            "reported": sweep.compute()["balanced_error"].tolist(),
            "chosen_on": None if on_val is None else on_val.sweeps[family].compute()["balanced_error"].tolist(),
        }
        for family, sweep in on_test.sweeps.items()
    }
    return {
        "results": on_test.results,
        "tau_star": {family: labels.get("tau*") for family, labels in taus.items()},
        "tau_curves": curves,
        "weight_norms": norms.tolist(),
    }


# ---- Files


def write_report(directory: Path, report: dict[str, Any]) -> str:
    """Write all files. Returns the text of report.md."""
    write_atomically(directory / "report.json", (json.dumps(without_nan(report), indent=1) + "\n").encode())
    figures = {}
    for name, draw in FIGURES.items():
        figure = Figure(figsize=(6, 4), layout="constrained")
        if draw(figure.subplots(), report):
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=100, metadata={"Software": None})
            write_atomically(directory / name, png.getbuffer())
            figures[name] = draw.__doc__ or name
    text = as_markdown(report, figures)
    write_atomically(directory / "report.md", text.encode())
    return text


def without_nan(value: Any) -> Any:
    """Replace NaN, the rate of no image, by None: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_markdown(report: dict[str, Any], figures: dict[str, str]) -> str:
    splits = report["splits"]
    chosen_on = splits["chosen_on"]
    lines = [f"# {report['model']} on {report['dataset']}, loss: {report['loss']}", ""]
    lines += [f"Trained on {splits['train']['n_images']:,} images ({splits['train']['name']})."]
    if chosen_on is None:
        lines += ["Nothing was chosen: there is no validation split."]
    else:
        lines += [f"Epoch and tau* were chosen on {chosen_on['n_images']:,} images: {chosen_on['name']}."]
    lines += [f"All rates are of {splits['reported']['n_images']:,} images: {splits['reported']['name']}."]
    lines += [*report["notes"]]
    for name, model in report["models"].items():
        lines += ["", f"## {name[0].upper()}{name[1:]} ({model['epoch']})", ""]
        lines += ["| % | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        for method, result in model["results"].items():
            lines += [
                f"| {method_label(method, model)} | "
                + " | ".join(format_rate(result, column) for column in COLUMNS)
                + " |"
            ]
    lines += [
        "",
        "Balanced error: mean over classes of a class's error. Many, medium, few: classes of > 100, 20 to 100, < 20 "
        "images in the data set's training split. ECE: expected calibration error, 15 bins.",
    ]
    if not report["settings"]["posthoc"]:
        lines += ["No post-hoc correction: the training corrects for the class frequencies, or --no-posthoc was given."]
    for name, caption in figures.items():
        lines += ["", caption, "", f"![{caption}]({name})"]
    return "\n".join(lines) + "\n"


def method_label(method: str, model: dict[str, Any]) -> str:
    family, _, label = method.rpartition(", ")
    return f"{family}, tau* = {model['tau_star'][family]:g}" if label == "tau*" else method


def format_rate(result: Result, column: str) -> str:
    rate = 1.0 - result["top1_accuracy"] if column == "top1_error" else result[column]
    return "-" if not math.isfinite(rate) else f"{100 * rate:.2f}"


# ---- Figures of the chosen model. Each function returns whether it drew; its docstring is the caption in report.md.


def chosen_model(report: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and results of the best epoch's model, which comes first; without it the last epoch's."""
    return next(iter(report["models"].items()))


def classes_by_frequency(report: dict[str, Any]) -> Tensor:
    """Indices of the classes, the most frequent one first."""
    return torch.tensor(report["class_counts"]).argsort(descending=True, stable=True)


def error_by_class_rank(axes: Axes, report: dict[str, Any]) -> bool:
    """Error of the classes in ten groups of equally many, the most frequent ones first."""
    name, model = chosen_model(report)
    order = classes_by_frequency(report)
    for method, result in model["results"].items():
        groups = torch.tensor(result["class_error"])[order].tensor_split(min(10, len(order)))
        errors = [100 * float(group.nanmean()) for group in groups]
        axes.plot(range(1, len(errors) + 1), errors, marker="o", markersize=4, label=method_label(method, model))
    axes.set_xlabel("group of classes by frequency")
    axes.set_ylabel(f"error on {report['splits']['reported']['name']} (%)")
    axes.set_title(name)
    axes.legend(fontsize="small")
    return True


def tau_curves(axes: Axes, report: dict[str, Any]) -> bool:
    """Balanced error against tau; the split that tau* was chosen on is dotted, tau* a vertical line."""
    _, model = chosen_model(report)
    if not model["tau_curves"]:
        return False
    for i, (family, curve) in enumerate(model["tau_curves"].items()):
        reported, chosen_on = report["splits"]["reported"], report["splits"]["chosen_on"]
        label = f"{family}, {reported['name']}"
        axes.plot(curve["taus"], [100 * e for e in curve["reported"]], color=f"C{i}", label=label)
        if curve["chosen_on"] is not None:
            errors, label = [100 * e for e in curve["chosen_on"]], f"{family}, {chosen_on['name']}"
            axes.plot(curve["taus"], errors, color=f"C{i}", linestyle=":", label=label)
            axes.axvline(model["tau_star"][family], color=f"C{i}", linewidth=0.5)
    axes.set_xlabel("tau")
    axes.set_ylabel("balanced error (%)")
    axes.legend(fontsize="small")
    return True


def weight_norms(axes: Axes, report: dict[str, Any]) -> bool:
    """Norm of each class's weight, the most frequent class first."""
    norms = torch.tensor(chosen_model(report)[1]["weight_norms"])[classes_by_frequency(report)]
    axes.plot(range(1, len(norms) + 1), norms.tolist(), marker="o" if len(norms) <= 100 else "", markersize=4)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("class by frequency")
    axes.set_ylabel("norm of its weight")
    return True


def reliability(axes: Axes, report: dict[str, Any]) -> bool:
    """Accuracy against confidence; on the diagonal a model is calibrated."""
    _, model = chosen_model(report)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for method, result in model["results"].items():
        bins = result["reliability"]
        axes.plot(bins["confidence"], bins["accuracy"], marker="o", markersize=4, label=method_label(method, model))
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.legend(fontsize="small")
    return True


FIGURES = {
    "error_by_class_rank.png": error_by_class_rank, "tau_curves.png": tau_curves, "weight_norms.png": weight_norms,
    "reliability.png": reliability,
}  # fmt: skip
