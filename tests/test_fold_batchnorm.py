"""Folding BatchNorm for serving changes time only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper
from tests.backbones import BACKBONES


def trained(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize("kind", list(BACKBONES))
def test_folded_model_gives_the_same_logits_and_leaves_the_original(kind: str) -> None:
    constructor, shape, _ = BACKBONES[kind]
    model = trained(RIDEWrapper(constructor(), 2)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    served = model.optimize_for_inference()
    x = torch.randn(6, *shape)
    expected = model.router_inputs(x)
    for got, wanted in zip(served.router_inputs(x), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    rows = torch.tensor([5, 2])
    logits, _ = served.run_expert(1, served.run_trunk(x).select(rows))
    torch.testing.assert_close(logits, expected.expert_logits[rows, 1], rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in served.modules())
    assert not any(p.requires_grad for p in served.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_batchnorm_is_kept_where_the_convolution_is_read_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.late, self.head = nn.Conv2d(4, 4, 3), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            x = torch.relu(self.bn(x)) + x
            return self.head(self.late(x).mean((2, 3)))

    model = trained(RIDEWrapper(Twice(), 2, fork_at="late")).eval()
    served = model.optimize_for_inference()
    x = torch.randn(3, 3, 16, 16)
    assert isinstance(served.trunk.bn, nn.BatchNorm2d)
    torch.testing.assert_close(served(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_in_another_precision_is_folded(dtype: torch.dtype) -> None:
    model = trained(RIDEWrapper(BACKBONES["plain convnet"][0](), 2)).eval().to(dtype)
    served = model.optimize_for_inference()
    x = torch.randn(4, *BACKBONES["plain convnet"][1], dtype=dtype)
    assert {p.dtype for p in served.parameters()} == {dtype}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in served.modules())
    error = (served(x) - model(x)).abs().max() / model(x).abs().max()
    assert error < (1e-12 if dtype == torch.float64 else 20 * torch.finfo(dtype).eps)
