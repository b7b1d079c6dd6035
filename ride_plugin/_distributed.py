"""What several processes know together."""

from __future__ import annotations

import threading
import warnings
from typing import TypeVar

from torch import distributed

T = TypeVar("T")

_PATIENCE = 60.0  # seconds of waiting after which a rank says what it waits for


def of_all_ranks(value: T, caller: str) -> list[T]:
    """The value of every rank, in order; a list of one where ``torch.distributed`` is not running.

    Every rank must call it. Tensors travel as they are and belong on the CPU.

    Args:
        value: this rank's.
        caller: the public name that a rank gives if the others do not come.
    """
    if not running():
        return [value]
    rank, found = distributed.get_rank(), [None] * distributed.get_world_size()

    def complain() -> None:
        warnings.warn(
            f"Rank {rank} has waited {_PATIENCE:g} s for the other ranks in `{caller}`, which adds "
            "up what all ranks found: every rank must call it.",
            stacklevel=2,
        )

    timer = threading.Timer(_PATIENCE, complain)
    timer.daemon = True
    timer.start()
    try:
        distributed.all_gather_object(found, value)
    finally:
        timer.cancel()
    return found  # type: ignore[return-value]


def running() -> bool:
    """Whether there are other ranks to ask."""
    return distributed.is_available() and distributed.is_initialized()
