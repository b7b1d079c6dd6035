"""Which tensors exist once for all experts: those that no training changes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ride_plugin._errors import CheckpointError
from ride_plugin._tree import dotted

Slot: TypeAlias = tuple[dict[str, Any], str]  # a module's parameters or buffers, and a name there
Group: TypeAlias = tuple[Tensor, list[Slot]]  # a tensor, and all slots that hold it


def frozen_layers(root: nn.Module, root_in_training: bool) -> list[nn.Module]:
    """Normalisation layers that somebody froze: in evaluation mode, with nothing to train.

    A layer without weights shows it only where the model around it is in training mode.
    """
    found: list[nn.Module] = []
    for layer in root.modules():
        if isinstance(layer, _NormBase) and layer.running_mean is not None and not layer.training:
            own = list(layer.parameters(recurse=False))
            if not trains(own) and (own or root_in_training):
                found.append(layer)
    return found


def unchanging(
    root: nn.Module, frozen_layers: Iterable[nn.Module], written: Collection[str] = ()
) -> dict[int, Tensor]:
    """Tensors of ``root`` that no training changes, by id.

    These are parameters that do not require gradients, the statistics of frozen normalisation
    layers, and tables of integers (positions, masks, quantised weights) beside nothing trainable.
    A row of integers is no table: it may be a queue's pointer or its labels, which training writes,
    and which would move on once for each expert if they shared it. Nor is what a forward has been
    seen to write (``written``, names in ``root``): queues, prototypes that follow an average.
    """
    found: dict[str, Tensor] = {n: p for n, p in root.named_parameters() if not p.requires_grad}
    for path, module in root.named_modules():
        if module._buffers and not trains(module.parameters(recurse=False)):
            for key, buffer in module.named_buffers(recurse=False):
                if buffer.dim() > 1 and not (buffer.is_floating_point() or buffer.is_complex()):
                    found[dotted(path, key)] = buffer
    kept = [tensor for name, tensor in found.items() if name not in written]
    for layer in frozen_layers:
        kept += layer.buffers(recurse=False)
    return {id(tensor): tensor for tensor in kept}


def held_together(experts: Iterable[nn.Module]) -> list[Group]:
    """The tensors that stand in several slots of the experts, each with those slots."""
    groups: dict[int, Group] = {}
    for expert in experts:
        for _, tensors, key in _slots(expert):
            group = groups.setdefault(id(tensors[key]), (tensors[key], []))
            group[1].append((tensors, key))
    return [group for group in groups.values() if len(group[1]) > 1]


def hold_together(groups: Iterable[Group]) -> None:
    """Let every slot of a group hold one tensor again: the one that has replaced the old."""
    for old, slots in groups:
        held = next((d[key] for d, key in slots if d[key] is not old), old)
        for tensors, key in slots:
            tensors[key] = held


def held_by_all(experts: Iterable[nn.Module]) -> dict[str, Slot]:
    """The parameters and buffers that all experts hold together: names, slots in expert 0."""
    first, *others = ({name: (t, k) for name, t, k in _slots(expert)} for expert in experts)
    if not others:
        return {}
    return {
        name: (tensors, key)
        for name, (tensors, key) in first.items()
        if all(name in o and o[name][0][o[name][1]] is tensors[key] for o in others)
    }


def complete_shared(state: Any, prefix: str, experts: nn.ModuleList, *, fill: bool) -> None:
    """Check what a checkpoint holds for shared tensors, which may stand under one key only.

    With ``fill`` every expert's key gets the tensor, so that none counts as missing.

    Raises:
        CheckpointError: it holds different values for experts that share the tensor here.
    """
    for name in held_by_all(experts):
        keys = [f"{prefix}experts.{index}.{name}" for index in range(len(experts))]
        values = [state[key] for key in keys if key in state]
        if not values:
            continue
        for value in values[1:]:
            if value is not values[0] and not _equal(value, values[0]):
                raise CheckpointError(
                    f"The checkpoint holds another `{name}` for each expert, but here all experts "
                    "share one, because it was frozen or tied when the model was wrapped. To give "
                    "each its own, unfreeze it before wrapping (`requires_grad_(True)`)."
                )
        if fill:
            state.update((key, state.get(key, values[0])) for key in keys)


def _slots(root: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    for path, module in root.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    yield dotted(path, key), tensors, key


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Number of trainable parameters and of all; a tensor in several places counts once."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def trains(parameters: Iterable[nn.Parameter]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)


def _equal(a: Any, b: Any) -> bool:
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.shape == b.shape
        and ((a.data_ptr() == b.data_ptr() and a.stride() == b.stride()) or torch.equal(a.to(b), b))
    )
