"""A score for each token, frame or choice is no class, whatever its entry is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper, SplitError

LENGTH = 12


def squeezed(hidden: Tensor, net: Tokens) -> Tensor:
    return net.score(hidden).squeeze(-1)


def multiplied(hidden: Tensor, net: Tokens) -> Tensor:
    return torch.einsum("bld,d->bl", hidden, net.weight)


def pointed(hidden: Tensor, net: Tokens) -> Tensor:
    return torch.einsum("bld,bd->bl", hidden, net.inside(hidden[:, 0]))


class Tokens(nn.Module):
    """Scores tokens, in a way and in an output that are given."""

    def __init__(
        self,
        score: Callable[[Tensor, Tokens], Tensor],
        shape: Callable[[Tensor], Any] = lambda x: x,
    ) -> None:
        super().__init__()
        self.way, self.shape = score, shape
        self.embed, self.body = nn.Embedding(50, LENGTH), nn.Linear(LENGTH, LENGTH)
        self.inside, self.score = nn.Linear(LENGTH, LENGTH), nn.Linear(LENGTH, 1)
        self.weight = nn.Parameter(torch.randn(LENGTH))

    def forward(self, tokens: Tensor) -> Any:
        hidden = torch.relu(self.body(self.embed(tokens)))
        return self.shape(self.way(hidden, self))


def named(logits: Tensor) -> dict[str, Tensor]:
    return {"logits": logits}


@pytest.mark.parametrize("shape", [lambda logits: logits, named])
@pytest.mark.parametrize("score", [squeezed, multiplied, pointed])
def test_scores_of_tokens_are_not_taken_for_classes(
    score: Callable[[Tensor, Tokens], Tensor], shape: Callable[[Tensor], Any]
) -> None:
    tokens = torch.randint(0, 50, (2, LENGTH))
    with pytest.raises(SplitError, match=r"a score for each of 12 positions .* for one of 11"):
        RIDEWrapper(Tokens(score, shape), 2, example_input=tokens)


def test_positions_that_are_classes_are_taken_where_somebody_says_so() -> None:
    tokens = torch.randint(0, 50, (2, LENGTH))
    model = RIDEWrapper(Tokens(squeezed), 2, example_input=tokens, num_classes=LENGTH)
    assert model(tokens).shape == (2, LENGTH)


def test_as_many_classes_as_tokens_are_a_coincidence() -> None:
    class Sentences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body = nn.Embedding(50, 8), nn.Linear(8, 8)
            self.fc = nn.Linear(8, LENGTH)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.fc(torch.relu(self.body(self.embed(tokens))).mean(1))

    tokens = torch.randint(0, 50, (2, LENGTH))
    assert RIDEWrapper(Sentences(), 2, example_input=tokens).num_classes == LENGTH


def test_as_many_classes_as_features_are_a_coincidence() -> None:
    backbone = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6)
    )
    assert RIDEWrapper(backbone, 2, example_input=torch.randn(2, 6)).num_classes == 6
