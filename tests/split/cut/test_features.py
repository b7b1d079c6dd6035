"""The features of a classifier of every token: those of the token whose scores are the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ExpertRouter, RIDEWrapper, RoutingInference
from ride_plugin._split._cut._features import features_of, pooled
from tests.backbones import Decoder, last_token, token_ids
from tests.naive import train_both


def model_of(net: nn.Module, **options: Any) -> RIDEWrapper:
    return RIDEWrapper(net, 3, init="copy", example_input=token_ids(2, 6), **options)


def picked(net: nn.Module, ids: Tensor) -> Tensor:
    """By a loop over rows, what a plain decoder's classifier receives for the last token."""
    hidden = net.hidden(ids)  # type: ignore[operator]
    return torch.stack([hidden[row, at] for row, at in enumerate(last_token(ids).tolist())])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_they_are_the_hidden_state_of_the_token_that_is_picked(
    padding: str, training: bool
) -> None:
    model = model_of(Decoder(), num_classes=11).train(training)
    ids = token_ids(6, 9, padding)
    state, rows = model.run_trunk(ids), torch.tensor([5, 1, 2])
    for index, plain in enumerate(model.to_modules()):
        logits, features = model.run_expert(index, state)
        torch.testing.assert_close(features, picked(plain, ids))
        torch.testing.assert_close(logits, plain.score(features))
        some = model.run_expert(index, state.select(rows))
        torch.testing.assert_close(some, (logits[rows], features[rows]))
    if not training:
        seen = model.router_inputs(ids).expert_features[:, 2]
        torch.testing.assert_close(seen, picked(model.to_module(2), ids))


def test_gradients_of_features_and_logits_are_those_of_the_token() -> None:
    net, ids = Decoder(), token_ids(4, 8)
    model = model_of(net)
    _, features = model.run_expert(1, model.run_trunk(ids))
    features.square().sum().backward()
    plain = model.to_module(1)
    plain.zero_grad()
    picked(plain, ids).square().sum().backward()
    got = model.experts[1].layers[2].weight.grad
    torch.testing.assert_close(got, plain.layers[2].weight.grad)
    train_both(net, model_of(net), [token_ids(4), token_ids(5, 9, "left"), token_ids(3)])


def test_rows_that_leave_early_do_so_by_the_same_logits() -> None:
    model, ids = model_of(Decoder()).eval(), token_ids(8)
    router = ExpertRouter.for_model(model, inputs="paper")
    assert router.feature_dim == 16
    serve = RoutingInference(model, router)
    alone = torch.cat([serve(row[None]) for row in ids])
    torch.testing.assert_close(serve(ids), alone)


def test_tokens_of_padding_may_be_anything() -> None:
    received, returned = torch.randn(2, 4, 6), torch.randn(2, 4, 3)
    logits = torch.stack([returned[0, 2], returned[1, 0]])
    received[0, 3], returned[0, 3], returned[1, 2] = torch.nan, torch.nan, torch.inf
    expected = torch.stack([received[0, 2], received[1, 0]])
    assert torch.equal(features_of(received, returned, logits), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4)], ids=["frames", "patches"])
def test_of_logits_that_are_a_mean_they_are_the_mean(shape: tuple[int, ...]) -> None:
    received, returned = torch.randn(*shape, 6), torch.randn(*shape, 3)
    between = tuple(range(1, len(shape)))
    got = features_of(received, returned, returned.mean(between))
    torch.testing.assert_close(got, received.mean(between))


def test_other_results_leave_the_mean_over_positions() -> None:
    received, logits = torch.randn(2, 4, 6), torch.randn(2, 3)
    for returned in (None, logits, torch.randn(2, 3, 4)):
        got = features_of(received, returned, logits)
        torch.testing.assert_close(got, pooled(received))
    torch.testing.assert_close(
        features_of(received, torch.zeros(2, 4, 3), logits), pooled(received)
    )


@pytest.mark.compiles
def test_the_choice_compiles_and_exports() -> None:
    model, ids = model_of(Decoder(), num_classes=11).eval(), token_ids(5, 6)
    wanted = model.router_inputs(ids)
    compiled = torch.compile(model.router_inputs, backend="eager", fullgraph=True)(ids)
    torch.testing.assert_close(compiled.expert_features, wanted.expert_features)
    stages = RoutingInference(model, ExpertRouter.for_model(model)).export_stages()
    crossing = stages["trunk"].module()(ids)
    logits, features = stages["expert_1"].module()(*crossing)
    torch.testing.assert_close(logits, wanted.expert_logits[:, 1])
    torch.testing.assert_close(features, wanted.expert_features[:, 1])
