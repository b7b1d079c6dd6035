"""Recording the glue of a forward, and replaying it."""

from __future__ import annotations

import threading

import pytest
import torch

from ride_plugin import ReplayError
from ride_plugin._split._replay._tape import Player, Recorder, Running


def record() -> tuple[tuple[str, ...], list[object]]:
    recorder = Recorder(((), {}), stops=lambda: False, layouts=())
    x = torch.ones(2)
    recorder.enter()
    y = torch.relu(x) * 2
    recorder.unit_begins()
    torch.tanh(y)  # inside a unit: not glue
    recorder.unit_ends("unit", y)
    y[0] = 5
    y.shape[0] + 1
    recorder.leave()
    return tuple(recorder.keys), recorder.values


def test_glue_and_units_are_recorded_in_order() -> None:
    keys, _ = record()
    assert keys == ("inputs", "relu", "mul", "unit", "__setitem__")


def test_replay_returns_what_was_recorded() -> None:
    keys, values = record()
    player, x = Player(keys, values), torch.full((2,), torch.nan)
    player.enter()
    try:
        y = torch.relu(x) * 3
        assert player.next_value() is y
        y[0] = 7  # replayed: not assigned again
    finally:
        player.leave()
    assert y.tolist() == [5, 2]


def test_another_operation_is_out_of_step() -> None:
    player, x = Player(*record()), torch.ones(2)
    player.enter()
    try:
        with pytest.raises(ReplayError, match=r"came to `tanh` where the trunk ran `relu`"):
            torch.tanh(x)
    finally:
        player.leave()


def test_attributes_of_tensors_are_told_apart() -> None:
    recorder, x = Recorder(((), {}), stops=lambda: False, layouts=()), torch.ones(2, 3)
    recorder.enter()
    assert [x.shape, x.mT.shape, x.requires_grad, x.data.shape] == [(2, 3), (3, 2), False, (2, 3)]
    recorder.leave()
    assert recorder.keys == ["inputs", "mT.__get__", "data.__get__"]
    player = Player(tuple(recorder.keys), recorder.values)
    player.enter()
    try:
        assert x.shape == (2, 3)
        assert x.mT is recorder.values[1]
        assert x.requires_grad is False
        assert x.data is recorder.values[2]
    finally:
        player.leave()


def test_early_fork_is_out_of_step() -> None:
    with pytest.raises(ReplayError, match="came to `the fork`"):
        Player(*record()).fork_begins()


def test_each_thread_has_its_own_pass() -> None:
    running = Running()
    running.features = torch.ones(1)
    seen: list[object] = []
    thread = threading.Thread(target=lambda: seen.append(running.features))
    thread.start()
    thread.join()
    assert seen == [None]
