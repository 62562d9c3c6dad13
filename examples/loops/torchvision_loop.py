"""torchvision's training loop: mixup and cutmix in the collate function, smoothing, a moving average, mixed precision.

    python examples/loops/torchvision_loop.py          # balanced error against cross entropy
    python examples/loops/torchvision_loop.py --check  # losses against the formula

`train` has the parts of `references/classification/train.py` in its order and by its names, as this command runs them:

    python train.py --data-path DIR --use-v2 --mixup-alpha 0.2 --cutmix-alpha 1.0 --label-smoothing 0.1 --opt adamw \\
        --lr-scheduler cosineannealinglr --lr-warmup-epochs 5 --lr-warmup-method linear --model-ema --amp

Mixup and cutmix turn labels into (N, C) probabilities, which the loss takes as its target.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from digits import N_CLASSES, Digits, Formula, grad_norm, main, network, save_images
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, RandomSampler, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fused_la import LogitAdjustedCrossEntropyLoss, count_classes

EPOCHS, WARMUP_EPOCHS, BATCH, SMOOTHING = 45, 5, 32, 0.1


def image_folder(digits: Digits, folder: str) -> ImageFolder:
    save_images(digits, folder)
    transform = v2.Compose([v2.Grayscale(), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    return ImageFolder(f"{folder}/train", transform)


def class_counts(digits: Digits) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        dataset = image_folder(digits, folder)
        return count_classes(dataset.targets, len(dataset.classes))


# The line that changes, from train.py's
def cross_entropy() -> nn.Module:
    return nn.CrossEntropyLoss(label_smoothing=SMOOTHING)


# to this, which smooths toward the prior: with smoothing toward the uniform distribution, the minimiser of the adjusted
# loss favours rare classes.
def logit_adjusted(class_counts: Tensor) -> nn.Module:
    return LogitAdjustedCrossEntropyLoss(class_counts, label_smoothing=SMOOTHING, smoothing_distribution="prior")


class SmoothedFormula(Formula):
    """The adjusted loss with smoothing toward the prior, by hand."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        z = logits.float() + self.log_prior
        smoothing = F.cross_entropy(z, self.log_prior.exp().expand_as(z))
        return (1 - SMOOTHING) * F.cross_entropy(z, target) + SMOOTHING * smoothing


def train(criterion: nn.Module, digits: Digits, seed: int, max_steps: int | None) -> tuple[nn.Module, list[float]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    mixup_cutmix = v2.RandomChoice([v2.MixUp(alpha=0.2, num_classes=N_CLASSES), v2.CutMix(num_classes=N_CLASSES)])

    def collate_fn(batch: Any) -> Any:
        return mixup_cutmix(*default_collate(batch))

    with tempfile.TemporaryDirectory() as folder:
        dataset = image_folder(digits, folder)
        data_loader = DataLoader(dataset, BATCH, sampler=RandomSampler(dataset), collate_fn=collate_fn)
        model, criterion = network().to(device), criterion.to(device)  # or torchvision.models.get_model(...)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
        scaler = torch.amp.GradScaler(device.type)  # for float16; bfloat16 does not need it
        lr_scheduler = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=WARMUP_EPOCHS),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS - WARMUP_EPOCHS),
            ],
            milestones=[WARMUP_EPOCHS],
        )
        model_ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)

        losses: list[float] = []
        for epoch in range(EPOCHS):
            model.train()
            for image, target in data_loader:
                image, target = image.to(device), target.to(device)
                with torch.autocast(device.type, dtype=torch.bfloat16):
                    output = model(image)
                    loss = criterion(output, target)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                model_ema.update_parameters(model)
                if epoch < WARMUP_EPOCHS:
                    model_ema.n_averaged.fill_(0)  # copy the weights during warmup
                losses += [loss.item(), grad_norm(model)]
                if len(losses) // 2 == max_steps:
                    return model_ema.cpu(), losses
            lr_scheduler.step()
    return model_ema.cpu().eval(), losses


if __name__ == "__main__":
    main("torchvision", train, logit_adjusted, cross_entropy, SmoothedFormula, class_counts)
