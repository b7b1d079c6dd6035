"""What is done to a stand-in, and would reach no layer, is told where the layer is."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ReplayError, RIDEWrapper, expert_logits

X = torch.randn(4, 8)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.early = nn.Linear(8, 16), nn.Dropout(0.0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(3))
        self.drop, self.fc = nn.Dropout(0.0), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(self.stem(x).relu())
        for block in self.blocks:
            x = block(x).relu()
        return self.fc(self.drop(x))


def wrapped() -> RIDEWrapper:
    return RIDEWrapper(Backbone(), 3, fork_at="blocks.1")


def hook(*_: Any) -> None:
    """Do nothing."""


DONE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "freezing": (
        lambda m: m.trunk.fc.requires_grad_(False),
        r"`model\.trunk\.fc\.requires_grad_\(False\)`.*`model\.experts\[k\]\.fc`.* for each k",
    ),
    "freezing in a list": (
        lambda m: m.trunk.blocks[2].requires_grad_(False),
        r"`model\.trunk\.blocks\[2\]\.req.*`model\.experts\[k\]\.blocks\[2\]`",
    ),
    "freezing the trunk's": (
        lambda m: m.experts[1].stem.requires_grad_(False),
        r"`model\.experts\[1\]\.stem\.requires_grad_\(False\)`.*`model\.trunk\.stem`\. Do it",
    ),
    "setting": (
        lambda m: setattr(m.trunk.drop, "p", 0.9),
        r"`model\.trunk\.drop\.p` was set.*`model\.experts\[k\]\.drop`",
    ),
    "setting the trunk's": (
        lambda m: setattr(m.experts[0].early, "p", 0.9),
        r"`model\.experts\[0\]\.early\.p` was set.*`model\.trunk\.early`",
    ),
    "a weight": (
        lambda m: setattr(m.trunk.fc, "weight", nn.Parameter(torch.zeros(5, 16))),
        r"`model\.trunk\.fc\.weight` was set",
    ),
    "what the class has": (
        lambda m: setattr(m.trunk.drop, "inplace", True),
        r"`model\.trunk\.drop\.inplace` was set",
    ),
    "a method": (
        lambda m: setattr(m.trunk.fc, "reset_parameters", hook),
        r"`model\.trunk\.fc\.reset_parameters` was set",
    ),
    "a forward hook": (
        lambda m: m.trunk.fc.register_forward_hook(hook),
        r"hook was registered on `model\.trunk\.fc`.*`model\.experts\[k\]\.fc`",
    ),
    "a forward pre-hook": (
        lambda m: m.experts[2].blocks[0].register_forward_pre_hook(hook),
        r"registered on `model\.experts\[2\]\.blocks\[0\]`.*`model\.trunk\.blocks\[0\]`",
    ),
    "a backward hook": (
        lambda m: m.trunk.fc.register_full_backward_hook(hook),
        r"hook was registered on `model\.trunk\.fc`",
    ),
    "a backward pre-hook": (
        lambda m: m.trunk.fc.register_full_backward_pre_hook(hook),
        r"hook was registered on `model\.trunk\.fc`",
    ),
    "another module": (
        lambda m: setattr(m.trunk, "fc", nn.Linear(16, 7)),
        r"`model\.trunk\.fc` was replaced or removed.*`model\.experts\[k\]\.fc`.*router_inputs",
    ),
    "another module in a list": (
        lambda m: m.trunk.blocks.__setitem__(1, nn.Identity()),
        r"`model\.trunk\.blocks\[1\]` was replaced or removed.*`model\.experts\[k\]\.blocks\[1\]`",
    ),
    "another list": (
        lambda m: setattr(m.trunk, "blocks", nn.ModuleList([m.trunk.blocks[0]])),
        r"`model\.trunk\.blocks` was replaced.*`model\.experts\[k\]\.blocks\[1\]`",
    ),
    "another module for the trunk's": (
        lambda m: setattr(m.experts[0], "stem", nn.Linear(8, 16)),
        r"`model\.experts\[0\]\.stem` was replaced or removed.*`model\.trunk\.stem`",
    ),
    "no module": (
        lambda m: delattr(m.trunk, "fc"),
        r"`model\.trunk\.fc` was replaced or removed",
    ),
}


@pytest.mark.parametrize("what", DONE)
def test_what_is_done_to_a_stand_in_is_told_where_the_layer_is(what: str) -> None:
    model = wrapped().eval()
    wanted, (do, message) = expert_logits(model(X)), DONE[what]
    do(model)
    with pytest.raises(ReplayError, match=message):
        model(X)
    torch.testing.assert_close(expert_logits(model(X)), wanted)


ASKED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a weight": (
        lambda m: nn.init.zeros_(m.trunk.fc.weight),
        r"`model\.trunk\.fc\.weight`.*3 of them.*`model\.experts\[k\]\.fc\.weight`.*_groups_by",
    ),
    "a method": (
        lambda m: m.trunk.fc.reset_parameters(),
        r"`model\.experts\[k\]\.fc\.reset_parameters`",
    ),
    "a part": (lambda m: m.trunk.late.inner.weight, r"`model\.experts\[k\]\.late\.inner`"),
    "an item": (
        lambda m: m.trunk.blocks[2][0].reset_parameters(),
        r"`model\.trunk\.blocks\[2\]\[0\]`.*`model\.experts\[k\]\.blocks\[2\]\[0\]`",
    ),
    "the state": (
        lambda m: m.trunk.fc.state_dict(),
        r"`model\.experts\[k\]\.fc\.state_dict\(\)`",
    ),
    "another state": (
        lambda m: m.trunk.fc.load_state_dict({}, strict=False),
        r"`model\.experts\[k\]\.fc\.load_state_dict\(\.\.\.\)`",
    ),
}


class Nested(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Sequential()
        self.late.inner = nn.Linear(16, 16)

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    def clear(self) -> None:
        for layer in (self.stem, self.fc):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(self.stem(x).relu())
        for block in self.blocks:
            x = block(x).relu()
        return self.fc(self.drop(self.late(x)))


def nested(num_experts: int = 3) -> RIDEWrapper:
    return RIDEWrapper(Nested(), num_experts, fork_at="blocks.1")


@pytest.mark.parametrize("what", ASKED)
@pytest.mark.parametrize("how", ["as it is", "deepcopy", "pickle"])
def test_who_asks_the_trunk_for_what_each_expert_has_is_told_so(what: str, how: str) -> None:
    model, (ask, message) = nested().eval(), ASKED[what]
    model = {"as it is": lambda m: m, "deepcopy": copy.deepcopy}.get(
        how, lambda m: pickle.loads(pickle.dumps(m))
    )(model)
    before = expert_logits(model(X))
    with pytest.raises(ReplayError, match=message):
        ask(model)
    torch.testing.assert_close(expert_logits(model(X)), before)
    assert model.trunk.fc.in_features == 16
    assert len(model.trunk.blocks[1]) == 1


def test_what_there_is_once_is_handed_out() -> None:
    model = nested(1)
    assert model.trunk.fc.weight is model.experts[0].fc.weight
    assert model.trunk.blocks[2][0] is model.experts[0].blocks[2][0]
    model.trunk.fc.load_state_dict(nn.Linear(16, 5).state_dict())
    assert list(model.trunk.fc.state_dict()) == ["weight", "bias"]
    model = nested()
    for expert in model.experts:
        assert expert.stem.weight is model.trunk.stem.weight
        assert list(expert.stem.state_dict()) == ["weight", "bias"]
    assert not [name for name in model.state_dict() if name.startswith("trunk.fc")]


def test_methods_of_the_backbone_may_be_called_on_every_part() -> None:
    model = nested()
    assert model.device == torch.device("cpu")
    for part in (model.trunk, *model.experts):
        part.clear()
    for layer in (model.trunk.stem, *model.classifiers):
        assert not layer.weight.any()


@pytest.mark.parametrize("part", ["all", "trunk"])
def test_loops_that_ask_every_module_pass_by_stand_ins(part: str) -> None:
    model = nested()

    def clear(module: nn.Module) -> None:
        if hasattr(module, "weight"):
            nn.init.zeros_(module.weight)
        if hasattr(module, "reset_running_stats"):
            module.reset_running_stats()

    root = model if part == "all" else model.trunk
    root.apply(clear)
    for module in root.modules():
        clear(module)
    assert not model.trunk.stem.weight.any()
    for expert in model.experts:
        assert bool(expert.fc.weight.any()) is (part == "trunk")


def test_a_question_to_one_stand_in_is_answered_with_a_warning() -> None:
    model = nested()
    with pytest.warns(UserWarning, match=r"is no\. `model\.trunk\.fc\.bias`") as told:
        assert getattr(model.trunk.fc, "bias", None) is None
    assert told[0].filename == __file__
    assert not hasattr(model.trunk.fc, "nothing")


@pytest.mark.parametrize("call", ["run_trunk", "router_inputs"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_tell_it_as_well_and_so_does_every_pass_of_the_trunk(how: str, call: str) -> None:
    for before in (True, False):
        model = wrapped()
        if before:
            model.trunk.drop.p = 0.9
        model = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        if not before:
            model.trunk.drop.p = 0.9
        with pytest.raises(ReplayError, match=r"`model\.trunk\.drop\.p` was set"):
            getattr(model, call)(X)


def test_what_is_done_to_the_layers_as_well_is_in_order() -> None:
    model = wrapped()
    for part in (model.trunk, *model.experts):
        part.drop.p = 0.25
        for block in part.blocks:
            block.requires_grad_(False)
        part.fc.register_forward_hook(hook)
    model.experts[0], model.experts[2] = model.experts[2], model.experts[0]
    model(X)
    assert [expert.drop.p for expert in model.experts] == [0.25] * 3
    assert not any(p.requires_grad for e in model.experts for p in e.blocks.parameters())


MODULES: dict[str, Callable[[nn.Module], Any]] = {
    "as they come": lambda root: root.modules(),
    "in a list": lambda root: list(root.modules()),
    "by name": lambda root: dict(root.named_modules()).values(),
}


@pytest.mark.parametrize("way", MODULES)
def test_loops_over_all_modules_come_by_stand_ins(way: str) -> None:
    model = wrapped()
    for module in MODULES[way](model):
        sum(parameter.numel() for parameter in module.parameters())
        module.requires_grad_(False)
        if hasattr(module, "p"):
            module.p = 0.5
        module.register_full_backward_hook(hook)
        module.register_forward_hook(hook)
        module.mark = id(module)  # each its own, which the next loop changes
    for module in MODULES[way](model):
        module.mark = id(module), 2
    with torch.no_grad():  # with gradients a model of which nothing trains is warned of
        model(X)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_loop_may_mean_one_part_alone() -> None:
    model = wrapped()

    def change(module: nn.Module) -> None:
        module.requires_grad_(False)
        module.register_forward_pre_hook(hook)
        if hasattr(module, "p"):
            module.p = 0.5

    model.trunk.apply(change)
    for module in model.trunk.modules():
        change(module)
    for module in model.experts[1].modules():
        change(module)
    model(X)
    assert [p.requires_grad for p in model.trunk.parameters()] == [False] * 4
    assert all(p.requires_grad for p in model.experts[0].parameters())
    assert model.trunk.early.p == 0.5
    assert [expert.drop.p for expert in model.experts] == [0, 0.5, 0]


def test_who_freezes_a_part_child_by_child_may_mean_the_part() -> None:
    model = wrapped()
    for child in model.trunk.children():
        child.requires_grad_(False)
    for block in model.trunk.blocks:
        block.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"fc\.requires_grad_\(False\)`.*And 2 more") as told:
        model(X).sum().backward()
    assert told[0].filename == __file__
    model(X)
    assert all(p.grad is None for p in model.trunk.parameters())
    assert all(p.grad is not None for p in model.experts[1].parameters())


def test_everything_may_be_frozen_and_the_heads_trained() -> None:
    for way, modules in MODULES.items():
        model = wrapped()
        for module in modules(model):
            module.requires_grad_(False)
        for head in model.classifiers:
            head.requires_grad_(True)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if way == "as they come" else "ignore")
            model(X).sum().backward()
        assert sum(p.grad is not None for p in model.parameters()) == 6


def test_whole_parts_are_set_as_before() -> None:
    model = wrapped()
    for part in (model, model.trunk, model.experts[0], *model.trunk.children()):
        part.train().eval().to(torch.float64).float()
    model.trunk.requires_grad_(False)
    model.experts[1].requires_grad_(False).apply(lambda module: module.zero_grad())
    model.requires_grad_(True)
    model.trunk.fc.train()
    model(X)


def test_something_may_be_put_around_a_stand_in_and_a_hook_taken_back() -> None:
    model = wrapped().eval()
    wanted = expert_logits(model(X))
    for part in (model.trunk, *model.experts):
        part.fc, part.stem = nn.Sequential(part.fc), nn.Sequential(part.stem)
        part.blocks = nn.ModuleList(part.blocks)
    model.trunk.drop.register_forward_hook(hook).remove()
    for _ in range(2):
        torch.testing.assert_close(expert_logits(model(X)), wanted)


class SetsInPass(Backbone):
    """Sets attributes of its submodules, and freezes one, in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        self.early.p = self.drop.p = 0.0
        self.fc.requires_grad_(True)
        return super().forward(x)


def test_a_forward_sets_what_it_likes() -> None:
    model = RIDEWrapper(SetsInPass(), 3, fork_at="blocks.1")
    for _ in range(2):
        model(X)


def test_hooks_of_the_trunk_that_never_run_are_warned_of_once() -> None:
    for register in ("register_forward_hook", "register_full_backward_hook"):
        model = wrapped()
        ran: list[int] = []
        getattr(model.trunk, register)(lambda *_, ran=ran: ran.append(1))
        with pytest.warns(UserWarning, match=r"on `model\.trunk` .* never run") as told:
            model(X).sum().backward()
        assert told[0].filename == __file__
        model(X)
        assert not ran


def test_hooks_of_the_trunk_that_run_and_those_of_every_module_are_not_warned_of() -> None:
    model, ran = wrapped(), list[int]()
    model.trunk.register_forward_pre_hook(lambda *_: ran.append(1))
    model.trunk.register_forward_hook(lambda *_: ran.append(2), always_call=True)
    model(X)
    assert ran == [1, 2]
    alone = RIDEWrapper(Backbone(), 1, fork_at="blocks.1")
    alone.trunk.register_forward_hook(lambda *_: ran.append(3))
    alone(X)
    assert ran == [1, 2, 3]
    every = wrapped()
    for module in every.modules():
        module.register_forward_hook(hook)
    every(X)
