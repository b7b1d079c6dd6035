"""Networks that go on, at each call, from what they have kept of each row: routing mixes the rows.

A spiking network called once for each time step is one, a recurrent cell that keeps its state
another. Rows leave at each step, so that an expert would go on with the states of other rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ArgumentError, ReplayError, RIDEWrapper, RoutingInference, SplitError
from ride_plugin._split import kept_rows_of
from ride_plugin.routing import RoutingQueue


class OfAttribute(nn.Module):
    """A leaky neuron that begins anew where the number of rows is another."""

    def __init__(self) -> None:
        super().__init__()
        self.v: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None or self.v.shape != x.shape:
            self.v = torch.zeros_like(x)
        self.v = 0.5 * self.v + x
        return torch.sigmoid(4 * self.v)

    def reset(self) -> None:
        self.v = None


class OfBuffer(nn.Module):
    """The same with its potential in a buffer that is written in place, and reset in place."""

    v: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("v", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.v.shape != x.shape:
            self.v = torch.zeros_like(x)
        self.v.mul_(0.5).add_(x)
        return torch.sigmoid(4 * self.v)

    def reset(self) -> None:
        self.v.zero_()


class OfDict(nn.Module):
    """A streaming layer that keeps the last frame of each row, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.memories: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        last = self.memories.get("frame", x)
        self.memories["frame"] = x.detach()
        return x + (last if last.shape == x.shape else x)

    def reset(self) -> None:
        self.memories.clear()


class InTheForward(nn.Module):
    """The root keeps the state itself, behind the fork."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.h: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        if self.h is None or self.h.shape != x.shape:
            self.h = torch.zeros_like(x)
        self.h = torch.tanh(self.h + x)
        return self.c(self.h)

    def reset(self) -> None:
        self.h = None


class KeepsNone(nn.Module):
    """Writes much in evaluation mode, of which nothing comes back: all of it is harmless."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.by_shape: dict[Any, Tensor] = {}
        self.features: list[Tensor] = []
        self.last: Any = None
        self.bias = nn.Parameter(torch.randn(8))
        self.table: Any = None
        self.number = 0
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape not in self.by_shape:  # positions, made of the values of the first rows
            self.by_shape[x.shape] = 1 + torch.zeros_like(x)
        if self.table is None:  # LeViT's biases
            self.table = self.bias * 2
        self.number += 1
        self.calls += 1
        self.last = x
        self.features.append(x.mean(0))
        return x * self.by_shape[x.shape] + self.table + 0.01 * self.number


class Given:
    """A router whose gates are given: how many experts each row shall use, batch by batch."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.rows: list[int] = []

    def gate(self, index: int, mean_logits: Tensor, features: Tensor) -> Tensor:
        self.rows = self.counts if index == 0 else [n for n in self.rows if n > index]
        return torch.tensor([1.0 if n > index + 1 else -1.0 for n in self.rows])


def of_layers(layer: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), layer(), nn.Linear(8, 8), layer(), nn.Linear(8, 5))


KEEPING = {
    "an attribute": (lambda: of_layers(OfAttribute), "2", "3.v"),
    "a buffer": (lambda: of_layers(OfBuffer), "2", "3.v"),
    "a dict": (lambda: of_layers(OfDict), "2", "3.memories"),
    "the root": (InTheForward, "b", "h"),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*classifier")


def wrapped(kind: str, num_experts: int = 3) -> RIDEWrapper:
    torch.manual_seed(0)
    make, fork, _ = KEEPING[kind]
    example = torch.randn(2, 6)
    return RIDEWrapper(make(), num_experts, fork_at=fork, example_input=example, num_classes=5)


def routed(model: RIDEWrapper) -> tuple[RoutingInference, Given]:
    router: Any = Given()
    return RoutingInference(model, router), router


def reset(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, OfAttribute | OfBuffer | OfDict | InTheForward):
            module.reset()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", KEEPING)
def test_a_step_in_which_an_expert_would_go_on_with_other_rows_is_refused(
    kind: str, inference: bool
) -> None:
    serve, router = routed(wrapped(kind))
    with torch.inference_mode(inference):
        router.counts = [3, 3, 1, 1]
        serve(torch.randn(4, 6))
        router.counts = [1, 3, 3, 1]
        with pytest.raises(ReplayError, match=rf"`{KEEPING[kind][2]}` in each.* reset since"):
            serve(torch.randn(4, 6))


@pytest.mark.parametrize(
    "counts", [[[1, 1], [2, 2]], [[3, 3], [1, 3]], [[2, 3], [3, 3]], [[1, 2], [1, 2]]]
)
def test_rows_that_left_and_experts_that_missed_a_step_are_seen(counts: list[list[int]]) -> None:
    serve, router = routed(wrapped("an attribute"))
    router.counts = counts[0]
    serve(torch.randn(2, 6))
    router.counts = counts[1]
    with pytest.raises(ReplayError, match="rows leave early"):
        serve(torch.randn(2, 6))


def test_rows_of_another_number_than_the_states_are_refused_for_the_same_reason() -> None:
    class Strict(OfAttribute):
        def forward(self, x: Tensor) -> Tensor:
            if self.v is not None and len(self.v) != len(x):
                raise RuntimeError("The size of tensor a must match the size of tensor b.")
            return super().forward(x)

    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), Strict(), nn.Linear(8, 5))
    model = RIDEWrapper(net, 3, fork_at="2", example_input=torch.randn(2, 6))
    serve, router = routed(model)
    router.counts = [3, 3, 3]
    serve(torch.randn(3, 6))
    router.counts = [1, 3, 3]
    with pytest.raises(ReplayError, match="rows leave early"):
        serve(torch.randn(3, 6))


@pytest.mark.parametrize("kind", KEEPING)
def test_what_is_reset_before_each_batch_is_routed(kind: str) -> None:
    model = wrapped(kind)
    serve, router = routed(model)
    for counts in ([3, 1, 2, 1], [1, 1, 1, 1], [2, 3, 3, 2], [3, 3, 3, 3], [1, 2, 1, 3]):
        reset(model)
        x, router.counts = torch.randn(4, 6), counts
        logits = serve(x)
        reset(model)
        each, _ = model.router_inputs(x)
        by_hand = torch.stack([each[row, :n].mean(0) for row, n in enumerate(counts)])
        torch.testing.assert_close(logits, by_hand)


@pytest.mark.parametrize("kind", KEEPING)
def test_steps_in_which_all_rows_use_the_same_experts_are_right(kind: str) -> None:
    model, other = wrapped(kind), wrapped(kind)
    serve, router = routed(model)
    for count in (3, 3, 2, 2, 1):
        x = torch.randn(4, 6)
        router.counts = [count] * 4
        each, _ = other.router_inputs(x)
        torch.testing.assert_close(serve(x), each[:, :count].mean(1))


def test_calls_of_the_model_between_are_seen() -> None:
    model = wrapped("a buffer").eval()
    serve, router = routed(model)
    model(torch.randn(4, 6))
    router.counts = [1, 2, 3, 1]
    with pytest.raises(ReplayError, match="rows leave early"):
        serve(torch.randn(4, 6))


def test_a_cache_a_count_and_features_that_nobody_reads_give_no_alarm() -> None:
    torch.manual_seed(0)
    model = RIDEWrapper(of_layers(KeepsNone), 3, fork_at="2", example_input=torch.randn(2, 6))
    assert kept_rows_of(model) is None
    serve, router = routed(model)
    for counts in ([3, 1, 2, 1], [1, 3, 1, 2]):
        router.counts = counts
        serve(torch.randn(4, 6))
    assert isinstance(RoutingQueue(serve), RoutingQueue)


def test_a_state_of_the_trunk_alone_gives_no_alarm() -> None:
    net = nn.Sequential(nn.Linear(6, 8), OfAttribute(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
    model = RIDEWrapper(net, 3, fork_at="2", example_input=torch.randn(2, 6))
    assert kept_rows_of(model) is None


def test_experts_of_a_factory_are_looked_at_as_well() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
    model = RIDEWrapper(
        net,
        3,
        fork_at="2",
        example_input=torch.randn(2, 6),
        expert_factory=lambda index: of_layers(OfAttribute) if index == 1 else of_layers(nn.ReLU),
    )
    serve, router = routed(model)
    router.counts = [3, 3, 1, 1]
    serve(torch.randn(4, 6))
    router.counts = [1, 3, 3, 1]
    with pytest.raises(ReplayError, match=r"`3\.v` in each"):
        serve(torch.randn(4, 6))


def test_a_queue_refuses_a_model_whose_experts_keep_rows() -> None:
    serve, _ = routed(wrapped("an attribute"))
    with pytest.raises(ArgumentError, match=r"each keeps `3\.v`, and here an expert runs on"):
        RoutingQueue(serve)


def test_an_empty_batch_says_nothing_of_states() -> None:
    kept = kept_rows_of(wrapped("an attribute"))
    assert kept is not None
    kept.check(True, torch.zeros(0, dtype=torch.int64))


def test_states_that_take_one_number_of_rows_only_are_refused_with_what_helps() -> None:
    class Strict(nn.Module):
        v: Any = 0.0

        def forward(self, x: Tensor) -> Tensor:
            self.v = 0.5 * self.v + x
            return torch.sigmoid(self.v)

    with pytest.raises(SplitError, match=r"begin anew where the number of rows is another"):
        RIDEWrapper(of_layers(Strict), 3, fork_at="2", example_input=torch.randn(2, 6))
