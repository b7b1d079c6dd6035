"""Narrowing where queries share keys and values, and where torch prepared quantization."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin import RIDEWrapper, SplitError, WidthError


class GroupedAttention(nn.Module):
    """As language models have it: it stores the size of a head and the queries for each key."""

    def __init__(self, width: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.num_key_value_groups = heads // key_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, key_heads * self.head_dim)
        self.v_proj = nn.Linear(width, key_heads * self.head_dim)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (
            p(x).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        grouped = mask is None  # the kernel shares keys by itself, but not with a mask
        if not grouped:
            k, v = (t.repeat_interleave(self.num_key_value_groups, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, key_heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(32), GroupedAttention(32, 4, key_heads)
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm(x), mask)
        return x + self.mlp(x)


class Decoder(nn.Module):
    def __init__(self, key_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList([Block(key_heads) for _ in range(3)])
        self.head = nn.Linear(32, 10)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        mask = None if padding is None else padding[:, None, None, :]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x[:, 0])


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_grouped_queries_run_on_padded_batches(key_heads: int) -> None:
    tokens = torch.randint(1, 50, (2, 6))
    model = RIDEWrapper(Decoder(key_heads), 2, expert_width=0.5, example_input=tokens)
    attention = model.experts[1].blocks[2].attention
    queries = attention.q_proj.out_features // attention.head_dim
    keys = attention.k_proj.out_features // attention.head_dim
    assert queries == 2
    assert keys * attention.num_key_value_groups == queries
    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[1, 4:] = False
    assert model(tokens, padding).shape == (2, 10)


def test_what_is_prepared_for_quantization_is_refused() -> None:
    from torch.ao.quantization import FakeQuantize, disable_observer

    backbone = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), FakeQuantize(), nn.Linear(16, 5)
    )
    with pytest.raises(SplitError, match=r"disable_observer.*wrap the plain network"):
        RIDEWrapper(backbone, 2, fork_at="2", expert_width=0.5)
    backbone.apply(disable_observer)
    with pytest.raises(WidthError, match=r"Wrap and narrow the backbone first"):
        RIDEWrapper(backbone, 2, fork_at="2", expert_width=0.5)
