"""What several processes know together."""

from __future__ import annotations

from typing import TypeVar

from torch import distributed

T = TypeVar("T")


def over_ranks(value: T) -> list[T]:
    """The value of every rank, in order; a list of one where ``torch.distributed`` is not running.

    Every rank must call it. Tensors travel as they are and belong on the CPU.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    found: list[T | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found  # type: ignore[return-value]
