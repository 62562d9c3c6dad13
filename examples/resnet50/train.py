"""Train a classifier on long-tailed images with the logit-adjusted loss, or another of its family.

    python examples/resnet50/train.py               # ResNet-50 on long-tailed digits, no download
    python examples/resnet50/train.py --loss erm    # plain cross entropy, and what corrects it post hoc
    python examples/resnet50/train.py --dataset cifar10-lt --data ~/cifar --download
    python examples/resnet50/train.py --dataset cifar100-lt --data ~/cifar --download
    torchrun --nproc_per_node=8 examples/resnet50/train.py --dataset imagenet-lt --data ~/imagenet --amp --workers 8
    torchrun --nproc_per_node=8 examples/resnet50/train.py --dataset inaturalist2018 --data ~/inat --amp --workers 8
    torchrun --nproc_per_node=8 examples/resnet50/train.py --dataset places-lt --data ~/places --pretrained --amp
    python examples/resnet50/train.py --dataset folder --data ~/images --batch-size 64 --lr 0.05

    python examples/resnet50/train.py --resume --out runs/digits-lt-resnet50-erm-seed0      # after it was stopped
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 examples/resnet50/train.py ...

Written to --out: args.json, log.csv (an epoch a line), tensorboard/, checkpoint.pt and the one before it, and at the
end report.json, report.md and its figures. The epoch and tau* are chosen on a validation split, which is carved from
the training images where a data set has none; the report names it. On one device a resumed run ends with the same
report as one that was never stopped. Under torchrun --out has to be on a file system that all nodes see.
"""

import contextlib
import csv
import io
import json
import math
import re
import sys
import time
import warnings
from itertools import islice
from typing import Any

import torch
from checkpoint import NAME, CheckpointError, check_same, load, save, set_aside, write_atomically
from data import Data, DataError, fingerprint
from data import load as load_data
from evaluation import RATES, evaluate
from loading import Mix, TrainLoader, eval_loader, mixed_seed, on_device
from model import Classifier, make_classifier, make_loss, try_shapes
from options import FREE, OptionError, parse, saved_form
from report import final_report, write_report
from states import load_model, load_optimizer, model_state, optimizer_state
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from world import World, all_finite, average_buffers, first_alone, mean_over_ranks, meet, start, stop


class Stopped(Exception):
    """Training cannot go on; the message says why and what is kept."""


def run(args: Any, world: World) -> None:
    data_options = (
        "train_list", "val_list", "test_list", "imb_type", "imb_factor", "val_fraction", "check_images", "download",
    )  # fmt: skip
    given = {name: getattr(args, name) for name in data_options if getattr(args, name) is not None}
    with first_alone(world, args.download):
        data = load_data(args.dataset, args.data, **given)
    check_batches(args, data, world)
    loader = TrainLoader(args, data.train.images, world)
    val = None if data.val is None else eval_loader(args, data.val.images, world)
    test = eval_loader(args, data.test.images, world)

    model = make_classifier(args, data.n_classes, make_loss(args, data.class_counts, world.device))
    try_shapes(args, model, args.batch_size // world.n_ranks // args.grad_accum_steps)
    model.to(world.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # which PyTorch documents
    if args.class_parallel:
        model.spread_classes()
    try_loss(args, model, world)
    if args.torchcompile:
        model.trunk.compile()
    trained = in_parallel(model, world)
    optimizer = make_optimizer(args, model)
    schedule = make_schedule(args, optimizer, len(loader))
    if args.amp == "fp16":  # where the scale has to come down first, steps are skipped, which the schedule counts
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16")  # type: ignore[attr-defined]
    ema = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.model_ema_decay), use_buffers=True)
        if args.model_ema
        else None
    )
    evaluated: Classifier = model if ema is None else ema.module  # type: ignore[assignment]
    autocast = autocast_of(args, world)
    mix = Mix(args)

    def train_step(images: Tensor, target: Tensor) -> Tensor:
        images, target, target_weight = mix(images, target)
        loss = backward(trained, images, target, target_weight, args.grad_accum_steps, scaler, autocast)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss

    def train_epoch(epoch: int, n_steps: int | None = None) -> float:
        """The mean loss of the epoch's batches on all processes."""
        torch.manual_seed(mixed_seed(args.seed, epoch, world.rank))  # of dropout and mixing
        trained.train()
        n_steps = len(loader) if n_steps is None else n_steps
        mean, total = math.nan, torch.zeros((), device=world.device)
        batches = islice(loader.epoch(epoch), n_steps)
        progress = tqdm(batches, f"epoch {epoch + 1}", n_steps, leave=False, disable=quiet(world))
        for step, (images, target) in enumerate(progress, 1):
            total += train_step(on_device(images, args, world), target.to(world.device, non_blocking=True))
            schedule.step()
            if ema is not None:
                ema.update_parameters(model)
            if step % 50 == 0 or step == n_steps:
                mean = float(mean_over_ranks(total)) / step
                if not math.isfinite(mean):
                    raise Stopped(
                        f"the loss is {mean} in epoch {epoch + 1} by step {step}: a new run with a lower --lr, a "
                        f"longer --warmup-epochs or --amp bf16 may help. {kept(args, epoch)}"
                    )
                progress.set_postfix(loss=f"{mean:.3f}")
        average_buffers(trained)
        if ema is not None:
            average_buffers(ema)
        if not all_finite(model):  # the last step's doing, which no loss has seen
            what = f"weights are not finite after epoch {epoch + 1}"
            raise Stopped(f"{what}: a new run with a lower --lr may help. {kept(args, epoch)}")
        return mean

    if args.profile_step:
        from profiling import profile_step  # here, because torch.utils.benchmark looks for a CUDA toolkit, and says so

        say(world, profile_step(args, loader, trained, model, train_step, autocast, world))
        return
    say(world, describe(args, data, model, loader))
    if args.dry_run:
        loss = train_epoch(0, n_steps=1)
        for split, batches in ((data.val, val), (data.test, test)):
            if split is not None and batches is not None:
                evaluate(args, evaluated, islice(batches, 1), split.name, data, world, autocast)
        say(
            world, f"dry run: a step of training (loss {loss:.3f}) and one of evaluation went well; nothing was written"
        )
        return

    # What the run is about from here on: an epoch, its rates on the validation split, a checkpoint.
    history: list[dict[str, Any]] = []
    best: dict[str, Any] | None = None
    identity = fingerprint(data)
    if args.resume:
        state, damaged = load(args.out)
        for line in damaged.values():
            say(world, f"warning: {line}")
        if world.is_first:
            set_aside(damaged)
        if state is not None:
            check_same(args.out, state, saved_form(args), identity, FREE)
            try:
                load_model(model, state["model"])
                load_optimizer(model, optimizer, state["optimizer"])
                schedule.load_state_dict(state["lr_scheduler"])
                scaler.load_state_dict(state["scaler"])
                if ema is not None:
                    ema.load_state_dict(state["model_ema"])
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise CheckpointError(f"the checkpoint in {args.out} does not fit this run: {error}") from error
            history, best = state["history"], state["best"]
        say(world, f"resuming {args.out} after epoch {len(history)} of {args.epochs}")

    if world.is_first:
        prepare(args)
    writer = SummaryWriter(args.out / "tensorboard", purge_step=len(history) + 1) if world.is_first else None
    for epoch in range(len(history), args.epochs):
        began = time.perf_counter()
        row: dict[str, Any] = {"epoch": epoch + 1, "lr": schedule.get_last_lr()[0], "train_loss": train_epoch(epoch)}
        seconds = time.perf_counter() - began
        if val is not None and data.val is not None:
            rates = evaluate(args, evaluated, val, data.val.name, data, world, autocast).results["raw"]
            row |= {f"val_{name}": rates[name] for name in (*RATES, "ece")}
            # Of equal epochs the later one, which has trained for longer.
            if best is None or rates["balanced_error"] <= best["balanced_error"]:
                best = {"epoch": epoch + 1, "balanced_error": rates["balanced_error"], "model": model_state(evaluated)}
        row |= {"seconds": seconds, "images_per_second": len(loader) * args.batch_size / seconds}
        history.append(row)
        state = {
            "model": model_state(model), "optimizer": optimizer_state(model, optimizer),
            "lr_scheduler": schedule.state_dict(), "scaler": scaler.state_dict(),
            "model_ema": None if ema is None else ema.state_dict(), "epoch": epoch + 1, "args": saved_form(args),
            "history": history, "best": best, "data": identity,
        }  # fmt: skip
        if writer is not None:
            save(args.out, state)
            write_log(args, history)
            for name, value in row.items():
                if name != "epoch":
                    writer.add_scalar(name, value, epoch + 1)
            writer.flush()
        say(world, epoch_line(row, args.epochs))

    candidates = {"last epoch": (args.epochs, model_state(evaluated))}
    if best is not None and best["epoch"] != args.epochs:
        candidates = {"best epoch": (best["epoch"], best["model"])} | candidates
    report = final_report(args, data, model, candidates, val, test, world, autocast)
    if writer is not None:
        write_log(args, history)
        print(write_report(args.out, report))
        writer.close()


def backward(
    trained: nn.Module, images: Tensor, target: Tensor, target_weight: Tensor | None, n_parts: int,
    scaler: Any, autocast: Any,
) -> Tensor:  # fmt: skip
    """The gradient of a batch's mean loss, in parts that need less memory; the loss, detached."""
    n_parts = min(n_parts, len(images))
    shares = [None] * n_parts if target_weight is None else target_weight.tensor_split(n_parts)
    parts = list(zip(images.tensor_split(n_parts), target.tensor_split(n_parts), shares, strict=True))
    total = torch.zeros((), device=images.device)
    for i, (part, labels, share) in enumerate(parts):
        unsynced = contextlib.nullcontext() if i == n_parts - 1 else without_sync(trained)
        with unsynced:
            with autocast():
                loss = trained(part, labels, share) * (len(part) / len(images))
            scaler.scale(loss).backward()
        total += loss.detach()
    return total


def without_sync(trained: nn.Module) -> Any:
    """Gradients add up on each process, to be averaged with those of the last part."""
    averaged = next((m for m in trained.modules() if isinstance(m, DistributedDataParallel)), None)
    return contextlib.nullcontext() if averaged is None else averaged.no_sync()


def in_parallel(model: Classifier, world: World) -> nn.Module:
    if world.n_ranks == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    if model.is_spread:  # the gradient of a head's part is of all images already
        model.trunk = DistributedDataParallel(model.trunk, device_ids=ids, broadcast_buffers=False)
        return model
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


def make_optimizer(args: Any, model: Classifier) -> torch.optim.Optimizer:
    groups = [{"params": list(part.parameters())} for part in (model.trunk, model.head)]
    if args.opt == "adamw":
        return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay)
    return torch.optim.SGD(
        groups, args.lr, momentum=args.momentum, nesterov=args.nesterov, weight_decay=args.weight_decay
    )


def make_schedule(args: Any, optimizer: torch.optim.Optimizer, n_steps: int) -> lr_scheduler.LRScheduler:
    """In steps: a linear warm-up, then what --schedule says of the rest."""
    n_warmup, n_all = round(args.warmup_epochs * n_steps), args.epochs * n_steps
    if args.schedule == "cosine":
        main = lr_scheduler.CosineAnnealingLR(optimizer, max(1, n_all - n_warmup))
    elif args.schedule == "step":
        milestones = [max(0, epoch * n_steps - n_warmup) for epoch in args.lr_steps]
        main = lr_scheduler.MultiStepLR(optimizer, milestones, args.lr_gamma)
    else:
        main = lr_scheduler.ConstantLR(optimizer, 1.0)
    if n_warmup == 0:
        return main
    warmup = lr_scheduler.LinearLR(optimizer, 1.0 / n_warmup, 1.0, n_warmup)
    return lr_scheduler.SequentialLR(optimizer, [warmup, main], [n_warmup])


def autocast_of(args: Any, world: World) -> Any:
    if args.amp is None:
        return contextlib.nullcontext
    dtype = torch.bfloat16 if args.amp == "bf16" else torch.float16
    return lambda: torch.autocast(world.device.type, dtype)


# ---- What is checked, said and written


def check_batches(args: Any, data: Data, world: World) -> None:
    n_images = len(data.train.images)
    if args.batch_size % world.n_ranks:
        raise OptionError(
            f"--batch-size {args.batch_size} is of all {world.n_ranks} processes, which have to share equally"
        )
    if args.batch_size // world.n_ranks < args.grad_accum_steps:
        raise OptionError(
            f"--grad-accum-steps must be at most {args.batch_size // world.n_ranks}, a process's images of a step, "
            f"got {args.grad_accum_steps}"
        )
    if n_images < args.batch_size:
        raise OptionError(f"--batch-size must be at most {n_images}, the training images, got {args.batch_size}")
    if args.class_parallel and world.n_ranks == 1:
        raise OptionError("--class-parallel spreads classes over processes: start it by torchrun --nproc_per_node=N")
    if args.norm == "sync" and (world.n_ranks == 1 or world.device.type != "cuda"):
        raise OptionError("--norm sync is of several processes with a GPU each")


def try_loss(args: Any, model: Classifier, world: World) -> None:
    """Options that an implementation of the loss does not compute are told before training."""
    features = torch.ones(2, model.head.in_features, device=world.device, requires_grad=True)
    target = torch.zeros(2, dtype=torch.int64, device=world.device)
    try:
        if model.fused or model.is_spread:
            model.loss_of(features, model.head.weight, target).backward()
        else:
            model.loss_of_logits(model.head(features), target).backward()
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"--loss {args.loss} --loss-impl {args.loss_impl} cannot be computed here: {error}"
        ) from error
    model.zero_grad()


def prepare(args: Any) -> None:
    """--out, which has no other run in it."""
    path = args.out / "args.json"
    if not args.resume and (path.exists() or (args.out / "checkpoint.pt").exists()):
        raise OptionError(f"{args.out} has a run already: --resume continues it, another --out keeps it")
    args.out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_atomically(path, json.dumps(saved_form(args), indent=1).encode())


def describe(args: Any, data: Data, model: Classifier, loader: TrainLoader) -> str:
    counts = data.class_counts
    n_parameters = sum(p.numel() for p in model.parameters())
    val = "none" if data.val is None else f"{len(data.val.images):,} ({data.val.name})"
    lines = [
        f"{args.dataset}: {data.n_classes:,} classes of {int(counts.max()):,} to {int(counts.min()):,} training images",
        f"images: {len(data.train.images):,} to train on, {val} to choose on, {len(data.test.images):,} to report on "
        f"({data.test.name})",
        f"{args.model}, {n_parameters:,} parameters; loss: {args.loss}; "
        f"{args.epochs} epochs of {len(loader)} steps of {args.batch_size}",
        *data.notes,
    ]
    return "\n".join(lines)


def write_log(args: Any, history: list[dict[str, Any]]) -> None:
    """All epochs anew, so that none is there twice after a run was resumed."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(history[0]))
    table.writeheader()
    table.writerows(history)
    write_atomically(args.out / "log.csv", text.getvalue().encode())


def epoch_line(row: dict[str, Any], n_epochs: int) -> str:
    line = f"epoch {row['epoch']}/{n_epochs}: loss {row['train_loss']:.4f}"
    if "val_balanced_error" in row:
        line += f", on the validation split balanced error {100 * row['val_balanced_error']:.2f} %"
        line += f", top-1 accuracy {100 * row['val_top1_accuracy']:.2f} %"
    return line + f"; {row['seconds']:.1f} s, {row['images_per_second']:.0f} images/s"


def kept(args: Any, n_epochs: int) -> str:
    return f"The state after epoch {n_epochs} is kept in {args.out}" if n_epochs else "No epoch had been finished"


def say(world: World, text: str) -> None:
    if world.is_first:
        print(text, flush=True)


def quiet(world: World) -> bool:
    return not (world.is_first and sys.stderr.isatty())


def main(argv: list[str] | None = None) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # it may be ASCII, and names of files are anything
    args = parse(__doc__, argv)
    try:
        run(args, start(args.device, args.seed, args.cudnn_benchmark))
        meet()
    except (DataError, OptionError, CheckpointError, Stopped) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        went_on = "" if not (args.out / NAME).exists() else f". {args.out / NAME} is whole: --resume continues from it"
        sys.exit(f"error: {where}{error.strerror or error}{went_on}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        sys.exit("error: out of memory: a smaller --batch-size or --image-size, or more --grad-accum-steps, may help")
    except KeyboardInterrupt:
        sys.exit(f"stopped; --resume --out {args.out} continues after the last whole epoch")
    finally:
        stop()


if __name__ == "__main__":
    main()
