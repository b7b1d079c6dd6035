"""Methods that a forward calls on its modules: they would run for the trunk and for each expert."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper, SplitError
from tests.naive import train_both


class Scheduled(nn.Module):
    """As dropblock's: `step` counts and raises a strength."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = 0.1
        self.settings = SimpleNamespace(count=0)
        self.seen: list[int] = []
        self.last: Any = None
        self.stream = random.Random(0)
        self.kept = SimpleNamespace(last=None, stream=random.Random(0))

    def step(self) -> None:
        self.strength = min(0.5, self.strength + 0.05)

    def count(self) -> None:
        self.settings.count += 1

    def remember(self) -> None:
        self.seen.append(len(self.seen))

    def draw(self) -> None:
        self.stream.random()

    def look(self) -> None:
        self.kept.last = torch.ones(2)
        self.last = {"rows": [1000, 2000], "shape": torch.zeros(2, 3).shape, "what": object}

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 - self.strength)


class Network(nn.Module):
    def __init__(self, method: str, where: str) -> None:
        super().__init__()
        self.method, self.where = method, where
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.drop = Scheduled()

    def call(self, here: str) -> None:
        if here == self.where:
            getattr(self.drop, self.method)()

    def forward(self, x: Tensor) -> Tensor:
        self.call("first")
        x = self.drop(self.a(x).relu())
        self.call("middle")
        x = self.b(x).relu()
        self.call("last")
        return self.c(x)


def wrapped(net: nn.Module, fork_at: str) -> RIDEWrapper:
    x = torch.randn(2, 6)
    return RIDEWrapper(net, 3, fork_at=fork_at, init="copy", example_input=x)


@pytest.mark.parametrize(
    ("where", "fork_at"),
    [("first", "b"), ("middle", "b"), ("last", "b"), ("middle", "c"), ("first", "a")],
)
@pytest.mark.parametrize(
    ("method", "attribute"),
    [("step", "strength"), ("count", "settings"), ("remember", "seen"), ("draw", "stream")],
)
def test_what_would_count_too_often_is_refused(
    method: str, attribute: str, where: str, fork_at: str
) -> None:
    with pytest.raises(SplitError, match=rf"`drop\.{attribute}` once more.*outside of the forward"):
        wrapped(Network(method, where), fork_at)


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("fork_at", ["a", "b", "c"])
def test_what_comes_to_the_same_however_often_is_not(where: str, fork_at: str) -> None:
    net = Network("look", where)
    train_both(net, wrapped(net, fork_at), [torch.randn(4, 6) for _ in range(2)])


def test_behind_the_fork_each_expert_counts_for_itself() -> None:
    net = Network("step", "last")
    model = wrapped(net, "a")
    copies = train_both(net, model, [torch.randn(4, 6) for _ in range(3)])
    strengths = [expert.get_submodule("drop").strength for expert in model.experts]
    assert strengths == [copy.get_submodule("drop").strength for copy in copies]


def test_inside_of_its_own_forward_it_counts_once() -> None:
    class Counts(Scheduled):
        def forward(self, x: Tensor) -> Tensor:
            self.step()
            return super().forward(x)

    net = Network("look", "first")
    net.drop = Counts()
    model = wrapped(net, "b")
    copies = train_both(net, model, [torch.randn(4, 6) for _ in range(3)])
    assert model.trunk.get_submodule("drop").strength == copies[0].drop.strength


def test_a_module_of_the_trunk_that_runs_again_behind_the_fork() -> None:
    class Twice(Network):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.drop(self.b(self.drop(self.a(x))).relu()))

    def kept(module: nn.Module, args: Any, out: Tensor) -> None:
        module.last = out.detach()  # type: ignore[assignment]

    def counted(module: Any, args: Any, out: Tensor) -> None:
        module.settings.count += 1

    def build(hook: Callable[..., None]) -> nn.Module:
        net = Twice("look", "first")
        net.drop.register_forward_hook(hook)
        return net

    net = build(kept)
    train_both(net, wrapped(net, "b"), [torch.randn(4, 6)])
    with pytest.raises(SplitError, match="on both sides of the fork"):
        wrapped(build(counted), "b")
