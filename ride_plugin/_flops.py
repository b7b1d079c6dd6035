"""FLOPs of one call: what torch's counter knows, and the operations that it leaves out.

Torch counts matrix products, convolutions and attention by the operation that carries them out, and
knows only some of these. A processor's own kernels for attention and recurrent layers, and products
of a matrix and a vector, would count as nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_ATEN = torch.ops.aten
Shape = tuple[int, ...]


def counted(module: Any, function: Any, *args: Any, **kwargs: Any) -> tuple[int, Any]:
    """FLOPs of ``function(*args, **kwargs)``, which runs ``module``, and what it returned."""
    # The fused encoder layer is one operation to the counter, of which it knows nothing.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # The counter hooks every tensor that wants a gradient and enters a module, which without a
    # graph fails on a parameter that a backbone hands to a submodule.
    parameters = module.parameters() if hasattr(module, "parameters") else ()  # a plain router
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            result = function(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for parameter in trained:
            parameter.requires_grad_(True)
    return counter.get_total_flops(), result


# Each formula takes what its operation takes, with every tensor replaced by its shape.


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Several query heads may share a key and a value; a mask saves nothing."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent_stack(x: Shape, weights: Iterable[Shape], *_: Any, **__: Any) -> int:
    """Each weight matrix meets every step of every sequence once."""
    matrices = sum(prod(shape) for shape in weights if len(shape) == 2)
    return 2 * prod(x[:-1]) * matrices


def _recurrent_layer(x: Shape, weight_0: Shape, weight_1: Shape, *_: Any, **__: Any) -> int:
    return _recurrent_stack(x, (weight_0, weight_1))


def _matrix_vector(matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def _sum_and_matrix_vector(_: Shape, matrix: Shape, *__: Any, **___: Any) -> int:
    return 2 * prod(matrix)


def _sum_of_products(_: Shape, first: Shape, second: Shape, *__: Any, **___: Any) -> int:
    return 2 * prod(first) * second[-1]


def _temporal_convolution(_: Shape, weight: Shape, *__: Any, out_shape: Shape, **___: Any) -> int:
    return 2 * prod(out_shape[:-1]) * prod(weight)


def _trilinear(*arguments: Any, **_: Any) -> int:
    """A product of three tensors, each of which is first given dimensions of size one."""
    sizes: list[list[int]] = []
    for shape, added in zip(arguments[:3], arguments[3:6], strict=True):
        size = list(shape)
        for dim in sorted(added):
            size.insert(dim, 1)
        sizes.append(size)
    return int(2 * prod(max(of_dim) for of_dim in zip(*sizes, strict=True)))


_BY_NAME: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_attention_math_for_mps": _attention,
    # Torch counts these three, but some of its versions fail where query heads share a key.
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "mkldnn_rnn_layer": _recurrent_layer,
    "_cudnn_rnn": _recurrent_stack,
    "miopen_rnn": _recurrent_stack,
    "mv": _matrix_vector,
    "dot": _matrix_vector,
    "vdot": _matrix_vector,
    "addmv": _sum_and_matrix_vector,
    "addbmm": _sum_of_products,
    "conv_tbc": _temporal_convolution,
    "_trilinear": _trilinear,
}
# Not every version of torch has all of them.
_FORMULAS = {getattr(_ATEN, name): f for name, f in _BY_NAME.items() if hasattr(_ATEN, name)}
