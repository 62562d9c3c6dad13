"""Class counts and log priors, of a data set and of a stream, against independent oracles: `Counter` and fractions.

Regimes: every dtype and container of labels or counts (uint64 does not fit a signed type, float16 overflows, NumPy
has no bfloat16); classes that never occur, especially the last one, which `bincount` without a minimum length drops;
ignored labels; groups; counts from one image to 1.6e10 pixels; one process and several; every error message, word for
word. A stream also casts, moves, saves and compiles.
"""

import copy
import doctest
import importlib
import math
import pickle
import re
from collections import Counter
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import DEVICE, run_on_two_ranks
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

import fused_la.prior
from fused_la import LogitAdjustedCrossEntropyLoss, LogitAdjustedLinear, logit_adjusted_cross_entropy
from fused_la._class_parallel.exchange import sum_over_group
from fused_la.metrics import BalancedError, shot_groups
from fused_la.posthoc import TauSweep
from fused_la.prior import RunningPrior, count_classes, log_prior_from_counts

TORCH_INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
TORCH_FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NUMPY_INTEGERS = [np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
NUMPY_FLOATS = [np.dtype(name) for name in ("float16", "float32", "float64", "longdouble")]

no_deadline = settings(deadline=None)  # the first example includes PyTorch's start


def test_docstring_examples_run():
    results = doctest.testmod(fused_la.prior)
    assert results.attempted >= 10
    assert results.failed == 0


# count_classes


@no_deadline
@given(
    n_classes=st.integers(1, 12),
    ignore_index=st.sampled_from([-100, -1, 0, 3, 255]),
    data=st.data(),
)
def test_counts_are_the_occurrences_of_each_class(n_classes, ignore_index, data):
    label = st.integers(0, n_classes - 1) | st.just(ignore_index)
    target = data.draw(st.lists(label, max_size=60))
    occurrences = Counter(label for label in target if label != ignore_index)

    class_counts = count_classes(target, n_classes, ignore_index=ignore_index)

    assert class_counts.tolist() == [occurrences[c] for c in range(n_classes)]
    assert class_counts.dtype == torch.int64


@no_deadline
@given(first=st.lists(st.integers(0, 4)), second=st.lists(st.integers(0, 4)))
def test_counts_of_two_parts_add_up_to_the_counts_of_the_whole(first, second):
    parts = count_classes(first, 5) + count_classes(second, 5)
    assert torch.equal(parts, count_classes(first + second, 5))


@pytest.mark.parametrize("dtype", TORCH_INTEGERS, ids=str)
def test_every_integer_tensor_is_counted(dtype):
    target = torch.tensor([[0, 2, 2], [100, 0, 0]]).to(dtype)
    assert count_classes(target, 4, ignore_index=100).tolist() == [3, 0, 2, 0]


@pytest.mark.parametrize("dtype", NUMPY_INTEGERS, ids=str)
def test_every_integer_array_is_counted(dtype):
    target = np.array([[0, 2, 2], [100, 0, 0]], dtype)
    assert count_classes(target, 4, ignore_index=100).tolist() == [3, 0, 2, 0]


def test_memory_that_pytorch_cannot_wrap_is_counted():
    read_only = np.array([0, 1, 1])
    read_only.flags.writeable = False
    for target in (read_only, read_only[::-1], read_only.astype(read_only.dtype.newbyteorder())):
        assert count_classes(target, 3).tolist() == [1, 2, 0]


def test_a_tensor_with_gaps_is_counted():
    target = torch.tensor([[0, 2, 1], [2, 2, 2]]).T[::2]  # 0 2, 1 2
    assert count_classes(target, 3).tolist() == [1, 1, 2]


@pytest.mark.parametrize(
    "target",
    [torch.tensor(1), 1, [[[1]]], (1,), [torch.tensor(1)], [np.int16(1)]],
    ids=["0-d tensor", "int", "nested", "tuple", "list of tensors", "list of NumPy ints"],
)
def test_any_shape_and_container_is_counted(target):
    assert count_classes(target, 2).tolist() == [0, 1]


@pytest.mark.parametrize("target", [[], [[], []], torch.empty(0, 3, dtype=torch.int32), np.empty(0, np.uint8)])
def test_an_empty_target_counts_nothing(target):
    assert count_classes(target, 3).tolist() == [0, 0, 0]


def test_classes_that_never_occur_keep_their_place():
    assert count_classes([1], 4).tolist() == [0, 1, 0, 0]


def test_ignored_labels_are_not_counted_even_if_they_are_classes():
    assert count_classes([0, 1, 1, 2], 3, ignore_index=1).tolist() == [1, 0, 1]
    assert count_classes([0, -100, -100], 3).tolist() == [1, 0, 0]
    assert count_classes([-100, -100], 3).tolist() == [0, 0, 0]


def test_target_is_not_modified():
    target = torch.tensor([0, -100, 1])
    count_classes(target, 2)
    assert target.tolist() == [0, -100, 1]


@pytest.mark.parametrize("n_classes", [np.int64(2), np.uint8(2)])
def test_numpy_integers_are_class_numbers(n_classes):
    assert count_classes([1], n_classes).tolist() == [0, 1]


WRAPS_TO_IGNORED = 2**64 - 100  # as int64 this is -100


@pytest.mark.parametrize(
    ("target", "value", "position"),
    [
        ([0, 3, 4], 3, 1),
        ([3], 3, 0),
        ([0, 2, -1], -1, 2),
        ([[0, 1], [-100, -5]], -5, 3),
        (torch.tensor([[0, 7], [9, 0]]), 7, 1),
        (torch.tensor([-128], dtype=torch.int8), -128, 0),
        (np.array([0, WRAPS_TO_IGNORED], np.uint64), WRAPS_TO_IGNORED, 1),
        (torch.tensor([0, WRAPS_TO_IGNORED], dtype=torch.uint64), WRAPS_TO_IGNORED, 1),
        (np.array([2**32]), 2**32, 0),
        (torch.tensor([2**32]), 2**32, 0),
    ],
)
def test_a_label_out_of_range_is_named_with_its_position(target, value, position):
    with pytest.raises(IndexError) as caught:
        count_classes(target, 3)
    assert str(caught.value) == (
        f"target must have entries in [0, 3) or equal to ignore_index = -100, got {value} at flat index {position}"
    )


def test_an_error_does_not_name_an_ignored_label():
    with pytest.raises(IndexError, match="got 5 at flat index 2"):
        count_classes([-1, -1, 5], 3, ignore_index=-1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": [0.0]}, TypeError, "target must be integer, got float64"),
        ({"target": torch.tensor([0.0]).half()}, TypeError, "target must be integer, got float16"),
        ({"target": torch.tensor([1j])}, TypeError, "target must be integer, got complex64"),
        ({"target": torch.empty(0)}, TypeError, "target must be integer, got float32"),
        ({"target": np.empty(0)}, TypeError, "target must be integer, got float64"),
        ({"target": [True, False]}, TypeError, "target must be integer, got bool"),
        ({"target": torch.tensor([True])}, TypeError, "target must be integer, got bool"),
        ({"target": ["cat"]}, TypeError, "target must be integer, got <U3"),
        ({"target": None}, TypeError, "target must be integer, got NoneType"),
        ({"target": [2**70]}, TypeError, "target must be integer, got list"),
        ({"target": [[0, 1], [0.5]]}, TypeError, "target must be integer, got float64"),
        ({"n_classes": 0}, ValueError, "n_classes must be positive, got 0"),
        ({"n_classes": -3}, ValueError, "n_classes must be positive, got -3"),
        ({"n_classes": True}, TypeError, "n_classes must be an integer, got bool"),
        ({"n_classes": 3.0}, TypeError, "n_classes must be an integer, got float"),
        ({"n_classes": "3"}, TypeError, "n_classes must be an integer, got str"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got NoneType"),
        ({"group": "gloo"}, TypeError, "group must be a torch.distributed ProcessGroup or None, got str"),
    ],
)
def test_wrong_arguments_of_count_classes_are_named(arguments, error, message):
    with pytest.raises(error) as caught:
        count_classes(**{"target": [0], "n_classes": 3, **arguments})
    assert str(caught.value) == message


# count_classes by group


@no_deadline
@given(n_classes=st.integers(1, 6), ignore_index=st.sampled_from([-100, 0, 2]), data=st.data())
def test_counts_by_group_are_the_occurrences_of_each_pair(n_classes, ignore_index, data):
    pairs = data.draw(
        st.lists(st.tuples(st.integers(0, n_classes - 1) | st.just(ignore_index), st.integers(0, 4)), max_size=60)
    )
    occurrences = Counter((g, c) for c, g in pairs if c != ignore_index)

    target, groups = [c for c, _ in pairs], [g for _, g in pairs]
    class_counts = count_classes(target, n_classes, ignore_index=ignore_index, groups=groups, n_groups=5)

    assert class_counts.tolist() == [[occurrences[g, c] for c in range(n_classes)] for g in range(5)]
    assert class_counts.dtype == torch.int64
    found = count_classes(target, n_classes, ignore_index=ignore_index, groups=groups)
    assert torch.equal(found, class_counts[: max((g + 1 for g, _ in occurrences), default=0)])


@pytest.mark.parametrize("kind", [*TORCH_INTEGERS, *NUMPY_INTEGERS, list], ids=str)
def test_groups_may_be_of_any_kind_and_shape(kind):
    groups = [[0, 2, 2], [0, 2, 0]]
    if isinstance(kind, torch.dtype):
        groups = torch.tensor(groups).to(kind)
    elif isinstance(kind, np.dtype):
        groups = np.asfortranarray(np.array(groups, kind))
    target = torch.tensor([[1, 0], [1, 1], [0, -100]], dtype=torch.int8).T  # not contiguous
    assert count_classes(target, 2, groups=groups).tolist() == [[1, 1], [0, 0], [1, 2]]


def test_the_group_of_an_ignored_entry_does_not_matter():
    for groups in ([0, 7, 1], [0, -5, 1], np.array([0, 2**64 - 1, 1], np.uint64)):
        for n_groups in (2, None):
            counts = count_classes([1, -100, 0], 2, groups=groups, n_groups=n_groups)
            assert counts.tolist() == [[0, 1], [1, 0]]


def test_groups_without_examples_keep_their_row_up_to_the_largest():
    assert count_classes([1], 2, groups=[1], n_groups=3).tolist() == [[0, 0], [0, 1], [0, 0]]
    assert count_classes([1], 2, groups=[1]).tolist() == [[0, 0], [0, 1]]
    assert count_classes([], 2, groups=[], n_groups=np.int64(2)).tolist() == [[0, 0], [0, 0]]
    assert count_classes([-100], 2, groups=[5]).shape == (0, 2)


@pytest.mark.parametrize(
    "sentences",
    [
        [[0, 1, -100], [2], [], [1]],
        ((0, 1, -100), (2, 1)),
        [np.array([0, 1]), np.array([2, 1, -100])],
        np.array([np.array([0, 1]), np.array([2, 1, -100])], dtype=object),
        [torch.tensor([0, 1]), torch.tensor([2, 1, -100])],
        [[[0], [1, -100]], [[2, 1]]],
    ],
    ids=str,
)
def test_labels_of_sentences_of_different_lengths_are_counted(sentences):
    assert count_classes(sentences, 3).tolist() == [1, 2, 1]
    with pytest.raises(IndexError, match="target must have entries in"):
        count_classes(sentences, 2)


def test_groups_of_sentences_of_different_lengths():
    assert count_classes([[0, 1], [2]], 3, groups=[[1, 0], [1]]).tolist() == [[0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"groups": [0.0, 1.0]}, TypeError, "groups must be integer, got float64"),
        ({"groups": torch.tensor([True, False])}, TypeError, "groups must be integer, got bool"),
        ({"groups": [0]}, ValueError, "groups must have the shape of target, (2,), got (1,)"),
        ({"groups": [[0, 1]]}, ValueError, "groups must have the shape of target, (2,), got (1, 2)"),
        ({"groups": [[0], [1, 2]]}, ValueError, "groups must have the shape of target, (2,), got (3,)"),
        ({"n_groups": 2}, ValueError, "n_groups must be None without groups, got 2"),
        ({"groups": [0, 1], "n_groups": 0}, ValueError, "n_groups must be positive, got 0"),
        ({"groups": [0, 1], "n_groups": 2.0}, TypeError, "n_groups must be an integer, got float"),
        ({"groups": [0, 2], "n_groups": 2}, IndexError,
         "groups must have entries in [0, 2) where target is not ignored, got 2 at flat index 1"),
        ({"groups": [-1, 2], "n_groups": 2}, IndexError,
         "groups must have entries in [0, 2) where target is not ignored, got -1 at flat index 0"),
        ({"groups": [0, -3]}, IndexError,
         "groups must have entries of at least 0 where target is not ignored, got -3 at flat index 1"),
        ({"groups": np.array([0, 2**64 - 3], np.uint64)}, IndexError,
         f"groups must have entries of at least 0 where target is not ignored, got {2**64 - 3} at flat index 1"),
        ({"groups": [0, 0], "target": [0, 3]}, IndexError,
         "target must have entries in [0, 3) or equal to ignore_index = -100, got 3 at flat index 1"),
    ],
)  # fmt: skip
def test_wrong_groups_are_named(arguments, error, message):
    with pytest.raises(error) as caught:
        count_classes(**{"target": [0, 1], "n_classes": 3, **arguments})
    assert str(caught.value) == message


def test_groups_are_counted_where_values_cannot_be_read_if_their_number_is_given():
    target, groups = torch.tensor([0, 2, -100, 2, 1]), torch.tensor([1, 0, 9, 0, 1])
    compiled = torch.compile(count_classes, fullgraph=True, backend="aot_eager")
    assert compiled(target, 3, groups=groups, n_groups=2).tolist() == [[0, 0, 2], [1, 1, 0]]
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(target), mode.from_tensor(groups)
        assert count_classes(fake[0], 3, groups=fake[1], n_groups=2).shape == (2, 3)
        with pytest.raises(ValueError, match=r"^n_groups must be given with groups that are fake .* got None$"):
            count_classes(fake[0], 3, groups=fake[1])


@pytest.mark.parametrize(("target", "groups"), [([3, 0], [0, 1]), ([-1, 0], [1, 1]), ([0, 0], [2, 0])], ids=str)
def test_what_is_out_of_range_is_never_counted_in_another_group(target, groups):
    """Flat indices of a table wrap into the row before or after; unread values raise in PyTorch's own check."""
    compiled = torch.compile(count_classes, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="out of bounds"):
        compiled(torch.tensor(target), 3, groups=torch.tensor(groups), n_groups=2)


# count_classes and RunningPrior over a process group


RANK_PROGRAM = """
import json, sys
import torch
import torch.distributed as dist
from fused_la.prior import RunningPrior, count_classes

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
target = [[0, 0, -100, 3], [3]][rank]
lopsided = [target, []][rank]  # the second rank has no examples
sites = [[0, 1, 5, 1], [2]][rank]  # the largest group is on the second rank
world = dist.group.WORLD
counted = {
    "world": count_classes(target, 5, group=world).tolist(),
    "alone": count_classes(target, 5).tolist(),
    "lopsided": count_classes(lopsided, 5, group=world).tolist(),
    "groups": count_classes(target, 4, groups=sites, group=world).tolist(),
    "groups, lopsided": count_classes(lopsided, 4, groups=[sites, []][rank], group=world).tolist(),
    "groups, alone": count_classes(target, 4, groups=sites).tolist(),
}


def error_of(call):
    try:
        call()
    except (TypeError, ValueError, IndexError) as error:
        return type(error).__name__ + ": " + str(error)


counted["errors"] = [
    error_of(lambda: count_classes(target, 4, groups=[sites, None][rank], group=world)),
    error_of(lambda: count_classes(target, 4, groups=sites, n_groups=[6, 3][rank], group=world)),
    error_of(lambda: count_classes(target, 4, groups=sites, n_groups=[6, None][rank], group=world)),
    error_of(lambda: count_classes(target, 4, groups=[sites, [-2]][rank], group=world)),
]
prior = RunningPrior(4, decay=0.5, group=world)
prior.update(torch.tensor(target))
prior.update(torch.tensor(lopsided, dtype=torch.int64))
counted["running"] = prior.class_counts.tolist()
counted["running error"] = error_of(lambda: prior.update(torch.tensor([[0], [4, 7]][rank])))
counted["running after the error"] = prior.class_counts.tolist()
counted["running, other numbers"] = error_of(lambda: RunningPrior(4 + rank, group=world).update(torch.tensor([0])))
wrong = [torch.tensor([0]), torch.tensor([0.5])][rank]
counted["running, wrong on one rank"] = error_of(lambda: prior.update(wrong))
dist.destroy_process_group()
print(json.dumps(counted))
"""


@pytest.mark.slow
def test_counts_are_summed_over_a_group_only_if_one_is_given(tmp_path):
    first, second = run_on_two_ranks(RANK_PROGRAM, tmp_path)
    for rank, alone in ((first, [2, 0, 0, 1, 0]), (second, [0, 0, 0, 1, 0])):
        assert rank["world"] == [2, 0, 0, 2, 0]
        assert rank["alone"] == alone
        assert rank["lopsided"] == [2, 0, 0, 1, 0]
        assert rank["groups"] == [[1, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 1]]
        assert rank["groups, lopsided"] == [[1, 0, 0, 0], [1, 0, 0, 1]]
        assert rank["errors"][:3] == [
            "ValueError: groups must be given or None on every rank, got given on rank 0, None on rank 1",
            "ValueError: n_groups must be the same on every rank, got 6 on rank 0, 3 on rank 1",
            "ValueError: n_groups must be the same on every rank, got 6 on rank 0, None on rank 1",
        ]
        assert rank["errors"][3].endswith(
            "groups must have entries of at least 0 where target is not ignored, got -2 at flat index 0"
        )
        assert rank["running"] == [1.0 + 2.0, 0.0, 0.0, 0.5 * 2.0 + 1.0]
        assert rank["running error"] == (
            "IndexError: target must hold class indices in [0, 4) or ignore_index (-100), got 2 labels that are neither"
        )
        assert rank["running after the error"] == rank["running"]
        assert rank["running, other numbers"] == (
            "ValueError: n_classes must be the same on every rank, got 4 on rank 0, 5 on rank 1"
        )
        assert rank["running, wrong on one rank"].startswith("TypeError: ")
        assert rank["running, wrong on one rank"].endswith("target must be integer, got float32")
    assert first["groups, alone"] == [[1, 0, 0, 0], [1, 0, 0, 1]]
    assert second["groups, alone"] == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert first["errors"][3].startswith("IndexError: rank 1 raised an error in count_classes: groups")


@pytest.fixture
def lone_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_running_prior_over_a_group_is_copied_and_says_that_it_is_not_pickled(lone_group):
    prior = RunningPrior(3, decay=0.5, group=lone_group)
    prior.update(torch.tensor([0, 2]))
    twin = copy.deepcopy(torch.nn.ModuleList([prior]))[0]
    assert twin.group is lone_group
    twin.update(torch.tensor([1]))
    assert twin.class_counts.tolist() == [0.5, 1.0, 0.5]
    assert prior.class_counts.tolist() == [1.0, 0.0, 1.0]
    with pytest.raises(TypeError, match="group must be None to pickle a RunningPrior"):
        pickle.dumps(prior)
    alone = RunningPrior(3)
    alone.update(torch.tensor([0, 2]))
    for again in (copy.deepcopy(alone), pickle.loads(pickle.dumps(alone))):
        assert torch.equal(again.update(torch.tensor([1])), copy.deepcopy(alone).update(torch.tensor([1])))


@pytest.mark.parametrize("arguments", [{"groups": [0, 10**15]}, {"groups": [0, 1], "n_groups": 2**62}])
def test_ids_that_are_no_numbers_of_groups_are_named(arguments):
    with pytest.raises(ValueError, match=r"groups must be numbers from 0 on, got \d+ groups of 4 classes, too many"):
        count_classes([0, 1], 4, **arguments)


def test_without_a_group_nothing_is_communicated(lone_group, monkeypatch):
    def all_reduce(*args, **kwargs):
        raise AssertionError("communicated")

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    assert count_classes([0], 2).tolist() == [1, 0]
    with pytest.raises(AssertionError, match="communicated"):
        count_classes([0], 2, group=lone_group)


@pytest.mark.parametrize(
    ("backend_config", "device_type"),
    [("meta:nccl", "meta"), ("cpu:gloo,meta:nccl", "cpu"), ("meta:nccl,cpu:gloo", "cpu")],
)
def test_counts_are_reduced_on_a_device_that_the_backend_supports(lone_group, monkeypatch, backend_config, device_type):
    """Labels on the CPU under NCCL; "meta" replaces the device that such a backend needs."""
    reduced_on = []

    class Reduced(Exception):
        pass

    def all_reduce(tensor, **kwargs):
        reduced_on.append(tensor.device.type)
        raise Reduced

    monkeypatch.setattr(dist, "get_backend_config", lambda group: backend_config)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with pytest.raises(Reduced):
        sum_over_group(torch.tensor([1, 0]), lone_group)
    assert reduced_on == [device_type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nccl_counts_come_back_on_the_device_of_the_target(device):
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        class_counts = count_classes(torch.tensor([0, 2], device=device), 3, group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert class_counts.device.type == device
    assert class_counts.tolist() == [1, 0, 1]


# log_prior_from_counts


def exact_log_prior(class_counts, pseudocount=0.0):
    """log((n_c + a) / (sum n + C a)), rounded only in the logarithm."""
    smoothed = [Fraction(count) + Fraction(pseudocount) for count in class_counts]
    priors = [count / sum(smoothed) for count in smoothed]
    return [math.log(prior) if prior < 0.5 else math.log1p(prior - 1) for prior in priors]


def assert_close_to_exact(log_prior, exact):
    """Within half an ulp of float32, plus the rounding of a float64 quotient (visible if a prior is near 1)."""
    exact = np.array(exact)
    tolerance = 0.5001 * np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64) + 4 * 2.0**-52
    assert log_prior.dtype == torch.float32
    assert (np.abs(log_prior.double().numpy() - exact) <= tolerance).all()


counts_of_integers = st.lists(st.integers(1, 10) | st.integers(1, 2 * 10**10), min_size=1, max_size=40)


@no_deadline
@given(counts_of_integers)
def test_log_prior_is_the_log_of_the_frequency(class_counts):
    assert_close_to_exact(log_prior_from_counts(class_counts), exact_log_prior(class_counts))


@no_deadline
@given(
    st.lists(st.integers(0, 5) | st.integers(0, 2 * 10**10), min_size=1, max_size=40).filter(any),
    st.floats(1e-3, 1e3),
)
def test_pseudocount_credits_every_class_with_examples(class_counts, pseudocount):
    log_prior = log_prior_from_counts(class_counts, pseudocount=pseudocount)
    assert_close_to_exact(log_prior, exact_log_prior(class_counts, pseudocount))


@no_deadline
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40))
def test_fractional_counts_are_frequencies_too(class_counts):
    assert_close_to_exact(log_prior_from_counts(class_counts), exact_log_prior(class_counts))


@no_deadline
@given(counts_of_integers)
def test_the_prior_sums_to_one(class_counts):
    total = log_prior_from_counts(class_counts).double().exp().sum().item()
    assert total == pytest.approx(1, abs=1e-6)


@no_deadline
@given(counts_of_integers, st.randoms())
def test_the_order_of_the_classes_does_not_matter(class_counts, random):
    order = random.sample(range(len(class_counts)), len(class_counts))
    log_prior = log_prior_from_counts(class_counts)
    assert torch.equal(log_prior_from_counts([class_counts[c] for c in order]), log_prior[order])


@no_deadline
@given(
    st.lists(st.floats(0, allow_infinity=False), min_size=1, max_size=8).filter(any),
    st.floats(0, allow_infinity=False),
)
@example([1e308, 1e308], 0.0)  # the sum overflows
@example([1e308, 1e308], 1e308)  # each term overflows
@example([1e-300, 1e300], 0.0)  # the quotient underflows
def test_counts_give_finite_log_priors_or_an_error(class_counts, pseudocount):
    """Also if sums overflow or quotients underflow."""
    try:
        log_prior = log_prior_from_counts(class_counts, pseudocount=pseudocount)
    except ValueError:
        return
    assert log_prior.isfinite().all()


@pytest.mark.parametrize("dtype", TORCH_INTEGERS + TORCH_FLOATS, ids=str)
def test_the_dtype_of_a_tensor_of_counts_does_not_matter(dtype):
    class_counts = torch.tensor([100, 7, 1]).to(dtype)
    assert torch.equal(log_prior_from_counts(class_counts), log_prior_from_counts([100, 7, 1]))


@pytest.mark.parametrize("dtype", NUMPY_INTEGERS + NUMPY_FLOATS, ids=str)
def test_the_dtype_of_an_array_of_counts_does_not_matter(dtype):
    class_counts = np.array([100, 7, 1], dtype)
    for array in (class_counts, class_counts[::-1][::-1], class_counts.astype(dtype.newbyteorder())):
        assert torch.equal(log_prior_from_counts(array), log_prior_from_counts((100, 7, 1)))


def test_float16_counts_lose_nothing_below_their_overflow():
    class_counts = torch.tensor([65504.0, 1.0], dtype=torch.float16)
    assert_close_to_exact(log_prior_from_counts(class_counts), exact_log_prior([65504, 1]))


@pytest.mark.parametrize(
    "class_counts",
    [np.array([2**64 - 1, 2**63, 1], np.uint64), torch.tensor([2**64 - 1, 2**63, 1], dtype=torch.uint64)],
    ids=["array", "tensor"],
)
def test_uint64_counts_do_not_turn_negative(class_counts):
    assert_close_to_exact(log_prior_from_counts(class_counts), exact_log_prior([2**64 - 1, 2**63, 1]))


def test_the_deep_tail_keeps_its_prior():
    """The rarest class of iNaturalist 2018: a constant added inside the logarithm would raise its prior."""
    log_prior = log_prior_from_counts([437_511, 2])
    assert log_prior[1].item() == pytest.approx(math.log(2 / 437_513), rel=1e-7)


def test_pixel_counts_beyond_int32_keep_their_prior():
    assert_close_to_exact(log_prior_from_counts([16_000_000_000, 3]), exact_log_prior([16_000_000_000, 3]))


def test_a_single_class_is_certain():
    assert log_prior_from_counts([5]).tolist() == [0.0]


def test_counts_that_require_grad_give_a_log_prior_that_does_not():
    class_counts = torch.tensor([1.0, 3.0], requires_grad=True)
    assert not log_prior_from_counts(class_counts).requires_grad
    assert class_counts.tolist() == [1.0, 3.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_results_come_back_on_the_device_of_the_argument():
    target = torch.tensor([0, 1, 1, 2], device="cuda")
    class_counts = count_classes(target, 3)
    log_prior = log_prior_from_counts(class_counts)
    assert class_counts.device == log_prior.device == target.device
    assert torch.equal(log_prior.cpu(), log_prior_from_counts([1, 2, 1]))


@pytest.mark.parametrize("pseudocount", [1, 1.0, np.float32(1), np.int64(1), Fraction(1)], ids=repr)
def test_any_real_number_is_a_pseudocount(pseudocount):
    log_prior = log_prior_from_counts([3, 0], pseudocount=pseudocount)
    assert_close_to_exact(log_prior, exact_log_prior([3, 0], 1))


NO_EXAMPLES = "; pass pseudocount > 0 (say 1), or exclude_absent=True for such classes to take no part"
MANY_ZEROS = ", ".join(f"0 for class {c}" for c in range(1, 11)) + " and 2 more (12 of 13 classes)"


@pytest.mark.parametrize(
    ("class_counts", "error", "message"),
    [
        (torch.tensor([True]), TypeError, "class_counts must be integer or floating, got bool"),
        ([True, False], TypeError, "class_counts must be integer or floating, got bool"),
        (torch.tensor([1j]), TypeError, "class_counts must be integer or floating, got complex64"),
        ([1j], TypeError, "class_counts must be integer or floating, got complex128"),
        (["9"], TypeError, "class_counts must be integer or floating, got <U1"),
        ({0: 1, 1: Fraction(1, 2)}, TypeError, "class_counts must be integer or floating, got Fraction"),
        ([3, None], TypeError, "class_counts must be integer or floating, got NoneType"),
        ({0: "9"}, TypeError, "class_counts must be integer or floating, got <U1"),
        (None, TypeError, "class_counts must be integer or floating, got NoneType"),
        (
            [[1], [2, 3]],
            ValueError,
            "class_counts must be rectangular, got nested sequences of different lengths",
        ),
        (3, ValueError, "class_counts must have shape (n_classes,) or (n_groups, n_classes), got ()"),
        (
            torch.ones(1, 2, 3),
            ValueError,
            "class_counts must have shape (n_classes,) or (n_groups, n_classes), got (1, 2, 3)",
        ),
        ([], ValueError, "class_counts must have at least one class, got shape (0,)"),
        (torch.empty(0), ValueError, "class_counts must have at least one class, got shape (0,)"),
        (
            [1, math.nan, -1, math.inf],
            ValueError,
            "class_counts must have no NaN, got nan for class 1 (1 of 4 classes)",
        ),
        (
            [math.inf, 1, -math.inf],
            ValueError,
            "class_counts must be finite, got inf for class 0, -inf for class 2 (2 of 3 classes)",
        ),
        (
            torch.tensor([1.0, 65520.0]).half(),
            ValueError,
            "class_counts must be finite, got inf for class 1 (1 of 2 classes) "
            "(float16 counts overflow past 65504: count in int64)",
        ),
        (
            np.array([np.inf, 1], np.float16),
            ValueError,
            "class_counts must be finite, got inf for class 0 (1 of 2 classes) "
            "(float16 counts overflow past 65504: count in int64)",
        ),
        (
            [-12345678901, 5, -2.5],
            ValueError,
            "class_counts must be non-negative, got -12345678901 for class 0, -2.5 for class 2 (2 of 3 classes)",
        ),
        ([0, 0], ValueError, "class_counts must have a positive count, got 0 for all 2 classes"),
        (
            [4, 0, 1],
            ValueError,
            f"class_counts must have examples of every class, got 0 for class 1 (1 of 3 classes){NO_EXAMPLES}",
        ),
        (
            [1] + 12 * [0],
            ValueError,
            f"class_counts must have examples of every class, got {MANY_ZEROS}{NO_EXAMPLES}",
        ),
    ],
)
def test_class_counts_that_give_no_prior_are_named(class_counts, error, message):
    with pytest.raises(error) as caught:
        log_prior_from_counts(class_counts)
    assert str(caught.value) == message


def test_no_examples_at_all_are_an_error_whatever_the_pseudocount():
    with pytest.raises(ValueError, match="class_counts must have a positive count, got 0 for all 2 classes"):
        log_prior_from_counts([0, 0], pseudocount=1.0)


@pytest.mark.parametrize(
    ("pseudocount", "error", "message"),
    [
        (-0.5, ValueError, "pseudocount must be finite and non-negative, got -0.5"),
        (math.nan, ValueError, "pseudocount must be finite and non-negative, got nan"),
        (math.inf, ValueError, "pseudocount must be finite and non-negative, got inf"),
        ("1", TypeError, "pseudocount must be a number, got str"),
        (True, TypeError, "pseudocount must be a number, got bool"),
        (None, TypeError, "pseudocount must be a number, got NoneType"),
        (1j, TypeError, "pseudocount must be a number, got complex"),
    ],
)
def test_wrong_pseudocounts_are_named(pseudocount, error, message):
    with pytest.raises(error) as caught:
        log_prior_from_counts([1, 2], pseudocount=pseudocount)
    assert str(caught.value) == message


# Counts by class: mappings and pandas series

LABELS = [2, 0, 3, 2, 2, 1, 0, 2]  # most frequent first: 2, 0, then 1 and 3


@pytest.mark.parametrize(
    "counted",
    [
        Counter(LABELS),
        dict(Counter(LABELS)),
        pd.Series(LABELS).value_counts(),
        pd.Series(LABELS).value_counts(ascending=True).astype("float32"),
        pd.Series(LABELS, dtype="category").value_counts(),
        pd.Series(LABELS, dtype="float64").value_counts(),  # pandas makes labels floating if one is missing
        pd.Series(LABELS, dtype="Int64").value_counts(),
        pd.Series([2, 1, 4, 1]),
        {np.int64(3): np.int32(1), 1: 1.0, 0: 2, 2: 4},
        MappingProxyType({3: 1, 1: 1, 0: 2, 2: 4}),
        {3: torch.tensor(1), 1: torch.tensor(1), 0: torch.tensor(2), 2: torch.tensor(4)},
    ],
    ids=lambda counted: type(counted).__name__,
)
def test_counts_by_class_are_taken_in_the_order_of_the_classes(counted):
    assert_close_to_exact(log_prior_from_counts(counted), exact_log_prior([2, 1, 4, 1]))
    assert_close_to_exact(log_prior_from_counts(counted, pseudocount=2), exact_log_prior([2, 1, 4, 1], 2))


@pytest.mark.parametrize("kind", ["module", "head", "metric", "groups", "sweep"])
def test_every_class_counts_argument_accepts_counts_by_class(kind):
    counted = pd.Series([0] * 3 + [1] * 50 + [2] * 200).value_counts()  # most frequent first: 2, 1, 0
    if kind == "module":
        assert LogitAdjustedCrossEntropyLoss(counted).class_counts.tolist() == [3, 50, 200]
    elif kind == "head":
        assert LogitAdjustedLinear(2, counted.to_dict()).class_counts.tolist() == [3, 50, 200]
    else:
        if kind == "metric":
            groups = BalancedError(Counter(counted.to_dict())).groups
        elif kind == "groups":
            groups = shot_groups(counted)
        else:
            groups = TauSweep(torch.zeros(3), [1.0], split="val", class_counts=counted)._groups
        assert [groups[name].tolist().index(True) for name in ("few", "medium", "many")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("counted", "message"),
    [
        (
            {0: 3, 2: 1, 5: 1},
            "class_counts must have a count for each class from 0 to 5, got none for 1, 3, 4 (3 of 6 classes); "
            "a class without examples has the count 0",
        ),
        (
            {1: 3, 2: 1},
            "class_counts must have a count for each class from 0 to 2, got none for 0 (1 of 3 classes); "
            "a class without examples has the count 0",
        ),
        (
            {40: 1},
            "class_counts must have a count for each class from 0 to 40, got none for 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, "
            "... (40 of 41 classes); a class without examples has the count 0",
        ),
        (
            {0: 3, "lynx": 1, -100: 2},
            "class_counts must have the classes 0, 1, ... as its keys, got 'lynx', -100 (2 of 3 keys); counts in the "
            "order of the classes may be a list or an array",
        ),
        (
            {"0": 3, "1": 2},
            "class_counts must have the classes 0, 1, ... as its keys, got '0', '1' (2 of 2 keys); counts in the "
            "order of the classes may be a list or an array",
        ),
        (
            {0: 3, 0.5: 2, True: 1},
            "class_counts must have the classes 0, 1, ... as its keys, got 0.5, True (2 of 3 keys); counts in the "
            "order of the classes may be a list or an array",
        ),
        (
            pd.Series([3, 1, 2], index=[0, 1, 1]),
            "class_counts must have every class once among its keys, got 1 twice",
        ),
        (
            {0: 4, 10**12: 1},
            "class_counts must have a count for each class from 0 to 1000000000000, got none for 1, 2, 3, 4, 5, 6, 7, "
            "8, 9, 10, ... (999999999999 of 1000000000001 classes); a class without examples has the count 0",
        ),
        ({}, "class_counts must have at least one class, got shape (0,)"),
        (Counter(), "class_counts must have at least one class, got shape (0,)"),
        ({0: 2, 1: -1}, "class_counts must be non-negative, got -1 for class 1 (1 of 2 classes)"),
    ],
)
def test_an_error_names_keys_that_are_not_the_classes(counted, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        log_prior_from_counts(counted)


def test_a_data_frame_is_refused():
    """Its columns need not be in the order of the classes, as those of `pd.crosstab` are not if a class is missing."""
    message = (
        "class_counts must not be a table, got DataFrame: its rows and columns may be in any order; .to_numpy() makes "
        "an array of it"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        log_prior_from_counts(pd.DataFrame({0: [1, 2], 1: [3, 4]}))


def test_counts_by_class_have_no_groups():
    """Their classes would come first, and groups second."""
    for counted in ({0: [1, 2], 1: [3, 4]}, {0: torch.tensor([1, 2]), 1: torch.tensor([3, 4])}):
        with pytest.raises(
            ValueError, match=r"^class_counts must have one number for each of its keys, got shape \(2,"
        ):
            log_prior_from_counts(counted)


# Counts of groups


@no_deadline
@given(st.lists(st.lists(st.integers(1, 10) | st.integers(1, 2 * 10**10), min_size=3, max_size=3), min_size=1))
def test_every_group_has_the_log_prior_of_its_own_counts(class_counts):
    log_prior = log_prior_from_counts(class_counts)
    assert log_prior.shape == (len(class_counts), 3)
    for row, counts in zip(log_prior, class_counts, strict=True):
        assert_close_to_exact(row, exact_log_prior(counts))


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list, lambda counts: torch.tensor(counts).bfloat16()])
def test_groups_take_the_same_pseudocount_and_exclusion(kind):
    counts = [[4, 0, 2], [0, 1, 0], [0, 0, 5]]
    smoothed = log_prior_from_counts(kind(counts), pseudocount=0.5)
    excluded = log_prior_from_counts(kind(counts), exclude_absent=True)
    for g, row in enumerate(counts):
        assert_close_to_exact(smoothed[g], exact_log_prior(row, 0.5))
        assert (excluded[g] == -math.inf).tolist() == [count == 0 for count in row]
        assert_close_to_exact(excluded[g][torch.tensor(row) > 0], exact_log_prior([count for count in row if count]))
    counted = count_classes([0, 2, 2, 1, 0, 0, 0], 3, groups=[0, 0, 0, 1, 0, 0, 0])
    assert torch.equal(log_prior_from_counts(counted, exclude_absent=True), excluded[:2])


def test_a_group_without_examples_has_a_uniform_prior_under_a_pseudocount():
    log_prior = log_prior_from_counts([[3, 1], [0, 0]], pseudocount=2.0)
    assert_close_to_exact(log_prior[0], exact_log_prior([3, 1], 2))
    assert_close_to_exact(log_prior[1], [math.log(0.5)] * 2)


@pytest.mark.parametrize(
    ("class_counts", "options", "message"),
    [
        (
            [[4, 0, 1], [1, 1, 0]],
            {},
            "class_counts must have examples of every class, got 0 for class 1 of group 0, 0 for class 2 of group 1 "
            f"(2 of 6 counts){NO_EXAMPLES}",
        ),
        (
            [[4, 1], [0, 0], [0, 0]],
            {"exclude_absent": True},
            "class_counts must have examples of every group, got 0 for all classes of group 1, 2 (2 of 3 groups); pass "
            "pseudocount > 0 (say 1), or leave such groups out",
        ),
        (
            [[0, 0], [0, 0]],
            {"pseudocount": 1.0},
            "class_counts must have a positive count, got 0 for all 2 classes of all 2 groups",
        ),
        ([[3, 1], [2, -4]], {}, "class_counts must be non-negative, got -4 for class 1 of group 1 (1 of 4 counts)"),
        (
            torch.tensor([[3.0, math.nan], [2.0, 1.0]]),
            {},
            "class_counts must have no NaN, got nan for class 1 of group 0 (1 of 4 counts)",
        ),
        (
            [[1.0, 1.0], [1e308, 1e308]],
            {},
            "class_counts must have a sum below 1.8e308 with pseudocount, got a larger one",
        ),
        (torch.ones(0, 3), {}, "class_counts must have at least one group and class, got shape (0, 3)"),
        (np.ones((2, 0)), {}, "class_counts must have at least one group and class, got shape (2, 0)"),
    ],
)  # fmt: skip
def test_counts_of_groups_that_give_no_prior_are_named(class_counts, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        log_prior_from_counts(class_counts, **options)


def test_counts_of_groups_are_no_counts_of_a_training_set():
    with pytest.raises(ValueError, match=re.escape("class_counts must have shape (n_classes,), got (2, 3)")):
        shot_groups(torch.ones(2, 3))


# exclude_absent


def test_absent_classes_are_excluded_on_request():
    log_prior = log_prior_from_counts([4, 0, 2, 0, 2], exclude_absent=True)
    assert_close_to_exact(log_prior[[0, 2, 4]], exact_log_prior([4, 2, 2]))
    assert (log_prior[[1, 3]] == -math.inf).all()
    assert torch.equal(log_prior_from_counts([3, 1], exclude_absent=True), log_prior_from_counts([3, 1]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(pseudocount=1), ValueError, "pseudocount must be 0 with exclude_absent=True, got 1"),
        (dict(exclude_absent=1), TypeError, "exclude_absent must be True or False, got int"),
        (dict(class_counts=[0, 0]), ValueError, "class_counts must have a positive count, got 0 for all 2 classes"),
        (
            dict(class_counts=[1e308, 1e-308]),  # the class has examples, but its frequency underflows
            ValueError,
            f"class_counts must have examples of every class, got 1e-308 for class 1 (1 of 2 classes){NO_EXAMPLES}",
        ),
    ],
)
def test_wrong_arguments_with_exclude_absent_are_named(arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        log_prior_from_counts(**{"class_counts": [4, 0], "exclude_absent": True, **arguments})


# RunningPrior


def batches(n_classes, n_batches=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(n_classes, (4 + i, 3), generator=generator) for i in range(n_batches)]


@pytest.mark.parametrize("decay", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("pseudocount", [1.0, 0.25, 1e-30])
def test_a_running_prior_is_that_of_decayed_counts(decay, pseudocount):
    """In fractions; the decays are powers of two, so the counts are exact in float64 too."""
    prior, counts = RunningPrior(5, decay=decay, pseudocount=pseudocount), [Fraction(0)] * 5
    assert_close_to_exact(prior.log_prior, [math.log(0.2)] * 5)
    for batch in batches(4):  # class 4 never comes
        log_prior = prior.update(batch)
        occurrences = Counter(batch.flatten().tolist())
        counts = [Fraction(decay) * counts[c] + occurrences[c] for c in range(5)]
        assert prior.class_counts.tolist() == counts
        assert_close_to_exact(log_prior, exact_log_prior(counts, pseudocount))
        assert torch.equal(log_prior, prior.log_prior)
    assert prior.class_counts.dtype == torch.float64


def test_a_running_prior_does_not_count_ignored_labels():
    prior = RunningPrior(3, ignore_index=255)
    prior.update(torch.tensor([[0, 255], [255, 2]], dtype=torch.uint8))
    assert prior.class_counts.tolist() == [1.0, 0.0, 1.0]
    prior = RunningPrior(3, ignore_index=1, decay=1.0)
    prior.update(torch.tensor([1, 1, 2], dtype=torch.int32))
    prior.update(torch.tensor([], dtype=torch.int64))
    assert prior.class_counts.tolist() == [0.0, 0.0, 1.0]


def test_no_class_is_ever_at_minus_infinity():
    """Neither one that never comes, nor one that was forgotten, nor under the smallest pseudocount."""
    prior = RunningPrior(3, decay=1e-3, pseudocount=1e-30)
    prior.update(torch.ones(10_000, dtype=torch.int64))
    for _ in range(200):  # 1e-3 to the 200th power is 0
        log_prior = prior.update(torch.zeros(10_000, dtype=torch.int64))
    assert prior.class_counts[1] == 0.0
    assert_close(log_prior[1:], torch.full((2,), math.log(1e-30) - math.log(10_000 / (1 - 1e-3))), rtol=1e-6, atol=0.0)


def test_a_label_out_of_range_raises_and_nothing_is_counted():
    prior = RunningPrior(3)
    prior.update(torch.tensor([0, 1]))
    before = prior.class_counts.clone()
    for target, n in ((torch.tensor([0, 3, -1]), 2), (torch.tensor([-128], dtype=torch.int8), 1)):
        message = f"target must hold class indices in [0, 3) or ignore_index (-100), got {n} labels that are neither"
        with pytest.raises(IndexError, match=f"^{re.escape(message)}$"):
            prior.update(target)
    assert torch.equal(prior.class_counts, before)


def test_a_log_prior_that_a_loss_keeps_for_its_gradient_stays_as_it_was():
    prior, logits = RunningPrior(3), torch.randn(4, 3, requires_grad=True)
    target = torch.tensor([0, 1, 1, 1])
    log_prior = prior.update(target)
    loss = logit_adjusted_cross_entropy(logits, target, log_prior)
    want = F.cross_entropy(logits.detach().requires_grad_() + log_prior, target)
    assert not prior.update(torch.tensor([2, 2, 2])).equal(log_prior)
    (got,) = torch.autograd.grad(loss, logits)
    exact = logits.detach().double().requires_grad_()
    F.cross_entropy(exact + torch.tensor([2.0, 4.0, 1.0], dtype=torch.float64).log(), target).backward()
    assert_close(loss, want)
    assert_close(got.double(), exact.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "convert",
    [
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.float(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
        lambda module: module.type(torch.float32),
        lambda module: copy.deepcopy(module).half(),
        lambda module: module.requires_grad_(False).train().double(),
    ],
)
def test_casts_do_not_round_the_counts(convert):
    prior = RunningPrior(3, decay=1.0)
    prior.update(torch.tensor([0] * 4097 + [1]))  # 4097 has 13 bits
    log_prior = prior.log_prior
    module = convert(torch.nn.Sequential(torch.nn.Linear(2, 3), prior))
    assert module[1].class_counts.tolist() == [4097.0, 1.0, 0.0]
    assert module[1].class_counts.dtype == torch.float64
    assert torch.equal(module[1].log_prior, log_prior)


def test_a_running_prior_moves_and_starts_anew_with_its_module():
    module = torch.nn.Sequential(RunningPrior(3)).to("meta")
    assert module[0].class_counts.is_meta
    module = module.to_empty(device="cpu")
    module[0].class_counts.fill_(math.nan)  # what fresh memory may hold
    module[0].reset_parameters()
    assert module[0].class_counts.tolist() == [0.0, 0.0, 0.0]
    assert module[0].class_counts.dtype == torch.float64


def test_update_reads_no_value_where_that_would_wait():
    """Tensors on the meta device have none, and are not read as those on a GPU are not."""
    prior = RunningPrior(3).to("meta")
    assert prior.update(torch.zeros(5, dtype=torch.int64, device="meta")).shape == (3,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_does_not_wait_for_a_gpu():
    prior = RunningPrior(3).to("cuda")
    logits = torch.randn(4, 3, device="cuda", requires_grad=True)
    target = torch.tensor([0, 1, 7, -100], device="cuda")  # 7 is not counted, and its row is NaN
    logit_adjusted_cross_entropy(logits, target, prior.update(target)).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        prior.add_classes(1)
        more = F.pad(logits, (0, 1))
        logit_adjusted_cross_entropy(more, target, prior.update(target)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(prior.class_counts.cpu(), torch.tensor([1.99, 1.99, 0.0, 0.0], dtype=torch.float64))


def test_classes_may_be_added_between_steps():
    prior = RunningPrior(2, decay=0.5)
    prior.update(torch.tensor([0, 0, 1]))
    prior.add_classes(2)
    assert prior.class_counts.tolist() == [2.0, 1.0, 0.0, 0.0]
    assert_close_to_exact(prior.update(torch.tensor([3, 3])), exact_log_prior([1, 0.5, 0, 2], 1))
    assert repr(prior) == "RunningPrior(n_classes=4, decay=0.5, pseudocount=1.0)"


@pytest.mark.parametrize("n_saved", [2, 3, 5])
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_brings_its_number_of_classes(n_saved, assign):
    saved, target = RunningPrior(n_saved), torch.tensor([1, 0, 1])
    saved.update(target)
    module = torch.nn.ModuleDict({"prior": RunningPrior(3)})
    module["prior"].update(torch.tensor([2]))
    state = copy.deepcopy(torch.nn.ModuleDict({"prior": saved}).state_dict())  # not the tensors of `saved`
    assert list(state) == ["prior.class_counts"]
    module.load_state_dict(state, assign=assign)
    assert torch.equal(module["prior"].class_counts, saved.class_counts)
    assert torch.equal(module["prior"].update(target), saved.update(target))
    half = {"prior.class_counts": torch.tensor([2.0, 1.0]).half()}  # of a state that was cast
    module.load_state_dict(half, assign=assign)
    assert module["prior"].class_counts.tolist() == [2.0, 1.0]
    assert module["prior"].class_counts.dtype == torch.float64


def test_a_checkpoint_without_class_counts_is_refused():
    prior = RunningPrior(3)
    prior.update(torch.tensor([2]))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"class_counts\""):
        prior.load_state_dict({})
    for saved in (torch.ones(1, 3), torch.ones(0)):
        with pytest.raises(RuntimeError, match="size mismatch for class_counts"):
            prior.load_state_dict({"class_counts": saved})
    prior.load_state_dict({}, strict=False)
    assert prior.class_counts.tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RunningPrior(0), ValueError, "n_classes must be at least 1, got 0"),
        (lambda: RunningPrior([3, 1]), TypeError, "n_classes must be an int, got list"),
        (lambda: RunningPrior(3, decay=1.5), ValueError, "decay must be between 0 and 1, got 1.5"),
        (lambda: RunningPrior(3, decay=None), TypeError, "decay must be a number, got NoneType"),
        (lambda: RunningPrior(3, pseudocount=0.0), ValueError, "pseudocount must be finite and positive, got 0.0"),
        (lambda: RunningPrior(3, pseudocount=math.inf), ValueError, "pseudocount must be finite and positive, got inf"),
        (lambda: RunningPrior(3, ignore_index=None), TypeError, "ignore_index must be an int, got NoneType"),
        (
            lambda: RunningPrior(3, group="gloo"),
            TypeError,
            "group must be a torch.distributed ProcessGroup or None, got str",
        ),
        (lambda: RunningPrior(3).update([0, 1]), TypeError, "target must be a torch.Tensor, got list"),
        (lambda: RunningPrior(3).update(torch.zeros(2)), TypeError, "target must be integer, got float32"),
        (
            lambda: RunningPrior(3).update(torch.zeros(2, dtype=torch.int64, device="meta")),
            ValueError,
            "target must be on the device of class_counts, cpu, got meta; move the RunningPrior there with .to()",
        ),
        (lambda: RunningPrior(3).add_classes(0), ValueError, "n must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_of_a_running_prior_are_named(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


# A log prior that changes at every step


def stream(n_steps, n_classes_of_step):
    """(logits, target, log_prior) of steps whose prior and number of classes change."""
    prior = RunningPrior(n_classes_of_step(0), decay=0.5)
    for step in range(n_steps):
        n_classes = n_classes_of_step(step)
        if n_classes > len(prior.class_counts):
            prior.add_classes(n_classes - len(prior.class_counts))
        target = torch.randint(n_classes, (6,), generator=torch.Generator().manual_seed(step))
        yield torch.randn(6, n_classes).to(DEVICE), target.to(DEVICE), prior.update(target).to(DEVICE)


def assert_step_is_right(loss_of, logits, target, log_prior):
    x, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss, want = loss_of(x, target, log_prior), F.cross_entropy(exact + log_prior.double(), target)
    loss.backward()
    want.backward()
    assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_kernels_are_compiled_once_for_a_prior_and_classes_that_change():
    """A variant is what Triton compiles: its key has the widths of tiles, but neither the prior nor the classes."""
    pytest.importorskip("triton")
    variant = importlib.import_module("fused_la._triton.variants").variant
    for step, case in enumerate(stream(6, lambda step: 9 + step // 2)):
        assert_step_is_right(lambda *case: logit_adjusted_cross_entropy(*case, impl="triton"), *case)
        if step == 0:
            compiled = variant.cache_info().misses
    assert compiled > 0
    assert variant.cache_info().misses == compiled


def test_a_graph_is_compiled_once_for_a_prior_that_changes_and_once_more_for_classes_that_come(impl):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def loss(logits, target, log_prior):
        return logit_adjusted_cross_entropy(logits, target, log_prior, impl=impl)

    compiled = []
    for case in stream(8, lambda step: 5 + max(0, step - 2)):
        assert_step_is_right(loss, *case)
        compiled.append(counter.frame_count)
    assert compiled == [1, 1, 1, 2, 2, 2, 2, 2]


def test_update_compiles_once_for_each_number_of_classes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, eager = RunningPrior(4, decay=0.5), RunningPrior(4, decay=0.5)
    update = torch.compile(compiled.update, fullgraph=True, backend=counter)
    for batch in batches(4, 3):
        assert torch.equal(update(batch[:4]), eager.update(batch[:4]))
        assert torch.equal(compiled.class_counts, eager.class_counts)
    assert counter.frame_count == 1
    update(torch.tensor([[4, -1, 0], [0, 1, -100], [9, 9, 9], [3, 3, 3]]))  # labels are not read: five are no class
    eager.update(torch.tensor([0, 0, 1, 3, 3, 3]))
    assert torch.equal(compiled.class_counts, eager.class_counts)
    assert counter.frame_count == 1
    for prior in (compiled, eager):
        prior.add_classes(1)
    for batch in batches(5, 2):
        assert torch.equal(update(batch[:4]), eager.update(batch[:4]))
    assert counter.frame_count == 2
