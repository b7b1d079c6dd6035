"""A full set of stages is told from one in which a file is missing, whichever it is."""

import pytest
import torch
from torch import nn

from ride_plugin import ArgumentError
from ride_plugin.routing import StagedRunner

NAMES = ["trunk", "expert_0", "gate_0", "expert_1", "gate_1", "expert_2"]


def stages(names: list[str]) -> dict[str, nn.Module]:
    return {name: nn.Identity() for name in names}


@pytest.mark.parametrize("lost", NAMES)
def test_a_lost_stage_is_named(lost: str) -> None:
    with pytest.raises(ArgumentError, match=rf"`stages`.*\['{lost}'\] are missing. Load the files"):
        StagedRunner(stages([name for name in NAMES if name != lost]))


@pytest.mark.parametrize("other", ["gate_2", "expert_02", "router", "expert_", 3])
def test_an_unknown_stage_is_named(other: str) -> None:
    with pytest.raises(ArgumentError, match=rf"missing|\['{other}'\] are unknown"):
        StagedRunner(stages([*NAMES, other]))


def test_a_full_set_in_any_order_is_taken() -> None:
    assert StagedRunner(stages(NAMES[::-1])).num_experts == 3


@pytest.mark.parametrize("bad", [None, [nn.Identity()], "stages.pt2", torch.zeros(2)])
def test_what_is_no_mapping_is_refused(bad: object) -> None:
    with pytest.raises(ArgumentError, match=r"`stages` to be a dict of stages by name"):
        StagedRunner(bad)  # type: ignore[arg-type]
