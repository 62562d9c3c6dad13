"""The balanced error against scikit-learn, torchmetrics and plain Python, and as a torchmetrics metric.

Regimes: logits of every shape and dtype, predicted classes; classes absent from the evaluation, groups without
classes, no examples at all; labels that are ignored; one process and two; checkpoints, copies, collections, plots,
wrappers; fake tensors. The tests include what torchmetrics' `MetricTester` checks of a metric.
"""

import copy
import json
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import run_on_two_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torchmetrics import MetricCollection, wrappers
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall

from fused_la import metrics
from fused_la._call import checks
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
    """The rates by counting, as exact fractions; NaN for a mean over nothing."""

    def mean(errors):
        return float(sum(errors) / len(errors)) if errors else math.nan

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
        "class_error": [float(errors[c]) if c in errors else math.nan for c in range(len(class_counts))],
        "worst_class_error": float(max(errors.values())) if errors else math.nan,
        "worst_class": max(errors, key=lambda c: (errors[c], -c)) if errors else -1,
        "n_absent_classes": len(class_counts) - len(errors),
    }


def assert_exact(result, batches, class_counts=COUNTS, ignore_index=-100):
    """A result holds the float32 rates and the int64 numbers of the examples of these batches."""
    pairs = [pair for preds, target in batches for pair in zip(preds.tolist(), target.tolist(), strict=True)]
    preds, target = [p for p, t in pairs if t != ignore_index], [t for _, t in pairs if t != ignore_index]
    for name, value in exact_rates(preds, target, class_counts).items():
        assert result[name].dtype == (torch.int64 if name in ("worst_class", "n_absent_classes") else torch.float32)
        expected = torch.tensor(value, dtype=torch.float64)
        torch.testing.assert_close(result[name].double(), expected, rtol=0, atol=2**-24, equal_nan=True)


pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=40)


@settings(deadline=None)
@given(pairs, st.lists(st.integers(0, 150), min_size=6, max_size=6))
def test_rates_are_those_of_counting(pairs, class_counts):
    preds, target = torch.tensor([p for p, _ in pairs]).long(), torch.tensor([t for _, t in pairs]).long()
    assert_exact(computed(preds, target, class_counts), [(preds, target)], class_counts)


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
    """A fixed case, since the test above may draw none."""
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


@pytest.mark.parametrize("kind", ["logits", "classes"])
def test_uint8_labels_are_not_compared_in_uint8(kind):
    """In uint8, -100 would be 156 and 300 classes would be 44."""
    target = torch.tensor([156, 200, 44, 156], dtype=torch.uint8)
    preds = torch.tensor([156, 200, 43, 0])
    result = computed(torch.eye(300)[preds] if kind == "logits" else preds, target, [1] * 300)
    assert_exact(result, [(preds, target)], [1] * 300)


def test_labels_that_only_a_gpu_holds_are_found_by_compute(monkeypatch):
    monkeypatch.setattr(checks, "label_range", lambda labels: (None, None))
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
    """Compared with resampling the examples themselves, class by class."""
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
        assert interval == pytest.approx(expected, abs=0.01)  # the widths are 0.09 and 0.26


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
batch = [([0, 0, 1, 2], [0, 0, 1, -100]), ([0, 0], [1, 2])][rank]  # a padded example is ignored
batch = [torch.tensor(part) for part in batch]
def listed(result):
    return {name: value.tolist() for name, value in result.items()}

metric = BalancedError([200, 50, 5], class_names=["a", "b", "c"])
metric.update(*batch)
found = {"compute": listed(metric.compute()), "counts after": metric.n_examples.tolist()}
on_step = BalancedError([200, 50, 5], dist_sync_on_step=True)
found["forward"], found["compute after forward"] = listed(on_step(*batch)), listed(on_step.compute())
alone = BalancedError([200, 50, 5], sync_on_compute=False)
found["forward alone"], found["compute alone"] = listed(alone(*batch)), listed(alone.compute())
alone.sync()
found["synced"] = listed(alone.compute())
try:
    BalancedError([200, 50, 5], ignore_index=-1 - rank).compute()
except ValueError as error:
    found["error"] = str(error)
dist.destroy_process_group()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_counts_are_summed_over_ranks(tmp_path):
    found = run_on_two_ranks(RANK_PROGRAM, tmp_path)

    def expected(preds, target):
        result = computed(torch.tensor(preds), torch.tensor(target), [200, 50, 5], n_bootstrap=1000)
        return json.loads(json.dumps({name: value.tolist() for name, value in result.items()}))

    whole = expected([0, 0, 1, 0, 0], [0, 0, 1, 1, 2])
    for name in ("compute", "forward", "compute after forward", "synced"):
        assert [str(rank[name]) for rank in found] == [str(whole)] * 2, name
    parts = [expected([0, 0, 1], [0, 0, 1]), expected([0, 0], [1, 2])]
    for name in ("forward alone", "compute alone"):
        assert [str(rank[name]) for rank in found] == [str(part) for part in parts], name
    assert [rank["counts after"] for rank in found] == [[2, 1, 0, 0], [0, 1, 1, 0]]
    message = "counts must be of ignore_index={} and 3 classes, got those of a metric with others"
    assert [rank["error"] for rank in found] == [message.format(-1), message.format(-2)]


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


@pytest.mark.parametrize("name", ["is_differentiable", "higher_is_better", "full_state_update", "plot_lower_bound"])
def test_attributes_of_the_class_are_constants(name):
    with pytest.raises(RuntimeError, match="Can't change const"):
        setattr(BalancedError(COUNTS), name, True)


def test_every_metric_has_a_hash_of_its_own():
    metric = BalancedError(COUNTS)
    assert len({hash(metric), hash(metric.clone()), hash(BalancedError(COUNTS))}) == 3


FIRST = torch.tensor([0, 1, 1, 3, 4, 5, 0]), torch.tensor([0, 1, 0, 3, 4, 5, 5])  # no label 2
SECOND = torch.tensor([2, 2, 0, 1, 3, 5]), torch.tensor([2, 0, 2, 1, 4, 2])


def updated(metric, *batches):
    for batch in batches:
        metric.update(*batch)
    return metric


CASTS = {
    "set_dtype float64": lambda metric: metric.set_dtype(torch.float64),
    "set_dtype float16": lambda metric: metric.set_dtype(torch.float16),
    "half": lambda metric: metric.half(),
    "double": lambda metric: metric.double(),
    "to bfloat16": lambda metric: metric.to(torch.bfloat16),
    "to CPU and float16": lambda metric: metric.to("cpu", torch.float16),
    "of a module": lambda metric: torch.nn.ModuleList([metric]).to(torch.float16)[0],
    "of a collection": lambda metric: MetricCollection({"metric": metric}).set_dtype(torch.float16)["metric"],
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("is_computed", [False, True])
def test_no_cast_rounds_counts_or_rates(cast, is_computed):
    """Half precision cannot hold 4097; results of `compute` and `forward` before the cast must not be cast either."""
    many = torch.zeros(4097).long(), torch.zeros(4097).long()
    metric = updated(BalancedError(COUNTS, ignore_index=5), many)
    interval = updated(BalancedError(COUNTS, ignore_index=5), many, FIRST).compute()["balanced_error_high"]
    if is_computed:
        metric.compute()
    metric = CASTS[cast](metric)
    assert_exact(metric.compute(), [many], ignore_index=5)
    assert_exact(metric(*FIRST), [FIRST], ignore_index=5)
    assert metric.n_examples.dtype == metric.n_correct.dtype == torch.int64
    assert metric.n_examples[0].item() == 4099
    assert_exact(metric.compute(), [many, FIRST], ignore_index=5)
    assert torch.equal(metric.compute()["balanced_error_high"], interval)
    metric.reset()
    assert_exact(updated(metric, SECOND).compute(), [SECOND], ignore_index=5)


def test_forward_is_update_and_compute_of_the_batch():
    metric = BalancedError(COUNTS)
    for batch in (FIRST, SECOND):
        alone = updated(BalancedError(COUNTS), batch).compute()
        for name, value in metric(*batch).items():
            assert torch.equal(value.nan_to_num(-1), alone[name].nan_to_num(-1))
    assert_exact(metric.compute(), [FIRST, SECOND])


def test_states_are_saved_only_if_persistent():
    metric = BalancedError(COUNTS)
    assert metric.state_dict() == {}
    metric.persistent(True)
    assert {"n_correct", "n_examples"} < metric.state_dict().keys()


def test_a_checkpoint_serves_several_metrics():
    """If they counted in place, all would count into the checkpoint's tensor."""
    saved = updated(BalancedError(COUNTS), FIRST)
    saved.persistent(True)
    checkpoint = saved.state_dict()
    restored = [BalancedError(COUNTS), BalancedError(COUNTS)]
    for metric in restored:
        metric.load_state_dict(checkpoint)
        metric.update(*SECOND)
    for metric in restored:
        assert_exact(metric.compute(), [FIRST, SECOND])


def test_counting_goes_on_outside_of_inference_mode():
    with torch.inference_mode():
        metric = updated(BalancedError(COUNTS), SECOND)
        metric.reset()
    assert_exact(updated(metric, FIRST).compute(), [FIRST])


def test_results_are_of_the_counts_that_were_loaded_or_merged():
    """torchmetrics by itself would give the cached result."""
    other = updated(BalancedError(COUNTS), SECOND)
    other.persistent(True)
    loaded, merged = updated(BalancedError(COUNTS), FIRST), updated(BalancedError(COUNTS), FIRST)
    loaded.compute(), merged.compute()
    loaded.load_state_dict(other.state_dict())
    assert_exact(loaded.compute(), [SECOND])
    merged.merge_state(other)
    assert_exact(merged.compute(), [FIRST, SECOND])
    merged.merge_state(updated(BalancedError(COUNTS), SECOND).metric_state)
    assert_exact(merged.compute(), [FIRST, SECOND, SECOND])


# -1 is all ones in binary, so combining it bitwise with a fingerprint of -100 changes nothing.
@pytest.mark.parametrize(("own", "others"), [(-100, 2), (2, -100), (-1, -100), (-100, -1), (-(2**63), 2**63 - 1)])
def test_counts_of_another_ignore_index_are_an_error(own, others):
    other = updated(BalancedError(COUNTS, ignore_index=others), FIRST)
    other.persistent(True)
    message = f"^counts must be of ignore_index={own} and 6 classes, got those of a metric with others$"
    merged, loaded = updated(BalancedError(COUNTS, ignore_index=own), FIRST), BalancedError(COUNTS, ignore_index=own)
    merged.merge_state(other)
    loaded.load_state_dict(other.state_dict())
    for metric in (merged, loaded):
        with pytest.raises(ValueError, match=message):
            updated(metric, FIRST).compute()
        metric.reset()
        assert_exact(updated(metric, SECOND).compute(), [SECOND], ignore_index=own)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric BalancedError was called before:UserWarning")
def test_counts_of_other_classes_are_an_error():
    other = updated(BalancedError([1, 1, 1]), (torch.tensor([0]), torch.tensor([0])))
    other.persistent(True)
    metric = BalancedError(COUNTS)
    metric.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"^counts must be of ignore_index=-100 and 6 classes, got"):
        metric.compute()


# Fake tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")  # torchmetrics' add_state
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["logits", "classes"])
def test_fake_tensors_give_the_shapes_and_dtypes(device, kind):
    real = updated(BalancedError(COUNTS), FIRST).compute()
    with FakeTensorMode():
        metric = BalancedError(COUNTS).to(device)
        target = torch.zeros(7, dtype=torch.int64, device=device)
        preds = torch.zeros(7, 6, device=device) if kind == "logits" else target
        metric.update(preds, target)
        metric.reset()
        for result in (metric(preds, target), updated(metric, (preds, target)).compute()):
            assert result.keys() == real.keys()
            for name, value in result.items():
                assert isinstance(value, FakeTensor)
                assert (value.shape, value.dtype) == (real[name].shape, real[name].dtype)
                assert value.device.type == device


# Collections ----------------------------------------------------------------------------------------------------------

# Training counts and ignore_index by name. After a first batch without label 2 these metrics have equal states.
KINDS = {"all": (COUNTS, -100), "few": ([1] * 6, -100), "without": (COUNTS, 2)}


def metrics_of(*names):
    return {name: BalancedError(KINDS[name][0], ignore_index=KINDS[name][1], n_bootstrap=50) for name in names}


def assert_each_exact(results, batches, names=KINDS):
    """Every metric of a collection has its own rates, and the same interval as outside of the collection."""
    for name in names:
        class_counts, ignore_index = KINDS[name]
        own = {key.split(f"{name}_", 1)[1]: value for key, value in results.items() if f"{name}_" in key}
        assert_exact(own, batches, class_counts, ignore_index)
        alone = updated(metrics_of(name)[name], *batches).compute()
        assert torch.equal(own["balanced_error_high"], alone["balanced_error_high"])


def after_a_copy(collection, copied):
    return updated(copied(updated(collection, FIRST)), SECOND)


def with_added_metrics(collection):
    start = updated(MetricCollection(metrics_of("all", "few")), FIRST)
    start.add_metrics({"without": updated(metrics_of("without")["without"], FIRST)})
    return updated(start, SECOND)


def in_a_second_epoch(collection):
    updated(collection, FIRST, SECOND).compute()
    collection.reset()
    return updated(collection, FIRST, SECOND)


def through_state_dict(collection):
    updated(collection, FIRST).persistent(True)
    other = MetricCollection(metrics_of(*KINDS))
    other.persistent(True)
    updated(other, FIRST).load_state_dict(collection.state_dict())
    return updated(other, SECOND)


def through_items(collection):
    for _, metric in updated(collection, FIRST).items():
        metric.compute()
    return updated(collection, SECOND)


def through_forward(collection):
    collection(*FIRST)
    collection(*SECOND)
    return collection


WAYS = {
    "update": lambda collection: updated(collection, FIRST, SECOND),
    "forward": through_forward,
    "clone": lambda collection: after_a_copy(collection, lambda c: c.clone(prefix="val/", postfix="/x")),
    "deepcopy": lambda collection: after_a_copy(collection, copy.deepcopy),
    "pickle": lambda collection: after_a_copy(collection, lambda c: pickle.loads(pickle.dumps(c))),
    "set_dtype": lambda collection: after_a_copy(collection, lambda c: c.set_dtype(torch.float16)),
    "add_metrics": with_added_metrics,
    "second epoch": in_a_second_epoch,
    "state_dict": through_state_dict,
    "items": through_items,
}


@pytest.mark.parametrize("way", WAYS)
def test_each_metric_of_a_collection_counts_for_itself(way):
    collection = WAYS[way](MetricCollection(metrics_of(*KINDS)))
    assert_each_exact({key.removesuffix("/x"): value for key, value in collection.compute().items()}, [FIRST, SECOND])


@pytest.mark.parametrize("outer", [None, "val/"])
def test_each_metric_of_nested_collections_counts_for_itself(outer):
    inner = {name: MetricCollection({"inner": metrics_of(name)[name]}, prefix="inner/") for name in KINDS}
    results = updated(MetricCollection(inner, prefix=outer), FIRST, SECOND).compute()
    assert_each_exact({key.replace("_inner_", "_"): value for key, value in results.items()}, [FIRST, SECOND])
    listed = MetricCollection([MetricCollection(metrics_of(name), postfix="/x") for name in KINDS], prefix=outer)
    results = updated(listed, FIRST, SECOND).compute()
    assert_each_exact({key.removesuffix("/x"): value for key, value in results.items()}, [FIRST, SECOND])


def test_nearly_equal_counts_are_not_taken_for_equal():
    """torchmetrics compares states with a relative tolerance of 1e-5."""
    names = ("all", "few")
    counted = metrics_of(*names)
    for n, name in zip((200_000, 200_001), names, strict=True):
        counted[name].update(torch.zeros(n).long(), torch.zeros(n).long())
    collection = updated(MetricCollection(counted), FIRST, SECOND)
    assert [collection[name].n_examples[0].item() for name in names] == [200_003, 200_004]


def test_compute_groups_that_count_the_same_are_right():
    collection = MetricCollection(metrics_of(*KINDS), compute_groups=[["all", "few"]])
    for way in ("clone", "second epoch", "items"):
        copied = WAYS[way](collection.clone()).compute()
        assert_each_exact({key.removesuffix("/x"): value for key, value in copied.items()}, [FIRST, SECOND])


def test_compute_groups_that_count_differently_are_an_error():
    collection = MetricCollection(metrics_of(*KINDS), compute_groups=[["all", "without"]])
    with pytest.raises(ValueError, match=r"^counts must be of ignore_index=2 and 6 classes, got those of a metric"):
        updated(collection, FIRST, SECOND).compute()


def test_a_collection_prefixes_its_results():
    both = MetricCollection({"la": BalancedError(COUNTS), "recall": MulticlassRecall(6)}, prefix="val/")
    both.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert both.compute()["val/balanced_error"] == 0.5


def test_a_collection_plots_together():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    figure, axes = updated(MetricCollection(metrics_of(*KINDS)), FIRST).plot(together=True)
    assert any("without_balanced_error" in text.get_text() for text in axes.get_legend().get_texts())
    matplotlib.pyplot.close(figure)


# Wrappers around a metric of one number or around the metric itself ---------------------------------------------------


def rate(name="balanced_error", **options):
    return BalancedError(COUNTS, n_bootstrap=0, **options)[name]


def exact_rate(*batches, name="balanced_error"):
    """The rate of these batches in float64."""
    preds, target = (torch.cat(parts).tolist() for parts in zip(*batches, strict=True))
    return exact_rates(preds, target, COUNTS)[name]


def test_a_rate_is_a_metric():
    metric = rate()
    assert metric(*FIRST).item() == pytest.approx(exact_rate(FIRST))
    metric = metric.clone()
    assert updated(metric, SECOND).compute().item() == pytest.approx(exact_rate(FIRST, SECOND))
    metric.reset()
    assert updated(metric, SECOND).compute().item() == pytest.approx(exact_rate(SECOND))


def test_rates_are_added_and_subtracted():
    difference = rate("worst_class_error") - rate(ignore_index=2)
    kept = [part[SECOND[1] != 2] for part in SECOND]
    expected = exact_rate(FIRST, SECOND, name="worst_class_error") - exact_rate(FIRST, kept)
    assert updated(difference, FIRST, SECOND).compute().item() == pytest.approx(expected)
    assert updated(1 - rate(), SECOND).compute().item() == pytest.approx(1 - exact_rate(SECOND))


@pytest.mark.parametrize("in_collection", [False, True])
def test_a_tracker_finds_the_best_step(in_collection):
    metric = MetricCollection({"error": rate()}) if in_collection else rate()
    tracker = wrappers.MetricTracker(metric, maximize=[False] if in_collection else False)
    for batch in (SECOND, FIRST, SECOND):
        tracker.increment()
        tracker.update(*batch)
    found = [each["error"] if in_collection else each for each in tracker.best_metric(return_step=True)]
    assert found == [pytest.approx(exact_rate(FIRST)), 1]


def test_a_tracker_keeps_all_rates():
    tracker = wrappers.MetricTracker(BalancedError(COUNTS, n_bootstrap=0))
    for batch in (SECOND, FIRST):
        tracker.increment()
        tracker.update(*batch)
    assert tracker.compute_all()["balanced_error"].tolist() == pytest.approx([exact_rate(SECOND), exact_rate(FIRST)])


def test_minimum_and_maximum_are_those_of_the_rate():
    metric = wrappers.MinMaxMetric(rate())
    first = updated(metric, FIRST).compute()
    both = updated(metric, SECOND).compute()
    assert first["raw"].item() == pytest.approx(exact_rate(FIRST))
    assert [both["min"].item(), both["max"].item()] == pytest.approx([exact_rate(FIRST), exact_rate(FIRST, SECOND)])


def test_a_bootstrapped_rate_is_spread_around_the_rate():
    target = torch.arange(6).repeat(100)
    preds = torch.where(torch.arange(600) % 4 == 0, (target + 1) % 6, target)
    result = updated(wrappers.BootStrapper(rate(), num_bootstraps=100), (preds, target)).compute()
    assert result["mean"].item() == pytest.approx(exact_rate((preds, target)), abs=0.01)  # the mean varies by 0.002
    assert result["std"].item() == pytest.approx((0.25 * 0.75 / 600) ** 0.5, rel=0.5)


def test_each_output_has_its_rate():
    metric = wrappers.MultioutputWrapper(rate(), num_outputs=2)
    preds, target = torch.stack([FIRST[0], FIRST[0].flip(0)], 1), torch.stack([FIRST[1]] * 2, 1)
    expected = [exact_rate(FIRST), exact_rate((FIRST[0].flip(0), FIRST[1]))]
    assert updated(metric, (preds, target)).compute().tolist() == pytest.approx(expected)
    metric.reset()
    logits = torch.nn.functional.one_hot(preds, 6).transpose(1, 2).double()
    assert updated(metric, (logits, target)).compute().tolist() == pytest.approx(expected)


def test_a_classwise_error_is_named():
    metric = wrappers.ClasswiseWrapper(rate("class_error"), list("abcdef"), prefix="error_")
    result = updated(metric, SECOND).compute()
    expected = dict(zip("abcdef", exact_rate(SECOND, name="class_error"), strict=True))
    assert {name: float(value) for name, value in result.items()} == pytest.approx(
        {f"error_{name}": value for name, value in expected.items()}, nan_ok=True
    )


def test_a_running_metric_is_of_the_last_batches():
    running = wrappers.Running(BalancedError(COUNTS, n_bootstrap=50), window=2)
    for batch, last in zip((FIRST, SECOND, SECOND), ([FIRST], [FIRST, SECOND], [SECOND, SECOND]), strict=True):
        assert_exact(running(*batch), [batch])
        assert_exact(running.compute(), last)
    assert_exact(updated(running, FIRST).compute(), [SECOND, FIRST])
    running.reset()
    assert_exact(updated(running, FIRST).set_dtype(torch.float64).compute(), [FIRST])


def test_running_metrics_of_a_collection_count_for_themselves():
    collection = MetricCollection({name: wrappers.Running(m, window=2) for name, m in metrics_of(*KINDS).items()})
    assert_each_exact(updated(collection, SECOND, FIRST, SECOND).compute(), [FIRST, SECOND])


def test_each_task_counts_for_itself():
    multitask = wrappers.MultitaskWrapper(metrics_of("all", "without"), prefix="val/")
    preds, target = [{"all": a, "without": b} for a, b in zip(FIRST, SECOND, strict=True)]
    for result in (multitask(preds, target), updated(multitask, (preds, target)).compute()):
        assert result["val/all"]["top1_accuracy"].item() == pytest.approx(5 / 7)
        assert result["val/without"]["top1_accuracy"].item() == pytest.approx(1 / 3)


def test_transformed_inputs_are_counted():
    metric = wrappers.LambdaInputTransformer(BalancedError(COUNTS, n_bootstrap=0), transform_pred=lambda p: 5 - p)
    assert_exact(updated(metric, FIRST).compute(), [(5 - FIRST[0], FIRST[1])])


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
INT32 = "target must be int64 class indices, got torch.int32; target.long() makes int64 of it"


@pytest.mark.parametrize(
    ("preds", "target", "error", "message"),
    [
        ([0], LABELS, TypeError, "preds must be a torch.Tensor, got list"),
        (torch.zeros(3, 4), LABELS, ValueError, "preds must have 2 classes, got shape (3, 4)"),
        (torch.zeros(()), LABELS, ValueError, "preds must have shape (C,), (N, C) or (N, C, d1, ..., dk), got ()"),
        (torch.zeros(3, 2), LABELS[:2], ValueError, "target must have shape (3,) for class indices, got (2,)"),
        (torch.zeros(3, 2), torch.zeros(3), TypeError, "target must be int64 class indices, got torch.float32"),
        (torch.zeros(3, 2), LABELS.int(), TypeError, INT32),
        (LABELS, LABELS.int(), TypeError, INT32),
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


@pytest.mark.parametrize("build", ["to meta", "default device"])
def test_a_metric_that_was_built_on_the_meta_device_begins_to_count_once_it_has_memory(build):
    """As part of a model whose `to_empty` gives it uninitialised memory."""
    if build == "to meta":
        metric = BalancedError([200, 50, 5], ignore_index=7)
        metric.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]))
        model = torch.nn.Sequential(metric).to("meta")
    else:
        with torch.device("meta"):
            model = torch.nn.Sequential(BalancedError([200, 50, 5], ignore_index=7))
    metric = model.half().to_empty(device="cpu")[0]
    for _ in range(2):
        metric.update(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 2, 7]))
        assert metric.compute()["class_error"].tolist() == [0.0, 0.0, 1.0]
        assert metric.n_examples.tolist() == [1, 1, 1, 0]
        metric.reset()


def test_metrics_of_a_collection_share_no_counts_by_default():
    """Even metrics that count the same are separate, so changing one of them does not change the others."""
    collection = MetricCollection({name: BalancedError([200, 50, 5]) for name in ("one", "two")})
    collection.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]))
    assert len(collection.compute_groups) == 2
    assert collection["one"].n_examples is not collection["two"].n_examples
