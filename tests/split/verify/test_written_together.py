"""Calls unlike the example, on which the forward writes or draws what the build has not seen."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ReplayError, RIDEWrapper, SplitError, expert_logits
from tests.naive import copies_of, train_both


class Advances(nn.Module):
    """Advances something where it is given targets, before the fork or behind it."""

    only_training = False

    def __init__(self, how: str, early: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("prior", torch.ones(4, 8))
        self.register_buffer("table", torch.zeros(1), persistent=False)
        self.a.steps = 0
        self.how, self.early = how, early

    def advance(self, h: Tensor, target: Tensor) -> Tensor | float:
        if self.how == "in place":
            self.prior.mul_(0.9).add_(target.sum())
        elif self.how == "anew":
            self.prior = 0.9 * self.prior + target.sum()
        elif self.how == "rows":
            self.prior[target] = h.detach()
        elif self.how == "once":
            self.prior = torch.full((4, 8), float(h.shape[1]))
        elif self.how == "the same":
            self.prior.fill_(float(h.shape[1]))
        elif self.how == "a table":
            self.table = torch.arange(1.0, 1 + len(h))
            return self.table[:4].mean()
        elif self.how == "a count":
            self.a.steps = self.a.steps + 1
            return float(self.a.steps)
        return self.prior.mean()

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        if self.only_training and not self.training:
            target = None
        h = self.a(x).relu()
        gain = self.advance(h, target) if target is not None and self.early else 1.0
        h = self.b(h).relu()
        if target is not None and not self.early:
            gain = self.advance(h, target)
        out: Tensor = self.c(h * gain)
        return out


def calls() -> list[Any]:
    target = torch.tensor([0, 3, 1, 2])
    return [((torch.randn(4, 6), t), {}) for t in (None, target, target, None, target)]


def advancing(how: str, early: bool) -> tuple[nn.Module, RIDEWrapper]:
    net = Advances(how, early)
    return net, RIDEWrapper(net, 3, fork_at="b", example_input=torch.randn(4, 6))


@pytest.mark.parametrize("how", ["in place", "anew", "rows", "once"])
def test_what_experts_write_into_a_buffer_of_the_trunk_is_refused(how: str) -> None:
    _, model = advancing(how, early=False)
    (plain, _), (first, _), *_ = calls()
    model(*plain)
    for _ in range(2):
        with pytest.raises(ReplayError, match="after the fork writes `prior`, which the trunk"):
            model(*first)


def test_a_count_on_a_module_of_the_trunk_is_refused_if_experts_would_go_on_counting() -> None:
    _, model = advancing("a count", early=True)
    (plain, _), (first, _), *_ = calls()
    model(*plain)
    with pytest.raises(ReplayError, match=r"the forward changes `a\.steps`.*once more in each"):
        model(*first)


@pytest.mark.parametrize(
    ("how", "early"),
    [("in place", True), ("anew", True), ("rows", True), ("the same", False), ("a count", False)],
)
def test_what_the_trunk_writes_or_each_expert_for_itself_is_right(how: str, early: bool) -> None:
    net, model = advancing(how, early)
    train_both(net, model, calls())


def test_a_table_for_another_length_is_made_by_each_expert() -> None:
    net, model = advancing("a table", early=False)
    model(*calls()[0][0])
    copies = copies_of(net, model)
    got = expert_logits(model(*calls()[1][0]))
    assert got.shape == (4, 3, 4)
    for x, target in ((torch.randn(n, 6), torch.arange(n) % 4) for n in (4, 6)):
        got = expert_logits(model(x, target))
        for index, plain in enumerate(copies):
            torch.testing.assert_close(got[:, index], plain(x, target))


class Mixes(nn.Module):
    """Mixup inside of the forward, with targets only; it returns the share that was drawn."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.draw = draw

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        if target is None:
            return self.c(self.b(self.a(x).relu()).relu())
        share = self.draw()
        h = self.a(share * x + (1 - share) * x.flip(0)).relu()
        if share > 0.5:
            h = share * h + (1 - share) * h.flip(0)
        return self.c(self.b(h).relu()) * share, target, share


def of_numpy() -> float:
    return float(np.random.beta(1.0, 1.0))  # noqa: NPY002


@pytest.mark.parametrize("draw", [of_numpy, random.random])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_experts_draw_what_the_trunk_draws_on_a_call_unlike_the_example(
    draw: Callable[[], float], checkpoint: bool
) -> None:
    x, target, net = torch.randn(4, 6), torch.arange(4), Mixes(draw)
    model = RIDEWrapper(
        net, 3, fork_at="b", example_input=x, logits=0, return_experts="outputs"
    ).train()
    model.checkpoint_experts = checkpoint
    copies, shares = copies_of(net, model), set()
    model(x)
    for step in range(6):
        np.random.seed(step)  # noqa: NPY002
        random.seed(step)
        each = model(x, target)
        after = draw()
        for got, plain in zip(each, copies, strict=True):
            np.random.seed(step)  # noqa: NPY002
            random.seed(step)
            expected = plain(x, target)
            torch.testing.assert_close(got[0], expected[0])
            assert got[2] == expected[2]
            assert draw() == after  # the generator stands where one pass leaves it
        sum(got[0].sum() for got in each).backward()
        shares.add(each[0][2] > 0.5)
    assert shares == {False, True}  # both paths were taken


def test_a_stored_state_of_such_a_call_draws_again_what_the_trunk_drew() -> None:
    x, target, net = torch.randn(4, 6), torch.arange(4), Mixes(of_numpy)
    model = RIDEWrapper(net, 2, fork_at="b", example_input=x, logits=0).train()
    with torch.no_grad():
        state = model.run_trunk(x, target)
        first = expert_logits(model(state))
        assert torch.equal(expert_logits(model(state)), first)


class Prototypes(nn.Module):
    """A mean of each class, kept in a frozen parameter; it looks at the labels' values."""

    def __init__(self, how: str, early: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.means = nn.Parameter(torch.zeros(4, 8), requires_grad=False)
        self.how, self.early = how, early

    @torch.no_grad()
    def follow(self, h: Tensor, target: Tensor) -> None:
        for label in target.unique().tolist():
            mean = h[target == label].mean(0)
            if self.how == "in place":
                self.means[label] = 0.5 * self.means[label] + 0.5 * mean
            elif self.how == "through .data":
                self.means.data[label] = 0.5 * self.means[label] + 0.5 * mean
            else:
                self.means.data = 0.5 * self.means.data + 0.5 * mean

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        h = self.a(x).relu()
        if target is not None and self.early:
            self.follow(h, target)
        h = h + self.means.mean(0)
        h = self.b(h).relu()
        if target is not None and not self.early:
            self.follow(h, target)
        out: Tensor = self.c(h + self.means.mean(0))
        return out


@pytest.mark.parametrize("how", ["in place", "through .data", "other .data"])
def test_learning_a_call_leaves_frozen_parameters_as_they_are(how: str) -> None:
    net = Prototypes(how, early=True)
    model = RIDEWrapper(net, 3, fork_at="b", example_input=torch.randn(4, 6))
    train_both(net, model, calls())
    assert net.means.abs().sum() == 0


@pytest.mark.parametrize("how", ["through .data", "other .data"])
@pytest.mark.parametrize("training", [True, False])
def test_what_experts_write_through_data_into_what_they_share_is_refused(
    how: str, training: bool
) -> None:
    net = Prototypes(how, early=False)
    model = RIDEWrapper(net, 3, fork_at="b", example_input=torch.randn(4, 6)).train(training)
    (first, _) = calls()[1]
    for _ in range(2):
        with pytest.raises(ReplayError, match=r"writes `means`.*example_input="):
            model(*first)
    assert all(not expert.means.any() for expert in model.experts)


@pytest.mark.parametrize("how", ["in place", "anew", "rows"])
def test_experts_each_have_what_they_write_if_the_example_shows_it(how: str) -> None:
    net = Advances(how, early=False)
    with pytest.raises(SplitError, match=r"writes `prior` in evaluation too.*`if self\.training:`"):
        RIDEWrapper(net, 3, fork_at="b", example_input=calls()[1][0])
    net.only_training = True
    model = RIDEWrapper(net, 3, fork_at="b", example_input=calls()[1][0])
    train_both(net, model, calls())
