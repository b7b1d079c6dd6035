"""Early exit: the one walk through trunk, experts and gates that every way of serving uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ride_plugin._checks import check_predictions, is_finite, refuse
from ride_plugin._contexts import evaluating_any
from ride_plugin._errors import ArgumentError
from ride_plugin._numerics import float32_or_better
from ride_plugin._output import rebuilt_from_one_iterable
from ride_plugin.functional import running_means
from ride_plugin.routing._confidence import ConfidenceRouter
from ride_plugin.routing._protocols import RoutableModel, Router, Stages, State
from ride_plugin.routing._router import ExpertRouter

# They look for NaN themselves (each look waits for the CPU), and their gates know no modes.
_OURS = (ConfidenceRouter, ExpertRouter)


@rebuilt_from_one_iterable
class RoutingOutput(NamedTuple):
    """What ``RoutingInference(...)(x, return_routing=True)`` returns.

    Attributes:
        logits: ``[B, C]``, for each row the mean logits of the experts that it used.
        num_experts_used: int64 ``[B]``, from 1 to E.
    """

    logits: Tensor
    num_experts_used: Tensor


class Underway(NamedTuple):
    """Rows that have seen the same experts, and what the next expert needs of them.

    Attributes:
        state: the trunk's result for these rows.
        total: ``[b, C]``, sum of the logits of the experts that they have seen, in float32 or
            better.
    """

    state: State
    total: Tensor

    def select(self, rows: Tensor) -> Underway:
        """Keep the rows ``[b]`` only."""
        return Underway(self.state.select(rows), self.total.index_select(0, rows))


@dataclass(frozen=True)
class RoutedStages:
    """A model and its router as stages: trunk, experts, and gates with their thresholds.

    Attributes:
        model: whose trunk and experts run.
        router: whose gates decide.
        threshold_logits: ``[E-1]``, what each gate's logit must exceed.
    """

    model: RoutableModel
    router: Router
    threshold_logits: Tensor

    @property
    def num_experts(self) -> int:
        """``E``."""
        return self.model.num_experts

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode of model and router for the duration of a block."""
        with self.model.evaluating(), evaluating_any(self.router):
            yield

    def in_training_mode(self) -> str:
        """Which of model and router is in training mode and depends on it, or nothing."""
        for name, part in (("model", self.model), ("router", self.router)):
            if type(part) not in _OURS and getattr(part, "training", False):
                return name
        return ""

    def start(self, *args: Any, **kwargs: Any) -> tuple[State, Tensor, Tensor]:
        """Run trunk and expert 0, in one pass where the model can."""
        if hasattr(self.model, "start"):
            result: tuple[State, Tensor, Tensor] = self.model.start(*args, **kwargs)
            return result
        state = self.model.run_trunk(*args, **kwargs)
        return (state, *self.model.run_expert(0, state))

    def run_expert(self, index: int, state: State) -> tuple[Tensor, Tensor]:
        """Run one expert."""
        return self.model.run_expert(index, state)

    def goes_on(self, index: int, mean_logits: Tensor, features: Tensor) -> Tensor:
        """Whether each row needs one more expert after expert ``index``."""
        gate = gate_logits(self.router, index, mean_logits, features)
        return exceeds(gate, self.threshold_logits[index])


def gate_logits(router: Router, index: int, mean_logits: Tensor, features: Tensor) -> Tensor:
    """A gate's logits ``[b]``, checked: a router may be made by hand.

    Raises:
        ArgumentError: they are not one floating-point number for each row, or (on the CPU only)
            one is NaN, which would let its row go as if it were settled.
    """
    gate: object = router.gate(index, mean_logits, features)
    rows = mean_logits.shape[:1]
    if not isinstance(gate, Tensor) or not gate.is_floating_point() or gate.shape != rows:
        refuse("router", "one whose `gate` returns floating-point logits [b], for each row", gate)
    checked = type(router) in _OURS or is_finite(gate)
    if not checked and bool(gate.isnan().any()):
        raise ArgumentError(
            "Expected argument `router` to decide for every row, but its gate returned NaN for "
            f"{int(gate.isnan().sum())} of {len(gate)} rows. Find the step at which it diverged."
        )
    return gate


def exceeds(gate_logits: Tensor, limit: Tensor) -> Tensor:
    """Whether a row needs one more expert: the gate's logit exceeds ``logit(threshold)``.

    Probabilities saturate in float32 (a logit of 17 already gives 1.0), logits do not; so the
    comparison is made between logits. It is made in float32 or better: torch would round the limit,
    a single number, to a gate's half precision, and with it the rows that calibration tells apart.
    A threshold of 0 (limit -inf) lets every row go on, even one whose logit is -inf; a threshold of
    1 (limit +inf) lets none.
    """
    wide = float32_or_better(gate_logits)
    return wide.clamp(min=torch.finfo(wide.dtype).min) > float32_or_better(limit)


def rows_going_on(stages: Stages, index: int, mean: Tensor, features: Tensor) -> Tensor:
    """Which rows need one more expert after expert ``index``, int64 ``[b]``, ascending.

    The only wait for the device in the whole walk: the sizes of what follows depend on it.
    """
    return stages.goes_on(index, mean, features).nonzero().squeeze(1)


def run_first(stages: Stages, *args: Any, **kwargs: Any) -> tuple[Underway, Tensor, Tensor]:
    """Run trunk and expert 0 on a batch; returns what `run_next` does.

    Raises:
        ArgumentError: the batch size of the trunk's result is not the number of logits.
    """
    state, logits, features = stages.start(*args, **kwargs)
    if state.batch_size != len(logits):
        raise ArgumentError(
            "Expected the first tensor of the inputs to hold the batch, a row for each sample, but "
            f"it has {state.batch_size} and the logits have {len(logits)}. Where an argument that "
            "is for all rows comes first, wrap the backbone with a dict of keyword arguments in "
            "which the batch is first, `example_input={'x': x, 'position': position}`, and call "
            "by keyword, in any order."
        )
    return Underway(state, float32_or_better(logits)), logits, features


def run_next(stages: Stages, index: int, rows: Underway) -> tuple[Underway, Tensor, Tensor]:
    """Run expert ``index`` on rows that have seen all experts before it.

    Returns:
        The same rows one expert further, their mean logits ``[b, C]``, and the expert's features.
    """
    more, features = stages.run_expert(index, rows.state)
    total = rows.total + more
    return Underway(rows.state, total), (total / (index + 1)).to(more.dtype), features


def walk(stages: Stages, *args: Any, **kwargs: Any) -> RoutingOutput:
    """Run the trunk once and each expert on the rows that need it.

    Args:
        stages: trunk, experts and gates.
        *args: what the trunk takes, and ``**kwargs``.
        **kwargs: see ``*args``.
    """
    rows, mean, features = run_first(stages, *args, **kwargs)
    logits = mean
    used = torch.ones(len(logits), dtype=torch.int64, device=logits.device)
    places: Tensor | None = None  # of `rows` in the batch; None means all of it
    for index in range(1, stages.num_experts):
        staying = rows_going_on(stages, index - 1, mean, features)
        if len(staying) == 0:
            break
        if len(staying) < len(mean):
            rows = rows.select(staying)
            places = staying if places is None else places.index_select(0, staying)
        rows, mean, features = run_next(stages, index, rows)
        if places is None:
            logits = mean
            used.fill_(index + 1)
        else:
            # Out of place: `logits` may be a tensor that the caller's model returned.
            logits = logits.index_copy(0, places, mean)
            used.index_fill_(0, places, index + 1)
    # Once, at the end: what is no number in any expert's logits stays in a row's mean.
    check_predictions(logits, "the experts' logits")
    return RoutingOutput(logits, used)


def run_everything(stages: RoutedStages, *args: Any, **kwargs: Any) -> RoutingOutput:
    """Run every expert on every row and select afterwards; no shape depends on a value.

    Args:
        stages: trunk, experts and gates.
        *args: what the trunk takes, and ``**kwargs``.
        **kwargs: see ``*args``.
    """
    experts, features = stages.model.router_inputs(*args, **kwargs)
    means = running_means(experts)
    logits = means[:, 0]
    active = torch.ones_like(logits[:, 0], dtype=torch.bool)
    used = active.to(torch.int64)
    for index in range(1, stages.num_experts):
        active = active & stages.goes_on(index - 1, means[:, index - 1], features[:, index - 1])
        logits = torch.where(active[:, None], means[:, index], logits)
        used = used + active
    return RoutingOutput(logits, used)
