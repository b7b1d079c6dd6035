"""Which parameters hold values that have their places, and that no random draw is taken for one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ride_plugin._initialise import is_structured


def sinusoids(positions: int, width: int) -> Tensor:
    angles = torch.arange(positions)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)


def gates(width: int) -> Tensor:
    # Every fifth draw hides its gate well enough to count as one.
    generator = torch.Generator().manual_seed(0)
    bias = torch.empty(4 * width).uniform_(-(width**-0.5), width**-0.5, generator=generator)
    bias[width : 2 * width] = 1.0
    return bias


SMOOTH = torch.tensor([1.0, 2, 1])
EDGE = torch.tensor([1.0, 0, -1])
FREQUENCIES = torch.arange(32)[:, None] * (torch.arange(32) + 0.5)
STRUCTURED = {
    "rates of Mamba": torch.arange(1, 17.0).repeat(64, 1).log(),
    "rates of S4D": math.pi * torch.arange(32.0).repeat(64, 1),
    "few rates": torch.arange(1, 9.0).repeat(2, 1),
    "positions": sinusoids(196, 64)[None],
    "positions of long rows": sinusoids(50, 512),
    "few positions": sinusoids(10, 16),
    "a range": torch.linspace(-1, 1, 12),
    "a falling range": torch.linspace(1, -1, 64)[None, None],
    "a power of a range": (torch.arange(64) / 64).sqrt()[None, None],
    "cosines, which are orthogonal": torch.cos(math.pi / 32 * FREQUENCIES),
    "a bias of four gates": gates(64),
    "gains above biases": torch.stack([torch.randn(64) * 0.02 + 1, torch.randn(64) * 0.02]),
    "equal slices": torch.randn(1, 16, 5).repeat(4, 1, 1),
    "a kernel that blurs": (SMOOTH[:, None] * SMOOTH / 16)[None, None],
    "a kernel for edges": (SMOOTH[:, None] * EDGE)[None, None],
    "a kernel for points": torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]),
    "kernels for two directions": torch.stack([SMOOTH[:, None] * EDGE, EDGE[:, None] * SMOOTH]),
    "equal columns": torch.randn(16, 1).expand(16, 4),
}


@pytest.mark.parametrize("kind", STRUCTURED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_constructor_computed_has_its_places(kind: str, dtype: torch.dtype) -> None:
    assert is_structured(STRUCTURED[kind].to(dtype))


def test_complex_values_have_their_places_if_one_part_has() -> None:
    rates = math.pi * torch.arange(32.0).repeat(64, 1)
    assert is_structured(torch.complex(torch.full_like(rates, -0.5), rates))  # S4D
    assert is_structured(torch.exp(2j * math.pi / 64 * torch.arange(64.0)))
    assert is_structured(torch.complex(rates, torch.randn(64, 32)))
    assert not is_structured(torch.complex(torch.randn(64, 32), torch.zeros(64, 32)))


DRAWS = {
    "normal": torch.randn,
    "uniform": torch.rand,
    "truncated": lambda shape: nn.init.trunc_normal_(torch.empty(shape), std=2.0),
    "of one sign": lambda shape: torch.empty(shape).exponential_(),
    "long-tailed": lambda shape: torch.empty(shape).cauchy_(),
    "of two values": lambda shape: torch.randint(0, 2, shape).float() * 2 - 1,
    "complex": lambda shape: torch.randn(shape, dtype=torch.cfloat),
    "of few digits": lambda shape: torch.randn(shape).bfloat16(),
    "of mean zero": lambda shape: (w := torch.randn(shape)) - w.mean(-1, keepdim=True),
    "orthogonal": lambda shape: (
        nn.init.orthogonal_(torch.empty(shape)) if len(shape) > 1 else torch.randn(shape)
    ),
}
SHAPES = [
    *((2,), (3,), (5,), (8,), (10,), (16,), (32,), (64,), (128,), (1000,)),
    *((2, 2), (2, 4), (3, 4), (2, 8), (8, 8), (8, 16), (16, 10), (64, 64), (3, 100)),
    *((1, 12), (1, 1, 48), (1, 50, 64), (16, 3, 3, 3), (64, 64, 3, 3), (32, 1, 7, 7)),
]


@pytest.mark.parametrize("kind", DRAWS)
def test_no_draw_is_taken_for_a_structure(kind: str) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        for shape in SHAPES:
            drawn = DRAWS[kind](shape)
            if not (drawn == drawn.flatten()[0]).all():
                assert not is_structured(drawn), (seed, shape)
