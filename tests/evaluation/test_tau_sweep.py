"""Sweeps over tau against one argmax for each tau.

Regimes: rows of ties, NaN and infinities; one tau and more taus than one program of the kernel takes; numbers of
classes around the width of its tile. Without a GPU the kernel runs in Triton's interpreter.
"""

import copy
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import run_on_two_ranks
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fused_la import log_prior_from_counts
from fused_la._call import checks
from fused_la._evaluation import argmax
from fused_la._triton.argmax import MAX_TAUS, TILE, launch_argmax
from fused_la.posthoc import TauSweep, adjust_logits, divide_by_prior, normalize_classifier

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INF, NAN = math.inf, math.nan


# Predictions for many taus --------------------------------------------------------------------------------------------


@pytest.fixture(params=["blocked", "kernel"])
def predict(request, device):
    """(predict, device) of the two implementations."""
    if request.param == "kernel":
        return launch_argmax, device
    return argmax.predict, "cpu"


def expected_predictions(logits, scale, offset):
    """One argmax for each tau over (N, P, C); on a CPU PyTorch returns the first of equals and the first NaN."""
    predictions = []
    for t in range(len(scale if scale is not None else offset)):
        z = logits.to((scale if scale is not None else offset).dtype)
        z = z if scale is None else z * scale[t]
        if offset is not None:
            z = (z + offset[t]).masked_fill(offset[t] == -INF, -INF)
        predictions.append(z.argmax(-1))
    return torch.stack(predictions)


def check_predictions(predict, logits, scale, offset):
    run, device = predict
    on_device = [None if table is None else table.to(device) for table in (scale, offset)]
    predictions = run(logits.to(device), *on_device)
    assert predictions.dtype == torch.int64
    assert torch.equal(predictions.cpu(), expected_predictions(logits, scale, offset))


@pytest.mark.parametrize("n_taus", [1, 3, MAX_TAUS, MAX_TAUS + 1])
@pytest.mark.parametrize("n_classes", [1, 3, TILE // MAX_TAUS, TILE // MAX_TAUS + 1, 600])
def test_predictions_are_one_argmax_for_each_tau(predict, n_taus, n_classes):
    logits = torch.randn(4, 1, n_classes)
    offset = torch.randn(n_taus, n_classes)
    scale = torch.rand(n_taus, n_classes) + 0.5
    check_predictions(predict, logits, None, offset)
    check_predictions(predict, logits, scale, None)
    check_predictions(predict, logits, scale, offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_predictions_of_every_dtype_and_layout(predict, dtype):
    offset = torch.randn(3, 70, dtype=torch.promote_types(dtype, torch.float32))
    images = torch.randn(2, 70, 5).to(dtype).transpose(1, 2)
    padded = torch.randn(6, 90).to(dtype)[:, 7:77].unsqueeze(1)
    every_second = torch.randn(6, 140).to(dtype)[:, ::2].unsqueeze(1)
    empty = torch.randn(0, 1, 70).to(dtype)
    for logits in (images, padded, every_second, empty):
        check_predictions(predict, logits, None, offset)


SPECIAL = st.sampled_from([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, -NAN, 1e-45, -1e-45, 3.4e38, -3.4e38])


@settings(deadline=None, max_examples=40)
@example([-0.0, 0.0], [0.0, 0.0], torch.float32)
@example([0.0, -0.0], [0.0, 0.0], torch.float64)
@example([INF, -NAN, NAN], [0.0, 0.0, 0.0], torch.float32)  # the sign of a NaN has no effect
@given(
    st.lists(SPECIAL, min_size=5, max_size=5),
    st.lists(st.sampled_from([0.0, -INF]), min_size=5, max_size=5),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_ties_nan_infinities_and_excluded_classes_are_argmax(row, class_offset, dtype):
    """Ties go to the lowest class, -0 equals 0, the first NaN beats everything, and a class at -inf never wins."""
    logits = torch.tensor([[row]], dtype=dtype)
    offset = torch.tensor([[0.0] * len(row), class_offset], dtype=dtype)
    for run in (argmax.predict, launch_argmax) if not torch.cuda.is_available() else (argmax.predict,):
        check_predictions((run, "cpu"), logits, None, offset)
        check_predictions((run, "cpu"), logits, torch.ones_like(offset), offset)
        check_predictions((run, "cpu"), logits, torch.ones_like(offset), None)  # without a sum, which turns -0 into 0


def test_ties_across_tiles_go_to_the_lowest_class(predict):
    """Equal logits in every lane and tile of the kernel."""
    n_classes = 3 * TILE // 4 + 5
    logits = torch.zeros(3, 1, n_classes)
    logits[1, 0, 700:] = 1.0
    logits[2, 0, 1000:] = NAN
    check_predictions(predict, logits, None, torch.zeros(4, n_classes))
    assert expected_predictions(logits, None, torch.zeros(4, n_classes))[0].flatten().tolist() == [0, 700, 1000]


def test_blocks_bound_the_memory_and_change_no_prediction(monkeypatch):
    logits, offset = torch.randn(6, 7, 10).half(), torch.randn(5, 10)
    whole = argmax.predict(logits, None, offset)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (logits, offset)}
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                is_new = result.untyped_storage().data_ptr() not in inputs
                largest = max(largest, is_new * result.numel())
            return result

    monkeypatch.setattr(argmax, "BLOCK_ELEMENTS", 80)
    with Sizes():
        blocked = argmax.predict(logits, None, offset)
    assert torch.equal(blocked, whole)
    assert 0 < largest <= 40  # half of a block, the logits are the other half; all results have 420 elements


COMPILE = """
import json
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fused_la._triton.argmax import _argmax_kernel

def compile(pointer, wide, *given):
    table = "*fp64" if wide else "*fp32"
    constants = {"ADJACENT": True, "COMPUTE": tl.float64 if wide else tl.float32, "KEY": tl.int64 if wide else tl.int32,
                 "HIGHEST": 2**63 - 1 if wide else 2**31 - 1, "TAUS": 16, "BLOCK_C": 128}
    constants |= {name: None for name in ("scale", "offset", "group") if name not in given}
    types = {"logits": pointer, "scale": table, "offset": table, "group": "*i64", "predictions": "*i64",
             "n_inner": "i32"}
    constants_at = {(_argmax_kernel.arg_names.index(name),): value for name, value in constants.items()}
    signature = {parameter.name: "constexpr" if parameter.name in constants else
                 types.get(parameter.name, parameter.annotation_type) for parameter in _argmax_kernel.params}
    source = ASTSource(_argmax_kernel, signature=signature, constexprs=constants_at)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32),
                              options={"num_warps": 4, "enable_fp_fusion": False})
    ptx = compiled.asm["ptx"]
    mul = "mul.f" in ptx or "mul.rn" in ptx
    print(json.dumps({"bytes": len(compiled.asm["cubin"]), "fma": "fma.rn" in ptx, "mul": mul}))

compile("*bf16", False, "offset", "group")
compile("*fp32", False, "scale", "offset")
compile("*fp64", True, "scale", "offset")
"""


@pytest.mark.slow
def test_the_kernel_compiles_without_a_gpu_and_without_fused_multiply_add(tmp_path):
    """Product and sum are rounded separately, as on a CPU."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "compile_argmax.py"  # Triton reads the source of a kernel from its file
    script.write_text(COMPILE)
    run = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(compiled) == 3
    assert all(row["bytes"] > 1000 and not row["fma"] for row in compiled)
    assert compiled[1]["mul"]
    assert compiled[2]["mul"]


# TauSweep -------------------------------------------------------------------------------------------------------------

TAUS = (0.0, 0.3, 1.0, 1.7, 2.5)
COUNTS = [400, 120, 60, 15, 4]


def long_tailed(n_rows=200, shape=(), dtype=torch.float32):
    """(logits, target, features, weight, bias) of a head whose row norms follow the class frequencies."""
    weight = torch.randn(5, 8) * torch.tensor([2.0, 1.6, 1.2, 0.9, 0.7])[:, None]
    bias = 0.5 * torch.randn(5)
    target = torch.randint(5, (n_rows, *shape))
    features = torch.randn(n_rows, *shape, 8) + 0.5 * F.normalize(weight, dim=1)[target]
    logits = F.linear(features, weight, bias).movedim(-1, 1)
    return logits.to(dtype), target, features, weight, bias


def expected_counts(predictions, target):
    n_correct = torch.stack([torch.bincount(target[p == target], minlength=5) for p in predictions])
    return n_correct, torch.bincount(target, minlength=5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=str)
def test_a_sweep_counts_what_each_adjustment_predicts(dtype, shape):
    logits, target, *_ = long_tailed(60, shape, dtype)
    log_prior = torch.tensor([-0.3, -1.1, -2.2, -4.0, -INF])
    for make, function in ((TauSweep, adjust_logits), (TauSweep.divide_by_prior, divide_by_prior)):
        sweep = make(log_prior, TAUS, split="val")
        for part in (slice(0, 7), slice(7, 7), slice(7, 60)):
            sweep.update(logits[part], target[part])
        predictions = [function(logits, log_prior, tau).argmax(1).flatten() for tau in TAUS]
        n_correct, n_examples = sweep.counts()
        expected = expected_counts(predictions, target.flatten())
        assert torch.equal(n_correct, expected[0])
        assert torch.equal(n_examples, expected[1])
        assert n_correct.dtype == torch.int64
        assert n_correct[0, 4] > 0  # at tau = 0 every class may be predicted
        assert (n_correct[1:, 4] == 0).all()


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_sweep_of_a_normalized_classifier_leaves_the_bias_undivided(has_bias):
    _, target, features, weight, bias = long_tailed(400)
    weight[4] = 0.0  # a row of zeros has the score of its bias
    bias = bias if has_bias else None
    sweep = TauSweep.normalize_classifier(weight, TAUS, bias=bias, split="val")
    sweep.update(F.linear(features, weight, bias), target)
    predictions = [F.linear(features, normalize_classifier(weight, tau), bias).argmax(1) for tau in TAUS]
    assert torch.equal(sweep.counts()[0], expected_counts(predictions, target)[0])
    divided = [(F.linear(features, weight, bias) / weight.norm(dim=1).clamp(min=1e-9) ** tau).argmax(1) for tau in TAUS]
    assert torch.equal(sweep.counts()[0], expected_counts(divided, target)[0]) == (not has_bias)


def test_the_rates_of_a_sweep_are_means_over_classes():
    logits, target, *_ = long_tailed()
    target[target == 1] = 0  # class 1 is absent, so class 0 alone has more than 100 training examples
    log_prior = log_prior_from_counts(COUNTS)
    sweep = TauSweep(log_prior, TAUS, split="val", class_counts=COUNTS)
    sweep.update(logits, target)
    rates = sweep.compute()
    best, best_error = None, INF
    for t, tau in enumerate(TAUS):
        predictions = adjust_logits(logits, log_prior, tau).argmax(1)
        errors = {c: (predictions != target)[target == c].double().mean().item() for c in (0, 2, 3, 4)}
        expected = {
            "balanced_error": sum(errors.values()) / 4,
            "top1_accuracy": (predictions == target).double().mean().item(),
            "many_error": errors[0],
            "medium_error": errors[2],
            "few_error": (errors[3] + errors[4]) / 2,
        }
        assert {name: rate[t].item() for name, rate in rates.items()} == pytest.approx(expected, abs=1e-12)
        assert sweep.class_error()[t].isnan().tolist() == [False, True, False, False, False]
        if expected["balanced_error"] < best_error - 1e-12:
            best, best_error = tau, expected["balanced_error"]
    assert sweep.best() == best


def test_the_smallest_of_equally_good_taus_is_best():
    sweep = TauSweep(torch.zeros(2), [2.0, 0.5, 1.0], split="val")
    sweep.update(torch.eye(2), torch.tensor([0, 1]))
    assert sweep.taus == (0.5, 1.0, 2.0)
    assert sweep.best() == 0.5


def test_equal_means_of_errors_in_another_order_are_a_tie():
    """As floating-point sums, 0.1 + 0.2 + 0.3 + 0.7 and 0.7 + 0.3 + 0.1 + 0.2 differ in the last digit."""
    errors = list(itertools.permutations([1, 2, 3, 7]))
    for first in errors:
        sweep = TauSweep(torch.zeros(4), range(1 + len(errors)), split="val")
        sweep._n_examples[:4] = 10
        sweep._n_correct[:, :4] = 10 - torch.tensor([first, *errors])
        assert sweep.best() == 0.0, first


def test_a_group_without_classes_has_no_error():
    """Its error is NaN, not 0; without training counts every group is without classes."""
    sweep = TauSweep(torch.zeros(2), [0.0], split="val", class_counts=[101, 19])
    without_counts = TauSweep(torch.zeros(2), [0.0], split="val")
    for each in (sweep, without_counts):
        each.update(torch.eye(2), torch.tensor([0, 1]))
    groups = ("many_error", "medium_error", "few_error")
    assert [sweep.compute()[name].isnan().item() for name in groups] == [False, True, False]
    assert [without_counts.compute()[name].isnan().item() for name in groups] == [True, True, True]


def test_ignored_labels_are_not_counted():
    logits, target, *_ = long_tailed(50)
    log_prior = log_prior_from_counts(COUNTS)
    for ignored in (-100, 2):
        with_ignored = target.clone()
        with_ignored[::3] = ignored
        kept = with_ignored != ignored
        sweep, expected = (TauSweep(log_prior, TAUS, split="val", ignore_index=ignored) for _ in range(2))
        sweep.update(logits, with_ignored)
        expected.update(logits[kept], target[kept])
        for mine, theirs in zip(sweep.counts(), expected.counts(), strict=True):
            assert torch.equal(mine, theirs)
        assert sweep.counts()[1].sum() == kept.sum()


def test_labels_that_only_a_gpu_holds_are_found_when_counts_are_read(monkeypatch):
    """If checking labels would synchronise, bad labels are counted separately."""
    monkeypatch.setattr(checks, "label_range", lambda labels: (None, None))
    sweep = TauSweep(torch.zeros(2), [0.0, 1.0], split="val")
    sweep.update(torch.eye(2), torch.tensor([0, -100]))
    assert sweep.counts()[1].tolist() == [1, 0]
    sweep.update(torch.eye(2), torch.tensor([2, -1]))
    for read in (sweep.counts, sweep.compute, sweep.best):
        with pytest.raises(
            IndexError, match=r"target must hold class indices in \[0, 2\) or ignore_index \(-100\), got 2 "
        ):
            read()


def test_the_tensors_of_a_sweep_do_not_grow_with_examples():
    sweep = TauSweep(log_prior_from_counts(COUNTS), TAUS, split="val")
    before = {name: value.shape for name, value in vars(sweep).items() if isinstance(value, torch.Tensor)}
    logits, target, *_ = long_tailed(1000)
    sweep.update(logits.requires_grad_(), target)
    after = {name: value.shape for name, value in vars(sweep).items() if isinstance(value, torch.Tensor)}
    assert after == before
    assert not any(value.requires_grad for value in vars(sweep).values() if isinstance(value, torch.Tensor))


def test_merging_adds_the_counts_and_changes_neither():
    logits, target, *_ = long_tailed(50)
    first, second, whole = (TauSweep(log_prior_from_counts(COUNTS), TAUS, split="val") for _ in range(3))
    first.update(logits[:20], target[:20])
    second.update(logits[20:], target[20:])
    whole.update(logits, target)
    before = [counts.clone() for counts in first.counts()]
    merged = first.merge(second)
    for mine, theirs in zip(merged.counts(), whole.counts(), strict=True):
        assert torch.equal(mine, theirs)
    merged.update(logits, target)
    assert all(torch.equal(mine, old) for mine, old in zip(first.counts(), before, strict=True))


def test_only_sweeps_of_one_kind_merge():
    log_prior = log_prior_from_counts(COUNTS)
    sweep = TauSweep(log_prior, TAUS, split="val")
    for other, message in (
        (TauSweep(log_prior, TAUS, split="test"), "other must have the split 'val', got 'test'"),
        (
            TauSweep(log_prior, [1.0], split="val"),
            r"other must have the taus \(0.0, 0.3, 1.0, 1.7, 2.5\), got \(1.0,\)",
        ),
        (TauSweep.divide_by_prior(log_prior, TAUS, split="val"), "other must have the method 'logit adjustment', got"),
        (TauSweep(log_prior[:4], TAUS, split="val"), "other must have 5 classes, got 4"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            sweep.merge(other)
    with pytest.raises(TypeError, match=r"^other must be a TauSweep, got int$"):
        sweep.merge(1)


RANK_PROGRAM = """
import json, sys
import torch, torch.distributed as dist
from fused_la.posthoc import TauSweep

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
sweep = TauSweep(torch.tensor([0.9, 0.1]).log(), [0.0, 1.0], split="val")
if rank == 0:  # the other rank has no examples
    sweep.update(torch.tensor([[5.0, 1.0], [1.0, 0.0], [1.0, 0.5]]), torch.tensor([0, 1, 1]))
total = sweep.sync(dist.group.WORLD)
again = sweep.sync(dist.group.WORLD)
dist.destroy_process_group()
print(json.dumps([[t.tolist() for t in s.counts()] for s in (sweep, total, again)]))
"""


def test_counts_are_summed_over_ranks(tmp_path):
    counted, nothing = [[[1, 0], [1, 2]], [1, 2]], [[[0, 0], [0, 0]], [0, 0]]
    assert run_on_two_ranks(RANK_PROGRAM, tmp_path) == [[counted, counted, counted], [nothing, counted, counted]]


def test_a_printed_sweep_names_its_split_and_marks_the_best_tau():
    sweep = TauSweep(torch.tensor([0.9, 0.1, 0.0]).log(), [0.0, 1.0], split="fold 3", class_counts=[900, 100, 0])
    assert "0 examples" in str(sweep)
    assert "best" not in str(sweep)
    sweep.update(torch.tensor([[5.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([0, 1]))
    title, heading, *rows = str(sweep).splitlines()
    assert title == "logit adjustment on 'fold 3': 2 examples, 1 of 3 classes without any; errors and accuracy in %"
    assert len(heading) == len(rows[0])
    assert rows[0].split() == ["0", "50.00", "50.00", "0.00", "100.00", "-"]
    assert rows[1].endswith("<- best balanced error on 'fold 3'")


def test_a_plot_shows_the_curves_the_split_and_the_best_tau():
    figure = pytest.importorskip("matplotlib.figure")
    logits, target, *_ = long_tailed()
    sweep = TauSweep(log_prior_from_counts(COUNTS), TAUS, split="val", class_counts=COUNTS)
    sweep.update(logits, target)
    axes = sweep.plot()
    assert "val" in axes.get_ylabel()
    assert axes.get_title() == "logit adjustment"
    curves = {line.get_label(): line for line in axes.get_lines()}
    assert list(curves) == ["balanced error", "many", "medium", "few", f"tau = {sweep.best():g}, best on 'val'"]
    assert curves["balanced error"].get_xdata().tolist() == list(TAUS)
    assert curves["few"].get_ydata().tolist() == (100 * sweep.compute()["few_error"]).tolist()
    own = figure.Figure().subplots()
    assert sweep.plot(own) is own


def test_without_matplotlib_a_plot_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    sweep = TauSweep(torch.zeros(2), [0.0], split="val")
    with pytest.raises(
        ModuleNotFoundError, match=r"^TauSweep.plot needs the package matplotlib, which is not installed$"
    ):
        sweep.plot()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"log_prior": [0.0, 0.0]}, TypeError, "log_prior must be a torch.Tensor, got list"),
        ({"log_prior": torch.zeros(0)}, ValueError, "log_prior must have shape (C,) or (G, C) with C >= 1, got (0,)"),
        (
            {"log_prior": torch.zeros(1, 2, 2)},
            ValueError,
            "log_prior must have shape (C,) or (G, C) with C >= 1, got (1, 2, 2)",
        ),
        (
            {"log_prior": torch.tensor([INF, 0.0])},
            ValueError,
            "log_prior must be finite or -inf, got inf for some class",
        ),
        ({"taus": []}, ValueError, "taus must have at least one number, got none"),
        ({"taus": 1.0}, TypeError, "taus must be a sequence of numbers, got float"),
        ({"taus": ["1"]}, TypeError, "taus must be a number, got str"),
        ({"taus": [0.0, -1.0]}, ValueError, "taus must be finite and not negative, got -1.0"),
        ({"split": ""}, ValueError, "split must name the data, such as 'val', got ''"),
        ({"split": None}, ValueError, "split must name the data, such as 'val', got None"),
        ({"class_counts": [1, 2, 3]}, ValueError, "class_counts must have shape (2,), got (3,)"),
        (
            {"class_counts": [1, -2]},
            ValueError,
            "class_counts must be non-negative, got -2 for class 1 (1 of 2 classes)",
        ),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got NoneType"),
    ],
)
def test_wrong_arguments_of_a_sweep_are_named(arguments, error, message):
    with pytest.raises(error) as caught:
        TauSweep(**{"log_prior": torch.zeros(2), "taus": [1.0], "split": "val", **arguments})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("logits", "target", "error", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3).long(), ValueError, "logits must have 2 classes, got shape (3, 4)"),
        (
            torch.zeros(3, 2),
            torch.zeros(2).long(),
            ValueError,
            "target must have shape (3,) for class indices, got (2,)",
        ),
        (torch.zeros(3, 2), torch.zeros(3, 2), TypeError, "target must be int64 class indices, got torch.float32"),
        (
            torch.zeros(1, 2),
            torch.tensor([2]),
            IndexError,
            "Target 2 is out of bounds: target must hold class indices in [0, 2) or ignore_index (-100)",
        ),
    ],
)
def test_wrong_batches_of_a_sweep_are_named(logits, target, error, message):
    sweep = TauSweep(torch.zeros(2), [1.0], split="val")
    with pytest.raises(error) as caught:
        sweep.update(logits, target)
    assert str(caught.value) == message
    assert sweep.counts()[1].tolist() == [0, 0]


def test_nothing_is_best_without_examples():
    with pytest.raises(ValueError, match="must have examples to choose by, got none: call update first"):
        TauSweep(torch.zeros(2), [1.0], split="val").best()


def test_a_wrong_bias_is_named():
    with pytest.raises(ValueError, match=r"^bias must have shape \(3,\), got \(2,\)$"):
        TauSweep.normalize_classifier(torch.ones(3, 2), [1.0], bias=torch.zeros(2), split="val")


def test_a_sweep_can_be_copied_in_the_middle():
    logits, target, *_ = long_tailed(20)
    sweep = TauSweep(log_prior_from_counts(COUNTS), TAUS, split="val")
    sweep.update(logits, target)
    twin = copy.deepcopy(sweep)
    twin.update(logits, target)
    assert torch.equal(twin.counts()[0], 2 * sweep.counts()[0])


@pytest.mark.gpu
def test_a_sweep_on_a_gpu_runs_the_kernel_and_counts_as_on_a_cpu(monkeypatch):
    from fused_la._triton import argmax

    launched = []
    run = argmax.launch_argmax
    monkeypatch.setattr(argmax, "launch_argmax", lambda *arguments: launched.append(True) or run(*arguments))
    for dtype in DTYPES:
        logits, target, *_, weight, bias = long_tailed(300, dtype=dtype)
        log_prior = log_prior_from_counts(COUNTS)
        for make, *vectors in (
            (TauSweep, log_prior),
            (TauSweep.divide_by_prior, log_prior),
            (TauSweep.normalize_classifier, weight, bias),
        ):
            counts = []
            for device in ("cpu", "cuda"):
                keywords = {"bias": vectors[1].to(device)} if len(vectors) == 2 else {}
                sweep = make(vectors[0].to(device), TAUS, split="val", **keywords)
                sweep.update(logits.to(device), target.to(device))
                counts.append(sweep.counts()[0])
            if make is TauSweep:
                assert torch.equal(*counts)
            else:  # powers may differ in the last place
                assert (counts[0] - counts[1]).abs().sum() <= 2
    assert len(launched) == 3 * len(DTYPES)
