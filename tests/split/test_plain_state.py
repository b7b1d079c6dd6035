"""A checkpoint of the plain backbone is refused with the way to use it, strict or not."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import pytest
from torch import nn

from ride_plugin import CheckpointError, RIDEWrapper

from ..backbones import CifarResNet, mlp


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("saved_parallel", [False, True])
@pytest.mark.parametrize("loaded_parallel", [False, True])
def test_it_is_loaded_before_wrapping(
    strict: bool, saved_parallel: bool, loaded_parallel: bool
) -> None:
    model: nn.Module = RIDEWrapper(mlp(), 2)
    plain: nn.Module = mlp()
    state = (nn.DataParallel(plain) if saved_parallel else plain).state_dict()
    if loaded_parallel:
        model = nn.DataParallel(model)
        state = OrderedDict((f"module.{name}", value) for name, value in state.items())
    with pytest.raises(CheckpointError, match=r'load them before wrapping.*init="copy"'):
        model.load_state_dict(state, strict=strict)


def test_both_modules_of_a_pair_refuse_it() -> None:
    extractor, classifier = nn.Sequential(CifarResNet(5, n=1), nn.ReLU()), nn.Linear(5, 3)
    halves = RIDEWrapper.from_pair(extractor, classifier, 2).as_pair()
    for half, plain in zip(halves, (extractor, classifier), strict=True):
        with pytest.raises(CheckpointError, match="as the plain backbone calls it"):
            half.load_state_dict(plain.state_dict())


def test_what_is_the_models_own_is_loaded_and_what_is_nobodys_is_left_to_torch() -> None:
    model, other = RIDEWrapper(mlp(), 2), RIDEWrapper(mlp(), 2)
    some = {name: value for name, value in other.state_dict().items() if "trunk" in name}
    assert model.load_state_dict(some, strict=False).unexpected_keys == []
    assert model.load_state_dict({"other": some.popitem()[1]}, strict=False).unexpected_keys == [
        "other"
    ]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


@pytest.mark.parametrize("parallel", [False, True])
def test_a_filter_by_names_that_leaves_nothing_is_warned_of(parallel: bool) -> None:
    model: nn.Module = RIDEWrapper(mlp(), 2)
    if parallel:
        model = nn.DataParallel(model)
    mine = model.state_dict()
    mine.update({name: value for name, value in mlp().state_dict().items() if name in mine})
    with pytest.warns(UserWarning, match="changes nothing.*load it into|changes nothing.*Load it"):
        model.load_state_dict(mine)


def test_an_empty_state_is_warned_of_where_torch_says_nothing() -> None:
    model = RIDEWrapper(mlp(), 2)
    with pytest.warns(UserWarning, match="changes nothing"):
        model.load_state_dict({}, strict=False)


def test_a_state_that_was_written_in_place_is_loaded_without_a_word() -> None:
    """As torch.distributed.checkpoint reads a folder."""
    model = RIDEWrapper(mlp(), 2)
    state = model.state_dict()
    next(iter(state.values())).fill_(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(state)


def test_a_state_with_anything_new_in_it_is_loaded_without_a_word() -> None:
    model, other = RIDEWrapper(mlp(), 2), RIDEWrapper(mlp(), 2)
    mine, theirs = model.state_dict(), other.state_dict()
    name = next(iter(mine))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict({**mine, name: theirs[name]})
        model.load_state_dict(theirs)
        nn.ModuleDict({"model": model, "loss": nn.Linear(2, 2)}).load_state_dict(
            {"loss.weight": nn.Linear(2, 2).weight}, strict=False
        )
