"""Narrower experts: the authors' widths, kept interfaces, training, and refusals."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from benchmarks.zoo.stateful import FrozenStem
from ride_plugin import (
    ArgumentError,
    RIDEWrapper,
    WidthError,
    count_flops,
    expert_logits,
    experts_loss,
)
from ride_plugin._initialise import warn_if_trained
from ride_plugin._width._amend import Amender
from ride_plugin._width._ledger import Ledger
from ride_plugin._width._map import WidthMap
from ride_plugin._width._plan import Amended, NarrowingPlan
from tests.backbones import BACKBONES, CifarResNet, ImageNetResNet, mlp
from tests.handmade import resnet32_ride
from tests.reference import resnet32_arrays


def widths(expert: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (m.in_channels, m.out_channels)
        for name, m in expert.named_modules()
        if isinstance(m, nn.Conv2d)
    }


@pytest.fixture(scope="module")
def ours() -> RIDEWrapper:
    """The authors' model for CIFAR, narrowed by this library."""
    return RIDEWrapper(CifarResNet(), 3, expert_width=0.75, classifier="cosine").eval()


def test_the_authors_widths_on_cifar_resnet_32(ours) -> None:
    expert = ours.experts[2]
    found = widths(expert)
    assert found["layer2.0.conv1"] == (16, 24)
    assert found["layer2.4.conv2"] == (24, 24)
    assert found["layer3.0.conv1"] == (24, 48)
    assert set(expert.linear.weight.shape) == {48, 100}


def test_the_authors_parameter_count_and_flops_on_cifar_resnet_32(ours) -> None:
    theirs = resnet32_ride()[0].eval()
    mine = sum(p.numel() for p in ours.parameters())
    assert mine == sum(p.numel() for p in theirs.parameters())
    x = torch.zeros(1, 3, 32, 32)
    assert count_flops(ours, x) == count_flops(_AllExperts(theirs), x)


class _AllExperts(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.router_inputs(x).expert_logits


@pytest.mark.reference
def test_shapes_are_those_of_the_authors_checkpoint(ours) -> None:
    _, state = resnet32_arrays()
    expert = ours.experts[1]
    for stage in ("layer2", "layer3"):
        prefix = f"backbone.{stage}s.1."
        theirs = {
            k.removeprefix(prefix): tuple(v.shape) for k, v in state.items() if k.startswith(prefix)
        }
        own = {k: tuple(v.shape) for k, v in expert.get_submodule(stage).state_dict().items()}
        assert own == theirs


def test_the_authors_widths_on_a_bottleneck_resnet() -> None:
    backbone = ImageNetResNet(20, 64, (1, 1, 1, 1))  # ResNet-50's widths, one block a stage
    found = widths(RIDEWrapper(backbone, 2, expert_width=0.75).experts[0])
    assert found["layer3.0.conv1"] == (512, 192)  # what the trunk hands over stays
    assert found["layer3.0.conv3"] == (192, 768)
    assert found["layer3.0.downsample.0"] == (512, 768)
    assert found["layer4.0.conv2"] == (384, 384)


@pytest.mark.parametrize("kind", list(BACKBONES))
def test_a_narrowed_model_is_smaller_runs_on_rows_and_learns(kind: str) -> None:
    constructor, shape, _ = BACKBONES[kind]
    torch.manual_seed(0)
    backbone = constructor()
    model = RIDEWrapper(backbone, 2, expert_width=0.75)
    whole, trunk, narrow = (
        sum(p.numel() for p in m.parameters()) for m in (backbone, model.trunk, model.experts[0])
    )
    assert narrow < 0.9 * (whole - trunk)
    x, y = torch.randn(8, *shape), torch.randint(0, 5, (8,))
    whole = model.router_inputs(x).expert_logits
    model.eval()
    rows = torch.tensor([7, 2])
    logits, _ = model.run_expert(1, model.run_trunk(x).select(rows))
    torch.testing.assert_close(logits, whole[rows, 1], rtol=1e-4, atol=1e-5)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(20):
        loss = experts_loss(F.cross_entropy, model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < 0.9 * losses[0]


class SplitsByAFixedSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.widen = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 64, 3)
        self.branch, self.join = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(64, 64, 1)
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.widen(self.stem(x)).relu().split(32, dim=1)
        return self.fc(self.join(torch.cat([left, self.branch(right)], 1)).mean((2, 3)))


def test_equal_parts_of_a_split_stay_equal() -> None:
    expert = RIDEWrapper(SplitsByAFixedSize(), 1, fork_at="widen", expert_width=0.75).experts[0]
    assert widths(expert) == {"widen": (8, 64), "branch": (32, 24), "join": (56, 48)}


def test_what_a_forward_caches_does_not_stop_the_trials() -> None:
    backbone = FrozenStem()  # computes a grid once and keeps it
    model = RIDEWrapper(backbone, 2, expert_width=0.75)
    assert widths(model.experts[0])["stage3.0"] == (12, 24)
    assert model.experts[0].grid is None  # nothing of the trials stays
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), model(x), rtol=0, atol=0)


def test_weights_keep_their_scale_for_the_new_fan_in() -> None:
    torch.manual_seed(0)
    backbone = CifarResNet(n=1)
    expert = RIDEWrapper(backbone, 2, expert_width=0.75).experts[1]
    new, old = expert.layer3[0].conv2.weight, backbone.layer3[0].conv2.weight
    torch.testing.assert_close(new.std() / old.std(), torch.tensor((64 / 48) ** 0.5), rtol=0.05,
                               atol=0)  # fmt: skip
    assert not torch.equal(new, RIDEWrapper(backbone, 2, expert_width=0.75).experts[1]
                           .layer3[0].conv2.weight)  # fmt: skip


def test_a_narrowed_expert_counts_as_fresh() -> None:
    model = RIDEWrapper(CifarResNet(n=1), 2, expert_width=0.5)
    warn_if_trained(model.experts[0])  # warnings are errors here
    assert all(m.training for m in model.modules())
    assert expert_logits(model(torch.randn(4, 3, 32, 32))).shape == (4, 2, 100)


class FillsATable(nn.Module):
    """Keeps on itself, outside of all units, what its first forward made after the fork."""

    table: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        if self.table is None:
            self.table = torch.ones(x.shape[1])
        return self.head(self.c((x * self.table).relu()).relu())


def test_an_expert_that_makes_a_table_of_its_width_is_narrowed() -> None:
    model = RIDEWrapper(FillsATable(), 2, fork_at="b", expert_width=0.75).eval()
    x = torch.randn(3, 6)
    experts = expert_logits(model(x))
    assert [expert.b.out_features for expert in model.experts] == [24, 24]
    for index in range(2):
        torch.testing.assert_close(model.to_module(index)(x), experts[:, index])


def test_the_map_keeps_equal_widths_equal_and_groups_whole() -> None:
    plain = WidthMap(0.75, [])
    assert [plain(c) for c in (32, 64, 256, 512)] == [24, 48, 192, 384]
    grouped = WidthMap(0.75, [(32, 8)])  # 32 groups of 8 channels
    assert grouped(256) % 32 == 0 or grouped(256) % 8 == 0


def test_width_out_of_range_and_width_of_pretrained_weights() -> None:
    for width in (0, -1.0, 1.5, "x"):
        with pytest.raises(ArgumentError, match="`expert_width` to be a finite number > 0"):
            RIDEWrapper(mlp(), 2, expert_width=width)
    with pytest.raises(ArgumentError, match="init='copy'"):
        RIDEWrapper(mlp(), 2, expert_width=0.75, init="copy")


def test_a_layer_that_cannot_be_narrowed_is_named() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.randn(16, 16, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bc,cdk->bd", x, self.mix)

    backbone = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), Fixed(), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(WidthError, match=r"Cannot narrow.*`expert_width=1\.0`"):
        RIDEWrapper(backbone, 2, fork_at="2", expert_width=0.75)


class Sliced(nn.Module):
    """Passes half of its channels by: the first ones, by a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.half, self.left = 32, nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x[:, : self.half]), x[:, self.half :]], 1)


class Reordered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(64).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.order]


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(64, 64, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bc,cdk->bd", x, self.mix)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Sliced(), "`block` (`__getitem__` returns another number"),
        (Reordered(), "`block` (`__getitem__`: index 63 is out of bounds"),
        (Mixed(), "`block` (`einsum`: "),
    ],
)
def test_what_layers_kept_their_widths_for_is_named(block: nn.Module, reason: str) -> None:
    net = nn.Sequential(OrderedDict(stem=nn.Linear(8, 24), into=nn.Linear(24, 64), block=block))
    net.append(nn.Linear(64, 5))
    expected = re.escape(f"parameters could go, since layers kept their widths for {reason}")
    with pytest.raises(WidthError, match=expected):
        RIDEWrapper(net, 2, fork_at="into", expert_width=0.5, example_input=torch.randn(4, 8))


@pytest.mark.parametrize(
    "change",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    ],
)
def test_weights_that_are_computed_are_refused_and_made_so_after_wrapping(change) -> None:
    backbone = mlp()
    model = RIDEWrapper(mlp(), 2, fork_at="2", expert_width=0.5)
    change(backbone[4])  # where torch aborted: its weight norm looks at no size
    with pytest.raises(WidthError, match=r"weights of `4` are computed.*narrow the backbone as it"):
        RIDEWrapper(backbone, 2, fork_at="2", expert_width=0.5)
    for expert in model.experts:
        change(expert[4])
    x = torch.randn(6, 20)
    out = expert_logits(model(x))
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    for index in range(2):
        torch.testing.assert_close(model.to_module(index)(x), out[:, index])


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_a_computed_weight_is_refused_under_whatever_name() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.mix = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.wide, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.early(x)
            return self.head(self.wide(x + self.mix(x, x, x)[0]).relu().mean(1))

    backbone, x = Attending(), torch.randn(2, 3, 6)
    RIDEWrapper(backbone, 2, fork_at="mix", expert_width=0.5, example_input=x)
    nn.utils.weight_norm(backbone.mix, "in_proj_weight")  # was built, without its norm
    with pytest.raises(WidthError, match=r"weights of `mix` are computed"):
        RIDEWrapper(backbone, 2, fork_at="mix", expert_width=0.5, example_input=x)


def test_attention_that_runs_in_the_trunk_keeps_its_number_of_heads() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = 2
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
            self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

        def forward(self, x: Tensor) -> Tensor:
            rows, length, _ = x.shape
            q, k, v = self.qkv(x).reshape(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, length, -1)
            x = x + self.out(y)
            return x + self.mlp(x)

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Block(), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(x).mean(1))

    x = torch.randn(4, 6, 8)
    model = RIDEWrapper(
        Backbone(), 2, fork_at="block.mlp", expert_width=0.5, example_input=x
    ).eval()
    assert model.experts[0].block.heads == 2
    assert model.experts[0].block.mlp[0].out_features == 16
    # The plain module runs attention itself, with the expert's number of heads.
    torch.testing.assert_close(model.to_module(1)(x), expert_logits(model(x))[:, 1])


class TwoViews(nn.Module):
    """In evaluation, an image and its mirror image; the second view runs the trunk's layers too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits if self.training else (logits + self.net(x.flip(3))) / 2


class Checkpointed(nn.Module):
    """Recomputes a part in training, which calls its layers one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = checkpoint_sequential(self.early, 2, x, use_reentrant=False)
        else:
            x = self.early(x)
        x = checkpoint(self.late, x, use_reentrant=False)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("kind", [TwoViews, Checkpointed])
def test_the_trunk_is_tried_in_the_mode_that_the_expert_is_tried_in(kind: type[nn.Module]) -> None:
    x = torch.randn(4, 3, 12, 12)
    model = RIDEWrapper(kind(), 2, expert_width=0.75, example_input=x)
    widths = {m.out_channels for m in model.experts[1].modules() if isinstance(m, nn.Conv2d)}
    assert widths == {12}
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.to_module(1)(x), expert_logits(model(x))[:, 1])
    model.train()
    expert_logits(model(x)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Spline(nn.Module):
    """A layer whose weight no known layer owns, beside one that is known, as in KANs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(-1, 1, 6))
        self.base = nn.Linear(inputs, outputs)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 6))

    def forward(self, x: Tensor) -> Tensor:
        basis = torch.exp(-((x[..., None] - self.grid) ** 2))
        return F.silu(self.base(x)) + torch.einsum("big,oig->bo", basis, self.weight)


def test_no_weight_grows_while_widths_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    resize = Ledger.resize

    def watched(
        self: Ledger, module: nn.Module, name: str, sizes: dict[int, int], *more: float
    ) -> None:
        nonlocal largest
        largest = max(largest, *sizes.values())
        resize(self, module, name, sizes, *more)

    monkeypatch.setattr(Ledger, "resize", watched)
    layers = [nn.Linear(20, 16), Spline(16, 16), Spline(16, 16), nn.Linear(16, 5)]
    with pytest.raises(WidthError):
        RIDEWrapper(nn.Sequential(*layers), 2, expert_width=0.75, example_input=torch.randn(4, 20))
    assert 0 < largest <= 16


PUT: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "bank[rows] = x": lambda bank, rows, x: bank.__setitem__(rows, x),
    "bank[:n] = x": lambda bank, rows, x: bank.__setitem__(slice(0, len(x)), x),
    "copy_": lambda bank, rows, x: bank[: len(x)].copy_(x),
    "index_copy_": lambda bank, rows, x: bank.index_copy_(0, rows, x),
    "index_put_": lambda bank, rows, x: bank.index_put_((rows,), x),
    "index_add_": lambda bank, rows, x: bank.index_add_(0, rows, x),
    "lerp_": lambda bank, rows, x: bank[: len(x)].lerp_(x, 0.1),
    "roll": lambda bank, rows, x: bank.copy_(torch.cat([x, bank[: -len(x)]])),
}


class FeatureBank(nn.Module):
    """Puts features into a memory in training, as contrastive losses want it."""

    def __init__(self, put: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.put = put
        self.body = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 5)
        self.register_buffer("bank", torch.zeros(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        if self.training:
            self.put(self.bank, torch.arange(len(x)), features.detach())
        return self.head(features)


@pytest.mark.parametrize("how", PUT)
def test_a_memory_of_features_becomes_as_narrow_as_they_are(how: str) -> None:
    x, backbone = torch.randn(4, 20), FeatureBank(PUT[how])
    model = RIDEWrapper(backbone, 2, fork_at="body.2", expert_width=0.75, example_input=x)
    assert [tuple(expert.bank.shape) for expert in model.experts] == [(32, 12)] * 2
    expert_logits(model(x)).square().mean().backward()
    assert all(expert.bank[:4].any() and not expert.bank[4:].any() for expert in model.experts)


def test_an_expert_that_would_not_train_is_refused_when_it_is_narrowed() -> None:
    x, backbone = (
        torch.randn(4, 20),
        FeatureBank(lambda bank, rows, y: bank.data.__setitem__(rows, y)),
    )
    with pytest.raises(WidthError):
        RIDEWrapper(backbone, 2, fork_at="body.2", expert_width=0.75, example_input=x)


class Shuffled(nn.Module):
    """Channels in an order that was drawn once; the index cannot become shorter."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.order]


def test_a_layer_before_a_fixed_order_of_channels_keeps_its_width_and_none_grows() -> None:
    backbone = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), Shuffled(32), nn.ReLU(),
        nn.Conv2d(32, 128, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 5),
    )  # fmt: skip
    x = torch.randn(4, 3, 8, 8)
    expert = RIDEWrapper(backbone, 2, fork_at="2", expert_width=0.75, example_input=x).experts[0]
    assert widths(expert) == {"2": (16, 32), "5": (32, 96)}


def test_no_layer_is_pinned_to_more_than_it_had() -> None:
    expert = nn.Sequential(nn.Linear(4, 8))
    plan = NarrowingPlan()
    ledger = Ledger(expert, set())
    ledger.layers["0"], ledger.new_widths["0"] = (8, 6), 6
    amender = Amender(ledger, plan, WidthMap(0.75, []), [], {})
    made = torch.randn(2, 6)
    ledger.tag(made, frozenset({("layer", "0")}))
    amender.pin(made, 1, 32, 6)
    assert plan.out == {"0": 8}
    with pytest.raises(Amended):  # as wide as it was, it can do no more
        amender.pin(made, 1, 32, 6)


def test_a_choice_by_a_mask_narrows_what_stands_in_for_the_features() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late, self.head = nn.Linear(6, 6), nn.Linear(6, 32), nn.Linear(32, 5)
            self.instead = nn.Parameter(torch.randn(32))

        def forward(self, x: Tensor) -> Tensor:
            x = self.late(self.early(x).relu())
            return self.head(torch.where(x > 0, x, self.instead))

    x = torch.randn(4, 6)
    model = RIDEWrapper(Masked(), 2, fork_at="late", expert_width=0.75, example_input=x)
    assert model.experts[0].late.out_features == 24 == len(model.experts[0].instead)


@pytest.mark.parametrize("as_keyword", [False, True])
def test_a_bias_of_attention_loses_heads_and_no_places(as_keyword: bool) -> None:
    class Attention(nn.Module):
        """Eight heads of eight, and a bias for each head and distance, as LeViT's kin has it."""

        def __init__(self, d: int, tokens: int) -> None:
            super().__init__()
            self.num_heads, self.key_dim, self.out_dim = 8, 8, 64
            self.qkv, self.proj = nn.Linear(d, 3 * 64), nn.Linear(64, d)
            self.bias = nn.Parameter(torch.zeros(8, tokens))
            places = torch.arange(tokens)
            self.register_buffer("distances", (places[:, None] - places).abs())

        def forward(self, x: Tensor) -> Tensor:
            parts = self.qkv(x).view(*x.shape[:2], self.num_heads, -1).split([self.key_dim] * 3, -1)
            q, k, v = (part.transpose(1, 2) for part in parts)
            bias = self.bias[:, self.distances]
            named, placed = ({"attn_mask": bias}, ()) if as_keyword else ({}, (bias,))
            z = F.scaled_dot_product_attention(q, k, v, *placed, **named)
            return x + self.proj(z.transpose(1, 2).reshape(*x.shape[:2], self.out_dim))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Linear(6, 48), Attention(48, tokens=10)
            self.fc = nn.Linear(48, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.block(self.stem(x)).mean(1))

    x = torch.randn(4, 10, 6)
    model = RIDEWrapper(Net(), 2, fork_at="block", expert_width=0.75, example_input=x)
    block = model.experts[0].block
    assert (block.num_heads, block.key_dim, tuple(block.bias.shape)) == (6, 8, (6, 10))
