"""What the backbone's class overrides of torch's modules, and a wrapped model does not call."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 5)
        self.averages = False

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).relu())


class Precise(Net):
    def half(self) -> Any:
        super().half()
        self.norm.float()
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.device = args[0]
        return super().to(*args, **kwargs)

    def eval(self) -> Any:
        self.averages = True
        return super().eval()


def wrapped(net: nn.Module) -> RIDEWrapper:
    return RIDEWrapper(net, 3, fork_at="norm")


MOVES: list[tuple[str, Callable[[nn.Module], Any]]] = [
    ("half", lambda model: model.half()),
    ("to", lambda model: model.to(torch.float64)),
    ("eval", lambda model: model.eval()),
]


@pytest.mark.parametrize(("name", "move"), MOVES)
def test_what_the_backbone_overrides_is_told_once(name: str, move: Any) -> None:
    model = wrapped(Precise())
    with pytest.warns(UserWarning, match=rf"`Precise` overrides `{name}\(\)`.*does not call it"):
        assert move(model) is model
    move(model)
    with warnings.catch_warnings():  # torch's own, which does to all parts what it did before
        warnings.simplefilter("error")
        model.float().requires_grad_(True).zero_grad()


@pytest.mark.parametrize("move", [move for _, move in MOVES])
def test_torchs_own_and_one_that_adds_nothing_need_no_word(move: Any) -> None:
    class Plain(Net):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            return super().to(*args, **kwargs)

        def half(self) -> Any:
            return nn.Module.half(self)

    move(wrapped(Plain()))
    move(wrapped(Net()))


@pytest.mark.parametrize("library", ["transformers.modeling_utils", "lightning.fabric.utilities"])
def test_libraries_that_keep_a_record_need_no_word(library: str) -> None:
    def half(self: Any) -> Any:
        self.its_dtype = torch.half
        return nn.Module.half(self)

    known = {**globals(), "__name__": library}
    kind = type("Known", (Net,), {"half": types.FunctionType(half.__code__, known)})
    wrapped(kind()).half()


def test_the_halves_of_a_pair_tell_what_theirs_override() -> None:
    class Head(nn.Linear):
        def half(self) -> Any:
            self.scale = 2.0
            return super().half()

    extractor = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    model = RIDEWrapper.from_pair(extractor, Head(16, 5), 3)
    first, second = model.as_pair()
    first.half()
    for whole in (second, model):
        with pytest.warns(UserWarning, match=r"`Head` overrides `half\(\)`"):
            whole.half()


class Tuned(Net):
    """Of which an optimizer shall get the head alone."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.b.parameters(recurse)


def test_parameters_that_the_backbone_hides_from_optimizers_are_told() -> None:
    with pytest.warns(UserWarning, match=r"`Tuned.parameters\(\)` leaves out 4 of 6"):
        model = wrapped(Tuned())
    groups = model.parameter_groups_by(lambda network: list(network.parameters()))
    heads = [p for expert in model.experts for p in (expert.b.weight, expert.b.bias)]
    assert {id(p) for p in groups} == {id(p) for p in heads}
    net = Tuned()
    net.a.requires_grad_(False)
    net.norm.requires_grad_(False)
    wrapped(net)
