"""Backbones as strangers write them: each expert trains as an independent copy of the backbone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from ride_plugin import RIDEWrapper, SplitError
from tests.naive import train_both


def rows(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(5, *shape)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.c(self.b(self.a(x).relu()).relu())


class OneLayerOnBothSides(Base):
    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.m(self.b(self.m(self.a(x).relu()).relu()).relu()))


class Block(nn.Module):
    def __init__(self, position: nn.Module) -> None:
        super().__init__()
        self.position, self.linear = position, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.position(x)).relu() + x


class ModulesUnderSeveralNames(nn.Module):
    """As CoaT: blocks hold a module that the root holds as well and calls again later."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.position1, self.position2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.early = nn.ModuleList(Block(self.position1) for _ in range(2))
        self.late = nn.ModuleList(Block(self.position2) for _ in range(2))
        self.mix = nn.ModuleList([Block(self.position1), Block(self.position2)])
        self.classifier = self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in (*self.early, *self.late):
            x = block(x)
        x = self.position1(x) + self.position2(x)
        for block in self.mix:
            x = block(x)
        return self.classifier(x)


class TiedWeights(Base):
    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Linear(8, 8)
        self.early.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.early(self.a(x).relu()).relu()).relu())


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
        self.c.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.embedding(x)).relu().mean(1))


class Parametrized(Base):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.orthogonal(self.a)
        parametrizations.weight_norm(self.b)


class FoldsFrames(Base):
    def forward(self, x: Tensor) -> Tensor:
        folded = self.b(self.a(x.reshape(-1, 6)).relu()).relu()
        return self.c(folded.reshape(len(x), -1, 8).mean(1))


class OwnGenerators(Base):
    """Dropout by hand, before and after the fork."""

    def __init__(self) -> None:
        super().__init__()
        self.early = torch.Generator().manual_seed(3)
        self.late = torch.Generator().manual_seed(4)
        self.numbers = np.random.default_rng(5)

    def drop(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if not self.training:
            return x
        return float(self.numbers.random()) * x * (torch.rand(x.shape, generator=generator) > 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.a(x).relu(), self.early)
        return self.c(self.drop(self.b(x).relu(), self.late))


class OneGenerator(OwnGenerators):
    def __init__(self) -> None:
        super().__init__()
        self.late = self.early


class StopsEarly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(6, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for index, block in enumerate(self.blocks):
            x = block(x).relu()
            if index == 3:
                break
        return self.c(x)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        both = torch.cat(state, 1)
        return self.f(both).tanh(), state[1] + self.g(both).sigmoid()


class TupleStates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(6, 8), nn.Linear(8, 4)
        self.cells = nn.ModuleList(Cell() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        state = (self.a(x), x.new_zeros(len(x), 8))
        for cell in self.cells:
            state = cell(state)
        return self.c(sum(state))


class KeywordsOnly(Base):
    def forward(self, *, pixels: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.a(pixels).relu()
        return self.c(self.b(x if scale is None else x * scale).relu())


@dataclasses.dataclass
class Output:
    hidden: Tensor
    logits: Tensor


class DataclassOutput(Base):
    def forward(self, x: Tensor) -> Output:
        hidden = self.b(self.a(x).relu()).relu()
        return Output(hidden, self.c(hidden))


class InPlaceAcross(Base):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.act(x)  # changes what the skip connection reads, in every expert
        return self.c(self.b(y) + x)


class MaskBySize(Base):
    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[int, Tensor] = {}

    def mask(self, x: Tensor) -> Tensor:
        size = x.shape[1]
        if size not in self.masks:
            self.masks[size] = torch.tril(torch.ones(size, size)) / size
        return self.masks[size]

    def forward(self, x: Tensor) -> Tensor:
        x = self.mask(x) @ self.a(x).relu()
        return self.c((self.mask(x) @ self.b(x).relu()).mean(1))


class HookOnATensor(Base):
    """A gradient that is scaled on its way into the trunk: once, not once for each expert."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if x.requires_grad:
            x.register_hook(lambda gradient: 0.5 * gradient)
            x.retain_grad()
        return self.c(self.b(x).relu())


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradient, None


class ReversesGradients(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = Reverse.apply(self.a(x).relu(), 0.5)
        return self.c(Reverse.apply(self.b(x).relu(), 2.0))


class ReadsATrunkWeightLate(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        return self.c(x) + (x @ self.a.weight)[:, :4]


class NormalisesItsClassifier(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        with torch.no_grad():
            self.c.weight.copy_(F.normalize(self.c.weight, dim=1))
        return self.c(x)


class TakesAnotherPathLater(Base):
    def __init__(self) -> None:
        super().__init__()
        self.steps, self.extra = 0, nn.Softplus()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        self.steps += self.training
        x = self.b(x).relu()
        return self.c(x + self.extra(x) if self.steps > 1 else x)


class AlternatesItsPath(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        x = self.a(x)
        return self.c(self.b(x.tanh() if self.calls[0] % 2 else x.relu()).relu())


class PopsFromItsInput(Base):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        mask = batch.pop("mask")
        return self.c(self.b(self.a(batch["x"]).relu() * mask).relu())


class PutsIntoItsInput(Base):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        batch["hidden"] = self.a(batch["x"]).relu()
        batch["hidden"] = self.b(batch["hidden"]).relu()
        return self.c(batch["hidden"])


class AppendsToItsInput(Base):
    def forward(self, levels: list[Tensor]) -> Tensor:
        levels.append(self.a(levels[0]).relu())
        levels.append(self.b(levels[-1]).relu())
        return self.c(levels[-1] + levels[-2])


class ChangesItsInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        return self.c(self.b(self.a(x).relu()).relu()) + x[:, :4]


class SetsAModeLate(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        self.norm.eval()
        x = self.norm(x)
        self.norm.train(self.training)
        return self.c(x.relu())


CASES: dict[type[nn.Module], tuple[str, Callable[[], Any]]] = {
    OneLayerOnBothSides: ("b", rows(6)),
    ModulesUnderSeveralNames: ("late", rows(6)),
    TiedWeights: ("b", rows(6)),
    TiedEmbedding: ("b", lambda: torch.randint(0, 9, (5, 7))),
    Parametrized: ("b", rows(6)),
    FoldsFrames: ("b", rows(3, 6)),
    OwnGenerators: ("b", rows(6)),
    StopsEarly: ("blocks.2", rows(6)),
    TupleStates: ("cells.1", rows(6)),
    KeywordsOnly: ("b", lambda: ((), {"pixels": torch.randn(5, 6), "scale": torch.rand(5, 1)})),
    DataclassOutput: ("b", rows(6)),
    InPlaceAcross: ("act", rows(6)),
    MaskBySize: ("b", rows(7, 6)),
    HookOnATensor: ("b", rows(6)),
    ReversesGradients: ("b", rows(6)),
    ReadsATrunkWeightLate: ("b", rows(6)),
    NormalisesItsClassifier: ("b", rows(6)),
    TakesAnotherPathLater: ("b", rows(6)),
    AlternatesItsPath: ("b", rows(6)),
    PopsFromItsInput: ("b", lambda: (({"x": torch.randn(5, 6), "mask": torch.rand(5, 8)},), {})),
    PutsIntoItsInput: ("b", lambda: (({"x": torch.randn(5, 6)},), {})),
    AppendsToItsInput: ("b", lambda: (([torch.randn(5, 6)],), {})),
    ChangesItsInput: ("b", rows(6)),
    SetsAModeLate: ("b", rows(6)),
}


@pytest.mark.filterwarnings("ignore:Experts 0 and 1 have equal weights")  # those of TiedEmbedding
@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_each_expert_trains_as_a_copy_of_its_own(kind: type[nn.Module]) -> None:
    fork_at, batch = CASES[kind]
    net, example = kind(), batch()
    model = RIDEWrapper(
        net,
        3,
        fork_at=fork_at,
        init="copy",
        num_classes=9 if kind is TiedEmbedding else 4,
        example_input=example,
    )
    again = copy.deepcopy(example)
    train_both(net, model, [batch() for _ in range(3)])
    torch.testing.assert_close(example, again)  # the build has used copies


@pytest.mark.parametrize("fork_at", ["early.1", "late", "late.1", "mix.0"])
def test_state_dicts_keep_every_name_of_a_module(fork_at: str) -> None:
    net = ModulesUnderSeveralNames()
    model = RIDEWrapper(net, 2, fork_at=fork_at, example_input=torch.randn(2, 6)).eval()
    x = torch.randn(4, 6)
    expected = model.router_inputs(x).expert_logits
    for index, plain in enumerate((model.to_module(0), *model.to_modules()[1:])):
        again = ModulesUnderSeveralNames().eval()
        again.load_state_dict(plain.state_dict())
        torch.testing.assert_close(again(x), expected[:, index])
    copied = RIDEWrapper(net, 2, fork_at=fork_at, example_input=torch.randn(2, 6))
    copied.load_state_dict(model.state_dict())
    torch.testing.assert_close(copied.router_inputs(x).expert_logits, expected)


def test_one_generator_on_both_sides_of_the_fork_is_refused() -> None:
    with pytest.raises(SplitError, match="generator of its own, `early`, before and after"):
        RIDEWrapper(OneGenerator(), 2, fork_at="b", example_input=torch.randn(2, 6))


def test_a_module_that_the_trunk_calls_inside_another_is_no_place_to_fork() -> None:
    with pytest.raises(SplitError, match="`fork_at` to name a submodule that"):
        RIDEWrapper(
            ModulesUnderSeveralNames(), 2, fork_at="position2", example_input=torch.randn(2, 6)
        )
