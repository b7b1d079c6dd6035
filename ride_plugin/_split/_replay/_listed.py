"""Modules of which a view owns only some parameters or none, though a forward asks for all.

These are torch's lists and dictionaries of parameters, and every module around units whose
parameters are all on the other side: a forward asks an encoder for its dtype before it calls it, or
calls its layers one by one. Among them are modules that did not run when the backbone was wrapped.
What has parameters on both sides lists its own side's alone, to a forward too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ride_plugin._split._replay._tape import Running

_NAME = "named_parameters"


class _Listed:
    """In place of such a module's ``named_parameters``: to a forward that asks, it has them all."""

    __func__ = nn.Module.named_parameters  # by which torch's compiler knows a module like others

    def __init__(self, view: nn.Module, names: list[str], running: Running) -> None:
        self.view = view
        self.names = names
        self.running = running

    def __call__(
        self, prefix: str = "", *args: Any, **kwargs: Any
    ) -> Iterator[tuple[str, nn.Parameter]]:
        if (self.running.recorder or self.running.player) is None:
            yield from type(self.view).named_parameters(self.view, prefix, *args, **kwargs)
            return
        for name in self.names:
            tensor: Any = self.view
            for key in name.split("."):
                tensor = getattr(tensor, key)
            yield f"{prefix}.{name}" if prefix else name, tensor


def list_all(view: nn.Module, original: nn.Module, running: Running) -> None:
    """Let a forward find all parameters of the original in a list or dictionary of a view."""
    if isinstance(view, nn.ParameterList | nn.ParameterDict):
        names = [name for name, tensor in original._parameters.items() if tensor is not None]
        vars(view)[_NAME] = _Listed(view, names, running)


def list_whole(view: nn.Module, original: nn.Module, running: Running) -> None:
    """Let a forward find the parameters of the original in a view that has none of them.

    Args:
        view: any module around units, in the trunk or in an expert; one that has parameters of its
            own side, or a list of parameters that `list_all` has seen, stays as it is.
        original: the backbone's module of that name.
        running: tells a forward, which gets all, from anybody else, who gets none.
    """
    names = [name for name, _ in original.named_parameters()]
    if names and _NAME not in vars(view) and next(view.parameters(), None) is None:
        vars(view)[_NAME] = _Listed(view, names, running)


def list_own(module: nn.Module) -> None:
    """Undo what the others do; what a module owns again stands in the original order."""
    listed = vars(module).get(_NAME)
    if isinstance(listed, _Listed):
        del vars(module)[_NAME]
        for name in listed.names:
            if name in module._parameters:
                module._parameters[name] = module._parameters.pop(name)
