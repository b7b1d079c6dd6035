import csv
import math

import numpy as np
import pytest
import torch

from ride_plugin import ExpertOutput, RIDEError
from ride_plugin.longtail import analyze, bias_variance, shot_groups, shot_report

COUNTS = [300, 101, 100, 50, 20, 19, 1]
SPLIT = ["many", "many", "medium", "medium", "medium", "few", "few"]


def naive(predicted, target):
    """Accuracy over samples, and mean over classes, of every split."""
    result = {}
    for split in ("overall", "many", "medium", "few"):
        pairs = [
            (p, t) for p, t in zip(predicted, target, strict=True) if split in ("overall", SPLIT[t])
        ]
        classes = sorted({t for _, t in pairs})
        each = [
            sum(p == t for p, t in pairs if t == c) / sum(t == c for _, t in pairs) for c in classes
        ]
        result[split] = (
            sum(p == t for p, t in pairs) / len(pairs) if pairs else None,
            sum(each) / len(each) if each else None,
        )
    return result


@pytest.mark.parametrize("seed", range(3))
def test_accuracies_equal_loops_on_an_unequal_test_set(seed: int) -> None:
    generator = np.random.default_rng(seed)
    target = generator.choice(7, 60, p=[0.4, 0.1, 0.1, 0.1, 0.1, 0.15, 0.05])
    predicted = np.where(generator.random(60) < 0.5, target, generator.integers(7, size=60))
    report = shot_report(predicted, target, COUNTS)
    expected = naive(predicted.tolist(), target.tolist())
    for split, (by_sample, by_class) in expected.items():
        assert getattr(report, split) == pytest.approx(by_sample)
        assert getattr(report.class_mean, split) == pytest.approx(by_class)
    for c, accuracy in enumerate(report.per_class):
        there = target == c
        assert accuracy == pytest.approx((predicted[there] == c).mean())


def test_logits_and_predictions_of_any_kind_agree() -> None:
    logits, target = torch.randn(40, 7, requires_grad=True), torch.arange(40) % 7
    report = shot_report(logits, target, COUNTS)
    assert report == shot_report(logits.argmax(1), target.numpy(), np.array(COUNTS))
    assert report == shot_report(logits.argmax(1).tolist(), target.tolist(), torch.tensor(COUNTS))
    assert report == shot_report(logits.detach().double().numpy(), target, COUNTS)


def test_cut_offs_are_the_fields_and_selectable() -> None:
    names = ["many", "medium", "few"]
    assert [names[g] for g in shot_groups(COUNTS)] == SPLIT
    assert shot_groups([3, 2, 1], many=2, few=2).tolist() == [0, 1, 2]
    assert shot_report([0, 1], [0, 0], [3, 2], many=2, few=2).split_classes == {
        "many": 1,
        "medium": 1,
        "few": 0,
    }


def test_absent_groups_are_none_and_printed_as_absent() -> None:
    report = shot_report([0, 1], [0, 1], [500, 400, 10])
    assert (report.many, report.medium, report.few) == (1.0, None, None)
    assert report.class_mean.few is None
    assert report.per_class == (1.0, 1.0, None)
    assert report.split_classes == {"many": 2, "medium": 0, "few": 1}
    assert report.split_samples == {"many": 2, "medium": 0, "few": 0}
    lines = str(report).splitlines()
    assert [line.split()[-1] for line in lines[3:]] == ["absent", "absent"]
    assert "nan" not in str(report)


def test_the_explicit_output_of_a_model_counts_by_the_mean_of_its_experts() -> None:
    experts = torch.randn(6, 3, 4)
    mean, target, counts = experts.mean(1), torch.arange(6) % 4, [200, 50, 30, 5]
    output = ExpertOutput(mean, experts)
    assert shot_report(output, target, counts) == shot_report(mean, target, counts)


def test_csv_holds_every_class(tmp_path) -> None:
    shot_report([0, 0, 1], [0, 1, 1], [500, 40, 7]).per_class_csv(tmp_path / "classes.csv")
    with open(tmp_path / "classes.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["class", "split", "train", "test", "correct", "accuracy"],
        ["0", "many", "500", "1", "1", "1"],
        ["1", "medium", "40", "2", "1", "0.5"],
        ["2", "few", "7", "0", "0", ""],
    ]


@pytest.mark.parametrize(
    ("output", "target", "arguments", "message"),
    [
        ([0, 1], [0, 2], {}, "`target`.*0 to 1.*to 2"),
        ([0, 2], [0, 1], {}, "`output`.*0 to 1.*to 2"),
        ([0], [0, 1], {}, r"`output`.*\[2, 2\].*\[1\]"),
        (torch.zeros(2, 3), [0, 1], {}, r"`output`.*\[2, 2\].*\[2, 3\]"),
        (torch.zeros(2), [0, 1], {}, r"`output`.*float32"),
        (torch.tensor([[0.0, math.nan], [0, 0]]), [0, 1], {}, r"NaN.*in 1 of 2 rows"),
        (torch.tensor([[math.inf, math.inf], [0, 0]]), [0, 1], {}, r"\+inf.*in 1 of 2 rows"),
        (torch.tensor([[-math.inf] * 2, [0, 0]]), [0, 1], {}, r"one class.*in 1 of 2 rows"),
        ([], [], {}, r"`target`.*at least one.*\[0\]"),
        ("labels", [0, 1], {}, "`output`.*'labels'"),
        ([0, 1], [0, 1], {"many": 5, "few": 10}, r"0 <= few <= many.*many=5 and few=10"),
    ],
)
def test_bad_input_is_named(output, target, arguments, message: str) -> None:
    with pytest.raises(RIDEError, match=message):
        shot_report(output, target, [50, 30], **arguments)


def test_zero_counts_are_named() -> None:
    with pytest.raises(RIDEError, match=r"`class_counts`.*0 for class 1"):
        shot_report([0], [0], [5, 0])


def test_shares_are_refused_where_the_cut_offs_are_numbers_of_samples() -> None:
    shares = [n / sum(COUNTS) for n in COUNTS]
    target = torch.arange(7)
    for call in (
        lambda: shot_groups(shares),
        lambda: shot_report(target, target, shares),
        lambda: shot_report(target, target, dict(enumerate(shares)), many=1, few=1),
        lambda: analyze(torch.randn(7, 2, 7), target, shares),
        lambda: bias_variance(target.expand(2, 7), target, shares),
    ):
        with pytest.raises(RIDEError, match=r"`class_counts`.*not shares"):
            call()
    cut_offs = {"many": 100 / sum(COUNTS), "few": 20 / sum(COUNTS)}
    assert [["many", "medium", "few"][g] for g in shot_groups(shares, **cut_offs)] == SPLIT
    report = shot_report(target, target, shares, **cut_offs)
    assert report.split_classes == {"many": 2, "medium": 3, "few": 2}
