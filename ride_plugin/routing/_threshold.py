"""Choosing the routing threshold: what accuracy costs, measured once and swept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from ride_plugin._checks import check_callable, check_number, refuse
from ride_plugin._errors import ArgumentError
from ride_plugin.routing._confidence import ConfidenceRouter, Kind
from ride_plugin.routing._exit import RoutedStages
from ride_plugin.routing._measure import measure

LONG_TAIL_RATIO = 10
"""Calibration labels whose most and least frequent classes differ by more are long-tailed."""

_POINTS = 100


class LongTailedCalibrationWarning(UserWarning):
    """The calibration data are long-tailed: the threshold will be right for such data only."""


@dataclass(frozen=True, eq=False)
class ExitCurve:
    """Accuracy against cost for one kind of gate, from all experts to one; all tensors ``[P]``.

    Attributes:
        threshold_logits: rising, from -inf (threshold 0, all experts) to +inf (1, one expert).
        mean_experts: mean number of experts for each row.
        flops: mean FLOPs for each row.
        relative_flops: the same, divided by those of running every expert without a router.
        accuracy: top-1 accuracy, from 0 to 1.
    """

    threshold_logits: Tensor
    mean_experts: Tensor
    flops: Tensor
    relative_flops: Tensor
    accuracy: Tensor

    @property
    def thresholds(self) -> Tensor:
        """The thresholds as probabilities, float64: many may lie very close to one."""
        return self.threshold_logits.double().sigmoid()

    def best_within(
        self, *, max_experts: float | None = None, max_flops: float | None = None
    ) -> int:
        """Index of the most accurate point within a budget; of equals, the cheapest.

        Args:
            max_experts: the budget as a mean number of experts for each row.
            max_flops: the budget as mean FLOPs for each row. Give exactly one of the two.

        Raises:
            ArgumentError: not exactly one budget is given, or no point is within it.
        """
        name, budget = _only_one(max_experts=max_experts, max_flops=max_flops)
        cost = self.mean_experts if name == "max_experts" else self.flops
        within = cost <= budget * (1 + 1e-9)
        if not within.any():
            raise ArgumentError(
                f"Expected argument `{name}` to be at least {float(cost.min()):g}, the cost of one "
                f"expert for every row, but got {budget:g}."
            )
        accuracy = self.accuracy.masked_fill(~within, -1.0)
        best = accuracy == accuracy.max()
        return int(cost.masked_fill(~best, torch.inf).argmin())


@dataclass(frozen=True, eq=False)
class CalibrationResult:
    """What `RoutingInference.calibrate` measured and chose; ``print`` shows the comparison.

    Attributes:
        curve: of the router.
        index: the chosen point of the curve.
        baselines: curves of the confidence exits on the same samples, by kind.
        num_samples: how many samples the loader held.
        target: what was asked for, the name of the argument and its value.
        gate: the kind of a `ConfidenceRouter`, or ``"router"`` for any other.
    """

    curve: ExitCurve
    index: int
    baselines: Mapping[str, ExitCurve]
    num_samples: int
    target: tuple[str, float]
    gate: str

    @property
    def threshold(self) -> float:
        """The chosen threshold, common to all gates."""
        return float(self.curve.thresholds[self.index])

    @property
    def threshold_logit(self) -> float:
        """Its logit, which is what `RoutingInference` compares gates with."""
        return float(self.curve.threshold_logits[self.index])

    def __str__(self) -> str:
        chosen = {self.gate: (self.curve, self.index)}
        for kind, curve in self.baselines.items():
            if kind != self.gate:
                chosen[kind] = curve, _choose(curve, *self.target)
        chosen["all experts"] = self.curve, 0
        name, value = self.target
        lines = [
            f"{self.num_samples} samples, {name}={value:g}; means of all samples:",
            f"{'gate':16} {'logit >':>10} {'experts':>8} {'x all':>6} {'accuracy':>9}",
        ]
        for name, (curve, index) in chosen.items():
            lines.append(
                f"{name:16} {curve.threshold_logits[index]:>10.3f} "
                f"{curve.mean_experts[index]:>8.3f} "
                f"{curve.relative_flops[index]:>6.2f} {curve.accuracy[index]:>9.4f}"
            )
        return "\n".join(lines)


def calibrate(
    routed: RoutedStages,
    loader: Iterable[Any],
    *,
    max_experts: float | None = None,
    max_flops: float | None = None,
    max_accuracy_drop: float | None = None,
    progress: Callable[[int], object] | None = None,
) -> CalibrationResult:
    """See `RoutingInference.calibrate`; this does not set the threshold."""
    if progress is not None:
        check_callable(progress, "progress", "progress(number_of_samples)")
    if not isinstance(loader, Iterable):
        refuse("loader", "a DataLoader or a list of batches (x, y)", loader)
    name, value = _only_one(
        max_experts=max_experts, max_flops=max_flops, max_accuracy_drop=max_accuracy_drop
    )
    baselines: dict[str, ConfidenceRouter] = {
        kind: ConfidenceRouter(kind) for kind in get_args(Kind)
    }
    found = measure(routed, baselines, loader, progress)
    _warn_if_long_tailed(found.labels)
    whole = float(found.flops[:, -1].double().mean())
    curve = _sweep(found.gates.pop("router"), found.right, found.routed_flops, whole)
    index = _choose(curve, name, value)
    curves = {
        kind: _sweep(gates, found.right, found.flops, whole) for kind, gates in found.gates.items()
    }
    router = routed.router
    gate = router.kind if isinstance(router, ConfidenceRouter) else "router"
    return CalibrationResult(curve, index, curves, len(found.labels), (name, value), gate)


def _sweep(gates: Tensor, right: Tensor, row_flops: Tensor, whole: float) -> ExitCurve:
    """What every candidate costs and gains, from one count of the samples between candidates.

    Args:
        gates: ``[N, E-1]``, the gates' logits.
        right: bool ``[N, E]``, whether the mean of the first 1, 2, ... E experts is right.
        row_flops: int64 ``[N, E]``, FLOPs of a row that uses 1, 2, ... E experts.
        whole: mean FLOPs of running every expert without a router.
    """
    limits, samples = _candidates(gates), len(gates)
    more_flops, more_right = row_flops.diff(dim=1), right.long().diff(dim=1)
    # A sample reaches an expert if the lowest of the gates before it exceeds the limit.
    lowest = gates.clamp(min=torch.finfo(gates.dtype).min).cummin(dim=1).values
    exceeded = torch.bucketize(lowest, limits.to(lowest.dtype))  # how many limits lie below it
    exceeded = exceeded.masked_fill_(lowest.isnan(), 0)
    # Whole numbers until the end, so that points of equal accuracy are equal.
    experts = torch.full((len(limits),), samples, device=gates.device)
    flops = row_flops[:, 0].sum().expand(len(limits)).clone()
    hits = right[:, 0].sum().expand(len(limits)).clone()
    for gate in range(gates.shape[1]):
        places = exceeded[:, gate]
        experts += _sum_above(places, len(limits), torch.ones_like(places))
        flops += _sum_above(places, len(limits), more_flops[:, gate])
        hits += _sum_above(places, len(limits), more_right[:, gate])
    experts, flops, hits = (total.double() / samples for total in (experts, flops, hits))
    return ExitCurve(limits, experts, flops, flops / max(whole, 1), hits)


def _sum_above(exceeded: Tensor, num_limits: int, weights: Tensor) -> Tensor:
    """Sum of the whole-numbered weights of the samples that exceed each limit, ``[P]``."""
    sums = weights.new_zeros(num_limits + 1).index_add_(0, exceeded, weights)
    return sums.sum() - sums.cumsum(0)[:-1]


def _candidates(gates: Tensor) -> Tensor:
    """-inf, +inf, and values half way between observed gates, so that no sample sits on one."""
    values = gates[gates.isfinite()].double().unique()
    between = (values[1:] + values[:-1]) / 2
    if len(between) > _POINTS:
        wide = torch.float64  # float32 tells places apart up to 16 million only
        places = torch.linspace(0, len(between) - 1, _POINTS, dtype=wide, device=between.device)
        between = between[places.round().long()]
    # float32, like the buffer that will hold the choice: the curve is then what inference gives.
    ends = torch.tensor([-torch.inf, torch.inf], dtype=torch.float32, device=between.device)
    candidates: Tensor = torch.cat((ends, between.float())).unique()
    return candidates


def _choose(curve: ExitCurve, name: str, value: float) -> int:
    if name == "max_accuracy_drop":
        good = curve.accuracy >= curve.accuracy[0] - value - 1e-12
        return int(curve.flops.masked_fill(~good, torch.inf).argmin())
    return curve.best_within(**{name: value})


def _only_one(**targets: float | None) -> tuple[str, float]:
    """The one argument that is given, as (name, value)."""
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        *most, last = (f"`{name}`" for name in targets)
        raise ArgumentError(
            f"Expected exactly one of the arguments {', '.join(most)} and {last}, but got "
            f"{sorted(given) or 'none'}."
        )
    ((name, value),) = given.items()
    if name == "max_accuracy_drop":
        return name, check_number(value, name, 0.0, 1.0, advice="Half a percent is 0.005.")
    return name, check_number(value, name, 0.0)


def _warn_if_long_tailed(labels: Tensor) -> None:
    counts = labels.bincount()
    counts = counts[counts > 0]
    ratio = int(counts.max()) / int(counts.min())
    if ratio > LONG_TAIL_RATIO:
        warnings.warn(
            f"The calibration labels are long-tailed: the most frequent class has {ratio:.0f} "
            f"times the samples of the rarest (more than {LONG_TAIL_RATIO}). The threshold then "
            "suits frequent classes, which need few experts; on balanced data accuracy and cost "
            "will differ. Pass a balanced held-out set if you serve or report on balanced data.",
            LongTailedCalibrationWarning,
            stacklevel=4,
        )
