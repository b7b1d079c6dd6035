"""States that a block of code borrows and gives back: the random state, evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def random_state_kept(module: nn.Module) -> Iterator[None]:
    """Restore the random state of the CPU and of the module's devices after a block."""
    devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices - {None})):
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration of a block; every submodule's mode is restored."""
    training: list[nn.Module] = []
    found: list[nn.Module] = [module]
    for inner in found:  # grows on the way; `modules()` spends most of its time on names
        if inner._modules:
            found += [child for child in inner._modules.values() if child is not None]
        if inner.training:
            training.append(inner)
    if training:
        module.eval()
    try:
        yield
    finally:
        for inner in training:
            inner.training = True
