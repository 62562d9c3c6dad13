"""Tests of examples/digits_lt.py and figure2.py: each runs in its own process and shows what it should.

Few seeds, trials and steps are enough: the runs are deterministic, and logit adjustment wins by several points.
"""

import contextlib
import io
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import fused_la
from fused_la import count_classes

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS_LT, FIGURE2 = EXAMPLES / "digits_lt.py", EXAMPLES / "figure2.py"
METHODS = [
    "ERM",
    "normalised by norm, tau = 1",
    "normalised by norm, tau*",
    "normalised by prior, tau = 1",
    "normalised by prior, tau*",
    "adaptive",
    "equalised",
    "balanced",
    "post hoc, tau = 1",
    "post hoc, tau*",
    "adjusted loss, tau = 1",
]
CORRECTIONS = ["normalised by norm", "normalised by prior", "post hoc"]
ADJUSTED = ["post hoc, tau = 1", "post hoc, tau*", "adjusted loss, tau = 1"]


def run_example(script, folder, *options):
    """What the example prints, and the folder that it writes to."""
    process = subprocess.run(
        [sys.executable, str(script), *options, "--out", "out"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(fused_la.__file__).parents[1])},  # the package under test
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert [path.name for path in folder.iterdir()] == ["out"]  # --out is where everything goes
    return process.stdout, folder / "out"


def run_in_this_process(script, folder, *options):
    """The same without another process, which takes seconds to import what this one has imported."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as stdout:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [script.name, *options, "--out", "out"])
        runpy.run_path(str(script))["main"]()
    assert [path.name for path in folder.iterdir()] == ["out"]
    return stdout.getvalue(), folder / "out"


def read_json(path):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def is_drawn(path, *colors):
    pixels = matplotlib.image.imread(path)[..., :3]
    height, width, _ = pixels.shape
    assert height >= 350
    assert width >= 850
    for color in colors:
        drawn = np.isclose(pixels, matplotlib.colors.to_rgb(color), atol=0.02).all(axis=-1)
        # in both halves, and more pixels than a legend has
        assert drawn[:, : width // 2].sum() > 100
        assert drawn[:, width // 2 :].sum() > 100


# digits_lt ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_lt(tmp_path_factory):
    return run_in_this_process(DIGITS_LT, tmp_path_factory.mktemp("digits_lt"), "--seeds", "2", "--steps", "60")


@pytest.fixture(scope="module")
def digits_lt_report(digits_lt):
    return read_json(digits_lt[1] / "results.json")


@pytest.fixture(scope="module")
def digits_lt_script():
    return runpy.run_path(str(DIGITS_LT))


@pytest.mark.parametrize("model", ["linear", "MLP"])
def test_digits_lt_shows_logit_adjustment_below_every_other_method(digits_lt_report, model):
    error = {name: np.mean(digits_lt_report["results"][model][name]["balanced_error"]) for name in METHODS}
    adjusted = [error.pop(name) for name in ADJUSTED]
    assert max(adjusted) < error["ERM"] - 2
    assert min(adjusted) < min(error.values())


def test_digits_lt_prints_a_table_of_what_it_reports(digits_lt, digits_lt_report):
    stdout, _ = digits_lt
    rows = re.findall(rf"^({'|'.join(map(re.escape, METHODS))}) +(.*)$", stdout, flags=re.MULTILINE)
    assert [name for name, _ in rows] == 2 * METHODS
    assert digits_lt_report["table"] == METHODS

    models = ["linear"] * len(METHODS) + ["MLP"] * len(METHODS)
    for model, (name, printed) in zip(models, rows, strict=True):
        result = digits_lt_report["results"][model][name]
        low, high = digits_lt_report["interval_of_balanced_error"][model][name]
        error = result["balanced_error"]
        half = 12.7062 * np.std(error, ddof=1) / math.sqrt(2)  # Student's t, one degree of freedom
        assert (low, high) == pytest.approx((np.mean(error) - half, np.mean(error) + half), abs=1e-3)
        others = [result[rate] for rate in ("long_tailed_error", "many_error", "medium_error", "few_error")]
        shown = ["-" if values[0] is None else f"{np.mean(values):.2f}" for values in others]
        spread = f"{np.std(error, ddof=1):.2f}"
        assert printed.split() == [f"{np.mean(error):.2f}", "±", spread, f"{low:.2f}", "to", f"{high:.2f}", *shown]


def test_digits_lt_rates_follow_from_the_errors_of_the_classes(digits_lt_report):
    settings = digits_lt_report["settings"]
    n_train, n_test = settings["training_images_by_rank"], settings["test_images_per_class"]
    assert n_train == [int(87 * 0.02 ** (rank / 9)) for rank in range(10)]
    for methods in digits_lt_report["results"].values():
        for result in methods.values():
            for seed, error in enumerate(result["class_error_by_rank"]):
                assert [e * n_test / 100 for e in error] == pytest.approx([round(e * n_test / 100) for e in error])
                few = [e for e, n in zip(error, n_train, strict=True) if n < 20]
                medium = [e for e, n in zip(error, n_train, strict=True) if 20 <= n <= 100]
                assert result["balanced_error"][seed] == pytest.approx(sum(error) / 10)
                assert result["top1_accuracy"][seed] == pytest.approx(100 - sum(error) / 10)
                assert result["few_error"][seed] == pytest.approx(sum(few) / len(few))
                assert result["medium_error"][seed] == pytest.approx(sum(medium) / len(medium))
                assert result["many_error"][seed] is None  # no class has more than 100 training images
                expected = sum(e * n for e, n in zip(error, n_train, strict=True)) / sum(n_train)
                assert result["long_tailed_error"][seed] == pytest.approx(expected)


def test_digits_lt_names_the_split_that_chose_tau_and_reports_at_that_tau(digits_lt, digits_lt_report):
    settings = digits_lt_report["settings"]
    assert (settings["tau_star_chosen_on"], settings["results_on"]) == ("val", "test")
    assert digits_lt[0].count('mean tau*, chosen on "val"') == 2
    for model, chosen in digits_lt_report["tau_star"].items():
        assert list(chosen) == CORRECTIONS
        for name, taus in chosen.items():
            for seed, tau in enumerate(taus):
                result = digits_lt_report["results"][model]
                best, at_tau = result[f"{name}, tau*"], result[f"{name}, tau = {tau:g}"]
                assert best["class_error_by_rank"][seed] == at_tau["class_error_by_rank"][seed]


def test_digits_lt_never_trains_on_or_chooses_by_a_test_image(digits_lt_script):
    pixels, digits = load_digits(return_X_y=True)
    images, target = torch.from_numpy(pixels / 16).float(), torch.from_numpy(digits)
    profile = [87, 56, 36, 23, 15, 9, 6, 4, 2, 1]
    for seed in range(3):
        split = digits_lt_script["split_digits"](target, profile, 29, 58, seed)
        drawn = torch.cat([split.train, split.val, split.test])
        assert len(drawn.unique()) == len(drawn) == sum(profile) + 10 * (29 + 58)
        assert count_classes(target[split.val], 10).tolist() == [29] * 10
        assert count_classes(target[split.test], 10).tolist() == [58] * 10

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 10))
    with torch.no_grad():
        chosen = digits_lt_script["choose_taus"](model, images, target, split)
        images[split.test] = math.nan  # any use of a test image would change the choice
        target[split.test] = -1
        assert digits_lt_script["choose_taus"](model, images, target, split) == chosen


def test_digits_lt_trains_each_model_of_a_batch_as_if_alone(digits_lt_script):
    torch.manual_seed(0)
    images, target = torch.rand(2, 20, 64), torch.randint(10, (2, 20))
    prior = torch.arange(1.0, 11.0).log()
    losses = [digits_lt_script["LOSSES"][name](prior) for name in ("adaptive", "balanced")]
    start = [nn.Sequential(nn.Linear(64, 10)) for _ in range(2)]

    def train(members):
        models = [nn.Sequential(nn.Linear(64, 10)) for _ in members]
        for model, i in zip(models, members, strict=True):
            model.load_state_dict(start[i].state_dict())
        progress = digits_lt_script["tqdm"](disable=True)
        arguments = images[members], target[members], [losses[i] for i in members]
        return digits_lt_script["train"](models, *arguments, lambda p: torch.optim.SGD(p, 0.1, 0.9), 5, progress)

    together = train([0, 1])
    for i in range(2):
        alone = train([i])[0]
        torch.testing.assert_close(together[i][0].weight, alone[0].weight)
        assert not torch.equal(alone[0].weight, start[i][0].weight)


def test_digits_lt_reports_every_curve_against_tau(digits_lt_report):
    for methods in digits_lt_report["results"].values():
        for tau in ("0.5", "1", "1.5", "2"):
            for name in (*CORRECTIONS, "adjusted loss"):
                assert all(map(math.isfinite, methods[f"{name}, tau = {tau}"]["balanced_error"]))
        for name in CORRECTIONS:  # tau = 0 corrects nothing
            corrected = methods[f"{name}, tau = 0"]["class_error_by_rank"]
            np.testing.assert_allclose(corrected, methods["ERM"]["class_error_by_rank"], rtol=1e-6)  # one is float32


def test_digits_lt_reports_weight_norms_of_both_optimizers(digits_lt_report):
    for norms in digits_lt_report["weight_norm_by_rank"].values():
        assert list(norms) == ["SGD with momentum", "Adam"]
        assert np.shape(list(norms.values())) == (2, 2, 10)
        of_sgd = np.mean(norms["SGD with momentum"], axis=0)
        assert of_sgd[0] > 1.3 * of_sgd[-1]  # they follow the class frequency


def test_digits_lt_reports_the_versions_that_it_ran_with(digits_lt_report):
    assert digits_lt_report["versions"].keys() >= {"python", "fused_la", "torch", "numpy", "sklearn", "scipy"}
    assert all(digits_lt_report["versions"].values())


@pytest.mark.parametrize(
    ("name", "colors"),
    [
        ("error_by_rank.png", ("#E69F00", "#0072B2")),  # post hoc, loss
        ("balanced_error_by_tau.png", ("#E69F00", "#0072B2", "#009E73", "#D55E00")),
        ("weight_norm_by_rank.png", ("#0072B2", "#D55E00")),
    ],
)
def test_digits_lt_draws_every_curve_for_both_models(digits_lt, name, colors):
    is_drawn(digits_lt[1] / name, *colors)


# figure2 --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def figure2(tmp_path_factory):
    stdout, out = run_example(FIGURE2, tmp_path_factory.mktemp("figure2"), "--trials", "3")
    return stdout, out, read_json(out / "figure2.json")


@pytest.fixture(scope="module")
def figure2_script():
    return runpy.run_path(str(FIGURE2))


def excess(report, name):
    """Mean balanced error minus that of the Bayes rule on the same test examples, in points."""
    error = report["balanced_error"]
    return 100 * (np.mean(error[name]) - np.mean(error["Bayes rule"]))


def check_consistent_losses(report, tolerance):
    # 10,000 training examples leave an excess: a boundary that is off by its standard error costs the square of it.
    for name in ("balanced", "logit-adjusted", "consistent, delta = pi^0.5", "post hoc, tau = 1"):
        assert abs(excess(report, name)) < tolerance, name


@pytest.mark.slow
def test_figure2_consistent_methods_reach_bayes_and_the_others_do_not(figure2):
    _, _, report = figure2
    check_consistent_losses(report, 0.3)
    assert excess(report, "ERM") > 8
    assert excess(report, "adaptive") > 5
    assert 0.3 < excess(report, "equalised") < 3
    assert list(report["balanced_error"])[1:10] == [
        "ERM", "adaptive", "equalised", "CDT, gamma = 0.25", "balanced", "logit-adjusted",
        "consistent, delta = pi^0.5", "logit-adjusted + adaptive", "vector scaling, gamma = 0.25",
    ]  # fmt: skip


def test_figure2_bayes_error_is_that_of_the_paper_and_of_the_rule(figure2):
    _, _, report = figure2
    assert report["bayes_balanced_error"] == pytest.approx(0.5 * math.erfc(1.0), abs=1e-12)  # Phi(-sqrt 2)
    off = np.mean(report["balanced_error"]["Bayes rule"]) - report["bayes_balanced_error"]
    assert abs(off) < 4 * report["standard_error_of_a_mean_by_drawing_test_examples"]


def test_figure2_weight_normalisation_predicts_as_erm_does(figure2):
    _, _, report = figure2
    error = report["balanced_error"]
    assert report["predictions_changed"]["weight norm of (w, b)"] == [0] * 3
    assert min(report["predictions_changed"]["weight norm of w, b kept"]) > 0
    for name in ("weight norm of (w, b)", "division by the prior"):
        curve = report["balanced_error_by_tau"][name]
        assert curve == pytest.approx([np.mean(error["ERM"])] * len(curve), rel=1e-6)  # one is float32
    curve = report["balanced_error_by_tau"]["weight norm of w, b kept"]
    assert min(curve) == curve[0]  # no better than ERM


def test_figure2_prints_every_method_and_how_tau_was_chosen(figure2):
    stdout, _, report = figure2
    for name, error in report["balanced_error"].items():
        assert re.search(rf"^{re.escape(name)} +{100 * np.mean(error):.2f} ", stdout, flags=re.MULTILINE), name
    assert "chosen on 'val'" in stdout
    assert "Bayes-optimal: 7.86 %" in stdout
    assert report["settings"]["tau_star_chosen_on"] == "val"


def test_figure2_is_drawn(figure2):
    is_drawn(figure2[1] / "figure2.png")


@pytest.mark.parametrize(
    ("options", "bayes"), [(["--prior", "0.3"], 0.0786496), (["--classes", "3", "--prior", "0.1"], 0.1342328)]
)
def test_figure2_consistent_methods_reach_bayes_at_other_priors_and_with_three_classes(tmp_path, options, bayes):
    _, out = run_in_this_process(FIGURE2, tmp_path, "--trials", "2", *options)
    report = read_json(out / "figure2.json")
    assert report["bayes_balanced_error"] == pytest.approx(bayes, abs=1e-6)
    check_consistent_losses(report, 0.3)
    assert excess(report, "ERM") > 1


def test_figure2_bayes_error_of_three_classes_is_what_sampling_finds(figure2_script):
    torch.manual_seed(0)
    means = figure2_script["gaussian_means"](3)
    target = torch.arange(3).repeat(100_000)
    features = means[target] + torch.randn(len(target), 2, dtype=torch.float64)
    error = (figure2_script["nearest_mean"](features, means).argmax(1) != target).double().mean().item()
    exact = figure2_script["bayes_balanced_error"](means)
    assert abs(error - exact) < 4 * math.sqrt(exact * (1 - exact) / len(target))


def test_figure2_counts_at_inaturalists_scale_are_its_own(figure2_script):
    counts = figure2_script["power_law_counts"](8142, 1000, 2, 437_513)
    assert (len(counts), counts[0], counts[-1], counts.sum()) == (8142, 1000, 2, 437_513)
    assert (counts.diff() <= 0).all()


def test_figure2_at_inaturalists_scale_runs_with_fewer_classes(tmp_path):
    _, out = run_in_this_process(FIGURE2, tmp_path, "--inaturalist", "--classes", "200", "--epochs", "4")
    report = read_json(out / "figure2_inaturalist.json")
    error = {name: result["balanced_error"] for name, result in report["results"].items()}
    assert error["Bayes rule"] == min(error.values())
    assert max(error["logit-adjusted"], error["post hoc, tau = 1"]) < error["ERM"] - 0.02
    assert report["settings"]["training_examples"] == sum(report["settings"]["class_counts"]) == 10747
    is_drawn(out / "figure2_inaturalist.png")


# both -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (DIGITS_LT, ["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (DIGITS_LT, ["--steps", "0"], "--steps must be at least 1, got 0"),
        (DIGITS_LT, ["--imb-factor", "0"], "--imb-factor must be in (0, 1], got 0"),
        (DIGITS_LT, ["--imb-factor", "1.5"], "--imb-factor must be in (0, 1], got 1.5"),
        (DIGITS_LT, ["--imb-factor", "nan"], "--imb-factor must be in (0, 1], got nan"),
        (DIGITS_LT, ["--imb-factor", "0.005"], "got 0.005, which leaves none to the class of rank 9, 10 of 10"),
        (FIGURE2, ["--trials", "0"], "--trials must be at least 1, got 0"),
        (FIGURE2, ["--prior", "0"], "--prior must be between 0.002 and 0.998, for examples of every class, got 0"),
        (FIGURE2, ["--prior", "nan"], "got nan"),
        (FIGURE2, ["--classes", "4"], "--classes must be 2 or 3, got 4"),
        (FIGURE2, ["--inaturalist", "--classes", "3"], "--classes must be at least 100 with --inaturalist, got 3"),
        (FIGURE2, ["--inaturalist", "--epochs", "0"], "--epochs must be at least 1, got 0"),
    ],
)
def test_examples_refuse_options_before_they_train(
    digits_lt_script, figure2_script, tmp_path, monkeypatch, capsys, script, options, message
):
    main = (digits_lt_script if script == DIGITS_LT else figure2_script)["main"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script.name, *options])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("digits_lt.py", "--seeds 1 --steps 1"),
        ("figure2.py", "--trials 1"),
        ("extreme_classes.py", "--classes 20 --features 4 --batch 8 --steps 1 --eval 100"),
    ],
)
def test_examples_print_in_ascii_and_write_to_a_folder_of_any_name(script, options, tmp_path, monkeypatch):
    """stdout is ASCII and a name is Latin-1. A character that cannot be shown must not end the run."""
    out = tmp_path / os.fsdecode(b"caf\xe9")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "argv", [script, *options.split(), "--out", str(out)])
    monkeypatch.setattr(sys, "stdout", stdout)
    runpy.run_path(str(EXAMPLES / script))["main"]()
    stdout.flush()
    assert b"Written to " + str(tmp_path).encode() + rb"/caf\udce9: " in stdout.buffer.getvalue()
    assert {path.suffix for path in out.iterdir()} == {".json", ".png"}


GROUP_ENDS = """
import sys, weakref
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist
__import__(sys.argv[2])

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = weakref.ref(dist.group.WORLD)
weight = torch.ones(3, requires_grad=True)
weight.sum().backward()
torch.optim.Adam([weight]).step()
dist.destroy_process_group()
assert group() is None
"""


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "module"), [(EXAMPLES, "extreme_classes"), (EXAMPLES / "resnet50", "world")])
def test_nothing_of_a_process_group_is_left_when_python_ends(folder, module):
    """A remaining thread that waits for the interpreter aborts the process now and then."""
    command = [sys.executable, "-c", GROUP_ENDS, str(folder), module]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
