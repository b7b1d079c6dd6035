"""Compiling and exporting, which an old torch cannot do."""

from __future__ import annotations

import torch

from ride_plugin._errors import VersionError

COMPILES_FROM = (2, 10)
"""The oldest torch whose `torch.compile` and `torch.export` can follow a wrapped model."""

COMPILES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= COMPILES_FROM


def needs_compiler(what: str) -> None:
    """Refuse what this torch cannot trace.

    Raises:
        VersionError: torch is too old.
    """
    if not COMPILES:
        raise VersionError(
            f"{what} needs torch {'.'.join(map(str, COMPILES_FROM))} or newer, but this is torch "
            f"{torch.__version__}. Training, evaluation and routing work here uncompiled."
        )


def refuse_old_compiler() -> None:
    """Refuse to be compiled by a torch that would fail somewhere inside."""
    if not COMPILES and torch.compiler.is_compiling():
        _untraced("Compiling or exporting a wrapped model")


# Not traced, so that the error is this one and none of the compiler's, whose import takes long.
_untraced = needs_compiler if COMPILES else torch.compiler.disable(needs_compiler)
