"""Which values of a stage's graph may share memory, and where that memory is written."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

_ATEN = torch.ops.aten
_NEW = frozenset(
    f"aten::{name}"
    for name in (
        *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "linear", "matmul"),
        *("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm", "std", "var"),
        *("avg_pool1d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "max_pool1d", "max_pool2d"),
        *("scaled_dot_product_attention", "softmax", "log_softmax"),
    )
)
"""Composed operations that return memory of their own, though their schema cannot promise it."""
_MAY_COPY = (
    _ATEN.contiguous.default,
    _ATEN.flatten.using_ints,
    _ATEN.reshape.default,
    _ATEN.view.default,  # where it cannot view, `reshape` stands for it
)
"""They return a view of some layouts and a copy of others."""


class Memory:
    """Which values of a graph may share memory, and the places at which it is written.

    Rewriting a graph is safe if no reading moves past a writing, and if two values become one only
    where neither is written. What cannot be known is taken for shared and for written.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._place = {node: place for place, node in enumerate(module.graph.nodes)}
        self._roots: dict[fx.Node, frozenset[object]] = {}
        self._writings: dict[object, list[int]] = defaultdict(list)
        self._copies: dict[fx.Node, frozenset[fx.Node]] = {}
        self.depends_on_layout = False
        for node in module.graph.nodes:
            self._note(module, node)
        self._compare_layouts()

    def written(
        self, value: Any, after: fx.Node | None = None, before: fx.Node | None = None
    ) -> bool:
        """Whether the memory of a value may be written, between two nodes if they are given."""
        first = -1 if after is None else self._place[after]
        last = len(self._place) if before is None else self._place[before]
        places = [p for root in self._roots.get(value, ()) for p in self._writings.get(root, ())]
        return any(first < place < last for place in places)

    def join(self, value: fx.Node, other: fx.Node) -> None:
        """Note that ``value`` is read in place of ``other`` from here on."""
        self._roots[value] = self._roots.get(value, frozenset()) | self._roots[other]
        self._place.setdefault(value, self._place[other])

    def _note(self, module: fx.GraphModule, node: fx.Node) -> None:
        shared, written = _effects(node)
        self._roots[node] = frozenset().union(*(self._roots[source] for source in shared))
        self._copies[node] = frozenset().union(*(self._copies[source] for source in shared))
        if not shared:
            self._roots[node] = frozenset([_own_memory(module, node)])
        if node.target in _MAY_COPY:
            self._copies[node] |= {node}
        for source in written:
            for root in self._roots[source]:
                self._writings[root].append(self._place[node])

    def _compare_layouts(self) -> None:
        """Find values that a writing reaches in one layout and not in another."""
        for writer, place in self._place.items():
            written = _effects(writer)[1]
            readers = [node for node in self._place if self._place[node] > place and written]
            later = {read for reader in readers for read in reader.all_input_nodes}
            for value in written:
                copies, roots = self._copies[value], self._roots[value]
                for read in later:
                    apart = copies ^ self._copies[read] if roots & self._roots[read] else ()
                    if any(self._place[copy] < place for copy in apart):
                        self.depends_on_layout = True


def _effects(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The inputs in whose memory the node's value may lie, and those that it may write."""
    inputs = node.all_input_nodes
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        arguments = list(_arguments(node, target._schema))
        shared = [value for value, alias in arguments if alias is not None]
        written = [value for value, alias in arguments if alias is not None and alias.is_write]
        if not shared and target._schema.name not in _NEW and _may_return_inputs(target):
            shared = inputs
        return shared, written
    if target is operator.getitem or node.op == "call_method":
        return inputs, []
    if node.op == "output" or getattr(target, "__module__", "") in ("_operator", math.__name__):
        return [], []
    return inputs, inputs


def _arguments(node: fx.Node, schema: Any) -> Iterator[tuple[fx.Node, Any]]:
    """The nodes that an operation takes, each with what its schema says of the memory."""
    for index, argument in enumerate(schema.arguments):
        given: Any = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        for value in given if isinstance(given, list | tuple) else [given]:
            if isinstance(value, fx.Node):
                yield value, argument.alias_info


def _may_return_inputs(target: Any) -> bool:
    """Whether the operation is made of others, whose views the schema of the whole conceals."""
    key = "CompositeImplicitAutograd"
    tensors = any("Tensor" in str(returned.type) for returned in target._schema.returns)
    return tensors and torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key)


def _own_memory(module: fx.GraphModule, node: fx.Node) -> object:
    """What stands for memory that the node brings itself; tied parameters share theirs."""
    value = operator.attrgetter(str(node.target))(module) if node.op == "get_attr" else None
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else node
