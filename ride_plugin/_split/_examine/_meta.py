"""Passes on the meta device, where tensors have shapes and no contents.

Most of what a build learns are shapes, and these cost hardly any time or memory there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ride_plugin._tree import map_tensors, tensors_in

T = TypeVar("T")
_META = torch.device("meta")


@contextmanager
def on_meta(inputs: T, meta: bool) -> Iterator[T]:
    """Inputs for a pass on the meta device, where tensors are also made while the block runs.

    Whole numbers keep their contents, since a forward may decide by them: whether a mask hides
    anything, say.
    """
    if not meta:
        yield inputs
        return

    def emptied(tensor: Tensor) -> Tensor:
        return tensor if _keeps_contents(tensor) else tensor.detach().to(_META)

    with _META, _QuickShapes(), _MixedDevices():
        yield map_tensors(emptied, inputs)


def _keeps_contents(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


class _MixedDevices(TorchFunctionMode):
    """Lets whole numbers keep their contents beside tensors that have none.

    What is computed from both has none. Nothing may be written into a tensor whose contents were
    left out for an operation, and nothing may share its memory: that would be lost.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and not args[0].is_meta:
            return _moved(*args, **kwargs)
        given = list(tensors_in((args, kwargs)))
        if len(given) < 2 or len({tensor.is_meta for tensor in given}) < 2:
            return func(*args, **kwargs)
        emptied = {id(tensor): tensor.to(_META) for tensor in given if not tensor.is_meta}
        args, kwargs = map_tensors(lambda tensor: emptied.get(id(tensor), tensor), (args, kwargs))
        result = func(*args, **kwargs)
        memory = {tensor.untyped_storage()._cdata for tensor in emptied.values()}
        if any(tensor._version for tensor in emptied.values()) or any(
            tensor.untyped_storage()._cdata in memory for tensor in tensors_in(result)
        ):
            name = getattr(func, "__name__", "an operation")
            raise NotImplementedError(f"{name} writes a tensor with contents, or returns a view.")
        return result


def _moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``tensor.to(...)``, but whole numbers that go to the others keep their contents."""

    def here(value: Any) -> Any:
        return tensor.device if isinstance(value, torch.device) and value == _META else value

    moved = tensor.to(*map(here, args), **{key: here(value) for key, value in kwargs.items()})
    return moved if _keeps_contents(moved) else moved.to(_META)


class _QuickShapes(TorchFunctionMode):
    """Operations on tensors without contents, by others of the same result's shape.

    Of most operations torch works the shape out in Python, which takes longer than a small layer
    itself; of convolutions it does not. The result depends on the same tensors. (Batch
    normalisation writes its statistics without counting their versions, so nothing is lost where
    they stay.)
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        quick = _QUICK.get(func)
        if quick is not None and args and "out" not in kwargs:
            given = tensors_in((args, kwargs))
            if all(tensor.is_meta and tensor.is_floating_point() for tensor in given):
                with torch._C.DisableTorchFunction():
                    result = quick(*args, **kwargs)
                if result is not None:
                    return result
        return func(*args, **kwargs)  # torch shall work it out, or say what is wrong


def _batch_norm(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if training and x.numel() == x.shape[1]:  # a single value in each channel
        return None
    if weight is None or bias is None or not x.shape[1:2] == weight.shape == bias.shape:
        return None
    return _scaled(x, weight, bias, x.shape)


def _layer_norm(
    x: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if weight is None or bias is None:
        return None
    if not x.shape[-len(shape) :] == weight.shape == bias.shape == torch.Size(shape):
        return None
    return _scaled(x.reshape(-1, weight.numel()), weight.flatten(), bias.flatten(), x.shape)


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if x.shape[1] % num_groups:
        return None
    return _batch_norm(x, None, None, weight, bias)


def _scaled(x: Tensor, weight: Tensor, bias: Tensor, shape: torch.Size) -> Tensor | None:
    if not x.dtype == weight.dtype == bias.dtype or not x.numel():
        return None
    groups = len(weight)
    x = x.reshape(len(x), groups, -1)
    return F.conv1d(x, weight.view(-1, 1, 1), bias, groups=groups).view(shape)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if bias is None or bias.shape != weight.shape[:1] or x.shape[-1:] != weight.shape[1:]:
        return None
    if not x.dtype == weight.dtype == bias.dtype or not x.numel():
        return None
    rows = x.reshape(-1, x.shape[-1], 1)
    return F.conv1d(rows, weight.unsqueeze(2), bias).view(*x.shape[:-1], len(weight))


def _add(x: Tensor, other: Any, *, alpha: float = 1) -> Tensor | None:
    if isinstance(other, Tensor) and (other.shape != x.shape or other.dtype != x.dtype):
        return None
    return x.clone().add_(other) if isinstance(x, Tensor) else None


def _activation(x: Tensor, *settings: Any, inplace: bool = False, **others: Any) -> Tensor | None:
    return None if inplace or any(value is True for value in settings) else F.silu(x)


def _dropout(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor | None:
    return F.silu(x) if training and 0 < p < 1 and not inplace else None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if enable_gqa or attn_mask is not None:
        return None
    return (query @ key.transpose(-2, -1)).softmax(-1) @ value


def _recurrent(
    x: Tensor,
    start: Any,
    weights: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """LSTM, GRU and plain recurrent layers, which torch would unroll step by step."""
    states = [start] if isinstance(start, Tensor) else list(start)
    directions = 2 if bidirectional else 1
    rows = x.shape[0 if batch_first else 1] if x.dim() == 3 else -1
    expected = torch.Size((num_layers * directions, rows))
    if not x.numel() or x.shape[2:] != weights[0].shape[1:]:
        return None
    if any(state.shape[:2] != expected for state in states):
        return None
    if any(tensor.dtype != x.dtype for tensor in (*states, *weights)):
        return None
    read = torch.cat([weight.reshape(-1)[:1] for weight in weights]).sum()
    each = F.conv1d(x.reshape(-1, x.shape[2], 1), weights[0][:1].unsqueeze(2))
    out = each.view(*x.shape[:2], 1).add_(read)
    out = out.expand(*x.shape[:2], directions * states[0].shape[2]).contiguous()
    last = [state.clone().add_(out.flatten()[0]) for state in states]
    return (out, *last)


_QUICK: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.linear: _linear,
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu, F.relu6, F.gelu, F.elu), _activation),
    **dict.fromkeys((F.leaky_relu, F.hardtanh, F.hardswish, F.hardsigmoid), _activation),
    F.dropout: _dropout,
    Tensor.add: _add,
    torch.add: _add,
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent),
}
