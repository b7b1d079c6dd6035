"""Expert 0 is one like the others: its own mode, attributes, state, and what a forward hands it."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ride_plugin import ArgumentError, RIDEWrapper, SplitError
from ride_plugin._compiler import COMPILES
from tests.naive import train_both

X = torch.randn(5, 6)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def wrapped(net: nn.Module, **options: Any) -> RIDEWrapper:
    options = {"fork_at": "b", "init": "copy", "num_classes": 4, "example_input": X, **options}
    return RIDEWrapper(net, 3, **options)


class DropsAtTheRoot(Base):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.b(self.a(x).relu()).relu(), 0.5, self.training)
        return self.c(h) * self.scale


@pytest.mark.parametrize(
    "compiled",
    [
        False,
        pytest.param(True, marks=pytest.mark.skipif(not COMPILES, reason="torch is too old")),
    ],
)
def test_dropout_behind_a_frozen_trunk_acts_in_every_expert(compiled: bool) -> None:
    model = wrapped(DropsAtTheRoot()).train()
    model.trunk.eval()
    run = torch.compile(model, backend="eager") if compiled else model
    model.return_experts = True
    draws = torch.stack([run(X).expert_logits.detach() for _ in range(6)])
    assert (draws.std(0) > 0).any(2).any(0).tolist() == [True, True, True]


def test_an_attribute_of_an_expert_acts_in_that_expert() -> None:
    model = wrapped(DropsAtTheRoot()).eval()
    model.return_experts = True
    before = model(X).expert_logits
    for k, expert in enumerate(model.experts):
        expert.scale = 10.0 * (k + 1)
    ratio = (model(X).expert_logits / before).mean((0, 2))
    torch.testing.assert_close(ratio, torch.tensor([10.0, 20.0, 30.0]))


class CountsBehind(Base):
    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training:
            self.seen += y.detach().softmax(1).sum(0)
        return y - (1 + self.seen).log()


def test_what_each_expert_counts_is_what_it_is_taken_out_with() -> None:
    model = wrapped(CountsBehind()).train()
    for _ in range(3):
        model(X)
    model.eval().return_experts = True
    each, state = model(X).expert_logits, model.run_trunk(X)
    for k in range(3):
        torch.testing.assert_close(model.to_module(k)(X), each[:, k])
        torch.testing.assert_close(model.run_expert(k, state)[0], each[:, k])


class Head(nn.Linear):
    hard = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (10 if self.hard else 1)


class HandsOver(Base):
    def __init__(self) -> None:
        super().__init__()
        self.c = Head(8, 4)

    def forward(self, x: Tensor, hard: bool = False) -> Tensor:
        self.c.hard = hard
        return super().forward(x)


def test_an_attribute_that_the_forward_sets_on_a_forked_module_reaches_every_expert() -> None:
    model = wrapped(HandsOver()).eval()
    model.return_experts = True
    before = model(X).expert_logits
    torch.testing.assert_close(model(X, hard=True).expert_logits, 10 * before)
    torch.testing.assert_close(model(X).expert_logits, before)


class Prompted(nn.Linear):
    prompt: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.prompt)


class Prompts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.c = Prompted(8, 8), Prompted(8, 4)
        self.prompts = nn.ParameterList([torch.randn(8), torch.randn(8)])

    def forward(self, x: Tensor) -> Tensor:
        self.b.prompt, self.c.prompt = self.prompts[0], self.prompts[1]
        return super().forward(x)


def test_prompts_that_the_forward_hands_to_forked_modules_are_each_expert_s_own() -> None:
    model = wrapped(Prompts())
    model.train().return_experts = True
    model(X).expert_logits.sum().backward()
    plain = [model.to_module(k) for k in range(3)]
    torch.testing.assert_close(
        model(X).expert_logits, torch.stack([net(X) for net in plain], dim=1)
    )


class Momentum(Base):
    def __init__(self) -> None:
        super().__init__()
        self.t = copy.deepcopy(self.c).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu()).relu()
        y = self.c(h) + self.t(h).detach()
        if self.training:
            with torch.no_grad():
                for p, q in zip(self.c.parameters(), self.t.parameters(), strict=True):
                    q.lerp_(p, 0.5)
        return y


class Schedules(Base):
    def __init__(self) -> None:
        super().__init__()
        self.limit, self.steps = nn.Hardtanh(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        for module in self.modules():
            if isinstance(module, nn.Hardtanh):
                module.max_val = 0.1 * self.steps
        self.b.slope = self.steps
        return self.c(self.limit(self.b(self.a(x).relu()).relu())) * self.b.slope


class AsksForADtype(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(next(self.a.parameters()).dtype))


class Named(Base):
    """Modules with attributes that a stand-in might call its own."""

    def __init__(self) -> None:
        super().__init__()
        for module in (self.a, self.b, self.c):
            module.running, module.key, module.real, module.part = 1.0, 2.0, 3.0, 4.0

    def forward(self, x: Tensor) -> Tensor:
        for module in (self.a, self.b, self.c):
            x = x + module.running * module.key * module.real * module.part
        return super().forward(x)


@pytest.mark.parametrize("net", [Momentum, Schedules, AsksForADtype, Named])
def test_it_trains_as_the_copies_do(net: type[Base]) -> None:
    backbone = net()
    model = wrapped(backbone)
    with torch.no_grad():  # a frozen classifier is kept, so that nothing tells experts apart
        for k, expert in enumerate(model.experts):
            expert.c.weight.add_(0.1 * k)
    train_both(backbone, model, [torch.randn(5, 6) for _ in range(3)])


class Thaws(Base):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        self.c.weight.requires_grad = self.steps < 2
        self.a.bias.requires_grad_(self.steps < 3)
        return super().forward(x)


def test_what_a_forward_freezes_is_frozen_in_every_expert() -> None:
    model = wrapped(Thaws()).train()
    for _ in range(2):
        model(X)
    assert [expert.c.weight.requires_grad for expert in model.experts] == [False] * 3
    assert model.trunk.a.bias.requires_grad
    model(X)
    assert not model.trunk.a.bias.requires_grad


class ReadsThenCounts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        step = int(self.step)
        if self.training:
            self.step += 1
        return super().forward(x) * (1 + max(0, step - 1))


def test_a_number_that_is_read_and_then_raised_is_the_same_for_trunk_and_experts() -> None:
    backbone = ReadsThenCounts()
    model = wrapped(backbone)
    train_both(backbone, model, [torch.randn(5, 6) for _ in range(4)])
    assert int(model.trunk.step) == 4


def test_states_in_which_different_numbers_were_read_are_not_joined() -> None:
    model = wrapped(ReadsThenCounts()).train()
    states = [model.run_trunk(X) for _ in range(2)]
    with pytest.raises(ArgumentError, match="keeps a number from call to call"):
        type(states[0]).cat(states)


def drop_and_add(x: Tensor, residual: Tensor, p: float, training: bool) -> Tensor:
    return torch.nn.functional.dropout(x, p, training) + residual


class DrawsInTorchScript(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.c(self.b(SCRIPTED[0](h, h, 0.5, self.training)).relu())


SCRIPTED: list[Any] = []


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_random_numbers_that_cannot_be_seen_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where tests run in several processes, each has a thread that listens, and nothing is said.
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    SCRIPTED.append(torch.jit.script(drop_and_add))
    with pytest.raises(SplitError, match="draws random numbers before the fork"):
        wrapped(DrawsInTorchScript())


class KeepsFeatures(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.features = self.b(self.a(x).relu()).relu()
        return self.c(self.features)


@pytest.mark.skipif(not COMPILES, reason="torch is too old")
def test_a_model_that_keeps_features_as_an_attribute_compiles() -> None:
    model = wrapped(KeepsFeatures()).eval()
    with torch.no_grad():
        expected = model(X)
        torch.testing.assert_close(torch.compile(model, backend="eager")(X), expected)
