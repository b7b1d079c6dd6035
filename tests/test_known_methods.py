"""Methods of backbones that name parameters, asked of a wrapped model."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper


class Net(nn.Module):
    """Blocks with a scale each, as timm's transformers have tables of positions in each."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(8))
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        for block in self.blocks:
            block.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token
        for block in self.blocks:
            x = x + torch.relu(block(x)) * block.scale
        return self.head(x)


class Walks(Net):
    """Chooses of its own parameters: timm's Swin, BEiT, MaxViT; LeViT of its state dict."""

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if "scale" in name}

    def no_weight_decay_keywords(self) -> Any:
        return {name.rsplit(".", 1)[-1]: 1 for name in self.state_dict() if "blocks.3.s" in name}


class Fixed(Net):
    """Names that it may have or not: timm's vision transformers."""

    def no_weight_decay(self) -> set[str]:
        return {"token", "blocks.2.scale", "blocks.3.scale", "dist_token"}


class Patterns(Net):
    """Names with wildcards: timm's XCiT."""

    def no_weight_decay(self) -> set[str]:
        return {"blocks.*.scale", "token"}


class PartsOfNames(Net):
    """What names contain: SlowFast's MViT."""

    def no_weight_decay(self) -> list[str]:
        return ["scale", "token"]


READINGS: dict[str, Callable[[str, Collection[str]], bool]] = {
    "whole names": lambda name, skip: name in skip,
    "patterns": lambda name, skip: any(fnmatch.fnmatch(name, entry) for entry in skip),
    "parts of names": lambda name, skip: any(entry in name for entry in skip),
}


def own_name(name: str) -> str:
    """The backbone's name of a parameter, of the wrapped model's."""
    return re.sub(r"^(trunk|experts\.\d+)\.", "", name)


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
@pytest.mark.parametrize("kind", [Walks, Fixed, Patterns, PartsOfNames])
def test_weight_decay_spares_the_parameters_that_it_spares_in_the_backbone(
    kind: Any, read: Callable[[str, Collection[str]], bool]
) -> None:
    backbone = kind()
    model = RIDEWrapper(backbone, 2, fork_at="blocks.2")
    spared, plain = model.no_weight_decay(), backbone.no_weight_decay()
    assert type(spared) is type(plain)
    for name, _ in model.named_parameters():
        assert read(name, spared) == read(own_name(name), plain), name


def test_keywords_are_those_of_all_experts() -> None:
    model = RIDEWrapper(Walks(), 2, fork_at="blocks.2")
    assert model.no_weight_decay_keywords() == {"scale"}


class Matched(Net):
    """Says by patterns which layer a parameter belongs to, the last one with two anchors."""

    def group_matcher(self, coarse: bool = False) -> Any:
        if coarse:
            return {"stem": r"^token", "blocks": r"^blocks\.(\d+)\.[^b]"}
        return {"stem": r"token", "blocks": [(r"^blocks\.(\d+)", None), (r"^neck|^head", (99,))]}


class Called(Net):
    """Says it by a function that counts its own blocks with scales: timm's CaiT."""

    def group_matcher(self, coarse: bool = False) -> Any:
        first = 0 if coarse else 1
        last = sum("scale" in name for name, _ in self.named_parameters())

        def layer_of(name: str) -> int:
            if name.startswith("blocks."):
                return int(name.split(".")[1]) + first
            return 0 if name == "token" else last + first

        return layer_of


def layer_of(name: str, matcher: Any) -> tuple[float, ...]:
    """As timm's `group_with_matcher` finds the layer of a name."""
    if not isinstance(matcher, dict):
        return (matcher(name),)
    for place, entry in enumerate(matcher.values()):
        for pattern, suffix in [(entry, None)] if isinstance(entry, str) else entry:
            found = re.compile(pattern).match(name)
            if found:
                return (place, *map(float, (*found.groups(), *(suffix or ()))))
    return (float("inf"),)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("kind", [Matched, Called])
def test_a_parameter_is_in_the_layer_that_it_is_in_in_the_backbone(kind: Any, coarse: bool) -> None:
    backbone = kind()
    model = RIDEWrapper(backbone, 2, fork_at="blocks.2")
    matcher, plain = model.group_matcher(coarse=coarse), backbone.group_matcher(coarse)
    assert type(matcher) is type(plain)
    for name, _ in model.named_parameters():
        assert layer_of(name, matcher) == layer_of(own_name(name), plain), name


class Heads(Net):
    """Two classifiers, each behind a normalisation: timm's LeViT and distilled transformers."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 5))
        self.head_dist = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 5))
        self.early = early

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return self.head, self.head_dist

    def forward(self, x: Tensor) -> Tensor:
        first = self.head_dist(x) if self.early else 0.0
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.head(x) + (first if self.early else self.head_dist(x))


@pytest.mark.parametrize("early", [False, True])
def test_the_classifier_is_all_of_it(early: bool) -> None:
    model = RIDEWrapper(Heads(early), 2, fork_at="blocks.2")
    found = {id(parameter) for parameter in model.get_classifier().parameters()}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in found}
    assert names == {name for name, _ in model.named_parameters() if "head" in name}
    assert len(names) == (3 if early else 4) * 4


class Nameless(Net):
    """Has the method and does not know its classifier."""

    def get_classifier(self) -> None:
        return None


def test_a_classifier_that_the_backbone_does_not_know_is_the_one_that_was_found() -> None:
    model = RIDEWrapper(Nameless(), 2, fork_at="blocks.2")
    assert tuple(model.get_classifier()) == model.classifiers
