"""`python -m benchmarks` at tiny sizes on a CPU: the files it writes; nothing wrong is timed or silently missing.

No time is asserted. The command runs from a checkout, so the checkout comes first on the path.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmarks():
    """The modules of the folder, by name."""
    sys.path.insert(0, str(ROOT))
    try:
        names = ("cases", "check", "clocks", "measure", "providers", "report", "run")
        timing = {name: importlib.import_module(f"benchmarks.timing.{name}") for name in names}
        yield SimpleNamespace(main=importlib.import_module("benchmarks.__main__"), **timing)
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture
def job(benchmarks):
    return benchmarks.measure.Job(benchmarks.cases.Case(8, 37, "float32"), "eager", "cpu", 0, seconds=0.001)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The output of the command, and {suffix: path} of the files it writes."""
    out = tmp_path_factory.mktemp("benchmarks")
    providers = ["fused_la blocked", "fused_la triton", "Liger-Kernel", "eager head, folded", "four bare products"]
    tiny = ["--device", "cpu", "--rows", "8", "--classes", "37", "--dtypes", "float32", "--seconds", "0.001"]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", *tiny, "--providers", *providers, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    (folder,) = out.iterdir()  # the device's
    return process.stdout, {path.suffix: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def document(run):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(run[1][".json"].read_text(), parse_constant=refuse)


def test_what_times_imports_nothing_of_what_only_compiles():
    importers = [
        path.name for path in (ROOT / "benchmarks" / "timing").glob("*.py") if "benchmarks.static" in path.read_text()
    ]
    assert importers == []


@pytest.mark.slow
def test_the_command_writes_three_files_of_one_name(run):
    assert set(run[1]) == {".json", ".md", ".png"}
    assert len({path.stem for path in run[1].values()}) == 1


@pytest.mark.slow
def test_results_say_what_they_were_made_on_and_with(document):
    assert document["versions"]["torch"] == torch.__version__
    assert document["versions"].keys() >= {"python", "triton", "fused_la", "liger-kernel", "quack-kernels"}
    assert document["device"]["name"]
    assert document["device"]["copy_gb_per_s"] > 0
    assert document["selection"] == "quick"
    assert document["interrupted"] is False
    assert all(document[key] for key in ("commit", "date", "units", "providers"))


@pytest.mark.slow
def test_every_provider_is_timed_in_every_mode_or_listed_with_the_reason(document):
    found = {}
    for record in document["results"]:
        found.setdefault((record["provider"], record["case"]), []).append(record)
    assert {key[0] for key in found} == set(document["providers"])
    everything = {("forward", "held"), ("backward", "held"), ("both", "held"), ("both", "returned")}
    for (provider, case), records in found.items():
        timed = {(record["mode"], record["memory"]) for record in records if record["status"] == "timed"}
        if provider in ("Liger-Kernel", "fused_la triton"):
            (record,) = records
            assert record["status"] == "not available"
            assert record["reason"] == ("needs a GPU" if provider == "Liger-Kernel" else "interpreter: not timed")
        elif provider == "four bare products":
            assert timed <= {(mode, memory) for mode, memory in everything if mode == "both"}, case
            assert timed
        else:
            assert {one for one in everything if one[1] == "held"} <= timed <= everything


@pytest.mark.slow
def test_figures_follow_from_the_times(document):
    copy = document["device"]["copy_gb_per_s"]
    for record in document["results"]:
        if record["status"] != "timed":
            continue
        assert 0 < record["ms_low"] <= record["ms"] <= record["ms_high"]
        assert record["times_faster_than_eager"] == pytest.approx(record["eager_ms"] / record["ms"])
        if not record["features"]:
            n_bytes = record["rows"] * record["classes"] * 4 * (1 if record["mode"] == "forward" else 2)
            assert record["gb_per_s"] == pytest.approx(n_bytes / record["ms"] / 1e6)
            assert record["share_of_copy"] == pytest.approx(record["gb_per_s"] / copy)
            assert record["gradient_error"] < 1e-5


@pytest.mark.slow
def test_tables_have_a_row_for_every_record_and_every_reason(run, document):
    text = run[1][".md"].read_text()
    timed = [record for record in document["results"] if record["status"] == "timed"]
    for record in timed:
        assert f"| {record['provider']} | {record['ms']:.4g} |" in text
    assert "| Liger-Kernel | all | not available | needs a GPU |" in text
    for key, meaning in document["units"].items():
        assert f"| {key} | {meaning} |" in text


@pytest.mark.slow
def test_the_picture_has_lines(run):
    pixels = matplotlib.image.imread(run[1][".png"])[..., :3]
    assert min(pixels.shape[:2]) >= 400
    assert (pixels.max(-1) - pixels.min(-1) > 0.3).sum() > 200  # in colour


def test_what_is_done_is_kept_on_an_interrupt(benchmarks, job, tmp_path, monkeypatch):
    def interrupted(jobs, timeout, minutes):
        yield job.record("timed", mode="both", timer="alternating", memory="held", ms=2.0, ms_low=1.0, ms_high=3.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarks.main, "in_one_process", interrupted)
    monkeypatch.setattr(benchmarks.main.machine, "device_facts", lambda _: DEVICE_FACTS)
    monkeypatch.setattr(benchmarks.report, "draw", lambda *_: False)
    assert benchmarks.main.main(["--device", "cpu", "--out", str(tmp_path)]) == 130
    (written,) = tmp_path.rglob("*.json")
    document = json.loads(written.read_text())
    assert document["interrupted"] is True
    assert [record["ms"] for record in document["results"]] == [2.0]
    assert "Interrupted" in written.with_suffix(".md").read_text()


DEVICE_FACTS = {"name": "A device", "copy_gb_per_s": 1.0, "cache_bytes": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slow"], "no selection 'slow'; there are 'quick', 'full'"),
        (["--providers", "Tiger-Kernel"], "no provider 'Tiger-Kernel'; there are 'eager'"),
        (["--classes", "0"], "--classes: must be a positive integer, got '0'"),
        (["--classes", "8142.5"], "--classes: must be a positive integer, got '8142.5'"),
        (["--rows", "-1"], "--rows: must be a positive integer, got '-1'"),
        (["--dtypes", "int8"], "no dtype 'int8'; there are 'float32', 'bfloat16', 'float16'"),
        (["--seconds", "nan"], "--seconds: must be a positive number, got 'nan'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--out", __file__], "is not a folder"),
        (["head", "--providers", "Liger-Kernel"], "none of --providers fits the cases of head"),
    ],
)
def test_bad_arguments_are_refused(benchmarks, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        benchmarks.main.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(benchmarks, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmarks.main.parse(["--device", "cuda"])
    assert "--device cuda: this PyTorch finds no GPU" in capsys.readouterr().err


def test_the_list_has_every_selection_and_provider(benchmarks, capsys):
    assert benchmarks.main.main(["--list", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for name in (*benchmarks.cases.SELECTIONS, *benchmarks.providers.PROVIDERS):
        assert f"  {name}: " in printed
    assert "[needs a GPU]" in printed


# What is not timed ----------------------------------------------------------------------------------------------------


def replaced(benchmarks, loss, **changes):
    """The provider eager with another loss(logits, batch)."""
    return replace(
        benchmarks.providers.PROVIDERS["eager"], load=lambda *_: lambda leaves, batch: loss(leaves[0], batch), **changes
    )


def loss_off_by_a_thousandth(logits, batch):
    loss = torch.nn.functional.cross_entropy(logits + batch.log_prior, batch.target)
    return loss + 1e-3 * loss.detach()


def no_offset(logits, batch):
    return torch.nn.functional.cross_entropy(logits, batch.target)


def gradient_off_by_a_thousandth(logits, batch):
    loss = torch.nn.functional.cross_entropy(logits + batch.log_prior, batch.target)
    return loss + 1e-3 * (loss - loss.detach())


def wrong_without_gradient(logits, batch):
    loss = torch.nn.functional.cross_entropy(logits + batch.log_prior, batch.target)
    return loss if logits.requires_grad else 2 * loss


class OneRowWithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, *grad_outputs):
        (gradient,) = grad_outputs
        gradient[-1] = 0.0
        return gradient


def no_gradient_in_the_last_row(logits, batch):
    return torch.nn.functional.cross_entropy(OneRowWithoutGradient.apply(logits) + batch.log_prior, batch.target)


def not_a_number(logits, batch):
    return torch.nn.functional.cross_entropy(logits + batch.log_prior, batch.target) * float("nan")


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (loss_off_by_a_thousandth, "loss is off by 0.001 of itself"),
        (no_offset, "loss is off by"),
        (gradient_off_by_a_thousandth, "gradient is off by 0.001 of itself"),
        (wrong_without_gradient, "loss is off by 1 of itself"),
        (not_a_number, "loss is off by nan of itself"),
    ],
)
def test_a_wrong_provider_is_listed_with_its_error_and_not_timed(benchmarks, job, loss, what):
    (record,) = benchmarks.measure.measure(job, replaced(benchmarks, loss))
    assert record["status"] == "wrong"
    assert what in record["reason"]
    assert "ms" not in record


def test_one_wrong_row_of_many_is_found(benchmarks, job):
    """One of 30,000 rows is 0.6 % of the gradient's norm, less than bfloat16 rounds away.

    A kernel whose last program is wrong leaves such a row.
    """
    case = benchmarks.cases.Case(30_000, 37, "bfloat16")
    (record,) = benchmarks.measure.measure(replace(job, case=case), replaced(benchmarks, no_gradient_in_the_last_row))
    assert record["status"] == "wrong"
    assert record["gradient_error"] < torch.finfo(torch.bfloat16).eps < 0.5 < record["row_error"]
    assert "gradient of a row is off by" in record["reason"]


def test_float16_gradients_of_many_rows_are_scaled_as_they_are_in_training(benchmarks, job):
    """1 / 30,000 of a probability of 1/2,000 is 0 in float16: without a loss scale every gradient would be wrong."""
    case = benchmarks.cases.Case(30_000, 17, "float16")
    for name in ("eager", "fused_la blocked"):
        records = list(benchmarks.measure.measure(replace(job, case=case, provider=name, time=False)))
        assert [(record["status"], record["reason"]) for record in records] == [("checked", "")], name


@pytest.mark.parametrize("target", ["hard", "two-label", "soft"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fused_la_and_eager_pass_the_check(benchmarks, job, dtype, target):
    case = benchmarks.cases.Case(8, 37, dtype, target)
    for name in ("eager", "eager, folded", "fused_la reference", "fused_la blocked"):
        records = list(benchmarks.measure.measure(replace(job, case=case, provider=name, time=False)))
        assert [(record["status"], record["reason"]) for record in records] == [("checked", "")], name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_pass_the_check(benchmarks, job, dtype):
    case = benchmarks.cases.Case(16, 37, dtype, n_features=30)
    for name in ("eager head", "eager head, folded"):
        records = list(benchmarks.measure.measure(replace(job, case=case, provider=name, time=False)))
        assert [(record["status"], record["reason"]) for record in records] == [("checked", "")], name


def test_a_bias_as_the_weight_of_a_feature_gives_the_same_loss_and_gradients(benchmarks, job):
    head = benchmarks.providers.PROVIDERS["cut-cross-entropy"]

    def loss(leaves, batch):
        features, weight = leaves
        assert features.shape[1] == weight.shape[1] == 64
        return torch.nn.functional.cross_entropy(features @ weight.T, batch.target)

    case = benchmarks.cases.Case(16, 37, "float32", n_features=30)
    provider = replace(head, load=lambda *_: loss, not_on={})
    (record,) = benchmarks.measure.measure(replace(job, case=case, time=False), provider)
    assert (record["status"], record["reason"]) == ("checked", "")


def test_a_loss_that_overwrites_its_logits_gets_a_fresh_copy_every_time(benchmarks, job):
    def loss(logits, batch):
        value = torch.nn.functional.cross_entropy(logits + batch.log_prior, batch.target)
        logits.detach().zero_()  # backward needs the sum logits + log_prior, not logits
        return value

    records = list(benchmarks.measure.measure(job, replaced(benchmarks, loss, overwrites=True)))
    assert {record["status"] for record in records} == {"timed"}
    (record,) = benchmarks.measure.measure(job, replaced(benchmarks, loss, overwrites=False))
    assert record["status"] == "wrong"


def test_a_loss_that_is_not_a_number_does_not_end_the_run(benchmarks, job, tmp_path, monkeypatch):
    """Its errors are NaN too, which JSON does not have."""
    records = [*benchmarks.measure.measure(job, replaced(benchmarks, not_a_number)), job.record("skipped", "next")]
    monkeypatch.setattr(benchmarks.main, "in_one_process", lambda *_: (record for record in records))
    monkeypatch.setattr(benchmarks.main.machine, "device_facts", lambda _: DEVICE_FACTS)
    assert benchmarks.main.main(["--device", "cpu", "--out", str(tmp_path)]) == 1  # nothing was timed
    (path,) = tmp_path.glob("*/*.json")
    wrong, following = json.loads(path.read_text(), parse_constant=pytest.fail)["results"]
    assert (wrong["status"], wrong["loss_error"], wrong["gradient_error"]) == ("wrong", "nan", "nan")
    assert following["reason"] == "next"
    assert "loss is off by nan of itself" in path.with_suffix(".md").read_text()


def test_a_provider_that_fails_leaves_its_traceback(benchmarks, job):
    def loss(logits, batch):
        raise RuntimeError("out of order")

    (record,) = benchmarks.measure.measure(job, replaced(benchmarks, loss))
    assert (record["status"], record["reason"]) == ("failed", "RuntimeError: out of order")
    assert "Traceback" in record["traceback"]


def test_one_mode_that_fails_does_not_lose_the_others(benchmarks, job):
    def loss(logits, batch):
        if not logits.requires_grad and checked:
            raise RuntimeError("no evaluation")
        checked.extend([None] * (not logits.requires_grad))
        return torch.nn.functional.cross_entropy(logits + batch.log_prior, batch.target)

    checked = []
    records = list(benchmarks.measure.measure(job, replaced(benchmarks, loss)))
    assert [(record["mode"], record["status"]) for record in records] == [
        ("forward", "failed"),
        ("backward", "timed"),
        ("both", "timed"),
    ]


def test_a_provider_that_is_not_installed_is_listed(benchmarks, job):
    provider = replace(
        benchmarks.providers.PROVIDERS["eager"], load=lambda *_: importlib.import_module("no_such_package")
    )
    (record,) = benchmarks.measure.measure(job, provider)
    assert record["status"] == "not available"
    assert "No module named 'no_such_package'" in record["reason"]


def test_what_does_not_fit_is_skipped_before_anything_is_allocated(benchmarks, job, monkeypatch):
    monkeypatch.setattr(benchmarks.clocks, "free_memory", lambda _: 10**9)
    monkeypatch.setattr(benchmarks.measure, "make_batch", None)
    case = benchmarks.cases.Case(2048, 1048576, "float32")
    (record,) = benchmarks.measure.measure(replace(job, case=case))
    assert record["status"] == "skipped"
    assert record["bytes_needed"] > 3 * case.logits_bytes
    assert f"needs {record['bytes_needed']:,} bytes, 1,000,000,000 are free" in record["reason"]


# Processes ------------------------------------------------------------------------------------------------------------


def test_a_crash_costs_one_job_and_the_next_has_a_process_of_its_own(benchmarks, job):
    """Unpickling this job ends the worker process."""

    class Crash(benchmarks.measure.Job):
        def __reduce__(self):
            return os._exit, (self.cache_bytes,)

    jobs = [Crash(job.case, "eager", "cpu", code) for code in (3, 4)]
    records = list(benchmarks.run.in_one_process(jobs, timeout=100, minutes=100))
    assert [(record["status"], record["reason"]) for record in records] == [
        ("crashed", "its process ended with exit code 3"),
        ("crashed", "its process ended with exit code 4"),
    ]


def test_a_job_that_hangs_is_stopped(benchmarks, job):
    start = time.monotonic()
    (record,) = benchmarks.run.in_one_process([job], timeout=0.01, minutes=100)  # too short for the process to start
    assert (record["status"], record["reason"]) == ("failed", "no result within 0.01 s: stopped")
    assert time.monotonic() - start < 60


def test_no_job_begins_after_the_minutes_of_a_selection(benchmarks, job):
    (record,) = benchmarks.run.in_one_process([job], timeout=100, minutes=-1)
    assert record["status"] == "skipped"
    assert "not begun within" in record["reason"]


def test_fresh_processes_are_reported_by_the_median_and_how_far_they_go(benchmarks, job):
    records = [
        job.record("timed", mode="both", ms=ms, eager_ms=12.0, ms_low=0.0, ms_high=9.0, rounds=3)
        for ms in (2.0, 4.0, 3.0)
    ]
    together = benchmarks.run.combine_records(records, {"loss_error": 1e-7})
    assert (together["ms_low"], together["ms"], together["ms_high"]) == (2.0, 3.0, 4.0)
    assert (together["ratio_low"], together["times_faster_than_eager"], together["ratio_high"]) == (3.0, 4.0, 6.0)
    assert together["loss_error"] == 1e-7
    assert together["gb_per_s"] == pytest.approx(2 * 8 * 37 * 4 / 3.0 / 1e6)
    assert together["processes"] == 3


# What a GPU needs, tested without one ---------------------------------------------------------------------------------


def test_device_times_are_of_the_run_alone(benchmarks, monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")
            self.at = len(log)

        def elapsed_time(self, end):
            assert log[-1] == "synchronized"
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronized"))

    def prepare():
        log.append("prepared")
        return "run"

    times = benchmarks.clocks.device_times(prepare, log.append, lambda: log.append("flushed"), rounds=2)
    assert log == 2 * ["prepared", "flushed", "event", "run", "event"] + ["synchronized"]
    assert times == [2, 2]


@pytest.fixture
def gpu_job(benchmarks, job, monkeypatch):
    """A job for a GPU, with tensors and events of a CPU."""

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.at = time.perf_counter()

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    make_batch = benchmarks.cases.make_batch
    monkeypatch.setattr(benchmarks.measure, "make_batch", lambda case, device: make_batch(case, "cpu"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(benchmarks.clocks, "free_memory", lambda device: 10**10)
    monkeypatch.setattr(benchmarks.clocks, "peak_memory", lambda run, device: run() is None or 1)
    monkeypatch.setattr(benchmarks.clocks, "cache_flush", lambda n_bytes: lambda: None)
    monkeypatch.setattr(benchmarks.clocks, "captured", lambda step: step.both)
    return replace(job, device="cuda", cache_bytes=10**6)


def test_on_a_gpu_every_way_of_timing_gives_a_record(benchmarks, gpu_job):
    records = list(benchmarks.measure.measure(gpu_job))
    assert [(record["status"], record["timer"], record["mode"], record["reason"]) for record in records] == [
        ("timed", "events", "forward", ""),
        ("timed", "events", "backward", ""),
        ("timed", "events", "both", ""),
        ("timed", "wall", "both", ""),
        ("timed", "graph", "both", ""),
    ]
    assert all(record["ms"] > 0 and record["gb_per_s"] > 0 for record in records)
    assert ["peak_bytes" in record for record in records] == [True, False, True, False, False]


def test_what_cannot_be_captured_is_listed_and_its_process_not_used_again(benchmarks, gpu_job, monkeypatch):
    def captured(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(benchmarks.clocks, "captured", captured)
    records = benchmarks.measure.measure(replace(gpu_job, modes=("both",)))
    assert [(next(records)["timer"]) for _ in range(2)] == ["events", "wall"]
    record = next(records)
    assert (record["status"], record["timer"]) == ("failed", "graph")
    assert record["reason"] == "RuntimeError: operation not permitted when stream is capturing"
    with pytest.raises(benchmarks.measure.GpuBrokenError):
        next(records)


def test_a_gpu_is_timed_by_the_clock_and_as_a_graph_where_the_logits_fit_its_cache(benchmarks, job):
    eager = benchmarks.providers.PROVIDERS["eager"]
    gpu = replace(job, device="cuda", cache_bytes=10**6)
    settings = [(one["timer"], one["mode"]) for one in benchmarks.measure.settings(gpu, eager)]
    events = [("events", mode) for mode in ("forward", "backward", "both")]
    assert settings == [*events, ("wall", "both"), ("graph", "both")]
    gpu = replace(gpu, cache_bytes=1)
    assert [(one["timer"], one["mode"]) for one in benchmarks.measure.settings(gpu, eager)] == events


def test_on_a_gpu_ratios_are_against_the_row_of_eager(benchmarks, job):
    setting = dict(mode="both", timer="events", memory="")
    records = [
        replace(job, provider=name).record("timed", **setting, ms=ms, gb_per_s=10.0)
        for name, ms in (("eager", 6.0), ("QuACK", 2.0))
    ]
    benchmarks.report.add_ratios(records, 40.0)
    assert [(r["times_faster_than_eager"], r["share_of_copy"]) for r in records] == [(1.0, 0.25), (3.0, 0.25)]


def test_big_is_four_times_the_cache(benchmarks):
    cases = benchmarks.cases
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        case = cases.with_rows(cases.Case(cases.BIG, 8142, dtype), 50 * 2**20)
        assert 0 <= case.n_rows * 8142 * size - 4 * 50 * 2**20 < 8142 * size
