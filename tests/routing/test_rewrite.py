"""A rewritten graph computes what the graph computes, whatever is written in place around it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin.routing._fused import FusedStage
from ride_plugin.routing._fused_conv import FusedConv2d

pytestmark = pytest.mark.exports

SIZE = (3, 8, 8)


class Parts(nn.Module):
    """Layers for the networks below, and parameters that some of them compute with."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second, self.third = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.gain, self.shift = (nn.Parameter(torch.randn(8)) for _ in range(2))
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.5)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 64, 5)


class ComputedGain(Parts):
    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        return F.batch_norm(out, self.mean, self.var * 2, 1 + self.gain, self.shift, False)


class ComputedBias(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.first.weight, self.shift * 0.5)


class ComputedBiasBeforeNorm(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.first.weight, self.shift * 0.5))


class BiasOfTheInput(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.first.weight, x.mean() + self.shift))


class GainOfTheInput(Parts):
    def forward(self, x: Tensor) -> Tensor:
        gain = x.mean() + self.gain
        return F.batch_norm(self.first(x), self.mean, self.var, gain, self.shift, False)


class InputOfAConvolutionWrittenBeforeTheSum(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out = self.second(x)
        return out + self.third(F.relu(x, inplace=True))


class InputOfAConvolutionWrittenBeforeTheActivation(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out = self.second(x)
        x.mul_(-2)
        return F.relu(out) + x


class AddendWrittenBeforeTheActivation(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out = self.second(x.tanh()) + x
        x.mul_(-2)
        return F.relu(out) + x


class WrittenThroughAView(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out = self.second(x)
        x[:, :2].mul_(-2)
        return F.relu(out) + x


class WrittenThroughDropout(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out = self.second(x)
        F.dropout(x, training=False).mul_(-2)
        return F.relu(out) + x


class CopyByConcatenation(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(F.relu(torch.cat([x], dim=1), inplace=True)) + x


class CopyOfWhatIsWritten(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        copy = torch.cat([x], dim=1)
        x.mul_(-2)
        return self.second(copy) + x


class CopyByConversion(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        copy = x.to(x.dtype, copy=True)
        copy.mul_(-2)
        return self.second(x) + copy


class ImagesWritten(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(-2)
        return self.first(x)


class ImagesWrittenThroughAView(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 1:].mul_(-2)
        return self.first(x)


class ConstantWritten(Parts):
    def forward(self, x: Tensor) -> Tensor:
        gain = self.gain.clone()
        gain += x.mean()
        return self.first(x) * gain[:, None, None]


class FlattenedAndWritten(Parts):
    """`flatten` views one layout and copies another, so that its input changes in one alone."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.second(self.first(x))
        flat = x.flatten(1)
        flat.mul_(-2)
        return self.head(flat), x


class WrittenAndFlattenedBefore(Parts):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.second(self.first(x))
        flat = x.flatten(1)
        x.mul_(-2)
        return self.head(flat), x


NETWORKS = [kind for kind in vars().values() if isinstance(kind, type) and Parts in kind.__bases__]


def rewritten(network: nn.Module) -> FusedStage:
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean)
    x = torch.randn(2, *SIZE)
    program = torch.export.export(network.eval(), (x,), dynamic_shapes=shapes)
    return FusedStage(program)


def results(function: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found = function(x.clone())
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("kind", NETWORKS, ids=lambda kind: kind.__name__)
def test_what_is_rewritten_computes_the_same(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = kind()
    stage = rewritten(network)
    for batch in (1, 4):
        for _ in range(2):  # what one call has written, the next one may read
            x = torch.randn(batch, *SIZE)
            for layout in (torch.contiguous_format, torch.channels_last):
                given = x.contiguous(memory_format=layout)
                expected = results(network, given)
                for got, wanted in zip(results(stage, given), expected, strict=True):
                    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "fused"),
    [(ComputedGain, 1), (ComputedBias, 1), (ComputedBiasBeforeNorm, 1), (BiasOfTheInput, 0)],
)
def test_what_parameters_alone_decide_is_folded(kind: type[nn.Module], fused: int) -> None:
    stage = rewritten(kind())
    assert sum(isinstance(module, FusedConv2d) for module in stage.modules()) == fused
    targets = " ".join(str(node.target) for node in stage.graph_module.graph.nodes)
    assert ("batch_norm" in targets) is not bool(fused)


def test_activations_in_place_are_fused_as_others_are() -> None:
    class Usual(Parts):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm(self.first(x)), inplace=True)
            out = F.relu(self.norm(self.second(x)), inplace=True)
            out = self.norm(self.third(out))
            out += x
            x = F.max_pool2d(F.relu(out, inplace=True), 2)
            return F.dropout(torch.flatten(x, 1), 0.5, False, inplace=True) + 1.0

    network, x = Usual(), torch.randn(4, *SIZE)
    stage = rewritten(network)
    targets = " ".join(str(node.target) for node in stage.graph_module.graph.nodes)
    assert not any(word in targets for word in ("batch_norm", "relu", "add_", "aten.conv2d"))
    for got, wanted in zip(results(stage, x), results(network, x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_view_of_convolutions_is_one_of_any_layout() -> None:
    class Viewed(Parts):
        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.first(x))
            return self.head(x.view(x.shape[0], -1))

    network, x = Viewed(), torch.randn(4, *SIZE)
    for got, wanted in zip(results(rewritten(network), x), results(network, x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_drawn_anew_at_each_call_stays_so() -> None:
    class Noisy(Parts):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + (torch.randn_like(self.gain) * self.gain)[:, None, None]

    network, x = Noisy(), torch.randn(4, *SIZE)
    stage = rewritten(network)
    drawn = []
    for seed in (1, 2):
        for function in (stage, network):
            torch.manual_seed(seed)
            drawn += results(function, x)
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn[2], drawn[3], rtol=1e-5, atol=1e-5)
    assert not torch.equal(drawn[0], drawn[2])
