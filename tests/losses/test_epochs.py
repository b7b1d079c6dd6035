"""A loop that never ends an epoch is told once, and no other loop is."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import DiversityLoss, RIDELoss, RIDEWrapper, TemperatureSchedule
from ride_plugin.longtail import DeferredReweighting, LDAMLoss

COUNTS = [900, 90, 10]
TARGET = torch.arange(500) % 3


def experts(num_experts: int = 3) -> Tensor:
    return torch.randn(500, num_experts, 3, requires_grad=True)


def epochs(loss: nn.Module, number: int, output: Tensor | None = None) -> None:
    """As many epochs as it takes to score each of the thousand samples so often."""
    output = experts() if output is None else output
    for _ in range(2 * number):
        loss(output, TARGET)


def silent(loss: nn.Module, output: Tensor | None = None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epochs(loss, 25, output)


@pytest.mark.parametrize("alone", [True, False])
def test_a_loop_without_steps_is_told_once_what_has_no_effect(alone) -> None:
    diversity = DiversityLoss(COUNTS, start_epoch=8)
    loss = diversity if alone else RIDELoss(nn.CrossEntropyLoss(), diversity)
    epochs(loss, 10)
    expected = re.escape("`start_epoch=8` of TemperatureSchedule has no effect before `step()`")
    with pytest.warns(UserWarning, match=expected) as told:
        epochs(loss, 1)
    assert [one.filename for one in told] == [__file__]
    silent(loss)


def test_a_schedule_that_was_given_is_told() -> None:
    criterion = nn.CrossEntropyLoss(weight=torch.ones(3))
    drw = DeferredReweighting(criterion, COUNTS, start_epoch=5)
    loss = RIDELoss(criterion, COUNTS, schedules=[drw])
    epochs(loss, 10)
    with pytest.warns(UserWarning, match="`start_epoch=5` of DeferredReweighting") as told:
        epochs(loss, 1)
    assert len(told) == 1
    silent(loss)


@pytest.mark.parametrize(
    "move",
    [
        lambda loss: loss.step(),
        lambda loss: loss.diversity.step(),
        lambda loss: setattr(loss.diversity.schedule, "last_epoch", 0),
        lambda loss: loss.load_state_dict(stepped().state_dict()),
    ],
    ids=["step", "diversity", "last_epoch", "resumed"],
)
def test_a_loop_that_knows_of_epochs_is_not_told(move) -> None:
    loss = RIDELoss(nn.CrossEntropyLoss(), DiversityLoss(COUNTS, start_epoch=100))
    epochs(loss, 9)
    move(loss)
    silent(loss)


def stepped() -> RIDELoss:
    loss = RIDELoss(nn.CrossEntropyLoss(), DiversityLoss(COUNTS, start_epoch=100))
    loss.step()
    return loss


@pytest.mark.parametrize(
    "diversity",
    [
        DiversityLoss(COUNTS),
        DiversityLoss(COUNTS, start_epoch=8, gamma=0.0),
        DiversityLoss(COUNTS, start_epoch=8, weight=0.0),
        DiversityLoss([500, 500, 500], start_epoch=8),
        DiversityLoss([500, 500, 500], start_epoch=8, form="paper", eta=1.1),
        DiversityLoss([0.9, 0.09, 0.01], start_epoch=8),
        DiversityLoss([90, 9, 1], start_epoch=8),
        DiversityLoss([9000.5, 90, 1], start_epoch=8),
    ],
    ids=["started", "gamma", "weight", "even", "even paper", "shares", "percent", "estimates"],
)
def test_a_schedule_that_changes_nothing_or_tells_no_length_is_silent(diversity) -> None:
    silent(diversity)
    silent(RIDELoss(nn.CrossEntropyLoss(), diversity))


def test_a_schedule_that_gives_the_weights_there_are_is_silent() -> None:
    criterion = nn.CrossEntropyLoss(weight=torch.ones(3))
    drw = DeferredReweighting(criterion, COUNTS, start_epoch=5, beta=0.0)
    silent(RIDELoss(criterion, COUNTS, schedules=[drw]))


def test_a_setting_that_comes_to_act_later_is_told_later() -> None:
    diversity = DiversityLoss(COUNTS, start_epoch=8, gamma=0.0)
    silent(diversity)
    diversity.gamma = 0.05
    with pytest.warns(UserWarning, match="has no effect before"):
        epochs(diversity, 30)


def test_what_is_no_training_of_several_experts_is_not_counted() -> None:
    diversity = DiversityLoss(COUNTS, start_epoch=8)
    silent(diversity, experts(1))
    silent(diversity, experts().detach())
    with torch.no_grad():
        silent(diversity)
        silent(RIDELoss(nn.CrossEntropyLoss(), diversity))
    diversity.eval()
    silent(diversity)
    assert diversity._scored == 0


def test_two_views_and_two_labels_a_sample_are_no_epochs() -> None:
    loss = RIDELoss(nn.CrossEntropyLoss(), DiversityLoss(COUNTS, start_epoch=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            epochs(loss, 4)
            loss.step()


def test_heads_that_share_a_schedule_count_for_themselves() -> None:
    schedule = TemperatureSchedule(COUNTS, start_epoch=8)
    heads = [DiversityLoss(COUNTS, temperature=schedule) for _ in range(12)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for head in heads:
            epochs(head, 9)


def test_a_copy_counts_what_a_model_returns() -> None:
    backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    model = RIDEWrapper(backbone, 3, fork_at="2", example_input=torch.randn(2, 4))
    loss = copy.deepcopy(RIDELoss(nn.CrossEntropyLoss(), DiversityLoss(COUNTS, start_epoch=8)))
    output = model(torch.randn(500, 4))
    with pytest.warns(UserWarning, match="no epoch was ended"):
        epochs(loss, 11, output)


def test_schedules_may_be_added_later() -> None:
    criterion = nn.CrossEntropyLoss(weight=torch.ones(3))
    loss = RIDELoss(criterion, COUNTS)
    epochs(loss, 1)
    loss.schedules.append(DeferredReweighting(criterion, COUNTS, start_epoch=5))
    with pytest.warns(UserWarning, match="DeferredReweighting"):
        epochs(loss, 10)


@pytest.mark.compiles
def test_compiled_losses_neither_count_nor_break_the_graph() -> None:
    loss = RIDELoss(LDAMLoss(COUNTS, scale=30.0), DiversityLoss(COUNTS, start_epoch=8))
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    epochs(compiled, 11)
    assert loss._scored == loss.diversity._scored == 0
