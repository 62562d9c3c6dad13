"""Hugging Face Trainer, token classification: labels of -100 and the class dimension last.

    python examples/loops/transformers_tokens.py          # balanced error against cross entropy
    python examples/loops/transformers_tokens.py --check  # losses and gradients against the formula

A sentence is a row of 4 to 12 handwritten digits, a token is one digit's image, and its tag is the digit. Sentences of
a batch are padded to one length, with labels of -100. The model's logits are (B, L, C); PyTorch's losses and the
criterion take (B, C, L), which `transpose(1, 2)` makes without a copy.

`num_items_in_batch` is the number of labels that are not -100 in the two batches of 4 sentences that the Trainer
accumulates. The criterion divides the sum of its losses by it: a label of a batch of short sentences counts as much as
one of long sentences, which means over each batch would not give. `--check` compares losses and gradient norms, as the
Trainer logs them, with those of the formula's mean over one batch of 8 (with `--bf16`, where each batch's gradient is
rounded, with the formula in two batches).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import datasets
import torch
from digits import N_CLASSES, Digits, Formula, main
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    BertForTokenClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fused_la import LogitAdjustedCrossEntropyLoss, count_classes

EPOCHS, BATCH, PIXELS = 40, 8, 64


def train_dataset(digits: Digits) -> datasets.Dataset:
    """Sentences of 4 to 12 of the training digits, in random order."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(digits.train_labels), generator=generator)
    ends = torch.randint(4, 13, (len(order),), generator=generator).cumsum(0)
    sentences = order.tensor_split(ends[ends < len(order)])
    columns = {
        "inputs_embeds": [digits.train_images[sentence].flatten(1).numpy() for sentence in sentences],
        "labels": [digits.train_labels[sentence].numpy() for sentence in sentences],
    }
    return datasets.Dataset.from_dict(columns).with_format("torch")


def class_counts(digits: Digits) -> Tensor:
    return count_classes(train_dataset(digits)["labels"], N_CLASSES)  # of sentences of any lengths


def collate(sentences: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    def pad(tensors: list[Tensor], value: int) -> Tensor:
        return pad_sequence(tensors, batch_first=True, padding_value=value)

    return {
        "inputs_embeds": pad([sentence["inputs_embeds"] for sentence in sentences], 0),
        "attention_mask": pad([torch.ones_like(sentence["labels"]) for sentence in sentences], 0),
        "labels": pad([sentence["labels"] for sentence in sentences], -100),
    }


# The lines that change: this, and `compute_loss_func` below.
def logit_adjusted(class_counts: Tensor) -> nn.Module:
    return LogitAdjustedCrossEntropyLoss(class_counts)


def train(
    criterion: Any, digits: Digits, seed: int, max_steps: int | None, bf16: bool = False, torch_compile: bool = False
) -> tuple[Callable[[Tensor], Tensor], list[float]]:
    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return criterion(outputs.logits.transpose(1, 2), labels, num_items_in_batch=num_items_in_batch)

    set_seed(seed)
    config = BertConfig(
        vocab_size=1, hidden_size=PIXELS, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label={digit: str(digit) for digit in range(N_CLASSES)},
    )  # fmt: skip
    model = BertForTokenClassification(config)
    accumulation = 1 if isinstance(criterion, SumFormula) and not bf16 else 2
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder, num_train_epochs=EPOCHS, max_steps=max_steps or -1, seed=seed,
                per_device_train_batch_size=BATCH // accumulation, gradient_accumulation_steps=accumulation,
                learning_rate=2e-3, warmup_steps=0.1, weight_decay=0.01, bf16=bf16, torch_compile=torch_compile,
                logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
            ),
            data_collator=collate,
            train_dataset=train_dataset(digits),
            compute_loss_func=compute_loss if criterion else None,  # None is the model's own cross entropy
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)  # a line a step
        trainer.train()
    model.eval()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return lambda images: tag(model, images), [step[name] for step in steps for name in ("loss", "grad_norm")]


def tag(model: BertForTokenClassification, images: Tensor) -> Tensor:
    """Logits of the test images, in sentences of ten drawn at random."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return model(inputs_embeds=images[order].view(-1, 10, PIXELS)).logits.flatten(0, 1)[order.argsort()]


class SumFormula:
    """The formula as a sum over labels, divided by the number of those of the whole step."""

    def __init__(self, class_counts: Tensor):
        self.formula = Formula(class_counts, reduction="sum")

    def __call__(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return self.formula(logits.transpose(1, 2).flatten(0, 1), labels.flatten()) / num_items_in_batch


if __name__ == "__main__":
    main(
        "Trainer, tokens", train, logit_adjusted, plain=lambda: None, formula=SumFormula, class_counts=class_counts,
        flags={"bf16": "the Trainer's mixed precision", "torch_compile": "the Trainer's compilation of the model"},
    )  # fmt: skip
