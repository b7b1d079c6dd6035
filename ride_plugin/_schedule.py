"""What depends on the epoch: one protocol, that of learning-rate schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ride_plugin._checks import check_integer
from ride_plugin._errors import warn_caller

# Two views, SAM, mixup's two labels or a checkpoint score a sample several times an epoch, and a
# sampler may draw an epoch that is several times as long as the data: ten times is no such thing.
_EPOCHS = 10
_FEWEST = 1000  # counts of fewer samples may be percentages or ratios of classes


class Schedule(nn.Module):
    """Something that changes at an epoch: ``step()`` at the end of each, ``last_epoch`` from 0.

    It is a module, so that its state dict can be saved within that of whatever owns it. The epoch
    is saved as a tensor, which every file format for state dicts can hold; it is a copy, as that of
    an LR scheduler is, so that a state which was kept can be gone back to.

    Attributes:
        start_epoch: the first epoch, counted from zero, in which the change acts. It may be set,
            and so may all that a schedule was built with: it acts at once.
        last_epoch: the current epoch, which may be set, too.
    """

    epoch: Tensor

    _patience = math.inf  # samples in training after which an epoch must have ended

    def __init__(self, start_epoch: int, class_counts: Tensor) -> None:
        super().__init__()
        samples = float(class_counts.sum())
        if samples >= _FEWEST and bool((class_counts == class_counts.round()).all()):
            self._patience = _EPOCHS * samples
        self._start_epoch = _checked_start(start_epoch)
        self._last_epoch = 0
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64, device="cpu"))

    @property
    def start_epoch(self) -> int:
        """The first epoch in which the change acts."""
        return self._start_epoch

    @start_epoch.setter
    def start_epoch(self, value: int) -> None:
        self._start_epoch = _checked_start(value)
        self._refresh()

    @property
    def last_epoch(self) -> int:
        """The current epoch."""
        return self._last_epoch

    @last_epoch.setter
    def last_epoch(self, value: int) -> None:
        self._last_epoch = check_integer(value, "last_epoch")
        self._patience = math.inf  # somebody knows of it
        self._refresh()

    @property
    def is_active(self) -> bool:
        """Whether the change acts in the current epoch."""
        return self.last_epoch >= self.start_epoch

    def step(self) -> None:
        """Go on to the next epoch; call it at the end of each, beside the LR scheduler's."""
        self.last_epoch += 1

    def scored(self, samples: int) -> None:
        """Warn, once, if a loss has scored so many samples in training and no epoch has ended."""
        if samples <= self._patience:
            return
        self._patience += samples  # a setting may change, so this is not the last look
        if not self.is_active and self._has_effect():
            kind = type(self).__name__
            warn_caller(
                f"{samples} samples were scored in training, more than {_EPOCHS} times those of "
                f"`class_counts`, and no epoch was ended: `start_epoch={self._start_epoch}` of "
                f"{kind} has no effect before `step()` is called. Call `criterion.step()` of "
                "RIDELoss or `diversity.step()` of DiversityLoss at the end of each epoch, or "
                "`step()` of what you gave them as a schedule. (If an epoch of yours is longer, or "
                "nothing shall change at an epoch, nothing is wrong.)"
            )
            self._patience = math.inf

    def _has_effect(self) -> bool:
        """Whether anything differs from the start epoch on."""
        return True

    def _refresh(self) -> None:
        """Let everything that depends on the epoch follow it."""
        self.epoch.fill_(self.last_epoch)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._refresh()  # `to_empty` leaves buffers without their values
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A copy, since `step` fills the buffer: what a scheduler's state holds stays as it is.
        destination[f"{prefix}epoch"] = self.epoch.clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name = f"{prefix}epoch"
        if name in state_dict:
            self._last_epoch = check_integer(state_dict[name], name)
            self._patience = math.inf if self._last_epoch else self._patience
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.epoch = self.epoch.clone()  # `assign=True` takes the tensor of the state itself
        self._refresh()


def _checked_start(epoch: object) -> int:
    return check_integer(epoch, "start_epoch", advice="Epochs count from zero; 0 starts at once.")
