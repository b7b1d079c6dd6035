"""Settings that a backbone's modules hold, which stay one object in the backbone and in all parts.

Training code keeps a configuration in its hand that the model holds as well, and sets something in
it later: ``args.epoch = epoch``, ``model.config.use_cache = False``. Copies would not hear of it.
What a forward was seen to change is no settings; where it begins to change some later, the pass
ends in an error, as each expert would go on from what the one before it left.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import PurePath
from types import (
    BuiltinFunctionType,
    FunctionType,
    MemberDescriptorType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ride_plugin._checks import version_of
from ride_plugin._contexts import is_stream
from ride_plugin._errors import ReplayError
from ride_plugin._tree import OF_MODULES, Place, dotted

_ATOMS = (
    *(int, float, complex, bool, str, bytes, type(None), range, slice, np.generic, Enum, PurePath),
    *(type, FunctionType, BuiltinFunctionType, ModuleType, logging.Logger),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_MOST = 10_000  # values in one settings object; what holds more is something else
_OURS = __name__.partition(".")[0]
_MOST_IN_A_PASS = 2000  # values, the names left out: about a millisecond
_LARGE = 4096  # bytes of an array that is looked at in every pass
_PICKLING = ("__reduce__", "__reduce_ex__")


def contents_in(root: nn.Module) -> dict[Place, list[Any]]:
    """Where modules of ``root`` hold settings as plain attributes, and what is in them.

    Settings are dictionaries and lists with something in them and objects of classes written in
    Python, in which there are numbers, names, and containers and objects of such, nothing else; in
    an object there may be tensors and arrays as well, but none that the modules own.
    What a plain dictionary or list of one layer alone holds (the scales of its adapters, say) is
    that layer's own state: methods of the layer write it.
    """
    owned = frozenset(map(id, (*root.modules(), *root.parameters(), *root.buffers())))
    known: dict[int, list[Any] | None] = {}
    holders: dict[int, int] = {}
    found: dict[Place, list[Any]] = {}
    for (path, name), value in _objects_in(root):
        if id(value) not in known:  # many modules may hold one configuration
            can_be = _can_be_settings(value)
            known[id(value)] = contents_of(value, owned=owned) if can_be else None
        contents = known[id(value)]
        if contents is not None:
            found[path, name] = contents
            everybodys = path == "" or type(value) not in (dict, list)
            holders[id(contents)] = holders.get(id(contents), 0) + (2 if everybodys else 1)
    return {place: contents for place, contents in found.items() if holders[id(contents)] > 1}


def held_together_by(parts: Sequence[nn.Module]) -> dict[str, Any]:
    """The settings that are one object in several parts of a model, by a name that one holds."""
    names: dict[int, str] = {}
    found: dict[int, Any] = {}
    holders: dict[int, set[int]] = {}
    for index, part in enumerate(parts):
        for place, value in _objects_in(part):
            if type(value).__module__.startswith(_OURS) or not _can_be_settings(value):
                continue
            names.setdefault(id(value), dotted(*place))
            found[id(value)] = value
            holders.setdefault(id(value), set()).add(index)
    shared = [key for key, those in holders.items() if len(those) > 1]
    return {names[key]: found[key] for key in shared if _is_quickly_read(found[key])}


def _objects_in(root: nn.Module) -> Iterator[tuple[Place, Any]]:
    """The plain attributes of modules that are neither single values nor tensors nor modules."""
    for path, module in root.named_modules():
        for name, value in vars(module).items():
            if not (name in OF_MODULES or isinstance(value, (*_ATOMS, Tensor, nn.Module))):
                yield (path, name), value


def _is_quickly_read(settings: Any) -> bool:
    """Whether it may be looked at in every pass: not if an `args` holds a whole data set."""
    contents = contents_of(settings, _mark_at_a_glance, names=False)
    return contents is not None and len(contents) <= _MOST_IN_A_PASS


@contextmanager
def unchanged(settings: Mapping[str, Any]) -> Iterator[None]:
    """Raise if what runs in this block changes settings; between such blocks anybody may.

    A name that a forward fills in, as that of transformers fills in `config.problem_type`, is the
    same for all experts.

    Raises:
        ReplayError: it has changed some; the message names them.
    """
    before = [_at_a_glance(value) for value in settings.values()]
    yield
    for (name, value), (old, _) in zip(settings.items(), before, strict=True):
        if _at_a_glance(value)[0] != old:
            raise ReplayError(
                f"The forward has changed `{name}` ({type(value).__name__}), which trunk, experts "
                "and the backbone hold together: it changed nothing in it when the model was "
                "wrapped, so that it was taken for settings, and each expert has gone on from what "
                "the one before it left. Keep what a forward counts or collects in a buffer or an "
                "attribute of a module, change settings outside of the forward, or wrap the "
                "backbone in a state in which its forward changes them; then each part gets its "
                "own."
            )


def _at_a_glance(settings: Any) -> tuple[list[Any], list[Any]]:
    """The contents, as far as a pass looks at them, and what has to stay alive meanwhile."""
    contents = contents_of(settings, _mark_at_a_glance, names=False)
    if contents is not None:
        return contents, []
    state = state_of(settings) or []  # of what became common later, see `_handed_out`
    return list(map(id, state)), state


def contents_of(
    settings: Any,
    mark: Callable[[Any], Any] | None = None,
    *,
    names: bool = True,
    owned: Set[int] = frozenset(),
) -> list[Any] | None:
    """All that a settings object holds, in a list that differs once something in it is changed.

    None if anything is in it that no settings hold: a module, an open file, a tensor with
    gradients, and in a container any tensor. A namespace is made for settings, whatever they are.

    Args:
        settings: the object.
        mark: of what is no plain value, what differs once it is changed.
        names: whether texts, and None in their place, are listed.
        owned: modules and tensors, by id, of which each part of a model has its own.
    """
    mark = _mark_of if mark is None else mark
    takes_all = isinstance(settings, SimpleNamespace | Namespace)
    takes_tensors = _is_plain_object(settings)
    found: list[Any] = []
    seen: dict[int, int] = {}
    waiting = [settings]
    while waiting:
        value = waiting.pop()
        if value is None or type(value) is str:
            if names:
                found.append(value)
        elif isinstance(value, _ATOMS):
            found.append(value)
        elif id(value) in seen:
            found.append((seen[id(value)],))
        else:
            inside = _inside(value)
            taken = inside is not None or takes_all or (takes_tensors and _is_fixed_tensor(value))
            if not taken or id(value) in owned or len(seen) > _MOST:
                return None
            seen[id(value)] = len(seen)
            found.append((type(value), mark(value) if inside is None else len(inside)))
            waiting += inside or ()
    return found


def state_of(value: Any) -> list[Any] | None:
    """What is in a container or an object of Python, one level deep; None of what has no state."""
    if isinstance(value, (*_ATOMS, Tensor, nn.Module, tuple, frozenset)) or callable(value):
        return None
    inside = _inside(value)
    if inside is None and hasattr(value, "__dict__"):
        return [*vars(value), *vars(value).values()]
    return inside


def settings_at(root: nn.Module, places: Iterable[Place]) -> list[Any]:
    """The settings at these places, each once."""
    found = [vars(root.get_submodule(path))[name] for path, name in places]
    return list({id(value): value for value in found}.values())


def as_they_are(values: Iterable[Any]) -> dict[int, Any]:
    """A deepcopy memo by which copies hold these values themselves."""
    return {id(value): value for value in values}


def _mark_of(value: Any) -> Any:
    """What differs once a tensor or an array is written; of anything else, which object it is."""
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, torch.Generator) or is_stream(value):
        return object()  # equal to nothing: whoever draws from one changes it
    return id(value), version_of(value) if isinstance(value, Tensor) else None


def _mark_at_a_glance(value: Any) -> Any:
    """The same in a pass, where nothing large is read and who draws random numbers may go on."""
    if isinstance(value, np.ndarray) and value.nbytes <= _LARGE:
        return value.tobytes()
    return id(value), version_of(value) if isinstance(value, Tensor) else None


def _can_be_settings(value: Any) -> bool:
    if isinstance(value, dict | list):
        return len(value) > 0
    return _is_plain_object(value)


def _is_fixed_tensor(value: Any) -> bool:
    """Whether this is a table of numbers that is no weight."""
    return isinstance(value, np.ndarray) or (isinstance(value, Tensor) and not value.requires_grad)


def _inside(value: Any) -> list[Any] | None:
    if isinstance(value, dict):
        return [*dict.keys(value), *dict.values(value), *getattr(value, "__dict__", {}).values()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return list(value)
    if not _is_plain_object(value):
        return None
    state = getattr(value, "__dict__", {}) | _slots_of(value)
    return [*state, *state.values()]


def _is_plain_object(value: Any) -> bool:
    """Whether all of its state is in its ``__dict__`` and in slots that its classes name.

    Not so with what says how it is pickled.
    """
    if isinstance(value, (Tensor, nn.Module, *_ATOMS)):
        return False
    kinds = type(value).__mro__[:-1]
    if not hasattr(value, "__dict__") and not all("__slots__" in vars(kind) for kind in kinds):
        return False
    usual = all(getattr(type(value), name) is getattr(object, name) for name in _PICKLING)
    return usual or isinstance(value, SimpleNamespace)


def _slots_of(value: Any) -> dict[str, Any]:
    """What is in the slots of an object, by name."""
    found: dict[str, Any] = {}
    for kind in type(value).__mro__:
        if "__slots__" in vars(kind):
            for name, slot in vars(kind).items():
                if type(slot) is MemberDescriptorType:
                    with suppress(AttributeError):  # nothing is in it
                        found[name] = slot.__get__(value)
    return found
