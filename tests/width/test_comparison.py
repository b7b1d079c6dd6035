"""Sizes that a forward has fixed and that fit a narrower tensor by luck."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper
from ride_plugin._width._comparison import Comparison
from ride_plugin._width._plan import Step


def narrowed(block: nn.Module, width: float = 0.75, made: int = 32) -> nn.Module:
    """An expert whose layer `2` makes 32 channels for the block, and whose layer `5` reads them."""
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        block, nn.Conv2d(made, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 5),
    )  # fmt: skip
    x = torch.randn(4, 3, 8, 8)
    model = RIDEWrapper(backbone, 2, fork_at="2", expert_width=width, example_input=x)
    return model.experts[0]


class HandMadeGroupNorm(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.gain = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape
        x = x.view(size[0], self.groups, -1)
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()
        return x.view(size) * self.gain


@pytest.mark.parametrize(("groups", "channels"), [(16, 32), (8, 24), (4, 24)])
def test_groups_of_a_reshape_hold_whole_channels(groups: int, channels: int) -> None:
    expert = narrowed(HandMadeGroupNorm(32, groups))
    assert expert[2].out_channels == channels == expert[4].gain.numel()


class Slices(nn.Module):
    """Attention whose queries, keys and values are cut out by fixed numbers."""

    def __init__(self, channels: int, narrow: bool) -> None:
        super().__init__()
        self.channels, self.narrow = channels, narrow
        self.qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, c = self.qkv(x).flatten(2), self.channels
        if self.narrow:
            q, k, v = (y.narrow(1, at, min(c, y.shape[1] - at)) for at in (0, c, 2 * c))
        else:
            q, k, v = y[:, :c], y[:, c : 2 * c], y[:, 2 * c :]
        attention = (q.transpose(1, 2) @ k / c**0.5).softmax(-1)
        return self.proj((v @ attention.transpose(1, 2)).unflatten(-1, x.shape[2:]))


@pytest.mark.parametrize("narrow", [False, True])
def test_pieces_that_were_equal_are_equal_again(narrow: bool) -> None:
    expert = narrowed(Slices(32, narrow))
    assert (expert[2].out_channels, expert[5].in_channels) == (24, 24)
    assert expert[4].qkv.weight.shape == (96, 24, 1, 1)
    assert expert[4].proj.weight.shape == (24, 32, 1, 1)


class Pieces(nn.Module):
    """Cuts 48 channels into sixteen pieces, and reads the first of each."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(32, 48, 1)

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.wide(x).tensor_split(16, 1)
        return torch.cat([piece[:, :1] for piece in pieces], 1)


def test_pieces_of_one_call_stay_equal() -> None:
    assert narrowed(Pieces(), made=16)[4].wide.out_channels == 48


class Halves(nn.Module):
    """Cuts by what arrives, which is half of it at any width."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return torch.cat([x[:, :half].relu(), x[:, half:], x[:, 0:1] * x[:, 1:2]], 1)


def test_cuts_that_follow_what_arrives_narrow_it() -> None:
    assert narrowed(Halves(), made=33)[2].out_channels == 24


def difference(name: str, old: list[tuple[int, ...]], new: list[tuple[int, ...]]) -> bool:
    """Whether a comparison objects; each list has the shapes of the operand and of the results."""
    step = Step(name, old[:1], old[1:])
    source, *outputs = (torch.empty(shape) for shape in new)
    return Comparison().difference(name, step, source, outputs) is not None


@pytest.mark.parametrize(
    ("old", "new", "objects"),
    [
        # whole channels in each of the groups, whether rows are joined with them or not
        ([(3, 32, 8, 8), (3, 16, 128)], [(3, 24, 8, 8), (3, 16, 96)], True),
        ([(3, 32, 8, 8), (48, 128)], [(3, 24, 8, 8), (48, 96)], True),
        ([(3, 32, 8, 8), (3, 8, 256)], [(3, 24, 8, 8), (3, 8, 192)], False),
        ([(3, 32, 8, 8), (24, 256)], [(3, 24, 8, 8), (24, 192)], False),
        # fewer groups, or smaller ones, of whole channels
        ([(3, 4, 8, 6), (3, 4, 48)], [(3, 3, 8, 6), (3, 3, 48)], False),
        ([(3, 32, 5), (3, 4, 40)], [(3, 24, 5), (3, 3, 40)], False),
        # a cut between rows of the images
        ([(3, 32, 6, 6), (3, 192, 6)], [(3, 16, 6, 6), (3, 192, 3)], True),
        ([(3, 32, 6, 6), (3, 192, 6)], [(3, 16, 6, 6), (3, 96, 6)], False),
        ([(3, 6, 32), (3, 2, 96)], [(3, 6, 24), (3, 2, 72)], False),
        ([(0, 4, 6), (0, 24)], [(0, 4, 5), (0, 20)], False),
    ],
)
def test_a_reshape_cuts_between_the_same_things(old, new, objects) -> None:
    assert difference("reshape", old, new) == objects


def test_pieces_along_other_dimensions_are_not_compared() -> None:
    assert not difference("__getitem__", [(3, 32, 32), (3, 32)], [(3, 24, 32), (3, 32)])
    comparison, source = Comparison(), torch.empty(3, 24, 32)
    for old, piece in (((3, 8, 32), source[:, :6]), ((3, 32, 8), source[:, :, :8])):
        step = Step("__getitem__", [(3, 32, 32)], [old])
        assert comparison.difference("__getitem__", step, source, [piece]) is None
    step = Step("__getitem__", [(3, 32, 32)], [(3, 8, 32)])
    assert comparison.difference("__getitem__", step, source, [source[:, 20:]]) is not None
