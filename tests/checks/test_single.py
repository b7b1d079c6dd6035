"""The room of argument checks: what comes in, how it goes on, in which words it is refused."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from ride_plugin import (
    ArgumentError,
    ConfidenceRouter,
    DistillationLoss,
    DiversityLoss,
    ExpertRouter,
    RIDELoss,
    RIDEWrapper,
    RoutingInference,
    RoutingLoss,
    _checks,
)
from ride_plugin.longtail import FocalLoss, LDAMLoss
from ride_plugin.routing import RoutingQueue
from tests.hostile import case_name


@pytest.mark.parametrize(
    "value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3).int()]
)
def test_integers_of_python_numpy_and_torch_are_integers(value: Any) -> None:
    number = _checks.check_integer(value, "size", 3, 3)
    assert type(number) is int
    assert number == 3
    assert _checks.check_number(value, "size", 3, 3) == 3.0


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), torch.tensor(0.5), Fraction(1, 2)])
def test_numbers_of_python_numpy_and_torch_are_numbers(value: Any) -> None:
    number = _checks.check_number(value, "share", 0, 1)
    assert type(number) is float
    assert number == 0.5


NO_NUMBERS = [
    *("3", None, True, np.True_, torch.tensor(True), [3], np.array([3]), torch.tensor([3])),
    *(
        math.nan,
        torch.tensor(math.nan),
        np.float32("nan"),
        3j,
        object(),
        torch.empty((), device="meta"),
    ),
]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=case_name)
def test_what_is_no_number_is_refused_in_the_same_words(value: Any) -> None:
    with pytest.raises(ArgumentError, match="`size` to be a finite number >= 0, but got "):
        _checks.check_number(value, "size", 0)
    with pytest.raises(ArgumentError, match="`size` to be an integer >= 0, but got "):
        _checks.check_integer(value, "size")


@pytest.mark.parametrize(
    ("arguments", "allowed", "refused", "words"),
    [
        ({}, [-1e300, 0], [math.inf, -math.inf, 10**400], "a finite number"),
        ({"low": 1}, [1], [0.999], "a finite number >= 1"),
        ({"low": 1, "open_low": True}, [1.001], [1], "a finite number > 1"),
        ({"low": 0, "high": 1}, [0, 1], [-0.1, 1.1], "a finite number >= 0 and <= 1"),
        ({"high": 1, "open_high": True}, [-5, 0.9], [1], "a finite number < 1"),
    ],
)
def test_limits_of_a_number(arguments: Any, allowed: Any, refused: Any, words: str) -> None:
    for value in allowed:
        assert _checks.check_number(value, "size", **arguments) == value
    for value in refused:
        with pytest.raises(ArgumentError, match=f"`size` to be {words}, but got "):
            _checks.check_number(value, "size", **arguments)


def test_limits_of_an_integer() -> None:
    assert [_checks.check_integer(i, "size", 1, 3) for i in (1, 3)] == [1, 3]
    for value in (0, 4, 2.0, np.float64(2)):
        with pytest.raises(ArgumentError, match="`size` to be an integer from 1 to 3, but got "):
            _checks.check_integer(value, "size", 1, 3)


def test_the_way_to_the_one_that_is_held_is_named() -> None:
    def fits(value: object) -> bool:
        return isinstance(value, torch.nn.ReLU)

    one = torch.nn.DataParallel(torch.nn.ReLU())
    assert "`net.module`" in _checks.way_inside(one, "net", fits)
    assert '`net.get_submodule("0.module")`' in _checks.way_inside(
        torch.nn.Sequential(one), "net", fits
    )
    two = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU())
    for none in (two, torch.nn.Identity(), torch.nn.ReLU(), None):
        assert _checks.way_inside(none, "net", fits) == ""
    with pytest.raises(ArgumentError, match=r"but got Sequential\.$"):  # not the start of a repr
        _checks.refuse("net", "a number", two)


def test_advice_ends_the_message() -> None:
    with pytest.raises(ArgumentError) as error:
        _checks.check_integer("a", "size", 1, advice="Count them.")
    assert str(error.value) == (
        "Expected argument `size` to be an integer >= 1, but got 'a'. Count them."
    )


def test_truth_is_true_or_false() -> None:
    assert _checks.check_bool(np.True_, "flag") is True
    assert _checks.check_bool(False, "flag") is False
    for value in (1, 0, None, "yes", [], torch.ones(2)):
        with pytest.raises(ArgumentError, match="`flag` to be True or False, but got "):
            _checks.check_bool(value, "flag")


def test_choices_are_compared_with_their_kind() -> None:
    choices = (True, "training")
    assert [_checks.check_choice(c, "kind", choices) for c in choices] == [True, "training"]
    for value in (1, "train", None, [], np.ones(2), torch.ones(2)):
        with pytest.raises(ArgumentError, match="`kind` to be one of True, 'training', but got "):
            _checks.check_choice(value, "kind", choices)


def test_objects_and_functions() -> None:
    layer = torch.nn.Linear(2, 2)
    assert _checks.check_instance(layer, "model", torch.nn.Module, "a module") is layer
    assert _checks.check_callable(layer, "model", "model(x)") is layer
    with pytest.raises(ArgumentError, match="`model` to be a module, but got 'fc'"):
        _checks.check_instance("fc", "model", torch.nn.Module, "a module")
    with pytest.raises(ArgumentError, match=r"`model` to be callable as model\(x\), but got 'fc'"):
        _checks.check_callable("fc", "model", "model(x)")


def test_long_values_are_shown_short() -> None:
    with pytest.raises(ArgumentError) as error:
        _checks.check_number(list(range(10_000)), "size")
    assert len(str(error.value)) < 120


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (DiversityLoss([5, 3, 2]), "weight"),
        (DistillationLoss(), "weight"),
        (DistillationLoss(), "temperature"),
        (FocalLoss(), "gamma"),
        (RoutingLoss(), "pos_weight"),
        (RoutingLoss(), "neg_weight"),
    ],
)
def test_a_number_that_is_set_while_training_is_checked_as_at_construction(
    loss: Any, name: str
) -> None:
    """A weight that falls with the epoch and passes zero would turn a loss round."""
    with pytest.raises(ArgumentError, match=f"`{name}` to be a finite number >=? ?0, but got -0.1"):
        setattr(loss, name, -0.1)
    assert getattr(loss, name) > 0
    setattr(loss, name, np.float32(0.5))
    assert type(getattr(loss, name)) is float
    assert "0.5" in repr(loss)
    assert getattr(copy.deepcopy(loss), name) == 0.5


def _made() -> dict[str, Any]:
    """One of everything whose choices and flags may be set later."""
    backbone = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    model = RIDEWrapper(backbone, 2, fork_at="2")
    return {
        "distillation": DistillationLoss(),
        "diversity": DiversityLoss([5, 3, 2], form="paper"),
        "ride": RIDELoss(torch.nn.CrossEntropyLoss(), [5, 3, 2]),
        "confidence": ConfidenceRouter(),
        "ldam": LDAMLoss([5, 3, 2]),
        "model": model,
        "queue": RoutingQueue(RoutingInference(model, ConfidenceRouter())),
    }


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "right"),
    [
        ("distillation", "form", "offical", "official"),
        ("diversity", "form", "oficial", "official"),
        ("diversity", "detach_others", "no", False),
        ("ride", "over_experts", "avg", "mean"),
        ("confidence", "kind", "max_prob", "max_probability"),
        ("ldam", "scale", float("nan"), 20.0),
        ("model", "checkpoint_experts", "false", True),
        ("queue", "batch_size", 0, 8),
        ("queue", "max_wait", -1, 0),
    ],
)
def test_a_choice_that_is_set_later_is_checked_as_at_construction(
    owner: str, name: str, wrong: object, right: object
) -> None:
    """A misspelt choice would silently be the other one."""
    made = _made()[owner]
    before = getattr(made, name)
    with pytest.raises(ArgumentError, match=f"Expected argument `{name}` to be "):
        setattr(made, name, wrong)
    assert getattr(made, name) == before
    setattr(made, name, right)
    assert getattr(made, name) == right
    assert getattr(copy.deepcopy(made), name) == right


def test_what_a_router_was_made_for_cannot_be_set() -> None:
    """Another value would leave out what is learnt of the inputs, or not fit the layers."""
    router = ExpertRouter(6, 2, num_classes=3)
    for name in ("inputs", "top_k"):
        with pytest.raises(AttributeError, match=name):
            setattr(router, name, "paper")
