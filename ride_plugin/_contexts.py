"""States that a block of code borrows and gives back: the random state, evaluation mode."""

from __future__ import annotations

import importlib
import random
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ride_plugin._errors import RIDEError
from ride_plugin._tree import CONTAINERS, buffers_of, parameters_of

M = TypeVar("M", bound=nn.Module)

_PACKAGE = __name__.partition(".")[0] + "."
_NUMPY = "numpy.random"  # which takes long to import: who has not imported it draws nothing


class _Mine(threading.local):
    """What the blocks that this thread is in have borrowed."""

    def __init__(self) -> None:
        self.generators: list[torch.Generator] = []  # whose states are restored at their ends
        self.roots: list[nn.Module] = []  # which are evaluated, or run a pass that trains


_mine = _Mine()


@dataclass(frozen=True)
class RandomState:
    """The state of Python's and numpy's common generators; states compare as equal."""

    python: tuple[Any, ...] = field(compare=False, repr=False)
    numpy: tuple[Any, ...] = field(compare=False, repr=False)

    @classmethod
    def now(cls) -> RandomState:
        generator = sys.modules.get(_NUMPY)
        if generator is None:
            return cls(random.getstate(), ())
        name, keys, *rest = generator.get_state()
        return cls(random.getstate(), (name, tuple(keys.tolist()), *rest))

    def restore(self) -> None:
        random.setstate(self.python)
        if self.numpy:
            sys.modules[_NUMPY].set_state(self.numpy)

    def same_as(self, other: RandomState) -> bool:
        """Whether nothing was drawn between the two."""
        return self.python == other.python and self.numpy == other.numpy

    def mark(self) -> str:
        """The same object for the same state."""
        return sys.intern(f"{hash(self.python)} {hash(self.numpy)}")


def random_state(held: nn.Module | Tensor) -> Callable[[], None]:
    """Note the random state of torch, numpy and Python; what is returned puts it back.

    Of torch's common generators these are the CPU's and those of the devices where ``held`` is.
    """
    return _noted(_common_generators(held))


@contextmanager
def random_state_kept(held: nn.Module | Tensor) -> Iterator[None]:
    """Restore the random state of torch, numpy and Python after a block.

    torch imports ``numpy.random`` at the first forward on tensors without contents. A state that
    begins inside of the block would look as if a forward had drawn, and could not be restored.
    """
    importlib.import_module(_NUMPY)
    generators = _common_generators(held)
    restore, kept = _noted(generators), _mine.generators
    kept += generators
    try:
        yield
    finally:
        for generator in generators:
            kept.remove(generator)
        restore()


def seed_everything(seed: int = 0) -> None:
    """Seed torch, numpy and Python alike, within :func:`random_state_kept`.

    Of torch's generators only those are seeded whose states the blocks around this call restore:
    ``torch.manual_seed`` would seed every device, and replace the seed that waits for CUDA's start.
    """
    for generator in (torch.default_generator, *_mine.generators):
        generator.manual_seed(seed)
    random.seed(seed)
    if _NUMPY in sys.modules:
        sys.modules[_NUMPY].seed(seed)


def _common_generators(held: nn.Module | Tensor) -> list[torch.Generator]:
    """What torch draws from where nobody passes a generator: the CPU's and those of devices.

    A device that has not started has none yet.
    """
    if isinstance(held, Tensor):
        devices = {held.device}
    else:
        devices = {tensor.device for _, tensor in (*parameters_of(held), *buffers_of(held))}
    found = [torch.default_generator]
    for device in devices:
        if device.type == "mps":
            found.append(torch.mps._get_default_mps_generator())
        elif device.index is not None:
            of_kind = getattr(getattr(torch, device.type, None), "default_generators", ())
            found += of_kind[device.index : device.index + 1]
    return found


def _noted(generators: Iterable[torch.Generator]) -> Callable[[], None]:
    states = [(generator, generator.get_state()) for generator in generators]
    common = RandomState.now()

    def restore() -> None:
        common.restore()
        for generator, state in states:
            generator.set_state(state)

    return restore


def in_mode(module: M, training: bool) -> M:
    """Set the mode of a module and return it: many a ``train`` that is overridden returns None."""
    module.train(training)
    return module


_PATIENCE = 600.0  # seconds that a thread waits for another, which may be waiting for this one
_lock = threading.Condition()
_borrowed: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # in evaluation for a while
_training: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # running a pass that trains


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration of a block; every submodule's mode is restored.

    Threads may evaluate one module at the same time: the last to leave restores the modes. A pass
    that trains (:func:`training_pass`) and evaluation wait for each other. Parts with a ``train``
    of their own, which may fill a cache for evaluation and empty it again, are asked to change.
    """
    roots = _mine.roots
    with _lock:
        if module not in roots:
            _wait(lambda: module not in _training, "computes a training pass of it")
        known = _borrowed if _borrowed else ()  # asking it costs more than a module's own flag
        borrowed = [part for part in _parts(module) if part.training or part in known]
        for part in borrowed:
            _borrowed[part] = _borrowed.get(part, 0) + 1
        _set_modes([part for part in borrowed if part.training], False)
    roots.append(module)
    try:
        yield
    finally:
        roots.remove(module)
        with _lock:
            for part in borrowed:
                _borrowed[part] -= 1
            free = [part for part in borrowed if not _borrowed[part]]
            for part in free:
                del _borrowed[part]
            _set_modes(free, True)
            _lock.notify_all()


def _set_modes(changing: Collection[nn.Module], mode: bool) -> None:
    """Set the mode of some modules; a ``train`` of their own leaves others beside as they are."""
    asked = _with_own_train(changing)
    inside = {part: part.training for module in asked for part in _parts(module)}
    for module in asked:
        module.train(mode)
    for part, before in inside.items():
        part.training = before
    for part in changing:
        part.training = mode


def _with_own_train(parts: Collection[nn.Module]) -> list[nn.Module]:
    """Those whose class has a ``train`` of its own, but not what such a one holds and will ask."""
    found: dict[nn.Module, None] = {}
    asked_by_others: set[nn.Module] = set()
    for part in parts:
        method = type(part).train
        if method is not nn.Module.train and not str(method.__module__).startswith(_PACKAGE):
            found[part] = None
            asked_by_others.update(_parts(part)[1:])
    return [part for part in found if part not in asked_by_others]


def evaluating_any(part: object) -> AbstractContextManager[None]:
    """Evaluation mode where there is one: a router made by hand may be no module."""
    return evaluating(part) if isinstance(part, nn.Module) else nullcontext()


@contextmanager
def training_pass(module: nn.Module) -> Iterator[None]:
    """Keep ``module`` from being evaluated by another thread for the duration of a block."""
    roots = _mine.roots
    if module in roots:  # within a block of this thread's own
        yield
        return
    with _lock:
        _training[module] = _training.get(module, 0) + 1  # first: who evaluates next shall wait
        try:
            _wait(lambda: module not in _borrowed, "has it in evaluation mode")
        except RIDEError:
            _end_training(module)
            raise
    roots.append(module)
    try:
        yield
    finally:
        roots.remove(module)
        with _lock:
            _end_training(module)


def _end_training(module: nn.Module) -> None:
    _training[module] -= 1
    if not _training[module]:
        del _training[module]
    _lock.notify_all()


def _wait(is_free: Callable[[], bool], what: str) -> None:
    """Wait until another thread is done with a model, but not for ever.

    Raises:
        RIDEError: it is not done; it may be waiting for this thread.
    """
    if not _lock.wait_for(is_free, _PATIENCE):
        raise RIDEError(
            f"Another thread {what} for more than {_PATIENCE:.0f} s, and this thread cannot go on "
            "before: the modes of a model's modules are the same for all threads. A block "
            "`with model.evaluating():` must not wait for a thread that trains the model; leave "
            "it first, or evaluate a copy (`copy.deepcopy(model)`)."
        )


def _parts(module: nn.Module) -> list[nn.Module]:
    found = [module]
    for inner in found:  # grows on the way; `modules()` spends most of its time on names
        if inner._modules:
            found += [child for child in inner._modules.values() if child is not None]
    return list(dict.fromkeys(found))


def is_stream(value: Any) -> bool:
    """Whether a value is a generator of random numbers of Python or numpy."""
    return isinstance(value, random.Random) or type(value).__module__.startswith(_NUMPY + ".")


def streams_in(value: Any) -> Iterator[Any]:
    """The generators of torch, Python and numpy in a value, its containers and tuples."""
    if isinstance(value, (*CONTAINERS, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from streams_in(item)
    elif type(value).__name__.endswith("SeedSequence"):  # numpy's seeds, which draw nothing
        return
    elif isinstance(value, torch.Generator) or is_stream(value):
        yield value


def stream_state(stream: Any) -> Callable[[], None]:
    """Note the state of a generator of random numbers; what is returned puts it back."""
    if isinstance(stream, random.Random):
        return partial(stream.setstate, stream.getstate())
    if hasattr(stream, "set_state"):  # torch's, and numpy's of old
        return partial(stream.set_state, stream.get_state())
    bits = getattr(stream, "bit_generator", stream)
    return partial(setattr, bits, "state", bits.state)
