"""Modules that never ran at the build: refused behind the fork, where all experts would share them.

What runs before the fork is the trunk's, whenever it runs for the first time.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ride_plugin import ReplayError, RIDEWrapper, expert_logits
from tests.naive import copies_of, train_both

X, Y = torch.randn(5, 6), torch.arange(5) % 4


def layer() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))


class Late(nn.Module):
    """A layer more behind the fork, or before it, where targets or an attribute say so."""

    def __init__(self, late: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.extra = layer()
        self.late, self.on = late, False

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.a(x).relu()
        more = self.on or y is not None
        if more and not self.late:
            h = self.extra(h)
        h = self.b(h).relu()
        if more and self.late:
            h = self.extra(h)
        return self.c(h)


class NeedsTargets(Late):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.training and y is None:
            raise ValueError("Targets, please.")
        return super().forward(x, y)


def wrapped(net: nn.Module, *example: Any) -> RIDEWrapper:
    return RIDEWrapper(net, 2, fork_at="b", example_input=example or (X,))


@pytest.mark.parametrize("net", [Late, NeedsTargets])
@pytest.mark.parametrize("copied", [False, True])
def test_a_layer_that_runs_behind_the_fork_with_targets_only_is_named(
    net: type[Late], copied: bool
) -> None:
    model = wrapped(net())
    model = copy.deepcopy(model) if copied else model
    before = [buffer.clone() for buffer in model.trunk.buffers()]
    with pytest.raises(ReplayError, match=r"`extra\.0` runs behind the fork.*example_input="):
        model(X, Y)
    assert all(map(torch.equal, before, model.trunk.buffers()))


def test_an_attribute_that_lets_it_run_is_told_as_well() -> None:
    model = wrapped(Late())
    for part in (model.trunk, *model.experts):
        part.on = True
    with pytest.raises(ReplayError, match=r"`extra\.0` runs behind the fork"):
        model(X)


@pytest.mark.parametrize("net", [Late, NeedsTargets])
def test_with_targets_in_the_example_each_expert_has_its_own(net: type[Late]) -> None:
    backbone = net()
    model = wrapped(backbone, X, Y)
    assert "extra.0.weight" in dict(model.experts[1].named_parameters())
    train_both(backbone, model, [((X, Y), {})] * 2)


@pytest.mark.parametrize("net", [Late, NeedsTargets])
def test_before_the_fork_it_is_the_trunk_s(net: type[Late]) -> None:
    backbone = net(late=False)
    train_both(backbone, wrapped(backbone), [((X, Y), {})] * 2)


def test_what_does_not_train_may_be_shared() -> None:
    backbone = Late()
    backbone.extra.requires_grad_(False)
    model = wrapped(backbone)
    model.eval()
    copies = copies_of(backbone, model)
    for index, each in enumerate(copies):
        torch.testing.assert_close(expert_logits(model(X, Y))[:, index], each.eval()(X, Y))


def test_a_single_expert_shares_with_nobody() -> None:
    backbone = Late()
    model = RIDEWrapper(backbone, 1, fork_at="b", example_input=(X,))
    train_both(backbone, model, [((X, Y), {})] * 2)


def test_a_plain_module_runs_whatever_the_backbone_runs() -> None:
    model = wrapped(Late())
    plain = model.to_module(1).train()
    plain(X, Y)
    assert plain.extra[1].num_batches_tracked == 1


class Computed(nn.Module):
    """Its weights are computed by modules whose calls are no steps of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.inner = weight_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu()).relu()
        return self.c(nn.functional.linear(h, self.inner.weight))


def test_modules_that_compute_a_weight_are_not_meant() -> None:
    backbone = Computed()
    train_both(backbone, wrapped(backbone), [X, X])


class Chosen(nn.Module):
    def __init__(self, norms: nn.ModuleList) -> None:
        super().__init__()
        self.norms = norms

    def forward(self, x: Tensor, domain: int) -> Tensor:
        return self.norms[domain](x)


class Domains(nn.Module):
    """A BatchNorm for each domain, which the forward chooses by a number, or a submodule does."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(2))
        self.norms, self.inside = Chosen(norms) if inside else norms, inside

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        h = self.b(self.a(x).relu())
        h = self.norms(h, domain) if self.inside else self.norms[domain](h)
        return self.c(h.relu())


def test_modules_of_several_domains_are_chosen_in_a_submodule_as_the_error_says() -> None:
    model = wrapped(Domains(inside=False))
    with pytest.raises(ReplayError, match=r"`norms\.1` runs behind.*domains.*holds them all"):
        model(X, domain=1)
    net = Domains(inside=True)
    train_both(net, wrapped(net), [((X,), {"domain": domain}) for domain in (0, 1, 1, 0)])
