"""Who uses how many experts: shares of samples, overall and by shot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ride_plugin._checks import (
    ClassCounts,
    Numbers,
    as_labels,
    check_bool,
    check_class_counts,
    check_integer,
)
from ride_plugin._distributed import of_all_ranks, running
from ride_plugin._errors import ArgumentError
from ride_plugin.longtail import shot_groups


@dataclass(frozen=True)
class RoutingReport:
    """Shares of samples that used 1, 2, ... E experts; ``print`` shows a table.

    Attributes:
        overall: over all samples; what `cost_report` takes as ``shares``.
        many: over samples of many-shot classes; None if there are none.
        medium: the same, medium-shot.
        few: the same, few-shot.
    """

    overall: tuple[float, ...]
    many: tuple[float, ...] | None
    medium: tuple[float, ...] | None
    few: tuple[float, ...] | None

    def __str__(self) -> str:
        lines = ["experts  " + " ".join(f"{i + 1:>6}" for i in range(len(self.overall)))]
        for name in ("overall", "many", "medium", "few"):
            shares: tuple[float, ...] | None = getattr(self, name)
            shown = " absent" if shares is None else " ".join(f"{s:6.3f}" for s in shares)
            lines.append(f"{name:9}{shown}")
        return "\n".join(lines)


def routing_report(
    num_experts_used: Numbers,
    target: Numbers,
    class_counts: ClassCounts,
    *,
    num_experts: int,
    many: float = 100,
    few: float = 20,
    over_ranks: bool = True,
) -> RoutingReport:
    """Count the share of samples by number of experts used, overall and by shot.

    Where ``torch.distributed`` is initialised, every rank calls this with its own samples, and
    gets the report of all of them.

    Args:
        num_experts_used: integers ``[N]``, collected from `RoutingOutput`.
        target: class indices ``[N]``.
        class_counts: ``[C]``, training samples of each class.
        num_experts: E, so that numbers which no sample used are reported as 0.
        many: a class is many-shot above so many training samples; see `longtail.shot_groups`.
        few: and few-shot below so many.
        over_ranks: False for the report of these samples alone, which one rank may ask for.

    Raises:
        ArgumentError: shapes do not fit, there are no samples, or a value is out of range.

    Example:
        >>> used, target = torch.tensor([1, 1, 3, 2]), torch.tensor([0, 0, 1, 1])
        >>> print(routing_report(used, target, [500, 5], num_experts=3))
        experts       1      2      3
        overall   0.500  0.250  0.250
        many      1.000  0.000  0.000
        medium    absent
        few       0.000  0.500  0.500
    """
    counts = check_class_counts(class_counts)
    num_experts = check_integer(num_experts, "num_experts", 1)
    shared = check_bool(over_ranks, "over_ranks") and running()
    labels = as_labels(target, "target", len(counts), empty=shared)
    used = as_labels(num_experts_used, "num_experts_used", empty=shared)
    if used.shape != labels.shape:
        raise ArgumentError(
            "Expected arguments `num_experts_used` and `target` to have the same shape [N], but "
            f"got {list(used.shape)} and {list(labels.shape)}."
        )
    if len(used) and (used.min() < 1 or used.max() > num_experts):
        raise ArgumentError(
            f"Expected argument `num_experts_used` to hold integers from 1 to {num_experts}, but "
            f"got {int(used.min())} to {int(used.max())}. Pass `RoutingOutput.num_experts_used`."
        )
    if shared:
        of_ranks = of_all_ranks((used, labels), "routing_report")
        used, labels = (torch.cat(parts) for parts in zip(*of_ranks, strict=True))
    if not len(used):
        raise ArgumentError(
            "Expected argument `target` to hold at least one sample on one of the ranks, but it is "
            "empty on each."
        )
    groups = torch.from_numpy(shot_groups(counts, many, few))[labels]

    def shares(values: Tensor) -> tuple[float, ...] | None:
        if len(values) == 0:
            return None
        histogram = torch.bincount(values - 1, minlength=num_experts).double()
        return tuple((histogram / len(values)).tolist())

    overall = shares(used)
    assert overall is not None
    return RoutingReport(overall, *(shares(used[groups == group]) for group in range(3)))
