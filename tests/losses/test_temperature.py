"""The schedule behaves like an LR scheduler and refuses what would give wrong temperatures."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from ride_plugin import ArgumentError, DiversityLoss, RIDELoss, TemperatureSchedule

COUNTS = [500, 100, 20, 5]


def official(gamma: float = 0.05, eta: float = 1.0) -> torch.Tensor:
    mean = sum(COUNTS) / len(COUNTS)
    psi = [gamma * n / mean + 1 - gamma for n in COUNTS]
    return torch.tensor([eta * value / max(psi) for value in psi])


def paper(gamma: float = 0.05, eta: float = 1.0) -> torch.Tensor:
    mean = sum(COUNTS) / len(COUNTS)
    psi = [gamma * n / mean + 1 - gamma for n in COUNTS]
    return torch.tensor([eta * value + eta * (1 - max(psi)) for value in psi])


@pytest.mark.parametrize("form", ["paper", "official"])
def test_class_temperatures_act_from_the_start_epoch_on(form) -> None:
    by_class = {"paper": paper, "official": official}[form](eta=1.1)
    schedule = TemperatureSchedule(COUNTS, eta=1.1, start_epoch=2, form=form)
    for epoch in range(5):
        assert schedule.last_epoch == epoch
        expected = torch.full((4,), 1.1) if epoch < 2 else by_class
        torch.testing.assert_close(schedule.temperature, expected)
        schedule.step()


def test_starts_with_class_temperatures_by_default() -> None:
    torch.testing.assert_close(TemperatureSchedule(COUNTS).temperature, official())


@pytest.mark.parametrize(
    "counts", [COUNTS, tuple(COUNTS), np.array(COUNTS), torch.tensor(COUNTS), np.float32(COUNTS)]
)
def test_takes_counts_in_any_usual_form(counts) -> None:
    torch.testing.assert_close(TemperatureSchedule(counts).temperature, official())


def test_uniform_counts_and_zero_gamma_give_one_temperature() -> None:
    for schedule in (TemperatureSchedule([7, 7, 7]), TemperatureSchedule(COUNTS, gamma=0.0)):
        assert schedule.temperature.equal(torch.ones(schedule.num_classes))


def test_resumes_from_its_state_dict_as_if_never_stopped() -> None:
    schedule = TemperatureSchedule(COUNTS, start_epoch=2)
    for _ in range(3):
        schedule.step()
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    resumed = TemperatureSchedule(COUNTS, start_epoch=2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.last_epoch == 3
    assert resumed.temperature.equal(schedule.temperature)


def test_state_survives_inside_another_module() -> None:
    owner = nn.ModuleDict({"schedule": TemperatureSchedule(COUNTS, start_epoch=1)})
    owner["schedule"].step()
    fresh = nn.ModuleDict({"schedule": TemperatureSchedule(COUNTS, start_epoch=1)})
    fresh.load_state_dict(owner.state_dict())
    torch.testing.assert_close(fresh["schedule"].temperature, official())


def test_the_state_is_of_tensors_so_that_any_file_format_can_hold_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2), TemperatureSchedule(COUNTS, start_epoch=1))
    model[1].step()
    state = model.state_dict()
    assert set(state) == {"0.weight", "0.bias", "1.epoch"}
    assert all(isinstance(value, torch.Tensor) for value in state.values())


def test_survives_a_safetensors_file() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.Sequential(nn.Linear(2, 2), TemperatureSchedule(COUNTS, start_epoch=1))
    model[1].step()
    state = model.state_dict()
    fresh = nn.Sequential(nn.Linear(2, 2), TemperatureSchedule(COUNTS, start_epoch=1))
    fresh.load_state_dict(safetensors.load(safetensors.save(state)))
    assert fresh[1].last_epoch == 1
    torch.testing.assert_close(fresh[1].temperature, official())


def test_buffers_without_values_are_filled_again() -> None:
    schedule = TemperatureSchedule(COUNTS, start_epoch=1)
    schedule.step()
    schedule.to("meta").to_empty(device="cpu")
    assert int(schedule.epoch) == schedule.last_epoch == 1
    torch.testing.assert_close(schedule.temperature, official())


@pytest.mark.parametrize("epoch", [-5, 2.9, float("nan")])
def test_an_epoch_that_cannot_be_is_not_loaded(epoch: float) -> None:
    schedule = TemperatureSchedule(COUNTS)
    with pytest.raises(ArgumentError, match="`epoch` to be an integer >= 0, but got"):
        schedule.load_state_dict({"epoch": torch.tensor(epoch)})
    assert schedule.last_epoch == 0


def test_going_back_to_an_earlier_epoch_takes_temperatures_back() -> None:
    schedule = TemperatureSchedule(COUNTS, start_epoch=1)
    early = copy.deepcopy(schedule.state_dict())
    schedule.step()
    schedule.load_state_dict(early)
    assert schedule.temperature.equal(torch.ones(4))


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_a_snapshot_also_within_that_of_its_owner(assign: bool) -> None:
    other = TemperatureSchedule(COUNTS, start_epoch=2)
    diversity = DiversityLoss(COUNTS, start_epoch=1)
    criterion = RIDELoss(nn.CrossEntropyLoss(), diversity, schedules=[other])
    for owner in (criterion, diversity, diversity.schedule):
        state = owner.state_dict()  # not copied, as nobody copies that of a scheduler
        kept = {name: int(value) for name, value in state.items()}
        owner.step()
        assert {name: int(value) for name, value in state.items()} == kept
        owner.load_state_dict(state, assign=assign)
        assert {int(value) for value in owner.state_dict().values()} == {0}
        assert diversity.schedule.temperature.equal(torch.ones(4))
        owner.step()
        assert {name: int(value) for name, value in state.items()} == kept
        owner.load_state_dict(state)


def test_step_keeps_the_buffer_in_place() -> None:
    schedule = TemperatureSchedule(COUNTS, start_epoch=1)
    buffer = schedule.temperature
    schedule.step()
    assert schedule.temperature is buffer
    torch.testing.assert_close(buffer, official())


def test_temperatures_lose_nothing_when_cast_back_and_forth() -> None:
    schedule = TemperatureSchedule(COUNTS).to(torch.bfloat16)
    assert schedule.temperature.dtype == torch.float32
    assert schedule.temperature.equal(TemperatureSchedule(COUNTS).temperature)
    exact = TemperatureSchedule(COUNTS).double().temperature
    assert exact.dtype == torch.float64
    assert schedule.to(torch.float64).temperature.equal(exact)
    assert exact[-1] != exact[-1].float()


def test_copy_steps_by_itself() -> None:
    schedule = TemperatureSchedule(COUNTS, start_epoch=1)
    other = copy.deepcopy(schedule)
    other.step()
    assert schedule.last_epoch == 0
    assert schedule.temperature.equal(torch.ones(4))


def test_repr_names_every_argument() -> None:
    assert repr(TemperatureSchedule(COUNTS)) == (
        "TemperatureSchedule(num_classes=4, eta=1.0, gamma=0.05, start_epoch=0, form='official', "
        "last_epoch=0)"
    )


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([10, 0, 5], r"positive and finite, but got 0 for class 1 \(1 such classes\)"),
        ([10, -3, -5], r"got -3 for class 1 \(2 such classes\)"),
        ([10, float("nan")], "got nan for class 1"),
        ([10, float("inf")], "got inf for class 1"),
        ([[1, 2]], r"one-dimensional.*of shape \[1, 2\]"),
        ([], r"of shape \[0\]"),
        (7, r"of shape \[\]"),
        ("abc", "to be a tensor, an array or a list of numbers, but got 'abc'"),
        (
            [[1, 2], [3]],
            r"to be a tensor, an array or a list of numbers, but got \[\[1, 2\], \[3\]\]",
        ),
    ],
)
def test_impossible_counts_are_named(counts, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"`class_counts`.*{message}"):
        TemperatureSchedule(counts)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("eta", 0.0),
        ("eta", -1.0),
        ("eta", float("nan")),
        ("gamma", -0.1),
        ("gamma", 1.5),
        ("gamma", float("nan")),
        ("start_epoch", -1),
        ("start_epoch", 0.5),
        ("form", "paperr"),
    ],
)
def test_arguments_out_of_range_are_named(argument: str, value) -> None:
    with pytest.raises(ArgumentError, match=f"Expected argument `{argument}`.*but got '?{value}"):
        TemperatureSchedule(COUNTS, **{argument: value})


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize(
    "settings",
    [{"gamma": 0.5}, {"eta": 2.0}, {"form": "paper"}, {"start_epoch": 3}, {"start_epoch": 1}],
)
def test_what_is_set_later_acts_at_once_as_if_built_with_it(settings: dict, epoch: int) -> None:
    kept = TemperatureSchedule(COUNTS, start_epoch=2)
    diversity = DiversityLoss(COUNTS, start_epoch=2)
    built = TemperatureSchedule(COUNTS, **{"start_epoch": 2, **settings})
    buffer = kept.temperature
    for schedule in (kept, diversity.schedule, built):
        schedule.last_epoch = epoch
    for name, value in settings.items():
        setattr(kept, name, value)
        setattr(diversity, name, value)
        assert getattr(diversity, name) == value
    for schedule in (kept, diversity.schedule):
        assert schedule.temperature.equal(built.temperature)
        assert repr(schedule) == repr(built)
        assert int(schedule.state_dict()["epoch"]) == epoch
    assert kept.temperature is buffer  # which a compiled loss has seen


@pytest.mark.parametrize(
    ("name", "value"),
    [("gamma", 1.5), ("eta", 0.0), ("form", "paperr"), ("start_epoch", -1), ("last_epoch", 0.5)],
)
def test_what_cannot_be_is_refused_when_it_is_set(name: str, value) -> None:
    schedule = TemperatureSchedule(COUNTS, form="paper")
    before = repr(schedule)
    with pytest.raises(ArgumentError, match=f"Expected argument `{name}`.*but got '?{value}"):
        setattr(schedule, name, value)
    with pytest.raises(ArgumentError, match=r"must be below 0\.316"):
        schedule.gamma = 0.5  # possible, but not in this form
    assert repr(schedule) == before
    assert schedule.temperature.equal(TemperatureSchedule(COUNTS, form="paper").temperature)


def test_gamma_that_makes_a_temperature_negative_is_told_its_limit() -> None:
    with pytest.raises(ArgumentError, match=r"must be below 0\.316") as error:
        TemperatureSchedule(COUNTS, gamma=0.5, form="paper")
    assert "gamma=0.5" in str(error.value)
    TemperatureSchedule(COUNTS, gamma=0.315, form="paper")
    TemperatureSchedule(COUNTS, gamma=0.5)


def test_temperatures_keep_their_digits_where_half_precision_is_the_default() -> None:
    expected = TemperatureSchedule([300, 100, 20]).temperature
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = TemperatureSchedule([300, 100, 20]).temperature
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
