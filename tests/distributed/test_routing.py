"""Calibration and reports over two ranks: each has a part of the data, both end with the same."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ArgumentError, ExpertRouter, RIDEWrapper, RoutingInference, _distributed
from ride_plugin.longtail import ClassBalancedSampler, ShotReport, analyze, shot_report
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


def _logits() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(90, 5), torch.randint(5, (90,))


def _shots_of_rank(parts: list[list[int]], over_ranks: bool = True) -> ShotReport:
    logits, y = _logits()
    rows = parts[torch.distributed.get_rank()]
    return shot_report(logits[rows], y[rows], COUNTS, over_ranks=over_ranks)


@pytest.mark.parametrize("first", [range(31), range(90), []])
def test_every_rank_gets_the_shot_report_of_all_samples(ranks: Ranks, first) -> None:
    parts = [list(first), [i for i in range(90) if i not in first]]  # not of equal size
    logits, y = _logits()
    for got in ranks(_shots_of_rank, parts):
        assert got == shot_report(logits, y, COUNTS)


def test_a_rank_may_ask_for_the_report_of_its_own_samples(ranks: Ranks) -> None:
    parts = [list(range(31)), list(range(31, 90))]
    logits, y = _logits()
    for rows, got in zip(parts, ranks(_shots_of_rank, parts, False), strict=True):
        assert got == shot_report(logits[rows], y[rows], COUNTS)


def _analysis_of_one_rank() -> float | None:
    # The other rank does not come, so that waiting for it would never end.
    if torch.distributed.get_rank() == 1:
        return None
    logits = 5 * torch.eye(len(COUNTS))[[0, 1, 1]][:, None].expand(-1, 2, -1)
    return analyze(logits, [0, 1, 2], COUNTS).report.overall


def test_an_analysis_is_of_one_rank_and_waits_for_nobody(ranks: Ranks) -> None:
    first, second = ranks(_analysis_of_one_rank)
    assert first == pytest.approx(2 / 3)
    assert second is None


def _no_samples_anywhere() -> list[str]:
    messages = []
    for call in (
        lambda: shot_report([], [], COUNTS),
        lambda: routing_report([], [], COUNTS, num_experts=3),
    ):
        with pytest.raises(ArgumentError, match="at least one sample on one of the ranks") as error:
            call()
        messages.append(str(error.value))
    return messages


def test_reports_without_samples_on_any_rank_are_refused_on_each(ranks: Ranks) -> None:
    first, second = ranks(_no_samples_anywhere)
    assert first == second


def _one_comes_late() -> list[str]:
    _distributed._PATIENCE = 0.2
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if torch.distributed.get_rank() == 1:
                time.sleep(0.7)
            shot_report([0, 1], [0, 1], COUNTS)
    finally:
        _distributed._PATIENCE = 60.0
    return [str(warning.message) for warning in caught]


def test_a_rank_that_waits_for_the_others_says_so(ranks: Ranks) -> None:
    first, second = ranks(_one_comes_late)
    assert len(first) == 1
    assert "other ranks in `shot_report`" in first[0]
    assert second == []


def _drawn() -> list[int]:
    sampler = ClassBalancedSampler(np.repeat(range(5), [50, 20, 6, 3, 1]))
    return list(sampler)


def test_ranks_draw_disjoint_parts_that_balance_the_classes(ranks: Ranks) -> None:
    labels = np.repeat(range(5), [50, 20, 6, 3, 1])
    parts = ranks(_drawn)
    assert np.bincount(labels[[*parts[0], *parts[1]]]).tolist() == [16] * 5
    assert [len(part) for part in parts] == [40, 40]
