"""What the trunk leaves that holds tensors out of sight, where nobody selects rows or copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from ride_plugin._split._copying import captured_by
from ride_plugin._split._replay import TrunkState
from ride_plugin._tree import holds_tensors


def advice(state: TrunkState) -> str:
    """What to do where experts take up something else than the trunk left."""
    return hidden(state) or "Pass `fork_at=` another submodule."


def hidden(state: TrunkState) -> str | None:
    """What the trunk has left that holds tensors out of sight, and what to do."""
    for key, value in zip(state.keys, state.values, strict=True):
        if kind := _hides_tensors(value):
            return (
                f"`{key}` returns {kind}, in which tensors are not found. Let it return them in a "
                "tuple, list, dict or dataclass, or pass `fork_at=` another submodule."
            )
    return None


def _hides_tensors(value: Any) -> str | None:
    """Name what may hold tensors that nobody selects rows of, copies or moves."""
    if isinstance(value, Iterator):
        return f"a {type(value).__name__}, which can be read once only"
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next(filter(None, map(_hides_tensors, value)), None)
    if isinstance(value, FunctionType):
        kept = list(captured_by(value))
        return "a function that captured tensors" if holds_tensors(kept) else None
    if type(value) is Tensor:
        return "a tensor with tensors as attributes" if holds_tensors(vars(value)) else None
    if isinstance(value, Tensor | nn.Module | type) or holds_tensors(value):
        return None
    return f"a {type(value).__name__}" if holds_tensors(getattr(value, "__dict__", {})) else None
