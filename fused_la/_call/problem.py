"""`Problem`, what every implementation is given: the rows of a checked loss, and the target mass of their classes.

A loss over logits of shape (N, C, d1, ..., dk) is a set of independent rows. `arguments.py` brings every input into one
form, (N, P, C) with P = d1 * ... * dk, or (N, C) if P is 1, without a copy. Each implementation computes for every row

    z_c  = scale_c * logits_c + tau * log_prior_c                (a class at -inf stays out, whatever its logit)
    t_c  = the target mass of class c                            (labels, their weights and smoothing, see below)
    loss = sum_c t_c * log[1 + sum_{k != c} exp(z_k - y_c)]

with y_c = z_c, so that the logarithm is logsumexp(z) - z_c, or with a target_offset, as a margin has one,
y_c = scale_c * logits_c + target_offset_c. With a label_scale the logits of the loss of class c as label are multiplied
by label_scale_c. With a prior_index, log_prior and smoothing_distribution have a row for each group of rows, and a row
of the logits uses the one with its index. One label, K weighted labels, class probabilities, class weights and label
smoothing differ in t alone:

    labels         t_c = sum_k target_weight_k * weight_c * ((1 - eps) * [c = target_k] + eps * q_c)
    probabilities  t_c = weight_c * ((1 - eps) * target_c + eps * q_c)

with eps = label_smoothing and q = smoothing_distribution (1/C where it is None). Labels equal to ignore_index do not
count; any other label outside [0, C) makes its row NaN. A mean counts a label as its mean_weight, which is its weight
but for the factor that a margin's alpha adds to it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def rows_by_classes(values: Tensor) -> Tensor:
    """(C,), (N, C) or (N, C, d1, ..., dk) as (N, P, C): a view wherever the strides allow one."""
    if values.dim() == 1:
        return values[None, None]
    if values.dim() == 2:
        return values.unsqueeze(1)
    return values.flatten(2).transpose(1, 2)


class Problem(NamedTuple):
    """The checked rows of a loss; N and P count rows, C classes, K labels a row.

    Where P is 1, logits may lack it, and then the others do too; one label a row is then (N,).
    """

    logits: Tensor  # (N, P, C) any strides
    log_prior: Tensor | None  # (C,), (G, C) with a prior_index, or None where tau = 0
    target: Tensor  # (N, P, K) int64 labels, or (N, P, C) floating probabilities
    target_weight: Tensor | None = None  # (N, P, K) floating
    prior_index: Tensor | None = None  # (N, P) int64, the row's group
    weight: Tensor | None = None  # (C,) floating
    mean_weight: Tensor | None = None  # (C,) floating
    smoothing_distribution: Tensor | None = None  # like log_prior, None is uniform or no smoothing
    target_offset: Tensor | None = None  # (C,) floating, None is tau * log_prior
    scale: Tensor | None = None  # (C,) floating
    label_scale: Tensor | None = None  # (C,) floating
    tau: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int = -100

    @property
    def compute_dtype(self) -> torch.dtype:
        """Float32 arithmetic, float64 for float64 logits."""
        return torch.float64 if self.logits.dtype == torch.float64 else torch.float32

    @property
    def has_probabilities(self) -> bool:
        return self.target.is_floating_point()

    @property
    def n_labels(self) -> int:
        """K of an index target."""
        return 1 if self.target.dim() < self.logits.dim() else self.target.shape[-1]

    def as_3d(self) -> Problem:
        """The problem with logits (N, P, C), where P may be 1."""
        if self.logits.dim() == 3:
            return self
        target = self.target.unsqueeze(-1) if self.target.dim() == 1 else self.target
        weight = None if self.target_weight is None else self.target_weight.unsqueeze(1)
        index = None if self.prior_index is None else self.prior_index.unsqueeze(1)
        return self._replace(
            logits=self.logits.unsqueeze(1), target=target.unsqueeze(1), target_weight=weight, prior_index=index
        )

    def offset(self) -> Tensor | None:
        """tau * log_prior, rounded once to the compute dtype."""
        if self.log_prior is None:
            return None
        if not torch.compiler.is_compiling() and self.tau == 1.0 and self.log_prior.dtype == self.compute_dtype:
            return self.log_prior  # not while compiling: one graph serves every tau
        wide = torch.promote_types(self.log_prior.dtype, self.compute_dtype)
        offset = (self.log_prior.to(wide) * self.tau).to(self.compute_dtype)
        return offset.masked_fill(self.log_prior == -math.inf, -math.inf)  # a tau that rounds to 0 makes it NaN

    def computed(self, vector: Tensor | None) -> Tensor | None:
        """A vector over the classes in the compute dtype."""
        return None if vector is None else vector.to(self.compute_dtype)

    def scaled_logits(self) -> Tensor:
        logits, scale = self.logits.to(self.compute_dtype), self.computed(self.scale)
        return logits if scale is None else logits * scale

    def smoothing_mass(self) -> Tensor | None:
        """eps * q_c * weight_c: what label smoothing gives each class in a row of weight 1; None without smoothing.

        (C,), or like the smoothing_distribution.
        """
        if self.label_smoothing == 0.0:
            return None
        n_classes = self.logits.shape[-1]
        if self.smoothing_distribution is None:
            mass = torch.full((n_classes,), self.label_smoothing / n_classes, dtype=self.compute_dtype,
                              device=self.logits.device)  # fmt: skip
        else:
            mass = self.smoothing_distribution.to(self.compute_dtype) * self.label_smoothing
        weight = self.computed(self.weight)
        return mass if weight is None else mass * weight

    @property
    def n_groups(self) -> int:
        """G; 0 without a prior_index."""
        return 0 if self.prior_index is None or self.log_prior is None else len(self.log_prior)

    def groups(self) -> tuple[Tensor, Tensor]:
        """Each row's group, 0 if it is out of range, and whether it is in range; both (N, P)."""
        assert self.prior_index is not None
        in_range = (self.prior_index >= 0) & (self.prior_index < self.n_groups)
        return self.prior_index * in_range, in_range

    def for_rows(self, values: Tensor | None) -> Tensor | None:
        """What log_prior or smoothing_distribution became, (C,) or (G, C), for each row: (C,) or (N, P, C)."""
        if values is None or values.dim() == 1:
            return values
        return F.embedding(self.groups()[0], values)  # its gradient is summed in a fixed order, also on a GPU

    def for_classes(self, values: Tensor, classes: Tensor) -> Tensor:
        """The same for some classes of each row, (N, P, K)."""
        if values.dim() == 1:
            return values[classes]
        return values[self.groups()[0].unsqueeze(-1), classes]


class ShardLabels(NamedTuple):
    """The labels among all C classes, on a rank that holds some of the classes.

    The target of its `Problem` counts classes from the rank's first one; a label of another rank lies past the last.
    """

    global_classes: Tensor | None  # (N, P, K) the labels among all C classes; None for class probabilities
    weight: Tensor | None = None  # (N, P, K) class weights of the labels, from the ranks that hold their classes
    mean_weight: Tensor | None = None  # (N, P, K) the same for the denominator of a mean


class Labels(NamedTuple):
    """The (N, P, K) index labels of a problem, read once."""

    classes: Tensor  # (N, P, K) int64; 0 for a label that is ignored, out of range, or of another rank
    mass: Tensor  # (N, P, K) the target mass of the label without smoothing; 0 if ignored, NaN if out of range
    counts: Tensor  # (N, P, K) bool: not ignored
    share: Tensor  # (N, P) sum of the counting labels' target_weight: the row's multiple of the smoothing mass
    live: Tensor  # (N, P) bool: some label counts
    row_weight: Tensor  # (N, P) the row's part in the denominator of reduction="mean"
    is_local: Tensor  # (N, P, K) bool: it counts, and its class is one of the problem's
    global_classes: Tensor  # (N, P, K) int64: equal for counting labels of one class


def resolve_labels(problem: Problem, shard: ShardLabels | None = None) -> Labels:
    """Resolve ignored and out-of-range labels, class weights and label weights of an index target.

    With a `shard` no label is out of range, and weights of other ranks' labels are arbitrary until it has them.
    """
    target, n_classes, dtype = problem.target, problem.logits.shape[-1], problem.compute_dtype
    counts = target != problem.ignore_index
    usable = counts & (target >= 0) & (target < n_classes)
    classes = target * usable
    if problem.target_weight is None:
        label_weight = counts.to(dtype)
    else:
        label_weight = torch.where(counts, problem.target_weight.to(dtype), 0.0)
    if shard is None:
        label_weight = label_weight.masked_fill(counts != usable, math.nan)
    gathered, gathered_mean = (None, None) if shard is None else (shard.weight, shard.mean_weight)
    weighted = _weighted(label_weight, problem.computed(problem.weight), gathered, classes)
    counted = weighted
    if problem.mean_weight is not problem.weight:
        counted = _weighted(label_weight, problem.computed(problem.mean_weight), gathered_mean, classes)
    mass = weighted if problem.label_smoothing == 0.0 else weighted * (1.0 - problem.label_smoothing)

    if target.shape[-1] == 1 and problem.target_weight is None:
        share, live, row_weight = label_weight[..., 0], counts[..., 0], counted[..., 0]
    else:
        # A row counts as the mean class weight of its labels, 1 without class weights.
        share, live = label_weight.sum(-1), counts.any(-1)
        row_weight = torch.where(share == 0, 0.0, counted.sum(-1) / torch.where(share == 0, 1.0, share))
    if shard is None or shard.global_classes is None:
        return Labels(classes, mass, counts, share, live, row_weight, counts, classes)
    return Labels(classes, mass, counts, share, live, row_weight, usable, shard.global_classes)


def _weighted(label_weight: Tensor, weight: Tensor | None, gathered: Tensor | None, classes: Tensor) -> Tensor:
    """The labels' weights times their class weights, which were gathered from other ranks or are looked up here."""
    if weight is None:
        return label_weight
    return label_weight * (weight[classes] if gathered is None else gathered)


def sum_by_group(values: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """The sums of (..., C) rows of each group, (G, C), in a fixed order, also on a GPU."""
    rows = values.reshape(-1, values.shape[-1])
    return torch.ops.aten.embedding_dense_backward(rows, groups.reshape(-1), n_groups, -1, False)


def sum_others(z: Tensor, m: Tensor, rest: Tensor) -> Tensor:
    """The sum of exp(z_k - m) over all classes but one with this z: rest for the top class, otherwise at least 1."""
    return torch.where(z == m, rest, 1.0 + rest - (z - m).exp())


def label_loss(gap: Tensor, others: Tensor) -> Tensor:
    """log(1 + others * exp(gap)): the loss of a label whose z lies `gap` below the row's maximum.

    `others` is the sum of exp(z - maximum) over the other classes; however large the gap is, nothing overflows.
    """
    near = gap < 40.0
    small = torch.where(near, gap, 0.0)
    large = torch.where(near, 1.0, gap)
    return torch.where(near, (others * small.exp()).log1p(), large + (others + (-large).exp()).log())


def reduce_rows(loss: Tensor, denominator: Tensor, reduction: str) -> Tensor:
    """Reduce (N, P) row losses as `F.cross_entropy` does; `denominator` divides a mean, which is NaN over no rows."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / denominator
