"""Runs of trunk and expert on copies, for trials: what is narrowed never runs itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ride_plugin._contexts import in_mode, seed_everything
from ride_plugin._inputs import Inputs, own_inputs
from ride_plugin._split import (
    Split,
    TrunkState,
    Views,
    play,
    read_attributes,
    record,
    write_attributes,
)


def trunk_state(split: Split, views: Views, training: bool, batch: Inputs) -> TrunkState:
    """What the trunk of ``views``, a throwaway copy, returns; its expert has not run yet."""
    start = read_attributes(views.expert, split.attributes)
    write_attributes(views.trunk, split.attributes, start)
    trunk = in_mode(views.trunk, training)
    state, _ = record(trunk, views.running, split.layouts, *own_inputs(batch), stop_at_fork=True)
    return replace(state, attributes=start)


def player_of(
    split: Split, views: Views, state: TrunkState, training: bool = False
) -> Callable[[], Any]:
    """What runs the expert of ``views``, a throwaway copy, on a trunk's result."""

    def run() -> Any:
        seed_everything()
        write_attributes(views.expert, split.attributes, state.attributes)
        views.trunk.train(training)  # an expert may call modules of the trunk again
        return play(in_mode(views.expert, training), views.running, state)

    return run
