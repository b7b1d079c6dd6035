"""Calibration and reports over two ranks: each has a part of the data, both end with the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ArgumentError, ExpertRouter, RIDEWrapper, RoutingInference
from ride_plugin.routing import routing_report

from .ranks import Ranks

COUNTS = [500, 200, 60, 30, 10]


def _serving() -> tuple[RoutingInference, Tensor, Tensor]:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 5))
    model = RIDEWrapper(backbone, 3, fork_at="2", example_input=torch.zeros(2, 6))
    router = ExpertRouter.for_model(model).eval()
    x = torch.randn(90, 6)
    return RoutingInference(model, router), x, torch.arange(90) % 5


def _measured(rows: slice | None) -> tuple[float, Tensor, int, str]:
    """Threshold, whole curve, number of samples and report of these rows; None for no data."""
    serve, x, y = _serving()
    batches = [] if rows is None else list(zip(x[rows].split(16), y[rows].split(16), strict=True))
    result = serve.calibrate(batches, max_experts=1.7)
    part = slice(0, 10) if rows is None else rows
    used = serve(x[part], return_routing=True).num_experts_used
    report = routing_report(used, y[part], COUNTS, num_experts=3)
    return result.threshold, result.curve.accuracy, result.num_samples, str(report)


def _of_rank(parts: list[slice | None]) -> Any:
    return _measured(parts[torch.distributed.get_rank()])


def _nothing_anywhere() -> str:
    serve, _, _ = _serving()
    with pytest.raises(ArgumentError, match="at least one sample") as error:
        serve.calibrate([], max_experts=1.7)
    return str(error.value)


def test_every_rank_ends_with_the_threshold_and_the_report_of_all_data(ranks: Ranks) -> None:
    threshold, accuracy, samples, report = _measured(slice(0, 90))
    assert 0 < threshold < 1
    for got in ranks(_of_rank, [slice(0, 31), slice(31, 90)]):  # not of equal size
        assert got[0] == threshold
        assert torch.equal(got[1], accuracy)
        assert got[2:] == (samples, report)


def test_a_rank_without_data_ends_with_the_threshold_of_the_other(ranks: Ranks) -> None:
    threshold, accuracy, samples, _ = _measured(slice(0, 40))
    for got in ranks(_of_rank, [slice(0, 40), None]):
        assert got[0] == threshold
        assert torch.equal(got[1], accuracy)
        assert got[2] == samples
    assert len(set(ranks(_nothing_anywhere))) == 1
