"""Modules of the trunk that run once more behind the fork: every expert would run them there.

That is right as long as they write nothing. The build refuses what it sees of this; on a path that
it did not see (a second image, a batch taken apart in the forward) the expert's pass refuses it.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

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


def refuse_writing(unit: nn.Module, name: str, writers: Collection[str]) -> None:
    """Raise if a unit that an expert is about to run would write tensors of the trunk."""
    modules = unit.named_modules(prefix=name)
    writing = {path for path, module in modules if path in writers and module.training}
    if writing:
        raise ReplayError(
            f"`{name}`, a module of the trunk, runs behind the fork, where it did not when the "
            f"model was wrapped: every expert would write what {listed(writing)} holds "
            "(statistics, say), and the backbone writes it once. Let the forward run it once on "
            "everything (`torch.cat` of two images before it, no `x.split(...)` around it); or "
            f"wrap with `fork_at={name!r}` or an earlier submodule, so that each expert has its "
            "own; or set what writes to evaluation mode, in which it may run there."
        )
