"""Hugging Face's Trainer with a text classifier: padded sentences and their attention masks."""

import random
import tempfile

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from ride_plugin import RIDELoss, RIDEModule, RIDEWrapper  # RIDE

CLASS_COUNTS = [200, 80, 30, 12]  # how many sentences each class has


def sentences(counts: list[int], seed: int) -> list[dict]:
    """Sentences of words 10 to 49; each class prefers ten of them. Word 0 is padding."""
    source = random.Random(seed)
    rows = []
    for label, count in enumerate(counts):
        for _ in range(count):
            words = [
                source.randrange(10 + 10 * label, 20 + 10 * label)
                if source.random() < 0.5
                else source.randrange(10, 50)
                for _ in range(source.randrange(6, 13))
            ]
            padding = 12 - len(words)
            rows.append(
                {
                    "input_ids": [*words, *[0] * padding],
                    "attention_mask": [*[1] * len(words), *[0] * padding],
                    "labels": label,
                }
            )
    return rows


def main(epochs: int = 15) -> float:
    """Train, and return the test accuracy in per cent."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=len(CLASS_COUNTS),
        initializer_range=0.15,  # the library's 0.02 suits a width of 768
    )
    model = BertForSequenceClassification(config)
    x = {"input_ids": torch.ones(2, 12, dtype=torch.long)}
    model = RIDEWrapper(model, num_experts=3, example_input=x, logits="logits")  # RIDE
    model = RIDEModule(model, RIDELoss(nn.CrossEntropyLoss(), CLASS_COUNTS))  # RIDE
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=sentences(CLASS_COUNTS, seed=0),
            eval_dataset=sentences([50] * 4, seed=1),
            compute_metrics=lambda p: {
                "accuracy": float(np.mean(p.predictions.argmax(1) == p.label_ids))
            },
        )
        trainer.train()
        return 100 * trainer.evaluate()["eval_accuracy"]


if __name__ == "__main__":
    print(f"{main():.1f} %")
