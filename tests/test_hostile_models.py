"""Every argument of wrapper, routing, cost, plan and checkpoints, given what it cannot be."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from ride_plugin import (
    ConfidenceRouter,
    ExpertRouter,
    RIDEWrapper,
    RoutingInference,
    RoutingLoss,
    cost_report,
    load_official_checkpoint,
    plan,
)
from ride_plugin.routing import ExitCurve, RoutingQueue, StagedRunner, routing_report
from tests import hostile
from tests.hostile import (
    BOOL,
    COUNT,
    EXPERTS,
    LABELS,
    MODULE,
    NAME,
    NUMBER,
    TARGET,
    TARGETS,
    TENSOR,
    WHOLE,
    Kinds,
)

COUNTS = [50, 20, 5]
X = torch.randn(4, 6)
BACKBONE = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
WRAPPED = RIDEWrapper(BACKBONE, 2, fork_at="2")
ROUTER = ExpertRouter.for_model(WRAPPED)
SERVE = RoutingInference(WRAPPED, ROUTER)
wrap = partial(RIDEWrapper, BACKBONE)
EXAMPLE = [3, 2.5, "a", True, [X], torch.zeros(()), X[:0], (X, X, X), {"nothing": X}, X[:, :5]]
BATCHES = [(X, TARGET)]
LOADER = [
    None,
    3,
    [],
    [3],
    [X],
    [(X, "a")],
    [(X, None)],
    [(X, TARGET[:2])],
    [(X, TARGET.float())],
    [(X, torch.eye(3)[TARGET])],
    [(X, TARGET + 5)],
    [(X, TARGET - 1)],
    [("a", TARGET)],
    [(X[:0], TARGET[:0])],
    [(X * math.nan, TARGET)],
]


def _serve(**changes: Any) -> RoutingInference:
    return RoutingInference(**({"model": WRAPPED, "router": ROUTER} | changes))


def _calibrated(**arguments: Any) -> Any:
    return RoutingInference(WRAPPED, ConfidenceRouter()).calibrate(**arguments)


STATE = WRAPPED.trainable_state_dict()
LAST = next(iter(STATE))
STAGED = RIDEWrapper(
    nn.Sequential(OrderedDict(conv1=nn.Linear(6, 8), layer2=nn.Linear(8, 8), fc=nn.Linear(8, 3))),
    1,
    fork_at="layer2",
)
THEIRS = {"conv1.weight": torch.ones(8, 6), "conv1.bias": torch.ones(8)}
THEIRS |= {"layer2s.0.weight": torch.ones(8, 8), "layer2s.0.bias": torch.ones(8)}
THEIRS |= {"linears.0.weight": torch.ones(3, 8), "linears.0.bias": torch.ones(3)}
CURVE = ExitCurve(*(torch.tensor([1.0, 2.0]) for _ in range(5)))

CALLS: dict[str, tuple[Callable[..., Any], Kinds]] = {
    "RIDEWrapper": (
        RIDEWrapper,
        {
            "backbone": (BACKBONE, MODULE),
            "num_experts": (2, [*WHOLE, None, 0]),
            "fork_at": ("2", [3, True, "nowhere", "", [], b"2", object()]),
            "expert_width": (1.0, [*NUMBER, None, 0, 1.5, -1]),
            "init": ("fresh", [*NAME, None]),
            "classifier": (None, ["cos", 3, [], object(), nn.Linear(8, 3), lambda a, b: None]),
            "example_input": (X, EXAMPLE),
            "logits": (None, [2.5, math.nan, [], object(), lambda out: None]),
            "num_classes": (3, [*WHOLE, 0, 1]),
            "return_experts": (False, ["yes", 3, [], None, math.nan]),
            "checkpoint_experts": (False, BOOL),
        },
    ),
    "RIDEWrapper(expert_factory=)": (
        lambda expert_factory: wrap(2, fork_at="2", expert_factory=expert_factory),
        {
            "expert_factory": (
                lambda k: BACKBONE,
                [3, "a", BACKBONE, lambda k: None, lambda k: nn.Linear(6, 3)],
            )
        },
    ),
    "from_parts": (
        RIDEWrapper.from_parts,
        {
            "trunk": (nn.Linear(6, 8), MODULE),
            "expert_factory": (
                lambda k: nn.Linear(8, 3),
                [None, 3, "a", nn.Linear(8, 3), lambda k: None],
            ),
            "num_experts": (2, [*WHOLE, None, 0]),
            "example_input": (X, EXAMPLE),
            "return_experts": (False, ["yes", 3, [], None]),
            "checkpoint_experts": (False, BOOL),
        },
    ),
    "from_pair": (
        RIDEWrapper.from_pair,
        {
            "feature_extractor": (nn.Linear(6, 8), MODULE),
            "classifier": (nn.Linear(8, 3), MODULE),
            "num_experts": (2, [*WHOLE, None, 0]),
            "features": (None, [2.5, [], object(), lambda out: None]),
        },
    ),
    "inside": (RIDEWrapper.inside, {"model": (nn.Sequential(WRAPPED), [*MODULE, BACKBONE])}),
    "to_module": (WRAPPED.to_module, {"expert": (1, [*WHOLE, None, 2])}),
    "ExpertRouter": (
        ExpertRouter,
        {
            "feature_dim": (8, [*WHOLE, None, 0]),
            "num_experts": (2, [*WHOLE, None, 1]),
            "num_classes": (3, [*WHOLE, None, 1]),
            "inputs": ("paper", [*NAME, None]),
            "top_k": (2, [*WHOLE, None, 0]),
            "hidden_dim": (4, [*WHOLE, 0]),
        },
    ),
    "ExpertRouter.for_model": (ExpertRouter.for_model, {"model": (WRAPPED, [*MODULE, BACKBONE])}),
    "ExpertRouter()": (
        ROUTER,
        {
            "inputs/expert_features/expert_logits/experts' logits": (
                (EXPERTS, torch.randn(4, 2, 8)),
                [
                    *TENSOR,
                    (EXPERTS, None),
                    (EXPERTS, "a"),
                    (EXPERTS.long(), torch.randn(4, 2, 8)),
                    (EXPERTS, torch.ones(4, 2, 8).int()),
                    (EXPERTS, torch.randn(4, 2, 7)),
                    (EXPERTS * math.nan, torch.randn(4, 2, 8)),
                ],
            )
        },
    ),
    "ExpertRouter.gate": (
        ExpertRouter(8, 2, num_classes=3, inputs="paper").gate,
        {
            "index": (0, [*WHOLE, None, -1, 1]),
            "mean_logits": (EXPERTS[:, 0], [*TENSOR, EXPERTS, EXPERTS[:, 0, :2]]),
            "features": (torch.randn(4, 8), [*TENSOR, torch.randn(4, 7), torch.randn(3, 8)]),
        },
    ),
    "ConfidenceRouter": (ConfidenceRouter, {"kind": ("margin", [*NAME, None])}),
    "ConfidenceRouter.gate": (
        lambda mean_logits: ConfidenceRouter().gate(0, mean_logits, mean_logits),
        {"mean_logits": (EXPERTS[:, 0], [*TENSOR, EXPERTS])},
    ),
    "RoutingLoss": (
        RoutingLoss,
        {
            "pos_weight": (100.0, [*NUMBER, None, -1]),
            "neg_weight": (1.0, [*NUMBER, None, -1]),
            "class_counts": (COUNTS, COUNT[1:]),
        },
    ),
    "RoutingLoss()": (
        RoutingLoss(class_counts=COUNTS),
        {
            "gate_logits": (torch.zeros(4, 1), [*TENSOR[:4], torch.zeros(4, 2)]),
            "output/target/experts' logits": (EXPERTS, [*TENSOR, EXPERTS[:0], EXPERTS * math.nan]),
            "target": (TARGET, TARGETS),
        },
    ),
    "RoutingInference": (
        RoutingInference,
        {
            "model": (WRAPPED, [*MODULE, BACKBONE]),
            "router": (ROUTER, [*MODULE, BACKBONE, ExpertRouter(7, 2, num_classes=3)]),
            "threshold": (0.5, [*NUMBER[:4], None, -0.1, 1.5, [], [0.5, 0.5], ["a"], [[0.5]]]),
        },
    ),
    "set_threshold": (
        SERVE.set_threshold,
        {"threshold": (0.5, [*NUMBER[:4], None, -0.1, 1.5, [], [0.5, 0.5], object()])},
    ),
    **{
        f"calibrate({target}=)": (
            _calibrated,
            {
                "loader/target/experts' logits": (BATCHES, LOADER),
                target: (good, [*NUMBER, -1]),
                "progress": (print, [3, "a", []]),
            },
        )
        for target, good in (("max_experts", 2), ("max_flops", 1e9), ("max_accuracy_drop", 0.1))
    },
    "best_within": (CURVE.best_within, {"max_experts": (2, [*NUMBER, None, -1, 0.5])}),
    "RoutingQueue": (
        RoutingQueue,
        {
            "serve": (SERVE, [*MODULE, WRAPPED]),
            "batch_size": (4, [*WHOLE, None, 0]),
            "max_wait": (1, [*WHOLE, None, -1]),
        },
    ),
    "StagedRunner": (
        StagedRunner,
        {
            "stages": (
                {"trunk": print, "expert_0": print},
                [None, 3, "a", [], {}, {"trunk": 3, "expert_0": print}, {3: print}],
            )
        },
    ),
    "export_stages": (  # what is right is exported by its own tests, which takes seconds
        lambda example_input: example_input is X or SERVE.export_stages(example_input),
        {"example_input": (X, EXAMPLE)},
    ),
    "routing_report": (
        routing_report,
        {
            "num_experts_used": ([1, 2, 1], [*LABELS, [1, 2], [1, 2, 3], [0, 1, 1]]),
            "target": ([0, 1, 2], [*LABELS, [0, 1], [0, 1, 3]]),
            "class_counts": (COUNTS, COUNT),
            "num_experts": (2, [*WHOLE, None, 0]),
            "many": (100, [*NUMBER, None, -1]),
            "few": (20, [*NUMBER, None, -1]),
        },
    ),
    "cost_report": (
        cost_report,
        {
            "model": (WRAPPED, [*MODULE, BACKBONE]),
            "example_input": (X, EXAMPLE),
            "router": (ROUTER, [*MODULE[1:], BACKBONE]),
            "shares": ([0.5, 0.5], [3, "a", [], [1], [0.5, 0.6], [1.5, -0.5], [math.nan, 1]]),
            "backbone": (BACKBONE, [*MODULE[1:]]),
        },
    ),
    "plan": (
        plan,
        {
            "backbone": (BACKBONE, MODULE),
            "num_experts": ((2,), [None, 3, "a", [], [0], [2.5], [True], ["3"], {2: 1}]),
            "expert_widths": ((1.0,), [None, 1, "a", [], [0], [1.5], [True], [math.nan], ["1"]]),
            "max_flops_ratio": (1.1, [*NUMBER, None, 0, -1]),
            "shares": ([0.5, 0.5], [3, "ab", [], [1.0], [0.5, "a"], {2: 3}, {2: [1.0]}, {"a": 1}]),
            "fork_at": ("2", [3, "nowhere", [], object()]),
            "example_input": (X, EXAMPLE),
        },
    ),
    "load_trainable_state_dict": (
        WRAPPED.load_trainable_state_dict,
        {"state": (STATE, [None, 3, "a", [], {}, STATE | {"more": X}, STATE | {LAST: X}])},
    ),
    "load_official_checkpoint": (
        load_official_checkpoint,
        {
            "model": (STAGED, [*MODULE, SERVE]),
            "router": (None, [*MODULE[1:], BACKBONE]),
            "path/checkpoint": (THEIRS, [None, 3.5, [], object(), b"file", {"state_dict": 3}]),
        },
    ),
}


NEEDS = {"export_stages": pytest.mark.exports}


@pytest.mark.parametrize("name", [pytest.param(n, marks=NEEDS.get(n, ())) for n in CALLS])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_an_argument_cannot_be_is_refused(name: str) -> None:
    hostile.check_refusals(*CALLS[name])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_numbers_of_numpy_and_torch_are_as_good_as_python_s(name: str) -> None:
    hostile.check_scalars(*CALLS[name])
