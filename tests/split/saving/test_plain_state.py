"""States of the plain backbone, behind prefixes, or of nothing: never loaded without a word."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import CheckpointError, RIDEWrapper

from ...backbones import CifarResNet, mlp


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


def body() -> nn.Sequential:
    return nn.Sequential(OrderedDict(a=nn.Linear(8, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 16)))


class Whole(nn.Module):
    """The same layers as `body`, with a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = body()
        self.linear = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.c(torch.relu(self.b(torch.relu(self.a(x))))))


@pytest.mark.parametrize("parallel", [False, True])
def test_experts_are_not_loaded_beside_a_trunk_of_another_form(parallel: bool) -> None:
    whole = RIDEWrapper(Whole(), 2, fork_at="c")
    pair = RIDEWrapper.from_pair(body(), nn.Linear(16, 5), 2, fork_at="feature_extractor.c")
    half: nn.Module = pair.as_pair()[0]
    state: dict[str, Any] = dict(whole.state_dict())
    if parallel:
        half = nn.DataParallel(half)
        state = {f"module.{name}": value for name, value in state.items()}
    before = {name: value.clone() for name, value in half.state_dict().items()}
    with pytest.raises(CheckpointError, match="made of one backbone, and this one was made of a p"):
        half.load_state_dict(state, strict=False)
    with pytest.raises(CheckpointError, match="made of a pair, and this one was made of one backb"):
        whole.load_state_dict(pair.state_dict(), strict=False)
    assert all(torch.equal(value, before[name]) for name, value in half.state_dict().items())


def test_experts_that_a_filter_leaves_beside_the_own_trunk_are_warned_of() -> None:
    whole = RIDEWrapper(Whole(), 2, fork_at="c")
    pair = RIDEWrapper.from_pair(body(), nn.Linear(16, 5), 2, fork_at="feature_extractor.c")
    half = pair.as_pair()[0]
    mine = half.state_dict()
    kept = {name: value for name, value in whole.state_dict().items() if name in mine}
    assert sorted(kept) == [
        f"experts.{k}.c.{name}" for k in range(2) for name in ("bias", "weight")
    ]
    with pytest.warns(UserWarning, match="the model's own trunk, which stays as it is"):
        half.load_state_dict(mine | kept)
    for parameter in pair.trunk.parameters():
        parameter.requires_grad_(False)  # experts alone are what such a model saves
    half.load_state_dict(half.state_dict() | kept)
    pair.trunk.requires_grad_(True)
    trunk = {n: torch.zeros_like(v) for n, v in half.state_dict().items() if n.startswith("trunk.")}
    half.load_state_dict(half.state_dict() | trunk)  # a trunk that was trained by itself


def test_what_is_the_models_own_is_loaded_and_what_is_nobodys_is_left_to_torch() -> None:
    model, other = RIDEWrapper(mlp(), 2), RIDEWrapper(mlp(), 2)
    some = {name: value for name, value in other.state_dict().items() if "trunk" in name}
    assert model.load_state_dict(some, strict=False).unexpected_keys == []
    more = {"other": torch.zeros(3), **some}
    assert model.load_state_dict(more, strict=False).unexpected_keys == ["other"]
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


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "model.", "backbone.", "net.encoder."]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("parallel", [False, True])
def test_a_prefix_is_named_with_the_names_to_load(
    strict: bool, prefix: str, parallel: bool
) -> None:
    """What the message says, evaluated, loads what was saved."""
    saved: dict[str, Tensor] = RIDEWrapper(mlp(), 2).state_dict()
    wrapped = RIDEWrapper(mlp(), 2)
    model = nn.DataParallel(wrapped) if parallel else wrapped
    outer = "module." if parallel else ""
    state = {f"{outer}{prefix}{name}": value for name, value in saved.items()}
    state["criterion.weight"] = torch.ones(7)  # as a checkpoint of a whole training module has
    with pytest.raises(CheckpointError, match=f"Remove the prefix `{re.escape(prefix)}`") as error:
        model.load_state_dict(state, strict=strict)
    assert isinstance(error.value, RuntimeError)  # which code catches that then renames
    code = str(error.value).split("load `")[1].removesuffix("`.")
    model.load_state_dict(eval(code, {"state": state}))
    for name, value in wrapped.state_dict().items():
        assert torch.equal(value, saved[name])


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_the_plain_backbone_is_named_with_the_names_to_load(prefix: str) -> None:
    saved, net = mlp().state_dict(), mlp()
    model = RIDEWrapper(net, 2)
    state = {f"{prefix}{name}": value for name, value in saved.items()}
    with pytest.raises(CheckpointError, match=f"behind the prefix `{re.escape(prefix)}`") as error:
        model.load_state_dict(state, strict=False)
    code = str(error.value).split("with `state` = `")[1].split("`, then")[0]
    net.load_state_dict(eval(code, {"state": state}))
    assert all(torch.equal(value, saved[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "model.encoder."])
def test_halves_of_a_pair_name_a_prefix_and_say_that_nothing_was_loaded(prefix: str) -> None:
    extractor, classifier = nn.Sequential(CifarResNet(5, n=1), nn.ReLU()), nn.Linear(5, 3)
    halves = RIDEWrapper.from_pair(extractor, classifier, 2).as_pair()
    for half, plain in zip(halves, (extractor, classifier), strict=True):
        for saved in (half.state_dict(), plain.state_dict()):
            state = {f"{prefix}{name}": value for name, value in saved.items()}
            with pytest.raises(CheckpointError, match=f"the prefix `{prefix}`"):
                half.load_state_dict(state, strict=False)
            with pytest.warns(UserWarning, match="Nothing of this state dict was loaded"):
                half.load_state_dict({"state_dict": saved}, strict=False)


@pytest.mark.parametrize(
    ("state", "advice"),
    [
        ({"epoch": 3, "model": mlp().state_dict()}, r"load `checkpoint\['model'\]`"),
        ({"other.weight": torch.zeros(3)}, "begin with `trunk.`"),
        (
            {"features.0.weight": torch.zeros(64, 3, 11, 11)},
            "begin with `trunk.`",
        ),  # not `0.weight`
    ],
)
def test_a_state_of_which_nothing_was_loaded_is_warned_of(
    state: dict[str, Any], advice: str
) -> None:
    model = RIDEWrapper(mlp(), 2)
    with pytest.warns(UserWarning, match=f"Nothing of this state dict.*{advice}") as record:
        found = model.load_state_dict(state, strict=False)
    assert found.unexpected_keys == list(state)
    assert record[0].filename == __file__


def test_what_hooks_rename_or_modules_around_it_strip_is_loaded_without_a_word() -> None:
    other = RIDEWrapper(mlp(), 2).state_dict()

    def strip(state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in [name for name in state if name.startswith("_orig_mod.")]:
            state[name.removeprefix("_orig_mod.")] = state.pop(name)

    model = RIDEWrapper(mlp(), 2)
    model.register_load_state_dict_pre_hook(lambda module, *given: strip(*given))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict({f"_orig_mod.{name}": value for name, value in other.items()})
        assert all(torch.equal(value, other[name]) for name, value in model.state_dict().items())
        averaged = torch.optim.swa_utils.AveragedModel(RIDEWrapper(mlp(), 2))
        averaged.load_state_dict(averaged.state_dict() | {f"module.{n}": other[n] for n in other})
        outer = nn.ModuleDict({"model": RIDEWrapper(mlp(), 2), "teacher": mlp()})
        outer.load_state_dict({"teacher.0.bias": torch.zeros(32)}, strict=False)
        model.trunk.load_state_dict({"other": torch.zeros(3)}, strict=False)


def test_a_backbones_own_hook_may_rename_every_entry() -> None:
    class Renames(nn.Sequential):
        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
            for name in [name for name in state if name.startswith(f"{prefix}old.")]:
                state[prefix + name.removeprefix(f"{prefix}old.")] = state.pop(name)
            super()._load_from_state_dict(state, prefix, *rest)

    model, other = (RIDEWrapper(Renames(*mlp()), 2, fork_at="4") for _ in range(2))
    wanted = other.state_dict()
    old = {re.sub(r"^(trunk|experts\.\d)\.", r"\1.old.", n): v for n, v in wanted.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(old, strict=False)
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
