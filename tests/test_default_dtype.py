"""What the library computes for itself keeps its digits, whatever torch's default dtype is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ConfidenceRouter, ExpertRouter, RIDEWrapper, RoutingInference, longtail
from ride_plugin.routing import LongTailedCalibrationWarning
from ride_plugin.routing._threshold import _warn_if_long_tailed


@pytest.fixture(autouse=True)
def _half_by_default() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def served(learned: bool) -> tuple[RoutingInference, Tensor]:
    layers = (nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
    model = RIDEWrapper(nn.Sequential(*layers), 3)
    router = ExpertRouter.for_model(model) if learned else ConfidenceRouter()
    return RoutingInference(model, router), torch.randn(400, 8)


@pytest.mark.parametrize("learned", [False, True])
def test_calibrated_thresholds_serve_what_the_curve_says(learned: bool) -> None:
    serve, x = served(learned)
    result = serve.calibrate([(x, torch.arange(400) % 5)], max_experts=1.7)
    assert len(result.curve.threshold_logits) > 20
    for index, limit in enumerate(result.curve.threshold_logits):
        serve.threshold_logits.fill_(limit)
        used = serve(x, return_routing=True).num_experts_used
        assert used.double().mean().item() == result.curve.mean_experts[index]


def test_what_a_router_has_seen_is_summed_as_in_float32() -> None:
    serve, x = served(learned=True)
    router, data = serve.router, serve.model.router_inputs(x)
    wide = ExpertRouter(32, 3, num_classes=5).float()
    router(data)
    for rows in torch.arange(400).split(7):
        wide((data.expert_logits[rows], data.expert_features[rows]))
    assert router.input_mean.dtype == torch.float32
    torch.testing.assert_close(wide.input_mean, router.input_mean)
    torch.testing.assert_close(wide.input_variance, router.input_variance)


def test_labels_are_long_tailed_just_above_the_ratio() -> None:
    labels = torch.tensor([0] * 1001 + [1] * 100)
    with pytest.warns(LongTailedCalibrationWarning):
        _warn_if_long_tailed(labels)


def test_disagreement_is_counted_in_float32() -> None:
    logits = torch.randn(50, 4, 5, dtype=torch.float32)
    choices, pairs = logits.argmax(2).tolist(), [(i, j) for i in range(4) for j in range(4)]
    share = sum(row[i] != row[j] for row in choices for i, j in pairs) / (50 * 12)
    report = longtail.analyze(logits, torch.arange(50) % 5, [500, 300, 50, 10, 5])
    assert report.disagreement.overall == pytest.approx(share, abs=1e-6)
