"""A copy of a criterion tells whether calls advance a state, and whether it sums over samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ride_plugin.longtail import (
    BalancedSoftmaxLoss,
    DeferredReweighting,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
)
from ride_plugin.losses._trials import keeps_state, sums_samples

COUNTS = [50, 20, 5, 2]
LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 2, 3, 0, 2])


def reweighted() -> nn.Module:
    criterion = LDAMLoss(COUNTS)
    DeferredReweighting(criterion, COUNTS, start_epoch=1).step()
    return criterion


PLAIN = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(weight=torch.rand(4), label_smoothing=0.1),
    nn.CrossEntropyLoss(reduction="none"),
    nn.MultiMarginLoss(),
    F.cross_entropy,
    lambda z, y: F.kl_div(F.log_softmax(z, 1), F.one_hot(y, 4).float(), reduction="batchmean"),
    LDAMLoss(COUNTS),
    reweighted(),
    FocalLoss(),
    BalancedSoftmaxLoss(COUNTS),
    LogitAdjustedLoss(COUNTS),
]


class Keeps(nn.Module):
    """Does something with what it keeps, and draws random numbers."""

    def __init__(self, act: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(6, 4))
        self.plain, self.calls, self.last = torch.zeros(6, 4), 0, torch.zeros(())
        self.cache, self.past, self.numbers = {}, deque(maxlen=3), np.zeros(4)
        self.act = act

    def forward(self, logits: Tensor, target: Tensor, *held: Any) -> Tensor:
        self.act(self, torch.softmax(logits.detach() + 0.01 * torch.randn(6, 4), 1))
        for one in held:
            one.add_(1)
        return F.cross_entropy(logits, target)


def in_place(keeps: Any, p: Tensor) -> None:
    keeps.memory[:] = 0.7 * keeps.memory + 0.3 * p


def anew(keeps: Any, p: Tensor) -> None:
    keeps.plain = 0.7 * keeps.plain + 0.3 * p


def count(keeps: Any, p: Tensor) -> None:
    keeps.calls += 1


def queue(keeps: Any, p: Tensor) -> None:
    keeps.past.append(len(keeps.past))


def count_classes(keeps: Any, p: Tensor) -> None:
    keeps.numbers += p.sum(0).numpy()


def fill(keeps: Any, p: Tensor) -> None:
    keeps.cache.setdefault("table", p)


def move(keeps: Any, p: Tensor) -> None:
    keeps.memory = keeps.memory.to(p.device, torch.float64)


def log(keeps: Any, p: Tensor) -> None:
    keeps.last = p.max()


@pytest.mark.parametrize("criterion", PLAIN)
def test_what_keeps_nothing_and_does_not_sum_is_told_neither(criterion: Any) -> None:
    assert not keeps_state(criterion, LOGITS, TARGET)
    assert not sums_samples(criterion, LOGITS, TARGET)


@pytest.mark.parametrize("act", [in_place, anew, count, queue, count_classes])
@pytest.mark.parametrize("wrap", [lambda c: c, partial, lambda c: lambda z, y: c(z, y)])
def test_what_each_call_advances_is_a_state(act: Any, wrap: Any) -> None:
    assert keeps_state(wrap(Keeps(act)), LOGITS, TARGET)


@pytest.mark.parametrize("act", [fill, move, log])
def test_what_a_call_only_sets_is_none(act: Any) -> None:
    assert not keeps_state(Keeps(act), LOGITS, TARGET)


def test_what_comes_with_the_call_is_left_as_it_is() -> None:
    held = torch.zeros(3)
    assert keeps_state(Keeps(log), LOGITS, TARGET, (held,))  # it writes into its argument
    assert not held.any()


def supervised_contrast(logits: Tensor, target: Tensor) -> Tensor:
    z = F.normalize(logits, dim=1)
    same = (target[:, None] == target).float().fill_diagonal_(0)
    near = (z @ z.T / 0.1).masked_fill(torch.eye(len(z)).bool(), -1e9)
    return -(same * F.log_softmax(near, 1)).sum()


SUMS = [
    lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    lambda z, y: len(z) * F.cross_entropy(z, y),
    partial(F.multi_margin_loss, reduction="sum"),
]


@pytest.mark.parametrize("criterion", SUMS)
def test_a_sum_over_samples_is_told(criterion: Any) -> None:
    for logits in (LOGITS, LOGITS.double()):
        assert sums_samples(criterion, logits, TARGET)


def test_a_sum_is_told_with_targets_and_arguments_of_any_form() -> None:
    def mixed(z: Tensor, y: tuple[Tensor, Tensor, float], weight: Tensor) -> Tensor:
        a, b = (F.cross_entropy(z, one, reduction="none") for one in y[:2])
        return (weight * (y[2] * a + (1 - y[2]) * b)).sum()

    given = (TARGET, TARGET.flip(0), 0.3), (1 + torch.rand(6),)
    assert sums_samples(mixed, LOGITS, *given)
    assert not sums_samples(lambda *all: mixed(*all) / len(all[0]), LOGITS, *given)
    shares = (given[0], (torch.rand(6).softmax(0),))
    assert not sums_samples(mixed, LOGITS, *shares)


@pytest.mark.parametrize(
    "criterion",
    [
        supervised_contrast,
        lambda z, y: F.cross_entropy(z, y, reduction="sum") ** 2,
        lambda z, y: 0 * z.sum(),
        lambda z, y: z.sum() * torch.inf,
        lambda z, y: 1e-6 * F.cross_entropy(z, y),
        lambda z, y: F.cross_entropy(z, y, reduction="sum") / 6,
        lambda z, y: F.cross_entropy(F.dropout(z), y, reduction="sum"),
        lambda z, y: torch.cdist(z, z).sum() / len(z) ** 2,
        lambda z, y: F.cross_entropy(z, y, reduction="sum") if len(z) == 6 else None,
    ],
)
def test_what_does_not_double_is_none(criterion: Any) -> None:
    assert not sums_samples(criterion, LOGITS, TARGET)
