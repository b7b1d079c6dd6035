"""The pieces of timm's training script: mixup, layer decay, averaged weights, checkpointing."""

import timm
import torch
from _shared import NUM_CLASSES, accuracy, digits
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

from ride_plugin import RIDELoss, RIDEWrapper  # RIDE


def main(epochs: int = 10) -> float:
    """Train, and return the test accuracy of the averaged weights in per cent."""
    train, test, class_counts = digits()
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", in_chans=1, num_classes=NUM_CLASSES)
    model = RIDEWrapper(model, num_experts=3)  # RIDE
    model.set_grad_checkpointing()
    optimizer = create_optimizer_v2(model, "adamw", 2e-3, weight_decay=0.05, layer_decay=0.9)
    average = ModelEmaV3(model, decay=0.9)
    mixup = Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=NUM_CLASSES)
    criterion = SoftTargetCrossEntropy()
    criterion = RIDELoss(criterion, class_counts)  # RIDE
    for _ in range(epochs):
        model.train()
        for x, y in train:
            even = len(x) // 2 * 2  # mixup pairs the samples of a batch
            x, soft = mixup(x[:even], y[:even])
            optimizer.zero_grad()
            loss = criterion(model(x), soft)
            loss.backward()
            optimizer.step()
            average.update(model)
    return accuracy(average.module, test)


if __name__ == "__main__":
    print(f"{main():.1f} %")
