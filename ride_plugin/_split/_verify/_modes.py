"""Modules whose ``train`` is overridden: it may set other modes in a part, or write weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ride_plugin._errors import listed
from ride_plugin._split._copying import clone_module, running_copy, same_values
from ride_plugin._split._replay import StandIn
from ride_plugin._tree import dotted


def other_modes(backbone: nn.Module, parts: Iterable[nn.Module]) -> str | None:
    """What to do where a part's own ``train`` set modes that are not the backbone's.

    A ``train`` that goes by the number of a module (partial BatchNorm: all but the first are
    frozen) begins to count anew in each part, and finds stand-ins among the modules.
    """
    modes = {name: module.training for name, module in backbone.named_modules()}
    names = [
        name
        for part in parts
        for name, module in part.named_modules()
        if not isinstance(module, StandIn) and modes.get(name, module.training) != module.training
    ]
    kinds = {type(m).__name__ for m in backbone.modules() if type(m).train is not nn.Module.train}
    if not names or not kinds:
        return None
    return (
        f"`train()`, which {listed(kinds)} overrides, sets {listed(names)} into another mode than "
        "in the backbone, as where it counts modules: every part begins at its own first. Let it "
        "go by names; or call `train()` on the backbone, then switch off what it does there, and "
        "wrap that: normalisation layers in evaluation mode whose parameters do not train stay so."
    )


def written_by_modes(backbone: nn.Module) -> frozenset[str]:
    """Names of frozen parameters that switching between training and evaluation writes.

    A layer with a low-rank update may add it to its frozen weight for evaluation (loralib does).
    Experts that shared this weight would add the updates of all to it, and as that is done through
    ``.data``, nothing would tell. New updates are zero, so copies with other numbers are switched.
    """
    written: set[str] = set()
    tried: list[str] = []
    for path, module in backbone.named_modules():
        if any(path.startswith(outer) for outer in tried):  # the outer one calls those inside
            continue
        if type(module).train is nn.Module.train and "train" not in vars(module):
            continue
        tried.append(f"{path}." if path else "")
        if all(parameter.requires_grad for parameter in module.parameters()):
            continue
        if not _computes_by_switching(module):  # as most do, of transformers say: no copy is made
            continue
        try:
            names = _written_by_switching(clone_module(module))
        except Exception:  # tensors of another kind, say: the build itself finds what does not run
            continue
        written |= {dotted(path, name) for name in names}
    return frozenset(written)


class _Operations(TorchDispatchMode):
    """Notes whether anything is computed with tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = True
        return func(*args, **(kwargs or {}))


def _computes_by_switching(module: nn.Module) -> bool:
    """Whether switching computes anything, tried on the meta device; True where it does not run."""
    memo = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), p.requires_grad)
        for p in module.parameters()
    }
    try:
        copied = running_copy(module, (module,), meta=True, memo=memo)
        with _Operations() as operations:
            for mode in (False, True, False):
                copied.train(mode)
    except Exception:
        return True
    return bool(operations.seen)


def _written_by_switching(module: nn.Module) -> set[str]:
    module.train()
    frozen = {
        name: parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.add_(torch.randn_like(parameter))
    before = {name: parameter.detach().clone() for name, parameter in frozen.items()}
    written: set[str] = set()
    for mode in (False, True):
        module.train(mode)
        now = dict(module.named_parameters(remove_duplicate=False))
        written |= {name for name in before if not same_values(now[name].detach(), before[name])}
    return written
