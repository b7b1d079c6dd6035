"""Values that somebody got through a model while trunk and experts hold copies of them.

Settings are one object for all parts (:mod:`ride_plugin._split._copying._settings`), but not every
value can be: an empty dictionary may be one that a forward will fill, of which each part needs its
own. What is read through the model (``model.flags``) is the trunk's. If it is then changed between
two passes (``model.flags["k"] = 10``), every part is given it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ride_plugin._errors import warn_caller
from ride_plugin._split._copying import state_of


@dataclass
class _Value:
    held: Any
    state: list[Any]
    alike: bool  # in trunk and experts


class HandedOut:
    """What was handed out, and how it was then.

    Attributes:
        shared: values that all parts hold together since somebody changed them, by name.
    """

    def __init__(self) -> None:
        self._values: dict[str, _Value] = {}
        self.shared: dict[str, Any] = {}

    def note(self, name: str, trunk: nn.Module, experts: Iterable[nn.Module]) -> None:
        """Remember that the trunk's own value of this name was handed out."""
        value = vars(trunk).get(name)
        known = self._values.get(name)
        if known is not None and known.held is value:
            return
        state, others = state_of(value), [vars(expert).get(name) for expert in experts]
        if state is not None and not all(other is value for other in others):
            self._values[name] = _Value(value, state, _alike(value, others))

    def follow(self, trunk: nn.Module, experts: Iterable[nn.Module]) -> None:
        """Give every part what was changed since; warn if each has its own."""
        for name, known in list(self._values.items()):
            if vars(trunk).get(name) is not known.held:
                del self._values[name]
            elif _changed(known.state, state_of(known.held) or []):
                del self._values[name]
                if known.alike:
                    self.shared[name] = known.held
                    for expert in experts:
                        setattr(expert, name, known.held)
                elif not _alike(known.held, [vars(expert).get(name) for expert in experts]):
                    warn_caller(
                        f"What was changed in `model.{name}` has reached the trunk alone: each "
                        f"expert holds another {type(known.held).__name__} of its own. Change "
                        f"`model.experts[k].{name}` as well, or set a new value on the model, "
                        f"`model.{name} = ...`, which every part gets."
                    )

    def look_again(self, trunk: nn.Module, experts: Iterable[nn.Module]) -> None:
        """Note the values anew after a pass: what the forward wrote is nobody's change of them."""
        if self._values:
            names, self._values = list(self._values), {}
            for name in names:
                self.note(name, trunk, experts)


def _changed(old: list[Any], new: list[Any]) -> bool:
    pairs = list(zip(old, new, strict=False))
    return len(old) != len(new) or not all(a is b or _is_same_atom(a, b) for a, b in pairs)


def _is_same_atom(a: Any, b: Any) -> bool:
    """Whether two are one number or name, of which a saved model has another object."""
    return type(a) is type(b) and isinstance(a, int | float | str) and bool(a == b)


def _alike(value: Any, others: Sequence[Any]) -> bool:
    """Whether others hold the same as a value, as far as that can be told."""
    state = state_of(value)
    try:
        return all(type(o) is type(value) and bool(state_of(o) == state) for o in others)
    except Exception:  # tensors, and objects that cannot be compared
        return False
