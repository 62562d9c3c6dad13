"""Command-line options of train.py: defaults by data set, saved options of a run, and checks of combinations."""

import argparse
import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from data import DATASETS
from formats import printable

from fused_la import margins


class OptionError(Exception):
    """An option that does not fit the model, the data or the machine."""


# Default settings by profile; options override them. The paper-* profiles are the settings of the paper's appendix D.
# The paper's code differs: it has a bottleneck ResNet for CIFAR, Nesterov momentum, 1241 and 1419 epochs, and an L2
# penalty that amounts to a weight decay of 2e-4 without BatchNorm.
PROFILES: dict[str, dict[str, Any]] = {
    "digits": dict(
        model="resnet50", image_size=32, augment="shift", epochs=24, batch_size=16, lr=0.01, weight_decay=5e-4,
        warmup_epochs=2.0, schedule="cosine", imb_factor=0.02,
    ),
    "paper-cifar": dict(
        model="resnet32", image_size=32, augment="pad-crop-flip", epochs=200, batch_size=128, lr=0.1, weight_decay=1e-4,
        warmup_epochs=5.0, schedule="step", lr_steps=[160, 180], lr_gamma=0.1, imb_factor=0.01,
    ),
    "paper-imagenet-lt": dict(
        model="resnet50", image_size=224, augment="resized-crop-flip", epochs=90, batch_size=512, lr=0.4,
        weight_decay=5e-4, warmup_epochs=5.0, schedule="cosine",
    ),
    "paper-inaturalist": dict(
        model="resnet50", image_size=224, augment="resized-crop-flip", epochs=90, batch_size=512, lr=0.4,
        weight_decay=1e-4, warmup_epochs=5.0, schedule="cosine",
    ),
}  # fmt: skip
PROFILE_OF = {
    "digits-lt": "digits", "cifar10-lt": "paper-cifar", "cifar100-lt": "paper-cifar",
    "imagenet-lt": "paper-imagenet-lt", "places-lt": "paper-imagenet-lt", "inaturalist2018": "paper-inaturalist",
    "folder": "paper-imagenet-lt",
}  # fmt: skip

# The arguments of each preset of fused_la.margins and their defaults; None: the option is required.
LOSSES: dict[str, dict[str, float | None]] = {
    "erm": {}, "balanced": {}, "adaptive": {}, "ldam": {"max_margin": 0.5, "scale": 30.0}, "equalised": {},
    "logit_adjusted": {"tau": 1.0}, "logit_adjusted_adaptive": {}, "balanced_softmax": {},
    "vector_scaling": {"gamma": None, "tau": 1.0}, "cdt": {"gamma": None}, "fisher_consistent": {"power": None},
}  # fmt: skip
# The last three follow from other arguments than a log prior.
assert set(LOSSES) == set(margins.__all__) - {"PairwiseMargin", "consistency", "fedlc", "fedrs", "immax"}
# The losses that correct for the prior themselves; a second correction would correct twice.
PRIOR_CORRECTING = set(LOSSES) - {"erm", "adaptive", "ldam"}

# The options that may change when a run is resumed, because no result depends on them.
MAY_CHANGE = {"out", "resume", "data", "train_list", "val_list", "test_list", "download", "workers", "check_images"}


def new_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flag: dict[str, Any] = {"action": "store_true"}

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, default="digits-lt", help="(default: %(default)s)")
    group.add_argument("--data", type=Path, metavar="DIR", help="where the data set is; digits-lt needs none")
    for split in ("train", "val", "test"):
        group.add_argument(f"--{split}-list", metavar="FILE", help="list file (or .json) of other name than the usual")
    group.add_argument("--download", help="CIFAR's archive, if it is not there", **flag)
    group.add_argument("--imb-type", choices=("exp", "step"), help="profile of digits-lt and CIFAR (default: exp)")
    group.add_argument("--imb-factor", type=float, metavar="F", help="rarest over most frequent class of these")
    group.add_argument(
        "--val-fraction", type=float, metavar="F",
        help="of the training images, to choose on if the data set has no validation split (default: 0.1)",
    )  # fmt: skip
    group.add_argument("--check-images", help="decode every image before training", **flag)
    group.add_argument("--image-size", type=int, metavar="PIXELS")
    group.add_argument("--augment", choices=("none", "shift", "pad-crop-flip", "resized-crop-flip"))
    group.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA", help="of its Beta distribution; 0: none")
    group.add_argument("--cutmix", type=float, default=0.0, metavar="ALPHA", help="with --mixup: one of both a batch")
    group.add_argument("--workers", type=int, default=0, metavar="N", help="of each process (default: %(default)s)")

    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="a classifier of torchvision.models, or resnet32 (CIFAR's)")
    group.add_argument("--pretrained", help="torchvision's default weights, but for the head (downloads)", **flag)
    group.add_argument(
        "--norm", choices=("batch", "sync", "group"), default="batch",
        help="of a ResNet; sync: over processes, GPUs only; group: the same on any number of processes",
    )  # fmt: skip
    group.add_argument("--channels-last", **flag)
    group.add_argument("--torchcompile", help="the model, but for head and loss", **flag)
    group.add_argument("--amp", nargs="?", const="bf16", choices=("bf16", "fp16"), help="fp16 scales the loss")

    group = parser.add_argument_group("method")
    group.add_argument("--loss", choices=list(LOSSES), default="logit_adjusted", help="(default: %(default)s)")
    group.add_argument("--tau", type=float, help="of logit_adjusted and vector_scaling (default: 1)")
    group.add_argument("--gamma", type=float, help="of vector_scaling and cdt")
    group.add_argument("--max-margin", type=float, help="of ldam (default: 0.5)")
    group.add_argument("--scale", type=float, help="of ldam, whose head is a cosine classifier (default: 30)")
    group.add_argument("--power", type=float, help="of fisher_consistent: delta = pi^power")
    group.add_argument(
        "--posthoc", action=argparse.BooleanOptionalAction,
        help="evaluate with logit adjustment and weight normalisation, too (default: if nothing else corrects)",
    )  # fmt: skip
    group.add_argument("--sampler", choices=("instance", "class-balanced"), default="instance")
    group.add_argument(
        "--class-weights", choices=("none", "inverse"), default="none",
        help="in the mean of each part of a batch that is computed at once",
    )  # fmt: skip
    group.add_argument("--smoothing", type=float, default=0.0, metavar="EPS", help="of labels, toward the prior")
    group.add_argument("--fused-head", help="head and loss in one: no logits in training", **flag)
    group.add_argument("--class-parallel", help="the head's classes spread over processes", **flag)
    group.add_argument("--loss-impl", choices=("auto", "reference", "blocked", "triton"), default="auto")

    group = parser.add_argument_group("optimization")
    group.add_argument(
        "--profile", choices=[name for name in PROFILES if name.startswith("paper-")],
        help="the paper's settings, for another data set than they belong to",
    )  # fmt: skip
    group.add_argument("--epochs", type=int)
    group.add_argument("--batch-size", type=int, metavar="N", help="images a step, of all processes together")
    group.add_argument("--grad-accum-steps", type=int, default=1, metavar="N", help="parts a step is computed in")
    group.add_argument("--opt", choices=("sgd", "adamw"), default="sgd")
    group.add_argument("--lr", type=float)
    group.add_argument("--momentum", type=float, help="of sgd (default: 0.9)")
    group.add_argument("--nesterov", help="of sgd", **flag)
    group.add_argument("--weight-decay", type=float)
    group.add_argument("--warmup-epochs", type=float, help="of learning rates that grow linearly")
    group.add_argument("--schedule", choices=("cosine", "step", "constant"))
    group.add_argument("--lr-steps", type=int, nargs="+", metavar="EPOCH", help="of --schedule step")
    group.add_argument("--lr-gamma", type=float, help="of --schedule step (default: 0.1)")
    group.add_argument("--model-ema", help="evaluate a running mean of the weights", **flag)
    group.add_argument("--model-ema-decay", type=float, help="(default: 0.999)")

    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, metavar="DIR", help="(default: runs/DATASET-MODEL-LOSS-seedSEED)")
    group.add_argument("--resume", help="continue the run in --out; options not given are that run's", **flag)
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--device", help="(default: a GPU if there is one)")
    group.add_argument("--cudnn-benchmark", help="faster convolutions; runs then differ in the last bits", **flag)
    group.add_argument("--dry-run", help="check all, a step of training and of evaluation, write nothing", **flag)
    group.add_argument("--profile-step", help="time loader, step and loss instead of training, write nothing", **flag)
    return parser


def parse(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    """Parse options and fill in every default. Ends the program with a message if they do not fit together."""
    parser = new_parser(description)
    args = parser.parse_args(argv)
    saved = None
    if args.resume:
        if args.out is None:
            parser.error("--resume needs --out, the directory of the run to continue")
        saved = read_saved_args(parser, args.out / "args.json")
        only_resume = parser.parse_args(["--resume", "--out", str(args.out)])
        if saved is None and args == only_resume:  # nobody resumes to begin a default run: --out is probably mistyped
            parser.error(f"{args.out / 'args.json'} does not exist: there is no run to continue. Give its options")
    if saved is not None:
        args = parser.parse_args(
            [*to_argv(saved), *(sys.argv[1:] if argv is None else argv)]
        )  # argparse takes the last of repeated options
    resolve(parser, args)
    for name, value in (saved or {}).items():
        if name not in MAY_CHANGE and json_value(getattr(args, name)) != value:
            parser.error(
                f"--{dashed(name)}: the run in {args.out} has {value!r}, not {json_value(getattr(args, name))!r}"
            )
    return args


def read_saved_args(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any] | None:
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError:
        return None  # the run was stopped before it had written anything, so it begins anew
    except OSError as error:
        parser.error(f"{path} cannot be read: {error.strerror}")
    except ValueError as error:
        parser.error(f"{path} is damaged ({error}): put it right or delete it, and give the run's options")
    known = set(vars(parser.parse_args([]))) - {"resume", "out"}
    if not isinstance(saved, dict) or set(saved) != known:
        parser.error(f"{path} is not of this version of train.py")
    strict = new_parser(None)
    strict.exit_on_error = False
    try:
        strict.parse_args(to_argv(saved))
    except argparse.ArgumentError as error:
        parser.error(f"{path} is damaged: {error}")
    return saved


def to_argv(saved: dict[str, Any]) -> list[str]:
    """Saved options as command-line arguments, so that argparse checks them: args.json may be damaged."""
    argv: list[str] = []
    for name, value in saved.items():
        if isinstance(value, list):
            argv += [f"--{dashed(name)}", *map(str, value)]
        elif isinstance(value, bool):
            argv += [f"--{dashed(name)}"] if value else ["--no-posthoc"] if name == "posthoc" else []
        elif value is not None:
            argv += [f"--{dashed(name)}={value}"]
    return argv


def args_as_json(args: argparse.Namespace) -> dict[str, Any]:
    return {name: json_value(value) for name, value in vars(args).items() if name not in ("resume", "out")}


def json_value(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def dashed(name: str) -> str:
    return name.replace("_", "-")


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name, value in PROFILES[args.profile or PROFILE_OF[args.dataset]].items():
        imb_unused = name in ("imb_type", "imb_factor") and not made_long_tailed(args)
        lr_steps_unused = name in ("lr_steps", "lr_gamma") and args.schedule not in (None, "step")
        if getattr(args, name) is None and not imb_unused and not lr_steps_unused:
            setattr(args, name, value)

    def default_if(name: str, applies: bool, applies_to: str, default: Any = None) -> None:
        """Fill in an option's default if the option applies; otherwise refuse it, because it would have no effect."""
        given = getattr(args, name)
        if not applies and given is not None and given is not False:
            parser.error(f"--{dashed(name)} is of {applies_to}")
        if applies and given is None:
            setattr(args, name, default)

    default_if("imb_type", made_long_tailed(args), "digits-lt and CIFAR; other data sets come as they are", "exp")
    default_if("imb_factor", made_long_tailed(args), "digits-lt and CIFAR; other data sets come as they are", 0.01)
    default_if("download", args.dataset.startswith("cifar"), "CIFAR; other data sets have to be fetched by hand")
    default_if("check_images", not made_long_tailed(args), "data sets of image files")
    default_if("momentum", args.opt == "sgd", "--opt sgd", 0.9)
    default_if("nesterov", args.opt == "sgd", "--opt sgd")
    default_if("lr_steps", args.schedule == "step", "--schedule step")
    default_if("lr_gamma", args.schedule == "step", "--schedule step", 0.1)
    default_if("model_ema_decay", args.model_ema, "--model-ema", 0.999)
    if args.schedule == "step" and args.lr_steps is None:
        parser.error("--schedule step needs --lr-steps")
    defaults = LOSSES[args.loss]
    for name in ("tau", "gamma", "max_margin", "scale", "power"):
        losses = [loss for loss, arguments in LOSSES.items() if name in arguments]
        default_if(name, name in defaults, f"--loss {' or '.join(losses)}; got --loss {args.loss}", defaults.get(name))
        if name in defaults and getattr(args, name) is None:
            parser.error(f"--loss {args.loss} needs --{name}")

    check_ranges(parser, args)
    refuse_double_corrections(parser, args)
    refuse_incompatible_options(parser, args)
    if args.out is None:
        args.out = Path("runs") / f"{args.dataset}-{args.model}-{args.loss}-seed{args.seed}"
    try:
        str(args.out).encode()
    except UnicodeEncodeError:  # otherwise TensorBoard fails when it opens its file
        parser.error(f"--out must be a path in UTF-8, got {printable(str(args.out))}")


def made_long_tailed(args: argparse.Namespace) -> bool:
    return args.dataset == "digits-lt" or args.dataset.startswith("cifar")


def check_ranges(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    lower_bounds = {
        "epochs": 1, "batch_size": 1, "grad_accum_steps": 1, "image_size": 1, "workers": 0, "seed": 0, "mixup": 0,
        "cutmix": 0, "warmup_epochs": 0, "weight_decay": 0, "tau": 0, "gamma": 0, "max_margin": 0, "momentum": 0,
    }  # fmt: skip
    for name, bound in lower_bounds.items():
        value = getattr(args, name)
        if value is not None and not bound <= value < float("inf"):
            parser.error(f"--{dashed(name)} must be at least {bound} and finite, got {value}")
    if args.seed >= 2**63:
        parser.error(f"--seed must be below 2^63, got {args.seed}")
    if args.nesterov and args.momentum == 0:
        parser.error("--nesterov needs a --momentum above 0")
    for name in ("lr", "scale", "lr_gamma"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{dashed(name)} must be positive and finite, got {value}")
    for name in ("smoothing", "model_ema_decay"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1:
            parser.error(f"--{dashed(name)} must be in [0, 1), got {value}")
    if args.val_fraction is not None and not 0 <= args.val_fraction <= 0.5:
        parser.error(f"--val-fraction must be in [0, 0.5], got {args.val_fraction}")
    if args.imb_factor is not None and not 0 < args.imb_factor <= 1:
        parser.error(f"--imb-factor must be in (0, 1], got {args.imb_factor}")
    if args.power is not None and not abs(args.power) < float("inf"):
        parser.error(f"--power must be finite, got {args.power}")
    if args.warmup_epochs >= args.epochs and args.warmup_epochs > 0:
        parser.error(f"--warmup-epochs must be below --epochs {args.epochs}, got {args.warmup_epochs:g}")
    if args.lr_steps is not None and not is_rising([args.warmup_epochs, *args.lr_steps, args.epochs]):
        steps = " ".join(map(str, args.lr_steps))
        parser.error(
            f"--lr-steps must rise from above --warmup-epochs {args.warmup_epochs:g} to below --epochs {args.epochs}, "
            f"got {steps}"
        )
    if args.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device must be cpu, cuda or cuda:N, got {args.device}")


def is_rising(numbers: list[float]) -> bool:
    return all(a < b for a, b in pairwise(numbers))


def refuse_double_corrections(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse a second correction for the prior: it makes rare classes as much too likely as they were too unlikely."""
    by_loss = [f"--loss {args.loss}"] if args.loss in PRIOR_CORRECTING else []
    by_sampler = ["--sampler class-balanced"] if args.sampler == "class-balanced" else []
    by_weights = ["--class-weights inverse"] if args.class_weights == "inverse" else []
    corrections = by_loss + by_sampler + by_weights
    if args.posthoc is None:
        args.posthoc = not corrections
    corrections += ["--posthoc"] if args.posthoc else []
    if len(corrections) > 1:
        effects = {
            "--sampler class-balanced": "shows the model all classes equally often",
            "--class-weights inverse": "weights each class by the inverse of its frequency",
            "--posthoc": "subtracts tau * log(prior) from the trained model's logits",
        }
        reasons = [f"{name} {effects.get(name, 'has the class frequencies in the loss')}" for name in corrections]
        parser.error(
            f"{' and '.join(corrections)} would correct for the class frequencies twice: {', and '.join(reasons)}. "
            "Keep one of them"
        )


def refuse_incompatible_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.class_parallel and args.fused_head:
        parser.error("--class-parallel computes head and loss in one already: leave out --fused-head")
    if args.class_parallel and args.model_ema:
        parser.error("--model-ema averages whole models, and --class-parallel spreads the head: choose one")
    if args.class_parallel and args.amp == "fp16":
        parser.error("--amp fp16 skips steps by what one process sees, which --class-parallel cannot share: use bf16")
    if args.class_parallel and args.loss_impl == "reference":
        parser.error("--loss-impl reference does not compute --class-parallel")
    if args.dry_run and args.profile_step:
        parser.error("--dry-run and --profile-step each run something else: choose one")
    if args.resume and (args.dry_run or args.profile_step):
        parser.error("--resume continues a run, --dry-run and --profile-step have none")
