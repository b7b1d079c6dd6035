"""What is changed in a value that was read through the model, of which each part has its own."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ReplayError, RIDEWrapper, expert_logits

X = torch.randn(4, 8)


LOCK = threading.Lock()


class Guarded:
    """Cannot be settings: nobody knows what is in a lock."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.lock = scale, LOCK

    def __deepcopy__(self, memo: dict[int, Any]) -> Guarded:
        return Guarded(self.scale)


class Weighted:
    def __init__(self) -> None:
        self.scale, self.weight = 1.0, torch.ones(5, requires_grad=True)


class Flagged(nn.Module):
    """Reads before the fork and behind it what somebody may put into its containers."""

    def __init__(self, settings: Any = None) -> None:
        super().__init__()
        self.early, self.late, self.fc = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.flags, self.steps, self.settings = dict[str, float](), list[float](), settings
        self.kept, self.keeps = list[Tensor](), False

    def scale(self) -> float:
        scale = self.flags.get("scale", 1.0) * (1.0 + sum(self.steps))
        return scale * getattr(self.settings, "scale", 1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.late(self.early(x).relu() * self.scale())
        if self.keeps:
            self.kept.append(x)
        return self.fc(x.relu()) * self.scale()


def wanted(model: RIDEWrapper, change: Any) -> Tensor:
    plain = [model.to_module(k) for k in range(model.num_experts)]
    for module in plain:
        change(module)
    return torch.stack([module(X) for module in plain], dim=1)


@pytest.mark.parametrize("how", ["model", "state", "router_inputs", "expert"])
def test_what_is_put_into_an_empty_container_reaches_every_part(how: str) -> None:
    model = RIDEWrapper(Flagged(), 3, fork_at="late").eval()

    def change(module: Any) -> None:
        module.flags["scale"] = 3.0
        module.flags["more"] = 1.0
        module.steps.append(2.0)

    expected = wanted(model, change)
    model(X)
    change(model)
    if how == "model":
        each = expert_logits(model(X))
    elif how == "state":
        each = expert_logits(model(model.run_trunk(X)))
    elif how == "router_inputs":
        each = model.router_inputs(X).expert_logits
    else:
        state = model.run_trunk(X)
        each = torch.stack([model.run_expert(k, state)[0] for k in range(3)], dim=1)
    torch.testing.assert_close(each, expected)
    model.flags["scale"] = 1.0  # all hold one object from there on
    model.steps.clear()
    torch.testing.assert_close(expert_logits(model(X)), wanted(model, lambda module: None))


def test_an_object_that_is_copied_reaches_every_part_once_it_is_changed() -> None:
    model = RIDEWrapper(Flagged(Guarded()), 2, fork_at="late").eval()
    assert model.trunk.settings is not model.experts[1].settings
    expected = wanted(model, lambda module: setattr(module.settings, "scale", 3.0))
    model.settings.scale = 3.0
    torch.testing.assert_close(expert_logits(model(X)), expected)
    assert model.trunk.settings is model.experts[1].settings


def test_what_each_part_has_of_its_own_is_warned_of_once_it_is_changed() -> None:
    model = RIDEWrapper(Flagged(Weighted()), 2, fork_at="late").eval()
    assert model.settings.scale == 1.0
    model(X)  # who only reads is not warned
    model.settings.scale = 3.0
    with pytest.warns(UserWarning, match=r"Change `model\.experts\[k\]\.settings` as well") as told:
        model(X)
    assert told[0].filename == __file__
    for part in (model.trunk, *model.experts):
        part.settings.scale = 2.0
    assert model.settings.scale == 2.0
    model(X)


def test_what_a_forward_collects_stays_each_part_s_own() -> None:
    model = RIDEWrapper(Flagged(), 2, fork_at="late").eval()
    assert model.kept == []
    model.keeps = True
    for _ in range(2):
        model(X)
    assert [len(part.kept) for part in model.experts] == [2, 2]
    model.kept.clear()  # the trunk's, which no forward has filled
    model(X)


def test_what_is_common_since_then_must_not_be_written_by_a_forward() -> None:
    model = RIDEWrapper(Flagged(), 2, fork_at="late").eval()
    model.kept.append(X)
    model(X)
    model.keeps = True
    with pytest.raises(ReplayError, match="has changed `kept`"):
        model(X)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_follows_what_is_changed_before_and_after(how: str) -> None:
    model = RIDEWrapper(Flagged(), 2, fork_at="late").eval()
    model.flags["scale"] = 3.0
    model.steps.append(1.5)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    other.steps.append(2.5)
    for one in (other, model):
        expected = wanted(one, lambda module: None)
        assert one.to_module(1).flags == {"scale": 3.0}
        torch.testing.assert_close(expert_logits(one(X)), expected)
    assert len(model.experts[1].steps) == 1
    assert len(other.experts[1].steps) == 2


def test_an_attribute_that_was_replaced_is_forgotten() -> None:
    model = RIDEWrapper(Flagged(), 2, fork_at="late").eval()
    old = model.flags
    model.flags = {"scale": 2.0}
    old["scale"] = 5.0
    expected = wanted(model, lambda module: None)
    torch.testing.assert_close(expert_logits(model(X)), expected)
    assert all(part.flags == {"scale": 2.0} for part in (model.trunk, *model.experts))
