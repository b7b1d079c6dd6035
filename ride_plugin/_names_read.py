"""Which names the code of a module's methods mentions: what its forward may read of the module."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn


def names_read_by(module: nn.Module) -> frozenset[str]:
    """Names in the methods of a module's classes, and in a ``forward`` that is the instance's own.

    A method may read an attribute that nobody has set yet: ``getattr(self, "scale", 1.0)``. So
    texts count as well, and other names that stand there are among them.
    """
    kinds = [kind for kind in type(module).__mro__ if kind not in (nn.Module, object)]
    methods = [value for kind in kinds for value in vars(kind).values()]
    return names_in(*methods, vars(module).get("forward"))


def names_read_by_forward(module: nn.Module) -> frozenset[str]:
    """Names in the code of ``forward``, and of the methods that it calls by name.

    What other methods mention is not for the forward: engines set and delete it on every module.
    """
    found, left = {"forward"}, ["forward"]
    while left:
        method = left.pop()
        # Those of base classes too, which it may call as `super().forward(x)`.
        own = vars(module).get(method), *(vars(kind).get(method) for kind in type(module).__mro__)
        more = {other for other in names_in(*own) if not hasattr(nn.Module, other)} - found
        found |= more
        left += more
    return frozenset(found)


def names_in(*functions: Any) -> frozenset[str]:
    """Names and texts that could be names in the code of functions."""
    names = set[str]()
    for code in _codes_of(list(functions)):
        names.update(code.co_names)
        names.update(text for text in _texts_in(code.co_consts) if text.isidentifier())
    return frozenset(names)


def may_be_set_late(value: Any) -> bool:
    """Whether every part can have this value under a name that none has yet.

    Modules and parameters would belong to several parts, and engines set methods on any model.
    """
    return not isinstance(value, nn.Module | nn.Parameter | MethodType)


def _codes_of(values: list[Any]) -> Iterator[CodeType]:
    """The code of functions, and of those that decorators and functions in them hold."""
    seen: set[int] = set()
    while values:
        value = values.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, CodeType):
            yield value
            values += value.co_consts
        elif isinstance(value, FunctionType):
            values += [value.__code__, inspect.unwrap(value)]
            values += [cell.cell_contents for cell in value.__closure__ or () if _is_set(cell)]
        elif isinstance(value, classmethod | staticmethod | MethodType):
            values.append(value.__func__)
        elif isinstance(value, property):
            values += [value.fget, value.fset]
        elif isinstance(
            value, functools.partial | functools.partialmethod | functools.cached_property
        ):
            values.append(value.func)


def _is_set(cell: Any) -> bool:
    try:
        return isinstance(cell.cell_contents, FunctionType | MethodType)
    except ValueError:  # a variable that was never set
        return False


def _texts_in(constants: tuple[Any, ...]) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple | frozenset):
            yield from _texts_in(tuple(constant))
