"""What routing asks of a model and of a router, and the rule by which a row goes on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from ride_plugin._output import RouterInputs


class State(Protocol):
    """The trunk's result for some rows."""

    @property
    def batch_size(self) -> int:
        """Number of rows."""

    def select(self, rows: Tensor) -> Any:
        """Return the state of the rows ``[b]`` only."""


class RoutableModel(Protocol):
    """A model whose trunk and experts run one at a time: ``RIDEWrapper``, or one made by hand."""

    num_experts: int
    num_classes: int
    feature_dim: int

    def run_trunk(self, *args: Any, **kwargs: Any) -> Any:
        """Run the shared part; returns a `State`."""

    def run_expert(self, index: int, state: Any) -> tuple[Tensor, Tensor]:
        """Run one expert: logits ``[b, C]`` and pooled features ``[b, D]``."""

    def router_inputs(self, *args: Any, **kwargs: Any) -> RouterInputs:
        """All experts' logits and features, in evaluation mode and without gradients."""

    def evaluating(self) -> AbstractContextManager[Any]:
        """Evaluation mode for the duration of a block."""


class Router(Protocol):
    """Whatever decides: ``ExpertRouter``, ``ConfidenceRouter``, or one made by hand."""

    def gate(self, index: int, mean_logits: Tensor, features: Tensor) -> Tensor:
        """Logit ``[b]`` of "one more expert is needed" after expert ``index``."""


def goes_on(gate_logits: Tensor, limit: Tensor) -> Tensor:
    """Whether a row needs one more expert: the gate's logit exceeds ``logit(threshold)``.

    Probabilities saturate in float32 (a logit of 17 already gives 1.0), logits do not; so the
    comparison is made between logits. A threshold of 0 (limit -inf) lets every row go on, even one
    whose logit is -inf; a threshold of 1 (limit +inf) lets none.
    """
    return gate_logits.clamp(min=torch.finfo(gate_logits.dtype).min) > limit


def start(
    model: RoutableModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Tensor, Tensor]:
    """Run trunk and expert 0, in one pass where the model can: state, logits and features."""
    if hasattr(model, "start"):
        result: tuple[Any, Tensor, Tensor] = model.start(*args, **kwargs)
        return result
    state = model.run_trunk(*args, **kwargs)
    return (state, *model.run_expert(0, state))
