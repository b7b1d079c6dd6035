"""The way back: an expert as a plain module, with nothing of this library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ride_plugin._closeness import close
from ride_plugin._contexts import in_mode, random_state_kept, seed_everything
from ride_plugin._errors import RIDEError
from ride_plugin._inputs import Inputs, own_inputs, resize_batch
from ride_plugin._split._copying import (
    clone_module,
    copy_with_hooks,
    detached_activations,
    running_copy,
)
from ride_plugin._split._cut import Link, Parts, is_ours, trial_run
from ride_plugin._split._examine import LogitsReader, on_meta, reader_in
from ride_plugin._split._replay import Recorded, drop_hooks, list_own
from ride_plugin._split._saving import Pair
from ride_plugin._split._ways._join import Joined


def plain_modules(parts: Parts, indices: Sequence[int]) -> nn.ModuleList:
    """For each index the backbone with the trunk's and that expert's weights, nothing of ours.

    The modules share one copy of the trunk; the parts themselves stay as they are.

    Raises:
        RIDEError: a module computes something else than its expert.
    """
    copied, roots, readers = _put_together(parts, indices, {})
    for part in (copied.trunk, *roots):
        _strip_hooks(part)
    for index, module, reader in zip(indices, roots, readers, strict=True):
        _check(parts, index, module, reader)
    return nn.ModuleList(_without_ours(root) for root in roots)


def output_of_backbone(parts: Parts, inputs: Inputs, meta: bool, memo: dict[int, Any]) -> Any:
    """All that expert 0 and the trunk return as a plain backbone, in the mode that they are in.

    Args:
        parts: left as they are.
        inputs: of the forward.
        meta: return tensors without contents; it raises where the backbone looks at values.
        memo: what stands in the copy for something, by its id.
    """
    _, (root,), _ = _put_together(parts, [0], _held_by(parts) | memo)
    _strip_hooks(root)
    with torch.no_grad(), random_state_kept(parts.trunk), on_meta(own_inputs(inputs), meta) as own:
        args, kwargs = own
        return running_copy(root, (root,), parts.written, meta)(*args, **kwargs)


def plain_views(parts: Parts) -> list[nn.Module]:
    """Every expert as the backbone would be, of the very tensors that the parts hold.

    They are for reading names and tensors: nothing checks that they run.
    """
    _, roots, _ = _put_together(parts, range(len(parts.experts)), _held_by(parts))
    return [_without_ours(root) for root in roots]


def _held_by(parts: Parts) -> dict[int, Any]:
    """A memo by which copies hold the very tensors of the parts."""
    roots = (parts.trunk, *parts.experts)
    return {id(t): t for root in roots for t in (*root.parameters(), *root.buffers())}


def _put_together(
    parts: Parts, indices: Sequence[int], memo: dict[int, Any]
) -> tuple[Parts, list[nn.Module], list[LogitsReader]]:
    """A copy of all parts, and in it the experts with the trunk's modules where they belong."""
    for root in (parts.trunk, *parts.experts):
        memo = detached_activations(root) | memo
    everything = [part for root in (parts.trunk, *parts.experts) for part in root.modules()]
    copied = copy_with_hooks(parts, everything, memo)
    roots = [copied.experts[index] for index in indices]
    for root in roots:
        _reunite(root, copied.links)
    return copied, roots, [reader_in(root) for root in roots]


def _without_ours(root: nn.Module) -> nn.Module:
    if isinstance(root, Joined):
        return nn.Sequential(root.body, root.head)
    if isinstance(root, Pair):
        halves = {"feature_extractor": root.feature_extractor, "classifier": root.classifier}
        return nn.ModuleDict(halves)
    return root


def _reunite(root: nn.Module, links: Sequence[Link]) -> None:
    """Put the trunk's modules and tensors back to where the backbone had them."""
    for name, module in list(root.named_modules(remove_duplicate=False)):
        if isinstance(module, Recorded):
            root.set_submodule(name, module.ride_real)
    inside = {id(module) for module in root.modules()}
    for link in links:
        if id(link.view) not in inside:
            continue
        link.view.__dict__.pop(link.name, None)
        if link.name in link.owner._parameters:
            link.view._parameters[link.name] = link.owner._parameters[link.name]
        else:
            link.view._buffers[link.name] = link.owner._buffers[link.name]
            if link.name in link.owner._non_persistent_buffers_set:
                link.view._non_persistent_buffers_set.add(link.name)


def _strip_hooks(root: nn.Module) -> None:
    for module in root.modules():
        list_own(module)
        drop_hooks(module, is_ours)


def _check(parts: Parts, index: int, module: nn.Module, reader: LogitsReader) -> None:
    inputs = resize_batch(parts.inputs, 2)
    probe = in_mode(clone_module(module), False)  # a forward may leave caches behind
    args, kwargs = inputs
    with torch.no_grad(), random_state_kept(probe):
        seed_everything()  # a forward may choose its path at random
        expected, _ = trial_run(parts, index, inputs)
        try:
            got = reader.logits_of(probe(*args, **kwargs))
        except Exception as error:
            raise RIDEError(
                f"Expert {index} does not run as a module of its own ({type(error).__name__}: "
                f"{error}). With a trunk of several inputs, call trunk and expert yourself."
            ) from error
    if not close(got, expected, units=500):
        raise RIDEError(
            f"The plain module of expert {index} computes other logits than the expert. Its "
            "backbone keeps references to submodules outside `named_modules()`."
        )
