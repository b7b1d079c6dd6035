"""What the benchmark of building measures, on a network that builds at once."""

import sys

import pytest
import torch
from torch import nn

from benchmarks.speed import build


def network() -> nn.Module:
    layers = [nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(64, 5))


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_bytes_are_counted_once_for_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.NETWORKS, "small", (network, lambda: torch.randn(2, 64)))
    one = build.measure("small", "1 expert")
    three = build.measure("small", "3 experts")
    frozen = build.measure("small", "3 experts, frozen")
    assert one["result"] == 1.0
    assert frozen["result"] < 1.1 < three["result"]  # three classifiers, one of everything else
    for found in (one, three, frozen):
        assert found["forwards"] > 1
        assert found["seconds"] > 0
        assert found["peak"] >= 0
