"""Hard cases of the modules: how parameters, buffers and submodules are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from benchmarks.zoo.images import conv_bn


class Parametrized(nn.Module):
    """Spectral and weight normalisation by parametrisation, on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.spectral_norm(nn.Conv2d(3, 8, 3, 1, 1))
        self.b = parametrizations.weight_norm(nn.Conv2d(8, 16, 3, 2, 1))
        self.c = parametrizations.weight_norm(nn.Conv2d(16, 32, 3, 2, 1))
        self.head = parametrizations.spectral_norm(nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))
        return self.head(x.mean((2, 3)))


class RootParameters(nn.Module):
    """Weights that are parameters of the root, used by function calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2)
        self.gain = nn.Parameter(torch.ones(8))
        self.body = nn.Sequential(conv_bn(8, 16, 2), conv_bn(16, 24, 2))
        self.top = conv_bn(24, 32, 2)
        self.scale = nn.Parameter(torch.full((32,), 0.5))
        self.fc = nn.Linear(32, 10)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.conv, padding=1).relu() * self.gain[None, :, None, None]
        x = self.top(self.body(x)).mean((2, 3)) * self.scale
        return self.fc(x) / self.temperature


class ParameterBank(nn.Module):
    """A ParameterList and a ParameterDict instead of layers, with one parameter after the fork."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(20, 24)
        self.mixers = nn.ModuleList([nn.Linear(24, 24) for _ in range(5)])
        self.gains = nn.ParameterList([torch.full((24,), 0.5) for _ in range(5)])
        self.heads = nn.ParameterDict(
            {"weight": torch.randn(10, 24) * 0.2, "bias": torch.zeros(10)}
        )
        self.norm = nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        for mixer, gain in zip(self.mixers, self.gains, strict=True):
            x = x + gain * mixer(x).tanh()
        return F.linear(self.norm(x), self.heads["weight"], self.heads["bias"])


class Prototypes(nn.Module):
    """Classifies by distance to prototypes; a moving mean of features is updated in place."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_bn(3, 8), conv_bn(8, 16, 2), conv_bn(16, 32, 2))
        self.project = nn.Linear(32, 16)
        self.prototypes = nn.Parameter(torch.randn(10, 16))
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        z = self.project(self.encoder(x).mean((2, 3)))
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(z.mean(0), 0.1)
        return -torch.cdist((z - self.mean)[None], self.prototypes[None])[0]


class TiedSides(nn.Module):
    """A layer of the trunk and one of the experts are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 32, bias=False)
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(5)])
        self.unembed = nn.Linear(32, 16, bias=False)
        self.unembed.weight = nn.Parameter(self.embed.weight.t().clone())
        self.layers[4].weight = self.layers[0].weight
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(self.unembed(x))


class ScriptedPart(nn.Module):
    """A scripted submodule in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.middle = torch.jit.trace(conv_bn(8, 16, 2).eval(), torch.randn(1, 8, 16, 16))
        self.top, self.head = conv_bn(16, 32, 2), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.top(self.middle(self.stem(x))).mean((2, 3)))


class Wrapped(nn.Module):
    """A model inside a model inside a model, each passing everything through."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(
                *[conv_bn(a, b, 2) for a, b in ((3, 8), (8, 16), (16, 32))]
            )

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"maps": self.encoder(x), "size": x.shape[-2:]}

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 10  # a feature extractor may end in class maps too, so it has to say so
        self.model: Any = nn.Module()
        self.model.backbone = self.Inner()
        self.model.decode_head = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(32, 10, 1))

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        features = self.model.backbone(*args, **kwargs)
        return self.model.decode_head(features["maps"]).mean((2, 3))


class Conditional(nn.Module):
    """A small network makes the weights of a convolution for each sample (grouped convolution)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.controller = nn.Linear(8, 4)
        self.kernels = nn.Parameter(torch.randn(4, 16, 8, 3, 3) * 0.1)
        self.stage2, self.stage3 = conv_bn(16, 24, 2), conv_bn(24, 32, 2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        batch, channels, height, width = x.shape
        mixture = self.controller(x.mean((2, 3))).softmax(-1)
        kernels = torch.einsum("bk,koihw->boihw", mixture, self.kernels).flatten(0, 1)
        x = F.conv2d(x.reshape(1, batch * channels, height, width), kernels, None, 1, 1, 1, batch)
        x = self.stage3(self.stage2(x.view(batch, -1, height, width)))
        return self.head(x.mean((2, 3)))


class GraphNetwork(nn.Module):
    """Node features and an adjacency matrix; normalisation of the adjacency is glue."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in ((8, 24), (24, 24), (24, 24))])
        self.readout = nn.Linear(24, 10)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        adjacency = adjacency.abs() + torch.eye(adjacency.shape[-1]).to(adjacency)
        adjacency = adjacency / adjacency.sum(-1, keepdim=True)
        for layer in self.layers:
            nodes = layer(adjacency @ nodes).relu()
        return self.readout(nodes.mean(1))


class TorchTransformer(nn.Module):
    """torch's own encoder (fused in evaluation), positions as a buffer, batch second."""

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(12, 32)
        self.register_buffer("positions", torch.randn(64, 1, 32), persistent=False)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x.transpose(0, 1))
        x = self.encoder(x + self.positions[: x.shape[0]])
        return self.head(x.mean(0))


class NormalizedInput(nn.Module):
    """Input statistics from a BatchNorm without weights, and instance and group normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, affine=False)
        self.a = nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1), nn.InstanceNorm2d(8, affine=True), nn.ReLU()
        )
        self.b = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.SiLU())
        self.c = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.SiLU())
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(self.norm(x)))).amax((2, 3)))


class Forward(nn.Module):
    """The forward lives in a method that is bound in the constructor, as plug-in code does."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(conv_bn(3, 8), conv_bn(8, 16, 2), conv_bn(16, 32, 2))
        self.fc = nn.Linear(32, 10)
        self.implementation = self.features

    def features(self, x: Tensor) -> Tensor:
        return self.stages(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.implementation(x))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "parametrized": (Parametrized, "spectral and weight normalisation by parametrisation"),
    "root_parameters": (RootParameters, "weights of the root on both sides"),
    "parameter_bank": (ParameterBank, "ParameterList, ParameterDict, classifier without module"),
    "prototypes": (Prototypes, "distances to prototypes, moving mean"),
    "tied_sides": (TiedSides, "one tensor in trunk and experts"),
    "scripted_part": (ScriptedPart, "traced submodule"),
    "wrapped_twice": (Wrapped, "nested models, 1x1 convolution before pooling"),
    "conditional_kernels": (Conditional, "batch folded into channels"),
    "graph_network": (GraphNetwork, "two inputs, adjacency normalised in the forward"),
    "torch_transformer": (TorchTransformer, "fused layers, buffer not saved"),
    "normalized_input": (NormalizedInput, "instance and group normalisation"),
    "bound_method": (Forward, "a bound method kept as attribute"),
}
"""Name -> (constructor, what is hard about it)."""
