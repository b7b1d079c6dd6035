"""Whether a backbone shows that it has been trained, so that fresh weights would throw it away."""

from __future__ import annotations

import torch
from torch import nn

from ride_plugin._errors import warn_caller
from ride_plugin._initialise._draw import is_constant
from ride_plugin._initialise._structure import is_structured

_DUMMIES = 8  # batches that a constructor may pass through, to find the size of the features
_ZERO, _ONE = torch.zeros(1, device="cpu"), torch.ones(1, device="cpu")


def warn_if_trained(expert: nn.Module) -> None:
    """Warn that fresh weights would throw away a training that left its traces."""
    for name, module in expert.named_modules():
        trace = _trace_of_training(module)
        if trace is not None:
            warn_caller(
                f"The backbone looks trained (`{name}` {trace}), and init='fresh' discards the "
                "weights of its forked part. Pass init='copy' to keep them, or a backbone with "
                "fresh weights."
            )
            return


def _trace_of_training(module: nn.Module) -> str | None:
    """What no initialisation in use leaves behind, in words; None if there is nothing."""
    # Its own tensors: a stand-in for a module of the trunk would answer with the trunk's.
    own = {
        name: tensor.detach()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    batches = int(own.get("num_batches_tracked", 0))
    if batches > _DUMMIES:
        return f"has seen {batches} batches"
    moved = (own.get("running_mean", _ZERO) != 0).any() | (own.get("running_var", _ONE) != 1).any()
    if not batches and bool(moved):
        return "holds running statistics"
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or not weight.is_floating_point():
        return None
    gains = "norm" in type(module).__name__.lower() and weight.dim() == 1
    gains = gains and "running_mean" not in own  # which tells, and RepVGG draws gains and biases
    # Some draw the gains at random, but then not the biases as well.
    if gains and not is_constant(weight) and (bias is None or not is_constant(bias)):
        return "has gains that differ"
    # Some set biases to values of their choice: one gate's to one, logarithms of frequencies, and
    # beside weights that are zero a grid of offsets. Training moves them up and down.
    layer = weight.dim() > 1 and not isinstance(module, nn.Bilinear)  # whose biases start larger
    if layer and bias is not None and not is_constant(weight):
        largest = 4 * weight[0].numel() ** -0.5  # torch's default draws up to a quarter of this
        if float(bias.max()) > largest and float(bias.min()) < -largest and not is_structured(bias):
            return "has biases larger than any initialisation draws"
    return None
