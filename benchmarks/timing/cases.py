"""Benchmark cases (shape, dtype, kind of target), the named selections of cases, and their input tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_la import log_prior_from_counts

DTYPES = ("float32", "bfloat16", "float16")
TARGETS = ("hard", "two-label", "soft")
MODES = ("forward", "backward", "both")
CLASSES = (1000, 8142, 8192, 32768, 131072, 262144, 1048576)
ROWS = (64, 256, 512, 2048)
BIG = 0  # n_rows of a case whose logits are 4 times the device's level-2 cache
SHARE = 0.3  # weight of the first of two labels


@dataclass(frozen=True)
class Case:
    """A loss of (n_rows, n_classes) logits in a dtype; with n_features, of the head that computes these logits."""

    n_rows: int
    n_classes: int
    dtype: str
    target: str = "hard"
    n_features: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def upstream(self) -> float:
        """The loss scale of backward: 1, but in float16 the power of two at n_rows or above, at most 2^15.

        Without it the float16 gradient of a mean over many rows underflows. A GradScaler does the same.
        """
        return 1.0 if self.dtype != "float16" else 2.0 ** min(15, math.ceil(math.log2(self.n_rows)))

    @property
    def logits_bytes(self) -> int:
        return self.n_rows * self.n_classes * self.torch_dtype.itemsize

    def __str__(self) -> str:
        rows = "big" if self.n_rows == BIG else self.n_rows
        features = f"x{self.n_features}" if self.n_features else ""
        kind = "" if self.target == "hard" else f"-{self.target}"
        return f"{rows}{features}x{self.n_classes}-{self.dtype}{kind}"


def least_bytes(case: Case, mode: str) -> int:
    """The least bytes that any implementation moves.

    An element of e bytes costs e in forward, 2e in backward (read, gradient written), and 2e in both (gradient written
    while the row is cached). A dense soft target is read once in each mode, 4 bytes an element.
    """
    target = 4 * case.n_rows * case.n_classes if case.target == "soft" else 0
    return case.logits_bytes * (1 if mode == "forward" else 2) + target


def head_flops(case: Case, mode: str) -> int:
    """Operations of a head's matrix products: logits in forward, gradients of features and weight in backward."""
    products = {"forward": 1, "backward": 2, "both": 3}[mode]
    return 2 * products * case.n_rows * case.n_features * case.n_classes


@dataclass(frozen=True)
class Selection:
    """A list of cases and how they are measured."""

    description: str
    cpu: tuple[Case, ...]
    gpu: tuple[Case, ...]
    memory: tuple[str, ...] = ("held", "returned")  # states of a CPU's memory, see `clocks`
    minutes: float = math.inf  # no measurement begins later than this
    seconds: float = 1.0  # for each figure on a CPU; on a GPU a third of it
    processes: int = 0  # fresh processes for each provider and case; 0: one process for all


def _product(rows: Iterable[int], classes: Iterable[int], dtypes: Iterable[str], target: str = "hard") -> list[Case]:
    return [Case(r, c, d, target) for d in dtypes for c in classes for r in rows]


_PAGE_FAULT_CASES = (
    Case(512, 8142, "float32"),
    Case(512, 8142, "bfloat16"),
    Case(64, 262144, "float32"),
)
_GPU_HEADS = (
    Case(512, 32768, "bfloat16", n_features=1024),
    Case(4096, 131072, "bfloat16", n_features=2048),
    Case(512, 1048576, "bfloat16", n_features=2048),
)

SELECTIONS = {
    "quick": Selection(
        "every provider; a GPU: 8142 and 8192 classes, many rows and 256, and one head; a CPU: the README's shapes",
        cpu=(*_PAGE_FAULT_CASES, Case(239, 10, "float32"), Case(256, 8142, "float32", n_features=128)),
        gpu=(
            Case(BIG, 8142, "bfloat16"),
            Case(256, 8142, "bfloat16"),
            Case(BIG, 8192, "bfloat16"),
            Case(256, 8192, "bfloat16"),
            _GPU_HEADS[0],
            Case(BIG, 8142, "bfloat16", "two-label"),
            Case(BIG, 8142, "bfloat16", "soft"),
            Case(BIG, 8142, "float32"),
        ),
        minutes=3.5,
    ),
    "full": Selection(
        "every number of classes, rows and dtype, every kind of target, heads; hours on a CPU, over an hour on a GPU",
        cpu=(
            *_product((64, 512), CLASSES[:4], DTYPES),
            *_product((64,), CLASSES[4:], DTYPES),
            *(Case(512, 8142, d, t) for t in TARGETS[1:] for d in DTYPES),
            Case(256, 100_000, "float32", n_features=512),
        ),
        gpu=(
            *_product((BIG, *ROWS), CLASSES, ("bfloat16", "float32", "float16")),
            *_product((BIG,), CLASSES, ("bfloat16", "float32"), "two-label"),
            *_product((BIG,), CLASSES, ("bfloat16", "float32"), "soft"),
            *_GPU_HEADS,
        ),
        seconds=2.0,
    ),
    "classes": Selection(
        "bandwidth against the number of classes: many rows, one label a row",
        cpu=tuple(_product((64,), CLASSES, ("float32", "bfloat16"))),
        gpu=tuple(_product((BIG,), CLASSES, ("bfloat16", "float32"))),
    ),
    "small": Selection(
        "few rows, where calls cost more than data: on a GPU wall time and CUDA graphs too",
        cpu=(Case(239, 10, "float32"), *_product(ROWS, (1000, 8142), ("float32", "bfloat16"))),
        gpu=tuple(_product(ROWS, (1000, 8142, 8192), ("bfloat16", "float32"))),
    ),
    "targets": Selection(
        "one label, two weighted labels and class probabilities a row",
        cpu=tuple(Case(512, 8142, d, t) for d in ("float32", "bfloat16") for t in TARGETS),
        gpu=tuple(Case(BIG, c, "bfloat16", t) for c in (8142, 131072) for t in TARGETS),
    ),
    "head": Selection(
        "the classifier's matrix product and the loss together",
        cpu=(
            Case(256, 8142, "float32", n_features=128),
            Case(4096, 8142, "float32", n_features=512),
            Case(256, 100_000, "float32", n_features=512),
        ),
        gpu=_GPU_HEADS,
        memory=("held",),
        seconds=5.0,
    ),
    "script": Selection(
        "as a plain training script on a CPU: eager and fused_la in turn, nothing else on the heap, five processes",
        cpu=_PAGE_FAULT_CASES,
        gpu=(),
        memory=("fresh",),
        seconds=5.0,
        processes=5,
    ),
}


def with_axes(
    cases: Sequence[Case], rows: Sequence[int] = (), classes: Sequence[int] = (), dtypes: Sequence[str] = ()
) -> list[Case]:
    """The cases with each given axis replaced by the given values, each combination once."""
    return list(
        dict.fromkeys(
            replace(case, n_rows=r, n_classes=c, dtype=d)
            for case in cases
            for d in dtypes or (case.dtype,)
            for c in classes or (case.n_classes,)
            for r in rows or (case.n_rows,)
        )
    )


def with_rows(case: Case, cache_bytes: int) -> Case:
    """The case, with a number of rows in place of BIG."""
    if case.n_rows != BIG:
        return case
    return replace(case, n_rows=math.ceil(4 * cache_bytes / (case.n_classes * case.torch_dtype.itemsize)))


@dataclass
class Batch:
    """Input tensors of one training step."""

    leaves: tuple[Tensor, ...]  # (logits,), or (features, weight, bias) for a head
    target: Tensor  # (N,) labels, (N, 2) labels weighted by shares, or (N, C) probabilities
    shares: Tensor | None  # (N, 2)
    targets: tuple[Tensor, ...]  # the same as targets of F.cross_entropy: one tensor, or one for each of two labels
    log_prior: Tensor  # (C,) float32


def make_batch(case: Case, device: str) -> Batch:
    """Normal logits of standard deviation 3, uniform labels, and the log prior of counts that fall from 1000 to 2."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = case.torch_dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    def labels() -> Tensor:
        return torch.randint(case.n_classes, (case.n_rows,), generator=generator, device=device)

    if case.n_features:
        features = normal(case.n_rows, case.n_features)
        weight = normal(case.n_classes, case.n_features).mul_(3 / math.sqrt(case.n_features))
        leaves: tuple[Tensor, ...] = (features, weight, normal(case.n_classes))
    else:
        leaves = (normal(case.n_rows, case.n_classes).mul_(3),)
    shares = None
    if case.target == "hard":
        target = labels()
        targets: tuple[Tensor, ...] = (target,)
    elif case.target == "two-label":
        targets = (labels(), labels())
        target = torch.stack(targets, 1)
        shares = torch.tensor([SHARE, 1 - SHARE], device=device).expand(case.n_rows, 2)
    else:
        target = torch.rand(case.n_rows, case.n_classes, generator=generator, device=device)
        target /= target.sum(1, keepdim=True)
        targets = (target,)
    ranks = torch.arange(1, case.n_classes + 1, dtype=torch.float64)
    log_prior = log_prior_from_counts((1000 * ranks**-0.7).clamp_min(2).round()).to(device)
    return Batch(leaves, target, shares, targets, log_prior)
