"""A forward that asks for the class of a module finds it, also where a stand-in answers."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin import ArgumentError, RIDELoss, RIDEWrapper, expert_logits
from ride_plugin._compiler import COMPILES


class Layers(nn.Module):
    """A loop that treats layers by their kinds, as hand-written networks do."""

    def __init__(self) -> None:
        super().__init__()
        kinds = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.LayerNorm(16)
        self.layers = nn.ModuleList([*kinds, nn.Linear(16, 5)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.LayerNorm):
                x = x.relu()
        return x


class ByName(Layers):
    """Asks by the name of the class."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x = x.relu() if layer.__class__.__name__ == "LayerNorm" else x
        return x


class Inside(nn.Module):
    """Takes layers out of a block and runs them by their kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index in range(2):
            layer = self.block[index]
            x = layer(x).relu() if isinstance(layer, nn.LayerNorm) else layer(x).tanh()
        return self.fc(x) * (2.0 if isinstance(self.stem, nn.Linear) else 1.0)


CASES = [(Layers, f"layers.{k}") for k in (1, 2, 3)] + [(ByName, "layers.2"), (Inside, "block")]


@pytest.mark.parametrize(("net", "fork_at"), CASES)
def test_each_expert_is_the_backbone_with_its_weights(net: type[nn.Module], fork_at: str) -> None:
    model = RIDEWrapper(net(), 3, fork_at=fork_at)
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        x, y = torch.randn(6, 8), torch.arange(6) % 5
        alone = [again.to_module(k) for k in range(3)]
        optimizer = torch.optim.SGD(again.parameters(), 0.1)
        for _ in range(2):
            logits = expert_logits(again.train()(x))
            expected = torch.stack([one.train()(x) for one in alone], 1)
            torch.testing.assert_close(logits, expected)
            grads = torch.autograd.grad(
                sum(F.cross_entropy(one(x), y) for one in alone),
                [p for one in alone for p in one.parameters()],
            )
            loss = RIDELoss(nn.CrossEntropyLoss(), [3, 2, 2, 2, 2])
            loss.diversity.weight = 0.0
            optimizer.zero_grad()
            loss(again(x), y).backward()
            found = sum(float(p.grad.square().sum()) for e in again.experts for p in e.parameters())
            trunk_names = {n for n, _ in again.trunk.named_parameters()}
            own = [n not in trunk_names for one in alone for n, _ in one.named_parameters()]
            wanted = sum(
                float(g.square().sum()) for g, mine in zip(grads, own, strict=True) if mine
            )
            assert found == pytest.approx(wanted, rel=1e-4)
            optimizer.step()
            alone = [again.to_module(k) for k in range(3)]


def test_a_hook_on_every_module_comes_by_each_layer_once() -> None:
    model, seen = RIDEWrapper(Layers(), 2, fork_at="layers.2").eval(), Counter()

    def count(module: nn.Module, *_: object) -> None:
        seen["linear"] += isinstance(module, nn.Linear)

    for module in model.modules():
        module.register_forward_hook(count)
    model(torch.randn(2, 8))
    assert seen["linear"] == 1 + 2 * 2
    assert not any(isinstance(module, nn.Linear) for module in model.experts[0].layers[:2])


@pytest.mark.skipif(not COMPILES, reason="this torch compiles no wrapped model")
def test_a_compiler_which_does_not_find_it_is_refused_where_it_matters() -> None:
    class Ends(Layers):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x) if not isinstance(layer, nn.Identity) else x
            return x

    x = torch.randn(2, 8)
    model = RIDEWrapper(Layers(), 2, fork_at="layers.2").eval()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ArgumentError, match=r"asks for the class of `layers\.0`.*isinstance"):
        compiled(x)
    harmless = RIDEWrapper(Ends(), 2, fork_at="layers.2").eval()
    compiled = torch.compile(harmless, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), harmless(x))
