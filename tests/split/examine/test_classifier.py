"""Classifiers that are made anew: only where the logits come from nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper, SplitError, expert_logits
from ride_plugin.longtail import CosineClassifier
from tests.backbones import Decoder, last_scores, last_token, token_ids


class Net(nn.Module):
    """What its logits are computed from is told by a function of itself and the features."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.neck = nn.Linear(8, 16), nn.Linear(16, 16)
        self.fc, self.other = nn.Linear(16, 5), nn.Linear(16, 5)
        self.scale, self.compute = nn.Parameter(torch.tensor(2.0)), compute

    def reset_classifier(self, number: int) -> None:
        raise AssertionError("must not be called")

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, self.neck(self.body(x).relu()).relu())


@pytest.mark.parametrize(
    "compute",
    [
        lambda net, h: (net.other(h) + net.fc(h)) / 2,
        lambda net, h: net.fc(h) - h[:, :5],
        lambda net, h: torch.stack([net.other(h), net.fc(h)]).mean(0),
    ],
    ids=["sum", "features", "mean"],
)
@pytest.mark.parametrize("options", [{"classifier": "cosine"}, {"num_classes": 9}, {}])
def test_one_of_several_classifiers_is_not_replaced(compute: Any, options: dict[str, Any]) -> None:
    with pytest.raises(SplitError, match=r"from more than one module: `fc` would be replaced"):
        RIDEWrapper(Net(compute), 2, fork_at="neck", **options).reset_classifier(9)


@pytest.mark.parametrize(
    "compute",
    [
        lambda net, h: net.fc(h) * net.scale,
        lambda net, h: nn.functional.normalize(net.fc(h), dim=1),
        lambda net, h: net.fc(h) / net.fc(h).norm(dim=1, keepdim=True),  # NaN of zeros
        lambda net, h: net.fc(h) * h.norm(dim=1, keepdim=True),
    ],
    ids=["scale", "normalised", "divided", "of each row"],
)
def test_what_is_computed_of_the_classifier_alone_stays(compute: Any) -> None:
    model = RIDEWrapper(Net(compute), 2, fork_at="neck", classifier="cosine", num_classes=9)
    assert [type(head) for head in model.classifiers] == [CosineClassifier] * 2
    x = torch.randn(3, 8)
    out = expert_logits(model(x))
    for k, expert in enumerate(model.experts):
        h = expert.neck(model.trunk.body(x).relu()).relu()
        torch.testing.assert_close(out[:, k], compute(expert, h))


def test_a_frozen_copy_of_the_classifier_is_not_taken_for_it() -> None:
    backbone = Net(lambda net, h: net.fc(h) + net.other(h).detach())
    backbone.other.load_state_dict(backbone.fc.state_dict())
    backbone.other.requires_grad_(False)
    model = RIDEWrapper(backbone, 2, fork_at="neck", init="copy")
    assert model.classifier_name == "fc"
    first, second = model.classifiers
    assert not torch.equal(first.weight, second.weight)


TAKEN: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "last": last_scores,
    "first": lambda net, scores, ids: scores[:, 0],
    "last, as a structure": lambda net, scores, ids: {"logits": last_scores(net, scores, ids)},
    "last, in double": lambda net, scores, ids: last_scores(net, scores.double(), ids),
    "by a mask": lambda net, scores, ids: scores[
        torch.arange(ids.shape[1]) == last_token(ids)[:, None]
    ],
    "mean": lambda net, scores, ids: scores.mean(1),
    "mean of patches": lambda net, scores, ids: scores.unflatten(1, (2, -1)).mean((1, 2)),
}


def wrapped_decoder(net: nn.Module, length: int = 6, **options: Any) -> RIDEWrapper:
    return RIDEWrapper(net, 3, example_input=token_ids(2, length), **options)


@pytest.mark.parametrize("kind", TAKEN)
def test_a_classifier_of_every_token_is_found_and_made_anew(kind: str) -> None:
    net = Decoder(TAKEN[kind])
    model = wrapped_decoder(net, init="copy", num_classes=11).eval()
    assert (model.classifier_name, model.num_classes, model.feature_dim) == ("score", 11, 16)
    said = {(expert.num_labels, expert.config.num_labels) for expert in model.experts}
    assert said == {(11, 11)}
    assert net.config.num_labels == 5
    first, second, _ = model.classifiers
    assert not torch.equal(first.weight, second.weight)
    assert torch.equal(model.experts[0].layers[2].weight, net.layers[2].weight)
    ids = token_ids(4, 8, "left")
    out = model.router_inputs(ids).expert_logits
    for index, plain in enumerate(model.to_modules()):
        expected = TAKEN[kind](plain, plain.score(plain.hidden(ids)), ids)
        expected = expected["logits"] if isinstance(expected, dict) else expected
        torch.testing.assert_close(out[:, index], expected)
    cosine = wrapped_decoder(net, classifier="cosine")
    assert [type(head) for head in cosine.classifiers] == [CosineClassifier] * 3


def test_a_classifier_of_every_token_that_is_zero_is_found_and_copies_differ() -> None:
    net = Decoder()
    nn.init.zeros_(net.score.weight)
    first, second, _ = wrapped_decoder(net, init="copy").classifiers
    assert not torch.equal(first.weight, second.weight)


def test_a_classifier_of_every_token_is_found_by_an_example_of_one_token() -> None:
    net = Decoder(TAKEN["last, as a structure"])
    model = wrapped_decoder(net, 1, init="copy", num_classes=11).eval()
    ids = token_ids(4, 8)
    expected = model.to_module(1)(ids)["logits"]
    torch.testing.assert_close(model.router_inputs(ids).expert_logits[:, 1], expected)


def test_of_two_classifiers_of_every_token_that_is_taken_whose_result_is_picked() -> None:
    class Two(Decoder):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(16, 5)

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.hidden(ids)
            logits = last_scores(self, self.score(hidden), ids)
            self.other(hidden)
            return logits

    assert wrapped_decoder(Two()).classifier_name == "score"


@pytest.mark.parametrize(
    "take",
    [
        lambda net, scores, ids: scores.amax(1),
        lambda net, scores, ids: scores[:, 0] + scores[:, 1],
        lambda net, scores, ids: scores[:, 0] * 2,
        lambda net, scores, ids: net.embedding(ids)[:, 0, :5],
    ],
    ids=["largest", "sum", "scaled", "another's"],
)
def test_what_is_computed_of_every_token_otherwise_has_no_classifier(take: Any) -> None:
    assert wrapped_decoder(Decoder(take)).classifiers == ()


@pytest.mark.parametrize("body", ["encoder", "recurrent", "embedding"])
def test_what_makes_features_of_every_token_is_no_classifier(body: str) -> None:
    class Extractor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 8)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.recurrent = nn.GRU(8, 8, batch_first=True)

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.embedding(ids)
            if body == "embedding":
                return hidden.mean(1)
            hidden = self.encoder(hidden)
            return hidden[:, 0] if body == "encoder" else self.recurrent(hidden)[0][:, -1]

    fork_at = "embedding" if body == "embedding" else "encoder"
    assert wrapped_decoder(Extractor(), fork_at=fork_at, num_classes=8).classifiers == ()
