"""Outputs that are choices: a gate keeps one for each part, in however many ways it chooses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin import RIDEWrapper, expert_logits

PARTS = 4


def of_one(chosen: Tensor) -> Tensor:
    return (chosen.reshape(-1, 1) == torch.arange(PARTS)).float()


# From scores [B, PARTS] to the weights of the parts [B, PARTS].
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda s: of_one(s.softmax(-1).max(-1, keepdim=True)[1]),
    "max, values too": lambda s: s.max(1).values[:, None] * of_one(s.max(dim=1).indices),
    "argmax": lambda s: of_one(s.argmax(1)),
    "argmax, axis": lambda s: of_one(torch.argmax(s, axis=-1)),
    "argmin": lambda s: of_one(torch.argmin(s, -1, True)),
    "topk": lambda s: s.new_zeros(len(s), PARTS).scatter(1, *reversed(s.topk(2))),
    "sort": lambda s: of_one(s.sort(descending=True)[1][:, 0]),
    "argsort": lambda s: of_one(s.argsort(-1)[:, -1]),
    "softmax, each": lambda s: torch.stack([w * 1.0 for w in s.softmax(-1).unbind(1)], 1),
    "softmax, by number": lambda s: torch.stack([s.softmax(-1)[:, k] for k in range(PARTS)], 1),
}

DRAWN: dict[str, Callable[[Tensor], Tensor]] = {
    "multinomial": lambda s: of_one(torch.multinomial(s.softmax(-1), 1)) * s.sum(),
    "gumbel": lambda s: of_one(numbers(F.gumbel_softmax(s, hard=True)).detach()) * s.sum(),
    "gumbel, dim": lambda s: of_one(numbers(F.gumbel_softmax(s, 1.0, False, 1e-10, 1)).round()),
}


def numbers(hot: Tensor) -> Tensor:
    return (hot * torch.arange(hot.shape[1])).sum(1)


class Mixture(nn.Module):
    """Parts of a mixture, which are layers that a gate weighs."""

    def __init__(self, channels: int, weights: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weights = weights
        self.gate = nn.Linear(channels, PARTS)
        self.parts = nn.ModuleList(nn.Linear(channels, channels) for _ in range(PARTS))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights(self.gate(x))
        parts = zip(weights.split(1, 1), self.parts, strict=False)
        return sum((w * part(x) for w, part in parts), torch.zeros(()))


@pytest.mark.parametrize("how", GATES)
def test_a_gate_keeps_an_output_for_each_part(how: str) -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), Mixture(32, GATES[how]),
        nn.ReLU(), nn.Linear(32, 5),
    )  # fmt: skip
    x = torch.randn(4, 8)
    model = RIDEWrapper(backbone, 2, fork_at="2", expert_width=0.75, example_input=x)
    mixture = model.experts[0][4]
    assert mixture.gate.weight.shape == (PARTS, 24)
    assert [part.weight.shape for part in mixture.parts] == [(24, 24)] * PARTS
    model.eval()
    torch.testing.assert_close(model.to_module(0)(x), expert_logits(model(x))[:, 0])


class DrawnInTraining(Mixture):
    """Chooses one part by chance in training; in evaluation all count alike."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        return self.gate(x).mean(1, keepdim=True) * sum(part(x) for part in self.parts)


@pytest.mark.parametrize("how", DRAWN)
def test_a_gate_that_draws_keeps_an_output_for_each_part(how: str) -> None:
    backbone = nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), DrawnInTraining(32, DRAWN[how]),
        nn.ReLU(), nn.Linear(32, 5),
    )  # fmt: skip
    x = torch.randn(4, 8)
    model = RIDEWrapper(backbone, 2, fork_at="2", expert_width=0.75, example_input=x)
    assert model.experts[0][3].gate.weight.shape == (PARTS, 24)


class LargestChannel(nn.Module):
    """Weighs positions by their largest channel, as spatial attention does; reads no number."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        largest, _ = torch.max(x, dim=1, keepdim=True)
        pair = torch.cat([largest, x.mean(1, keepdim=True)], 1)
        return x * self.mix(pair).sigmoid()


class LargestPositions(nn.Module):
    """Reads which positions are largest: their number stays, so channels may be fewer."""

    def forward(self, x: Tensor) -> Tensor:
        return x.gather(2, x.topk(3, dim=2).indices)


@pytest.mark.parametrize("then", [LargestChannel, LargestPositions])
def test_channels_are_narrowed_where_no_number_of_one_is_read(then: type[nn.Module]) -> None:
    backbone = nn.Sequential(
        nn.Conv1d(2, 8, 1), nn.ReLU(), nn.Conv1d(8, 32, 1), then(), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    x = torch.randn(4, 2, 6)
    model = RIDEWrapper(backbone, 2, fork_at="2", expert_width=0.75, example_input=x)
    assert model.experts[0][2].out_channels == 24


def test_a_choice_that_is_returned_is_read() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = nn.Linear(6, 16), nn.Linear(16, 32)
            self.topics, self.head = nn.Linear(32, 12), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.late(self.early(x).relu()).relu()
            return {"logits": self.head(x), "topic": self.topics(x).argmax(1)}

    x = torch.randn(4, 6)
    model = RIDEWrapper(Net(), 2, fork_at="late", expert_width=0.75, example_input=x)
    assert model.experts[0].topics.weight.shape == (12, 24)
