"""Traces of training are warned of, and what constructors draw or set is none."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from ride_plugin import RIDEWrapper
from ride_plugin._initialise import warn_if_trained

from ..backbones import CifarResNet


def test_fresh_weights_for_a_trained_backbone_warn() -> None:
    backbone = CifarResNet(n=1)
    for _ in range(9):
        backbone(torch.randn(4, 3, 32, 32))
    with pytest.warns(UserWarning, match="looks trained.*has seen 9 batches"):
        RIDEWrapper(backbone, 2)


def test_a_batch_in_the_constructor_is_no_training() -> None:
    """Many networks run one, to find the size of their features."""
    backbone = CifarResNet(n=1)
    backbone(torch.randn(1, 3, 32, 32))
    RIDEWrapper(backbone, 2)  # warnings are errors


class RMSNorm(nn.Module):
    """As language models have it: gains, and nothing else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight / x.square().mean(-1, keepdim=True).sqrt()


def normalised(norm: nn.Module | None) -> nn.Sequential:
    inner = [] if norm is None else [norm]
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), *inner, nn.Linear(16, 5))


@pytest.mark.parametrize(
    ("norm", "trained", "trace"),
    [
        (nn.BatchNorm1d(16), lambda n: n[3].running_mean.normal_(), "`3` holds running statistics"),
        (nn.BatchNorm1d(16), lambda n: n[3].running_var.uniform_(), "`3` holds running statistics"),
        (
            nn.LayerNorm(16),
            lambda n: [p.normal_() for p in n[3].parameters()],
            "`3` has gains that differ",
        ),
        (RMSNorm(16), lambda n: n[3].weight.normal_(), "`3` has gains that differ"),
        (None, lambda n: n[2].bias.normal_(std=2), "`2` has biases larger than any"),
    ],
)
def test_every_trace_of_training_is_warned_of(norm, trained, trace: str) -> None:
    net = normalised(norm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RIDEWrapper(net, 2, fork_at="2")
        with torch.no_grad():
            trained(net)
        RIDEWrapper(net, 2, fork_at="2", init="copy")
        RIDEWrapper(net, 1, fork_at="2")  # nothing is drawn anew
    with pytest.warns(UserWarning, match=f"looks trained .{trace}.*init='copy'") as caught:
        RIDEWrapper(net, 2, fork_at="2", expert_width=0.5 if norm is None else 1.0)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "initialise",
    [
        lambda net: nn.init.normal_(net[3].weight, 1, 0.02),  # as DCGAN draws gains
        lambda net: [nn.init.normal_(p, 0.1, 0.1) for p in net[3].parameters()],  # as RepVGG does
        lambda net: nn.init.normal_(net[2].bias, std=1e-6),  # as vision transformers do
        lambda net: nn.init.constant_(net[4].bias, -4.6),  # the prior of the focal loss
    ],
)
def test_what_initialisations_draw_is_no_trace_of_training(initialise) -> None:
    net = normalised(nn.BatchNorm1d(16))
    initialise(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RIDEWrapper(net, 2, fork_at="2")


def test_traces_in_the_trunk_are_none_of_the_experts() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Linear(16, 5))
    net(torch.randn(4, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RIDEWrapper(net, 2, fork_at="2")


def lstm_cell(shift: float, spread: float) -> nn.Linear:
    gates = nn.Linear(64, 4 * 32)
    nn.init.uniform_(gates.bias, -spread, spread)
    with torch.no_grad():
        gates.bias[32:64] += shift
    return gates


def offsets_of_points(heads: int, points: int) -> nn.Linear:
    """As deformable attention has it: offsets in all directions, whatever the input."""
    angle = torch.arange(heads) * (2 * math.pi / heads)
    grid = (
        torch.stack([angle.cos(), angle.sin()], 1)[:, None] * torch.arange(1.0, points + 1)[:, None]
    )
    layer = nn.Linear(64, grid.numel())
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.bias.copy_(grid.flatten())
    return layer


def with_bias(bias: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(64, len(bias))
    with torch.no_grad():
        layer.bias.copy_(bias)
    return layer


UNTRAINED = {
    "a cell's forget gate": lambda: lstm_cell(1.0, 0.0),
    "a cell's forget gate, drawn": lambda: lstm_cell(1.0, 0.05),
    "a bilinear layer": lambda: nn.Bilinear(32, 32, 16),
    "offsets": lambda: offsets_of_points(4, 3),
    "logarithms of frequencies": lambda: with_bias(torch.rand(20).softmax(0).log()),
    "a rare class": lambda: with_bias(torch.tensor([0.0, -4.6])),
    "steps of a state-space model": lambda: with_bias(torch.rand(64) * 5 - 7),
    "bins": lambda: with_bias(torch.linspace(-3, 3, 16)),
}


@pytest.mark.parametrize("kind", UNTRAINED)
def test_biases_that_a_constructor_set_are_no_trace_of_training(kind: str) -> None:
    warn_if_trained(UNTRAINED[kind]())  # warnings are errors
