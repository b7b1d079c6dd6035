"""What happens where two widths meet that have to be equal: one of them is changed in the plan."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor

from ride_plugin._tree import dotted, map_tensors, tensors_in
from ride_plugin._width._attention import Attention
from ride_plugin._width._layers import resized
from ride_plugin._width._ledger import (
    ATTENTION,
    CONVOLUTIONS,
    FIXED,
    JOINS,
    PRODUCTS,
    RESHAPES,
    SUMS_OF_PRODUCTS,
    Ledger,
)
from ride_plugin._width._map import WidthMap
from ride_plugin._width._plan import Amended, NarrowingPlan, Step, Stuck
from ride_plugin._width._recurrent import CELLS, RECURRENT


class Amender:
    """Decides which of two widths changes; a layer that cannot be narrowed keeps its own.

    Args:
        ledger: changes and origins of this trial.
        plan: amended where widths do not meet.
        widths: the map of widths.
        attentions: attention modules of the expert.
        tables: buffers that cannot be cut, and along which dimensions; see :func:`tables_of`.

    Attributes:
        running: names of the modules that run at the moment, the innermost last.
        arrived: names of the layers that made what each module was given.
        amended: whether this trial has changed the plan.
    """

    def __init__(
        self,
        ledger: Ledger,
        plan: NarrowingPlan,
        widths: WidthMap,
        attentions: Sequence[Attention],
        tables: Mapping[str, Collection[int]],
    ) -> None:
        self.ledger = ledger
        self.plan = plan
        self.widths = widths
        self.attentions = {attention.name: attention for attention in attentions}
        self._tables = tables
        self.running: list[str] = []
        self.arrived: dict[str, set[str]] = {}
        self.amended = False

    @property
    def where(self) -> str:
        """Name of the innermost module that runs."""
        return self.running[-1] if self.running else ""

    def reconciled(
        self, name: str, step: Step, args: Any, kwargs: Any, error: Exception
    ) -> tuple[Any, Any]:
        """Amend the plan where operands do not fit, and make them fit for the rest of the trial."""
        tensors = list(tensors_in((args, kwargs)))
        if name in RESHAPES:
            self._follow_shape(tensors[0], _ints_in((args, kwargs)))
        broadcasts = name not in JOINS | PRODUCTS | SUMS_OF_PRODUCTS | CELLS | {"linear"}
        reason = f"`{name}`: {str(error).splitlines()[0]}"
        changed = False
        for i, a, j, b in _equal_sizes(name, tensors, args, kwargs):
            left, right = tensors[i].shape[a], tensors[j].shape[b]
            if left == right or (broadcasts and 1 in (left, right)):
                continue
            if not (_has_width(tensors[i]) and _has_width(tensors[j])):
                continue
            loser, axis, size = self._loser((tensors[i], a), (tensors[j], b))
            k = i if loser is tensors[i] else j
            old = step.inputs[k][axis] if k < len(step.inputs) else None
            self.pin(loser, axis, size, old, reason)
            tensors[k] = resized(loser, {axis % loser.dim(): size})
            self.ledger.keep_alive(tensors[k])
            changed = True
        if not changed:
            self.give_way(tensors, reason)
        replaced = iter(tensors)
        fitted: tuple[Any, Any] = map_tensors(lambda _: next(replaced), (args, kwargs))
        return fitted

    def _loser(self, a: tuple[Tensor, int], b: tuple[Tensor, int]) -> tuple[Tensor, int, int]:
        """Which of two tensors has to change, along which dimension, and to which size."""

        def reluctance(tensor: Tensor, axis: int, other_size: int) -> tuple[int, int]:
            tags = self.ledger.tags_of(tensor)
            if not tags:
                return 3, 0
            if all(kind == "raw" for kind, _ in tags):
                from_end = axis if axis < 0 else axis - tensor.dim()
                return (3 if any(self._is_table(n, from_end) for _, n in tags) else 0), 0
            planned = all(name in self.plan.out for kind, name in tags if kind == "layer")
            # The narrower of two layers becomes wider, since the other may be unable to narrow.
            return (2 if planned else 1), int(tensor.shape[axis] > other_size)

        ours, theirs = (*a, b[0].shape[b[1]]), (*b, a[0].shape[a[1]])
        return ours if reluctance(*ours) < reluctance(*theirs) else theirs

    def pin(
        self, tensor: Tensor, axis: int, size: int, old_size: int | None, reason: str = ""
    ) -> None:
        """Amend the plan so that ``tensor`` gets ``size`` along ``axis``."""
        now = tensor.shape[axis]
        if now == size:
            return
        tags = self.ledger.tags_of(tensor)
        done = False
        for kind, name in tags:
            if kind == "raw":
                done |= self._pin_raw(name, now, size)
            else:
                old_out, out = self.ledger.layers.get(name, (0, 0))
                reference = old_size if old_size is not None else now
                wanted = round((old_out if old_size is not None else out) * size / reference)
                wanted = min(wanted, old_out)  # a layer that would grow was misunderstood
                if name not in self.plan.out and wanted > 0:
                    self.plan.out[name] = wanted
                    done |= (out, wanted) != (old_out, old_out)
                elif self.plan.out.get(name) != old_out and old_out:
                    self.plan.out[name] = old_out
                    done = True
                if reason and done and self.plan.out.get(name) == old_out:
                    self.plan.kept.setdefault(self.where, reason)
        if not done:
            self.give_way((), f"a width of {now} meets one of {size}")
        self.amended = True

    def _pin_raw(self, name: str, now: int, size: int) -> bool:
        path, _, key = name.rpartition(".")
        tensor: Any = getattr(self.ledger.modules[path], key)
        dims = [d for d, s in enumerate(tensor.shape) if s == now]
        dims = dims or [d for d, s in enumerate(tensor.shape) if s > 1]
        if len(dims) < 1 or (len(dims) > 1 and tensor.shape[dims[0]] != now):
            return False
        dim = dims[-1]
        if self._is_table(name, dim - tensor.dim()):
            return False
        # No weight grows: one that would was misunderstood, and might grow with every trial.
        wanted = min(round(tensor.shape[dim] * size / now), self._full_size(path, key, dim))
        sizes = self.plan.raw.setdefault(name, {})
        if sizes.get(dim) == wanted or wanted < 1:
            return False
        sizes[dim] = wanted
        return True

    def _follow_shape(self, tensor: Tensor, asked: Collection[int]) -> None:
        """Amend the plan where a module views its own resized parameter in sizes that it keeps."""
        for module, key in self.ledger.owners.get(id(tensor), ()):
            path = self.ledger.names[id(module)]
            if dotted(path, key) not in self.plan.raw:
                continue
            found = {
                (path, attribute, key)
                for attribute, value in vars(module).items()
                if not attribute.startswith("_")
                and set(asked).issuperset(_ints_in(value))
                and self.ledger.resized_shape(module, attribute, key) is not None
            }
            if found - self.plan.shapes:
                self.plan.shapes |= found
                raise Amended

    def _is_table(self, name: str, dim: int) -> bool:
        return dim in self._tables.get(name, ())

    def _full_size(self, path: str, key: str, dim: int) -> int:
        """Size of a parameter or buffer along a dimension before this trial resized it."""
        return self.ledger.full_shape(self.ledger.modules[path], key)[dim]

    def give_way(self, tensors: Iterable[Tensor], reason: str) -> NoReturn:
        """Try another way to narrow the attention that runs; else let layers keep their widths.

        Raises:
            Amended: the plan has changed, so another trial is worth it.
            Stuck: nothing is left to change.
        """
        if self.amended:
            raise Amended  # this failure may be a consequence of an earlier change of the plan
        for name in reversed(self.running):
            attention = self.attentions.get(name)
            if attention is not None:
                tried = self.plan.choice.get(name, 0)
                if tried + 1 < len(attention.choices(self.widths.ratio)):
                    for other in filter(attention.is_like, self.attentions.values()):
                        if self.plan.choice.get(other.name, 0) == tried:
                            self.plan.choice[other.name] = tried + 1
                    raise Amended
        made = {name for tensor in tensors for name in self._layers_of(tensor)}
        inside = [self._layers_in(path) for path in reversed(self.running)]
        # Code may read a width off what it is given, so what made that comes last.
        arriving = [self.arrived.get(path, set()) for path in reversed(self.running)]
        for at_fault in (made, *inside, *arriving):
            if self._keep(at_fault):
                self.plan.kept.setdefault(self.where, reason)
                raise Amended
        raise Stuck(f"`{self.where or 'its forward'}` does not run when narrowed ({reason})")

    def note_arrival(self, name: str, tensor: Tensor | None) -> None:
        """Note which layers made what a module is given."""
        self.arrived[name] = set() if tensor is None else self._layers_of(tensor)

    def _layers_of(self, tensor: Tensor) -> set[str]:
        return {name for kind, name in self.ledger.tags_of(tensor) if kind == "layer"}

    def _layers_in(self, path: str) -> set[str]:
        return {n for n in self.ledger.new_widths if n == path or n.startswith(path + ".")}

    def _keep(self, layers: Collection[str]) -> bool:
        """Let layers keep their widths; False if all of them do."""
        kept = False
        for name in layers:
            old_out, out = self.ledger.layers[name]
            if out != old_out and self.plan.out.get(name) != old_out:
                self.plan.out[name] = old_out
                kept = True
        return kept


def _equal_sizes(
    name: str, tensors: Sequence[Tensor], args: Any, kwargs: Any
) -> list[tuple[int, int, int, int]]:
    """Which sizes an operation needs to be equal: number of a tensor, axis, another one, axis."""
    pairs: list[tuple[int, int, int, int]] = []
    if name in JOINS:
        axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        rank = tensors[0].dim()
        pairs = [
            (0, dim, k, dim)
            for k in range(1, len(tensors))
            for dim in range(rank)
            if dim != axis % rank
        ]
    elif name in PRODUCTS and len(tensors) == 2:
        pairs = [(0, -1, 1, -2 if tensors[1].dim() > 1 else -1)]
    elif name in SUMS_OF_PRODUCTS:
        pairs = [(1, -1, 2, -2), (0, -1, 2, -1)]
    elif name == "__setitem__" or name.startswith(("index_", "scatter_")):
        # A memory of features, and features to put there; between them an index.
        pairs = [(0, -1, len(tensors) - 1, -1)]
    elif name == "linear":
        pairs = [(0, -1, 1, -1)]
        pairs += [(2, 0, 1, 0)] if len(tensors) > 2 else []
    elif name in CELLS:  # each state, and the weight that it meets
        states = range(1, 3 if name == "lstm_cell" else 2)
        pairs = [(k, -1, states.stop + 1, -1) for k in states]
    elif name == ATTENTION and len(tensors) > 2:  # queries, keys, values, perhaps a mask
        pairs = [(0, -1, 1, -1), (0, -3, 1, -3), (1, -2, 2, -2), (1, -3, 2, -3)]
        pairs += [(3, -1, 1, -2), (3, -2, 0, -2), (3, -3, 0, -3)] if len(tensors) > 3 else []
        pairs = [p for p in pairs if min(tensors[p[0]].dim(), tensors[p[2]].dim()) >= -p[1]]
    elif len(tensors) > 1 and name not in RESHAPES | CONVOLUTIONS | FIXED | RECURRENT:
        first = next((k for k, tensor in enumerate(tensors) if _has_width(tensor)), 0)
        for k in range(first + 1, len(tensors)):
            rank = min(tensors[first].dim(), tensors[k].dim())
            pairs += [(first, -d, k, -d) for d in range(1, rank + 1)]
    return pairs


def _ints_in(value: Any) -> list[int]:
    """The whole numbers in an argument or attribute, in tuples and lists as well."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return [number for one in value for number in _ints_in(one)]
    return [value] if type(value) is int else []


def _has_width(tensor: Tensor) -> bool:
    """Whether its entries can be channels: those of an index are places, whatever its size."""
    return tensor.is_floating_point() or tensor.is_complex()
