"""Plans against FLOPs counted by hand on the CIFAR ResNet-32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ride_plugin import ArgumentError, ExpertRouter, RIDEWrapper, SplitError, cost_report, plan
from ride_plugin._budget import Plan, PlanRow
from tests.backbones import CifarResNet, TwoMatrices

CLASSES = 100
SHARES = (0.41, 0.09, 0.50)
WIDTHS = {1.0: (32, 64), 0.75: (24, 48), 0.5: (16, 32)}


def convolution(inputs: int, outputs: int, side: int) -> int:
    return 2 * 9 * inputs * outputs * side * side


def by_hand(widths: tuple[int, int]) -> tuple[int, int, int]:
    """FLOPs of trunk, expert and gate."""
    a, b = widths
    trunk = convolution(3, 16, 32) + 10 * convolution(16, 16, 32)
    expert = convolution(16, a, 16) + 9 * convolution(a, a, 16)
    expert += convolution(a, b, 8) + 9 * convolution(b, b, 8) + 2 * b * CLASSES
    gate = 2 * (30 + 3 + 8) * 32 + 2 * 32
    return trunk, expert, gate


@pytest.fixture(scope="module")
def found() -> Plan:
    return plan(CifarResNet(CLASSES), shares=SHARES)


def test_ratios_are_those_by_hand(found: Plan) -> None:
    trunk, full, _ = by_hand(WIDTHS[1.0])
    backbone = trunk + full
    assert [(row.num_experts, row.expert_width) for row in found.rows] == [
        (number, width) for number in (2, 3, 4) for width in (1.0, 0.75, 0.5)
    ]
    for row in found.rows:
        trunk, expert, gate = by_hand(WIDTHS[row.expert_width])
        assert row.report.backbone_flops == backbone
        assert row.report.flops == trunk + row.num_experts * expert
        assert row.ratio == pytest.approx((trunk + row.num_experts * expert) / backbone)
        if row.num_experts != 3:
            assert row.routed_ratio is None
            continue
        routed = SHARES[0] * (expert + gate) + SHARES[1] * 2 * (expert + gate)
        routed += SHARES[2] * (3 * expert + 2 * gate)
        assert row.routed_ratio == pytest.approx((trunk + routed) / backbone)


def test_the_affordable_mean_number_of_experts_spends_the_budget(found: Plan) -> None:
    trunk, full, _ = by_hand(WIDTHS[1.0])
    for row in found.rows:
        _, expert, gate = by_hand(WIDTHS[row.expert_width])
        mean = (1.1 * (trunk + full) - trunk) / (expert + gate)
        assert row.affordable_experts == pytest.approx(min(mean, row.num_experts))


def test_all_experts_are_affordable_where_all_of_them_are_within_the_budget() -> None:
    """Gates of a tiny network cost more than its experts, and behind the last one is none."""
    backbone = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 4))
    full = plan(backbone, num_experts=(1, 2), expert_widths=(1.0,), max_flops_ratio=1.0)
    assert [row.affordable_experts for row in full.rows] == [1.0, 0.0]
    report = full.rows[1].report
    routed = report.flops_by_experts[-1] / full.rows[0].report.flops
    both = plan(backbone, num_experts=(2,), expert_widths=(1.0,), max_flops_ratio=routed)
    assert both.rows[0].affordable_experts == 2.0


def test_rows_are_what_a_built_model_costs(found: Plan) -> None:
    backbone = CifarResNet(CLASSES)
    model = RIDEWrapper(backbone, 4, expert_width=0.75)
    report = cost_report(model, router=ExpertRouter.for_model(model), backbone=backbone)
    assert found.rows[7].report == report


def test_the_best_choice_spends_most_of_the_budget(found: Plan) -> None:
    def chosen(row: PlanRow | None) -> tuple[int, float] | None:
        return None if row is None else (row.num_experts, row.expert_width)

    assert chosen(found.best) == (2, 0.75)  # 1.09 x
    assert chosen(found.best_routed) == (3, 0.5)  # 0.70 x
    looser = Plan(found.rows, 1.13)
    assert chosen(looser.best_routed) == (3, 0.75)  # the paper's setting, 1.12 x
    assert chosen(looser.best) == (2, 0.75)
    assert Plan(found.rows, 0.5).best is None
    assert Plan(found.rows, 0.5).best_routed is None


def test_the_table_marks_what_fits(found: Plan) -> None:
    lines = str(found).splitlines()
    assert len(lines) == 1 + 9 + 2
    assert lines.pop() == "FLOPs are those of a row of sizes [3, 32, 32]"
    row = next(line for line in lines if line.split()[:2] == ["3", "0.75"])
    assert row.split()[3:] == ["1.46", "1.12", "2.03"]
    assert "1.10" in lines[-1]
    fitting = [line for line in lines[1:-1] if "*" in line]
    assert [line.split()[:2] for line in fitting] == [
        ["2", "0.75"], ["2", "0.50"], ["3", "0.50"], ["4", "0.50"]
    ]  # fmt: skip


def test_shares_may_be_given_for_several_numbers() -> None:
    backbone = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    shares = {2: (0.5, 0.5), 3: torch.tensor(SHARES)}
    found = plan(backbone, num_experts=(3, 2), expert_widths=(1.0,), shares=shares, fork_at="2")
    assert [row.report.shares for row in found.rows] == [
        (0.5, 0.5), pytest.approx(SHARES)
    ]  # fmt: skip


def test_widths_that_are_not_possible_are_listed_with_the_reason() -> None:
    backbone = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    found = plan(backbone, num_experts=(2,), expert_widths=(0.5, 1.0), fork_at="2")
    assert [row.expert_width for row in found.rows] == [1.0]
    assert found.failed[0][0] == 0.5
    assert "width 0.50 is not possible: Cannot narrow" in str(found)


def test_widths_that_would_draw_frozen_layers_at_random_are_left_out() -> None:
    backbone = CifarResNet(10, n=1)
    backbone.layer2.requires_grad_(False)
    found = plan(backbone, num_experts=(2,), expert_widths=(1.0, 0.5), fork_at="layer2")
    assert [row.expert_width for row in found.rows] == [1.0]
    ((width, why),) = found.failed
    assert width == 0.5
    assert why.startswith("`layer2.0.conv1.weight`, ")
    assert "would be drawn at random and never learn" in why
    backbone.layer3[0].bn1.requires_grad_(False)  # ones and zeros, whatever the width
    behind = plan(backbone, num_experts=(2,), expert_widths=(1.0, 0.5), fork_at="layer3")
    assert [row.expert_width for row in behind.rows] == [1.0, 0.5]
    assert behind.failed == ()


def test_what_is_frozen_and_keeps_its_values_leaves_no_width_out() -> None:
    class WithPrior(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.hidden, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            prior = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
            self.prior = nn.Parameter(prior, requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.fc(self.hidden(self.stem(x).relu()).relu()) + self.prior
            return logits

    found = plan(WithPrior(), num_experts=(2,), expert_widths=(1.0, 0.5), fork_at="hidden")
    assert [row.expert_width for row in found.rows] == [1.0, 0.5]
    assert found.failed == ()


def test_backbone_and_random_state_stay_as_they_are() -> None:
    backbone = CifarResNet(10, n=1).train()
    kept = copy.deepcopy(backbone.state_dict())
    state = torch.random.get_rng_state()
    plan(backbone, num_experts=(2,), expert_widths=(0.75,))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(kept[name], tensor) for name, tensor in backbone.state_dict().items())
    assert all(module.training for module in backbone.modules())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_experts": ()}, ArgumentError, "num_experts"),
        ({"num_experts": (0, 2)}, ArgumentError, "`num_experts` to be an integer >= 1, but got 0"),
        ({"num_experts": 3}, ArgumentError, r"Pass `num_experts=\(3,\)` for a single one"),
        ({"num_experts": None}, ArgumentError, "`num_experts` to be a sequence"),
        ({"num_experts": "23"}, ArgumentError, "`num_experts` to be a sequence"),
        ({"num_experts": (True, 2)}, ArgumentError, "`num_experts` to be an integer"),
        ({"expert_widths": ()}, ArgumentError, "`expert_widths` to be a sequence of at least one"),
        ({"expert_widths": (1.5,)}, ArgumentError, "`expert_widths` to be a finite number > 0 and"),
        ({"expert_widths": 0.5}, ArgumentError, "`expert_widths` to be a sequence"),
        ({"max_flops_ratio": 0}, ArgumentError, "`max_flops_ratio` to be a finite number > 0"),
        ({"max_flops_ratio": "1"}, ArgumentError, "`max_flops_ratio` to be a finite number > 0"),
        ({"shares": (0.2, 0.2, 0.2, 0.2, 0.2)}, ArgumentError, "Add 5 to `num_experts`"),
        ({"shares": (0.2, 0.2)}, ArgumentError, "sum to 1"),
        ({"fork_at": "layer9"}, SplitError, "layer9"),
    ],
)
def test_misuse_is_named(options, error, message: str) -> None:
    with pytest.raises(error, match=message):
        plan(CifarResNet(10, n=1), **{"num_experts": (2,), "expert_widths": (1.0,), **options})


def test_where_the_logits_are_can_be_said() -> None:
    with pytest.raises(SplitError, match="logits="):
        plan(TwoMatrices(), num_experts=(2,), expert_widths=(1.0,), fork_at="body")
    found = plan(TwoMatrices(), num_experts=(2,), expert_widths=(1.0,), fork_at="body", logits=0)
    (row,) = found.rows
    model = RIDEWrapper(TwoMatrices(), 2, fork_at="body", logits=0)
    assert row.report.parameters == sum(p.numel() for p in model.parameters())


def test_frozen_parameters_are_shared_by_two_experts_and_the_own_of_one() -> None:
    def frozen() -> nn.Module:
        network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 5))
        network[2].requires_grad_(False)
        return network

    found = plan(frozen(), num_experts=(1, 2, 4), expert_widths=(1.0,), fork_at="2")
    for row in found.rows:
        built = cost_report(RIDEWrapper(frozen(), row.num_experts, fork_at="2"))
        for name in ("parameters", "expert_parameters", "shared_parameters"):
            assert getattr(row.report, name) == getattr(built, name)
        assert row.report.trainable_parameters == built.trainable_parameters
