"""Modules of torch.fx, which copy and call themselves by their graph, in and as backbones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ride_plugin import RIDEWrapper
from tests.naive import train_both


def stage(rows: int, columns: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(rows, columns), nn.BatchNorm1d(columns), nn.ReLU())


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = stage(6, 8), stage(8, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x) * self.scale) + self.scale)


class Dual(fx.GraphModule):
    """As torchvision's feature extractors: another graph in each mode, copies as it says itself."""

    def __init__(self, root: nn.Module, train_graph: fx.Graph, eval_graph: fx.Graph) -> None:
        super().__init__(root, train_graph)
        self.train_graph, self.eval_graph = train_graph, eval_graph

    def train(self, mode: bool = True) -> Any:
        self.graph = self.train_graph if mode else self.eval_graph
        return super().train(mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        attributes = copy.deepcopy(vars(self), memo)
        root = nn.Module()
        root.__dict__ = attributes
        return Dual(root, attributes["train_graph"], attributes["eval_graph"])


class Extracted(nn.Module):
    """A backbone around an extractor."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor
        self.b, self.c = stage(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.extractor(x)))


def dual() -> Dual:
    body = nn.Sequential(stage(6, 8), stage(8, 8))
    graphs = []
    for number in (2.0, 3.0):
        graph = fx.Tracer().trace(body)
        (last,) = (node for node in graph.nodes if node.op == "output")
        with graph.inserting_before(last):
            last.args = (graph.call_function(torch.mul, (last.args[0], number)),)
        graphs.append(graph)
    return Dual(body, *graphs)


def compare(net: nn.Module, fork_at: str | None) -> None:
    x = torch.randn(2, 6)
    model = RIDEWrapper(net, 3, fork_at=fork_at, init="copy", example_input=x)
    train_both(net, model, [torch.randn(5, 6) for _ in range(3)])
    model.eval()
    x = torch.randn(3, 6)
    expected = model.router_inputs(x).expert_logits
    again = copy.deepcopy(model)
    torch.testing.assert_close(again.router_inputs(x).expert_logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(again.to_module(2)(x), expected[:, 2])


@pytest.mark.parametrize("fork_at", ["a.1", "b.0", "c", None])
def test_a_traced_backbone(fork_at: str | None) -> None:
    compare(fx.symbolic_trace(Network()), fork_at)


@pytest.mark.parametrize("fork_at", ["extractor", "extractor.1.0", "b", "c"])
@pytest.mark.parametrize("dual_graph", [False, True])
def test_a_traced_part(dual_graph: bool, fork_at: str) -> None:
    traced = fx.symbolic_trace(nn.Sequential(stage(6, 8), stage(8, 8)))
    compare(Extracted(dual() if dual_graph else traced), fork_at)


def test_the_code_of_each_part_is_its_own() -> None:
    x = torch.randn(2, 6)
    net = fx.symbolic_trace(Network())
    model = RIDEWrapper(net, 2, fork_at="c", init="copy", example_input=x).eval()
    expected, plain = model(x), model.to_module(0)
    (last,) = (node for node in plain.graph.nodes if node.op == "output")
    last.args = (last.all_input_nodes[0].args[0],)
    plain.recompile()
    assert plain(x).shape == (2, 8)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert net(x).shape == (2, 4)


class CopiesItself(nn.Module):
    """Builds its copy of what is in it, so that this must be there already."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        inner = copy.deepcopy(self.inner, memo)
        assert list(inner.parameters())
        memo[id(self)] = copied = CopiesItself(inner)
        return copied

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("fork_at", ["b", "c"])
def test_modules_that_copy_themselves_find_their_parts(fork_at: str) -> None:
    net = Network()
    net.b = CopiesItself(net.b)  # type: ignore[assignment]
    compare(net, fork_at)
