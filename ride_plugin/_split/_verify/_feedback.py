"""Refuses a trunk that depends on an expert: on its weights, or on what it wrote a step before.

Both are tried: with other weights in the expert, the trunk must compute the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._contexts import seed_everything
from ride_plugin._errors import SplitError, listed
from ride_plugin._inputs import resize_batch
from ride_plugin._split._copying import same_values
from ride_plugin._split._cut import Split, Views, throwaway, throwaway_expert
from ride_plugin._split._replay import (
    Absent,
    own_containers,
    play,
    read_attributes,
    record,
    write_attributes,
)
from ride_plugin._tree import Place, dotted, ids_of_tensors, map_tensors, snapshot, tensors_in


def refuse_reading_ahead(split: Split) -> None:
    """Refuse a trunk that computes with tensors of an expert, or writes them.

    Raises:
        SplitError: the trunk cannot be shared; the message names what it reads.
    """
    if used := read_ahead(split):
        raise SplitError(
            f"Cannot split the backbone at {split.fork_at!r}: its forward uses {listed(used)} "
            "before the fork, so that every expert would use those of expert 0. Use them in "
            "the forward of the module that holds them, or pass `fork_at=` an earlier "
            "submodule."
        )


def read_ahead(
    split: Split,
    modes: Collection[bool] = (False, True),
    memo: Mapping[int, Any] | None = None,
) -> list[str]:
    """Names of an expert's tensors with which the trunk computes, or that it writes.

    Args:
        split: left as it is.
        modes: whether to look in evaluation (False), in training (True).
        memo: what stands in copies for something, by its id.
    """
    weights = [name for name, _ in _own_tensors(split.views)]
    for training in modes:
        plain = _run(split, training, memo=memo)
        if plain is None:
            continue

        def matters(names: Collection[str], training: bool = training, run: Any = plain) -> bool:
            return not _same(run.tape, _tape(_run(split, training, names, memo=memo)))

        any_matters = matters(weights)  # most often none does
        used = [n for n in weights if n in plain.wrote or (any_matters and matters([n]))]
        if used:
            return used
    return []


def refuse_feedback(split: Split, places: Collection[Place]) -> set[Place]:
    """Refuse a trunk that uses what experts have left, where each leaves something else.

    A count of steps is the same for every expert, and the trunk may use it. An average of the
    features behind the fork is another for each expert, and makes another trunk of each.

    Args:
        split: left as it is.
        places: attributes and buffers outside units that the code after the fork changes.

    Returns:
        The places where each expert leaves something else.

    Raises:
        SplitError: the trunk cannot be shared; the message names what it uses.
    """
    found: set[Place] = set()
    weights = [name for name, _ in _own_tensors(split.views)]
    for training in (False, True):
        ours = _run(split, training, places=places)
        theirs = _run(split, training, weights, places=places)
        if ours is None or theirs is None:
            continue
        own = [p for p in places if not _same(ours.left[p], theirs.left[p])]
        found.update(own)
        # What the trunk sets as well starts, for every expert, from what the trunk had.
        set_twice = [place for place in own if place in split.attributes]
        for tried, look in ((own, _tape), (set_twice, _output)):
            starts = [{place: run.left[place] for place in tried} for run in (ours, theirs)]
            runs = [_run(split, training, start=start, places=places) for start in starts]
            if tried and not _same(*map(look, runs)):
                names = listed([dotted(*place) for place in tried])
                raise SplitError(
                    f"Cannot split the backbone at {split.fork_at!r}: {names} keeps what the code "
                    "after the fork wrote in the step before, other values for each expert, and "
                    "the code before the fork, which they share, uses it. Pass `fork_at=` an "
                    "earlier submodule, so that each expert uses its own."
                )
    return found


@dataclass
class _Pass:
    tape: list[Any]
    wrote: set[str]  # tensors of the expert that the trunk has changed
    output: Any
    left: dict[Place, Any]


def _run(
    split: Split,
    training: bool,
    changed: Collection[str] = (),
    start: dict[Place, Any] | None = None,
    places: Collection[Place] = (),
    memo: Mapping[int, Any] | None = None,
) -> _Pass | None:
    """Run trunk and expert on throwaway copies; None where they do not run in this mode.

    Args:
        split: left as it is.
        training: the mode.
        changed: names of the expert's tensors that get other values.
        start: attributes and buffers outside units that both start with.
        places: attributes and buffers outside units to look at afterwards.
        memo: what stands in the copies for something, by its id.
    """
    written = split.views.written.union(changed)
    views = throwaway(replace(split.views, written=written), training, memo=memo)
    args, kwargs = resize_batch(split.inputs, 2)
    with torch.no_grad():
        _change(views.expert, changed)
        for (path, key), value in (start or {}).items():
            if value is not Absent:
                views.trunk.get_submodule(path).__dict__[key] = own_containers(value)
                if (path, key) in split.late:
                    setattr(views.expert.get_submodule(path), key, own_containers(value))
        seed_everything()
        before = read_attributes(views.trunk, split.attributes)
        own = {name: t for name, t in _own_tensors(views) if not places}
        values = {name: tensor.clone() for name, tensor in own.items()}
        ids = {id(tensor) for tensor in own.values()}

        def noted(value: Tensor) -> Tensor:
            # What is computed with an expert's tensor counts, not that somebody looked at it.
            return value.new_zeros(()) if id(value) in ids else value.detach().clone()

        try:
            state, _ = record(views.trunk, views.running, (), args, kwargs, stop_at_fork=True)
            write_attributes(views.expert, split.attributes, before)
            tape = [list(state.keys), *(map_tensors(noted, v) for v in state.values[1:])]
            wrote = {name for name, tensor in own.items() if not _same(tensor, values[name])}
            output = play(views.expert, views.running, state) if places else None
        except Exception:
            if training:  # a backbone that cannot train on its own input
                return None
            raise
    left = {p: snapshot(getattr(views.expert.get_submodule(p[0]), p[1], Absent)) for p in places}
    return _Pass(tape, wrote, output, left)


def with_other_weights(views: Views, copied: Views) -> Views:
    """A throwaway expert with other numbers in what it owns, and with the trunk of ``copied``."""
    own = {name for name, _ in _own_tensors(views)}
    another = throwaway_expert(replace(views, written=views.written | own), copied)
    with torch.no_grad():
        _change(another.expert, own)
    return another


def _change(expert: nn.Module, names: Collection[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*expert.named_parameters(), *expert.named_buffers()):
        if name in names and tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, device="cpu")
            tensor.mul_(1 + noise.to(tensor))


def _own_tensors(views: Views) -> list[tuple[str, Tensor]]:
    expert, shared = views.expert, ids_of_tensors(views.trunk)
    tensors = (*expert.named_parameters(), *expert.named_buffers())
    return [(name, tensor) for name, tensor in tensors if id(tensor) not in shared]


def _tape(run: _Pass | None) -> list[Any] | None:
    return None if run is None else run.tape


def _output(run: _Pass | None) -> Any:
    return None if run is None else run.output


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same_values(a, b)
    ours, theirs = list(tensors_in(a)), list(tensors_in(b))
    if ours or theirs:
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    try:
        return bool(a == b)
    except Exception:  # objects that cannot be compared
        return a is b
