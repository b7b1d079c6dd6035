"""Stages own their weights: torch.export lends a program the very tensors of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ride_plugin._tree import cloned


def own_weights_of_program(program: ExportedProgram) -> None:
    """Put copies in the place of the tensors that a program shares with the exported model.

    What is done to the model later (training, another state dict) must not reach the program.
    """
    _put_copies([program.state_dict, program.constants])


def own_weights_of_module(module: nn.Module) -> None:
    """Put copies in the place of all parameters and buffers; none requires gradients."""
    parts = list(module.modules())
    _put_copies([part._parameters for part in parts] + [part._buffers for part in parts])
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def _put_copies(places: list[dict[str, Any]]) -> None:
    tensors = [v for held in places for v in held.values() if isinstance(v, Tensor)]
    copies = {id(tensor): tensor for tensor in tensors}  # a tensor under two names stays one
    # Under inference mode copies would be such that nobody can load other weights into later.
    with torch.inference_mode(False), torch.no_grad():
        copies = {key: cloned(tensor) for key, tensor in copies.items()}
    for held in places:
        held.update({k: copies[id(v)] for k, v in held.items() if isinstance(v, Tensor)})
