"""Modules of the trunk that run once more behind the fork, on a path that the build did not see."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ride_plugin import ReplayError, RIDEWrapper, SplitError, expert_logits
from tests.naive import copies_of, train_both

X = torch.randn(8, 6)


class Twice(nn.Module):
    """Everything once more where it is given a second batch, told to repeat, or to go in pieces."""

    def __init__(self, stem: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = stem or nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        self.relu = nn.ReLU()
        self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 4)

    def once(self, x: Tensor) -> Tensor:
        logits: Tensor = self.c(self.relu(self.b(self.relu(self.stem(x)))))
        return logits

    def forward(
        self, x: Tensor, other: Tensor | None = None, times: int = 1, rows: int = 100
    ) -> Tensor:
        batches = [x.roll(k, 1) for k in range(times)] + ([] if other is None else [other])
        return sum(torch.cat([self.once(part) for part in b.split(rows)]) for b in batches)


class NeedsTargets(Twice):
    def forward(self, x: Tensor, other: Tensor | None = None, **options: Any) -> Tensor:
        if self.training and other is None:
            raise ValueError("Targets, please.")
        return super().forward(x, other, **options)


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "a second batch": ((X, X.flip(1)), {}),
    "a number": ((X,), {"times": 2}),
    "pieces": ((X,), {"rows": 4}),
}


def wrapped(net: nn.Module, num_experts: int = 2, **options: Any) -> RIDEWrapper:
    return RIDEWrapper(net, num_experts, **{"fork_at": "b", "example_input": (X,)} | options)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("copied", [False, True])
def test_statistics_of_the_trunk_are_not_written_by_experts(call: str, copied: bool) -> None:
    model = wrapped(Twice())
    model = copy.deepcopy(model) if copied else model
    args, kwargs = CALLS[call]
    with pytest.raises(ReplayError, match=r"`stem`, a module of the trunk, .*`stem\.1`"):
        model(*args, **kwargs)
    assert model.trunk.stem[1].num_batches_tracked == 1  # of the trunk's own pass


def test_nor_where_experts_are_computed_again_for_the_backward() -> None:
    with pytest.raises(ReplayError, match="runs behind the fork"):
        wrapped(Twice(), checkpoint_experts=True)(X, X)


def test_nor_where_the_build_could_not_train() -> None:
    with pytest.raises(ReplayError, match="runs behind the fork"):
        wrapped(NeedsTargets())(X, X)


def test_nor_vectors_of_a_spectral_norm() -> None:
    with pytest.raises(ReplayError, match=r"`stem\.parametrizations\.weight\.0`"):
        wrapped(Twice(spectral_norm(nn.Linear(6, 8))))(X, X)


class Positions(nn.Module):
    """Numbers of the features, in a cache that the first call fills."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("cache", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.cache) < x.shape[1]:
            self.cache = torch.arange(x.shape[1]) / x.shape[1]
        return x + self.scale * self.cache[: x.shape[1]]


class Positioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = Positions()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.positions(self.a(self.positions(x)).relu()))
        logits: Tensor = self.c(self.positions(x.relu()))
        return logits


@pytest.mark.parametrize("checkpoint_experts", [False, True])
def test_a_cache_that_the_trunk_has_filled_is_read_by_experts(checkpoint_experts: bool) -> None:
    backbone = Positioned()
    model = wrapped(backbone, checkpoint_experts=checkpoint_experts)
    train_both(backbone, model, [((X,), {})] * 2)


@pytest.mark.parametrize("call", CALLS)
def test_in_evaluation_the_path_may_be_taken(call: str) -> None:
    backbone = Twice()
    model = wrapped(backbone).eval()
    args, kwargs = CALLS[call]
    for index, each in enumerate(copies_of(backbone, model)):
        expected = each.eval()(*args, **kwargs)
        torch.testing.assert_close(expert_logits(model(*args, **kwargs))[:, index], expected)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("how", ["nothing to write", "frozen", "one expert", "an earlier fork"])
def test_where_nothing_is_shared_that_is_written_it_trains_as_the_copies_do(
    call: str, how: str
) -> None:
    backbone = Twice(nn.Linear(6, 8) if how == "nothing to write" else None).train()
    if how == "frozen":
        backbone.stem[1].requires_grad_(False).eval()
    num_experts = 1 if how == "one expert" else 2
    fork_at = "stem" if how == "an earlier fork" else "b"
    model = wrapped(backbone, num_experts, fork_at=fork_at)
    if how == "frozen":  # the copies' own `train()` would set it to training
        backbone.train = lambda mode=True: backbone  # type: ignore[assignment, method-assign]
    train_both(backbone, model, [CALLS[call]] * 2)


def test_a_build_that_sees_the_path_refuses_it() -> None:
    with pytest.raises(SplitError, match=r"writes `stem\.1\.num_batches_tracked`"):
        wrapped(Twice(), example_input=(X, X))


def test_who_chooses_rows_is_told_that_their_number_may_decide_the_path() -> None:
    model = wrapped(Twice()).eval()
    with pytest.raises(ReplayError, match=r"Where the number of rows decides the path"):
        model.run_trunk(X, rows=4).select(torch.tensor([1, 0]))
