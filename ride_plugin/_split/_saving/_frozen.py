"""What was frozen when a model was wrapped, and therefore exists once for all experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ride_plugin._errors import ReplayError, listed, warn_caller
from ride_plugin._split._copying import frozen_layers, held_by_all, trains
from ride_plugin._split._replay import StandIn, versions_in
from ride_plugin._tree import dotted


class Frozen:
    """The tensors that experts share because nothing trained them, and the layers set to rest.

    Args:
        trunk: the shared part.
        experts: all of them.
        written: names, inside an expert, of what a forward or a change of modes writes, which
            each expert has for itself.

    Attributes:
        layers: normalisation layers in evaluation mode without trainable parameters.
    """

    def __init__(
        self, trunk: nn.Module, experts: Sequence[nn.Module], written: frozenset[str]
    ) -> None:
        self.layers = [
            layer for part in (trunk, *experts) for layer in frozen_layers(part, trunk.training)
        ]
        self._shared = {
            name: (tensors, key)
            for name, (tensors, key) in held_by_all(experts).items()
            if not tensors[key].requires_grad
        }
        self._adapted = [
            (called, layer, _is_merged(layer))
            for called, layer in self._adapted_layers(experts, written)
        ]

    def _adapted_layers(
        self, experts: Sequence[nn.Module], written: frozenset[str]
    ) -> Iterator[tuple[str, nn.Module]]:
        """Layers of experts around a shared weight to which their own part can be added."""
        shared = {id(tensors[key]) for tensors, key in self._shared.values()}
        for index, expert in enumerate(experts):
            for name, layer in expert.named_modules():
                if isinstance(layer, StandIn) or not _can_merge(layer):
                    continue
                held = {dotted(name, key): p for key, p in layer.named_parameters()}
                # One that merges by its mode has its weight for itself, and its bias not.
                if any(id(p) in shared for p in held.values()) and written.isdisjoint(held):
                    yield f"experts.{index}.{name}", layer

    def keep_in_evaluation(self) -> None:
        """Set the layers to evaluation again, but for those that train by now."""
        for layer in self.layers:
            if not trains(layer.parameters(recurse=False)):
                layer.eval()

    def tell_what_trains(self, experts: Iterable[nn.Module]) -> None:
        """Warn once that what was frozen at wrapping, and therefore is shared, trains now."""
        if not any(tensor.requires_grad for tensor in self._held().values()):
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

    def refuse_merged(self) -> None:
        """Raise if an adapter of one expert was added to a weight that all experts share.

        It is written through ``.data``, which leaves no trace, so the layer itself is asked.
        """
        merged = [name for name, layer, before in self._adapted if _is_merged(layer) != before]
        if merged:
            raise ReplayError(
                f"Adapters of experts were merged (or taken out again) after wrapping, those of "
                f"{listed(merged)}. Their frozen weights are one tensor for all experts, which "
                "now holds the adapters of several. Undo it in the same layers (`unmerge()`), and "
                "merge in a copy of one expert as a plain network: "
                "`model.to_module(k).merge_adapter()`."
            )

    def _held(self) -> dict[str, Tensor]:
        """What is shared, where it still is: a parametrization puts a weight to another place."""
        places = self._shared.items()
        return {name: held[key] for name, (held, key) in places if held.get(key) is not None}

    @contextmanager
    def refusing_writes(self) -> Iterator[None]:
        """Raise if an expert writes what all share because nothing was seen to write it."""
        fixed = self._held()
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


def _can_merge(layer: nn.Module) -> bool:
    """Whether it says if an adapter is added to its weight, as layers of peft and loralib do."""
    return "merged" in vars(layer) or hasattr(type(layer), "merged")


def _is_merged(layer: nn.Module) -> bool:
    return getattr(layer, "merged", None) is True
