"""Biases that somebody set keep their places; those that were drawn or trained do not stay."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper
from ride_plugin._initialise import set_biases

COUNTS = torch.tensor([50.0, 200, 10, 100, 5, 300])
PRIORS = {
    "logarithms of frequencies": (COUNTS / COUNTS.sum()).log(),
    "logarithms of counts": COUNTS.log(),
    "tempered": 0.5 * (COUNTS / COUNTS.sum()).log(),
    "of sigmoids": torch.logit(COUNTS / COUNTS.sum()),
}


def drawn_alike(std: float) -> nn.Sequential:
    """Weights and biases of one draw, whose biases are larger than torch's default."""
    net = network(torch.zeros(6))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=std)
    return net


def network(bias: Tensor) -> nn.Sequential:
    net = nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, len(bias))
    )
    with torch.no_grad():
        net[4].bias.copy_(bias)
    return net


@pytest.mark.parametrize("init", ["fresh", "copy"])
@pytest.mark.parametrize("kind", PRIORS)
def test_a_prior_stays_in_every_classifier_and_is_named(kind: str, init: str) -> None:
    net = network(PRIORS[kind])
    with pytest.warns(UserWarning, match=re.escape("['4.bias']")) as caught:
        model = RIDEWrapper(net, 2, init=init, fork_at="2")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    for head in model.classifiers:
        assert torch.equal(head.bias, net[4].bias)
        assert not torch.equal(head.weight, net[4].weight)


def test_a_prior_stays_in_narrow_experts() -> None:
    net = network(PRIORS["logarithms of frequencies"])
    with pytest.warns(UserWarning, match=re.escape("['4.bias']")):
        model = RIDEWrapper(net, 2, expert_width=0.5, fork_at="2")
    assert all(torch.equal(head.bias, net[4].bias) for head in model.classifiers)


CENTRED = PRIORS["logarithms of frequencies"] - PRIORS["logarithms of frequencies"].mean()


@pytest.mark.parametrize("size", [1.0, 0.2])
def test_a_centred_prior_stays_unless_it_may_come_from_training(size: float) -> None:
    net = network(size * CENTRED)
    assert list(set_biases(net, "4", 6, may_be_trained=False)) == ["4.bias"]
    assert set_biases(net, "4", 6, may_be_trained=True) == {}


NONE_SET: dict[str, Callable[[], nn.Module]] = {
    "drawn": lambda: network(torch.empty(6).uniform_(-0.17, 0.17)),
    "drawn as the weights are": lambda: drawn_alike(0.5),
    "constant": lambda: network(torch.full((6,), -4.6)),
    "frozen": lambda: network(PRIORS["tempered"]).requires_grad_(False),
    "no bias": lambda: nn.Sequential(nn.Linear(8, 6, bias=False)),
}


@pytest.mark.parametrize("may_be_trained", [False, True])
@pytest.mark.parametrize("kind", NONE_SET)
def test_what_nobody_set_does_not_stay(kind: str, may_be_trained: bool) -> None:
    assert set_biases(NONE_SET[kind](), "4", 6, may_be_trained) == {}


def test_only_biases_of_the_classes_are_priors() -> None:
    steps = torch.rand(6) * 5 - 7  # of a state-space model, drawn
    layer = network(steps)[4]
    assert list(set_biases(layer, "", 6, may_be_trained=True)) == ["bias"]
    for net in (nn.Sequential(layer, nn.Linear(6, 6)), nn.Sequential(layer, nn.Linear(6, 5))):
        assert set_biases(net, "1", len(net[1].bias), may_be_trained=False) == {}
        assert set_biases(net, None, len(net[1].bias), may_be_trained=False) == {}
    inside = nn.Sequential(layer, nn.Linear(6, 5))
    assert set_biases(inside, "", 5, may_be_trained=False) == {}
    nn.init.zeros_(layer.weight)  # what it computes is its bias
    assert list(set_biases(inside, "1", 5, may_be_trained=False)) == ["0.bias"]
    assert set_biases(inside, "1", 5, may_be_trained=True) == {}


def test_default_networks_have_none() -> None:
    net = network(torch.zeros(6))
    net[4].reset_parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RIDEWrapper(net, 2, fork_at="2")
