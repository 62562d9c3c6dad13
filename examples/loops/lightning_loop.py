"""Lightning: the criterion as a child of the LightningModule, two processes, a checkpoint and training resumed from it.

    python examples/loops/lightning_loop.py          # balanced error against cross entropy
    python examples/loops/lightning_loop.py --check  # losses against the formula

Lightning starts the second process itself, by this command. DDP averages the gradients of the two losses, each a mean
over its process's batch. That is the gradient of the mean over both, because Lightning's sampler gives both processes
equally many images; with ignored labels or class weights it would not be (accelerate_loop.py says what is). The prior
counts the images of the whole data set, not those of one process.
"""

from __future__ import annotations

import logging
import tempfile

import lightning as L
import torch
from digits import N_CLASSES, Digits, main, network
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fused_la import LogitAdjustedCrossEntropyLoss, count_classes

EPOCHS, BATCH = 30, 16  # images of a step and process
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.WARNING)


# The line that changes, in the place of `nn.CrossEntropyLoss()`.
def logit_adjusted(class_counts: Tensor) -> nn.Module:
    return LogitAdjustedCrossEntropyLoss(class_counts)


class DigitClassifier(L.LightningModule):
    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.network = network()
        self.criterion = criterion
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = self.criterion(self.network(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def train_loader(digits: Digits) -> DataLoader:
    return DataLoader(TensorDataset(digits.train_images, digits.train_labels), batch_size=BATCH, shuffle=True)


def class_counts(digits: Digits) -> Tensor:
    # From a DataLoader, one that drops no batch.
    return count_classes(torch.cat([labels for _, labels in train_loader(digits)]), N_CLASSES)


def train(criterion: nn.Module, digits: Digits, seed: int, max_steps: int | None) -> tuple[nn.Module, list[float]]:
    epochs = 2 if max_steps else EPOCHS
    L.seed_everything(seed, verbose=False)
    loader = train_loader(digits)
    with tempfile.TemporaryDirectory() as folder:

        def trainer(max_epochs: int, checkpoint: ModelCheckpoint) -> L.Trainer:
            return L.Trainer(
                accelerator="cpu", devices=2, strategy="ddp", max_epochs=max_epochs, callbacks=checkpoint,
                limit_train_batches=max_steps // 2 if max_steps else None,
                logger=False, enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip

        first, checkpoint = DigitClassifier(criterion), ModelCheckpoint(folder)
        trainer(epochs // 2, checkpoint).fit(first, loader)
        path = checkpoint.best_model_path

        # Strict loading, in both directions: the criterion neither leaves a key in a checkpoint nor asks for one.
        with_cross_entropy = DigitClassifier.load_from_checkpoint(path, criterion=nn.CrossEntropyLoss())
        resumed = DigitClassifier(criterion)
        resumed.load_state_dict(with_cross_entropy.state_dict())

        trainer(epochs, ModelCheckpoint(folder)).fit(resumed, loader, ckpt_path=path)
    return resumed.network, first.losses + resumed.losses


if __name__ == "__main__":
    main("Lightning", train, logit_adjusted, class_counts=class_counts)
