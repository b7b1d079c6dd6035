"""Norms of narrowed experts: groups that keep a spread, and sizes that nothing holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ride_plugin import RIDEWrapper


class Normed(nn.Module):
    """A stem that is shared; a layer, a norm and a classifier that are narrowed."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem, self.body, self.norm = nn.Linear(12, 64), nn.Linear(64, 64), norm
        self.after, self.fc = nn.Linear(64, 96), nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.body(self.stem(x).relu()))
        return self.fc(self.after(x).relu())


def narrowed(norm: nn.Module, width: float) -> Normed:
    torch.manual_seed(0)
    backbone, x = Normed(norm), torch.randn(16, 12)
    model = RIDEWrapper(backbone, 2, fork_at="body", expert_width=width, example_input=x)
    expert = model.eval().to_module(1)
    with torch.no_grad():  # it looks at its input if the backbone does
        assert (expert(x).std(0).min() > 1e-3) == (backbone(x).std(0).min() > 1e-3)
    return expert


class GroupsOfAFunction(nn.Module):
    """Norms in groups whose number no attribute of torch's holds."""

    def __init__(self, groups: int, by_keyword: bool) -> None:
        super().__init__()
        self.count, self.by_keyword = groups, by_keyword

    def forward(self, x: Tensor) -> Tensor:
        if self.by_keyword:
            return F.group_norm(x, num_groups=self.count)
        return F.group_norm(x, self.count)


@pytest.mark.parametrize(
    ("groups", "width", "expected"),
    [(32, 0.5, 16), (32, 0.75, 24), (16, 0.5, 16), (16, 0.25, 4), (64, 0.5, 32), (1, 0.5, 1)],
)
def test_groups_of_several_channels_never_hold_one(groups, width, expected) -> None:
    norm = narrowed(nn.GroupNorm(groups, 64), width).norm
    assert (norm.num_groups, norm.num_channels) == (expected, 64 * width)


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize(("groups", "kept"), [(32, 64), (8, 32), (64, 64)])
def test_groups_that_no_attribute_holds_keep_their_channels(groups, kept, by_keyword) -> None:
    expert = narrowed(GroupsOfAFunction(groups, by_keyword), 0.5)
    assert expert.body.out_features == kept
    assert (expert.after.in_features, expert.after.out_features) == (kept, 48)


class SizeOfItsOwn(nn.Module):
    """Norms as many channels as an attribute says that torch does not know."""

    def __init__(self, weighted: bool) -> None:
        super().__init__()
        self.size, self.gain = 64, nn.Parameter(torch.ones(64)) if weighted else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.size,), self.gain)


class SizeOfItsGain(SizeOfItsOwn):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.gain.shape, weight=self.gain)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_size_that_cannot_be_set_keeps_its_channels(weighted: bool) -> None:
    expert = narrowed(SizeOfItsOwn(weighted), 0.5)
    assert (expert.body.out_features, expert.after.out_features) == (64, 48)


def test_a_size_that_is_a_parameters_follows_it() -> None:
    expert = narrowed(SizeOfItsGain(weighted=True), 0.5)
    assert expert.body.out_features == 32 == len(expert.norm.gain)
