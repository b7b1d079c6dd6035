"""Groups of parameters, for an optimizer, as code written for the plain backbone makes them.

Such code reads names (``name.startswith("head")``), and a wrapped model's begin with ``trunk.`` or
``experts.0.``. So it is shown each expert as the plain network that it is together with the trunk,
made of the model's own tensors, and what it returns for each is merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ride_plugin._checks import check_callable
from ride_plugin._errors import ArgumentError
from ride_plugin._split._cut import Parts
from ride_plugin._split._ways import plain_views

G = TypeVar("G")


def merged_groups(
    model: nn.Module, parts: Parts, function: Callable[[nn.Module], G], argument: str
) -> G:
    """What ``function`` returns for every expert's plain network, merged place by place.

    Args:
        model: whose parameters and names the result has.
        parts: what it is made of.
        function: maps a plain network to lists of parameters, or of pairs of name and parameter,
            in any nesting of lists, tuples and dictionaries.
        argument: what errors call it.

    Raises:
        ArgumentError: what it returns holds no parameter of the model, or has another structure for
            one expert than for another.
    """
    check_callable(function, argument, f"{argument}(network)")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    results = [_listed(function(view)) for view in plain_views(parts)]
    if isinstance(results[0], torch.optim.Optimizer):
        raise ArgumentError(
            f"Expected `{argument}` to return groups of parameters, but got an optimizer, "
            f"{type(results[0]).__name__}, which is for one expert's network. Return its groups, "
            "`optimizer.param_groups`, and make the model's optimizer of what comes back."
        )
    if not any(id(tensor) in names for tensor in _tensors(results)):
        if isinstance(results[0], Tensor):
            raise ArgumentError(
                f"Expected `{argument}` to return parameters of the network that it gets, but got "
                f"a tensor {list(results[0].shape)} computed from them, of one expert. Of the "
                "whole model: `torch.nn.utils.parameters_to_vector(model.parameters())`."
            )
        raise ArgumentError(
            f"Expected `{argument}` to return parameters of the network that it gets, in lists or "
            f"dictionaries, but got {type(results[0]).__name__} without any."
        )
    return _merge(results, names, argument)  # type: ignore[no-any-return]


def _listed(value: Any) -> Any:
    """The same with every iterator read out, which can be done once only."""
    if isinstance(value, str | bytes | Tensor):
        return value
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return _tuple_like(value, [_listed(item) for item in value])
    if isinstance(value, Iterable):
        return [_listed(item) for item in value]
    return value


def _tuple_like(example: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    return type(example)(*items) if hasattr(example, "_fields") else tuple(items)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those that `_merge` comes to, and none in a dataclass, which it would not merge."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _merge(values: list[Any], names: Mapping[int, str], argument: str) -> Any:
    first = values[0]
    if all(isinstance(value, list) for value in values):
        items = [item for value in values for item in value]
        if all(id(item) in names for item in items):
            return _once(items)
        if all(_is_named(item, names) for item in items):
            return [(names[id(t)], t) for t in _once([parameter for _, parameter in items])]
    if all(id(value) in names for value in values):
        once = _once(values)
        return once[0] if len(once) == 1 else once
    if isinstance(first, dict) and all(_keys(value) == list(first) for value in values):
        return {key: _merge([v[key] for v in values], names, argument) for key in first}
    if isinstance(first, list | tuple) and all(
        type(value) is type(first) and len(value) == len(first) for value in values
    ):
        places = zip(*values, strict=True)
        merged = [_merge(list(place), names, argument) for place in places]
        return _tuple_like(first, merged) if isinstance(first, tuple) else merged
    for value in values:
        if not _same(value, first):
            raise ArgumentError(
                f"Expected `{argument}` to return groups of one structure for every expert, but "
                f"got {_short(first)} for the first and {_short(value)} for another."
            )
    return first


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _once(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in order, each once: those of the trunk are in every expert's network."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def _is_named(item: Any, names: Mapping[int, str]) -> bool:
    return (
        isinstance(item, tuple)
        and len(item) == 2
        and isinstance(item[0], str)
        and id(item[1]) in names
    )


def _keys(value: Any) -> list[Any] | None:
    return list(value) if isinstance(value, dict) else None


def _short(value: Any) -> str:
    if isinstance(value, list | tuple | dict):
        return f"{type(value).__name__} of {len(value)}"
    return f"{value!r:.80}"
