"""Classifiers whose classes are spread over the ranks, as with many thousands of classes."""

from __future__ import annotations

import pytest
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from .ranks import Ranks
from .training import assert_equal_to_alone, batch, build, train


def _train(style: str) -> None:
    model, mesh = build(), init_device_mesh("cpu", (2,))
    styles = {
        "columns": ColwiseParallel(output_layouts=Replicate()),
        "rows": RowwiseParallel(input_layouts=Replicate()),
    }
    for expert in model.experts:
        parallelize_module(expert, mesh, {"head": styles[style]})
    train(model, batch)  # every rank reads the whole batch
    assert_equal_to_alone(model.state_dict())


@pytest.mark.parametrize("style", ["columns", "rows"])
def test_parallel_classifiers_train_as_one_process(ranks: Ranks, style: str) -> None:
    ranks(_train, style)


def _blocks() -> None:
    model, mesh = build(), init_device_mesh("cpu", (2,))
    plan = {"hidden": ColwiseParallel(), "out": RowwiseParallel()}
    for module in list(model.modules()):
        if type(module).__name__ == "Block":
            parallelize_module(module, mesh, plan)
    train(model, batch)
    assert_equal_to_alone(model.state_dict())


def test_parallel_blocks_of_trunk_and_experts_train_as_one_process(ranks: Ranks) -> None:
    ranks(_blocks)
