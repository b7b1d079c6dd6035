"""A forward that ends in the middle: hooks that torch always calls run all the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.module_tracker import ModuleTracker

from ride_plugin._errors import warn_caller


class Unwinding(BaseException):
    """Ends a forward; never leaves the library.

    It is no ``Exception``, because a forward may catch every one, to go another way where a module
    fails. That has a price: torch calls hooks with ``always_call=True`` for an ``Exception`` only,
    and tools that follow which module runs rely on them. Torch's own one, which divides FLOPs among
    modules, does not ask to be called always, and would take the trunk for running on.
    """

    def call_hooks(self) -> None:
        """Call the hooks that torch would have called for an ``Exception``, from inside out."""
        if torch.compiler.is_compiling():
            return
        # Before torch 2.6 hooks of all modules get no keyword arguments.
        with_kwargs_of_all = getattr(nn.modules.module, "_global_forward_hooks_with_kwargs", {})
        for module, args, kwargs in reversed(list(self._left())):
            hooks = [
                (key, hook, with_kwargs_of_all)
                for key, hook in nn.modules.module._global_forward_hooks.items()
                if key in nn.modules.module._global_forward_hooks_always_called
                or isinstance(getattr(hook, "__self__", None), ModuleTracker)
            ] + [
                (key, hook, module._forward_hooks_with_kwargs)
                for key, hook in module._forward_hooks.items()
                if key in module._forward_hooks_always_called
            ]
            for key, hook, with_kwargs in hooks:
                given = (args, kwargs, None) if key in with_kwargs else (args, None)
                try:
                    hook(module, *given)
                except Exception as error:  # torch too goes on, and warns
                    warn_caller(
                        "A hook that is registered with `always_call=True` raised "
                        f"{type(error).__name__}: {error}. It is called with None as the result "
                        "where a forward ends before it returns, as the trunk's does at the fork."
                    )

    def _left(self) -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
        """The calls of modules that were left."""
        step = self.__traceback__
        while step is not None:
            if step.tb_frame.f_code is nn.Module._call_impl.__code__:
                known = step.tb_frame.f_locals
                yield known["self"], known["args"], known["kwargs"]
            step = step.tb_next
