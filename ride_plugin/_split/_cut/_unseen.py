"""Modules behind the fork that did not run at the build, so that no expert has its own.

Where a module never runs, nothing tells on which side of the fork it would. The trunk holds it. It
may run there later, on another path; an expert that runs it would train what all experts share.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from ride_plugin._errors import ReplayError
from ride_plugin._split._cut._views import Link
from ride_plugin._split._examine import Call, out_of_sight
from ride_plugin._split._replay import Running


class UnseenHook:
    """Pre-hook of such a module in an expert: refuses a pass that would train it there."""

    def __init__(self, running: Running, name: str, tensors: Sequence[str]) -> None:
        self.running = running
        self.name = name
        self.tensors = tensors  # names of those that the trunk holds

    def __call__(self, module: nn.Module, args: object) -> None:
        player = self.running.player
        if player is None or not player.reached_fork:
            return
        held = [vars(module).get(key) for key in self.tensors]
        trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in held)
        if trains or (module.training and any(map(_is_buffer, held))):
            raise ReplayError(
                f"`{self.name}` runs behind the fork, where it did not run when the model was "
                "wrapped, so that the trunk holds it: all experts would train one set of weights "
                "and write the same buffers. Wrap the backbone as it is in use, with an "
                "`example_input=` of this kind (the targets too, where it runs with targets only), "
                "so that each expert gets its own. Where an argument chooses between modules, "
                "those of several domains say, let the forward of a module that holds them all "
                "choose: each expert gets all of them. Where it shall be shared, freeze it "
                "(`requires_grad_(False)` and `eval()`)."
            )


def unseen_modules(trunk: nn.Module, spine: Collection[str], trees: Iterable[Call]) -> list[str]:
    """Names of the modules outside all units that were not called, in either mode."""
    called = {call.name for tree in trees for call in tree.walk()}
    hidden = out_of_sight(trunk)
    return [n for n in spine if n not in called and id(trunk.get_submodule(n)) not in hidden]


def watch_unseen(
    experts: Sequence[nn.Module], links: Sequence[Link], unseen: Collection[str], running: Running
) -> None:
    """Let every expert refuse to train modules of the trunk that did not run at the build."""
    for expert in experts:
        for name, module in expert.named_modules():
            tensors = [link.name for link in links if link.view is module]
            if tensors and name in unseen:
                module.register_forward_pre_hook(UnseenHook(running, name, tensors))


def _is_buffer(tensor: Tensor | None) -> bool:
    return tensor is not None and not isinstance(tensor, nn.Parameter)
