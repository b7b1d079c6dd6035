"""What a stand-in cannot hand out: what is one of several, or comes by once more for each expert.

``model.trunk.head.weight`` would be the weight of expert 0. What is done to it (an initialisation,
a penalty, a place in an optimizer) would leave the other experts as they are, without a word. And a
loop over all modules that adds up what layers hold, losses say, would count a shared layer's once
more for each expert.
"""

from __future__ import annotations

import re
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ride_plugin._errors import ReplayError, caller, is_question, warn_caller


class OneOfSeveral(ReplayError, AttributeError):
    """What was asked for is elsewhere too. Code that asks any module by ``hasattr`` gets a no."""


def is_of_one_expert(value: Any) -> bool:
    """Whether a value is a tensor or a part of a module, or acts on one, and not plain data."""
    if isinstance(value, MethodType):
        return isinstance(value.__self__, nn.Module)
    return isinstance(value, Tensor | nn.Module)


def one_of_several(number: int, key: str, name: str, quiet: bool) -> OneOfSeveral:
    """The error of somebody who asks the trunk for what each of several experts has.

    Args:
        number: of the experts.
        key: name of the module in each of them.
        name: what was asked for: a name, a call with its parentheses, or an index in brackets.
        quiet: whether a loop over all modules asks, which comes by the experts' own as well.
    """
    asked = called("model.trunk", key) + (name if name.startswith("[") else f".{name}")
    there = asked.replace("model.trunk", "model.experts[k]", 1)
    message = (
        f"`{asked}` is asked for, but there are {number} of them, one in each expert: `{there}`. "
        "What is done to one of them reaches no other. Do it there for each k (the classifiers: "
        "`model.classifiers`); groups of parameters for an optimizer are made as for the backbone "
        "by `model.parameter_groups_by(function)`."
    )
    if name.isidentifier() and not quiet and is_question():
        warn_caller(f"The answer to `hasattr` or to `getattr` with a default is no. {message}")
    return OneOfSeveral(message)


def warn_of_first_expert(number: int, key: str) -> None:
    """Warn of somebody who runs the trunk by itself, which goes on into the first expert."""
    warn_caller(
        f"`model.trunk`, or modules taken from it, ran by themselves as far as `{key}`, which is "
        f"forked, so that what they return is that of expert 0 alone, of {number}. The shared "
        "result is `model.run_trunk(x)`, the logits of all experts are `model(x)`, and those of "
        "one `model.experts[k](x)`."
    )


def comes_by_itself(part: str, key: str, name: str, quiet: bool) -> OneOfSeveral:
    """The answer to a loop over all modules, which meets the real module as well.

    Args:
        part: where the real module is.
        key: its name in there.
        name: what was asked for, as for :func:`one_of_several`.
        quiet: whether it is known that a loop asks.
    """
    asked = f"{key}{name}" if name.startswith("[") else f"{key}.{name}"
    if not quiet:
        warn_caller(
            "The answer to `hasattr` or to `getattr` with a default is no, since a stand-in was "
            f"asked for `{asked}`. Ask the module that it stands for, `{called(part, key)}`. (A "
            "loop over a list of all modules meets that as well: what it adds up is right.)"
        )
    return OneOfSeveral(
        f"A loop over all modules asks a stand-in for `{asked}`. It meets the real module as well, "
        "so that what it adds up would count twice: let it leave out what has no such attribute "
        "(`hasattr`), or is not of the type that it looks for (`isinstance`)."
    )


def asks_as_backbone(stand_in: nn.Module, real: nn.Module) -> bool:
    """Whether code of the trunk itself asks, a method or a property of the backbone's own.

    It is called on every part, and each expert's own comes to that expert's modules.
    """
    frame = caller()
    asker = None if frame is None else frame.f_locals.get("self")
    if not isinstance(asker, nn.Module):
        return False
    inside = {id(module) for module in nn.Module.modules(asker)}
    return id(stand_in) in inside and id(real) not in inside


def called(part: str, name: str) -> str:
    """As it is written in Python, with numbers as indices."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", f"{part}.{name}")
