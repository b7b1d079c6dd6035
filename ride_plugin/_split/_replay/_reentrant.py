"""Reentrant checkpoints (``use_reentrant=True``, long torch's default) around the trunk's units.

Such a checkpoint is a function of autograd: it computes without gradients, and again with them in
the backward. An expert's pass calls it once more, around stand-ins, and would compute the trunk
again in the backward of each expert, of which DistributedDataParallel says that a parameter is
ready twice. The stand-ins return what the trunk has computed, checkpoint and all, so there the
checkpoint is to be passed by. torch has no switch for it; other libraries' checkpoints of this kind
stay as they are, slower and right.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import CheckpointFunction

_lock = threading.Lock()
_users = 0


class _Here(threading.local):
    passes_by: Callable[[], bool] | None = None


_here = _Here()


@contextmanager
def passed_by(when: Callable[[], bool]) -> Iterator[None]:
    """In this block and thread, reentrant checkpoints call their function directly, if `when()`."""
    global _users
    outer, _here.passes_by = _here.passes_by, when
    with _lock:
        _users += 1
        CheckpointFunction.apply = classmethod(_apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        _here.passes_by = outer
        with _lock:
            _users -= 1
            if _users == 0:
                del CheckpointFunction.apply


def _apply(cls: Any, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
    if _here.passes_by is not None and _here.passes_by():
        return function(*args)
    return super(CheckpointFunction, cls).apply(function, preserve, *args)


def region_without_gradients() -> FrameType | None:
    """The forward of a function of autograd that computes here without gradients, or None.

    It is known by its first argument, the context. torch up to 2.13 calls it from a frame of its
    own, which 2.14 does not have any more.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    frame: FrameType | None = sys._getframe()
    while frame is not None and not _is_of_autograd(frame):
        frame = frame.f_back
    return frame


def _is_of_autograd(frame: FrameType) -> bool:
    code = frame.f_code
    if code.co_name != "forward" or not code.co_argcount:
        return False
    return isinstance(frame.f_locals.get(code.co_varnames[0]), FunctionCtx)
