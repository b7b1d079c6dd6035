"""Dictionaries of tensors that trunk and experts both look into, as some adapters keep them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper, expert_logits


class Dictionary(nn.Module):
    """Looks into torch's own dictionary, and not up an attribute."""

    def __init__(self, trainable: bool, **tensors: Tensor) -> None:
        super().__init__()
        self.trainable = trainable
        for key, tensor in tensors.items():
            if trainable:
                self.register_parameter(key, nn.Parameter(tensor))
            else:
                self.register_buffer(key, tensor, persistent=False)

    def __getitem__(self, key: str) -> Tensor:
        return self._parameters[key] if self.trainable else self._buffers[key]

    def __iter__(self) -> Iterator[str]:
        return iter((*self._parameters, *self._buffers))


class Adapted(nn.Module):
    """A layer with an adapter whose matrix all layers share."""

    def __init__(self, matrices: Dictionary) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(8, 8), nn.Parameter(torch.rand(8))
        self.matrices = matrices

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.matrices["shared"] * self.scale


class Net(nn.Module):
    def __init__(self, trainable: bool) -> None:
        super().__init__()
        self.matrices = Dictionary(trainable, shared=torch.randn(8, 8), other=torch.randn(2))
        self.a, self.b, self.c = (Adapted(self.matrices) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x).relu()).relu()).relu())


@pytest.mark.parametrize("trainable", [False, True])
def test_experts_find_what_the_trunk_holds(trainable: bool) -> None:
    net = Net(trainable)
    model = RIDEWrapper(net, 2, fork_at="b", init="copy").eval()
    for expert in model.experts:
        expert.head.load_state_dict(net.head.state_dict())
    x = torch.randn(4, 8)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = expert_logits(same(x))
        assert torch.equal(found, net(x).unsqueeze(1).expand_as(found))
        (held,) = [name for name, _ in _tensors(same) if name.endswith("matrices.shared")]
        assert held == "trunk.matrices.shared"
    with torch.no_grad():  # whoever moves it or trains it, experts read what it is now
        model.trunk.matrices["shared"].mul_(2)
        net.matrices["shared"].mul_(2)
    assert torch.equal(expert_logits(model(x))[:, 1], net(x))
    moved = model.double()
    assert torch.allclose(moved(x.double()).float(), net(x), atol=1e-5)
    assert torch.equal(moved.to_module(1)(x.double()), expert_logits(moved(x.double()))[:, 1])


def test_what_nobody_holds_is_missing() -> None:
    model = RIDEWrapper(Net(False), 2, fork_at="b")
    with pytest.raises(KeyError, match="absent"):
        model.experts[0].matrices["absent"]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
