"""What experts keep of each row for their next call: membrane potentials, a recurrent state.

Where a loop calls the model once for each time step, every row goes on from its own state. Routing
cannot allow that: rows leave at each step, so that an expert would give those that come one step
later the state of others, without a word where their numbers agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ride_plugin._contexts import seed_everything
from ride_plugin._errors import ReplayError, listed
from ride_plugin._split._copying import same_values
from ride_plugin._split._cut import Split, Views, place_of, throwaway
from ride_plugin._split._replay import StandIn, TrunkState, is_hollow, play, write_attributes
from ride_plugin._split._verify._check_rows import with_extremes
from ride_plugin._split._verify._results import logits_of, near
from ride_plugin._tree import Place, dotted, map_tensors, tensors_in


def kept_rows(split: Split, state: TrunkState, changed: Collection[Place]) -> list[Place]:
    """Attributes and buffers of an expert that make its next call depend on the rows of this one.

    Most networks write nothing in evaluation, and for these nothing runs here. What comes to the
    same whatever the rows were (a cache by shape, a count, a feature that nobody reads) is none.

    Args:
        split: left as it is.
        state: what the trunk returned for three rows in evaluation mode.
        changed: plain attributes that the backbone's forward sets or fills in evaluation mode.
    """
    expert = split.views.expert
    spine = {own for _, own in split.views.spine}
    own = {
        path
        for path, module in expert.named_modules()
        if module not in spine and not isinstance(module, StandIn)
    }
    places = {place for place in (*changed, *split.late) if place[0] in own or place in split.late}
    for name, _ in expert.named_buffers():
        place = place_of(name)
        if name in split.views.written and not isinstance(
            expert.get_submodule(place[0]), _NormBase
        ):
            places.add(place)
    if not places or state.layout is None:
        return []
    fresh = partial(throwaway, split.views, False)
    for matters in (_leads_back, _others_mattered):
        with suppress(Exception):  # it has no gradients, or does not run on numbers as these are
            if matters(fresh, split, state):
                return _holding_tensors(fresh(), split, state, places)
    return []


class KeptRows:
    """The states of a model's experts, and whether the next routed call would mix them.

    Args:
        places: where in an expert they are; none for most models, and then nothing is done.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        self._left: dict[int, list[list[Tensor]]] = {}
        # How many of the first experts have seen every row since somebody has reset the states.
        self._whole: float = math.inf

    def note(self, index: int, expert: nn.Module) -> None:
        """Note what a call of an expert has left."""
        left = [_tensors_at(expert, place) for place in self.places]
        self._left[index] = [[t.detach().clone() for t in tensors] for tensors in left]

    def held(self, experts: Iterable[nn.Module]) -> bool:
        """Whether an expert still has all that its last call has left, so nobody has reset it."""
        return any(
            all(
                _same(before, _tensors_at(expert, place))
                for before, place in zip(self._left[index], self.places, strict=True)
            )
            for index, expert in enumerate(experts)
            if any(self._left.get(index, ()))
        )

    def check(self, held: bool, num_experts_used: Tensor) -> None:
        """Raise ReplayError if an expert has gone on with states of other rows than it was given.

        Args:
            held: whether the states were those of an earlier call when this one began.
            num_experts_used: int64 ``[B]``, of this call.
        """
        if not num_experts_used.numel():
            return
        fewest, most = map(int, num_experts_used.aminmax())
        mixed = held and (fewest < most or most > self._whole)
        self._whole = fewest
        if mixed:
            raise self.error()

    def error(self) -> ReplayError:
        """What is said of rows that would go on from the state of others."""
        names = listed([dotted(*place) for place in self.places])
        return ReplayError(
            f"The experts keep something of each row from call to call ({names} in each), which "
            "was not reset since the last call, and rows leave early: an expert would go on with "
            "the states of other rows. Reset the model before each batch (a spiking network by its "
            "library's `reset_net(model)`, or set these to what they were at first), and let one "
            "call run all time steps of a batch; or call the model itself once for each step, "
            "`model(x)`, in which every expert sees every row."
        )


def kept_rows_of(model: object) -> KeptRows | None:
    """Those of a model, if its experts keep any; a model made by hand is not looked into."""
    kept = getattr(model, "_kept_rows", None)
    return kept if isinstance(kept, KeptRows) and kept.places else None


def _leads_back(fresh: Callable[[], Views], split: Split, state: TrunkState) -> bool:
    """Whether a gradient of a second call's logits reaches what the first call was given."""
    views, leaves = fresh(), list[Tensor]()

    def followed(value: Tensor) -> Tensor:
        if not value.is_floating_point() or value.layout is not torch.strided or is_hollow(value):
            return value
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1].clone()  # which the expert may change in place

    with torch.inference_mode(False), torch.enable_grad():
        first = replace(state, values=[map_tensors(followed, value) for value in state.values])
        for given in (first, state):
            logits = _played(views, split, given)
        if not logits.requires_grad or not leaves:
            return False
        gradients = torch.autograd.grad(logits.sum(), leaves, allow_unused=True)
    return any(gradient is not None for gradient in gradients)


def _others_mattered(fresh: Callable[[], Views], split: Split, state: TrunkState) -> bool:
    """Whether a call returns something else after a call with other rows."""
    alike = state.select(torch.zeros(state.batch_size, dtype=torch.int64, device="cpu"))
    results = []
    for before in (alike, with_extremes(alike, 0, 0)):
        views = fresh()
        with torch.no_grad():
            for given in (before, state):
                logits = _played(views, split, given)
        results.append(logits)
    return not near(*results)


def _played(views: Views, split: Split, state: TrunkState) -> Tensor:
    seed_everything()
    write_attributes(views.expert, split.attributes, state.attributes)
    return logits_of(play(views.expert, views.running, state.hollowed()))


def _holding_tensors(
    views: Views, split: Split, state: TrunkState, places: Collection[Place]
) -> list[Place]:
    """Those of the places that hold tensors after a call."""
    with torch.no_grad():
        _played(views, split, state)
    return sorted(place for place in places if _tensors_at(views.expert, place))


def _tensors_at(expert: nn.Module, place: Place) -> list[Tensor]:
    path, name = place
    try:
        module = expert.get_submodule(path)
    except AttributeError:  # experts may be networks of several kinds
        return []
    value = module._buffers[name] if name in module._buffers else vars(module).get(name)
    return list(tensors_in(value))


def _same(before: list[Tensor], now: list[Tensor]) -> bool:
    return len(before) == len(now) and all(
        a.device == b.device and same_values(a, b) for a, b in zip(before, now, strict=True)
    )
