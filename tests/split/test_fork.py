"""Units of a backbone, and the one at which it forks by default."""

from __future__ import annotations

import pytest
import torch

from ride_plugin._split._fork import choose_fork
from ride_plugin._split._probe import call_tree
from ride_plugin._split._units import tokens, units_of
from tests.backbones import CifarResNet, ImageNetResNet, VisionTransformer, mlp


def test_units_are_blocks_and_layers_between_them() -> None:
    root, _ = call_tree(CifarResNet(n=2).eval(), ((torch.rand(2, 3, 32, 32),), {}))
    names = [unit.name for unit in units_of(root)]
    assert names[:5] == ["conv1", "bn1", "relu", "layer1.0", "layer1.1"]
    assert names[-2:] == ["pool", "linear"]
    assert [tokens(unit) for unit in units_of(root)][-3:] == [64, 1, 1]


def test_multiply_adds_of_resnet_32_are_the_known_number() -> None:
    root, _ = call_tree(CifarResNet().eval(), ((torch.rand(1, 3, 32, 32),), {}))
    assert root.multiply_adds == pytest.approx(69.1e6, rel=0.01)  # ResNet paper: 0.69e8


@pytest.mark.parametrize(
    ("backbone", "size", "reason"),
    [
        (CifarResNet(n=1), 32, "last two of 3 resolution levels"),
        (ImageNetResNet(), 64, "last two of 5 resolution levels"),
        (VisionTransformer(), 32, "last third of 6 TransformerEncoderLayer blocks"),
    ],
)
def test_reason_for_the_default_fork(backbone, size: int, reason: str) -> None:
    root, _ = call_tree(backbone.eval(), ((torch.rand(2, 3, size, size),), {}))
    assert choose_fork(root, None).reason == reason


def test_probing_leaves_no_hook_behind() -> None:
    backbone = mlp()
    call_tree(backbone, ((torch.rand(2, 20),), {}))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())
