"""`TauSweep`: error rates of a post-hoc correction for many tau, counted in one pass over a model's logits."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_la._call import checks
from fused_la._call.problem import rows_by_classes
from fused_la._call.values import check_has_values, is_compiled_or_traced
from fused_la._evaluation.argmax import predict
from fused_la._evaluation.error_rates import class_error, count_predictions, mean_rates, read_counts, shot_groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.distributed import ProcessGroup

_ADJUST, _DIVIDE, _NORMALIZE = "logit adjustment", "division by the prior", "weight normalisation"
_COLUMNS = {"balanced_error": "balanced error", "top1_accuracy": "top-1 accuracy", "many_error": "many",
            "medium_error": "medium", "few_error": "few"}  # fmt: skip


class TauSweep:
    r"""Balanced error, top-1 accuracy and many/medium/few error of a post-hoc correction, for many tau at once.

    .. math:: \hat y_\tau = \arg\max_c \; f_c - \tau \log \pi_c, \qquad
        \mathrm{error}_\tau = \frac1C \sum_c P(\hat y_\tau \ne c \mid y = c)

    `TauSweep(log_prior, taus)` sweeps `adjust_logits`; `TauSweep.divide_by_prior` and `TauSweep.normalize_classifier`
    sweep the functions of these names. Update each with the *raw* logits of a model trained with plain cross entropy,
    batch by batch; it keeps integer counts of correct predictions for each tau and class. A tau is chosen on the split
    that was counted, so a sweep stores that split's name and prints it with every result: choose on validation data,
    report on test data.

    Args:
        log_prior: (C,) floating, log class frequencies of training up to any constant; a class at -inf is never
            predicted (at tau > 0). The logits have to be on its device. Or (G, C), a prior for each group of rows.
        taus: numbers >= 0, kept in increasing order.
        split: the name of the data that will be counted, such as "val".
        class_counts: (C,) *training* examples a class, for many/medium/few; without them these are NaN.
        ignore_index: label that is not counted.

    Attributes:
        taus, split, method: the values of tau, the name of the data, and the name of the correction.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or range; the message names it.

    Example:
        >>> import torch
        >>> from fused_la.posthoc import TauSweep
        >>> sweep = TauSweep(torch.tensor([0.9, 0.1]).log(), [0.0, 1.0], split="val", class_counts=[900, 100])
        >>> sweep.update(torch.tensor([[5.0, 1.0], [1.0, 0.0], [1.0, 0.5]]), torch.tensor([0, 1, 1]))
        >>> print(sweep)
        logit adjustment on 'val': 3 examples, 0 of 2 classes without any; errors and accuracy in %
             tau  balanced error  top-1 accuracy     many   medium      few
               0           50.00           33.33     0.00   100.00        -
               1            0.00          100.00     0.00     0.00        -  <- best balanced error on 'val'

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, section 6 and Figure 3.
    """

    def __init__(
        self, log_prior: Tensor, taus: Iterable[float], *, split: str, class_counts: Any = None,
        ignore_index: int = -100,
    ):  # fmt: skip
        self._init_counts(_ADJUST, _checked_log_prior(log_prior), None, taus, split, class_counts, ignore_index)

    @classmethod
    def divide_by_prior(
        cls, log_prior: Tensor, taus: Iterable[float], *, split: str, class_counts: Any = None,
        ignore_index: int = -100,
    ) -> TauSweep:  # fmt: skip
        """Sweep argmax f_c / pi_c^tau; arguments as of `TauSweep`."""
        sweep = cls.__new__(cls)
        sweep._init_counts(_DIVIDE, _checked_log_prior(log_prior), None, taus, split, class_counts, ignore_index)
        return sweep

    @classmethod
    def normalize_classifier(
        cls, weight: Tensor, taus: Iterable[float], *, bias: Tensor | None, split: str, class_counts: Any = None,
        ignore_index: int = -100,
    ) -> TauSweep:  # fmt: skip
        """Sweep argmax (w_c . h) / ||w_c||^tau + b_c, updated with the logits w_c . h + b_c.

        `weight` is (C, n_features). `bias` is the (C,) bias that the logits contain, None if the classifier has none;
        it is subtracted from the logits, and added back undivided. Other arguments as of `TauSweep`.
        """
        checks.check_classifier(weight)
        weight = weight.detach()
        if bias is not None:
            checks.check_class_vector("bias", bias, len(weight))
            if bias.device != weight.device:
                raise ValueError(f"bias must be on the device of weight, {weight.device}, got {bias.device}")
            bias = bias.detach()
        norm = torch.linalg.vector_norm(weight.to(torch.promote_types(weight.dtype, torch.float32)), dim=1)
        sweep = cls.__new__(cls)
        log_norm = norm.masked_fill(norm == 0, 1.0).double().log()  # so that the score of a row of zeros is its bias
        sweep._init_counts(_NORMALIZE, log_norm, bias, taus, split, class_counts, ignore_index)
        return sweep

    def _init_counts(
        self, method: str, log_divisor: Tensor, bias: Tensor | None, taus: Iterable[float], split: str,
        class_counts: Any, ignore_index: int,
    ) -> None:  # fmt: skip
        """Check the arguments that all corrections share, and set the counts to 0."""
        self.method = method
        self.taus = _checked_taus(taus)
        if not isinstance(split, str) or not split:
            raise ValueError(f"split must name the data, such as 'val', got {split!r}")
        self.split = split
        n_classes, device = log_divisor.shape[-1], log_divisor.device
        groups = shot_groups([0.0] * n_classes if class_counts is None else class_counts)
        if len(groups["many"]) != n_classes:
            raise ValueError(f"class_counts must have shape ({n_classes},), got {tuple(groups['many'].shape)}")
        # Without counts, no class is in a group.
        self._groups = {name: members & (class_counts is not None) for name, members in groups.items()}
        self.ignore_index = checks.check_ignore_index(ignore_index)
        self._log_divisor, self._bias = log_divisor, bias
        self._excluded = log_divisor == -math.inf
        self._any_excluded = is_compiled_or_traced(self._excluded) or bool(self._excluded.any())
        self._taus = torch.tensor(self.taus, dtype=torch.float64, device=device)[:, None]
        self._n_correct = torch.zeros((len(self.taus), n_classes + 1), dtype=torch.int64, device=device)
        self._n_examples = torch.zeros(n_classes + 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor, group: Tensor | None = None) -> None:
        """Count a batch: raw logits (N, C), (C,) or (N, C, d1, ..., dk), int64 target (N,), () or (N, d1, ..., dk).

        With a log_prior of shape (G, C), `group` is the group of each row, of the shape of the target or (N,).
        """
        checks.check_logits(logits)
        n_classes, dim = self._log_divisor.shape[-1], checks.class_dim(logits)
        if logits.shape[dim] != n_classes:
            raise ValueError(f"logits must have {n_classes} classes, got shape {tuple(logits.shape)}")
        if logits.device != self._log_divisor.device:
            raise ValueError(
                f"logits must be on the device of the sweep, {self._log_divisor.device}, got {logits.device}"
            )
        checks.check_labels(target, logits, self.ignore_index)
        by_group = self._log_divisor.dim() == 2
        if by_group != (group is not None):
            expected = "given for a log_prior of shape (G, C)" if by_group else "None for a log_prior of shape (C,)"
            raise ValueError(f"group must be {expected}, got {type(group).__name__}")
        if group is not None:
            group = checks.rows_of_groups(group, logits.shape[:dim] + logits.shape[dim + 1 :], logits)
            checks.check_groups_in_range(group, len(self._log_divisor), target, self.ignore_index)
            in_range = (group >= 0) & (group < len(self._log_divisor))
            # As a label that is no class: it raises when the counts are read.
            target = torch.where(in_range | (target == self.ignore_index), target, n_classes)
            group = rows_by_classes((group * in_range).unsqueeze(dim)).squeeze(-1).contiguous()
        scale, offset = self._scale_and_offset(torch.float64 if logits.dtype == torch.float64 else torch.float32)
        predictions = _predict(rows_by_classes(logits), scale, offset, group).flatten(1)
        count_predictions(self._n_correct, self._n_examples, predictions, target.flatten(), self.ignore_index)

    def _scale_and_offset(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """scale and offset, (T, C) or (G, T, C), of the scores f_c * scale_tc + offset_tc; None for a scale of 1, an
        offset of 0."""
        excluded = self._excluded.unsqueeze(-2)
        divisor = self._log_divisor.unsqueeze(-2).masked_fill(excluded, 0.0)
        divisor = divisor.to(torch.promote_types(divisor.dtype, dtype))
        exponent = -self._taus.to(divisor.dtype) * divisor
        if self.method == _ADJUST:
            scale, offset = None, exponent.to(dtype)
        else:
            scale, offset = exponent.exp().to(dtype), None
            if self._bias is not None:
                offset = self._bias.to(dtype) * (1.0 - scale)
        if self._any_excluded:
            offset = torch.zeros_like(exponent, dtype=dtype) if offset is None else offset
            offset = offset.masked_fill(excluded & (self._taus > 0.0), -math.inf)
        return scale, offset

    def merge(self, other: TauSweep) -> TauSweep:
        """A new sweep with the counts of both, which need the same correction, taus and split."""
        if not isinstance(other, TauSweep):
            raise TypeError(f"other must be a TauSweep, got {type(other).__name__}")
        for name in ("method", "taus", "split"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"other must have the {name} {mine!r}, got {theirs!r}")
        if other._n_correct.shape != self._n_correct.shape:
            raise ValueError(f"other must have {self._excluded.shape[-1]} classes, got {other._excluded.shape[-1]}")
        device = self._n_correct.device
        n_correct = self._n_correct + other._n_correct.to(device)
        return self._with_counts(n_correct, self._n_examples + other._n_examples.to(device))

    def sync(self, group: ProcessGroup) -> TauSweep:
        """A new sweep with the counts of all ranks of `group`; every rank has to make this call."""
        from fused_la._class_parallel.exchange import sum_over_group  # here: not every PyTorch was built for it

        return self._with_counts(sum_over_group(self._n_correct, group), sum_over_group(self._n_examples, group))

    def _with_counts(self, n_correct: Tensor, n_examples: Tensor) -> TauSweep:
        """A new sweep with these counts."""
        sweep = copy.copy(self)
        sweep._n_correct, sweep._n_examples = n_correct, n_examples
        return sweep

    def counts(self) -> tuple[Tensor, Tensor]:
        """Correct predictions (T, C) and examples (C,), int64 on the CPU."""
        check_has_values("logits", self._n_correct, "TauSweep")
        try:
            return read_counts(self._n_correct, self._n_examples, self.ignore_index)
        except IndexError as error:
            if self._log_divisor.dim() == 1:
                raise
            raise IndexError(f"{error}, or whose group is outside [0, {len(self._log_divisor)})") from None

    def class_error(self) -> Tensor:
        """Error of each class at each tau, (T, C) float64; NaN for a class without examples."""
        return class_error(*self.counts())

    def compute(self) -> dict[str, Tensor]:
        """Rates in [0, 1], each (T,) float64 on the CPU, in the order of `taus`.

        The keys are "balanced_error", "top1_accuracy", "many_error", "medium_error", "few_error". Classes without
        examples are left out of the means; a mean over no class is NaN.
        """
        return mean_rates(*self.counts(), self._groups)

    def best(self) -> float:
        """The tau with the least balanced error on `split`; the smallest one in a tie."""
        balanced_error = self.compute()["balanced_error"]
        if balanced_error.isnan().all():
            raise ValueError("TauSweep.best must have examples to choose by, got none: call update first")
        # A tie may differ in the last digits: means of the same errors, summed in different orders.
        return self.taus[int((balanced_error <= balanced_error.amin() + 1e-12).int().argmax())]

    def __str__(self) -> str:
        n_examples = self.counts()[1]
        lines = [
            f"{self.method} on {self.split!r}: {int(n_examples.sum())} examples, {int((n_examples == 0).sum())} of "
            f"{len(n_examples)} classes without any; errors and accuracy in %",
            "     tau  balanced error  top-1 accuracy     many   medium      few",
        ]
        rates = self.compute()
        best = self.best() if n_examples.any() else None
        for t, tau in enumerate(self.taus):
            cells = []
            for key, heading in _COLUMNS.items():
                rate = float(rates[key][t])
                cells.append(("-" if math.isnan(rate) else f"{100 * rate:.2f}").rjust(max(7, len(heading))))
            mark = f"  <- best balanced error on {self.split!r}" if tau == best else ""
            lines.append(f"{tau:8g}  {'  '.join(cells)}{mark}")
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw balanced error and many/medium/few error in % against tau, and mark the best tau; needs matplotlib.

        Without `ax` it draws on a new figure: ``sweep.plot().figure.savefig("tau.png")``.
        """
        if ax is None:
            try:
                from matplotlib.figure import Figure  # not pyplot, which looks for a display
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    "TauSweep.plot needs the package matplotlib, which is not installed"
                ) from error
            ax = Figure(layout="constrained").subplots()
        rates, best = self.compute(), self.best()
        for (key, heading), linestyle in zip(_COLUMNS.items(), ("-", "", "--", "-.", ":"), strict=True):
            if key != "top1_accuracy" and not rates[key].isnan().all():
                ax.plot(self.taus, 100 * rates[key], label=heading, marker="o", markersize=4, linestyle=linestyle)
        ax.axvline(best, color="0.5", linewidth=1, label=f"tau = {best:g}, best on {self.split!r}")
        ax.set_xlabel("tau")
        ax.set_ylabel(f"error on {self.split!r} (%)")
        ax.set_title(self.method)
        ax.legend()
        return ax


def _predict(rows: Tensor, scale: Tensor | None, offset: Tensor | None, group: Tensor | None = None) -> Tensor:
    """Dispatch to the Triton kernel on a GPU, and to PyTorch on other devices or without Triton."""
    if rows.device.type == "cuda" and not is_compiled_or_traced(rows):  # ROCm's too
        try:
            from fused_la._triton.argmax import launch_argmax
        except ModuleNotFoundError:
            pass
        else:
            return launch_argmax(rows, scale, offset, group)
    return predict(rows, scale, offset, group)


def _checked_log_prior(log_prior: Any) -> Tensor:
    checks.check_tensor("log_prior", log_prior)
    if log_prior.dim() not in (1, 2) or log_prior.numel() == 0:
        raise ValueError(f"log_prior must have shape (C,) or (G, C) with C >= 1, got {tuple(log_prior.shape)}")
    log_prior = log_prior.detach()
    checks.check_log_prior(log_prior, log_prior, tau=1.0, by_group=log_prior.dim() == 2)
    return log_prior


def _checked_taus(taus: Any) -> tuple[float, ...]:
    values = taus.tolist() if hasattr(taus, "tolist") else taus
    if not isinstance(values, Iterable):
        raise TypeError(f"taus must be a sequence of numbers, got {type(taus).__name__}")
    checked = tuple(sorted(checks.check_number("taus", tau, 0.0, 1e38, "finite and not negative") for tau in values))
    if not checked:
        raise ValueError("taus must have at least one number, got none")
    return checked
