"""torchrun and FSDP2: the classifier head and its loss in one module, `LogitAdjustedLinear`.

    torchrun --nproc_per_node=2 examples/loops/fsdp2_head.py          # balanced error against cross entropy
    torchrun --nproc_per_node=2 examples/loops/fsdp2_head.py --check  # losses against the formula

The head takes the place of the last `nn.Linear` and of the loss: `model(images, labels)` is the loss, `model(images)`
the raw logits. It has a `fully_shard` of its own, which gathers its weight for its call. FSDP2 averages the gradients
of the processes, each of a mean over its own batch: that is the gradient of the mean over all images of the step,
because all processes have equally many; with ignored labels or class weights it would not be (accelerate_loop.py says
what is). The prior counts the images of all processes.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from digits import N_CLASSES, Digits, Formula, main, network
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fused_la import LogitAdjustedLinear, count_classes

EPOCHS, BATCH, FEATURES = 30, 16, 64  # images of a step and process


# The line that changes, in the place of `nn.Linear(FEATURES, N_CLASSES)` and the loss.
def logit_adjusted_head(class_counts: Tensor) -> nn.Module:
    return LogitAdjustedLinear(FEATURES, class_counts)


class Classifier(nn.Module):
    def __init__(self, make_head: Callable[[], nn.Module]):
        super().__init__()
        self.trunk = network()[:-1]
        self.head = make_head()

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.trunk(images), labels)


def class_counts(digits: Digits) -> Tensor:
    rank, world = dist.get_rank(), dist.get_world_size()
    own_labels = digits.train_labels[rank::world]  # where each process has files of its own
    return count_classes(own_labels, N_CLASSES, group=dist.group.WORLD)  # summed over the processes


def train(
    make_head: Callable[[], nn.Module], digits: Digits, seed: int, max_steps: int | None
) -> tuple[nn.Module, list[float]]:
    with torch.device("meta"):
        model = Classifier(make_head)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.trunk, model.head, model):
        fully_shard(module, mesh=mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(seed * dist.get_world_size() + dist.get_rank())  # each process draws its own part of the weights
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    dataset = TensorDataset(digits.train_images, digits.train_labels)
    sampler = DistributedSampler(dataset, seed=seed)
    losses: list[float] = []
    for epoch in range(1 if max_steps else EPOCHS):
        sampler.set_epoch(epoch)
        for images, labels in itertools.islice(DataLoader(dataset, BATCH, sampler=sampler), max_steps):
            loss = model(images, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return model, losses


class PlainHead(nn.Linear):
    """A linear head and the formula of the loss; with equal class counts, plain cross entropy."""

    def __init__(self, class_counts: Tensor):
        super().__init__(FEATURES, N_CLASSES)
        self.formula = Formula(class_counts).forward  # as a child it would lose its prior in to_empty

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = super().forward(input)
        return logits if labels is None else self.formula(logits, labels)


if __name__ == "__main__":
    if "RANK" not in os.environ:
        sys.exit("RANK must be set: run this file by torchrun --nproc_per_node=2")
    dist.init_process_group("gloo")
    main(
        "FSDP2", train, lambda counts: partial(logit_adjusted_head, counts),
        plain=lambda: partial(PlainHead, torch.ones(N_CLASSES)), formula=lambda counts: partial(PlainHead, counts),
        class_counts=class_counts,
    )  # fmt: skip
    dist.destroy_process_group()
