"""Modules whose ``train`` is overridden, and sets other modes in a part than in the backbone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ride_plugin._errors import listed
from ride_plugin._split._stand_ins import StandIn


def other_modes(backbone: nn.Module, parts: Iterable[nn.Module]) -> str | None:
    """What to do where a part's own ``train`` set modes that are not the backbone's.

    A ``train`` that goes by the number of a module (partial BatchNorm: all but the first are
    frozen) begins to count anew in each part, and finds stand-ins among the modules.
    """
    modes = {name: module.training for name, module in backbone.named_modules()}
    names = [
        name
        for part in parts
        for name, module in part.named_modules()
        if not isinstance(module, StandIn) and modes.get(name, module.training) != module.training
    ]
    kinds = {type(m).__name__ for m in backbone.modules() if type(m).train is not nn.Module.train}
    if not names or not kinds:
        return None
    return (
        f"`train()`, which {listed(kinds)} overrides, sets {listed(names)} into another mode than "
        "in the backbone, as where it counts modules: every part begins at its own first. Let it "
        "go by names; or call `train()` on the backbone, then switch off what it does there, and "
        "wrap that: normalisation layers in evaluation mode whose parameters do not train stay so."
    )
