"""The library's own hooks on modules, and where they stand: they tell a pass where units begin.

Somebody may replace a module that carries one, or put a copy in its place; each call sets them
right before it runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ride_plugin._compiler import is_compiled, uncompiled
from ride_plugin._errors import ReplayError
from ride_plugin._split._copying import COMPILED_CALL
from ride_plugin._split._replay._tape import Running
from ride_plugin._tree import tensors_in


class UnitHooks:
    """Pre-hook and hook of a trunk unit: tell the recorder where the unit begins and ends."""

    def __init__(self, running: Running, key: str) -> None:
        self.running = running
        self.key = key

    def install(self, unit: nn.Module) -> None:
        """Register both."""
        # Before the hooks of others, which may compute a weight: that belongs to the unit.
        unit.register_forward_pre_hook(self.before, prepend=True)
        # A forward may catch what the unit raises, and go on.
        unit.register_forward_hook(self.after, always_call=True)

    def before(self, module: nn.Module, args: Any) -> None:
        if self.running.recorder is not None:
            self.running.recorder.unit_begins()

    def after(self, module: nn.Module, args: Any, result: Any) -> None:
        if self.running.recorder is not None:
            self.running.recorder.unit_ends(self.key, result)


@dataclass
class UnitPlace:
    """Where a unit of the trunk stands; somebody may put another module there."""

    parent: nn.Module
    name: str
    hooks: UnitHooks

    def keep_hooks(self) -> None:
        """Let the hooks stand on the module that is here now, around those of everybody else.

        What a unit's other hooks compute (FSDP2 gathers parameters there) belongs to the unit. As
        glue, the experts would look for it in the backbone's forward, which does not have it.
        """
        unit = module_at(self.parent, self.name)
        if next(filter(None, map(_ours, unit._forward_pre_hooks.values())), None) is not self.hooks:
            # Somebody replaced the module, by SyncBatchNorm or an adapter, or by a changed copy of
            # it, whose hooks tell nobody.
            drop_hooks(unit, _ours)
            self.hooks.install(unit)
        for hooks, last in ((unit._forward_pre_hooks, False), (unit._forward_hooks, True)):
            if not _ours(next((reversed if last else iter)(hooks.values()))):
                ours = next(key for key, hook in hooks.items() if _ours(hook))
                cast(OrderedDict[int, Any], hooks).move_to_end(ours, last=last)


def module_at(parent: nn.Module, name: str) -> nn.Module:
    """The submodule that stands there now.

    Raises:
        ReplayError: it is compiled by itself, so that our hooks cannot tell what runs, or there is
            none any more.
    """
    module = parent._modules.get(name)
    if module is None:
        raise ReplayError(
            f"Submodule `{name}` of a {type(parent).__name__} was removed, or set to None, since "
            "the backbone was wrapped, but the fork depends on it. Put another module in its "
            "place: nn.Identity() returns what it gets."
        )
    if vars(module).get(COMPILED_CALL) is not None:
        raise _compiled_apart(name, module, "module.compile()")
    return module


def expert_at(experts: nn.ModuleList, index: int) -> nn.Module:
    """The expert that stands there now.

    Raises:
        ReplayError: it is compiled by itself; what runs in it, our hooks cannot tell.
    """
    expert, name = experts[index], f"experts.{index}"
    if vars(expert).get(COMPILED_CALL) is not None:
        raise _compiled_apart(name, expert, "module.compile()")
    if is_compiled(expert):
        raise _compiled_apart(name, uncompiled(expert), "torch.compile(module)")
    return expert


def _compiled_apart(name: str, module: nn.Module, how: str) -> ReplayError:
    """The error for a submodule that was compiled by itself."""
    return ReplayError(
        f"Expected the wrapped model to be compiled as a whole, but its submodule `{name}` "
        f"({type(module).__name__}) is compiled by itself (`{how}`). Leave that out, and use "
        "`torch.compile(model)` or `model.compile()`."
    )


def places_of_units(trunk: nn.Module) -> list[UnitPlace]:
    """Find the units: the submodules that carry :class:`UnitHooks`."""
    return [
        UnitPlace(parent, name, hooks)
        for parent in trunk.modules()
        for name, child in parent.named_children()
        for hooks in map(_ours, child._forward_pre_hooks.values())
        if hooks is not None
    ]


def _ours(hook: Any) -> UnitHooks | None:
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, UnitHooks) else None


def drop_hooks(module: nn.Module, chosen: Callable[[Any], object]) -> None:
    """Remove the hooks of a module that are chosen, and what torch notes of them beside.

    A note that stayed, of keyword arguments say, would be taken for that of another hook which gets
    the same number after the module was saved and loaded.
    """
    for hooks, notes in (
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (
            module._forward_hooks,
            (module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        ),
    ):
        for key in [key for key, hook in hooks.items() if chosen(hook)]:
            del cast(OrderedDict[int, Any], hooks)[key]
            for noted in notes:
                cast(OrderedDict[int, Any], noted).pop(key, None)


class StartHook:
    """Last pre-hook of a view that has others: glue begins after them."""

    def __init__(self, running: Running) -> None:
        self.running = running

    def __call__(self, module: nn.Module, args: Any) -> None:
        mode = self.running.recorder or self.running.player
        if mode is not None and not mode.on_stack:
            mode.enter()


class ForkHook:
    """Pre-hook of an expert's own units: from the first of them on, nothing is replayed."""

    def __init__(self, running: Running) -> None:
        self.running = running

    def __call__(self, module: nn.Module, args: Any) -> None:
        player = self.running.player
        if player is not None and player.on_stack:
            player.fork_begins()


@dataclass
class ForkPlace:
    """Where an expert's own unit stands; somebody may put another module, or a copy, there."""

    parent: nn.Module
    name: str
    hook: ForkHook

    def keep_hook(self) -> None:
        """Let the hook stand on the module that is here now."""
        unit = module_at(self.parent, self.name)
        if self.hook not in unit._forward_pre_hooks.values():
            drop_hooks(unit, lambda hook: isinstance(hook, ForkHook))
            unit.register_forward_pre_hook(self.hook, prepend=True)


def put_fork_hooks_first(unit: nn.Module) -> None:
    """Let an expert's own hook stand before those that have been put before it."""
    hooks = cast(OrderedDict[int, Any], unit._forward_pre_hooks)
    for key in [key for key, hook in hooks.items() if isinstance(hook, ForkHook)]:
        hooks.move_to_end(key, last=False)


def places_of_forks(expert: nn.Module) -> list[ForkPlace]:
    """Find an expert's own units: the submodules that carry a :class:`ForkHook`."""
    return [
        ForkPlace(parent, name, hook)
        for parent in expert.modules()
        for name, child in parent.named_children()
        for hook in child._forward_pre_hooks.values()
        if isinstance(hook, ForkHook)
    ]


def belongs_to(expert: nn.Module, running: Running) -> bool:
    """Whether an expert takes part in this pass; a copy of one has a pass of its own."""
    hooks = (hook for part in expert.modules() for hook in part._forward_pre_hooks.values())
    return any(isinstance(hook, ForkHook) and hook.running is running for hook in hooks)


class FeatureHook:
    """Pre-hook and hook of an expert's classifier: keep what it receives and returns."""

    def __init__(self, running: Running) -> None:
        self.running = running

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None, *returned: Any
    ) -> None:
        if returned:
            self.running.returned = next(tensors_in(returned), None)
        else:
            self.running.features = next(tensors_in((args, kwargs)), None)


def watch_classifier(expert: nn.Module, name: str | None, running: Running) -> None:
    """Keep what an expert's classifier receives and returns, for the router.

    One that was replaced has lost the hooks for it.
    """
    if name is not None:
        head = expert.get_submodule(name)
        before = _watches(running, head._forward_pre_hooks, head._forward_pre_hooks_with_kwargs)
        if before and _watches(running, head._forward_hooks, head._forward_hooks_with_kwargs):
            return
        drop_hooks(head, lambda hook: isinstance(hook, FeatureHook))  # that of a copy tells nobody
        head.register_forward_pre_hook(FeatureHook(running), with_kwargs=True)
        head.register_forward_hook(FeatureHook(running), with_kwargs=True)


def _watches(running: Running, hooks: Mapping[int, Any], with_kwargs: Collection[int]) -> bool:
    # What puts another module in the place of one, as torch's quantization does, takes hooks along,
    # but not that they are given keyword arguments.
    for key, hook in hooks.items():
        if isinstance(hook, FeatureHook) and hook.running is running and key in with_kwargs:
            return True
    return False
