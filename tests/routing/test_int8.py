"""Stages in eight bits compute what the rounded numbers give, in float64 by hand."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin import ArgumentError, ConfidenceRouter, RIDEWrapper, RoutingInference
from ride_plugin.routing import StagedRunner, _int8, fuse_stages, quantize_stages
from ride_plugin.routing._fused_conv import FusedConv2d
from ride_plugin.routing._int8 import Int8Conv2d, largest_step


def rounded_by_hand(conv: Int8Conv2d, x: Tensor, other: Tensor | None) -> Tensor:
    steps = (x.double() / conv.scale + conv.zero_point + 0.5).floor().clamp(0, 255)
    entering = (steps - conv.zero_point) * conv.scale
    weights = []
    for channel in conv.weight.double():
        step = channel.abs().max() / largest_step()
        weights.append((channel / step).round() * step)
    bias = None if conv.bias is None else conv.bias.double()
    out = F.conv2d(entering, torch.stack(weights), bias, conv.stride, conv.padding, conv.dilation)
    out = out if other is None else out + other.double()
    return (out.relu() if conv.relu else out).float()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 2.5), (0.5, 2.0)])
def test_a_convolution_is_that_of_the_rounded_numbers(
    relu: bool, with_bias: bool, added: bool, low: float, high: float
) -> None:
    torch.manual_seed(0)
    bias = torch.randn(6) if with_bias else None
    options = ([2, 1], [1, 0], [1, 1], 1)
    whole = FusedConv2d(torch.randn(6, 5, 3, 3), bias, options, relu, [4, 5, 9, 9])
    conv = Int8Conv2d(whole, low, high)
    x = torch.rand(4, 5, 9, 9) * (high - low) + low
    other = torch.randn(4, 6, 5, 7).contiguous(memory_format=torch.channels_last) if added else None
    expected = rounded_by_hand(conv, x, other)
    before = None if other is None else other.clone()
    torch.testing.assert_close(conv(x, other), expected, rtol=1e-3, atol=1e-3)
    if other is not None:
        assert torch.equal(other, before)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_largest_sums_fit_on_any_processor(kernel: int, sign: int) -> None:
    weight = sign * torch.ones(6, 8, kernel, kernel)
    whole = FusedConv2d(weight, None, ([1, 1], [0, 0], [1, 1], 1), False, [4, 8, 9, 9])
    x = torch.ones(4, 8, 9, 9)
    torch.testing.assert_close(Int8Conv2d(whole, 0.0, 1.0)(x, None), whole(x))


@pytest.mark.parametrize(("holds", "largest"), [(2**31, 127), (2**15, 64)])
def test_weights_are_as_large_as_sums_of_two_products_may_be(holds, largest, monkeypatch) -> None:
    def convolution(steps: Tensor, *packed: Tensor | float) -> Tensor:
        pair = min(2 * float(steps[0, 0, 0, 0]) * float(weights[-1][0, 0, 0, 0]), holds - 1)
        return torch.full((1, 16, 4, 4), 8 * pair)

    def packed(weight: Tensor, *rest: object) -> tuple[()]:
        weights.append(weight)
        return ()

    weights: list[Tensor] = []
    monkeypatch.setattr(_int8, "_CONVOLUTION", convolution)
    monkeypatch.setattr(_int8, "_packed", packed)
    assert _int8.largest_step.__wrapped__() == largest


def test_other_defaults_of_device_and_dtype_change_nothing() -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert _int8.largest_step.__wrapped__() == largest_step()
    finally:
        torch.set_default_dtype(before)


def test_a_processor_on_which_small_sums_are_wrong_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(_int8, "_CONVOLUTION", lambda *_: torch.zeros(1, 16, 4, 4))
    with pytest.raises(ArgumentError, match="products of 255 and 64 are 0 for it"):
        _int8.largest_step.__wrapped__()


def test_in_another_precision_it_is_the_plain_convolution() -> None:
    torch.manual_seed(0)
    whole = FusedConv2d(
        torch.randn(6, 5, 3, 3), None, ([1, 1], [0, 0], [1, 1], 1), True, [4, 5, 9, 9]
    )
    x = torch.rand(4, 5, 9, 9, dtype=torch.float64)
    conv = Int8Conv2d(whole, 0.0, 1.0).double()
    torch.testing.assert_close(conv(x, None), F.conv2d(x, conv.weight).relu())


def test_what_lies_outside_of_the_range_is_cut_off() -> None:
    whole = FusedConv2d(
        torch.ones(1, 1, 1, 1), None, ([1, 1], [0, 0], [1, 1], 1), False, [2, 1, 1, 1]
    )
    conv = Int8Conv2d(whole, 0.0, 1.0)
    found = conv(torch.tensor([-5.0, 7.0]).view(2, 1, 1, 1)).flatten()
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0]))


def test_small_weights_and_inputs_keep_their_digits_and_a_channel_of_zeros_stays_zero() -> None:
    torch.manual_seed(0)
    weight = 1e-4 * torch.randn(6, 5, 3, 3)
    weight[2] = 0
    whole = FusedConv2d(weight, None, ([1, 1], [0, 0], [1, 1], 1), False, [4, 5, 9, 9])
    conv, x = Int8Conv2d(whole, 0.0, 1e-3), 1e-3 * torch.rand(4, 5, 9, 9)
    found = conv(x, None)
    assert not found[:, 2].any()
    torch.testing.assert_close(found, whole(x), rtol=0, atol=0.02 * float(found.abs().max()))


@pytest.mark.exports
def test_ranges_are_those_of_all_batches_in_any_order() -> None:
    serve, x = served()
    stages = fuse_stages(serve.export_stages())
    wide = x * torch.linspace(1, 3, len(x))[:, None, None, None] + 1
    steps = []
    for batches in ([wide], [wide, x * 0.01], [x * 0.01, wide]):
        quantized = quantize_stages(stages, batches)
        trunk = quantized["trunk"].modules()
        first = next(module for module in trunk if isinstance(module, Int8Conv2d))
        steps.append((first.scale, first.zero_point))
    low, high = float(wide.min()), float(wide.max())
    assert steps[0] == (pytest.approx((high - low) / 255), round(-low * 255 / (high - low)))
    assert steps == [steps[0]] * 3


def served() -> tuple[RoutingInference, Tensor]:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    model = RIDEWrapper(backbone, 2, example_input=torch.randn(2, 3, 17, 17))
    return RoutingInference(model, ConfidenceRouter(), 0.0), torch.randn(32, 3, 17, 17)


def kinds(stages: dict[str, nn.Module]) -> dict[bool, set[type]]:
    convolutions = [m for s in stages.values() for m in s.modules() if isinstance(m, FusedConv2d)]
    return {
        grouped: {type(m) for m in convolutions if (m.groups > 1) == grouped}
        for grouped in (False, True)
    }


@pytest.mark.exports
def test_a_batch_without_rows_is_skipped() -> None:
    serve, x = served()
    stages = fuse_stages(serve.export_stages())
    expected = StagedRunner(quantize_stages(stages, [x]))(x)
    assert torch.equal(StagedRunner(quantize_stages(stages, [x[:0], x, (x[:0],)]))(x), expected)


@pytest.mark.exports
def test_quantized_stages_are_close_and_leave_the_float_ones_alone() -> None:
    serve, x = served()
    stages = fuse_stages(serve.export_stages())
    before = StagedRunner(stages)(x)
    quantized = quantize_stages(stages, (part for part in x.split(8)))
    assert kinds(stages) == {False: {FusedConv2d}, True: {FusedConv2d}}
    assert kinds(quantized) == {False: {Int8Conv2d}, True: {FusedConv2d}}
    after = StagedRunner(quantized)(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=0, atol=0.05 * float(before.abs().max()))
    assert torch.equal(StagedRunner(stages)(x), before)


@pytest.mark.exports
def test_quantized_stages_are_copied_stored_and_serve_several_threads() -> None:
    serve, x = served()
    stages = quantize_stages(fuse_stages(serve.export_stages()), [x])
    expected = StagedRunner(stages)(x)
    buffer = io.BytesIO()
    torch.save(stages, buffer)
    buffer.seek(0)
    stored = StagedRunner(torch.load(buffer, weights_only=False))
    assert torch.equal(stored(x), expected)
    assert torch.equal(StagedRunner(copy.deepcopy(stages))(x), expected)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(result, expected) for result in pool.map(stored, [x] * 8))


@pytest.mark.exports
def test_bad_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    serve, x = served()
    programs = serve.export_stages()
    with pytest.raises(ArgumentError, match=r"stages\['trunk'\].*fuse_stages"):
        quantize_stages(programs, [x])  # type: ignore[arg-type]
    for empty in ([], [x[:0]]):
        with pytest.raises(ArgumentError, match=r"`batches`.*empty"):
            quantize_stages(fuse_stages(programs), empty)
    stages = fuse_stages(programs)
    with pytest.raises(ArgumentError, match=r"`stages` to be a dict.*fuse_stages"):
        quantize_stages(None, [x])  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"`stages`.*\['trunk'\] are missing"):
        quantize_stages({name: s for name, s in stages.items() if name != "trunk"}, [x])
    with pytest.raises(ArgumentError, match=r"`batches` to be inputs.*but got 3"):
        quantize_stages(stages, 3)  # type: ignore[arg-type]
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ArgumentError, match=r"`batches`.*finite"):
            quantize_stages(stages, [x.masked_fill(x > 2, bad)])
    with pytest.raises(ArgumentError, match=r"`batches`.*Leave labels out"):
        quantize_stages(stages, [[x, torch.zeros(len(x)).long()]])
    monkeypatch.setattr("ride_plugin.routing._int8._CONVOLUTION", None)
    with pytest.raises(ArgumentError, match=r"eight bits.*float stages"):
        quantize_stages(fuse_stages(programs), [x])
