"""What crosses the cut: the trunk's tape, reduced to what the experts use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map

from ride_plugin._checks import refuse
from ride_plugin._contexts import RandomState
from ride_plugin._errors import ArgumentError, ReplayError
from ride_plugin._inputs import Inputs
from ride_plugin._split._replay._form import Form, form_of, form_of_inputs, plain_in, single_in
from ride_plugin._split._replay._hollow import Unread, hollow, is_hollow
from ride_plugin._split._replay._rows import Rows, join_rows, take_rows
from ride_plugin._tree import CONTAINERS, map_tensors, tensors_in

_UNKNOWN_PATH = (
    "The backbone's forward took a path that was not seen when it was wrapped, so it is not known "
    "which dimension of its values is the batch. Wrap it with `example_input=` of the size in use, "
    "if that is another. Where the number of rows decides the path (`x.split(4)`, a loop over "
    "rows), the two or three rows on which an example is tried do not show it: move that into the "
    "forward of a submodule of the trunk, behind the fork, or out of the backbone."
)


class Absent:
    """Stands for an attribute that a module does not have; never instantiated, so it pickles."""


@dataclass(frozen=True)
class Layout:
    """What the probe learned of a tape; one tuple per entry, one item per tensor in it.

    It holds for the tapes that it :meth:`fits`; what else comes along needs another layout.

    Attributes:
        keys: what ran, in order.
        rows: the batch dimension of each tensor.
        live: whether an expert's result depends on the tensor.
        clone: whether an expert changes the tensor in place, so that each needs its own.
        forms: where tensors lie in each entry.
        single: which tensors of the inputs have one slice for all rows.
        chooses: whether an expert computes integers, truth values or plain numbers of tensors.
    """

    keys: tuple[str, ...]
    rows: tuple[tuple[Rows | None, ...], ...]
    live: tuple[tuple[bool, ...], ...]
    clone: tuple[tuple[bool, ...], ...]
    forms: tuple[Form, ...]
    single: tuple[bool, ...]
    chooses: bool = False

    @property
    def path(self) -> tuple[Any, ...]:
        """What two layouts of one path have in common."""
        return self.keys, self.forms, self.single

    def fits(self, keys: tuple[str, ...], values: Sequence[Any], batch_size: int) -> bool:
        """Whether a tape took this path: the same steps, with tensors in the same places.

        In a batch of one row every tensor has one slice, which says nothing.
        """
        return (
            self.keys == keys
            and self.takes(values[0], batch_size)
            and self.forms[1:] == tuple(map(form_of, values[1:]))
        )

    def takes(self, inputs: Inputs, batch_size: int) -> bool:
        """Whether these arguments are of the kind that it holds for."""
        if self.forms[0] != form_of_inputs(inputs):
            return False
        if torch.compiler.is_compiling():  # sizes are symbols there, not to be asked for
            return True
        return batch_size == 1 or self.single == single_in(inputs)

    def joined(self, other: Layout) -> Layout:
        """For experts of two kinds: what any reads stays, what any changes is cloned for each."""

        def either(a: Any, b: Any) -> Any:
            pairs = zip(a, b, strict=True)
            return tuple(tuple(x or y for x, y in zip(p, q, strict=True)) for p, q in pairs)

        return Layout(
            self.keys,
            either(self.rows, other.rows),
            either(self.live, other.live),
            either(self.clone, other.clone),
            self.forms,
            self.single,
            self.chooses or other.chooses,
        )

    @cached_property
    def changes_in_place(self) -> bool:
        """Whether an expert changes anything in place."""
        return any(any(flags) for flags in self.clone)

    @cached_property
    def reads_all(self) -> bool:
        """Whether experts read everything."""
        return all(map(all, self.live))


@dataclass(frozen=True)
class TrunkState:
    """The shared part's result for one batch: hand it to the experts as often as needed.

    ``model(state)`` is ``model(x)`` without the trunk. A state can be stored and reused for as long
    as the trunk does not change: it is a sequence of its rows, so a DataLoader takes it as a data
    set and collates its rows; ``pickle`` and ``torch.save`` take it too, and ``torch.load`` reads
    it with ``weights_only=True`` once this library is imported.

    Attributes:
        batch_size: number of rows.

    Example:
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, StackDataset
        >>> from ride_plugin import RIDEWrapper
        >>> net = nn.Sequential(nn.Linear(8, 6).requires_grad_(False), nn.ReLU(), nn.Linear(6, 5))
        >>> model = RIDEWrapper(net, num_experts=2, fork_at="2")
        >>> with model.evaluating(), torch.no_grad():
        ...     state = model.run_trunk(torch.randn(10, 8))
        >>> rows = StackDataset(state, torch.arange(10))
        >>> for part, target in DataLoader(rows, batch_size=5):
        ...     print(tuple(model(part).shape), target.tolist())
        (5, 5) [0, 1, 2, 3, 4]
        (5, 5) [5, 6, 7, 8, 9]
    """

    batch_size: int
    keys: tuple[str, ...] = field(repr=False)
    values: list[Any] = field(repr=False)
    layout: Layout | None = field(repr=False)
    attributes: tuple[Any, ...] = field(default=(), repr=False)
    hollow: bool = field(default=False, repr=False)  # whether something was dropped
    # Whether the backward of some value computes it again, in a reentrant checkpoint.
    recomputes: bool = field(default=False, repr=False)
    # What was read as a number from a tensor that changed before the fork, by which read.
    numbers: tuple[tuple[int, Any], ...] = field(default=(), repr=False)
    chosen: bool = field(default=False, repr=False)  # whether rows were, by `select`
    # Where the trunk began to draw with numpy or Python on a call, if the example did not.
    draws_from: RandomState | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.batch_size

    def __getitem__(self, index: int) -> TrunkState:
        """One row, as a batch of one."""
        if not -self.batch_size <= index < self.batch_size:
            raise IndexError(f"Row {index} of a state of {self.batch_size} rows.")
        return self.select(torch.tensor([index % self.batch_size], device="cpu"))

    def detach(self) -> TrunkState:
        """The same values without their gradient history."""
        return self._mapped(Tensor.detach)

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> TrunkState:
        """The state on another device, or its floating-point values in another precision."""

        def move(value: Tensor) -> Tensor:
            kind = dtype if value.is_floating_point() else None
            return value.to(device=device, dtype=kind, non_blocking=non_blocking)

        return self._mapped(move)

    def pin_memory(self) -> TrunkState:
        """The state in page-locked memory; a DataLoader with ``pin_memory=True`` calls this."""
        return self._mapped(Tensor.pin_memory)

    def select(self, rows: Tensor) -> TrunkState:
        """Return the state of some rows only, in the order given.

        Args:
            rows: int64 ``[b]``, indices into the batch.

        Raises:
            ReplayError: the backbone took a path that was not seen when it was wrapped, so the
                batch dimension of its values is not known.
            ArgumentError: ``rows`` is not a one-dimensional int64 tensor.
        """
        if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype != torch.int64:
            advice = "Pass row indices, for example `mask.nonzero().squeeze(1)`."
            refuse("rows", "an int64 tensor of shape [b]", rows, advice)
        if self.layout is None:
            raise ReplayError(_UNKNOWN_PATH)
        specs = self.layout.rows
        done: dict[int, Tensor] = {}

        def gather(value: Tensor, spec: Rows | None) -> Tensor:
            if id(value) not in done:
                done[id(value)] = take_rows(value, spec, rows.to(value.device), self.batch_size)
            return done[id(value)]

        values = [_map_with(gather, v, s) for v, s in zip(self.values, specs, strict=True)]
        return replace(self, batch_size=rows.numel(), values=values, chosen=True)

    @staticmethod
    def cat(states: Sequence[TrunkState]) -> TrunkState:
        """Join states of several batches into one, rows in the order given.

        Args:
            states: of one model and one input size; a single one is returned as it is.

        Raises:
            ReplayError: the backbone took a path that was not seen when it was wrapped.
            ArgumentError: there is none, or the states differ in more than their rows.
        """
        if not states:
            refuse("states", "at least one", states)
        first, *others = states
        if not others:
            return first
        if first.layout is None:
            raise ReplayError(_UNKNOWN_PATH)
        for other in others:
            if not first.layout.fits(other.keys, other.values, other.batch_size):
                raise ArgumentError(
                    "Expected argument `states` to come from one path through the backbone, but "
                    "they differ. Keep inputs of different kinds apart."
                )
            if list(plain_in(other.values)) != list(plain_in(first.values)):
                raise ArgumentError(
                    "Expected argument `states` to differ in their tensors alone, but numbers or "
                    "words among the arguments, or beside the tensors that a module of the trunk "
                    "returned, differ between them. Run them apart, or make them tensors with one "
                    "entry for each row."
                )
            same = all(map(_may_join, first.attributes, other.attributes))
            if not same or first.numbers != other.numbers:
                raise ArgumentError(
                    "Expected argument `states` to start from the same values, but the backbone "
                    "keeps a number from call to call, a count say, which differs between them. "
                    "Run them apart."
                )
        values = []
        sizes = [state.batch_size for state in states]
        layout, tapes = first.layout, [state.values for state in states]
        for *entries, specs, live in zip(*tapes, layout.rows, layout.live, strict=True):
            rest = zip(*map(tensors_in, entries[1:]), strict=True)

            def join(value: Tensor, info: tuple[Rows | None, bool], rest: Any = rest) -> Tensor:
                return join_rows((value, *next(rest)), *info, sizes)

            values.append(_map_with(join, entries[0], tuple(zip(specs, live, strict=True))))
        chosen = any(state.chosen for state in states)
        return replace(first, batch_size=sum(sizes), values=values, chosen=chosen)

    def hollowed(self) -> TrunkState:
        """Replace what no expert reads by NaNs of the same shape that take no memory.

        A compiler frees by itself what nobody reads.
        """
        if self.layout is None or torch.compiler.is_compiling():
            return self
        pairs = zip(self.values, self.layout.live, strict=True)
        values = [_map_with(_keep_or_hollow, value, live) for value, live in pairs]
        return replace(self, values=values, hollow=True)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> TrunkState:
        """Apply a function to every tensor once; what takes no memory goes on taking none."""
        done: dict[int, Tensor] = {}

        def apply(value: Tensor) -> Tensor:
            if id(value) not in done:
                if is_hollow(value):
                    done[id(value)] = function(value[(0,) * value.dim()]).expand(value.shape)
                else:
                    done[id(value)] = function(value)
            return done[id(value)]

        values = map_tensors(apply, self.values)
        return replace(self, values=values, attributes=map_tensors(apply, self.attributes))

    def own_values(self, forked: Callable[[], bool]) -> list[Any]:
        """The values for one expert: what it changes in place is cloned, once per tensor.

        While a path that is not known is compiled, everything is: nobody sees afterwards whether
        an expert has changed something. What was dropped comes as values that cannot be read,
        once `forked()`.
        """
        layout, compiling = self.layout, torch.compiler.is_compiling()
        if layout is None:
            return [map_tensors(torch.clone, v) for v in self.values] if compiling else self.values
        values = self.values
        if layout.changes_in_place:
            done: dict[int, Tensor] = {}

            def own(value: Tensor, clone: bool) -> Tensor:
                if not clone:
                    return value
                if id(value) not in done:
                    done[id(value)] = value.clone()
                return done[id(value)]

            pairs = zip(values, layout.clone, strict=True)
            values = [_map_with(own, value, flags) for value, flags in pairs]
        if self.hollow and not layout.reads_all:
            entries = zip(self.keys, values, layout.live, strict=True)
            values = [
                v if all(live) else _guarded(v, live, key, forked) for key, v, live in entries
            ]
        return values


def _may_join(ours: Any, theirs: Any) -> bool:
    """Whether one pass can start from either of two values that a backbone kept.

    What was computed with a tensor before the fork is in the states, so tensors may differ.
    """
    kept = (Tensor, *CONTAINERS, type(None))
    return (isinstance(ours, kept) and isinstance(theirs, kept)) or ours == theirs


def _guarded(value: Any, live: tuple[bool, ...], key: str, forked: Callable[[], bool]) -> Any:
    def guarded(tensor: Tensor, kept: bool) -> Tensor:
        kept = kept or tensor.layout is not torch.strided  # the input, say: what is hollow is
        return tensor if kept else Unread.of(tensor, key, forked)

    return _map_with(guarded, value, live)


def _keep_or_hollow(value: Tensor, live: bool) -> Tensor:
    return value if live or is_hollow(value) else hollow(value)


def _map_with(function: Any, value: Any, infos: tuple[Any, ...]) -> Any:
    if isinstance(value, Tensor):
        return function(value, infos[0])
    remaining = iter(infos)
    return map_tensors(lambda tensor: function(tensor, next(remaining)), value)


def _collate(batch: Sequence[TrunkState], *, collate_fn_map: Any = None) -> TrunkState:
    return TrunkState.cat(batch)


# torch's two documented registries: what `weights_only` may build, what a DataLoader can collate.
torch.serialization.add_safe_globals([TrunkState, Layout, Rows, Absent, RandomState])
default_collate_fn_map[TrunkState] = _collate
