"""The parts that a build hands over: a trunk, an expert, and what runs them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from ride_plugin._inputs import Inputs
from ride_plugin._split._state import Layout
from ride_plugin._split._views import Link, Views


@dataclass
class Split:
    """A backbone cut in two, with one expert that is an exact copy of its forked part.

    Attributes:
        views: the trunk and the expert.
        layouts: what crosses the cut, for each path seen (evaluation, training).
        attributes: plain attributes that a forward changes, put back before each expert.
        inputs: an example of two rows.
        num_classes: ``C``.
        fork_at: name of the first forked submodule.
        classifier: name of the classifier inside an expert, or None if there is no such module.
    """

    views: Views
    layouts: list[Layout]
    attributes: list[tuple[str, str]]
    inputs: Inputs
    num_classes: int
    fork_at: str
    classifier: str | None


def another_expert(views: Views) -> tuple[nn.Module, list[Link]]:
    """Copy the expert; what belongs to the trunk stays shared, what is tied to it stays tied."""
    memo: dict[int, Any] = {id(views.running): views.running}
    memo.update((id(module), module) for module in views.trunk.modules())
    for tensor in (*views.trunk.parameters(), *views.trunk.buffers()):
        memo[id(tensor)] = tensor
    inside = {id(module) for module in views.expert.modules()}
    links = [link for link in views.links if id(link.view) in inside]
    expert, links = copy.deepcopy((views.expert, links), memo)
    return expert, links
