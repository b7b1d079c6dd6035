"""torchmetrics reads the model's output as it is: the mean of the experts' logits."""

import torch
from _shared import NUM_CLASSES, backbone, digits
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from ride_plugin import RIDELoss, RIDEWrapper  # RIDE


def main(epochs: int = 10) -> float:
    """Train, measuring while training and on the test set; return the accuracy in per cent."""
    train, test, class_counts = digits()
    model = backbone()
    model = RIDEWrapper(model, num_experts=3)  # RIDE
    criterion = nn.CrossEntropyLoss()
    criterion = RIDELoss(criterion, class_counts)  # RIDE
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    running = MulticlassAccuracy(NUM_CLASSES, average="micro")
    measured = MetricCollection(
        {
            "accuracy": MulticlassAccuracy(NUM_CLASSES, average="micro"),
            "calibration": MulticlassCalibrationError(NUM_CLASSES),
        }
    )
    for _ in range(epochs):
        model.train()
        for x, y in train:
            optimizer.zero_grad()
            out = model(x)
            loss = criterion(out, y)
            loss.backward()
            optimizer.step()
            running.update(out, y)
    model.eval()
    with torch.no_grad():
        for x, y in test:
            measured.update(model(x), y)
    return 100 * measured.compute()["accuracy"].item()


if __name__ == "__main__":
    print(f"{main():.1f} %")
