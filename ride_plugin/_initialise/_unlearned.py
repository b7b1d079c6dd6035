"""Warnings of frozen parameters that leave experts equal, or random for good."""

from __future__ import annotations

from collections.abc import Set

from torch import nn

from ride_plugin._errors import warn_caller
from ride_plugin._initialise._draw import is_constant


def warn_if_all_frozen(expert: nn.Module, keep: Set[int]) -> None:
    """Warn that no parameter of an expert's own can learn."""
    own = [parameter for parameter in expert.parameters() if id(parameter) not in keep]
    if own and not any(parameter.requires_grad for parameter in own):
        warn_caller(
            "Every parameter behind the fork is frozen, so all experts are equal and stay equal. "
            "Unfreeze what shall learn before wrapping (`requires_grad_(True)`)."
        )


def warn_if_frozen(module: nn.Module, keep: Set[int], why: str) -> None:
    """Warn that parameters which cannot learn have been given random values."""
    frozen = frozen_in(module, keep)
    if frozen:
        warn_caller(
            f"{why}, so these frozen parameters hold random values that will not learn: "
            f"{list(frozen)}. "
            "Unfreeze them before wrapping (`requires_grad_(True)`), or fork behind them "
            "(`fork_at=`)."
        )


def frozen_in(module: nn.Module, keep: Set[int]) -> dict[str, nn.Parameter]:
    """Parameters that do not train and are not in ``keep``; of constants nothing would be drawn."""
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if not (parameter.requires_grad or id(parameter) in keep or is_constant(parameter))
    }
