"""What the build learns by running the two views on small batches, on throwaway copies."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from ride_plugin._checks import version_of
from ride_plugin._contexts import seed_everything
from ride_plugin._errors import SplitError, listed
from ride_plugin._inputs import Inputs, own_inputs, resize_batch
from ride_plugin._split._copying import running_copy, same_values
from ride_plugin._split._cut._use import Reads, marks_at, tensor_at, use_by_expert
from ride_plugin._split._cut._views import Views
from ride_plugin._split._examine import differ, on_meta
from ride_plugin._split._replay import (
    Layout,
    Rows,
    StandIn,
    TrunkState,
    find_rows,
    form_of,
    form_of_inputs,
    read_attributes,
    record,
    single_in,
    write_attributes,
)
from ride_plugin._tree import Place, ids_of_tensors, tensors_in

_BATCHES = (2, 3)
_SEEDS = range(1, 65)  # under which another batch may take the path of the first


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
        behind: names of tensors of the trunk that the code after the fork writes.
    """

    layout: Layout
    reads: frozenset[str]
    writes: frozenset[str]
    early: frozenset[Place]
    late: frozenset[Place]
    ahead: bool
    behind: frozenset[str]


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
        batches = tuple(resize_batch(inputs, size, _BATCHES[0]) for size in _BATCHES)
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
    if lesson is None or lesson.behind:  # which only values tell
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
    cold = read_attributes(views.trunk, attributes)

    def run(inputs: Inputs, stop_at_fork: bool = True) -> TrunkState:
        # Each pass gets what the first got, whatever that has taken out of a dict.
        args, kwargs = own_inputs(inputs)
        return record(views.trunk, views.running, (), args, kwargs, stop_at_fork=stop_at_fork)[0]

    def start_of(inputs: Inputs, seed: int = 0) -> tuple[Any, ...]:
        """Set what a pass over these inputs starts from, and return it."""
        seed_everything(seed)
        write_attributes(views.trunk, attributes, cold)
        if not warm:
            return cold
        with torch.no_grad():
            run(inputs, stop_at_fork=False)
        return read_attributes(views.trunk, attributes)

    def recorded(inputs: Inputs, seed: int = 0) -> TrunkState:
        start = start_of(inputs, seed)
        state = run(inputs)
        return replace(state, attributes=start)

    with torch.no_grad():
        start_of(batches[0])
        marks, trunk_reads = marks_at(views.trunk, attributes), Reads()
        with trunk_reads:
            small = run(batches[0])
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
    with torch.set_grad_enabled(bool(parameters)):
        large = recorded(batches[1])
    if _steps(small) != _steps(large):
        if recorded(batches[0]).keys != small.keys:
            cached = sorted(_cached_methods(views.trunk))
            raise SplitError(
                "The backbone's forward takes another path at its second call than at its first: "
                "something is made at the first and kept. "
                + (
                    f"functools keeps the results of {listed(cached)} for each copy of a module "
                    "apart, out of sight. Keep them in an attribute of the module, a dict for "
                    "example."
                    if cached
                    else "Run one batch through the backbone before wrapping it, or make it in its "
                    "`__init__`."
                )
            )
        is_random = views.trunk.training and any(
            _steps(recorded(batches[0], seed)) != _steps(small) for seed in _SEEDS[:8]
        )
        for seed in _SEEDS if is_random else ():
            with torch.set_grad_enabled(bool(parameters)):
                large = recorded(batches[1], seed)
            if _steps(small) == _steps(large):
                break
    if _steps(small) != _steps(large) and is_random:
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
    for key, few, more in zip(small.keys, _steps(small)[1], _steps(large)[1], strict=True):
        if few != more:
            raise SplitError(
                f"What `{key}` returns before the fork holds {few} tensors for a batch of "
                f"{_BATCHES[0]} and {more} for a batch of {_BATCHES[1]}, so that rows of it "
                "cannot be chosen. Take a batch apart in the forward of a submodule that returns "
                "one tensor (`torch.stack`), or behind the fork: pass `fork_at=` an earlier "
                "submodule."
            )
    try:
        read_by_trunk = _influences(tensors_in(large.values), parameters)
    except Exception:  # a reentrant checkpoint or a layer without a backward is in between
        read_by_trunk = {name for name, p in parameters.items() if id(p) in trunk_reads.seen}
    of_trunk = dict((*views.trunk.named_parameters(), *views.trunk.named_buffers()))
    before = {name: version_of(tensor) for name, tensor in of_trunk.items()}
    use = use_by_expert(views, large, attributes, parameters, outside)
    behind = {name for name, tensor in of_trunk.items() if version_of(tensor) != before[name]}
    once = {name: of_trunk[name].detach().clone() for name in behind}
    if once and not any(tensor.is_meta for tensor in once.values()):
        use_by_expert(views, large, attributes, parameters, outside)  # what comes to the same stays
        behind = {name for name in once if not same_values(of_trunk[name].detach(), once[name])}
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
        layout,
        frozenset(use.reads - read_by_trunk),
        frozenset(use.writes),
        frozenset(early),
        frozenset(use.late),
        not of_expert.isdisjoint(trunk_reads.seen),
        frozenset(behind),
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
        return find_rows(key, small, large, _BATCHES)
    except SplitError:
        if live:
            raise
        return None
