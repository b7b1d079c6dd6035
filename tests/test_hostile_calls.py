"""Every argument of the losses and of `longtail`, given what it cannot be: an error of ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ride_plugin import (
    DistillationLoss,
    DiversityLoss,
    RIDELoss,
    TemperatureSchedule,
    expert_logits,
    experts_loss,
    functional,
    longtail,
)
from tests import hostile
from tests.hostile import (
    BOOL,
    COUNT,
    EXPERTS,
    LABELS,
    LOGITS,
    MODULE,
    NAME,
    NUMBER,
    TARGET,
    TARGETS,
    TENSOR,
    WEIGHT,
    WHOLE,
    Kinds,
)

COUNTS = [50, 20, 5]
HALF_NAN = torch.tensor([1.0, 1.0, math.nan, math.nan])


def built(make: Callable[[], Any]) -> Callable[..., Any]:
    return lambda **kwargs: make()(**kwargs)


def logits_target(soft: bool = True) -> Kinds:
    return {"logits": (LOGITS, [*TENSOR, EXPERTS, LOGITS[:0]]), "target": (TARGET, TARGETS)}


LINEAR = nn.Linear(4, 3)
CALLS: dict[str, tuple[Callable[..., Any], Kinds]] = {
    "DiversityLoss": (
        DiversityLoss,
        {
            "class_counts": (COUNTS, COUNT),
            "weight": (0.2, [*NUMBER, None, -1]),
            "gamma": (0.05, [*NUMBER, -1, 1.5]),
            "eta": (1.0, [*NUMBER, 0]),
            "start_epoch": (0, [*WHOLE, -5]),
            "form": ("paper", [*NAME, None]),
            "detach_others": (True, BOOL),
        },
    ),
    "DiversityLoss(temperature=)": (
        lambda temperature: DiversityLoss(COUNTS, temperature=temperature),
        {"temperature": (TemperatureSchedule(COUNTS), [1.0, "a", TemperatureSchedule([1, 2])])},
    ),
    "DiversityLoss()": (
        built(lambda: DiversityLoss(COUNTS, form="paper")),
        {"output": (EXPERTS, [*TENSOR, LOGITS, EXPERTS[:0]]), "target": (TARGET, TARGETS)},
    ),
    "TemperatureSchedule": (
        TemperatureSchedule,
        {
            "class_counts": (COUNTS, COUNT),
            "gamma": (0.05, [*NUMBER, None, -1, 1.5]),
            "eta": (1.0, [*NUMBER, None, 0]),
            "start_epoch": (0, [*WHOLE, None, -5]),
            "form": ("official", [*NAME, None]),
        },
    ),
    "DistillationLoss": (
        DistillationLoss,
        {
            "weight": (1.0, [*NUMBER, None, -1]),
            "temperature": (1.5, [*NUMBER, None, 0, -1]),
            "form": ("official", [*NAME, None]),
        },
    ),
    "DistillationLoss()": (
        built(DistillationLoss),
        {
            "output": (EXPERTS, [*TENSOR, LOGITS, EXPERTS[:0]]),
            "teacher_output": (LOGITS, [*TENSOR, LOGITS[:2], LOGITS[:, :2]]),
        },
    ),
    "RIDELoss": (
        RIDELoss,
        {
            "criterion": (F.cross_entropy, [None, 3, "ce", [F.cross_entropy, None]]),
            "diversity": (COUNTS, COUNT),
            "reduction": ("mean", [*NAME, None]),
            "schedules": ([], [None, 3, "a", [nn.ReLU()]]),
        },
    ),
    "RIDELoss()": (
        built(lambda: RIDELoss(F.cross_entropy, COUNTS)),
        {"output": (EXPERTS, [*TENSOR, LOGITS, EXPERTS[:0]]), "target": (TARGET, TARGETS)},
    ),
    "experts_loss": (
        experts_loss,
        {
            "criterion": (nn.CrossEntropyLoss(), [None, 3, "ce", [F.cross_entropy]]),
            "output": (EXPERTS, [*TENSOR, LOGITS, EXPERTS[:0]]),
            "target": (TARGET, TARGETS),
            "reduction": ("mean", [*NAME, None, "none"]),
        },
    ),
    "expert_logits": (expert_logits, {"output": (EXPERTS, [*TENSOR, LOGITS, (LOGITS, LOGITS)])}),
    "class_balance": (
        functional.class_balance,
        {"class_counts": (COUNTS, COUNT), "gamma": (0.1, [*NUMBER, None, -1, 1.5])},
    ),
    "class_temperatures": (
        functional.class_temperatures,
        {
            "class_counts": (COUNTS, COUNT),
            "eta": (1.0, [*NUMBER, None, 0]),
            "gamma": (0.1, [*NUMBER, None, -1, 1.5]),
            "form": ("paper", [*NAME, None]),
        },
    ),
    "sample_temperatures": (
        functional.sample_temperatures,
        {
            "temperature": (torch.ones(3), [*TENSOR[:4], 1.0, -torch.ones(3)]),
            "target": (TARGET, TARGETS[:3]),
        },
    ),
    "pairwise_kl": (
        functional.pairwise_kl,
        {
            "expert_logits": (EXPERTS, [*TENSOR, LOGITS]),
            "temperature": (1.0, [*NUMBER, None, 0, -1, torch.ones(3), -torch.ones(4), TARGET]),
        },
    ),
    "kl_from_mean": (
        functional.kl_from_mean,
        {
            "expert_logits": (EXPERTS, [*TENSOR, LOGITS]),
            "temperature": (1.0, [*NUMBER, None, 0, -1, torch.ones(4), torch.zeros(3)]),
        },
    ),
    "distillation_kl": (
        functional.distillation_kl,
        {
            "expert_logits": (EXPERTS, [*TENSOR, LOGITS]),
            "teacher_logits": (LOGITS, [*TENSOR, LOGITS[:2]]),
            "temperature": (1.5, [*NUMBER, None, 0, -1]),
        },
    ),
    "mean_logits": (functional.mean_logits, {"experts": (EXPERTS, [*TENSOR, LOGITS])}),
    "routing_targets": (
        functional.routing_targets,
        {
            "expert_logits": (EXPERTS, [*TENSOR, LOGITS, EXPERTS[:, :1]]),
            "target": (TARGET, TARGETS),
        },
    ),
    "routing_loss": (
        functional.routing_loss,
        {
            "gate_logits": (torch.zeros(4, 1), [*TENSOR[:4], LOGITS]),
            "targets": (torch.ones(4, 1).bool(), [None, "a", LOGITS, torch.ones(0, 1).bool()]),
            "pos_weight": (1.0, [*NUMBER, None, -1]),
            "neg_weight": (1.0, [*NUMBER, None, -1]),
            "weight": (
                torch.full((4,), 0.5),
                ["a", [1.0] * 4, torch.ones(3), torch.ones(4).int(), -torch.ones(4), HALF_NAN],
            ),
        },
    ),
    "LDAMLoss": (
        longtail.LDAMLoss,
        {
            "class_counts": (COUNTS, COUNT),
            "max_margin": (0.5, [*NUMBER, None, -1]),
            "scale": (30.0, [*NUMBER, None, 0]),
            "weight": ([1.0, 1, 1], WEIGHT),
        },
    ),
    "LDAMLoss()": (built(lambda: longtail.LDAMLoss(COUNTS)), logits_target()),
    "BalancedSoftmaxLoss": (longtail.BalancedSoftmaxLoss, {"class_counts": (COUNTS, COUNT)}),
    "BalancedSoftmaxLoss()": (built(lambda: longtail.BalancedSoftmaxLoss(COUNTS)), logits_target()),
    "LogitAdjustedLoss": (
        longtail.LogitAdjustedLoss,
        {"class_counts": (COUNTS, COUNT), "tau": (1.0, [*NUMBER, None])},
    ),
    "FocalLoss": (
        longtail.FocalLoss,
        {"gamma": (2.0, [*NUMBER, None, -1]), "weight": ([1.0, 1, 1], WEIGHT)},
    ),
    "FocalLoss()": (built(longtail.FocalLoss), logits_target()),
    "adjust_logits": (
        longtail.adjust_logits,
        {
            "logits": (LOGITS, [None, "a", [[1.0]], LOGITS.long(), LOGITS[:, :2], LOGITS.sum()]),
            "class_counts": (COUNTS, COUNT),
            "tau": (1.0, [*NUMBER, None]),
        },
    ),
    "effective_number_weights": (
        longtail.effective_number_weights,
        {"class_counts": (COUNTS, COUNT), "beta": (0.99, [*NUMBER, None, -1, 1])},
    ),
    "DeferredReweighting": (
        longtail.DeferredReweighting,
        {
            "criterion": (longtail.LDAMLoss(COUNTS), [*MODULE, nn.ReLU(), nn.Linear(2, 2)]),
            "class_counts": (COUNTS, COUNT),
            "start_epoch": (1, [*WHOLE, None, -5]),
            "beta": (0.99, [*NUMBER, None, 1]),
        },
    ),
    "ClassBalancedSampler": (
        longtail.ClassBalancedSampler,
        {
            "labels": ([0, 0, 1], LABELS),
            "num_samples": (3, [*WHOLE, 0]),
            "num_replicas": (2, [*WHOLE, 0]),
            "rank": (1, [*WHOLE, 2]),
            "seed": (0, [*WHOLE, None]),
        },
    ),
    "long_tailed_counts": (
        longtail.long_tailed_counts,
        {
            "num_classes": (5, [*WHOLE, None, 0]),
            "max_count": (100, [*WHOLE, None, 0]),
            "imbalance_factor": (10, [*NUMBER, None, 0.01]),
            "profile": ("step", [*NAME, None]),
        },
    ),
    "long_tailed_indices": (
        longtail.long_tailed_indices,
        {
            "labels": ([0, 0, 1, 1], LABELS),
            "imbalance_factor": (2, [*NUMBER, None, 0.01]),
            "profile": ("step", [*NAME, None]),
            "max_count": (2, [*WHOLE, 0]),
            "seed": (0, [*WHOLE, None]),
            "generator": (torch.Generator(), [3, "a"]),
        },
    ),
    "shot_groups": (
        longtail.shot_groups,
        {
            "class_counts": (COUNTS, COUNT),
            "many": (100, [*NUMBER, None, -1, 1]),
            "few": (20, [*NUMBER, None, -1, 101]),
        },
    ),
    "shot_report": (
        longtail.shot_report,
        {
            "output": (LOGITS, [None, "a", LOGITS[:2], LOGITS[:, :2], [True] * 4, [0.5] * 4]),
            "target": (TARGET, LABELS),
            "class_counts": (COUNTS, COUNT),
        },
    ),
    "analyze": (
        longtail.analyze,
        {
            "expert_logits": (EXPERTS, [*TENSOR, LOGITS, EXPERTS[:2]]),
            "target": (TARGET, LABELS),
            "class_counts": (COUNTS, COUNT),
            "num_experts_used": ([1, 2, 1, 2], ["a", 3, [1], [0, 1, 1, 1], [1.0] * 4]),
            "num_bins": (15, [*WHOLE, None, 0]),
        },
    ),
    "bias_variance": (
        longtail.bias_variance,
        {
            "predictions": ([[0, 1], [0, 2]], [*LABELS, [[0, 1]], [[0, 1], [0, 3]]]),
            "target": ([0, 1], LABELS),
            "class_counts": (COUNTS, COUNT),
        },
    ),
    "expected_calibration_error": (
        longtail.expected_calibration_error,
        {
            "confidence": ([0.5, 0.9], [None, "a", [], [0.5], [1.5, 0.5], [math.nan, 1], [-1, 0]]),
            "correct": ([True, False], [None, "a", [], [True], [2, 0], [math.nan, 1]]),
            "num_bins": (15, [*WHOLE, None, 0]),
        },
    ),
    "tau_normalized": (
        longtail.tau_normalized,
        {"weight": (LOGITS, [*TENSOR, LOGITS * 0]), "tau": (1.0, [*NUMBER, None, -1])},
    ),
    "find_classifiers": (longtail.find_classifiers, {"model": (LINEAR, [*MODULE, [], [3]])}),
    "freeze_representation": (longtail.freeze_representation, {"model": (LINEAR, [*MODULE, []])}),
    "reset_classifiers": (longtail.reset_classifiers, {"model": (LINEAR, [*MODULE, [nn.ReLU()]])}),
    "LearnableWeightScaling": (
        longtail.LearnableWeightScaling,
        {"num_classes": (3, [*WHOLE, None, 0])},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_an_argument_cannot_be_is_refused(name: str) -> None:
    hostile.check_refusals(*CALLS[name])


@pytest.mark.parametrize("name", CALLS)
def test_numbers_of_numpy_and_torch_are_as_good_as_python_s(name: str) -> None:
    hostile.check_scalars(*CALLS[name])
