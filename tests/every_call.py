"""Calls of every public function that reaches a Triton kernel, and a command that makes them without a GPU.

    python tests/every_call.py compile --only losses  # a line of JSON for each call that does not compile
    python tests/every_call.py count                  # variants of each kernel, of calls that should share them

Kernels are compiled by `benchmarks.static.compile_only` and never run: only the type, shape and memory layout of an
argument matter. A call takes one value from each axis of an entry point (rows, classes, dtype, ...). Calls are chosen
so that any two values of two axes occur together in some call, except those that no call supports (`is_supported`).

`test_every_call_compiles.py` runs this file, in processes where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import fused_la
from fused_la import PairwiseMargin, distributed, margins
from fused_la.posthoc import TauSweep

Choice = dict[str, Any]  # {axis: value}

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


class Axes(NamedTuple):
    """The axes of an entry point, the function that makes a call, and which choices are allowed."""

    values: dict[str, Sequence[Any]]
    run: Callable[[Choice], None]  # makes the call of a choice
    allowed: Callable[[Choice], bool]  # also takes a choice on some of the axes


# Arguments ------------------------------------------------------------------------------------------------------------


def counts_prior(n_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(0.0, -3.0, n_classes).log_softmax(0).to(dtype)


def make_logits(n_rows: int, n_classes: int, positions: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    """Uninitialised logits (n_rows, n_classes, *positions) in one of LAYOUTS; untouched memory costs nothing."""
    shape, padding = (n_rows, n_classes, *positions), 0
    if layout == "padded":  # rows begin on boundaries of 16 elements
        padding = 16 + -n_classes % 16
    if layout == "oddly padded":
        padding = 2 - n_classes % 2
        padding += (n_classes + padding) % 2 == 0
    if layout == "one vector":  # (C,) alone
        return torch.empty(n_classes, dtype=dtype)
    if layout == "classes last":
        return torch.empty((n_rows, *positions, n_classes), dtype=dtype).movedim(-1, 1)
    if layout == "rows last":
        return torch.empty((n_classes, *positions, n_rows), dtype=dtype).movedim(-1, 0)
    if layout == "misaligned":
        return torch.empty(1 + torch.Size(shape).numel(), dtype=dtype)[1:].view(shape)
    if layout == "every second row":
        return torch.empty((2 * n_rows, *shape[1:]), dtype=dtype)[::2]
    if layout == "one row repeated":
        return torch.empty((1, *shape[1:]), dtype=dtype).expand(shape)
    return torch.empty((n_rows, n_classes + padding, *positions), dtype=dtype)[:, :n_classes]


LAYOUTS = (
    "contiguous", "misaligned", "padded", "oddly padded", "every second row", "one row repeated", "classes last",
    "rows last", "one vector",
)  # fmt: skip
TARGETS = ("label", "one weighted", "two weighted", "three weighted", "probabilities", "probabilities in half")
OPTIONS = ("none", "class weights", "smoothing", "smoothing toward", "class weights, smoothing", "ignore_index")
SHIFTED = ("adaptive", "ldam", "vectors in float64")  # margins whose two offsets differ


def placed(value: Tensor, place: str) -> Tensor:
    """The same values, one element after a 16-byte boundary, or two elements apart."""
    if place == "misaligned":
        return torch.cat([value.new_empty(1), value.flatten()])[1:].view(value.shape)
    if place == "every second":
        return value.unsqueeze(-1).expand(*value.shape, 2).contiguous()[..., 0]
    return value


def make_target(
    kind: str, shape: tuple[int, ...], n_classes: int, class_dim: int, place: str = "aligned"
) -> tuple[Tensor, Tensor | None]:
    """Labels, weighted labels or probabilities of rows of `shape`, and target_weight."""
    n_labels = {"one weighted": 1, "two weighted": 2, "three weighted": 3}.get(kind)
    if n_labels is not None:
        several = (*shape[:class_dim], n_labels, *shape[class_dim:])
        return placed(torch.zeros(several, dtype=torch.int64), place), placed(torch.ones(several), place)
    if kind.startswith("probabilities"):
        dtype = torch.bfloat16 if kind.endswith("in half") else torch.float32
        whole = (*shape[:class_dim], n_classes, *shape[class_dim:])
        if place == "every second":
            return torch.empty((*whole, 2), dtype=dtype)[..., 0], None
        offset = 1 if place == "misaligned" else 0
        return torch.empty(offset + torch.Size(whole).numel(), dtype=dtype)[offset:].view(whole), None
    return placed(torch.zeros(shape, dtype=torch.int64), place), None


def make_options(kind: str, n_classes: int, weight_name: str, place: str = "aligned") -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "class weights" in kind:
        options[weight_name] = placed(torch.ones(n_classes), place)
    if "smoothing" in kind:
        options["label_smoothing"] = 0.1
    if kind == "smoothing toward":
        options["smoothing_distribution"] = placed(torch.full((n_classes,), 1.0 / n_classes), place)
    if kind == "ignore_index":
        options["ignore_index"] = 0
    return options


def make_margin(name: str, n_classes: int) -> PairwiseMargin:
    prior = counts_prior(n_classes)
    if name == "vectors in float64":
        ones = torch.ones(n_classes, dtype=torch.float64)
        return PairwiseMargin(alpha=ones, negative_offset=ones, target_offset=ones, scale=ones)
    if name == "vector_scaling":
        return margins.vector_scaling(prior, 0.3, 1.0)
    if name == "cdt":
        return margins.cdt(prior, 0.3)
    if name == "erm":
        return margins.erm()
    if name == "label scale":
        return PairwiseMargin(label_scale=torch.ones(n_classes), negative_offset=prior, target_offset=prior)
    return {"balanced": margins.balanced, "adaptive": margins.adaptive, "ldam": margins.ldam}[name](prior)


BY_GROUP = ("priors by group", "learned priors by group", "no priors by group")
PRIORS = ("prior", "prior in float64", "prior in half", "learned prior", "no prior", *BY_GROUP)
PRIOR_DTYPES = {"prior in float64": torch.float64, "prior in half": torch.bfloat16}
MARGINS = ("erm", "balanced", "vector_scaling", "cdt", "label scale", *SHIFTED)


def make_prior(kind: str, n_classes: int, place: str, shape: tuple[int, ...]) -> tuple[Tensor, dict[str, Any]]:
    """The log prior of one of PRIORS, and the other arguments that it needs for rows of `shape`."""
    prior = counts_prior(n_classes, PRIOR_DTYPES.get(kind, torch.float32))
    arguments: dict[str, Any] = {"tau": 0.0 if kind.startswith("no prior") else 1.0}
    if kind in BY_GROUP:
        prior = torch.stack([prior, prior, prior])
        arguments["group"] = placed(torch.zeros(shape, dtype=torch.int64), place)
    return placed(prior, place).requires_grad_(kind.startswith("learned")), arguments


def is_supported(choice: Choice) -> bool:
    """Whether these values go together in a call that reaches a kernel; some are left to the reference."""
    probabilities = choice.get("target", "").startswith("probabilities")
    smoothed = "smoothing" in choice.get("option", "")
    several = choice.get("target") in ("two weighted", "three weighted")
    return not (
        (choice.get("loss") in SHIFTED and (probabilities or smoothed))
        or (probabilities and choice.get("option") == "ignore_index")
        or (choice.get("loss") == "label scale" and (probabilities or smoothed or several))
        or (choice.get("layout") == "one vector" and (choice.get("rows", 1) > 1 or choice.get("positions")))
        or (choice.get("loss", "").startswith("learned") and choice.get("mode") == "evaluation")
        or choice.get("rows", 1) * choice.get("classes", 1) * torch.Size(choice.get("positions", ())).numel() > 1 << 26
    )


def differentiate(loss: Tensor, leaves: list[Tensor], mode: str) -> None:
    """Backward as in a training step, or twice, or with an upstream gradient other than 1."""
    if mode == "evaluation":
        return
    upstream = torch.full_like(loss, 0.5) if mode == "scaled step" else torch.ones_like(loss)
    for again in range(2 if mode == "two backward passes" else 1):
        torch.autograd.grad(loss, leaves, upstream, retain_graph=mode == "two backward passes" and not again)


MODES = ("step", "scaled step", "two backward passes", "evaluation")


# Entry points ---------------------------------------------------------------------------------------------------------


def loss_of_logits(choice: Choice, logit_adjusted: Any = None, margin_loss: Any = None) -> None:
    dtype, n_classes = DTYPES[choice["dtype"]], choice["classes"]
    logits = make_logits(choice["rows"], n_classes, choice["positions"], choice["layout"], dtype)
    logits.requires_grad_(choice["mode"] != "evaluation")
    class_dim = min(1, logits.dim() - 1)
    shape = tuple(logits.shape[:class_dim] + logits.shape[class_dim + 1 :])
    place = choice["vectors"]
    target, target_weight = make_target(choice["target"], shape, n_classes, class_dim, place)
    options = make_options(choice["option"], n_classes, "weight", place)
    options |= dict(target_weight=target_weight, reduction=choice["reduction"], impl="triton")
    leaves = [logits]
    if choice["loss"] in PRIORS:
        prior, arguments = make_prior(choice["loss"], n_classes, place, shape)
        leaves += [prior] * prior.requires_grad
        function = logit_adjusted or fused_la.logit_adjusted_cross_entropy
        loss = function(logits, target, prior, **arguments, **options)
    else:
        function = margin_loss or fused_la.margin_cross_entropy
        loss = function(logits, target, make_margin(choice["loss"], n_classes), **options)
    differentiate(loss, leaves, choice["mode"])


def loss_of_features(choice: Choice, logit_adjusted: Any = None, margin_loss: Any = None) -> None:
    dtype, n_classes, n_features = DTYPES[choice["dtype"]], choice["classes"], choice["features"]
    train = choice["mode"] != "evaluation"
    features = torch.zeros(choice["rows"], n_features, dtype=dtype, requires_grad=train)
    weight = torch.zeros(n_classes, n_features, dtype=dtype, requires_grad=train and choice["bias"] != "alone learned")
    place, bias = choice["vectors"], None
    if choice["bias"] != "none":
        bias = placed(torch.zeros(n_classes, dtype=dtype), place).requires_grad_(train)
    target, target_weight = make_target(choice["target"], (choice["rows"],), n_classes, 1, place)
    options = make_options(choice["option"], n_classes, "class_weight", place)
    options |= dict(bias=bias, target_weight=target_weight, reduction=choice["reduction"], impl="triton")
    leaves = [leaf for leaf in (features, weight, bias) if leaf is not None and leaf.requires_grad]
    if choice["loss"] in PRIORS:
        prior, arguments = make_prior(choice["loss"], n_classes, place, (choice["rows"],))
        leaves += [prior] * prior.requires_grad
        function = logit_adjusted or fused_la.linear_logit_adjusted_cross_entropy
        loss = function(features, weight, target, prior, **arguments, **options)
    else:
        function = margin_loss or fused_la.linear_margin_cross_entropy
        loss = function(features, weight, target, make_margin(choice["loss"], n_classes), **options)
    differentiate(loss, leaves, choice["mode"])


def tau_sweep(choice: Choice) -> None:
    dtype, n_classes = DTYPES[choice["dtype"]], choice["classes"]
    taus = [0.1 * i for i in range(choice["taus"])]
    if choice["method"] == "adjust":
        sweep = TauSweep(counts_prior(n_classes), taus, split="val")
    elif choice["method"] == "divide":
        sweep = TauSweep.divide_by_prior(counts_prior(n_classes), taus, split="val")
    else:
        bias = torch.zeros(n_classes) if choice["method"] == "normalise, bias" else None
        sweep = TauSweep.normalize_classifier(torch.ones(n_classes, 2), taus, bias=bias, split="val")
    logits = make_logits(choice["rows"], n_classes, choice["positions"], choice["layout"], dtype)
    class_dim = min(1, logits.dim() - 1)
    shape = logits.shape[:class_dim] + logits.shape[class_dim + 1 :]
    sweep.update(logits, torch.zeros(shape, dtype=torch.int64))


def under_a_transform(choice: Choice) -> None:
    """The loss or its gradient under torch.func.vmap, which makes more rows of a batch."""
    batch, n_rows, n_classes = choice["batch"], choice["rows"], choice["classes"]
    logits = torch.empty(batch, n_rows, n_classes, dtype=DTYPES[choice["dtype"]])
    target, target_weight = make_target(choice["target"], (batch, n_rows), n_classes, 2)
    prior, options = counts_prior(n_classes), make_options(choice["option"], n_classes, "weight")

    def loss(x: Tensor, y: Tensor, w: Tensor | None) -> Tensor:
        return fused_la.logit_adjusted_cross_entropy(
            x, y, prior, target_weight=w, reduction=choice["reduction"], impl="triton", **options
        )

    per_example = torch.func.grad(loss) if choice["mode"] == "gradient" else loss
    torch.func.vmap(per_example, (0, 0, None if target_weight is None else 0))(logits, target, target_weight)


def on_one_rank(run: Callable[..., None], prefix: str) -> Callable[[Choice], None]:
    """The functions of `fused_la.distributed` in a group of one process."""

    def call(choice: Choice) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        run(
            choice,
            getattr(distributed, f"class_parallel_{prefix}logit_adjusted_cross_entropy"),
            getattr(distributed, f"class_parallel_{prefix}margin_cross_entropy"),
        )

    return call


LOSS: dict[str, Sequence[Any]] = {
    "rows": (1, 2, 3, 16, 17, 64, 264, 4096),
    "classes": (1, 2, 3, 8, 16, 100, 255, 256, 1000, 8142, 50257),
    "positions": ((), (1,), (3, 3), (4, 4)),
    "dtype": tuple(DTYPES),
    "layout": LAYOUTS,
    "loss": (*PRIORS, *MARGINS),
    "target": TARGETS,
    "option": OPTIONS,
    "vectors": ("aligned", "misaligned", "every second"),  # memory layout of the target and of vectors over the classes
    "reduction": ("mean", "sum", "none"),
    "mode": MODES,
}
HEAD: dict[str, Sequence[Any]] = {
    "rows": (1, 2, 3, 16, 17, 64, 264),
    "features": (1, 2, 16, 17),
    "classes": (1, 2, 3, 16, 100, 1000, 4096, 5001),
    "bias": ("none", "bias", "alone learned"),
    **{name: LOSS[name] for name in ("dtype", "loss", "target", "option", "vectors", "reduction", "mode")},
}
SWEEP: dict[str, Sequence[Any]] = {
    "rows": (1, 2, 3, 16, 17, 264),
    "classes": (1, 2, 3, 16, 100, 1000, 8142),
    "taus": (1, 2, 3, 16, 17, 33),
    "method": ("adjust", "divide", "normalise", "normalise, bias"),
    **{name: LOSS[name] for name in ("positions", "dtype", "layout")},
}
TRANSFORM: dict[str, Sequence[Any]] = {
    "batch": (1, 2, 16),
    "rows": (1, 3, 16),
    "classes": (1, 16, 100, 1000),
    "mode": ("gradient", "loss"),
    "target": TARGETS[:-1],
    "option": OPTIONS[:-1],
    "dtype": ("bfloat16", "float32", "float64"),
    "reduction": ("mean", "sum"),
}
RANK: dict[str, Sequence[Any]] = {
    "rows": (1, 3, 16),
    "classes": (1, 16, 1000),
    "dtype": ("bfloat16", "float32", "float64"),
    "loss": ("prior", "learned prior", "no prior", "cdt", "ldam"),
    "target": ("label", "two weighted", "probabilities"),
    "option": ("none", "class weights", "smoothing", "class weights, smoothing"),
    "vectors": ("aligned", "misaligned"),
    "reduction": ("mean", "none"),
    "mode": ("step", "evaluation"),
}

ENTRY_POINTS: dict[str, Axes] = {
    "losses": Axes(LOSS, loss_of_logits, is_supported),
    "heads": Axes(HEAD, loss_of_features, is_supported),
    "tau sweep": Axes(SWEEP, tau_sweep, is_supported),
    "torch.func": Axes(TRANSFORM, under_a_transform, is_supported),
    "a rank's losses": Axes(
        {**RANK, "positions": ((),), "layout": ("contiguous", "misaligned")},
        on_one_rank(loss_of_logits, ""),
        is_supported,
    ),
    "a rank's heads": Axes(
        {**RANK, "features": (1, 16), "bias": ("none", "bias")}, on_one_rank(loss_of_features, "linear_"), is_supported
    ),
}


# Combinations ---------------------------------------------------------------------------------------------------------


def combinations(axes: Axes, strength: int) -> list[Choice]:
    """Choices that hold every allowed combination of values on `strength` axes; deterministic.

    Each choice begins with a missing combination. On every other axis it takes the value that adds most missing ones.
    """
    names, generator = list(axes.values), random.Random(0)
    missing = {
        combination
        for some in itertools.combinations(names, strength)
        for combination in itertools.product(*([(name, i) for i in range(len(axes.values[name]))] for name in some))
        if axes.allowed(chosen(axes, combination))
    }
    found = []
    for combination in sorted(missing):
        if combination not in missing:
            continue
        indices = dict(combination)
        rest = [name for name in names if name not in indices]
        generator.shuffle(rest)
        for name in rest:
            best = None
            for i in generator.sample(range(len(axes.values[name])), len(axes.values[name])):
                if axes.allowed(chosen(axes, [*indices.items(), (name, i)])):
                    added = sum(1 for new in combinations_with(indices, (name, i), names, strength) if new in missing)
                    if best is None or added > best[0]:
                        best = added, i
            if best is None:
                break  # no value on this axis goes with the values so far
            indices[name] = best[1]
        else:
            missing -= set(value_combinations(indices, names, strength))
            found.append(chosen(axes, [(name, indices[name]) for name in names]))
    return found


def chosen(axes: Axes, combination: Sequence[tuple[str, int]]) -> Choice:
    return {name: axes.values[name][i] for name, i in combination}


def value_combinations(
    indices: dict[str, int], names: list[str], strength: int
) -> Iterator[tuple[tuple[str, int], ...]]:
    return itertools.combinations([(name, indices[name]) for name in names if name in indices], strength)


def combinations_with(
    indices: dict[str, int], new: tuple[str, int], names: list[str], strength: int
) -> Iterator[tuple[tuple[str, int], ...]]:
    """The combinations of `indices` and `new` that contain `new`."""
    order = {name: i for i, name in enumerate(names)}
    for some in itertools.combinations([(name, indices[name]) for name in names if name in indices], strength - 1):
        yield tuple(sorted((*some, new), key=lambda item: order[item[0]]))


# Failures -------------------------------------------------------------------------------------------------------------


def innermost_cause(error: BaseException) -> str:
    """The last exception of the chain; for a compiler error its message and the line of the kernel."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    caret = next((i for i, line in enumerate(lines) if line.strip() == "^"), 0)
    where = f" in `{lines[caret - 1].strip()}`" if caret else ""
    return f"{type(error).__name__}: {lines[-1].strip()}{where}"


def failures(calls: Sequence[tuple[str, Callable[[], None]]]) -> Iterator[tuple[str, str]]:
    for name, run in calls:
        try:
            run()
        except Exception as error:
            yield name, innermost_cause(error)


def entry_point_calls(name: str, strength: int) -> list[tuple[str, Callable[[], None]]]:
    axes = ENTRY_POINTS[name]
    return [
        (
            f"{name}: " + ", ".join(f"{axis} {value}" for axis, value in choice.items()),
            functools.partial(axes.run, choice),
        )
        for choice in combinations(axes, strength)
    ]


# Calls that should share variants -------------------------------------------------------------------------------------

ROWS = (256, 255, 1, 2, 3, 15, 16, 17, 37, 64, 100, 128, 250, 264, 300, 600, 1000, 1024, 4096)
BASE_LOSS = dict(
    rows=256, classes=8142, positions=(), dtype="bfloat16", layout="contiguous", loss="prior", target="label",
    option="none", vectors="aligned", reduction="mean", mode="step",
)  # fmt: skip
BASE_HEAD = dict(
    rows=256, features=16, classes=1000, bias="bias", dtype="bfloat16", loss="prior", target="label", option="none",
    vectors="aligned", reduction="mean", mode="step",
)  # fmt: skip
BASE_SWEEP = dict(
    rows=256, classes=8142, positions=(), dtype="bfloat16", layout="contiguous", taus=13, method="adjust"
)  # fmt: skip


class Shared(NamedTuple):
    """Calls that differ in what changes from batch to batch; they need at most `most` variants of each kernel."""

    calls: list[Callable[[], None]]
    most: int


def over_rows(run: Callable[[Choice], None], base: Choice, rows: Sequence[int] = ROWS, **changes: Any) -> Shared:
    return Shared([functools.partial(run, {**base, **changes, "rows": n}) for n in rows], most=2)


def step(
    logits: Tensor,
    tau: float = 1.0,
    upstream: Tensor | float | None = None,
    target: Tensor | None = None,
    prior: Tensor | None = None,
    **options: Any,
) -> None:
    """A training step of logits, one label a row."""
    n_rows, n_classes = logits.shape[:2]
    logits = logits.detach().requires_grad_()
    target = torch.zeros(n_rows, dtype=torch.int64) if target is None else target
    prior = counts_prior(n_classes) if prior is None else prior
    loss = fused_la.logit_adjusted_cross_entropy(logits, target, prior, tau, impl="triton", **options)
    if not isinstance(upstream, Tensor):
        upstream = torch.full_like(loss, 1.0 if upstream is None else upstream)
    torch.autograd.grad(loss, logits, upstream)


def bfloat16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def alike(function: Callable[..., None], calls: Sequence[tuple[Any, ...]], name: str = "", **options: Any) -> Shared:
    """Calls that share one variant of each kernel. With a `name` the last argument of each call is that keyword."""
    if name:
        return Shared(
            [functools.partial(function, *args, **{name: value}, **options) for *args, value in calls], most=1
        )
    return Shared([functools.partial(function, *args, **options) for args in calls], most=1)


def shared_calls() -> dict[str, Shared]:
    x, few = bfloat16(256, 8142), bfloat16(64, 1000)
    found = {
        f"rows of {n_classes} classes in {dtype}, {mode}": over_rows(
            loss_of_logits, BASE_LOSS, classes=n_classes, dtype=dtype, mode=mode
        )
        for n_classes, dtype, mode in (
            (8142, "bfloat16", "step"),
            (8142, "bfloat16", "evaluation"),
            (8192, "bfloat16", "step"),
            (50257, "bfloat16", "step"),
            (100, "bfloat16", "step"),
            (8142, "float32", "step"),
            (8142, "float16", "step"),
            (1000, "float64", "step"),
        )
    }
    found["rows, reduction none"] = over_rows(loss_of_logits, BASE_LOSS, reduction="none")
    found["rows, scaled step"] = over_rows(loss_of_logits, BASE_LOSS, mode="scaled step")
    found["rows, learned prior"] = over_rows(loss_of_logits, BASE_LOSS, loss="learned prior")
    found["rows, two weighted labels"] = over_rows(loss_of_logits, BASE_LOSS, target="two weighted")
    found["rows, probabilities"] = over_rows(loss_of_logits, BASE_LOSS, target="probabilities")
    found["rows, class weights and smoothing"] = over_rows(
        loss_of_logits, BASE_LOSS, option="class weights, smoothing", loss="balanced"
    )
    found["rows, learned priors by group"] = over_rows(loss_of_logits, BASE_LOSS, loss="learned priors by group")
    found["rows of a head, priors by group"] = over_rows(loss_of_features, BASE_HEAD, loss="priors by group")
    index, groups = torch.zeros(256, dtype=torch.int64), (1, 2, 3, 16, 100, 256)
    by_group = [torch.zeros(n_groups, 8142) for n_groups in groups]
    found["number of groups"] = alike(step, [(x, priors) for priors in by_group], "prior", group=index)
    found["rows, misaligned"] = over_rows(loss_of_logits, BASE_LOSS, layout="misaligned")
    images = dict(classes=1000, positions=(7, 7))
    found["images"] = over_rows(loss_of_logits, BASE_LOSS, ROWS[:-2], **images)
    found["images, classes last"] = over_rows(loss_of_logits, BASE_LOSS, ROWS[:-2], **images, layout="classes last")
    found["sizes of images"] = Shared(
        [
            functools.partial(loss_of_logits, {**BASE_LOSS, "rows": 4, "classes": 1000, "positions": (size, size)})
            for size in (2, 3, 4, 7, 8, 14, 16, 32)
        ],
        most=2,
    )
    found["rows of a head, step"] = over_rows(loss_of_features, BASE_HEAD)
    found["rows of a head, evaluation"] = over_rows(loss_of_features, BASE_HEAD, mode="evaluation")
    found["rows of a head of many classes"] = over_rows(loss_of_features, BASE_HEAD, classes=20_000, features=2)
    found["rows of a head, two weighted labels, margin"] = over_rows(
        loss_of_features, BASE_HEAD, target="two weighted", loss="ldam"
    )
    found["rows of a tau sweep"] = over_rows(tau_sweep, BASE_SWEEP)
    taus = (1.0, 0.5, 1.7, 2.0, 16.0, 1e-3)
    found["tau"] = alike(step, [(x, tau) for tau in taus])
    found["ignore_index"] = alike(step, [(x, i) for i in (-100, -1, 1, 2, 16, 255, -(2**40), 2**40)], "ignore_index")
    found["label_smoothing"] = alike(step, [(x, s) for s in (0.1, 1e-3, 0.5, 1.0)], "label_smoothing")
    found["upstream gradient"] = alike(step, [(x, u) for u in (1.0, 0.0, 2.5, 16.0, 65536.0)], "upstream")
    upstreams = (torch.ones(256), torch.ones(1).expand(256), torch.ones(512)[::2], torch.ones(256, 17)[:, 0])
    found["upstream gradient of rows"] = alike(step, [(x, u) for u in upstreams], "upstream", reduction="none")
    found["strides that are multiples of 16 bytes"] = alike(
        step, [(bfloat16(256, n)[:, :8142],) for n in (8144, 8152, 8160, 8192, 16000, 65536, 65544)]
    )
    found["strides that are no multiples of 16 bytes"] = alike(
        step, [(bfloat16(256, n)[:, :8142],) for n in (8142, 8146, 8150, 10_002)]
    )
    found["rows that are not neighbours"] = alike(step, [(bfloat16(256 * n, 8142)[::n],) for n in (4, 8, 12)])
    found["base pointers on 16 bytes"] = alike(
        step, [(bfloat16(257, 8144).view(-1)[n : n + 256 * 8144].view(256, 8144)[:, :8142],) for n in (0, 8, 16, 800)]
    )
    found["base pointers 2 bytes after 16"] = alike(
        step, [(bfloat16(257, 8144).view(-1)[n : n + 256 * 8144].view(256, 8144)[:, :8142],) for n in (1, 9, 17, 801)]
    )
    labels, priors = torch.zeros(1024, dtype=torch.int64), torch.zeros(2048)
    found["pointers of labels"] = alike(step, [(few, labels[n : n + 64]) for n in (0, 2, 16, 30)], "target")
    found["pointers of the prior"] = alike(step, [(few, priors[n : n + 1000]) for n in (0, 4, 16, 1000)], "prior")
    strided = torch.zeros(64, 3, dtype=torch.int64)
    found["strides of labels"] = alike(step, [(few, y) for y in (labels[:64], strided[:, 0], labels[:128:2])], "target")
    return found


def count_variants(driver: Any, shared: Shared) -> tuple[dict[str, int], list[str]]:
    """({kernel: number of variants that the calls launched}, causes of failed calls)."""
    driver.launched.clear()
    causes = [cause for _, cause in failures([("", call) for call in shared.calls])]
    return dict(collections.Counter(variant.name for variant in driver.launched)), list(dict.fromkeys(causes))


# The command ----------------------------------------------------------------------------------------------------------


def use_sweep_kernel() -> None:
    """Make a tau sweep of CPU tensors launch the kernel; its predictions become 0, as they would be uninitialised."""
    launch_argmax = importlib.import_module("fused_la._triton.argmax").launch_argmax
    module: Any = sys.modules[TauSweep.__module__]
    module._predict = lambda *args: launch_argmax(*args).zero_()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/every_call.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=("compile", "count"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the entry points, or of the calls to count")
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--strength", type=int, default=2, help="axes whose values meet in every combination")
    parser.add_argument("--whole-compiler", action="store_true")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every N-th call from I")
    options = parser.parse_args()
    sys.path.append(str(Path(__file__).parent.parent))  # of the folder benchmarks
    from benchmarks.static.compile_only import compile_only

    use_sweep_kernel()
    first, step_size = options.part
    started = time.perf_counter()
    with compile_only(options.target, front_end_only=not options.whole_compiler) as driver:
        if options.what == "compile":
            names = options.only or list(ENTRY_POINTS)
            calls = [call for name in names for call in entry_point_calls(name, options.strength)][first::step_size]
            for name, cause in failures(calls):
                print(json.dumps({"call": name, "cause": cause}), flush=True)
            summary: dict[str, Any] = {"calls": len(calls)}
        else:
            shared = shared_calls()
            for name in (options.only or list(shared))[first::step_size]:
                variants, causes = count_variants(driver, shared[name])
                counted = {"calls of": name, "most": shared[name].most, "variants": variants, "causes": causes}
                print(json.dumps(counted), flush=True)
            summary = {}
    summary |= {"compiled": len(driver.compiled), "seconds": round(time.perf_counter() - started, 1)}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
