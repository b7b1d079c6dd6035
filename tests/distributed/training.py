"""One model, one data stream and one training loop for every engine, alone and over ranks.

Each rank reads its half of every batch, so that an engine that averages gradients over the ranks
must end where one process with the whole batch ends. Float64 keeps rounding far below the
tolerance.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ride_plugin import DiversityLoss, RIDEWrapper, experts_loss

CLASSES = 7
COUNTS = [60, 30, 20, 12, 8, 5, 3]
STEPS = 2


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.hidden = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(nn.functional.gelu(self.hidden(self.norm(x))))


class Network(nn.Module):
    """Blocks with a residual stream, as most models that people shard have; no BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(20, 16)
        self.blocks = nn.Sequential(*[Block(16) for _ in range(4)])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x))))


@functools.cache
def _built() -> RIDEWrapper:
    torch.manual_seed(0)
    return RIDEWrapper(Network(), 3, fork_at="blocks.2")


def build(dtype: torch.dtype = torch.float64, **options: bool) -> RIDEWrapper:
    model = copy.deepcopy(_built()).to(dtype)
    for name, value in options.items():
        setattr(model, name, value)
    return model


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The whole batch of a step: the first half is rank 0's."""
    source = torch.Generator().manual_seed(step)
    x = torch.randn(8, 20, generator=source, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, CLASSES, (8,), generator=source)


def my_half(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x, y = batch(step, dtype)
    rank = dist.get_rank()
    return x.chunk(2)[rank], y.chunk(2)[rank]


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    diversity = DiversityLoss(COUNTS)
    return experts_loss(nn.functional.cross_entropy, out, y) + diversity(out, y)


def train(
    model: nn.Module,
    data: Callable[[int], tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer | None = None,
    steps: range = range(STEPS),
) -> torch.optim.Optimizer:
    optimizer = optimizer or optimizer_for(model)
    model.train()
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, *data(step)).backward()
        optimizer.step()
    return optimizer


@functools.cache
def trained_alone(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The state after training on whole batches in one process."""
    model = build(dtype)
    train(model, lambda step: batch(step, dtype))
    return model.state_dict()


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    """A state dict with every sharded tensor put together."""
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in state.items()
    }


def assert_equal_to_alone(
    state: dict[str, Any], *, tolerance: float = 1e-8, dtype: torch.dtype = torch.float64
) -> None:
    """Same names, same values as one process reached, and every tensor moved from the start."""
    got, expected, start = whole(state), trained_alone(dtype), build(dtype).state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert not torch.equal(tensor, start[name]), f"{name} did not train"
        off = (got[name].to(dtype) - tensor).abs().max().item()
        assert off <= tolerance, f"{name} differs by {off}"
