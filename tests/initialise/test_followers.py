"""Copies of weights that were drawn anew have the new values; other frozen tensors stay."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper
from ride_plugin._initialise import follow, followers_in


class Averaged(nn.Module):
    """A layer beside its moving average, which is another layer, frozen, or a buffer."""

    def __init__(self, kind: str, in_forward: bool = True) -> None:
        super().__init__()
        self.layer, self.in_forward = nn.Linear(16, 16), in_forward
        self.average = copy.deepcopy(self.layer).requires_grad_(False)
        if kind == "a buffer":
            for name, parameter in self.layer.named_parameters():
                del self.average._parameters[name]
                self.average.register_buffer(name, parameter.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.in_forward:
            with torch.no_grad():
                for name, parameter in self.layer.named_parameters():
                    getattr(self.average, name).lerp_(parameter, 0.01)
        return self.layer(x) + self.average(x)


def network(averaged: Averaged) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), averaged, nn.ReLU(), nn.Linear(16, 5))


@pytest.mark.parametrize("kind", ["a layer", "a buffer"])
def test_averages_start_as_the_weights_of_their_expert(kind: str) -> None:
    model = RIDEWrapper(network(Averaged(kind)), 3, fork_at="2")
    for part in ("weight", "bias"):
        averages = [getattr(expert[2].average, part) for expert in model.experts]
        weights = [getattr(expert[2].layer, part) for expert in model.experts]
        assert all(map(torch.equal, averages, weights))
        assert not torch.equal(averages[0], averages[1])
        assert not any(average.requires_grad for average in averages)


def test_an_average_that_all_experts_share_is_named() -> None:
    net = network(Averaged("a layer", in_forward=False))
    names = re.escape("['2.average.weight', '2.average.bias']")
    with pytest.warns(UserWarning, match=f"held the values of weights.*{names}") as caught:
        model = RIDEWrapper(net, 2, fork_at="2")
    assert [warning.filename for warning in caught] == [__file__]
    first, second = model.experts
    assert first[2].average.weight is second[2].average.weight
    assert torch.equal(first[2].average.weight, net[2].average.weight)


def test_the_old_values_of_a_pretrained_classifier_stay() -> None:
    class Distilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.late, self.fc = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)
            self.old = copy.deepcopy(self.fc).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.late(torch.relu(self.stem(x))))
            self.soft = self.old(x).detach()
            return self.fc(x)

    net = Distilled()
    model = RIDEWrapper(net, 2, init="copy", fork_at="late")
    for expert in model.experts:
        assert torch.equal(expert.old.weight, net.old.weight)
        assert not torch.equal(expert.fc.weight, net.old.weight)


def test_other_frozen_tensors_do_not_follow() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))
    net[2].requires_grad_(False)
    net.register_buffer("scale", torch.ones(6))
    assert followers_in(net) == {}
    with torch.no_grad():
        net[2].weight.copy_(net[0].weight)
        net[2].weight[5, 5] += 1
    assert followers_in(net) == {}


def test_of_equal_layers_each_follows_its_own() -> None:
    layer = nn.Linear(4, 4)
    net = nn.ModuleDict(
        {
            "query": nn.ModuleList([layer, copy.deepcopy(layer)]),
            "key": nn.ModuleList([copy.deepcopy(layer), copy.deepcopy(layer)]),
        }
    )
    net["key"].requires_grad_(False)
    followers = followers_in(net)
    with torch.no_grad():
        for parameter in net["query"].parameters():
            parameter.normal_()
    assert follow(net, followers, set()) == []
    for key, query in zip(net["key"].parameters(), net["query"].parameters(), strict=True):
        assert torch.equal(key, query)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_buffers_whose_entries_cannot_be_read_are_no_copies() -> None:
    layer = nn.Linear(4, 4)
    layer.register_buffer("table", torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8))
    layer.register_buffer("sparse", layer.weight.detach().to_sparse())
    assert followers_in(layer) == {}
