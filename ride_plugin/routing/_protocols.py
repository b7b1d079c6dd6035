"""What routing asks of a model and of a router."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ride_plugin._cost import CountableModel


class State(Protocol):
    """The trunk's result for some rows."""

    @property
    def batch_size(self) -> int:
        """Number of rows."""

    def select(self, rows: Tensor) -> Any:
        """Return the state of the rows ``[b]`` only."""


class RoutableModel(CountableModel, Protocol):
    """A model whose trunk and experts run one at a time: ``RIDEWrapper``, or one made by hand."""

    num_classes: int
    feature_dim: int


class Router(Protocol):
    """Whatever decides: ``ExpertRouter``, ``ConfidenceRouter``, or one made by hand."""

    def gate(self, index: int, mean_logits: Tensor, features: Tensor) -> Tensor:
        """Logit ``[b]`` of "one more expert is needed" after expert ``index``."""


class Stages(Protocol):
    """Trunk, experts and gates that run one at a time: all that early exit needs to know."""

    @property
    def num_experts(self) -> int:
        """``E``."""

    def start(self, *args: Any, **kwargs: Any) -> tuple[State, Tensor, Tensor]:
        """Run trunk and expert 0: state, logits ``[B, C]`` and features ``[B, D]``."""

    def run_expert(self, index: int, state: Any) -> tuple[Tensor, Tensor]:
        """Run one expert: logits ``[b, C]`` and features ``[b, D]``."""

    def goes_on(self, index: int, mean_logits: Tensor, features: Tensor) -> Tensor:
        """Whether each row needs one more expert after expert ``index``, bool ``[b]``."""
