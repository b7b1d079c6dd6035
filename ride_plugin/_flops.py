"""FLOPs of one call: what torch's counter knows, and the operations that it leaves out.

Torch counts matrix products, convolutions and attention by the operation that carries them out, and
knows only some of these. A processor's own kernels for attention and recurrent layers, products in
groups or in place, and those of a matrix and a vector would count as nothing. What still does is
named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ride_plugin._errors import listed, warn_caller
from ride_plugin._tree import tensors_in

_ATEN = torch.ops.aten
Shape = tuple[int, ...]

# Parts of an operation's name that tell a product, but not `digamma`, `hamming`, `comm`, `convert`.
_PRODUCT = re.compile(r"(?<!co)(?<!sy)mm\d*(_|$)|matmul|conv(?!er|ex)|att(entio)?n|dot(_|$)|einsum")
# Not counted by what the documentation says, no product of a forward, or none at all.
_LEFT_OUT = re.compile(
    r"quant|sparse|spmm|sddmm|int[48]|[48]bit|q(linear|conv|mm|matmul)|backward|bwd|_grad"
    r"|(^|_)(pre|un)?pack(_|$)|reorder"
)
_named: set[str] = set()  # operations that a warning has told of in this process


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
        # The counter takes operations apart as far as it can and hands on what it then runs.
        with (
            _Carried() as carried,
            FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter,
            _VectorProducts() as vectors,
        ):
            result = function(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for parameter in trained:
            parameter.requires_grad_(True)
    if new := carried.products - {str(known) for known in counter.flop_registry} - _named:
        _named.update(new)
        warn_caller(
            f"FLOPs of {listed(new)} count as nothing, since it is not known how many there are. "
            "Tell torch's counter: `torch.utils.flop_counter.register_flop_formula`."
        )
    return counter.get_total_flops() + vectors.flops, result


class _Carried(TorchDispatchMode):
    """What is carried out, of operations that are products by their names."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(function).rpartition(".")[0]  # without the overload
        lower = name.lower()
        if _PRODUCT.search(lower.partition(".")[2]) and not _LEFT_OUT.search(lower):
            tensors = list(tensors_in((args, kwargs)))
            dense = all(tensor.layout == torch.strided for tensor in tensors)
            if dense and any(tensor.is_floating_point() for tensor in tensors):
                self.products.add(name)
        return function(*args, **kwargs)


class _VectorProducts(TorchFunctionMode):
    """Many products of two vectors, which torch carries out as a product and a sum of entries."""

    flops = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.linalg.vecdot and result.dim():  # two vectors are one operation
            x, y, *_ = tensors_in((args, kwargs))
            self.flops += 2 * prod(torch.broadcast_shapes(x.shape, y.shape))
        return result


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


def _product_by_groups(first: Shape, second: Shape, *_: Any, **__: Any) -> int:
    """Groups are matrices of their own in both, or parts of a dimension of one or of both."""
    of_all_groups = first if len(second) == 3 else first[-2:]
    return 2 * prod(of_all_groups) * second[-1]


def _several_products(first: Iterable[Shape], second: Iterable[Shape], **_: Any) -> int:
    return sum(2 * prod(a) * b[-1] for a, b in zip(first, second, strict=True))


def _distances(first: Shape, second: Shape, *_: Any, **__: Any) -> int:
    """A product of matrices to which the squared lengths of the rows are added as two columns."""
    return 2 * prod(first[:-1]) * (first[-1] + 2) * second[-2]


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
    "addmv_": _sum_and_matrix_vector,
    "addmm_": _sum_of_products,
    "addbmm": _sum_of_products,
    "addbmm_": _sum_of_products,
    "baddbmm_": _sum_of_products,
    "_addmm_activation": _sum_of_products,
    "_scaled_mm_v2": _product_by_groups,
    "_grouped_mm": _product_by_groups,
    "_scaled_grouped_mm": _product_by_groups,
    "_scaled_grouped_mm_v2": _product_by_groups,
    "_foreach_mm": _several_products,
    "_euclidean_dist": _distances,
    "conv_tbc": _temporal_convolution,
    "_trilinear": _trilinear,
}
# Not every version of torch has all of them.
_FORMULAS = {getattr(_ATEN, name): f for name, f in _BY_NAME.items() if hasattr(_ATEN, name)}
