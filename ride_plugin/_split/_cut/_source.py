"""The copy of the backbone from which trunk and experts are made, or why there can be none."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from ride_plugin._compiler import COMPILED, is_compiled
from ride_plugin._contexts import evaluating
from ride_plugin._errors import SplitError, warn_caller
from ride_plugin._inputs import Inputs, run_plainly
from ride_plugin._split._copying import (
    COMPILED_CALL,
    as_they_are,
    contents_in,
    copy_with_hooks,
    detached_activations,
    hook_owners,
    refuse_captured,
    running_copy,
    settings_at,
)
from ride_plugin._split._replay import NoHandle, StandIn
from ride_plugin._tree import Place, dotted

_PARALLEL = frozenset(
    {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}
    | {"DeepSpeedEngine", "_FabricModule"}
)


def refuse_unfit(backbone: nn.Module) -> None:
    """Raise SplitError where the modules or tensors are of a kind that cannot be split."""
    if torch.is_inference_mode_enabled():
        raise SplitError(
            "Expected to be called outside `torch.inference_mode()`: tensors made there can never "
            "be trained. Wrap the backbone first."
        )
    held = [
        (dotted(path, key), child)
        for path, module in backbone.named_modules()
        for key, child in module._modules.items()
    ]
    for name, module in [("", backbone), *held]:
        if isinstance(module, nn.Module) and not issubclass(type(module), nn.Module):
            raise SplitError(
                f"Expected argument `backbone` to be made of modules, but {_called(name)} is "
                f"{type(module).__name__}, an object that answers for a "
                f"{module.__class__.__name__} inside of it. Attributes and hooks would be set on "
                "that one, and the object runs code of its own around it. Pass an nn.Module whose "
                "forward runs the same."
            )
    for name, module in backbone.named_modules():
        kind = type(module).__name__
        if kind in _PARALLEL:
            raise SplitError(
                f"Expected argument `backbone` to be a plain module, but {_called(name)} is "
                f"{kind}, which would run each expert's pass on its own and leave the ranks to "
                "drift apart. Wrap the plain module first, then the result: "
                f"`{kind}(RIDEWrapper(net, ...))`."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise SplitError(
                f"Expected argument `backbone` to be made of Python modules, but `{name}` is "
                "TorchScript, which runs no hooks. Wrap the backbone before scripting or tracing "
                "its parts."
            )
        if isinstance(module, StandIn):
            raise SplitError(
                "Expected argument `backbone` to be a plain module, but it is or holds a wrapped "
                "one. Wrap the backbone once; `to_module()` gives back a plain one."
            )
    for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers()):
        if is_lazy(tensor):
            raise SplitError(
                f"Expected argument `backbone` to have weights, but `{name}` is lazy and has none "
                "yet. Run one batch through the backbone before wrapping it."
            )
        if type(tensor).__name__ == "DTensor":
            raise SplitError(
                f"Expected argument `backbone` to hold ordinary tensors, but `{name}` is sharded. "
                "Wrap the plain module first, then shard the wrapped model: "
                "`fully_shard(RIDEWrapper(net, ...))`."
            )
        if tensor.is_meta:
            raise SplitError(
                f"Expected argument `backbone` to have weights, but `{name}` is on the meta "
                "device. Materialise it (`to_empty`, then initialise or load) before wrapping it."
            )
    for name, buffer in backbone.named_buffers():
        if buffer.requires_grad and buffer.is_leaf:
            raise SplitError(
                "Expected argument `backbone` to have weights that are parameters, but the buffer "
                f"`{name}` requires gradients, as in modules for meta-learning. Neither optimizers "
                "nor experts would know it as a weight. Make it an nn.Parameter; a step of "
                "meta-learning calls the wrapped model with other weights, "
                "`torch.func.functional_call(model, weights, (x,))`. If it is no weight, "
                "`requires_grad_(False)`."
            )
    refuse_captured(backbone)


def _called(name: str) -> str:
    return f"`{name}`" if name else "it"


def source_of(backbone: nn.Module) -> nn.Module:
    """A copy of the backbone, what was compiled as it was before."""
    settings = settings_at(backbone, contents_in(backbone))
    memo: dict[int, Any] = detached_activations(backbone) | as_they_are(settings)
    compiled = [module for module in backbone.modules() if is_compiled(module)]
    for module in reversed(compiled):  # from inside to outside
        memo[id(module)] = copy.deepcopy(module.get_submodule(COMPILED), memo)
    if compiled or any(vars(module).get(COMPILED_CALL) for module in backbone.modules()):
        warn_caller(
            "The backbone, or a part of it, is compiled. The experts are made of what was there "
            "before: compile the wrapped model instead, `torch.compile(model)`."
        )
    try:
        copy.deepcopy(settings)  # which passes that are thrown away have copies of
        source = copy_with_hooks(backbone, backbone.modules(), memo)
    except Exception as error:
        _refuse_uncopied(backbone, error)
        raise
    _drop_handles(source)
    return source


def after_first_call(
    source: nn.Module, inputs: Inputs, settings: frozenset[Place], written: frozenset[str]
) -> nn.Module:
    """A source whose forward has registered the hooks that it registers at its first call.

    Trunk and experts then have them, each once. Otherwise each would register them in its own
    first pass: on its own modules, not on those of the other side that run in this pass as well,
    and again in every pass that starts from what was noted before them. Hooks that captured a part
    of the module cannot be copied; there the source is returned as it is.

    Args:
        source: shares its parameters with what is returned.
        inputs: an example.
        settings: places of settings, which all copies hold together.
        written: names of parameters that a forward writes.
    """
    memo = as_they_are(settings_at(source, settings))
    copied = running_copy(source, (source,), written, memo=memo)
    with evaluating(copied):
        run_plainly(copied, inputs)
    try:
        refuse_captured(copied)
    except SplitError:
        return source
    _drop_handles(copied)
    return copied


def _drop_handles(source: nn.Module) -> None:
    for module in source.modules():
        for owner in (module, *hook_owners(module)):
            kept = getattr(owner, "__dict__", {})
            kept.update({key: _without_handles(value) for key, value in kept.items()})


def _refuse_uncopied(backbone: nn.Module, error: Exception) -> None:
    """Name the attribute that cannot be copied: a lock, an open file, a generator; if it is one."""
    kept: dict[int, Any] = detached_activations(backbone)
    kept |= {id(module): module for module in backbone.modules()}  # each is asked by itself
    for path, module in backbone.named_modules():
        for key, value in vars(module).items():
            if key in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(value, dict(kept))
            except Exception as own:
                raise SplitError(
                    "Expected argument `backbone` to be a module that `copy.deepcopy` can copy, as "
                    f"each expert is a copy, but its attribute `{dotted(path, key)}` "
                    f"({type(value).__name__}) "
                    f"raises {type(own).__name__}: {own}. Remove it before wrapping, keep it "
                    f"outside of the module, or give {type(module).__name__} a `__getstate__` that "
                    "leaves it out and a `__setstate__` that makes a new one."
                ) from error


def _without_handles(value: Any) -> Any:
    """The same without handles, which would lead to hooks of the original, or of nobody."""
    if isinstance(value, RemovableHandle):
        return NoHandle()
    if type(value) is list and any(isinstance(entry, RemovableHandle) for entry in value):
        return [_without_handles(entry) for entry in value]
    if type(value) is dict and any(isinstance(entry, RemovableHandle) for entry in value.values()):
        return {key: _without_handles(entry) for key, entry in value.items()}
    return value
