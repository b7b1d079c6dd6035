"""Activation checkpointing of experts: memory for time, with the same gradients and statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from ride_plugin._checks import version_of
from ride_plugin._contexts import random_state, stream_state, streams_in
from ride_plugin._errors import ReplayError, listed
from ride_plugin._split import own_containers
from ride_plugin._tree import OF_MODULES, cloned, tensors_in


def checkpointed(
    compute: Callable[[], Tensor], expert: nn.Module, written: frozenset[str]
) -> Tensor:
    """Run ``compute`` without keeping what its backward needs; that is computed again then.

    The second computation starts from the random state and from what the expert's modules held
    before the first. Whatever it draws and writes is dropped: the first has done so already.

    Args:
        compute: a pass of the expert.
        expert: the module whose state it may write.
        written: names of the expert's parameters and buffers that a forward writes.

    Raises:
        ReplayError: it has written a tensor in place that is not among those, nor statistics.
    """
    start = None if torch.compiler.is_compiling() else _Start(expert, written)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _Again(expert, start)

    result: Tensor = checkpoint(compute, use_reentrant=False, context_fn=contexts)
    if start is not None:
        start.refuse_others_written()
    return result


class _Again:
    """The context of each further computation; there are several where the graph is retained."""

    def __init__(self, expert: nn.Module, start: _Start | None) -> None:
        self._expert, self._start = expert, start
        self._stack = ExitStack()

    def __enter__(self) -> None:
        if self._start is not None:
            self._stack.enter_context(self._start.put_back())
        self._stack.enter_context(_statistics_kept(self._expert))

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class _Start:
    """What the modules of an expert hold before a pass, and the random state."""

    def __init__(self, expert: nn.Module, written: frozenset[str]) -> None:
        self._expert = expert
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._tensors: list[tuple[dict[str, Any], str, Tensor]] = []
        self._others: list[tuple[str, Tensor, int | None]] = []
        self._streams: dict[int, Any] = {}
        clones: dict[int, Tensor] = {}  # tied tensors stay tied
        memo: dict[int, Any] = {}  # and containers that several modules hold
        for path, module in expert.named_modules():
            prefix = f"{path}." if path else ""
            own = {key: value for key, value in vars(module).items() if key not in OF_MODULES}
            self._streams.update((id(s), s) for value in own.values() for s in streams_in(value))
            memo.update(self._streams)  # they stay what they are, and get their states back
            kept = {key: own_containers(value, memo) for key, value in own.items()}
            self._attributes.append((vars(module), kept))
            self._watch(prefix, own)
            if _is_counted_by_torch(module):
                continue
            for held in (module._parameters, module._buffers):
                for key, tensor in held.items():
                    if tensor is not None and prefix + key in written:
                        clone = clones.setdefault(id(tensor), cloned(tensor))
                        self._tensors.append((held, key, clone))
                    else:
                        self._watch(prefix, {key: tensor})
        self._restore_random = self._random_state()

    def _random_state(self) -> Callable[[], None]:
        """Note the state of every generator that the expert may draw from."""
        restores = [random_state(self._expert), *map(stream_state, self._streams.values())]

        def restore() -> None:
            for each in restores:
                each()

        return restore

    def _watch(self, prefix: str, values: dict[str, Any]) -> None:
        for key, value in values.items():
            for tensor in tensors_in(value):
                self._others.append((prefix + key, tensor, version_of(tensor)))

    def refuse_others_written(self) -> None:
        """Raise if a tensor has been written since of which no copy was made."""
        names = {name for name, tensor, version in self._others if version_of(tensor) != version}
        if names:
            raise ReplayError(
                f"The forward of an expert has written {listed(names)} in place, so the second "
                "computation of `checkpoint_experts=True` would not start where the first did: "
                "it is no buffer, or nothing wrote it when the model was wrapped. Make it a "
                "buffer that is written then (wrap the backbone in that state), let the forward "
                "assign a new tensor instead of writing into the old, or set "
                "`model.checkpoint_experts = False`."
            )

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Let modules and generators be in this block as they were; what is written there is lost.

        Other tensors take the places of those that are written, which autograd may have saved.
        """
        fresh = {id(clone): cloned(clone) for _, _, clone in self._tensors}
        ended = [(held, key, held[key]) for held, key, _ in self._tensors]
        later = [
            {key: value for key, value in own.items() if key not in OF_MODULES}
            for own, _ in self._attributes
        ]
        restore_later, memo = self._random_state(), dict(self._streams)
        for held, key, clone in self._tensors:
            held[key] = fresh[id(clone)]
        for own, values in self._attributes:
            kept = {key: own_containers(value, memo) for key, value in values.items()}
            _set_attributes(own, kept)
        self._restore_random()
        try:
            yield
        finally:
            restore_later()
            for held, key, tensor in ended:
                held[key] = tensor
            for (own, _), values in zip(self._attributes, later, strict=True):
                _set_attributes(own, values)


def _set_attributes(own: dict[str, Any], values: dict[str, Any]) -> None:
    """Let a module have these attributes and, but for those that all modules have, no others."""
    for key in [key for key in own if key not in OF_MODULES and key not in values]:
        del own[key]
    own.update(values)


def _is_counted_by_torch(module: nn.Module) -> bool:
    """Whether it is one of torch's own normalisation layers, whose statistics cost no copies."""
    return isinstance(module, _NormBase) and type(module).__module__.startswith("torch.nn.")


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let normalisation layers normalise by the batch, as in training, without counting it."""
    kept: list[tuple[_NormBase, Any, Any]] = []
    for layer in module.modules():
        if isinstance(layer, _NormBase) and layer.training and layer.track_running_stats:
            kept.append((layer, layer.momentum, layer.num_batches_tracked))
            layer.momentum = 0.0  # new = (1 - 0) * old + 0 * batch, which is old to the bit
            layer.num_batches_tracked = None
    try:
        yield
    finally:
        for layer, momentum, count in kept:
            layer.momentum = momentum
            layer.num_batches_tracked = count
