"""What the build learns by running the two views on small batches, on throwaway copies."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

from ride_plugin._contexts import RandomState, seed_everything
from ride_plugin._errors import SplitError, listed
from ride_plugin._inputs import Inputs, resize_batch
from ride_plugin._split._copies import running_copy
from ride_plugin._split._form import form_of, form_of_inputs, single_in
from ride_plugin._split._hollow import reads
from ride_plugin._split._meta import on_meta
from ride_plugin._split._passes import play, read_attributes, record, write_attributes
from ride_plugin._split._probe import RANDOM, differ, mark_of
from ride_plugin._split._reentrant import passed_by
from ride_plugin._split._rows import Rows, find_rows
from ride_plugin._split._stand_ins import Forked, Recorded
from ride_plugin._split._state import Layout, TrunkState
from ride_plugin._split._views import Views
from ride_plugin._tree import Place, logits_in, map_tensors, tensors_in

_BATCHES = (2, 3)


class _Reads(TorchFunctionMode):
    """Collects the tensors whose values any operation reads; looking at a shape does not count.

    Gradients alone would miss what reaches the logits through a comparison, an index, a detached
    branch, or a Python decision.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if reads(func, result):
            self.seen.update((id(t), t) for t in tensors_in((args, kwargs)))
        return result


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
    early: frozenset[Place] = frozenset()
    late: frozenset[Place] = frozenset()
    ahead: bool = False


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

    Raises:
        SplitError: the batch dimension of a value that crosses the cut is ambiguous.
    """
    # Gradients tell what experts read: they are on in here, wherever this is called.
    # Where none can be had is no error, so that a search for errors shall not find one.
    anomaly = torch.autograd.set_detect_anomaly(False)
    with torch.inference_mode(False), torch.enable_grad(), anomaly:
        views = throwaway(views, training, meta)
        for parameter in (*views.trunk.parameters(), *views.expert.parameters()):
            parameter.requires_grad_(False)
        batches = tuple(resize_batch(inputs, size) for size in _BATCHES)
        with on_meta(batches, meta) as (small, large):
            return _learn(views, (small, large), attributes, set(outside), warm, known)


def learn_at_run_time(
    views: Views, inputs: Inputs, training: bool, attributes: Sequence[Place]
) -> Layout:
    """The layout of a path that the build did not see: on the meta device if that will do."""
    try:
        lesson = learn(views, inputs, training, attributes, meta=True)
    except Exception:
        lesson = learn(views, inputs, training, attributes)
    assert lesson is not None  # nothing was known
    return lesson.layout


def _learn(
    views: Views,
    batches: Sequence[Inputs],
    attributes: Sequence[Place],
    outside: set[str],
    warm: bool,
    known: Collection[tuple[Any, ...]],
) -> Lesson | None:
    cold = read_attributes(views.trunk, attributes)

    def start_of(inputs: Inputs) -> tuple[Any, ...]:
        """Set what a pass over these inputs starts from, and return it."""
        seed_everything()
        write_attributes(views.trunk, attributes, cold)
        if not warm:
            return cold
        with torch.no_grad():
            record(views.trunk, views.running, (), *inputs, stop_at_fork=False)
        return read_attributes(views.trunk, attributes)

    def recorded(inputs: Inputs) -> TrunkState:
        start = start_of(inputs)
        state, _ = record(views.trunk, views.running, (), *inputs, stop_at_fork=True)
        return replace(state, attributes=start)

    with torch.no_grad():
        start_of(batches[0])
        marks, trunk_reads = _marks(views.trunk, attributes), _Reads()
        with trunk_reads:
            small = record(views.trunk, views.running, (), *batches[0], stop_at_fork=True)[0]
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
    now = _marks(views.trunk, attributes)
    early = {p for p, a, b in zip(attributes, marks, now, strict=True) if differ(a, b)}
    of_trunk = {id(t) for t in (*views.trunk.parameters(), *views.trunk.buffers())}
    of_expert = {id(t) for t in (*views.expert.parameters(), *views.expert.buffers())} - of_trunk
    parameters = {
        name: tensor
        for name in outside
        if isinstance(tensor := _get(views.trunk, name), nn.Parameter)
        and tensor.is_floating_point()
    }
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    with torch.set_grad_enabled(bool(parameters)):
        large = recorded(batches[1])
    if small.keys != large.keys:
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
        raise SplitError(
            "The backbone's forward takes another path for another batch size, so its trunk cannot "
            "be shared between experts. Move what depends on the number of rows (a loop over them, "
            "say) into the forward of a submodule, which then runs as a whole, or behind the fork: "
            "pass `fork_at=` an earlier submodule."
        )
    for key, few, more in zip(small.keys, small.values, large.values, strict=True):
        numbers = [len(list(tensors_in(value))) for value in (few, more)]
        if numbers[0] != numbers[1]:
            raise SplitError(
                f"What `{key}` returns before the fork holds {numbers[0]} tensors for a batch of "
                f"{_BATCHES[0]} and {numbers[1]} for a batch of {_BATCHES[1]}, so that rows of it "
                "cannot be chosen. Take a batch apart in the forward of a submodule that returns "
                "one tensor (`torch.stack`), or behind the fork: pass `fork_at=` an earlier "
                "submodule."
            )
    read_by_trunk = _influences(tensors_in(large.values), parameters)
    use = _use_by_expert(views, large, attributes, parameters, outside)
    rows = [
        tuple(
            _rows_or_none(key, a, b, alive)
            for a, b, alive in zip(tensors_in(x), tensors_in(y), flags, strict=True)
        )
        for key, x, y, flags in zip(small.keys, small.values, large.values, use.live, strict=True)
    ]
    layout = Layout(small.keys, tuple(rows), tuple(use.live), tuple(use.clone), forms, single)
    return Lesson(
        layout,
        frozenset(use.reads - read_by_trunk),
        frozenset(use.writes),
        frozenset(early),
        frozenset(use.late),
        not of_expert.isdisjoint(trunk_reads.seen),
    )


def _cached_methods(root: nn.Module) -> set[str]:
    """Methods of a module's class whose results functools keeps, outside of the module."""
    return {
        f"{cls.__name__}.{name}"
        for module in root.modules()
        for cls in type(module).__mro__
        for name, method in vars(cls).items()
        if hasattr(method, "cache_info")
    }


def throwaway(views: Views, training: bool, meta: bool = False) -> Views:
    """Copy both views, so that a probe changes no statistic and no random state of the real ones.

    The copy's expert is what its trunk's stand-ins lead to, as in the original.
    """
    copied = running_copy(views, (views.trunk, views.expert), views.written, meta)
    _share_running(copied)
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


def _share_running(views: Views) -> None:
    # Running copies itself anew for each reference outside one deepcopy; inside one, the memo
    # keeps a single copy. Assert what the passes rely on.
    for module in views.expert.modules():
        if isinstance(module, Recorded | Forked) and module.ride_running is not views.running:
            raise AssertionError("stand-ins lost the pass they belong to")


@dataclass
class _Use:
    """What an expert's pass does with the values and tensors that it finds."""

    live: list[tuple[bool, ...]]
    clone: list[tuple[bool, ...]]
    reads: set[str]
    writes: set[str]
    late: set[Place]


def _use_by_expert(
    views: Views,
    state: TrunkState,
    attributes: Sequence[Place],
    parameters: dict[str, nn.Parameter],
    outside: set[str],
) -> _Use:
    """Watch one pass of the expert, with gradients where they can be had.

    A reentrant checkpoint gives none to `torch.autograd.grad`, so what is in it is called directly.
    Where they cannot be had (a layer without a backward in evaluation, say), every value is taken
    to be in use, which costs memory and nothing else.
    """
    try:
        write_attributes(views.expert, attributes, state.attributes)
        with passed_by(lambda: True):
            return _watch_expert(views, state, attributes, parameters, outside, gradients=True)
    except Exception:
        write_attributes(views.expert, attributes, state.attributes)
        return _watch_expert(views, state, attributes, parameters, outside, gradients=False)


def _watch_expert(
    views: Views,
    state: TrunkState,
    places: Sequence[Place],
    parameters: dict[str, nn.Parameter],
    outside: set[str],
    gradients: bool,
) -> _Use:
    leaves: dict[int, Tensor] = {}
    handed: dict[int, int] = {}  # what the expert is given -> the recorded value
    given: list[tuple[Tensor, int]] = []

    def hand(value: Tensor) -> Tensor:
        if gradients and value.is_floating_point():
            if id(value) not in leaves:
                leaves[id(value)] = value.detach().clone().requires_grad_(True)
            own = leaves[id(value)].clone()  # not a leaf: an expert may change it in place
        else:
            own = value.detach().clone()
        handed[id(own)] = id(value)
        given.append((own, own._version))
        return own

    buffers = {
        name: (tensor, tensor._version, memory_of(tensor))
        for name in outside
        if isinstance(tensor := _get(views.expert, name), Tensor)
        and not isinstance(tensor, nn.Parameter)
    }
    at_fork: list[list[Any]] = []

    def look() -> None:
        at_fork.extend(_marks(views.expert, places))

    watch = _Reads()
    with torch.set_grad_enabled(gradients):
        values = [map_tensors(hand, value) for value in state.values]
        watched = TrunkState(state.batch_size, state.keys, values, None, numbers=state.numbers)
        with watch:  # below the player's mode: what is replayed reads nothing
            logits = logits_in(play(views.expert, views.running, watched, look))
    flat = [list(tensors_in(value)) for value in state.values]
    used = {handed[key] for key in watch.seen if key in handed}
    read_parameters: set[str] = set()
    if not gradients or logits is None:
        read_parameters = {name for name, p in parameters.items() if id(p) in watch.seen}
        used = {id(tensor) for entry in flat for tensor in entry}
    elif logits.requires_grad:
        asked = [*leaves.values(), *parameters.values()]
        found = torch.autograd.grad(logits.sum(), asked, allow_unused=True)
        keys = [*leaves, *parameters]
        reached = {key for key, grad in zip(keys, found, strict=True) if grad is not None}
        used |= {key for key in leaves if key in reached}
        read_parameters = {name for name in parameters if name in reached}
    # A hook that an expert registers on a tensor is for its own share of the gradient.
    changed = {handed[id(o)] for o, version in given if o._version != version or o._backward_hooks}
    # A tensor that shares its memory with one that is changed in place changes with it.
    memory = {memory_of(tensor) for entry in flat for tensor in entry if id(tensor) in changed}
    bound = {  # to another tensor, and not to one that the trunk has bound them to
        name
        for name, (tensor, *_) in buffers.items()
        if (now := _get(views.expert, name)) is not tensor and id(now) not in handed
    }
    written = bound | {
        name
        for name, (tensor, version, memory) in buffers.items()
        if tensor._version != version or memory_of(tensor) != memory
    }
    marks = _marks(views.expert, places)
    late = {p for p, a, b in zip(places, at_fork, marks, strict=True) if differ(a, b)} - {RANDOM}
    late |= {place_of(name) for name in bound}
    return _Use(
        # Integers and booleans (masks, positions) are small: they are always kept.
        [tuple(id(t) in used or not t.is_floating_point() for t in entry) for entry in flat],
        [tuple(id(t) in changed or memory_of(t) in memory for t in entry) for entry in flat],
        read_parameters,
        written,
        late,
    )


def _marks(root: nn.Module, places: Sequence[Place]) -> list[list[Any]]:
    """Marks of the attributes at these places: they differ once something sets or fills one."""
    return [
        [RandomState.now().mark()]
        if (path, key) == RANDOM
        else mark_of(root.get_submodule(path).__dict__.get(key))
        for path, key in places
    ]


def memory_of(tensor: Tensor) -> int:
    """A number that is the same for two tensors that share their memory."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, or inside vmap: no storage to share
        return id(tensor)


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


def _get(root: nn.Module, name: str) -> object:
    path, attribute = place_of(name)
    module = root.get_submodule(path)
    # A forward that sets an entry of `_buffers` passes by the reference to a tensor of the trunk.
    buffer = module._buffers.get(attribute)
    return getattr(module, attribute, None) if buffer is None else buffer


def place_of(name: str) -> Place:
    path, _, attribute = name.rpartition(".")
    return path, attribute
