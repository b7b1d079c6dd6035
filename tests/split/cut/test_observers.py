"""Hooks of others on a model in use see its calls, and no throwaway pass that learns a path."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from ride_plugin import RIDEWrapper, expert_logits
from tests.naive import copies_of

X, SCALE = torch.randn(7, 6), torch.rand(7, 1)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        h = self.b(self.a(x).relu()).relu()
        logits: Tensor = self.c(h if scale is None else h * scale)
        return logits


class Collector:
    """Counts rows of what it sees, and cannot be copied."""

    def __init__(self) -> None:
        self.lock, self.rows = threading.Lock(), list[int]()

    def __call__(self, module: nn.Module, given: Any, result: Any = None) -> None:
        self.rows.append(len(given[0]))


def wrapped(backbone: nn.Module) -> RIDEWrapper:
    return RIDEWrapper(backbone, 2, fork_at="b", example_input=(X,)).eval()


REGISTER: dict[str, Callable[[nn.Module, Collector], object]] = {
    "a function": lambda part, hook: part.register_forward_hook(lambda *seen: hook(*seen)),
    "an object": lambda part, hook: part.register_forward_hook(hook),
    "a method": lambda part, hook: part.register_forward_hook(hook.__call__),
    "before": lambda part, hook: part.register_forward_pre_hook(hook),
}


@pytest.mark.parametrize("how", REGISTER)
@pytest.mark.parametrize("where", ["trunk.a", "experts.0.b", "experts.1.c"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_hook_sees_each_call_once(how: str, where: str, copied: bool) -> None:
    model = wrapped(Scaled())
    model = copy.deepcopy(model) if copied else model
    collector = Collector()
    REGISTER[how](model.get_submodule(where), collector)
    with torch.no_grad():
        for _ in range(2):
            model(X, scale=SCALE)  # a path that the build did not see
    assert collector.rows == [7, 7]
    assert model.run_trunk(X, scale=SCALE).layout is not None  # it was learned all the same


def test_backward_hooks_see_each_backward_once() -> None:
    model = wrapped(Scaled())
    rows: list[int] = []
    model.experts[1].c.register_full_backward_hook(
        lambda m, inner, outer: rows.append(len(outer[0]))
    )
    expert_logits(model(X, scale=SCALE)).sum().backward()
    assert rows == [7]


def test_a_hook_that_was_there_at_wrapping_is_a_part_of_the_computation() -> None:
    class Reads(Scaled):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            first = self.a(x).flatten(1)  # the hook makes three dimensions of it
            h = self.b(first.relu()).relu()
            logits: Tensor = self.c(h if scale is None else h * scale)
            return logits

    backbone = Reads()
    backbone.a.register_forward_hook(lambda module, given, result: result.unflatten(1, (2, 4)))
    backbone.c.register_forward_pre_hook(lambda module, given: (given[0] * 2,))
    model = wrapped(backbone)
    got = expert_logits(model(X, scale=SCALE))
    for index, each in enumerate(copies_of(backbone, model)):
        torch.testing.assert_close(got[:, index], each(X, scale=SCALE))
    assert model.run_trunk(X, scale=SCALE).layout is not None


def test_a_hook_of_torch_that_computes_a_weight_runs_in_every_pass() -> None:
    model = wrapped(Scaled())
    for part in (model.trunk.a, *(expert.b for expert in model.experts)):
        prune.l1_unstructured(part, "weight", amount=0.5)
    rows = torch.tensor([3, 1])
    some = model.run_trunk(X, scale=SCALE).select(rows)
    torch.testing.assert_close(
        model.run_expert(1, some)[0], expert_logits(model(X, scale=SCALE))[rows, 1]
    )
