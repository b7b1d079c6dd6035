"""What the build learns by running the two views on small batches, on throwaway copies."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from ride_plugin._errors import SplitError
from ride_plugin._inputs import Inputs, resize_batch
from ride_plugin._split._copying import running_copy
from ride_plugin._split._cut._same_path import BATCHES, Passes, on_the_same_path
from ride_plugin._split._cut._use import Reads, marks_at, tensor_at, use_by_expert
from ride_plugin._split._cut._views import Views
from ride_plugin._split._examine import differ, on_meta
from ride_plugin._split._replay import (
    Layout,
    Rows,
    StandIn,
    find_rows,
    form_of,
    form_of_inputs,
    single_in,
)
from ride_plugin._tree import Place, ids_of_tensors, tensors_in


@dataclass(frozen=True)
class Lesson:
    """What one mode of the backbone teaches about a cut.

    Attributes:
        layout: which values cross the cut, along which dimension their rows lie, which to clone.
        reads: names of parameters outside all units that only the code after the fork reads.
        writes: names of buffers outside all units that the code after the fork writes.
        early: plain attributes that the code before the fork sets or fills.
        late: attributes and buffers outside units that the code after the fork sets or fills.
        ahead: whether the code before the fork reads what experts own.
    """

    layout: Layout
    reads: frozenset[str]
    writes: frozenset[str]
    early: frozenset[Place]
    late: frozenset[Place]
    ahead: bool


def learn(
    views: Views,
    inputs: Inputs,
    training: bool,
    attributes: Sequence[Place],
    *,
    outside: Iterable[str] = (),
    warm: bool = False,
    known: Collection[tuple[Any, ...]] = (),
    meta: bool = False,
    memo: Mapping[int, Any] | None = None,
) -> Lesson | None:
    """Run the views on two small batches, on throwaway copies.

    Args:
        views: left as they are.
        inputs: an example.
        training: the mode.
        attributes: plain attributes that a forward sets or fills; each pass starts from the same.
        outside: names of tensors that belong to no unit.
        warm: start from the attributes that an earlier forward leaves behind (a filled cache).
        known: paths on which nothing more is to be learned; None is returned there.
        meta: run on tensors without contents; it raises where the backbone looks at values.
        memo: what stands in the copies for something, by its id.

    Raises:
        SplitError: the batch dimension of a value that crosses the cut is ambiguous.
    """
    # Gradients tell what experts read: they are on in here, wherever this is called.
    # Where they cannot be had is found by an exception, which anomaly detection would report.
    anomaly = torch.autograd.set_detect_anomaly(False)
    with torch.inference_mode(False), torch.enable_grad(), anomaly:
        views = throwaway(views, training, meta, memo)
        for parameter in (*views.trunk.parameters(), *views.expert.parameters()):
            parameter.requires_grad_(False)
        # Made of the same rows, so that the length of the longest row is the same in both.
        batches = tuple(resize_batch(inputs, size, BATCHES[0]) for size in BATCHES)
        with on_meta(batches, meta) as (small, large):
            return _learn(views, (small, large), attributes, set(outside), warm, known)


def learn_at_run_time(
    views: Views,
    inputs: Inputs,
    training: bool,
    attributes: Sequence[Place],
    memo: Mapping[int, Any],
) -> Lesson:
    """What a path teaches that the build did not see: on the meta device if that will do."""
    lesson = None
    with suppress(Exception):
        lesson = learn(views, inputs, training, attributes, meta=True, memo=memo)
    if lesson is None:  # the backbone looks at values
        lesson = learn(views, inputs, training, attributes, memo=memo)
    assert lesson is not None  # nothing was known
    return lesson


def _learn(
    views: Views,
    batches: Sequence[Inputs],
    attributes: Sequence[Place],
    outside: set[str],
    warm: bool,
    known: Collection[tuple[Any, ...]],
) -> Lesson | None:
    passes = Passes(views, attributes, warm)
    with torch.no_grad():
        passes.start(batches[0])
        marks, trunk_reads = marks_at(views.trunk, attributes), Reads()
        with trunk_reads:
            small = passes.run(batches[0])
    if any(map(is_functorch_wrapped_tensor, tensors_in(small.values))):
        raise SplitError(
            "The backbone's forward runs `torch.vmap` or another transform of `torch.func` before "
            "the fork, and what is computed inside of it cannot be handed to experts. Move it into "
            "the forward of a submodule, which then runs as a whole, or behind the fork."
        )
    inputs = small.values[0]
    forms = (form_of_inputs(inputs), *map(form_of, small.values[1:]))
    single = single_in(inputs)
    if (small.keys, forms, single) in known:
        return None
    now = marks_at(views.trunk, attributes)
    early = {p for p, a, b in zip(attributes, marks, now, strict=True) if differ(a, b)}
    of_expert = ids_of_tensors(views.expert) - ids_of_tensors(views.trunk)
    parameters = {
        name: tensor
        for name in outside
        if isinstance(tensor := tensor_at(views.trunk, name), nn.Parameter)
        and tensor.is_floating_point()
    }
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    large = on_the_same_path(small, batches, passes, with_gradients=bool(parameters))
    try:
        read_by_trunk = _influences(tensors_in(large.values), parameters)
    except Exception:  # a reentrant checkpoint or a layer without a backward is in between
        read_by_trunk = {name for name, p in parameters.items() if id(p) in trunk_reads.seen}
    use = use_by_expert(views, large, attributes, parameters, outside)
    rows = [
        tuple(
            _rows_or_none(key, a, b, alive)
            for a, b, alive in zip(tensors_in(x), tensors_in(y), flags, strict=True)
        )
        for key, x, y, flags in zip(small.keys, small.values, large.values, use.live, strict=True)
    ]
    live, clone = tuple(use.live), tuple(use.clone)
    layout = Layout(small.keys, tuple(rows), live, clone, forms, single, use.chooses)
    return Lesson(
        layout=layout,
        reads=frozenset(use.reads - read_by_trunk),
        writes=frozenset(use.writes),
        early=frozenset(early),
        late=frozenset(use.late),
        ahead=not of_expert.isdisjoint(trunk_reads.seen),
    )


def throwaway(
    views: Views, training: bool, meta: bool = False, memo: Mapping[int, Any] | None = None
) -> Views:
    """Copy both views, so that a probe changes no statistic and no random state of the real ones.

    The copy's expert is what its trunk's stand-ins lead to, as in the original.
    """
    parts = views.trunk, views.expert
    copied = running_copy(views, parts, views.written, meta, dict(memo or {}))
    # A pass is copied once inside of one deepcopy, and anew for each reference outside of it.
    stand_ins = (module for module in copied.expert.modules() if isinstance(module, StandIn))
    assert all(stand_in.ride_running is copied.running for stand_in in stand_ins)
    copied.trunk.train(training)
    copied.expert.train(training)
    return copied


def throwaway_expert(views: Views, copied: Views) -> Views:
    """Another throwaway copy of the expert of ``views``, with the trunk of ``copied``."""
    memo = views.memo_onto(copied.trunk, copied.running)
    mine = (views.expert, views.expert_links)
    expert, links = running_copy(mine, (views.expert,), views.written, memo=memo)
    expert.train(copied.expert.training)
    return replace(copied, expert=expert, links=links)


def _influences(outputs: Iterable[Tensor], parameters: dict[str, nn.Parameter]) -> set[str]:
    total = [o.sum() for o in outputs if o.is_floating_point() and o.requires_grad]
    if not total or not parameters:  # a forward may ask for gradients itself, as Wav2Vec2's does
        return set()
    gradients: Any = torch.autograd.grad(
        torch.stack([t.float() for t in total]).sum(), list(parameters.values()), allow_unused=True
    )
    return {name for name, g in zip(parameters, gradients, strict=True) if g is not None}


def _rows_or_none(key: str, small: Tensor, large: Tensor, live: bool) -> Rows | None:
    try:
        return find_rows(key, small, large, BATCHES)
    except SplitError:
        if live:
            raise
        return None
