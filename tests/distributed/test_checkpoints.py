"""Saving and resuming over ranks: sharded and whole checkpoints, and a rank that was killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from ride_plugin import RIDEWrapper

from .ranks import Ranks
from .test_fully_shard import shard
from .training import assert_equal_to_alone, batch, build, my_half, optimizer_for, train, whole

FIRST, SECOND = range(1), range(1, 2)


def _other() -> RIDEWrapper:
    """A model of the same shape whose values all differ."""
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def _save_sharded(folder: str) -> None:
    model = shard(build(), "experts")
    optimizer = train(model, my_half, steps=FIRST)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)


def _load_sharded(folder: str) -> None:
    model = shard(_other(), "whole")  # sharded in another way than what was saved
    optimizer = optimizer_for(model)
    weights, moments = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": moments}
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
    )
    train(model, my_half, optimizer, SECOND)
    assert_equal_to_alone(model.state_dict())


def test_a_sharded_checkpoint_resumes_under_another_sharding(ranks: Ranks, tmp_path: Path) -> None:
    ranks(_save_sharded, str(tmp_path))
    ranks(_load_sharded, str(tmp_path))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_sharded_checkpoint_loads_in_one_process(ranks: Ranks, tmp_path: Path) -> None:
    ranks(_save_sharded, str(tmp_path))
    model = _other()
    state = model.state_dict()
    dcp.load({"model": state}, checkpoint_id=str(tmp_path), no_dist=True)
    model.load_state_dict(state)
    expected = build()
    train(expected, batch, steps=FIRST)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-8, rtol=1e-8)


def _load_whole() -> None:
    source, model = _other(), shard(build(), "blocks")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = source.state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(model, state, options=options)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    for name, tensor in whole(full).items():
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_a_whole_checkpoint_is_sharded_on_loading(ranks: Ranks) -> None:
    ranks(_load_whole)


def _parallel() -> tuple[nn.Module, RIDEWrapper]:
    model = build(torch.float32)
    return DistributedDataParallel(model), model


def _half_in_float32(step: int) -> tuple[Tensor, Tensor]:
    return my_half(step, torch.float32)


def _run(make: Callable[[], tuple[nn.Module, RIDEWrapper]]) -> dict[str, Tensor]:
    parallel, model = make()
    train(parallel, _half_in_float32, steps=range(3))
    return model.state_dict()


def _run_until_killed(path: str) -> None:
    parallel, model = _parallel()
    optimizer = train(parallel, _half_in_float32, steps=range(2))
    if dist.get_rank() == 0:
        torch.save((model.state_dict(), optimizer.state_dict()), path)
    dist.barrier()


def _resume(path: str) -> dict[str, Tensor]:
    parallel, model = _parallel()
    weights, moments = torch.load(path)
    model.load_state_dict(weights)
    optimizer = optimizer_for(model)
    optimizer.load_state_dict(moments)
    train(parallel, _half_in_float32, optimizer, range(2, 3))
    return model.state_dict()


def test_ranks_that_were_killed_resume_with_equal_bits(ranks: Ranks, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint.pth")
    expected = ranks(_run, _parallel)
    ranks(_run_until_killed, path)
    ranks.stop()  # kills both processes; the next call starts new ones
    for state, wanted in zip(ranks(_resume, path), expected, strict=True):
        for name, tensor in wanted.items():
            assert torch.equal(state[name], tensor), name
