"""RIDEModule: what Hugging Face's Trainer looks for in a model, without the Trainer."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import (
    ArgumentError,
    DiversityLoss,
    ExpertOutput,
    RIDELoss,
    RIDEModule,
    RIDEWrapper,
    experts_loss,
)

COUNTS = [30, 10, 5]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(
        self, values: Tensor, mask: Tensor | None = None, labels: None = None, **rest: object
    ) -> Tensor:
        x = self.embed(values if mask is None else values * mask).relu()
        return self.head(self.body(x).relu())


class Criterion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.diversity = DiversityLoss(COUNTS)

    def forward(self, output: Tensor | ExpertOutput, labels: Tensor) -> Tensor:
        loss = experts_loss(nn.functional.cross_entropy, output, labels)
        return loss + self.diversity(output, labels)


def build() -> RIDEModule:
    example = {"values": torch.randn(2, 8)}
    return RIDEModule(RIDEWrapper(Named(), 3, fork_at="body", example_input=example), Criterion())


def test_arguments_are_the_backbones_and_labels() -> None:
    module = build()
    assert list(inspect.signature(module.forward).parameters) == ["values", "mask", "labels"]
    assert "labels" in inspect.signature(RIDEModule.forward).parameters  # read off the class too
    assert next(iter(inspect.signature(copy.deepcopy(module).forward).parameters)) == "values"


@pytest.mark.parametrize("return_experts", [False, True])
def test_loss_and_logits_are_those_of_the_parts(return_experts: bool) -> None:
    module = build()
    module.model.return_experts = return_experts
    values, labels = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    got = module(values=values, mask=torch.ones(4, 8), labels=labels)
    output = module.model(values)
    torch.testing.assert_close(got["loss"], module.criterion(output, labels))
    torch.testing.assert_close(got["logits"], output[0] if return_experts else output)
    got["loss"].backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_copy_computes_with_its_own_parameters() -> None:
    module = build().eval()
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        values = torch.randn(4, 8)
        assert other(values)["logits"].abs().max() == 0
        assert module(values)["logits"].abs().max() > 0


def test_predicts_without_labels_and_refuses_to_train_without() -> None:
    module, values = build(), torch.randn(4, 8)
    assert module.eval()(values)["logits"].shape == (4, 3)
    with pytest.raises(ArgumentError, match="label_smoothing"):
        module.train()(values)
    with torch.no_grad():
        assert set(module(values)) == {"logits"}


@pytest.mark.parametrize("what", ["gradient", "activation"])
def test_gradient_checkpointing_recomputes_the_experts(what: str) -> None:
    module = build()
    getattr(module, f"{what}_checkpointing_enable")({"use_reentrant": False})
    assert module.model.checkpoint_experts
    getattr(module, f"{what}_checkpointing_disable")()
    assert not module.model.checkpoint_experts


def test_wants_a_wrapped_model() -> None:
    with pytest.raises(ArgumentError, match="`model` to be a RIDEWrapper, but got Named"):
        RIDEModule(Named(), Criterion())


@pytest.mark.parametrize("criterion", [None, nn.CrossEntropyLoss])
def test_wants_a_criterion_that_can_be_called(criterion: Any) -> None:
    with pytest.raises(ArgumentError, match=r"`criterion` to be callable as criterion\(output,"):
        RIDEModule(build().model, criterion)


def test_arguments_by_position_are_those_of_the_signature() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x, labels=None, scale=1.0):
            return self.last((self.first(x) * scale).relu())

    x = torch.randn(4, 8)
    model = RIDEWrapper(Backbone(), 2, fork_at="last", example_input=x)
    module = RIDEModule(model.eval(), RIDELoss(nn.CrossEntropyLoss(), [5, 3, 1])).eval()
    assert list(inspect.signature(module.forward).parameters) == ["x", "scale", "labels"]
    torch.testing.assert_close(module(x, 3.0)["logits"], model(x, scale=3.0))
    with pytest.raises(ArgumentError, match="at most 2 arguments by position, but got 3"):
        module(x, 3.0, torch.tensor([0, 1, 2, 0]))
