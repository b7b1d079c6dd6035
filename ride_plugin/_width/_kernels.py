"""Convolutions whose kernel no layer owns: a blur that keeps one filter for each channel, say."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ride_plugin._width._layers import kind_of
from ride_plugin._width._ledger import Ledger, channels_of, sees_one_channel
from ride_plugin._width._plan import Step


def fit_kernel(ledger: Ledger, step: Step, tensors: Sequence[Tensor]) -> None:
    """Give a depthwise kernel that a module keeps as its own as many filters as channels arrive.

    Args:
        ledger: of this trial.
        step: the convolution at full width.
        tensors: its operands: input, kernel, perhaps a bias.
    """
    if not is_depthwise(step) or any(tensor.dim() == 0 for tensor in tensors):
        return
    old_in, old_out = channels_of(step.inputs[0], step.inputs[1]), step.inputs[1][0]
    new_out = channels_of(tensors[0].shape, step.inputs[1]) * old_out // old_in
    for tensor in tensors[1:]:
        for module, key in ledger.owners.get(id(tensor), ()):
            if kind_of(module) is None and tensor.shape[0] != new_out:
                ledger.resize(module, key, {0: new_out})


def is_depthwise(step: Step) -> bool:
    """Whether each filter saw one of several channels."""
    if len(step.inputs) < 2 or step.name.startswith("conv_transpose"):
        return False
    return sees_one_channel(*step.inputs[:2])


def keeps_ratio(ledger: Ledger, step: Step, tensors: Sequence[Tensor], result: Tensor) -> bool:
    """Whether each channel still leads to as many outputs, if a kernel of fixed size says how many.

    The kernel of a layer follows the widths, and so does one that a forward computes for each
    sample.
    """
    if len(tensors) < 2 or not step.outputs:
        return True
    kernel = step.inputs[1]
    old_in, new_in = channels_of(step.inputs[0], kernel), channels_of(tensors[0].shape, kernel)
    own = ledger.owners.get(id(tensors[1]), [])
    grouped = kernel[1] < old_in and own and all(kind_of(module) is None for module, _ in own)
    if not (is_depthwise(step) or (grouped and not step.name.startswith("conv_transpose"))):
        return True
    old_out, new_out = channels_of(step.outputs[0], kernel), channels_of(result.shape, kernel)
    return old_out * new_in == new_out * old_in
