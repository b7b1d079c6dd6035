"""What a training code sets in a configuration that it shares with the model reaches every part."""

from __future__ import annotations

import argparse
import copy
import functools
import pickle
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ReplayError, RIDEWrapper, expert_logits
from ride_plugin._split._copying._settings import contents_in, contents_of, unchanged

X = torch.randn(6, 8)
COUNTS = np.array([9, 5, 1])


@dataclass
class Options:
    scale: float = 1.0
    nested: dict[str, list[int]] = field(default_factory=lambda: {"depths": [2, 2]})


@dataclass(slots=True)
class Slots:
    scale: float = 1.0
    depths: list[int] = field(default_factory=lambda: [2, 2])


class Pickled(Slots):
    """Has both kinds of state, and says what of it is pickled, as classes of attrs do."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "run"

    def __getstate__(self) -> tuple[float, list[int], str]:
        return self.scale, self.depths, self.name

    def __setstate__(self, state: tuple[float, list[int], str]) -> None:
        self.scale, self.depths, self.name = state


class Prior:
    """What a loss or a forward is told of the data."""

    def __init__(self) -> None:
        self.scale, self.prior, self.counts = 1.0, torch.zeros(5), COUNTS


class Configuration(dict[str, Any]):
    """As yacs and easydict have them: a dictionary whose entries are attributes."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class Late(nn.Module):
    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings, self.linear = settings, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu() * scale_of(self.settings)


class Backbone(nn.Module):
    """Reads its settings before the fork, in a submodule after it and in its own late part."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self.early, self.late, self.fc = nn.Linear(8, 16), Late(settings), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(x) * scale_of(self.settings)
        return self.fc(self.late(x)) * scale_of(self.settings)


def scale_of(settings: Any) -> float:
    if isinstance(settings, list):
        return float(settings[0])
    return float(settings["scale"] if isinstance(settings, dict) else settings.scale)


def set_scale(settings: Any, value: float) -> None:
    if isinstance(settings, list):
        settings[0] = value
    elif isinstance(settings, dict):
        settings["scale"] = value
    else:
        settings.scale = value


MADE = {
    "a namespace": lambda: SimpleNamespace(scale=1.0, name="run", epoch=0),
    "arguments": lambda: argparse.Namespace(
        scale=1.0, lr=[0.1, 0.01], device=torch.device("cpu"), weight=torch.ones(5), counts=COUNTS
    ),
    "a dataclass": Options,
    "an object with slots": Slots,
    "slots and attributes": Pickled,
    "an object with a tensor": Prior,
    "a dictionary": lambda: {"scale": 1.0, "nested": {"a": (1, 2)}},
    "a dictionary with attributes": lambda: Configuration(scale=1.0),
    "a list": lambda: [1.0, 2.0],
}


@pytest.mark.parametrize("kind", MADE)
def test_what_is_set_in_settings_reaches_trunk_and_experts(kind: str) -> None:
    settings = MADE[kind]()
    backbone = Backbone(settings)
    model = RIDEWrapper(backbone, 3, fork_at="late").eval()
    plain = [model.to_module(k) for k in range(3)]
    for module in plain:
        set_scale(module.settings, 3.0)
    wanted = torch.stack([module(X) for module in plain], dim=1)
    assert scale_of(settings) == 1  # a plain module has its own
    set_scale(settings, 3.0)
    torch.testing.assert_close(expert_logits(model(X)), wanted)
    assert model.settings is settings


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_settings_of_its_own_that_are_one_in_all_parts(how: str) -> None:
    settings = SimpleNamespace(scale=1.0)
    model = RIDEWrapper(Backbone(settings), 2, fork_at="late").eval()
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    held = {id(m.settings) for m in copied.modules() if "settings" in vars(m)}
    assert len(held) == 1
    assert id(settings) not in held


def test_experts_of_a_factory_and_of_parts_hold_the_settings_that_they_were_given() -> None:
    settings = SimpleNamespace(scale=1.0)
    made = RIDEWrapper(
        Backbone(settings), 2, fork_at="late", expert_factory=lambda k: Backbone(settings)
    )
    parts = RIDEWrapper.from_parts(
        nn.Sequential(nn.Linear(8, 16), Late(settings)),
        lambda k: nn.Sequential(Late(settings), nn.Linear(16, 5)),
        num_experts=2,
        example_input=X,
    )
    for model in (made.eval(), parts.eval()):
        held = {id(m.settings) for m in model.modules() if "settings" in vars(m)}
        assert held == {id(settings)}


class Counts(Backbone):
    """Writes into what looks like settings."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if isinstance(self.settings.calls, int):
            self.settings.calls = self.settings.calls + 1
        else:
            self.settings.calls += 1
        return out


@pytest.mark.parametrize("made", [SimpleNamespace, Prior])
@pytest.mark.parametrize("kind", ["number", "tensor", "array", "stream"])
def test_what_a_forward_writes_is_no_settings_and_stays_each_part_s_own(
    kind: str, made: type[Any]
) -> None:
    calls = {"tensor": torch.zeros(1), "array": np.zeros(1)}.get(kind, 0)
    settings = made()
    settings.scale, settings.calls = 1.0, calls
    if kind == "stream":
        settings.stream = np.random.default_rng(0)
    backbone = Backbone(settings) if kind == "stream" else Counts(settings)
    model = RIDEWrapper(backbone, 3, fork_at="late").eval()
    model(X)
    assert settings.calls == 0
    held = [part.settings for part in (model.trunk, *model.experts)]
    assert len({id(one) for one in held}) == 4


@pytest.mark.parametrize("made", [SimpleNamespace, Prior])
@pytest.mark.parametrize("which", ["layer", "buffer", "weight", "with gradients"])
def test_what_belongs_to_modules_or_trains_is_no_settings(which: str, made: type[Any]) -> None:
    settings = made()
    settings.scale = 1.0
    backbone = Backbone(settings)
    backbone.fc.requires_grad_(False)
    backbone.register_buffer("table", torch.zeros(5))
    backbone.settings.held = {
        "layer": backbone.fc,
        "buffer": backbone.table,
        "weight": backbone.fc.weight,
        "with gradients": torch.zeros(1, requires_grad=True),
    }[which]
    model = RIDEWrapper(backbone, 2, fork_at="late")
    is_common = model.trunk.settings is settings
    assert is_common is (which == "with gradients" and made is SimpleNamespace)  # takes anything


class AfterWarmUp(Backbone):
    """Changes its settings in training, once its warm-up is over."""

    warm = True

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.warm:
            set_scale(self.settings, scale_of(self.settings) + 1)
        return super().forward(x)


@pytest.mark.parametrize("checkpoint_experts", [False, True])
@pytest.mark.parametrize("kind", MADE)
def test_settings_that_a_forward_begins_to_change_are_refused(
    kind: str, checkpoint_experts: bool
) -> None:
    model = RIDEWrapper(
        AfterWarmUp(MADE[kind]()), 3, fork_at="late", checkpoint_experts=checkpoint_experts
    )
    model.train()
    for epoch in range(3):
        set_scale(model.settings, epoch + 1.0)  # a loop may, between passes
        model(X)
    model.eval()
    model.warm = False
    model(X)
    model.train()
    with pytest.raises(ReplayError, match=r"has changed `settings`.*in a buffer or an attribute"):
        model(X)


class CountsInSettings(AfterWarmUp):
    def forward(self, x: Tensor) -> Tensor:
        if not self.warm:
            self.settings.prior += 1
        return super().forward(x)


def test_a_tensor_in_settings_that_a_forward_begins_to_write_is_refused() -> None:
    model = RIDEWrapper(CountsInSettings(Prior()), 3, fork_at="late").eval()
    model.settings.prior += 1  # a loop may, between passes
    model(X)
    model.warm = False
    with pytest.raises(ReplayError, match=r"has changed `settings`"):
        model(X)


class CountsAfterWarmUp(nn.Sequential):
    warm = False

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5))
        self.state = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.warm:
            self.state["calls"] += 1
        return super().forward(x) * (1 + self.state["calls"])


def test_what_a_forward_writes_when_the_model_is_wrapped_is_each_part_s_own() -> None:
    backbone = CountsAfterWarmUp()  # in the state that the error advises
    model = RIDEWrapper(backbone, 3, fork_at="1").train()
    model(X)
    model(X)
    parts = (model.trunk, *model.experts[1:])  # the trunk's pass goes on into the first expert
    assert [part.state["calls"] for part in parts] == [2] * 3
    assert backbone.state == {"calls": 0}


class Filling(Backbone):
    """Fills in a name in its first training pass, as transformers do with labels."""

    def forward(self, x: Tensor) -> Tensor:
        if self.settings.filled and self.settings.kind is None:
            self.settings.kind = "single_label"
        return super().forward(x)


def test_a_name_may_be_filled_in_and_a_generator_drawn_from_and_large_arrays_are_not_read() -> None:
    settings = SimpleNamespace(scale=1.0, kind=None, filled=False)
    model = RIDEWrapper(Filling(settings), 3, fork_at="late").train()
    settings.filled = True
    settings.generator, settings.data = torch.Generator(), np.zeros(10_000)
    model(X)
    assert settings.kind == "single_label"
    settings.counts = torch.zeros(1)
    with pytest.raises(ReplayError), unchanged({"settings": settings}):
        settings.counts += 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_watch_their_own_settings(how: str) -> None:
    model = RIDEWrapper(AfterWarmUp({"scale": 1.0}), 3, fork_at="late").train()
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    copied.warm = False
    with pytest.raises(ReplayError, match="has changed `settings`"):
        copied(X)
    model(X)
    assert scale_of(model.settings) == 1.0


def test_one_expert_changes_settings_as_the_backbone_does() -> None:
    model = RIDEWrapper(AfterWarmUp({"scale": 1.0}), 1, fork_at="late").train()
    model.warm = False
    model(X)
    model(X)
    assert scale_of(model.settings) == 3.0


class Adapted(nn.Module):
    """A layer with a dictionary of its own, which a method of it writes, as adapters have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scaling = nn.Linear(16, 16), {"default": 1.0}

    def scale_by(self, factor: float) -> None:
        self.scaling["default"] *= factor

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scaling["default"]


def test_a_dictionary_of_one_layer_alone_is_its_own_in_each_expert() -> None:
    net = nn.Sequential(nn.Linear(8, 16), Adapted(), nn.Linear(16, 5))
    model = RIDEWrapper(net, 3, fork_at="1").eval()
    for module in model.modules():
        if isinstance(module, Adapted):
            module.scale_by(2.0)
    assert [expert[1].scaling["default"] for expert in model.experts] == [2.0] * 3
    assert net[1].scaling["default"] == 1.0


def test_contents_differ_once_something_inside_is_changed() -> None:
    inner = SimpleNamespace(a=[1, {2}], b={"c": (3, None)})
    value = {"x": inner, "again": inner, "kind": torch.float32}
    before = contents_of(value)
    assert contents_of(value) == before
    inner.b["c"] = (3, 4)
    assert contents_of(value) not in (None, before)
    inner.b["c"] = (3, None)
    assert contents_of(value) == before
    inner.itself = inner
    assert contents_of(value) not in (None, before)


def test_contents_are_those_of_slots_too() -> None:
    class Secret:
        __slots__ = ("__inside", "unset")

        def __init__(self, inside: Any) -> None:
            self.__inside = inside

    assert contents_of(Secret(1)) == contents_of(Secret(1))
    assert contents_of(Secret(1)) != contents_of(Secret(2))
    assert contents_of(Secret(threading.Lock())) is None


@pytest.mark.parametrize(
    "value",
    [
        {"a": torch.zeros(1)},
        Options(scale=nn.Linear(1, 1)),  # type: ignore[arg-type]
        [functools.partial(print)],
        {"lock": threading.Lock()},
        [nn.Linear(1, 1).forward],
        list(range(20_000)) + [[] for _ in range(20_000)],
        {},
        [],
        (1, 2),
        "text",
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_settings(value: Any) -> None:
    module = nn.Linear(2, 2)
    module.value = value  # of the root, where a dictionary would do
    assert contents_in(module) == {}
