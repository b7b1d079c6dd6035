"""The two passes over a split backbone: record the trunk, replay it into an expert."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from ride_plugin._contexts import RandomState, is_stream
from ride_plugin._errors import ReplayError
from ride_plugin._inputs import Inputs, batch_size_of, own_inputs
from ride_plugin._split._examine import RANDOM
from ride_plugin._split._replay._hooks import StartHook
from ride_plugin._split._replay._reentrant import passed_by
from ride_plugin._split._replay._stand_ins import leads_to_experts
from ride_plugin._split._replay._state import Absent, Layout, TrunkState
from ride_plugin._split._replay._tape import ForkReached, Player, Recorder, Running
from ride_plugin._tree import CONTAINERS, Place

AtFork: TypeAlias = Callable[[Sequence[Any], Layout | None], bool]


def record(
    trunk: nn.Module,
    running: Running,
    layouts: Sequence[Layout],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    stop_at_fork: bool | AtFork,
    keep_all: bool = False,
) -> tuple[TrunkState, Any]:
    """Run the trunk once.

    Args:
        trunk: what runs.
        running: the pass of the model that it belongs to.
        layouts: paths that are known.
        args: of the forward, and ``kwargs``.
        kwargs: see ``args``.
        stop_at_fork: whether to stop at the fork; the exporter needs a pass that goes on into
            expert 0. A function is asked there, given the tape and its layout if known.
        keep_all: whether somebody else reads values that no expert reads.

    Returns:
        The trunk's state, and expert 0's output unless it stopped at the fork.
    """
    # An evaluation pass can be repeated should it leave the known paths after something was
    # dropped. What a frozen trunk computes is then held by nobody, as autograd keeps none of it.
    own = _own_inputs((args, kwargs))
    batch_size = batch_size_of(own)
    whole = keep_all or trunk.training or torch.compiler.is_compiling()  # which drops by itself
    known = [] if whole else [k for k in layouts if k.takes(own, batch_size)]
    layout: Layout | None = None

    def stops() -> bool:
        nonlocal layout
        keys, values = tuple(recorder.keys), recorder.values
        layout = next((k for k in layouts if k.fits(keys, values, batch_size)), None)
        if layout is None and recorder.dropped:
            return True
        return stop_at_fork if isinstance(stop_at_fork, bool) else stop_at_fork(values, layout)

    recorder = Recorder(own, stops, known)
    recorder.may_go_on = stop_at_fork is not True
    running.recorder = recorder
    output = None
    _begin(recorder, trunk, running)
    try:
        output = trunk(*args, **kwargs)
        if recorder.unwinds:
            raise ReplayError(
                "The backbone's forward goes on where this library ends it, at the fork: it "
                "catches whatever there is (`except:`, `except BaseException:`, or a `return` in "
                "`finally:`). Catch `Exception` there, or pass `fork_at=` another submodule."
            )
    except ForkReached as reached:
        recorder.leave()
        reached.call_hooks()
    finally:
        recorder.leave()
        running.recorder = None
    if not recorder.reached_fork:
        if not leads_to_experts(trunk, running):
            raise ReplayError(
                "`model.trunk` is not the one that the model was made with, but a copy, that of "
                "another model or another module, which does not lead to these experts. Load its "
                "weights into the trunk that stood there: "
                "`model.trunk.load_state_dict(other.state_dict())`. (Parts of it may be replaced.)"
            )
        raise ReplayError(
            "The backbone's forward ended without reaching the fork, so no expert ran. It takes "
            "another path on this input than on the example: pass `example_input=` of this kind. "
            "(Or it asks for `type(submodule)`, which has a stand-in: ask by `isinstance`.)"
        )
    if layout is None and recorder.dropped:
        args, kwargs = own  # the forward may have popped something from what it was given
        return record(trunk, running, (), args, kwargs, stop_at_fork=stop_at_fork)
    return TrunkState(
        batch_size,
        tuple(recorder.keys),
        recorder.values,
        layout,
        hollow=recorder.dropped,
        recomputes=recorder.recomputes,
        numbers=recorder.numbers,
    ), output


def play(
    expert: nn.Module,
    running: Running,
    state: TrunkState,
    at_fork: Callable[[], None] | None = None,
) -> Any:
    """Run one expert on the trunk's state; what its classifier received is in ``running``.

    ``at_fork`` is called where the expert's own modules begin.
    """
    player = Player(state.keys, [], at_fork, state.numbers, state.chosen)
    player.values = state.own_values(lambda: player.reached_fork)
    args, kwargs = _own_inputs(player.values[0])
    running.player = player
    _begin(player, expert, running)
    checkpoints = passed_by(player.expects_more) if state.recomputes else nullcontext()
    try:
        with checkpoints:
            output = expert(*args, **kwargs)
        if player.refused is not None:  # and the forward has caught it
            raise player.refused
        return output
    finally:
        player.leave()
        running.player = None


def _own_inputs(inputs: Inputs) -> Inputs:
    """Copies of dicts and lists; a compiled graph changes none of its inputs."""
    return inputs if torch.compiler.is_compiling() else own_inputs(inputs)


def _begin(mode: Recorder | Player, view: nn.Module, running: Running) -> None:
    """Let the mode see the view's forward, but not what hooks of the view compute before it."""
    hooks = cast(OrderedDict[int, Any], view._forward_pre_hooks)
    if not hooks or torch.compiler.is_compiling():
        mode.enter()
    elif not isinstance(next(reversed(hooks.values())), StartHook):
        ours = next((key for key, hook in hooks.items() if isinstance(hook, StartHook)), None)
        if ours is None:
            view.register_forward_pre_hook(StartHook(running))
        else:
            hooks.move_to_end(ours)


def read_attributes(owner: nn.Module, places: Sequence[Place]) -> tuple[Any, ...]:
    """Values of plain attributes at these places, which a forward may set or fill."""
    return tuple(
        RandomState.now()
        if (path, attribute) == RANDOM
        else own_containers(owner.get_submodule(path).__dict__.get(attribute, Absent))
        for path, attribute in places
    )


def take_up(trunk: nn.Module, expert: nn.Module, places: Iterable[Place]) -> None:
    """Let the trunk start from what an expert has left outside units: a count, say.

    The build has checked that what the trunk reads of it is the same for every expert.
    """
    for path, key in places:
        left = expert.get_submodule(path).__dict__.get(key, Absent)
        if left is not Absent:
            trunk.get_submodule(path).__dict__[key] = own_containers(left)


def write_attributes(owner: nn.Module, places: Sequence[Place], values: tuple[Any, ...]) -> None:
    """Put plain attributes back, so that an expert starts where the trunk started."""
    for (path, attribute), value in zip(places, values, strict=True):
        if isinstance(value, RandomState):
            value.restore()
            continue
        attributes = owner.get_submodule(path).__dict__
        if value is Absent:
            attributes.pop(attribute, None)
        elif attributes.get(attribute, Absent) is not value:
            attributes[attribute] = own_containers(value)


def own_containers(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """The same value, but copies of containers and generators, so that each part has its own.

    Args:
        value: what a module holds as an attribute.
        memo: copies that exist, by the id of the original, as in ``copy.deepcopy``: what several
            attributes hold stays one object.
    """
    if memo is not None and id(value) in memo:
        return memo[id(value)]
    # A compiler cannot ask whether something is Python's generator, and copies none.
    if not torch.compiler.is_compiling() and is_stream(value):
        return copy.deepcopy(value, memo)
    if not isinstance(value, CONTAINERS):
        return value
    copied: Any = copy.copy(value)
    if memo is not None:
        memo[id(value)] = copied
    if isinstance(copied, dict):
        copied.update((key, own_containers(item, memo)) for key, item in copied.items())
    elif isinstance(copied, list):
        copied[:] = [own_containers(item, memo) for item in copied]
    return copied
