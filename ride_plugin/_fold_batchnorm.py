"""A copy of a wrapped model for serving: frozen, with BatchNorm folded into convolutions."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from ride_plugin._closeness import close

if TYPE_CHECKING:
    from ride_plugin._wrapper import RIDEWrapper

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TOLERANCE = 5e-6  # of a number, and as much of the largest one
Model = TypeVar("Model", bound="RIDEWrapper")


def folded_copy(model: Model) -> Model:
    """A copy in evaluation mode, frozen, whose BatchNorm layers are folded where that is exact."""
    served = copy.deepcopy(model).eval().requires_grad_(False)
    args, kwargs = served.example_input(2)
    with torch.no_grad():
        expected = served.router_inputs(*args, **kwargs).expert_logits
        for name, bn_name in _pairs(served):
            layer, bn = served.get_submodule(name), served.get_submodule(bn_name)
            weight, bias = layer.weight, layer.bias
            _fold(layer, bn)
            served.set_submodule(bn_name, _identity_in_place_of(bn))
            got = served.router_inputs(*args, **kwargs).expert_logits
            units = max(_TOLERANCE / torch.finfo(got.dtype).eps, 4)  # half: a layer's own rounding
            if not close(got, expected, units):  # somebody else reads what the layer returns
                layer.weight, layer.bias = weight, bias
                served.set_submodule(bn_name, bn)
    return served


def _pairs(model: RIDEWrapper) -> list[tuple[str, str]]:
    """Names of (convolution or linear layer, BatchNorm) where one feeds the other."""
    made_by: dict[int, str] = {}
    found: list[tuple[str, str]] = []
    alive: list[Tensor] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (*_CONVOLUTIONS, nn.Linear)):

            def remember(
                layer: nn.Module, inputs: object, result: Tensor, name: str = name
            ) -> None:
                alive.append(result)  # an address names a tensor only while that tensor lives
                made_by[result.data_ptr()] = name

            handles.append(module.register_forward_hook(remember))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:

            def match(layer: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                source = made_by.get(inputs[0].data_ptr())
                if source is not None:
                    found.append((source, name))

            handles.append(module.register_forward_pre_hook(match))
    args, kwargs = model.example_input(2)
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    # A layer that runs twice, or feeds two BatchNorms, has no single place to fold into.
    return [pair for pair in found if sum(pair[0] == f[0] or pair[1] == f[1] for f in found) == 1]


def _fold(layer: Any, bn: Any) -> None:
    fuse: Any = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    statistics = bn.running_mean, bn.running_var, bn.eps
    layer.weight, layer.bias = fuse(layer.weight, layer.bias, *statistics, bn.weight, bn.bias)
    layer.requires_grad_(False)


def _identity_in_place_of(bn: nn.Module) -> nn.Module:
    """The identity inherits the hooks by which the wrapper records what runs in the trunk."""
    identity = nn.Identity().eval()
    identity._forward_hooks = bn._forward_hooks
    identity._forward_pre_hooks = bn._forward_pre_hooks
    return identity
