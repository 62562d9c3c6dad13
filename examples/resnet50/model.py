"""The classifier: a trunk of torchvision, a linear or cosine head, and the loss on top of it."""

import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from options import OptionError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torchvision import models
from torchvision.models.resnet import BasicBlock

from fused_la import linear_margin_cross_entropy, log_prior_from_counts, margin_cross_entropy, margins
from fused_la.distributed import class_parallel_linear_margin_cross_entropy
from fused_la.margins import PairwiseMargin


class Loss(NamedTuple):
    """A member of the family and the options it is called with; `margin` is of all classes."""

    margin: PairwiseMargin
    class_weight: Tensor | None
    smoothing: float
    prior: Tensor  # (C,) of which smoothed labels get their share
    impl: str

    def options(self, weight_name: str, first: int = 0, last: int | None = None) -> dict[str, Any]:
        """The keyword arguments of the package's functions, for the classes from `first` up to `last`."""
        weight = None if self.class_weight is None else self.class_weight[first:last]
        options: dict[str, Any] = {weight_name: weight, "impl": self.impl}
        if self.smoothing > 0:
            options |= {"label_smoothing": self.smoothing, "smoothing_distribution": self.prior[first:last]}
        return options


def make_loss(args: Any, class_counts: Tensor, device: torch.device) -> Loss:
    try:
        return loss_of_options(args, class_counts, device)
    except ValueError as error:
        raise OptionError(f"--loss {args.loss}: {error}") from error


def loss_of_options(args: Any, class_counts: Tensor, device: torch.device) -> Loss:
    log_prior = log_prior_from_counts(class_counts).to(device)
    preset = getattr(margins, args.loss)
    if args.loss == "erm":
        margin = preset()
    elif args.loss == "fisher_consistent":
        margin = preset(log_prior, args.power * log_prior)
    elif args.loss == "ldam":  # its scale is in the logits, as the cosine head makes them
        margin = PairwiseMargin(target_offset=preset(log_prior, args.max_margin, args.scale).target_offset)
    else:
        numbers = {name: getattr(args, name) for name in ("tau", "gamma") if getattr(args, name) is not None}
        margin = preset(log_prior, **numbers)
    class_weight = (-log_prior).exp() / len(log_prior) if args.class_weights == "inverse" else None
    return Loss(margin, class_weight, args.smoothing, log_prior.exp(), args.loss_impl)


def unit_vectors(vectors: Tensor) -> Tensor:
    """Of the last dimension, in the vectors' dtype; zeros of zeros, which in float16 are NaN to `F.normalize`."""
    norm = torch.linalg.vector_norm(vectors.float(), dim=-1, keepdim=True)
    return (vectors / norm.masked_fill(norm < 1e-12, 1.0)).to(vectors.dtype)


class Classifier(nn.Module):
    """Called with images and labels, it gives the mean loss of the batch; `logits` is for evaluation.

    The logits are f = W h + b of features h, or cosines times a scale. Where the classes are spread over processes, W
    and b are DTensors, and the trunk alone is averaged over processes.
    """

    def __init__(self, trunk: nn.Module, head: nn.Linear, cosine_scale: float | None, loss: Loss, fused: bool):
        super().__init__()
        self.trunk, self.head = trunk, head
        self.cosine_scale, self.loss, self.fused = cosine_scale, loss, fused

    def forward(self, images: Tensor, target: Tensor, target_weight: Tensor | None = None) -> Tensor:
        features, weight = self.operands(images, self.head.weight)
        if self.is_spread or self.fused:
            return self.loss_of(features, weight, target, target_weight)
        return self.loss_of_logits(F.linear(features, weight, self.head.bias), target, target_weight)

    def loss_of(self, features: Tensor, weight: Tensor, target: Tensor, target_weight: Tensor | None = None) -> Tensor:
        """Head and loss in one."""
        bias = self.head.bias
        if isinstance(weight, DTensor):
            return class_parallel_loss(self.loss, features, weight, bias, target, target_weight)
        return linear_margin_cross_entropy(
            features, weight, target, self.loss.margin, bias=bias, target_weight=target_weight,
            **self.loss.options("class_weight"),
        )  # fmt: skip

    def loss_of_logits(self, logits: Tensor, target: Tensor, target_weight: Tensor | None = None) -> Tensor:
        return margin_cross_entropy(
            logits, target, self.loss.margin, target_weight=target_weight, **self.loss.options("weight")
        )

    def logits(self, images: Tensor, whole_head: "Head") -> Tensor:
        features, weight = self.operands(images, whole_head.weight)
        return F.linear(features, weight, whole_head.bias)

    def operands(self, images: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(images)
        if self.cosine_scale is None:
            return features, weight
        return unit_vectors(features) * self.cosine_scale, unit_vectors(weight)

    @property
    def is_spread(self) -> bool:
        return isinstance(self.head.weight, DTensor)

    def whole_head(self) -> "Head":
        """All classes on every process, which all have to ask."""
        weight, bias = (None if p is None else p.detach() for p in (self.head.weight, self.head.bias))
        assert weight is not None
        if isinstance(weight, DTensor):
            return Head(weight.full_tensor(), bias.full_tensor() if isinstance(bias, DTensor) else None)
        return Head(weight, bias)

    def spread_classes(self) -> None:
        """A part of the head's classes for each process, the first ones for the first."""
        mesh = init_device_mesh(self.head.weight.device.type, (dist.get_world_size(),))
        for name, parameter in list(self.head.named_parameters()):
            spread = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            self.head.register_parameter(name, nn.Parameter(spread))


class Head(NamedTuple):
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)


def class_parallel_loss(
    loss: Loss, features: Tensor, weight: DTensor, bias: Any, target: Tensor, target_weight: Tensor | None
) -> Tensor:
    group, n_classes = weight.device_mesh.get_group(), weight.shape[0]
    most = -(-n_classes // dist.get_world_size(group))  # as distribute_tensor splits
    first = min(n_classes, most * dist.get_rank(group))
    last = min(n_classes, first + most)
    return class_parallel_linear_margin_cross_entropy(
        features, weight.to_local(), target, loss.margin.of_classes(first, last),
        bias=None if bias is None else bias.to_local(), group=group, gather_features=True, average_over_ranks=True,
        target_weight=target_weight, **loss.options("class_weight", first, last),
    )  # fmt: skip


# ---- The network


def make_classifier(args: Any, n_classes: int, loss: Loss) -> Classifier:
    trunk = make_network(args)
    name, replaced = final_linear(trunk, args.model)
    owner, _, attribute = name.rpartition(".")
    setattr(trunk.get_submodule(owner), attribute, nn.Identity())
    cosine_scale = args.scale if args.loss == "ldam" else None
    head = nn.Linear(replaced.in_features, n_classes, bias=cosine_scale is None)
    return Classifier(trunk, head, cosine_scale, loss, args.fused_head)


def make_network(args: Any) -> nn.Module:
    """With a head of 1000 classes, which is replaced."""
    is_resnet = args.model.startswith(("resnet", "resnext", "wide_resnet"))
    if args.norm != "batch" and (args.pretrained or not is_resnet):
        raise OptionError(f"--norm {args.norm} is of ResNets that are trained anew, got --model {args.model}"
                         + " --pretrained" * args.pretrained)  # fmt: skip
    if args.model == "resnet32":
        if args.pretrained:
            raise OptionError("--pretrained: there are no weights of resnet32")
        return CifarResNet32(norm_layer(args.norm))
    if args.model not in models.list_models(module=models):
        raise OptionError(f"--model must be resnet32 or a classifier of torchvision.models, got {args.model!r}")
    options: dict[str, Any] = {}
    if is_resnet and not args.pretrained:
        # Blocks begin as the identity (Goyal et al., 2017), without which a few hundred images do not train one.
        options = {"zero_init_residual": True, "norm_layer": norm_layer(args.norm)}
    elif args.model == "inception_v3" or (args.model == "googlenet" and not args.pretrained):
        options = {"aux_logits": False} | ({} if args.pretrained else {"init_weights": True})
    try:
        return models.get_model(args.model, weights="DEFAULT" if args.pretrained else None, **options)
    except (OSError, RuntimeError) as error:
        if not args.pretrained:
            raise
        raise OptionError(
            f"--pretrained: the weights of {args.model} cannot be fetched ({error}); where there is no network, put "
            f"the file of torchvision's model page in {torch.hub.get_dir()}/checkpoints"
        ) from error


def try_shapes(args: Any, model: Classifier, n_images: int) -> None:
    """Sizes that a network does not take are told before training: by a copy that has shapes, but no numbers."""
    trunk = copy.deepcopy(model.trunk).to("meta")
    try:
        trunk(torch.empty(n_images, 3, args.image_size, args.image_size, device="meta"))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise OptionError(
            f"--model {args.model} cannot be trained on {n_images} images of --image-size {args.image_size} at a time, "
            f"a process's part of --batch-size and --grad-accum-steps: {error}"
        ) from error


def norm_layer(name: str) -> Any:
    return {
        "batch": nn.BatchNorm2d,
        "sync": nn.SyncBatchNorm,
        "group": lambda channels: nn.GroupNorm(min(32, channels // 4), channels),
    }[name]


def final_linear(network: nn.Module, model: str) -> tuple[str, nn.Linear]:
    """The classifier of 1000 classes, whose output is the network's."""
    linear = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not linear or linear[-1][1].out_features != 1000:
        raise OptionError(f"--model {model} does not end in a linear layer, as head and weight norms need")
    return linear[-1]


class CifarResNet32(nn.Module):
    """He et al., "Deep residual learning for image recognition", 2016, section 4.2: three stages of five blocks with
    16, 32 and 64 channels, and shortcuts without parameters."""

    def __init__(self, norm: Any):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm1 = norm(16)
        blocks, n_channels = [], 16
        for width in (16, 32, 64):
            for _ in range(5):
                narrower = width != n_channels
                shortcut = Subsample() if narrower else None
                blocks.append(BasicBlock(n_channels, width, 2 if narrower else 1, shortcut, norm_layer=norm))
                n_channels = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(n_channels, 1000)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(F.relu(self.norm1(self.conv1(images))))
        return self.fc(features.mean((2, 3)))


class Subsample(nn.Module):
    """Every second pixel, and as many channels of zeros again, half of them on either side."""

    def forward(self, images: Tensor) -> Tensor:
        n_zeros = images.shape[1] // 2
        return F.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, n_zeros, n_zeros))
