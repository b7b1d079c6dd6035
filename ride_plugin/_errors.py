"""The errors of ride-plugin; each message says what came, what was expected and what to do."""

from __future__ import annotations

import dis
import os
import sys
import warnings
from collections.abc import Collection, Set
from pathlib import Path
from types import FrameType

import torch

_STDLIB = os.path.dirname(os.__file__)
_PACKAGE, _TORCH = (f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))


class RIDEError(Exception):
    """Base class: ``except RIDEError`` catches whatever this library raises on purpose."""


class ArgumentError(RIDEError, ValueError):
    """An argument is outside what the function accepts (shape, range, dtype or value)."""


class MissingExpertLogitsError(RIDEError, ValueError):
    """A loss was given plain ``[B, C]`` logits that no longer carry the experts' logits."""


class SplitError(RIDEError, ValueError):
    """A backbone cannot be split into trunk and experts as asked; the message says what to pass."""


class ReplayError(RIDEError, RuntimeError):
    """An expert's forward left the path that the trunk recorded, so its result would be wrong."""


class WidthError(RIDEError, ValueError):
    """A layer of the forked part cannot be narrowed; the message names it."""


class CheckpointError(RIDEError, ValueError, RuntimeError):
    """A checkpoint does not fit the model, or cannot be read safely.

    Also a ``RuntimeError``, as torch raises: code catches that to load under other names.
    """


class VersionError(RIDEError, RuntimeError):
    """The installed torch is too old for what was asked; the message names the oldest that can."""


def caller() -> FrameType | None:
    """The frame outside of this package from which it was called; torch's code is outside, too."""
    return _caller_and_level(_PACKAGE)[0]


def is_question() -> bool:
    """Whether the user's code asks by ``hasattr``, or ``getattr`` with a default, and not by a dot.

    What depends on the answer (freezing, a learning rate of its own, another way to features) is
    then skipped without a word. Libraries ask any model for what some models have: they may.
    """
    frame = caller()
    if frame is None:
        return False
    file = frame.f_code.co_filename
    if file.startswith(_STDLIB) or "site-packages" in file or "dist-packages" in file:
        return False
    return dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith(("CALL", "PRECALL"))


def is_of_package(level: int) -> bool:
    """Whether the frame ``level`` calls outside of the function that asks is of this package."""
    return sys._getframe(level + 1).f_code.co_filename.startswith(_PACKAGE)


def is_of_package_or_torch(level: int) -> bool:
    """The same, of this package or of torch."""
    return sys._getframe(level + 1).f_code.co_filename.startswith((_PACKAGE, _TORCH))


def warn_caller(message: str) -> None:
    """Warn at the line of the user's code, however deep inside the package the cause was found."""
    warnings.warn(message, UserWarning, stacklevel=_caller_and_level(_PACKAGE, _TORCH)[1])


def _caller_and_level(*inside: str) -> tuple[FrameType | None, int]:
    """The first frame outside these folders, and its `stacklevel` for the function that asks."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return frame, level


def listed(names: Collection[str]) -> str:
    """The first names of several, as a message shows them; those of a set are sorted."""
    several = sorted(names) if isinstance(names, Set) else list(names)
    shown = ", ".join(f"`{name}`" for name in several[:3])
    return f"{shown} and {len(several) - 3} more" if len(several) > 3 else shown
