"""Which number and width of experts stay within a budget of FLOPs, before anything is trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._checks import check_instance, check_integer, check_number, refuse
from ride_plugin._contexts import random_state_kept
from ride_plugin._cost import CostReport, check_shares, cost_report, counted_for
from ride_plugin._errors import ArgumentError, WidthError, listed
from ride_plugin._initialise import frozen_in
from ride_plugin._wrapper import RIDEWrapper
from ride_plugin.routing import ExpertRouter

Shares = Sequence[float] | Tensor

_MADE_ANEW = (
    "would be drawn at random and never learn, being frozen. Unfreeze them before "
    "(`requires_grad_(True)`), or fork behind them (`fork_at=`)."
)


@dataclass(frozen=True)
class PlanRow:
    """One choice of a plan.

    Attributes:
        num_experts: ``E``.
        expert_width: as ``RIDEWrapper`` takes it.
        report: its cost, with a router, and with the plain backbone to compare with.
        ratio: FLOPs of a row that every expert sees, without router, over the backbone's.
        routed_ratio: expected FLOPs of a routed row over the backbone's; None without shares.
        affordable_experts: how many experts a routed row may use on average within the budget,
            from 1 to E; 0 if not even one fits.
    """

    num_experts: int
    expert_width: float
    report: CostReport
    ratio: float
    routed_ratio: float | None
    affordable_experts: float


@dataclass(frozen=True)
class Plan:
    """The choices of :func:`plan`; ``print`` shows a table.

    Attributes:
        rows: every choice, by number of experts, wide ones first.
        max_flops_ratio: the budget, in FLOPs of the plain backbone.
        failed: widths to which the backbone's experts cannot be narrowed, and why; also those for
            which frozen parameters would be drawn anew.
    """

    rows: tuple[PlanRow, ...]
    max_flops_ratio: float
    failed: tuple[tuple[float, str], ...] = ()

    @property
    def best(self) -> PlanRow | None:
        """Without routing, the row that spends most of the budget; None if none is within it."""
        return self._largest([(row.ratio, row) for row in self.rows])

    @property
    def best_routed(self) -> PlanRow | None:
        """The same when routed at the shares given."""
        routed = [(row.routed_ratio, row) for row in self.rows]
        return self._largest([(ratio, row) for ratio, row in routed if ratio is not None])

    def _largest(self, rows: Sequence[tuple[float, PlanRow]]) -> PlanRow | None:
        within = [pair for pair in rows if pair[0] <= self.max_flops_ratio]
        return max(within, key=lambda pair: pair[0])[1] if within else None

    def __str__(self) -> str:
        def number(value: float | None) -> str:
            if value is None:
                return f"{'-':>11} "
            return f"{value:>11.2f}{'*' if value <= self.max_flops_ratio else ' '}"

        lines = [
            f"{'experts':>7}  {'width':>5}  {'parameters':>12}  {'all experts':>11}   "
            f"{'routed':>11}   {'affordable':>10}"
        ]
        lines += [
            f"{row.num_experts:>7}  {row.expert_width:>5.2f}  {row.report.parameters:>12,}  "
            f"{number(row.ratio)}  {number(row.routed_ratio)}  {row.affordable_experts:>10.2f}"
            for row in self.rows
        ]
        lines += [f"width {width:.2f} is not possible: {why}" for width, why in self.failed]
        lines.append(
            f"* at most {self.max_flops_ratio:.2f} x the backbone's FLOPs; affordable: experts "
            "that a row may use on average"
        )
        for row in self.rows[:1]:
            lines += counted_for(row.report)
        return "\n".join(lines)


def plan(
    backbone: nn.Module,
    *,
    num_experts: Sequence[int] = (2, 3, 4),
    expert_widths: Sequence[float] = (1.0, 0.75, 0.5),
    max_flops_ratio: float = 1.1,
    shares: Shares | Mapping[int, Shares] | None = None,
    fork_at: str | None = None,
    example_input: Any = None,
    logits: int | str | Callable[[Any], Tensor] | None = None,
    num_classes: int | None = None,
) -> Plan:
    """Compare numbers and widths of experts by cost, before training: what fits a budget of FLOPs?

    One wrapped model is built for each width and counted by :func:`cost_report`; all experts cost
    the same, so other numbers of them follow. Backbone and random state stay as they are.

    Args:
        backbone: as ``RIDEWrapper`` takes it.
        num_experts: numbers to compare.
        expert_widths: widths to compare.
        max_flops_ratio: the budget, in FLOPs of the plain backbone.
        shares: shares of rows that use 1, 2, ... E experts, for the E of its length (the authors
            publish 0.41, 0.09, 0.50 for three); or a mapping from E to such shares. Other numbers
            of experts are then compared without routing.
        fork_at: as for ``RIDEWrapper``.
        example_input: as for ``RIDEWrapper``.
        logits: as for ``RIDEWrapper``.
        num_classes: as for ``RIDEWrapper``.

    Raises:
        ArgumentError: an argument is out of range, or shares are for a number of experts that is
            not compared.
        SplitError: the backbone cannot be split.

    Example:
        >>> backbone = nn.Sequential(
        ...     nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(),
        ...     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        ... )
        >>> found = plan(backbone, num_experts=(2, 3), expert_widths=(1.0, 0.5), fork_at="2")
        >>> print(found)
        experts  width    parameters  all experts        routed   affordable
              2   1.00        10,388         1.90             -         1.11
              2   0.50         5,428         1.00*            -         2.00
              3   1.00        15,358         2.81             -         1.11
              3   0.50         7,918         1.45             -         2.22
        * at most 1.10 x the backbone's FLOPs; affordable: experts that a row may use on average
        FLOPs are those of a row of sizes [3, 32, 32]
        >>> found.best.num_experts, found.best.expert_width
        (2, 0.5)
    """
    numbers = sorted(
        {check_integer(n, "num_experts", 1) for n in _several(num_experts, "num_experts")}
    )
    widths = sorted(
        {
            check_number(width, "expert_widths", 0, 1, open_low=True)
            for width in _several(expert_widths, "expert_widths")
        },
        reverse=True,
    )
    check_instance(backbone, "backbone", nn.Module, "a torch.nn.Module")
    max_flops_ratio = check_number(max_flops_ratio, "max_flops_ratio", 0, open_low=True)
    shares_of = _by_number(shares, numbers)
    rows: list[PlanRow] = []
    failed = []
    with random_state_kept(backbone), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights, which do not matter here
        for width in widths:
            try:
                model = RIDEWrapper(
                    backbone,
                    2,
                    expert_width=width,
                    fork_at=fork_at,
                    example_input=example_input,
                    logits=logits,
                    num_classes=num_classes,
                )
            except WidthError as error:
                failed.append((width, str(error)))
                continue
            if width < 1 and (lost := _frozen_and_made_anew(model, backbone)):
                failed.append((width, f"{listed(lost)} of the experts {_MADE_ANEW}"))
                continue
            report = cost_report(model, router=ExpertRouter.for_model(model), backbone=backbone)
            rows += [
                _row(number, width, report, model, shares_of.get(number), max_flops_ratio)
                for number in numbers
            ]
    rows.sort(key=lambda row: row.num_experts)  # stable: wide ones stay first
    return Plan(tuple(rows), max_flops_ratio, tuple(failed))


def _frozen_and_made_anew(narrow: RIDEWrapper, backbone: nn.Module) -> list[str]:
    """Names in an expert of what narrowing has made anew though it does not train."""
    of_trunk = {id(parameter) for parameter in narrow.trunk.parameters()}
    old = dict(backbone.named_parameters())
    return [
        name
        for name, parameter in frozen_in(narrow.experts[0], of_trunk).items()
        if not (name in old and torch.equal(parameter, old[name]))
    ]


def _several(values: Any, name: str) -> list[Any]:
    """What is to be compared, as a list of at least one."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        refuse(name, "a sequence", values, f"Pass `{name}=({values!r},)` for a single one.")
    found = list(values)
    if not found:
        refuse(name, "a sequence of at least one", values)
    return found


def _by_number(
    shares: Shares | Mapping[int, Shares] | None, numbers: Sequence[int]
) -> dict[int, tuple[float, ...]]:
    if shares is None:
        return {}
    given = shares if isinstance(shares, Mapping) else {len(_several(shares, "shares")): shares}
    for number in given:
        if number not in numbers:
            raise ArgumentError(
                f"Expected argument `shares` to be for one of {list(numbers)} experts, but got "
                f"shares for {number}. Add {number} to `num_experts`, or pass a mapping from the "
                "number of experts to its shares."
            )
    return {number: check_shares(those, number) for number, those in given.items()}


def _row(
    number: int,
    width: float,
    of_two: CostReport,
    model: RIDEWrapper,
    shares: tuple[float, ...] | None,
    budget: float,
) -> PlanRow:
    expert, gate = of_two.expert_flops[0], of_two.gate_flops[0]
    own, shared = of_two.expert_parameters[0], of_two.shared_parameters
    only = number == 1  # nothing is shared then: what is frozen is the expert's own too
    router = None
    if number > 1:
        router = ExpertRouter(model.feature_dim, number, num_classes=model.num_classes)
    report = replace(
        of_two,
        expert_parameters=(own + shared * only,) * number,
        shared_parameters=0 if only else shared,
        trainable_parameters=of_two.trainable_parameters + (number - 2) * own,  # own ones all train
        expert_flops=(expert,) * number,
        gate_flops=(gate,) * (number - 1),
        router_parameters=0 if router is None else sum(p.numel() for p in router.parameters()),
        shares=shares,
    )
    backbone = report.backbone_flops or 1
    affordable = float(number)
    if report.flops_by_experts[-1] > budget * backbone:
        # As if each expert were followed by a gate: at most one gate too many.
        affordable = (budget * backbone - report.trunk_flops) / (expert + gate)
    routed = report.routed_flops
    return PlanRow(
        number,
        width,
        report,
        ratio=report.flops / backbone,
        routed_ratio=None if routed is None else routed / backbone,
        affordable_experts=0.0 if affordable < 1 else min(affordable, float(number)),
    )
