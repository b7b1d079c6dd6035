"""Ways to train little beside frozen weights, made by hand as people and libraries make them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """A frozen linear layer and a low-rank one beside it, whose second matrix starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Block(nn.Module):
    """A residual block with BatchNorm; ``adapter`` runs behind it if there is one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.adapter: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.adapter(torch.relu(self.norm(self.linear(x))))


class Network(nn.Module):
    """Two blocks for the trunk, two for the experts, and a classifier."""

    def __init__(self, width: int = 12, num_classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(4)))
        self.prompt = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)) + self.prompt)


def pretrained() -> Network:
    """Weights and statistics as a training leaves them, all frozen, in evaluation mode."""
    network = Network()
    for _ in range(3):
        network(torch.randn(16, 8) * 2 + 1)
    with torch.no_grad():
        for block in network.blocks:
            block.norm.weight.normal_(1, 0.1)
    return network.eval().requires_grad_(False)


def low_rank() -> Network:
    network = pretrained()
    for block in network.blocks[2:]:
        block.linear = LowRank(block.linear)
    network.head.requires_grad_(True)
    return network


def adapter_modules() -> Network:
    network = pretrained()
    for block in network.blocks[2:]:
        block.adapter = nn.Sequential(nn.Linear(12, 3), nn.ReLU(), nn.Linear(3, 12))
        nn.init.zeros_(block.adapter[2].weight)
        nn.init.zeros_(block.adapter[2].bias)
    network.head.requires_grad_(True)
    return network


def prompt() -> Network:
    network = pretrained()
    network.prompt.requires_grad_(True)
    nn.init.normal_(network.prompt)
    network.head.requires_grad_(True)
    return network


def biases() -> Network:
    network = pretrained()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in ("blocks.2.linear.bias", "blocks.3.linear.bias"))
    network.head.requires_grad_(True)
    return network


def new_head() -> Network:
    network = pretrained()
    network.head = nn.Linear(12, 7)
    return network


KINDS = {f.__name__: f for f in (low_rank, adapter_modules, prompt, biases, new_head)}
