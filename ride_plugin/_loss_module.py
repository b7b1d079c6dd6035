"""A wrapped model and its loss as one module, for trainers that want the loss from the model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._checks import check_callable
from ride_plugin._errors import ArgumentError
from ride_plugin._output import without_experts
from ride_plugin._wrapper import RIDEWrapper


class _Forward:
    """A forward whose signature is the backbone's, since trainers pick a batch's columns by it."""

    def __init__(
        self,
        run: Callable[..., dict[str, Tensor]],
        signature_of: Callable[[Any], inspect.Signature],
    ) -> None:
        self.run = run
        self.signature_of = signature_of
        self.__signature__ = inspect.signature(run)  # of the class, whose backbone is not known

    def __call__(self, module: RIDEModule, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self.run(module, *args, **kwargs)

    def __get__(self, module: RIDEModule | None, owner: type[RIDEModule]) -> Callable[..., Any]:
        if module is None:
            return self
        forward = functools.partial(self.run, module)
        forward.__signature__ = self.signature_of(module)  # type: ignore[attr-defined]
        return forward


class RIDEModule(nn.Module):
    """A wrapped model and its loss, returning ``{"loss": ..., "logits": ...}`` as Trainers ask.

    The Trainer picks a batch's columns by the names of the model's arguments, takes the loss from
    the model and drops the first entry of an output that is a bare tensor. This module has the
    backbone's argument names and ``labels``, and computes the loss in its own forward, so that
    prediction returns every row.

    Args:
        model: the wrapped model.
        criterion: called as ``criterion(output, labels)`` on the wrapped model's output, usually
            `RIDELoss`. It is a submodule: what it saves is part of the checkpoint.

    Raises:
        ArgumentError: ``model`` is not wrapped, or ``criterion`` cannot be called.

    Example:
        >>> from ride_plugin import experts_loss
        >>> class Criterion(nn.Module):
        ...     def forward(self, output, labels):
        ...         return experts_loss(nn.functional.cross_entropy, output, labels)
        >>> backbone = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> model = RIDEWrapper(backbone, 2, fork_at="2")
        >>> module = RIDEModule(model, Criterion())
        >>> sorted(module(torch.randn(4, 8), labels=torch.tensor([0, 1, 2, 0])))
        ['logits', 'loss']
    """

    # The Trainer then divides the loss by its gradient accumulation steps, which our mean needs.
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True

    def __init__(self, model: RIDEWrapper, criterion: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, RIDEWrapper):
            raise ArgumentError(
                "Expected argument `model` to be a RIDEWrapper, but got "
                f"{type(model).__name__}. Pass RIDEWrapper(backbone, num_experts=3)."
            )
        check_callable(criterion, "criterion", "criterion(output, labels)")
        self.model = model
        self.criterion = criterion

    @property
    def config(self) -> Any:
        """The backbone's configuration, which the Trainer reads."""
        return self.model.config

    def gradient_checkpointing_enable(self, *how: Any, **named: Any) -> None:
        """Compute the experts' activations again in the backward pass (``checkpoint_experts``).

        How is not a choice here: what the Trainer says of it (``use_reentrant``) is left aside.
        """
        self.model.checkpoint_experts = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep the experts' activations for the backward pass."""
        self.model.checkpoint_experts = False

    # Their names from transformers 5.24 on.
    activation_checkpointing_enable = gradient_checkpointing_enable
    activation_checkpointing_disable = gradient_checkpointing_disable

    def _run(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        if labels is None and self.training and torch.is_grad_enabled():
            raise ArgumentError(
                "Expected argument `labels` in training, but got None, so the loss would be one of "
                "the mean of the experts' logits. The Trainer takes the labels away for "
                "`label_smoothing_factor` and `compute_loss_func`: leave both unset and put the "
                "smoothing into the criterion, RIDELoss(nn.CrossEntropyLoss(label_smoothing=0.1), "
                "class_counts)."
            )
        args, kwargs = self._named(args, kwargs)
        output = self.model(*args, **kwargs)
        logits = without_experts(output)
        if labels is None:
            return {"logits": logits}
        return {"loss": self.criterion(output, labels), "logits": logits}

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Arguments by position as this signature has them, where the backbone takes `labels`."""
        if not args:  # as trainers call it, at each step
            return args, kwargs
        backbone = list(inspect.signature(self.model.trunk.forward).parameters)
        if "labels" not in backbone:
            return args, kwargs
        place = backbone.index("labels")
        names, late = backbone[place + 1 :], args[place:]
        if len(late) > len(names):
            raise ArgumentError(
                f"Expected at most {place + len(names)} arguments by position, but got "
                f"{len(args)}. Pass the labels by name: `labels=`."
            )
        return args[:place], {**dict(zip(names, late, strict=False)), **kwargs}

    def _signature(self) -> inspect.Signature:
        named = [
            parameter
            for parameter in inspect.signature(self.model.trunk.forward).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD and parameter.name != "labels"
        ]
        labels = inspect.Parameter("labels", inspect.Parameter.KEYWORD_ONLY, default=None)
        return inspect.Signature([*named, labels])

    forward = _Forward(_run, _signature)
