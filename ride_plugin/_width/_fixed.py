"""Modules whose sizes are fixed, replaced by equal ones whose sizes can be changed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ride_plugin._closeness import close
from ride_plugin._inputs import resize_batch
from ride_plugin._split import Recorded, Split, on_meta, throwaway
from ride_plugin._tree import logits_in, tensors_in
from ride_plugin._width._attention import replace_multihead_attention
from ride_plugin._width._layers import may_be_pad, pads_in
from ride_plugin._width._plan import Stuck
from ride_plugin._width._runs import player_of, trunk_state


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
            raise Stuck(f"`{replaced[0]}` could not be rebuilt with its heads apart")
    try:  # by shapes, but a backbone may look at values
        some = bool(_possible_pads(split, meta=True))
    except Exception:
        some = True
    if some:
        for name, pad in pads_in(_possible_pads(split, meta=False)):
            expert.set_submodule(name, pad.train(expert.get_submodule(name).training))


def _logits(split: Split) -> Tensor | None:
    assert split.state is not None  # the build has left it
    return logits_in(player_of(split, throwaway(split.views, False), split.state)())


def _possible_pads(split: Split, meta: bool) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """The name of each module that may be such a shortcut, itself, its input and its output."""
    views = throwaway(split.views, False, meta)
    found = {}
    for name, module in views.expert.named_modules():
        if not isinstance(module, Recorded):

            def note(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
                x = next(tensors_in(args), None)
                if x is not None and may_be_pad(module, x, out):
                    found[name] = (name, module, x.clone(), out.clone())

            module.register_forward_hook(note)
    with on_meta(resize_batch(split.inputs, 2), meta) as inputs:
        player_of(split, views, trunk_state(split, views, False, inputs))()
    return list(found.values())
