"""A training loop as everybody writes it. Lines that differ from a plain backbone's end in RIDE."""

import torch
from _shared import accuracy, backbone, digits
from torch import nn

from ride_plugin import RIDELoss, RIDEWrapper  # RIDE


def main(epochs: int = 10) -> float:
    """Train and return the test accuracy in per cent."""
    train, test, class_counts = digits()
    model = backbone()
    model = RIDEWrapper(model, num_experts=3)  # RIDE
    criterion = nn.CrossEntropyLoss()
    criterion = RIDELoss(criterion, class_counts)  # RIDE
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        model.train()
        for x, y in train:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
        criterion.step()  # RIDE
    return accuracy(model, test)


if __name__ == "__main__":
    print(f"{main():.1f} %")
