"""A torch that cannot compile a wrapped model is named instead of failing somewhere inside."""

import pytest
import torch
from torch import nn

from ride_plugin import (
    ExpertRouter,
    RIDEWrapper,
    RoutingInference,
    VersionError,
    _compiler,
    expert_logits,
)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> RIDEWrapper:
    monkeypatch.setattr(_compiler, "COMPILES", False)
    monkeypatch.setattr(_compiler, "EXPORTS", False)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 5))
    return RIDEWrapper(backbone, 2, fork_at="2", example_input=torch.zeros(2, 6))


MESSAGE = r"needs torch 2\.\d+ or newer, but this is torch 2\."


@pytest.mark.parametrize("method", ["forward", "router_inputs", "run_trunk"])
def test_an_old_torch_does_not_compile_a_wrapped_model(model: RIDEWrapper, method: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(getattr(model, method), backend="eager")
    with pytest.raises(VersionError, match=MESSAGE):
        compiled(torch.zeros(2, 6))
    assert expert_logits(model(torch.zeros(2, 6))).shape == (2, 2, 5)  # nothing was left behind


def test_with_fullgraph_the_compiler_s_own_error_names_the_reason(model: RIDEWrapper) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="_needs_newer_torch"):
        compiled(torch.zeros(2, 6))


def test_an_old_torch_does_not_export(model: RIDEWrapper) -> None:
    with pytest.raises(VersionError, match=MESSAGE):
        torch.export.export(model, (torch.zeros(2, 6),), strict=False)
    with pytest.raises(VersionError, match=f"`export_stages` {MESSAGE}"):
        RoutingInference(model, ExpertRouter.for_model(model)).export_stages()
