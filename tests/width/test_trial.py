"""Trial forwards of narrowed experts: widths follow what reaches a layer or a function."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ride_plugin import RIDEWrapper, WidthError, expert_logits
from ride_plugin._width import _narrow


class Net(nn.Module):
    """A stem that is shared, a body that is forked and narrowed, a classifier."""

    def __init__(self, body: nn.Module, features: int = 24) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 16)
        self.body = body
        self.wide, self.fc = nn.Linear(features, 96), nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.wide(self.body(self.stem(x).relu())).relu())


class Two(nn.Module):
    """Two layers side by side, joined, then what is under test on ``[B, C, 4]``."""

    def __init__(self, width: int, then: nn.Module) -> None:
        super().__init__()
        self.left, self.right = nn.Conv1d(4, width, 1), nn.Conv1d(4, width, 1)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x.unflatten(1, (4, 4)))
        right = self.right(x.unflatten(1, (4, 4)).flip(2))
        return self.then(torch.cat([left, right], 1)).mean(2)


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Conv1d(4, 24, 1)
        self.depthwise = nn.Conv1d(24, 48, 3, padding=1, groups=24)
        self.out = nn.Conv1d(48, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.depthwise(self.into(x.unflatten(1, (4, 4))))).mean(2)


class NormByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 24)
        self.gain, self.bias = nn.Parameter(torch.ones(24)), nn.Parameter(torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return F.layer_norm(x, normalized_shape=(x.shape[1],), weight=self.gain, bias=self.bias)


class WeightOfALayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x).relu(), self.second.weight, self.second.bias)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.mix = nn.Linear(16, 32), nn.Parameter(torch.randn(32, 24) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.linear(x).relu(), self.mix)


class Conv1D(nn.Module):
    """The linear layer of GPT-2, whose weight is transposed; transformers calls it so."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = (
            nn.Parameter(torch.randn(nx, nf) / 4),
            nn.Parameter(torch.zeros(nf)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class SumOfProducts(nn.Module):
    """A residual block on the trunk's stream, which cannot be narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = Conv1D(24, 16), Conv1D(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.into(x).relu())


class KeptShape(nn.Module):
    """Views its factor in sizes that it keeps, as layer scales do; it keeps others as well."""

    def __init__(self, shape: object) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(4, 24, 1), nn.Conv1d(24, 24, 1)
        self.scale, self.shape = nn.Parameter(torch.rand(24)), shape
        self.positions, self.names = (4, 24), ["scale", 4, 24]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.unflatten(1, (4, 4)))
        shape = self.shape if isinstance(self.shape, tuple) else (1, self.shape, 1)
        return self.out((x * self.scale.view(shape)).relu()).mean(2)


class Parts(nn.Module):
    """Takes three parts out of a layer, each as wide as the input, and needs 24 of them."""

    def __init__(self) -> None:
        super().__init__()
        self.three = nn.Linear(24, 72)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.three(x).reshape(len(x), 3, x.shape[1]).unbind(1)
        left, right = c.split([8, 16], dim=1)
        return a * b + torch.cat([right, left], 1)


class FixedPieces(nn.Module):
    """Cuts into pieces of six channels, as many as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.linear(x).split(6, dim=1)
        return torch.cat([first.relu(), *others], 1)


class FixedRows(nn.Module):
    """A reshape that would move positions into channels, had it fewer channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.unflatten(1, (4, 4)))
        return x.permute(0, 2, 1).reshape(-1, 24).relu().view(len(x), -1, 24).mean(1)


class ByIndex(nn.Module):
    """Reads a channel by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x * x[:, 23:].sigmoid() + x[:, 20].unsqueeze(1)


class ByIndexTensor(ByIndex):
    """Reads channels whose numbers a tensor holds; without contents none is out of range."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.tensor([20, 23]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x * x[:, self.places].mean(1, keepdim=True).sigmoid()


class LooksAtValues(ByIndex):
    """Takes its way by a value, which a tensor without contents does not have."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x.relu() if float(x.detach().max()) < 1e6 else x.tanh()


BODIES = {
    "depthwise": (Depthwise, 24),
    "groups": (lambda: Two(12, nn.Conv1d(24, 24, 3, padding=1, groups=3)), 24),
    "group norm": (lambda: Two(12, nn.GroupNorm(6, 24)), 24),
    "norm by keyword": (NormByKeyword, 24),
    "weight of a layer": (WeightOfALayer, 24),
    "product": (Product, 24),
    "sum of products": (SumOfProducts, 16),
    "kept shape": (lambda: KeptShape((24, 1)), 24),
    "kept size": (lambda: KeptShape(24), 24),
    "pieces": (FixedPieces, 24),
    "rows": (FixedRows, 24),
    "index": (ByIndex, 24),
    "index tensor": (ByIndexTensor, 24),
    "values": (LooksAtValues, 24),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_narrowed_expert_computes_what_its_layers_say(name: str) -> None:
    body, features = BODIES[name]
    torch.manual_seed(0)
    net = Net(body(), features)
    model = RIDEWrapper(net, 2, fork_at="body", expert_width=0.75, example_input=torch.rand(2, 6))
    x = torch.rand(7, 6)
    model.eval()
    with torch.no_grad():
        both = expert_logits(model(x))
        assert both.shape == (7, 2, 5)
        for index in range(2):
            alone = model.to_module(index)  # the backbone's own forward, without trunk and replay
            torch.testing.assert_close(alone(x), both[:, index])
            for row in range(7):  # no sample looks at another one's channels
                torch.testing.assert_close(alone(x[row : row + 1])[0], both[row, index])
    whole = sum(p.numel() for p in net.body.parameters())
    narrowed = sum(p.numel() for n, p in alone.named_parameters() if n.startswith("body."))
    assert narrowed <= whole


@pytest.mark.parametrize("name", BODIES)
def test_trials_without_contents_find_the_same_widths(name, monkeypatch) -> None:
    body, features = BODIES[name]

    def shapes() -> dict[str, torch.Size]:
        torch.manual_seed(0)
        net, x = Net(body(), features), torch.rand(2, 6)
        model = RIDEWrapper(net, 1, fork_at="body", expert_width=0.75, example_input=x)
        return {key: parameter.shape for key, parameter in model.named_parameters()}

    found = shapes()
    monkeypatch.setattr(_narrow, "_narrowed", partial(_with_contents, _narrow._narrowed))
    assert shapes() == found


def _with_contents(narrowed, split, width, meta):
    if meta:
        raise NotImplementedError
    return narrowed(split, width, meta)


def test_what_is_narrowed_runs_with_contents_twice() -> None:
    calls = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(not x.is_meta)
            return super().forward(x)

    counted = {}
    for width in (1.0, 0.75):
        calls.clear()
        net, x = Net(Counted(16, 24)), torch.rand(2, 6)
        RIDEWrapper(net, 2, fork_at="body", expert_width=width, example_input=x)
        counted[width] = sum(calls)
    assert counted == {1.0: 11, 0.75: 13}  # once with all rows, once with some


def test_in_a_sum_of_products_the_weight_makes_the_width() -> None:
    net, x = Net(SumOfProducts(), 16), torch.rand(2, 6)
    body = RIDEWrapper(net, 2, fork_at="body", expert_width=0.75, example_input=x).experts[1].body
    assert (body.into.nf, body.out.nx, body.out.nf) == (18, 18, 16)


def test_what_a_module_is_given_keeps_its_width_where_nothing_else_helps() -> None:
    layers = nn.Linear(6, 16), nn.Linear(16, 24), Parts(), nn.Linear(24, 96), nn.Linear(96, 5)
    model = RIDEWrapper(nn.Sequential(*layers), 2, fork_at="1", expert_width=0.75)
    _, into, parts, wide, _ = model.to_module(1)
    assert [layer.out_features for layer in (into, parts.three, wide)] == [24, 72, 72]


def test_sizes_that_a_parameter_is_viewed_in_follow_it() -> None:
    for shape, narrower in (((24, 1), (18, 1)), (24, 18), (torch.Size((24, 1)), (18, 1))):
        net, x = Net(KeptShape(shape)), torch.rand(2, 6)
        model = RIDEWrapper(net, 2, fork_at="body", expert_width=0.75, example_input=x)
        body = model.experts[1].body
        assert (body.shape, len(body.scale), net.body.shape) == (narrower, 18, shape)
        assert (body.positions, body.names) == (
            (4, 24),
            ["scale", 4, 24],
        )  # nothing viewed in these


def test_groups_follow_what_arrives() -> None:
    def narrowed(then: nn.Module) -> nn.Module:
        net, x = Net(Two(12, then)), torch.rand(2, 6)
        model = RIDEWrapper(net, 2, fork_at="body", expert_width=0.75, example_input=x)
        return model.to_module(0).body.then

    norm = narrowed(nn.GroupNorm(6, 24))
    assert norm.num_channels == 16 == len(norm.weight)  # two layers of 12, now of 8 each
    assert norm.num_groups == 4  # of four channels, as before
    conv = narrowed(nn.Conv1d(24, 24, 3, padding=1, groups=3))
    assert (conv.in_channels, conv.out_channels, conv.groups) == (16, 18, 2)
    assert conv.weight.shape == (18, 8, 3)  # eight channels reach each group, as before


def test_groups_that_cannot_follow_are_refused() -> None:
    net = Net(Two(12, nn.Conv1d(24, 24, 3, padding=1, groups=8)))
    with pytest.raises(WidthError, match=r"`body\.then`.* in 8 groups"):
        RIDEWrapper(net, 2, fork_at="body", expert_width=0.75, example_input=torch.rand(2, 6))


def test_a_path_that_hangs_on_the_width_is_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.fc = nn.Linear(16, 24), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            out = self.fc(x)
            return out.clone() if x.shape[1] == 24 else out

    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), Fixed())
    with pytest.raises(WidthError, match="another path"):
        RIDEWrapper(net, 2, fork_at="2", expert_width=0.75, example_input=torch.rand(2, 6))


class Decoder(nn.Module):
    """Down and up again, joined with what the trunk computed, as U-Net does."""

    def __init__(self, d: int) -> None:
        super().__init__()
        convolution, transposed = getattr(nn, f"Conv{d}d"), getattr(nn, f"ConvTranspose{d}d")
        self.stem = convolution(3, 16, 3, padding=1)
        self.down = convolution(16, 32, 3, stride=2, padding=1)
        self.up = transposed(32, 16, 2, stride=2)
        self.late, self.fc = convolution(16, 32, 3, padding=1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        early = self.stem(x).relu()
        late = self.late(self.up(self.down(early).relu()) + early).relu()
        return self.fc(late.flatten(2).mean(2))


@pytest.mark.parametrize("d", [1, 2, 3])
def test_a_layer_that_goes_up_again_to_the_trunk_gives_way_alone(d: int) -> None:
    x = torch.randn(2, 3, *[8] * d)
    model = RIDEWrapper(
        Decoder(d), num_experts=2, fork_at="down", expert_width=0.75, example_input=x
    )
    expert = model.experts[0]
    assert expert.down.weight.shape[:2] == (24, 16)
    assert expert.up.weight.shape[:2] == (24, 16)  # it keeps its outputs, not its inputs
    assert expert.late.weight.shape[:2] == (24, 16)
    assert model(x).shape == (2, 5)


def test_trials_come_to_an_end(monkeypatch) -> None:
    monkeypatch.setattr(_narrow, "_TRIALS", 1)  # a decoder needs a second one
    x = torch.randn(2, 3, 8)
    with pytest.raises(WidthError, match="no consistent widths were found in 1 trials"):
        RIDEWrapper(Decoder(1), 2, fork_at="down", expert_width=0.75, example_input=x)
