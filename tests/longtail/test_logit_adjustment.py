import math

import pytest
import torch
from torch.nn import functional as F

from ride_plugin import ExpertOutput, RIDEError, RIDEWrapper, expert_logits, experts_loss
from ride_plugin.longtail import BalancedSoftmaxLoss, LogitAdjustedLoss, adjust_logits

COUNTS = [300, 40, 5]


def naive(logits, target, counts, tau):
    """Counts to the power tau in the softmax itself; ``target`` as probabilities."""
    total = 0.0
    for row, q in zip(logits.tolist(), target.tolist(), strict=True):
        terms = [n**tau * math.exp(z) for n, z in zip(counts, row, strict=True)]
        total -= sum(a * math.log(t / sum(terms)) for a, t in zip(q, terms, strict=True))
    return total / len(logits)


@pytest.mark.parametrize("tau", [-1.0, 0.0, 1.0, 2.0])
def test_equals_the_equation_by_loops_for_indices_and_probabilities(tau: float) -> None:
    logits, target = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 0])
    one_hot = F.one_hot(target, 3).double()
    mixed = 0.6 * one_hot + 0.4 * one_hot.flip(0)
    criterion = LogitAdjustedLoss(COUNTS, tau)
    expected = naive(logits, one_hot, COUNTS, tau)
    assert criterion(logits, target).item() == pytest.approx(expected, 1e-6)
    expected = naive(logits, mixed, COUNTS, tau)
    assert criterion(logits, mixed).item() == pytest.approx(expected, 1e-6)


def test_balanced_softmax_equals_its_own_equation() -> None:
    logits, target = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 0])
    expected = naive(logits, F.one_hot(target, 3).double(), COUNTS, 1)
    assert BalancedSoftmaxLoss(COUNTS)(logits, target).item() == pytest.approx(expected, 1e-6)


def test_uniform_counts_give_cross_entropy() -> None:
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 0])
    expected = F.cross_entropy(logits, target)
    torch.testing.assert_close(LogitAdjustedLoss([7, 7, 7], 1.5)(logits, target), expected)


def test_gradient_is_that_of_finite_differences() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    criterion = BalancedSoftmaxLoss(COUNTS)
    soft = torch.rand(4, 3).softmax(1)
    assert torch.autograd.gradcheck(lambda z: criterion(z, soft), (logits,))


def test_masked_class_and_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, 0.0, -math.inf], [-1e4, 1.0, -math.inf]], requires_grad=True)
    for target in (torch.tensor([0, 0]), torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])):
        loss = BalancedSoftmaxLoss(COUNTS)(logits, target)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert grad.isfinite().all()


def test_half_precision_is_computed_in_float32() -> None:
    logits, target = torch.randn(4, 3).bfloat16(), torch.tensor([0, 1, 2, 0])
    criterion = BalancedSoftmaxLoss(COUNTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, criterion(logits.float(), target))


def test_each_expert_may_have_its_own_tau() -> None:
    experts, target = torch.randn(4, 3, 3), torch.tensor([0, 1, 2, 0])
    criteria = [LogitAdjustedLoss(COUNTS, tau) for tau in (0.0, 1.0, 2.0)]
    expected = sum(c(experts[:, i], target) for i, c in enumerate(criteria))
    torch.testing.assert_close(experts_loss(criteria, experts, target), expected)


@pytest.mark.parametrize("shape", [(3,), (5, 3), (4, 2, 3)])
@pytest.mark.parametrize("tau", [-0.5, 0.0, 1.0])
def test_after_training_it_divides_probabilities_by_the_prior(shape, tau: float) -> None:
    logits = torch.randn(shape, dtype=torch.float64)
    adjusted = adjust_logits(logits, COUNTS, tau).softmax(-1).reshape(-1, 3)
    for row, expected in zip(adjusted.tolist(), logits.reshape(-1, 3).tolist(), strict=True):
        weights = [math.exp(z) * n**-tau for z, n in zip(expected, COUNTS, strict=True)]
        assert row == pytest.approx([w / sum(weights) for w in weights])


def test_after_training_it_undoes_what_the_criterion_added() -> None:
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 0])
    expected = LogitAdjustedLoss(COUNTS, tau=0.7)(logits, target)
    torch.testing.assert_close(
        F.cross_entropy(adjust_logits(logits, COUNTS, -0.7), target), expected
    )


def test_a_negative_tau_moves_decisions_to_frequent_classes_only() -> None:
    logits = torch.randn(200, 3)
    before, after = (adjust_logits(logits, COUNTS, tau).argmax(1) for tau in (0.0, -0.5))
    assert torch.equal(before, logits.argmax(1))
    assert (after <= before).all()
    assert (after < before).any()


def test_after_training_it_takes_a_wrapped_model_s_output_and_half_precision() -> None:
    backbone = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    model = RIDEWrapper(backbone, 2, fork_at="2", example_input=torch.randn(2, 4))
    out = model(torch.randn(5, 4))
    adjusted = adjust_logits(out, COUNTS, -0.3)
    assert type(adjusted) is torch.Tensor
    torch.testing.assert_close(adjusted, adjust_logits(expert_logits(out), COUNTS, -0.3).mean(1))
    explicit = ExpertOutput(out, expert_logits(out))
    assert torch.equal(adjust_logits(explicit, COUNTS, -0.3), adjusted)
    half = adjust_logits(torch.tensor([[1.0, -math.inf, 0.0]]).half(), COUNTS)
    assert half.dtype == torch.float32
    assert half.isneginf().tolist() == [[False, True, False]]


def test_bad_input_is_named() -> None:
    with pytest.raises(RIDEError, match="`tau` to be a finite number, but got inf"):
        adjust_logits(torch.zeros(1, 3), COUNTS, math.inf)
    with pytest.raises(RIDEError, match=r"`class_counts`.*0 for class 1"):
        adjust_logits(torch.zeros(1, 2), [1, 0])
    with pytest.raises(RIDEError, match=r"`logits`.*floating-point tensor \[\.\.\., 3\].*\[1, 2\]"):
        adjust_logits(torch.zeros(1, 2), COUNTS)
    with pytest.raises(RIDEError, match=r"int64.*not predicted classes"):
        adjust_logits(torch.zeros(3, dtype=torch.int64), COUNTS)
    with pytest.raises(RIDEError, match="`tau` to be a finite number, but got nan"):
        LogitAdjustedLoss(COUNTS, math.nan)
    with pytest.raises(RIDEError, match=r"`class_counts`.*0 for class 1"):
        BalancedSoftmaxLoss([1, 0])
    with pytest.raises(RIDEError, match=r"`logits`.*\[B, 3\].*\[1, 2\]"):
        BalancedSoftmaxLoss(COUNTS)(torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(RIDEError, match=r"`target`.*to 3"):
        BalancedSoftmaxLoss(COUNTS)(torch.zeros(1, 3), torch.tensor([3]))


def test_the_whole_prior_is_added_by_default_and_the_logits_dtype_stays() -> None:
    logits, target, counts = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([8, 3, 1])
    expected = torch.nn.functional.cross_entropy(logits + (counts / 12).log(), target)
    torch.testing.assert_close(LogitAdjustedLoss(counts)(logits, target), expected)
    mixed = torch.nn.functional.one_hot(target, 3).double()
    assert LogitAdjustedLoss(counts)(logits, mixed).dtype == torch.float32


def test_adjusting_takes_the_whole_prior_away_by_default() -> None:
    logits, counts = torch.randn(2, 3), torch.tensor([8.0, 3.0, 1.0])
    torch.testing.assert_close(adjust_logits(logits, counts), logits - (counts / 12).log())


def test_checkpoints_hold_nothing_of_it_and_it_moves_with_to() -> None:
    assert not LogitAdjustedLoss(COUNTS).state_dict()
    assert BalancedSoftmaxLoss(COUNTS).adjustment.dtype == torch.float32
    assert BalancedSoftmaxLoss(COUNTS).double().adjustment.dtype == torch.float64


def test_a_strength_that_is_set_acts_from_then_on() -> None:
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 0])
    criterion = LogitAdjustedLoss([50, 5, 1], tau=1.0)
    for tau in (0.0, 0.5, 2):
        criterion.tau = tau
        expected = LogitAdjustedLoss([50, 5, 1], tau=tau)
        assert torch.equal(criterion(logits, target), expected(logits, target))
        assert f"tau={float(tau)}" in repr(criterion)
    with pytest.raises(RIDEError, match="`tau`"):
        criterion.tau = float("nan")


def test_the_adjustment_outlives_every_cast() -> None:
    expected = LogitAdjustedLoss([8000, 90, 5]).adjustment
    cast = LogitAdjustedLoss([8000, 90, 5]).bfloat16().float()
    emptied = LogitAdjustedLoss([8000, 90, 5]).to("meta").to_empty(device="cpu")
    assert torch.equal(cast.adjustment, expected)
    assert torch.equal(emptied.adjustment, expected)
