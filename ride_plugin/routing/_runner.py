"""Runs exported stages with early exit; needs nothing of the model but its programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ride_plugin._numerics import without_autocast
from ride_plugin._split import Rows, take_rows
from ride_plugin._tree import tensors_in
from ride_plugin.routing._call import call_of, tensors_of_call
from ride_plugin.routing._exit import RoutingOutput, walk
from ride_plugin.routing._stage_inputs import check_inputs, inputs_of_program
from ride_plugin.routing._stages import check_stages, count_experts

_MADE_BY = "`serve.export_stages()`, `fuse_stages` or `quantize_stages`"
_FIRST_DIM = Rows(0, 1)


@dataclass(frozen=True)
class Crossing:
    """What crosses the cut, rows in the first dimension."""

    tensors: tuple[Tensor, ...]

    @property
    def batch_size(self) -> int:
        return len(self.tensors[0])

    def select(self, rows: Tensor) -> Crossing:
        return Crossing(
            tuple(take_rows(value, _FIRST_DIM, rows, self.batch_size) for value in self.tensors)
        )


class StagedRunner:
    """Runs exported stages with early exit; equal to `RoutingInference` row by row.

    Needs nothing of the model but its programs, so it is also the pattern for a runner in another
    language. Autocast reaches neither programs nor fused stages: they run in the precision of the
    export.

    Args:
        stages: what `export_stages` returned, or the same programs loaded from files. In place of
            a program, any function that takes and returns the same tensors, for example a session
            of another runtime; several results as a tuple or a list. Programs and fused stages
            know the names of the model's arguments; for any other function as the trunk the
            tensors of a call are taken in the order in which they come.

    Raises:
        ArgumentError: a stage is missing, has an unknown name, or is neither a program nor a
            function.
    """

    def __init__(self, stages: Mapping[str, ExportedProgram | Callable[..., Any]]) -> None:
        kinds = (ExportedProgram, Callable)
        check_stages(stages, kinds, "an ExportedProgram or a function of tensors", _MADE_BY)
        self.num_experts = count_experts(stages)
        functions = {name: _function(stage) for name, stage in stages.items()}
        self._trunk, self._call = functions["trunk"], call_of(stages["trunk"])
        self._experts = [functions[f"expert_{index}"] for index in range(self.num_experts)]
        self._gates = [functions[f"gate_{index}"] for index in range(self.num_experts - 1)]

    @overload
    def __call__(
        self, *args: Any, return_routing: Literal[False] = False, **kwargs: Any
    ) -> Tensor: ...

    @overload
    def __call__(
        self, *args: Any, return_routing: Literal[True], **kwargs: Any
    ) -> RoutingOutput: ...

    @overload
    def __call__(
        self, *args: Any, return_routing: bool = False, **kwargs: Any
    ) -> Tensor | RoutingOutput: ...

    @torch.no_grad()
    def __call__(
        self, *args: Any, return_routing: bool = False, **kwargs: Any
    ) -> Tensor | RoutingOutput:
        """Run the stages on a batch; arguments and return as for `RoutingInference`.

        Raises:
            ArgumentError: names of arguments, values beside the tensors, or sizes and dtypes of
                tensors are not those of the export.
        """
        output = walk(self, *args, **kwargs)
        return output if return_routing else output.logits

    def start(self, *args: Any, **kwargs: Any) -> tuple[Crossing, Tensor, Tensor]:
        """Run trunk and expert 0."""
        crossing = tuple(tensors_in(self._trunk(*tensors_of_call(self._call, (args, kwargs)))))
        state = Crossing(crossing)
        return (state, *self.run_expert(0, state))

    def run_expert(self, index: int, state: Crossing) -> tuple[Tensor, Tensor]:
        """Run one expert."""
        logits, features = self._experts[index](*state.tensors)
        return logits, features

    def goes_on(self, index: int, mean_logits: Tensor, features: Tensor) -> Tensor:
        """Whether each row needs one more expert after expert ``index``."""
        (verdict,) = tensors_in(self._gates[index](mean_logits, features))
        return verdict


class _Program:
    """A program that refuses other inputs than the exported ones, and that no autocast reaches."""

    def __init__(self, program: ExportedProgram) -> None:
        self.module = program.module()
        self.dtypes, self.sizes = inputs_of_program(program)

    def __call__(self, *tensors: Tensor) -> Any:
        check_inputs(tensors, self.dtypes, self.sizes)
        with without_autocast(tensors[0]):
            return self.module(*tensors)


def _function(stage: ExportedProgram | Callable[..., Any]) -> Callable[..., Any]:
    return _Program(stage) if isinstance(stage, ExportedProgram) else stage
