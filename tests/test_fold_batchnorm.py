"""Folding BatchNorm for serving changes time only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from ride_plugin import RIDEWrapper
from tests.backbones import BACKBONES


def trained(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
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


class Net(nn.Module):
    """A stem, then what ``between`` makes of a layer and a BatchNorm, then a classifier."""

    def __init__(
        self,
        between: Callable[[nn.Module, nn.Module, Tensor], Tensor],
        layer: nn.Module,
        norm: nn.Module,
    ) -> None:
        super().__init__()
        conv = isinstance(layer, nn.Conv2d)
        self.stem = nn.Conv2d(3, 8, 3) if conv else nn.Linear(12, 8)
        self.between, self.layer, self.norm = between, layer, norm
        self.head = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.layer, self.norm, self.stem(x).relu()).relu()
        return self.head(x.flatten(2).mean(2) if x.dim() == 4 else x.flatten(1))


def by_halves(layer: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    x = layer(x)
    return torch.cat([norm(x[:, :8]), x[:, 8:]], 1)


IMAGES, ROWS, SEQUENCES = (3, 8, 8), (12,), (6, 12)
FORMS: dict[str, tuple[Any, Any, Any, tuple[int, ...], bool]] = {
    "as it is": (lambda f, bn, x: bn(f(x)), nn.Conv2d(8, 16, 3), 16, IMAGES, True),
    "by keyword": (lambda f, bn, x: bn(input=f(x)), nn.Conv2d(8, 16, 3), 16, IMAGES, True),
    "linear": (lambda f, bn, x: bn(f(x)), nn.Linear(8, 16), 16, ROWS, True),
    "channels last": (
        lambda f, bn, x: bn(f(x).transpose(1, 2)), nn.Linear(8, 7), 7, SEQUENCES, True
    ),
    "square, channels last": (
        lambda f, bn, x: bn(f(x).transpose(1, 2)), nn.Linear(8, 6), 6, SEQUENCES, True
    ),
    "heads": (lambda f, bn, x: bn(f(x).view(-1, 4, 4)), nn.Linear(8, 16), 4, ROWS, False),
    "a slice": (by_halves, nn.Conv2d(8, 16, 3), 8, IMAGES, False),
    "positions": (lambda f, bn, x: bn(f(x)), nn.Linear(8, 7), 6, SEQUENCES, False),
    "as many positions": (lambda f, bn, x: bn(f(x)), nn.Linear(8, 6), 6, SEQUENCES, False),
    "rows of one": (
        lambda f, bn, x: torch.cat([bn(f(x)[:1]), f(x)[1:]]), nn.Conv2d(8, 16, 3), 16, IMAGES, False
    ),
    "old weight norm": (
        lambda f, bn, x: bn(f(x)), lambda: weight_norm(nn.Conv2d(8, 16, 3)), 16, IMAGES, False
    ),
    "old spectral norm": (
        lambda f, bn, x: bn(f(x)), lambda: spectral_norm(nn.Conv2d(8, 16, 3)), 16, IMAGES, False
    ),
    "weight norm": (
        lambda f, bn, x: bn(f(x)),
        lambda: parametrizations.weight_norm(nn.Conv2d(8, 16, 3)), 16, IMAGES, False,
    ),
    "spectral norm": (
        lambda f, bn, x: bn(f(x)),
        lambda: parametrizations.spectral_norm(nn.Linear(8, 16)), 16, ROWS, False,
    ),
    "bias norm": (
        lambda f, bn, x: bn(f(x)),
        lambda: parametrizations.weight_norm(nn.Linear(8, 16), "bias", None), 16, ROWS, False,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.* is deprecated")
@pytest.mark.parametrize("name", list(FORMS))
def test_what_is_folded_and_what_stays(name: str) -> None:
    torch.manual_seed(0)
    between, layer, size, shape, folded = FORMS[name]
    norm = nn.BatchNorm2d(size) if shape == IMAGES else nn.BatchNorm1d(size)
    net = Net(between, copy.deepcopy(layer) if isinstance(layer, nn.Module) else layer(), norm)
    example = torch.randn(2, *shape)
    net.eval()(example)
    model = trained(RIDEWrapper(net, 2, fork_at="layer", example_input=example)).eval()
    served = model.optimize_for_inference()
    x = torch.randn(6, *shape)
    torch.testing.assert_close(served(x), model(x), rtol=1e-4, atol=1e-5)
    kept = [isinstance(expert.norm, type(norm)) for expert in served.experts]
    assert kept == [not folded] * 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [IMAGES, ROWS])
def test_a_batchnorm_without_weight_is_folded(shape: tuple[int, ...], bias: bool) -> None:
    layer: nn.Module = nn.Conv2d(8, 16, 3, bias=bias)
    norm: nn.Module = nn.BatchNorm2d(16, affine=False)
    if shape == ROWS:
        layer, norm = nn.Linear(8, 16, bias), nn.BatchNorm1d(16, affine=False)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    net = Net(directly, layer, norm)
    example = torch.randn(2, *shape)
    net.eval()(example)
    model = RIDEWrapper(net, 2, init="copy", fork_at="layer", example_input=example).eval()
    served = model.optimize_for_inference()
    x = torch.randn(6, *shape)
    assert not any(isinstance(expert.norm, type(norm)) for expert in served.experts)
    torch.testing.assert_close(served(x), model(x), rtol=1e-4, atol=1e-5)


class NormAndReLU(nn.BatchNorm2d):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(x).relu()


def test_a_batchnorm_that_does_more_stays() -> None:
    net = Net(lambda f, bn, x: bn(f(x), 2.0), nn.Conv2d(8, 16, 3), NormAndReLU(16))
    example = torch.randn(2, *IMAGES)
    net.eval()(example)
    model = trained(RIDEWrapper(net, 2, fork_at="layer", example_input=example)).eval()
    served = model.optimize_for_inference()
    x = torch.randn(6, *IMAGES)
    torch.testing.assert_close(served(x), model(x))
    assert all(isinstance(expert.norm, NormAndReLU) for expert in served.experts)


def test_a_hook_that_takes_keywords_is_called_with_them() -> None:
    net = Net(lambda f, bn, x: bn(input=f(x)), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))
    example = torch.randn(2, *IMAGES)
    net.eval()(example)
    model = trained(RIDEWrapper(net, 2, fork_at="layer", example_input=example)).eval()
    seen: list[list[str]] = []
    for expert in model.experts:
        expert.norm.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(list(kwargs)), with_kwargs=True
        )
        expert.norm.register_forward_hook(
            lambda module, args, kwargs, result: seen.append(list(kwargs)), with_kwargs=True
        )
    served = model.optimize_for_inference()
    seen.clear()
    served(torch.randn(6, *IMAGES))
    assert seen == [["input"]] * 4


def bounded(x: Tensor) -> Tensor:
    return x.clamp(-2, 2)


class BoundedConvolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return bounded(super().forward(x))


class BoundedKernel(nn.Conv2d):
    def _conv_forward(self, x: Tensor, *weights: Tensor) -> Tensor:
        return bounded(super()._conv_forward(x, *weights))


def with_hook(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, result: bounded(result))
    return layer


def bounded_forward(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return bounded(nn.Conv2d.forward(layer, x))


def with_forward(layer: nn.Module) -> nn.Module:
    layer.forward = MethodType(bounded_forward, layer)
    return layer


def directly(layer: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    return norm(layer(x))


def in_place(layer: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    return norm(layer(x).clamp_(-2, 2))


def by_a_mask(layer: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    x = layer(x)
    return norm(x.masked_fill_(x > 2, 0.0))


def in_a_view(layer: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    x = layer(x)
    x[:, :8].clamp_(-2, 2)
    return norm(x)


BETWEEN: dict[str, tuple[Any, Any]] = {
    "in place": (in_place, lambda: nn.Conv2d(8, 16, 3)),
    "by a mask": (by_a_mask, lambda: nn.Conv2d(8, 16, 3)),
    "in a view": (in_a_view, lambda: nn.Conv2d(8, 16, 3)),
    "by a hook": (directly, lambda: with_hook(nn.Conv2d(8, 16, 3))),
    "by a subclass": (directly, lambda: BoundedConvolution(8, 16, 3)),
    "by a subclass's kernel": (directly, lambda: BoundedKernel(8, 16, 3)),
    "by a forward of its own": (directly, lambda: with_forward(nn.Conv2d(8, 16, 3))),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", list(BETWEEN))
def test_what_does_nothing_to_the_example_keeps_the_batchnorm(name: str, inference: bool) -> None:
    between, layer = BETWEEN[name]
    example = torch.randn(2, *IMAGES) / 100
    net = Net(between, layer(), nn.BatchNorm2d(16))
    net.eval()(example)
    model = trained(RIDEWrapper(net, 2, fork_at="layer", example_input=example)).eval()
    with torch.inference_mode(inference):
        served = model.optimize_for_inference()
    assert all(isinstance(expert.norm, nn.BatchNorm2d) for expert in served.experts)
    x = 30 * torch.randn(6, *IMAGES)
    torch.testing.assert_close(served(x), model(x), rtol=1e-4, atol=1e-5)


class NamedConvolution(nn.Conv2d):
    """A subclass that adds a name and computes nothing else."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.name = "late"


def test_a_subclass_without_a_forward_of_its_own_is_folded_also_in_inference_mode() -> None:
    example = torch.randn(2, *IMAGES)
    net = Net(directly, NamedConvolution(8, 16, 3), nn.BatchNorm2d(16))
    net.eval()(example)
    model = trained(RIDEWrapper(net, 2, fork_at="layer", example_input=example)).eval()
    with torch.inference_mode():
        served = model.optimize_for_inference()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in served.modules())
    assert not any(parameter.is_inference() for parameter in served.parameters())
    x = torch.randn(6, *IMAGES)
    torch.testing.assert_close(served(x), model(x), rtol=1e-4, atol=1e-5)


class Reads(nn.Module):
    """Asks a BatchNorm in the trunk and one in the experts for more than a call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.b, self.bn_b = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.c, self.bn_c = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn_a(self.a(x).to(self.bn_a.weight.dtype)))
        x = torch.relu(self.bn_b(self.b(x).to(self.bn_b.running_mean)))
        return self.fc(torch.relu(self.bn_c(self.c(x))))


def test_a_batchnorm_that_the_forward_asks_for_an_attribute_stays() -> None:
    model = trained(RIDEWrapper(Reads(), 2, fork_at="b", example_input=torch.randn(4, 8))).eval()
    served = model.optimize_for_inference()
    x = torch.randn(6, 8)
    torch.testing.assert_close(served(x), model(x), rtol=1e-4, atol=1e-5)
    kept = [name for name, m in served.named_modules() if isinstance(m, nn.BatchNorm1d)]
    assert kept == ["trunk.bn_a", "experts.0.bn_b", "experts.1.bn_b"]
