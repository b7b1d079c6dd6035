"""A copy of a wrapped model for serving: frozen, with BatchNorm folded into convolutions."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ride_plugin._closeness import close

if TYPE_CHECKING:
    from ride_plugin._wrapper import RIDEWrapper

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm)
_TOLERANCE = 5e-6  # of a number, and as much of the largest one
Model = TypeVar("Model", bound="RIDEWrapper")


def folded_copy(model: Model) -> Model:
    """A copy in evaluation mode, frozen, whose BatchNorm layers are folded where that is exact."""
    # Tensors made in inference mode do not tell whether somebody has written into them.
    with torch.inference_mode(False), torch.no_grad():
        served = copy.deepcopy(model).eval().requires_grad_(False)
        args, kwargs = served.example_input(2)
        expected = served.router_inputs(*args, **kwargs).expert_logits
        units = max(_TOLERANCE / torch.finfo(expected.dtype).eps, 4)  # half: a layer's own rounding
        for name, bn_name in _pairs(served):
            layer, bn = served.get_submodule(name), served.get_submodule(bn_name)
            weight, bias = layer.weight, layer.bias
            _fold(layer, bn)
            served.set_submodule(bn_name, _identity_in_place_of(bn))
            try:
                got = served.router_inputs(*args, **kwargs).expert_logits
            except Exception:  # the forward asks the BatchNorm for its weight, say
                got = None
            if not close(got, expected, units):  # somebody else reads what the layer returns
                layer.weight, layer.bias = weight, bias
                served.set_submodule(bn_name, bn)
    return served


def _pairs(model: RIDEWrapper) -> list[tuple[str, str]]:
    """Names of (convolution or linear layer, BatchNorm) where one feeds the other."""
    made_by: dict[int, tuple[str, _Channels, int]] = {}
    found: list[tuple[str, str]] = []
    alive: list[Tensor] = []
    handles = []
    for name, module in model.named_modules():
        if _is_foldable(module):

            def remember(layer: Any, inputs: object, result: object, name: str = name) -> None:
                if isinstance(result, Tensor):
                    alive.append(result)  # an address names a tensor only while that tensor lives
                    channels = _Channels.of(result, result.dim() - layer.weight.dim() + 1)
                    made_by[result.data_ptr()] = name, channels, result._version

            # Before other hooks, since one may change the result.
            handles.append(module.register_forward_hook(remember, prepend=True))
        elif _is_plain_batchnorm(module):

            def match(
                layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], name: str = name
            ) -> None:
                x = inputs[0] if inputs else named["input"]
                source, *made = made_by.get(x.data_ptr(), (None,))
                # A mask that is written into it may do nothing to the example, and counts here.
                if source is not None and made == [_Channels.of(x, 1), x._version]:
                    found.append((source, name))

            handles.append(module.register_forward_pre_hook(match, with_kwargs=True))
    args, kwargs = model.example_input(2)
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    # A layer that runs twice, or feeds two BatchNorms, has no single place to fold into.
    return [pair for pair in found if sum(pair[0] == f[0] or pair[1] == f[1] for f in found) == 1]


class _Channels(NamedTuple):
    """Where a tensor has its channels: views of one tensor agree if these are the same for both."""

    number: int
    stride: int
    elements: int  # of the whole tensor; a part of it is another tensor

    @classmethod
    def of(cls, tensor: Tensor, dim: int) -> _Channels:
        return cls(tensor.shape[dim], tensor.stride(dim), tensor.numel())


def _is_foldable(module: nn.Module) -> bool:
    """A layer whose weight and bias are parameters of its own, and not computed in each pass."""
    plain = module._parameters
    return _runs_as_one_of(module, _LAYERS) and plain.get("weight") is not None and "bias" in plain


def _is_plain_batchnorm(module: nn.Module) -> bool:
    return _runs_as_one_of(module, _NORMS) and module.running_var is not None


def _runs_as_one_of(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether it does nothing else, as a subclass or a forward of its own with a ReLU does."""
    return "forward" not in vars(module) and any(
        isinstance(module, kind)
        and all(
            getattr(type(module), name, None) is getattr(kind, name, None)
            for name in ("forward", "_conv_forward")
        )
        for kind in kinds
    )


def _fold(layer: Any, bn: Any) -> None:
    statistics = bn.running_mean, bn.running_var, bn.eps
    # Right for linear layers too, for which torch's own function needs a weight of the BatchNorm.
    layer.weight, layer.bias = fuse_conv_bn_weights(
        layer.weight, layer.bias, *statistics, bn.weight, bn.bias
    )
    layer.requires_grad_(False)


def _identity_in_place_of(bn: nn.Module) -> nn.Module:
    """The identity inherits the hooks by which the wrapper records what runs in the trunk."""
    identity = nn.Identity().eval()
    identity._forward_hooks = bn._forward_hooks
    identity._forward_pre_hooks = bn._forward_pre_hooks
    identity._forward_hooks_with_kwargs = bn._forward_hooks_with_kwargs
    identity._forward_pre_hooks_with_kwargs = bn._forward_pre_hooks_with_kwargs
    return identity
