"""Methods of torch's modules that the backbone's class overrides, and a wrapped model passes by.

What torch calls on every module inside (``train``, ``_apply``, ``state_dict``) runs on trunk and
experts. What it calls on the outermost module alone is the wrapped model's own method; the
backbone's may do more, such as keeping some layers in float32.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ride_plugin._errors import warn_caller
from ride_plugin._names_read import names_in
from ride_plugin._split._replay import StandIn

_NAMES = (
    *("to", "cpu", "cuda", "xpu", "to_empty", "share_memory"),
    *("type", "float", "double", "half", "bfloat16"),
    *("eval", "requires_grad_", "zero_grad"),
)
# Theirs keep a record for an engine, or refuse what a wrapped model is not asked for.
_KNOWN = ("torch", "transformers", "lightning", "pytorch_lightning", "lightning_fabric", "mmengine")
_NOTHING_ELSE = frozenset({"super", "nn", "Module", "torch"})


def tells(kind: type[nn.Module]) -> None:
    """Let the methods of this class tell what they pass by.

    Args:
        kind: of modules with a method ``own_parts()`` that returns modules of the backbone's.
    """
    for name in _NAMES:
        setattr(kind, name, _telling(kind, name))


def _telling(kind: type[nn.Module], name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(nn.Module, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        told = vars(self).setdefault("ride_told", set())
        if name not in told:
            told.add(name)
            _tell(self.own_parts(), name)
        return getattr(super(kind, self), name)(*args, **kwargs)

    return method


def _tell(parts: Iterable[nn.Module], name: str) -> None:
    kinds = {type(part): None for part in parts if not isinstance(part, StandIn)}
    for kind in kinds:
        if _does_more(inspect.getattr_static(kind, name), name):
            warn_caller(
                f"`{kind.__name__}` overrides `{name}()`, but the wrapped model has one of its "
                "own, which does to all parts what torch's does and does not call it. What else "
                "it does is left out (tensors that are plain attributes, layers that keep their "
                "precision, flags that the forward reads). Call it on the backbone before "
                "wrapping that; or do here, on each part, what it does: `for part in "
                "(model.trunk, *model.experts): ...`."
            )


def _does_more(method: Any, name: str) -> bool:
    if method is inspect.getattr_static(nn.Module, name):
        return False
    home = getattr(method, "__globals__", {}).get("__name__", "")
    return home.partition(".")[0] not in _KNOWN and not names_in(method) <= {name, *_NOTHING_ELSE}


def tell_of_hidden_parameters(backbone: nn.Module) -> None:
    """Warn where ``parameters()`` of a backbone leaves out some that train.

    An optimizer that is made of it trains the others only, and one of the wrapped model all.
    """
    found = {id(parameter) for parameter in backbone.parameters()}
    every = {
        id(parameter): parameter
        for _, module in nn.Module.named_modules(backbone)
        for parameter in module._parameters.values()
        if parameter is not None and parameter.requires_grad
    }
    hidden = every.keys() - found
    if hidden:
        kind = type(backbone).__name__
        warn_caller(
            f"`{kind}.parameters()` leaves out {len(hidden)} of {len(every)} parameters that "
            "require gradients. Those of the wrapped model are all of them, so that an optimizer "
            "made of `model.parameters()` trains what it did not train before. Freeze the others "
            "before wrapping (`requires_grad_(False)`), and the experts share them; or make it of "
            "`model.parameter_groups_by(lambda network: list(network.parameters()))`."
        )
