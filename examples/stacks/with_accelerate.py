"""Hugging Face accelerate; ``mixed_precision="bf16"`` casts outputs, hence ``return_experts``."""

import torch
from _shared import accuracy, backbone, digits
from accelerate import Accelerator
from torch import nn

from ride_plugin import RIDELoss, RIDEWrapper  # RIDE


def main(epochs: int = 10) -> float:
    """Train and return the test accuracy in per cent."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    train, test, class_counts = digits()
    model = backbone()
    model = RIDEWrapper(model, num_experts=3, return_experts="training")  # RIDE
    criterion = nn.CrossEntropyLoss()
    criterion = RIDELoss(criterion, class_counts)  # RIDE
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    model, optimizer, train = accelerator.prepare(model, optimizer, train)
    for _ in range(epochs):
        model.train()
        for x, y in train:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
        criterion.step()  # RIDE
    return accuracy(model, test)


if __name__ == "__main__":
    print(f"{main():.1f} %")
