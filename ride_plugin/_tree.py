"""Tensors inside nested values: what modules take and return, whatever container they use."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import is_
from typing import Any, TypeAlias

from torch import Tensor, nn

OF_MODULES = frozenset(vars(nn.Module()))
"""The attributes that every module has; the others are somebody's own."""

CONTAINERS = (list, dict, set, deque)
"""What a module fills from call to call."""

_PLAIN = frozenset({type(None), bool, int, float, str})

Path: TypeAlias = tuple[int | str, ...]
"""A place inside nested values: keys, indices and names of fields, from outside to inside."""

Place: TypeAlias = tuple[str, str]
"""A place inside a module: the name of a submodule, and an attribute or buffer of it."""


def dotted(path: str, name: str) -> str:
    """The name in a model of what its submodule at ``path`` has under a name; "" is the model."""
    return f"{path}.{name}" if path else name


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, depth first: tuples, lists, deques, mappings, dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple | deque):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def cloned(tensor: Tensor) -> Tensor:
    """A copy of a tensor without its gradient history; of a parameter another parameter."""
    copied = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copied, tensor.requires_grad)
    return copied


def parameters_of(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's parameters under all their names, as torch sees them in a module around it.

    The module's own ``named_parameters`` may be overridden, with the arguments of older versions.
    """
    return nn.Module.named_parameters(module, remove_duplicate=False)


def buffers_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's buffers, in the way of :func:`parameters_of`."""
    return nn.Module.named_buffers(module, remove_duplicate=False)


def holds_tensors(value: Any) -> bool:
    """Whether there is a tensor in a value, where :func:`tensors_in` looks."""
    return next(tensors_in(value), None) is not None


def ids_of_tensors(module: nn.Module) -> set[int]:
    """Ids of a module's parameters and buffers."""
    return {id(tensor) for tensor in (*module.parameters(), *module.buffers())}


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return the value with ``function`` applied to its tensors, in :func:`tensors_in`'s order."""
    if isinstance(value, Tensor):
        return function(value)
    if not holds_tensors(value):
        return value
    if type(value) is dict:
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, Mapping):
        changed = _copied_mapping(value)
        for key, item in value.items():
            changed[key] = map_tensors(function, item)
        return changed
    if isinstance(value, deque):
        return type(value)((map_tensors(function, item) for item in value), value.maxlen)
    if isinstance(value, list | tuple):
        return _of_same_class(value, [map_tensors(function, item) for item in value])
    return dataclasses.replace(
        value,
        **{
            field.name: map_tensors(function, getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init
        },
    )


def snapshot(value: Any) -> Any:
    """The value with copies of its tensors, without their gradient history."""
    return map_tensors(lambda tensor: tensor.detach().clone(), value)


def _of_same_class(value: Any, items: list[Any]) -> Any:
    """Other items in a list or tuple of the same class, be it a named one."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def own_container(value: Any, memo: dict[int, tuple[Any, Any]] | None = None) -> Any:
    """The value in containers of its own, at any depth; tensors and other objects stay the same.

    Somebody may fill or empty a list, put another tensor into it, or set a field. What cannot be
    changed (a tuple of tensors) is returned itself, and so is a mapping that cannot be copied.

    Args:
        value: what a module takes or returns.
        memo: for each container by its id, itself and its copy: what is one object stays one.
    """
    if isinstance(value, Tensor) or type(value) in _PLAIN:
        return value
    memo = {} if memo is None else memo
    if isinstance(value, tuple):
        items = [own_container(item, memo) for item in value]
        return value if all(map(is_, items, value)) else _of_same_class(value, items)
    if isinstance(value, list | deque | set | Mapping) or _is_record(value):
        if id(value) not in memo:
            memo[id(value)] = value, _own_copy(value, memo)
        return memo[id(value)][1]
    return value


def _own_copy(value: Any, memo: dict[int, tuple[Any, Any]]) -> Any:
    copied: Any
    if isinstance(value, Mapping):
        try:
            copied = _copied_mapping(value)
            memo[id(value)] = value, copied
            for key, item in value.items():
                if (own := own_container(item, memo)) is not item:
                    copied[key] = own
        except Exception:  # a view of somebody else's data, say, or one that nobody can change
            return value
        return copied
    copied = copy.copy(value)
    memo[id(value)] = value, copied
    if isinstance(value, list | deque):
        for index, item in enumerate(value):
            copied[index] = own_container(item, memo)
    elif not isinstance(value, set):
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if (own := own_container(item, memo)) is not item:
                object.__setattr__(copied, field.name, own)  # it may be frozen
    return copied


def _copied_mapping(value: Mapping[Any, Any]) -> Any:
    """A shallow copy that keeps the class: of a BatchEncoding or a ModelOutput, say."""
    copied = copy.copy(value)
    if not isinstance(copied, dict) and copied is not value:
        # `copy.copy` leaves both with the one dict in which such an object keeps its entries.
        held = getattr(copied, "__dict__", {})
        held.update({k: copy.copy(v) for k, v in held.items() if isinstance(v, CONTAINERS)})
    return copied


def _is_record(value: Any) -> bool:
    """Whether it is an object of a dataclass that is no module."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type | nn.Module)


def matrices_in(value: Any) -> list[tuple[Path, Tensor]]:
    """The floating-point matrices in a value, depth first, each with its place in it."""
    return [(path, tensor) for path, tensor in places_in(value) if is_matrix(tensor)]


def places_in(value: Any) -> list[tuple[Path, Tensor]]:
    """The tensors in a value, depth first, each with its place in it."""
    if isinstance(value, Tensor):
        return [((), value)]
    items: Iterable[tuple[int | str, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    elif isinstance(getattr(value, "logits", None), Tensor):
        items = (("logits", value.logits),)
    return [((key, *path), t) for key, item in items for path, t in places_in(item)]


def at_path(value: Any, path: Path) -> Any:
    """What lies at a place that :func:`matrices_in` named; None if there is nothing."""
    for key in path:
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(key, int):
            inside = isinstance(value, list | tuple) and -len(value) <= key < len(value)
            value = value[key] if inside else None
        else:
            value = getattr(value, str(key), None)
    return value


def emptied(value: Any, path: Path) -> Any:
    """What is like ``value``, with ``...`` at a place in it and None everywhere else."""
    if not path:
        return ...
    first, rest = path[0], path[1:]
    if isinstance(first, int) and isinstance(value, list | tuple):
        first = getattr(value, "_fields", range(len(value)))[first]
    return _with_items(value, lambda key, item: emptied(item, rest) if key == first else None)


def filled(empty: Any, value: Any) -> Any:
    """What :func:`emptied` returned, with ``value`` where it has ``...``."""
    if empty is None or empty is ...:
        return None if empty is None else value
    return _with_items(empty, lambda key, item: filled(item, value))


def _with_items(value: Any, function: Callable[[Any, Any], Any]) -> Any:
    """A copy of a container or an object, with ``function(key, item)`` in the place of each item.

    No constructor of somebody's own object runs, which may check what it is given.
    """
    if isinstance(value, list | tuple):
        names = getattr(value, "_fields", range(len(value)))
        return _of_same_class(
            value, [function(key, item) for key, item in zip(names, value, strict=True)]
        )
    if isinstance(value, Mapping) and not isinstance(value, dict):
        return {key: function(key, item) for key, item in value.items()}
    copied = copy.copy(value)
    if isinstance(value, dict):
        copied.update((key, function(key, item)) for key, item in value.items())
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            item = function(field.name, getattr(value, field.name))
            object.__setattr__(copied, field.name, item)  # it may be frozen
    else:
        vars(copied).update((key, function(key, item)) for key, item in vars(value).items())
    return copied


def is_matrix(value: object) -> bool:
    """Whether a value is a floating-point tensor ``[B, C]``."""
    return isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()


def logits_in(output: Any) -> Tensor | None:
    """Return the ``[B, C]`` logits of a classifier's output, or None if it is not certain which.

    A matrix is the logits; of a structured output it is the entry named `logits`, or the only
    matrix in it.
    """
    found = matrices_in(output)
    named = [tensor for path, tensor in found if path and path[-1] == "logits"]
    if len(named) == 1:
        return named[0]
    return found[0][1] if len(found) == 1 else None


def answers_indices(output: Any) -> bool:
    """Whether `output[0]` is an entry of it: of a tuple or list, or beside names, but no row."""
    if isinstance(output, list | tuple):
        return True
    if isinstance(output, Tensor):
        return False
    if isinstance(output, defaultdict) and 0 not in output:  # it would get an entry
        return False
    try:
        return isinstance(output[0], Tensor)
    except Exception:  # whatever its class says to an index
        return False
