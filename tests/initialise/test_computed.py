"""What is kept of a weight that another is computed from follows what is drawn anew."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm

from ride_plugin import RIDEWrapper
from ride_plugin._initialise import settle_computed

SPECTRAL = {"parametrized": parametrizations.spectral_norm, "old": spectral_norm}


def network(first: nn.Module, last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), first, nn.ReLU(), last)


def settled(kind: str, layer: nn.Linear) -> nn.Module:
    layer = SPECTRAL[kind](layer)
    for _ in range(15):  # the old one converges in training
        layer(torch.randn(2, layer.in_features))
    return layer.eval()


@pytest.mark.parametrize("kind", SPECTRAL)
@pytest.mark.parametrize("init", ["fresh", "copy"])
def test_spectral_norms_are_one_from_the_start(kind: str, init: str) -> None:
    net = network(settled(kind, nn.Linear(32, 32)), settled(kind, nn.Linear(32, 5)))
    model = RIDEWrapper(net, 3, init=init, fork_at="2").eval()
    model(torch.randn(4, 8))
    for expert in model.experts:
        for name in ("2", "4"):
            weight = expert.get_submodule(name).weight.detach()
            assert 0.99 < float(torch.linalg.matrix_norm(weight, 2)) < 1.1
        assert not expert.training
        if init == "copy":
            kept, old = expert[2].state_dict(), net[2].state_dict()
            assert all(torch.equal(kept[key], old[key]) for key in old)


@pytest.mark.parametrize("kind", SPECTRAL)
def test_what_is_frozen_or_not_its_own_does_not_move(kind: str) -> None:
    layer = SPECTRAL[kind](nn.Linear(16, 16))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    source = next(p for name, p in layer.named_parameters() if name.endswith(("orig", "original")))
    assert settle_computed(layer, {id(p) for p in layer.parameters()}) == []
    source.requires_grad_(False)
    assert settle_computed(layer) == []
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


class Divided(nn.Module):
    """By the lengths that its rows had when it was registered."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("lengths", weight.detach().norm(dim=1, keepdim=True))

    def forward(self, weight: Tensor) -> Tensor:
        return weight / self.lengths


def test_buffers_that_stay_are_named() -> None:
    layer = nn.Linear(32, 32)
    parametrize.register_parametrization(layer, "weight", Divided(layer.weight))
    net = network(layer, nn.Linear(32, 5))
    message = re.escape("a parametrization, which stay as they are") + r".*\['2\.weight'\]"
    with pytest.warns(UserWarning, match=message) as caught:
        RIDEWrapper(net, 2, fork_at="2")
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RIDEWrapper(net, 2, fork_at="2", init="copy")


class Times(nn.Module):
    """By a mask or a factor that is no weight's."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_masks_and_fixed_factors_are_not_named(dtype: torch.dtype) -> None:
    mask = torch.ones(16, 16).tril().to(dtype)
    for factor in (mask, torch.tensor(3).to(dtype), torch.full((16, 1), 3).to(dtype)):
        layer = nn.Linear(16, 16)
        parametrize.register_parametrization(layer, "weight", Times(factor))
        assert settle_computed(layer) == []
    parametrize.register_parametrization(layer, "weight", Times(torch.rand(16, 1)))
    assert settle_computed(layer) == ["weight"]


class Same(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values.clone()


def test_a_computed_buffer_is_not_named() -> None:
    layer = nn.BatchNorm1d(16)
    parametrize.register_parametrization(layer, "running_mean", Same())
    assert settle_computed(layer) == []


def test_bases_of_orthogonal_weights_are_not_named() -> None:
    assert settle_computed(parametrizations.orthogonal(nn.Linear(16, 16))) == []
