"""Early exit without this library's Python: trunk, experts and gates exported one by one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument

from ride_plugin._compiler import as_exported, check_exports
from ride_plugin._contexts import evaluating
from ride_plugin._errors import ArgumentError, RIDEError
from ride_plugin._inputs import Inputs, as_inputs, in_order_of, resize_batch, taken_by_model
from ride_plugin._numerics import without_autocast
from ride_plugin._split import Rows, TrunkState, form_of, hollow, plain_in
from ride_plugin._tree import map_tensors, tensors_in
from ride_plugin._wrapper import RIDEWrapper
from ride_plugin.routing._call import describe_call, keep_call
from ride_plugin.routing._exit import RoutedStages, exceeds, gate_logits
from ride_plugin.routing._own import own_weights_of_program


def export_stages(routed: RoutedStages, example_input: Any = None) -> dict[str, ExportedProgram]:
    """See `RoutingInference.export_stages`."""
    check_exports()
    # What adapters put around a wrapped model answers with the methods of the model inside.
    model = getattr(routed.model.run_trunk, "__self__", routed.model)
    if not isinstance(model, RIDEWrapper):
        raise ArgumentError(
            f"Expected the served model to be a RIDEWrapper, but got {type(model).__name__}. "
            "Export the parts of a model that was split by hand yourself."
        )
    example = model.example_input() if example_input is None else as_inputs(example_input)
    inputs = resize_batch((example[0], in_order_of(model.example_input()[1], example[1])), 2)
    stages: dict[str, ExportedProgram] = {}
    # Autocast around the export would become part of some stages, and be refused by others.
    plain = without_autocast(next(tensors_in(inputs)))
    with model.evaluating(), torch.no_grad(), plain, as_exported():
        with taken_by_model(example_input):
            state = model.run_trunk(*inputs[0], **inputs[1])
        if state.layout is None:
            raise ArgumentError(
                "Expected argument `example_input` to follow a path that the model knows, but it "
                "does not. Wrap the backbone with `example_input=` of this kind."
            )
        given, batch = tuple(tensors_in(inputs)), Dim("batch", min=1)
        shapes = tuple({s.dim: s.per_sample * batch} if s else {} for s in state.layout.rows[0])
        trunk = _Trunk(model, inputs, state)
        # Stopping at the fork unwinds the backbone's forward, which only the strict tracer follows.
        stages["trunk"] = _export("trunk", trunk, given, (shapes,), strict=True)
        keep_call(stages["trunk"], describe_call(model.trunk.forward, inputs))
        crossing = trunk(*given)
        if len(stages["trunk"].graph_signature.user_outputs) != len(crossing):
            raise ArgumentError(
                "Expected the backbone's forward to go one way whether torch.export follows it or "
                "not, but another path is taken there: it asks whether it is compiled, say. Serve "
                "the model with RoutingInference, which needs no export, or export a module whose "
                "forward returns `serve.dense(x)`."
            )
        _check_numbers(_Numbers(model, inputs, state), state, given, shapes)
        for index in range(model.num_experts):
            expert = _Expert(model, index, state)
            name, rows = f"expert_{index}", (({0: batch},) * len(crossing),)
            model.run_expert(index, state)  # raises where it reads what the trunk has dropped
            stages[name] = _export(name, expert, crossing, rows)
            if index + 1 < model.num_experts:
                name, gate = f"gate_{index}", _Gate(routed, index)
                stages[name] = _export(name, gate, expert(*crossing), ({0: batch}, {0: batch}))
    return stages


class _Trunk(nn.Module):
    """The shared part as a function of tensors: inputs to what crosses the cut, rows first."""

    def __init__(self, model: RIDEWrapper, inputs: Inputs, state: TrunkState) -> None:
        super().__init__()
        self.trunk = model.trunk
        self.model = [model]  # not registered: the program holds the trunk's parameters only
        self.inputs = [inputs]
        # The tracer has other names for operators (`getitem`, `sub`) than those that torch calls.
        modules = {name for name, _ in model.trunk.named_modules()}
        self.units = [(step, key) for step, key in enumerate(state.keys) if key in modules]
        self.forms = list(map(form_of, state.values[1:]))
        self.infos = _crossing(state)

    def run(self, tensors: Sequence[Tensor]) -> TrunkState:
        given = iter(tensors)
        args, kwargs = map_tensors(lambda _: next(given), self.inputs[0])
        return self.model[0].run_trunk(*args, **kwargs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        state = self.run(tensors)
        same = list(map(form_of, state.values[1:])) == self.forms
        if not same or any(state.keys[step] != key for step, key in self.units):
            return ()  # seen afterwards: out of the strict tracer no exception comes as it is
        found = zip(_flat(state.values), self.infos, strict=True)
        return tuple(
            _rows_first(value, spec, state.batch_size) for value, (spec, live) in found if live
        )


class _Numbers(_Trunk):
    """The numbers beside the tensors that modules of the trunk return."""

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        return tuple(number for _, number in _numbers(self.run(tensors)))


class _Expert(nn.Module):
    """One expert as a function of what crosses the cut."""

    def __init__(self, model: RIDEWrapper, index: int, state: TrunkState) -> None:
        super().__init__()
        self.expert = model.experts[index]
        self.model = [model]  # not registered: the program holds this expert's parameters only
        self.index = index
        self.state = [state]
        self.infos = _crossing(state)

    def forward(self, *crossing: Tensor) -> tuple[Tensor, Tensor]:
        state, given, infos = self.state[0], iter(crossing), iter(self.infos)
        batch_size = crossing[0].shape[0]

        def rebuilt(old: Tensor) -> Tensor:
            spec, live = next(infos)
            if live:
                return _rows_back(next(given), spec)
            shape = list(old.shape)
            if spec is not None:
                shape[spec.dim] = batch_size * spec.per_sample
            return hollow(crossing[0].new_empty((), dtype=old.dtype).expand(shape))

        values = [map_tensors(rebuilt, value) for value in state.values]
        state = replace(state, batch_size=batch_size, values=values, hollow=False)
        return self.model[0].run_expert(self.index, state)


class _Gate(nn.Module):
    """One gate with its threshold: which rows need one more expert."""

    def __init__(self, routed: RoutedStages, index: int) -> None:
        super().__init__()
        self.router = routed.router
        self.index = index
        self.register_buffer("limit", routed.threshold_logits[index].clone())

    def forward(self, mean_logits: Tensor, features: Tensor) -> Tensor:
        gate = gate_logits(self.router, self.index, mean_logits, features)
        return exceeds(gate, cast("Tensor", self.limit))


def _check_numbers(module: _Numbers, state: TrunkState, given: Any, shapes: Any) -> None:
    """Refuse numbers that follow values or the number of rows: a stage would keep the example's."""
    numbers = list(_numbers(state))
    if not numbers:
        return
    program = _export("trunk", module, given, (shapes,), strict=True)
    for (key, number), spec in zip(numbers, program.graph_signature.output_specs, strict=True):
        if not isinstance(spec.arg, ConstantArgument):
            raise ArgumentError(
                "Expected numbers that a module of the trunk returns to follow from sizes of the "
                f"exported inputs alone, but `{key}` returns {number}, which it reads from a "
                "tensor or which follows the number of rows, so that exported stages would keep "
                "it at every call. Return a tensor in its place, with one entry for each row; ask "
                "for the number of rows where it is used (`x.shape[0]`); or serve the model with "
                "RoutingInference, which needs no export."
            )


def _numbers(state: TrunkState) -> Iterator[tuple[str, Any]]:
    """The numbers on the tape, by what returned them; those of the inputs belong to the call."""
    for key, value in zip(state.keys[1:], state.values[1:], strict=True):
        for item in plain_in(value):
            if isinstance(item, bool | int | float):
                yield key, item


def _crossing(state: TrunkState) -> list[tuple[Rows | None, bool]]:
    layout = state.layout
    assert layout is not None
    pairs = zip(layout.rows, layout.live, strict=True)
    return [info for rows, live in pairs for info in zip(rows, live, strict=True)]


def _flat(values: Sequence[Any]) -> list[Tensor]:
    return [tensor for value in values for tensor in tensors_in(value)]


def _rows_first(value: Tensor, spec: Rows | None, batch_size: int) -> Tensor:
    """Bring the rows to the front; what is the same for all rows is handed to each."""
    if spec is None:
        return value.expand(batch_size, *value.shape)
    value = value.movedim(spec.dim, 0)
    return value if spec.per_sample == 1 else value.reshape(-1, spec.per_sample, *value.shape[1:])


def _rows_back(value: Tensor, spec: Rows | None) -> Tensor:
    if spec is None:
        return value[0]
    if spec.per_sample > 1:
        value = value.flatten(0, 1)
    return value.movedim(0, spec.dim)


def _export(
    name: str, module: nn.Module, inputs: tuple[Tensor, ...], shapes: Any, strict: bool = False
) -> ExportedProgram:
    """Export a stage for any number of rows, by the strict tracer alone if ``strict``.

    The other tracer is tried first elsewhere: it follows more Python, but takes ``len(x)`` for a
    constant, which the strict one does not.
    """
    refused: Exception | None = None
    for tracer in (True,) if strict else (False, True):
        try:
            # The router is no part of the model, which is in evaluation mode already.
            with evaluating(module), warnings.catch_warnings():
                # What the wrapper notes while it runs is undone by the end of the pass.
                warnings.filterwarnings(
                    "ignore", message=".*certain side effects", category=UserWarning
                )
                program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=tracer)
            own_weights_of_program(program)
            return program
        except RIDEError:
            raise
        except Exception as error:  # each obstacle in a forward has a class of its own in torch
            refused = refused or error
    reason = str(refused) or type(refused).__name__
    if reason.startswith("Observed exception"):  # which the forward has raised, says its cause
        reason = str(refused.__cause__) if refused else reason
    reason = reason.splitlines()[0].rstrip(".!")
    raise ArgumentError(
        "Expected every stage to be exportable for any number of rows, but torch.export refuses "
        f"`{name}`: {reason}. Take the number of rows from `x.shape[0]`, without `int()`, "
        "`range()` or a loop over the rows, or serve the model with RoutingInference, which needs "
        "no export."
    ) from refused
