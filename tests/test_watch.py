"""A training in which nothing learns is noticed; every other one is left in peace."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper, expert_logits

from .backbones import mlp

PASSES = 300


def train(
    model: RIDEWrapper, parameters: Iterable[Tensor], passes: int = PASSES, every: int = 1
) -> None:
    optimizer = torch.optim.SGD(parameters, 0.01)
    x, y = torch.randn(4, 20), torch.randint(0, 7, (4,))
    for step in range(passes):
        loss = nn.functional.cross_entropy(expert_logits(model(x)).mean(1), y)
        loss.backward()
        if step % every == every - 1:
            optimizer.step()
            optimizer.zero_grad()


def test_an_optimizer_made_before_wrapping_is_noticed_once() -> None:
    backbone = mlp()
    model = RIDEWrapper(backbone, 2)
    with pytest.warns(UserWarning, match=r"make it after wrapping, from `model\.parameters") as w:
        train(model, backbone.parameters())
    assert len(w) == 1
    assert w[0].filename == __file__


def test_a_training_is_left_in_peace() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = RIDEWrapper(mlp(), 2)
        train(model, model.parameters())
        accumulated = RIDEWrapper(mlp(), 2)
        train(accumulated, accumulated.parameters(), every=60)
        head_only = RIDEWrapper(mlp(), 2)
        train(head_only, head_only.classifiers[1].parameters())


def test_an_optimizer_that_no_counter_shows_is_left_in_peace() -> None:
    model = RIDEWrapper(mlp(), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(PASSES):
            model(torch.randn(4, 20)).square().sum().backward()
            for parameter in model.parameters():
                parameter.data.sub_(0.001 * parameter.grad)
                parameter.grad = None


def test_passes_that_are_no_training_do_not_count() -> None:
    model = RIDEWrapper(mlp(), 2)
    x = torch.randn(4, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(PASSES):
            model(x)  # never goes back
        model.eval()
        for _ in range(PASSES):
            model(x).sum().backward()
        frozen = RIDEWrapper(mlp(), 2).train().requires_grad_(False)
        for _ in range(PASSES):
            frozen(x.requires_grad_(True)).sum().backward()


def test_copies_begin_anew_and_need_no_graph() -> None:
    model = RIDEWrapper(mlp(), 2)
    train(model, model.parameters(), passes=1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.warns(UserWarning, match="In 128 training passes"):
            train(other, model.parameters(), passes=128)
