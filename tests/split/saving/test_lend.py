"""Backbones with loaders of their own, which look up what the other side of the cut holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper, SplitError
from tests.naive import train_both


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()) * self.scale)


class ComparesShapes(Network):
    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("a.weight", "b.running_mean", "c.weight", "scale"):
            if state[prefix + name].shape != self.get(name).shape:
                del state[prefix + name]
        super()._load_from_state_dict(state, prefix, *rest)

    def get(self, name: str) -> Tensor:
        path, _, key = name.rpartition(".")
        found: Tensor = getattr(self.get_submodule(path), key)
        return found


class Renames(Network):
    """Reads what an older version saved, which called the layers otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if f"{prefix}old.weight" not in state and f"{prefix}fc.weight" not in state:
            assert state[f"{prefix}c.weight"].shape == (4, 8)
            return
        for key in ("weight", "bias"):
            state[f"{prefix}a.{key}"] = state.pop(f"{prefix}old.{key}")
            state[f"{prefix}c.{key}"] = state.pop(f"{prefix}fc.{key}")


class Inside(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def wrapped(net: nn.Module, fork_at: str) -> RIDEWrapper:
    x = torch.randn(2, 6)
    return RIDEWrapper(net, 3, fork_at=fork_at, init="copy", num_classes=4, example_input=x)


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("fork", ["b", "c"])
@pytest.mark.parametrize("kind", [ComparesShapes, Renames])
def test_a_saved_model_is_loaded(kind: type[Network], fork: str, outer: bool) -> None:
    inner = outer and kind is Renames
    fork_at = f"net.{fork}" if inner else fork
    model, other = (wrapped(Inside(kind()) if inner else kind(), fork_at) for _ in range(2))
    holder: nn.Module = nn.ModuleDict({"model": model}) if outer else model
    wanted = nn.ModuleDict({"model": other}).state_dict() if outer else other.state_dict()
    state = {name: tensor.clone() + 1 for name, tensor in wanted.items()}
    given = list(state)
    holder.load_state_dict(state)
    assert list(state) == given
    for name, tensor in holder.state_dict().items():
        torch.testing.assert_close(tensor, state[name])
    name = f"{'model.' if outer else ''}trunk.{'net.' if inner else ''}c.other"
    with pytest.raises(RuntimeError, match=rf"Unexpected key.*{name}"):
        holder.load_state_dict({**state, name: torch.ones(1)})


def test_it_decides_for_each_part_as_for_a_plain_network() -> None:
    model = wrapped(ComparesShapes(), "c")
    state = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}
    state["experts.1.c.weight"] = torch.randn(7, 8)
    before = model.experts[1].get_submodule("c").weight.clone()
    keys = model.load_state_dict(state, strict=False)
    assert keys.missing_keys == ["experts.1.c.weight"]
    assert keys.unexpected_keys == []
    assert torch.equal(model.experts[1].get_submodule("c").weight, before)
    assert torch.equal(model.experts[2].get_submodule("c").weight, state["experts.2.c.weight"])
    assert torch.equal(model.trunk.get_submodule("a").weight, state["trunk.a.weight"])


def test_old_names_are_renamed_on_both_sides() -> None:
    model = wrapped(Renames(), "c")
    state = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}
    old = {n.replace(".a.", ".old.").replace(".c.", ".fc."): v for n, v in state.items()}
    assert old.keys() != state.keys()
    model.load_state_dict(old)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name])


def _pop(module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
    state.pop(f"{prefix}c.weight")


def _pop_if_there(module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
    state.pop(f"{prefix}c.weight", None)


def test_a_backbone_that_could_not_be_saved_in_two_parts_is_refused() -> None:
    net = Network()
    net._register_state_dict_hook(_pop)  # type: ignore[no-untyped-call]
    with pytest.raises(
        SplitError, match=r"KeyError: 'inner\.c\.weight'.*whether an entry is there"
    ):
        wrapped(net, "c")
    net = Network()
    net._register_state_dict_hook(_pop_if_there)  # type: ignore[no-untyped-call]
    assert "trunk.a.weight" in wrapped(net, "c").state_dict()

    class WithoutArguments(Network):
        def state_dict(self) -> Any:  # type: ignore[override]
            return super().state_dict()

    with pytest.raises(SplitError, match=r"own `state_dict`.*`\*args, \*\*kwargs`"):
        wrapped(WithoutArguments(), "c")


def test_enumerations_as_older_versions_have_them() -> None:
    class Enumerates(Network):
        def named_parameters(  # type: ignore[override]
            self, prefix: str = "", recurse: bool = True
        ) -> Iterator[tuple[str, nn.Parameter]]:
            yield from super().named_parameters(prefix, recurse)

        def named_buffers(  # type: ignore[override]
            self, prefix: str = "", recurse: bool = True
        ) -> Iterator[tuple[str, Tensor]]:
            yield from super().named_buffers(prefix, recurse)

    net = Enumerates()
    model = wrapped(net, "c")
    plain = Network()
    plain.load_state_dict(net.state_dict())
    train_both(plain, model, [torch.randn(4, 6) for _ in range(2)])
