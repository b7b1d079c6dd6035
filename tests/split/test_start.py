"""Trunk and expert 0 in one pass: the same results, and nobody writes into what others read."""

import pytest
import torch
from torch import nn

from ride_plugin import RIDEWrapper


class ShiftsItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.conv(x.add_(1.0))


class Backbone(nn.Module):
    def __init__(self, late):
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.late = late
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.late(self.early(x)).mean((2, 3)))


LATE = {"pure": lambda: nn.Conv2d(8, 8, 3), "in place": ShiftsItsInput}


def wrapped(late):
    torch.manual_seed(0)
    backbone = Backbone(LATE[late]())
    return RIDEWrapper(backbone, 3, fork_at="late", example_input=torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("late", sorted(LATE))
@pytest.mark.parametrize("training", [False, True])
def test_start_equals_the_trunk_then_expert_zero(late, training):
    model, x = wrapped(late).train(training), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        state, *first = model.start(x)
        alone = model.run_trunk(x)
        for got, expected in zip(first, model.run_expert(0, alone), strict=True):
            torch.testing.assert_close(got, expected)
        rows = torch.tensor([3, 1])
        for index in (1, 2):
            expected = model.run_expert(index, alone.select(rows))
            for got, wanted in zip(
                model.run_expert(index, state.select(rows)), expected, strict=True
            ):
                torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("training", [False, True])
def test_an_expert_that_changes_its_input_in_place_leaves_the_others_theirs(training):
    model, x = wrapped("in place").train(training), torch.randn(4, 3, 8, 8)
    model.return_experts = True
    logits = model(x).expert_logits
    features = model.trunk.early(x)
    for index, expert in enumerate(model.experts):
        by_hand = expert.fc(expert.late.conv(features + 1.0).mean((2, 3)))
        torch.testing.assert_close(logits[:, index], by_hand)


def test_start_runs_the_trunk_once():
    model, calls = wrapped("pure").eval(), []
    model.trunk.early.register_forward_hook(lambda *_: calls.append(1))
    model.start(torch.randn(2, 3, 8, 8))
    assert len(calls) == 1
