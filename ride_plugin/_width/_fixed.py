"""Modules whose sizes are fixed, replaced by equal ones whose sizes can be changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._closeness import close
from ride_plugin._split import Call, Recorded, Split, throwaway
from ride_plugin._tree import logits_in, map_tensors, tensors_in
from ride_plugin._width._attention import replace_multihead_attention
from ride_plugin._width._layers import pads_in
from ride_plugin._width._runs import player_of


def replace_fixed_modules(split: Split) -> None:
    """Replace torch's attention, and shortcuts that add channels of zeros, in the expert."""
    _replace_attention(split)
    expert = split.views.expert
    done: list[str] = []
    for name, pad in pads_in(_possible_pads(split)):
        if not any(name.startswith(f"{outer}.") for outer in done):
            expert.set_submodule(name, pad)
            done.append(name)


def _replace_attention(split: Split) -> None:
    """Replace torch's attention where the expert computes the same with what stands in for it.

    A forward may read attributes of torch's module, its joined weights for one of torch's functions
    say. Such a module stays as it is, and keeps its width.
    """
    expert = split.views.expert
    if not any(type(module) is nn.MultiheadAttention for module in expert.modules()):
        return
    expected = _logits(split)
    originals = replace_multihead_attention(expert)
    if not originals or _computes(split, expected):
        return
    replacements = {name: expert.get_submodule(name) for name in originals}
    _put(expert, originals)
    for original in dict.fromkeys(originals.values()):
        names = [name for name, module in originals.items() if module is original]
        _put(expert, {name: replacements[name] for name in names})
        if not _computes(split, expected):
            _put(expert, dict.fromkeys(names, original))


def _put(expert: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        expert.set_submodule(name, module)


def _computes(split: Split, expected: Tensor | None) -> bool:
    """Whether the expert runs and its logits are the expected ones."""
    try:
        return close(_logits(split), expected)
    except Exception:  # a backbone's own code may raise whatever it likes
        return False


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
