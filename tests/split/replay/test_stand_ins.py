"""What a loop over all modules does to a stand-in: neither a copy nor a thread goes on in it."""

from __future__ import annotations

import copy
from threading import Thread

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ReplayError, RIDEWrapper
from ride_plugin._split._replay._stand_ins import StandIn


def wrapped() -> RIDEWrapper:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    return RIDEWrapper(net, 2, fork_at="2", example_input=torch.randn(3, 6))


def weight_of(model: RIDEWrapper) -> Tensor:
    return model.experts[0].get_submodule("0").weight


def test_a_copy_that_a_loop_makes_is_in_no_loop() -> None:
    model = wrapped()
    copies = [copy.deepcopy(model) for module in model.modules() if isinstance(module, StandIn)]
    assert len(copies) > 2
    for each in copies:
        assert weight_of(each) is each.trunk.get_submodule("0").weight
        kept = each.experts[0].get_submodule("0").state_dict()
        assert set(kept) == {"weight", "bias"}


def test_a_loop_in_one_thread_is_none_in_another() -> None:
    model = wrapped()
    stand_in = model.experts[0].get_submodule("0")
    found = []
    for module in model.modules():
        if module is stand_in:
            with pytest.raises(ReplayError, match="meets the real module as well"):
                _ = module.weight
            thread = Thread(target=lambda: found.append(weight_of(model)))
            thread.start()
            thread.join()
    assert found[0] is model.trunk.get_submodule("0").weight


def test_a_loop_that_breaks_off_is_over() -> None:
    model = wrapped()
    for module in model.modules():
        if module is model.experts[0].get_submodule("0"):
            break
    assert weight_of(model) is model.trunk.get_submodule("0").weight
