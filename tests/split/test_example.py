"""Example inputs guessed from a backbone's first layer."""

from __future__ import annotations

import pytest
from torch import nn

from ride_plugin._split._example import find_example
from ride_plugin._split._logits import LogitsReader


@pytest.mark.parametrize(
    ("backbone", "shape"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 5)), (2, 784)),
        (
            nn.Sequential(
                nn.Conv1d(4, 8, 9), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 5)
            ),
            (2, 4, 64),
        ),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 5)),
            (2, 1, 28, 28),
        ),
        (nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(128, 5)), (2, 16)),
    ],
)
def test_inputs_are_guessed_from_the_first_layer(backbone, shape) -> None:
    (x,), kwargs = find_example(backbone.eval(), None, LogitsReader())
    assert tuple(x.shape) == shape
    assert not kwargs
