"""What is equal in all experts at the start is named, and nothing else."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper, expert_logits
from ride_plugin._apart import warn_if_equal


class Head(nn.Module):
    """A classifier whose own method sets a weight that is always the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(8, 16)), nn.Parameter(torch.empty(8))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.eye_(self.weight)
        nn.init.normal_(self.bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def layers(head: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), head)


def test_a_classifier_that_its_own_method_makes_equal_is_named() -> None:
    with pytest.warns(UserWarning, match=r"equal in all experts: \['4\.weight'\]") as caught:
        RIDEWrapper(layers(Head()), 2, fork_at="2", init="copy")
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_parameter_is_named_once() -> None:
    with pytest.warns(UserWarning, match=r"seem to have their places.*'4\.weight'") as caught:
        RIDEWrapper(layers(Head()), 2, fork_at="2")
    assert len(caught) == 1


class Quiet(nn.Module):
    """Everything that may be equal: constants, one entry, two entries, signs, frozen, shared."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late, self.norm = nn.Linear(8, 16), nn.Linear(16, 16), nn.LayerNorm(16)
        self.scale = nn.Parameter(1e-4 * torch.ones(16))
        self.temperature, self.pair = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(2))
        self.signs = nn.Parameter(torch.tensor([1.0, -1.0, 1.0, 1.0]))
        self.fixed = nn.Parameter(torch.randn(16), requires_grad=False)
        self.fc = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.relu(self.late(torch.relu(self.early(x))))) * self.scale + self.fixed
        return self.fc(x) * self.temperature * self.signs.sum() + self.pair


@pytest.mark.parametrize("init", ["fresh", "copy"])
@pytest.mark.parametrize("num_experts", [1, 3])
def test_what_may_be_equal_is_not_named(init: Any, num_experts: int) -> None:
    for seed in range(4):  # the entries of a pair come out in one order every second time
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            RIDEWrapper(Quiet(), num_experts, fork_at="late", init=init)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_many_entries_in_one_order_are_no_chance(dtype: torch.dtype) -> None:
    first, second = (nn.ParameterDict({"w": torch.arange(16).to(dtype)}) for _ in range(2))
    with pytest.warns(UserWarning, match=r"\['w'\]"):
        warn_if_equal([first, second], set(), "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_equal([first, second], {id(first["w"])}, "")
        warn_if_equal([first, second], set(), "", ["w"])
        warn_if_equal([first], set(), "")


class ClassWeights(nn.Module):
    """Class weights that no module uses: angles, distances to prototypes, or the trunk's table."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.early, self.late, self.kind = nn.Linear(8, 16), nn.Linear(16, 16), kind
        self.weight = nn.Parameter(torch.randn(5, 16))
        if kind == "frozen":
            self.fc = nn.Linear(16, 5).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.late(self.early(x).relu()).relu()
        if self.kind == "prototypes":
            return -torch.cdist(h, self.weight)
        if self.kind == "frozen":
            return self.fc(h)
        return nn.functional.linear(h, nn.functional.normalize(self.weight))


@pytest.mark.parametrize("kind", ["angles", "prototypes", "frozen"])
def test_copies_in_which_nothing_was_drawn_anew_are_told_when_wrapping(kind: str) -> None:
    hint = "" if kind == "frozen" else r" \(perhaps `weight`\)"
    said = r"init=\"copy\" draws the classifier anew.*in each of `model.experts\[k\]`" + hint
    with pytest.warns(UserWarning, match=said) as caught:
        model = RIDEWrapper(ClassWeights(kind), 2, fork_at="late", init="copy")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    x = torch.randn(3, 8)
    assert torch.equal(*expert_logits(model(x)).unbind(1))
    with torch.no_grad():
        model.experts[1].late.weight.normal_()  # something anew: their gradients differ
    assert not torch.equal(*expert_logits(model(x)).unbind(1))


@pytest.mark.parametrize("init", ["fresh", "copy"])
def test_experts_that_differ_or_are_one_are_not_told_of(init: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RIDEWrapper(ClassWeights("angles"), 1, fork_at="late", init=init)
        RIDEWrapper(layers(nn.Linear(16, 5)), 2, fork_at="2", init=init)
