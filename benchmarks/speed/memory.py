"""Peak memory of a training step, and how time grows with each size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.resnets import CifarResNet
from benchmarks.speed.live_bytes import LiveBytes
from benchmarks.speed.networks import (
    Case,
    images,
    plain_resnet50,
    resnet32,
    resnet50,
    to_channels_last,
    train_step,
)
from benchmarks.speed.timing import compare


def memory() -> Case:
    """Largest amount of live tensor memory in a training step, against the single backbone."""
    networks: dict[
        str, tuple[Any, Callable[[], nn.Module], int, tuple[int, ...], tuple[int, ...]]
    ] = {
        "ResNet-32": (resnet32, lambda: CifarResNet(100), 32, (128,), (1, 2, 3, 4, 6, 8)),
        "ResNet-50": (resnet50, plain_resnet50, 224, (8, 32, 64), (3, 4)),
    }

    def rows() -> Iterator[list[Any]]:
        for name, (network, backbone, size, batches, counts) in networks.items():
            for batch in batches:
                single = _counted_peak(backbone(), batch, size)
                for num_experts in counts:
                    plain, again = network(num_experts), network(num_experts)
                    again.checkpoint_experts = True
                    time: Any = "-"
                    if batch == batches[0]:
                        at = images(batch, size=size), torch.randint(0, 100, (batch,))
                        time = compare(train_step(again, *at), train_step(plain, *at), seconds=0)
                    kept, less = (_counted_peak(m, batch, size) / single for m in (plain, again))
                    yield [name, batch, num_experts, f"{kept:.2f}", f"{less:.2f}", time]

    header = ["network", "batch", "experts", "kept", "checkpointed", "time, checkpointed / kept"]
    return "Peak memory of a training step / the single backbone's", header, rows()


def scaling() -> Case:
    """Time and peak memory of a training step against a smaller one."""

    def rows() -> Iterator[list[Any]]:
        for num_experts in (1, 2, 4, 6, 8):
            yield _grown(f"{num_experts} experts / 3", num_experts, 100, 64, 32)
        for classes in (10, 1000, 8142):
            yield _grown(f"{classes} classes / 100", 3, classes, 64, 32)
        for batch in (16, 256):
            yield _grown(f"batch {batch} / 64", 3, 100, batch, 32)
        for size in (64, 96):
            yield _grown(f"images of {size} x {size} / 32 x 32", 3, 100, 64, size)

    header = ["change", "time", "peak memory"]
    return "Training step of ResNet-32 / that of 3 experts, 100 classes, batch 64", header, rows()


def _grown(label: str, num_experts: int, classes: int, batch: int, size: int) -> list[Any]:
    (changed, at), (base, before) = (
        _case(*sizes) for sizes in ((num_experts, classes, batch, size), (3, 100, 64, 32))
    )
    ratio = compare(train_step(changed, *at), train_step(base, *before), seconds=0.1)
    return [label, ratio, f"{_peak(changed, *at) / _peak(base, *before):.2f}"]


def _case(
    num_experts: int, classes: int, batch: int, size: int
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = resnet32(num_experts, num_classes=classes)
    return model, (images(batch, size=size), torch.randint(0, classes, (batch,)))


def _counted_peak(model: nn.Module, batch: int, size: int) -> int:
    """Peak of a step on tensors without contents, which have sizes and take no time."""
    mode = FakeTensorMode()
    for module in to_channels_last(model).modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(mode.from_tensor(parameter.detach()))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)
    with mode:
        return _peak(model, images(batch, size=size), torch.zeros(batch, dtype=torch.int64))


def _peak(model: nn.Module, x: Tensor, y: Tensor) -> int:
    step = train_step(model, x, y)
    step()
    model.zero_grad(set_to_none=True)
    with LiveBytes() as counter:
        step()
    return counter.peak
