"""What somebody does to a stand-in, or puts in its place, would do nothing: the next pass says so.

``model.trunk.head`` answers for a layer that lives in the experts, so that it looks like that
layer. A loop over all modules comes by stand-ins and by the layers themselves; who means one layer
and has the stand-in is told where the layer is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ride_plugin._errors import ReplayError, warn_caller
from ride_plugin._split._cut._observers import hooks_of_others, is_of_torch
from ride_plugin._split._replay import FREEZING, HOOKING, Forked, StandIn, called
from ride_plugin._tree import dotted

_NOTHING = object()


@dataclass
class StandInPlace:
    """Where a stand-in, or a module that leads to one, was put."""

    root: nn.Module
    parent: nn.Module
    name: str
    module: nn.Module


def places_of_stand_ins(root: nn.Module) -> list[StandInPlace]:
    """Every place in a trunk or an expert that leads to a stand-in."""
    return [
        StandInPlace(root, parent, name, child)
        for parent in root.modules()
        for name, child in parent._modules.items()
        if child is not None and any(isinstance(module, StandIn) for module in child.modules())
    ]


def is_real(module: nn.Module) -> bool:
    """Whether a module is more than stand-ins, and containers of such."""
    if isinstance(module, StandIn):
        return False
    children = list(module.children())
    return any(map(is_real, children)) if children else True


def real_parts(module: nn.Module, name: str) -> list[str]:
    """Names of the outermost modules in a part of this name that lead to no stand-in."""
    if not any(isinstance(inner, StandIn) for inner in module.modules()):
        return [name]
    children = module.named_children()
    return [part for key, child in children for part in real_parts(child, f"{name}.{key}")]


def keep_stand_ins(
    places: Sequence[StandInPlace], trunk: nn.Module, experts: Iterable[nn.Module]
) -> None:
    """Look at what was done to stand-ins since the last pass.

    Raises:
        ReplayError: it has not reached the module that a stand-in stands for, or another module
            stands in its place; the message says where the real one is.
    """
    disturbed = [
        place
        for place in places
        if place.parent._modules.get(place.name) is not place.module
        or "ride_done" in place.module.__dict__
    ]
    if not disturbed:
        return
    experts = list(experts)
    names = {id(trunk): "model.trunk"}
    names |= {id(expert): f"model.experts[{k}]" for k, expert in enumerate(experts)}
    doubtful: list[str] = []
    for place in disturbed:
        if id(place.root) not in names:
            continue
        part = names[id(place.root)]
        here = place.parent._modules.get(place.name)
        if here is not place.module:
            if here is None or not _stand_ins_in(place.module) <= _stand_ins_in(here):
                place.parent._modules[place.name] = place.module
                raise _replaced(place, part)
            place.module = here  # something around it, as of an engine
        elif isinstance(here, StandIn):
            done: dict[str, Any] = here.__dict__.pop("ride_done")
            owners = experts if isinstance(here, Forked) else [trunk]
            reals = [_submodule(owner, here.ride_key) for owner in owners]
            for what, value in done.items():
                if _has_reached(reals, here, what, value):
                    continue
                message = _without_effect(here, part, what, value)
                if what != FREEZING or any(
                    parameter.requires_grad != value for parameter in place.root.parameters()
                ):
                    raise ReplayError(message)
                doubtful.append(message)
    if doubtful:  # who freezes a part child by child means the part, and need not mean these
        more = f" (And {len(doubtful) - 1} more like this one.)" if len(doubtful) > 1 else ""
        warn_caller(doubtful[0] + more)


def _submodule(owner: nn.Module, key: str) -> nn.Module:
    try:
        return owner.get_submodule(key)
    except AttributeError:  # somebody has taken it away; the pass will tell
        return nn.Module()


def has_unrun_hooks(trunk: nn.Module, experts: Iterable[nn.Module]) -> bool:
    """Whether the trunk has hooks of its own that no pass runs, as it ends at the fork.

    Hooks on every module there is are on the experts as well; those of torch know what they do.
    """
    own = hooks_of_others(trunk)
    hooks = [hook for key, hook in own if key not in trunk._forward_hooks_always_called]
    return any(not is_of_torch(hook) for hook in hooks) and not any(
        True for expert in experts for _ in hooks_of_others(expert)
    )


def _stand_ins_in(module: nn.Module) -> set[str]:
    return {inner.ride_key for inner in module.modules() if isinstance(inner, StandIn)}


def _has_reached(reals: Sequence[nn.Module], stand_in: StandIn, what: str, value: Any) -> bool:
    """Whether the modules have what was done to the stand-in, by a loop over all of them say."""
    if what == FREEZING:
        return all(p.requires_grad == value for real in reals for p in real.parameters())
    if what == HOOKING:
        gone = next(hooks_of_others(stand_in, True), None) is None
        return gone or any(True for real in reals for _ in hooks_of_others(real, True))
    try:
        found = [getattr(real, what, _NOTHING) for real in reals]
        return all(one is value or bool(one == value) for one in found)
    except Exception:  # tensors, and objects that cannot be compared
        return False


def _without_effect(stand_in: StandIn, part: str, what: str, value: Any) -> str:
    here, there = called(part, stand_in.ride_key), _real_place(stand_in)
    if what == FREEZING:
        done = f"`{here}.requires_grad_({value})` was called"
    elif what == HOOKING:
        done = f"A hook was registered on `{here}`"
    else:
        done = f"`{here}.{what}` was set"
    return (
        f"{done}, which changes nothing: it only stands for the module that the forward runs, "
        f"`{there}`. Do it there{' for each k' if isinstance(stand_in, Forked) else ''}."
    )


def _replaced(place: StandInPlace, part: str) -> ReplayError:
    path = next(name for name, module in place.root.named_modules() if module is place.parent)
    here = called(part, dotted(path, place.name))
    stand_ins = [m for m in place.module.modules() if isinstance(m, StandIn)]
    there = ", ".join(f"`{_real_place(stand_in)}`" for stand_in in stand_ins[:3])
    return ReplayError(
        f"`{here}` was replaced or removed, which changes nothing and was undone: it only stands "
        f"for what the forward runs, {there}. Replace that; or, for another network, the "
        "backbone's own before wrapping it. (The shared features come from `model.run_trunk(x)`, "
        "those of the experts from `model.router_inputs(x)`.)"
    )


def _real_place(stand_in: StandIn) -> str:
    return called(
        "model.experts[k]" if isinstance(stand_in, Forked) else "model.trunk", stand_in.ride_key
    )
