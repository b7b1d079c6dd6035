"""Models from a trunk and experts that somebody wrote as modules: nothing has to be cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ride_plugin._checks import check_function, check_instance
from ride_plugin._contexts import random_state_kept
from ride_plugin._errors import SplitError
from ride_plugin._split._attempt import learned
from ride_plugin._split._copying import as_they_are, clone_module, settings_at
from ride_plugin._split._cut import Parts, Split, Views
from ride_plugin._split._examine import examine
from ride_plugin._split._replay import Forked, ForkHook, Recorded, Running, UnitHooks
from ride_plugin._split._ways._graft import module_from, unite


class Joined(nn.Module):
    """A trunk (``body``) and one expert (``head``) after it; in a view, one is a stand-in."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hand what the trunk returns to the expert, as one argument."""
        return self.head(self.body(*args, **kwargs))


def join_parts(
    trunk: nn.Module,
    expert_factory: Callable[[int], nn.Module],
    num_experts: int,
    example_input: Any,
) -> Parts:
    """The parts of a model, from copies of ``trunk`` and of what the factory returns.

    Raises:
        ArgumentError: an argument is of another kind.
        SplitError: an expert does not fit the trunk; the message says which and why.
    """
    check_instance(trunk, "trunk", nn.Module, "a torch.nn.Module")
    check_function(expert_factory, "expert_factory", "expert_factory(index)")
    heads = [module_from(expert_factory, index) for index in range(num_experts)]
    running, splits = Running(), list[Split]()
    for index, head in enumerate(heads):
        network = Joined(trunk, head)
        source = clone_module(network)
        try:
            with random_state_kept(network):
                example = splits[0].inputs if splits else example_input
                seen = examine(source, example)
                settings = as_they_are(settings_at(network, seen.settings))
                if not splits:
                    shared = clone_module(trunk, dict(settings))
                    view, forked = _trunk_view(shared, running)
                    # An expert that holds tensors of the trunk stays tied to them.
                    originals = (*trunk.parameters(), *trunk.buffers())
                    copies = (*shared.parameters(), *shared.buffers())
                    tied = {id(a): b for a, b in zip(originals, copies, strict=True)}
                expert = _expert_view(head, view, running, tied | settings)
                forked.ride_stand_for(expert)
                views = Views(view, expert, running, [], [(view, expert)])
                source.register_forward_hook(seen.reader)
                expert.head.register_forward_hook(seen.reader)
                splits.append(learned(source, views, seen, "head", ["head"]))
        except SplitError as error:
            message = f"`expert_factory({index})` does not fit: {error}"
            if "`logits=" in message or "`num_classes=" in message:
                message += (
                    " (`from_parts` takes neither `logits=` nor `num_classes=`: let each expert "
                    "return its logits alone.)"
                )
            raise SplitError(message) from error
    return unite(splits[0], splits)


def _trunk_view(trunk: nn.Module, running: Running) -> tuple[Joined, Forked]:
    UnitHooks(running, "body").install(trunk)
    forked = Forked(running, "head")
    return Joined(trunk, forked), forked


def _expert_view(head: nn.Module, trunk: Joined, running: Running, tied: dict[int, Any]) -> Joined:
    own = clone_module(head, dict(tied))
    own.register_forward_pre_hook(ForkHook(running), prepend=True)
    recorded = Recorded(running, "body")
    recorded.ride_stand_for(trunk)
    return Joined(recorded, own)
