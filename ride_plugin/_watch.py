"""Notices a training in which nothing learns: the optimizer was made before wrapping."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ride_plugin._errors import warn_caller

_PASSES = 128  # training passes without a change that are too many, gradients accumulated or not


class TrainingWatch:
    """Compares the parameters' version counters after 1, 2, 4, ... training passes.

    As soon as one has changed it is done, which in an ordinary loop is at the second pass. A copy
    or an unpickled one begins anew.

    Attributes:
        done: whether there is nothing left to watch.
    """

    def __init__(self) -> None:
        self.done = False
        self._passes = 0
        self._went_back = False
        self._versions: list[tuple[int, int]] = []
        self._sample: tuple[nn.Parameter, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainingWatch:
        return TrainingWatch()

    def __reduce__(self) -> tuple[type[TrainingWatch], tuple[()]]:
        return TrainingWatch, ()

    def note(self, module: nn.Module, output: Tensor) -> None:
        """Take note of one training pass with gradients, and warn once where none has an effect."""
        self._passes += 1
        if self._passes == 1:
            self._begin(module, output)
        elif self._passes & (self._passes - 1) == 0:  # a power of two
            if self._versions != _versions(module):
                self.done = True
            elif self._passes >= _PASSES:
                self.done = True
                if self._went_back and self._is_unchanged():
                    warn_caller(
                        f"In {_PASSES} training passes no parameter of the wrapped model has "
                        "changed. An optimizer made from the backbone's parameters trains the "
                        "backbone, which the model does not use: make it after wrapping, from "
                        "`model.parameters()`. (If gradients are accumulated over more passes, or "
                        "the model shall not learn, nothing is wrong.)"
                    )

    def _begin(self, module: nn.Module, output: Tensor) -> None:
        # Sharded and functional parameters are of other types; their counters tell nothing.
        trained = [p for p in module.parameters() if p.requires_grad and type(p) is nn.Parameter]
        if not trained or not output.requires_grad:
            self.done = True
            return
        self._versions = _versions(module)
        # Some optimizers write to `parameter.data`, which no counter shows.
        self._sample = trained[-1], trained[-1].detach().flatten()[:64].clone()
        output.register_hook(self._went)

    def _went(self, gradient: Tensor) -> None:
        self._went_back = True

    def _is_unchanged(self) -> bool:
        if self._sample is None:
            return False
        parameter, values = self._sample
        return bool((parameter.detach().flatten()[:64] == values).all())


def _versions(module: nn.Module) -> list[tuple[int, int]]:
    return [(id(p), p._version) for p in module.parameters() if p.requires_grad]
