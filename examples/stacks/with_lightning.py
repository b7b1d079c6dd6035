"""Lightning: the module that one has, with the network and its loss replaced."""

import lightning
import torch
from _shared import accuracy, backbone, digits
from torch import Tensor, nn

from ride_plugin import RIDELoss, RIDEWrapper  # RIDE


class Classifier(lightning.LightningModule):
    """An ordinary classifier."""

    def __init__(self, class_counts: list[int]) -> None:
        super().__init__()
        self.model = backbone()
        self.model = RIDEWrapper(self.model, num_experts=3)  # RIDE
        self.criterion = nn.CrossEntropyLoss()
        self.criterion = RIDELoss(self.criterion, class_counts)  # RIDE

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return self.criterion(self(x), y)

    def on_train_epoch_end(self) -> None:
        self.criterion.step()  # RIDE

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)


def main(epochs: int = 10) -> float:
    """Train and return the test accuracy in per cent."""
    train, test, class_counts = digits()
    classifier = Classifier(class_counts)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, train)
    return accuracy(classifier, test)


if __name__ == "__main__":
    print(f"{main():.1f} %")
