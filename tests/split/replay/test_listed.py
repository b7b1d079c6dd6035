"""Modules of which a forward asks for all parameters: torch's lists, and what has not run yet."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper, expert_logits
from tests.naive import copies_of, train_both


class Prompts(nn.Module):
    """Adds prompts before the fork, after it, or both; of one side or of all."""

    def __init__(self, early: bool, late: bool) -> None:
        super().__init__()
        self.early, self.late = early, late
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.listed = nn.ParameterList(nn.Parameter(torch.randn(8)) for _ in range(3))
        self.named = nn.ParameterDict({k: nn.Parameter(torch.randn(8)) for k in ("late", "both")})

    def prompts(self) -> Tensor:
        named = dict(self.named.named_parameters())
        listed = torch.stack([torch.ones(8), *self.listed.parameters()]).prod(0)
        assert len(named) == 2
        return listed + named["both"] + sum(p for _, p in self.listed.named_parameters("all"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.listed[0]
        for index, block in enumerate(self.blocks):
            if (index == 1 and self.early) or (index == 3 and self.late):
                x = x + self.prompts()
            x = block(x).relu()
        return self.head(x + self.named["late"])


@pytest.mark.parametrize(("early", "late"), [(True, True), (True, False), (False, True)])
def test_a_forward_that_asks_for_all_parameters_of_a_list_gets_them(
    early: bool, late: bool
) -> None:
    net, x = Prompts(early, late), torch.randn(5, 6)
    model = RIDEWrapper(net, 3, fork_at="blocks.2", example_input=x)
    train_both(net, model, [torch.randn(5, 6) for _ in range(3)])
    expected = torch.stack([each(x) for each in copies_of(net, model)], dim=1)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(expert_logits(same(x)), expected)
    named = [name.partition("listed.")[2] for name, _ in model.named_parameters()]
    assert sum(name == "2" for name in named) in (1, 3)  # the trunk's, or each expert's
    plain = model.to_module(1)
    torch.testing.assert_close(plain(x), expected[:, 1])
    assert [name for name, _ in plain.listed.named_parameters()] == ["0", "1", "2"]
    assert b"ride_plugin" not in pickle.dumps(plain)


class TextAndImage(nn.Module):
    """A text, and an image where there is one, for whose encoder's dtype the forward asks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        x = self.embed(x.to(next(self.parameters()).dtype))
        if image is not None:
            x = x + self.encoder(image.to(next(self.encoder.parameters()).dtype))
            assert [p.shape[0] for p in self.encoder.parameters()] == [8, 8, 8, 8]
        for block in self.blocks:
            x = block(x).relu()
        return self.head(x)


@pytest.mark.parametrize("fork_at", ["blocks.2", "embed"])
def test_a_forward_may_ask_for_parameters_of_a_module_that_ran_in_no_example(fork_at: str) -> None:
    net, x = TextAndImage(), torch.randn(5, 6)
    if fork_at == "embed":  # then the encoder would be trained by each expert, which is refused
        net.encoder.requires_grad_(False).eval()
    model = RIDEWrapper(net, 3, init="copy", fork_at=fork_at, example_input=x)
    inputs = (x, torch.randn(5, 5))
    if fork_at == "embed":
        model.eval()
    else:
        train_both(net, model, [(inputs, {}), ((torch.randn(4, 6),), {})])
        model.eval()
    expected = torch.stack([each.eval()(*inputs) for each in copies_of(net, model)], dim=1)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(expert_logits(same(*inputs)), expected)
    assert not list(model.experts[0].encoder.parameters())
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})
    plain = model.to_module(1)
    torch.testing.assert_close(plain(*inputs), expected[:, 1])
    assert b"ride_plugin" not in pickle.dumps(plain)


@pytest.mark.compiles
@pytest.mark.parametrize("fork_at", ["0", "1", "1.1"])
def test_modules_of_which_one_side_has_no_parameters_compile(fork_at: str) -> None:
    inner = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model = RIDEWrapper(nn.Sequential(nn.Linear(6, 8), inner), 2, fork_at=fork_at).train()
    x = torch.randn(5, 6)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(expert_logits(compiled(x)), expert_logits(model(x)))
