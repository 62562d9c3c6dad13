"""Tests of examples/online_prior.py, run as a script in this process: what it prints, and that its parts are right."""

import contextlib
import importlib.util
import io
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

SCRIPT = Path(__file__).parents[2] / "examples" / "online_prior.py"
METHODS = ("cross entropy", "adjusted, prior of the start", "adjusted, running prior")


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("online_prior", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(example, monkeypatch):
    def main(*options):
        n_threads = torch.get_num_threads()
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *options])
        try:
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                example.main()
        finally:
            torch.set_num_threads(n_threads)
        return stdout.getvalue()

    return main


def rows_of(printed):
    rows = re.findall(rf"^({'|'.join(METHODS)}) +([ \d.]+)$", printed, flags=re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in rows}


def test_the_running_prior_has_the_lowest_balanced_error_of_a_stream(run):
    printed = run("--steps", "400", "--seeds", "1")
    assert printed.startswith("balanced error in %, mean of 1 streams of 400 steps\n")
    assert re.search(r"^classes +4 +6 +8 +10 +mean$", printed, flags=re.MULTILINE)
    rows = rows_of(printed)
    assert list(rows) == list(METHODS)
    assert all(len(row) == 5 for row in rows.values())
    *others, running = (rows[method][-1] for method in METHODS)
    assert running < min(others) - 5


def test_a_few_steps_end_with_every_class(run):
    rows = rows_of(run("--steps", "5", "--seeds", "2"))
    assert all(len(row) == 5 and max(row) <= 100.0 for row in rows.values())


def test_too_few_steps_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("--steps", "3")
    assert "--steps must be at least 4 and --seeds at least 1, got 3 and 3" in capsys.readouterr().err


def test_a_grown_head_has_the_logits_of_the_classes_that_were_there(example):
    features, head = torch.randn(5, 7), nn.Linear(7, 3)
    grown = example.grow(head, 2)
    assert grown.out_features == 5
    torch.testing.assert_close(grown(features)[:, :3], head(features))


def test_learners_differ_in_their_loss_alone(example):
    """The first step of each, against its loss written out; the prior of the start stops at its last step."""
    images, target = torch.rand(12, 64), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2, 0, 0, 3])
    log_prior = (torch.tensor([8.0, 2.0, 1.0, 1.0]) + 1.0).div(16.0).log()
    for method in METHODS:
        learner, other = example.Learner(method, 0), example.Learner(method, 0)
        learner.step(images, target, example.FIXED_AFTER - 1)
        logits = other.head(other.trunk(images))
        offset = 0.0 if method == "cross entropy" else log_prior
        torch.nn.functional.cross_entropy(logits + offset, target).backward()
        torch.testing.assert_close(learner.head.weight, other.head.weight - 0.1 * other.head.weight.grad)
        torch.testing.assert_close(learner.prior.log_prior, log_prior)
        learner.add_classes(1)
        learner.step(images, target, example.FIXED_AFTER)
        is_fixed = method == "adjusted, prior of the start"
        assert (learner.prior.class_counts[0] == 8.0) == is_fixed
        assert len(learner.prior.class_counts) == learner.head.out_features == 5
