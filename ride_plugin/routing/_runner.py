"""Runs exported stages with early exit; needs nothing of the model but its programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.export import ExportedProgram

from ride_plugin._errors import ArgumentError
from ride_plugin._split import Rows, take_rows
from ride_plugin._tree import tensors_in
from ride_plugin.routing._exit import RoutingOutput

_FIRST_DIM = Rows(0, 1)


class StagedRunner:
    """Runs exported stages with early exit; equal to `RoutingInference` row by row.

    Needs nothing of the model but its programs, so it is also the pattern for a runner in another
    language.

    Args:
        stages: what `export_stages` returned, or the same programs loaded from files. In place of
            a program, any function that takes and returns the same tensors, for example a session
            of another runtime; several results as a tuple or a list.

    Raises:
        ArgumentError: a stage is missing, or is neither a program nor a function.
    """

    def __init__(self, stages: Mapping[str, ExportedProgram | Callable[..., Any]]) -> None:
        self.num_experts = sum(name.startswith("expert_") for name in stages)
        experts = [f"expert_{index}" for index in range(self.num_experts)]
        gates = [f"gate_{index}" for index in range(self.num_experts - 1)]
        missing = {"trunk", "expert_0", *experts, *gates} - stages.keys()
        if missing:
            raise ArgumentError(
                f"Expected argument `stages` to hold all that `export_stages` returned, but "
                f"{sorted(missing)} are missing."
            )
        self._trunk = _function("trunk", stages)
        self._experts = [_function(name, stages) for name in experts]
        self._gates = [_function(name, stages) for name in gates]

    @torch.no_grad()
    def __call__(self, *args: Any, return_routing: bool = False, **kwargs: Any) -> Any:
        """Run the stages on a batch; arguments and return as for `RoutingInference`."""
        crossing = list(tensors_in(self._trunk(*tensors_in((args, kwargs)))))
        total, features = self._experts[0](*crossing)
        logits = mean = total
        rows = torch.arange(len(total), device=total.device)
        used = torch.ones_like(rows)
        for index, (gate, expert) in enumerate(
            zip(self._gates, self._experts[1:], strict=True), start=2
        ):
            (goes,) = tensors_in(gate(mean, features))
            stay = goes.nonzero().squeeze(1)
            if len(stay) == 0:
                break
            if len(stay) < len(total):
                rows, total = rows.index_select(0, stay), total.index_select(0, stay)
                crossing = [take_rows(value, _FIRST_DIM, stay) for value in crossing]
            more, features = expert(*crossing)
            total = total + more
            mean = total / index
            logits = logits.index_copy(0, rows, mean)
            used.index_fill_(0, rows, index)
        return RoutingOutput(logits, used) if return_routing else logits


def _function(name: str, stages: Mapping[str, Any]) -> Callable[..., Any]:
    stage = stages[name]
    if isinstance(stage, ExportedProgram):
        return stage.module()
    if callable(stage):
        return cast("Callable[..., Any]", stage)
    raise ArgumentError(
        f"Expected `stages[{name!r}]` to be an ExportedProgram or a function of tensors, but got "
        f"{type(stage).__name__}."
    )
