"""Attention with fewer heads: the Python attributes that attention modules keep of their sizes.

The number of heads is reduced. The size of a head stays, because the scores are scaled by it. Where
no whole number of heads is near the ratio, each head gets smaller instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin._split import Recorded
from ride_plugin._width._scales import rescaled

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
_SHARED = ("num_key_value_groups", "num_queries_per_kv", "n_rep", "num_groups")
_HEAD_DIM = ("head_dim", "attention_head_size", "dim_head", "dim_per_head", "head_size", "key_dim")
_INNER = {"all_head_size", "attn_dim", "inner_dim", "inner_size", "out_dim"}
_INNER |= {"embed_dim", "dim", "split_size"}
_PROJECTIONS = {"qkv", "kv", "q", "k", "v", "query", "key", "value", "q_proj", "k_proj", "v_proj"}
_PROJECTIONS |= {"to_qkv", "to_q", "to_k", "to_v", "to_kv", "q_lin", "k_lin", "v_lin", "c_attn"}
_PROJECTIONS |= {"qkv_proj", "query_key_value", "in_proj", "wq", "wk", "wv"}
_TOLERANCE = 0.13  # how far the share of heads kept may be from the ratio


@dataclass
class Attention:
    """An attention module and what its sizes are called.

    Attributes:
        name: dotted name in the expert.
        module: the attention itself.
        projections: names of the layers that make queries, keys and values.
        num_heads: number of heads.
        head_dim: size of one head.
        shared: queries that share one head of keys and values (grouped-query attention).
    """

    name: str
    module: nn.Module
    projections: list[str]
    num_heads: int
    head_dim: int
    shared: int = 1

    def is_like(self, other: Attention) -> bool:
        """Whether another one is of the same kind and sizes, so that the same will fail in it."""
        return (type(self.module), self.num_heads, self.head_dim, self.shared) == (
            type(other.module),
            other.num_heads,
            other.head_dim,
            other.shared,
        )

    def choices(self, ratio: float) -> list[str]:
        """Ways to narrow it, best first; the last one leaves it as it is."""
        heads = math.prod(self._grouped(ratio))
        fits = abs(heads / self.num_heads - ratio) <= _TOLERANCE and heads < self.num_heads
        return ["heads", "head_dim", "keep"] if fits else ["head_dim", "keep"]

    def _grouped(self, ratio: float) -> tuple[int, int]:
        """Heads of keys and values, and queries for each of them.

        There are fewer of the former, or of the latter where no whole number is near the ratio.
        """
        keys = self.num_heads // self.shared
        fewer = max(1, round(keys * ratio))
        if self.shared == 1 or abs(fewer / keys - ratio) <= _TOLERANCE:
            return fewer, self.shared
        return keys, max(1, round(self.shared * ratio))

    def apply(self, choice: str, ratio: float) -> tuple[dict[str, int], list[tuple[Any, str, Any]]]:
        """Sizes under a choice.

        Returns:
            The new output width of each projection by dotted name, and the attributes to set:
            ``(module, name, value)``.
        """
        if choice == "keep":
            return {n: _out(self.module.get_submodule(n)) for n in self.projections}, []
        if choice == "heads":
            old, new = self.num_heads, math.prod(self._grouped(ratio))
        else:
            old = self.head_dim
            # Rotary embeddings split a head in two or four.
            grain = 4 if old % 8 == 0 and old >= 32 else 1 + (old % 2 == 0)
            new = max(grain, round(old * ratio / grain) * grain)
        widths = {}
        new_keys, new_shared = self._grouped(ratio)
        keys = self.num_heads // self.shared, new_keys
        for name in self.projections:
            width = _out(self.module.get_submodule(name))
            if choice == "heads" and self.shared > 1 and width == keys[0] * self.head_dim:
                widths[name] = keys[1] * self.head_dim
            else:
                widths[name] = width // old * new if width % old == 0 else width
        settings: list[tuple[Any, str, Any]] = []
        for module in self.module.modules():
            for key, value in _sizes(module):
                if (choice == "heads" and key in _HEADS and value == old) or (
                    choice == "head_dim" and key in _HEAD_DIM and value == old
                ):
                    settings.append((module, key, new))
                elif choice == "heads" and key in _KEY_HEADS and value == keys[0]:
                    settings.append((module, key, new_keys))
                elif choice == "heads" and key in _SHARED and value == self.shared:
                    settings.append((module, key, new_shared))
                elif key in _INNER or key.endswith("attn_dim"):
                    if value == self.num_heads * self.head_dim or (
                        key not in _INNER and value % old == 0
                    ):
                        settings.append((module, key, value // old * new))
                elif choice == "head_dim" and key in ("val_dim", "value_dim") and value % old == 0:
                    settings.append((module, key, value // old * new))
            bias_shape = vars(module).get("bias_shape")
            if choice == "heads" and isinstance(bias_shape, tuple) and old in bias_shape:
                swapped = tuple(new if size == old else size for size in bias_shape)
                settings.append((module, "bias_shape", swapped))
            if choice == "head_dim":
                settings += [(module, key, scale) for key, scale in rescaled(module, old, new)]
        return widths, settings


def attention_of(name: str, module: nn.Module) -> Attention | None:
    """Describe ``module`` if it is attention whose sizes are known by their names."""
    heads = next((v for k, v in _sizes(module) if k in _HEADS and v > 0), None)
    layers = [
        child_name
        for child_name, child in module.named_modules()
        if child_name.rpartition(".")[2] in _PROJECTIONS | {"conv"}
        and child_name.split(".")[0] in _PROJECTIONS
        and _out(child)
    ]
    head_dim = next((v for k, v in _sizes(module) if k in _HEAD_DIM and v > 0), None)
    widths = {layer.rpartition(".")[2]: _out(module.get_submodule(layer)) for layer in layers}
    queries = next((widths[n] for n in ("q_proj", "q", "query", "to_q", "wq") if n in widths), 0)
    keys = next((widths[n] for n in ("k_proj", "k", "key", "to_k", "wk") if n in widths), 0)
    if heads is None and head_dim and queries and any(k in _SHARED for k, _ in _sizes(module)):
        heads = queries // head_dim
    if heads is None or not layers:
        return None
    if any(isinstance(module.get_submodule(layer), Recorded) for layer in layers):
        return None  # it runs in the trunk, with the trunk's number of heads
    if head_dim is None:
        kind = layers[0].rpartition(".")[2]
        parts = 3 if kind in ("qkv", "to_qkv", "query_key_value", "qkv_proj", "c_attn") else 1
        parts = 2 if kind in ("kv", "to_kv") else parts
        head_dim, rest = divmod(_out(module.get_submodule(layers[0])), heads * parts)
        if rest:
            return None
    grouped = 0 < keys < queries and queries % keys == 0 and keys % head_dim == 0
    return Attention(name, module, layers, heads, head_dim, queries // keys if grouped else 1)


class HeadwiseAttention(nn.Module):
    """``nn.MultiheadAttention`` whose heads together may be narrower than its input.

    Built from one, it computes the same; the sum of its heads' sizes is free, where torch's module
    ties it to ``embed_dim``.
    """

    # What nn.TransformerEncoder reads before it takes its fused path, which would not fit.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim = source.embed_dim
        self.num_heads = source.num_heads
        self.head_dim = source.head_dim
        self.dropout = source.dropout
        self.batch_first = source.batch_first
        size, width = source.embed_dim, source.embed_dim
        weights = (
            source.in_proj_weight.chunk(3)
            if source._qkv_same_embed_dim
            else (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        )
        biases = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.chunk(3)
        inputs = (size, source.kdim, source.vdim)
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(weight, bias, cols, width)
            for weight, bias, cols in zip(weights, biases, inputs, strict=True)
        )
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias, width, size)
        self.train(source.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``, which needs the mask that ``is_causal`` is a hint about."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        unbatched = query.dim() == 2
        if unbatched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            attention = F.softmax(scores if mask is None else scores + mask, dim=-1)
            attention = F.dropout(attention, dropout)
            mixed = attention @ v
            weights = attention.mean(dim=1) if average_attn_weights else attention
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(mixed.transpose(1, 2).flatten(-2))
        if unbatched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _mask(self, attn: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
        mask = None
        if attn is not None:
            mask = _additive(attn, query.dtype)
            if mask.dim() == 3:
                size = mask.shape[0] // query.shape[0]
                mask = mask.unflatten(0, (query.shape[0], size))
                # One mask for each of the heads that were; those that are left take the first.
                mask = mask[:, : self.num_heads]
        if padding is not None:
            extra = _additive(padding, query.dtype).reshape(-1, 1, 1, padding.shape[-1])
            mask = extra if mask is None else mask + extra
        return mask


def replace_multihead_attention(expert: nn.Module) -> dict[str, nn.MultiheadAttention]:
    """Put :class:`HeadwiseAttention` in place of torch's modules; returns these by their names.

    A module that has several names is replaced by one module under all of them.
    """
    originals: dict[str, nn.MultiheadAttention] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in list(expert.named_modules(remove_duplicate=False)):
        if type(module) is nn.MultiheadAttention and _can_be_headwise(module):
            if module not in replacements:
                trains = module.out_proj.weight.requires_grad
                replacements[module] = HeadwiseAttention(module).requires_grad_(trains)
            expert.set_submodule(name, replacements[module])
            originals[name] = module
    return originals


def _can_be_headwise(module: nn.MultiheadAttention) -> bool:
    return module.bias_k is None and not module.add_zero_attn


def _linear(weight: Tensor, bias: Tensor | None, inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


def _sizes(module: nn.Module) -> Iterator[tuple[str, int]]:
    for key, value in vars(module).items():
        if type(value) is int and not key.startswith("_"):
            yield key, value


def _out(layer: nn.Module) -> int:
    for key in ("out_features", "out_channels", "nf"):
        value = getattr(layer, key, None)
        if isinstance(value, int):
            return value
    return 0
