"""Backbones that checkpoint activations: the same gradients, or an error that says what works."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.zoo.images import conv_bn
from ride_plugin import ReplayError, RIDEWrapper, experts_loss


class Checkpointing(nn.Module):
    """Stages of two blocks, checkpointed stage by stage, block by block, or all at once."""

    how = ""
    use_reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(conv_bn(3, 8), conv_bn(8, 8))
        self.layer2 = conv_bn(8, 16, 2)
        self.layer3 = nn.Sequential(conv_bn(16, 24, 2), conv_bn(24, 24))
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        stages: list[nn.Module] = [self.layer1, self.layer2, self.layer3]
        if self.how == "blocks":  # the stages themselves are not called
            stages = [*self.layer1, self.layer2, *self.layer3]
        if self.how == "all":
            x = self._run(self._body, x)
        else:
            for stage in stages:
                x = self._run(stage, x)
        return self.fc(x.mean((2, 3)))

    def _run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not (self.how and self.training):
            return function(x)
        return checkpoint(function, x, use_reentrant=self.use_reentrant)

    def _body(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(x)))


def set_how(model: nn.Module, how: str) -> None:
    for module in model.modules():
        if isinstance(module, Checkpointing):
            module.how = how


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    target = torch.arange(len(x)) % 10
    experts_loss(nn.functional.cross_entropy, model(x), target).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("how", ["stages", "blocks"])
def test_gradients_are_those_without_checkpointing(
    how: str, use_reentrant: bool, when: str
) -> None:
    backbone = Checkpointing()
    backbone.use_reentrant = use_reentrant
    if when == "before":
        set_how(backbone, how)
    model = RIDEWrapper(backbone, 3, fork_at="layer3")
    plain = copy.deepcopy(model)
    set_how(plain, "")
    set_how(model, how)
    x = torch.randn(4, 3, 12, 12, requires_grad=True)  # or reentrant checkpoints stop gradients
    expected, got = gradients(plain, x), gradients(model, x)
    for name, gradient in expected.items():
        assert gradient is not None
        assert got[name] is not None, name
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
def test_one_region_across_the_fork_is_refused(when: str) -> None:
    backbone = Checkpointing()
    set_how(backbone, "all" if when == "before" else "")
    model = RIDEWrapper(backbone, 2, fork_at="layer3")
    set_how(model, "all")
    with pytest.raises(ReplayError, match="checkpoint_experts=True"):
        gradients(model, torch.randn(4, 3, 12, 12))
