"""Where a network says how many classes it has: an attribute of its own, or one of its settings."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from ride_plugin._errors import listed, warn_caller
from ride_plugin._split._cut import Parts
from ride_plugin._split._replay import StandIn

_NAMES = ("num_classes", "num_labels")


def set_class_number(parts: Parts, number: int) -> None:
    """Let the parts say the number of classes that new classifiers have, as a new network would.

    A forward may read it (``logits.view(-1, self.num_labels)``), and it is saved in a
    configuration. Only the modules around the classifier are asked; another module's may count
    something else. Settings are one object for the backbone and all parts, and the backbone stays
    as it is, so the parts get a copy in common.
    """
    old, roots = parts.num_classes, (parts.trunk, *parts.experts)
    owners = [owner for root in roots for owner in _around(root, str(parts.classifier))]
    left = {name for owner in owners for name in _set(owner, old, number)}
    copies: dict[int, Any] = {}
    settings = {id(held): (name, held) for owner in owners for name, held in vars(owner).items()}
    for key, (name, held) in settings.items():
        if isinstance(held, Tensor | nn.Module) or not any(_says(held, n, old) for n in _NAMES):
            continue
        copies[key] = copy.copy(held)
        if copies[key] is held:  # a class, say, which is the backbone's too
            left.add(name)
        else:
            left |= {f"{name}.{failed}" for failed in _set(copies[key], old, number)}
    for module in (module for root in roots for module in root.modules()):
        for name, held in vars(module).items():
            if id(held) in copies:
                vars(module)[name] = copies[id(held)]
    if left:
        warn_caller(
            f"The classifiers have {number} outputs, but {listed(left)} of the backbone still "
            f"says {old} classes and cannot be set. A forward that reads it computes as for {old}. "
            f"Make the backbone for {number} classes, and leave `num_classes=` out."
        )


def _around(root: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules of a part that hold the module at ``path``, from outside to inside."""
    module: nn.Module | None = root
    for name in path.split("."):
        if module is None or isinstance(module, StandIn):
            return
        yield module
        module = module._modules.get(name)


def _set(owner: Any, old: int, number: int) -> Iterator[str]:
    """Set what says the old number; yield the names of what still does."""
    for name in _NAMES:
        if _says(owner, name, old):
            with suppress(Exception):  # a property without a setter, a frozen dataclass
                setattr(owner, name, number)
            if _says(owner, name, old):
                yield name


def _says(owner: Any, name: str, number: int) -> bool:
    # A module that answers for another one, as adapters do, has no attribute of its own.
    if isinstance(owner, nn.Module) and inspect.getattr_static(owner, name, None) is None:
        return False
    try:
        value = getattr(owner, name, None)
    except Exception:  # a property of the trunk may ask a layer of the experts
        return False
    return type(value) is int and value == number
