"""What was frozen when a model was wrapped, and therefore exists once for all experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ride_plugin._errors import ReplayError, warn_caller
from ride_plugin._split._form import versions_in
from ride_plugin._split._sharing import frozen_layers, held_by_all, trains


class Frozen:
    """The tensors that experts share because nothing trained them, and the layers set to rest.

    Attributes:
        layers: normalisation layers in evaluation mode without trainable parameters.
    """

    def __init__(self, trunk: nn.Module, experts: Sequence[nn.Module]) -> None:
        self.layers = [
            layer for part in (trunk, *experts) for layer in frozen_layers(part, trunk.training)
        ]
        self._shared = {
            name: (tensors, key)
            for name, (tensors, key) in held_by_all(experts).items()
            if not tensors[key].requires_grad
        }

    def keep_in_evaluation(self) -> None:
        """Set the layers to evaluation again, but for those that train by now."""
        for layer in self.layers:
            if not trains(layer.parameters(recurse=False)):
                layer.eval()

    def tell_what_trains(self, experts: Iterable[nn.Module]) -> None:
        """Warn once that what was frozen at wrapping, and therefore is shared, trains now."""
        if not any(tensors[key].requires_grad for tensors, key in self._shared.values()):
            return
        unfrozen = [
            name
            for name, (tensors, key) in held_by_all(experts).items()
            if name in self._shared and tensors[key].requires_grad
        ]
        self._shared = {}
        if unfrozen:
            more = f" and {len(unfrozen) - 3} more" if len(unfrozen) > 3 else ""
            warn_caller(
                "These parameters were frozen when the model was wrapped, so all experts share "
                f"them: {unfrozen[:3]}{more}. They train now, as one tensor for all experts. To "
                "give each expert its own, unfreeze them before wrapping (`requires_grad_(True)`)."
            )

    @contextmanager
    def refusing_writes(self) -> Iterator[None]:
        """Raise if an expert writes what all share because nothing was seen to write it."""
        fixed = {name: held[key] for name, (held, key) in self._shared.items()}
        before = versions_in(list(fixed.values()))
        yield
        after = versions_in(list(fixed.values()))
        if before == after:
            return
        written = [n for n, old, new in zip(fixed, before, after, strict=True) if old != new]
        raise ReplayError(
            f"The forward of an expert has written {written[:3]}, which all experts share, because "
            "nothing wrote it when the model was wrapped. To give each expert its own, wrap the "
            "backbone in a state in which its forward writes it (a warm-up that is over, say), or "
            "let the forward assign a new tensor instead of writing into the old."
        )
