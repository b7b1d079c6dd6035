"""Layers that add a low-rank update to their frozen weight, in evaluation or when asked."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ExpertRouter, ReplayError, RIDEWrapper, RoutingInference, expert_logits
from ride_plugin._split._verify import _modes


class Update(nn.Linear):
    """Its second matrix starts at zero, so that merging shows nothing before it was trained."""

    def __init__(self, width: int, by_mode: bool) -> None:
        super().__init__(width, width)
        self.weight.requires_grad_(False)
        self.bias.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, width))
        self.up = nn.Parameter(torch.zeros(width, 2))
        self.merged, self.by_mode = False, by_mode

    def merge(self, on: bool = True) -> None:
        if on is not self.merged:
            # As these layers are written: nothing counts a write through `.data`.
            self.weight.data += (1 if on else -1) * (self.up @ self.down).detach()
            self.merged = on

    def train(self, mode: bool = True) -> Update:
        if self.by_mode:
            self.merge(not mode)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.down.T @ self.up.T


class Updated(nn.Module):
    def __init__(self, by_mode: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Update(8, by_mode) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


def trained(by_mode: bool, evaluates: bool = False, pretrained: bool = False) -> RIDEWrapper:
    net = Updated(by_mode)
    if pretrained:
        randomise(net)
    net.train(not evaluates)
    model = RIDEWrapper(
        net, 3, fork_at="layers.1", init="copy", example_input=torch.randn(2, 8)
    ).train()
    randomise(model)
    return model


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("up"):
                parameter.normal_()


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("pretrained", [False, True])
def test_updates_that_are_merged_for_evaluation_stay_each_experts_own(
    evaluates: bool, pretrained: bool
) -> None:
    model = trained(True, evaluates, pretrained)
    x = torch.randn(5, 8)
    expected = expert_logits(model(x)).detach()
    assert not torch.equal(expected[:, 0], expected[:, 1])
    for training in (False, True, False):
        model.train(training)
        torch.testing.assert_close(expert_logits(model(x)).detach(), expected)
    weights = {expert.get_submodule("layers.2").weight for expert in model.experts}
    assert len(weights) == 3
    again = trained(by_mode=True)
    again.eval().load_state_dict(model.state_dict())
    torch.testing.assert_close(expert_logits(again(x)).detach(), expected)


def test_weights_that_no_mode_writes_stay_one_tensor() -> None:
    model = trained(by_mode=False)
    assert len({expert.get_submodule("layers.2").weight for expert in model.experts}) == 1


def test_updates_merged_by_hand_into_a_shared_weight_are_refused_until_they_are_undone() -> None:
    model = trained(by_mode=False).eval()
    x = torch.randn(5, 8)
    expected = expert_logits(model(x)).detach()
    serve = RoutingInference(model, ExpertRouter.for_model(model))
    layers = [m for part in (model.trunk, *model.experts) for m in part.modules()]
    layers = [layer for layer in layers if isinstance(layer, Update)]
    assert len(layers) == 1 + 3 * 2
    layers[0].merge()  # the trunk's: its weight is nobody else's
    torch.testing.assert_close(expert_logits(model(x)).detach(), expected)
    for call in (model, model.run_trunk, serve, copy.deepcopy(model)):
        call(x)
    for layer in layers:
        layer.merge()
    told = r"`experts\.0\.layers\.1`.*one tensor for all experts.*`unmerge\(\)`.*to_module\(k\)"
    for refused in (model, model.run_trunk, serve, copy.deepcopy(model)):
        with pytest.raises(ReplayError, match=told):
            refused(x)
    with pytest.raises(ReplayError, match=told):
        model.to_module(1)
    for layer in layers:
        layer.merge(False)
    torch.testing.assert_close(expert_logits(model(x)).detach(), expected)
    plain = model.to_module(1)
    for module in plain.modules():
        if isinstance(module, Update):
            module.merge()
    torch.testing.assert_close(plain(x).detach(), expected[:, 1])
    torch.testing.assert_close(expert_logits(model(x)).detach(), expected)


class OnlySwitches(nn.Sequential):
    """Has a `train` of its own, as every model of transformers."""

    def train(self, mode: bool = True) -> OnlySwitches:
        return super().train(mode)


def test_a_train_that_computes_nothing_costs_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.Linear(8, 8).requires_grad_(False), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4)
    copied = []
    monkeypatch.setattr(_modes, "clone_module", lambda m: copied.append(m) or copy.deepcopy(m))
    assert _modes.written_by_modes(OnlySwitches(*layers)) == frozenset()
    assert not copied
    assert _modes.written_by_modes(Updated(True)) == {f"layers.{k}.weight" for k in range(3)}
    assert len(copied) == 3
