"""What the build learns by running the two views on a small batch, on throwaway copies."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ride_plugin._errors import SplitError
from ride_plugin._inputs import Inputs, resize_batch
from ride_plugin._split._passes import play, read_attributes, record, write_attributes
from ride_plugin._split._probe import detached_activations
from ride_plugin._split._rows import Rows, find_rows
from ride_plugin._split._state import Layout, TrunkState
from ride_plugin._split._views import Views
from ride_plugin._tree import logits_in, map_tensors, tensors_in

_BATCHES = (2, 3)
_INTERNAL = frozenset(vars(nn.Module()))
# Operations that look at a tensor's values, although they return no tensor.
_READS = frozenset(
    {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__array__", "__contains__"}
    | {"__bool__", "__int__", "__float__", "__complex__", "__index__"}
)


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
        if getattr(func, "__name__", "") in _READS or next(tensors_in(result), None) is not None:
            self.seen.update((id(t), t) for t in tensors_in((args, kwargs)))
        return result


def layout_of(
    views: Views,
    inputs: Inputs,
    training: bool,
    attributes: Sequence[tuple[str, str]],
    *,
    warm: bool = False,
) -> Layout:
    """Learn which values cross the cut, along which dimension their rows lie, and which to clone.

    ``attributes`` are those of :func:`changing_attributes`; each pass starts from the same values,
    with ``warm`` from those that an earlier forward leaves behind (a filled cache).

    Raises:
        SplitError: the batch dimension of a value that crosses the cut is ambiguous.
    """
    views = throwaway(views, training)
    if warm:
        args, kwargs = inputs
        with torch.no_grad():
            record(views.trunk, views.running, (), args, kwargs, stop_at_fork=False)
    start = read_attributes(views.trunk, attributes)
    states = []
    for batch_size in _BATCHES:
        torch.manual_seed(0)
        write_attributes(views.trunk, attributes, start)
        args, kwargs = resize_batch(inputs, batch_size)
        with torch.no_grad():
            state, _ = record(views.trunk, views.running, (), args, kwargs, stop_at_fork=True)
        states.append(state)
    small, large = states
    if small.keys != large.keys:
        raise SplitError(
            "The backbone's forward takes another path for another batch size, so its trunk cannot "
            "be shared between experts. Pass `fork_at=` an earlier submodule."
        )
    write_attributes(views.expert, attributes, start)
    live = _live_values(views, large)
    write_attributes(views.expert, attributes, start)
    versions = [[t._version for t in tensors_in(value)] for value in large.values]
    with torch.no_grad():
        play(views.expert, views.running, large)
    clone = [
        tuple(t._version != old for t, old in zip(tensors_in(value), entry, strict=True))
        for value, entry in zip(large.values, versions, strict=True)
    ]
    rows = [
        tuple(
            _rows_or_none(key, a, b, alive)
            for a, b, alive in zip(tensors_in(x), tensors_in(y), flags, strict=True)
        )
        for key, x, y, flags in zip(small.keys, small.values, large.values, live, strict=True)
    ]
    return Layout(small.keys, tuple(rows), tuple(live), tuple(clone))


def tensors_only_experts_read(
    views: Views, inputs: Inputs, names: Iterable[str], training: bool
) -> set[str]:
    """Names of parameters outside all units that only code after the fork reads.

    Found by gradients: of the recorded values for the trunk, of the logits for an expert.
    """
    views = throwaway(views, training)
    parameters = {
        name: tensor
        for name in names
        if isinstance(tensor := _get(views.trunk, name), nn.Parameter)
        and tensor.is_floating_point()
    }
    if not parameters:
        return set()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    args, kwargs = resize_batch(inputs, _BATCHES[1])
    with torch.enable_grad():
        state, _ = record(views.trunk, views.running, (), args, kwargs, stop_at_fork=True)
        read_before = _influences(tensors_in(state.values), parameters)
        detached = TrunkState(
            state.batch_size,
            state.keys,
            [map_tensors(Tensor.detach, value) for value in state.values],
            None,
        )
        logits = logits_in(play(views.expert, views.running, detached))
        read_after = _influences([] if logits is None else [logits], parameters)
    return read_after - read_before


def changing_attributes(views: Views, inputs: Inputs, training: bool) -> set[tuple[str, str]]:
    """Plain attributes of the backbone's own modules that a forward changes, caches for example."""
    views = throwaway(views, training)
    names = {id(module): name for name, module in views.trunk.named_modules()}
    found: set[tuple[str, str]] = set()
    args, kwargs = resize_batch(inputs, _BATCHES[0])
    for _ in range(2):  # a cache changes in the first forward, a counter in every one
        before = [dict(vars(module)) for module, _ in views.spine]
        with torch.no_grad():
            record(views.trunk, views.running, (), args, kwargs, stop_at_fork=False)
        for (module, _), old in zip(views.spine, before, strict=True):
            new = vars(module)
            for key in {*old, *new} - _INTERNAL:
                if old.get(key) is not new.get(key):
                    found.add((names[id(module)], key))
    return found


def throwaway(views: Views, training: bool) -> Views:
    """Copy both views, so that a probe changes no statistic and no random state of the real ones.

    The copy's expert is what its trunk's stand-ins lead to, as in the original.
    """
    kept = {**detached_activations(views.trunk), **detached_activations(views.expert)}
    copied: Views = copy.deepcopy(views, kept)
    _share_running(copied)
    copied.trunk.train(training)
    copied.expert.train(training)
    return copied


def _share_running(views: Views) -> None:
    # Running copies itself anew for each reference outside one deepcopy; inside one, the memo
    # keeps a single copy. Assert what the passes rely on.
    for module in views.expert.modules():
        running = vars(module).get("running")
        if running is not None and running is not views.running:
            raise AssertionError("stand-ins lost the pass they belong to")


def _live_values(views: Views, state: TrunkState) -> list[tuple[bool, ...]]:
    leaves: dict[int, Tensor] = {}
    handed: dict[int, int] = {}  # what the expert is given -> the recorded value

    def leaf(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        if id(value) not in leaves:
            leaves[id(value)] = value.detach().clone().requires_grad_(True)
        given = leaves[id(value)].clone()  # not a leaf: an expert may change it in place
        handed[id(given)] = id(value)
        return given

    reads = _Reads()
    with torch.enable_grad():
        values = [map_tensors(leaf, value) for value in state.values]
        watched = TrunkState(state.batch_size, state.keys, values, None)
        with reads:  # below the player's mode: what is replayed reads nothing
            logits = logits_in(play(views.expert, views.running, watched))
        if logits is None:
            return [tuple(True for _ in tensors_in(value)) for value in state.values]
        used = {handed[key] for key in reads.seen if key in handed}
        if logits.requires_grad:
            gradients = torch.autograd.grad(logits.sum(), list(leaves.values()), allow_unused=True)
            pairs = zip(leaves, gradients, strict=True)
            used |= {key for key, gradient in pairs if gradient is not None}
    # Integers and booleans (masks, positions) are small: they are always kept.
    return [
        tuple(id(t) in used or not t.is_floating_point() for t in tensors_in(value))
        for value in state.values
    ]


def _influences(outputs: Iterable[Tensor], parameters: dict[str, nn.Parameter]) -> set[str]:
    total = [o.sum() for o in outputs if o.is_floating_point() and o.requires_grad]
    if not total:
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
    path, _, attribute = name.rpartition(".")
    return getattr(root.get_submodule(path) if path else root, attribute, None)
