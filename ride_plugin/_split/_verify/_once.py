"""What methods that a forward calls on its modules leave there, if they run more than once.

A call such as ``self.drop.step()`` in a backbone's forward is neither a call of a module nor an
operation on tensors: nothing of it is on the tape, and it runs in the trunk's pass and in each
expert's. What it counts is then counted too often. What comes to the same however often it runs
(the shape of the last input, a cache) does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from ride_plugin._checks import version_of
from ride_plugin._contexts import is_stream
from ride_plugin._split._copying import contents_of, same_values
from ride_plugin._split._examine import differ, mark_of
from ride_plugin._split._replay import Absent, own_containers
from ride_plugin._tree import OF_MODULES, Place, snapshot, tensors_in


class Attributes:
    """The plain attributes of the units of a view, to tell afterwards what a pass has set.

    Args:
        root: the trunk or an expert.
        spine: its modules outside units, of which each view has its own.
    """

    def __init__(self, root: nn.Module, spine: Collection[nn.Module]) -> None:
        self.root = root
        self.spine = set(spine)
        self.marks = self._marks()

    def changed(self) -> set[Place]:
        """Where something was set or filled since."""
        now, nothing = self._marks(), ([Absent], None)
        pairs = {p: (self.marks.get(p, nothing), now.get(p, nothing)) for p in {*self.marks, *now}}
        return {place for place, (a, b) in pairs.items() if differ(a[0], b[0]) or a[1] != b[1]}

    def _marks(self) -> dict[Place, tuple[list[Any], Any]]:
        return {
            (path, key): (mark_of(value), _inside(value))
            for path, module in self.root.named_modules()
            if module not in self.spine
            for key, value in vars(module).items()
            if key not in OF_MODULES and not isinstance(value, nn.Module)
        }


def changed_again(root: nn.Module, places: Collection[Place], run: Callable[[], Any]) -> set[Place]:
    """At which of these places another run leaves something else than the run before."""
    before = {place: _left_at(root, place) for place in places}
    run()
    return {place for place in places if not _same(before[place], _left_at(root, place))}


def _inside(value: Any) -> Any:
    """What differs once a tensor is written, or something in an object that holds settings."""
    tensors = [version_of(tensor) for tensor in tensors_in(value)]
    return tensors or contents_of(value)


def _left_at(root: nn.Module, place: Place) -> tuple[Any, Any]:
    value = vars(root.get_submodule(place[0])).get(place[1], Absent)
    copied = snapshot(own_containers(value))
    if isinstance(value, torch.Generator) or is_stream(value):
        return copied, mark_of(value)[1:]  # how far it has drawn
    contents = contents_of(value)
    return copied, None if contents is None else [_without_identity(entry) for entry in contents]


def _without_identity(entry: Any) -> Any:
    """What is in a settings object, but for a mark that says only which object it is."""
    marked = isinstance(entry, tuple) and len(entry) == 2 and not isinstance(entry[1], int | bytes)
    return entry[:1] if marked else entry


def _same(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    ours, theirs = list(tensors_in(a[0])), list(tensors_in(b[0]))
    if ours or theirs:
        return len(ours) == len(theirs) and all(map(same_values, ours, theirs))
    if a[1] is not None and b[1] is not None:
        return bool(a[1] == b[1])
    try:
        compares = vars(object)["__eq__"] is not getattr(type(a[0]), "__eq__", None)
        return bool(a[0] == b[0]) if compares else type(a[0]) is type(b[0])
    except Exception:  # an array, say: nobody can tell
        return type(a[0]) is type(b[0])
