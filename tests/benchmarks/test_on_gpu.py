"""`benchmarks/on_gpu.sh` without a GPU: which stages and jobs run or stop, which results stay, what its checks find.

Times are asserted only where something must stop. The test of the dry run itself is slow.
"""

import base64
import hashlib
import importlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fused_la import logit_adjusted_cross_entropy
from fused_la._call.problem import Problem

ROOT = Path(__file__).parents[2]
COMMAND = ["bash", str(ROOT / "benchmarks" / "on_gpu.sh")]


@pytest.fixture(scope="module")
def benchmarks():
    """The modules of the folder, by name."""
    sys.path.insert(0, str(ROOT))
    try:
        names = (
            "accuracy",
            "on_gpu",
            *(f"timing.{name}" for name in ("cases", "clocks", "pool", "profiled", "run", "speed")),
        )
        yield SimpleNamespace(
            **{name.removeprefix("timing."): importlib.import_module(f"benchmarks.{name}") for name in names}
        )
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture
def new_run(benchmarks, tmp_path):
    return lambda seconds=100.0, dry=False: benchmarks.on_gpu.Run(tmp_path, seconds, dry)


def written(run):
    return [json.loads(line) for line in (run.out / "results.jsonl").read_text().splitlines()]


# Stages ---------------------------------------------------------------------------------------------------------------


def test_a_stage_that_the_time_left_does_not_hold_is_not_begun(benchmarks, new_run):
    begun = []

    def stage(name, least):
        def records(run, until):
            begun.append(name)
            return [{"status": "right"}]

        return benchmarks.on_gpu.Stage(name, least, 0.5, records)

    run = new_run(seconds=20.0)
    benchmarks.on_gpu.run_stages(run, [stage("long", 16.0), stage("short", 1.0)])
    assert begun == ["short"]
    (skipped,) = run.of("long")
    assert (skipped["status"], skipped["reason"]) == ("skipped", "not begun: 15 s were left")
    assert [record["status"] for record in run.of("short")] == ["right", "ended"]


def test_a_stage_gets_its_share_of_the_time_and_none_after_the_end(benchmarks, new_run):
    given = {}

    def stage(name, share):
        return benchmarks.on_gpu.Stage(name, 0.0, share, lambda run, until: given.update({name: until}) or [])

    run = new_run(seconds=100.0)
    benchmarks.on_gpu.run_stages(run, [stage("some", 0.25), stage("rest", 1.0)])
    assert given["some"] == pytest.approx(run.started + 25, abs=5)
    assert given["rest"] == run.deadline == run.started + 100 - benchmarks.on_gpu.WRAP_UP_SECONDS


def test_a_stage_that_raises_keeps_what_it_had_and_the_next_one_goes_on(benchmarks, new_run):
    def raising(run, until):
        yield {"status": "right", "option": "first"}
        assert written(run)[-1]["option"] == "first"  # it is in the file already
        raise RuntimeError("out of order")

    run = new_run()
    stages = [benchmarks.on_gpu.Stage(name, 0.0, 1.0, raising) for name in ("accuracy", "speed")]
    benchmarks.on_gpu.run_stages(run, stages)
    found = [(record["stage"], record["status"]) for record in written(run)]
    assert found == [(s.name, status) for s in stages for status in ("right", "failed", "ended")]
    assert "out of order" in (run.out / "summary.md").read_text()
    assert [r["reason"] for r in benchmarks.on_gpu.problems(run)] == ["RuntimeError: out of order"] * 2


@pytest.mark.parametrize(
    ("stage", "record", "dry", "wrong"),
    [
        ("accuracy", {"status": "wrong"}, False, True),
        ("accuracy", {"status": "crashed"}, False, True),
        ("speed", {"status": "failed", "provider": "fused_la triton"}, False, True),
        ("speed", {"status": "failed", "provider": "QuACK"}, False, False),
        ("wheels", {"status": "failed"}, False, False),
        ("tests", {"status": "wrong"}, False, True),
        ("profile", {"status": "not available"}, False, False),
        ("accuracy", {"status": "skipped"}, False, False),
        ("accuracy", {"status": "skipped"}, True, True),
        ("speed", {"status": "unfinished"}, True, True),
    ],
)
def test_all_that_is_wrong_counts_but_a_library_that_is_only_compared_with(
    benchmarks, new_run, stage, record, dry, wrong
):
    run = new_run(dry=dry)
    run.add(stage, record)
    assert bool(benchmarks.on_gpu.problems(run)) == wrong


# Cases in processes of their own --------------------------------------------------------------------------------------


class Job:
    """A job at module level, so that it can be pickled by name."""

    def __init__(self, what):
        self.what = what

    def record(self, status, reason="", **figures):
        return {"job": self.what, "status": status, "reason": reason, **figures}

    def run(self):
        yield self.record("begun", pid=os.getpid())
        if self.what == "crashes":
            os._exit(7)
        if self.what == "raises":
            raise RuntimeError("out of order")
        if self.what == "hangs":
            time.sleep(1000)
        yield self.record("right")


def outcome(records):
    return [(record["job"], record["status"], record["reason"]) for record in records if record["status"] != "begun"]


def test_a_case_that_crashes_keeps_what_it_had_and_the_next_has_a_process_of_its_own(benchmarks):
    jobs = [Job("first"), Job("raises"), Job("crashes"), Job("last")]
    records = list(benchmarks.pool.in_processes(jobs, 1, time.monotonic() + 200, timeout=100))
    assert outcome(records) == [
        ("first", "right", ""),
        ("raises", "failed", "RuntimeError: out of order"),
        ("crashes", "crashed", "its process ended with exit code 7"),
        ("last", "right", ""),
    ]
    first, second, third, last = (record["pid"] for record in records if record["status"] == "begun")
    assert first == second == third != last  # a process is kept as long as it lives
    assert "Traceback" in next(record["traceback"] for record in records if record["status"] == "failed")


@pytest.mark.slow
def test_a_case_that_hangs_is_stopped_while_others_go_on(benchmarks):
    jobs = [Job("hangs"), *(Job(i) for i in range(4))]
    start = time.monotonic()
    records = list(benchmarks.pool.in_processes(jobs, 2, time.monotonic() + 200, timeout=20))
    assert time.monotonic() - start < 100
    assert set(outcome(records)) == {
        ("hangs", "failed", "no result within 20 s: stopped"),
        *((i, "right", "") for i in range(4)),
    }
    hung = next(record["pid"] for record in records if record["job"] == "hangs")
    with pytest.raises(ProcessLookupError):
        os.kill(hung, 0)


def test_a_case_does_not_run_on_after_the_time_of_its_stage(benchmarks):
    start = time.monotonic()
    records = list(benchmarks.pool.in_processes([Job("hangs"), Job("next")], 1, start + 3, timeout=100))
    assert time.monotonic() - start < 60
    assert outcome(records) == [
        ("hangs", "unfinished", "stopped: the time of its stage was over"),
        ("next", "skipped", "not begun: too little time was left"),
    ]


def test_no_case_begins_without_the_time_that_it_needs(benchmarks):
    records = list(
        benchmarks.pool.in_processes([Job(0), Job(1)], 2, time.monotonic() + 10, timeout=100, min_seconds=11)
    )
    assert [record["status"] for record in records] == ["skipped", "skipped"]


def test_a_command_that_does_not_end_is_stopped_and_its_output_kept(benchmarks, tmp_path):
    path = tmp_path / "output.txt"
    script = "echo begun; sleep 1000 & echo $!; wait"
    start = time.monotonic()
    assert benchmarks.on_gpu.run_command(["bash", "-c", script], path, start + 2) is None
    assert time.monotonic() - start < 30
    begun, pid = path.read_text().split()
    assert begun == "begun"
    for _ in range(100):  # its child ends too: it is gone, or a zombie that nobody has waited for yet
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            break
        if state == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {pid} runs on")
    assert benchmarks.on_gpu.run_command(["bash", "-c", "exit 5"], path, time.monotonic() + 60) == 5


# Wheels ---------------------------------------------------------------------------------------------------------------


def make_wheel(folder, name, files):
    """The smallest wheel that pip installs."""
    info = f"{name}-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: no-such-package\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            lines.append(f"{path},sha256={digest},{len(text.encode())}")
            wheel.writestr(path, text)
        wheel.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,"]) + "\n")


def test_wheels_are_installed_offline_and_a_broken_one_costs_only_itself(benchmarks, tmp_path, monkeypatch):
    """Two wheels may have files in one folder, and a .pth file may add another folder to the path."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    make_wheel(
        folder, "peer_one", {"shared_peer/one.py": "ONE = 1\n", "shared_peer/more/hidden_peer.py": "THREE = 3\n"}
    )
    pth = "import os, sys; sys.path.insert(0, os.path.join(sitedir, 'shared_peer', 'more'))\n"
    make_wheel(folder, "peer_two", {"shared_peer/two.py": "TWO = 2\n", "peer_two.pth": pth})
    (folder / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip file")
    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.setattr(sys, "path", list(sys.path))
    records = {r["wheel"].partition("-")[0]: r for r in benchmarks.on_gpu.install_wheels(folder, tmp_path / "target")}
    assert {name: record["status"] for name, record in records.items()} == {
        "broken": "failed",
        "peer_one": "installed",
        "peer_two": "installed",
    }
    assert records["broken"]["reason"]
    benchmarks.on_gpu.add_to_path(tmp_path / "target" / "site")
    script = "from shared_peer.one import ONE; from shared_peer.two import TWO; from hidden_peer import THREE"
    check = f"{script}; from importlib.metadata import version; print(ONE, TWO, THREE, version('peer_one'))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "2", "3", "1.0"], done.stderr
    assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert os.environ["PYTHONPATH"].split(os.pathsep)[-1] == "before"


def test_no_wheels_are_no_error(benchmarks, tmp_path):
    assert list(benchmarks.on_gpu.install_wheels(tmp_path / "nowhere", tmp_path)) == []


# ncu ------------------------------------------------------------------------------------------------------------------


def test_ncu_output_is_read_kernel_by_kernel(benchmarks):
    first, second = benchmarks.profiled.parse(benchmarks.profiled.SAMPLE)
    assert (first["kernel"], first["grid"], first["block"]) == ("_resident_kernel", "(12879, 1, 1)", "(128, 1, 1)")
    assert (first["dram_read_bytes"], first["time_ns"], first["registers"]) == (200e6, 150_000.5, 104)
    assert first["stall_long_scoreboard"] == 7.25
    assert "stall_wait" not in first  # n/a
    assert (second["kernel"], second["time_ns"]) == ("_prepare_kernel", 4000)


def test_what_ncu_says_of_an_error_is_found(benchmarks):
    text = "==PROF== Connected to process 1\n==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\nbye\n"
    assert benchmarks.profiled.parse(text) == []
    assert "ERR_NVGPUCTRPERM" in benchmarks.profiled.error_summary(text)


def test_ncu_leaves_the_clocks_alone_and_profiles_one_step(benchmarks):
    command = benchmarks.profiled.command("ncu", ["a", "b"], ["python3", "-m", "x"])
    line = " ".join(command)
    assert "--clock-control none" in line
    assert "--profile-from-start off" in line
    assert "--csv" in line
    assert line.endswith("--metrics a,b python3 -m x")


@pytest.fixture
def fake_ncu(benchmarks, new_run, monkeypatch):
    """A function that runs the profile stage with a bash script as ncu; returns the run and the stage's records."""

    def make(script):
        run = new_run()
        path = run.out / "ncu"
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
        (run.out / "sample").write_text(benchmarks.profiled.SAMPLE)
        monkeypatch.setattr(benchmarks.profiled, "find_ncu", lambda: str(path))
        return run, list(benchmarks.on_gpu.profile_stage(run, time.monotonic() + 100))

    return make


def test_counters_are_read_for_each_number_of_classes(fake_ncu):
    run, records = fake_ncu('cat "$(dirname "$0")/sample"')
    assert [(r["classes"], r["kernel"], r["status"]) for r in records] == [
        (classes, kernel, "profiled")
        for classes in (8142, 131072)
        for kernel in ("_resident_kernel", "_prepare_kernel")
    ]
    assert "_resident_kernel" in (run.out / "ncu-8142.csv").read_text()


def test_an_ncu_that_knows_not_all_metrics_is_asked_for_the_few_that_matter_most(fake_ncu):
    _, records = fake_ncu('[[ "$*" == *stalled* ]] && exit 1; cat "$(dirname "$0")/sample"')
    assert [record["status"] for record in records] == ["profiled"] * 4


def test_an_ncu_that_fails_is_said_to_have_failed(fake_ncu):
    _, records = fake_ncu("echo '==ERROR== no counters here'; exit 3")
    assert [(r["status"], r["reason"]) for r in records] == [("failed", "exit code 3: ==ERROR== no counters here")] * 2


# Accuracy -------------------------------------------------------------------------------------------------------------


def wrong_by_a_ten_thousandth(logits, target, log_prior, tau, **options):
    loss = logit_adjusted_cross_entropy(logits, target, log_prior, tau, **options | {"impl": "reference"})
    return loss + 1e-4 * loss.detach()


def gradient_wrong_by_a_thousandth(logits, target, log_prior, tau, **options):
    loss = logit_adjusted_cross_entropy(logits, target, log_prior, tau, **options | {"impl": "reference"})
    return loss + 1e-3 * (loss - loss.detach())


def not_a_number(logits, target, log_prior, tau, **options):
    return float("nan") * logit_adjusted_cross_entropy(logits, target, log_prior, tau, **options)


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (logit_adjusted_cross_entropy, ""),
        (wrong_by_a_ten_thousandth, "loss is off by"),
        (gradient_wrong_by_a_thousandth, "gradient 1 is off by"),
        (not_a_number, "loss is NaN"),
    ],
)
def test_a_loss_is_right_or_wrong_by_what_the_oracle_says(benchmarks, monkeypatch, loss, what):
    def option(x):
        logits, target, log_prior = benchmarks.accuracy.default_inputs(x)
        yield benchmarks.accuracy.logits_trial(x, logits, target, log_prior, loss=loss)

    monkeypatch.setitem(benchmarks.accuracy.OPTIONS, "one label", option)
    (record,) = benchmarks.accuracy.AccuracyJob("one label", "float32", "cpu").run()
    assert record["status"] == ("wrong" if what else "right")
    assert what in record["reason"]
    assert (record["part_of_allowed"] > 1) == bool(what)


@pytest.mark.parametrize("option", ["head", "vector scaling", "post hoc"])
def test_margins_heads_and_counts_are_judged_too(benchmarks, monkeypatch, option):
    """A relative error of a thousandth is over the limit of each of them."""
    record = next(benchmarks.accuracy.AccuracyJob(option, "float32", "cpu").run())
    assert record["status"] == "right"
    original = benchmarks.accuracy.judge

    def off(trial):
        return original(trial._replace(actual=lambda: [1.001 * part.double() for part in trial.actual()]))

    monkeypatch.setattr(benchmarks.accuracy, "judge", off)
    record = next(benchmarks.accuracy.AccuracyJob(option, "float32", "cpu").run())
    assert record["status"] == "wrong"


def test_every_option_is_tried_in_every_dtype_the_most_valuable_first(benchmarks):
    jobs = benchmarks.accuracy.jobs("cuda")
    assert (jobs[0].option, jobs[0].dtype) == ("one label", "bfloat16")
    found = {(job.option, job.dtype) for job in jobs}
    assert len(found) == len(jobs)
    for option in benchmarks.accuracy.OPTIONS:
        dtypes = benchmarks.accuracy.ONLY_DTYPES.get(option, ("bfloat16", "float32", "float16", "float64"))
        assert {dtype for other, dtype in found if other == option} == set(dtypes)
    dry = {job.option for job in benchmarks.accuracy.dry_run_jobs()}
    assert dry == set(benchmarks.accuracy.OPTIONS)


# Speed ----------------------------------------------------------------------------------------------------------------


def test_speed_is_measured_in_order_of_value(benchmarks):
    jobs = benchmarks.speed.jobs(50 * 2**20)
    first = ("fused_la triton", "fused_la, streaming", "eager", "torch.compile")
    assert [(job.case.n_classes, job.provider) for job in jobs[:8]] == [
        (classes, provider) for classes in (8142, 8192) for provider in first
    ]
    of_bfloat16 = [job for job in jobs if job.case.dtype == "bfloat16"]
    assert jobs[: len(of_bfloat16)] == of_bfloat16
    assert {job.case.n_classes for job in jobs} == {1000, 8142, 8192, 32768, 131072}
    for job in jobs:
        if job.few:
            assert job.case.n_rows == 256
        else:
            row = job.case.logits_bytes / job.case.n_rows
            assert 0 <= job.case.logits_bytes - 4 * 50 * 2**20 < row
    everyone = {"fused_la triton", "eager", "torch.compile", "Liger-Kernel", "QuACK"}
    for case in {job.case for job in jobs}:
        streamed = (
            {"fused_la, streaming"}
            if case.n_rows != 256 and case.n_classes <= 32768 // (case.torch_dtype.itemsize // 2)
            else set()
        )
        assert {job.provider for job in jobs if job.case == case} == everyone | streamed


def test_what_is_timed_as_streaming_streams(benchmarks):
    passes = importlib.import_module("fused_la._triton.loss")

    def kernel():
        logits, target = torch.zeros(2, 300), torch.zeros(2, dtype=torch.int64)
        signature = passes.signature_of(Problem(logits, None, target))
        return passes.plan_launches(signature, "mean", False, True).row_kernel.kernel.__name__

    assert kernel() == "_resident_kernel"
    with benchmarks.speed.streaming():
        assert kernel() == "_streamed_kernel"
    assert kernel() == "_resident_kernel"


def test_the_host_is_timed_in_short_batches_that_begin_with_an_idle_device(benchmarks, monkeypatch):
    log = []
    monkeypatch.setattr(benchmarks.clocks, "synchronize", log.append)
    step = SimpleNamespace(reset=lambda: log.append("reset"), both=lambda: log.append("step"))
    times = benchmarks.speed.host_times(step, 2, "cuda")
    n = benchmarks.speed.STEPS_IN_QUEUE
    assert log == 2 * (["cuda"] + n * ["reset", "step"]) + ["cuda"]
    assert len(times) == 2 * n
    assert all(ms >= 0 for ms in times)


def test_a_figure_that_fails_does_not_lose_the_others(benchmarks, monkeypatch):
    case = benchmarks.cases.Case(5, 37, "float32")
    job = benchmarks.speed.SpeedJob(case, "eager", "cpu", 0, seconds=0.01, few=True)

    def host_times(*_):
        raise RuntimeError("out of order")

    monkeypatch.setattr(benchmarks.speed, "host_times", host_times)
    records = list(job.run())
    assert [(r["timer"], r["status"]) for r in records] == [("host", "failed"), ("wall", "timed"), ("graph", "timed")]
    assert records[0]["reason"] == "RuntimeError: out of order"


def test_a_provider_that_is_wrong_is_not_timed(benchmarks, monkeypatch):
    case = benchmarks.cases.Case(5, 37, "float32")
    monkeypatch.setattr(benchmarks.speed.measure, "check", lambda *_: ({"loss_error": 1.0}, "loss is off"))
    (record,) = benchmarks.speed.SpeedJob(case, "eager", "cpu", 0, seconds=0.01).run()
    assert (record["status"], record["reason"]) == ("wrong", "loss is off")


# Tests, and the summary -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("....F. [ 50%]\n..s\n= short summary =\nFAILED a - b\n1 failed, 7 passed, 1 skipped in 3.20s\n",
         {"failed": 1, "passed": 7, "skipped": 1}),
        ("tests/triton/test_gpu.py::a\n\n44 tests collected in 2.31s\n", {"collected": 44}),
        ("........ [ 50%]\n..FE\n", {"passed": 10, "failed": 1, "errors": 1}),
        ("", {"passed": 0, "failed": 0, "errors": 0}),
    ],
)  # fmt: skip
def test_tests_are_counted_also_where_pytest_was_stopped(benchmarks, text, counts):
    assert benchmarks.on_gpu.counts_of_tests(text) == counts


def test_tests_that_are_all_skipped_are_not_passed(benchmarks, new_run):
    """Tests marked gpu are skipped without one."""
    (record,) = benchmarks.on_gpu.tests_stage(new_run(), time.monotonic() + 300)
    if torch.cuda.is_available():
        assert record["status"] == "passed"
    else:
        assert (record["status"], record["reason"]) == ("wrong", "no test ran")
        assert record["skipped"] > 10


def test_the_summary_of_a_whole_run_is_short_and_has_what_matters(benchmarks, new_run):
    run = new_run(420.0)
    run.add("run", {"status": "begun", "name": "A GPU", "torch": "2.11.0"})
    for job in benchmarks.accuracy.jobs("cuda"):
        run.add("accuracy", job.record("right", part_of_allowed=0.5))
    run.records[1] |= {"status": "wrong", "reason": "loss is off"}
    run.add("speed", benchmarks.speed.CopyJob("cuda", 0).record("timed", gb_per_s=3000.0))
    for job in benchmarks.speed.jobs(50 * 2**20):
        for mode, timer in job.modes_and_timers():
            figures = {"ms": 0.5, "ms_low": 0.25, "ms_high": 1.0, "gb_per_s": 1500.0}
            run.add("speed", job.record("timed", mode=mode, timer=timer, **figures))
    full = dict.fromkeys(benchmarks.profiled.METRICS.values(), 1.0)
    for classes in benchmarks.profiled.CLASSES:
        run.add("profile", {"status": "profiled", "classes": classes, "kernel": "_resident_kernel", **full})
    run.add("tests", {"status": "passed", "passed": 44})
    text = benchmarks.on_gpu.summary(run)
    assert len(text.splitlines()) <= 64
    for expected in ("A GPU", "loss is off", "Copy: 3000 GB/s", "| 50% | 0.5 |", "500, 250", "issue_slots_percent",
                     "QuACK", "256x131072-bfloat16", "44 passed"):  # fmt: skip
        assert expected in text


# The command ----------------------------------------------------------------------------------------------------------


def run_command(arguments, out):
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=600, env=environment, cwd=out.parent
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run_command([], tmp_path / "out")
    assert done.returncode == 2
    assert "this PyTorch finds no GPU; --dry-run goes through all that needs none" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_dry_run_without_time_begins_no_stage_and_fails(tmp_path):
    done = run_command(["6", "--dry-run"], tmp_path / "out")
    assert done.returncode == 1, done.stderr
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert records[0]["at"] > 0.2  # the time of importing PyTorch counts
    skipped = {record["stage"] for record in records if record["status"] == "skipped"}
    assert skipped == {"accuracy", "speed", "profile", "tests"}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_dry_run_goes_through_every_stage_and_writes_its_files(benchmarks, tmp_path):
    out = tmp_path / "out"
    done = run_command(["--dry-run"], out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "summary.md", "ncu-37.csv", "tests.txt"}
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    of = {stage: [r for r in records if r["stage"] == stage] for stage in ("accuracy", "speed", "profile", "tests")}
    for found in of.values():
        assert found[-1]["status"] == "ended"
    assert {r["option"] for r in of["accuracy"] if r["status"] == "right"} == set(benchmarks.accuracy.OPTIONS)
    timed = {(r["provider"], r["timer"]) for r in of["speed"] if r["status"] == "timed" and r["provider"] != "copy"}
    timers = ("events", "host", "wall", "graph")
    assert timed == {(p, timer) for p in benchmarks.speed.MAIN_PROVIDERS for timer in timers}
    assert [r["kernel"] for r in of["profile"][:-1]] == ["_resident_kernel", "_prepare_kernel"]
    assert of["tests"][0]["collected"] > 10
    assert (out / "summary.md").read_text() in done.stdout
    assert "nothing here was measured on a GPU" in done.stdout
