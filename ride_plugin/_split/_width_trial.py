"""A trial forward of a narrowed expert: layers are resized as the tensors reach them.

Output widths come from one map, input widths from the tensor that arrives. Where two widths meet
that have to be equal (a residual sum with what the trunk computed, say), the plan is amended: the
layer that made the narrower one keeps a wider output, or a parameter that is combined with the
other by hand is resized. Amended plans are tried again, until one runs through.

Each operation is compared with the same operation of the full-width expert, so that a reshape with
a fixed number of channels cannot move positions into channels unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ride_plugin._split._attention_width import Attention
from ride_plugin._split._tree import map_tensors, tensors_in
from ride_plugin._split._width_layers import Kind, kind_of, resized
from ride_plugin._split._width_map import WidthMap

Tag = tuple[str, str]  # ("layer", module name) or ("raw", parameter name)
_NORMS = {"batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm", "prelu"}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "conv_transpose2d"}
_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm"}
_RESHAPES = {"view", "reshape", "unflatten", "_unsafe_view", "flatten"}
_JOINS = {"cat", "concat", "concatenate"}


class Amended(Exception):
    """The plan was changed; try again."""


class Stuck(Exception):
    """No change of the plan helps; the message says where and why."""


@dataclass
class Plan:
    """Decisions that hold over all trials.

    Attributes:
        out: output width of a layer, where it differs from what the map gives.
        raw: sizes of a parameter that no layer owns, by dimension.
        choice: how far an attention module has fallen back, as an index into its choices.
    """

    out: dict[str, int] = field(default_factory=dict)
    raw: dict[str, dict[int, int]] = field(default_factory=dict)
    choice: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One operation of the full-width expert: its name, and the shapes that went in and came out."""

    name: str
    inputs: list[tuple[int, ...]]
    outputs: list[tuple[int, ...]]


class Trace(TorchFunctionMode):
    """Writes down the operations of the full-width expert."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        shapes = _shapes((args, kwargs or {}))  # before: an operation may resize in place
        result = func(*args, **(kwargs or {}))
        self.steps.append(Step(_name(func), shapes, _shapes(result)))
        return result


@dataclass
class Change:
    """A resized parameter or buffer, with what stood there before."""

    module: nn.Module
    name: str
    old: Tensor
    fan_ratio: float


class Trial(TorchFunctionMode):
    """Runs an expert once and resizes its layers on the way; everything can be undone.

    Args:
        expert: an expert's view of the backbone.
        frozen: ids of tensors that the trunk owns.
        plan: amended when widths do not meet.
        widths: the map of widths.
        attentions: attention modules of the expert.
    """

    def __init__(
        self,
        expert: nn.Module,
        frozen: set[int],
        plan: Plan,
        widths: WidthMap,
        attentions: Sequence[Attention],
    ) -> None:
        super().__init__()
        self.plan = plan
        self.widths = widths
        self.changes: list[Change] = []
        self.layers: dict[str, tuple[int, int]] = {}  # name -> (old, new) output width
        self._attentions = {attention.name: attention for attention in attentions}
        self._names = {id(module): name for name, module in expert.named_modules()}
        self._modules_by_name = dict(expert.named_modules())
        self._undo: list[Callable[[], None]] = []
        self._out: dict[str, int] = {}
        self._steps: Sequence[Step] = ()
        self._position = 0
        self._tags: dict[int, frozenset[Tag]] = {}
        self._alive: list[Any] = []
        self._stack: list[str] = []
        self._amended = False
        self._swapped: dict[int, Tensor] = {}
        self._owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in expert.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and id(tensor) not in frozen:
                    self._owners.setdefault(id(tensor), []).append((module, name))
        self._set_attributes()
        for name, sizes in plan.raw.items():
            path, _, key = name.rpartition(".")
            self._resize(self._modules_by_name[path], key, sizes)

    def run(self, play: Callable[[], Any], steps: Sequence[Step], output: Sequence[Any]) -> None:
        """Run the expert once; ``steps`` and ``output`` are the full-width expert's.

        Raises:
            Amended: the plan was changed.
            Stuck: it does not run, and no change of the plan is left to try.
        """
        self._steps, self._position, self._stack = steps, 0, []
        handles = []
        for module in self._modules_by_name.values():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._exit))
        try:
            with torch.no_grad(), self:
                result = play()
        except (Amended, Stuck):
            raise
        except Exception as error:
            self._give_way((), f"{type(error).__name__}: {error}")
        finally:
            for handle in handles:
                handle.remove()
        for got, expected in zip(tensors_in(result), output, strict=True):
            if len(expected) == 2 and tuple(got.shape) != expected:  # logits keep their classes
                self._pin(got, 1, expected[1], expected[1])
        if self._position != len(self._steps):
            raise Stuck("the narrowed expert's forward takes another path than the original's")
        if self._amended:
            raise Amended

    def undo(self) -> None:
        """Put everything back."""
        for restore in reversed(self._undo):
            restore()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stack.append(self._names[id(module)])
        with torch._C.DisableTorchFunction():
            kind = kind_of(module)
            x = next(tensors_in((args, kwargs)), None)
            if kind is not None and x is not None:
                self._fix(module, kind, x)

    def _exit(self, module: nn.Module, args: Any, result: Any) -> None:
        self._stack.pop()
        with torch._C.DisableTorchFunction():
            kind = kind_of(module)
        if kind is not None and kind.in_dim is None and isinstance(result, Tensor):
            self._tag(result, frozenset({("layer", self._names[id(module)])}))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = _name(func)
        index, self._position = self._position, self._position + 1
        if index >= len(self._steps) or self._steps[index].name != name:
            self._give_way(tensors_in((args, kwargs)), f"its path changes at `{name}`")
        step = self._steps[index]
        if "weight" in name or name in ("linear", *_CONVOLUTIONS):
            self._fix_functional(args, kwargs or {})
        args, kwargs = map_tensors(self._current, (args, kwargs or {}))
        if name in _NORMS:
            args, kwargs = self._fix_norm(name, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            args, kwargs = self._reconciled(name, step, args, kwargs, error)
            try:
                result = func(*args, **kwargs)
            except (RuntimeError, ValueError, IndexError) as again:
                reason = f"`{name}`: {str(again).splitlines()[0]}"
                self._give_way(tensors_in((args, kwargs)), reason)
        self._compare(name, step, args, result)
        tags = self._tags_of_result(name, args, kwargs)
        for tensor in tensors_in(result):
            self._tag(tensor, tags)
        return result

    # --- resizing -------------------------------------------------------------------------------

    def _fix(self, module: nn.Module, kind: Kind, x: Tensor) -> None:
        """Give a layer the input width that arrives and the output width of the plan."""
        name = self._names[id(module)]
        weight: Any = module._parameters.get("weight")
        owned = weight is None or id(weight) in self._owners
        if name in self._out or not owned or (weight is None and hasattr(module, "weight")):
            if kind.in_dim is not None and x.dim() > 1:
                self._pin(x, kind.axis, getattr(module, kind.in_name), x.shape[kind.axis])
            return
        arriving = x.shape[kind.axis] if kind.in_dim is not None else 0
        old_in = getattr(module, kind.in_name) if kind.in_dim is not None else 0
        old_out = getattr(module, kind.out_name)
        groups = getattr(module, "groups", 1)
        out = self.plan.out.get(name)
        if out is None:
            out = self._projections.get(name)
        if groups > 1 and groups == old_in:  # depthwise: as wide as its input
            new_groups, out = arriving, arriving * (old_out // old_in)
        elif groups > 1:
            out = self.widths(old_out) if out is None else out
            size = old_in // groups
            new_groups = groups
            if arriving % groups or out % groups:
                new_groups = arriving // size
            if not new_groups or arriving % new_groups or out % new_groups:
                self._give_way((x,), f"{arriving} and {out} channels in {groups} groups")
        elif kind.in_dim is None and not isinstance(module, nn.Embedding):
            new_groups, out = 1, max(self.widths(old_out) if out is None else out, x.shape[1])
        else:
            new_groups, out = 1, self.widths(old_out) if out is None else out
        fan_ratio = 1.0
        if kind.in_dim is not None and arriving:
            fan_ratio = (old_in / groups) / (arriving / new_groups)
        if weight is not None:
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None:
                    continue
                if key == "weight":
                    sizes = {kind.out_dim: out if kind.in_dim != 0 else out // new_groups}
                    if kind.in_dim is not None:
                        per_group = 1 if kind.in_dim == 0 else new_groups
                        sizes[kind.in_dim] = arriving // per_group
                    self._resize(module, key, sizes, fan_ratio)
                elif tensor.dim() and tensor.shape[0] == old_out:  # bias, gain
                    self._resize(module, key, {0: out}, fan_ratio)
        self._set(module, kind.out_name, out)
        if kind.in_dim is not None:
            self._set(module, kind.in_name, arriving)
        if groups != new_groups:
            self._set(module, "groups", new_groups)
        self._out[name] = out
        self.layers[name] = (old_out, out)

    def _fix_functional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Layers whose weight is handed to a function by the code around them."""
        tensors = list(tensors_in((args, kwargs)))
        if len(tensors) < 2:
            return
        x, weight = tensors[:2]
        for module, key in self._owners.get(id(weight), ()):
            kind = kind_of(module)
            if kind is not None and key == "weight" and self._names[id(module)] not in self._out:
                self._fix(module, kind, x)

    def _fix_norm(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x: Tensor = args[0] if args else kwargs["input"]
        given = list(args)
        last = name in ("layer_norm", "rms_norm")
        module = self._modules_by_name.get(self._stack[-1] if self._stack else "")
        if last:
            shape = given[1] if len(given) > 1 else kwargs["normalized_shape"]
            size = tuple(x.shape[-len(shape) :])
        else:
            size = (x.shape[1],)
        for i, value in enumerate(given[1:], 1):
            given[i] = self._norm_argument(value, size)
        kwargs = {k: v if k == "input" else self._norm_argument(v, size) for k, v in kwargs.items()}
        if last and tuple(shape) != size:
            if len(given) > 1:
                given[1] = size
            else:
                kwargs["normalized_shape"] = size
            if module is not None and hasattr(module, "normalized_shape"):
                self._set(module, "normalized_shape", size)
        if name == "group_norm":
            groups = given[1] if len(given) > 1 else kwargs["num_groups"]
            if size[0] % groups and isinstance(module, nn.GroupNorm):
                groups = max(1, size[0] // (module.num_channels // module.num_groups))
                if size[0] % groups:
                    self._give_way((x,), f"{size[0]} channels in {module.num_groups} groups")
                self._set(module, "num_groups", groups)
                given[1:2] = [groups]
        for attribute in ("num_features", "num_channels", "num_parameters"):
            if isinstance(getattr(module, attribute, None), int) and module is not None:
                if name != "prelu" or module.num_parameters != 1:
                    self._set(module, attribute, size[0])
        return tuple(given), kwargs

    def _norm_argument(self, value: Any, size: tuple[int, ...]) -> Any:
        if isinstance(value, Tensor) and value.numel() > 1 and tuple(value.shape) != size:
            for module, key in self._owners.get(id(value), ()):
                self._resize(module, key, dict(enumerate(size)))
            return self._current(value)
        return value

    def _resize(
        self, module: nn.Module, name: str, sizes: dict[int, int], fan_ratio: float = 1.0
    ) -> None:
        where = module._parameters if name in module._parameters else module._buffers
        old: Any = where[name]
        if all(old.shape[dim] == size for dim, size in sizes.items()):
            return
        value = resized(old, sizes)
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        owners = self._owners.pop(id(old), [(module, name)])
        for owner, key in owners:  # tied parameters stay tied
            slot: Any = owner._parameters if key in owner._parameters else owner._buffers
            slot[key] = value
            self._undo.append(lambda slot=slot, key=key, old=old: slot.__setitem__(key, old))
        self._owners[id(value)] = owners
        self._swapped[id(old)] = value
        self._alive.append((old, value))
        self.changes.append(Change(module, name, old, fan_ratio))

    def _current(self, tensor: Tensor) -> Tensor:
        while id(tensor) in self._swapped:
            tensor = self._swapped[id(tensor)]
        return tensor

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        attributes = module.__dict__
        if name in attributes:
            old = attributes[name]
            self._undo.append(lambda: attributes.__setitem__(name, old))
            attributes[name] = value

    def _set_attributes(self) -> None:
        self._projections: dict[str, int] = {}
        for name, attention in self._attentions.items():
            choices = attention.choices(self.widths.ratio)
            choice = choices[min(self.plan.choice.get(name, 0), len(choices) - 1)]
            widths, settings = attention.apply(choice, self.widths.ratio)
            prefix = name + "." if name else ""
            self._projections |= {prefix + key: width for key, width in widths.items()}
            for module, key, value in settings:
                self._set(module, key, value)
        for module in self._modules_by_name.values():
            for key, value in vars(module).items():
                # Caches of computed tensors, filled at the full width.
                if type(value) is dict and not key.startswith("_"):
                    if next(tensors_in(value), None) is not None:
                        self._set(module, key, {})

    # --- widths that have to be equal -------------------------------------------------------------

    def _reconciled(
        self, name: str, step: Step, args: Any, kwargs: Any, error: Exception
    ) -> tuple[Any, Any]:
        """Amend the plan where operands do not fit, and make them fit for the rest of the trial."""
        tensors = list(tensors_in((args, kwargs)))
        pairs: list[tuple[int, int, int, int]] = []  # (tensor, axis, tensor, axis) to be equal
        if name in _JOINS:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            rank = tensors[0].dim()
            pairs = [
                (0, dim, k, dim)
                for k in range(1, len(tensors))
                for dim in range(rank)
                if dim != axis % rank
            ]
        elif name in _PRODUCTS and len(tensors) == 2:
            pairs = [(0, -1, 1, -2 if tensors[1].dim() > 1 else -1)]
        elif name == "linear":
            pairs = [(0, -1, 1, -1)]
            pairs += [(2, 0, 1, 0)] if len(tensors) > 2 else []
        elif len(tensors) > 1 and name not in _RESHAPES | _CONVOLUTIONS:
            for k in range(1, len(tensors)):
                rank = min(tensors[0].dim(), tensors[k].dim())
                pairs += [(0, -d, k, -d) for d in range(1, rank + 1)]
        broadcasts = name not in _JOINS | _PRODUCTS | {"linear"}
        changed = False
        for i, a, j, b in pairs:
            left, right = tensors[i].shape[a], tensors[j].shape[b]
            if left == right or (broadcasts and 1 in (left, right)):
                continue
            loser, axis, size = self._loser((tensors[i], a), (tensors[j], b))
            k = i if loser is tensors[i] else j
            old = step.inputs[k][axis] if k < len(step.inputs) else None
            self._pin(loser, axis, size, old)
            tensors[k] = resized(loser, {axis % loser.dim(): size})
            self._alive.append(tensors[k])
            changed = True
        if not changed:
            self._give_way(tensors, f"`{name}`: {str(error).splitlines()[0]}")
        replaced = iter(tensors)
        fitted: tuple[Any, Any] = map_tensors(lambda _: next(replaced), (args, kwargs))
        return fitted

    def _loser(self, a: tuple[Tensor, int], b: tuple[Tensor, int]) -> tuple[Tensor, int, int]:
        """Which of two has to change, along which dimension, and to which size."""

        def reluctance(side: tuple[Tensor, int]) -> tuple[int, int]:
            tags = self._tags_of(side[0])
            if not tags:
                return 3, 0
            if all(kind == "raw" for kind, _ in tags):
                return 0, 0
            layers = [name for kind, name in tags if kind == "layer"]
            narrowed = side[0].shape[side[1]]
            other = (b if side is a else a)[0].shape[(b if side is a else a)[1]]
            # Of two layers, the one that is narrower widens: the other may have no choice.
            return (2 if all(n in self.plan.out for n in layers) else 1), int(narrowed > other)

        loser, winner = (a, b) if reluctance(a) < reluctance(b) else (b, a)
        return loser[0], loser[1], winner[0].shape[winner[1]]

    def _pin(self, tensor: Tensor, axis: int, size: int, old_size: int | None) -> None:
        """Amend the plan so that ``tensor`` gets ``size`` along ``axis``."""
        now = tensor.shape[axis]
        if now == size:
            return
        tags = self._tags_of(tensor)
        done = False
        for kind, name in tags:
            if kind == "raw":
                done |= self._pin_raw(name, now, size)
            else:
                old_out, out = self.layers.get(name, (0, 0))
                reference = old_size if old_size is not None else now
                wanted = round((old_out if old_size is not None else out) * size / reference)
                if name not in self.plan.out and wanted > 0:
                    self.plan.out[name] = wanted
                    done = True
                elif self.plan.out.get(name) != old_out and old_out:
                    self.plan.out[name] = old_out
                    done = True
        if not done:
            self._give_way((), f"a width of {now} meets one of {size}")
        self._amended = True

    def _pin_raw(self, name: str, now: int, size: int) -> bool:
        path, _, key = name.rpartition(".")
        tensor: Any = getattr(self._modules_by_name[path], key)
        dims = [d for d, s in enumerate(tensor.shape) if s == now]
        dims = dims or [d for d, s in enumerate(tensor.shape) if s > 1]
        if len(dims) < 1 or (len(dims) > 1 and tensor.shape[dims[0]] != now):
            return False
        wanted = round(tensor.shape[dims[-1]] * size / now)
        sizes = self.plan.raw.setdefault(name, {})
        if sizes.get(dims[-1]) == wanted or wanted < 1:
            return False
        sizes[dims[-1]] = wanted
        return True

    def _compare(self, name: str, step: Step, args: Any, result: Any) -> None:
        """Refuse a reshape that moves what a dimension holds, and anything that came out empty."""
        outputs = list(tensors_in(result))
        expected = step.outputs
        if len(outputs) != len(expected) or any(
            len(e) != t.dim() or (t.numel() == 0 and 0 not in e)
            for t, e in zip(outputs, expected, strict=True)
        ):
            self._give_way(tensors_in(args), f"`{name}` returns another number of dimensions")
        if name in _RESHAPES and outputs and step.inputs:
            source = next(tensors_in(args), None)
            if source is None:
                return
            for ins, outs in _groups(step.inputs[0], expected[0]):
                before = _product(source.shape[i] for i in ins)
                if before != _product(outputs[0].shape[o] for o in outs):
                    self._give_way((source,), f"`{name}` with fixed sizes")

    def _give_way(self, tensors: Iterable[Tensor], reason: str) -> None:
        """Fall back: another way to narrow the attention here, else keep the layers at fault."""
        if self._amended:
            raise Amended  # what fails may follow from what was amended already
        where = self._stack[-1] if self._stack else ""
        for name in reversed(self._stack):
            attention = self._attentions.get(name)
            if attention is not None:
                tried = self.plan.choice.get(name, 0)
                if tried + 1 < len(attention.choices(self.widths.ratio)):
                    self.plan.choice[name] = tried + 1
                    raise Amended
        tags = {tag for tensor in tensors for tag in self._tags_of(tensor)}
        at_fault = [name for kind, name in tags if kind == "layer"]
        for path in ("", *reversed(self._stack)):
            if path:
                at_fault = [name for name in self._out if name.startswith(path + ".")]
            kept = False
            for name in at_fault:
                old_out, out = self.layers[name]
                if out != old_out and self.plan.out.get(name) != old_out:
                    self.plan.out[name] = old_out
                    kept = True
            if kept:
                raise Amended
        raise Stuck(f"`{where or 'its forward'}` does not run when narrowed ({reason})")

    # --- which layers made a tensor ---------------------------------------------------------------

    def _tag(self, tensor: Tensor, tags: frozenset[Tag]) -> None:
        self._alive.append(tensor)  # an id names a tensor only while it lives
        self._tags[id(tensor)] = tags

    def _tags_of(self, tensor: Tensor) -> frozenset[Tag]:
        if id(tensor) in self._tags:
            return self._tags[id(tensor)]
        found = set()
        for module, key in self._owners.get(id(tensor), ()):
            name = self._names[id(module)]
            if not tensor.is_floating_point():
                continue  # an index, a mask
            layer = kind_of(module) is not None and name in self._out
            found.add(("layer", name) if layer else ("raw", f"{name}.{key}" if name else key))
        return frozenset(found)

    def _tags_of_result(self, name: str, args: Any, kwargs: Any) -> frozenset[Tag]:
        tensors = list(tensors_in((args, kwargs)))
        if name == "linear" or name in _CONVOLUTIONS:
            layers = self._tags_of(tensors[1])
            names = [n for kind, n in layers if kind == "layer"]
            depthwise = any(
                getattr(self._modules_by_name[n], "groups", 1) > 1
                and self._modules_by_name[n].groups == self._modules_by_name[n].in_channels
                for n in names
            )
            return self._tags_of(tensors[0]) if depthwise else layers
        if name in _PRODUCTS and len(tensors) > 1:
            return self._tags_of(tensors[1]) or self._tags_of(tensors[0])
        if name == "scaled_dot_product_attention":
            return self._tags_of(tensors[2])
        if name in _NORMS:
            return self._tags_of(tensors[0])
        return frozenset().union(*(self._tags_of(tensor) for tensor in tensors))


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions that a reshape maps onto each other, by equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        ins, outs = [i], [j]
        left, right = before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right and i < len(before):
                left *= before[i]
                ins.append(i)
                i += 1
            elif right < left and j < len(after):
                right *= after[j]
                outs.append(j)
                j += 1
            else:
                return [(list(range(len(before))), list(range(len(after))))]
        groups.append((ins, outs))
    return groups


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _shapes(value: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors_in(value)]


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", None) or type(func).__name__
