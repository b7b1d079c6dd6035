import math

import pytest
import torch
from torch.nn import functional as F

from ride_plugin import RIDEError
from ride_plugin.longtail import FocalLoss


def naive(logits, target, gamma, weight=None):
    """``target`` as probabilities ``[B, C]``."""
    total, weights = 0.0, 0.0
    p = logits.double().softmax(1)
    for b in range(logits.shape[0]):
        for c in range(logits.shape[1]):
            share = target[b, c].item() * (1.0 if weight is None else weight[c])
            total -= share * (1 - p[b, c].item()) ** gamma * math.log(p[b, c].item())
            weights += share
    return total / weights


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weight", [None, [0.5, 1.0, 3.0]])
def test_equals_the_equation_by_loops_for_indices_and_probabilities(gamma, weight) -> None:
    logits, target = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])
    criterion = FocalLoss(gamma, weight=weight)
    one_hot = F.one_hot(target, 3).double()
    mixed = 0.7 * one_hot + 0.3 * one_hot.flip(0)
    expected = naive(logits, one_hot, gamma, weight)
    assert criterion(logits, target).item() == pytest.approx(expected)
    assert criterion(logits, one_hot).item() == pytest.approx(expected)
    assert criterion(logits, mixed).item() == pytest.approx(naive(logits, mixed, gamma, weight))


@pytest.mark.parametrize("gamma", ["0.5", "1.0", "2.0"])
def test_equals_the_authors_numbers(losses, gamma: str) -> None:
    experts = losses["expert_logits"].clone().requires_grad_()
    loss = FocalLoss(float(gamma))(experts[:, 0], losses["target"])
    loss.backward()
    torch.testing.assert_close(loss, losses[f"focal_{gamma}_loss"], rtol=1e-5, atol=0)
    reference = losses[f"focal_{gamma}_grad"]
    torch.testing.assert_close(experts.grad[: len(reference)], reference, rtol=1e-5, atol=1e-9)


def test_gamma_zero_is_weighted_cross_entropy() -> None:
    logits, target, weight = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]), torch.rand(3) + 0.1
    expected = F.cross_entropy(logits, target, weight)
    torch.testing.assert_close(FocalLoss(0.0, weight=weight)(logits, target), expected)


@pytest.mark.parametrize("soft", [False, True])
def test_gradient_is_that_of_finite_differences(soft: bool) -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.rand(4, 3).softmax(1) if soft else torch.tensor([0, 2, 1, 1])
    assert torch.autograd.gradcheck(lambda z: FocalLoss(0.5)(z, target), (logits,))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_certainty_and_extreme_logits_stay_finite(gamma: float) -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0]], requires_grad=True)
    loss = FocalLoss(gamma)(logits, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert logits.grad.isfinite().all()


def test_masked_class_gives_no_nan_with_soft_targets() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    loss = FocalLoss(2.0)(logits, torch.tensor([[0.5, 0.5, 0.0]]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_half_precision_is_computed_in_float32() -> None:
    logits, target = torch.randn(4, 3).bfloat16(), torch.tensor([0, 1, 2, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = FocalLoss()(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, FocalLoss()(logits.float(), target))


def test_bad_input_is_named() -> None:
    with pytest.raises(RIDEError, match=r"`gamma`.*-1"):
        FocalLoss(-1)
    with pytest.raises(RIDEError, match="`weight`"):
        FocalLoss(weight=[0.0, 0.0])
    with pytest.raises(RIDEError, match=r"`logits`.*\[B, 2\]"):
        FocalLoss(weight=[1.0, 1.0])(torch.zeros(1, 3), torch.tensor([0]))
    with pytest.raises(RIDEError, match=r"`target`.*probabilities"):
        FocalLoss()(torch.zeros(1, 3), torch.tensor([[0.5, 0.5, 0.5]]))


def test_the_default_power_is_two() -> None:
    logits, target = torch.randn(5, 3, dtype=torch.double), torch.tensor([0, 1, 2, 0, 1])
    p = logits.softmax(1)[torch.arange(5), target]
    torch.testing.assert_close(FocalLoss()(logits, target), (-((1 - p) ** 2) * p.log()).mean())


def test_checkpoints_hold_nothing_of_it() -> None:
    assert not FocalLoss(weight=[1.0, 2.0]).state_dict()
