"""How an exported trunk is called: the names, the order and the fixed values of its arguments.

A program takes tensors by position. What the model's forward takes beside them (numbers, flags,
None) has become part of the program, and keyword arguments have become positional. So the program
carries a description of its example, in the form of JSON, which `torch.export.save` stores.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.export import ExportedProgram

from ride_plugin._errors import ArgumentError
from ride_plugin._inputs import Inputs
from ride_plugin._tree import holds_tensors, tensors_in

Call: TypeAlias = dict[str, Any]
"""``names`` of what can be positional, and descriptions of what was ``given`` and of defaults."""

_KEY = "ride_plugin.call"
_TENSOR = "tensor"


def describe_call(forward: Callable[..., Any], inputs: Inputs) -> Call:
    """Describe the inputs with which a forward is exported."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):  # some functions written in C have no signature
        parameters = []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in parameters if parameter.kind in positional]
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    plain = {name: v for name, v in defaults.items() if not holds_tensors(v)}
    given = _by_name(names, *inputs)
    return {
        "names": names,
        "given": {name: describe(value) for name, value in given.items()},
        "defaults": {name: describe(value) for name, value in plain.items()},
    }


def keep_call(program: ExportedProgram, call: Call) -> None:
    """Let a program carry the description."""
    program.graph_module.meta.setdefault("custom", {})[_KEY] = call


def call_of(stage: Any) -> Call | None:
    """The description that a program or a fused stage carries; None where nothing is known."""
    if isinstance(stage, ExportedProgram):
        call: Call | None = stage.graph_module.meta.get("custom", {}).get(_KEY)
        return call
    return getattr(stage, "call", None)


def tensors_of_call(call: Call | None, inputs: Inputs) -> list[Tensor]:
    """The tensors of a call in the order of the program; as they come where nothing is known.

    Raises:
        ArgumentError: the call has other names, containers or values than the exported one.
    """
    if call is None:
        return list(tensors_in(inputs))
    given = _by_name(call["names"], *inputs)
    found = {name: describe(value) for name, value in given.items()}
    if call["defaults"] | found != call["defaults"] | call["given"]:
        raise ArgumentError(
            f"Expected a call as the exported one, with {_shown(call['given'])}, but got "
            f"{_shown(found)}. Names and values beside the tensors are part of the exported "
            "stages: export others with an `example_input` like this call."
        )
    named = ((kind, given[name]) for name, kind in call["given"].items() if name in given)
    return [tensor for kind, value in named for tensor in _in_order(kind, value)]


def _by_name(
    names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments by name; positional ones beyond the names, or given twice, by number."""
    own = [name if name not in kwargs else f"argument {i}" for i, name in enumerate(names)]
    own += [f"argument {i}" for i in range(len(names), len(args))]
    return dict(zip(own, args, strict=False)) | dict(kwargs)


def describe(value: Any) -> Any:
    """What a value is, as JSON; two values with one description are taken for the same."""
    if isinstance(value, Tensor):
        return _TENSOR
    if (
        value is None
        or isinstance(value, int)
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    if isinstance(value, Sequence | deque) and not isinstance(value, str | bytes):
        return [describe(item) for item in value]
    items = _items(value)
    if items is not None:
        return {key: describe(item) for key, item in items.items()}
    return f"= {re.sub(' at 0x[0-9a-f]+', '', repr(value))}"  # an address says nothing of a value


def _items(value: Any) -> dict[str, Any] | None:
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _in_order(kind: Any, value: Any) -> Iterator[Tensor]:
    """The tensors of a value in the order of its description."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(kind, list):
        for inner, item in zip(kind, value, strict=True):
            yield from _in_order(inner, item)
    elif isinstance(kind, dict):
        items = _items(value) or {}
        for key, inner in kind.items():
            yield from _in_order(inner, items[key])


def _shown(kinds: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {str(kind).removeprefix('= ')}" for name, kind in kinds.items())
