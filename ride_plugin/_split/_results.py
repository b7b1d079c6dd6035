"""The backbone's own results, which those of a split are compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._closeness import close
from ride_plugin._contexts import seed_everything
from ride_plugin._errors import SplitError
from ride_plugin._inputs import Inputs, own_inputs
from ride_plugin._split._copies import same_values
from ride_plugin._tree import logits_in

near = partial(close, units=100, scale=0.0, equal_nan=True)  # other kernels may run


def seeded(module: nn.Module, inputs: Inputs) -> Tensor:
    seed_everything()
    args, kwargs = own_inputs(inputs, tensors=True)
    with torch.no_grad():
        return logits_of(module(*args, **kwargs))


def unfused(hooked: nn.Module, inputs: Inputs, expected: Tensor) -> Tensor:
    """The backbone's logits as its layers compute them with a hook on each.

    torch replaces its own transformer layers by one fused kernel unless a hook is registered; the
    wrapper needs hooks, so it differs from the plain backbone by rounding, and no more.
    """
    for module in hooked.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(lambda *_: None)
    logits = seeded(hooked, inputs)
    return logits if near(logits, expected) else expected


def logits_of(output: Any) -> Tensor:
    logits = logits_in(output)
    if logits is None:
        raise SplitError("The backbone returned no logits [B, C].")
    return logits


def same(a: Tensor, b: Tensor, exact: Callable[[], bool]) -> bool:
    if same_values(a, b):
        return True
    return near(a, b) and not exact()
