"""DistributedDataParallel in all its modes: what trains is what one process would train."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ride_plugin import MissingExpertLogitsError, RIDEWrapper, experts_loss

from ..backbones import CifarResNet
from .ranks import Ranks
from .training import Network, assert_equal_to_alone, build, loss_of, my_half, optimizer_for, train


def _train(options: dict[str, Any], ddp: dict[str, Any], compiled: str) -> None:
    model = build(**options)
    inner = torch.compile(model, backend="aot_eager") if compiled == "inside" else model
    parallel = DistributedDataParallel(inner, **ddp)
    outer = torch.compile(parallel, backend="aot_eager") if compiled == "outside" else parallel
    train(outer, my_half)
    assert_equal_to_alone(model.state_dict())


@pytest.mark.parametrize("checkpoint_experts", [False, True])
@pytest.mark.parametrize(
    "ddp", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str
)
def test_trains_as_one_process(ranks: Ranks, ddp: dict[str, Any], checkpoint_experts: bool) -> None:
    options = {"return_experts": bool(ddp), "checkpoint_experts": checkpoint_experts}
    ranks(_train, options, ddp, "")


@pytest.mark.compiles
@pytest.mark.parametrize("return_experts", [False, True])
@pytest.mark.parametrize("compiled", ["inside", "outside"])
def test_compiled_model_trains_as_one_process(
    ranks: Ranks, compiled: str, return_experts: bool
) -> None:
    ranks(_train, {"return_experts": return_experts}, {}, compiled)


class Recomputes(Network):
    """Every block in a reentrant checkpoint, which runs a backward of its own in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return self.head(self.norm(x))


def _recompute() -> None:
    model = RIDEWrapper(Recomputes(), 3, fork_at="blocks.2").double()
    model.load_state_dict(build().state_dict())
    train(DistributedDataParallel(model), my_half)
    assert_equal_to_alone(model.state_dict())


def test_reentrant_checkpoints_train_as_one_process(ranks: Ranks) -> None:
    ranks(_recompute)


def _with_batchnorm() -> None:
    torch.manual_seed(0)
    model = RIDEWrapper(CifarResNet(7, n=1), 3).train()
    parts = [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)]
    alone = [copy.deepcopy(model) for _ in parts]
    for one, x in zip(alone, parts, strict=True):
        experts_loss(nn.functional.cross_entropy, one(x), torch.arange(4)).backward()
    x = parts[dist.get_rank()]
    parallel = DistributedDataParallel(model)
    experts_loss(nn.functional.cross_entropy, parallel(x), torch.arange(4)).backward()
    for mine, *both in zip(*(m.parameters() for m in (model, *alone)), strict=True):
        mean = (both[0].grad + both[1].grad) / 2
        torch.testing.assert_close(mine.grad, mean, atol=1e-6, rtol=1e-4)


def test_statistics_of_each_rank(ranks: Ranks) -> None:
    """BatchNorm without synchronisation: the gradients are the mean of both ranks' own."""
    ranks(_with_batchnorm)


def _accumulate() -> None:
    model = build()
    parallel = DistributedDataParallel(model)
    optimizer = optimizer_for(model)
    parallel.train()
    for step in range(2):
        x, y = my_half(step)
        optimizer.zero_grad()
        with parallel.no_sync():
            (loss_of(parallel, x[:2], y[:2]) / 2).backward()
        (loss_of(parallel, x[2:], y[2:]) / 2).backward()
        optimizer.step()
    assert_equal_to_alone(model.state_dict())


def test_accumulates_without_synchronising(ranks: Ranks) -> None:
    ranks(_accumulate)


def _refused(ddp: dict[str, Any]) -> None:
    parallel = DistributedDataParallel(build(), **ddp)
    with pytest.raises(MissingExpertLogitsError, match="return_experts"):
        loss_of(parallel, *my_half(0))


@pytest.mark.parametrize("ddp", [{"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_modes_that_lose_the_experts_are_refused(ranks: Ranks, ddp: dict[str, Any]) -> None:
    ranks(_refused, ddp)
