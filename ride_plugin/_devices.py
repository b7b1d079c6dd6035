"""Losses that go where the logits are."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def follow(module: nn.Module, own: Tensor, logits: Tensor) -> None:
    """Move a loss to the device of the logits, if its own tensor is elsewhere.

    ``nn.CrossEntropyLoss()`` holds no tensor, so a training code moves its model and not its
    criterion; a loss that takes its place has to work there too. It moves once, at the first call.
    """
    if own.device != logits.device and not torch.compiler.is_compiling():
        module.to(logits.device)
