"""accelerate: gradient accumulation and two processes, with the criterion as it is.

    python examples/loops/accelerate_loop.py                               # balanced error against cross entropy
    torchrun --nproc_per_node=2 examples/loops/accelerate_loop.py          # the same in two processes
    torchrun --nproc_per_node=2 examples/loops/accelerate_loop.py --check  # losses against the formula

On GPUs `accelerate launch` starts the processes; on CPUs it needs mpirun for more than one, and torchrun does not.

accelerate divides each loss by the number of accumulated batches, and DDP averages gradients over the processes. That
is the gradient of the mean over all images of a step if its batches have equally many, as here. If they do not, or if
labels are ignored, divide by the number n of labels that count in all batches and processes of the step:

    loss = criterion(logits, labels, num_items_in_batch=n)
    accelerator.backward(loss * accelerator.gradient_accumulation_steps * accelerator.num_processes)
"""

from __future__ import annotations

import itertools

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import N_CLASSES, Digits, main, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fused_la import LogitAdjustedCrossEntropyLoss, count_classes

EPOCHS, BATCH, ACCUMULATION = 60, 19, 2  # 304 images: all batches have 19, and all steps two of them


def train_dataset(digits: Digits) -> TensorDataset:
    return TensorDataset(digits.train_images, digits.train_labels)


def class_counts(digits: Digits) -> Tensor:
    return count_classes(train_dataset(digits).tensors[1], N_CLASSES)  # the prior of all images, not of this process's


# The line that changes, in the place of `nn.CrossEntropyLoss()`. The criterion needs neither prepare() nor .to(device):
# it goes where the logits are.
def logit_adjusted(class_counts: Tensor) -> nn.Module:
    return LogitAdjustedCrossEntropyLoss(class_counts)


def train(criterion: nn.Module, digits: Digits, seed: int, max_steps: int | None) -> tuple[nn.Module, list[float]]:
    set_seed(seed)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(train_dataset(digits), batch_size=BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[float] = []
    for _ in range(1 if max_steps else EPOCHS):
        for images, labels in itertools.islice(loader, max_steps):
            with accelerator.accumulate(model):
                loss = criterion(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return accelerator.unwrap_model(model), losses


if __name__ == "__main__":
    main("accelerate", train, logit_adjusted, class_counts=class_counts)
    Accelerator(cpu=True).end_training()
