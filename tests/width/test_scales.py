"""Factors that are roots of a width follow it, as if the class had made the narrow one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin import RIDEWrapper
from ride_plugin._width._attention import attention_of
from ride_plugin._width._scales import rescaled


class Net(nn.Module):
    """A stem that is shared; a layer that makes the width, a block of that width, a classifier."""

    def __init__(self, block: Callable[[int], nn.Module], width: int) -> None:
        super().__init__()
        self.stem, self.into = nn.Linear(8, 24), nn.Linear(24, width)
        self.block, self.fc = block(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.into(self.stem(x))).mean(1))


def narrowed(block: Callable[[int], nn.Module], width: int, tokens: int = 6) -> Net:
    torch.manual_seed(0)
    x = torch.randn(4, tokens, 8)
    model = RIDEWrapper(
        Net(block, width), 2, fork_at="into", expert_width=0.75, example_input=x
    ).eval()
    return model.to_module(1)


class OneHead(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.scale = d**-0.5

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-2, -1) * self.scale
        return scores.softmax(-1) @ self.v(x)


class OneHeadDivided(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.all, self.temperature = nn.Linear(d, 3 * d), math.sqrt(d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.all(x).chunk(3, -1)
        return (q @ k.transpose(-2, -1) / self.temperature).softmax(-1) @ v


class OneHeadFused(OneHead):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), scale=self.scale)


class FourHeads(nn.Module):
    """Attention under names that nobody knows, so that each head gets smaller."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.n, self.all, self.factor = 4, nn.Linear(d, 3 * d), (d // 4) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        batch, length, d = x.shape
        q, k, v = self.all(x).view(batch, length, 3, self.n, d // self.n).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * self.factor
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, d)


class Embedding(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.linear, self.embed_scale = nn.Linear(d, d), d**0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.embed_scale


class RootMeanSquare(nn.Module):
    """A norm without a parameter that would show the size."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.scale = d**0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.normalize(x, dim=-1)


class RootMeanSquareGain(RootMeanSquare):
    def __init__(self, d: int) -> None:
        super().__init__(d)
        self.gain = nn.Parameter(torch.ones(d))
        self.eps, self.drop_rate = 1e-6, d**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.normalize(x, dim=-1) * self.scale * self.gain, 0.0)


class EqualLinear(nn.Module):
    """A linear layer that scales its weight when it is used, as generators of images do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.randn(outputs, inputs)), inputs**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.factor)


class Standardised(nn.Conv1d):
    """A convolution of networks without normalisation: a gain over the root of the fan-in."""

    def __init__(self, *sizes: int, gain: float = 1.0) -> None:
        super().__init__(*sizes, padding=sizes[2] // 2)
        self.scale = gain * self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        weight = weight / weight.std((1, 2), keepdim=True) * self.scale
        return F.conv1d(x, weight, self.bias, padding=self.padding)


class OverTokens(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "one head": OneHead,
    "one head, divided": OneHeadDivided,
    "one head, fused": OneHeadFused,
    "four heads": FourHeads,
    "embedding": Embedding,
    "norm": RootMeanSquare,
    "norm with a gain": RootMeanSquareGain,
    "one convolution": lambda d: OverTokens(Standardised(d, d, 3)),
    "convolutions with a gain": lambda d: OverTokens(
        Standardised(d, 2 * d, 1, gain=1.7), Standardised(2 * d, d, 3, gain=1.7)
    ),
}


@pytest.mark.filterwarnings("ignore:`block.* followed the width")
@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_narrowed_expert_is_what_its_class_makes_that_narrow(kind: str, width: int) -> None:
    expert = narrowed(BLOCKS[kind], width)
    assert expert.into.out_features == 0.75 * width
    native = Net(BLOCKS[kind], expert.into.out_features).eval()
    native.load_state_dict(expert.state_dict())
    x = torch.randn(3, 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(expert(x), native(x))


@pytest.mark.filterwarnings("ignore:`block.* followed the width")
def test_the_factor_of_a_weight_of_its_own_follows_it() -> None:
    block = narrowed(lambda d: nn.Sequential(EqualLinear(d, 80), nn.Linear(80, d)), 64).block
    assert block[0].weight.shape[1] == 48
    assert block[0].factor == pytest.approx(48**-0.5)


class Cosine(nn.Module):
    """Multiplies cosines of 64 numbers by eight, which somebody chose."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(10, d)), 8.0
        self.out = nn.Linear(10, d)

    def forward(self, x: Tensor) -> Tensor:
        cosines = F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))
        return self.out(self.scale * cosines)


class Residual(nn.Module):
    """Adds an eighth of what a layer says, whatever its width is."""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down, self.share = nn.Linear(d, hidden), nn.Linear(hidden, d), 0.125

    def forward(self, x: Tensor) -> Tensor:
        return x + self.share * self.down((self.up(x) * self.share).relu())


class Bounded(nn.Module):
    """Has numbers that no operation multiplies with."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.linear, self.level, self.elu = nn.Linear(d, d), 0.125, nn.ELU(0.125)

    def forward(self, x: Tensor) -> Tensor:
        return self.elu(F.leaky_relu(self.linear(x), self.level) + self.level)


class Unused(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.linear, self.level, self.drop = nn.Linear(d, d), 0.125, nn.Dropout(0.125)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(x))


OTHERS: dict[str, Callable[[int], nn.Module]] = {
    "cosine": Cosine,
    "share of every width": lambda d: nn.Sequential(
        Residual(d, 80), nn.Linear(d, 80), Residual(80, 40), nn.Linear(80, d)
    ),
    "bounds": Bounded,
    "unused": Unused,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_numbers_that_are_roots_by_chance_stay(kind: str) -> None:
    expert, whole = narrowed(OTHERS[kind], 64), Net(OTHERS[kind], 64)
    assert expert.into.out_features == 48
    modules = dict(whole.named_modules())
    for name, module in expert.named_modules():
        for key, value in vars(module).items():
            if type(value) is float:
                assert value == getattr(modules[name], key)


def test_a_root_of_what_became_several_sizes_is_left_and_named() -> None:
    with pytest.warns(UserWarning, match=r"^`block\.scale` of the narrowed experts may be comp"):
        expert = narrowed(OneHead, 16, tokens=16)
    assert expert.block.scale == 0.25
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert narrowed(OneHead, 24).block.scale == pytest.approx(18**-0.5)


def test_what_followed_and_may_have_been_chosen_is_named() -> None:
    with pytest.warns(UserWarning, match=r"^`block\.scale` \(0\.25 became 0\.2887\) of the narr"):
        assert narrowed(OneHead, 16).block.scale == pytest.approx(12**-0.5)
    # Roots of several sizes are computed: nobody chooses so by chance.
    two = OverTokens(Standardised(64, 256, 1), Standardised(256, 64, 1))
    convolutions = narrowed(lambda d: two, 64).block
    assert [m.scale for m in convolutions] == [pytest.approx(48**-0.5), pytest.approx(192**-0.5)]


def test_a_factor_of_a_head_stays_where_a_table_has_as_many_heads() -> None:
    class Biased(nn.Module):
        """Has as many heads as a head has numbers."""

        def __init__(self, d: int) -> None:
            super().__init__()
            self.num_heads, self.scale = 8, 8**-0.5
            self.qkv, self.proj = nn.Linear(d, 3 * 64), nn.Linear(64, d)
            self.bias = nn.Parameter(torch.randn(8, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            parts = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            q, k, v = parts.unbind(0)
            scores = q @ k.transpose(-2, -1) * self.scale + self.bias
            return x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))

    attention = narrowed(Biased, 32).block
    assert (attention.num_heads, attention.bias.shape[0]) == (6, 6)
    assert attention.scale == 8**-0.5


@pytest.mark.parametrize("name", ["scale", "temperature", "norm_factor", "anything"])
def test_any_factor_of_a_heads_size_follows_it(name: str) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor, self.dropout = 4.0, nn.Dropout(0.25)

    attention = nn.Module()
    attention.num_heads, attention.head_dim, attention.attn_drop = 2, 16, 0.25
    attention.qkv, attention.inner = nn.Linear(32, 96), Inner()
    setattr(attention, name, 0.25)
    found = attention_of("", attention)
    assert found is not None
    changed = {(m, key): value for m, key, value in found.apply("head_dim", 0.75)[1]}
    assert changed == {
        (attention, "head_dim"): 12,
        (attention, name): pytest.approx(12**-0.5),
        (attention.inner, "factor"): pytest.approx(12**0.5),
    }


def test_a_size_of_one_has_no_root_to_tell() -> None:
    module = nn.Module()
    module.gain, module.other = 1.0, math.pi
    assert list(rescaled(module, 1, 2)) == []
    assert list(rescaled(module, 9, 4)) == []
