"""Between wrapped models and plain modules: trunk and experts joined, and the way back."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ride_plugin._errors import ArgumentError


class Joined(nn.Module):
    """One expert after the trunk: the backbone that ``from_parts`` splits at `head`."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The expert takes whatever the trunk returns, as one argument."""
        return self.head(self.body(*args, **kwargs))


def joined_by(
    trunk: nn.Module, expert_factory: Callable[[int], nn.Module]
) -> Callable[[int], nn.Module]:
    """A factory of whole networks from a trunk and a factory of experts, asked once for each.

    Raises:
        ArgumentError: an argument is of another kind.
    """
    for name, value, kind, fits in (
        ("trunk", trunk, "a torch.nn.Module", isinstance(trunk, nn.Module)),
        ("expert_factory", expert_factory, "a function of the index", callable(expert_factory)),
    ):
        if not fits:
            raise ArgumentError(
                f"Expected argument `{name}` to be {kind}, but got {type(value).__name__}."
            )

    @functools.cache
    def joined(index: int) -> nn.Module:
        expert = expert_factory(index)
        if not isinstance(expert, nn.Module):
            raise ArgumentError(
                "Expected argument `expert_factory` to return a torch.nn.Module, but for "
                f"{index} it returned {type(expert).__name__}."
            )
        return Joined(trunk, expert)

    return joined


def warn_if_equal(experts: nn.ModuleList) -> None:
    """Say so where a factory made two experts with the same weights."""
    states = [dict(expert.named_parameters()) for expert in experts]
    for k in range(1, len(states)):
        if states[0].keys() == states[k].keys() and all(
            torch.equal(tensor, states[k][name]) for name, tensor in states[0].items()
        ):
            warnings.warn(
                f"`expert_factory` gave experts 0 and {k} equal weights. They receive equal "
                "gradients and stay equal unless something tells them apart: initialise each anew.",
                UserWarning,
                stacklevel=4,
            )
            return
