"""The routing report against counts by hand."""

import pytest
import torch

from ride_plugin import ArgumentError
from ride_plugin.routing import _report, routing_report


def test_report_counts_shares_by_shot():
    counts = [500, 101, 100, 20, 19]
    target = torch.tensor([0, 0, 1, 2, 3, 3, 4])
    used = torch.tensor([1, 2, 1, 3, 3, 1, 2])
    report = routing_report(used, target, counts, num_experts=4)
    assert report.overall == pytest.approx((3 / 7, 2 / 7, 2 / 7, 0))
    assert report.many == pytest.approx((2 / 3, 1 / 3, 0, 0))
    assert report.medium == pytest.approx((1 / 3, 0, 2 / 3, 0))
    assert report.few == pytest.approx((0, 1, 0, 0))


def test_empty_shots_are_absent():
    report = routing_report(torch.tensor([1]), torch.tensor([0]), [500, 5], num_experts=2)
    assert (report.medium, report.few) == (None, None)
    assert "few       absent" in str(report)


def test_cut_offs_are_those_of_the_other_reports():
    counts, target = [300, 120, 50, 10], torch.tensor([0, 1, 2, 3])
    used = torch.tensor([1, 2, 3, 3])
    report = routing_report(used, target, counts, num_experts=3, many=200, few=60)
    assert report.many == (1, 0, 0)
    assert report.medium == (0, 1, 0)
    assert report.few == (0, 0, 1)
    with pytest.raises(ArgumentError, match="0 <= few <= many"):
        routing_report(used, target, counts, num_experts=3, many=10, few=60)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integers_of_any_width_are_indices(dtype):
    counts = [500] + [50] * 299 if dtype != torch.uint8 else [500] + [50] * 199
    target = torch.tensor([0, 1, 1, 0], dtype=dtype)
    used = torch.tensor([1, 2, 2, 1], dtype=dtype)
    report = routing_report(used, target, counts, num_experts=2)
    assert (report.many, report.medium, report.few) == ((1, 0), (0, 1), None)


@pytest.mark.parametrize(
    ("used", "target", "message"),
    [
        ([0], [0], "`num_experts_used` to hold integers from 1 to 3"),
        ([4], [0], "`num_experts_used` to hold integers from 1 to 3"),
        ([1], [2], "`target` to hold class indices from 0 to 1"),
        ([1, 2], [0], r"the same shape \[N\]"),
        ([], [], "`target` to be integers"),
    ],
)
def test_bad_reports_are_named(used, target, message):
    used, target = torch.tensor(used).long(), torch.tensor(target).long()
    with pytest.raises(ArgumentError, match=message):
        routing_report(used, target, [10, 10], num_experts=3)


def test_one_value_out_of_range_is_enough_and_one_expert_is_allowed():
    target = torch.tensor([0, 1])
    for used in ([0, 2], [2, 4]):
        with pytest.raises(ArgumentError, match="to hold integers from 1 to 3"):
            routing_report(torch.tensor(used), target, [10, 10], num_experts=3)
    assert routing_report(torch.tensor([1, 1]), target, [9, 9], num_experts=1).overall == (1.0,)


def test_the_samples_of_another_rank_count_unless_they_are_not_asked_for(monkeypatch):
    """The gathering itself runs over two processes in tests/distributed."""
    counts, used, target = [500, 5], torch.tensor([1, 2]), torch.tensor([0, 1])
    other = torch.tensor([2, 2]), torch.tensor([0, 0])
    monkeypatch.setattr(_report, "running", lambda: True)
    monkeypatch.setattr(_report, "of_all_ranks", lambda own, name: [own, other])
    report = routing_report(used, target, counts, num_experts=2)
    assert report.overall == pytest.approx((1 / 4, 3 / 4))
    assert report.many == pytest.approx((1 / 3, 2 / 3))
    nothing = torch.tensor([], dtype=torch.long)
    assert routing_report(nothing, nothing, counts, num_experts=2).overall == (0, 1)
    own = routing_report(used, target, counts, num_experts=2, over_ranks=False)
    assert own.overall == (1 / 2, 1 / 2)
    with pytest.raises(ArgumentError, match="`target` to be integers"):
        routing_report(nothing, nothing, counts, num_experts=2, over_ranks=False)
