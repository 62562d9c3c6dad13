"""Evaluation of a model on a split: error rates, calibration, and post-hoc corrections with their sweeps over tau.

Every image counts exactly once, on any number of processes. No tau is chosen on the split that it is reported on.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from data import Data
from loading import on_device
from model import Classifier, Head
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError
from torchmetrics.utilities import dim_zero_cat
from world import World

from fused_la import log_prior_from_counts
from fused_la.metrics import BalancedError
from fused_la.posthoc import TauSweep, adjust_logits

TAUS = [round(0.1 * i, 1) for i in range(31)]
POST_HOC, NORMALISED = "logit adjustment post hoc", "weight normalisation"
FAMILIES = (POST_HOC, NORMALISED)
RATES = ("balanced_error", "top1_accuracy", "many_error", "medium_error", "few_error", "worst_class_error")
N_BINS = 15  # confidence bins

Result = dict[str, Any]
Correction = Callable[[Tensor], Tensor]  # logits -> logits


class Evaluation(NamedTuple):
    results: dict[str, Result]  # by name of the correction
    sweeps: dict[str, TauSweep]  # by name of the family of corrections


@torch.no_grad()
def evaluate(
    args: Any,
    model: Classifier,
    batches: Iterable[tuple[Tensor, Tensor]],
    split: str,
    data: Data,
    world: World,
    autocast: Callable[[], AbstractContextManager],
    corrections: dict[str, Correction] | None = None,
    with_sweeps: bool = False,
) -> Evaluation:
    """The rates of the raw logits and of each correction, and the sweeps over tau of the post-hoc corrections.

    This is a collective: each process calls it with its own images, and gets the rates over all images.
    """
    was_training = model.training
    model.eval()
    head = model.whole_head()
    metrics = {
        name: CorrectionMetrics(data, fn, world.device)
        for name, fn in {"raw": torch.Tensor.float, **(corrections or {})}.items()
    }
    sweeps = make_sweeps(head, data, split) if with_sweeps else {}
    for images, target in batches:
        target = target.to(world.device, non_blocking=True)
        with autocast():
            logits = model.logits(on_device(images, args, world), head)
        logits = logits.float()
        for metric in metrics.values():
            metric.update(logits, target)
        for sweep in sweeps.values():
            sweep.update(logits, target)
    model.train(was_training)
    if dist.is_initialized():
        group = dist.group.WORLD
        assert group is not None
        sweeps = {name: sweep.sync(group) for name, sweep in sweeps.items()}
    return Evaluation({name: metric.compute() for name, metric in metrics.items()}, sweeps)


class CorrectionMetrics:
    """The metrics of the logits under one correction."""

    def __init__(self, data: Data, correction: Correction, device: torch.device):
        self.correction = correction
        self.balanced = BalancedError(data.shots_counts, class_names=None).to(device)
        self.calibration = MulticlassCalibrationError(data.n_classes, n_bins=N_BINS).to(device)

    def update(self, logits: Tensor, target: Tensor) -> None:
        corrected = self.correction(logits)
        self.balanced.update(corrected, target)
        self.calibration.update(corrected.softmax(1), target)

    def compute(self) -> Result:
        computed = self.balanced.compute()
        result: Result = {name: float(computed[name]) for name in RATES}
        result["balanced_error_interval"] = [float(computed[f"balanced_error_{end}"]) for end in ("low", "high")]
        result["worst_class"] = int(computed["worst_class"])
        result["n_absent_classes"] = int(computed["n_absent_classes"])
        result["class_error"] = computed["class_error"].tolist()
        with self.calibration.sync_context():
            confidence = dim_zero_cat(self.calibration.confidences)
            correct = dim_zero_cat(self.calibration.accuracies)
        result["n_images"] = len(confidence)
        result["reliability"] = reliability(confidence.double().cpu(), correct.double().cpu())
        result["ece"] = float(self.calibration.compute())
        return result


def reliability(confidence: Tensor, correct: Tensor) -> dict[str, list[float]]:
    """For each bin of confidence: the number of images, their mean confidence and their accuracy."""
    bins = (confidence * N_BINS).ceil().long().clamp(1, N_BINS) - 1
    count, total, n_correct = (
        torch.zeros(N_BINS, dtype=torch.float64).index_add_(0, bins, values)
        for values in (torch.ones_like(confidence), confidence, correct)
    )
    return {"count": count.tolist(), "confidence": (total / count).tolist(), "accuracy": (n_correct / count).tolist()}


# ---- Corrections of a trained model


def make_sweeps(head: Head, data: Data, split: str) -> dict[str, TauSweep]:
    options = {"split": split, "class_counts": data.shots_counts}
    log_prior = log_prior_from_counts(data.class_counts).to(head.weight.device)
    return {
        POST_HOC: TauSweep(log_prior, TAUS, **options),
        NORMALISED: TauSweep.normalize_classifier(head.weight, TAUS, bias=head.bias, **options),
    }


def make_corrections(head: Head, data: Data, taus: dict[str, dict[str, float]]) -> dict[str, Correction]:
    """A correction for each `taus[family][label]`, by its name "family, label"."""
    log_prior = log_prior_from_counts(data.class_counts).to(head.weight.device)
    norm = torch.linalg.vector_norm(head.weight.float(), dim=1)
    bias = 0.0 if head.bias is None else head.bias.float()
    correction_at: dict[str, Callable[[float], Correction]] = {
        POST_HOC: lambda tau: lambda logits: adjust_logits(logits, log_prior, tau),
        NORMALISED: lambda tau: lambda logits: (logits - bias) * norm.pow(-tau) + bias,
    }
    return {
        f"{family}, {label}": correction_at[family](tau)
        for family, labels in taus.items()
        for label, tau in labels.items()
    }
