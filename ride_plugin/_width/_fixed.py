"""Modules whose sizes are fixed, replaced by equal ones whose sizes can be changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._closeness import close
from ride_plugin._split import Call, Recorded, Split, throwaway
from ride_plugin._tree import logits_in, map_tensors, tensors_in
from ride_plugin._width._attention import replace_multihead_attention
from ride_plugin._width._layers import pads_in
from ride_plugin._width._plan import Stuck
from ride_plugin._width._runs import player_of


def replace_fixed_modules(split: Split) -> None:
    """Replace torch's attention, and shortcuts that add channels of zeros, in the expert.

    Raises:
        Stuck: what stands in for attention computes something else.
    """
    expert = split.views.expert
    if any(type(module) is nn.MultiheadAttention for module in expert.modules()):
        expected = _logits(split)
        replaced = replace_multihead_attention(expert)
        if replaced and not close(_logits(split), expected):
            raise Stuck(f"`{next(iter(replaced))}` could not be rebuilt with its heads apart")
    done: list[str] = []
    for name, pad in pads_in(_possible_pads(split)):
        if not any(name.startswith(f"{outer}.") for outer in done):
            expert.set_submodule(name, pad)
            done.append(name)


def _logits(split: Split) -> Tensor | None:
    assert split.state is not None  # the build has left it
    return logits_in(player_of(split, throwaway(split.views, False), split.state)())


def _possible_pads(split: Split) -> list[tuple[str, nn.Module, Any, Any]]:
    """Name, the expert's module, input and output of each that may be such a shortcut."""
    assert split.calls is not None
    assert split.state is not None
    names = {call.name for call in split.calls.walk() if _adds_channels(call)}
    own = {
        name: module
        for name, module in split.views.expert.named_modules()
        if name in names and not isinstance(module, Recorded)
    }
    if not own:
        return []
    views = throwaway(split.views, False)
    found: dict[str, tuple[str, nn.Module, Any, Any]] = {}
    for name in own:

        def note(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
            kept = (next(tensors_in(args), None), out)
            found[name] = (name, own[name], *map_tensors(torch.clone, kept))

        views.expert.get_submodule(name).register_forward_hook(note)
    player_of(split, views, split.state)()
    return list(found.values())


def _adds_channels(call: Call) -> bool:
    """Whether images of more channels came out of a module without parameters than went in."""
    if any(True for _ in call.module.parameters()) or not call.inputs or not call.outputs:
        return False
    (_, before), (_, after) = call.inputs[0], call.outputs[0]
    return len(before) == 4 == len(after) and after[1] > before[1]
