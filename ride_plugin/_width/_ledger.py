"""What one trial has changed, so that it can be undone, and which layer made which tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._tree import dotted, holds_tensors, tensors_in
from ride_plugin._width._layers import resized
from ride_plugin._width._recurrent import CELLS, RECURRENT

Tag = tuple[str, str]  # ("layer", module name) or ("raw", parameter name)
NORMS = {"batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm", "prelu"}
CONVOLUTIONS = {f"{kind}{d}d" for kind in ("conv", "conv_transpose") for d in (1, 2, 3)}
RESHAPES = {"view", "reshape", "unflatten", "_unsafe_view", "flatten"}
JOINS = {"cat", "concat", "concatenate"}
FIXED = {"multi_head_attention_forward"}  # torch's, as wide as the weights that it is given
ATTENTION = "scaled_dot_product_attention"
PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm"}
SUMS_OF_PRODUCTS = {"addmm", "baddbmm"}  # of a bias, what comes in, and a weight


@dataclass
class Change:
    """A resized parameter or buffer, with what stood there before."""

    module: nn.Module
    name: str
    old: Tensor
    sizes: dict[int, int]
    fan_ratio: float
    parts: int = 1  # blocks along the first dimension that are cut alike, as gates are


def empty_caches(expert: nn.Module) -> list[Callable[[], None]]:
    """Take away what modules keep in dictionaries: tensors computed at the full width.

    Returns:
        What puts each of them back.
    """
    put_back: list[Callable[[], None]] = []
    for module in expert.modules():
        attributes = module.__dict__
        for key, value in attributes.items():
            if type(value) is dict and holds_tensors(value) and not key.startswith("_"):
                put_back.append(partial(attributes.__setitem__, key, value))
                attributes[key] = {}
    return put_back


def sees_one_channel(x: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether each filter of a convolution sees one of several channels, by the two shapes."""
    return kernel[1] == 1 < channels_of(x, kernel)


def channels_of(shape: Sequence[int], kernel: Sequence[int]) -> int:
    """Number of channels in a convolution's input or output, be it a batch or a single image.

    A kernel has as many dimensions as a batch, so its channels are counted from the end.
    """
    return shape[1 - len(kernel)]


class Ledger:
    """Changes an expert's layers, remembers each change, and knows which layer made a tensor.

    Args:
        expert: an expert's view of the backbone.
        frozen: ids of tensors that the trunk owns, which stay as they are.

    Attributes:
        changes: every resized parameter and buffer, in order.
        settings: every plain attribute that was set, in order.
        layers: old and new output width of each layer that was resized, by name.
        new_widths: the new output widths alone, also of layers that kept theirs.
        modules: the expert's modules by name; ``names`` is the way back, from ids.
        owners: modules and keys of each tensor that may be resized, by id.
    """

    def __init__(self, expert: nn.Module, frozen: set[int]) -> None:
        self.changes: list[Change] = []
        self.settings: list[tuple[nn.Module, str, Any]] = []
        self.layers: dict[str, tuple[int, int]] = {}  # name -> (old, new) output width
        self.names = {id(module): name for name, module in expert.named_modules()}
        self.modules = dict(expert.named_modules())
        self._undo: list[Callable[[], None]] = []
        self.new_widths: dict[str, int] = {}
        self._tags: dict[int, frozenset[Tag]] = {}
        self._alive: list[Any] = []
        self._swapped: dict[int, Tensor] = {}
        self.owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in expert.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and id(tensor) not in frozen:
                    self.owners.setdefault(id(tensor), []).append((module, name))

    def undo(self) -> None:
        """Put everything back."""
        for restore in reversed(self._undo):
            restore()

    def repeat_on(self, other: Ledger) -> None:
        """Do the same to another expert, of which this one's is a copy."""
        for change in self.changes:
            module = other.modules[self.names[id(change.module)]]
            other.resize(module, change.name, change.sizes, change.fan_ratio, change.parts)
        for module, name, value in self.settings:
            other.set_attribute(other.modules[self.names[id(module)]], name, value)

    def resize(
        self,
        module: nn.Module,
        name: str,
        sizes: dict[int, int],
        fan_ratio: float = 1.0,
        parts: int = 1,
    ) -> None:
        """Resize a parameter or buffer along some dimensions; tied tensors stay tied."""
        where = module._parameters if name in module._parameters else module._buffers
        old: Any = where[name]
        if all(old.shape[dim] == size for dim, size in sizes.items()):
            return
        each = sizes if parts == 1 else sizes | {0: sizes[0] // parts}
        value = torch.cat([resized(part, each) for part in old.chunk(parts)])
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
            vars(value).update(vars(old))  # marks for optimizers
        owners = self.owners.pop(id(old), [(module, name)])
        for owner, key in owners:  # tied parameters stay tied
            self._undo.append(partial(_put, owner, key, old))
            _put(owner, key, value)
        self.owners[id(value)] = owners
        self._swapped[id(old)] = value
        self._alive.append((old, value))
        self.changes.append(Change(module, name, old, sizes, fan_ratio, parts))

    def full_shape(self, module: nn.Module, key: str) -> torch.Size:
        """Sizes of a parameter or buffer before this trial resized it."""
        changes = (c.old for c in self.changes if c.module is module and c.name == key)
        full: Tensor = next(changes, getattr(module, key))
        return full.shape

    def resized_shape(self, module: nn.Module, attribute: str, key: str) -> Any:
        """What an attribute with sizes becomes where a parameter has others; None if it has none.

        ``(320, 1, 1)`` becomes ``(240, 1, 1)`` where the parameter had 320 entries and has 240.
        """
        value, now = vars(module)[attribute], getattr(module, key).shape
        swaps = {a: b for a, b in zip(self.full_shape(module, key), now, strict=True) if a != b}
        if type(value) is int:
            return swaps.get(value)
        sizes = value if type(value) in (tuple, list, torch.Size) else ()
        if all(type(size) is int for size in sizes) and not swaps.keys().isdisjoint(sizes):
            return type(value)(swaps.get(size, size) for size in sizes)
        return None

    def current(self, tensor: Tensor) -> Tensor:
        """What stands in the place of a tensor that was resized."""
        while id(tensor) in self._swapped:
            tensor = self._swapped[id(tensor)]
        return tensor

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set a plain attribute that the module has."""
        attributes = module.__dict__
        if name in attributes:
            old = attributes[name]
            self._undo.append(partial(attributes.__setitem__, name, old))
            self.settings.append((module, name, value))
            attributes[name] = value

    def keep_alive(self, tensor: Tensor) -> None:
        """Hold a tensor until the trial ends: an id names a tensor only while it lives."""
        self._alive.append(tensor)

    def tag(self, tensor: Tensor, tags: frozenset[Tag]) -> None:
        """Note which layers or parameters a tensor comes from."""
        self.keep_alive(tensor)
        self._tags[id(tensor)] = tags

    def tags_of(self, tensor: Tensor) -> frozenset[Tag]:
        """Which layers, or parameters without a layer, a tensor comes from."""
        if id(tensor) in self._tags:
            return self._tags[id(tensor)]
        found = set()
        for module, key in self.owners.get(id(tensor), ()):
            name = self.names[id(module)]
            if not tensor.is_floating_point():
                continue  # an index, a mask
            layer = name in self.new_widths
            found.add(("layer", name) if layer else ("raw", dotted(name, key)))
        return frozenset(found)

    def tags_of_result(self, name: str, args: Any, kwargs: Any) -> frozenset[Tag]:
        """Which of them the result of an operation has its width from."""
        tensors = list(tensors_in((args, kwargs)))
        if name in FIXED:
            return frozenset()
        if name == "linear" or name in CONVOLUTIONS:
            layers = self.tags_of(tensors[1])
            names = [n for kind, n in layers if kind == "layer"]
            depthwise = any(
                getattr(self.modules[n], "groups", 1) > 1
                and self.modules[n].groups == self.modules[n].in_channels
                for n in names
            )
            if name in ("conv1d", "conv2d", "conv3d") and not names:  # a kernel that no layer owns
                depthwise = sees_one_channel(tensors[0].shape, tensors[1].shape)
            return self.tags_of(tensors[0]) if depthwise else layers
        if name in SUMS_OF_PRODUCTS:
            tensors = tensors[1:]
        if name in PRODUCTS | SUMS_OF_PRODUCTS and len(tensors) > 1:
            return self.tags_of(tensors[1]) or self.tags_of(tensors[0])
        if name == ATTENTION:
            return self.tags_of(tensors[2])
        if name in RECURRENT | CELLS:
            weights = (tensor for tensor in tensors if id(tensor) in self.owners)
            return frozenset().union(*map(self.tags_of, weights))
        if name in NORMS:
            return self.tags_of(tensors[0])
        return frozenset().union(*(self.tags_of(tensor) for tensor in tensors))


def _put(owner: nn.Module, key: str, value: Tensor) -> None:
    """Give a module another parameter or buffer; a recurrent layer lists its weights as well."""
    slot: Any = owner._parameters if key in owner._parameters else owner._buffers
    old, slot[key] = slot[key], value
    if isinstance(owner, nn.RNNBase):
        flat: list[Any] = owner._flat_weights
        weights: list[Any] = [value if weight is old else weight for weight in flat]
        owner._flat_weights = weights
        # With references to others its forward would make the list anew.
        owner._flat_weight_refs = [w if w is None else weakref.ref(w) for w in weights]
