"""Buffers that depend on a layer's weight, brought up to date after the weight was drawn anew."""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from ride_plugin._initialise._draw import is_constant
from ride_plugin._tree import dotted

_STEPS = 15  # of a power iteration: torch takes as many when it registers a spectral norm


def settle_computed(root: nn.Module, keep: Set[int] = frozenset()) -> list[str]:
    """Let the buffers of parametrizations, and of older spectral norms, follow a new weight.

    What follows its weight while the layer is in training, as the vectors of a spectral norm do,
    is made to follow it here: the layer would compute with those of another weight until then, and
    for good if it stays in evaluation mode.

    Args:
        root: changed in place.
        keep: ids of tensors that are not its own.

    Returns:
        Names of computed weights beside which buffers stay as they are, whatever the weight is,
        and may have been computed from it.
    """
    left = []
    with torch.no_grad():
        for name, module, key, held in _computed_in(root):
            sources = list(held.parameters())
            if not sources or not all(p.requires_grad and id(p) not in keep for p in sources):
                continue  # nothing was drawn there
            before = [buffer.clone() for buffer in held.buffers()]
            training = held.training
            held.train()
            for _ in range(_STEPS if before else 0):
                getattr(module, key)
            held.train(training)
            stays = all(map(torch.equal, before, held.buffers())) and not _is_of_torch(held)
            if stays and any(map(_may_come_from_a_weight, before)):
                left.append(name)
        for module in root.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, SpectralNorm):
                    source = getattr(module, f"{hook.name}_orig")
                    if source.requires_grad and id(source) not in keep:
                        for _ in range(_STEPS):
                            weight = hook.compute_weight(module, do_power_iteration=True)
                        setattr(module, hook.name, weight)
    return left


def _computed_in(root: nn.Module) -> Iterator[tuple[str, nn.Module, str, ParametrizationList]]:
    """Computed weights: their name, the module and the key there, and what computes them."""
    for path, module in root.named_modules():
        for key, held in getattr(module, "parametrizations", {}).items():
            yield dotted(path, key), module, key, held


def _is_of_torch(held: ParametrizationList) -> bool:
    """Whether torch's own code computes it: an orthogonal weight's basis comes from no weight."""
    return all(type(step).__module__.startswith("torch.") for step in held)


def _may_come_from_a_weight(buffer: Tensor) -> bool:
    """A mask and a fixed factor do not; one number that does cannot be told from a factor."""
    if not buffer.is_floating_point() or is_constant(buffer):
        return False
    return not bool(((buffer == 0) | (buffer == 1)).all())
