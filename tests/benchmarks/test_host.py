"""`python -m benchmarks host` with small settings: the files it writes; no time is asserted."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEVICE

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def host():
    sys.path.insert(0, str(ROOT))
    try:
        yield importlib.import_module("benchmarks.static.host")
    finally:
        sys.path.remove(str(ROOT))


def command(*options):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *options],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


RECORDS = (
    ("turns", "4x64-float32", "eager"),
    ("turns", "4x64-float32", "fused_la triton"),
    ("turns", "4x16x64-float32", "fused_la head triton"),
    ("turns", "239x10-float32", "eager"),
    ("turns", "239x10-float32", "fused_la blocked"),
    ("first", "256x8142-bfloat16", "eager"),
    ("first", "256x8142-bfloat16", "fused_la triton"),
    ("first", "256x64x8142-bfloat16", "fused_la head triton"),
)


@pytest.mark.slow
def test_host_times_launches_and_first_steps_are_written(tmp_path):
    providers = ("eager", "fused_la triton", "fused_la head triton", "fused_la blocked")
    done = command("host", "--rounds", "4", "--processes", "1", "--out", str(tmp_path), "--providers", *providers)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*/*.json")
    document = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert document["selection"] == "host"
    assert not document["interrupted"]
    assert document["versions"].keys() >= {"python", "torch", "triton", "fused_la"}
    records = {(record["what"], record["case"], record["provider"]): record for record in document["results"]}
    assert {record["status"] for record in records.values()} == {"timed"}
    assert set(records) == {record for record in RECORDS if record[2] in providers}
    for (what, _, provider), record in records.items():
        in_triton = provider.endswith("triton")
        if what == "turns":
            assert set(record["host_us"]) == {"inference", "forward", "both"}
            assert all(us > 0 for us in record["host_us"].values())
            assert (record["launches"] > 0) == in_triton
        else:
            assert 0 < record["first_s_low"] <= record["first_s"] <= record["first_s_high"]
            assert (record["kernels"] > 0) == in_triton
            assert record["kernels"] == len(record["compiled"])
    text = path.with_suffix(".md").read_text()
    for heading in ("Host time, 4x64-float32", "First step, 256x8142-bfloat16", "What the figures mean"):
        assert f"## {heading}" in text


def test_the_list_names_the_selection_and_who_is_measured(host, capsys):
    main = importlib.import_module("benchmarks.__main__").main
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert f"host: {host.DESCRIPTION}" in listed
    assert main(["host", "--list"]) == 0
    listed = capsys.readouterr().out
    for name in ("eager", "fused_la triton", "fused_la head triton", "Liger-Kernel", "QuACK", "fused_la blocked"):
        assert f"by {name}:" in listed


@pytest.mark.parametrize(
    "options", [["--rounds", "0"], ["--processes", "-1"], ["--providers", "nobody"], ["--target", "sm_1"]]
)
def test_options_that_fit_nothing_are_refused(host, options, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        host.main(options, tmp_path)
    assert stopped.value.code == 2


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels are interpreted on a CPU")
def test_interpreted_kernels_are_not_taken_for_compiled_ones(host):
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"), host.compile_only("sm_90"):
        pass


def test_a_provider_that_cannot_run_is_listed_with_the_reason(host, monkeypatch):
    def load(case, device):
        raise host.UnavailableError("its kernels are of another kind")

    monkeypatch.setitem(host.HOST_PROVIDERS, "eager", host.replace(host.HOST_PROVIDERS["eager"], load=load))
    with monkeypatch.context() as patch:
        patch.setattr(host, "compile_only", lambda target: host.contextlib.nullcontext())
        (record,) = host.take_turns(host.CASES[0], ["eager"], "sm_90", rounds=1)
        assert record == host.first_step(host.FIRST_STEP_CASES[0], "eager", "sm_90")
    expected = {"provider": "eager", "status": "not available", "reason": "its kernels are of another kind"}
    assert record == expected


def test_first_steps_of_several_processes_are_reported_by_their_median(host):
    runs = [{"provider": "eager", "status": "timed", "s": s, "compiled": ["a", "a"]} for s in (3.0, 1.0, 2.0)]
    record = host.combine_runs(runs)
    assert (record["first_s_low"], record["first_s"], record["first_s_high"]) == (1.0, 2.0, 3.0)
    assert record["kernels"] == 2
    stopped = host.failed("eager", "no result")
    assert host.combine_runs([runs[0], stopped]) == stopped
