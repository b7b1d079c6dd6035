"""Attention with fewer heads: the module in place of torch's, and sizes that names tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ride_plugin._width._attention import (
    HeadwiseAttention,
    attention_of,
    replace_multihead_attention,
)

BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 3, 5, 4, 8


def multihead(**options) -> nn.MultiheadAttention:
    attention = nn.MultiheadAttention(WIDTH, HEADS, **options).eval()
    for bias in (attention.in_proj_bias, attention.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return attention


def inputs(attention: nn.MultiheadAttention, batched: bool = True) -> list[Tensor]:
    shapes = ((QUERIES, attention.embed_dim), (KEYS, attention.kdim), (KEYS, attention.vdim))
    if not batched:
        return [torch.randn(shape) for shape in shapes]
    drawn = [torch.randn(BATCH, *shape) for shape in shapes]
    return drawn if attention.batch_first else [x.transpose(0, 1) for x in drawn]


def assert_same(attention: nn.MultiheadAttention, *args: Tensor, **kwargs: object) -> None:
    expected, expected_weights = attention(*args, **kwargs)
    got, weights = HeadwiseAttention(attention)(*args, **kwargs)
    torch.testing.assert_close(got, expected)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("batched", [True, False], ids=["batch", "one"])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"bias": False}, {"kdim": 6, "vdim": 7}],
    ids=["plain", "batch_first", "no_bias", "kdim"],
)
def test_it_computes_what_torch_does(options: dict, batched: bool) -> None:
    attention = multihead(**options)
    x = inputs(attention, batched)
    assert_same(attention, *x)
    assert_same(attention, *x, average_attn_weights=False)
    assert_same(attention, *x, need_weights=False)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "each_head"])
def test_masks_are_those_of_torch(mask: str, padded: bool, need_weights: bool) -> None:
    attention = multihead(batch_first=True)
    hidden = torch.zeros(QUERIES, KEYS, dtype=torch.bool).index_fill(1, torch.tensor([1]), True)
    bias = torch.randn(QUERIES, KEYS)
    of_head = torch.randn(BATCH, 1, QUERIES, KEYS).repeat(1, HEADS, 1, 1).flatten(0, 1)
    attn_mask = {"none": None, "bool": hidden, "float": bias, "each_head": of_head}[mask]
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool).index_fill(1, torch.tensor([4]), True)
    if mask in ("float", "each_head"):  # torch wants both masks of one type
        padding = torch.zeros(BATCH, KEYS).masked_fill(padding, -torch.inf)
    options = {"attn_mask": attn_mask, "need_weights": need_weights}
    assert_same(
        attention, *inputs(attention), key_padding_mask=padding if padded else None, **options
    )


def test_a_causal_hint_without_a_mask_is_refused() -> None:
    attention = HeadwiseAttention(multihead())
    x = torch.randn(QUERIES, WIDTH)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        attention(x, x, x, is_causal=True)


def test_only_what_computes_the_same_is_replaced() -> None:
    model = nn.ModuleDict(
        {
            "plain": (plain := multihead()),
            "biased": multihead(add_bias_kv=True),
            "zero": multihead(add_zero_attn=True),
        }
    )
    assert replace_multihead_attention(model) == {"plain": plain}
    assert type(model["plain"]) is HeadwiseAttention


class SelfAttention(nn.Module):
    """Four heads of six, whose sizes are attributes as several libraries keep them."""

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 6
        self.qkv = nn.Linear(10, 72)
        for name, value in attributes.items():
            setattr(self, name, value)


def settings(attention: nn.Module, choice: str, ratio: float) -> dict[str, object]:
    found = attention_of("a", attention)
    assert found is not None
    return {name: value for _, name, value in found.apply(choice, ratio)[1]}


def test_attributes_follow_the_number_of_heads() -> None:
    attention = SelfAttention(inner_dim=24, bias_shape=(1, 4, 7), scale=6**-0.5)
    changed = settings(attention, "heads", 0.5)
    assert changed == {"num_heads": 2, "inner_dim": 12, "bias_shape": (1, 2, 7)}


def test_attributes_follow_the_size_of_a_head() -> None:
    attention = SelfAttention(inner_dim=24, val_dim=12, bias_shape=(1, 4, 7), scale=6**-0.5)
    changed = settings(attention, "head_dim", 0.7)
    scale = changed.pop("scale")
    assert changed == {"head_dim": 4, "inner_dim": 16, "val_dim": 8}
    assert scale == pytest.approx(4**-0.5)


def test_a_scale_that_is_not_the_heads_stays() -> None:
    assert "scale" not in settings(SelfAttention(scale=0.9), "head_dim", 0.7)
    assert "inner_dim" not in settings(SelfAttention(inner_dim=10), "head_dim", 0.7)


def test_kept_as_it_is_nothing_changes() -> None:
    found = attention_of("a", SelfAttention())
    assert found is not None
    assert found.apply("keep", 0.5) == ({"qkv": 72}, [])


def test_grouped_queries_narrow_heads_of_keys_too() -> None:
    attention = SelfAttention(num_key_value_heads=2, num_key_value_groups=2)
    del attention.qkv
    attention.q_proj, attention.k_proj = nn.Linear(10, 24), nn.Linear(10, 12)
    found = attention_of("a", attention)
    assert found is not None
    widths, changed = found.apply("heads", 0.5)
    assert widths == {"q_proj": 12, "k_proj": 6}
    expected = {"num_heads": 2, "num_key_value_heads": 1, "num_key_value_groups": 2}
    assert {name: value for _, name, value in changed} == expected


def test_what_does_not_divide_into_heads_is_not_attention() -> None:
    attention = SelfAttention()
    del attention.head_dim
    attention.qkv = nn.Linear(10, 70)
    assert attention_of("a", attention) is None
    assert attention_of("a", nn.Linear(3, 4)) is None
