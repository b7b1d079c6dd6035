"""What is tried out computes the same as the criterion and leaves it as it is, or is not tried."""

from __future__ import annotations

import io
import math
import random
import types
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ride_plugin import RIDELoss, experts_loss
from ride_plugin.losses._trial_copy import trial_copy

COUNTS = [50, 20, 5, 2]
LOGITS, TARGET = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 2])


class Seesaw(nn.Module):
    """Counts the classes that it meets, as seesaw loss does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.ones(4))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        self.counts += torch.bincount(target, minlength=4)
        return F.cross_entropy(logits + self.counts.log(), target)


class Averaging:
    """No module; its own method and a list see every call."""

    def __init__(self) -> None:
        self.mean, self.seen = 0.0, []

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, target)
        self.mean = 0.9 * self.mean + 0.1 * float(loss.detach())
        self.seen.append(len(target))
        return loss * (1 + self.mean)

    def state(self) -> list[float]:
        return [self.mean, *self.seen]


KEPT: dict[str, Any] = {"calls": 0}
MEMORY = torch.zeros(4)


def with_global_state(logits: Tensor, target: Tensor) -> Tensor:
    KEPT["calls"] += 1
    MEMORY[target] += 1
    return F.cross_entropy(logits * math.sqrt(KEPT["calls"]) + MEMORY, target)


def with_own_state(logits: Tensor, target: Tensor, scale: float = 1.0, *, more: int = 1) -> Tensor:
    with_own_state.calls += 1
    return F.cross_entropy(logits, target) * with_own_state.calls * scale * more


with_own_state.calls = 0


@torch.no_grad()
def remember(target: Tensor) -> None:
    MEMORY[target] += 1


def with_a_decorator_of_torch(logits: Tensor, target: Tensor) -> Tensor:
    remember(target)
    return F.cross_entropy(logits + MEMORY, target)


def decorated(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], Callable[[], Any]]:
    calls = 0

    @wraps(function)
    def counted(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return sum(function(*args) for _ in range(calls))

    return counted, lambda: calls


def cases() -> list[tuple[Callable[..., Tensor], Callable[[], Any]]]:
    """Criteria with what they keep, each anew."""
    seesaw, averaging, method = Seesaw(), Averaging(), Averaging()
    enclosed, memory = Seesaw(), torch.zeros(4)
    KEPT["calls"], with_own_state.calls = 0, 0
    MEMORY.zero_()

    def remembering(logits: Tensor, target: Tensor) -> Tensor:
        memory[target] += 1
        return F.cross_entropy(logits + memory, target)

    return [
        (seesaw, lambda: seesaw.counts.tolist()),
        (lambda z, y: (lambda: enclosed(z, y))(), lambda: enclosed.counts.tolist()),
        (averaging, averaging.state),
        (method.__call__, method.state),
        (partial(with_global_state), lambda: [KEPT["calls"], *MEMORY.tolist()]),
        (with_own_state, lambda: with_own_state.calls),
        (remembering, memory.tolist),
        (with_a_decorator_of_torch, MEMORY.tolist),
        decorated(F.cross_entropy),
    ]


@pytest.mark.parametrize("case", range(9))
def test_a_copy_computes_the_same_and_changes_nothing(case: int) -> None:
    criterion, kept = cases()[case]
    before = kept()
    copied = trial_copy(criterion)
    values = [copied(LOGITS, TARGET) for _ in range(3)]
    assert kept() == before
    assert [criterion(LOGITS, TARGET) for _ in range(3)] == values
    assert kept() != before


@pytest.mark.parametrize("case", range(9))
@pytest.mark.filterwarnings("ignore:The criterion .* (adds a prior|keeps a state)")
def test_the_look_at_a_criterion_changes_nothing_that_it_keeps(case: int) -> None:
    experts = torch.randn(6, 2, 4, requires_grad=True)
    alone, expected = cases()[case]
    experts_loss(alone, experts, TARGET)
    wanted = expected()
    criterion, kept = cases()[case]
    RIDELoss(criterion, COUNTS)(experts, TARGET)
    assert kept() == wanted


def draws(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits * random.random(), target)


def test_what_random_functions_and_constants_reach_is_copied() -> None:
    assert trial_copy(draws)(LOGITS, TARGET).isfinite()
    assert trial_copy(F.cross_entropy) is F.cross_entropy


foreign = types.ModuleType("foreign")
FILE = io.StringIO("text")


class Memory(nn.Module):
    def __init__(self, memory: Tensor) -> None:
        super().__init__()
        self.memory = memory  # no buffer


SEEN = KEPT.setdefault("seen", []).append


def reads_a_module(logits: Tensor, target: Tensor) -> Tensor:
    return foreign.criterion(logits, target)


class Handle:
    closed = 0

    def __del__(self) -> None:
        type(self).closed += 1


HANDLE = Handle()


def reads_a_handle(logits: Tensor, target: Tensor) -> Tensor:
    return HANDLE and F.cross_entropy(logits, target)


def reads_a_class(logits: Tensor, target: Tensor) -> Tensor:
    return Averaging()(logits, target)


def reads_a_file(logits: Tensor, target: Tensor) -> Tensor:
    return FILE.read() and F.cross_entropy(logits, target)


@pytest.mark.parametrize(
    "criterion",
    [
        *(reads_a_module, reads_a_class, reads_a_file, reads_a_handle),
        lambda z, y: [].append(z) or SEEN(z),
        partial(F.cross_entropy, weight=torch.empty(1).expand(2**25)),
        Memory(torch.empty(1).expand(2**25)),
        partial(draws, [[] for _ in range(2000)]),
    ],
)
def test_what_cannot_be_copied_is_not_tried(criterion: Callable[..., Tensor]) -> None:
    with pytest.raises(TypeError):
        trial_copy(criterion)
    assert Handle.closed == 0
