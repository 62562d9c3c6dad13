"""Tests of the training example: options, training, report, stopping and resuming, one process and two."""

import csv
import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import slow
from torch.nn import functional as F

import fused_la

for name in ("torchvision", "torchmetrics", "sklearn", "matplotlib", "tensorboard", "tqdm"):
    pytest.importorskip(name)
FOLDER = Path(__file__).parents[2] / "examples" / "resnet50"
sys.path.insert(0, str(FOLDER))

import checkpoint  # noqa: E402
import data as data_sets  # noqa: E402
import evaluation  # noqa: E402
import loading  # noqa: E402
import model as models  # noqa: E402
import options  # noqa: E402
import report as reports  # noqa: E402
import table  # noqa: E402
import train  # noqa: E402
import world  # noqa: E402
from PIL import Image  # noqa: E402
from world import World, init_world  # noqa: E402

ALONE = World(0, 1, torch.device("cpu"))
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(Path(fused_la.__file__).parents[1]), "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0",
}  # fmt: skip
COUNTS = {"train": (24, 12, 5), "val": (4, 4, 3), "test": (6, 6, 5)}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """One thread, as in the processes that tests start, so that results are equal bit for bit."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module", autouse=True)
def _end_workers_soon():
    """Otherwise a data loader whose data set raised an error waits 5 s for its worker when it is deleted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
        yield


@pytest.fixture(scope="module")
def listed(tmp_path_factory) -> Path:
    """Images of three colours in the format of ImageNet-LT. A few steps learn them, but not without errors."""
    root = tmp_path_factory.mktemp("listed")
    generator = torch.Generator().manual_seed(0)
    for split, counts in COUNTS.items():
        lines = []
        for label, n in enumerate(counts):
            for i in range(n):
                image = torch.randint(0, 170, (8, 8, 3), generator=generator, dtype=torch.uint8)
                image[..., label] += 40
                path = f"{split}/{label}_{i}.png"
                (root / split).mkdir(exist_ok=True)
                Image.fromarray(image.numpy()).save(root / path)
                lines.append(f"{path} {label}")
        (root / f"ImageNet_LT_{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def command(listed: Path, *more: object) -> list[str]:
    """Options of a run of three epochs of five steps. `more` overrides them."""
    small = {
        "--dataset": "imagenet-lt", "--data": listed, "--model": "resnet32", "--image-size": 8, "--augment": "none",
        "--epochs": 3, "--batch-size": 8, "--warmup-epochs": 1, "--lr": 0.02, "--device": "cpu",
    }  # fmt: skip
    return [str(value) for pair in small.items() for value in pair] + [str(value) for value in more]


def run(listed: Path, out: Path, *more: object) -> dict:
    train.main(command(listed, "--out", out, *more))
    return json.loads((out / "report.json").read_text())


def log(out: Path) -> list[dict[str, str]]:
    with open(out / "log.csv") as file:
        return list(csv.DictReader(file))


def losses(out: Path) -> list[float]:
    return [float(row["train_loss"]) for row in log(out)]


def stopped(capsys, argv: list[str]) -> str:
    """The message of a run that ends with an error."""
    with pytest.raises(SystemExit) as raised:
        train.main(argv)
    assert raised.value.code != 0
    return f"{raised.value.code} {capsys.readouterr().err}"


def in_ascii(monkeypatch) -> io.TextIOWrapper:
    """Make stdout ASCII, as LC_ALL=C or PYTHONIOENCODING=ascii do."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    return stdout


@pytest.fixture(scope="module")
def erm(listed, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("erm") / "run"
    run(listed, out, "--loss", "erm")
    return out


# ---- A table of runs


def test_a_table_has_mean_and_deviation_over_seeds(tmp_path, capsys, monkeypatch):
    def report(name, seed, loss, error):
        results = {"raw": dict.fromkeys(table.COLUMNS, error) | {"many_error": None}}
        content = {
            "dataset": "d", "model": "m", "loss": loss, "settings": {"seed": seed, "loss": loss},
            "splits": {"reported": {"name": "test"}},
            "models": {"best epoch": {"results": results}, "last epoch": {"results": {}}},
        }  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(content))

    def printed(*names):
        monkeypatch.setattr(sys, "argv", ["table.py", *(str(tmp_path / name) for name in names)])
        table.main()
        return capsys.readouterr().out

    report("a", 0, "erm", 0.1)
    report("b", 1, "erm", 0.3)
    report("c", 0, "logit_adjusted", 0.05)
    lines = printed("a", "b", "c").splitlines()
    assert lines[2] == "| d, test | m | erm | raw | 2 | 20.0 ± 14.1 | - | 20.0 ± 14.1 | 20.0 ± 14.1 | 20.0 ± 14.1 |"
    assert lines[3] == "| d, test | m | logit_adjusted | raw | 1 | 5.0 | - | 5.0 | 5.0 | 5.0 |"
    stdout = in_ascii(monkeypatch)
    printed("a", "b")
    stdout.flush()
    assert rb"| 20.0 \xb1 14.1 |" in stdout.buffer.getvalue()
    report("again", 0, "erm", 0.1)
    with pytest.raises(SystemExit, match=r"two runs have one seed: \[0, 0\]"):
        printed("a", "again")
    (tmp_path / "a" / "report.json").write_text("{")
    with pytest.raises(SystemExit, match=r"a/report.json is no report of a finished run"):
        printed("a")


# ---- Options


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ("--posthoc", "--loss logit_adjusted and --posthoc would correct for the class frequencies twice"),
        ("--sampler class-balanced", "shows the model all classes equally often"),
        ("--class-weights inverse", "weights each class by the inverse of its frequency"),
        ("--loss balanced --class-weights inverse", "--loss balanced and --class-weights inverse would correct"),
        ("--loss erm --sampler class-balanced --class-weights inverse", "twice"),
        ("--loss erm --sampler class-balanced --posthoc", "subtracts tau * log(prior)"),
        ("--loss erm --class-weights inverse --posthoc", "twice"),
        ("--loss balanced_softmax --posthoc", "twice"),
        ("--loss vector_scaling --gamma 0.2 --sampler class-balanced", "twice"),
    ],
)
def test_a_pair_that_corrects_twice_is_refused_with_the_reason(capsys, argv, reason):
    assert reason in stopped(capsys, argv.split())


@pytest.mark.parametrize(
    ("argv", "posthoc"),
    [("--loss erm", True), ("--loss adaptive", True), ("--loss ldam", True), ("--loss erm --no-posthoc", False),
     ("--loss logit_adjusted", False), ("--loss erm --sampler class-balanced", False),
     ("--loss erm --class-weights inverse", False), ("--loss adaptive --class-weights inverse", False)],
)  # fmt: skip
def test_what_nothing_corrected_is_evaluated_post_hoc(argv, posthoc):
    assert options.parse(None, argv.split()).posthoc is posthoc


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--loss erm --tau 0", "--tau is of --loss logit_adjusted or vector_scaling; got --loss erm"),
        ("--loss cdt", "--loss cdt needs --gamma"),
        ("--gamma 1", "--gamma is of"),
        ("--tau -1", "--tau must be at least 0"),
        ("--tau nan", "--tau must be"),
        ("--tau 1e300", "--loss logit_adjusted: tau must be finite"),
        ("--loss fisher_consistent --power 1e300", "--loss fisher_consistent: log_delta must be finite"),
        ("--seed 9223372036854775808", "--seed must be below 2^63"),
        ("--momentum 0 --nesterov", "--nesterov needs a --momentum above 0"),
        ("--schedule step --lr-steps 5 3", "--lr-steps must rise from above --warmup-epochs 2 to below --epochs"),
        ("--schedule step --lr-steps 2", "--lr-steps must rise"),
        ("--schedule step --lr-steps 90", "--lr-steps must rise"),
        ("--dataset cifar10-lt --data x --epochs 100", "below --epochs 100, got 160 180"),
        ("--val-fraction 0.2", "--val-fraction does not apply: there are a validation and a test split"),
        ("--cudnn-benchmark", "--cudnn-benchmark is of GPUs"),
        ("--model alexnet", "--model alexnet cannot be trained on 16 images of --image-size 32 at a time"),
        ("--model vit_b_16", "Expected 224 but got 32"),
        ("--grad-accum-steps 16", "--model resnet50 cannot be trained on 1 images of --image-size 32 at a time"),
        ("--lr 0", "--lr must be positive"),
        ("--lr-steps 3", "--lr-steps is of --schedule step"),
        ("--schedule step", "--schedule step needs --lr-steps"),
        ("--opt adamw --momentum 0.9", "--momentum is of --opt sgd"),
        ("--opt adamw --nesterov", "--nesterov is of --opt sgd"),
        ("--model-ema-decay 0.9", "--model-ema-decay is of --model-ema"),
        ("--dataset folder --data x --imb-factor 0.1", "--imb-factor is of digits-lt and CIFAR"),
        ("--imb-factor 2", "--imb-factor must be in (0, 1]"),
        ("--dataset digits-lt --download", "--download is of CIFAR"),
        ("--check-images", "--check-images is of data sets of image files"),
        ("--val-fraction 0.7", "--val-fraction must be in [0, 0.5]"),
        ("--smoothing 1", "--smoothing must be in [0, 1)"),
        ("--warmup-epochs 30", "--warmup-epochs must be below --epochs"),
        ("--device tpu", "--device must be cpu, cuda or cuda:N"),
        ("--resume", "--resume needs --out"),
        ("--class-parallel --fused-head", "leave out --fused-head"),
        ("--class-parallel --model-ema", "choose one"),
        ("--class-parallel --amp fp16", "use bf16"),
        ("--class-parallel --loss-impl reference", "--loss-impl reference does not compute --class-parallel"),
        ("--dry-run --profile-step", "--dry-run and --profile-step each run something else"),
        ("--resume --dry-run", "--resume continues a run"),
        ("--loss fisher_consistent --power nan", "--power must be finite, got nan"),
        ("--pretrained --model resnet32", "--pretrained: there are no weights of resnet32"),
        ("--loss ldam --smoothing 0.1 --loss-impl blocked", "--loss ldam --loss-impl blocked cannot be computed here"),
        ("--loss nll", "invalid choice"),
        ("--epochs 0", "--epochs must be at least 1"),
        ("--class-parallel", "start it by torchrun"),
        ("--norm sync", "--norm sync is of several processes with a GPU each"),
        ("--norm group --model vgg11", "--norm group is of ResNets"),
        ("--model resnet51", "--model must be resnet32 or a classifier of torchvision.models, got 'resnet51'"),
        ("--model squeezenet1_1", "does not end in a linear layer"),
        ("--batch-size 288", "--batch-size must be at most 287"),
        ("--grad-accum-steps 17", "--grad-accum-steps must be at most 16"),
        ("--device cuda", "PyTorch finds no GPU"),
        ("--data /nowhere", "--data"),
        ("--dataset cifar10-lt --data /nowhere", "/nowhere"),
    ],
)
def test_an_option_that_cannot_be_followed_is_named(capsys, monkeypatch, tmp_path, argv, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in stopped(
        capsys, [*argv.split(), *([] if argv == "--resume" else ["--out", str(tmp_path / "out")])]
    )
    assert not (tmp_path / "out").exists()


def test_profiles_are_the_papers():
    cifar = options.parse(None, ["--dataset", "cifar10-lt", "--data", "x"])
    assert (cifar.model, cifar.epochs, cifar.batch_size, cifar.lr, cifar.weight_decay) == (
        "resnet32",
        200,
        128,
        0.1,
        1e-4,
    )
    assert (cifar.schedule, cifar.lr_steps, cifar.lr_gamma, cifar.warmup_epochs) == ("step", [160, 180], 0.1, 5)
    assert (cifar.imb_type, cifar.imb_factor, cifar.momentum, cifar.nesterov) == ("exp", 0.01, 0.9, False)
    imagenet = options.parse(None, ["--dataset", "digits-lt", "--profile", "paper-imagenet-lt"])
    assert (imagenet.model, imagenet.epochs, imagenet.batch_size, imagenet.lr) == ("resnet50", 90, 512, 0.4)
    assert (imagenet.weight_decay, imagenet.schedule, imagenet.augment) == (5e-4, "cosine", "resized-crop-flip")
    assert options.parse(None, ["--dataset", "inaturalist2018", "--data", "x"]).weight_decay == 1e-4
    own = options.parse(None, ["--dataset", "cifar10-lt", "--data", "x", "--schedule", "cosine", "--lr", "1"])
    assert (own.lr, own.schedule, own.lr_steps, own.lr_gamma) == (1.0, "cosine", None, None)


def test_learning_rates_follow_the_schedule():
    args = options.parse(None, ["--dataset", "cifar10-lt", "--data", "x"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], args.lr)
    schedule = train.make_schedule(args, optimizer, 10)
    rates = []
    for _ in range(2000):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.1 / 50)
    assert rates[24] == pytest.approx(0.1 * (1 / 50 + 24 / 50 * (1 - 1 / 50)))
    assert rates[50] == rates[1599] == pytest.approx(0.1)
    assert rates[1600] == rates[1799] == pytest.approx(0.01)
    assert rates[1800] == rates[1999] == pytest.approx(0.001)


@pytest.mark.parametrize("loss", list(options.LOSSES))
def test_every_preset_is_the_packages(loss):
    needs = {"cdt": "--gamma 0.2", "vector_scaling": "--gamma 0.2 --tau 0.5", "fisher_consistent": "--power 0.5"}
    args = options.parse(None, f"--loss {loss} {needs.get(loss, '')}".split())
    counts = torch.tensor([50, 10, 3])
    made = models.make_loss(args, counts, torch.device("cpu"))
    log_prior = fused_la.log_prior_from_counts(counts)
    margins = fused_la.margins
    arguments = {
        "erm": (), "cdt": (log_prior, 0.2), "vector_scaling": (log_prior, 0.2, 0.5), "ldam": (log_prior, 0.5, 30.0),
        "fisher_consistent": (log_prior, 0.5 * log_prior),
    }.get(loss, (log_prior,))  # fmt: skip
    cosines, target = torch.rand(6, 3) - 0.5, torch.tensor([0, 1, 2, 0, 1, 2])
    expected = fused_la.margin_cross_entropy(cosines, target, getattr(margins, loss)(*arguments))
    logits = 30.0 * cosines if loss == "ldam" else cosines  # the cosine head has multiplied by the scale
    torch.testing.assert_close(fused_la.margin_cross_entropy(logits, target, made.margin), expected)


@pytest.mark.parametrize(("device", "rank", "index"), [(None, None, 0), ("cuda", None, 0), ("cuda:2", None, 2),
                                                       (None, "1", 1), ("cuda", "1", 1)])  # fmt: skip
def test_a_gpu_is_chosen_by_its_index(monkeypatch, device, rank, index):
    """PyTorch's GPU calls are replaced. `set_device` refuses a device without an index, so each needs one."""
    from torch.cuda._utils import _get_device_index

    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda given: chosen.append(_get_device_index(given)))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *args, **kwargs: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if rank is not None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: int(rank))
    world = init_world(device, 0, cudnn_benchmark=False)
    assert chosen == [index]
    assert torch.backends.cudnn.benchmark is False
    init_world(device, 0, cudnn_benchmark=True)
    assert torch.backends.cudnn.benchmark is True
    assert world.device == torch.device("cuda", index)
    if rank is not None:
        with pytest.raises(options.OptionError, match="--device cuda:0 is of one process"):
            init_world("cuda:0", 0, cudnn_benchmark=False)


# ---- A run


def test_a_run_leaves_what_it_promises(listed, erm):
    names = {path.name for path in erm.iterdir()}
    assert names == {
        "args.json", "log.csv", "tensorboard", "checkpoint.pt", "checkpoint.previous.pt", "report.json", "report.md",
        "error_by_class_rank.png", "tau_curves.png", "weight_norms.png", "reliability.png",
    }  # fmt: skip
    assert [row["epoch"] for row in log(erm)] == ["1", "2", "3"]
    args = json.loads((erm / "args.json").read_text())
    assert (args["loss"], args["epochs"], args["momentum"]) == ("erm", 3, 0.9)
    state = torch.load(erm / "checkpoint.pt", weights_only=True)
    assert {"model", "optimizer", "lr_scheduler", "epoch", "args", "model_ema"} <= set(state)
    assert state["epoch"] == 3
    for png in erm.glob("*.png"):
        Image.open(png).verify()
        assert f"({png.name})" in (erm / "report.md").read_text()


def test_the_report_is_json_by_the_standard(erm):
    """Standard JSON has no NaN. many_error has no value here: none of the classes has more than 100 images."""

    def refuse(constant):
        raise AssertionError(constant)

    report = json.loads((erm / "report.json").read_text(), parse_constant=refuse)
    assert report["models"]["last epoch"]["results"]["raw"]["many_error"] is None


def events_of(out: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return events


def steps_of_events(out: Path) -> list[int]:
    return [event.step for event in events_of(out).Scalars("train_loss")]


def test_tensorboard_has_every_epoch(erm):
    events = events_of(erm)
    assert steps_of_events(erm) == [1, 2, 3]
    assert [event.value for event in events.Scalars("train_loss")] == pytest.approx(losses(erm))
    assert "val_balanced_error" in events.Tags()["scalars"]


def logits_of(erm: Path, listed: Path, split: str, state: dict) -> tuple[torch.Tensor, torch.Tensor]:
    args = options.parse(None, command(listed, "--loss", "erm"))
    data = data_sets.load("imagenet-lt", listed)
    classifier = models.make_classifier(args, 3, models.make_loss(args, data.class_counts, torch.device("cpu")))
    classifier.load_state_dict(state)
    classifier.eval()
    images = getattr(data, split).images
    transform = loading.eval_transform(args)
    with torch.no_grad():
        batch = torch.stack([transform(images[i]) for i in range(len(images))])
        return classifier.logits(batch, classifier.whole_head()).double(), images.target


def test_the_report_is_what_the_logits_say(listed, erm):
    """Recompute every rate of an ERM run from its checkpoint, and tau* from the validation split."""
    report = json.loads((erm / "report.json").read_text())
    saved = torch.load(erm / "checkpoint.pt", weights_only=True)
    log_prior = torch.tensor([24 / 41, 12 / 41, 5 / 41], dtype=torch.float64).log()
    assert saved["best"]["epoch"] == max(
        range(1, 4), key=lambda epoch: (-float(log(erm)[epoch - 1]["val_balanced_error"]), epoch)
    )
    assert [float(row["lr"]) for row in log(erm)] == pytest.approx([0.02 / 5, 0.02, 0.01])  # at the start of each epoch
    states = {"last epoch": saved["model"]}
    if saved["best"]["epoch"] != 3:
        states["best epoch"] = saved["best"]["model"]
    assert set(report["models"]) == set(states)
    assert report["splits"]["chosen_on"] == {"name": "val", "n_images": 11}
    assert report["splits"]["reported"] == {"name": "test", "n_images": 17}

    def error(logits, target):
        wrong = logits.argmax(1) != target
        return float(torch.stack([wrong[target == c].double().mean() for c in range(3)]).mean())

    for name, state in states.items():
        found = report["models"][name]
        norm = state["head.weight"].double().norm(dim=1)
        bias = state["head.bias"].double()
        corrections = {
            evaluation.POST_HOC: lambda f, tau: f - tau * log_prior,
            evaluation.NORMALISED: lambda f, tau, norm=norm, bias=bias: (f - bias) / norm**tau + bias,
        }
        val, val_target = logits_of(erm, listed, "val", state)
        test, test_target = logits_of(erm, listed, "test", state)
        assert found["results"]["raw"]["balanced_error"] == pytest.approx(error(test, test_target))
        accuracy = float((test.argmax(1) == test_target).double().mean())
        assert found["results"]["raw"]["top1_accuracy"] == pytest.approx(accuracy)
        for family, corrected in corrections.items():
            on_val = [error(corrected(val, tau), val_target) for tau in evaluation.TAUS]
            best = evaluation.TAUS[min(range(len(on_val)), key=lambda i: (round(on_val[i], 9), i))]
            assert found["tau_star"][family] == best
            for label, tau in (("tau = 1", 1.0), ("tau*", best)):
                result = found["results"][f"{family}, {label}"]
                assert result["balanced_error"] == pytest.approx(error(corrected(test, tau), test_target))
            curve = found["tau_curves"][family]
            assert curve["chosen_on"] == pytest.approx(on_val)
            assert curve["reported"] == pytest.approx(
                [error(corrected(test, tau), test_target) for tau in curve["taus"]]
            )
        confidence, predicted = test.softmax(1).max(1)
        right = (predicted == test_target).double()
        ece = sum(
            float((right[inside] - confidence[inside]).sum().abs()) / len(test)
            for inside in ((confidence > b / 15) & (confidence <= (b + 1) / 15) for b in range(15))
        )
        assert found["results"]["raw"]["ece"] == pytest.approx(ece, rel=1e-4)
        bins = found["results"]["raw"]["reliability"]
        assert sum(bins["count"]) == 17
        assert found["weight_norms"] == pytest.approx(norm.tolist(), rel=1e-6)


def test_shots_are_of_the_whole_training_split_and_the_prior_of_what_is_left():
    """They differ if validation images were carved from the training split."""
    images = data_sets.ArrayImages(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.arange(3))
    split = data_sets.Split("x", images)
    data = data_sets.Data(split, None, split, 3, list("abc"), torch.tensor([101, 20, 19]), torch.tensor([1, 1, 98]), [])
    rated = evaluation.CorrectionMetrics(data, torch.Tensor.float, ALONE.device)
    rated.update(torch.eye(3)[[0, 0, 0]], torch.arange(3))
    result = rated.compute()
    assert [result[f"{group}_error"] for group in ("many", "medium", "few")] == [0, 1, 1]
    head = models.Head(torch.eye(3), None)
    logits, target = torch.tensor([[0.0, -9.0, 1.0]]), torch.tensor([0])  # class 0 wins by a prior for class 2
    for sweep in (evaluation.make_sweeps(head, data, "x")[evaluation.POST_HOC],):
        sweep.update(logits, target)
        assert sweep.compute()["balanced_error"].tolist()[evaluation.TAUS.index(1.0)] == 0
    (correct,) = evaluation.make_corrections(head, data, {evaluation.POST_HOC: {"tau = 1": 1.0}}).values()
    assert correct(logits).argmax() == 0


def test_statistics_of_processes_are_averaged(monkeypatch):
    monkeypatch.setattr(world.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(world, "mean_over_ranks", lambda value: value + 1)
    norm = torch.nn.BatchNorm2d(2)
    world.average_buffers(norm)
    assert norm.running_mean.tolist() == [1, 1]
    assert norm.running_var.tolist() == [2, 2]
    assert norm.num_batches_tracked == 0


def test_figures_begin_with_the_most_frequent_class():
    assert reports.classes_by_frequency({"class_counts": [3, 9, 5, 9]}).tolist() == [1, 3, 2, 0]


def test_inverse_weights_are_one_for_a_class_of_average_size():
    args = options.parse(None, ["--loss", "erm", "--class-weights", "inverse"])
    weight = models.make_loss(args, torch.tensor([60, 30, 10, 20]), ALONE.device).class_weight
    assert weight.tolist() == pytest.approx([0.5, 1, 3, 1.5])


def test_the_optimizer_has_what_the_options_say():
    args = options.parse(
        None, ["--model", "resnet32", "--momentum", "0.8", "--nesterov", "--weight-decay", "0.3", "--lr", "0.2"]
    )
    network = models.make_classifier(args, 3, models.make_loss(args, torch.ones(3), ALONE.device))
    for group in train.make_optimizer(args, network).param_groups:
        found = [group[name] for name in ("lr", "momentum", "nesterov", "weight_decay", "dampening")]
        assert found == [0.2, 0.8, True, 0.3, 0]
    args = options.parse(None, ["--model", "resnet32", "--opt", "adamw", "--weight-decay", "0.3", "--lr", "0.2"])
    for group in train.make_optimizer(args, network).param_groups:
        assert (group["lr"], group["weight_decay"]) == (0.2, 0.3)


def test_of_epochs_that_are_equally_good_the_last_is_chosen(listed, tmp_path):
    """The model does not change here, so all epochs are equally good."""
    report = run(listed, tmp_path / "run", "--norm", "group", "--lr", 1e-30, "--weight-decay", 0)
    assert len({row["val_balanced_error"] for row in log(tmp_path / "run")}) == 1
    assert list(report["models"]) == ["last epoch"]
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["best"]["epoch"] == 3


def test_an_adjusted_run_is_not_corrected_again(listed, tmp_path):
    report = run(listed, tmp_path / "run", "--epochs", 2)
    for found in report["models"].values():
        assert set(found["results"]) == {"raw"}
        assert found["tau_star"] == {}
    assert not (tmp_path / "run" / "tau_curves.png").exists()
    assert "No post-hoc correction" in (tmp_path / "run" / "report.md").read_text()


def test_without_a_validation_split_nothing_is_chosen(listed, tmp_path):
    """A folder with train and test: --val-fraction 0 leaves no validation split, the default carves one."""
    root = tmp_path / "folder"
    for split, source in (("train", "train"), ("test", "test")):
        for path in sorted((listed / source).iterdir()):
            target = root / split / path.name[0] / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    argv = command(
        listed, "--dataset", "folder", "--data", root, "--loss", "erm", "--epochs", 2, "--out", tmp_path / "run"
    )
    train.main([*argv, "--val-fraction", "0"])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["splits"]["chosen_on"] is None
    assert list(report["models"]) == ["last epoch"]
    found = report["models"]["last epoch"]
    assert set(found["tau_star"].values()) == {None}
    assert not any("tau*" in method for method in found["results"])
    assert "val_balanced_error" not in log(tmp_path / "run")[0]
    train.main([*argv[:-1], str(tmp_path / "carved")])
    carved = json.loads((tmp_path / "carved" / "report.json").read_text())
    assert carved["splits"]["train"]["n_images"] + carved["splits"]["chosen_on"]["n_images"] == 41
    assert sum(carved["class_counts"]) == carved["splits"]["train"]["n_images"]


def test_a_dry_run_writes_nothing(listed, tmp_path, capsys):
    train.main(command(listed, "--out", tmp_path / "run", "--dry-run", "--model-ema", "--mixup", 0.2))
    assert "dry run: a step of training" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_profile_step_says_which_limits(listed, tmp_path, capsys):
    for more in ((), ("--fused-head", "--batch-size", 41)):  # the second has one batch an epoch
        train.main(command(listed, "--out", tmp_path / "run", "--profile-step", *more))
        printed = capsys.readouterr().out
        assert "loader alone" in printed
        assert "% of the step" in printed
        rate, milliseconds = re.search(r"step +([\d,.]+) images/s \(([\d.]+) ms", printed).groups()
        n_images = int(re.search(r"batches of (\d+)", printed)[1])
        assert float(rate.replace(",", "")) * float(milliseconds) == pytest.approx(1000 * n_images, rel=0.02)
        assert "limit: the " in printed
        assert "nan" not in printed
    assert not (tmp_path / "run").exists()


# ---- What must not change a result


# GroupNorm, because BatchNorm of eight images amplifies rounding at every step.
PLAIN = ("--norm", "group", "--epochs", 2, "--no-posthoc")


@pytest.fixture(scope="module")
def plain(listed, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "run"
    run(listed, out, *PLAIN)
    return out


@pytest.mark.parametrize(
    "more",
    [
        ("--fused-head",),
        slow(("--loss-impl", "reference")),
        slow(("--loss-impl", "blocked")),
        ("--loss-impl", "triton"),
        slow(("--grad-accum-steps", 3)),
        slow(("--channels-last",)),
    ],
    ids=str,
)
def test_loss_curves_do_not_depend_on_the_implementation(listed, plain, tmp_path, device, more):
    if "triton" in more and device != "cpu":
        pytest.skip("the test means its interpreter, which is for machines without a GPU")
    run(listed, tmp_path / "run", *PLAIN, *more)
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), rel=2e-5)


def test_batches_do_not_depend_on_workers_and_processes(listed):
    args = options.parse(None, command(listed, "--augment", "resized-crop-flip"))
    images = data_sets.load("imagenet-lt", listed).train.images

    def batches(of, epoch, workers=0):
        args.workers = workers
        return list(loading.TrainLoader(args, images, of).epoch(epoch))

    alone = batches(ALONE, 4)
    assert len(alone) == 41 // 8
    for (images_0, target_0), (images_1, target_1) in zip(alone, batches(ALONE, 4, workers=1), strict=True):
        assert torch.equal(images_0, images_1)
        assert torch.equal(target_0, target_1)
    parts = [batches(World(rank, 2, torch.device("cpu")), 4) for rank in range(2)]
    for (whole, target), *of_ranks in zip(alone, *parts, strict=True):
        together = torch.stack([images for images, _ in of_ranks], 1).flatten(0, 1)
        assert torch.equal(whole, together)
        assert torch.equal(target, torch.stack([labels for _, labels in of_ranks], 1).flatten())
    assert not torch.equal(alone[0][0], batches(ALONE, 5)[0][0])


@pytest.mark.parametrize(("dataset", "size", "side"), [("imagenet-lt", 112, 128), ("inaturalist2018", 224, 256),
                                                       ("digits-lt", 32, 32), ("cifar10-lt", 32, 32)])  # fmt: skip
def test_what_is_evaluated_is_the_middle_of_an_image_with_the_data_sets_mean_and_deviation(dataset, size, side):
    """An image whose shorter side is 8/7 of the crop needs no resizing. A small image is not cropped."""
    mean_and_std = {
        "imagenet-lt": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "inaturalist2018": ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),
        "digits-lt": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        "cifar10-lt": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    }
    argv = ["--dataset", dataset, "--image-size", str(size), *([] if dataset == "digits-lt" else ["--data", "x"])]
    transform = loading.eval_transform(options.parse(None, argv))
    image = torch.randint(0, 256, (3, side, side + 10 * (side > size)), dtype=torch.uint8)
    top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
    middle = image[:, top : top + size, left : left + size].double() / 255
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in mean_and_std[dataset])
    torch.testing.assert_close(transform(image).double(), (middle - mean) / std, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("augment", ["shift", "pad-crop-flip", "resized-crop-flip"])
def test_augmentation_does_what_it_is_called(augment):
    """The image is bright only on the left, so the bright side of the result says whether it was flipped."""
    args = options.parse(None, ["--augment", augment, "--image-size", "32"])
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[..., :16] = 255
    dataset = loading.Transformed(
        data_sets.ArrayImages(image.expand(60, -1, -1, -1), torch.zeros(60, dtype=torch.int64)),
        loading.train_transform(args), seed=0,
    )  # fmt: skip
    images = torch.stack([dataset[i][0] for i in range(60)])
    assert images.shape == (60, 3, 32, 32)
    left_is_brighter = images[..., :16].mean((1, 2, 3)) > images[..., 16:].mean((1, 2, 3))
    n_left = int(left_is_brighter.sum())
    assert n_left == 60 if augment == "shift" else 10 < n_left < 50
    assert len({tuple(image.flatten().tolist()) for image in images}) > 20


def test_every_epoch_has_its_own_order_and_its_own_mixing(listed, tmp_path, monkeypatch):
    args = options.parse(None, command(listed))
    loader = loading.TrainLoader(args, data_sets.load("imagenet-lt", listed).train.images, ALONE)
    orders = [torch.cat([images for images, _ in loader.epoch(epoch)]) for epoch in (0, 1, 0)]  # without augmentation
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])
    seeds, genuine = [], train.backward

    def noting(*arguments):
        seeds.append(torch.initial_seed())
        return genuine(*arguments)

    monkeypatch.setattr(train, "backward", noting)
    for seed in (0, 1):
        run(listed, tmp_path / str(seed), "--seed", seed, "--epochs", 2)
    assert len(set(seeds)) == 4  # two runs of two epochs
    assert len(seeds) == 20


def test_a_class_balanced_sampler_draws_classes_equally():
    target = torch.tensor([0] * 9000 + [1] * 900 + [2] * 100)
    sampler = loading.ClassBalancedSampler(target, num_replicas=2, rank=1, seed=3, drop_last=True)
    sampler.set_epoch(1)
    drawn = torch.tensor(list(sampler))
    assert len(drawn) == 5000
    share = target[drawn].bincount().double() / 5000
    assert share.sub(1 / 3).abs().max() < 5 * (2 / 9 / 5000) ** 0.5  # five standard deviations
    assert torch.equal(torch.tensor(list(sampler)), drawn)
    sampler.set_epoch(2)
    assert not torch.equal(torch.tensor(list(sampler)), drawn)


@pytest.mark.parametrize("argv", ["--mixup 0.4", "--cutmix 1", "--mixup 0.4 --cutmix 1"])
def test_mixing_keeps_both_labels_as_torchvisions_dense_targets_would(argv):
    from torchvision.transforms import v2

    mix = loading.Mix(options.parse(None, argv.split()))
    images, target = torch.rand(7, 3, 8, 8), torch.tensor([0, 3, 3, 1, 2, 0, 1])
    seen = set()
    for seed in range(6):
        torch.manual_seed(seed)
        mixed, labels, weight = mix(images, target)
        kind, alpha = v2.MixUp, 0.4
        torch.manual_seed(seed)
        if torch.randint(len(mix.alphas), ()) == 1 or argv == "--cutmix 1":
            kind, alpha = v2.CutMix, 1.0
        expected, dense = kind(alpha=alpha, num_classes=4)(images, target)
        assert torch.equal(mixed, expected)
        found = torch.zeros(7, 4).scatter_add_(1, labels, weight)
        torch.testing.assert_close(found, dense)
        seen.add(kind)
    assert len(seen) == len(mix.alphas)


@pytest.mark.parametrize(
    "more",
    [
        ("--amp", "--channels-last", "--mixup", 0.2, "--cutmix", 1, "--model-ema", "--smoothing", 0.1, "--workers", 1),
        slow(("--amp", "fp16", "--opt", "adamw", "--lr", 1e-3, "--fused-head", "--grad-accum-steps", 2)),
        ("--loss", "ldam", "--schedule", "constant", "--class-weights", "inverse"),
        slow(("--loss", "erm", "--sampler", "class-balanced", "--nesterov", "--warmup-epochs", 0)),
    ],
    ids=["mixed images", "fp16", "ldam", "class-balanced"],
)
def test_options_of_training_run_together(listed, tmp_path, more):
    report = run(listed, tmp_path / "run", "--epochs", 2, *more)
    assert all(torch.isfinite(torch.tensor(losses(tmp_path / "run"))))
    assert report["models"]["last epoch"]["results"]["raw"]["n_images"] == 17
    assert run(listed, tmp_path / "again", "--epochs", 2, *more) == report


def test_the_running_mean_of_weights_is_what_is_evaluated(listed, tmp_path):
    out = tmp_path / "run"
    run(listed, out, "--model-ema", "--model-ema-decay", 0.5, "--epochs", 1, "--warmup-epochs", 0)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    averaged = {k.removeprefix("module."): v for k, v in state["model_ema"].items() if k.startswith("module.")}
    assert torch.equal(state["best"]["model"]["head.weight"], averaged["head.weight"])
    assert not torch.equal(averaged["head.weight"], state["model"]["head.weight"])


def test_smoothed_labels_go_to_the_prior(listed):
    args = options.parse(None, command(listed, "--smoothing", 0.2))
    counts = torch.tensor([24, 12, 5])
    classifier = models.make_classifier(args, 3, models.make_loss(args, counts, torch.device("cpu")))
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    prior = counts.double() / 41
    dense = 0.8 * F.one_hot(target, 3) + 0.2 * prior
    expected = -(dense * (logits.double() + prior.log()).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(classifier.loss_of_logits(logits, target).double(), expected, rtol=1e-6, atol=0)


def test_the_cifar_resnet_has_the_size_of_the_original():
    """0.46 million parameters: table 6 of He et al. (2016)."""
    network = models.make_network(options.parse(None, ["--model", "resnet32", "--image-size", "32"]))
    assert sum(p.numel() for p in network.parameters()) - network.fc.weight.numel() - 1000 + 650 == 464_154
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 1000)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5", "regnet_y_400mf"]
)
def test_classifiers_of_torchvision_are_split_before_their_last_layer(name):
    args = options.parse(None, ["--model", name])
    counts = torch.tensor([5, 4, 3, 2])
    classifier = models.make_classifier(args, 4, models.make_loss(args, counts, torch.device("cpu"))).eval()
    images = torch.randn(2, 3, 64, 64)
    features = classifier.trunk(images)
    assert features.shape == (2, classifier.head.in_features)
    expected = F.linear(features, classifier.head.weight, classifier.head.bias)
    torch.testing.assert_close(classifier.logits(images, classifier.whole_head()), expected)


def test_ldams_head_gives_cosines_times_the_scale():
    args = options.parse(None, ["--loss", "ldam", "--scale", "20", "--model", "resnet32", "--image-size", "8"])
    classifier = models.make_classifier(args, 3, models.make_loss(args, torch.tensor([5, 4, 3]), ALONE.device)).eval()
    images = torch.rand(4, 3, 8, 8)
    expected = 20 * F.cosine_similarity(classifier.trunk(images)[:, None], classifier.head.weight, dim=2)
    torch.testing.assert_close(classifier.logits(images, classifier.whole_head()), expected, rtol=1e-5, atol=1e-5)
    assert classifier.head.bias is None


def test_weights_that_cannot_be_fetched_are_told(monkeypatch):
    def offline(name, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(models.models, "get_model", offline)
    with pytest.raises(options.OptionError, match=r"weights of resnet18 cannot be fetched \(no route to host\)"):
        models.make_network(options.parse(None, ["--model", "resnet18", "--pretrained"]))


@pytest.mark.slow
def test_a_compiled_model_trains_as_one_that_is_not(listed, tmp_path):
    """Half a minute of compiling."""
    common = ("--norm", "group", "--epochs", 2, "--model-ema")
    for name, more in {"plain": (), "compiled": ("--torchcompile",)}.items():
        run(listed, tmp_path / name, *common, *more)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=2e-5)


@pytest.mark.slow
def test_every_classifier_of_torchvision_is_split_or_refused():
    from torchvision import models as zoo

    for name in zoo.list_models(module=zoo):
        if name.startswith("regnet") and not name.endswith("400mf"):
            continue  # RegNets read their widths from tensors, so the meta device does not do; one of them is enough
        with torch.device("cpu" if name.startswith("regnet") else "meta"):
            network = models.make_network(options.parse(None, ["--model", name]))
        if name.startswith("squeezenet"):
            with pytest.raises(options.OptionError, match="does not end in a linear layer"):
                models.final_linear(network, name)
        else:
            assert models.final_linear(network, name)[1].out_features == 1000


# ---- Stopped, and resumed


class Killed(BaseException):
    """Nothing in the example catches it, so the files stay as if the process had been killed."""


def killed_at(monkeypatch, n: int) -> None:
    """Raise Killed before the n-th call of a function that changes files."""
    calls = [0]
    for name in ("replace", "fsync"):
        genuine = getattr(os, name)

        def wrapped(*args, genuine=genuine, **kwargs):
            calls[0] += 1
            if calls[0] == n:
                raise Killed
            return genuine(*args, **kwargs)

        monkeypatch.setattr(os, name, wrapped)


def content(out: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in out.iterdir()
        if path.name.startswith("report") or path.suffix == ".png"
    }


@pytest.fixture(scope="module")
def whole(listed, tmp_path_factory) -> Path:
    """An uninterrupted run with every kind of state."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(listed, out, *STATEFUL)
    return out


STATEFUL = ("--epochs", 2, "--model-ema", "--mixup", 0.2, "--augment", "resized-crop-flip", "--loss", "erm")


@pytest.fixture
def kill_and_resume(listed, whole, tmp_path, monkeypatch):
    """Function of n: whether a run was killed before its n-th change of a file. It is then resumed and checked."""

    def run_twice(n: int) -> bool:
        out = tmp_path / f"killed-{n}"
        argv = command(listed, "--out", out, *STATEFUL)
        with monkeypatch.context() as patch:
            killed_at(patch, n)
            try:
                train.main(argv)
            except Killed:
                pass
            else:
                return False
        train.main([*argv, "--resume"])
        assert content(out) == content(whole), n
        assert [row["train_loss"] for row in log(out)] == [row["train_loss"] for row in log(whole)]
        return True

    return run_twice


@pytest.mark.parametrize("n", [2, 10])
def test_a_run_killed_between_two_changes_of_files_resumes_to_the_same_report(kill_and_resume, n):
    """Early in the first epoch, and after a checkpoint."""
    assert kill_and_resume(n)


@pytest.mark.slow
def test_a_run_killed_between_any_two_changes_of_files_resumes_to_the_same_report(kill_and_resume):
    n = 1
    while kill_and_resume(n):
        n += 1 if n < 3 else 3  # covers every kind of change in some epoch, and most in both orders
    assert n > 10


@pytest.mark.slow
def test_sigkill_and_resume_give_the_same_report(listed, whole, tmp_path):
    """As for a user: a process is killed while it trains, and resumed with nothing but --out."""
    out = tmp_path / "run"
    argv = [sys.executable, str(FOLDER / "train.py"), *command(listed, "--out", out, *STATEFUL)]
    process = subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0)
    done = subprocess.run(
        [sys.executable, str(FOLDER / "train.py"), "--resume", "--out", str(out)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert content(out) == content(whole)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    elif how == "a bit":
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda record: record.file_size)
        content[largest.header_offset + largest.file_size] ^= 1  # in a record, not in the padding between records
    elif how == "something else":
        content = bytearray(b"not a checkpoint")
    path.write_bytes(content)


@pytest.mark.parametrize("how", [slow("cut"), slow("empty"), "a bit", slow("something else")])
def test_a_damaged_checkpoint_is_told_and_the_previous_one_used(listed, whole, tmp_path, capsys, how):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    damage(out / "checkpoint.pt", how)
    train.main(["--resume", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "checkpoint.pt is damaged" in printed
    assert "after epoch 1 of 2" in printed
    assert content(out) == content(whole)
    assert checkpoint.read(out / "checkpoint.previous.pt")["epoch"] == 1  # not the damaged one
    damage(out / "checkpoint.pt", how)
    damage(out / "checkpoint.previous.pt", how)
    message = stopped(capsys, ["--resume", "--out", str(out)])
    assert "no whole checkpoint is left" in message
    assert str(out / "checkpoint.previous.pt") in message


def test_what_takes_a_files_place_is_on_the_disk_before(tmp_path, monkeypatch):
    """A power cut cannot be tested, so the test checks the order of fsync and replace."""
    calls = []
    for name in ("fsync", "replace"):
        genuine = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, genuine=genuine, name=name: (calls.append(name), genuine(*a))[1])
    checkpoint.write_atomically(tmp_path / "file", b"content")
    assert calls == ["fsync", "replace"]
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_checkpoint_of_other_parts_is_damaged(tmp_path):
    torch.save({"model": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(checkpoint.CheckpointError, match=r"it has no args, best, data, epoch"):
        checkpoint.load(tmp_path)
    assert checkpoint.load(tmp_path / "nothing") == (None, {})


def test_a_resumed_run_keeps_its_options(listed, whole, tmp_path, capsys):
    argv = command(listed, "--out", whole, *STATEFUL, "--resume")
    assert "--lr: the run in" in stopped(capsys, [*argv, "--lr", "0.5"])
    assert "--loss: the run in" in stopped(capsys, ["--resume", "--out", str(whole), "--loss", "adaptive"])
    before = content(whole)
    train.main(["--resume", "--out", str(whole), "--workers", "1"])
    assert content(whole) == before


def test_the_scale_of_the_loss_and_the_events_are_resumed(listed, tmp_path):
    """The scale changes only after thousands of steps, so the test changes it in the checkpoint."""
    out = tmp_path / "run"
    run(listed, out, "--amp", "fp16", "--epochs", 2)
    state = checkpoint.read(out / "checkpoint.previous.pt")
    assert state["epoch"] == 1
    state["scaler"]["scale"] = 8.0
    torch.save(state, out / "checkpoint.pt")
    train.main(["--resume", "--out", str(out)])
    state = checkpoint.read(out / "checkpoint.pt")
    assert (state["epoch"], state["scaler"]["scale"]) == (2, 8.0)
    assert steps_of_events(out) == [1, 2]  # the second epoch was trained twice, but is there once


def test_a_run_has_names_that_cannot_be_encoded(listed, tmp_path, monkeypatch, capsys):
    """Latin-1 in the path of the data, of a class and of a file that is skipped, and a stdout that is ASCII."""
    root, out = tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / "run"
    names = ["ant", "caf\u00e9", os.fsdecode(b"caf\xe9")]
    for split, counts in COUNTS.items():
        for label, n in enumerate(counts):
            (root / split / names[label]).mkdir(parents=True)
            for i in range(n):
                shutil.copy(listed / split / f"{label}_{i}.png", root / split / names[label])
        (root / split / names[2] / "\u00e9.txt").touch()
    stdout = in_ascii(monkeypatch)
    train.main(command(root, "--dataset", "folder", "--out", out))
    first = content(out)
    train.main(["--resume", "--out", str(out)])
    stdout.flush()
    skipped = "files without an image's extension are skipped: 3 (3 .txt; {0}, {1}, {2})"
    said = skipped.format(*(rf"{split}/caf\xe9/\xe9.txt" for split in ("test", "train", "val")))
    written = skipped.format(*(f"{split}/caf\\xe9/\u00e9.txt" for split in ("test", "train", "val")))
    assert said in stdout.buffer.getvalue().decode("ascii")
    report = json.loads(first["report.json"])
    assert report["class_names"] == ["ant", "caf\u00e9", r"caf\xe9"]
    assert report["notes"] == [written]
    assert written in first["report.md"].decode()
    assert content(out) == first
    monkeypatch.undo()
    (root / "train" / names[2] / "2_0.png").write_bytes(b"no image")
    assert rf"{tmp_path}/caf\xe9/train/caf\xe9/2_0.png cannot be read" in stopped(
        capsys, command(root, "--dataset", "folder", "--out", tmp_path / "other", "--workers", 1, "--batch-size", 41)
    )
    # TensorBoard's files can only be opened by names in UTF-8.
    message = stopped(capsys, command(listed, "--out", tmp_path / os.fsdecode(b"caf\xe9")))
    assert rf"--out must be a path in UTF-8, got {tmp_path}/caf\xe9" in message


def test_a_run_is_not_overwritten(listed, whole, capsys):
    assert "has a run already: --resume continues it" in stopped(capsys, command(listed, "--out", whole, *STATEFUL))


def test_nothing_to_resume_is_told(listed, tmp_path, capsys):
    """A mistyped --out must not begin a default run there."""
    assert "there is no run to continue" in stopped(capsys, ["--resume", "--out", str(tmp_path / "run")])
    (tmp_path / "file").touch()
    assert "args.json cannot be read" in stopped(capsys, ["--resume", "--out", str(tmp_path / "file")])
    message = stopped(capsys, command(listed, "--out", tmp_path / "file"))
    assert message.strip() == f"error: {tmp_path / 'file'}: File exists"
    run(listed, tmp_path / "run", "--resume", "--epochs", 1, "--warmup-epochs", 0)  # as in a job that always resumes


def test_a_run_goes_on_with_its_own_options_and_images(listed, whole, tmp_path, capsys):
    """Otherwise its best epoch could have been chosen on the split that is reported now."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (tmp_path / "val.txt").write_text((listed / "ImageNet_LT_test.txt").read_text())
    (tmp_path / "test.txt").write_text((listed / "ImageNet_LT_val.txt").read_text())
    swapped = ("--val-list", str(tmp_path / "val.txt"), "--test-list", str(tmp_path / "test.txt"))
    assert "the images or labels are not those" in stopped(capsys, ["--resume", "--out", str(out), *swapped])
    shutil.copytree(listed, tmp_path / "moved")
    train.main(["--resume", "--out", str(out), "--data", str(tmp_path / "moved")])
    assert content(out) == content(whole)
    (out / "args.json").unlink()
    other = command(listed, "--out", out, *STATEFUL, "--lr", 0.5, "--resume")
    assert "is of another run: it has lr 0.02, not lr 0.5" in stopped(capsys, other)
    train.main(command(listed, "--out", out, *STATEFUL, "--resume"))
    assert content(out) == content(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {}}, "does not fit this run"),
        ({"optimizer": {}}, "does not fit this run"),
        ({"lr_scheduler": None}, "does not fit this run"),
        ({"history": []}, "its history has not a row for each epoch"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_told(whole, tmp_path, capsys, change, message):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.previous.pt").unlink()
    path = tmp_path / "run" / "checkpoint.pt"
    torch.save(torch.load(path, weights_only=True) | change, path)
    assert message in stopped(capsys, ["--resume", "--out", str(path.parent)])


def test_whatever_is_in_the_way_damaged_checkpoints_are_set_aside(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for n in range(3):
        path.mkdir()
        (path / str(n)).touch()
        checkpoint.set_aside({path: ""})
        assert not path.exists()
    path.touch()
    checkpoint.set_aside({path: ""})
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    "change",
    [{"epochs": "x"}, {"epochs": None}, {"loss": "foo"}, {"lr": [1]}, {"model": 3}, {"mixup": None}, {"seed": 1.5},
     {"amp": "int8"}, {"channels_last": "maybe"}, {"posthoc": "no"}, {"profile": "x"}, {"augment": {}}, {"opt": 1}],
)  # fmt: skip
def test_options_of_a_wrong_kind_are_told(whole, tmp_path, capsys, change):
    saved = json.loads((whole / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps(saved | change))
    message = stopped(capsys, ["--resume", "--out", str(tmp_path)])
    assert "args.json is damaged" in message or "the run in" in message
    assert f"--{next(iter(change)).replace('_', '-')}" in message


def test_damaged_options_are_told(listed, whole, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "args.json").write_text("{")
    assert f"{out / 'args.json'} is damaged" in stopped(capsys, ["--resume", "--out", str(out)])
    (out / "args.json").write_text("{}")
    assert "is not of this version" in stopped(capsys, ["--resume", "--out", str(out)])


def test_a_full_disk_stops_the_run_and_keeps_its_state(listed, whole, tmp_path, capsys):
    out = tmp_path / "run"
    size = (whole / "checkpoint.previous.pt").stat().st_size
    argv = command(listed, "--out", out, *STATEFUL)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 16, hard))  # room for the first checkpoint, not for the second
    try:
        message = stopped(capsys, argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.strerror(errno.EFBIG) in message
    assert "checkpoint.new.pt" in message
    assert not list(out.glob("*.unfinished"))
    assert torch.load(out / "checkpoint.pt", weights_only=True)["epoch"] == 1
    train.main([*argv, "--resume"])
    assert content(out) == content(whole)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_state(listed, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    genuine = train.backward

    def poisoned(trained, images, *args):
        return genuine(trained, images * (float("nan") if (out / "checkpoint.pt").exists() else 1.0), *args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "backward", poisoned)
        message = stopped(capsys, command(listed, "--out", out))
    assert "the loss is nan in epoch 2 by step 5" in message
    assert f"The state after epoch 1 is kept in {out}" in message
    assert checkpoint.read(out / "checkpoint.pt")["epoch"] == 1
    train.main([*command(listed, "--out", out), "--resume"])
    assert len(log(out)) == 3


def test_weights_that_only_the_last_step_destroyed_are_not_kept(listed, tmp_path, capsys):
    """With one step an epoch, the loss is computed before the step that destroys the weights."""
    out = tmp_path / "run"
    argv = command(listed, "--out", out, "--batch-size", 41, "--lr", 1e10, "--warmup-epochs", 0)
    assert "weights are not finite after epoch 2" in stopped(capsys, argv)
    assert checkpoint.read(out / "checkpoint.pt")["epoch"] == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [(KeyboardInterrupt(), "continues after the last whole epoch"), (MemoryError(), "error: out of memory"),
     (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "error: out of memory")],
)  # fmt: skip
def test_what_ends_a_run_from_outside_is_one_line(listed, tmp_path, capsys, monkeypatch, error, message):
    def interrupted(*args):
        raise error

    monkeypatch.setattr(train, "backward", interrupted)
    assert message in stopped(capsys, command(listed, "--out", tmp_path / "run"))


def test_a_fault_of_the_code_is_not_taken_for_a_full_memory(listed, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("the shapes do not match")

    monkeypatch.setattr(train, "backward", broken)
    with pytest.raises(RuntimeError, match="the shapes do not match"):
        train.main(command(listed, "--out", tmp_path / "run"))


def test_an_image_that_cannot_be_read_is_named_with_its_line(listed, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(listed, root)
    (root / "train" / "1_3.png").write_bytes((root / "train" / "1_3.png").read_bytes()[:60])
    for workers in (0, 1):
        argv = command(root, "--out", tmp_path / f"run{workers}", "--workers", workers, "--batch-size", 41)
        message = stopped(capsys, argv)
        assert "1_3.png" in message
        assert "ImageNet_LT_train.txt:28" in message
        assert message.count("\n") == 0  # no traceback
    (root / "train" / "0_2.png").unlink()
    assert "ImageNet_LT_train.txt:3" in stopped(capsys, command(root, "--out", tmp_path / "run"))


# ---- Two processes


def in_two(argv: list[str]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(FOLDER / "train.py"), *argv],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def same_evaluation(out: Path, one: dict) -> None:
    """Two processes report what one process finds for the same weights; 17 and 11 images do not split equally."""
    assert one["splits"]["reported"]["n_images"] == 17
    two = json.loads((out / "report.of.two.json").read_text())
    for name, found in one["models"].items():
        for method, result in found["results"].items():
            other = two["models"][name]["results"][method]
            assert other["ece"] == pytest.approx(result["ece"], abs=1e-6)
            for rate in (*evaluation.RATES, "class_error", "n_images", "worst_class"):
                assert other[rate] == result[rate], (method, rate)
        assert two["models"][name]["tau_curves"] == found["tau_curves"]


# GroupNorm, because each process has BatchNorm of its own images.
COMMON = ("--norm", "group", "--augment", "resized-crop-flip", "--epochs", 2, "--loss", "erm", "--lr", 0.005)


@pytest.fixture(scope="module")
def one_process(listed, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    run(listed, out, *COMMON)
    return out


@pytest.fixture(scope="module")
def sharded(listed, tmp_path_factory) -> tuple[list[str], Path]:
    """Options and folder of a run of two processes that share the classes."""
    out = tmp_path_factory.mktemp("sharded") / "run"
    argv = command(listed, "--out", out, *COMMON, "--class-parallel", "--grad-accum-steps", 2)
    in_two(argv)
    return argv, out


@pytest.mark.slow
def test_two_processes_with_sharded_classes_train_as_one(one_process, sharded):
    _, out = sharded
    assert losses(out) == pytest.approx(losses(one_process), rel=2e-5)
    found, expected = (
        torch.load(folder / "checkpoint.pt", weights_only=True)["model"] for folder in (out, one_process)
    )
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_as_one(listed, one_process, tmp_path):
    out = tmp_path / "run"
    in_two(command(listed, "--out", out, *COMMON))
    assert losses(out) == pytest.approx(losses(one_process), rel=2e-5)
    (out / "report.of.two.json").write_bytes((out / "report.json").read_bytes())
    same_evaluation(out, run(listed, out, *COMMON, "--resume"))


@pytest.mark.slow
def test_two_processes_with_sharded_classes_resume(sharded):
    argv, out = sharded
    (out / "report.json").unlink()
    in_two([*argv, "--resume"])
    resumed = json.loads((out / "report.json").read_text())
    assert resumed["models"]["last epoch"]["results"]["raw"]["n_images"] == 17


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_unit_vectors_of_the_cosine_head_are_finite_where_the_features_are_zeros(dtype):
    features = torch.randn(3, 8).to(dtype)
    features[1] = 0.0
    features.requires_grad_()
    unit = models.unit_vectors(features)
    unit.square().sum().backward()
    wide = features.detach().double()
    want = wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-300)
    assert unit.dtype == dtype
    torch.testing.assert_close(unit.double(), want, rtol=torch.finfo(dtype).eps, atol=0.0)
    assert features.grad.isfinite().all()
