"""A copy of a criterion to try out, since a criterion may count classes or remember samples."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ride_plugin._tree import tensors_in

_LARGEST = 2**26  # bytes
_MOST = 1000  # objects
_CONSTANT = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_KEEP_NOTHING = ("torch", "math", "numpy", "random")  # but for random states, which are restored

T = TypeVar("T")


def trial_copy(criterion: T) -> T:
    """Return a criterion that computes the same and whose calls change nothing of the original.

    It may come in a tuple, with its arguments. A function is copied with all that it names: what it
    encloses, and global variables.

    Raises:
        TypeError: it reaches something that cannot be copied, or too much.
    """
    copied: T = _Copies().of(criterion)
    return copied


class _Copies:
    """Copies of what a criterion reaches; the same object is copied once."""

    def __init__(self) -> None:
        self.done: dict[int, Any] = {}
        self.bytes_left = _LARGEST

    def of(self, value: Any) -> Any:
        """A copy that shares with the original nothing that can change."""
        if isinstance(value, _CONSTANT) or _keeps_nothing(value):
            return value
        if id(value) not in self.done:
            if len(self.done) == _MOST:
                raise TypeError("The criterion reaches too many objects to try it out.")
            make = self._function if isinstance(value, FunctionType) else self._object
            self.done[id(value)] = make(value)
        return self.done[id(value)]

    def _function(self, value: FunctionType) -> FunctionType:
        names: dict[str, Any] = {}
        cells = tuple(CellType() for _ in value.__closure__ or ())
        copied = FunctionType(value.__code__, names, value.__name__, None, cells)
        self.done[id(value)] = copied  # it may name itself
        for cell, original in zip(cells, value.__closure__ or (), strict=True):
            cell.cell_contents = self.of(original.cell_contents)
        for name in _names(value.__code__):
            if name in value.__globals__:
                names[name] = self.of(value.__globals__[name])
        copied.__defaults__ = self.of(value.__defaults__)
        copied.__kwdefaults__ = self.of(value.__kwdefaults__)
        copied.__dict__.update(self.of(value.__dict__))
        return copied

    def _object(self, value: Any) -> Any:
        if isinstance(value, (Tensor, np.ndarray)):
            return self._deep(value, value.nbytes)
        if isinstance(value, nn.Module):
            held = [tensor for part in value.modules() for tensor in tensors_in(vars(part))]
            return self._deep(value, sum(tensor.nbytes for tensor in held))
        if isinstance(value, partial):
            function, args, keywords = map(self.of, (value.func, value.args, value.keywords))
            return partial(function, *args, **keywords)
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self.of(value.__self__))
        if type(value) in (list, tuple):
            return type(value)(map(self.of, value))
        if type(value) is dict:
            return {name: self.of(one) for name, one in value.items()}
        if isinstance(value, ModuleType):
            raise TypeError("What the functions of a module keep cannot be seen.")
        if hasattr(value, "__del__"):
            raise TypeError("The end of a copy would close what the original has open.")
        copied = object.__new__(type(value))  # a TypeError for what holds more than attributes
        vars(copied).update(self.of(vars(value)))
        return copied

    def _deep(self, value: Any, size: int) -> Any:
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise TypeError("The criterion holds too much to try it out.")
        return copy.deepcopy(value)


def _keeps_nothing(value: Any) -> bool:
    """Whether it is a module, class or function of a library whose calls leave nothing behind."""
    if isinstance(value, ModuleType):
        home = value.__name__
    elif isinstance(value, FunctionType):
        if value.__closure__:
            return False  # it may be a decorator of theirs around another's function
        home = value.__globals__.get("__name__", "")  # `functools.wraps` names another's
    elif isinstance(value, (type, BuiltinFunctionType)):
        home = value.__module__ or ""
    else:
        return False
    return home.partition(".")[0] in _KEEP_NOTHING


def _names(code: CodeType) -> Iterator[str]:
    """What a function names, and what the functions inside of it do."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
