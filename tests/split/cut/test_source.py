"""Backbones whose forward registers hooks at its first call and computes with what they collect."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper, SplitError, expert_logits

X = torch.rand(3, 8)
_collecting: list[list[Tensor]] = []  # as transformers does, outside of any module


def _collect(module: nn.Module, args: Any, output: Tensor) -> None:
    _collecting[-1].append(output)


class _Encoder(nn.Module):
    """A weighted sum of what its layers return; one flag, or handles, tell that hooks are there."""

    def __init__(self, handles: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.weights = nn.Parameter(torch.randn(3))
        self.handles: list[Any] | None = [] if handles else None
        self.has_hooks = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.has_hooks and not self.handles:
            handles = [layer.register_forward_hook(_collect) for layer in self.layers]
            if self.handles is None:
                self.has_hooks = True
            else:
                self.handles += handles
        _collecting.append([])
        try:
            for layer in self.layers:
                x = x + layer(x)
        finally:
            collected = _collecting.pop()
        return (torch.stack(collected) * self.weights.view(-1, 1, 1)).sum(0)


class _Net(nn.Module):
    def __init__(self, handles: bool = False) -> None:
        super().__init__()
        self.stem, self.encoder, self.fc = nn.Linear(8, 8), _Encoder(handles), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(self.stem(x)))


@pytest.mark.parametrize("handles", [False, True])
@pytest.mark.parametrize("fork_at", ["encoder", "encoder.layers.0", "fc"])
@pytest.mark.parametrize("num_experts", [1, 2])
def test_hooks_that_the_first_call_registers_stand_once_on_every_part(
    handles: bool, fork_at: str, num_experts: int
) -> None:
    net = _Net(handles)
    model = RIDEWrapper(
        net, num_experts, fork_at=fork_at, example_input=X, checkpoint_experts=True
    ).train()
    assert not any(module._forward_hooks for module in net.modules())
    states = [model.to_module(k).state_dict() for k in range(num_experts)]
    for _ in range(2):
        logits = expert_logits(model(X))
        model.zero_grad()
        logits.square().sum().backward()
        for k, state in enumerate(states):
            plain = copy.deepcopy(net)
            plain.load_state_dict(state)
            expected = plain(X)
            torch.testing.assert_close(logits[:, k], expected)
            expected.square().sum().backward()
            torch.testing.assert_close(model.classifiers[k].weight.grad, plain.fc.weight.grad)


def test_a_fork_between_modules_whose_results_are_collected_names_the_first_of_them() -> None:
    with pytest.raises(SplitError, match=r"pass `fork_at='encoder\.layers\.0'`"):
        RIDEWrapper(_Net(), 2, fork_at="encoder.layers.1", example_input=X)


class _Bound(nn.Module):
    """Its hooks captured the module itself, so that each part has to register its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.late = nn.Linear(8, 8), nn.Linear(8, 8)
        self.fc = nn.Linear(8, 5)
        self.seen: dict[str, Tensor] = {}
        self.has_hooks = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.has_hooks:
            self.late.register_forward_hook(lambda m, args, out: self.seen.update(late=out))
            self.has_hooks = True
        x = torch.relu(self.late(torch.relu(self.body(x))))
        return self.fc(x + self.seen["late"])


def test_hooks_that_captured_the_module_are_registered_by_each_part() -> None:
    model = RIDEWrapper(_Bound(), 2, fork_at="late", example_input=X).eval()
    expected = [module(X) for module in model.to_modules()]
    torch.testing.assert_close(expert_logits(model(X)), torch.stack(expected, dim=1))
