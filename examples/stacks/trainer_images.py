"""Hugging Face's Trainer with an image classifier: saved and resumed, every row predicted."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from _shared import NUM_CLASSES, digits
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from ride_plugin import RIDELoss, RIDEModule, RIDEWrapper  # RIDE


class Images(Dataset):
    """Rows as the Trainer expects them, with a column that no model asks for."""

    def __init__(self, images: Dataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        image, label = self.images[index]
        return {"pixel_values": image, "labels": int(label), "index": index}


def build() -> nn.Module:
    """A small vision transformer with random weights."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=NUM_CLASSES,
        initializer_range=0.15,  # the library's 0.02 suits a width of 768
    )
    return ViTForImageClassification(config)


def trainer(folder: Path, epochs: float, **options: object) -> Trainer:
    """A Trainer over the handwritten digits."""
    train, test, class_counts = digits()
    model = build()
    model = RIDEWrapper(model, num_experts=3, logits="logits")  # RIDE
    model = RIDEModule(model, RIDELoss(nn.CrossEntropyLoss(), class_counts))  # RIDE
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        save_strategy="epoch",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=Images(train.dataset),
        eval_dataset=Images(test.dataset),
        compute_metrics=lambda p: {
            "accuracy": float(np.mean(p.predictions.argmax(1) == p.label_ids))
        },
    )


def main(epochs: int = 15) -> float:
    """Train, and return the test accuracy in per cent."""
    with tempfile.TemporaryDirectory() as folder:
        one = trainer(Path(folder), epochs)
        one.train()
        return 100 * one.evaluate()["eval_accuracy"]


if __name__ == "__main__":
    print(f"{main():.1f} %")
