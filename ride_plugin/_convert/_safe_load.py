"""Reads the tensors of a checkpoint that also pickles other objects, and runs nothing of it."""

from __future__ import annotations

import os
import pickletools
import struct
import warnings
import zipfile
from typing import IO, Any

import torch

from ride_plugin._errors import CheckpointError

_PROTOCOL = 2  # the newest that torch's restricted unpickler reads, and what torch.save writes


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
        CheckpointError: the file is damaged, or it holds what even that cannot read; the message
            names a remedy.
    """
    _check_archive(path)
    try:
        return _load(path)
    except OSError:
        raise  # no such file
    except Exception:
        pass  # it names something else than tensors, or is broken
    names: set[str] = set()
    protocol = 0
    try:
        names, protocol = _names_in(path)
        shells: list[Any] = [_shell_named(name) for name in sorted(names)]
        with torch.serialization.safe_globals(shells):
            return _load(path)
    except Exception as error:  # a broken pickle can fail in any way
        ends_early = isinstance(error, EOFError | IndexError | struct.error)
        if ends_early or "unexpected EOF" in str(error):
            raise _damaged(path, "it ends before its tensors do") from error
        if not names and protocol <= _PROTOCOL:
            raise _damaged(path, "it holds no pickled tensors that can be read") from error
        reason = (
            f"it is written in pickle protocol {protocol}, of which tensors are read only up to "
            f"{_PROTOCOL}"
            if protocol > _PROTOCOL
            else f"it names {', '.join(sorted(names))}"
        )
        raise CheckpointError(
            f"Cannot read {os.fspath(path)!r} without running code that it holds: {reason}. If "
            "you trust where it comes from, keep only its tensors once, where the authors' code is "
            'installed: torch.save({"state_dict": torch.load(path, weights_only=False)'
            '["state_dict"]}, new_path), and load new_path here.'
        ) from error


def _shell_named(name: str) -> type[_Shell]:
    module, _, own = name.rpartition(".")
    return type(own, (_Shell,), {"__module__": module})


def _load(path: str | os.PathLike[str]) -> Any:
    with warnings.catch_warnings():  # of a pickle protocol: what cannot be read raises below
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _damaged(path: str | os.PathLike[str], reason: str) -> CheckpointError:
    return CheckpointError(
        f"Cannot read {os.fspath(path)!r}: {reason}. The file is damaged, cut off or no "
        "checkpoint; get it again and compare its size and checksum with the source's."
    )


def _check_archive(path: str | os.PathLike[str]) -> None:
    """Refuse an archive that is cut off, whose bytes have changed, or that inflates.

    Since torch 1.6 a checkpoint is a zip of uncompressed members. torch checks neither their
    checksums nor their sizes; files from before carry no checksum.
    """
    with open(path, "rb") as file:
        begins_as_archive = file.read(2) == b"PK"
    if not zipfile.is_zipfile(path):
        if begins_as_archive:
            raise _damaged(path, "the end of its zip archive is missing")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            if not stored or sum(m.file_size for m in members) > os.path.getsize(path):
                raise _damaged(path, "its members unpack to more bytes than the file has")
            changed = archive.testzip()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged directory can fail in any way
        raise _damaged(path, "the directory of its zip archive is broken") from error
    if changed is not None:
        raise _damaged(path, f"the checksum of its member {changed!r} does not match")


def _names_in(path: str | os.PathLike[str]) -> tuple[set[str], int]:
    """Every `module.name` that the file's pickles mention, and their protocol, by disassembly."""
    names: set[str] = set()
    protocol = 0

    def read(pickle: IO[bytes]) -> None:
        nonlocal protocol
        for code, argument, _ in pickletools.genops(pickle):
            if code.name == "GLOBAL":
                names.add(str(argument).replace(" ", "."))
            elif code.name == "PROTO":
                protocol = max(protocol, int(str(argument)))

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    read(archive.open(name))
        return names, protocol
    with open(path, "rb") as file:  # before torch 1.6: a mark, a version, a header, the content
        for _ in range(4):
            read(file)
    return names, protocol
