"""Hugging Face Trainer, image classification: `compute_loss_func=criterion`.

    python examples/loops/transformers_image.py                         # balanced error against cross entropy
    python examples/loops/transformers_image.py --bf16 --torch_compile  # two of the Trainer's own arguments
    python examples/loops/transformers_image.py --check                 # losses and gradients against the formula

The model is a small ViT made from its configuration. The Trainer accumulates two batches of 16 a step and tells the
criterion, as `num_items_in_batch`, how many labels they have together. The criterion divides the sum of its losses by
that number, so the losses of the two batches add up to the mean over 32, and so do the gradients. `--check` compares
losses and gradient norms, as the Trainer logs them, with those of the formula's mean over one batch of 32 (with
`--bf16`, where each batch's gradient is rounded, with the formula in two batches).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import datasets
from digits import N_CLASSES, Digits, Formula, main
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from fused_la import LogitAdjustedCrossEntropyLoss, count_classes

EPOCHS, BATCH = 30, 32


def train_dataset(digits: Digits) -> datasets.Dataset:
    features = datasets.Features(
        pixel_values=datasets.Array3D((1, 8, 8), "float32"), label=datasets.ClassLabel(num_classes=N_CLASSES)
    )
    columns = {"pixel_values": digits.train_images.numpy(), "label": digits.train_labels.numpy()}
    return datasets.Dataset.from_dict(columns, features=features).with_format("torch")


def class_counts(digits: Digits) -> Tensor:
    return count_classes(train_dataset(digits)["label"], N_CLASSES)  # from a column of the data set


# The lines that change: this, and `compute_loss_func` below.
def logit_adjusted(class_counts: Tensor) -> nn.Module:
    return LogitAdjustedCrossEntropyLoss(class_counts)


def train(
    criterion: Any, digits: Digits, seed: int, max_steps: int | None, bf16: bool = False, torch_compile: bool = False
) -> tuple[Callable[[Tensor], Tensor], list[float]]:
    set_seed(seed)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, id2label={digit: str(digit) for digit in range(N_CLASSES)},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    accumulation = 1 if isinstance(criterion, SumFormula) and not bf16 else 2
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder, num_train_epochs=EPOCHS, max_steps=max_steps or -1, seed=seed,
                per_device_train_batch_size=BATCH // accumulation, gradient_accumulation_steps=accumulation,
                learning_rate=2e-3, warmup_steps=0.1, weight_decay=0.05, bf16=bf16, torch_compile=torch_compile,
                logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
            ),
            train_dataset=train_dataset(digits),
            compute_loss_func=criterion,  # None is the model's own cross entropy
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)  # a line a step
        trainer.train()
    model.eval()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return lambda images: model(images).logits, [step[name] for step in steps for name in ("loss", "grad_norm")]


class SumFormula:
    """The formula as a sum over labels, divided by the number of those of the whole step."""

    def __init__(self, class_counts: Tensor):
        self.formula = Formula(class_counts, reduction="sum")

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return self.formula(outputs.logits, labels) / num_items_in_batch


if __name__ == "__main__":
    main(
        "Trainer, images", train, logit_adjusted, plain=lambda: None, formula=SumFormula, class_counts=class_counts,
        flags={"bf16": "the Trainer's mixed precision", "torch_compile": "the Trainer's compilation of the model"},
    )  # fmt: skip
