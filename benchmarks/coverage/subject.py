"""What is checked: a backbone, its wrapped forms, and how to run them."""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.architecture import Architecture
from benchmarks.coverage.compare import Failed
from benchmarks.coverage.inputs import Inputs, redrawn
from ride_plugin import RIDEWrapper
from ride_plugin._split._copying._copies import clone_module
from ride_plugin._tree import logits_in, matrices_in

_BATCH = 3


class Subject:
    """A backbone and its wrapped forms, built when first needed."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        torch.manual_seed(0)
        self.backbone = architecture.build()

    @cached_property
    def one(self) -> RIDEWrapper:
        """With one expert: the backbone itself."""
        return RIDEWrapper(self.backbone, num_experts=1)

    @cached_property
    def two(self) -> RIDEWrapper:
        """With two experts that differ."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # parameters that are not redrawn
            return RIDEWrapper(self.backbone, num_experts=2)

    @cached_property
    def inputs(self) -> Inputs:
        """A batch that the build has not seen."""
        return redrawn(self.one.example_input(_BATCH))

    def plain(self, training: bool = False) -> nn.Module:
        """A fresh copy of the backbone."""
        return clone_module(self.backbone).train(training)

    def expert_as_backbone(self, index: int) -> nn.Module:
        """The backbone with the weights of the trunk and of one expert: the hand-made split."""
        module = self.plain()
        ours: dict[str, Tensor] = {}
        for part in (self.two.trunk, self.two.experts[index]):
            ours.update(part.named_parameters(remove_duplicate=False))
            ours.update(part.named_buffers(remove_duplicate=False))
        theirs: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        theirs.update(module.named_buffers(remove_duplicate=False))
        if missing := set(theirs) - set(ours):
            raise Failed(f"not in trunk or expert: {sorted(missing)[:3]}")
        with torch.no_grad():
            for name, tensor in theirs.items():
                if tensor.shape != ours[name].shape:  # a cache in a buffer, filled by a forward
                    owner, _, buffer = name.rpartition(".")
                    setattr(module.get_submodule(owner), buffer, ours[name].clone())
                elif not torch.equal(tensor, ours[name]):
                    tensor.copy_(ours[name])
        return module


def run(module: Any, inputs: Inputs, seed: int = 0) -> Tensor:
    """Logits of a module on inputs."""
    torch.manual_seed(seed)
    output = module(*inputs[0], **inputs[1])
    logits = logits_in(output)
    if logits is not None:
        return logits
    for _, matrix in matrices_in(output):  # in training, with auxiliary heads: ours come first
        return matrix
    raise Failed("no logits")


def run_wrapped(model: RIDEWrapper, inputs: Inputs, seed: int = 0) -> Tensor:
    """The output of a wrapped model, which carries its expert logits."""
    torch.manual_seed(seed)
    return model(*inputs[0], **inputs[1])


def unfused(module: nn.Module) -> nn.Module:
    """Keep torch's transformer layers from their fused kernel, as any hook does."""
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.register_forward_hook(lambda *_: None)
    return module
