"""Loaders of a backbone's own, which look up entries of a state that the other side holds.

``_load_from_state_dict`` of a backbone, or a hook before it, may compare shapes or rename old
entries. It runs for the trunk and for each expert, and each has a part of the entries only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ride_plugin._errors import SplitError
from ride_plugin._split._replay import StandIn


@dataclass(frozen=True)
class Lent:
    """What a state held before entries were lent to it; ``prefix`` is that of the model."""

    prefix: str
    given: frozenset[str]

    def take_back(self, unexpected: list[str]) -> None:
        """Let nothing that was lent, or that a loader has made of it, count as unexpected."""
        ours = (name for name in unexpected if name.startswith(self.prefix))
        lent = {name for name in ours if name not in self.given}
        unexpected[:] = [name for name in unexpected if name not in lent]


def lend_entries(state: dict[str, Any], prefix: str, parts: Mapping[str, nn.Module]) -> Lent | None:
    """Give a state, under each part's names, what the other side has there, if a loader may ask.

    Args:
        state: what is being loaded.
        prefix: of the entries that belong to the model.
        parts: the trunk, then the experts, by the prefix of their names.

    Returns:
        What takes them back; None if there is no such loader.
    """
    if not any(map(_has_loaders, parts.values())):
        return None
    lent = Lent(prefix, frozenset(state))
    sides = [prefix + part for part in parts]
    held = [
        {name.removeprefix(side): value for name, value in state.items() if name.startswith(side)}
        for side in sides
    ]
    for index, side in enumerate(sides):
        for name, value in (held[0] if index else held[1]).items():
            state.setdefault(side + name, value)
    return lent


def refuse_unsavable(source: nn.Module, *views: nn.Module) -> None:
    """Refuse a backbone whose ``state_dict``, or a hook of it, asks for what the other side holds.

    Raises:
        SplitError: a wrapped model could not be saved.
    """
    try:
        source.state_dict()
    except Exception:
        return
    for view in views:
        try:
            view.state_dict(destination=OrderedDict(), prefix="inner.", keep_vars=True)
        except Exception as error:
            raise SplitError(
                "Expected argument `backbone` to be saved in two parts, trunk and experts, but its "
                f"own `state_dict` (of {type(view).__name__}, or a hook that was registered for "
                f"it) fails on one of them with {type(error).__name__}: {error}. Let it take what "
                "torch hands to a part of a model (`*args, **kwargs`), and ask first whether an "
                "entry is there (`state.pop(prefix + name, None)`); or remove it before wrapping."
            ) from error


def _has_loaders(part: nn.Module) -> bool:
    """Whether a module that has parts on both sides does something to a state that is loaded."""
    return any(
        any(isinstance(inner, StandIn) for inner in module.modules())
        for module in part.modules()
        if not isinstance(module, StandIn)
        if module._load_state_dict_pre_hooks
        or type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
    )
