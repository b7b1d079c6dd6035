"""The prior of unlabelled data, against data whose posterior is known exactly."""

import math

import pytest
import torch
from torch.nn import functional as F

from ride_plugin import ArgumentError
from ride_plugin.longtail import PriorEstimate, calibrate_prior

CLASSES = 20
COUNTS = [round(500 * 0.01 ** (c / (CLASSES - 1))) for c in range(CLASSES)]
LOG_COUNTS = torch.tensor(COUNTS, dtype=torch.float64).div(sum(COUNTS)).log()


def sample(tau, n, seed, *, order=None):
    """Gaussian classes at the corners of a simplex, and their exact log-likelihoods [N, C]."""
    generator = torch.Generator().manual_seed(seed)
    prior = (tau * LOG_COUNTS).softmax(0)
    prior = prior if order is None else prior[order]
    labels = prior.multinomial(n, replacement=True, generator=generator)
    x = torch.randn(n, CLASSES, generator=generator, dtype=torch.float64)
    x[torch.arange(n), labels] += 2.5
    return 2.5 * x, labels  # log p(x | c) up to what is the same for all classes


def as_a_model_gives_them(log_likelihood, scale=0.4, offset=-0.3):
    return ((log_likelihood - offset * LOG_COUNTS) / scale).float()


@pytest.mark.parametrize("held_out_tau", [0.0, 1.0])
def test_scale_and_offset_are_found_from_balanced_and_from_long_tailed_data(held_out_tau):
    log_likelihood, labels = sample(held_out_tau, 20_000, 0)
    found = calibrate_prior(as_a_model_gives_them(log_likelihood), labels, COUNTS)
    assert found.scale == pytest.approx(0.4, rel=0.05)
    assert found.offset == pytest.approx(-0.3, abs=0.06)


@pytest.mark.parametrize("factor", [1e-9, 1e-6, 1e4, 1e9, 1e200])
def test_the_size_of_logits_does_not_change_what_is_found(factor):
    """Small ones have small gradients, at which a search stops before it has begun."""
    log_likelihood, labels = sample(0.0, 500, 0)
    found = calibrate_prior(log_likelihood, labels, COUNTS)
    other = calibrate_prior(factor * log_likelihood, labels, COUNTS)
    assert other.scale * factor == pytest.approx(found.scale, rel=1e-6)
    assert other.offset == pytest.approx(found.offset, rel=1e-6)


def test_counts_that_hardly_differ_are_fitted_as_well():
    log_likelihood, labels = sample(0.0, 500, 0)
    counts = [1_000_000 + c for c in range(CLASSES)]
    found = calibrate_prior(log_likelihood, labels, counts)
    log_counts, present = torch.tensor(counts).double().log(), labels.bincount().double().log()
    numbers = torch.tensor([found.scale, found.offset], dtype=torch.float64, requires_grad=True)
    adjusted = numbers[0] * log_likelihood + numbers[1] * (log_counts - log_counts.mean())
    (slope,) = torch.autograd.grad(F.cross_entropy(adjusted + present, labels), numbers)
    assert slope.abs().max() < 1e-5
    assert abs(slope[1] / log_counts.std()) < 1e-5


@pytest.mark.parametrize("sign", [1, -1])
def test_no_prior_beyond_the_largest_is_found(sign):
    held_out, labels = sample(0.0, 2_000, 1)
    calibration = calibrate_prior(as_a_model_gives_them(held_out), labels, COUNTS)
    one = torch.zeros(50, CLASSES).index_fill(1, torch.tensor([0 if sign > 0 else -1]), 30.0)
    largest = max(3, 14 / math.log(COUNTS[0] / COUNTS[-1]))
    tau = calibration.estimate(one).tau
    assert abs(tau) <= largest
    assert tau == pytest.approx(sign * largest, abs=2e-3)


@pytest.mark.parametrize("tau", [-0.85, -0.3, 0.5, 1.0])
def test_a_shift_is_found_and_adjusting_is_as_good_as_knowing_it(tau):
    held_out, labels = sample(0.0, 2_000, 1)
    calibration = calibrate_prior(as_a_model_gives_them(held_out), labels, COUNTS)
    log_likelihood, truth = sample(tau, 5_000, 2)
    logits = as_a_model_gives_them(log_likelihood)
    found = calibration.estimate(logits)
    assert found.justified == (tau != 0.5)  # the logits as they are suit a tau near 0.3
    assert found.tau == pytest.approx(tau, abs=0.12)
    assert found.prior.sum().item() == pytest.approx(1.0)
    accuracy = (found.adjust(logits).argmax(1) == truth).double().mean()
    best = ((log_likelihood + tau * LOG_COUNTS).argmax(1) == truth).double().mean()
    before = (logits.argmax(1) == truth).double().mean()
    assert best - accuracy < 0.005
    assert (accuracy > before) == found.justified


@pytest.mark.parametrize("counts", [COUNTS, [500] * 8 + [40] * 6 + [5] * 6])
@pytest.mark.parametrize("held_out_tau", [0.0, 0.7])
def test_held_out_samples_judge_a_prior_as_classifying_them_again_does(held_out_tau, counts):
    held_out, labels = sample(held_out_tau, 800, 1)
    logits = as_a_model_gives_them(held_out)
    calibration = calibrate_prior(logits, labels, counts)
    frequency = [float((labels == c).sum()) for c in range(CLASSES)]
    for tau in (-1.2, -0.4, 0.0, 0.31, 1.0):
        gain, error = calibration.held_out.accuracy_gain(tau, calibration.log_counts)
        after = calibration.adjust(logits.double(), tau).argmax(1).tolist()
        weights = [counts[y] ** tau / frequency[y] for y in labels.tolist()]
        rows = zip(after, logits.argmax(1).tolist(), labels.tolist(), strict=True)
        changes = [(new == y) - (old == y) for new, old, y in rows]
        mean = sum(w * c for w, c in zip(weights, changes, strict=True)) / sum(weights)
        assert gain == pytest.approx(mean, abs=1e-9)
        squares = [(w * (c - mean)) ** 2 for w, c in zip(weights, changes, strict=True)]
        assert error == pytest.approx(sum(squares) ** 0.5 / sum(weights), abs=1e-9)


@pytest.mark.parametrize(
    ("likelihood_gain", "accuracy_gain", "justified"),
    [(0.021, 0.011, True), (0.019, 0.011, False), (0.021, 0.009, False), (0.021, -0.05, False)],
)
def test_a_shift_must_be_likely_and_adjusting_must_help(likelihood_gain, accuracy_gain, justified):
    held_out, labels = sample(0.0, 500, 1)
    calibration = calibrate_prior(as_a_model_gives_them(held_out), labels, COUNTS)
    found = PriorEstimate(calibration, -0.5, likelihood_gain, 0.01, accuracy_gain, 0.02)
    assert found.justified == justified
    logits = as_a_model_gives_them(held_out)
    assert torch.equal(found.adjust(logits), logits) == (not justified)


def test_data_that_the_logits_decide_for_and_too_few_samples_are_left_as_they_are():
    held_out, labels = sample(0.0, 5_000, 1)
    calibration = calibrate_prior(as_a_model_gives_them(held_out), labels, COUNTS)
    refused = 0
    for seed in range(20):
        logits = as_a_model_gives_them(sample(0.3, 1_000, 100 + seed)[0])
        found = calibration.estimate(logits)
        if not found.justified:
            refused += 1
            assert found.adjust(logits) is logits
            assert torch.allclose(found.prior, (0.3 * LOG_COUNTS).softmax(0), atol=0.01)
    assert refused >= 19
    assert not calibration.estimate(as_a_model_gives_them(sample(0.5, 4, 3)[0])).justified


def test_logits_that_hold_the_training_prior_are_adjusted_to_balanced_data():
    held_out, labels = sample(0.0, 1_000, 1)  # as cross entropy gives them
    calibration = calibrate_prior(as_a_model_gives_them(held_out, offset=-1.0), labels, COUNTS)
    log_likelihood, truth = sample(0.0, 1_000, 2)
    logits = as_a_model_gives_them(log_likelihood, offset=-1.0)
    found = calibration.estimate(logits)
    assert found.justified
    assert found.tau == pytest.approx(0.0, abs=0.12)
    before, after = (
        (each.argmax(1) == truth).double().mean() for each in (logits, found.adjust(logits))
    )
    assert after > before + 0.05
    again = as_a_model_gives_them(sample(1.0, 1_000, 3)[0], offset=-1.0)  # as in training
    assert not calibration.estimate(again).justified


def test_a_long_tail_over_other_classes_is_not_mistaken_for_one_over_ours():
    held_out, labels = sample(0.0, 5_000, 1)
    calibration = calibrate_prior(as_a_model_gives_them(held_out), labels, COUNTS)
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(3))
    log_likelihood, truth = sample(1.0, 5_000, 4, order=order)
    logits = as_a_model_gives_them(log_likelihood)
    found = calibration.estimate(logits)
    before = (logits.argmax(1) == truth).double().mean()
    assert (found.adjust(logits).argmax(1) == truth).double().mean() > before - 0.005


def test_the_estimate_is_the_maximum_of_the_likelihood():
    held_out, labels = sample(0.0, 2_000, 1)
    calibration = calibrate_prior(as_a_model_gives_them(held_out), labels, COUNTS)
    logits = as_a_model_gives_them(sample(0.6, 500, 5)[0])
    found = calibration.estimate(logits)

    def likelihood(tau):  # naive: a loop over samples, probabilities and no logarithms
        prior = [count**tau for count in COUNTS]
        prior = [p / sum(prior) for p in prior]
        rows = calibration.adjust(logits.double(), 0.0).softmax(1).tolist()
        return sum(
            math.log(sum(CLASSES * p * q for p, q in zip(prior, row, strict=True))) for row in rows
        )

    assert likelihood(found.tau) >= max(likelihood(found.tau + d) for d in (-0.01, 0.01))


def test_the_order_of_the_samples_does_not_decide():
    held_out, labels = sample(0.0, 2_000, 1)
    calibration = calibrate_prior(as_a_model_gives_them(held_out), labels, COUNTS)
    log_likelihood, truth = sample(1.0, 2_000, 6)
    found = calibration.estimate(as_a_model_gives_them(log_likelihood[truth.argsort()]))
    assert found.justified
    assert found.tau == pytest.approx(1.0, abs=0.12)


@pytest.mark.parametrize(
    ("logits", "labels", "counts", "message"),
    [
        (torch.zeros(4, 3), [0, 1, 2, 0], [5, 5, 5], "differ between classes"),
        (torch.zeros(4, 3), [0, 1, 2], [9, 5, 2], "row for each of the 3"),
        (torch.full((4, 3), math.nan), [0, 1, 2, 0], [9, 5, 2], "finite"),
        (torch.zeros(4, 2), [0, 1, 1, 0], [9, 5, 2], "logits"),
        (torch.zeros(4, 3, device="meta"), [0, 1, 2, 0], [9, 5, 2], "on the meta device"),
        (torch.zeros(4, 3), [0, 1, 2, 3], [9, 5, 2], "labels"),
        (-torch.eye(3).repeat(9, 1), [0, 1, 2] * 9, [9, 5, 2], "tell something"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(logits, labels, counts, message):
    with pytest.raises(ArgumentError, match=message):
        calibrate_prior(logits, labels, counts)


def test_estimates_refuse_what_does_not_fit():
    held_out, labels = sample(0.0, 500, 1)
    calibration = calibrate_prior(as_a_model_gives_them(held_out), labels, COUNTS)
    empty = torch.zeros(9, CLASSES, device="meta")
    for wrong in (
        empty,
        torch.zeros(1, CLASSES),
        torch.zeros(9, 3),
        torch.full((9, CLASSES), math.nan),
    ):
        with pytest.raises(ArgumentError, match="logits"):
            calibration.estimate(wrong)
    with pytest.raises(ArgumentError, match="tau"):
        calibration.adjust(torch.zeros(2, CLASSES), math.nan)


def held_out(number: int, counts: list[int]):
    labels = torch.randint(3, (number,))
    prior = torch.tensor(counts).double() / sum(counts)
    logits = (F.one_hot(labels, 3) * 2.0 + torch.randn(number, 3).double()) * 2 + prior.log()
    return logits.float(), labels


def test_held_out_data_that_determine_nothing_are_refused() -> None:
    counts = [100, 10, 1]
    logits, labels = held_out(600, counts)
    with pytest.raises(ArgumentError, match="`labels` to hold classes with different"):
        calibrate_prior(logits[labels == 1], labels[labels == 1], counts)
    with pytest.raises(ArgumentError, match="`labels` to hold classes with different"):
        calibrate_prior(logits[labels < 2], labels[labels < 2], [100, 100, 1])
    prior = (torch.tensor(counts) / sum(counts)).log()
    for constant in (
        torch.ones(600, 3),
        torch.randn(600, 1) + torch.zeros(600, 3),
        -2 * prior.expand(600, 3),
    ):
        with pytest.raises(ArgumentError, match="`logits` to tell something"):
            calibrate_prior(constant, labels, counts)


@pytest.mark.parametrize("sure", [4.0, 8.0, 15.0, 20.0, 1000.0])
@pytest.mark.parametrize("per_class", [(5, 5, 5, 5), (40, 9, 3, 1), (20, 0, 5, 5)])
def test_held_out_data_that_are_all_classified_rightly_are_refused(sure, per_class) -> None:
    counts = [500, 100, 20, 4]
    labels = torch.arange(4).repeat_interleave(torch.tensor(per_class))
    noise = torch.rand(len(labels), 4) - 0.5
    right = sure * F.one_hot(labels, 4) + noise
    for offset in (0, 1, -0.5):  # after adjusting, though not as they are
        logits = right + offset * torch.tensor(counts).log()
        with pytest.raises(ArgumentError, match=f"all {len(labels)} are classified rightly.*more"):
            calibrate_prior(logits, labels, counts)
    one_wrong = torch.cat([right, right[:1]]), torch.cat([labels, labels[-1:]])
    found = calibrate_prior(*one_wrong, counts)
    assert 0 < found.scale < 10
    tripled = calibrate_prior(3 * one_wrong[0], one_wrong[1], counts)
    assert tripled.scale == pytest.approx(found.scale / 3, rel=0.01)
    assert tripled.offset == pytest.approx(found.offset, abs=0.01)


def test_logits_made_in_inference_mode_are_calibrated() -> None:
    logits, labels = held_out(600, [100, 10, 1])
    expected = calibrate_prior(logits.double(), labels, [100, 10, 1])
    with torch.inference_mode():
        inside = calibrate_prior(logits.double() + 0, labels, [100, 10, 1])
        outside = logits.double() + 0
    for found in (inside, calibrate_prior(outside, labels, [100, 10, 1])):
        assert (found.scale, found.offset) == (expected.scale, expected.offset)


def test_an_exponent_of_counts_that_differ_little_is_found_though_it_is_large() -> None:
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    calibration = calibrate_prior(
        F.one_hot(labels, 3) * 2 + torch.randn(300, 3), labels, [60, 50, 40]
    )
    shifted = torch.multinomial(torch.tensor([0.05, 0.2, 0.75]), 3000, replacement=True)
    found = calibration.estimate(F.one_hot(shifted, 3) * 2 + torch.randn(3000, 3))
    assert found.tau < -5
    torch.testing.assert_close(
        found.prior, torch.tensor([0.05, 0.2, 0.75]).double(), atol=0.05, rtol=0
    )
