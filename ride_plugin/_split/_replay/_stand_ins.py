"""Stand-ins: where another module stood, one that reads the tape or ends the recording.

An expert has one for each unit of the trunk, the trunk one for each forked unit, so that both are
the backbone's own root with its own forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode
from typing_extensions import Self

from ride_plugin._errors import (
    ReplayError,
    is_of_package,
    is_of_package_or_torch,
    is_question,
)
from ride_plugin._split._replay._again import run_again
from ride_plugin._split._replay._several import (
    asks_as_backbone,
    comes_by_itself,
    is_of_one_expert,
    one_of_several,
    warn_of_first_expert,
)
from ride_plugin._split._replay._tape import Player, Recorder, Running
from ride_plugin._tree import OF_MODULES

_OF_ANY = OF_MODULES.union(dir(nn.Module))
FREEZING, HOOKING = "requires_grad_()", "a hook"  # what is done to a stand-in; names are set


class _Asked(threading.local):
    """What a build notes and says of questions for the class of a stand-in, in this thread."""

    names: set[str] | None = None
    answered = True


_asked = _Asked()


@contextmanager
def asked_for_classes(answered: bool) -> Iterator[set[str]]:
    """Note during a block which stand-ins a forward asks for their class, as `isinstance` does.

    Args:
        answered: whether it finds the class of the module that they stand for. A compiler does not.
    """
    before, names = (_asked.names, _asked.answered), set[str]()
    _asked.names, _asked.answered = names, answered
    try:
        yield names
    finally:
        _asked.names, _asked.answered = before


def _class_of(stand_in: StandIn | _Inside, key: str) -> type[nn.Module]:
    """The class that who calls the caller finds: this library, torch and hooks mean this one."""
    if is_of_package_or_torch(2):
        return type(stand_in)
    if _asked.names is not None:
        _asked.names.add(key)
    return type(stand_in.ride_real if _asked.answered else stand_in)


class _Visits(threading.local):
    """The stand-ins that a loop over all modules, or a tool's hook, is at in this thread."""

    def __init__(self) -> None:
        self.met: list[int] = []
        self.aside: list[int] = []  # of these, in a pass that does not mean them


_visits = _Visits()


@contextmanager
def _visit(visits: list[int], stand_in: nn.Module) -> Iterator[None]:
    """Note during a block that somebody is at a stand-in."""
    visits.append(id(stand_in))
    try:
        yield
    finally:
        if id(stand_in) in visits:  # not in that of another thread, which throws a loop away
            visits.remove(id(stand_in))


class _Aside:
    """Somebody's hook on a stand-in, during which nothing is recorded or looked for on the tape.

    Tools put one on every module there is: they count operations, collect shapes or look for NaN.
    What no expert reads was dropped, so there may be nothing to look at; they have seen it in the
    trunk.
    """

    def __init__(self, running: Running, hook: Callable[..., Any], of_forward: bool) -> None:
        self.running = running
        self.hook = hook
        self.of_forward = of_forward  # whether the backbone's own forward has registered it

    def __call__(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        mode = self.running.player or self.running.recorder
        with nullcontext() if self.of_forward else stand_in.ride_looked_at():
            if mode is None or _get_current_function_mode() is not mode:
                return self.hook(stand_in, *args, **kwargs)
            mode.leave()
            try:
                return self.hook(stand_in, *args, **kwargs)
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
    model looks at it (:mod:`ride_plugin._split._cut._misplaced`). Not so where it is one of all
    modules that a loop comes by: then that module, or the loop, is meant.
    """

    ride_part_of_real = "model.trunk"  # where the real module is

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
        if running is None or (running.recorder or running.player) is None:
            return False
        return torch.compiler.is_compiling() or id(self) not in _visits.aside

    @property
    def ride_met(self) -> bool:
        """Whether a loop over all modules is at this one, or a hook that is on all of them."""
        return id(self) in _visits.met

    @contextmanager
    def ride_looked_at(self) -> Iterator[None]:
        """While a tool's hook looks at this one in a pass, which it does at the real one as well.

        Then weights, say, belong to the real module, as for a loop over all modules.
        """
        if torch.compiler.is_compiling():
            yield
            return
        with _visit(_visits.aside, self), _visit(_visits.met, self):
            yield

    def ride_class(self) -> type[nn.Module]:
        """What `isinstance` finds: in a forward the class of the module that this one stands for.

        A compiler does not ask here.
        """
        return _class_of(self, self.ride_key) if self.ride_in_pass else type(self)

    __class__ = property(ride_class)

    def ride_keep(self, what: str, value: Any) -> None:
        """Keep what somebody does to this one, and not to all modules."""
        if not self.ride_in_pass and not self.ride_met:
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
        """As for any module; notes that a loop over all modules comes by, which may change it."""
        found = super().named_modules(*args, **kwargs)
        return found if self.ride_in_pass else self._met(found)

    def _met(self, found: Iterator[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
        for name, module in found:
            with _visit(_visits.met, self):
                yield name, module

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

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As for any module inside of another; asked for by itself, the real one's."""
        if args or kwargs.get("destination") is not None or self.ride_met:
            return super().state_dict(*args, **kwargs)
        return self.ride_given("state_dict()", self.ride_real).state_dict(**kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the real module."""
        return self.ride_given("load_state_dict(...)", self.ride_real).load_state_dict(
            *args, **kwargs
        )

    def register_buffer(self, name: str, *args: Any, **kwargs: Any) -> None:
        """As for any module; that the real one has this name as well is no matter."""
        self._buffers.setdefault(name, None)
        super().register_buffer(name, *args, **kwargs)

    def register_forward_pre_hook(self, hook: Any, **kwargs: Any) -> Any:
        """As for any module, but for what the hook computes, which is none of the forward's."""
        self.ride_keep(HOOKING, hook)
        aside = _Aside(self.ride_running, hook, of_forward=self.ride_in_pass)
        return super().register_forward_pre_hook(aside, **kwargs)

    def register_forward_hook(self, hook: Any, **kwargs: Any) -> Any:
        """As for any module, but for what the hook computes, which is none of the forward's."""
        self.ride_keep(HOOKING, hook)
        aside = _Aside(self.ride_running, hook, of_forward=self.ride_in_pass)
        return super().register_forward_hook(aside, **kwargs)

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
        value = getattr(self.ride_real, name)
        outside = not self.ride_in_pass and is_of_one_expert(value)
        # This library asks for what it needs; who calls it is no question.
        asked = outside and not is_of_package(1) and is_question()
        return self.ride_given(name, value, asked)

    def ride_given(self, name: str, value: Any, asked: bool = False) -> Any:
        """What callers get as the attribute of this name, or ``[index]``, of the real module.

        A loop over all modules gets plain values only, as it comes to the real module as well. It
        may be one over a list of them, of which nothing is known but that it asks (``hasattr``).
        """
        outside = not self.ride_in_pass and is_of_one_expert(value)
        if outside and (asked or self.ride_met) and not asks_as_backbone(self, self.ride_real):
            raise comes_by_itself(self.ride_part_of_real, self.ride_key, name, quiet=self.ride_met)
        return self.ride_part(value)

    def ride_part(self, value: Any) -> Any:
        """An attribute or a part of the module that this one stands for, as callers get it."""
        return value

    def __len__(self) -> int:
        return len(self.ride_real)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        return self.ride_given(f"[{index}]", self.ride_real[index])  # type: ignore[index]

    def __bool__(self) -> bool:
        return True

    def extra_repr(self) -> str:
        return self.ride_key


class Recorded(StandIn):
    """In an expert: stands for a unit of the trunk and returns what that unit returned.

    ``ride_writers`` are the modules in it that write, if other experts would write there as well.
    """

    ride_writers: Collection[str] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        player = self.ride_running.player
        if player is None or player.position >= len(player.keys):
            if self.ride_writers and player is not None:
                return run_again(self.ride_real, self.ride_key, self.ride_writers, args, kwargs)
            return self.ride_real(*args, **kwargs)  # a shared module used after the fork
        if not player.is_next(self.ride_key):
            raise player.out_of_step(self.ride_key)
        return player.next_value()


class Forked(StandIn):
    """In the trunk: stands for a forked unit; ends the recording, then runs expert 0's unit.

    In a model of several experts it hands out plain values of that unit only, while no forward runs
    (:mod:`ride_plugin._split._replay._several`); ``ride_several`` is their number.
    """

    ride_several = 1
    ride_part_of_real = "model.experts[0]"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.ride_several > 1 and not self.ride_in_pass:
            self.ride_tell_of_first()
        self.ride_begin()
        return self.ride_real(*args, **kwargs)

    def ride_tell_of_first(self) -> None:
        """Warn, once, somebody who runs the trunk by itself; not a pass of another model."""
        running = self.ride_running
        if torch.compiler.is_compiling() or running.told_of_first:
            return
        if not isinstance(_get_current_function_mode(), Recorder | Player):
            running.told_of_first = True
            warn_of_first_expert(self.ride_several, self.ride_key)

    def ride_begin(self) -> None:
        """End the recording, if there is one."""
        recorder = self.ride_running.recorder
        if recorder is not None and not recorder.reached_fork:
            recorder.fork_begins()

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any module; what the forward sets is the unit's, if this pass goes on into it."""
        if name != "training" and self._goes_on():
            _set_on_real(self.ride_real, name, value)
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

    def ride_given(self, name: str, value: Any, asked: bool = False) -> Any:
        """What callers get of the unit: outside of a pass nothing that is one of several."""
        apart = self.ride_several > 1 and not self.ride_in_pass and is_of_one_expert(value)
        if apart and not asks_as_backbone(self, self.ride_real):
            raise one_of_several(self.ride_several, self.ride_key, name, quiet=self.ride_met)
        return super().ride_given(name, value, asked)

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

    def ride_class(self) -> type[nn.Module]:
        return _class_of(self, self.ride_forked.ride_key)

    __class__ = property(ride_class)

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


def _set_on_real(real: nn.Module, name: str, value: Any) -> None:
    """Set what a forward sets; `functional_call` puts tensors in the place of parameters."""
    if name in real._parameters and isinstance(value, Tensor):
        real._parameters[name] = value  # type: ignore[assignment]
    else:
        setattr(real, name, value)


def leads_to_experts(trunk: nn.Module, running: Running) -> bool:
    """Whether a trunk takes part in this pass; a copy of one has a pass of its own."""
    return any(isinstance(m, Forked) and m.ride_running is running for m in trunk.modules())
