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
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, cast

import torch
import torch.utils.checkpoint
import torch.utils.hooks
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from ride_plugin._checks import version_of
from ride_plugin._errors import ReplayError, warn_caller
from ride_plugin._split._replay._hollow import hollow
from ride_plugin._split._replay._raised import Raised, being_handled, raised_by
from ride_plugin._split._replay._reentrant import region_without_gradients
from ride_plugin._split._replay._state import Layout
from ride_plugin._split._replay._unwinding import Unwinding
from ride_plugin._tree import holds_tensors, map_tensors, own_container

_ASSIGNMENTS = frozenset({"__setitem__", "__delitem__", "__set__"})  # change a tensor, return None
# They return copies; an array of numpy would share the memory of a tensor that changes later.
_READS = frozenset({"item", "tolist", "__int__", "__float__", "__bool__", "__index__"})
_FREEZES = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
_PARAMETER_COPIED = "data.__get__"  # with which `Parameter.__deepcopy__` begins
_CHECKPOINT = torch.utils.checkpoint.__file__
_BACKWARD_HOOKS = torch.utils.hooks.__file__
_ACROSS = (
    "The backbone's forward checkpoints one region (torch.utils.checkpoint) that begins in the "
    "trunk and ends in an expert"
)
_APART = (
    "Checkpoint its submodules one by one; or pass as `fork_at=` a submodule with which a region "
    "begins; or switch the backbone's checkpointing off and pass `checkpoint_experts=True`."
)


class ForkReached(Unwinding):
    """Unwinds the trunk's forward at the first call of a forked unit."""


class Running(threading.local):
    """The pass that runs in this thread; each wrapped model has one, which may be copied."""

    def __init__(self) -> None:  # in each thread; a compiled forward must find the names there
        self.recorder: Recorder | None = None
        self.player: Player | None = None
        self.features: Tensor | None = None  # what the last classifier that ran received
        self.returned: Tensor | None = None  # and what it returned
        self.told_of_first = False  # somebody who runs the trunk by itself, of expert 0

    def forget(self) -> None:
        """Keep nothing of a classifier that ran."""
        self.features = self.returned = None

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
        self.unwinds = False  # whether the forward shall end at the fork
        self.recomputes = False  # in reentrant checkpoints that are over when the fork is reached
        self._open: list[BaseException | None] = []  # for each unit inside: what is being handled
        self._stepped_aside = False
        self._region: FrameType | None = None  # the reentrant checkpoint of the last value, if any
        self._read: list[tuple[Tensor, int | None, Any]] = []  # as a number: version and number
        self._with_gradients = not torch.compiler.is_compiling() and torch.is_grad_enabled()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._open and not self.reached_fork and _leaves_a_trace(func, result):
            if _is_of_a_backward_hook(func):  # of the unit that has just ended; experts go through
                swapped = map_tensors(lambda t: result if t is args[0] else t, self.values[-1])
                self.values[-1] = swapped
            else:
                self._write(operation_name(func), result)
        elif not self._open and not self.reached_fork and operation_name(func) in _READS:
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
        self._open.append(being_handled())
        # A mode that the backbone itself put on top must stay there: then we only look away.
        if len(self._open) == 1 and _get_current_function_mode() is self:
            self._stepped_aside = True
            self.leave()

    def unit_ends(self, key: str, result: Any) -> None:
        """Called when a unit has returned, and when it has raised something."""
        if not self._open:  # somebody's hook for all modules raised before the unit began
            return
        error = being_handled()
        if error is not self._open.pop() and error is not None:
            key, result = raised_by(key), Raised.of(error)
        if not self._open and not self.reached_fork:
            self._write(key, result)  # while we still look away: writing must not be recorded
        if not self._open and self._stepped_aside:
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
            self.unwinds = True
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
        chosen: bool = False,
    ) -> None:
        super().__init__()
        self.keys = keys
        self.values = values
        self._chosen = chosen  # whether these are some rows of what the trunk has run
        self._numbers = dict(numbers)
        self._num_reads = 0
        self.at_fork = at_fork
        self.reached_fork = False
        self.refused: ReplayError | None = None  # which the forward may have caught
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
        if _is_of_a_backward_hook(func):  # on all modules that there are, so on a stand-in too
            return func(*args, **(kwargs or {}))
        if self._numbers and operation_name(func) in _READS:
            self._num_reads += 1
            if self._num_reads - 1 in self._numbers:
                return self._numbers[self._num_reads - 1]
        if self.position < len(self.keys):
            name = operation_name(func)
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

    def is_next(self, unit: str) -> bool:
        """Whether the next step is one of this unit."""
        key = self.keys[self.position]
        return key == unit or key == raised_by(unit)

    def next_value(self) -> Any:
        """What the next step returned.

        Raises:
            BaseException: what it raised instead.
        """
        self.region = _checkpointed_region()
        value = self.values[self.position]
        self.position += 1
        if type(value) is Raised:
            raise value.again()
        return _own(value)

    def out_of_step(self, name: str) -> ReplayError:
        self.refused = self._out_of_step(name)
        return self.refused

    def _out_of_step(self, name: str) -> ReplayError:
        recorded = self.keys[self.position]
        if torch.nn.modules.module._global_forward_hooks and not torch.compiler.is_compiling():
            return ReplayError(
                f"A hook for all modules that there are (`register_module_forward_hook`) computes "
                f"`{name}`, also where an expert passes by a module of the trunk, or the experts' "
                "forward left the trunk's path. Register the hook on each module, `for module in "
                "model.modules(): module.register_forward_hook(hook)`."
            )
        where = (
            f"An expert's forward left the trunk's path: it came to `{name}` where the trunk ran "
            f"`{recorded}` (step {self.position} of {len(self.keys) - 1})."
        )
        if _PARAMETER_COPIED in (name, recorded):
            return ReplayError(
                f"{where} That is how a parameter is copied: if the forward copies a module before "
                "the fork (`copy.deepcopy(self.layer)`), an expert would copy what stands in for "
                "it. Copy it in a submodule of the backbone, which holds the layer, or behind the "
                "fork."
            )
        if self._chosen:
            where += (
                " This expert has some of the rows: a forward that goes by their number before "
                "the fork (`if len(x) == 1:`) has to do so in a submodule, or behind the fork."
            )
        return ReplayError(
            f"{where} The backbone's forward "
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


def operation_name(func: Callable[..., Any]) -> str:
    """What a torch-function mode calls an operation; of an attribute, which one is read."""
    name = getattr(func, "__name__", None) or type(func).__name__
    if name != "__get__":
        return name
    return f"{getattr(getattr(func, '__self__', None), '__name__', '')}.__get__"


def _state_of_generator() -> bytes:
    """The state of torch's common generator; as bytes, since to compare tensors is an operation."""
    state = torch.get_rng_state()
    if detect_fake_mode(state) is not None:  # where every tensor is one without values
        return b""
    try:
        return state.numpy().tobytes()
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
    return holds_tensors(result) or operation_name(func) in _ASSIGNMENTS
