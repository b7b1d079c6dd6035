"""Losses that go where the logits are, and keep their values with all digits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def follow(module: nn.Module, own: Tensor, logits: Tensor) -> None:
    """Move a loss to the device of the logits, if its own tensor is elsewhere.

    ``nn.CrossEntropyLoss()`` holds no tensor, so a training code moves its model and not its
    criterion; a loss that takes its place has to work there too. It moves once, at the first call.
    """
    if own.device != logits.device and not torch.compiler.is_compiling():
        if own.is_meta:  # where it was run for shapes; every loss knows the values of its buffers
            module.to_empty(device=logits.device)
        else:
            module.to(logits.device)


def keeping_digits(module: nn.Module, apply: Callable[[], object]) -> None:
    """Let ``apply`` move or cast a loss, all but its buffers of float32 or better.

    A model that is trained in half precision may hold its loss, ``RIDEModule(...).bfloat16()``.
    Class weights, margins and priors would lose their digits there, although losses compute in
    float32, and some criteria fail on weights of another precision than the logits.

    Args:
        module: the loss; of modules inside of it as well.
        apply: casts it.
    """
    held = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and buffer.dtype in (torch.float32, torch.float64)
    ]
    apply()
    for owner, name, buffer in held:
        cast = owner._buffers[name]
        if cast is not None and cast.dtype in (torch.float16, torch.bfloat16):
            owner._buffers[name] = buffer.to(cast.device)


def keeping_values(module: nn.Module, apply: Callable[[], object]) -> None:
    """Let ``apply`` move or cast a loss as `keeping_digits` does, and leave no buffer unfilled.

    On the meta device there are no values, and ``to_empty`` copies none. What stands in the buffer
    may come from a schedule or from the loop, so it cannot be computed again: it is kept beside a
    buffer on the meta device, and copied where there is a place for it.
    """
    before = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    kept: dict[str, Tensor] = vars(module).setdefault("_kept", {})
    keeping_digits(module, apply)
    for name, buffer in before.items():
        after = module._buffers[name]
        if after is None or after is buffer:
            continue
        values = kept.pop(name, None) if buffer.is_meta else buffer
        if values is not None and after.is_meta:
            kept[name] = values.cpu()
        elif values is not None:
            after.copy_(values)
