"""timm's training loop: mixup, smoothing, a moving average, mixed precision, gradient accumulation.

    python examples/loops/timm_loop.py          # balanced error against cross entropy
    python examples/loops/timm_loop.py --check  # losses against the formula, with both kinds of target

`train` has the parts of timm's `train.py` in its order and by its names, as this command runs them:

    python train.py DIR --mixup 0.2 --smoothing 0.1 --model-ema --amp --amp-dtype bfloat16 --grad-accum-steps 2 \\
        --no-prefetcher

timm's mixup turns labels into (N, C) probabilities, which the loss takes as its target. With `keep_labels` the target
is a pair, the two labels of each row and their weights: the same loss without an (N, C) target.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import functools
import sys
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from digits import N_CLASSES, Digits, Formula, grad_norm, main, network, save_images
from timm import utils
from timm.data import Mixup, create_dataset, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from torch import Tensor, nn

from fused_la import LogitAdjustedCrossEntropyLoss, count_classes

EPOCHS, BATCH, ACCUM_STEPS, SMOOTHING = 50, 32, 2, 0.1


def train_dataset(digits: Digits, folder: str) -> Any:
    save_images(digits, folder)
    return create_dataset("", root=folder, split="train", is_training=True, input_img_mode="L")


def class_counts(digits: Digits) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        dataset_train = train_dataset(digits, folder)
        return count_classes([label for _, label in dataset_train.reader.samples], N_CLASSES)


# The line that changes, from `train_loss_fn = SoftTargetCrossEntropy()`, which train.py has for mixup, to this. The
# loss smooths toward the prior. timm's mixup smooths toward the uniform distribution, with which the minimiser of the
# adjusted loss favours rare classes, so it gets `--smoothing 0`.
def logit_adjusted(class_counts: Tensor) -> nn.Module:
    return LogitAdjustedCrossEntropyLoss(class_counts, label_smoothing=SMOOTHING, smoothing_distribution="prior")


def train(
    train_loss_fn: nn.Module, digits: Digits, seed: int, max_steps: int | None, keep_labels: bool = False
) -> tuple[nn.Module, list[float]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    utils.random_seed(seed)
    model = network().to(device)  # or timm.create_model(...)
    amp_autocast = functools.partial(torch.autocast, device_type=device.type, dtype=torch.bfloat16)
    loss_scaler = utils.NativeScaler(device=device.type)  # for float16; bfloat16 does not need it

    with tempfile.TemporaryDirectory() as folder:
        loader_train = create_loader(
            train_dataset(digits, folder), input_size=(1, 8, 8), batch_size=BATCH, is_training=True, no_aug=True,
            mean=(0.0,), std=(1.0,), num_workers=0, persistent_workers=False, device=device, use_prefetcher=False,
        )  # fmt: skip
        mixup_fn = (LabelMixup if keep_labels else Mixup)(
            mixup_alpha=0.2, num_classes=N_CLASSES,
            label_smoothing=SMOOTHING if isinstance(train_loss_fn, SoftTargetCrossEntropy) else 0.0,
        )  # fmt: skip
        task = ClassificationTask(model=model, criterion=train_loss_fn, device=device)
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.01)
        model_ema = task.setup_ema(decay=0.95)
        lr_scheduler, num_epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS)

        losses: list[float] = []
        for epoch in range(num_epochs):
            model.train()
            accum_steps, last_accum_steps = ACCUM_STEPS, len(loader_train) % ACCUM_STEPS
            for batch_idx, (input, target) in enumerate(loader_train):
                need_update = batch_idx == len(loader_train) - 1 or (batch_idx + 1) % ACCUM_STEPS == 0
                if batch_idx >= len(loader_train) - last_accum_steps:
                    accum_steps = last_accum_steps
                input, target = mixup_fn(input.to(device), target.to(device))
                with amp_autocast():
                    loss = task(input, target)["loss"]
                loss /= accum_steps
                loss_scaler(loss, optimizer, need_update=need_update)
                losses += [loss.item() * accum_steps, grad_norm(model)]
                if need_update:
                    optimizer.zero_grad()
                    task.update_ema()
                if len(losses) // 2 == max_steps:
                    return model_ema.cpu(), losses
            if lr_scheduler is not None:
                lr_scheduler.step(epoch + 1)
    return model_ema.cpu(), losses


class LabelMixup(Mixup):
    """timm's mixup with labels kept: a pair of (N, 2) labels and weights in the place of (N, C) probabilities."""

    def __call__(self, x: Tensor, target: Tensor) -> Any:
        mix = {"batch": self._mix_batch, "pair": self._mix_pair, "elem": self._mix_elem}[self.mode]
        lam = torch.as_tensor(mix(x), dtype=x.dtype, device=x.device).expand(len(x), 1)
        return x, (torch.stack([target, target.flip(0)], 1), torch.cat([lam, 1 - lam], 1))


class SmoothedFormula(Formula):
    """The adjusted loss with smoothing toward the prior, by hand, for either kind of target."""

    def forward(self, logits: Tensor, target: Any) -> Tensor:
        z = logits.float() + self.log_prior
        if isinstance(target, Tensor):
            loss = F.cross_entropy(z, target)
        else:
            labels, lam = target[0], target[1][0, 0]  # lam is the same in all rows of the batch
            loss = lam * F.cross_entropy(z, labels[:, 0]) + (1 - lam) * F.cross_entropy(z, labels[:, 1])
        return (1 - SMOOTHING) * loss + SMOOTHING * F.cross_entropy(z, self.log_prior.exp().expand_as(z))


if __name__ == "__main__":
    criteria: Any = dict(adjusted=logit_adjusted, plain=SoftTargetCrossEntropy, formula=SmoothedFormula)
    main("timm", train, class_counts=class_counts, **criteria)
    if "--check" in sys.argv:
        train_with_labels = functools.partial(train, keep_labels=True)
        main("timm, labels kept", train_with_labels, class_counts=class_counts, **criteria)
