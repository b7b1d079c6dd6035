"""Layers whose width can be chosen, their resized parameters, shortcuts that pad channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper
from ride_plugin._width._layers import ChannelPad, kind_of, pads_in, redrawn, resized
from tests.backbones import CifarResNet


class Conv1D(nn.Module):
    """A linear layer with a transposed weight, as transformers' GPT-2 has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nx, self.nf = nx, nf
        self.weight = nn.Parameter(torch.randn(nx, nf))


@pytest.mark.parametrize(
    ("layer", "width_in", "width_out"),
    [
        (nn.Conv2d(3, 5, 1), 3, 5),
        (nn.ConvTranspose2d(3, 5, 1), 3, 5),
        (nn.Linear(3, 5), 3, 5),
        (nn.Embedding(3, 5), None, 5),
        (Conv1D(5, 3), 3, 5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_where_a_layer_keeps_its_sizes(
    layer: nn.Module, width_in: int | None, width_out: int
) -> None:
    kind = kind_of(layer)
    assert kind is not None
    assert getattr(layer, kind.out_name) == layer.weight.shape[kind.out_dim] == width_out
    if width_in is None:
        assert kind.in_dim is None
    else:
        assert kind.in_dim is not None
        assert getattr(layer, kind.in_name) == layer.weight.shape[kind.in_dim] == width_in


def test_the_width_of_other_modules_cannot_be_chosen() -> None:
    assert kind_of(nn.ReLU()) is None
    assert kind_of(nn.BatchNorm1d(3)) is None


def test_resized_cuts_or_repeats() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert resized(tensor, {0: 1, 1: 5}).tolist() == [[0, 1, 2, 0, 1]]
    assert resized(tensor, {0: 2}).data_ptr() != tensor.data_ptr()


def test_an_orthogonal_matrix_is_drawn_orthogonal() -> None:
    old = torch.empty(8, 16)
    nn.init.orthogonal_(old, gain=2.0)
    new = redrawn(resized(old, {0: 6, 1: 12}), old, fan_ratio=16 / 12)
    gram = new @ new.T
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(6), atol=1e-5, rtol=0)
    expected = old.square().mean() * 16 / 12  # the variance of what a unit computes stays
    torch.testing.assert_close(new.square().mean(), expected)


def test_a_constant_stays() -> None:
    assert redrawn(torch.ones(3), torch.ones(4), 2.0).tolist() == [1, 1, 1]


def test_the_row_of_a_padding_index_stays_zero() -> None:
    old = nn.Embedding(10, 8, padding_idx=2).weight.detach()
    new = redrawn(resized(old, {1: 6}), old, 1.0)
    assert (new == 0).all(1).nonzero().flatten().tolist() == [2]
    assert torch.isin(new, old).all()
    assert not torch.equal(new, old[:, :6])


def test_layers_in_one_parameter_keep_their_spreads() -> None:
    old = torch.cat([torch.randn(32, 32) * spread for spread in (0.1, 1.0, 10.0)])
    new = redrawn(resized(old, {0: 72, 1: 24}), old, fan_ratio=32 / 24)
    for part, source in zip(new.chunk(3), old.chunk(3), strict=True):
        assert torch.isin(part, source * (32 / 24) ** 0.5).all()


def test_rows_of_one_length_have_one_again() -> None:
    old = torch.nn.functional.normalize(torch.randn(10, 32)) * 3
    new = redrawn(resized(old, {1: 24}), old, fan_ratio=32 / 24)
    torch.testing.assert_close(new.norm(dim=1), torch.full((10,), 3.0))


def test_a_range_keeps_its_first_entries() -> None:
    old = torch.arange(1, 9.0).repeat(8, 1).log()
    assert torch.equal(redrawn(resized(old, {0: 6}), old, 1.0), old[:6])


class Shortcut(nn.Module):
    """Subsamples or averages, then puts zeros after the channels or on both sides."""

    def __init__(self, centred: bool, pool: bool) -> None:
        super().__init__()
        self.centred, self.pool = centred, pool

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(x, 2) if self.pool else x[:, :, ::2, ::2]
        zeros = torch.zeros_like(x)
        return torch.cat((zeros[:, :1], x, zeros[:, :1]) if self.centred else (x, zeros), dim=1)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("pool", [True, False])
def test_shortcuts_that_pad_are_recognised(centred: bool, pool: bool) -> None:
    x, shortcut = torch.randn(2, 2, 6, 6), Shortcut(centred, pool).eval()
    ((name, pad),) = pads_in([("shortcut", shortcut, x, shortcut(x))])
    assert (name, pad.centred, pad.pool, pad.training) == ("shortcut", centred, pool, False)
    other = torch.randn(3, 2, 6, 6)
    assert torch.equal(pad(other), shortcut(other))


def test_what_is_no_padding_shortcut_is_left_alone() -> None:
    x = torch.randn(2, 2, 6, 6)
    noise = torch.randn(2, 4, 3, 3)
    calls = [
        ("other values", nn.Identity(), x, noise),
        ("as wide as before", nn.Identity(), x, x),
        ("no tensor", nn.Identity(), x, (x,)),
        ("a matrix", nn.Identity(), x[:, :, 0, 0], noise[:, :, 0, 0]),
        ("with parameters", nn.Linear(1, 1), x, ChannelPad(4, 2, True, False)(x)),
    ]
    assert pads_in(calls) == []


def test_a_shortcut_inside_a_container_is_replaced_once() -> None:
    net = CifarResNet(n=1)
    for module in net.modules():
        if isinstance(getattr(module, "shortcut", None), nn.Module):
            module.shortcut = nn.Sequential(module.shortcut)
    model = RIDEWrapper(net, 2, expert_width=0.75)
    pads = [name for name, m in model.experts[0].named_modules() if isinstance(m, ChannelPad)]
    assert pads
    assert all(name.endswith("shortcut") for name in pads)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 100)
