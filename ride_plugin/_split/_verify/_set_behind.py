"""What code after the fork sets on modules of the trunk: experts set it on their stand-ins."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ride_plugin._split._copying import same_values
from ride_plugin._split._replay import Absent, Recorded
from ride_plugin._tree import OF_MODULES, Place


def set_behind(expert: nn.Module, trunk: nn.Module) -> set[Place]:
    """What an expert has set otherwise than the trunk, which therefore lacks it.

    Args:
        expert: after a pass from the tape.
        trunk: after a pass that has stopped at the fork.
    """
    places = set()
    for stand_in in expert.modules():
        if not isinstance(stand_in, Recorded):
            continue
        real = trunk.get_submodule(stand_in.ride_key)
        for key in sorted(vars(stand_in).keys() - OF_MODULES):
            if key.startswith("ride_"):
                continue
            if not _equal(vars(stand_in)[key], getattr(real, key, Absent)):
                places.add((stand_in.ride_key, key))
    return places


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same_values(a.detach(), b.detach())
    try:
        return a is b or bool(a == b)
    except Exception:  # arrays, say, of which each entry is compared
        return False
