"""Record and replay: how one forward of any backbone becomes trunk, then experts.

The trunk is recorded: a copy of the backbone runs its own forward, and the results of its *units*
(the submodules of the trunk) and of its *glue* (tensor operations between units) go onto a tape,
until the first forked unit is called. An expert is replayed: another copy of the backbone runs its
own forward, but units of the trunk and glue return what is on the tape, and from the fork on its
own submodules run. Anything that is not a tensor (shapes, Python control flow) is computed anew,
so an expert can run on a subset of the rows.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

import torch
import torch.utils.checkpoint
import torch.utils.hooks
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from typing_extensions import Self

from ride_plugin._checks import version_of
from ride_plugin._errors import ReplayError, warn_caller
from ride_plugin._split._copies import COMPILED_CALL
from ride_plugin._split._hollow import hollow
from ride_plugin._split._reentrant import region_without_gradients
from ride_plugin._split._state import Layout
from ride_plugin._tree import OF_MODULES, map_tensors, own_container, tensors_in

_ASSIGNMENTS = frozenset({"__setitem__", "__delitem__", "__set__"})  # change a tensor, return None
# Copies; an array of numpy would share the memory that changes.
_READS = frozenset({"item", "tolist", "__int__", "__float__", "__bool__", "__index__"})
_FREEZES = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
_CHECKPOINT = torch.utils.checkpoint.__file__
_BACKWARD_HOOKS = torch.utils.hooks.__file__
_OF_ANY = OF_MODULES.union(dir(nn.Module))
FREEZING, HOOKING = "requires_grad_()", "a hook"  # what is done to a stand-in; names are set
_ACROSS = (
    "The backbone's forward checkpoints one region (torch.utils.checkpoint) that begins in the "
    "trunk and ends in an expert"
)
_APART = (
    "Checkpoint its submodules one by one; or pass as `fork_at=` a submodule with which a region "
    "begins; or switch the backbone's checkpointing off and pass `checkpoint_experts=True`."
)


class ForkReached(Exception):
    """Unwinds the trunk's forward at the first call of a forked unit; never leaves the library."""


class Running(threading.local):
    """The pass that runs in this thread; each wrapped model has one, which may be copied."""

    def __init__(self) -> None:  # in each thread; a compiled forward must find the names there
        self.recorder: Recorder | None = None
        self.player: Player | None = None
        self.features: Tensor | None = None  # what the last classifier that ran received

    def __deepcopy__(self, memo: dict[int, Any]) -> Running:
        return Running()

    def __reduce__(self) -> tuple[type[Running], tuple[()]]:
        return Running, ()


class NoHandle:
    """In place of the handle of a hook that is registered already, elsewhere."""

    def remove(self) -> None:
        """Do nothing: the hook stays with what it was registered on."""


class _GlueMode(TorchFunctionMode):
    """A torch-function mode that sees glue only: it leaves the stack while a unit runs.

    Leaving it there would cost time for every operation inside units, and would change results
    where torch itself looks for modes (the fused encoder layer, for example).
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_stack = False

    def enter(self) -> None:
        self.__enter__()  # type: ignore[no-untyped-call]
        self.on_stack = True

    def leave(self) -> None:
        if self.on_stack:
            self.on_stack = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]


class Recorder(_GlueMode):
    """Writes the trunk's tape: ``keys`` (what ran) and ``values`` (what it returned).

    Args:
        inputs: the backbone's arguments, entry 0 of the tape.
        stops: tells, at the fork, whether to unwind the forward there.
        layouts: paths known from the build. While the tape follows one of them, values that no
            expert reads are dropped at once, so their memory is used again.
    """

    def __init__(
        self,
        inputs: tuple[tuple[Any, ...], dict[str, Any]],
        stops: Callable[[], bool],
        layouts: Sequence[Layout],
    ) -> None:
        super().__init__()
        self.keys: list[str] = ["inputs"]
        self.values: list[Any] = [inputs]
        self.dropped = False
        self.stops = stops
        self.may_go_on = True  # into expert 0
        self._layouts = list(layouts)
        self.reached_fork = False
        self.recomputes = False  # in reentrant checkpoints that are over when the fork is reached
        self._depth = 0
        self._stepped_aside = False
        self._region: FrameType | None = None  # the reentrant checkpoint of the last value, if any
        self._read: list[tuple[Tensor, int | None, Any]] = []  # in which version, and as what
        self._with_gradients = not torch.compiler.is_compiling() and torch.is_grad_enabled()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._depth == 0 and not self.reached_fork and _leaves_a_trace(func, result):
            if _is_of_a_backward_hook(func):  # of the unit that has just ended; experts go through
                swapped = map_tensors(lambda t: result if t is args[0] else t, self.values[-1])
                self.values[-1] = swapped
            else:
                self._write(_name(func), result)
        elif self._depth == 0 and not self.reached_fork and _name(func) in _READS:
            self._read.append((args[0], version_of(args[0]), result))
        return result

    def _write(self, key: str, value: Any) -> None:
        step = len(self.keys)
        self.keys.append(key)
        if self._with_gradients:
            self._region = region_without_gradients()
            self.recomputes = self.recomputes or self._region is not None
        if self._layouts:
            self._layouts = [k for k in self._layouts if k.keys[step : step + 1] == (key,)]
            if self._layouts and not any(any(layout.live[step]) for layout in self._layouts):
                value = map_tensors(hollow, value)
                self.dropped = True
        self.values.append(_own(value))

    def unit_begins(self) -> None:
        self._depth += 1
        # A mode that the backbone itself put on top must stay there: then we only look away.
        if self._depth == 1 and _get_current_function_mode() is self:
            self._stepped_aside = True
            self.leave()

    def unit_ends(self, key: str, result: Any) -> None:
        if self._depth == 1 and not self.reached_fork:
            self._write(key, result)  # while we still look away: writing must not be recorded
        self._depth -= 1
        if self._depth == 0 and self._stepped_aside:
            self._stepped_aside = False
            self.enter()

    def fork_begins(self) -> None:
        self.reached_fork = True
        if self._region is not None and self._region is region_without_gradients():
            self.recomputes = False
            warn_caller(
                f"{_ACROSS}. Gradients are right, but the backward computes the trunk again for "
                f"each expert, which DistributedDataParallel refuses. {_APART}"
            )
        self._region = None
        if _get_current_function_mode() is self:
            self.leave()
        if self.stops():
            raise ForkReached

    @property
    def numbers(self) -> tuple[tuple[int, Any], ...]:
        """What was read as a number from a tensor that changed before the fork, by which read.

        A forward may go on from a count, `int(self.step)`, that it then raises.
        """
        reads = enumerate(self._read)
        return tuple((k, number) for k, (t, v, number) in reads if version_of(t) != v)


class Player(_GlueMode):
    """Reads the tape back, in order, and refuses any other order."""

    def __init__(
        self,
        keys: tuple[str, ...],
        values: list[Any],
        at_fork: Callable[[], None] | None = None,
        numbers: tuple[tuple[int, Any], ...] = (),
    ) -> None:
        super().__init__()
        self.keys = keys
        self.values = values
        self._numbers = dict(numbers)
        self._num_reads = 0
        self.at_fork = at_fork
        self.reached_fork = False
        self.position = 1  # entry 0 holds the inputs
        self.region: object = None  # the checkpointed region of the last value, if any
        # With several threads, another may draw from the same generator.
        alone = not torch.compiler.is_compiling() and threading.active_count() == 1
        self._random = _state_of_generator() if alone else None
        self.around = _checkpointed_region()  # that of the whole pass: `checkpoint_experts`

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.register_hook and not isinstance(args[0], nn.Parameter):
            return NoHandle()  # the trunk has registered it, on the same tensor
        if self._numbers and _name(func) in _READS:
            self._num_reads += 1
            if self._num_reads - 1 in self._numbers:
                return self._numbers[self._num_reads - 1]
        if self.position < len(self.keys):
            name = _name(func)
            if self.keys[self.position] == name:
                if func in _FREEZES and isinstance(args[0], nn.Parameter):
                    self.position += 1  # of the expert's own, or of the trunk's once more
                    return func(*args, **(kwargs or {}))
                return self.next_value()
            result = func(*args, **(kwargs or {}))
            if _leaves_a_trace(func, result):
                raise self.out_of_step(name)
            return result
        return func(*args, **(kwargs or {}))

    def expects_more(self) -> bool:
        """Whether something on the tape is still to come, before the fork."""
        return not self.reached_fork and self.position < len(self.keys)

    def next_value(self) -> Any:
        self.region = _checkpointed_region()
        value = self.values[self.position]
        self.position += 1
        return _own(value)

    def out_of_step(self, name: str) -> ReplayError:
        recorded = self.keys[self.position]
        if torch.nn.modules.module._global_forward_hooks and not torch.compiler.is_compiling():
            return ReplayError(
                f"A hook for all modules that there are (`register_module_forward_hook`) computes "
                f"`{name}`, also where an expert passes by a module of the trunk, or the experts' "
                "forward left the trunk's path. Register the hook on each module, `for module in "
                "model.modules(): module.register_forward_hook(hook)`."
            )
        return ReplayError(
            f"An expert's forward left the trunk's path: it came to `{name}` where the trunk ran "
            f"`{recorded}` (step {self.position} of {len(self.keys) - 1}). The backbone's forward "
            "depends on something that changed between the two passes (a cache outside of its "
            "modules, say: keep it in an attribute of one), or a submodule of the trunk was "
            "replaced after wrapping. Convert the backbone before wrapping it, or pass "
            "`fork_at=` an earlier submodule."
        )

    def fork_begins(self) -> None:
        if self.position < len(self.keys):
            raise self.out_of_step("the fork")
        here = _checkpointed_region()
        if here is self.region and here is not self.around:
            raise ReplayError(
                f"{_ACROSS}, so that it cannot be computed again for one of them. {_APART}"
            )
        self.reached_fork = True
        if _get_current_function_mode() is self:
            self.leave()
        if self._random is not None and self._random != _state_of_generator():
            raise ReplayError(
                "An expert's forward draws random numbers before the fork, where it shall read "
                "what the trunk has drawn: in a function of TorchScript, say, which cannot be seen "
                "from outside. Put it into a module of the trunk, or write it in plain Python."
            )
        if self.at_fork is not None:
            self.at_fork()


class UnitHooks:
    """Pre-hook and hook of a trunk unit: tell the recorder where the unit begins and ends."""

    def __init__(self, running: Running, key: str) -> None:
        self.running = running
        self.key = key

    def install(self, unit: nn.Module) -> None:
        """Register both."""
        # Before the hooks of others, which may compute a weight: that belongs to the unit.
        unit.register_forward_pre_hook(self.before, prepend=True)
        unit.register_forward_hook(self.after)

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
            _drop(unit, _ours)
            self.hooks.install(unit)
        for hooks, last in ((unit._forward_pre_hooks, False), (unit._forward_hooks, True)):
            if not _ours(next((reversed if last else iter)(hooks.values()))):
                ours = next(key for key, hook in hooks.items() if _ours(hook))
                cast(OrderedDict[int, Any], hooks).move_to_end(ours, last=last)


def module_at(parent: nn.Module, name: str) -> nn.Module:
    """The submodule that stands there now.

    Raises:
        ReplayError: it is compiled by itself, so that our hooks cannot tell what runs.
    """
    module = parent._modules[name]
    assert module is not None
    if vars(module).get(COMPILED_CALL) is not None:
        raise ReplayError(
            f"Expected the wrapped model to be compiled as a whole, but its submodule `{name}` "
            f"({type(module).__name__}) is compiled by itself (`module.compile()`). Leave that "
            "out, and use `torch.compile(model)` or `model.compile()`."
        )
    return module


def places_of_units(trunk: nn.Module) -> list[UnitPlace]:
    """Find the units: the submodules that carry :class:`UnitHooks`."""
    places: list[UnitPlace] = []
    for parent in trunk.modules():
        for name, child in parent.named_children():
            for hook in child._forward_pre_hooks.values():
                hooks = getattr(hook, "__self__", None)
                if isinstance(hooks, UnitHooks):
                    places.append(UnitPlace(parent, name, hooks))
    return places


def _ours(hook: Any) -> UnitHooks | None:
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, UnitHooks) else None


def _drop(module: nn.Module, chosen: Callable[[Any], object]) -> None:
    """Remove the hooks of a module that are chosen."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if chosen(hook)]:
            del cast(OrderedDict[int, Any], hooks)[key]


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
            _drop(unit, lambda hook: isinstance(hook, ForkHook))
            unit.register_forward_pre_hook(self.hook, prepend=True)


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
    """Pre-hook of an expert's classifier: keeps what the classifier receives, for the router."""

    def __init__(self, running: Running) -> None:
        self.running = running

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.running.features = next(tensors_in(args), None)


def watch_classifier(expert: nn.Module, name: str | None, running: Running) -> None:
    """Keep what an expert's classifier receives; one that was replaced has lost the hook for it."""
    if name is not None:
        head = expert.get_submodule(name)
        for hook in head._forward_pre_hooks.values():
            if isinstance(hook, FeatureHook) and hook.running is running:
                return
        _drop(head, lambda hook: isinstance(hook, FeatureHook))  # that of a copy tells nobody
        head.register_forward_pre_hook(FeatureHook(running))


class _Aside:
    """Somebody's hook on a stand-in, during which nothing is recorded or looked for on the tape.

    Tools put one on every module there is: they count operations, collect shapes or look for NaN.
    What no expert reads was dropped, so there may be nothing to look at; they have seen it in the
    trunk.
    """

    def __init__(self, running: Running, hook: Callable[..., Any]) -> None:
        self.running = running
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mode = self.running.player or self.running.recorder
        if mode is None or _get_current_function_mode() is not mode:
            return self.hook(*args, **kwargs)
        mode.leave()
        try:
            return self.hook(*args, **kwargs)
        except ReplayError:  # it read what was dropped
            return None
        finally:
            mode.enter()


class StandIn(nn.Module):
    """Stands where another module stood; has no parameters, but answers for its attributes.

    The module it stands for is looked up by name in the view that owns it, at each use: somebody
    may replace it there, a classifier for example. Names of its own begin with ``ride_``: any other
    may be one of that module's.

    What somebody does to it outside of a pass does nothing to that module, and is kept until the
    model looks at it (:mod:`ride_plugin._split._stand_ins`). Not so where it is one of all modules
    that a loop comes by: then that module, or the loop, is meant.
    """

    def __init__(self, running: Running, key: str) -> None:
        super().__init__()
        self.ride_running = running
        self.ride_key = key

    def ride_stand_for(self, owner: nn.Module) -> None:
        """Set the view that owns the module; not registered, since it is no part of this one."""
        self.__dict__["ride_owner"] = owner
        real = self.ride_real
        held = {*vars(real), *real._modules, *real._parameters, *real._buffers} - OF_MODULES
        self.__dict__["ride_names"] = frozenset(held)

    @property
    def ride_real(self) -> nn.Module:
        """The module that this one stands for."""
        owner: nn.Module = self.__dict__["ride_owner"]
        return owner.get_submodule(self.ride_key)

    @property
    def ride_in_pass(self) -> bool:
        """Whether a forward is being recorded or replayed, which means the other module by this."""
        running = self.__dict__.get("ride_running")
        return running is not None and (running.recorder or running.player) is not None

    def ride_keep(self, what: str, value: Any) -> None:
        """Keep what somebody does to this one, and not to all modules."""
        if not self.ride_in_pass and not self.__dict__.get("ride_met"):
            self.__dict__.setdefault("ride_done", {})[what] = value

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a forward that does so means the module that this one stands for."""
        if self.ride_in_pass:
            self.ride_real.train(mode)
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As for any module, of whose parameters this one has none."""
        self.ride_keep(FREEZING, requires_grad)
        return super().requires_grad_(requires_grad)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As for any module; what a loop does with this one on its way is told from the rest."""
        found = super().named_modules(*args, **kwargs)
        return found if self.ride_in_pass else self._met(found)

    def _met(self, found: Iterator[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
        for name, module in found:
            self.__dict__["ride_met"] = self.__dict__.get("ride_met", 0) + 1
            try:
                yield name, module
            finally:
                self.__dict__["ride_met"] -= 1

    def apply(self, fn: Callable[[nn.Module], Any]) -> Self:
        """As for any module."""
        for module in self.modules():
            fn(module)
        return self

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As for any module; a forward that asks, for a dtype say, means the other module's."""
        if self.ride_in_pass:
            return self.ride_real.named_parameters(*args, **kwargs)
        return super().named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """As for any module; a forward that asks means the other module's."""
        if self.ride_in_pass:
            return self.ride_real.named_buffers(*args, **kwargs)
        return super().named_buffers(*args, **kwargs)

    def register_buffer(self, name: str, *args: Any, **kwargs: Any) -> None:
        """As for any module; that the real one has this name as well is no matter."""
        self._buffers.setdefault(name, None)
        super().register_buffer(name, *args, **kwargs)

    def register_forward_pre_hook(self, hook: Any, **kwargs: Any) -> Any:
        """As for any module, but for what the hook computes, which is none of the forward's."""
        self.ride_keep(HOOKING, hook)
        return super().register_forward_pre_hook(_Aside(self.ride_running, hook), **kwargs)

    def register_forward_hook(self, hook: Any, **kwargs: Any) -> Any:
        """As for any module, but for what the hook computes, which is none of the forward's."""
        self.ride_keep(HOOKING, hook)
        return super().register_forward_hook(_Aside(self.ride_running, hook), **kwargs)

    def register_full_backward_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        """As for any module."""
        self.ride_keep(HOOKING, hook)
        return super().register_full_backward_hook(hook, *args, **kwargs)

    def register_full_backward_pre_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        """As for any module."""
        self.ride_keep(HOOKING, hook)
        return super().register_full_backward_pre_hook(hook, *args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any module; what a forward hands to it, a prompt say, becomes no part of it."""
        if self.ride_in_pass:
            if isinstance(value, nn.Parameter | nn.Module):
                self.__dict__[name] = value
                return
        elif self._is_of_real(name):
            self.ride_keep(name, value)
            if isinstance(value, nn.Parameter | nn.Module):
                return  # torch would say that the attribute exists already
        super().__setattr__(name, value)

    def _is_of_real(self, name: str) -> bool:
        """Whether the real module begins with an attribute of this name; loops leave marks too."""
        names = self.__dict__.get("ride_names")
        if names is None or name in _OF_ANY or name.startswith("ride_"):
            return False
        return name in names or hasattr(type(self.ride_real), name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith(("ride_", "__")) or "ride_owner" not in self.__dict__:
                raise
            return self.ride_part(getattr(self.ride_real, name))

    def ride_part(self, value: Any) -> Any:
        """An attribute or a part of the module that this one stands for, as callers get it."""
        return value

    def __len__(self) -> int:
        return len(self.ride_real)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        return self.ride_part(self.ride_real[index])  # type: ignore[index]

    def __bool__(self) -> bool:
        return True

    def extra_repr(self) -> str:
        return self.ride_key


class Recorded(StandIn):
    """In an expert: stands for a unit of the trunk and returns what that unit returned."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        player = self.ride_running.player
        if player is None or player.position >= len(player.keys):
            return self.ride_real(*args, **kwargs)  # a shared module used after the fork
        if player.keys[player.position] != self.ride_key:
            raise player.out_of_step(self.ride_key)
        return player.next_value()


class Forked(StandIn):
    """In the trunk: stands for a forked unit; ends the recording, then runs expert 0's unit."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.ride_begin()
        return self.ride_real(*args, **kwargs)

    def ride_begin(self) -> None:
        """End the recording, if there is one."""
        recorder = self.ride_running.recorder
        if recorder is not None and not recorder.reached_fork:
            recorder.fork_begins()

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any module; what the forward sets is the unit's, if this pass goes on into it."""
        if name != "training" and self._goes_on():
            setattr(self.ride_real, name, value)
        else:
            super().__setattr__(name, value)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As for any module; to a forward that goes on into the unit, those of the unit."""
        owner: Any = self.ride_real if self._goes_on() else super()
        found: Iterator[tuple[str, nn.Module]] = owner.named_modules(*args, **kwargs)
        return found

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As for any module; to a forward that goes on into the unit, those of the unit."""
        owner: Any = self.ride_real if self._goes_on() else super()
        yield from owner.named_children()

    def _goes_on(self) -> bool:
        recorder = self.ride_running.recorder if self.ride_in_pass else None
        return recorder is not None and recorder.may_go_on

    def ride_part(self, value: Any) -> Any:
        """Wrap what is inside the unit: a forward may call it directly, to checkpoint a block."""
        recorder = self.ride_running.recorder
        if isinstance(value, nn.Module) and recorder is not None and not recorder.reached_fork:
            return _Inside(self, value)
        return value


class _Inside(nn.Module):
    """A submodule of a forked unit, handed out by its stand-in: to run it is to fork as well."""

    def __init__(self, forked: Forked, module: nn.Module) -> None:
        super().__init__()
        # Not registered: it is no part of this.
        self.__dict__.update(ride_forked=forked, ride_real=module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.ride_forked.ride_begin()
        return self.ride_real(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        parameters: Iterator[tuple[str, nn.Parameter]]
        parameters = self.ride_real.named_parameters(*args, **kwargs)
        return parameters

    def __getattr__(self, name: str) -> Any:
        return self.ride_forked.ride_part(getattr(self.ride_real, name))

    def __len__(self) -> int:
        return len(self.ride_real)

    def __getitem__(self, index: Any) -> Any:
        return self.ride_forked.ride_part(self.ride_real[index])


def leads_to_experts(trunk: nn.Module, running: Running) -> bool:
    """Whether a trunk takes part in this pass; a copy of one has a pass of its own."""
    return any(isinstance(m, Forked) and m.ride_running is running for m in trunk.modules())


def _checkpointed_region() -> object:
    """The non-reentrant checkpoint that is computing here, or None."""
    if torch.compiler.is_compiling():
        return None
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:  # torch 2.5: the generator that opens and closes the region, in its caller
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code.co_filename != _CHECKPOINT:
            frame = frame.f_back
        if frame is None or not torch.is_grad_enabled():
            return None
        return frame.f_locals.get("gen")
    hooks = top(False)
    pack = None if hooks is None else hooks[0]
    return pack if getattr(pack, "__qualname__", "").startswith("_checkpoint_hook.") else None


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", None) or type(func).__name__


def _state_of_generator() -> bytes:
    """The state of torch's common generator; as bytes, since to compare tensors is an operation."""
    try:
        return torch.get_rng_state().numpy().tobytes()
    except RuntimeError:  # of torch.func, whose tensors have no storage
        return b""


def _own(value: Any) -> Any:
    """A container that the forward may change; a compiled graph changes none."""
    return value if torch.compiler.is_compiling() else own_container(value)


def _is_of_a_backward_hook(func: Callable[..., Any]) -> bool:
    """Whether this is the view through which torch hears of the gradient of a unit's output.

    It is made after all forward hooks, ours too.
    """
    if func is not Tensor.view_as or torch.compiler.is_compiling():
        return False
    frame, looked = sys._getframe(), 0
    while frame is not None and looked < 5:
        if frame.f_code.co_filename == _BACKWARD_HOOKS:
            return True
        frame, looked = cast(FrameType, frame.f_back), looked + 1
    return False


def _leaves_a_trace(func: Callable[..., Any], result: Any) -> bool:
    return next(tensors_in(result), None) is not None or _name(func) in _ASSIGNMENTS
