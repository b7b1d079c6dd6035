"""What a wrapped model answers for its backbone: plain values, and the few methods that fit all.

Training code asks a model for its `config`, its `default_cfg`, its parameters without weight decay,
and sets what the forward reads, `model.epoch = epoch`: on every part then.
A method of the backbone would act on the trunk's view alone, so only those are passed on of which
the meaning for trunk and experts is known; the others are refused with the way to go.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ride_plugin._errors import is_of_package, is_question, listed, warn_caller
from ride_plugin._known_methods import GROUPS, METHODS, alike, parameter_groups
from ride_plugin._names_read import may_be_set_late, names_read_by_forward
from ride_plugin._split import SplitModule, called, is_real, real_parts, write_attributes
from ride_plugin._tree import OF_MODULES, holds_tensors

_OPTIONS = frozenset({"return_experts", "checkpoint_experts"})  # to be set at any time


@dataclass
class Names:
    """Names that the backbone had when it was wrapped; what engines add later is not among them.

    Attributes:
        private: its plain attributes that begin with an underscore.
        taken: names of its own that the wrapped model has as well.
        absent: names that the code of its forward mentions and that neither it nor the wrapped
            model had.
        answered: private names that were set on the model, which it therefore answers for.
        added: names of ``absent`` that were set on the model, and on every part.
    """

    private: frozenset[str]
    taken: frozenset[str]
    absent: frozenset[str]
    answered: set[str] = field(default_factory=set)
    added: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: SplitModule, kind: type[SplitModule]) -> Names:
        """Those of the backbone of a model of this kind, which may be of a subclass."""
        trunk = model.trunk
        known = OF_MODULES.union(dir(nn.Module))
        plain = {*vars(trunk), *(set(dir(type(trunk))) - known)} - OF_MODULES
        held = {*trunk._modules, *trunk._parameters, *trunk._buffers}
        own = {*vars(model), *dir(kind)}
        ours = own - known - _OPTIONS - set(model._modules)
        mentioned = names_read_by_forward(trunk) - own - set(model._modules)
        return cls(
            private=frozenset(name for name in plain if re.match("_(?!_)", name)),
            taken=frozenset((plain | held) & ours),
            absent=mentioned - plain - held,
        )


def from_backbone(model: SplitModule, names: Names, name: str) -> Any:
    """The backbone's attribute of this name, or a method that does the same for all parts.

    Raises:
        AttributeError: it has none, or one that cannot be passed on; the message says what to use.
    """
    absent = f"'{type(model).__name__}' object has no attribute '{name}'"
    try:
        value = getattr(model.trunk, name)
    except AttributeError:
        raise AttributeError(absent) from None
    if name in METHODS and callable(value):
        return partial(METHODS[name], model)
    if ("", name) in model.set_by_experts:
        each = [getattr(expert, name) for expert in model.experts]
        if not alike(each):
            advice = f"Each expert sets its own in its forward: `model.experts[k].{name}`."
            raise _refused(absent, name, advice)
        value = each[0]
    if name in names.added:
        return value
    if GROUPS.search(name) and callable(value) and not isinstance(value, nn.Module):
        return parameter_groups(model, name)
    if isinstance(value, nn.Module | Tensor):
        raise _refused(
            absent,
            name,
            f"The backbone's exists {_where(model, name)}. Groups of parameters for an optimizer, "
            "made as of the backbone: `model.parameter_groups_by(function)`.",
        )
    if callable(value) or _holds_parts(value):
        raise _refused(absent, name, _instead_of(name, callable(value)))
    # Engines ask for private ones: names of parts, say, which are others now.
    if name.startswith("_") and name not in names.answered:
        raise AttributeError(absent)
    model.hand_out(name)
    return value


def _instead_of(name: str, is_method: bool) -> str:
    """Where to turn for what the backbone has of this name, in words."""
    begins = "The backbone's own would reach one part of the model only."
    if re.match("save|push", name):
        return (
            f"{begins} Save `model.state_dict()` and load it with `model.load_state_dict()`; "
            f"`model.to_module(k).{name}(...)` is for expert k alone, as a plain network."
        )
    if "merge" in name:  # adapters
        return (
            f"{begins} Experts share their frozen weights, so merge in a copy of one of them as a "
            f"plain network: `model.to_module(k).{name}(...)`."
        )
    verb, use = ("Call", f"{name}(...)") if is_method else ("Take", name)
    function = f"lambda network: network.{use}" if is_method else "function"
    if re.match("load|from_pretrained", name):
        last = "A state of a wrapped model is loaded with `model.load_state_dict()`."
    elif is_method and "feat" in name:
        last = "Features of all experts: `model.router_inputs(x).expert_features`."
    else:
        last = f"Groups of parameters for an optimizer: `model.parameter_groups_by({function})`."
    return (
        f"{begins} {verb} `{name}` on the backbone before wrapping it; on `model.to_module(k)`, "
        f"expert k as a plain network; on the trunk alone, `model.trunk.{use}`, if it concerns "
        "nothing behind the fork; or on every part, "
        f"`for part in (model.trunk, *model.experts): part.{use}`. {last}"
    )


def _where(model: SplitModule, name: str) -> str:
    """Where the backbone's module or tensor of this name is, in words."""

    def is_in(part: nn.Module) -> bool:
        value = getattr(part, name, None)
        if isinstance(value, nn.Module):
            return is_real(value)
        return name in part._parameters or name in part._buffers

    in_trunk, in_experts = is_in(model.trunk), is_in(model.experts[0])
    halves = (getattr(part, name, None) for part in (model.trunk, model.experts[0]))
    ours, theirs = (
        real_parts(half, name) if isinstance(half, nn.Module) else [] for half in halves
    )
    if in_trunk and in_experts and ours and theirs:  # a container in two halves
        here = listed([called("model.trunk", part) for part in ours])
        there = listed([called("model.experts[k]", part) for part in theirs])
        return f"once, in the trunk: {here}; and once for each expert: {there}"
    shared = f"once, in the trunk: `model.trunk.{name}`"
    forked = f"once for each expert: `model.experts[k].{name}`"
    if in_trunk is in_experts:  # a tensor that is a plain attribute, say
        return f"{shared}, and {forked}"
    return shared if in_trunk else forked


def _refused(absent: str, name: str, advice: str) -> AttributeError:
    if not name.startswith("_") and is_question():
        warn_caller(
            f"This code asks the model for `{name}` by `hasattr` or `getattr`: the backbone has it "
            "and the wrapped model has not. Where that answer is hidden (`hasattr`, or `getattr` "
            f"with a default), what depends on it is left out. {advice}"
        )
    return AttributeError(f"{absent}. {advice}")


def set_on_parts(model: SplitModule, names: Names, name: str, value: Any) -> bool:
    """Set an attribute of the backbone on trunk and experts, whose forwards may all read it.

    Returns:
        Whether the backbone has such an attribute, or code that mentions one; otherwise it is the
        wrapped model's own.

    Raises:
        AttributeError: it is a submodule or a tensor, of which each part has its own; or backbone
            and wrapped model both have the name, and which is meant is not certain.
    """
    if name in names.taken and not is_of_package(level=2):  # not the model's own code
        raise AttributeError(
            f"Cannot set `{name}`: both the wrapped model and the backbone have an attribute of "
            "this name, and the backbone's forward would not see what is set on the model. Set it "
            f"on each part, `for part in (model.trunk, *model.experts): part.{name} = ...`, or on "
            "the backbone before wrapping it. The wrapped model's own is not to be set."
        )
    if name in vars(model) or name in model._modules or hasattr(type(model), name):
        return False
    is_private = name.startswith("_")
    if name in names.absent and (name in names.added or not hasattr(model.trunk, name)):
        return _add(model, names, name, value)
    if not hasattr(model.trunk, name) or (is_private and name not in names.private):
        return False
    old, parts = getattr(model.trunk, name), (model.trunk, *model.experts)
    if isinstance(old, nn.Module):
        raise _replaced_too_late(model, name, "module")
    if any(name in part._parameters or name in part._buffers for part in parts):
        if value is None and all(getattr(part, name, None) is None for part in parts):
            return True
        raise _replaced_too_late(model, name, "tensor")
    if isinstance(value, nn.Module | nn.Parameter | MethodType) or _holds_modules(old):
        _tell_alone(name, "has")
        return False
    _set(model, name, value)
    if is_private:
        names.answered.add(name)
    return True


def _set(model: SplitModule, name: str, value: Any) -> None:
    for part in (model.trunk, *model.experts):
        if ("", name) in model.set_by_experts:  # a list that each fills is one for each
            write_attributes(part, [("", name)], (value,))
        else:
            setattr(part, name, value)


def _add(model: SplitModule, names: Names, name: str, value: Any) -> bool:
    """Set on every part what the backbone's code reads and did not have when it was wrapped."""
    if may_be_set_late(value):
        names.added.add(name)
        _set(model, name, value)
        return True
    _tell_alone(name, "reads")
    return False


def take_from_parts(model: SplitModule, names: Names, name: str) -> bool:
    """Take away from every part what :func:`set_on_parts` has added there, if it has."""
    if name not in names.added:
        return False
    names.added.discard(name)
    for part in (model.trunk, *model.experts):
        vars(part).pop(name, None)
    return True


def _tell_alone(name: str, why: str) -> None:
    warn_caller(
        f"The backbone {why} `{name}`, but it is set on the wrapped model alone, so that the "
        "backbone's forward does not see it. Set it on the backbone before wrapping, or on "
        f"each part: `for part in (model.trunk, *model.experts): part.{name} = ...`."
    )


def refuse_added(model: SplitModule) -> None:
    """Refuse modules that came into the model past :func:`set_on_parts`, by ``add_module`` say.

    Raises:
        AttributeError: the backbone has a submodule of this name.
    """
    for name in model._modules:
        shadowed = name not in ("trunk", "experts") and getattr(model.trunk, name, None)
        if isinstance(shadowed, nn.Module):
            raise _replaced_too_late(model, name, "module")


def _replaced_too_late(model: SplitModule, name: str, kind: str) -> AttributeError:
    return AttributeError(
        f"Expected the backbone's `{name}` to be replaced before wrapping, but got another "
        f"{kind} for it afterwards, which the model would not run: the backbone's exists "
        f"{_where(model, name)}. Replace it in the backbone and wrap that; for another number of "
        "classes pass `num_classes=` when wrapping; or replace it there."
    )


def _holds_parts(value: Any) -> bool:
    return _holds_modules(value) or holds_tensors(value)


def _holds_modules(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value
    return isinstance(value, list | tuple | set | dict) and any(
        isinstance(item, nn.Module) for item in items
    )
