"""Two copies of the backbone: one that runs the trunk, one that runs an expert.

Both keep the backbone's own ``forward``. Units on the other side of the cut are replaced by
stand-ins without parameters, so names stay those of the backbone (``trunk.conv1.weight``,
``experts.0.layer2.0.conv1.weight``) and every tensor is listed on one side.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ride_plugin._split._copying import as_they_are, copy_with_hooks
from ride_plugin._split._examine import Call, Fork
from ride_plugin._split._replay import (
    Forked,
    ForkHook,
    Recorded,
    Running,
    UnitHooks,
    list_all,
    list_whole,
)
from ride_plugin._tree import buffers_of, dotted, parameters_of


@dataclass
class Link:
    """``view`` reads the parameter or buffer ``name`` that ``owner`` holds, without owning it."""

    view: nn.Module
    owner: nn.Module
    name: str

    def let_go(self) -> None:
        """Take the tensor out of the view's own parameters and buffers."""
        for kind in ("_parameters", "_buffers"):
            own = getattr(self.view, kind)
            if own.pop(self.name, None) is not None and _is_dictionary(self.view):
                vars(self.view)[kind] = _Held(self.view, own)

    def refresh(self) -> None:
        """Follow the owner's tensor, which ``.to()`` or loading may have replaced."""
        tensor = self.owner._parameters.get(self.name, self.owner._buffers.get(self.name))
        if self.view.__dict__.get(self.name) is not tensor:
            # Assigning an `nn.Buffer` would register it, in a view that does not own it.
            vars(tensor).pop("_is_buffer", None)
            self.view.__dict__[self.name] = tensor


class _Held(dict[str, Any]):
    """A view's own tensors, in which code can also look up those that the view only reads."""

    def __init__(self, view: nn.Module, own: dict[str, Any]) -> None:
        super().__init__(own)
        self.view = view

    def __missing__(self, name: str) -> Any:
        linked = vars(self.view).get(name)
        if isinstance(linked, Tensor):
            return linked
        raise KeyError(name)


def _is_dictionary(module: nn.Module) -> bool:
    """Whether it is a dictionary of tensors of somebody's own, which looks into torch's."""
    kind = type(module)
    return hasattr(kind, "__getitem__") and not kind.__module__.startswith("torch.nn.")


@dataclass
class Views:
    """The trunk, and one expert that is still an exact copy of the backbone's forked part.

    Attributes:
        trunk: runs the shared part; its forked units lead to the expert it was built with.
        expert: runs the rest.
        running: the pass in progress, shared by all hooks and stand-ins.
        links: tensors that one side reads and the other owns.
        spine: pairs (trunk's, expert's) of modules whose own forward runs on both sides.
        written: names of parameters and buffers that a forward writes.
        settings: objects that all parts hold together
            (:mod:`ride_plugin._split._copying._settings`).
    """

    trunk: nn.Module
    expert: nn.Module
    running: Running
    links: list[Link]
    spine: list[tuple[nn.Module, nn.Module]]
    written: frozenset[str] = frozenset()
    settings: Sequence[Any] = ()

    @property
    def expert_links(self) -> list[Link]:
        """The tensors that the expert reads and the trunk owns."""
        inside = {id(module) for module in self.expert.modules()}
        return [link for link in self.links if id(link.view) in inside]

    def memo_onto(self, trunk: nn.Module, running: Running) -> dict[int, Any]:
        """A deepcopy memo by which a copy of the expert runs on a trunk of the same names."""
        memo: dict[int, Any] = {id(self.running): running, **as_they_are(self.settings)}
        for name, module in self.trunk.named_modules(remove_duplicate=False):
            memo[id(module)] = trunk.get_submodule(name)
        for name, tensor in (*parameters_of(self.trunk), *buffers_of(self.trunk)):
            path, _, attribute = name.rpartition(".")
            memo[id(tensor)] = getattr(trunk.get_submodule(path), attribute)
        return memo


def sides(fork: Fork, root: Call, training: Call | None) -> tuple[list[str], list[str]]:
    """Names of the submodules that belong to the trunk and to the experts.

    A container whose units all lie on one side belongs there as a whole: fewer things to record.
    ``training`` is the call tree of a forward in training mode: auxiliary heads and augmentations
    that run only there belong to the side of the cut where they are called.
    """
    side_of = {id(unit): index >= fork.index for index, unit in enumerate(fork.units)}
    also_in_trunk = {call.name for unit in fork.units[: fork.index] for call in unit.walk()}
    found: dict[str, set[bool]] = {}

    def collect(call: Call) -> set[bool]:
        if id(call) in side_of:
            mine = {side_of[id(call)] and call.name not in also_in_trunk}
        else:
            mine = set().union(*(collect(child) for child in call.children))
        found.setdefault(call.name, set()).update(mine)
        return mine

    collect(root)
    trunk: list[str] = []
    forked: list[str] = []

    def is_whole(call: Call) -> bool:
        """Whether it lies on one side, and nothing outside of it calls a part of it."""
        inside = {id(part) for part in call.walk()}
        return len(found.get(call.name, ())) == 1 and not any(
            unit.name.startswith(f"{call.name}.") and id(unit) not in inside for unit in fork.units
        )

    def assign(call: Call) -> None:
        for child in call.children:
            if is_whole(child):
                names = forked if True in found[child.name] else trunk
                if child.name not in names:
                    names.append(child.name)
            else:
                assign(child)

    assign(root)
    if training is None:
        return trunk, forked
    known = {*trunk, *forked}
    reached_fork = False
    without_parameters: dict[str, set[bool]] = {}

    def walk(call: Call) -> None:
        nonlocal reached_fork
        for child in call.children:
            unit = next((u for u in known if f"{child.name}.".startswith(f"{u}.")), None)
            if unit is not None:  # itself, or a part of it that is called alone (checkpointing)
                reached_fork = reached_fork or unit in forked
            elif any(name.startswith(child.name + ".") for name in known):
                walk(child)
            elif child.num_parameters:
                known.add(child.name)
                (forked if reached_fork else trunk).append(child.name)
            else:
                without_parameters.setdefault(child.name, set()).add(reached_fork)

    walk(training)
    for name, after in without_parameters.items():
        if len(after) == 1:  # one that is called on both sides runs as operations do
            (forked if True in after else trunk).append(name)
    return trunk, forked


def build_views(
    source: nn.Module,
    trunk_units: list[str],
    forked_units: list[str],
    forked_tensors: Collection[str],
    settings: Sequence[Any] = (),
) -> Views:
    """Build both views.

    Args:
        source: a copy of the backbone of which nothing is changed; the views hold its parameters.
        trunk_units: names of the submodules that run in the trunk.
        forked_units: names of the submodules that each expert owns.
        forked_tensors: names of tensors outside units (a class token, say) that only experts read.
        settings: objects that both views hold as they are.
    """
    modules = dict(source.named_modules(remove_duplicate=False))
    in_trunk = {id(modules[name]): name for name in trunk_units}
    in_expert = {id(modules[name]): name for name in forked_units}
    running = Running()
    spine = _spine(source, {*in_trunk, *in_expert})

    # Both views hold the same tensors: nothing is copied, and tied weights stay tied.
    shared = as_they_are((*source.parameters(), *source.buffers(), *settings))
    stand_ins: dict[int, Any] = {key: Recorded(running, name) for key, name in in_trunk.items()}
    outside = [
        (name, module, key)
        for name, module in spine
        for key in (*module._parameters, *module._buffers)
        if (module._parameters.get(key) is not None or module._buffers.get(key) is not None)
    ]
    expert = copy_with_hooks(source, source.modules(), {**stand_ins, **shared})
    expert_modules = dict(expert.named_modules(remove_duplicate=False))
    for name in forked_units:
        expert_modules[name].register_forward_pre_hook(ForkHook(running), prepend=True)

    replaced: dict[int, Any] = {key: Forked(running, name) for key, name in in_expert.items()}
    trunk = copy_with_hooks(source, source.modules(), {**replaced, **shared})
    trunk_modules = dict(trunk.named_modules(remove_duplicate=False))
    for name in trunk_units:
        UnitHooks(running, name).install(trunk_modules[name])
    for stand_in, owner in ((stand_ins, trunk), (replaced, expert)):
        for module in stand_in.values():
            module.ride_stand_for(owner)

    links: list[Link] = []
    for name, original, key in outside:
        expert_owns = dotted(name, key) in forked_tensors
        owner, view = (expert, trunk) if expert_owns else (trunk, expert)
        link = Link(view.get_submodule(name), owner.get_submodule(name), key)
        link.let_go()
        link.refresh()
        links.append(link)
        list_all(link.view, original, running)
    for name, original in spine:
        for root in (trunk, expert):
            list_whole(root.get_submodule(name), original, running)
    pairs = [(trunk.get_submodule(name), expert.get_submodule(name)) for name, _ in spine]
    return Views(trunk, expert, running, links, pairs, settings=settings)


def spine_tensors(backbone: nn.Module, units: list[str]) -> dict[str, Tensor]:
    """Parameters and buffers that belong to no unit, by name."""
    modules = dict(backbone.named_modules(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for name, module in _spine(backbone, {id(modules[unit]) for unit in units}):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[dotted(name, key)] = tensor
    return found


def _spine(root: nn.Module, units: set[int]) -> list[tuple[str, nn.Module]]:
    """Modules outside all units: the root, its containers, and modules that are never called."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> None:
        if id(module) in units or id(module) in seen:
            return
        seen.add(id(module))
        found.append((name, module))
        for child_name, child in module.named_children():
            walk(dotted(name, child_name), child)

    walk("", root)
    return found
