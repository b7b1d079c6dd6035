"""The first call of a criterion warns of what the loss would do otherwise than meant."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ride_plugin import DiversityLoss, RIDELoss

COUNTS = [50, 20, 5, 2]
TARGET, INDEX = torch.tensor([0, 1, 2, 3, 0, 2]), torch.arange(6)


class Remembering(nn.Module):
    """Early-learning regularisation (ELR) as published: a memory of each sample's predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = torch.zeros(6, 4)

    def forward(self, logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
        p = torch.softmax(logits, 1).clamp(1e-4, 1 - 1e-4)
        self.memory[index] = 0.7 * self.memory[index] + 0.3 * p.detach()
        return F.cross_entropy(logits, target) + (1 - (self.memory[index] * p).sum(1)).log().mean()


def experts(num_experts: int = 3) -> Tensor:
    return torch.randn(6, num_experts, 4, requires_grad=True)


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_a_state_that_all_experts_advance_is_told_once_with_the_remedy(weight: float) -> None:
    criterion, out, diversity = Remembering(), experts(), DiversityLoss(COUNTS, weight=weight)
    loss = RIDELoss(criterion, diversity)
    with pytest.warns(UserWarning, match=r"advances it 3 times.*copy\.deepcopy") as told:
        loss(out, TARGET, INDEX)
    assert [one.filename for one in told] == [__file__]
    loss(out, TARGET, INDEX)

    each = [Remembering() for _ in range(3)]
    loss = RIDELoss([copy.deepcopy(one) for one in each], diversity)
    for _ in range(2):
        expected = sum(one(out[:, i], TARGET, INDEX) for i, one in enumerate(each))
        got = loss(out, TARGET, INDEX)
        torch.testing.assert_close(got, expected + loss.diversity(out, TARGET))


def test_a_single_expert_advances_a_state_once() -> None:
    RIDELoss(Remembering(), COUNTS)(experts(1), TARGET, INDEX)


def test_a_criterion_that_is_called_once_advances_its_state_once() -> None:
    class Counting(nn.Module):
        averages_rows, calls = True, 0

        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            self.calls += 1
            return F.cross_entropy(logits, target)

    criterion = Counting()
    RIDELoss(criterion, COUNTS)(experts(), TARGET)
    assert criterion.calls == 1


class Summing(nn.Module):
    def forward(self, logits: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
        return F.cross_entropy(logits, target, reduction="sum")


def summing(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="sum")


@pytest.mark.parametrize(
    "make", [Summing, lambda: partial(summing), lambda: lambda *z: summing(*z)]
)
def test_a_sum_that_does_not_say_so_is_told_once_and_follows_the_remedy(make: Any) -> None:
    criterion, out = make(), experts()
    alone = sum(summing(out[:, i], TARGET) for i in range(3))
    mean, loss = DiversityLoss(COUNTS)(out, TARGET), RIDELoss(criterion, COUNTS)
    with pytest.warns(UserWarning, match=r"6 times too small.*reduction = \"sum\"") as told:
        torch.testing.assert_close(loss(out, TARGET), alone + mean)
    assert [one.filename for one in told] == [__file__]
    loss(out, TARGET)
    for says, term in (("sum", 6 * mean), ("mean", mean)):
        criterion.reduction = says
        torch.testing.assert_close(RIDELoss(criterion, COUNTS)(out, TARGET), alone + term)


def test_a_sum_beside_no_diversity_term_or_told_in_the_call_needs_no_word() -> None:
    RIDELoss(Summing(), DiversityLoss(COUNTS, weight=0))(experts(), TARGET)
    RIDELoss(Summing(), COUNTS)(experts(), TARGET, reduction="sum")
