"""Reads the tensors of a checkpoint that also pickles other objects, and runs nothing of it."""

from __future__ import annotations

import os
import pickletools
import zipfile
from typing import IO, Any

import torch

from ride_plugin._errors import CheckpointError


class _Shell:
    """Stands in for whatever a file names beside tensors: takes anything, keeps nothing."""

    def __new__(cls, *_: Any) -> _Shell:
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """Read a checkpoint's tensors, with shells for every other name that the file mentions.

    torch's restricted unpickler calls what its own list of tensor builders allows, and the shell.
    The names are found by disassembling the pickle, which runs nothing.

    Raises:
        CheckpointError: it holds what even that cannot read; the message names a remedy.
    """
    try:
        return _load(path)
    except OSError:
        raise  # no such file
    except Exception:
        pass  # it names something else than tensors, or is broken
    names: list[str] = []
    try:
        names = sorted(_names_in(path))
        shells: list[Any] = [(_Shell, name) for name in names]
        with torch.serialization.safe_globals(shells):
            return _load(path)
    except Exception as error:  # a broken pickle can fail in any way
        raise CheckpointError(
            f"Cannot read {os.fspath(path)!r} without running code that it holds; it names "
            f"{', '.join(names) or 'nothing, so it is broken or no checkpoint'}. If you trust "
            "where it comes from, keep only its tensors once, where the authors' code is "
            'installed: torch.save({"state_dict": torch.load(path, weights_only=False)'
            '["state_dict"]}, new_path), and load new_path here.'
        ) from error


def _load(path: str | os.PathLike[str]) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _names_in(path: str | os.PathLike[str]) -> set[str]:
    """Every `module.name` that the file's pickles mention, by disassembly."""

    def mentioned(pickle: IO[bytes]) -> set[str]:
        operations = pickletools.genops(pickle)
        return {str(a).replace(" ", ".") for code, a, _ in operations if code.name == "GLOBAL"}

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            return set().union(*(mentioned(archive.open(name)) for name in names))
    with open(path, "rb") as file:  # before torch 1.6: a mark, a version, a header, the content
        return set().union(*(mentioned(file) for _ in range(4)))
