"""The balanced error as a torchmetrics metric; needs the extra `metrics` of this package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_la._call import checks
from fused_la._call.values import read_value
from fused_la._evaluation.error_rates import class_error, count_predictions, mean_rates, read_counts, shot_groups

try:
    from torchmetrics import Metric
except ModuleNotFoundError as error:
    if error.name != "torchmetrics":
        raise
    raise ModuleNotFoundError(
        "fused_la.metrics needs the package torchmetrics, which is not installed: pip install 'fused_la[metrics]'",
        name="torchmetrics",
    ) from error

__all__ = ["BalancedError", "shot_groups"]

_DRAWS = 1 << 20  # bootstrap draws in memory at a time


class BalancedError(Metric):
    r"""The mean over classes of each class's error rate, and the other rates that long-tail results report.

    .. math:: \mathrm{error} = \frac{1}{C} \sum_c P(\hat y \ne c \mid y = c)

    `compute()` gives a dict of float32 tensors, rates in [0, 1], computed in float64 from integer counts:

    - `balanced_error`: mean of the class errors; classes without examples are left out (and counted, see below).
      1 - `sklearn.metrics.balanced_accuracy_score`.
    - `balanced_error_low`, `balanced_error_high`: its bootstrap interval; see `n_bootstrap`.
    - `top1_accuracy`: the share of all examples that are predicted correctly.
    - `many_error`, `medium_error`, `few_error`: means over the classes of more than 100, 20 to 100 and fewer than 20
      *training* examples; NaN for a group without examples here.
    - `worst_class_error`, and `worst_class` (int64): the highest class error and the first class that has it.
    - `n_absent_classes` (int64): classes without examples.
    - `class_error`: (C,), NaN for absent classes.

    Over no examples rates are NaN and `worst_class` is -1. As in any torchmetrics metric, `compute()` sums counts over
    ranks. A sampler that pads its last batches makes some examples count twice: give the padded ones the label
    `ignore_index`. For checkpoints call `metric.persistent(True)`. `set_dtype`, `half`, `double` and `to(dtype)` leave
    counts int64 and rates float32.

    With other parts of torchmetrics:

    - `metric["balanced_error"]` is a metric of one number. Arithmetic (`a["balanced_error"] - b["balanced_error"]`),
      `MetricTracker` (with `maximize=False`), `MinMaxMetric`, `BootStrapper` and `MultioutputWrapper` need that, and
      `ClasswiseWrapper` needs `metric["class_error"]`. Such a metric updates the one that it is made from, so two made
      from one metric would count every batch twice: make each from its own. It can be cloned but not pickled.
    - `MetricCollection`, `Running`, `MultitaskWrapper` and `LambdaInputTransformer` take the metric itself.
      `MetricCollection.plot` needs `together=True`.
    - Metrics of a collection share no counts unless its `compute_groups` say so. Counts that are shared, merged, loaded
      or summed over ranks must have the same `ignore_index` and number of classes; else `compute()` raises.
    - TorchScript cannot compile it.

    Args:
        class_counts: (C,) *training* examples a class: a list, an array or a tensor, integer or floating. It determines
            the number of classes and many/medium/few.
        class_names: C different names; with them `scalars()` reports every class.
        ignore_index: label that is not counted.
        n_bootstrap: number of resamples for the interval; 0 for no interval (NaN). Each resample draws the examples of
            every class with replacement, that is, the number of errors from Binomial(n_c, error_c). So the classes are
            held fixed, and a class without errors contributes no spread.
        confidence: of the interval, in (0, 1): from percentile (1 - confidence) / 2 to (1 + confidence) / 2.
        seed: seed of the resamples, >= 0; the same counts give the same interval.
        kwargs: as of `torchmetrics.Metric`: process_group, sync_on_compute, dist_sync_on_step, ...

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or range; the message names it.
        IndexError: a label or predicted class outside [0, C), on a CPU. On a GPU such a label raises in `compute()`,
            and such a predicted class counts as an error of the model.

    Example:
        >>> import torch
        >>> from fused_la.metrics import BalancedError
        >>> metric = BalancedError([900, 90, 10], class_names=["cat", "lynx", "ocelot"])
        >>> metric.update(torch.tensor([0, 0, 0, 1, 0]), torch.tensor([0, 0, 1, 1, 2]))
        >>> result = metric.compute()
        >>> result["balanced_error"], result["class_error"]
        (tensor(0.5000), tensor([0.0000, 0.5000, 1.0000]))
        >>> metric.scalars("val/")["val/class/lynx"]
        0.5

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 2; groups of Liu et al.,
        "Large-scale long-tailed recognition in an open world", CVPR 2019.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    fingerprint: Tensor
    n_correct: Tensor
    n_examples: Tensor

    def __init__(
        self,
        class_counts: Any,
        *,
        class_names: Sequence[str] | None = None,
        ignore_index: int = -100,
        n_bootstrap: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.groups = shot_groups(class_counts)
        self.n_classes = len(self.groups["many"])
        self.class_names = None if class_names is None else _checked_class_names(class_names, self.n_classes)
        self.ignore_index = checks.check_ignore_index(ignore_index)
        self.n_bootstrap = checks.check_int("n_bootstrap", n_bootstrap, 0)
        self.confidence = checks.check_number(
            "confidence", confidence, math.nextafter(0, 1), math.nextafter(1, 0), "between 0 and 1"
        )
        self.seed = checks.check_int("seed", seed, 0)
        # The fingerprint is a state that travels with the counts and says what they count. It holds bytes, which any
        # floating dtype represents. Its NaN keeps a collection from merging metrics whose states are equal, within a
        # tolerance, after the first batch. It is the first state because torchmetrics before 1.7 compares no other.
        self._fingerprint = [
            *self.ignore_index.to_bytes(8, "little", signed=True),
            *self.n_classes.to_bytes(8, "little"),
        ]
        for name, initial in self._initial_states().items():
            self.add_state(name, initial, dist_reduce_fx=_reduce_fingerprints if name == "fingerprint" else "sum")
        # These clones replace torchmetrics' deepcopies: a deepcopy of a fake tensor has another fake mode.
        self._defaults = {name: getattr(self, name).clone() for name in self._defaults}

    def _initial_states(self) -> dict[str, Tensor]:
        # The last of the C + 1 columns counts labels that are neither a class nor ignored.
        n_correct, n_examples = torch.zeros((2, self.n_classes + 1), dtype=torch.int64)
        fingerprint = torch.tensor([math.nan, *self._fingerprint])
        return {"fingerprint": fingerprint, "n_correct": n_correct.clone(), "n_examples": n_examples.clone()}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("prefix", "postfix") and value is None:
            value = ""  # a collection in a collection sets None, and then expects a string
        super().__setattr__(name, value)
        if name in self.__dict__.get("_defaults", ()):
            self._computed = None  # torchmetrics keeps the result when it loads or merges counts

    def _apply(self, fn: Any, exclude_state: Sequence[str] = "") -> Any:
        """Apply a change of device, but not of dtype: counts are integers.

        After the meta device the counts are reset, because `to_empty` leaves memory without values.
        """
        had_values = not self.n_correct.is_meta

        def follow(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor.is_meta else tensor.to(moved.device)

        super()._apply(follow, exclude_state)
        if not had_values and not self.n_correct.is_meta:
            device = self.n_correct.device
            self._defaults = {name: initial.to(device) for name, initial in self._initial_states().items()}
            self.reset()
        return self

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: logits (or any scores) (N, C), (C,) or (N, C, d1, ..., dk), floating; or predicted classes, integer,
                of the shape of `target`.
            target: int64 or uint8 classes, (N,), () or (N, d1, ..., dk).
        """
        checks.check_tensor("preds", preds)
        checks.check_tensor("target", target)
        if preds.is_floating_point():
            checks.check_logits(preds, "preds")
            if preds.shape[checks.class_dim(preds)] != self.n_classes:
                raise ValueError(f"preds must have {self.n_classes} classes, got shape {tuple(preds.shape)}")
            checks.check_labels(target, preds, self.ignore_index)
            predictions = preds.argmax(checks.class_dim(preds))
        else:
            checks.check_predictions(preds, target, self.n_classes, self.ignore_index)
            predictions = preds
        if preds.device != self.n_correct.device:
            raise ValueError(f"preds must be on the device of the metric, {self.n_correct.device}, got {preds.device}")
        # Not in place: counts may be shared with a checkpoint that others load too, or be tensors of inference mode.
        n_correct, n_examples = self.n_correct.clone(), self.n_examples.clone()
        count_predictions(n_correct, n_examples, predictions.flatten(), target.flatten(), self.ignore_index)
        self.n_correct, self.n_examples = n_correct, n_examples

    def compute(self) -> dict[str, Tensor]:
        """The rates over all batches that were counted; see the class."""
        fingerprint = read_value(self.fingerprint[1:].cpu())
        if fingerprint is not None and fingerprint != self._fingerprint:
            raise ValueError(
                f"counts must be of ignore_index={self.ignore_index} and {self.n_classes} classes, "
                "got those of a metric with others"
            )
        n_correct, n_examples = read_counts(self.n_correct, self.n_examples, self.ignore_index)
        rates = mean_rates(n_correct, n_examples, self.groups)
        rates["balanced_error_low"], rates["balanced_error_high"] = self._bootstrap_interval(n_correct, n_examples)
        rates["class_error"] = class_error(n_correct, n_examples)
        worst_error, worst = rates["class_error"].nan_to_num(nan=-1.0).max(0)
        rates["worst_class_error"] = worst_error.masked_fill(worst_error < 0, math.nan)
        result = {name: rate.to(self.device, torch.float32) for name, rate in rates.items()}
        result["worst_class"] = worst.masked_fill(worst_error < 0, -1).to(self.device)
        result["n_absent_classes"] = (n_examples == 0).sum().to(self.device)
        return result

    def _bootstrap_interval(self, n_correct: Tensor, n_examples: Tensor) -> tuple[Tensor, Tensor]:
        if self.n_bootstrap == 0 or not read_value(n_examples.sum()):  # 0, or None for fake tensors
            return torch.tensor(math.nan), torch.tensor(math.nan)
        present = n_examples > 0
        n = n_examples[present].numpy()
        error = 1.0 - n_correct[present].numpy() / n
        generator = np.random.default_rng(self.seed)
        means, max_resamples = [], max(1, _DRAWS // len(n))
        for first in range(0, self.n_bootstrap, max_resamples):
            n_errors = generator.binomial(n, error, (min(max_resamples, self.n_bootstrap - first), len(n)))
            means.append((n_errors / n).mean(1))
        ends = np.quantile(np.concatenate(means), [(1.0 - self.confidence) / 2.0, (1.0 + self.confidence) / 2.0])
        low, high = torch.from_numpy(ends)
        return low, high

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """`compute()` as a flat dict of floats for a logger, with `class/<name>` for each of `class_names`."""
        result = self.compute()
        flat = {prefix + name: float(value) for name, value in result.items() if value.dim() == 0}
        if self.class_names is not None:
            errors = result["class_error"].tolist()
            flat |= {f"{prefix}class/{name}": error for name, error in zip(self.class_names, errors, strict=True)}
        return flat

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the rates of `val`, a result of `compute()` or a list with one result a step, as torchmetrics' plots do.

        Returns the figure (None if `ax` was given) and the axes.
        """
        val = self.compute() if val is None else val
        if isinstance(val, dict):
            return self._plot(_plotted_rates(val), ax)
        return self._plot([_plotted_rates(step) for step in val], ax)


def _reduce_fingerprints(fingerprints: Tensor) -> Tensor:
    """Reduce the ranks' fingerprints, (ranks, bytes), to one, with NaN in the bytes that differ."""
    first = fingerprints[0]
    return torch.where((fingerprints == first).all(0), first, math.nan)


def _plotted_rates(result: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("balanced_error", "many_error", "medium_error", "few_error", "worst_class_error", "top1_accuracy")
    return {name: result[name] for name in names}


def _checked_class_names(class_names: Any, n_classes: int) -> list[str]:
    invalid = (
        class_names if isinstance(class_names, str) else next((n for n in class_names if not isinstance(n, str)), None)
    )
    if invalid is not None:
        raise TypeError(f"class_names must be strings, one a class, got {type(invalid).__name__}")
    if len(class_names) != n_classes:
        raise ValueError(f"class_names must have {n_classes} names, got {len(class_names)}")
    if len(set(class_names)) != n_classes:
        duplicate = next(name for i, name in enumerate(class_names) if name in class_names[:i])
        raise ValueError(f"class_names must be different, got {duplicate!r} twice")
    return list(class_names)
