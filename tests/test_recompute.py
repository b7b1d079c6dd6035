"""Experts whose activations are computed twice keep the state of one computation."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ReplayError, RIDEWrapper, _contexts, expert_logits


class InPlace(nn.Module):
    """A codebook's running means and a count, as VQ layers keep them; the means are saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.5)
            self.n += 1
        return (x - self.mean) * (1 + self.mean.clone())


class Anew(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = self.mean.lerp(x.detach().mean(0), 0.5)
            self.n = self.n + 1
        return (x - self.mean) * (1 + self.mean)


class Attributes(nn.Module):
    """A number, a list and a tensor that is bound anew."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen, self.last = 0, [0.0], torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.seen.append(float(x.detach().mean()))
            self.last = 0.5 * self.last + x.detach().mean(0)
        return x * (1 + self.calls + self.seen[-1]) + self.last.square() * x


class Clamped(nn.Linear):
    """Writes its own parameter."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.weight.data.mul_(0.5)
        return super().forward(x)


class CustomNorm(nn.BatchNorm1d):
    """Keeps its statistics by itself."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(x.mean(0), 0.3)
        return x - self.running_mean.clone()


class Drawing(nn.Module):
    """Multiplies by random numbers, one of each of its generators or of the common ones."""

    def __init__(self, *generators: Any) -> None:
        super().__init__()
        self.generators = generators

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            for generator in self.generators or (torch.default_generator, random, np.random):
                x = x * drawn_from(generator)
        return x


def drawn_from(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return 0.5 + torch.rand((), generator=generator).item()
    if isinstance(generator, np.random.BitGenerator):
        return 0.5 + generator.random_raw() % 100 / 100
    return 0.5 + float(generator.random())


def of_numpy() -> list[Any]:
    kinds = np.random
    return [kinds.default_rng(1), kinds.RandomState(1), kinds.MT19937(1), kinds.PCG64(1)]


class Nested(Drawing):
    """Holds generators in containers, beside a seed, which is no generator."""

    def __init__(self) -> None:
        super().__init__(*of_numpy())
        self.more = {"a": [random.Random(1), (torch.Generator().manual_seed(1),)]}
        self.seed = np.random.SeedSequence(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            first, (second,) = self.more["a"]
            x = x * drawn_from(first) * drawn_from(second)
        return super().forward(x)


class Collects(nn.Module):
    """Fills a list that another module looks into."""

    def __init__(self, seen: list[float], fills: bool) -> None:
        super().__init__()
        self.seen, self.fills = seen, fills

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.fills:
            self.seen.append(float(x.detach().mean()))
        return x if self.fills or not self.seen else x * (len(self.seen) + self.seen[-1])


def with_one_generator() -> nn.Module:
    ours = [torch.Generator().manual_seed(1), random.Random(1), *of_numpy()]
    return nn.Sequential(Drawing(*ours), nn.Linear(8, 8), Drawing(*ours))


def with_one_list() -> nn.Module:
    seen: list[float] = []
    return nn.Sequential(Collects(seen, True), nn.Linear(8, 8), Collects(seen, False))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "in place": InPlace,
    "bound anew": Anew,
    "attributes": Attributes,
    "a parameter": lambda: Clamped(8, 8),
    "statistics": lambda: nn.BatchNorm1d(8),
    "own statistics": lambda: CustomNorm(8, affine=False),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "dropout": lambda: nn.Dropout(0.5),
    "common generators": Drawing,
    "own generators": Nested,
    "two modules with one generator": with_one_generator,
    "two modules with one list": with_one_list,
}


def attributes_of(model: nn.Module) -> list[Any]:
    return [
        (module.calls, module.seen, module.last)
        for module in model.modules()
        if isinstance(module, Attributes)
    ]


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002


@pytest.mark.parametrize("kind", KINDS)
def test_state_and_gradients_are_those_of_one_computation(kind: str) -> None:
    net = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), KINDS[kind](), nn.Linear(8, 8), nn.Linear(8, 4)
    )
    models = [
        RIDEWrapper(net, 3, fork_at="2", init="copy", checkpoint_experts=flag).train()
        for flag in (False, True)
    ]
    models[1].load_state_dict(models[0].state_dict())
    drawn: list[list[float]] = []
    for step in range(3):
        x = torch.randn(5, 6)
        for model in models:
            model.zero_grad()
            seed(step)
            loss = expert_logits(model(x)).square().mean()
            if kind != "a parameter":  # which a second pass would write under the first one's graph
                loss = loss + model(-x).square().mean()
            loss.backward()
            drawn.append([drawn_from(generator) for generator in (torch.default_generator, random)])
        assert drawn[-1] == drawn[-2]
        plain, checkpointed = models
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(checkpointed.state_dict()[name], value, msg=name)
        for (name, a), (_, b) in zip(
            plain.named_parameters(), checkpointed.named_parameters(), strict=True
        ):
            assert a.grad is not None, name
            torch.testing.assert_close(b.grad, a.grad, msg=name)
        torch.testing.assert_close(attributes_of(checkpointed), attributes_of(plain))


def test_what_a_device_draws_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch looks at the arguments for the devices whose generators it keeps; there are none."""
    device, common = torch.Generator(), _contexts._common_generators
    monkeypatch.setattr(_contexts, "_common_generators", lambda held: [*common(held), device])

    class Dropout(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (torch.rand(x.shape, generator=device) > 0.5) if self.training else x

    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), Dropout(), nn.Linear(8, 4))
    model = RIDEWrapper(net, 2, fork_at="1", init="copy").train()
    gradients, x = [], torch.randn(5, 6)
    for flag in (False, True):
        model.checkpoint_experts = flag
        model.zero_grad()
        device.manual_seed(3)
        expert_logits(model(x)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()] + [torch.rand(2, generator=device)])
    torch.testing.assert_close(*gradients)


def test_a_second_backward_computes_from_the_same_start() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), InPlace(), nn.Linear(8, 4))
    model = RIDEWrapper(net, 2, fork_at="1", init="copy", checkpoint_experts=True).train()
    loss = model(torch.randn(5, 6)).square().sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], first)
    assert [expert[2].n.item() for expert in model.experts] == [1.0, 1.0]


class Hidden(nn.Module):
    """Writes into a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.total += x.detach().mean(0)
        return x + self.total


def test_a_tensor_that_is_no_buffer_is_named_once_it_is_written() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), Hidden(), nn.Linear(8, 4))
    model = RIDEWrapper(net, 2, fork_at="1", init="copy").train()
    model(torch.randn(5, 6)).sum().backward()
    model.checkpoint_experts = True
    with pytest.raises(ReplayError, match=r"written .*2\.total.* in place.*checkpoint_experts"):
        model(torch.randn(5, 6))
    model.eval()(torch.randn(5, 6)).sum().backward()
