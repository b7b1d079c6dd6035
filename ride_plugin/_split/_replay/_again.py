"""Modules of the trunk that run once more behind the fork: every expert would run them there.

That is right as long as they write nothing. The build refuses what it sees of this; on a path that
it did not see (a second image, a batch taken apart in the forward) the expert's pass refuses it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ride_plugin._checks import version_of
from ride_plugin._errors import ReplayError, listed


def writers_in(unit: nn.Module, name: str, written: Collection[str]) -> list[str]:
    """Names of the modules in a unit whose forward writes tensors of their own in training mode.

    Args:
        unit: a submodule of the trunk, ``name`` in the backbone.
        name: see ``unit``.
        written: names of parameters and buffers that the backbone's forward was seen to write.
            Statistics are not among them where it did not run in training mode, for want of targets
            say.
    """
    return [
        path
        for path, module in unit.named_modules(prefix=name)
        if (isinstance(module, _NormBase) and module.running_mean is not None)
        or any(f"{path}.{key}" in written for key in (*module._parameters, *module._buffers))
    ]


def run_again(
    unit: nn.Module,
    name: str,
    writers: Collection[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a unit of the trunk in an expert; raise ReplayError if that writes tensors of the trunk.

    Statistics of norms are refused before they are written. What else was seen to be written may be
    a cache that the trunk has filled, so of that the result is asked.
    """
    modules = unit.named_modules(prefix=name)
    training = {path: module for path, module in modules if path in writers and module.training}
    _refuse(name, [path for path, module in training.items() if isinstance(module, _NormBase)])
    if torch.compiler.is_compiling():  # no tensor has a version there
        return unit(*args, **kwargs)
    before = {path: _held(module) for path, module in training.items()}
    result = unit(*args, **kwargs)
    _refuse(name, [p for p, held in before.items() if not _is_unchanged(held, training[p])])
    return result


def _held(module: nn.Module) -> list[tuple[Tensor | None, int | None]]:
    held = (*module._parameters.values(), *module._buffers.values())
    return [(tensor, None if tensor is None else version_of(tensor)) for tensor in held]


def _is_unchanged(before: list[tuple[Tensor | None, int | None]], module: nn.Module) -> bool:
    now = _held(module)
    return len(before) == len(now) and all(
        old is new and version == current
        for (old, version), (new, current) in zip(before, now, strict=True)
    )


def _refuse(name: str, writing: Collection[str]) -> None:
    if writing:
        raise ReplayError(
            f"`{name}`, a module of the trunk, runs behind the fork, where it did not when the "
            f"model was wrapped: every expert would write what {listed(writing)} holds "
            "(statistics, say), and the backbone writes it once. Let the forward run it once on "
            "everything (`torch.cat` of two images before it, no `x.split(...)` around it); or "
            f"wrap with `fork_at={name!r}` or an earlier submodule, so that each expert has its "
            "own; or set what writes to evaluation mode, in which it may run there."
        )
