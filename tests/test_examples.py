"""The examples run as a user runs them, in a process of their own, and show what they are there to show.

One seed of the digits example is enough: it is deterministic, and logit adjustment wins by several points.
"""

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

import fused_la

DIGITS_LT = Path(__file__).parents[1] / "examples" / "digits_lt.py"
METHODS = ["ERM", "post hoc, tau = 1", "adjusted loss, tau = 1"]


@pytest.fixture(scope="module")
def digits_lt(tmp_path_factory):
    """What one seed prints, and the folder that it writes to."""
    folder = tmp_path_factory.mktemp("digits_lt")
    command = [sys.executable, str(DIGITS_LT), "--seeds", "1", "--out", "out"]
    package_root = str(Path(fused_la.__file__).parents[1])  # the package under test, installed or not
    process = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": package_root},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert [path.name for path in folder.iterdir()] == ["out"]  # --out is where everything goes
    return process.stdout, folder / "out"


@pytest.fixture(scope="module")
def digits_lt_report(digits_lt):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads((digits_lt[1] / "results.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def digits_lt_main():
    return runpy.run_path(str(DIGITS_LT))["main"]


@pytest.mark.parametrize("model", ["linear", "MLP"])
def test_digits_lt_shows_logit_adjustment_below_erm_in_balanced_error(digits_lt_report, model):
    erm, *adjusted = (digits_lt_report["results"][model][name]["balanced_error"][0] for name in METHODS)
    assert max(adjusted) < erm - 2


def test_digits_lt_prints_a_table_of_what_it_reports(digits_lt, digits_lt_report):
    stdout, _ = digits_lt
    rows = re.findall(rf"^({'|'.join(METHODS)}) +(.*)$", stdout, flags=re.MULTILINE)
    assert [name for name, _ in rows] == 2 * METHODS

    models = ["linear"] * len(METHODS) + ["MLP"] * len(METHODS)
    metrics = (
        "balanced_error",
        "top1_accuracy",
        "long_tailed_error",
        "many_error",
        "medium_error",
        "few_error",
    )
    for model, (name, printed) in zip(models, rows, strict=True):
        reported = [digits_lt_report["results"][model][name][metric][0] for metric in metrics]
        shown = ["-" if value is None else f"{value:.2f}" for value in reported]
        balanced_error, *others = shown
        assert printed.split() == [balanced_error, "±", "-", *others]  # one seed has no standard deviation


def test_digits_lt_metrics_follow_from_the_wrong_predictions(digits_lt_report):
    settings = digits_lt_report["settings"]
    n_train, n_test = settings["training_images_by_rank"], settings["test_images_per_class"]
    assert n_train == [int(87 * 0.02 ** (rank / 9)) for rank in range(10)]
    for methods in digits_lt_report["results"].values():
        for result in methods.values():
            (wrong,) = result["wrong_by_rank"]
            error = [100 * w / n_test for w in wrong]
            few = [e for e, n in zip(error, n_train, strict=True) if n < 20]
            medium = [e for e, n in zip(error, n_train, strict=True) if 20 <= n <= 100]
            assert result["balanced_error"] == [pytest.approx(sum(error) / 10)]
            assert result["top1_accuracy"] == [pytest.approx(100 - sum(error) / 10)]
            assert result["few_error"] == [pytest.approx(sum(few) / len(few))]
            assert result["medium_error"] == [pytest.approx(sum(medium) / len(medium))]
            assert result["many_error"] == [None]  # digits has no class of more than 100 training images
            expected = sum(e * n for e, n in zip(error, n_train, strict=True)) / sum(n_train)
            assert result["long_tailed_error"] == [pytest.approx(expected)]


def test_digits_lt_reports_both_curves_against_tau(digits_lt_report):
    for methods in digits_lt_report["results"].values():
        for tau in ("0.5", "1", "1.5", "2"):
            for name in (f"post hoc, tau = {tau}", f"adjusted loss, tau = {tau}"):
                assert math.isfinite(methods[name]["balanced_error"][0])


def test_digits_lt_reports_the_versions_that_it_ran_with(digits_lt_report):
    assert digits_lt_report["versions"].keys() >= {"python", "fused_la", "torch", "numpy", "scikit-learn"}
    assert all(digits_lt_report["versions"].values())


@pytest.mark.parametrize("name", ["error_by_rank.png", "balanced_error_by_tau.png"])
def test_digits_lt_draws_both_kinds_of_logit_adjustment(digits_lt, name):
    pixels = matplotlib.image.imread(digits_lt[1] / name)[..., :3]
    height, width, _ = pixels.shape
    assert height >= 600
    assert width >= 1200
    for color in ("#E69F00", "#0072B2"):  # post hoc, loss; ERM is as black as the text
        drawn = np.isclose(pixels, matplotlib.colors.to_rgb(color), atol=0.01).all(axis=-1)
        # in both panels, and more than a legend has: a line with its markers
        assert drawn[:, : width // 2].sum() > 1000
        assert drawn[:, width // 2 :].sum() > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--imb-factor", "0"], "--imb-factor must be in (0, 1], got 0"),
        (["--imb-factor", "1.5"], "--imb-factor must be in (0, 1], got 1.5"),
        (["--imb-factor", "nan"], "--imb-factor must be in (0, 1], got nan"),
        (["--imb-factor", "0.005"], "got 0.005, which leaves none to the class of rank 9, 10 of 10"),
    ],
)
def test_digits_lt_refuses_arguments_before_it_trains(
    digits_lt_main, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["digits_lt.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        digits_lt_main()
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
