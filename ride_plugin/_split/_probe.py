"""One forward with hooks: which submodules a backbone calls, in which order, on what shapes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._inputs import Inputs
from ride_plugin._tree import tensors_in

Seen = tuple[int, tuple[int, ...]]  # (address, shape) of a tensor


@dataclass
class Call:
    """One call of a submodule, and the calls inside it."""

    name: str
    module: nn.Module
    children: list[Call] = field(default_factory=list)
    inputs: list[Seen] = field(default_factory=list)
    outputs: list[Seen] = field(default_factory=list)

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
    root = Call("", model, inputs=_seen(inputs))
    stack = [root]
    alive: list[Any] = []  # addresses identify tensors only while all of them live

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        call = Call(names[id(module)], module, inputs=_seen((args, kwargs)))
        alive.append((args, kwargs))
        stack[-1].children.append(call)
        stack.append(call)

    def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        alive.append(result)
        stack.pop().outputs = _seen(result)

    handles = []
    for module in model.modules():
        if module is not model and not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        with torch.no_grad():
            output = model(*inputs[0], **inputs[1])
    finally:
        for handle in handles:
            handle.remove()
    root.outputs = _seen(output)
    return root, output


def clone_module(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Deep copy that survives activations left on modules (``self.feat = out``).

    ``deepcopy`` refuses tensors with a gradient history; they are copied without it.
    """
    memo = {} if memo is None else memo
    memo.update(detached_activations(module))
    return copy.deepcopy(module, memo)


def detached_activations(module: nn.Module) -> dict[int, Any]:
    """A deepcopy memo that maps activations kept on modules to copies without history."""
    return {
        id(tensor): tensor.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if not isinstance(value, nn.Module)
        for tensor in tensors_in(value)
        if not tensor.is_leaf
    }


def address_of(tensor: Tensor) -> int:
    """Where a tensor's data begin."""
    return tensor.data_ptr()


def _seen(value: Any) -> list[Seen]:
    return [(address_of(t), tuple(t.shape)) for t in tensors_in(value) if _has_address(t)]


def _has_address(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided


def _leaf_multiply_adds(leaf: Call) -> int:
    module = leaf.module
    if leaf.shape is None or isinstance(module, nn.Embedding):
        return 0
    weights = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
    if not weights:
        return 0
    outputs = 1
    for size in leaf.shape:
        outputs *= size
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return outputs * weights[0][0].numel()
    return outputs * weights[0].shape[-1]
