"""Checks of single arguments: what may come in, and the words that refuse everything else.

A function here returns the argument in the form that the caller computes with, so that the integers
and numbers of numpy and torch are as good as Python's. Tensors of many values have their checks in
``_tensors``.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from ride_plugin._errors import ArgumentError

T = TypeVar("T")

_LARGEST = torch.finfo(torch.float64).max
_SCALARS = (np.generic, np.ndarray, Tensor)  # torch.compile knows no union of types


def refuse(name: str, expected: str, value: object, advice: str = "") -> NoReturn:
    """Raise the error of an argument: which one, what was expected, what came, what to do.

    Raises:
        ArgumentError: always.
    """
    raise ArgumentError(
        f"Expected argument `{name}` to be {expected}, but got {shown(value)}."
        f"{f' {advice}' if advice else ''}"
    )


def check_number(
    value: object,
    name: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    advice: str = "",
) -> float:
    """Return a finite number from ``low`` to ``high``, either of them excluded if open."""
    number = _number(value, Real)
    if number is not None:
        above = number > low if open_low else number >= low
        below = number < high if open_high else number <= high
        if above and below and abs(number) <= _LARGEST:
            return float(number)
    lower = "" if math.isinf(low) else f" {'>' if open_low else '>='} {low:g}"
    upper = "" if math.isinf(high) else f" {'<' if open_high else '<='} {high:g}"
    expected = f"a finite number{lower}{' and' if lower and upper else ''}{upper}"
    refuse(name, expected, value, advice)


def check_integer(
    value: object, name: str, low: int = 0, high: int | None = None, *, advice: str = ""
) -> int:
    """Return an integer from ``low`` to ``high``, both included."""
    number = _number(value, Integral)
    if number is not None and number >= low and (high is None or number <= high):
        return int(number)
    expected = f"an integer {f'>= {low}' if high is None else f'from {low} to {high}'}"
    refuse(name, expected, value, advice)


def check_bool(value: object, name: str) -> bool:
    """Return True or False; what is merely true or false in a condition is refused."""
    truth = as_python(value)
    if isinstance(truth, bool):
        return truth
    refuse(name, "True or False", value)


def check_choice(value: object, name: str, choices: Iterable[T], *, advice: str = "") -> T:
    """Return the one of ``choices`` that was named."""
    choices = tuple(choices)
    for choice in choices:
        if isinstance(value, type(choice)) and value == choice:
            return choice
    refuse(name, f"one of {', '.join(map(repr, choices))}", value, advice)


def check_instance(
    value: object, name: str, kind: type[T], expected: str, *, advice: str = ""
) -> T:
    """Return an object of the kind; ``expected`` says in words what that is."""
    if isinstance(value, kind):
        return value
    refuse(name, expected, value, advice)


def check_callable(value: object, name: str, call: str) -> Callable[..., Any]:
    """Return what can be called; ``call`` shows how, as in ``criterion(logits, target)``."""
    if callable(value) and not isinstance(value, type):
        return value
    advice = f"Make one: {value.__name__}(...)." if isinstance(value, type) else ""
    refuse(name, f"callable as {call}", value, advice)


def check_function(value: object, name: str, call: str) -> Callable[..., Any]:
    """Return a function or class; a module is no such, since its call computes something else."""
    if callable(value) and not isinstance(value, torch.nn.Module):
        return value
    refuse(name, f"a function, called as {call}", value)


def way_inside(value: object, name: str, fits: Callable[[object], bool]) -> str:
    """Advice for an argument that holds what should have been passed, or nothing to say."""
    modules = value.named_modules() if isinstance(value, torch.nn.Module) else ()
    paths = [path for path, module in modules if path and fits(module)]
    if len(paths) != 1:
        return ""
    way = paths[0] if paths[0].isidentifier() else f'get_submodule("{paths[0]}")'
    return f"Pass what it holds: `{name}.{way}`."


def shown(value: object) -> str:
    """A value as an error shows it: short, of a tensor its shape and type, of a module its type."""
    if isinstance(value, torch.nn.Module):
        return type(value).__name__
    if isinstance(value, Tensor | np.ndarray):
        kind = "a tensor" if isinstance(value, Tensor) else "an array"
        return f"{kind} of shape {list(value.shape)} and dtype {value.dtype}"
    return reprlib.repr(value)


def setting(name: str, doc: str, check: Callable[..., Any], *limits: Any, **further: Any) -> Any:
    """A property that is checked whenever it is set, at construction or while training.

    Args:
        name: of the property.
        doc: its docstring.
        check: one of the checks above.
        *limits: what ``check`` takes after value and name.
        **further: what ``check`` takes by name.
    """
    place = f"_{name}"

    def put(owner: object, value: object) -> None:
        setattr(owner, place, check(value, name, *limits, **further))

    return property(lambda owner: getattr(owner, place), put, doc=doc)


def as_python(value: object) -> object:
    """A scalar of numpy or torch as Python's own, anything else as it is."""
    if isinstance(value, _SCALARS) and value.ndim == 0:
        try:
            return value.item()
        except RuntimeError:  # a tensor without data
            return value
    return value


def _number(value: object, kind: type) -> Any:
    """A number of the kind, or None; True and False are no numbers."""
    number = as_python(value)
    return number if isinstance(number, kind) and not isinstance(number, bool) else None
