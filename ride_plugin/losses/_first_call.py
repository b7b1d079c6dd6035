"""What the first call of a criterion tells of it that a loss over experts does not expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ride_plugin._checks import may_read, rows_sum_to_one
from ride_plugin._errors import warn_caller
from ride_plugin._numerics import float32_or_better
from ride_plugin.losses._experts_loss import as_int64, averages_rows, setting_of
from ride_plugin.losses._seen_logits import adds_a_prior
from ride_plugin.losses._trials import keeps_state, sums_samples


def look_at(
    criterion: Any,
    experts: Tensor,
    target: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    diverse: bool,
) -> None:
    """Warn of what the loss would do otherwise than meant.

    Args:
        criterion: one for all experts, or a list with one for each.
        experts: ``[B, E, C]``, of the first call.
        target: of the first call.
        args: handed on to the criterion.
        kwargs: handed on to the criterion.
        diverse: whether there is a diversity term.
    """
    several = isinstance(criterion, (list, nn.ModuleList))
    each = list(criterion) if several else [criterion]
    given = (float32_or_better(experts)[:, 0], as_int64(target), args, kwargs)
    if not several:
        _look_at_the_state(criterion, experts.shape[1], given)
    if diverse:
        _look_at_the_sum(each[0], given)
        _look_at_the_prior(each, given)
        _look_at_the_targets(experts, target)


def _look_at_the_state(criterion: Any, num_experts: int, given: tuple[Any, ...]) -> None:
    """Warn if a state that belongs to one network would follow all experts."""
    if num_experts > 1 and not averages_rows(criterion) and keeps_state(criterion, *given):
        warn_caller(
            f"The criterion {criterion!r} keeps a state that each call advances, such as a memory "
            "of samples, a moving average or a counter. It is called once for each expert, so a "
            f"step advances it {num_experts} times, by what all experts predict. Give each its "
            f"own: RIDELoss([copy.deepcopy(criterion) for _ in range({num_experts})], "
            "class_counts). (If the experts shall share it, or it is for logs only, nothing is "
            "wrong.)"
        )


def _look_at_the_sum(criterion: Any, given: tuple[Any, ...]) -> None:
    """Warn of a sum over samples beside a diversity term that is their mean."""
    logits, kwargs = given[0], given[3]
    says = kwargs.get("reduction") or setting_of(criterion, "reduction", None)
    if says is None and not averages_rows(criterion) and sums_samples(criterion, *given):
        warn_caller(
            f"The criterion {criterion!r} sums over samples without saying so: for a batch that "
            "holds each sample twice, its loss is twice as large. The diversity term is a mean, "
            f"{len(logits)} times too small beside it in this batch. Say so: "
            '`criterion.reduction = "sum"`, and the term is a sum as well. (If the criterion '
            "divides the sum by a number that is not of this batch, "
            '`criterion.reduction = "mean"` leaves the term a mean without this warning.)'
        )


def _look_at_the_prior(criteria: list[Any], given: tuple[Any, ...]) -> None:
    """Warn if experts can part where a criterion of another library does not look."""
    for criterion in criteria:
        if not hasattr(criterion, "with_prior") and adds_a_prior(criterion, *given):
            warn_caller(
                f"The criterion {criterion!r} adds a prior to the logits, or has a factor for each "
                "class: at equal logits it does not treat alike the classes that are not the "
                "sample's. The diversity term compares the plain logits, on which experts then "
                "part at no cost to the criterion, and each becomes useless by "
                "itself. If it is logit adjustment or balanced softmax, put "
                "ride_plugin.longtail.LogitAdjustedLoss(class_counts) in its place; if it is "
                "another, give it a method `with_prior(logits)` that returns the logits which "
                "its softmax sees, or leave the term out: RIDELoss(criterion, "
                "DiversityLoss(class_counts, weight=0))."
            )
            return


def _look_at_the_targets(experts: Tensor, target: Any) -> None:
    """Warn if a sample has several classes, or none, for which the diversity term is not made."""
    if not isinstance(target, Tensor) or not target.is_floating_point() or not may_read(target):
        return
    if target.shape == experts[:, 0].shape and not rows_sum_to_one(target):
        warn_caller(
            "Rows of `target` do not sum to one, as where a sample may have several classes or "
            "none. The diversity term compares experts by a softmax over the classes, which is "
            "made for one class a sample, and nothing was measured for others. To leave it out: "
            "RIDELoss(criterion, DiversityLoss(class_counts, weight=0))."
        )
