"""Whose parameters are, as a printed model tells it, against counting by hand."""

from __future__ import annotations

import pytest
from torch import nn

from ride_plugin import RIDEWrapper, cost_report
from tests.backbones import plain_convnet


def sizes_of(model: RIDEWrapper) -> tuple[int, int, list[int]]:
    """The trunk's, those in every expert, and each expert's own."""
    each = [{id(p): p.numel() for p in expert.parameters()} for expert in model.experts]
    of_trunk = {id(p): p.numel() for p in model.trunk.parameters()}
    common = set.intersection(*map(set, each)) if len(each) > 1 else set()
    own = [sum(n for key, n in one.items() if key not in common) for one in each]
    return sum(of_trunk.values()), sum(each[0][key] for key in common), own


def test_a_printed_model_says_what_is_shared_forked_narrowed_and_what_it_costs() -> None:
    model = RIDEWrapper(plain_convnet(), 3, expert_width=0.5)
    head, shared, forked, narrowed, cost = str(model).splitlines()
    trunk, _, (expert, *_) = sizes_of(model)
    assert f"fork_at={model.fork_at!r}" in head
    assert shared.endswith(f"; {trunk:,} parameters")
    assert forked.endswith(f"; {expert:,} parameters for each expert")
    assert narrowed == "  narrowed: expert_width=0.5"
    assert f"{trunk + 3 * expert:,} parameters" in cost
    assert f"{(trunk + 3 * expert) / (trunk + expert):.2f} x those" in cost


def made(width: int) -> nn.Sequential:
    late = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 16))
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), late, nn.ReLU(), nn.Linear(16, 5))


def test_of_experts_of_several_sizes_the_smallest_and_the_largest_are_told() -> None:
    model = RIDEWrapper(made(16), 3, fork_at="2", expert_factory=lambda k: made(100 * (3 - k)))
    trunk, _, own = sizes_of(model)
    total = trunk + sum(own)
    _, shared, forked, cost = str(model).splitlines()
    assert shared.endswith(f"; {trunk:,} parameters")
    assert forked.endswith(f"; {own[2]:,} to {own[0]:,} parameters for each expert")
    low, high = total / (trunk + own[0]), total / (trunk + own[2])
    assert f"cost: {total:,} parameters, {low:.2f} to {high:.2f} x those" in cost


@pytest.mark.parametrize("num_experts", [1, 3])
def test_what_experts_share_is_counted_once_and_told(num_experts: int) -> None:
    backbone = plain_convnet().requires_grad_(False)
    classifier = [m for m in backbone.modules() if isinstance(m, nn.Linear)][-1]
    classifier.requires_grad_(True)
    model = RIDEWrapper(backbone, num_experts, init="copy")
    trunk, common, own = sizes_of(model)
    total = trunk + common + sum(own)
    _, shared, forked, cost = str(model).splitlines()
    assert shared.endswith(f"; {trunk:,} parameters")
    told = f", and {common:,} that experts share" if num_experts > 1 else ""
    assert forked.endswith(f"; {own[0]:,} parameters for each expert{told}")
    assert f"cost: {total:,} parameters, {total / (trunk + common + own[0]):.2f} x those" in cost
    report = cost_report(model)
    assert (report.trunk_parameters, report.shared_parameters) == (trunk, common)
    assert list(report.expert_parameters) == own
