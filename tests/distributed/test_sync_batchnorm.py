"""SyncBatchNorm, converted before wrapping and after."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ride_plugin import RIDEWrapper, experts_loss

from ..backbones import CifarResNet
from .ranks import Ranks

convert = nn.SyncBatchNorm.convert_sync_batchnorm


def _build(order: str) -> RIDEWrapper:
    torch.manual_seed(0)
    backbone = CifarResNet(7, n=1)
    if order == "before":
        return RIDEWrapper(convert(backbone), 3)
    model = RIDEWrapper(backbone, 3)
    return convert(model) if order == "after" else model


def _gradients(model: RIDEWrapper) -> dict[str, torch.Tensor]:
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    experts_loss(nn.functional.cross_entropy, model.train()(x), torch.arange(4)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", ["before", "after"])
def test_every_layer_is_converted_and_nothing_changes_in_one_process(order: str) -> None:
    model, plain = _build(order), _build("never")
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(layers) > 10
    assert all(type(layer) is nn.SyncBatchNorm for layer in layers)
    expected, got = _gradients(plain), _gradients(model)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def _build_in_a_group(order: str) -> list[str]:
    model = _build(order)
    assert dist.is_initialized()
    for name, tensor in _build("never").state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    return [n for n, m in model.named_modules() if type(m) is nn.SyncBatchNorm]


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_build_neither_synchronises_nor_needs_an_accelerator(ranks: Ranks, order: str) -> None:
    # torch refuses such a layer in training on the CPU, where most people build their model.
    first, second = ranks(_build_in_a_group, order)
    assert first == second
    assert len(first) > 10
