"""FLOPs of operations against counts by hand, and against torch's count of plain products."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ride_plugin import RIDEWrapper, _flops, cost_report, count_flops
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
        (lambda: torch.zeros(6).addmv_(MATRIX, VECTOR), 2 * 6 * 8),
        (lambda: torch.zeros(6, 6).addmm_(MATRIX, MATRIX.mT), 2 * 6 * 8 * 6),
        (lambda: torch.zeros(5, 5).addbmm_(BATCH, BATCH.mT), 2 * 3 * 5 * 8 * 5),
        (lambda: torch.zeros(3, 5, 5).baddbmm_(BATCH, BATCH.mT), 2 * 3 * 5 * 8 * 5),
        (lambda: torch._addmm_activation(torch.zeros(6), MATRIX, MATRIX.mT), 2 * 6 * 8 * 6),
        (lambda: torch.linalg.vecdot(BATCH, BATCH), 2 * 3 * 5 * 8),
        (lambda: torch.linalg.vecdot(x=BATCH, y=VECTOR), 2 * 3 * 5 * 8),
        (lambda: torch.linalg.vecdot(BATCH, BATCH, dim=1), 2 * 3 * 5 * 8),
        (lambda: torch.linalg.vecdot(VECTOR, VECTOR), 2 * 8),
        # The squared lengths of the rows are two further columns.
        (lambda: torch.cdist(BATCH, torch.zeros(3, 30, 8)), 2 * 3 * 5 * (8 + 2) * 30),
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


GROUPED = torch.randn(8, 16, dtype=torch.bfloat16)
BY_GROUP = torch.randn(2, 16, 8, dtype=torch.bfloat16)
ENDS = torch.tensor([4, 8], dtype=torch.int32)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped products")
@pytest.mark.parametrize(
    ("first", "second", "ends", "expected"),
    [
        (GROUPED, BY_GROUP, ENDS, 2 * 8 * 16 * 8),  # each row meets the matrix of its group
        (BY_GROUP.mT, BY_GROUP, None, 2 * 2 * 8 * 16 * 8),
        (BY_GROUP.mT, GROUPED.mT, ENDS, 2 * 8 * 16 * 8),  # so does each column
        (GROUPED.mT, GROUPED, ENDS, 2 * 16 * 8 * 16),  # groups share out what is summed over
    ],
)
def test_grouped_products(
    first: Tensor, second: Tensor, ends: Tensor | None, expected: int
) -> None:
    first, second = first.contiguous(), second.contiguous()  # as the kernels ask
    assert flops_of(lambda: F.grouped_mm(first, second, offs=ends)) == expected
    shapes = first.shape, second.shape
    for name in ("_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2"):
        assert _BY_NAME[name](*shapes, None, None) == expected


def test_products_of_a_list_are_those_of_its_matrices() -> None:
    several = [torch.Size((3, 4)), torch.Size((5, 4))], [torch.Size((4, 2)), torch.Size((4, 6))]
    assert _BY_NAME["_foreach_mm"](*several) == 2 * 3 * 4 * 2 + 2 * 5 * 4 * 6


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


NAMES = ["fused_gemm", "attn_fwd", "MatMulBias", "deform_conv2d", "my_dot", "told_mm"]
# Custom operations, whose inside no counter sees.
OPERATIONS = {
    name: torch.library.custom_op(f"ride_tests::{name}", product, mutates_args=()) for name in NAMES
}


class Scores(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.late, self.fc, self.name = nn.Linear(8, 8), nn.Linear(8, 5), name

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(OPERATIONS[self.name](self.late(x), self.late.weight))


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_that_nothing_is_known_of_is_named_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_flops, "_named", set())
    x, module = torch.randn(2, 8), Scores(name)
    linear = 2 * 2 * (8 * 8 + 8 * 5)
    with pytest.warns(UserWarning, match=f"`ride_tests.{name}` count as nothing") as caught:
        assert count_flops(module, x) == linear
    assert [warning.filename for warning in caught] == [__file__]
    assert count_flops(module, x) == linear  # a warning would be an error
    monkeypatch.setattr(_flops, "_named", set())
    model = RIDEWrapper(module, 2, fork_at="fc", example_input=x)
    with pytest.warns(UserWarning, match="count as nothing") as caught:
        cost_report(model, example_input=x, backbone=module)
    assert len(caught) == 1


def test_an_operation_whose_formula_torch_was_told_is_counted() -> None:
    packet = torch.ops.ride_tests.told_mm

    @register_flop_formula(packet)
    def formula(x: Any, weight: Any, out_shape: Any = None, **_: Any) -> int:
        return 2 * x[0] * x[1] * weight[1]

    try:
        flops = count_flops(Scores("told_mm"), torch.randn(2, 8))
    finally:
        del flop_registry[packet]
    assert flops == 2 * 2 * (8 * 8 + 8 * 8 + 8 * 5)


def gradient_of(function: Any, *inputs: Tensor) -> Any:
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    with torch.enable_grad():
        return torch.autograd.grad(function(*inputs).sum(), inputs)


SQUARE, IMAGES = torch.rand(8, 8), torch.rand(2, 4, 6, 6)
SILENT = {
    "dropout": lambda: F.dropout(SQUARE, 0.5),
    "names that contain mm": lambda: (
        SQUARE.lgamma(), SQUARE.digamma(), torch.hamming_window(8), SQUARE.cummax(0),
        torch.special.gammainc(SQUARE, SQUARE), torch._standard_gamma(SQUARE),
    ),
    "names that contain conv": lambda: torch.ops.prims.convert_element_type(SQUARE, torch.half),
    "resizing": lambda: F.interpolate(IMAGES, scale_factor=2, mode="bilinear"),
    "taken apart": lambda: (
        torch.einsum("bi,ij->bj", SQUARE, SQUARE), torch.tensordot(SQUARE, SQUARE, 1),
        torch.inner(SQUARE, SQUARE), torch.linalg.multi_dot([SQUARE] * 3),
        F.multi_head_attention_forward(
            SQUARE, SQUARE, SQUARE, 8, 2, torch.rand(24, 8), None, None, None, False, 0.0,
            SQUARE, None,
        ),
        F.conv_transpose2d(IMAGES, torch.rand(4, 2, 3, 3)),
        F.conv3d(IMAGES, torch.rand(2, 2, 1, 3, 3)),
    ),
    "backward": lambda: (
        gradient_of(F.conv2d, IMAGES, torch.rand(2, 4, 3, 3)),
        gradient_of(F.scaled_dot_product_attention, IMAGES, IMAGES, IMAGES),
        gradient_of(torch.matmul, SQUARE, SQUARE),
    ),
    "sparse": lambda: (SQUARE.to_sparse() @ SQUARE, torch.sparse.mm(SQUARE.to_sparse(), SQUARE)),
    "integers": lambda: torch._int_mm(*[torch.ones(32, 32, dtype=torch.int8)] * 2),
    "eight bits": lambda: torch._weight_int8pack_mm(
        torch.rand(32, 32).bfloat16(), torch.ones(32, 32, dtype=torch.int8),
        torch.rand(32).bfloat16(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SILENT)
def test_what_is_no_uncounted_product_is_not_named(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_flops, "_named", set())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*count as nothing")
        flops_of(SILENT[kind])
    assert not _flops._named
