"""Functions and weak references that lead to the backbone: a copy of it does not copy them."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from ride_plugin._errors import SplitError, warn_caller
from ride_plugin._split._copying._copies import COMPILED_CALL
from ride_plugin._tree import CONTAINERS, OF_MODULES

_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
_WEAK = (weakref.ref, weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)


def refuse_captured(backbone: nn.Module) -> None:
    """Refuse functions, hooks above all, that captured a part of the backbone or what it keeps.

    ``deepcopy`` copies a method with the object that it belongs to, but leaves a function as it is,
    and a weak reference as well. So a hook such as
    ``lambda module, args, out: setattr(net, "features", out)`` on a copy would write into the
    original, and what the copy reads would be out of date.

    Raises:
        SplitError: there is such a function or reference; the message names it and what it
            captured.
    """
    names: dict[int, str] = {}
    for name, module in backbone.named_modules():
        names.setdefault(id(module), f"`{name}`" if name else "the backbone itself")
        for key, value in vars(module).items():
            if isinstance(value, CONTAINERS) and key not in OF_MODULES:
                names.setdefault(id(value), f"`{name}.{key}`" if name else f"`{key}`")
    for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers()):
        names.setdefault(id(tensor), f"`{name}`")
    for name, module in backbone.named_modules():
        if type(module).__name__ == "OptimizedModule":  # taken as it was before it was compiled
            continue
        for what, function in _functions_of(module):
            for captured in captured_by(function):
                if id(captured) in names:
                    where = f" of `{name}`" if name else ""
                    raise SplitError(
                        f"Expected argument `backbone` to hold no function that captured a part of "
                        f"it, but {what}{where} ({getattr(function, '__qualname__', function)}) "
                        f"captured {names[id(captured)]}. In each expert it would still act on the "
                        "original. Make it a method of the module that it belongs to, or register "
                        "it after wrapping, on `model.trunk` or `model.experts[k]`."
                    )
        for key, reference in _weak_references_of(module):
            for referent in _referents(reference):
                if id(referent) in names:
                    where = f" of `{name}`" if name else ""
                    raise SplitError(
                        "Expected argument `backbone` to hold no weak reference to a part of it, "
                        f"but attribute `{key}`{where} refers to {names[id(referent)]}. In each "
                        "expert it would still lead to the original, and to nothing once that is "
                        "gone. Hand what is read there to the forward as an argument, or hold the "
                        f"part itself where it is no submodule, in a tuple: `self.{key} = (part,)`."
                    )


def warn_of_outside_hooks(backbone: nn.Module) -> None:
    """Say that an object which no module holds, a feature extractor say, will hear nothing more."""
    inside = {
        id(part) for module in backbone.modules() for part in (module, *vars(module).values())
    }
    for name, module in backbone.named_modules():
        for owner in hook_owners(module):
            if id(owner) not in inside:
                warn_caller(
                    f"A hook of `{name}` is a method of an object outside of the backbone "
                    f"({type(owner).__name__}). Trunk and experts call copies of it, so what the "
                    "original collects is not theirs. Register it after wrapping, on a submodule "
                    "of `model.trunk` or `model.experts[k]`, or remove it before."
                )
                return


def hook_owners(module: nn.Module) -> Iterator[Any]:
    """The objects, not torch's own, whose methods are hooks of a module's passes."""
    for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"):
        for hook in vars(module).get(kind, {}).values():
            function = _unwrapped(hook)
            if isinstance(function, MethodType):
                owner = function.__self__
                if not type(owner).__module__.startswith("torch."):
                    yield owner


def _unwrapped(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func
    return function


def _functions_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, attribute in vars(module).items():
        if key in OF_MODULES or key == COMPILED_CALL:
            continue
        for value in _one_level_into(attribute):
            if isinstance(value, FunctionType | partial):
                yield f"attribute `{key}`", value
    for what, hooks in (
        ("a forward pre-hook", module._forward_pre_hooks),
        ("a forward hook", module._forward_hooks),
    ):
        for hook in hooks.values():
            yield what, hook


def _weak_references_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, attribute in vars(module).items():
        # torch's recurrent layers refer to their own weights, and renew that in each copy.
        own = isinstance(module, nn.RNNBase) and key == "_flat_weight_refs"
        if key in OF_MODULES or own:
            continue
        for value in _one_level_into(attribute):
            if _is_weak(value):
                yield key, value


def _is_weak(value: Any) -> bool:
    """Whether it refers to something that it does not keep; a proxy answers as that would."""
    return type(value) in _PROXIES or isinstance(value, _WEAK)


def _referents(reference: Any) -> list[Any]:
    """What weak references lead to, if it is still there."""
    if isinstance(reference, weakref.WeakSet | weakref.WeakKeyDictionary):
        return list(reference)
    if isinstance(reference, weakref.WeakValueDictionary):
        return list(reference.values())
    if isinstance(reference, weakref.ref):
        referent = reference()
        return [referent.__self__ if isinstance(referent, MethodType) else referent]
    try:
        return [reference.__repr__.__self__]  # a proxy's method is that of the object
    except (ReferenceError, AttributeError):
        return []


def _one_level_into(value: Any) -> list[Any]:
    """What a container holds, or the value itself."""
    if _is_weak(value):
        return [value]
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple | set | frozenset | deque) else [value]


def captured_by(function: Any) -> Iterator[Any]:
    """What a function keeps in its closure and defaults, one level into containers."""
    function = _unwrapped(function)
    if not isinstance(function, FunctionType):
        return
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # a variable that was never set
            continue
    for value in values:
        if isinstance(value, CONTAINERS):
            yield value
        for item in _one_level_into(value):
            if _is_weak(item):
                yield from _referents(item)
            elif isinstance(item, MethodType):
                yield item.__self__
            elif isinstance(item, nn.Module | Tensor):
                yield item
