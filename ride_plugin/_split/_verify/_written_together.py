"""What experts write where all of them read it, on a call unlike the example.

The build finds what a forward writes on the calls that it sees, and gives each expert its own. On
a call of a new kind the forward may write something else: a prior, a queue or a count that it only
advances where it is given targets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._checks import version_of
from ride_plugin._contexts import seed_everything
from ride_plugin._inputs import Inputs, own_inputs, resize_batch
from ride_plugin._split._copying import Writes, same_values, storage_of
from ride_plugin._split._cut import Views, tensor_at, throwaway
from ride_plugin._split._examine import on_meta
from ride_plugin._split._replay import (
    Recorded,
    StandIn,
    TrunkState,
    play,
    read_attributes,
    record,
    write_attributes,
)
from ride_plugin._split._verify._feedback import with_other_weights
from ride_plugin._split._verify._once import Attributes, changed_again
from ride_plugin._split._verify._set_behind import set_behind
from ride_plugin._tree import Place, map_tensors


def written_together(
    views: Views,
    inputs: Inputs,
    training: bool,
    attributes: Sequence[Place],
    memo: Mapping[int, Any],
    shared: Collection[str],
) -> tuple[set[str], set[Place]]:
    """Tensors that all experts hold, and attributes of the trunk's modules, that each changes.

    What comes to the same however often it is written, a table for another length say, is none.

    Args:
        views: left as they are.
        inputs: of the call.
        training: the mode.
        attributes: plain attributes that a forward sets or fills; each pass starts from the same.
        memo: what stands in copies for something, by its id.
        shared: names, inside an expert, of tensors that are one for all experts.
    """
    for meta in (True, False):
        with suppress(Exception):  # as where the backbone looks at values
            copied = throwaway(views, training, meta, memo)
            found = _written(copied, inputs, attributes, shared, meta)
            if not meta or not any(found):  # only values tell whether it comes to the same
                return found
    return set(), set()


def _written(
    views: Views,
    inputs: Inputs,
    attributes: Sequence[Place],
    shared: Collection[str],
    meta: bool,
) -> tuple[set[str], set[Place]]:
    """The same, of throwaway copies; on the meta device all that is written."""
    batches = (resize_batch(inputs, 2),)
    with torch.inference_mode(False), torch.no_grad(), on_meta(batches, meta) as (batch,):
        args, kwargs = own_inputs(batch)
        units = {m.ride_key for m in views.expert.modules() if isinstance(m, Recorded)}
        seed_everything()
        before = Attributes(views.trunk, ())
        start = read_attributes(views.trunk, attributes)
        state, _ = record(views.trunk, views.running, (), args, kwargs, stop_at_fork=True)

        def run(expert: nn.Module = views.expert) -> None:
            write_attributes(expert, attributes, start)
            play(expert, views.running, _own(state))

        ahead, held, kept = before.changed(), _Held(views, shared), Attributes(views.trunk, ())
        with Writes() as writes:
            run()
        tensors = held.written(views.expert, writes.seen)
        by_methods = {place for place in kept.changed() if _is_inside(place, units)}
        by_hand = ahead & set_behind(views.expert, views.trunk)
        if meta or not (tensors or by_methods or by_hand):
            return tensors, by_methods | by_hand
        once = held.values(views.expert, tensors)
        changed = held.lost(once)
        places = changed_again(views.trunk, by_methods, run)
        places |= changed_again(views.expert, by_hand, run)
        changed |= _otherwise(once, held.values(views.expert, tensors))
        another = with_other_weights(views, views).expert
        run(another)
        changed |= _otherwise(once, held.values(another, tensors))
        return changed, places


class _Held:
    """The tensors that the trunk holds or experts share, as an expert's own code finds them.

    Args:
        views: before the expert's pass.
        shared: names, inside an expert, of tensors that are one for all experts.
    """

    def __init__(self, views: Views, shared: Collection[str]) -> None:
        trunk, expert = views.trunk, views.expert
        self._of_trunk = dict((*trunk.named_parameters(), *trunk.named_buffers()))
        of_expert = dict((*expert.named_parameters(), *expert.named_buffers()))
        self.tensors = self._of_trunk | {n: t for n, t in of_expert.items() if n in shared}
        self._versions = {name: version_of(tensor) for name, tensor in self.tensors.items()}
        self._memory = {name: storage_of(tensor) for name, tensor in self.tensors.items()}
        self._buffers = {
            name: buffer.clone() for name, buffer in trunk.named_buffers() if not buffer.is_meta
        }
        self._found = {name: _read_by(expert, name) for name in self._of_trunk}

    def written(self, expert: nn.Module, memory: Collection[int]) -> set[str]:
        """Names of those that a pass of the expert has written, or bound to other values.

        Args:
            expert: after that pass.
            memory: where it wrote, as `storage_of` tells it.
        """
        through_data = {
            name
            for name, tensor in self.tensors.items()
            if version_of(tensor) == self._versions[name]
            and (self._memory[name] in memory or storage_of(tensor) != self._memory[name])
        }
        return through_data | {
            name
            for name, tensor in self._of_trunk.items()
            if version_of(tensor) != self._versions[name]
            or (name in self._buffers and not same_values(tensor, self._buffers[name]))
            or self._is_bound(name, tensor, _read_by(expert, name))
        }

    def values(self, expert: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
        """What stands there now, where the expert reads it."""
        found = {name: _read_by(expert, name) for name in names}
        return {
            name: (self.tensors[name] if tensor is None else tensor).detach().clone()
            for name, tensor in found.items()
        }

    def lost(self, values: Mapping[str, Tensor]) -> set[str]:
        """Names of those that an expert has bound anew, so that the trunk keeps the old values.

        What has another shape is a table for inputs of another length, which is made again.
        """
        now = {name: self.tensors[name].detach() for name in values}
        return {
            name
            for name, value in values.items()
            if name in self._of_trunk
            and value.shape == now[name].shape
            and not same_values(value, now[name])
        }

    def _is_bound(self, name: str, tensor: Tensor, now: Tensor | None) -> bool:
        if now is None or now is self._found[name] or now is tensor:
            return False
        return now.is_meta or not same_values(now.detach(), tensor.detach())


def _read_by(expert: nn.Module, name: str) -> Tensor | None:
    """The trunk's tensor as the expert's own code reads it; None where a stand-in answers."""
    module = expert
    for part in name.split(".")[:-1]:
        module = module.get_submodule(part)
        if isinstance(module, StandIn):
            return None
    found = tensor_at(expert, name)
    return found if isinstance(found, Tensor) else None


def _is_inside(place: Place, units: Collection[str]) -> bool:
    return any(f"{place[0]}.".startswith(f"{unit}.") for unit in units)


def _own(state: TrunkState) -> TrunkState:
    """The state with values of its own, which an expert may change."""
    clone: Callable[[Tensor], Tensor] = torch.clone
    return replace(state, values=[map_tensors(clone, value) for value in state.values])


def _otherwise(once: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> set[str]:
    return {name for name, value in once.items() if not same_values(value, again[name])}
