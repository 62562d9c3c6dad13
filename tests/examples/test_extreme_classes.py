"""Tests of examples/extreme_classes.py, run as a user does: in one process, and under torchrun on two ranks."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_la

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "extreme_classes.py"
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(Path(fused_la.__file__).parents[1]),  # the package under test
    "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
SMALL = ["--classes", "1999", "--features", "48", "--batch", "64", "--steps", "6", "--eval", "1000"]


def run(out, *options, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(SCRIPT), *SMALL, *options, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "extreme_classes.json").read_text()), done.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"))


@pytest.mark.slow
def test_training_comes_closer_to_an_optimum_that_nothing_beats(alone):
    report, printed = alone
    start, trained, optimum = (report["results"][name] for name in ("start", "trained", "optimum"))
    assert optimum["loss"] < trained["loss"] < start["loss"]
    assert optimum["balanced_error"] < trained["balanced_error"] < start["balanced_error"]
    assert len(report["losses"]) == 6
    for name in ("start", "trained", "optimum"):
        assert f"{name:8} {report['results'][name]['loss']:8.4f}" in printed


def test_the_optimum_is_the_bayes_rule(tmp_path):
    """Its loss must be the mean of -log of the label's true posterior, computed from the densities in float64."""
    spec = importlib.util.spec_from_file_location("extreme_classes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    mixture = example.make_mixture(300, 8, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    classes = torch.multinomial(mixture.log_prior.exp(), 400, replacement=True, generator=generator)
    features = mixture.draw(classes, generator)
    means = mixture.means(torch.arange(300))
    density = torch.distributions.Independent(torch.distributions.Normal(means.double(), 1.0), 1)
    log_joint = mixture.log_prior.double() + density.log_prob(features[:, None].double())
    exact = -log_joint.log_softmax(1).gather(1, classes[:, None]).mean()
    loss = example.loss_of(mixture, slice(0, 300), features, *example.optimal_head(means), classes)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.slow
def test_two_ranks_reach_the_losses_of_one(alone, tmp_path):
    report, _ = run(tmp_path, ranks=2)
    assert report["settings"]["ranks"] == 2
    assert report["classes_of_rank_0"] == 999
    assert report["losses"] == pytest.approx(alone[0]["losses"], rel=1e-5)
    for name, result in report["results"].items():
        assert result == pytest.approx(alone[0]["results"][name], rel=1e-5)


@pytest.mark.slow
def test_memory_and_shapes_are_told(alone):
    report, printed = alone
    assert report["whole_logits_bytes"] == 4 * 64 * 1999
    assert report["head_bytes"] == 4 * 1999 * 49
    assert "peak beyond head and gradient" in printed


@pytest.mark.parametrize(("options", "message"), [(["--classes", "1"], "--classes must be at least 2, got 1"),
                                                  (["--steps", "0"], "--steps must be at least 1, got 0")])  # fmt: skip
def test_bad_options_are_named(monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *options])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT))["main"]()
    assert message in capsys.readouterr().err
