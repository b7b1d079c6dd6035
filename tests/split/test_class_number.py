"""New classifiers for another number of classes: what a network made for that number says."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ReplayError, RIDEWrapper, expert_logits


class Config:
    """Keeps names for the classes, as configurations of transformers do."""

    def __init__(self, number: int) -> None:
        self.num_labels = number

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, number: int) -> None:
        self.id2label = {k: f"LABEL_{k}" for k in range(number)}


class Body(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.num_classes = config, 5  # something of its own that is five as well
        self.early, self.late = nn.Linear(8, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.early(x).relu()).relu()


class Network(nn.Module):
    num_labels = 5

    def __init__(self, number: int, config: Any) -> None:
        super().__init__()
        self.config, self.num_classes = config, number
        self.body, self.fc = Body(config), nn.Linear(16, number)

    @property
    def of_config(self) -> int:
        return int(self.config.num_labels)

    def reset_classifier(self, number: int) -> None:
        raise AssertionError("must not be called")

    def forward(self, x: Tensor) -> Tensor:
        logits = self.fc(self.body(x)).view(-1, self.num_classes)
        return logits + torch.arange(logits.shape[1]) / self.config.num_labels


class Around(nn.Module):
    """Answers for the network in it, as adapters do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


@pytest.mark.parametrize("when", ["at once", "later"])
@pytest.mark.parametrize("around", [False, True])
def test_parts_are_as_a_network_that_was_made_for_the_number(when: str, around: bool) -> None:
    backbone = Network(5, Config(5))
    given = Around(backbone) if around else backbone
    fork_at = "network.body.late" if around else "body.late"
    number = 9 if when == "at once" else None
    model = RIDEWrapper(given, 2, fork_at=fork_at, num_classes=number)
    if number is None:
        model.reset_classifier(9)
    x = torch.randn(3, 8)
    out = expert_logits(model(x))
    for k, plain in enumerate(model.to_modules()):
        made = Network(9, Config(9))
        own = plain.network if around else plain
        made.load_state_dict(own.state_dict())
        torch.testing.assert_close(out[:, k], made(x))
        assert own.num_classes == own.num_labels == own.of_config == 9
        assert own.config.id2label == made.config.id2label
        assert own.body.config is own.config
        assert own.body.num_classes == 5
        assert ("num_classes" in vars(plain)) is not around
    parts = [model.trunk, *model.experts]
    inner = [part.network if around else part for part in parts]
    assert len({id(part.config) for part in inner}) == 1
    assert backbone.config.num_labels == backbone.num_classes == 5
    assert model.config.num_labels == 9


class Writes(Network):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.fc(self.body(x))
        if x.shape[0] == 7:
            self.config.calls += 1
        return logits


def test_settings_of_the_parts_are_watched_as_those_of_the_backbone_were() -> None:
    model = RIDEWrapper(Writes(5, SimpleNamespace(num_labels=5, calls=0)), 2, fork_at="body.late")
    model.reset_classifier(9)
    with pytest.raises(ReplayError, match="has changed `config`"):
        model(torch.randn(7, 8))


@dataclass(frozen=True)
class Frozen:
    num_labels: int = 5


class Fixed(Network):
    @property
    def num_labels(self) -> int:  # type: ignore[override]
        return 5


def test_what_cannot_be_set_is_named() -> None:
    said = r"`config.num_labels`, `num_labels` of the backbone still says 5 classes"
    with pytest.warns(UserWarning, match=said):
        RIDEWrapper(Fixed(5, Frozen()), 2, fork_at="body.late", num_classes=9)
    settings = SimpleNamespace(num_labels=5)
    RIDEWrapper(Fixed(5, settings), 2, fork_at="body.late", num_classes=5)
    assert settings.num_labels == 5


class Kind:
    num_labels = 5


def test_a_class_of_settings_is_left_as_it_is() -> None:
    with pytest.warns(UserWarning, match="`config` of the backbone"):
        RIDEWrapper(Network(5, Kind), 2, fork_at="body.late", num_classes=9)
    assert Kind.num_labels == 5
