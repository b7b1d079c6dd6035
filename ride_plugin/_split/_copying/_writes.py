"""Who writes into which memory: copies for a pass that is thrown away share it with the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ride_plugin._tree import tensors_in


class Writes(TorchDispatchMode):
    """Notes which memory is written, through ``.data`` as well, which leaves no other trace.

    Args:
        kept: tensors whose memory :meth:`undo` fills with what stood there.

    Attributes:
        seen: numbers of the memory that was written, as :func:`storage_of` gives them.
    """

    def __init__(self, kept: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[int] = set()
        self._kept = {storage_of(tensor): tensor for tensor in kept}
        self._earlier: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for tensor in _written(func, args, kwargs or {}):
            memory = storage_of(tensor)
            self.seen.add(memory)
            if memory in self._kept and memory not in self._earlier:
                self._earlier[memory] = self._kept[memory].untyped_storage().clone()
        return func(*args, **(kwargs or {}))

    def undo(self) -> None:
        """Put back what stood in memory that is kept."""
        for memory, earlier in self._earlier.items():
            self._kept[memory].untyped_storage().copy_(earlier)


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Undo after a block what it has written into the model's parameters.

    Copies that are thrown away share them. A frozen one may hold what a forward writes, prototypes
    or a moving average, on calls that the build has not seen.
    """
    # Those of another class are copied, see `running_copy`.
    writes = Writes([p for p in model.parameters() if type(p) is nn.Parameter])
    try:
        with writes:
            yield
    finally:
        writes.undo()


def storage_of(tensor: Tensor) -> int:
    """A number that is the same for two tensors that share their memory."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, or inside vmap: no storage to share
        return id(tensor)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes, by its schema."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found: list[Tensor] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            found.extend(tensors_in(given))
    return found
