"""Norms follow the channels that arrive: their parameters, sizes and groups."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ride_plugin._width._amend import Amender
from ride_plugin._width._plan import Step


def fit_norm(
    amender: Amender, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Resize what a norm is given, and set what its module keeps of the size.

    Args:
        amender: of this trial; it lets the channels keep their number where nothing that can be
            set holds the size.
        step: the norm at full width.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        Arguments that fit the channels that arrive.
    """
    name, ledger, given = step.name, amender.ledger, list(args)
    x: Tensor = given[0] if given else kwargs["input"]
    module: Any = ledger.modules[amender.where]
    last = name in ("layer_norm", "rms_norm")
    if last:
        shape = tuple(given[1] if len(given) > 1 else kwargs["normalized_shape"])
        size = tuple(x.shape[-len(shape) :])
    else:
        size = (x.shape[1],)
    done = len(ledger.changes)
    for i, value in enumerate(given[1:], 1):
        given[i] = _fitted(amender, value, size)
    kwargs = {k: v if k == "input" else _fitted(amender, v, size) for k, v in kwargs.items()}
    if last and shape != size:
        if "normalized_shape" in vars(module):
            ledger.set_attribute(module, "normalized_shape", size)
        elif len(ledger.changes) == done:  # else it may be the shape of what was just resized
            amender.give_way((x,), f"`{name}` with a fixed size")
        if len(given) > 1:
            given[1] = size
        else:
            kwargs["normalized_shape"] = size
    if name == "group_norm":
        groups = _groups(amender, step, module, x, given[1] if given[1:] else kwargs["num_groups"])
        if len(given) > 1:
            given[1] = groups
        else:
            kwargs["num_groups"] = groups
    for attribute in ("num_features", "num_channels", "num_parameters"):
        if not isinstance(getattr(module, attribute, None), int):
            continue
        if name != "prelu" or module.num_parameters != 1:  # one for all channels stays one
            ledger.set_attribute(module, attribute, size[0])
    return tuple(given), kwargs


def _fitted(amender: Amender, value: Any, size: tuple[int, ...]) -> Any:
    if isinstance(value, Tensor) and value.numel() > 1 and tuple(value.shape) != size:
        for module, key in amender.ledger.owners.get(id(value), ()):
            amender.ledger.resize(module, key, dict(enumerate(size)))
        return amender.ledger.current(value)
    return value


def _groups(amender: Amender, step: Step, module: Any, x: Tensor, groups: int) -> int:
    """As many groups as there were, or groups of as many channels.

    Groups of several channels never become groups of one: a single value less its mean is zero.
    """
    channels, own = x.shape[1], isinstance(module, nn.GroupNorm)
    before: int = module.num_channels if own else step.inputs[0][1]
    if channels % groups == 0 and (channels > groups or before == groups):
        return groups
    if own:
        fewer = max(1, channels // (before // groups))
        if channels % fewer == 0:
            amender.ledger.set_attribute(module, "num_groups", fewer)
            return fewer
    amender.give_way((x,), f"{channels} channels in {groups} groups")
