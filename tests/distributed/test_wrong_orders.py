"""What was done in the wrong order trains nothing, or not as meant, and says so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from ride_plugin import RIDEWrapper, SplitError

from .ranks import Ranks
from .training import Network, build, my_half, optimizer_for, train

needs_fsdp2 = pytest.mark.skipif(
    not hasattr(fsdp, "fully_shard"), reason="torch has FSDP2 from 2.6 on"
)


def _parallel(model: nn.Module, engine: str) -> nn.Module:
    if engine == "DDP":
        return DistributedDataParallel(model)
    if engine == "FSDP1":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    sharded: nn.Module = fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return sharded


def _engine_before_wrapping(engine: str) -> None:
    with pytest.raises(SplitError, match=r"Wrap the plain module first"):
        RIDEWrapper(_parallel(Network(), engine), 3)


@pytest.mark.parametrize("engine", ["DDP", "FSDP1", pytest.param("FSDP2", marks=needs_fsdp2)])
def test_wrapping_what_an_engine_has_made_is_refused(ranks: Ranks, engine: str) -> None:
    ranks(_engine_before_wrapping, engine)


def _said(engine: str, optimizer_first: bool) -> list[str]:
    model: Any = build()
    early = optimizer_for(model)
    parallel = _parallel(model, engine)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(parallel, my_half, early if optimizer_first else None, steps=range(5))
        parallel.eval()
        with torch.no_grad():
            parallel(my_half(0)[0])
    return [str(w.message) for w in caught if "training passes" in str(w.message)]


@pytest.mark.parametrize("engine", ["FSDP1", pytest.param("FSDP2", marks=needs_fsdp2)])
def test_an_optimizer_made_before_sharding_is_noticed(ranks: Ranks, engine: str) -> None:
    for said in ranks(_said, engine, True):
        assert len(said) == 1
        assert "after an engine that replaces parameters (FSDP" in said[0]


@pytest.mark.parametrize("engine", ["DDP", "FSDP1", pytest.param("FSDP2", marks=needs_fsdp2)])
def test_an_optimizer_made_after_sharding_is_left_in_peace(ranks: Ranks, engine: str) -> None:
    assert ranks(_said, engine, False) == [[], []]
