"""Bad inputs to the public functions: the exception, and a message with the argument, what was expected and what came.

Each table holds the bad values of one argument and the whole message that each must give. Every implementation is
tried, since the check comes before all of them. Tensors on "meta" stand for another device. The values of a tensor
(labels out of range, a NaN in the prior) are checked on a CPU only, outside of transforms and tracing. Elsewhere a bad
label or prior must give NaN in its own rows, and in no other.
"""

import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import truth
from torch.func import grad, vmap

import fused_la
import fused_la.reference
from fused_la import LogitAdjustedCrossEntropyLoss, logit_adjusted_cross_entropy
from fused_la._call.problem import Problem

N_ROWS, N_CLASSES = 3, 5
INT64 = torch.iinfo(torch.int64)
FLOAT8 = torch.float8_e4m3fn
INTERFACES = "index labels", "weighted labels", "probabilities"


def valid_arguments(device, target_kind="index labels"):
    arguments = dict(
        logits=torch.linspace(-2.0, 2.0, N_ROWS * N_CLASSES, device=device).reshape(N_ROWS, N_CLASSES),
        target=torch.tensor([0, 1, 4], device=device),
        log_prior=torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], device=device).log(),
    )
    if target_kind == "weighted labels":
        arguments["target"] = torch.tensor([[0, 1], [1, 2], [4, 4]], device=device)
        arguments["target_weight"] = torch.tensor([[0.7, 0.3], [0.5, 0.5], [1.0, 0.0]], device=device)
    if target_kind == "probabilities":
        arguments["target"] = torch.full((N_ROWS, N_CLASSES), 1 / N_CLASSES, device=device)
    return arguments


MOVE = "; move it, or the module that holds it, with .to(logits.device)"


def assert_refused(error, message, call):
    """`call` raises `error` with exactly this message, so a text that names the wrong thing does not pass."""
    with pytest.raises(error, match=f"^{re.escape(message)}$") as caught:
        call()
    assert type(caught.value) is error


@functools.cache
def assert_valid_arguments_pass(impl, device, target_kind):
    """The unchanged arguments are valid, so an error comes from what a test changes in them."""
    assert logit_adjusted_cross_entropy(**valid_arguments(device, target_kind), impl=impl).isfinite()


def assert_loss_refuses(impl, device, error, message, target_kind="index labels", **changes):
    assert_valid_arguments_pass(impl, device, target_kind)
    arguments = {**valid_arguments(device, target_kind), "impl": impl, **changes}
    assert_refused(error, message, lambda: logit_adjusted_cross_entropy(**arguments))


def table(*rows):
    """Parameters (value, error, message); `value` is a function of the device."""
    return pytest.mark.parametrize(
        ("value", "error", "message"),
        [pytest.param(value, error, message, id=name) for name, value, error, message in rows],
    )


@pytest.fixture
def cpu(device):
    """The device of tests whose errors need a tensor's values, which are read on a CPU only."""
    if device != "cpu":
        pytest.skip("values are checked on a CPU")
    return device


# logits ---------------------------------------------------------------------------------------------------------------

FLOATING = "{} must be float16, bfloat16, float32 or float64, got {}"
FLOATING_LOGITS = FLOATING.format("logits", "")


@table(
    ("list", lambda d: [[0.0] * 5] * 3, TypeError, "logits must be a torch.Tensor, got list"),
    ("None", lambda d: None, TypeError, "logits must be a torch.Tensor, got NoneType"),
    ("array", lambda d: np.zeros((3, 5)), TypeError, "logits must be a torch.Tensor, got ndarray"),
    ("int64", lambda d: torch.zeros(3, 5, device=d).long(), TypeError, FLOATING_LOGITS + "torch.int64"),
    ("bool", lambda d: torch.zeros(3, 5, device=d).bool(), TypeError, FLOATING_LOGITS + "torch.bool"),
    ("complex", lambda d: torch.zeros(3, 5, device=d) + 0j, TypeError, FLOATING_LOGITS + "torch.complex64"),
    ("float8", lambda d: torch.zeros(3, 5, device=d).to(FLOAT8), TypeError, FLOATING_LOGITS + "torch.float8_e4m3fn"),
    (
        "sparse",
        lambda d: torch.zeros(3, 5, device=d).to_sparse(),
        TypeError,
        "logits must be a dense tensor, got layout torch.sparse_coo",
    ),
    (
        "nested",
        lambda d: torch.nested.nested_tensor([torch.zeros(5), torch.zeros(4)], device=d, layout=torch.jagged),
        TypeError,
        "logits must be a dense tensor, got layout nested",
    ),
    (
        "scalar",
        lambda d: torch.zeros((), device=d),
        ValueError,
        "logits must have shape (C,), (N, C) or (N, C, d1, ..., dk), got ()",
    ),
    (
        "no class",
        lambda d: torch.zeros(3, 0, device=d),
        ValueError,
        "logits must have at least one class, got shape (3, 0)",
    ),
    (
        "no class and no batch",
        lambda d: torch.zeros(0, device=d),
        ValueError,
        "logits must have at least one class, got shape (0,)",
    ),
    (
        "no class in an image",
        lambda d: torch.zeros(3, 0, 2, device=d),
        ValueError,
        "logits must have at least one class, got shape (3, 0, 2)",
    ),
)
def test_bad_logits_are_refused(impl, device, value, error, message):
    assert_loss_refuses(impl, device, error, message, logits=value(device))


# log_prior, weight, smoothing_distribution ----------------------------------------------------------------------------

BAD_CLASS_VECTORS = [
    ("list", lambda d: [0.2] * 5, TypeError, "{} must be a torch.Tensor, got list"),
    ("array", lambda d: np.full(5, 0.2), TypeError, "{} must be a torch.Tensor, got ndarray"),
    ("short", lambda d: torch.full((4,), 0.25, device=d), ValueError, "{} must have shape (5,), got (4,)"),
    ("long", lambda d: torch.full((6,), 1 / 6, device=d), ValueError, "{} must have shape (5,), got (6,)"),
    ("one for all", lambda d: torch.full((1,), 0.2, device=d), ValueError, "{} must have shape (5,), got (1,)"),
    ("scalar", lambda d: torch.tensor(0.2, device=d), ValueError, "{} must have shape (5,), got ()"),
    ("row", lambda d: torch.full((1, 5), 0.2, device=d), ValueError, "{} must have shape (5,), got (1, 5)"),
    ("column", lambda d: torch.full((5, 1), 0.2, device=d), ValueError, "{} must have shape (5,), got (5, 1)"),
    ("a row each", lambda d: torch.full((3, 5), 0.2, device=d), ValueError, "{} must have shape (5,), got (3, 5)"),
    (
        "sparse",
        lambda d: torch.full((5,), 0.2, device=d).to_sparse(),
        TypeError,
        "{} must be a dense tensor, got layout torch.sparse_coo",
    ),
]


@pytest.mark.parametrize("name", ["log_prior", "weight", "smoothing_distribution"])
@table(*BAD_CLASS_VECTORS)
def test_what_is_not_a_floating_number_a_class_is_refused(impl, device, name, value, error, message):
    value = value(device)
    if name == "log_prior" and isinstance(value, torch.Tensor) and value.shape[1:] == (5,):
        message += "; with a row for each group, group must be given"
    assert_loss_refuses(impl, device, error, message.format(name), **{name: value})


@pytest.mark.parametrize("name", ["log_prior", "weight", "smoothing_distribution"])
def test_class_vectors_on_another_device_are_refused(impl, device, name):
    on_logits_device = valid_arguments(device)["logits"].device
    message = f"{name} must be on the device of the logits, {on_logits_device}, got meta" + MOVE
    assert_loss_refuses(impl, device, ValueError, message, **{name: torch.full((5,), 0.2, device="meta")})


@pytest.mark.parametrize("name", ["weight", "smoothing_distribution"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, FLOAT8])
def test_class_vectors_that_are_not_floating_are_refused(impl, device, name, dtype):
    value = torch.tensor([1, 0, 0, 0, 0], device=device).to(dtype)
    assert_loss_refuses(impl, device, TypeError, FLOATING.format(name, dtype), **{name: value})


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_class_counts_as_log_prior_are_refused_with_a_hint(impl, device, dtype, tau):
    counts = torch.tensor([5, 4, 3, 2, 1], device=device).to(dtype)
    hint = "; log_prior_from_counts makes a log prior from class counts"
    message = FLOATING.format("log_prior", dtype) + hint
    assert_loss_refuses(impl, device, TypeError, message, log_prior=counts, tau=tau)
    assert callable(fused_la.log_prior_from_counts)


def test_log_prior_must_be_given(impl, device):
    assert_loss_refuses(impl, device, TypeError, "log_prior must be a torch.Tensor, got NoneType", log_prior=None)


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize(
    ("log_prior", "problem"),
    [
        ([0.0, math.nan, 0.0, 0.0, 0.0], "finite or -inf, got nan for some class"),
        ([math.inf, math.nan, 0.0, 0.0, 0.0], "finite or -inf, got nan for some class"),
        ([-math.inf, -math.inf, -math.inf, -math.inf, math.nan], "finite or -inf, got nan for some class"),
        ([0.0, 0.0, 0.0, 0.0, math.inf], "finite or -inf, got inf for some class"),
        ([-math.inf, 0.0, 0.0, math.inf, 0.0], "finite or -inf, got inf for some class"),
    ],
)
def test_impossible_log_priors_are_refused(impl, cpu, tau, log_prior, problem):
    message = f"log_prior must be {problem}"
    assert_loss_refuses(impl, cpu, ValueError, message, log_prior=torch.tensor(log_prior), tau=tau)


def test_a_log_prior_that_leaves_no_class_is_refused_where_it_is_used(impl, cpu):
    nothing = torch.full((5,), -math.inf)
    message = "log_prior must be finite for some class, got -inf for every class"
    assert_loss_refuses(impl, cpu, ValueError, message, log_prior=nothing, tau=0.5)
    arguments = valid_arguments(cpu)
    expected = torch.nn.functional.cross_entropy(arguments["logits"], arguments["target"])
    for learned in (False, True):
        arguments["log_prior"] = nothing.requires_grad_(learned)
        loss = logit_adjusted_cross_entropy(**arguments, tau=0.0, impl=impl)
        assert abs(loss.item() - expected.item()) <= 2 * torch.finfo(torch.float32).eps * expected.item()


def distribution_message(total, smallest):
    expected = "smoothing_distribution must hold probabilities that add up to 1"
    return f"{expected}, got a smallest value of {smallest} and a sum of {total}"


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("distribution", "total", "smallest"),
    [
        ([5.0, 4.0, 3.0, 2.0, 1.0], "15", "1"),  # counts
        ([-1.0, -2.0, -2.0, -2.0, -2.0], "-9", "-2"),  # log probabilities
        ([-0.5, 0.5, 0.5, 0.25, 0.25], "1", "-0.5"),
        ([0.125, 0.125, 0.125, 0.125, 0.0], "0.5", "0"),
        ([0.0] * 5, "0", "0"),
        ([0.25, 0.25, 0.25, 0.25, math.nan], "nan", "nan"),
        ([0.25, 0.25, 0.25, 0.25, math.inf], "inf", "0.25"),
    ],
)
def test_smoothing_toward_no_distribution_is_refused(impl, cpu, label_smoothing, distribution, total, smallest):
    bad = torch.tensor(distribution)
    options = dict(smoothing_distribution=bad, label_smoothing=label_smoothing)
    assert_loss_refuses(impl, cpu, ValueError, distribution_message(total, smallest), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_rounded_to_half_precision_still_add_up(impl, device, dtype):
    rounded = (torch.arange(1.0, 1001.0, device=device) / 500500).to(dtype)
    logits = torch.zeros(1, 1000, device=device)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    loss = logit_adjusted_cross_entropy(
        logits, target, logits[0], label_smoothing=0.1, smoothing_distribution=rounded, impl=impl
    )
    assert loss.isfinite()


# target ---------------------------------------------------------------------------------------------------------------

TARGET_DTYPE = "target must be int64 class indices, or probabilities in float16, bfloat16, float32 or float64, got "
LONG = "; target.long() makes int64 of it"
INDEX_SHAPE = "target must have shape (3,) for class indices, got "
SEVERAL = "; several labels a row need target_weight, and class probabilities must be floating"


def integers(*values, dtype=torch.int64):
    return lambda d: torch.tensor(values, device=d).to(dtype)


@table(
    ("list", lambda d: [0, 1, 4], TypeError, "target must be a torch.Tensor, got list"),
    ("None", lambda d: None, TypeError, "target must be a torch.Tensor, got NoneType"),
    ("array", lambda d: np.array([0, 1, 4]), TypeError, "target must be a torch.Tensor, got ndarray"),
    ("int32", integers(0, 1, 4, dtype=torch.int32), TypeError, TARGET_DTYPE + "torch.int32" + LONG),
    ("int8", integers(0, 1, 4, dtype=torch.int8), TypeError, TARGET_DTYPE + "torch.int8" + LONG),
    ("uint16", integers(0, 1, 4, dtype=torch.uint16), TypeError, TARGET_DTYPE + "torch.uint16" + LONG),
    ("bool", integers(0, 1, 1, dtype=torch.bool), TypeError, TARGET_DTYPE + "torch.bool"),
    ("complex", integers(0, 1, 4, dtype=torch.complex64), TypeError, TARGET_DTYPE + "torch.complex64"),
    ("float8", lambda d: torch.zeros(3, 5, device=d).to(FLOAT8), TypeError, TARGET_DTYPE + "torch.float8_e4m3fn"),
    ("int32 one-hot", lambda d: torch.eye(5, device=d)[:3].int(), TypeError, TARGET_DTYPE + "torch.int32" + LONG),
    ("sparse", lambda d: torch.tensor([0, 1, 4], device=d).to_sparse(), TypeError,
     "target must be a dense tensor, got layout torch.sparse_coo"),
    ("short", integers(0, 1), ValueError, INDEX_SHAPE + "(2,)"),
    ("one for all", integers(0), ValueError, INDEX_SHAPE + "(1,)"),
    ("scalar", lambda d: torch.zeros((), device=d).long(), ValueError, INDEX_SHAPE + "()"),
    ("image", lambda d: torch.zeros(3, 2, 2, device=d).long(), ValueError,
     INDEX_SHAPE + "(3, 2, 2)"),
    ("column", integers([0], [1], [4]), ValueError, INDEX_SHAPE + "(3, 1)" + SEVERAL),
    ("one-hot", lambda d: torch.eye(5, device=d)[:3].long(), ValueError,
     INDEX_SHAPE + "(3, 5)" + SEVERAL),
    ("two labels", integers([0, 1], [1, 2], [4, 4]), ValueError,
     INDEX_SHAPE + "(3, 2)" + SEVERAL),
    ("floating indices", lambda d: torch.tensor([0.0, 1.0, 4.0], device=d), ValueError,
     "target must have shape (3, 5) for class probabilities, got (3,)"),
    ("probabilities of too few rows", lambda d: torch.full((2, 5), 0.2, device=d), ValueError,
     "target must have shape (3, 5) for class probabilities, got (2, 5)"),
    ("probabilities to broadcast", lambda d: torch.full((1, 5), 0.2, device=d), ValueError,
     "target must have shape (3, 5) for class probabilities, got (1, 5)"),
    ("transposed probabilities", lambda d: torch.full((5, 3), 0.2, device=d), ValueError,
     "target must have shape (3, 5) for class probabilities, got (5, 3)"),
    ("probabilities of too few classes", lambda d: torch.full((3, 4), 0.25, device=d), ValueError,
     "target must have shape (3, 5) for class probabilities, got (3, 4)"),
)  # fmt: skip
def test_bad_targets_are_refused(impl, device, value, error, message):
    assert_loss_refuses(impl, device, error, message, target=value(device))


LAST = "; dimension 1 of the logits, (2, 7, 5), has the classes"
MOVED = LAST + ", pass logits.movedim(-1, 1)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "log_prior must have shape (7,), got (5,)" + MOVED),
        (dict(log_prior=torch.zeros(6)), "log_prior must have shape (7,), got (6,)" + LAST),
        (
            dict(log_prior=torch.zeros(7)),
            "target must have shape (2, 5) for class indices, got (2, 7)" + MOVED,
        ),
        (
            dict(log_prior=torch.zeros(7), target=torch.zeros(2, 5).long(), weight=torch.ones(5)),
            "weight must have shape (7,), got (5,)" + MOVED,
        ),
        (dict(log_prior=torch.zeros(7), target=torch.zeros(2, 6).long()),
         "target must have shape (2, 5) for class indices, got (2, 6)"),
    ],
)  # fmt: skip
def test_the_class_dimension_is_named_if_arguments_fit_the_last_one(change, message):
    """Logits (N, L, C) with labels (N, L), as language models have them."""
    arguments = dict(logits=torch.randn(2, 7, 5), target=torch.zeros(2, 7).long(), log_prior=torch.zeros(5)) | change
    assert_refused(ValueError, message, lambda: logit_adjusted_cross_entropy(**arguments))
    if "target" not in change:
        margin = fused_la.PairwiseMargin(negative_offset=arguments["log_prior"])
        assert_refused(
            ValueError,
            message.replace("log_prior", "margin.negative_offset"),
            lambda: fused_la.margin_cross_entropy(arguments["logits"], arguments["target"], margin),
        )


@pytest.mark.parametrize("ignored", [-100, 255, 2])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_labels_may_be_uint8_as_those_of_cross_entropy(impl, device, ignored, reduction):
    """Segmentation masks are uint8, where -100 would be 156."""
    logits, log_prior = torch.randn(6, 200, 2, device=device), torch.randn(200, device=device)
    target = torch.tensor([[0, 156], [199, 2], [ignored % 256, 3]] * 2, device=device, dtype=torch.uint8)
    if ignored == -100:
        target[target == 156] = 155
        target[0, 0] = 156  # a class like any other
    options = dict(reduction=reduction, ignore_index=ignored)
    loss = logit_adjusted_cross_entropy(logits, target, log_prior, impl=impl, **options)
    want = truth(logits, target.long(), log_prior, **options).loss
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=2e-6)
    several = torch.stack([target[:, 0], target[:, 1]], 1)
    shares = torch.rand(6, 2, device=device)
    loss = logit_adjusted_cross_entropy(logits[..., 0], several, log_prior, target_weight=shares, impl=impl, **options)
    want = truth(logits[..., 0], several.long(), log_prior, target_weight=shares, **options).loss
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=2e-6)


def test_uint8_labels_of_heads_and_sweeps(device):
    features, target = torch.randn(4, 3, device=device), torch.tensor([0, 4, 255, 1], device=device).to(torch.uint8)
    head = fused_la.LogitAdjustedLinear(3, COUNTS, ignore_index=255).to(device)
    assert torch.equal(head(features, target), head(features, target.long()))
    sweep = fused_la.posthoc.TauSweep(torch.zeros(5, device=device), [0.0], split="val", ignore_index=255)
    sweep.update(head(features).detach(), target)
    assert sweep.counts()[1].tolist() == [1, 1, 0, 0, 1]


def test_uint8_labels_out_of_range_are_named(cpu):
    with pytest.raises(IndexError, match="Target 156 is out of bounds"):
        logit_adjusted_cross_entropy(torch.randn(2, 5), torch.tensor([0, 156], dtype=torch.uint8), torch.zeros(5))


@pytest.mark.parametrize("target_kind", INTERFACES)
def test_a_target_on_another_device_is_refused(impl, device, target_kind):
    arguments = valid_arguments(device, target_kind)
    message = f"target must be on the device of the logits, {arguments['logits'].device}, got meta" + MOVE
    assert_loss_refuses(impl, device, ValueError, message, target_kind, target=arguments["target"].to("meta"))


@pytest.mark.parametrize(
    ("logits_shape", "target_shape", "message"),
    [
        ((5,), (1,), "target must have shape () for class indices, got (1,)" + SEVERAL),
        ((2, 5, 3, 4), (2, 4, 3), "target must have shape (2, 3, 4) for class indices, got (2, 4, 3)"),
        ((2, 5, 3, 4), (2,), "target must have shape (2, 3, 4) for class indices, got (2,)"),
        ((2, 5, 3, 4), (2, 12), "target must have shape (2, 3, 4) for class indices, got (2, 12)"),
        ((2, 5, 3, 4), (2, 1, 3, 4), "target must have shape (2, 3, 4) for class indices, got (2, 1, 3, 4)" + SEVERAL),
        ((0, 5), (1,), "target must have shape (0,) for class indices, got (1,)"),
    ],
)
def test_index_targets_must_fit_logits_of_every_rank(impl, device, logits_shape, target_shape, message):
    logits = torch.zeros(logits_shape, device=device)
    target = torch.zeros(target_shape, dtype=torch.int64, device=device)
    log_prior = torch.zeros(5, device=device)
    assert_refused(ValueError, message, lambda: logit_adjusted_cross_entropy(logits, target, log_prior, impl=impl))


# target_weight --------------------------------------------------------------------------------------------------------

WEIGHTED_SHAPE = "target must have shape (3, K) with K >= 1 labels for target_weight, got "


@table(
    ("list", lambda d: [[1.0, 0.0]] * 3, TypeError, "target_weight must be a torch.Tensor, got list"),
    ("int64", lambda d: torch.ones(3, 2, device=d).long(), TypeError,
     FLOATING.format("target_weight", "torch.int64")),
    ("bool", lambda d: torch.ones(3, 2, device=d).bool(), TypeError, FLOATING.format("target_weight", "torch.bool")),
    ("complex", lambda d: torch.ones(3, 2, device=d) + 0j, TypeError,
     FLOATING.format("target_weight", "torch.complex64")),
    ("sparse", lambda d: torch.ones(3, 2, device=d).to_sparse(), TypeError,
     "target_weight must be a dense tensor, got layout torch.sparse_coo"),
    ("too few rows", lambda d: torch.ones(2, 2, device=d), ValueError,
     "target_weight must have the shape of target, (3, 2), got (2, 2)"),
    ("one a row", lambda d: torch.ones(3, 1, device=d), ValueError,
     "target_weight must have the shape of target, (3, 2), got (3, 1)"),
    ("flat", lambda d: torch.ones(3, device=d), ValueError,
     "target_weight must have the shape of target, (3, 2), got (3,)"),
    ("lambda alone", lambda d: torch.tensor(0.3, device=d), ValueError,
     "target_weight must have the shape of target, (3, 2), got ()"),
    ("transposed", lambda d: torch.ones(2, 3, device=d), ValueError,
     "target_weight must have the shape of target, (3, 2), got (2, 3)"),
)  # fmt: skip
def test_bad_target_weights_are_refused(impl, device, value, error, message):
    assert_loss_refuses(impl, device, error, message, "weighted labels", target_weight=value(device))


def test_a_target_weight_on_another_device_is_refused(impl, device):
    on_logits_device = valid_arguments(device)["logits"].device
    message = f"target_weight must be on the device of the logits, {on_logits_device}, got meta" + MOVE
    weight = torch.ones(3, 2, device="meta")
    assert_loss_refuses(impl, device, ValueError, message, "weighted labels", target_weight=weight)


@table(
    ("one a row", integers(0, 1, 4), ValueError, WEIGHTED_SHAPE + "(3,)"),
    ("no label", lambda d: torch.zeros(3, 0, device=d).long(), ValueError, WEIGHTED_SHAPE + "(3, 0)"),
    ("too few rows", integers([0, 1], [1, 2]), ValueError, WEIGHTED_SHAPE + "(2, 2)"),
    ("transposed", integers([0, 1, 4], [1, 2, 4]), ValueError, WEIGHTED_SHAPE + "(2, 3)"),
    ("image", lambda d: torch.zeros(3, 2, 2, device=d).long(), ValueError, WEIGHTED_SHAPE + "(3, 2, 2)"),
    ("int32", integers([0, 1], [1, 2], [4, 4], dtype=torch.int32), TypeError, TARGET_DTYPE + "torch.int32" + LONG),
)
def test_targets_that_target_weight_does_not_fit_are_refused(impl, device, value, error, message):
    target = value(device)
    weight = torch.ones(target.shape, device=device)
    assert_loss_refuses(impl, device, error, message, "weighted labels", target=target, target_weight=weight)


@pytest.mark.parametrize(
    ("logits_shape", "target_shape", "expected"),
    [((5,), (), "(K,)"), ((2, 5, 3, 4), (2, 2, 4, 3), "(2, K, 3, 4)"), ((2, 5, 3, 4), (2, 2), "(2, K, 3, 4)")],
)
def test_weighted_labels_must_fit_logits_of_every_rank(impl, device, logits_shape, target_shape, expected):
    message = f"target must have shape {expected} with K >= 1 labels for target_weight, got {target_shape}"
    target = torch.zeros(target_shape, dtype=torch.int64, device=device)
    arguments = torch.zeros(logits_shape, device=device), target, torch.zeros(5, device=device)
    weight = torch.ones(target_shape, device=device)

    def call():
        return logit_adjusted_cross_entropy(*arguments, target_weight=weight, impl=impl)

    assert_refused(ValueError, message, call)


def test_target_weight_and_probabilities_exclude_each_other(impl, device):
    message = "target_weight must be None with class probabilities as target, got a tensor"
    weight = torch.ones(3, 5, device=device)
    assert_loss_refuses(impl, device, ValueError, message, "probabilities", target_weight=weight)


@pytest.mark.parametrize("ignore_index", [0, 3, 255])
def test_probabilities_have_no_label_to_ignore(impl, device, ignore_index):
    message = f"ignore_index must be negative with class probabilities as target, got {ignore_index}"
    assert_loss_refuses(impl, device, ValueError, message, "probabilities", ignore_index=ignore_index)


# Labels out of range --------------------------------------------------------------------------------------------------

OUT_OF_RANGE = [7, -1, N_CLASSES, -101, 2**31, 2**32 + 1, INT64.min, INT64.max]


def out_of_bounds(label, ignore_index=-100):
    return f"Target {label} is out of bounds: target must hold class indices in [0, 5) or ignore_index ({ignore_index})"


@pytest.mark.parametrize("label", OUT_OF_RANGE)
def test_labels_out_of_range_are_an_index_error(impl, cpu, label):
    target = torch.tensor([0, label, 4])
    assert_loss_refuses(impl, cpu, IndexError, out_of_bounds(label), target=target)


@pytest.mark.parametrize("label", OUT_OF_RANGE)
def test_one_of_several_labels_out_of_range_is_an_index_error(impl, cpu, label):
    target = torch.tensor([[0, 1], [1, label], [4, 4]])
    assert_loss_refuses(impl, cpu, IndexError, out_of_bounds(label), "weighted labels", target=target)


def test_labels_out_of_range_are_found_at_every_rank(impl, cpu):
    log_prior = torch.zeros(5)
    image = torch.zeros(2, 3, 4, dtype=torch.int64)
    image[1, 2, 3] = 7
    for logits, target in [(torch.zeros(5), torch.tensor(7)), (torch.zeros(2, 5, 3, 4), image)]:

        def call(logits=logits, target=target):
            return logit_adjusted_cross_entropy(logits, target, log_prior, impl=impl)

        assert_refused(IndexError, out_of_bounds(7), call)


@pytest.mark.parametrize(
    ("labels", "ignore_index", "named"),
    [
        ([0, -100, 4], -1, -100),  # PyTorch's default is ignored only if it is the ignore_index
        ([0, -1, -2], -1, -2),
        ([0, 255, 256], 255, 256),
        ([3, 3, 5], 3, 5),
    ],
)
def test_only_the_ignore_index_may_be_out_of_range(impl, cpu, labels, ignore_index, named):
    message = out_of_bounds(named, ignore_index)
    assert_loss_refuses(impl, cpu, IndexError, message, target=torch.tensor(labels), ignore_index=ignore_index)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 4, 5, 255, 2**31, INT64.min, INT64.max])
def test_the_ignore_index_may_be_anything_inside_and_outside_the_classes(impl, device, ignore_index):
    arguments = valid_arguments(device)
    arguments["target"] = torch.tensor([1, ignore_index, 3], device=device)
    loss = logit_adjusted_cross_entropy(**arguments, ignore_index=ignore_index, reduction="none", impl=impl)
    assert (loss == 0).tolist() == [False, True, False]
    assert loss.isfinite().all()


@pytest.mark.parametrize("label", OUT_OF_RANGE)
def test_under_vmap_a_label_out_of_range_makes_its_row_nan_and_no_other(impl, device, label):
    arguments = valid_arguments(device)
    target = torch.tensor([0, label, 4], device=device)

    def row_loss(row, row_target):  # a sum: a mean over a weight of NaN is NaN, whatever the row's loss is
        return logit_adjusted_cross_entropy(row, row_target, arguments["log_prior"], reduction="sum", impl=impl)

    def losses_and_gradients(target):
        return vmap(row_loss)(arguments["logits"], target), vmap(grad(row_loss))(arguments["logits"], target)

    loss, gradient = losses_and_gradients(target)
    good_loss, good_gradient = losses_and_gradients(arguments["target"])
    assert loss[1].isnan()
    assert gradient[1].isnan().all()
    assert torch.equal(loss[[0, 2]], good_loss[[0, 2]])
    assert torch.equal(gradient[[0, 2]], good_gradient[[0, 2]])


@pytest.mark.parametrize("label", [7, -1])
def test_under_vmap_one_of_several_labels_out_of_range_makes_its_row_nan(impl, device, label):
    arguments = valid_arguments(device, "weighted labels")
    arguments["target"][1, 1] = label
    class_weight = torch.arange(1.0, 6.0, device=device)
    options = dict(weight=class_weight, label_smoothing=0.1, reduction="sum", impl=impl)

    def row_loss(row, target, weight):
        return logit_adjusted_cross_entropy(row, target, arguments["log_prior"], target_weight=weight, **options)

    rows = arguments["logits"], arguments["target"], arguments["target_weight"]
    assert vmap(row_loss)(*rows).isnan().tolist() == [False, True, False]
    assert vmap(grad(row_loss))(*rows).isnan().all(1).tolist() == [False, True, False]
    assert vmap(grad(row_loss))(*rows).isnan().any(1).tolist() == [False, True, False]


def assert_all_nan_but_the_first(loss, gradient):
    assert loss[0].isfinite().all()
    assert gradient[0].isfinite().all()
    assert loss[1:].isnan().all()
    assert gradient[1:].isnan().all()


def losses_of_priors(device, impl):
    """(losses as a function of the log prior and the logits, logits, log priors); only the first prior is good."""
    arguments = valid_arguments(device)
    good = arguments.pop("log_prior")
    priors = torch.stack([good, good, good, torch.full_like(good, -math.inf)])
    priors[1, 3], priors[2, 3] = math.nan, math.inf
    logits = arguments.pop("logits")

    def losses(log_prior, logits=logits):
        return logit_adjusted_cross_entropy(
            logits, log_prior=log_prior, **arguments, tau=0.5, reduction="none", impl=impl
        )

    return losses, logits, priors


def test_under_vmap_an_impossible_log_prior_makes_loss_and_gradient_nan(impl, device):
    losses, logits, priors = losses_of_priors(device, impl)
    gradient = vmap(lambda prior: grad(lambda x: losses(prior, x).sum())(logits))(priors)
    assert_all_nan_but_the_first(vmap(losses)(priors), gradient)


def compiled_outcome(losses, logits, *rows):
    """Stacked losses and gradients of the compiled function: a tracer hides values from the checks."""
    torch.compiler.reset()
    compiled, outcomes = torch.compile(losses, fullgraph=True, backend="aot_eager"), []
    for row in rows:
        x = logits.detach().requires_grad_()
        loss = compiled(row, x)
        outcomes.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
    return [torch.stack(values) for values in zip(*outcomes, strict=True)]


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_a_traced_impossible_log_prior_makes_loss_and_gradient_nan(impl, cpu):
    losses, logits, priors = losses_of_priors(cpu, impl)
    assert_all_nan_but_the_first(*compiled_outcome(losses, logits, *priors))


def test_second_derivatives_of_an_impossible_log_prior_are_nan():
    """The other implementations differentiate the reference's closed-form gradient, which is tested here."""
    logits, log_prior = torch.zeros(1, 1, 5), torch.full((5,), -math.inf)
    problem = Problem(logits, log_prior, torch.zeros(1, 1, 1).long())
    assert fused_la.reference.gradient(problem, torch.ones(1, 1)).isnan().all()


@pytest.mark.parametrize("target_kind", INTERFACES)
def test_smoothing_toward_no_distribution_makes_loss_and_gradient_nan_if_values_are_hidden(impl, device, target_kind):
    arguments = valid_arguments(device, target_kind)
    logits = arguments.pop("logits")
    distributions = torch.tensor(
        [
            [0.5, 0.125, 0.125, 0.125, 0.125],
            [-0.5, 0.5, 0.5, 0.25, 0.25],
            [5.0, 4.0, 3.0, 2.0, 1.0],
            [0.25, 0.25, 0.25, 0.25, math.nan],
        ],
        device=device,
    )

    def losses(distribution, x=logits):
        return logit_adjusted_cross_entropy(
            x, **arguments, label_smoothing=0.1, smoothing_distribution=distribution, reduction="none", impl=impl
        )

    gradient = vmap(lambda q: grad(lambda x: losses(q, x).sum())(logits))(distributions)
    assert_all_nan_but_the_first(vmap(losses)(distributions), gradient)
    assert_all_nan_but_the_first(*compiled_outcome(losses, logits, *distributions))


def test_under_vmap_shapes_are_still_checked(impl, device):
    arguments = valid_arguments(device)

    def row_loss(row, target):
        return logit_adjusted_cross_entropy(row, target, arguments["log_prior"][:4], impl=impl)

    message = "log_prior must have shape (5,), got (4,)"
    assert_refused(ValueError, message, lambda: vmap(row_loss)(arguments["logits"], arguments["target"]))


def assert_compiled_loss_makes_the_row_nan(device, impl, backend, target_kind):
    """A tracer hides values from the checks, so a label out of range reaches every implementation."""
    torch.compiler.reset()
    arguments = valid_arguments(device, target_kind)
    logits, good = arguments["logits"].requires_grad_(), arguments["target"]
    options = {name: arguments[name] for name in arguments.keys() - {"logits", "target"}}
    options |= dict(weight=torch.arange(1.0, 6.0, device=device), label_smoothing=0.1, reduction="none", impl=impl)

    @torch.compile(fullgraph=True, backend=backend)
    def losses(logits, target):
        return logit_adjusted_cross_entropy(logits, target, **options)

    def loss_and_gradient(target):
        loss = losses(logits, target)
        return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]

    good_loss, good_gradient = loss_and_gradient(good)
    assert good_loss.isfinite().all()
    for label in OUT_OF_RANGE:
        bad = good.clone()
        bad.view(N_ROWS, -1)[1, -1] = label
        loss, gradient = loss_and_gradient(bad)
        assert loss[1].isnan(), label
        assert gradient[1].isnan().all(), label
        assert torch.equal(loss[[0, 2]], good_loss[[0, 2]]), label
        assert torch.equal(gradient[[0, 2]], good_gradient[[0, 2]]), label


@pytest.mark.parametrize("target_kind", ["index labels", "weighted labels"])
def test_a_traced_label_out_of_range_makes_its_row_nan_and_no_other(impl, device, target_kind):
    assert_compiled_loss_makes_the_row_nan(device, impl, "aot_eager", target_kind)


@pytest.mark.parametrize("target_kind", ["index labels", "weighted labels"])
def test_a_compiled_label_out_of_range_makes_its_row_nan_and_no_other(device, target_kind):
    assert_compiled_loss_makes_the_row_nan(device, "auto", "inductor", target_kind)


@pytest.mark.gpu
@pytest.mark.parametrize("label", OUT_OF_RANGE)
@pytest.mark.parametrize("n_labels", [1, 2])
def test_on_a_gpu_a_label_out_of_range_makes_its_row_nan_without_a_synchronisation(impl, device, label, n_labels):
    arguments = valid_arguments(device, "index labels" if n_labels == 1 else "weighted labels")
    good = {**arguments, "impl": impl, "reduction": "none"}
    bad = {**good, "target": arguments["target"].clone()}
    bad["target"].view(N_ROWS, n_labels)[1, -1] = label
    results = []
    for case in (good, bad):
        case["logits"] = arguments["logits"].clone().requires_grad_()
        logit_adjusted_cross_entropy(**case).sum().backward()  # compiles the kernels
        case["logits"].grad = None
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = logit_adjusted_cross_entropy(**case)
            loss.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append((loss.detach(), case["logits"].grad))
    (good_loss, good_gradient), (loss, gradient) = results
    assert loss[1].isnan()
    assert gradient[1].isnan().all()
    assert torch.equal(loss[[0, 2]], good_loss[[0, 2]])
    assert torch.equal(gradient[[0, 2]], good_gradient[[0, 2]])


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_on_a_gpu_an_impossible_log_prior_makes_the_loss_nan(impl, device, bad):
    arguments = valid_arguments(device)
    arguments["log_prior"][3] = bad
    assert logit_adjusted_cross_entropy(**arguments, reduction="none", impl=impl).isnan().all()


# Scalars and choices --------------------------------------------------------------------------------------------------


LEARN_TAU = "; to learn tau, or keep it in a tensor, pass tau * log_prior as log_prior and leave tau at 1"


@pytest.mark.parametrize("name", ["tau", "label_smoothing"])
@pytest.mark.parametrize("value", ["1", True, None, 1j, [1.0], np.ones(1), np.bool_(True), torch.tensor(0.5)], ids=repr)
def test_what_is_not_a_number_is_refused(impl, device, name, value):
    message = f"{name} must be a number, got {type(value).__name__}"
    if name == "tau" and isinstance(value, torch.Tensor):
        message += LEARN_TAU
    assert_loss_refuses(impl, device, TypeError, message, **{name: value})


@pytest.mark.parametrize("tau", [torch.tensor(1.0), torch.nn.Parameter(torch.ones(())), torch.ones(3)])
def test_a_tau_tensor_is_refused_with_the_way_to_learn_tau(tau):
    message = f"tau must be a number, got {type(tau).__name__}" + LEARN_TAU
    assert_refused(TypeError, message, lambda: LogitAdjustedCrossEntropyLoss(COUNTS, tau=tau))
    logits, log_prior = torch.randn(2, 5), torch.zeros(5)
    assert_refused(TypeError, message, lambda: fused_la.adjust_logits(logits, log_prior, tau))
    assert_refused(TypeError, message, lambda: fused_la.normalize_classifier(logits, tau))


@pytest.mark.parametrize("value", [-1.0, -1, -1e-30, math.nan, math.inf, -math.inf, 1e39, np.float32(-1)])
def test_tau_must_be_finite_and_not_negative(impl, device, value):
    assert_loss_refuses(impl, device, ValueError, f"tau must be finite and not negative, got {value}", tau=value)


@pytest.mark.parametrize("value", [-0.1, 1.1, 2, math.nan, math.inf, -math.inf])
def test_label_smoothing_must_be_a_share(impl, device, value):
    message = f"label_smoothing must be between 0 and 1, got {value}"
    assert_loss_refuses(impl, device, ValueError, message, label_smoothing=value)


@pytest.mark.parametrize("name", ["tau", "label_smoothing"])
@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.float64(0.5), np.int64(1)])
def test_numbers_of_python_and_numpy_are_taken(impl, device, name, value):
    expected = logit_adjusted_cross_entropy(**valid_arguments(device), impl=impl, **{name: float(value)})
    assert torch.equal(logit_adjusted_cross_entropy(**valid_arguments(device), impl=impl, **{name: value}), expected)


@pytest.mark.parametrize("value", [1.0, -100.0, "-100", None, True, torch.tensor(1)], ids=repr)
def test_ignore_index_must_be_an_int(impl, device, value):
    message = f"ignore_index must be an int, got {type(value).__name__}"
    assert_loss_refuses(impl, device, TypeError, message, ignore_index=value)


@pytest.mark.parametrize("value", [INT64.max + 1, 2**70, INT64.min - 1])
def test_ignore_index_must_fit_the_labels(impl, device, value):
    message = "ignore_index must fit in int64, got a number that does not"
    assert_loss_refuses(impl, device, ValueError, message, ignore_index=value)


@pytest.mark.parametrize("value", ["avg", "batchmean", "MEAN", "", None, True, 1, ["mean"], np.array(["mean", "sum"])])
def test_unknown_reductions_are_refused(impl, device, value):
    message = f"reduction must be 'none', 'mean' or 'sum', got {value!r}"
    assert_loss_refuses(impl, device, ValueError, message, reduction=value)


@pytest.mark.parametrize("value", ["cuda", "Triton", "", None, True, 1])
def test_unknown_implementations_are_refused(device, value):
    message = f"impl must be 'auto', 'triton', 'blocked' or 'reference', got {value!r}"
    assert_refused(ValueError, message, lambda: logit_adjusted_cross_entropy(**valid_arguments(device), impl=value))


def test_options_are_given_by_name(impl, device):
    arguments = valid_arguments(device, "weighted labels")
    weight = arguments.pop("target_weight")
    with pytest.raises(TypeError, match="takes from 3 to 4 positional arguments but 5 positional arguments"):
        logit_adjusted_cross_entropy(*arguments.values(), 1.0, weight, impl=impl)


# Implementations that cannot run --------------------------------------------------------------------------------------


NO_TRITON_HERE = (
    "impl must not be 'triton' for logits on {}: it runs on a GPU, or on a CPU in Triton's interpreter if "
    "TRITON_INTERPRET=1 is set before the first use"
)


def on_meta():
    return {name: value.to("meta") for name, value in valid_arguments("cpu").items()}


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_reference_gives_shapes_of_tensors_without_values(impl, reduction):
    arguments = on_meta()
    logits = arguments["logits"].requires_grad_()
    options = dict(weight=torch.ones(5, device="meta"), label_smoothing=0.1)
    loss = logit_adjusted_cross_entropy(**arguments, **options, reduction=reduction, impl=impl)
    assert loss.shape == (arguments["target"].shape if reduction == "none" else ())
    assert torch.autograd.grad(loss.sum(), logits)[0].shape == logits.shape


def test_blocked_is_refused_off_the_cpu():
    message = "impl must not be 'blocked' for logits on meta: it runs on a CPU"
    assert_refused(ValueError, message, lambda: logit_adjusted_cross_entropy(**on_meta(), impl="blocked"))


def test_triton_is_refused_off_the_gpu_and_the_interpreter():
    message = NO_TRITON_HERE.format("meta")
    assert_refused(ValueError, message, lambda: logit_adjusted_cross_entropy(**on_meta(), impl="triton"))


def test_triton_is_refused_on_a_cpu_without_the_interpreter():
    script = """
import torch
from fused_la import logit_adjusted_cross_entropy
logit_adjusted_cross_entropy(torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), torch.zeros(5), impl="triton")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(fused_la.__file__).parents[1])
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == "ValueError: " + NO_TRITON_HERE.format("cpu")


@pytest.mark.parametrize(
    ("name", "target_kind"),
    [
        ("target", "probabilities"),
        ("target_weight", "weighted labels"),
        ("weight", "index labels"),
        ("smoothing_distribution", "index labels"),
    ],
)
def test_a_fused_implementation_refuses_a_gradient_that_it_does_not_make(impl, device, name, target_kind):
    arguments = valid_arguments(device, target_kind)
    learned = arguments.get(name, torch.full((5,), 0.2, device=device)).requires_grad_()
    if impl == "reference":
        loss = logit_adjusted_cross_entropy(**{**arguments, name: learned}, label_smoothing=0.1, impl=impl)
        assert torch.autograd.grad(loss, learned)[0].shape == learned.shape
        return
    message = (
        "impl must be 'reference' or 'auto' for a gradient of target, target_weight, weight or smoothing_distribution, "
        f"got {impl!r}"
    )
    assert_loss_refuses(impl, device, ValueError, message, target_kind, **{name: learned})


# The module -----------------------------------------------------------------------------------------------------------

COUNTS = [40, 30, 15, 10, 5]


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ([], ValueError, "class_counts must have at least one class, got shape (0,)"),
        ([[[1, 2]]], ValueError, "class_counts must have shape (n_classes,) or (n_groups, n_classes), got (1, 1, 2)"),
        (5, ValueError, "class_counts must have shape (n_classes,) or (n_groups, n_classes), got ()"),
        ([1, -1], ValueError, "class_counts must be non-negative, got -1 for class 1 (1 of 2 classes)"),
        (
            [1, 0],
            ValueError,
            "class_counts must have examples of every class, got 0 for class 1 (1 of 2 classes); "
            "pass pseudocount > 0 (say 1), or exclude_absent=True for such classes to take no part",
        ),
        (["a"], TypeError, "class_counts must be integer or floating, got <U1"),
        (None, TypeError, "class_counts must be integer or floating, got NoneType"),
    ],
)
def test_the_module_refuses_unusable_counts(counts, error, message):
    assert_refused(error, message, lambda: LogitAdjustedCrossEntropyLoss(counts))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(tau=-1.0), ValueError, "tau must be finite and not negative, got -1.0"),
        (dict(tau=math.nan), ValueError, "tau must be finite and not negative, got nan"),
        (dict(tau=True), TypeError, "tau must be a number, got bool"),
        (dict(pseudocount=-1), ValueError, "pseudocount must be finite and non-negative, got -1"),
        (dict(pseudocount="1"), TypeError, "pseudocount must be a number, got str"),
        (dict(ignore_index=1.5), TypeError, "ignore_index must be an int, got float"),
        (dict(reduction="avg"), ValueError, "reduction must be 'none', 'mean' or 'sum', got 'avg'"),
        (dict(label_smoothing=2), ValueError, "label_smoothing must be between 0 and 1, got 2"),
        (dict(impl="cuda"), ValueError, "impl must be 'auto', 'triton', 'blocked' or 'reference', got 'cuda'"),
        (dict(weight=torch.ones(4)), ValueError, "weight must have shape (5,), got (4,)"),
        (dict(weight=torch.ones(5).long()), TypeError, FLOATING.format("weight", "torch.int64")),
        (
            dict(smoothing_distribution=torch.full((4,), 0.25)),
            ValueError,
            "smoothing_distribution must have shape (5,), got (4,)",
        ),
        (dict(smoothing_distribution=torch.ones(5)), ValueError, distribution_message("5", "1")),
    ],
)
def test_the_module_refuses_bad_options_before_training_starts(options, error, message):
    assert_refused(error, message, lambda: LogitAdjustedCrossEntropyLoss(COUNTS, **options))


@pytest.mark.parametrize("name", ["weight", "smoothing_distribution"])
@pytest.mark.parametrize(
    "value", ["abc", {0: 1.0}, [[0.5], [0.1, 0.2]], object()], ids=["str", "dict", "ragged", "object"]
)
def test_the_module_refuses_per_class_options_that_are_no_numbers(name, value):
    message = f"{name} must be a tensor, an array or a list of numbers, got {type(value).__name__}"
    assert_refused(TypeError, message, lambda: LogitAdjustedCrossEntropyLoss(COUNTS, **{name: value}))


def test_the_module_refuses_unusable_inputs(impl, device):
    criterion = LogitAdjustedCrossEntropyLoss(COUNTS, impl=impl).to(device)
    arguments = valid_arguments(device)
    logits, target = arguments["logits"], arguments["target"]
    assert math.isfinite(criterion(logits, target).item())

    other = f"target must be on the device of the logits, meta, got {target.device}" + MOVE
    assert_refused(ValueError, other, lambda: criterion(logits.to("meta"), target))
    too_few = "log_prior must have shape (4,), got (5,)"
    assert_refused(ValueError, too_few, lambda: criterion(logits[:, :4], target))
    assert_refused(TypeError, TARGET_DTYPE + "torch.int32" + LONG, lambda: criterion(logits, target.int()))
    needs_weight = INDEX_SHAPE + "(3, 1)" + SEVERAL
    assert_refused(ValueError, needs_weight, lambda: criterion(logits, target[:, None]))


def test_the_module_refuses_labels_out_of_range(impl, cpu):
    criterion = LogitAdjustedCrossEntropyLoss(COUNTS, ignore_index=-1, impl=impl)
    logits = valid_arguments(cpu)["logits"]
    assert_refused(IndexError, out_of_bounds(7, -1), lambda: criterion(logits, torch.tensor([0, 7, -1])))
