"""States that a block of code borrows and gives back: the random state, evaluation mode."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ride_plugin._errors import RIDEError

M = TypeVar("M", bound=nn.Module)

_NUMPY = "numpy.random"  # which takes long to import: who has not imported it draws nothing


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

    def mark(self) -> str:
        """The same object for the same state."""
        return sys.intern(f"{hash(self.python)} {hash(self.numpy)}")


def random_state(module: nn.Module) -> Callable[[], None]:
    """Note the random state of torch, numpy and Python; what is returned puts it back.

    Of torch's generators these are the CPU's and those of the module's devices.
    """
    found = {p.device for p in module.parameters() if p.device.type == "cuda"}
    on_devices = [(device, torch.cuda.get_rng_state(device)) for device in found]
    common, here = RandomState.now(), torch.get_rng_state()

    def restore() -> None:
        common.restore()
        torch.set_rng_state(here)
        for device, state in on_devices:
            torch.cuda.set_rng_state(state, device)

    return restore


@contextmanager
def random_state_kept(module: nn.Module) -> Iterator[None]:
    """Restore the random state of torch, numpy and Python after a block."""
    restore = random_state(module)
    try:
        yield
    finally:
        restore()


def seed_everything() -> None:
    """Seed torch, numpy and Python alike, within :func:`random_state_kept`."""
    torch.manual_seed(0)
    random.seed(0)
    if _NUMPY in sys.modules:
        sys.modules[_NUMPY].seed(0)


def in_mode(module: M, training: bool) -> M:
    """Set the mode of a module and return it: many a ``train`` that is overridden returns None."""
    module.train(training)
    return module


_PATIENCE = 600.0  # seconds that a thread waits for another, which may be waiting for this one
_lock = threading.Condition()
_borrowed: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # in evaluation for a while
_training: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # running a pass that trains
_mine = threading.local()  # roots that this thread evaluates or trains now


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration of a block; every submodule's mode is restored.

    Threads may evaluate one module at the same time: the last to leave restores the modes. A pass
    that trains (:func:`training_pass`) and evaluation wait for each other.
    """
    roots = _roots()
    with _lock:
        if module not in roots:
            _wait(lambda: module not in _training, "computes a training pass of it")
        known = _borrowed if _borrowed else ()  # asking it costs more than a module's own flag
        borrowed = [part for part in _parts(module) if part.training or part in known]
        for part in borrowed:
            _borrowed[part] = _borrowed.get(part, 0) + 1
            part.training = False
    roots.append(module)
    try:
        yield
    finally:
        roots.remove(module)
        with _lock:
            for part in borrowed:
                _borrowed[part] -= 1
                if not _borrowed[part]:
                    del _borrowed[part]
                    part.training = True
            _lock.notify_all()


def evaluating_any(part: object) -> AbstractContextManager[None]:
    """Evaluation mode where there is one: a router made by hand may be no module."""
    return evaluating(part) if isinstance(part, nn.Module) else nullcontext()


@contextmanager
def training_pass(module: nn.Module) -> Iterator[None]:
    """Keep ``module`` from being evaluated by another thread for the duration of a block."""
    roots = _roots()
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


def _roots() -> list[nn.Module]:
    try:
        roots: list[nn.Module] = _mine.roots
    except AttributeError:
        roots = _mine.roots = []
    return roots


def _parts(module: nn.Module) -> list[nn.Module]:
    found = [module]
    for inner in found:  # grows on the way; `modules()` spends most of its time on names
        if inner._modules:
            found += [child for child in inner._modules.values() if child is not None]
    return list(dict.fromkeys(found))


def is_stream(value: Any) -> bool:
    """Whether a value is a generator of random numbers of Python or numpy."""
    return isinstance(value, random.Random) or type(value).__module__.startswith(_NUMPY + ".")
