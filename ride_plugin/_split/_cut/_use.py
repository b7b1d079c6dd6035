"""What an expert does with the values of the trunk and with tensors outside of all units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ride_plugin._contexts import RandomState
from ride_plugin._split._copying import storage_of
from ride_plugin._split._cut._views import Views
from ride_plugin._split._examine import RANDOM, differ, mark_of
from ride_plugin._split._replay import TrunkState, passed_by, play, reads, write_attributes
from ride_plugin._tree import Place, holds_tensors, logits_in, map_tensors, tensors_in


class Reads(TorchFunctionMode):
    """Collects the tensors whose values any operation reads; looking at a shape does not count.

    Gradients alone would miss what reaches the logits through a comparison, an index, a detached
    branch, or a Python decision.

    Attributes:
        seen: these tensors, by id.
        chooses: whether integers, truth values or plain numbers were computed of any tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Tensor] = {}
        self.chooses = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if reads(func, result):
            given = {id(t): t for t in tensors_in((args, kwargs))}
            self.seen.update(given)
            made = [t for t in tensors_in(result) if id(t) not in given]
            whole = any(not (t.is_floating_point() or t.is_complex()) for t in made)
            self.chooses |= bool(given) and (whole or not holds_tensors(result))
        return result


@dataclass
class Use:
    """What an expert's pass does with the values and tensors that it finds."""

    live: list[tuple[bool, ...]]
    clone: list[tuple[bool, ...]]
    reads: set[str]
    writes: set[str]
    late: set[Place]
    chooses: bool


def use_by_expert(
    views: Views,
    state: TrunkState,
    attributes: Sequence[Place],
    parameters: dict[str, nn.Parameter],
    outside: set[str],
) -> Use:
    """Watch one pass of the expert, with gradients where they can be had.

    A reentrant checkpoint gives none to `torch.autograd.grad`, so what is in it is called directly.
    Where they cannot be had (a layer without a backward in evaluation, say), every value is taken
    to be in use, which costs memory and nothing else.
    """
    try:
        write_attributes(views.expert, attributes, state.attributes)
        with passed_by(lambda: True):
            return _watch_expert(views, state, attributes, parameters, outside, gradients=True)
    except Exception:
        write_attributes(views.expert, attributes, state.attributes)
        return _watch_expert(views, state, attributes, parameters, outside, gradients=False)


def _watch_expert(
    views: Views,
    state: TrunkState,
    places: Sequence[Place],
    parameters: dict[str, nn.Parameter],
    outside: set[str],
    gradients: bool,
) -> Use:
    handed, buffers = _Handed(gradients), _Buffers(views.expert, outside)
    at_fork: list[list[Any]] = []
    watch = Reads()

    def look() -> None:
        at_fork.extend(marks_at(views.expert, places))
        watch.chooses = False  # of what runs behind the fork is asked

    with torch.set_grad_enabled(gradients):
        values = [map_tensors(handed.hand, value) for value in state.values]
        watched = TrunkState(state.batch_size, state.keys, values, None, numbers=state.numbers)
        with watch:  # below the player's mode: what is replayed reads nothing
            logits = logits_in(play(views.expert, views.running, watched, look))
    flat = [list(tensors_in(value)) for value in state.values]
    used = {handed.origin[key] for key in watch.seen if key in handed.origin}
    read_parameters: set[str] = set()
    if not gradients or logits is None:
        read_parameters = {name for name, p in parameters.items() if id(p) in watch.seen}
        used = {id(tensor) for entry in flat for tensor in entry}
    elif logits.requires_grad:
        asked = [*handed.leaves.values(), *parameters.values()]
        found = torch.autograd.grad(logits.sum(), asked, allow_unused=True)
        keys = [*handed.leaves, *parameters]
        reached = {key for key, grad in zip(keys, found, strict=True) if grad is not None}
        used |= handed.leaves.keys() & reached
        read_parameters = parameters.keys() & reached
    changed = handed.changed()
    # A tensor that shares its memory with one that is changed in place changes with it.
    memory = {storage_of(tensor) for entry in flat for tensor in entry if id(tensor) in changed}
    bound = buffers.bound(handed)
    marks = marks_at(views.expert, places)
    late = {p for p, a, b in zip(places, at_fork, marks, strict=True) if differ(a, b)} - {RANDOM}
    return Use(
        # Integers and booleans (masks, positions) are small: they are always kept.
        live=[tuple(id(t) in used or not t.is_floating_point() for t in entry) for entry in flat],
        clone=[tuple(id(t) in changed or storage_of(t) in memory for t in entry) for entry in flat],
        reads=read_parameters,
        writes=bound | buffers.filled(),
        late=late | {place_of(name) for name in bound},
        chooses=watch.chooses,
    )


class _Handed:
    """Values of the trunk as an expert gets them: copies, which tell what became of them.

    Attributes:
        leaves: what gradients are asked of, by the id of the recorded value.
        origin: the id of the recorded value, by that of what the expert is given.
    """

    def __init__(self, gradients: bool) -> None:
        self._gradients = gradients
        self._given: list[tuple[Tensor, int]] = []
        self.leaves: dict[int, Tensor] = {}
        self.origin: dict[int, int] = {}

    def hand(self, value: Tensor) -> Tensor:
        """A copy of a recorded value."""
        if self._gradients and value.is_floating_point():
            if id(value) not in self.leaves:
                self.leaves[id(value)] = value.detach().clone().requires_grad_(True)
            own = self.leaves[id(value)].clone()  # not a leaf: an expert may change it in place
        else:
            own = value.detach().clone()
        self.origin[id(own)] = id(value)
        self._given.append((own, own._version))
        return own

    def changed(self) -> set[int]:
        """Ids of the recorded values that each expert needs a copy of."""
        # A hook that an expert registers on a tensor is for its own share of the gradient.
        return {
            self.origin[id(own)]
            for own, version in self._given
            if own._version != version or own._backward_hooks
        }


class _Buffers:
    """Buffers that belong to no unit, as they were before an expert's pass."""

    def __init__(self, expert: nn.Module, names: set[str]) -> None:
        self._expert = expert
        self._before = {
            name: (tensor, tensor._version, storage_of(tensor))
            for name in names
            if isinstance(tensor := tensor_at(expert, name), Tensor)
            and not isinstance(tensor, nn.Parameter)
        }

    def bound(self, handed: _Handed) -> set[str]:
        """Names that the pass has bound to another tensor, and not to one of the trunk's."""
        return {
            name
            for name, (tensor, *_) in self._before.items()
            if (now := tensor_at(self._expert, name)) is not tensor and id(now) not in handed.origin
        }

    def filled(self) -> set[str]:
        """Names of those that the pass has written into."""
        return {
            name
            for name, (tensor, version, memory) in self._before.items()
            if tensor._version != version or storage_of(tensor) != memory
        }


def marks_at(root: nn.Module, places: Sequence[Place]) -> list[list[Any]]:
    """Marks of the attributes at these places: they differ once something sets or fills one."""
    return [
        [RandomState.now().mark()]
        if (path, key) == RANDOM
        else mark_of(root.get_submodule(path).__dict__.get(key))
        for path, key in places
    ]


def tensor_at(root: nn.Module, name: str) -> object:
    """The tensor of this name, as the module that holds it finds it; None if there is none."""
    path, attribute = place_of(name)
    module = root.get_submodule(path)
    # A forward that sets an entry of `_buffers` passes by the reference to a tensor of the trunk.
    buffer = module._buffers.get(attribute)
    return getattr(module, attribute, None) if buffer is None else buffer


def place_of(name: str) -> Place:
    """The path of the module that holds a tensor, and its name there."""
    path, _, attribute = name.rpartition(".")
    return path, attribute
