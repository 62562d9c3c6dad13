"""The balanced error against scikit-learn, torchmetrics and plain Python, and as a torchmetrics metric.

Regimes: logits of every shape and dtype, predicted classes; classes absent from the evaluation, groups without
classes, no examples at all; labels that are ignored; one process and two; checkpoints, copies, collections, plots.
"""

import copy
import json
import math
import pickle
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall

from fused_la import _checks, metrics
from fused_la.metrics import BalancedError, shot_groups
from fused_la.posthoc import TauSweep

COUNTS = [1280, 101, 100, 20, 19, 0]
RATES = ["balanced_error", "top1_accuracy", "many_error", "medium_error", "few_error", "worst_class_error"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true:UserWarning"),  # scikit-learn's
    pytest.mark.filterwarnings("ignore:A single label was found in:UserWarning"),
]


def computed(preds, target, class_counts=COUNTS, **options):
    metric = BalancedError(class_counts, **{"n_bootstrap": 0, **options})
    metric.update(torch.as_tensor(preds), torch.as_tensor(target))
    return metric.compute()


def exact_rates(preds, target, class_counts):
    """By counting, in fractions; None for a mean over nothing."""

    def mean(errors):
        return float(sum(errors) / len(errors)) if errors else None

    errors = {}
    for c in range(len(class_counts)):
        wrong = [p != t for p, t in zip(preds, target, strict=True) if t == c]
        if wrong:
            errors[c] = Fraction(sum(wrong), len(wrong))
    return {
        "balanced_error": mean(list(errors.values())),
        "top1_accuracy": mean([Fraction(p == t) for p, t in zip(preds, target, strict=True)]),
        "many_error": mean([error for c, error in errors.items() if class_counts[c] > 100]),
        "medium_error": mean([error for c, error in errors.items() if 20 <= class_counts[c] <= 100]),
        "few_error": mean([error for c, error in errors.items() if class_counts[c] < 20]),
        "worst_class_error": float(max(errors.values())) if errors else None,
        "worst_class": max(errors, key=lambda c: (errors[c], -c)) if errors else -1,
        "n_absent_classes": len(class_counts) - len(errors),
    }


pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=40)


@settings(deadline=None)
@given(pairs, st.lists(st.integers(0, 150), min_size=6, max_size=6))
def test_rates_are_those_of_counting(pairs, class_counts):
    preds, target = [p for p, _ in pairs], [t for _, t in pairs]
    result = computed(torch.tensor(preds).long(), torch.tensor(target).long(), class_counts)
    for name, value in exact_rates(preds, target, class_counts).items():
        if value is None:
            assert result[name].isnan()
        else:
            assert result[name].item() == pytest.approx(value, abs=2**-24)  # float32


@settings(deadline=None)
@given(pairs.filter(len))
def test_the_balanced_error_is_that_of_scikit_learn_and_torchmetrics(pairs):
    preds, target = torch.tensor(pairs).T
    result = computed(preds, target)
    assert result["balanced_error"].item() == pytest.approx(1 - balanced_accuracy_score(target, preds), abs=1e-7)
    top1 = MulticlassAccuracy(6, average="micro")(preds, target)
    torch.testing.assert_close(result["top1_accuracy"], top1)
    recall = MulticlassRecall(6, average=None)(preds, target)
    present = ~result["class_error"].isnan()
    torch.testing.assert_close(result["class_error"][present], 1 - recall[present])
    if present.all():  # torchmetrics counts an absent class's recall as 0 unless nothing is predicted as it either
        macro = MulticlassRecall(6, average="macro")(preds, target)
        torch.testing.assert_close(result["balanced_error"], 1 - macro)


def test_the_balanced_error_is_that_of_torchmetrics_where_every_class_is_present():
    """Not left to the draws of the test above."""
    target = torch.arange(6).repeat(20)
    preds = torch.randint(6, (120,))
    for each in (MulticlassRecall(6, average="macro"), MulticlassAccuracy(6, average="macro")):
        torch.testing.assert_close(computed(preds, target)["balanced_error"], 1 - each(preds, target))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(6,), (20, 6), (4, 6, 5), (2, 6, 2, 3)], ids=str)
def test_logits_of_every_shape_are_their_predicted_classes(dtype, shape):
    logits = torch.randn(shape).to(dtype)
    predicted = logits.argmax(0 if len(shape) == 1 else 1)
    target = torch.randint(6, predicted.shape)
    by_logits, by_classes = computed(logits, target), computed(predicted, target)
    for name in by_classes:
        assert torch.equal(by_logits[name].nan_to_num(-1), by_classes[name].nan_to_num(-1))


def test_batches_add_up():
    preds, target = torch.randint(6, (2, 90))
    metric = BalancedError(COUNTS)
    for part in (slice(0, 1), slice(1, 1), slice(1, 90)):
        metric.update(preds[part], target[part])
    whole = BalancedError(COUNTS)
    whole.update(preds, target)
    for name, value in whole.compute().items():
        assert torch.equal(metric.compute()[name], value)


def test_absent_classes_are_left_out_and_reported():
    result = computed([0, 0, 1], [0, 1, 1])
    assert result["class_error"].isnan().tolist() == [False, False, True, True, True, True]
    assert result["balanced_error"].item() == 0.25
    assert result["n_absent_classes"].item() == 4
    assert [result[name].isnan().item() for name in ("many_error", "medium_error", "few_error")] == [False, True, True]


def test_the_worst_class_is_the_first_of_the_worst():
    result = computed([1, 1, 0, 5], [1, 2, 3, 4])
    assert result["worst_class"].item() == 2
    assert result["worst_class_error"].item() == 1.0


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric BalancedError was called before:UserWarning")
@pytest.mark.parametrize("updated", [False, True])
def test_over_no_examples_rates_are_nan(updated):
    metric = BalancedError(COUNTS)
    if updated:
        metric.update(torch.tensor([3]), torch.tensor([-100]))
    result = metric.compute()
    assert all(result[name].isnan() for name in [*RATES, "balanced_error_low", "balanced_error_high"])
    assert result["worst_class"].item() == -1
    assert result["n_absent_classes"].item() == 6


@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_ignored_labels_are_not_counted(ignore_index):
    preds, target = torch.randint(6, (2, 80))
    target[::3] = ignore_index
    kept = target != ignore_index
    ignored, expected = computed(preds, target, ignore_index=ignore_index), computed(preds[kept], target[kept])
    for name in expected:
        assert torch.equal(ignored[name].nan_to_num(-1), expected[name].nan_to_num(-1))


def test_predictions_at_ignored_labels_may_be_anything():
    assert computed([0, 77, -5], [0, -100, -100])["top1_accuracy"].item() == 1.0


def test_labels_that_only_a_gpu_holds_are_found_by_compute(monkeypatch):
    monkeypatch.setattr(_checks, "label_ends", lambda labels: (None, None))
    metric = BalancedError(COUNTS)
    metric.update(torch.tensor([0, 1, 1]), torch.tensor([0, 6, -1]))
    with pytest.raises(
        IndexError, match=r"^target must hold class indices in \[0, 6\) or .* got 2 labels that are neither$"
    ):
        metric.compute()


# Shot groups ----------------------------------------------------------------------------------------------------------


def test_groups_are_of_more_than_100_of_20_to_100_and_of_fewer_than_20():
    groups = shot_groups(COUNTS)
    assert {name: mask.nonzero().flatten().tolist() for name, mask in groups.items()} == {
        "many": [0, 1],
        "medium": [2, 3],
        "few": [4, 5],
    }


@settings(deadline=None)
@given(st.lists(st.integers(0, 300) | st.floats(0, 300), min_size=1))
def test_every_class_is_in_one_group(class_counts):
    assert sum(mask.int() for mask in shot_groups(class_counts).values()).tolist() == [1] * len(class_counts)


def test_a_sweep_and_the_metric_agree():
    logits, target = torch.randn(100, 6), torch.randint(5, (100,))
    sweep = TauSweep(torch.zeros(6), [0.0], split="val", class_counts=COUNTS)
    sweep.update(logits, target)
    result = computed(logits, target)
    for name, rate in sweep.compute().items():
        assert torch.equal(rate[0].float(), result[name])


# Bootstrap ------------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_resampled_examples():
    """Against resampling the examples themselves, class by class."""
    generator = np.random.default_rng(1)
    sizes, errors = (30, 8, 100), (0.3, 0.5, 0.05)
    wrong = [generator.random(size) < error for size, error in zip(sizes, errors, strict=True)]
    resampled = np.mean([[generator.choice(w, len(w)).mean() for w in wrong] for _ in range(4000)], axis=1)
    target = torch.tensor(np.repeat(range(3), sizes))
    preds = torch.where(torch.tensor(np.concatenate(wrong)), (target + 1) % 3, target)
    for confidence in (0.5, 0.95):
        result = computed(preds, target, [9, 9, 9], n_bootstrap=4000, confidence=confidence)
        expected = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
        interval = [result["balanced_error_low"].item(), result["balanced_error_high"].item()]
        assert interval == pytest.approx(expected, abs=0.01)  # of a width of 0.09 and 0.26


def test_the_interval_covers_the_error_as_often_as_it_says():
    covered = 0
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(4).repeat(50)
    true_error = torch.tensor([0.2, 0.4, 0.5, 0.7])
    for _ in range(200):
        wrong = torch.rand(200, generator=generator) < true_error[target]
        result = computed(
            torch.where(wrong, (target + 1) % 4, target), target, [1] * 4, n_bootstrap=300, confidence=0.9
        )
        covered += (result["balanced_error_low"] <= 0.45 <= result["balanced_error_high"]).item()
    assert 165 <= covered <= 195  # 180 on average; 4 standard deviations are 17


def test_the_interval_depends_on_counts_and_seed_alone(monkeypatch):
    preds, target = torch.randint(6, (2, 60))
    order = torch.randperm(60)

    def interval(seed, shuffled=False):
        result = computed(
            preds[order] if shuffled else preds, target[order] if shuffled else target, n_bootstrap=200, seed=seed
        )
        return result["balanced_error_low"].item(), result["balanced_error_high"].item()

    torch.manual_seed(1)
    first = interval(0)
    torch.manual_seed(2)
    assert interval(0, shuffled=True) == first
    assert interval(1) != first
    monkeypatch.setattr(metrics, "_DRAWS", 20)  # resamples in several blocks
    assert interval(0) == first


def test_no_resamples_give_no_interval():
    result = computed([0], [0], n_bootstrap=0)
    assert result["balanced_error_low"].isnan()
    assert result["balanced_error_high"].isnan()


# As a metric ----------------------------------------------------------------------------------------------------------


RANK_PROGRAM = """
import json, sys
import torch, torch.distributed as dist
from fused_la.metrics import BalancedError

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
metric = BalancedError([200, 50, 5], class_names=["a", "b", "c"])
preds, target = [([0, 0, 1, 2], [0, 0, 1, -100]), ([0, 0], [1, 2])][rank]  # a padded example is ignored
metric.update(torch.tensor(preds), torch.tensor(target))
result = {name: value.tolist() for name, value in metric.compute().items()}
alone = metric.n_examples.tolist()
dist.destroy_process_group()
print(json.dumps([result, alone]))
"""


def test_counts_are_summed_over_ranks(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    results = [json.loads(stdout) for stdout, _ in outputs]
    whole = BalancedError([200, 50, 5])
    whole.update(torch.tensor([0, 0, 1, 0, 0]), torch.tensor([0, 0, 1, 1, 2]))
    expected = {name: value.tolist() for name, value in whole.compute().items()}
    assert [result for result, _ in results] == [expected, expected]
    assert [alone for _, alone in results] == [[2, 1, 0, 0], [0, 1, 1, 0]]


def test_forward_gives_the_batch_and_keeps_the_total():
    metric = BalancedError(COUNTS, n_bootstrap=0)
    assert metric(torch.tensor([0]), torch.tensor([0]))["balanced_error"].item() == 0.0
    assert metric(torch.tensor([0]), torch.tensor([1]))["balanced_error"].item() == 1.0
    assert metric.compute()["balanced_error"].item() == 0.5
    metric.reset()
    assert metric.n_examples.sum().item() == 0


def test_checkpoints_and_copies_go_on_counting():
    metric = BalancedError(COUNTS, n_bootstrap=0)
    metric.persistent(True)
    metric.update(torch.tensor([0, 0]), torch.tensor([0, 1]))
    restored = BalancedError(COUNTS, n_bootstrap=0)
    restored.persistent(True)
    restored.load_state_dict(metric.state_dict())
    for other in (restored, copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        other.update(torch.tensor([1, 1]), torch.tensor([1, 1]))
        assert other.compute()["class_error"][:2].tolist() == pytest.approx([0.0, 1 / 3])


def test_casting_the_module_that_holds_it_rounds_no_count():
    module = torch.nn.ModuleDict({"metric": BalancedError([5000, 1], n_bootstrap=0)})
    module.half()
    module["metric"].update(torch.zeros(4097).long(), torch.zeros(4097).long())
    assert module["metric"].n_examples[0].item() == 4097


def test_a_collection_prefixes_its_results():
    both = torchmetrics.MetricCollection({"la": BalancedError(COUNTS), "recall": MulticlassRecall(6)}, prefix="val/")
    both.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert both.compute()["val/balanced_error"] == 0.5


def test_scalars_are_flat_floats_that_name_the_classes():
    metric = BalancedError([200, 50, 5], class_names=["cat", "lynx", "ocelot"])
    metric.update(torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1]))
    scalars = metric.scalars("val/")
    assert all(type(value) is float for value in scalars.values())
    assert scalars["val/balanced_error"] == 0.25
    assert scalars["val/worst_class"] == 1
    assert [scalars[f"val/class/{name}"] for name in ("cat", "lynx")] == [0.0, 0.5]
    assert math.isnan(scalars["val/class/ocelot"])
    unnamed = BalancedError([200, 50, 5])
    unnamed.update(torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1]))
    assert not any("class/" in name for name in unnamed.scalars())
    assert unnamed.scalars().keys() == {name.removeprefix("val/") for name in scalars if "class/" not in name}


def test_plots_show_rates_of_one_result_or_of_many(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    metric = BalancedError(COUNTS, n_bootstrap=0)
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    figure, axes = metric.plot()
    assert {line.get_label() for line in axes.get_lines()} == set(RATES)
    _, again = metric.plot([metric.compute()] * 3, figure.add_subplot())
    assert {len(line.get_xdata()) for line in again.get_lines()} == {3}
    matplotlib.pyplot.close(figure)


@pytest.mark.gpu
def test_a_metric_on_a_gpu_counts_as_on_a_cpu():
    logits, target = torch.randn(100, 6), torch.randint(6, (100,))
    metric = BalancedError(COUNTS).to("cuda")
    metric.update(logits.cuda(), target.cuda())
    on_cpu = BalancedError(COUNTS)
    on_cpu.update(logits, target)
    for name, value in metric.compute().items():
        assert value.device.type == "cuda"
        assert torch.equal(value.cpu(), on_cpu.compute()[name])


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"class_counts": [[1]]}, ValueError, "class_counts must have shape (n_classes,), got (1, 1)"),
        (
            {"class_counts": [1, -1]},
            ValueError,
            "class_counts must be non-negative, got -1 for class 1 (1 of 2 classes)",
        ),
        ({"class_names": ["a"]}, ValueError, "class_names must have 2 names, got 1"),
        ({"class_names": ["a", "a"]}, ValueError, "class_names must be different, got 'a' twice"),
        ({"class_names": "ab"}, TypeError, "class_names must be strings, one a class, got str"),
        ({"class_names": ["a", 1]}, TypeError, "class_names must be strings, one a class, got int"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got float"),
        ({"n_bootstrap": -1}, ValueError, "n_bootstrap must be at least 0, got -1"),
        ({"confidence": 1.0}, ValueError, "confidence must be between 0 and 1, got 1.0"),
        ({"confidence": 0.0}, ValueError, "confidence must be between 0 and 1, got 0.0"),
        ({"seed": "0"}, TypeError, "seed must be an int, got str"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error) as caught:
        BalancedError(**{"class_counts": [1, 2], **arguments})
    assert str(caught.value) == message


LABELS = torch.zeros(3).long()


@pytest.mark.parametrize(
    ("preds", "target", "error", "message"),
    [
        ([0], LABELS, TypeError, "preds must be a torch.Tensor, got list"),
        (torch.zeros(3, 4), LABELS, ValueError, "preds must have 2 classes, got shape (3, 4)"),
        (torch.zeros(()), LABELS, ValueError, "preds must have shape (C,), (N, C) or (N, C, d1, ..., dk), got ()"),
        (torch.zeros(3, 2), LABELS[:2], ValueError, "target must have shape (3,) for class indices, got (2,)"),
        (torch.zeros(3, 2), torch.zeros(3), TypeError, "target must be int64 class indices, got torch.float32"),
        (torch.zeros(3, 2), LABELS.int(), TypeError, "target must be int64 class indices, got torch.int32"),
        (LABELS, LABELS.int(), TypeError, "target must be int64 class indices, got torch.int32"),
        (LABELS, [0, 0, 0], TypeError, "target must be a torch.Tensor, got list"),
        (LABELS > 0, LABELS, TypeError, "preds must be floating scores or integer classes, got torch.bool"),
        (
            LABELS[:2],
            LABELS,
            ValueError,
            "preds must have the shape of target, (3,), for predicted classes, got (2,)",
        ),
        (LABELS + 2, LABELS, IndexError, "preds must hold class indices in [0, 2), got 2"),
        (
            LABELS,
            LABELS + 2,
            IndexError,
            "Target 2 is out of bounds: target must hold class indices in [0, 2) or ignore_index (-100)",
        ),
    ],
)
def test_wrong_batches_are_named(preds, target, error, message):
    metric = BalancedError([1, 2])
    with pytest.raises(error) as caught:
        metric.update(preds, target)
    assert str(caught.value) == message
    assert metric.n_examples.sum().item() == 0
