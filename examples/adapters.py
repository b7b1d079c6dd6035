"""Experts for the price of adapters: a frozen pretrained network, its trunk computed once.

A small network is trained on the five most frequent digits and frozen, as pretrained ones are. Low-
rank adapters in its late layers and a new classifier learn all ten digits from a long tail. Frozen
means shared: three experts hold one copy of the pretrained weights, and an adapter and a classifier
each. The trunk is frozen too, so it runs once for all images, and every epoch starts from its
stored result. With peft, ``add_adapters`` is ``get_peft_model(network, LoraConfig(...))``.
Lines that use RIDE end in ``# RIDE``. See docs/how-to/pretrained.md.
"""

import argparse

import torch
from _data import Digits
from _models import SmallResNet
from _recipes import compare, parse, test
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ride_plugin import RIDEWrapper, experts_loss
from ride_plugin.longtail import BalancedSoftmaxLoss, ShotReport


class LowRankConv(nn.Module):
    """A frozen convolution and a low-rank one beside it, which starts as zero."""

    def __init__(self, base: nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Conv2d(base.in_channels, rank, 3, base.stride[0], padding=1, bias=False)
        self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def all_of(digits: Digits) -> tuple[Tensor, ...]:
    return next(iter(DataLoader(digits.train, batch_size=len(digits.train))))


def pretrain(digits: Digits, epochs: int) -> SmallResNet:
    """A network that knows the digits 0 to 4, frozen, in evaluation mode."""
    network = SmallResNet()
    images, labels = all_of(digits)
    images, labels = images[labels < 5], labels[labels < 5]
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(64):
            loss = nn.functional.cross_entropy(network(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval().requires_grad_(False)


def add_adapters(network: SmallResNet, rank: int) -> SmallResNet:
    """Adapters in the last stage, and a new classifier; nothing else trains."""
    stage = network.layer3
    stage.conv1 = LowRankConv(stage.conv1, rank)  # type: ignore[assignment]
    stage.conv2 = LowRankConv(stage.conv2, rank)  # type: ignore[assignment]
    network.linear = nn.Linear(64, 10)
    return network


def train(model: RIDEWrapper, digits: Digits, epochs: int) -> RIDEWrapper:
    images, labels = all_of(digits)
    with model.evaluating():
        state = model.run_trunk(images)  # RIDE: once, for all images
    criterion = BalancedSoftmaxLoss(digits.train.class_counts)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, 5e-3)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(64):
            out = model(state.select(rows))  # RIDE: what model(images[rows]) would give
            loss = experts_loss(criterion, out, labels[rows])  # RIDE
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def run(digits: Digits, arguments: argparse.Namespace) -> dict[str, ShotReport]:
    results = {}
    pretrained = pretrain(digits, arguments.epochs).state_dict()
    for name, num_experts, rank in (
        ("one adapter of rank 6", 1, 6),
        ("three experts, adapters of rank 2", 3, 2),
    ):
        network = SmallResNet().eval().requires_grad_(False)
        network.load_state_dict(pretrained)
        adapted = add_adapters(network, rank)
        model = RIDEWrapper(adapted, num_experts, fork_at="layer3", init="copy")  # RIDE
        results[name] = test(train(model, digits, arguments.epochs), digits)
    return results


if __name__ == "__main__":
    compare(run, parse(__doc__))
