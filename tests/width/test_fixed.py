"""Torch's attention in a narrowed expert: replaced where that changes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin import RIDEWrapper, expert_logits
from ride_plugin._width._attention import HeadwiseAttention

WIDTH, LENGTH = 32, 6


class Block(nn.Module):
    """Attention, called as a module or by torch's function, and a hidden layer."""

    def __init__(self, attention: nn.MultiheadAttention, how: str = "module") -> None:
        super().__init__()
        self.attn, self.how = attention, how
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + getattr(self, self.how)(x)
        return x + self.down(self.up(x).relu())

    def module(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]

    def function(self, x: Tensor) -> Tensor:
        a, x = self.attn, x.transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            x, x, x, WIDTH, 4, a.in_proj_weight, a.in_proj_bias, None, None, False, 0.0,
            a.out_proj.weight, a.out_proj.bias, training=self.training, need_weights=False,
        )  # fmt: skip
        return y.transpose(0, 1)

    def other_result(self, x: Tensor) -> Tensor:
        """Reads an attribute that what stands in for it has as well, with another value."""
        return self.module(x) if self.attn.in_proj_bias is not None else x


def attention() -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(WIDTH, 4, batch_first=True)


def narrowed(*blocks: nn.Module) -> RIDEWrapper:
    head = [nn.Flatten(), nn.Linear(WIDTH * LENGTH, 5)]
    backbone = nn.Sequential(nn.Linear(8, WIDTH), *blocks, *head)
    x = torch.randn(4, LENGTH, 8)
    model = RIDEWrapper(backbone, 2, fork_at="1", expert_width=0.5, example_input=x).eval()
    with torch.no_grad():
        for index in range(2):
            expected = expert_logits(model(x))[:, index]
            torch.testing.assert_close(model.to_module(index)(x), expected)
    expert_logits(model.train()(x)).square().mean().backward()
    return model


@pytest.mark.parametrize("how", ["function", "other_result"])
def test_attention_whose_attributes_a_forward_reads_stays_as_it_is(how: str) -> None:
    expert = narrowed(Block(attention(), how), Block(attention())).experts[0]
    assert type(expert[1].attn) is nn.MultiheadAttention
    assert expert[1].attn.in_proj_weight.shape == (3 * WIDTH, WIDTH)
    assert expert[2].attn.num_heads == 2  # the other one is narrowed
    assert [expert[k].up.out_features for k in (1, 2)] == [2 * WIDTH, 2 * WIDTH]


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}])
def test_what_reaches_attention_that_stays_is_as_wide_as_it_was(options: dict) -> None:
    kept = nn.MultiheadAttention(WIDTH, 4, batch_first=True, **options)
    block = Block(kept, "module" if options else "function")
    expert = narrowed(nn.Linear(WIDTH, WIDTH), block, Block(attention())).experts[0]
    assert expert[1].out_features == WIDTH == expert[2].attn.embed_dim
    assert (expert[2].up.out_features, expert[3].attn.num_heads) == (2 * WIDTH, 2)


def test_attention_under_two_names_is_one_module_again() -> None:
    shared = attention()
    model = narrowed(Block(shared), Block(attention()), Block(shared))
    for expert in model.experts:
        assert expert[1].attn is expert[3].attn is not expert[2].attn
        assert type(expert[1].attn) is HeadwiseAttention
        assert (expert[1].attn.num_heads, expert[2].attn.num_heads) == (2, 2)
        assert expert[1].attn.q_proj.weight.shape == (WIDTH // 2, WIDTH)
    first, second = model.experts
    assert first[1].attn is not second[1].attn
