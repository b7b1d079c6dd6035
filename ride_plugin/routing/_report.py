"""Who uses how many experts: shares of samples, overall and by shot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ride_plugin._checks import ClassCounts, check_class_counts
from ride_plugin._errors import ArgumentError


@dataclass(frozen=True)
class RoutingReport:
    """Shares of samples that used 1, 2, ... E experts; ``print`` shows a table.

    Attributes:
        overall: over all samples; what `cost_report` takes as ``shares``.
        many: over samples of classes with more than 100 training samples; None if there are none.
        medium: 20 to 100 training samples; None if there are none.
        few: fewer than 20 training samples; None if there are none.
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
    num_experts_used: Tensor, target: Tensor, class_counts: ClassCounts, *, num_experts: int
) -> RoutingReport:
    """Count the share of samples by number of experts used, overall and by shot.

    Args:
        num_experts_used: int64 ``[N]``, collected from `RoutingOutput`.
        target: class indices ``[N]``.
        class_counts: ``[C]``, training samples of each class; the field's cut-offs apply: many
            above 100, medium 20 to 100, few below 20.
        num_experts: E, so that numbers which no sample used are reported as 0.

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
    used, labels = num_experts_used.cpu(), target.cpu()
    if used.dim() != 1 or used.shape != labels.shape or len(used) == 0:
        raise ArgumentError(
            "Expected arguments `num_experts_used` and `target` to have the same shape [N] with "
            f"N >= 1, but got {list(used.shape)} and {list(labels.shape)}."
        )
    for name, values, low, high in (
        ("num_experts_used", used, 1, num_experts),
        ("target", labels, 0, len(counts) - 1),
    ):
        if values.is_floating_point() or values.min() < low or values.max() > high:
            raise ArgumentError(
                f"Expected argument `{name}` to hold integers from {low} to {high}, but got "
                f"{values.dtype} from {values.min().item()} to {values.max().item()}."
            )
    of_sample = counts[labels]

    many, few = of_sample > 100, of_sample < 20
    groups = {"many": many, "medium": ~many & ~few, "few": few}

    def shares(values: Tensor) -> tuple[float, ...]:
        histogram = torch.bincount(values - 1, minlength=num_experts).double()
        return tuple((histogram / len(values)).tolist())

    by_shot = {name: shares(used[group]) if group.any() else None for name, group in groups.items()}
    return RoutingReport(shares(used), **by_shot)
