"""Passes over a trunk, and two of them on one path: over a small batch, and over a larger one.

What they return differs in its rows only, so that it is known along which dimension these lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ride_plugin._contexts import seed_everything
from ride_plugin._errors import SplitError, listed
from ride_plugin._inputs import Inputs, own_inputs
from ride_plugin._split._cut._views import Views
from ride_plugin._split._replay import TrunkState, read_attributes, record, write_attributes
from ride_plugin._tree import Place, tensors_in

BATCHES = (2, 3)  # rows of the small batch and of the larger one
_SEEDS = range(1, 65)  # under which another batch may take the path of the first


class Passes:
    """Passes over a trunk that all start alike, but for the seed.

    Args:
        views: throwaway copies.
        attributes: plain attributes that a forward sets or fills.
        warm: start from what an earlier forward over the same inputs leaves in them.
    """

    def __init__(self, views: Views, attributes: Sequence[Place], warm: bool) -> None:
        self.trunk = views.trunk
        self._running = views.running
        self._attributes = attributes
        self._warm = warm
        self._cold = read_attributes(views.trunk, attributes)

    def run(self, inputs: Inputs, stop_at_fork: bool = True) -> TrunkState:
        """A pass from where the trunk is now."""
        # Each pass gets what the first got, whatever that has taken out of a dict.
        args, kwargs = own_inputs(inputs)
        state, _ = record(self.trunk, self._running, (), args, kwargs, stop_at_fork=stop_at_fork)
        return state

    def start(self, inputs: Inputs, seed: int = 0) -> tuple[Any, ...]:
        """Set what a pass over these inputs starts from, and return it."""
        seed_everything(seed)
        write_attributes(self.trunk, self._attributes, self._cold)
        if not self._warm:
            return self._cold
        with torch.no_grad():
            self.run(inputs, stop_at_fork=False)
        return read_attributes(self.trunk, self._attributes)

    def recorded(self, inputs: Inputs, seed: int = 0) -> TrunkState:
        """A whole pass, and what it started from."""
        start = self.start(inputs, seed)
        return replace(self.run(inputs), attributes=start)


def on_the_same_path(
    small: TrunkState, batches: Sequence[Inputs], passes: Passes, with_gradients: bool
) -> TrunkState:
    """A pass over the larger batch that runs what the pass over the smaller one ran.

    Args:
        small: the pass over ``batches[0]``.
        batches: a smaller and a larger batch of the same rows.
        passes: runs them.
        with_gradients: whether they are needed of the larger one.

    Raises:
        SplitError: there is none; the message says why.
    """
    with torch.set_grad_enabled(with_gradients):
        large = passes.recorded(batches[1])
    if _steps(small) == _steps(large):
        return large
    if passes.recorded(batches[0]).keys != small.keys:
        raise _at_its_second_call(passes.trunk)
    if passes.trunk.training and any(
        _steps(passes.recorded(batches[0], seed)) != _steps(small) for seed in _SEEDS[:8]
    ):
        for seed in _SEEDS:
            with torch.set_grad_enabled(with_gradients):
                large = passes.recorded(batches[1], seed)
            if _steps(small) == _steps(large):
                return large
        raise SplitError(
            "In training the backbone's forward leaves out layers at random before the fork, so "
            "often that two batches hardly take one path. Lower the probability before wrapping it "
            "(`config.layerdrop`, in networks of transformers), or pass as `fork_at=` the first of "
            "these layers."
        )
    if small.keys != large.keys:
        raise SplitError(
            "The backbone's forward takes another path for another batch size, so its trunk cannot "
            "be shared between experts. Move what depends on the number of rows (a loop over them, "
            "say) into the forward of a submodule, which then runs as a whole, or behind the fork: "
            "pass `fork_at=` an earlier submodule."
        )
    steps = zip(small.keys, _steps(small)[1], _steps(large)[1], strict=True)
    key, few, more = next(step for step in steps if step[1] != step[2])
    raise SplitError(
        f"What `{key}` returns before the fork holds {few} tensors for a batch of {BATCHES[0]} "
        f"and {more} for a batch of {BATCHES[1]}, so that rows of it cannot be chosen. Take a "
        "batch apart in the forward of a submodule that returns one tensor (`torch.stack`), or "
        "behind the fork: pass `fork_at=` an earlier submodule."
    )


def _at_its_second_call(root: nn.Module) -> SplitError:
    """The error for a forward that does something else at its second call."""
    advice = "Run one batch through the backbone before wrapping it, or make it in its `__init__`."
    cached = sorted(_cached_methods(root))
    if cached:
        advice = (
            f"functools keeps the results of {listed(cached)} for each copy of a module apart, out "
            "of sight. Keep them in an attribute of the module, a dict for example."
        )
    return SplitError(
        "The backbone's forward takes another path at its second call than at its first: "
        f"something is made at the first and kept. {advice}"
    )


def _steps(state: TrunkState) -> tuple[tuple[str, ...], list[int]]:
    """What ran before the fork, and how many tensors each step returned.

    A whole encoder that leaves out layers at random returns fewer hidden states then.
    """
    return state.keys, [len(list(tensors_in(value))) for value in state.values]


def _cached_methods(root: nn.Module) -> set[str]:
    """Methods of a module's class whose results functools keeps, outside of the module."""
    return {
        f"{cls.__name__}.{name}"
        for module in root.modules()
        for cls in type(module).__mro__
        for name, method in vars(cls).items()
        if hasattr(method, "cache_info")
    }
