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

A run writes to --out: args.json, log.csv (one line an epoch), tensorboard/, checkpoint.pt and the one before it, and at
the end report.json, report.md and its figures. The epoch and tau* are chosen on a validation split, which the report
names. If a data set has none, it is carved from the training images. On one device a resumed run ends with the same
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
from loading import Mix, TrainLoader, derive_seed, eval_loader, on_device
from model import Classifier, make_classifier, make_loss, try_shapes
from options import MAY_CHANGE, OptionError, args_as_json, parse
from report import final_report, write_report
from states import load_model, load_optimizer, model_state, optimizer_state
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from world import World, all_finite, average_buffers, barrier, close_world, init_world, mean_over_ranks, rank_0_first


class Stopped(Exception):
    """Training cannot go on; the message says why and which state is kept."""


def run(args: Any, world: World) -> None:
    data_options = (
        "train_list", "val_list", "test_list", "imb_type", "imb_factor", "val_fraction", "check_images", "download",
    )  # fmt: skip
    data_kwargs = {name: getattr(args, name) for name in data_options if getattr(args, name) is not None}
    with rank_0_first(world, args.download):
        data = load_data(args.dataset, args.data, **data_kwargs)
    check_batches(args, data, world)
    loader = TrainLoader(args, data.train.images, world)
    val = None if data.val is None else eval_loader(args, data.val.images, world)
    test = eval_loader(args, data.test.images, world)

    model = make_classifier(args, data.n_classes, make_loss(args, data.class_counts, world.device))
    try_shapes(args, model, args.batch_size // world.n_ranks // args.grad_accum_steps)
    model.to(world.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # documented by PyTorch
    if args.class_parallel:
        model.shard_classes()
    try_loss(args, model, world)
    if args.torchcompile:
        model.trunk.compile()
    parallel_model = wrap_ddp(model, world)
    optimizer = make_optimizer(args, model)
    schedule = make_schedule(args, optimizer, len(loader))
    if args.amp == "fp16":  # the scaler skips steps while its scale is too large, but the schedule counts them
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16")  # type: ignore[attr-defined]
    ema = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.model_ema_decay), use_buffers=True)
        if args.model_ema
        else None
    )
    eval_model: Classifier = model if ema is None else ema.module  # type: ignore[assignment]
    autocast = make_autocast(args, world)
    mix = Mix(args)

    def train_step(images: Tensor, target: Tensor) -> Tensor:
        images, target, target_weight = mix(images, target)
        loss = backward(parallel_model, images, target, target_weight, args.grad_accum_steps, scaler, autocast)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss

    def train_epoch(epoch: int, n_steps: int | None = None) -> float:
        """The mean loss of the epoch's batches on all processes."""
        torch.manual_seed(derive_seed(args.seed, epoch, world.rank))  # for dropout and mixing
        parallel_model.train()
        n_steps = len(loader) if n_steps is None else n_steps
        mean, total = math.nan, torch.zeros((), device=world.device)
        batches = islice(loader.epoch(epoch), n_steps)
        progress = tqdm(batches, f"epoch {epoch + 1}", n_steps, leave=False, disable=hide_progress(world))
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
                        f"longer --warmup-epochs or --amp bf16 may help. {kept_state(args, epoch)}"
                    )
                progress.set_postfix(loss=f"{mean:.3f}")
        average_buffers(parallel_model)
        if ema is not None:
            average_buffers(ema)
        if not all_finite(model):  # the last step may have broken the weights, and no loss was computed after it
            what = f"weights are not finite after epoch {epoch + 1}"
            raise Stopped(f"{what}: a new run with a lower --lr may help. {kept_state(args, epoch)}")
        return mean

    if args.profile_step:
        from profiling import profile_step  # here, because torch.utils.benchmark looks for a CUDA toolkit and prints so

        print_rank_0(world, profile_step(args, loader, parallel_model, model, train_step, autocast, world))
        return
    print_rank_0(world, describe(args, data, model, loader))
    if args.dry_run:
        loss = train_epoch(0, n_steps=1)
        for split, batches in ((data.val, val), (data.test, test)):
            if split is not None and batches is not None:
                evaluate(args, eval_model, islice(batches, 1), split.name, data, world, autocast)
        print_rank_0(
            world, f"dry run: a step of training (loss {loss:.3f}) and one of evaluation went well; nothing was written"
        )
        return

    # The training loop: each epoch trains, evaluates on the validation split and writes a checkpoint.
    history: list[dict[str, Any]] = []
    best: dict[str, Any] | None = None
    data_fingerprint = fingerprint(data)
    if args.resume:
        state, damaged = load(args.out)
        for line in damaged.values():
            print_rank_0(world, f"warning: {line}")
        if world.is_first:
            set_aside(damaged)
        if state is not None:
            check_same(args.out, state, args_as_json(args), data_fingerprint, MAY_CHANGE)
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
        print_rank_0(world, f"resuming {args.out} after epoch {len(history)} of {args.epochs}")

    if world.is_first:
        prepare_out_dir(args)
    writer = SummaryWriter(args.out / "tensorboard", purge_step=len(history) + 1) if world.is_first else None
    for epoch in range(len(history), args.epochs):
        began = time.perf_counter()
        row: dict[str, Any] = {"epoch": epoch + 1, "lr": schedule.get_last_lr()[0], "train_loss": train_epoch(epoch)}
        seconds = time.perf_counter() - began
        if val is not None and data.val is not None:
            rates = evaluate(args, eval_model, val, data.val.name, data, world, autocast).results["raw"]
            row |= {f"val_{name}": rates[name] for name in (*RATES, "ece")}
            # <=: of equally good epochs the later one counts, because it has trained for longer.
            if best is None or rates["balanced_error"] <= best["balanced_error"]:
                best = {"epoch": epoch + 1, "balanced_error": rates["balanced_error"], "model": model_state(eval_model)}
        row |= {"seconds": seconds, "images_per_second": len(loader) * args.batch_size / seconds}
        history.append(row)
        state = {
            "model": model_state(model), "optimizer": optimizer_state(model, optimizer),
            "lr_scheduler": schedule.state_dict(), "scaler": scaler.state_dict(),
            "model_ema": None if ema is None else ema.state_dict(), "epoch": epoch + 1, "args": args_as_json(args),
            "history": history, "best": best, "data": data_fingerprint,
        }  # fmt: skip
        if writer is not None:
            save(args.out, state)
            write_log(args, history)
            for name, value in row.items():
                if name != "epoch":
                    writer.add_scalar(name, value, epoch + 1)
            writer.flush()
        print_rank_0(world, epoch_line(row, args.epochs))

    candidates = {"last epoch": (args.epochs, model_state(eval_model))}
    if best is not None and best["epoch"] != args.epochs:
        candidates = {"best epoch": (best["epoch"], best["model"])} | candidates
    report = final_report(args, data, model, candidates, val, test, world, autocast)
    if writer is not None:
        write_log(args, history)
        print(write_report(args.out, report))
        writer.close()


def backward(
    parallel_model: nn.Module, images: Tensor, target: Tensor, target_weight: Tensor | None, n_micro_batches: int,
    scaler: Any, autocast: Any,
) -> Tensor:  # fmt: skip
    """Accumulate the gradient of a batch's mean loss over micro-batches, to save memory. Returns the loss, detached."""
    n_micro_batches = min(n_micro_batches, len(images))
    weights = [None] * n_micro_batches if target_weight is None else target_weight.tensor_split(n_micro_batches)
    micro_batches = list(
        zip(images.tensor_split(n_micro_batches), target.tensor_split(n_micro_batches), weights, strict=True)
    )
    total = torch.zeros((), device=images.device)
    for i, (micro_images, micro_target, weight) in enumerate(micro_batches):
        sync_context = contextlib.nullcontext() if i == n_micro_batches - 1 else without_sync(parallel_model)
        with sync_context:
            with autocast():
                loss = parallel_model(micro_images, micro_target, weight) * (len(micro_images) / len(images))
            scaler.scale(loss).backward()
        total += loss.detach()
    return total


def without_sync(parallel_model: nn.Module) -> Any:
    """Let gradients add up on each process; the backward pass of the last micro-batch averages them over processes."""
    ddp = next((m for m in parallel_model.modules() if isinstance(m, DistributedDataParallel)), None)
    return contextlib.nullcontext() if ddp is None else ddp.no_sync()


def wrap_ddp(model: Classifier, world: World) -> nn.Module:
    if world.n_ranks == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    if model.is_sharded:  # the gradient of a head's shard already covers the images of all processes
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
    """The learning rate by step: a linear warm-up, then --schedule for the remaining steps."""
    n_warmup, n_total = round(args.warmup_epochs * n_steps), args.epochs * n_steps
    if args.schedule == "cosine":
        schedule = lr_scheduler.CosineAnnealingLR(optimizer, max(1, n_total - n_warmup))
    elif args.schedule == "step":
        milestones = [max(0, epoch * n_steps - n_warmup) for epoch in args.lr_steps]
        schedule = lr_scheduler.MultiStepLR(optimizer, milestones, args.lr_gamma)
    else:
        schedule = lr_scheduler.ConstantLR(optimizer, 1.0)
    if n_warmup == 0:
        return schedule
    warmup = lr_scheduler.LinearLR(optimizer, 1.0 / n_warmup, 1.0, n_warmup)
    return lr_scheduler.SequentialLR(optimizer, [warmup, schedule], [n_warmup])


def make_autocast(args: Any, world: World) -> Any:
    if args.amp is None:
        return contextlib.nullcontext
    dtype = torch.bfloat16 if args.amp == "bf16" else torch.float16
    return lambda: torch.autocast(world.device.type, dtype)


# ---- Checks, messages and files


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
    """Compute the loss once, so that options which its implementation does not support are reported before training."""
    features = torch.ones(2, model.head.in_features, device=world.device, requires_grad=True)
    target = torch.zeros(2, dtype=torch.int64, device=world.device)
    try:
        if model.fused or model.is_sharded:
            model.loss_of_features(features, model.head.weight, target).backward()
        else:
            model.loss_of_logits(model.head(features), target).backward()
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"--loss {args.loss} --loss-impl {args.loss_impl} cannot be computed here: {error}"
        ) from error
    model.zero_grad()


def prepare_out_dir(args: Any) -> None:
    """Create --out and write args.json; refuse a folder that has another run."""
    path = args.out / "args.json"
    if not args.resume and (path.exists() or (args.out / "checkpoint.pt").exists()):
        raise OptionError(f"{args.out} has a run already: --resume continues it, another --out keeps it")
    args.out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_atomically(path, json.dumps(args_as_json(args), indent=1).encode())


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
    """Write all epochs anew, so that none appears twice after a run was resumed."""
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


def kept_state(args: Any, n_epochs: int) -> str:
    return f"The state after epoch {n_epochs} is kept in {args.out}" if n_epochs else "No epoch had been finished"


def print_rank_0(world: World, text: str) -> None:
    if world.is_first:
        print(text, flush=True)


def hide_progress(world: World) -> bool:
    return not (world.is_first and sys.stderr.isatty())


def main(argv: list[str] | None = None) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # stdout may be ASCII, and file names may hold any character
    args = parse(__doc__, argv)
    try:
        run(args, init_world(args.device, args.seed, args.cudnn_benchmark))
        barrier()
    except (DataError, OptionError, CheckpointError, Stopped) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        file_prefix = f"{error.filename}: " if error.filename else ""
        resume_hint = (
            "" if not (args.out / NAME).exists() else f". {args.out / NAME} is whole: --resume continues from it"
        )
        sys.exit(f"error: {file_prefix}{error.strerror or error}{resume_hint}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        sys.exit("error: out of memory: a smaller --batch-size or --image-size, or more --grad-accum-steps, may help")
    except KeyboardInterrupt:
        sys.exit(f"stopped; --resume --out {args.out} continues after the last whole epoch")
    finally:
        close_world()


if __name__ == "__main__":
    main()
