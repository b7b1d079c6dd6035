"""Everything works on the device that the model and the data are on, whatever torch's default is.

``torch.set_default_device("cuda")`` and ``with torch.device("cuda"):`` are how people put a whole
script on an accelerator, and a model or an array of labels may still be elsewhere. The default of
these tests is a device without contents, so that whatever lands there by mistake fails at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ride_plugin import (
    DistillationLoss,
    DiversityLoss,
    ExpertRouter,
    RIDELoss,
    RIDEWrapper,
    RoutingInference,
    RoutingLoss,
    cost_report,
    experts_loss,
    longtail,
)
from ride_plugin.routing import ConfidenceRouter, RoutingQueue

COUNTS = [50, 20, 10, 5, 2]
NOISE = torch.Generator().manual_seed(0)
X = torch.randn(24, 3, 8, 8, generator=NOISE)
Y = torch.arange(24) % 5


def network() -> nn.Module:
    with torch.device("cpu"):
        return nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
        )


@pytest.fixture(autouse=True)
def _default_without_contents() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def devices(module: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init": "copy", "num_classes": 7},
        {"classifier": "cosine"},
        {"classifier": nn.Linear},
        {"expert_width": 0.5},
        {"expert_factory": lambda index: network(), "fork_at": "3"},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_a_model_is_where_its_backbone_is(options: dict[str, Any]) -> None:
    model = RIDEWrapper(network(), num_experts=2, **options)
    assert devices(model) == {"cpu"}
    criterion = RIDELoss(nn.CrossEntropyLoss(), COUNTS if model.num_classes == 5 else [9] * 7)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        criterion(model(X), Y).backward()
        optimizer.step()
    criterion.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    with torch.no_grad():
        alone = torch.stack([module.eval()(X) for module in model.to_modules()], dim=1)
        torch.testing.assert_close(model.eval()(X), alone.mean(1))
        torch.testing.assert_close(model.optimize_for_inference()(X), alone.mean(1))
    assert cost_report(model).flops > 0


def _parts() -> RIDEWrapper:
    layers = list(network())
    heads = [list(network()) for _ in range(2)]
    return RIDEWrapper.from_parts(
        nn.Sequential(*layers[:3]),
        lambda k: nn.Sequential(*heads[k][3:]),
        num_experts=2,
        example_input=X,
    )


def test_models_of_parts_and_pairs() -> None:
    layers = list(network())
    pair = RIDEWrapper.from_pair(nn.Sequential(*layers[:-1]), layers[-1], num_experts=2)
    for model in (_parts(), pair):
        assert devices(model) == {"cpu"}
        assert model(X).device.type == "cpu"


@pytest.mark.parametrize(
    "criterion",
    [
        lambda: longtail.LDAMLoss(COUNTS),
        lambda: longtail.BalancedSoftmaxLoss(COUNTS),
        lambda: longtail.LogitAdjustedLoss(COUNTS, tau=2.0),
        lambda: longtail.FocalLoss(weight=longtail.effective_number_weights(COUNTS)),
    ],
)
@pytest.mark.parametrize("form", ["official", "paper"])
def test_losses(criterion: Callable[[], nn.Module], form: Any) -> None:
    loss = RIDELoss(criterion(), DiversityLoss(COUNTS, form=form))
    logits = torch.zeros(24, 3, 5, device="cpu").normal_(generator=NOISE).requires_grad_()
    loss(logits, Y).backward()
    assert bool(logits.grad.isfinite().all())
    assert bool(DistillationLoss()(logits, logits.detach() + 1).isfinite())


def test_deferred_weights_and_schedules() -> None:
    criterion = longtail.LDAMLoss(COUNTS)
    drw = longtail.DeferredReweighting(criterion, COUNTS, start_epoch=1)
    loss = RIDELoss(criterion, DiversityLoss(COUNTS, start_epoch=1), schedules=[drw])
    loss.step()
    again = RIDELoss(longtail.LDAMLoss(COUNTS), DiversityLoss(COUNTS, start_epoch=1))
    again.load_state_dict(loss.state_dict(), strict=False)
    assert criterion.weight[-1] > criterion.weight[0]


@pytest.mark.parametrize("kind", ["learned", "paper", "confidence"])
def test_routing(kind: str) -> None:
    model = RIDEWrapper(network(), num_experts=3).eval()
    if kind == "confidence":
        router: nn.Module = ConfidenceRouter()
    else:
        learned = ExpertRouter.for_model(model, **({"inputs": "paper"} if kind == "paper" else {}))
        assert devices(learned) == {"cpu"}
        inputs = model.router_inputs(X)
        RoutingLoss(class_counts=COUNTS)(learned(inputs), inputs, Y).backward()
        router = learned.eval()
    serve = RoutingInference(model, router)
    print(serve.calibrate([(X[:12], Y[:12]), (X[12:], Y[12:])], max_experts=2.0))
    with torch.no_grad():
        expected = serve(X, return_routing=True)
        assert serve.dense(X).device.type == "cpu"
        torch.testing.assert_close(serve.dense(X), expected.logits)
        queue = RoutingQueue(serve)
        tickets = [queue.submit(X[:12]), queue.submit(X[12:])]
        done = dict(queue.flush())
    torch.testing.assert_close(torch.cat([done[t].logits for t in tickets]), expected.logits)


def test_reports_and_priors() -> None:
    logits = torch.zeros(24, 3, 5, device="cpu").normal_(generator=NOISE)
    mean = logits.mean(1)
    assert longtail.shot_report(mean, Y.tolist(), COUNTS).overall >= 0
    assert longtail.analyze(logits, Y, COUNTS).report.overall >= 0
    assert longtail.adjust_logits(mean, COUNTS).device.type == "cpu"
    favoured = mean + nn.functional.one_hot(Y, 5) + torch.tensor(COUNTS, device="cpu").log()
    calibration = longtail.calibrate_prior(favoured, Y, COUNTS)
    assert calibration.estimate(favoured).adjust(favoured).device.type == "cpu"


def test_samples() -> None:
    labels = np.repeat(np.arange(5), 40)
    assert len(longtail.long_tailed_indices(labels, 10)) < 200
    drawn = list(longtail.ClassBalancedSampler(labels))
    assert len(drawn) == 200


def test_heads_of_a_second_stage() -> None:
    model = RIDEWrapper(network(), num_experts=2)
    longtail.tau_normalize(model, 0.5)
    longtail.reset_classifiers(model)
    trained = longtail.freeze_representation(model)
    assert {parameter.device.type for parameter in trained} == {"cpu"}
    loss: Tensor = experts_loss(nn.functional.cross_entropy, model(X), Y)
    loss.backward()
