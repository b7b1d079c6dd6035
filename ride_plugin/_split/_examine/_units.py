"""The units of a backbone: the submodule calls between which it can be cut.

Units are the root's calls, expanded through containers (Sequential, ModuleList, stages made of
numbered blocks, a submodule holding most of the parameters), but never into the blocks themselves,
unless a part of a block is called from outside of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from torch import nn

from ride_plugin._split._examine._probe import Call

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_MANY_INSTANCES = 6  # a class with so many instances is a block, not a container


def units_of(root: Call, must_expand: Callable[[Call], bool] = lambda call: False) -> list[Call]:
    """Return the units in the order of their calls.

    Args:
        root: the call tree of one forward.
        must_expand: forces the expansion of a call, so that a named submodule becomes a unit.
    """
    total = max(1, root.num_parameters)
    instances = Counter(
        type(m)
        for m in root.module.modules()
        if not isinstance(m, _LISTS) and any(True for _ in m.children())
    )
    units: list[Call] = []
    opened: set[int] = set()

    def is_container(call: Call, siblings: list[object]) -> bool:
        if not call.children or instances[type(call.module)] >= _MANY_INSTANCES:
            return False
        with_parts = [c for c in call.children if c.children]
        with_parameters = [c for c in call.children if c.num_parameters]
        share = call.num_parameters / total
        in_list = isinstance(call.module, nn.Sequential | nn.ModuleList)
        block_as_list = (
            in_list and siblings.count(_signature(call)) >= 3 and not _holds_blocks(call)
        )
        if in_list and not block_as_list and (with_parts or share >= 0.15 or _pools(call)):
            return True
        opaque = isinstance(call.module, nn.MultiheadAttention | nn.TransformerEncoderLayer)
        if share >= 0.5 and len(with_parameters) >= 2 and not opaque:
            return True
        if share >= 0.9 and len(with_parameters) == 1:
            return True
        return _holds_blocks(call) and _is_chain(call)

    def expand(call: Call) -> None:
        siblings: list[object] = [_signature(child) for child in call.children]
        for child in call.children:
            must = must_expand(child) or id(child) in opened
            if child.children and (must or is_container(child, siblings)):
                expand(child)
            else:
                units.append(child)

    expand(root)
    # A submodule of a unit that is called from outside as well, as the embedding of a language
    # model is, would be on one side of a cut and its unit on the other.
    while around := {id(unit) for unit in units if unit.children and _is_around_any(unit, units)}:
        opened |= around
        units.clear()
        expand(root)
    return units


def tokens(unit: Call) -> int | None:
    """Positions per sample of a unit's output: its elements / (batch x channels).

    Channels are read off the last parametric layer inside, so the memory layout does not matter.
    """
    shape = unit.shape
    if not shape or shape[0] == 0:
        return None
    if len(shape) <= 2:
        return 1
    elements = math.prod(shape[1:])
    channels = _channels(unit)
    if channels not in shape[1:]:
        channels = shape[1] if len(shape) in (4, 5) else shape[-1]
    return elements // max(1, channels)


def _is_around_any(unit: Call, units: Sequence[Call]) -> bool:
    return any(other.name.startswith(f"{unit.name}.") for other in units)


def _signature(call: Call) -> tuple[object, ...]:
    return type(call.module), tuple(type(m) for m in call.module.children())


def _holds_blocks(call: Call) -> bool:
    numbered = [c for c in call.children if c.children and c.name.rsplit(".", 1)[-1].isdigit()]
    nested = (
        isinstance(c.module, nn.Sequential | nn.ModuleList) and any(g.children for g in c.children)
        for c in call.children
    )
    return len(numbered) >= 2 or any(nested)


def _is_chain(call: Call) -> bool:
    """Each child takes what the one before returned, and the last one's result is the call's."""
    previous = call.inputs[:1]
    for child in call.children:
        known = {address for address, _ in previous}
        if not child.inputs or child.inputs[0][0] not in known:
            return False
        previous = child.outputs
    known = {address for address, _ in previous}
    return bool(call.outputs) and call.outputs[0][0] in known


def _pools(call: Call) -> bool:
    """Reduces the number of positions eightfold or more: a stem, or a whole body."""
    before, after = _positions(call.inputs), _positions(call.outputs)
    return before is not None and after is not None and before >= 8 * after


def _positions(seen: list[tuple[int, tuple[int, ...]]]) -> int | None:
    if not seen or len(seen[0][1]) < 4:
        return None
    return math.prod(seen[0][1][2:])


def _channels(call: Call) -> int | None:
    channels: int | None = None
    for leaf in call.leaves:
        if not any(True for _ in leaf.module.parameters(recurse=False)):
            continue
        names = ("out_channels", "out_features", "num_features", "num_channels", "embedding_dim")
        for name in names:
            value = getattr(leaf.module, name, None)
            if isinstance(value, int):
                channels = value
        normalized = getattr(leaf.module, "normalized_shape", None)
        if isinstance(normalized, tuple | list) and len(normalized) == 1:
            channels = normalized[0]
    return channels
