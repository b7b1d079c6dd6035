"""Where expert logits travel, and what happens when they are gone."""

from __future__ import annotations

import pytest
import torch

from ride_plugin import ArgumentError, ExpertOutput, MissingExpertLogitsError, expert_logits
from ride_plugin._output import attach_expert_logits
from ride_plugin.routing import RouterInputs


def test_every_form_gives_the_expert_logits() -> None:
    experts, features = torch.randn(2, 3, 5), torch.randn(2, 3, 8)
    mean = experts.mean(1)
    forms = [
        experts,
        attach_expert_logits(mean.clone(), experts),
        ExpertOutput(mean, experts),
        (mean, experts),
        RouterInputs(experts, features),
    ]
    for form in forms:
        assert expert_logits(form) is experts


def test_bare_logits_name_the_likely_causes_and_the_remedy() -> None:
    message = r"\[4, 5\].*cast.*DistributedDataParallel.*RoutingInference.*return_experts = True"
    with pytest.raises(MissingExpertLogitsError, match=message):
        expert_logits(torch.randn(4, 5))


@pytest.mark.parametrize("output", [torch.zeros(3), torch.zeros(2, 3, 4).long(), "x", (1, 2), None])
def test_anything_else_is_refused(output: object) -> None:
    with pytest.raises(ArgumentError, match="`output`"):
        expert_logits(output)
