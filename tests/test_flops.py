"""FLOPs of operations against counts by hand, and against torch's count of plain products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ride_plugin import RIDEWrapper, cost_report, count_flops
from ride_plugin._flops import _BY_NAME, counted
from tests.backbones import VisionTransformer


def flops_of(function: Any, *args: Any) -> int:
    with torch.no_grad():
        return counted(None, function, *args)[0]


ROWS, STEPS = 2, 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "gates", "options", "matrices"),
    [
        (nn.LSTM, 4, {}, 16 * (8 + 16)),
        (nn.GRU, 3, {}, 16 * (8 + 16)),
        (nn.RNN, 1, {}, 16 * (8 + 16)),
        (nn.LSTM, 4, {"batch_first": True, "bias": False}, 16 * (8 + 16)),
        (nn.LSTM, 4, {"num_layers": 2}, 16 * (8 + 16 + 16 + 16)),
        (nn.LSTM, 4, {"bidirectional": True}, 2 * 16 * (8 + 16)),
    ],
)
def test_a_recurrent_layer_multiplies_each_step_by_its_matrices(
    kind: type[nn.Module],
    gates: int,
    options: dict[str, Any],
    matrices: int,
    dtype: torch.dtype,
) -> None:
    layer = kind(8, 16, **options).to(dtype)
    x = torch.randn(ROWS, STEPS, 8, dtype=dtype)
    assert count_flops(layer, x) == 2 * ROWS * STEPS * gates * matrices


def test_sequences_of_different_lengths_cost_their_own_steps() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(5, 8), torch.randn(3, 8)])
    assert count_flops(nn.LSTM(8, 16), packed) == 2 * (5 + 3) * 4 * 16 * (8 + 16)


def attention(length: int, others: int, mask: Tensor | None = None, **options: Any) -> int:
    query, key = torch.randn(2, 4, length, 8), torch.randn(2, 4, others, 8)
    value = torch.randn(2, 4, others, 8)
    return flops_of(lambda: F.scaled_dot_product_attention(query, key, value, mask, **options))


@pytest.mark.parametrize(
    ("others", "options"),
    [
        (10, {}),
        (7, {}),
        (10, {"is_causal": True}),
        (7, {"mask": torch.ones(10, 7, dtype=torch.bool)}),
    ],
)
def test_attention_is_two_products_for_each_head(others: int, options: dict[str, Any]) -> None:
    by_hand = 2 * 2 * 4 * 10 * others * (8 + 8)
    assert attention(10, others, **options) == by_hand
    with sdpa_kernel(SDPBackend.MATH):
        assert attention(10, others, **options) == by_hand


def test_heads_that_share_a_key_each_cost_their_products() -> None:
    query, key = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 10, 8)
    flops = flops_of(
        lambda: F.scaled_dot_product_attention(query, key, key, enable_gqa=True),
    )
    assert flops == 2 * 2 * 4 * 10 * 10 * (8 + 8)


VECTOR, MATRIX, BATCH = torch.randn(8), torch.randn(6, 8), torch.randn(3, 5, 8)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: MATRIX @ VECTOR, 2 * 6 * 8),
        (lambda: BATCH @ VECTOR, 2 * 3 * 5 * 8),
        (lambda: VECTOR @ VECTOR, 2 * 8),
        (lambda: torch.vdot(VECTOR, VECTOR), 2 * 8),
        (lambda: torch.addmv(torch.zeros(6), MATRIX, VECTOR), 2 * 6 * 8),
        (lambda: torch.addbmm(torch.zeros(5, 5), BATCH, BATCH.mT), 2 * 3 * 5 * 8 * 5),
        (lambda: torch.conv_tbc(BATCH, torch.zeros(2, 8, 4), VECTOR[:4]), 2 * 2 * 5 * 2 * 8 * 4),
        (lambda: F.bilinear(BATCH, BATCH, torch.zeros(4, 8, 8)), 2 * 3 * 5 * 4 * 8 * 8),
    ],
)  # fmt: skip
def test_products_that_torch_does_not_count(function: Any, expected: int) -> None:
    assert flops_of(function) == expected


def test_bilinear_layer() -> None:
    assert count_flops(nn.Bilinear(8, 8, 4), torch.zeros(1, 8), torch.zeros(1, 8)) == 2 * 8 * 8 * 4


def test_cudnn_gives_a_stack_of_layers_as_one_operation() -> None:
    weights = [torch.Size(s) for s in ((64, 8), (64, 16), (64,), (64,), (64, 16), (64, 16))]
    flops = _BY_NAME["_cudnn_rnn"](torch.Size((10, 2, 8)), weights, 4, None, None)
    assert flops == 2 * 10 * 2 * 64 * (8 + 3 * 16)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True) for _ in range(2))
        )
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(1))


def test_a_transformer_costs_what_its_equations_say() -> None:
    length, width = 512, 64
    layer = 2 * length * (3 * width * width + width * width + 2 * width * 128)
    layer += 2 * 2 * length * length * width
    expected = 2 * layer + 2 * width * 5
    x = torch.randn(1, length, width)
    assert count_flops(Encoder(), x) == expected
    model = RIDEWrapper(Encoder(), 2, fork_at="layers.1", example_input=x)
    report = cost_report(model, example_input=x)
    assert report.trunk_flops == layer
    assert report.expert_flops == (layer + 2 * width * 5,) * 2


def test_a_vision_transformer_is_counted_as_plain_products_are() -> None:
    backbone = VisionTransformer(depth=3)
    report = cost_report(RIDEWrapper(backbone, 1), backbone=backbone)
    x = torch.randn(1, 3, 32, 32)
    with sdpa_kernel(SDPBackend.MATH):
        assert count_flops(backbone, x) == report.backbone_flops == report.flops
