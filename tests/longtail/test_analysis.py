import math
import tracemalloc

import pytest
import torch
import torch.nn.functional as F

from benchmarks.speed.live_bytes import LiveBytes
from ride_plugin import RIDEError
from ride_plugin.longtail import analyze, expected_calibration_error, shot_report

COUNTS = [300, 150, 60, 30, 4]
SPLIT = ["many", "many", "medium", "medium", "few"]
NAMES = ("overall", "many", "medium", "few")


def case():
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(90, 3, 5, generator=generator)
    target = torch.randint(5, (90,), generator=generator)
    used = torch.randint(1, 4, (90,), generator=generator)
    return logits, target, used


def split_mean(values, target):
    """Mean of one number per sample in every split, by loops."""
    result = []
    for name in NAMES:
        chosen = [v for v, t in zip(values, target, strict=True) if name in ("overall", SPLIT[t])]
        result.append(sum(chosen) / len(chosen) if chosen else None)
    return result


def softmax(row):
    peak = max(row)
    terms = [math.exp(z - peak) for z in row]
    return [t / sum(terms) for t in terms]


def naive_ece(confidence, correct, num_bins=15):
    total = 0.0
    for b in range(num_bins):
        held = [
            (c, r)
            for c, r in zip(confidence, correct, strict=True)
            if b / num_bins < c <= (b + 1) / num_bins
        ]
        if held:
            gap = sum(r for _, r in held) / len(held) - sum(c for c, _ in held) / len(held)
            total += len(held) / len(confidence) * abs(gap)
    return total


def test_each_experts_accuracy_equals_loops() -> None:
    logits, target, _ = case()
    analysis = analyze(logits, target, COUNTS)
    assert len(analysis.expert_accuracy) == 3
    for e, accuracy in enumerate(analysis.expert_accuracy):
        right = [max(range(5), key=z.__getitem__) for z in logits[:, e].tolist()]
        values = [float(r == t) for r, t in zip(right, target.tolist(), strict=True)]
        assert list(accuracy) == pytest.approx(split_mean(values, target.tolist()))


def test_disagreement_and_kl_equal_loops_over_pairs() -> None:
    logits, target, _ = case()
    differ, divergence = [], []
    for sample in logits.double().tolist():
        p = [softmax(z) for z in sample]
        top = [q.index(max(q)) for q in p]
        pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
        differ.append(sum(top[i] != top[j] for i, j in pairs) / 6)
        divergence.append(
            sum(p[i][c] * math.log(p[i][c] / p[j][c]) for i, j in pairs for c in range(5)) / 6
        )
    analysis = analyze(logits, target, COUNTS)
    labels = target.tolist()
    assert list(analysis.disagreement) == pytest.approx(split_mean(differ, labels))
    assert list(analysis.kl) == pytest.approx(split_mean(divergence, labels))


def test_routed_prediction_is_the_mean_of_the_experts_used() -> None:
    logits, target, used = case()
    mean = torch.stack([z[:k].mean(0) for z, k in zip(logits, used.tolist(), strict=True)])
    analysis = analyze(logits, target, COUNTS, num_experts_used=used)
    assert analysis.report == shot_report(mean, target, COUNTS)
    expected = split_mean(used.tolist(), target.tolist())
    assert list(analysis.num_experts_used) == pytest.approx(expected)


def test_without_routing_all_experts_predict() -> None:
    logits, target, _ = case()
    analysis = analyze(logits, target, COUNTS)
    assert analysis.report == shot_report(logits.mean(1), target, COUNTS)
    assert list(analysis.num_experts_used) == [3.0] * 4


def test_calibration_error_equals_loops_in_every_split() -> None:
    logits, target, _ = case()
    analysis = analyze(logits, target, COUNTS, num_bins=7)
    p = [softmax(z) for z in logits.double().mean(1).tolist()]
    for name, value in zip(NAMES, analysis.calibration_error, strict=True):
        rows = [i for i, t in enumerate(target.tolist()) if name in ("overall", SPLIT[t])]
        confidence = [max(p[i]) for i in rows]
        correct = [p[i].index(max(p[i])) == target[i].item() for i in rows]
        assert value == pytest.approx(naive_ece(confidence, correct, 7))


def test_calibration_error_of_certain_predictions() -> None:
    assert expected_calibration_error([1.0, 1.0, 0.0], [True, True, False]) == 0.0
    assert expected_calibration_error([1.0, 1.0], [True, False]) == 0.5


def test_long_test_sets_give_the_same_as_short_ones() -> None:
    logits, target, used = case()
    once = analyze(logits, target, COUNTS, num_experts_used=used)
    many = analyze(
        logits.repeat(30, 1, 1), target.repeat(30), COUNTS, num_experts_used=used.repeat(30)
    )
    assert list(many.kl) == pytest.approx(list(once.kl))
    assert many.report.overall == pytest.approx(once.report.overall)


def test_equal_experts_neither_disagree_nor_diverge() -> None:
    logits, target, _ = case()
    analysis = analyze(logits[:, :1].repeat(1, 3, 1), target, COUNTS)
    assert list(analysis.disagreement) == [0.0] * 4
    assert list(analysis.kl) == pytest.approx([0.0] * 4, abs=1e-14)  # two roundings, multiplied


def test_kl_of_close_experts_keeps_its_digits() -> None:
    logits, target, _ = case()
    close = 5 * logits[:, :1] + 1e-3 * logits
    log_p = close.double().log_softmax(2)
    expected = sum(
        F.kl_div(log_p[:, j], log_p[:, i], log_target=True, reduction="none").sum(1) / 6
        for i in range(3)
        for j in range(3)
    )
    found = analyze(close, target, COUNTS).kl
    assert list(found) == pytest.approx(split_mean(expected.tolist(), target.tolist()), rel=1e-3)


def test_a_class_that_only_one_expert_excludes_makes_the_divergence_infinite() -> None:
    logits, target, _ = case()
    logits[7, 1, 4] = -math.inf
    analysis = analyze(logits, target, COUNTS)
    own = ("many", "medium", "few").index(SPLIT[target[7]])
    for index, value in enumerate(list(analysis.kl)):
        assert math.isinf(value) == (index in (0, own + 1))


def test_a_million_predictions_would_not_be_copied() -> None:
    logits = torch.randn(40_000, 4, 100).bfloat16()  # which is computed in float32
    target = torch.randint(5, (40_000,))
    counts = [*COUNTS, *[10] * 95]
    with LiveBytes() as torch_bytes:
        analyze(logits, target, counts)
    tracemalloc.start()
    try:
        analyze(logits, target, counts)
        _, numpy_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    own = torch_bytes.peak - logits.nbytes  # parts of the input are views, which count as it does
    assert own + numpy_bytes < logits.nbytes / 2


def test_classes_masked_in_all_experts_give_no_nan() -> None:
    logits, target, used = case()
    target = target.clamp_max(3)
    logits[:, :, 4] = -math.inf
    analysis = analyze(logits, target, COUNTS, num_experts_used=used)
    same = analyze(logits[:, :, :4], target, COUNTS[:4])
    assert list(analysis.kl) == pytest.approx(list(same.kl))
    assert analysis.calibration_error.few is None


def test_one_expert_has_no_pairs() -> None:
    logits, target, _ = case()
    analysis = analyze(logits[:, :1], target, COUNTS)
    assert analysis.disagreement is None
    assert analysis.kl is None
    assert "disagreement" not in str(analysis)


def test_the_table_shows_every_number_and_absent_splits() -> None:
    logits, target, used = case()
    target = target.clamp_max(3)
    text = str(analyze(logits, target, COUNTS, num_experts_used=used))
    lines = text.splitlines()
    assert [line[:20].strip() for line in lines[1:]] == [
        "top-1",
        "calibration error",
        "expert 0 top-1",
        "expert 1 top-1",
        "expert 2 top-1",
        "expert disagreement",
        "expert KL (nats)",
        "experts used",
    ]
    assert all(line.endswith("absent") for line in lines[1:9])


LOGITS = torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("logits", "arguments", "message"),
    [
        (torch.zeros(2, 5), {}, r"`expert_logits`.*\[2, E, 5\].*\[2, 5\].*expert_logits\(model"),
        (torch.zeros(3, 3, 5), {}, r"`expert_logits`.*\[3, 3, 5\]"),
        (torch.zeros(2, 3, 4), {}, r"`expert_logits`.*\[2, 3, 4\]"),
        (LOGITS.index_fill(0, torch.tensor([1]), math.nan), {}, r"NaN.*1 of 2"),
        (LOGITS.index_fill(2, torch.tensor([1]), math.inf), {}, r"\+inf.*2 of 2"),
        (LOGITS, {"num_experts_used": [1, 4]}, "`num_experts_used`.*1 to 3.*from 1 to 4"),
        (LOGITS, {"num_experts_used": [0, 1]}, r"`num_experts_used`.*from 0"),
        (LOGITS, {"num_experts_used": [1]}, r"`num_experts_used`.*\[2\].*\[1\]"),
        (LOGITS, {"num_experts_used": [1.0, 2.0]}, r"`num_experts_used`.*float"),
        (LOGITS, {"num_bins": 0}, r"`num_bins`.*0"),
    ],
)
def test_bad_input_is_named(logits, arguments, message: str) -> None:
    with pytest.raises(RIDEError, match=message):
        analyze(logits, [0, 1], COUNTS, **arguments)


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([0.5], [True, False], r"shapes \[1\] and \[2\]"),
        ([], [], r"N > 0"),
        ([1.5], [True], r"`confidence`.*1\.5"),
        ([math.nan], [True], r"`confidence`.*nan"),
    ],
)
def test_bad_confidence_is_named(confidence, correct, message: str) -> None:
    with pytest.raises(RIDEError, match=message):
        expected_calibration_error(confidence, correct)


@pytest.mark.parametrize("num_bins", [3, 15, 49, 100])
def test_a_confidence_on_an_edge_is_in_the_bin_below(num_bins: int) -> None:
    """Beside a lower one in its bin that is wrong, and a higher one in the next that is right."""
    for edge in range(1, num_bins):
        confidence = [edge / num_bins, (edge - 0.5) / num_bins, (edge + 0.5) / num_bins]
        together = abs(1 - confidence[0] - confidence[1]) + 1 - confidence[2]
        found = expected_calibration_error(confidence, [True, False, True], num_bins)
        assert found == pytest.approx(together / 3)
