"""Groups of parameters that code for the plain backbone makes, for a wrapped model."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ArgumentError, RIDEWrapper

Halves = namedtuple("Halves", ["weights", "biases"])


class Blocks(nn.Module):
    """As a transformer is built: blocks with numbers, which layer-wise learning rates read."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(8))
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 5)
        if tied:
            self.blocks[3].weight = self.blocks[2].weight

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(self.norm(x))


def layer_of(name: str) -> int:
    """As layer-wise learning rates are usually written; what it does not know is the last layer."""
    if name == "pos_embed":
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 5


def by_layer(network: nn.Module) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        layer, decay = layer_of(name), parameter.ndim > 1
        key = f"layer_{layer}_{'decay' if decay else 'no_decay'}"
        default = {"params": [], "lr": 0.75 ** (5 - layer), "weight_decay": 0.05 * decay}
        groups.setdefault(key, default)["params"].append(parameter)
    return list(groups.values())


def own_name(name: str) -> str:
    """The name without the part that it is in: an independent way to the same groups."""
    return name.split(".", 2 if name.startswith("experts.") else 1)[-1]


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_layer_wise_learning_rates_are_those_of_the_backbones_names(width: float) -> None:
    model = RIDEWrapper(Blocks(), 3, fork_at="blocks.2")
    if width < 1:
        body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        net = nn.Sequential(body, nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
        model = RIDEWrapper(net, 3, fork_at="1", expert_width=width)
    groups = model.parameter_groups_by(by_layer)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == 0.75 ** (5 - layer_of(own_name(name))), name
        assert decays[id(parameter)] == 0.05 * (parameter.ndim > 1), name
    optimizer = torch.optim.AdamW(groups)
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()


def test_frozen_and_tied_parameters_come_once() -> None:
    backbone = Blocks(tied=True)
    backbone.blocks[2].bias.requires_grad_(False)
    model = RIDEWrapper(backbone, 3, fork_at="blocks.2", init="copy")
    groups = model.parameter_groups_by(by_layer)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize(
    "function",
    [
        lambda network: network.parameters(),
        lambda network: {"all": list(network.parameters())},
        lambda network: [{"params": p, "lr": 0.1} for p in network.parameters()],
        lambda network: [{"params": filter(lambda p: p.requires_grad, network.parameters())}],
        lambda network: (list(network.head.parameters()), dict(network.named_parameters())),
        lambda network: ([], [{"params": network.parameters(), "lr": torch.tensor(0.1)}]),
    ],
)
def test_any_nesting_holds_every_parameter(function: Callable[[nn.Module], Any]) -> None:
    model = RIDEWrapper(Blocks(), 2, fork_at="blocks.2")
    result = model.parameter_groups_by(function)

    def ids(value: Any) -> set[int]:
        if isinstance(value, Tensor):
            return {id(value)} if value.requires_grad else set()
        items = value.values() if isinstance(value, dict) else value
        nested = isinstance(value, dict | list | tuple)
        return {i for item in items for i in ids(item)} if nested else set()

    assert ids(result) == {id(parameter) for parameter in model.parameters()}


def test_pairs_have_the_models_names() -> None:
    model = RIDEWrapper(Blocks(), 2, fork_at="blocks.2")
    pairs = model.parameter_groups_by(lambda network: list(network.named_parameters()))
    assert {name: id(p) for name, p in pairs} == {n: id(p) for n, p in model.named_parameters()}


def test_a_named_tuple_stays_one() -> None:
    def halves(network: nn.Module) -> Halves:
        every = list(network.parameters())
        return Halves([p for p in every if p.ndim > 1], [p for p in every if p.ndim == 1])

    model = RIDEWrapper(Blocks(), 2, fork_at="blocks.2")
    result = model.parameter_groups_by(halves)
    assert isinstance(result, Halves)
    assert len(result.weights) + len(result.biases) == len(list(model.parameters()))


def test_pairs_and_parts_are_shown_as_they_were_given() -> None:
    pair = RIDEWrapper.from_pair(Blocks(), nn.Linear(5, 5), 2, fork_at="feature_extractor.blocks.2")
    heads = pair.parameter_groups_by(lambda network: network["classifier"].parameters())
    assert len(heads) == 4
    parts = RIDEWrapper.from_parts(nn.Linear(8, 16), lambda k: nn.Linear(16, 5), 2)
    trunk, heads = parts.parameter_groups_by(lambda net: tuple(list(p.parameters()) for p in net))
    assert (len(trunk), len(heads)) == (2, 4)


def test_the_model_is_as_it_was() -> None:
    model = RIDEWrapper(Blocks(), 2, fork_at="blocks.2")
    x, names = torch.randn(4, 8), list(model.state_dict())
    before = model(x)
    model.parameter_groups_by(by_layer)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == names


def test_what_cannot_be_merged_is_refused() -> None:
    model = RIDEWrapper(Blocks(), 2, fork_at="blocks.2")
    with pytest.raises(ArgumentError, match=r"`function` to return parameters"):
        model.parameter_groups_by(lambda network: [])
    with pytest.raises(ArgumentError, match=r"argument `function`"):
        model.parameter_groups_by(None)  # type: ignore[arg-type]
    seen: list[nn.Module] = []

    def another_rate_each_time(network: nn.Module) -> list[dict[str, Any]]:
        seen.append(network)
        return [{"params": list(network.parameters()), "lr": 0.1 * len(seen)}]

    with pytest.raises(ArgumentError, match=r"one structure for every expert, but got 0.1 .* 0.2"):
        model.parameter_groups_by(another_rate_each_time)


def test_an_optimizer_is_refused_for_its_groups() -> None:
    model = RIDEWrapper(Blocks(), 2, fork_at="blocks.2")

    def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(by_layer(network), lr=0.1)

    with pytest.raises(ArgumentError, match=r"got an optimizer, AdamW.*`optimizer\.param_groups`"):
        model.parameter_groups_by(optimizer_of)
    groups = model.parameter_groups_by(lambda network: optimizer_of(network).param_groups)
    optimizer = torch.optim.AdamW(groups)
    plain = optimizer_of(Blocks()).param_groups
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in plain]
    found = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())


def test_a_vector_made_of_parameters_is_one_experts_and_refused() -> None:
    class Flat(nn.Sequential):
        def get_params(self) -> Tensor:
            return torch.cat([p.view(-1) for p in self.parameters()])

    model = RIDEWrapper(Flat(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), 2, fork_at="2")
    with pytest.raises(ArgumentError, match=r"`get_params`.*tensor \[67\].*parameters_to_vector"):
        model.get_params()
