"""Copies for passes that are thrown away: whatever the build runs, it runs on one of these.

A pass may fill caches, count, observe and write buffers, so all of these are copied. Parameters are
most of a model's memory and a forward hardly ever writes them, so a copy shares them; the few
modules that do write parameters are found (see :func:`written_parameters`) and get copies of these
as well. On the meta device, where tensors have shapes and no contents, a copy takes no memory at
all and a pass hardly any time.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ride_plugin._tree import OF_MODULES, cloned, map_tensors, parameters_of, tensors_in

T = TypeVar("T")
_ATOMS = frozenset(
    {int, float, bool, str, type(None), type, FunctionType, torch.dtype, torch.device}
)
COMPILED_CALL = "_compiled_call_impl"
_WITHOUT_TENSORS = OF_MODULES - {"_parameters", "_buffers"}  # submodules, hooks
_HOOKS = tuple(name for name in vars(nn.Module()) if "hooks" in name)
_NOT_COPIED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)  # by torch
_COPYING = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__")


def clone_module(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Deep copy that survives activations left on modules (``self.feat = out``).

    ``deepcopy`` refuses tensors with a gradient history; they are copied without it.
    """
    memo = {} if memo is None else memo
    memo.update(detached_activations(module))
    return copy_with_hooks(module, module.modules(), memo)


def detached_activations(*modules: nn.Module) -> dict[int, Any]:
    """A deepcopy memo that maps activations kept on modules to copies without history."""
    return {id(t): t.detach().clone() for t in _kept_on(*modules) if not t.is_leaf}


def running_copy(
    value: T,
    modules: Iterable[nn.Module],
    written: frozenset[str] = frozenset(),
    meta: bool = False,
    memo: dict[int, Any] | None = None,
) -> T:
    """Copy ``value``, which holds ``modules``, for a pass that is thrown away.

    Args:
        value: a module, or an object that holds modules.
        modules: the modules whose parameters are shared.
        written: names of parameters that a forward writes; they are copied.
        meta: replace every tensor by one on the meta device.
        memo: what has a copy already, by id.
    """
    memo, modules = {} if memo is None else memo, list(modules)
    for module in modules:
        for name, parameter in module.named_parameters():
            if id(parameter) not in memo and type(parameter) is nn.Parameter:
                if meta:
                    memo[id(parameter)] = _like(parameter, parameter.detach().to("meta"))
                elif name not in written:
                    memo[id(parameter)] = _like(parameter, parameter.detach())
    if meta:
        buffers = [buffer for module in modules for buffer in module.buffers()]
        for tensor in (*buffers, *_kept_on(*modules)):
            if id(tensor) not in memo and not isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = tensor.detach().to("meta")
    else:
        memo.update({k: v for k, v in detached_activations(*modules).items() if k not in memo})
    parts = [part for module in modules for part in module.modules()]
    _copy_modules(parts, memo)
    return copy_with_hooks(value, parts, memo)


def copy_with_hooks(value: T, modules: Iterable[nn.Module], memo: dict[int, Any]) -> T:
    """``copy.deepcopy(value, memo)`` where every copy of ``modules`` has the hooks of its original.

    A module that says itself how it is copied may be made anew from a few settings, as einops'
    layers are. Without its hooks a pass would not know where a unit of the trunk ends.
    """
    modules = list(modules)
    for tensor in (buffer for module in modules for buffer in module.buffers(recurse=False)):
        if tensor.layout in _NOT_COPIED:
            memo.setdefault(id(tensor), tensor.clone())
    _copy_modules([module for module in modules if isinstance(module, GraphModule)], memo)
    result = copy.deepcopy(value, memo)
    for module in modules:
        copied = memo.get(id(module))
        if type(copied) is not type(module):  # not copied, or something stands in its place
            continue
        for name in _HOOKS:
            if vars(module).get(name) and not vars(copied).get(name):
                vars(copied)[name] = copy.deepcopy(vars(module)[name], memo)
    _mark_copies([p for module in modules for p in module._parameters.values()], memo)
    return result


def _mark_copies(parameters: Iterable[nn.Parameter | None], memo: dict[int, Any]) -> None:
    """Put on copies of parameters what models leave there for optimizers: `_no_weight_decay`, say.

    ``deepcopy`` leaves that out, but the copies are what trains.
    """
    for parameter in parameters:
        copied = memo.get(id(parameter))
        if parameter is None or copied is None or not vars(parameter) or vars(copied):
            continue
        for name, mark in vars(parameter).items():
            setattr(copied, name, map_tensors(lambda t: memo.get(id(t), cloned(t)), mark))


def _copy_modules(modules: Iterable[nn.Module], memo: dict[int, Any]) -> None:
    """Put copies of modules into a deepcopy memo: what ``deepcopy`` does, many times faster.

    Most attributes of most modules are numbers, names and empty dictionaries of hooks. Modules that
    say themselves how they are copied are left to ``deepcopy``, but for those of torch.fx, which
    make anew only what their graph calls, and no place where something stands in for others.
    """
    plain = {
        id(module): module
        for module in modules
        if id(module) not in memo
        if isinstance(module, GraphModule)
        or all(_inherits(type(module), name) for name in _COPYING)
    }
    shells = {key: type(module).__new__(type(module)) for key, module in plain.items()}
    memo.update(shells)
    # From inside to outside: a module that says itself how it is copied may use what is in it.
    for key, shell in reversed(shells.items()):
        attributes = shell.__dict__
        for name, attribute in vars(plain[key]).items():
            kind = type(attribute)
            if name == COMPILED_CALL:  # of `module.compile()`: it calls the original
                continue
            if kind in _ATOMS:
                attributes[name] = attribute
            elif kind in (dict, OrderedDict) and id(attribute) not in memo:
                # Known before it is filled: a hook's owner may hold a handle of this dictionary.
                attributes[name] = memo[id(attribute)] = kind()
                if attribute:
                    attributes[name].update((k, _copied(v, memo)) for k, v in attribute.items())
            else:
                attributes[name] = _copied(attribute, memo)
        if isinstance(shell, GraphModule):  # each has a class of its own, with the code as method
            shell.graph = shell.graph


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy(value, memo)``, without its detours for what most modules hold."""
    kind = type(value)
    if id(value) in memo:  # a function too, in whose place another may stand
        return memo[id(value)]
    if kind in _ATOMS:
        return value
    if kind is set and not value:  # names of buffers that are not saved
        memo[id(value)] = result = set[Any]()
        return result
    if kind is tuple and _is_small(value):
        return value
    if kind is Tensor and value.layout in _NOT_COPIED:
        memo[id(value)] = copied = value.clone()
        return copied
    if kind is Tensor and not value.requires_grad and _owns_its_memory(value):
        storage = value.untyped_storage()._cdata
        known = memo.setdefault("torch", {})  # type: ignore[call-overload]  # where deepcopy looks
        if storage not in known and not vars(value):
            memo[id(value)] = copied = value.clone()
            known[storage] = copied.untyped_storage()
            return copied
    return copy.deepcopy(value, memo)


def _owns_its_memory(tensor: Tensor) -> bool:
    """Whether its numbers fill a memory in order, so that others see all of it that they share."""
    return (
        tensor.layout is torch.strided
        and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    )


def _inherits(cls: type, name: str) -> bool:
    method = getattr(cls, name, None)
    if method is getattr(nn.Module, name, None):
        return True
    # Those of torch's own layers fill in what older versions did not save.
    return name == "__setstate__" and method.__module__.startswith("torch.nn.modules.")


def written_parameters(backbone: nn.Module, modules: Iterable[nn.Module]) -> frozenset[str]:
    """Put back the parameters of ``modules`` that a pass has written, and return their names.

    ``modules`` are parts of a copy of ``backbone``, under its names; the backbone itself has run
    nothing, so its values are the right ones.
    """
    theirs = dict(parameters_of(backbone))
    written = set()
    for module in modules:
        for name, parameter in parameters_of(module):
            original = theirs.get(name)
            if original is not None and not same_values(parameter.detach(), original.detach()):
                written.add(name)
                with torch.no_grad():
                    parameter.copy_(original)
    return frozenset(written)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one kind hold the same numbers, NaN where the other has NaN."""
    if a.shape != b.shape or a.dtype != b.dtype or a.layout is not b.layout:
        return False
    if a.layout is not torch.strided:  # torch compares no sparse tensors
        a, b = a.to_dense(), b.to_dense()
    if _same_bits(a, b) or _equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _equal(a: Tensor, b: Tensor) -> bool:
    try:
        return torch.equal(a, b)
    except NotImplementedError:  # classes of quantized weights know few operations
        if type(a) is not type(b) or not is_traceable_wrapper_subclass(a):
            raise
        inner, _ = a.__tensor_flatten__()
        return all(same_values(getattr(a, name), getattr(b, name)) for name in inner)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether large tensors are the same bit by bit: compared eight bytes at a time, sooner."""
    if a.nbytes < 2**16 or not a.is_floating_point():
        return False
    for t in (a, b):
        if type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided or t.is_neg():
            return False
        if not t.is_contiguous() or t.nbytes % 8 or t.storage_offset() * t.element_size() % 8:
            return False
    return torch.equal(*(t.detach().view(-1).view(torch.int64) for t in (a, b)))


def _like(parameter: nn.Parameter, data: Tensor) -> nn.Parameter:
    alias = nn.Parameter(data, parameter.requires_grad)
    alias.__dict__.update(parameter.__dict__)  # marks that models leave on their parameters
    return alias


def _kept_on(*modules: nn.Module) -> list[Tensor]:
    """The tensors that modules hold: parameters, buffers and plain attributes."""
    kept = {
        id(value): value  # many modules may hold one value, a configuration say
        for part in _reached_from(modules)
        for key, value in vars(part).items()
        if type(value) not in _ATOMS and key not in _WITHOUT_TENSORS
        if not isinstance(value, nn.Module)
    }
    values = [value for value in kept.values() if not _is_small(value)]
    return [tensor for value in values for tensor in tensors_in(value)]


def _is_small(value: Any) -> bool:
    """Whether it is empty or a tuple of numbers, as most attributes of layers are."""
    kind = type(value)
    if kind in (dict, OrderedDict, set, list):
        return not value
    return kind is tuple and all(type(entry) in _ATOMS for entry in value)


def _reached_from(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Their modules, and those that are held as plain attributes, as stand-ins hold an expert."""
    found: dict[int, nn.Module] = {}
    waiting = list(modules)
    while waiting:
        part = waiting.pop()
        if id(part) not in found:
            found[id(part)] = part
            waiting += [child for child in part._modules.values() if child is not None]
            waiting += [held for held in vars(part).values() if isinstance(held, nn.Module)]
    return list(found.values())
