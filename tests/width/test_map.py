"""The map from old to new widths."""

from __future__ import annotations

import pytest
from torch import nn

from ride_plugin._width._map import WidthMap, groupings_of


@pytest.mark.parametrize(
    ("ratio", "groupings", "width", "expected"),
    [
        (1.0, [], 40, 40),
        (0.5, [], 1, 1),  # a width of one would become none
        (0.1, [], 4, 2),  # never one, which would broadcast
        (0.75, [], 32, 24),
        (0.75, [], 256, 192),
        (0.7, [], 64, 48),  # 44.8: the multiple of eight next to it
        (0.5, [(3, 5)], 15, 6),  # 7.5, in three groups
        (0.5, [(7, 11)], 77, 35),  # 38.5, in seven groups
        (0.34, [(4, 3)], 12, 3),  # 4.1, but not one channel in each of four groups
        (0.1, [(3, 3)], 9, 2),  # no width in threes is near, and the share decides
    ],
)
def test_widths(ratio: float, groupings: list, width: int, expected: int) -> None:
    assert WidthMap(ratio, groupings)(width) == expected


def test_groupings() -> None:
    expert = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8), nn.GroupNorm(4, 8)
    )
    assert groupings_of(expert) == [(2, 4), (4, 2)]
