"""Building changes no state: neither the backbone's nor what experts start with."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization

from ride_plugin import RIDEWrapper, SplitError, WidthError
from tests.naive import train_both


class Observer(nn.Module):
    """Counts and measures in evaluation too, in every way that is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.kept: list[Tensor] = []
        self.register_buffer("low", torch.tensor(float("inf")))
        self.register_buffer("high", torch.tensor(-float("inf")))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.kept.append(x.detach().mean())
        self.low = torch.minimum(self.low, x.detach().min())
        self.high.copy_(torch.maximum(self.high, x.detach().max()))
        self.mean.data = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x


def observed() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Observer(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Observer(),
        nn.Conv2d(16, 16, 3, padding=1),
        Observer(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def state_of(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {n: t.clone() for n, t in (*module.named_parameters(), *module.named_buffers())}
    observers = {n: m for n, m in module.named_modules() if isinstance(m, Observer)}
    return tensors, {name: (m.count, len(m.kept), m.training) for name, m in observers.items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init": "copy"},
        {"expert_width": 0.5},
        {"classifier": "cosine"},
        {"num_experts": 1},
        {"num_classes": 7},
        {"expert_factory": lambda index: observed()},
    ],
    ids=["fresh", "copy", "narrow", "cosine", "one", "classes", "factory"],
)
def test_a_build_leaves_the_backbone_and_starts_experts_from_its_state(
    options: dict[str, Any], training: bool
) -> None:
    net = observed().train(training)
    net(torch.randn(2, 3, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has seen a batch, and looks trained
        tensors, observers = state_of(net)
        example = torch.randn(2, 3, 8, 8)
        model = RIDEWrapper(net, **{"fork_at": "4", "example_input": example, **options})
    now, observers_now = state_of(net)
    assert observers_now == observers
    assert all(torch.equal(tensors[name], now[name]) for name in tensors)
    if "expert_factory" in options:
        tensors, observers = state_of(observed().train(training))
    for part in model.experts:
        ours, ours_observers = state_of(part)
        assert ours_observers.items() <= observers.items()
        for name in ours_observers:
            for key in ("low", "high", "mean"):
                assert torch.equal(ours[f"{name}.{key}"], tensors[f"{name}.{key}"])


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.fc(self.body(self.stem(self.quant(x))).mean((2, 3))))


def prepared(module: nn.Module) -> nn.Module:
    module.train()
    module.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    return quantization.prepare_qat(module, inplace=True)


def wrapped(net: nn.Module, **options: Any) -> RIDEWrapper:
    example = torch.randn(2, 3, 8, 8)
    options = {"init": "copy", "num_classes": 4, "example_input": example, **options}
    return RIDEWrapper(net, 3, fork_at="body", **options)


def images() -> list[Tensor]:
    return [torch.randn(4, 3, 8, 8) for _ in range(2)]


@pytest.mark.filterwarnings("ignore")  # torch announces the end of this way to quantize
def test_quantization_aware_training() -> None:
    net = prepared(Quantized())
    with pytest.raises(SplitError, match=r"in evaluation too.*disable_observer.*prepare the wrapp"):
        wrapped(net)
    # Either way that the message names works.
    net.apply(quantization.disable_observer)
    model = wrapped(net)
    train_both(net, model, images(), tolerance=1e-4)
    for module in (net, model):
        module.apply(quantization.enable_observer)
    train_both(net, model, images(), tolerance=1e-4)

    net = Quantized()
    model = wrapped(net)
    train_both(prepared(net), prepared(model), images(), tolerance=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("batches", [1, 3, 20])
def test_observers_that_have_settled_are_refused_as_well(batches: int, seed: int) -> None:
    """What they change is then as little as rounding may be."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.body(torch.relu(self.stem(x)))))

    torch.manual_seed(seed)
    net = prepared(Small())
    for _ in range(batches):
        net(torch.randn(5, 6))
    example = torch.randn(5, 6)
    with pytest.raises(SplitError, match="in evaluation too, and what a row gets depends"):
        wrapped(net, example_input=example)
    model = wrapped(net.apply(quantization.disable_observer), example_input=example).eval()
    x = torch.randn(8, 6)
    whole, rows = model.router_inputs(x).expert_logits, torch.tensor([5, 0])
    got, _ = model.run_expert(1, model.run_trunk(x).select(rows))
    torch.testing.assert_close(got, whole[rows, 1])


@pytest.mark.filterwarnings("ignore")
def test_what_is_prepared_for_quantization_is_not_narrowed() -> None:
    net = prepared(Quantized()).apply(quantization.disable_observer)
    with pytest.raises(
        WidthError, match=r"`dequant` is prepared for quantization. Wrap and narrow"
    ):
        wrapped(net, init="fresh", expert_width=0.5)


@pytest.mark.filterwarnings("ignore")
def test_observers_measure_for_each_expert() -> None:
    net = Quantized().eval()
    net.qconfig = quantization.QConfig(
        activation=quantization.MinMaxObserver, weight=quantization.MinMaxObserver
    )
    quantization.prepare(net, inplace=True)
    model = wrapped(net)
    buffers = dict(net.named_buffers())
    for part in (model.trunk, *model.experts):
        assert all(torch.equal(b, buffers[n]) for n, b in part.named_buffers())
    train_both(net, model, images())
