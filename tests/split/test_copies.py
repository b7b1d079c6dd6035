"""Passes on the meta device: batch normalisation is worked out by one operation, not by many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ride_plugin._split._copies import on_meta, running_copy


def passed(layer: nn.Module, x: Tensor) -> tuple[Tensor, nn.Module]:
    copied = running_copy(layer, (layer,), meta=True)
    with on_meta(x, True) as shapes:
        return copied(shapes), copied


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5, 6)])
def test_batch_normalisation_without_contents_has_the_shape_and_writes_the_same(
    shape: tuple[int, ...], options: dict[str, bool], training: bool
) -> None:
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    layer = kind(4, **options).train(training)
    x = torch.randn(shape)
    found, copied = passed(layer, x)
    before = {name: buffer._version for name, buffer in layer.named_buffers()}
    expected = layer(x)
    assert found.is_meta
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    for name, buffer in copied.named_buffers():
        assert (buffer._version > 0) == (layer.get_buffer(name)._version > before[name]), name
    if options == {}:
        asked = (copied.weight, copied.bias)
        gradients = torch.autograd.grad(found.sum(), asked)
        assert [g.shape for g in gradients] == [(4,), (4,)]


class Operations(TorchDispatchMode):
    """Names what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
def test_batch_normalisation_without_contents_is_one_operation(training: bool) -> None:
    original = nn.BatchNorm2d(4).train(training)
    layer = running_copy(original, (original,), meta=True)
    with torch.no_grad(), on_meta(torch.randn(3, 4, 5, 6), True) as shapes, Operations() as seen:
        layer(shapes)
    assert [name for name in seen.names if name not in ("view", "add_")] == ["addcmul"]


def test_another_number_of_channels_is_refused_as_with_contents() -> None:
    with pytest.raises(RuntimeError, match="running_mean"):
        passed(nn.BatchNorm2d(4), torch.randn(2, 1, 3, 3))


def test_a_single_value_in_each_channel_is_refused_as_with_contents() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        passed(nn.BatchNorm1d(4), torch.randn(1, 4))
