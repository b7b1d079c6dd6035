"""Hooks of others on the modules of a model, apart from those of this library.

Those that are there when a backbone is wrapped may be a part of its computation, and run in every
pass. Who registers one later wants to see what the model computes, not the throwaway passes over an
example by which it learns a new path.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn

from ride_plugin._split._cut._unseen import UnseenHook
from ride_plugin._split._examine import LogitsReader
from ride_plugin._split._replay import FeatureHook, ForkHook, StartHook, UnitHooks

_OURS = (ForkHook, FeatureHook, LogitsReader, StartHook, UnitHooks, UnseenHook)


def is_ours(hook: Any) -> bool:
    """Whether a hook is one of this library's."""
    return isinstance(hook, _OURS) or isinstance(getattr(hook, "__self__", None), _OURS)


def is_of_torch(hook: Any) -> bool:
    """Whether a hook is one of torch's, which may compute a weight or gather one."""
    return str(getattr(hook, "__module__", None) or type(hook).__module__).startswith("torch.")


def hooks_of_others(module: nn.Module, and_before: bool = False) -> Iterator[tuple[int, Any]]:
    """The hooks of others that run after a module, or at any time, with torch's numbers of them."""
    kinds = [module._forward_hooks, module._backward_hooks, module._backward_pre_hooks]
    for hooks in (*kinds, module._forward_pre_hooks) if and_before else kinds:
        for key, hook in hooks.items():
            if not is_ours(hook):
                yield key, hook


def numbers_of_hooks(roots: Iterable[nn.Module]) -> frozenset[int]:
    """Torch's numbers of all hooks of others in there, by which later ones are told."""
    return frozenset(number for number, _ in _hooks_in(roots))


def without_later(roots: Iterable[nn.Module], known: Collection[int]) -> dict[int, Any]:
    """A memo for copies in which hooks do nothing that are not known, unless they are torch's."""
    return {
        id(hook): _do_nothing
        for number, hook in _hooks_in(roots)
        if number not in known and not is_of_torch(hook)
    }


def _hooks_in(roots: Iterable[nn.Module]) -> Iterator[tuple[int, Any]]:
    modules = (module for root in roots for module in root.modules())
    return (found for module in modules for found in hooks_of_others(module, and_before=True))


def _do_nothing(*args: object, **kwargs: object) -> None:
    """In the place of a hook."""
