"""What a wrapped model costs: parameters and FLOPs of trunk, experts and router."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ride_plugin._checks import Numbers, as_cpu_tensor, check_instance, refuse, way_inside
from ride_plugin._compiler import uncompiled
from ride_plugin._contexts import evaluating_any
from ride_plugin._errors import ArgumentError, RIDEError
from ride_plugin._flops import counted
from ride_plugin._inputs import (
    as_inputs,
    at_least_one_row,
    batch_size_of,
    row_sizes,
    taken_by_model,
)
from ride_plugin._output import RouterInputs
from ride_plugin._parameters import parameters_by_owner
from ride_plugin._tree import map_tensors


@dataclass(frozen=True)
class CostReport:
    """Parameters, and FLOPs for one row; ``print`` shows a table. See `cost_report`.

    Attributes:
        trunk_parameters: of the shared part.
        expert_parameters: of each expert, its own.
        router_parameters: of all gates together; 0 without a router.
        trunk_flops: of the shared part.
        expert_flops: of each expert.
        gate_flops: of each gate; zeros without a router.
        shares: share of rows that used 1, 2, ... E experts, or None.
        backbone_parameters: of the plain backbone, or None.
        backbone_flops: of the plain backbone, or None.
        shared_parameters: behind the fork, held once for all experts because they are frozen.
        trainable_parameters: of trunk and experts, those that require gradients.
        input_sizes: those of the row that was counted, of each tensor of the input.
    """

    trunk_parameters: int
    expert_parameters: tuple[int, ...]
    router_parameters: int
    trunk_flops: int
    expert_flops: tuple[int, ...]
    gate_flops: tuple[int, ...]
    shares: tuple[float, ...] | None = None
    backbone_parameters: int | None = None
    backbone_flops: int | None = None
    shared_parameters: int = 0
    trainable_parameters: int = 0
    input_sizes: tuple[tuple[int, ...], ...] = ()

    @property
    def parameters(self) -> int:
        """Of trunk and experts, without the router."""
        return self.trunk_parameters + self.shared_parameters + sum(self.expert_parameters)

    @property
    def flops(self) -> int:
        """FLOPs of a row that every expert sees, without the router."""
        return self.trunk_flops + sum(self.expert_flops)

    @property
    def flops_by_experts(self) -> tuple[int, ...]:
        """FLOPs of a routed row that uses 1, 2, ... E experts, with the gates it passes."""
        gates = (*self.gate_flops, 0)
        total, totals = self.trunk_flops, []
        for expert, gate in zip(self.expert_flops, gates, strict=True):
            total += expert + gate
            totals.append(total)
        return tuple(totals)

    @property
    def routed_flops(self) -> float | None:
        """Expected FLOPs of a row at ``shares``, or None without shares."""
        if self.shares is None:
            return None
        pairs = zip(self.shares, self.flops_by_experts, strict=True)
        return sum(share * flops for share, flops in pairs)

    def __str__(self) -> str:
        rows: list[tuple[str, int | None, float | None]] = [
            ("trunk", self.trunk_parameters, self.trunk_flops)
        ]
        if self.shared_parameters:
            rows.append(("shared by experts", self.shared_parameters, None))
        experts = zip(self.expert_parameters, self.expert_flops, strict=True)
        rows += [
            (f"expert {i}", parameters, flops) for i, (parameters, flops) in enumerate(experts)
        ]
        if self.router_parameters:
            rows.append(("router", self.router_parameters, sum(self.gate_flops)))
        rows.append(("all experts", self.parameters, self.flops))
        if self.trainable_parameters < self.parameters:
            rows.append(("of them trainable", self.trainable_parameters, None))
        if self.shares is not None:
            shown = ", ".join(f"{share:.2f}" for share in self.shares)
            rows.append((f"routed ({shown})", None, self.routed_flops))
        if self.backbone_flops is not None:
            rows.append(("plain backbone", self.backbone_parameters, self.backbone_flops))
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{'':{width}}  {'parameters':>12}  {'MFLOPs':>10}"]
        if self.backbone_flops:
            lines[0] += f"  {'x backbone':>10}"
        for name, parameters, flops in rows:
            count = "" if parameters is None else f"{parameters:,}"
            line = f"{name:{width}}  {count:>12}"
            if flops is not None:
                line += f"  {flops / 1e6:>10.3f}"
                if self.backbone_flops:
                    line += f"  {flops / self.backbone_flops:>10.2f}"
            lines.append(line)
        return "\n".join([*lines, *counted_for(self)])


def counted_for(report: CostReport) -> list[str]:
    """The line that tells for which sizes the FLOPs hold; none where no sizes are known."""
    sizes = ", ".join(str(list(sizes)) for sizes in report.input_sizes)
    return [f"FLOPs are those of a row of sizes {sizes}"] if sizes else []


class CountableModel(Protocol):
    """What is asked of a model to be counted: a ``RIDEWrapper`` has it all."""

    @property
    def num_experts(self) -> int:
        """``E``."""

    def run_trunk(self, *args: Any, **kwargs: Any) -> Any:
        """Run the shared part."""

    def run_expert(self, index: int, state: Any) -> tuple[Tensor, Tensor]:
        """Run one expert on what the trunk returned."""

    def router_inputs(self, *args: Any, **kwargs: Any) -> RouterInputs:
        """All experts' logits and features, in evaluation mode and without gradients."""

    def evaluating(self) -> AbstractContextManager[Any]:
        """Evaluation mode for the duration of a block."""

    def example_input(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Inputs ``(args, kwargs)`` that the model accepts."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter once."""

    def named_parameters(
        self, *, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The same by name; those of expert k start with ``experts.k.``."""


def cost_report(
    model: CountableModel,
    *,
    example_input: Any = None,
    router: nn.Module | None = None,
    shares: Sequence[float] | None = None,
    backbone: nn.Module | None = None,
) -> CostReport:
    """Count what trunk, experts and router cost, and what a routed row is expected to cost.

    FLOPs are those of matrix products, convolutions, attention and recurrent layers, 2 for each
    multiply-add; what else a model does (BatchNorm, activations, pooling, top-k) is not counted.
    An operation of another library whose name tells a product counts as nothing, and is named in a
    warning, once; ``torch.utils.flop_counter.register_flop_formula`` tells how many it takes.
    Nothing is trained or changed, and BatchNorm statistics stay as they are.

    Args:
        model: a ``RIDEWrapper``; one from ``torch.compile`` is counted as it was before.
        example_input: a batch (a tensor, a tuple of arguments, a dict of keyword arguments); by
            default ``model.example_input()``, which is guessed where the model was wrapped without
            one; the report names its sizes. FLOPs are divided by the number of rows of the logits,
            whichever argument has as many.
        router: counted as well if given.
        shares: E numbers, share of rows that used 1, 2, ... E experts; they sum to one.
        backbone: the plain network to compare with.

    Raises:
        ArgumentError: ``shares`` are not E numbers that sum to one, ``model`` is not split,
            ``router`` does not fit it, or model or backbone do not run on the inputs.

    Example:
        >>> from ride_plugin import RIDEWrapper
        >>> backbone = nn.Sequential(
        ...     nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
        ... )
        >>> model = RIDEWrapper(backbone, num_experts=2, fork_at="2")
        >>> print(cost_report(model, backbone=backbone, shares=(0.5, 0.5)))
                               parameters      MFLOPs  x backbone
        trunk                     200,960       0.401        0.85
        expert 0                   34,186       0.068        0.15
        expert 1                   34,186       0.068        0.15
        all experts               269,332       0.538        1.15
        routed (0.50, 0.50)                     0.504        1.07
        plain backbone            235,146       0.470        1.00
        FLOPs are those of a row of sizes [784]
    """
    model = uncompiled(model)
    missing = [name for name in ("run_trunk", "run_expert", "experts") if not hasattr(model, name)]
    if missing:
        raise ArgumentError(
            f"Expected argument `model` to be a RIDEWrapper, but got {type(model).__name__} "
            f"without {missing}. Count a plain module with `count_flops`."
        )
    if router is not None:
        check_router(router, model)
    if backbone is not None:
        check_instance(backbone, "backbone", nn.Module, "a torch.nn.Module")
    checked = None if shares is None else check_shares(shares, model.num_experts)
    args, kwargs = model.example_input() if example_input is None else as_inputs(example_input)
    batch_size_of((args, kwargs), "argument `example_input`")  # refuses one without a batch
    with model.evaluating(), evaluating_any(router), torch.no_grad():
        # Not counted: a path that the model has not seen is learned here, by passes of its own.
        with taken_by_model(example_input):
            state = model.run_trunk(*args, **kwargs)
        everything, (of_all, _) = counted(model, model.router_inputs, *args, **kwargs)
        rows = at_least_one_row(len(of_all))  # another argument may come before the batch
        expert_flops, gate_flops = [], []
        for index in range(model.num_experts):
            flops, (logits, features) = counted(model, model.run_expert, index, state)
            expert_flops.append(flops)
            if index < model.num_experts - 1:
                gate = 0
                if router is not None:
                    gate, _ = counted(router, router.gate, index, logits, features)
                gate_flops.append(gate // rows)
    named = model.named_parameters(remove_duplicate=False)
    trunk, shared, own = parameters_by_owner(named, model.num_experts)
    return CostReport(
        trunk_parameters=trunk,
        expert_parameters=own,
        router_parameters=_parameters(router),
        trunk_flops=(everything - sum(expert_flops)) // rows,
        expert_flops=tuple(flops // rows for flops in expert_flops),
        gate_flops=tuple(gate_flops),
        shares=checked,
        backbone_parameters=None if backbone is None else _parameters(backbone),
        backbone_flops=None if backbone is None else _flops_of(backbone, args, kwargs) // rows,
        shared_parameters=shared,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        input_sizes=row_sizes((args, kwargs), rows),
    )


def check_router(router: object, model: object) -> None:
    """Raise unless a router has a gate and, where it tells sizes, those of the model.

    Raises:
        ArgumentError: it does not.
    """
    if isinstance(router, type) or not _has_gate(router):
        expected = "an ExpertRouter, a ConfidenceRouter or another router with a method `gate`"
        made = "Make one: `ExpertRouter.for_model(model)` or `ConfidenceRouter()`."
        refuse("router", expected, router, way_inside(router, "router", _has_gate) or made)
    for name in ("num_experts", "num_classes", "feature_dim"):
        # A router without these, such as ConfidenceRouter, fits every model.
        sizes = [getattr(one, name, None) for one in (router, model)]
        if None not in sizes and sizes[0] != sizes[1]:
            raise ArgumentError(
                f"Expected argument `router` to fit the model's {name} {sizes[1]}, but got "
                f"{sizes[0]}. Use `ExpertRouter.for_model(model)`."
            )


def _has_gate(router: object) -> bool:
    return callable(getattr(router, "gate", None))


def count_flops(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """FLOPs of one call of any module, in evaluation mode and without gradients.

    2 for each multiply-add of matrix products, convolutions, attention and recurrent layers. What
    is not known is named as by :func:`cost_report`.

    Args:
        module: left in the mode it was in.
        *args: what its forward takes, and ``**kwargs``.
        **kwargs: see ``*args``.

    Raises:
        ArgumentError: ``module`` is no module.

    Example:
        >>> count_flops(nn.Linear(10, 5), torch.zeros(1, 10))
        100
    """
    advice = "Let the forward of a module call the function."
    module = check_instance(uncompiled(module), "module", nn.Module, "a module", advice=advice)
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        with torch.no_grad():
            return counted(module, module, *args, **kwargs)[0]
    finally:
        for m in training:
            m.training = True


def _flops_of(backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Its FLOPs on the model's inputs, which may be in another precision or place by now."""
    like = next(
        (p for p in backbone.parameters() if p.is_floating_point()), torch.empty((), device="cpu")
    )

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)

    args, kwargs = map_tensors(moved, (args, kwargs))
    try:
        return count_flops(backbone, *args, **kwargs)
    except RIDEError:
        raise
    except Exception as error:
        raise ArgumentError(
            "Expected argument `backbone` to be the plain network, which takes what the model "
            f"takes, but on the same inputs it raised {type(error).__name__}: {error}"
        ) from error


def _parameters(module: object) -> int:
    parameters = module.parameters() if isinstance(module, nn.Module) else ()
    return sum(parameter.numel() for parameter in parameters)


def check_shares(shares: Numbers, num_experts: int) -> tuple[float, ...]:
    found = as_cpu_tensor(shares, "shares")
    if found.dim() != 1 or found.is_complex() or found.dtype == torch.bool:
        refuse("shares", f"{num_experts} numbers that sum to 1", shares)
    values = tuple(found.double().tolist())
    if len(values) != num_experts:
        raise ArgumentError(
            f"Expected argument `shares` to hold {num_experts} numbers, one for each number of "
            f"experts used, but got {len(values)}."
        )
    # `not all` rather than `any`: a NaN compares false.
    if not all(value >= 0 for value in values) or not abs(sum(values) - 1) < 1e-3:
        raise ArgumentError(
            "Expected argument `shares` to be non-negative and to sum to 1, but got "
            f"{values}, whose sum is {sum(values):g}. Pass the shares of samples that used 1 to "
            f"{num_experts} experts, for example from `routing_report`."
        )
    return values
