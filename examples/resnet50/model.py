"""The classifier: a torchvision trunk, a linear or cosine head, and the loss on top."""

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
    """A loss of the family and the options that it is called with. `margin` covers all classes."""

    margin: PairwiseMargin
    class_weight: Tensor | None
    smoothing: float
    prior: Tensor  # (C,) the distribution that label smoothing mixes in
    impl: str

    def options(self, weight_name: str, first: int = 0, last: int | None = None) -> dict[str, Any]:
        """Keyword arguments for the package's loss functions, for the classes from `first` up to `last`, exclusive."""
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
    elif args.loss == "ldam":  # the cosine head has already multiplied the logits by its scale
        margin = PairwiseMargin(target_offset=preset(log_prior, args.max_margin, args.scale).target_offset)
    else:
        preset_options = {name: getattr(args, name) for name in ("tau", "gamma") if getattr(args, name) is not None}
        margin = preset(log_prior, **preset_options)
    class_weight = (-log_prior).exp() / len(log_prior) if args.class_weights == "inverse" else None
    return Loss(margin, class_weight, args.smoothing, log_prior.exp(), args.loss_impl)


def unit_vectors(vectors: Tensor) -> Tensor:
    """Normalise the last dimension, in the vectors' dtype. Zeros stay zeros; in float16 `F.normalize` gives NaN."""
    norm = torch.linalg.vector_norm(vectors.float(), dim=-1, keepdim=True)
    return (vectors / norm.masked_fill(norm < 1e-12, 1.0)).to(vectors.dtype)


class Classifier(nn.Module):
    """Trunk, head and loss. Calling it with images and labels gives the mean loss; `logits` is for evaluation.

    The logits are f = W h + b for features h, or cosines times a scale. If the classes are sharded over processes, W
    and b are DTensors, and only the gradients of the trunk are averaged over processes.
    """

    def __init__(self, trunk: nn.Module, head: nn.Linear, cosine_scale: float | None, loss: Loss, fused: bool):
        super().__init__()
        self.trunk, self.head = trunk, head
        self.cosine_scale, self.loss, self.fused = cosine_scale, loss, fused

    def forward(self, images: Tensor, target: Tensor, target_weight: Tensor | None = None) -> Tensor:
        features, weight = self.head_operands(images, self.head.weight)
        if self.is_sharded or self.fused:
            return self.loss_of_features(features, weight, target, target_weight)
        return self.loss_of_logits(F.linear(features, weight, self.head.bias), target, target_weight)

    def loss_of_features(
        self, features: Tensor, weight: Tensor, target: Tensor, target_weight: Tensor | None = None
    ) -> Tensor:
        """The loss from features, with head and loss fused: the logits are never stored."""
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
        features, weight = self.head_operands(images, whole_head.weight)
        return F.linear(features, weight, whole_head.bias)

    def head_operands(self, images: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The features and weight whose product the logits are; for a cosine head they are normalised and scaled."""
        features = self.trunk(images)
        if self.cosine_scale is None:
            return features, weight
        return unit_vectors(features) * self.cosine_scale, unit_vectors(weight)

    @property
    def is_sharded(self) -> bool:
        return isinstance(self.head.weight, DTensor)

    def whole_head(self) -> "Head":
        """The head with all classes, on every process. If the classes are sharded it is a collective."""
        weight, bias = (None if p is None else p.detach() for p in (self.head.weight, self.head.bias))
        assert weight is not None
        if isinstance(weight, DTensor):
            return Head(weight.full_tensor(), bias.full_tensor() if isinstance(bias, DTensor) else None)
        return Head(weight, bias)

    def shard_classes(self) -> None:
        """Shard the head's classes over processes, in order: the first process gets the first classes."""
        mesh = init_device_mesh(self.head.weight.device.type, (dist.get_world_size(),))
        for name, parameter in list(self.head.named_parameters()):
            sharded = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            self.head.register_parameter(name, nn.Parameter(sharded))


class Head(NamedTuple):
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)


def class_parallel_loss(
    loss: Loss, features: Tensor, weight: DTensor, bias: Any, target: Tensor, target_weight: Tensor | None
) -> Tensor:
    group, n_classes = weight.device_mesh.get_group(), weight.shape[0]
    shard_size = -(-n_classes // dist.get_world_size(group))  # the same split as distribute_tensor's
    first = min(n_classes, shard_size * dist.get_rank(group))
    last = min(n_classes, first + shard_size)
    return class_parallel_linear_margin_cross_entropy(
        features, weight.to_local(), target, loss.margin.of_classes(first, last),
        bias=None if bias is None else bias.to_local(), group=group, gather_features=True, average_over_ranks=True,
        target_weight=target_weight, **loss.options("class_weight", first, last),
    )  # fmt: skip


# ---- The network


def make_classifier(args: Any, n_classes: int, loss: Loss) -> Classifier:
    trunk = make_network(args)
    name, old_head = final_linear(trunk, args.model)
    owner, _, attribute = name.rpartition(".")
    setattr(trunk.get_submodule(owner), attribute, nn.Identity())
    cosine_scale = args.scale if args.loss == "ldam" else None
    head = nn.Linear(old_head.in_features, n_classes, bias=cosine_scale is None)
    return Classifier(trunk, head, cosine_scale, loss, args.fused_head)


def make_network(args: Any) -> nn.Module:
    """The network with torchvision's head of 1000 classes, which `make_classifier` replaces."""
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
        # Blocks begin as the identity (Goyal et al., 2017); otherwise a few hundred images cannot train a ResNet.
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
    """Run a copy on the meta device, so that sizes which the network does not take are reported before training."""
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
    """Name and module of the last linear layer, which has to be the network's classifier of 1000 classes."""
    linear = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not linear or linear[-1][1].out_features != 1000:
        raise OptionError(f"--model {model} does not end in a linear layer, as head and weight norms need")
    return linear[-1]


class CifarResNet32(nn.Module):
    """ResNet-32 for CIFAR: three stages of five blocks with 16, 32 and 64 channels, and shortcuts without parameters.

    He et al., "Deep residual learning for image recognition", 2016, section 4.2.
    """

    def __init__(self, norm: Any):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm1 = norm(16)
        blocks, n_channels = [], 16
        for width in (16, 32, 64):
            for _ in range(5):
                downsamples = width != n_channels
                shortcut = Subsample() if downsamples else None
                blocks.append(BasicBlock(n_channels, width, 2 if downsamples else 1, shortcut, norm_layer=norm))
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
    """Shortcut that keeps every second pixel and doubles the channels with zeros, half of them on either side."""

    def forward(self, images: Tensor) -> Tensor:
        n_zeros = images.shape[1] // 2
        return F.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, n_zeros, n_zeros))
