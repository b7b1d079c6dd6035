"""One forward with hooks: which submodules a backbone calls, in which order, on what shapes."""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ride_plugin._checks import version_of
from ride_plugin._contexts import RandomState, is_stream
from ride_plugin._inputs import Inputs, own_inputs
from ride_plugin._split._copying import contents_in
from ride_plugin._tree import CONTAINERS, OF_MODULES, Place, tensors_in

RANDOM = ("", "numpy.random and random")  # draws leave their mark as attributes do

Seen = tuple[int, tuple[int, ...]]  # (address, shape) of a tensor


@dataclass
class Call:
    """One call of a submodule, and the calls inside it.

    For the root, ``changed`` names the plain attributes ``(submodule, attribute)`` that the forward
    has set or filled: caches, counters, lists of features. ``settings`` names those that hold
    settings which it has left as they were, ``hooked`` the first module with somebody's hooks, and
    ``registers`` tells whether it has left hooks that were not there.
    """

    name: str
    module: nn.Module
    children: list[Call] = field(default_factory=list)
    inputs: list[Seen] = field(default_factory=list)
    outputs: list[Seen] = field(default_factory=list)
    version: int | None = None  # of the first input: how often it had been changed in place
    changed: set[Place] = field(default_factory=set)
    settings: frozenset[Place] = frozenset()
    hooked: str | None = None
    registers: bool = False

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of the first tensor returned."""
        return self.outputs[0][1] if self.outputs else None

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    @property
    def leaves(self) -> list[Call]:
        """The calls without calls inside, in order."""
        if not self.children:
            return [self]
        return [leaf for child in self.children for leaf in child.leaves]

    def walk(self) -> Iterator[Call]:
        """This call and those inside it, each after the calls inside it."""
        for child in self.children:
            yield from child.walk()
        yield self

    def calls_of(self, name: str) -> list[Call]:
        """The calls of one submodule."""
        return [call for call in self.walk() if call.name == name]

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of convolutions and linear layers (attention products are not counted)."""
        return sum(_leaf_multiply_adds(leaf) for leaf in self.leaves)


def call_tree(model: nn.Module, inputs: Inputs) -> tuple[Call, Any]:
    """Run ``model`` once without gradients; return the tree of calls and the output."""
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        names.setdefault(id(module), name)
    inputs = own_inputs(inputs, tensors=True)
    root = Call("", model, inputs=_seen(inputs))
    stack = [root]
    alive: list[Any] = []  # addresses identify tensors only while all of them live

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if id(module) not in names:  # a copy that the forward has made, hooks included
            return
        first = next(tensors_in((args, kwargs)), None)
        version = None if first is None else version_of(first)
        call = Call(names[id(module)], module, inputs=_seen((args, kwargs)), version=version)
        alive.append((args, kwargs))
        called.setdefault(call.name, module)
        stack[-1].children.append(call)
        stack.append(call)

    def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if id(module) not in names:
            return
        alive.append(result)
        stack.pop().outputs = _seen(result)

    num_hooks = _num_hooks(model)
    called: dict[str, nn.Module] = {}
    before_all = {name: (part, marks_of(part)) for name, part in model.named_modules()}
    settings = contents_in(model)
    random_before = RandomState.now().mark()
    unseen, handles = out_of_sight(model), []
    for module in model.modules():
        if module is not model and id(module) not in unseen:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
    try:
        with torch.no_grad():
            output = model(*inputs[0], **inputs[1])
    finally:
        for handle in handles:
            handle.remove()
    root.outputs = _seen(output)
    root.hooked = next((name for name, module in called.items() if module._forward_hooks), None)
    root.changed = {
        (name, key)
        for name, (part, old) in before_all.items()
        for now in (marks_of(part),)
        for key in {*old, *now}
        if differ(old.get(key, []), now.get(key, []))
    }
    root.registers = _num_hooks(model) > num_hooks
    now = contents_in(model)
    kept = {place for place, contents in settings.items() if now.get(place) == contents}
    root.settings = frozenset(kept - root.changed)
    if RandomState.now().mark() != random_before:
        root.changed.add(RANDOM)
    return root, output


def out_of_sight(root: nn.Module) -> set[int]:
    """Ids of modules whose calls are not noted.

    TorchScript runs no hooks, and a module that computes a weight is no step of the forward.
    """
    return {
        id(part)
        for module in root.modules()
        if isinstance(module, ParametrizationList | torch.jit.ScriptModule)
        for part in module.modules()
    }


def _num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def marks_of(module: nn.Module) -> dict[str, list[Any]]:
    """A mark of each plain attribute, which differs once somebody sets or fills it."""
    return {key: mark_of(value) for key, value in vars(module).items() if key not in OF_MODULES}


def mark_of(value: Any) -> list[Any]:
    """A value and, of a container, what is in it, of a generator of random numbers its state."""
    if isinstance(value, torch.Generator):
        return [value, sys.intern(str(hash(tuple(value.get_state().tolist()))))]
    if is_stream(value):
        return [value, sys.intern(str(hash(pickle.dumps(value))))]
    if not isinstance(value, CONTAINERS):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [value, *(mark for item in items for mark in mark_of(item))]


def differ(a: list[Any], b: list[Any]) -> bool:
    """Whether two marks are of other objects; what these are equal to is not asked."""
    return len(a) != len(b) or any(x is not y for x, y in zip(a, b, strict=True))


def _seen(value: Any) -> list[Seen]:
    return [(address_of(t), _shape_of(t)) for t in tensors_in(value)]


def _shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Its sizes, in which 0 stands for one that is no number, as a nested tensor may have.

    Those that torch's own transformer encoder makes of a mask cannot be asked for their sizes.
    """
    if tensor.is_nested and tensor.layout is torch.strided:
        return ()
    return tuple(size if type(size) is int else 0 for size in tensor.shape)


def address_of(tensor: Tensor) -> int:
    """Where a tensor's data begin; without data, a number that tells it from other tensors."""
    try:
        if tensor.is_meta:
            return hash((tensor.untyped_storage()._cdata, tensor.storage_offset()))
        return tensor.data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse, or inside vmap
        return id(tensor)


def is_same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are one, or views of all of one; of views no compiler can tell."""
    if a is b or a is None or b is None or torch.compiler.is_compiling():
        return a is b and a is not None
    return 0 != a.numel() == b.numel() and address_of(a) == address_of(b) != 0


def _leaf_multiply_adds(leaf: Call) -> int:
    module = leaf.module
    if leaf.shape is None or isinstance(module, nn.Embedding):
        return 0
    outputs = math.prod(leaf.shape)
    # Not by the weight, which need not be a parameter: it may be pruned or normalised.
    if isinstance(module, nn.modules.conv._ConvNd):
        # Each input, or each output, meets every channel of the other side in its group.
        one, others = outputs, module.in_channels
        if module.transposed:
            one, others = math.prod(leaf.inputs[0][1]), module.out_channels
        return one * (others // module.groups) * math.prod(module.kernel_size)
    if isinstance(module, nn.Linear):
        return outputs * module.in_features
    weights = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
    return outputs * max(weights, key=Tensor.numel).shape[-1] if weights else 0
