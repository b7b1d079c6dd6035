"""Exported stages are called as the model is: by name, by position, and with its own values."""

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ArgumentError, ConfidenceRouter, RIDEWrapper, RoutingInference
from ride_plugin.routing import StagedRunner, fuse_stages, quantize_stages
from ride_plugin.routing._call import describe_call, tensors_of_call

A, B, C = (torch.full((2,), float(value)) for value in range(3))


@dataclass
class Batch:
    x: Tensor
    mask: Tensor
    scale: float = 1.0


def plain(x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> None: ...
def prompted(x: Tensor, prompt: Tensor = A) -> None: ...
def anything(*args: object, **kwargs: object) -> None: ...


@pytest.mark.parametrize(
    ("forward", "example", "call", "expected"),
    [
        (plain, ((A,), {}), ((B,), {}), [B]),
        (plain, ((A,), {}), ((), {"x": B, "mask": None, "scale": 1}), [B]),
        (plain, ((A, A), {}), ((), {"mask": C, "x": B}), [B, C]),
        (plain, ((), {"mask": A, "x": A}), ((B, C), {}), [C, B]),
        (plain, ((A,), {"scale": 3.0}), ((B,), {"scale": 3.0}), [B]),
        (plain, ((), {"x": {"m": A, "n": A}}), (({"n": B, "m": C},), {}), [C, B]),
        (plain, (([A, {"m": A, "n": A}],), {}), (((B, {"n": A, "m": C}),), {}), [B, C, A]),
        (plain, ((Batch(A, A),), {}), ((Batch(B, C),), {}), [B, C]),
        (plain, ((A,), {"scale": float("inf")}), ((B,), {"scale": float("inf")}), [B]),
        (anything, ((A, A), {"m": A, "n": A}), ((A, B), {"n": A, "m": C}), [A, B, C, A]),
        (anything, ((A, 10**400, object()), {}), ((B, 10**400, object()), {}), [B]),
        (print, ((A, A), {}), ((B, C), {}), [B, C]),
    ],
)
def test_tensors_come_in_the_order_of_the_example(
    forward: Callable[..., None], example: Any, call: Any, expected: list[Tensor]
) -> None:
    found = tensors_of_call(describe_call(forward, example), call)
    assert len(found) == len(expected)
    assert all(got is wanted for got, wanted in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("forward", "example", "call"),
    [
        (plain, ((A,), {}), ((A, B), {})),
        (plain, ((A, B), {}), ((A,), {})),
        (plain, ((A,), {}), ((A,), {"scale": 3.0})),
        (plain, ((A,), {"scale": 3.0}), ((A,), {})),
        (plain, ((A,), {}), ((A,), {"x": A})),
        (plain, ((A,), {}), ((A,), {"other": A})),
        (plain, ((A,), {}), ((), {})),
        (plain, ((A,), {"scale": "a"}), ((A,), {"scale": "b"})),
        (plain, (({"m": A},), {}), (({"n": A},), {})),
        (plain, (([A, A],), {}), (([A],), {})),
        (plain, ((Batch(A, A),), {}), ((Batch(A, A, 2.0),), {})),
        (anything, ((A,), {}), ((A, 3), {})),
        (prompted, ((A,), {}), ((A, B), {})),
        (prompted, ((A, B), {}), ((A,), {})),
    ],
)
def test_other_names_and_values_are_refused(
    forward: Callable[..., None], example: Any, call: Any
) -> None:
    with pytest.raises(ArgumentError, match=r"call as the exported one.*`example_input`"):
        tensors_of_call(describe_call(forward, example), call)


def test_where_nothing_is_known_tensors_come_as_they_are() -> None:
    found = tensors_of_call(None, ((A, 3), {"n": {"m": B}}))
    assert len(found) == 2
    assert found[0] is A
    assert found[1] is B


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
        x = (self.early(x) + mask.mean((1, 2, 3), keepdim=True)).relu() * scale
        return self.head(self.late(x).relu().mean((2, 3)))


@pytest.mark.exports
def test_programs_files_fused_and_eight_bit_stages_are_called_as_the_model_is() -> None:
    torch.manual_seed(0)
    example = {"x": torch.randn(2, 3, 8, 8), "mask": torch.randn(2, 3, 8, 8)}
    model = RIDEWrapper(TwoInputs(), 2, fork_at="late", example_input=example)
    serve = RoutingInference(model, ConfidenceRouter(), 0.0)
    programs = serve.export_stages()
    loaded = {}
    for name, program in programs.items():
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        loaded[name] = torch.export.load(buffer)
    fused = fuse_stages(loaded)
    x, mask = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    expected = serve(x, mask)
    quantized = quantize_stages(fused, [{"mask": mask, "x": x}])
    first, *_ = (m for m in quantized["expert_0"].modules() if hasattr(m, "zero_point"))
    same, *_ = (
        m
        for m in quantize_stages(fused, [[x, mask]])["expert_0"].modules()
        if hasattr(m, "zero_point")
    )
    assert (first.scale, first.zero_point) == (same.scale, same.zero_point)
    for stages in (programs, loaded, fused, copy.deepcopy(fused), quantized):
        runner = StagedRunner(stages)
        error = 0.05 if stages is quantized else 1e-5
        for call in (
            lambda run: run(mask=mask, x=x),
            lambda run: run(x, mask=mask),
            lambda run: run(x, mask, 1.0),
        ):
            torch.testing.assert_close(call(runner), expected, rtol=0, atol=error)
        with pytest.raises(ArgumentError, match=r"got x: tensor, mask: tensor, scale: 3\.0"):
            runner(x, mask, scale=3.0)
    with pytest.raises(ArgumentError, match=r"`batches`.*scale: 3\.0"):
        quantize_stages(fused, [{"mask": mask, "x": x, "scale": 3.0}])
