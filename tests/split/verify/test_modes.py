"""Backbones that say themselves what `train()` does: frozen stages, norm_eval."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper, SplitError
from ride_plugin._split._verify._modes import other_modes
from tests.naive import train_both


class FrozenStages(nn.Module):
    """As detectors' backbones: `train` freezes and returns nothing."""

    def __init__(self, frozen: tuple[str, ...]) -> None:
        super().__init__()
        self.frozen = frozen
        self.a = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.b = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.c = nn.Linear(8, 4)

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        for name in self.frozen:
            stage: Any = getattr(self, name)
            stage[1].eval()
            for parameter in stage.parameters():
                parameter.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


class NormEval(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def batches() -> list[Tensor]:
    return [torch.randn(5, 6) for _ in range(3)]


def wrapped(net: nn.Module, fork_at: str, **settings: Any) -> RIDEWrapper:
    x = torch.randn(2, 6)
    return RIDEWrapper(net, 3, fork_at=fork_at, example_input=x, **settings)


@pytest.mark.parametrize("fork_at", ["b", "c"])
@pytest.mark.parametrize("frozen", [("a",), ("b",), ("a", "b")], ids="+".join)
def test_frozen_stages_stay_frozen_on_either_side(frozen: tuple[str, ...], fork_at: str) -> None:
    net = FrozenStages(frozen)
    net.train()
    model = wrapped(net, fork_at, init="copy")
    train_both(net, model, batches())
    modes = {name: m.training for name, m in model.named_modules() if name.endswith(".1")}
    assert modes == {name: name.split(".")[-2] not in frozen for name in modes}
    model.eval()
    x = torch.randn(3, 6)
    plain = model.to_module(1)
    torch.testing.assert_close(plain(x), model.router_inputs(x).expert_logits[:, 1])


@pytest.mark.parametrize("fork_at", ["net.1", "net.3"])
def test_norm_eval_reaches_trunk_and_experts(fork_at: str) -> None:
    net = NormEval()
    model = wrapped(net, fork_at, init="copy")
    train_both(net, model, batches())
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm1d))


def test_narrow_experts_and_new_classifiers_of_such_a_backbone() -> None:
    net = FrozenStages(("a",))
    assert wrapped(net, "b", expert_width=0.5)(torch.randn(3, 6)).shape == (3, 4)

    class Head(nn.Linear):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)

    made = wrapped(net, "b", classifier=Head, num_classes=7)
    assert made(torch.randn(3, 6)).shape == (3, 7)


class PartialNorm(FrozenStages):
    """As for videos: `train` leaves the first normalisation layer as it is and freezes the rest."""

    def __init__(self, enabled: bool) -> None:
        super().__init__(())
        self.enabled = enabled

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        layers = [module for module in self.modules() if isinstance(module, nn.BatchNorm1d)]
        for layer in layers[1:] if self.enabled and mode else ():
            layer.eval().requires_grad_(False)


def test_a_train_that_counts_modules_is_named_with_what_helps() -> None:
    told = r"\(checked in training mode\).*`PartialNorm` overrides, sets `b\.1` into another mode"
    with pytest.raises(SplitError, match=told) as refused:
        wrapped(PartialNorm(True), "b")
    assert "fork_at" not in str(refused.value)
    net = PartialNorm(True)
    net.train()
    net.enabled = False  # as the message says
    model = wrapped(net, "b", init="copy")
    for training in (False, True):
        model.train(training)
    layers = {n: m.training for n, m in model.named_modules() if isinstance(m, nn.BatchNorm1d)}
    assert layers == {"trunk.a.1": True, **{f"experts.{k}.b.1": False for k in range(3)}}
    wrapped(PartialNorm(True), "c")  # where no part begins at another layer


def test_other_differences_have_another_cause() -> None:
    net, same = PartialNorm(True), PartialNorm(True)
    net.train()
    same.train()
    assert other_modes(net, [same]) is None
    same.b.train()
    assert other_modes(net, [same]) is not None
    plain, part = nn.Sequential(nn.Dropout()), nn.Sequential(nn.Dropout())
    part.eval()
    assert other_modes(plain, [part]) is None  # nobody overrides `train`
