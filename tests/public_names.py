"""The public names and signatures, one a line: `python -m tests.public_names` writes them anew.

`tests/test_public_names.py` compares what the package offers with `tests/public_names.txt`, so that
every change to them shows in a diff and nobody makes one by accident.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ride_plugin

SNAPSHOT = Path(__file__).with_suffix(".txt")
_MODULES = ("", "functional", "longtail", "losses", "routing")


def lines() -> Iterator[str]:
    """Every public name with its signature, in alphabetical order within its module."""
    seen: dict[int, str] = {}
    for name in _MODULES:
        module = getattr(ride_plugin, name) if name else ride_plugin
        for public in sorted(names_of(module)):
            value, path = getattr(module, public), f"{module.__name__}.{public}"
            first = seen.setdefault(id(value), path)
            yield from _described(path, value) if first == path else [f"{path}: {first}"]


def names_of(module: ModuleType) -> list[str]:
    """What a module offers: `__all__`, or the public functions and classes defined in it."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def _described(path: str, value: Any) -> Iterator[str]:
    if inspect.ismodule(value):
        yield f"{path}: module"
    elif inspect.isclass(value):
        bases = ", ".join(base.__name__ for base in value.__bases__)
        signature = "" if issubclass(value, BaseException) else _signature(value)
        yield f"{path}({bases}){signature}"
        for name, member in sorted(vars(value).items()):
            if not name.startswith("_"):
                yield from _described(f"{path}.{name}", member)
    elif isinstance(value, classmethod | staticmethod):
        yield f"{path}{_signature(value.__func__)}: {type(value).__name__}"
    elif isinstance(value, property):
        yield f"{path}: property"
    elif inspect.isroutine(value):
        yield f"{path}{_signature(value)}"
    elif not inspect.isdatadescriptor(value):
        yield f"{path} = ..."


def _signature(value: Any) -> str:
    """Without quotes: which annotations are strings differs between versions of Python."""
    text = re.sub(r"ForwardRef\('([^']*)'[^)]*\)", r"\1", str(inspect.signature(value)))
    return text.replace("'", "").replace('"', "")


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(lines()) + "\n")
