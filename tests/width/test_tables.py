"""Tables that a constructor computed are not cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper
from ride_plugin._width._tables import tables_of

LENGTH, WIDTH = 6, 32


def angles(size: int, length: int = LENGTH) -> Tensor:
    return torch.outer(torch.arange(length).float(), 1000 ** -(torch.arange(0, size, 2) / size))


class Rotary(nn.Module):
    """Attention with rotary embeddings, and a factor under a name of its own."""

    def __init__(self, heads: int, interleaved: bool = False) -> None:
        super().__init__()
        size = WIDTH // heads
        self.num_heads, self.head_dim, self.temperature = heads, size, size**0.5
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(WIDTH, WIDTH) for _ in range(4)
        )
        self.interleaved, table = interleaved, angles(size)
        table = table.repeat_interleave(2, 1) if interleaved else table.repeat(1, 2)
        self.register_buffer("cos", table.cos())
        self.register_buffer("sin", table.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        if self.interleaved:
            other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        else:
            a, b = x.chunk(2, -1)
            other = torch.cat([-b, a], -1)
        return x * self.cos + other * self.sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = self.rotate(q) @ self.rotate(k).transpose(-2, -1) / self.temperature
        return x + self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(8 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def narrowed(*blocks: nn.Module, width: float = 0.75) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, WIDTH), *blocks, nn.Flatten(), nn.Linear(WIDTH * LENGTH, 5)]
    x = torch.randn(4, LENGTH, 8)
    model = RIDEWrapper(nn.Sequential(*layers), 2, fork_at="1", expert_width=width, example_input=x)
    return model.experts[0]


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embeddings_stay_rotations(interleaved: bool) -> None:
    expert = narrowed(Rotary(2, interleaved), Hidden())
    attention = expert[1]
    assert attention.head_dim == 16 == attention.cos.shape[1]
    assert attention.q_proj.out_features == 32
    assert expert[2].up.out_features == 192
    q, k = torch.randn(2, attention.head_dim)
    scores = attention.rotate(q.expand(LENGTH, -1)) @ attention.rotate(k.expand(LENGTH, -1)).T
    for distance in range(1, LENGTH):  # one distance, one score
        same = scores.diagonal(distance)
        torch.testing.assert_close(same, same[:1].expand_as(same))


def test_whole_heads_go_beside_a_table_for_each_head() -> None:
    attention = narrowed(Rotary(4), Hidden())[1]
    assert (attention.num_heads, attention.head_dim, attention.cos.shape[1]) == (3, 8, 8)
    assert attention.temperature == 8**0.5


class WithBuffer(nn.Module):
    def __init__(self, buffer: Tensor, product: bool = False) -> None:
        super().__init__()
        self.linear, self.product = nn.Linear(WIDTH, WIDTH), product
        self.register_buffer("buffer", buffer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x @ self.buffer if self.product else x + self.buffer


POSITIONS = torch.cat([angles(WIDTH).sin(), angles(WIDTH).cos()], 1)
COSINES = torch.cos(torch.pi / WIDTH * torch.outer(torch.arange(WIDTH) + 0.5, torch.arange(WIDTH)))


@pytest.mark.parametrize(
    ("buffer", "product", "width"),
    [
        (POSITIONS, False, 32),
        (POSITIONS[None], False, 32),
        (COSINES, True, 32),
        (torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)), False, 24),
        (torch.zeros(LENGTH, WIDTH), False, 24),
        (torch.linspace(0, 1, WIDTH), False, 24),  # each channel's own
        (torch.linspace(0, 1, LENGTH)[:, None].repeat(1, WIDTH), False, 24),
    ],
)
def test_what_is_added_to_channels_is_cut_unless_it_is_a_table(
    buffer: Tensor, product: bool, width: int
) -> None:
    expert = narrowed(WithBuffer(buffer.clone(), product), nn.ReLU(), nn.Linear(WIDTH, 2 * WIDTH),
                      nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))  # fmt: skip
    assert expert[1].linear.out_features == width
    assert expert[1].buffer.shape[-1] == (WIDTH if product else width)
    assert torch.equal(expert[1].buffer, buffer[..., : expert[1].buffer.shape[-1]])
    assert expert[3].out_features == 48


def test_tables_are_told_from_other_buffers() -> None:
    module = nn.Module()
    distance = (torch.arange(9.0) - torch.arange(9.0)[:, None]).abs()
    slopes = 0.5 ** torch.arange(1.0, 17)
    tables = {
        "cos": angles(16).repeat(1, 2).cos(),
        "basis": COSINES,
        "alibi": slopes[:, None, None] * distance,  # a table of distances for each head
        "time": torch.linspace(0, 1, LENGTH)[:, None].repeat(1, WIDTH),
    }
    others = {
        "slopes": slopes[:, None, None],
        "memory": torch.randn(32, 16),
        "empty": torch.zeros(8, 8),
        "causal": torch.ones(16, 16).tril(),
        "places": torch.arange(64).view(8, 8),
        "nothing": None,
    }
    for name, buffer in (tables | others).items():
        module.register_buffer(name, buffer)
    both = frozenset({-1, -2})
    expected = {"cos": both, "basis": both, "alibi": both, "time": frozenset({-2})}
    assert tables_of(module) == expected
    assert tables_of(nn.Sequential(module)) == {f"0.{k}": v for k, v in expected.items()}
