"""A wrapped model as two modules, for training code that calls an extractor and a classifier."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._errors import ArgumentError, RIDEError
from ride_plugin._output import ExpertOutput
from ride_plugin._split import (
    Pair,
    Recorded,
    SplitModule,
    plain_modules,
    reader_in,
    refuse_plain_state,
    tell_of_nothing_loaded,
)
from ride_plugin._tree import OF_MODULES, Path, at_path

Combine = Callable[[Sequence[Tensor]], "Tensor | ExpertOutput"]
"""What a wrapped model makes of its experts' logits."""


class _Reached(Exception):
    """Unwinds an expert at its classifier; never leaves the library."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


class _Stop:
    """Pre-hook of the classifiers while one thread wants the features only."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() == self.thread:
            raise _Reached(args[0])


class _Half(nn.Module):
    """Holds some of a model's parameters and leads to the model, which is not registered in it."""

    def __init__(self, model: SplitModule) -> None:
        super().__init__()
        self.__dict__["model"] = model
        self.training = model.training

    def train(self, mode: bool = True) -> _Half:
        """Set the mode of this half, and the model's own."""
        super().train(mode)
        self.__dict__["model"].training = mode
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any module, and in the parts where the plain module has this attribute."""
        super().__setattr__(name, value)
        own = name.startswith("_") or hasattr(nn.Module, name) or name in OF_MODULES
        if own or isinstance(value, nn.Module | nn.Parameter) or "experts" not in self._modules:
            return
        for part in (*self.shared(), *self.get_submodule("experts").children()):
            if not isinstance(getattr(part, name, part), nn.Module | Tensor):
                setattr(part, name, value)

    def shared(self) -> Sequence[nn.Module]:
        """The modules of this half that exist once, in the trunk."""
        return ()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As for any module."""
        found = super().load_state_dict(state_dict, strict, assign)
        tell_of_nothing_loaded(state_dict, found.unexpected_keys)
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)  # with hooks, which may rename
        refuse_plain_state(state_dict, prefix, self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Half:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.__dict__["model"].relink()
        return self


class ExpertFeatures(_Half):
    """The trunk and every expert's feature extractor: returns features ``[B, E * D]``.

    The features of all experts stand side by side; where the extractor returned a tuple, so does
    this, with None in the other places.
    """

    def __init__(self, model: SplitModule, output: Any, path: Path) -> None:
        super().__init__(model)
        self.trunk = model.trunk
        self.place = _place(output, path)
        self.experts = nn.ModuleList(  # last: what is set from here on, the parts have as well
            expert.get_submodule("feature_extractor") for expert in model.experts
        )

    def shared(self) -> Sequence[nn.Module]:
        """The extractor's part in the trunk."""
        return (self.trunk.get_submodule("feature_extractor"),)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the trunk once and every expert up to its classifier."""
        if getattr(self, "_is_replica", False):
            raise RIDEError(
                "DataParallel cannot run the two halves of a wrapped model on several devices. "
                "Use one process for each device (DistributedDataParallel), or the model itself."
            )
        model, stop = self.__dict__["model"], _Stop()
        state = model.run_trunk(*args, **kwargs)
        handles = [
            expert.get_submodule("classifier").register_forward_pre_hook(stop)
            for expert in model.experts
        ]
        features = []
        try:
            for index in range(model.num_experts):
                try:
                    model.run_expert(index, state)
                except _Reached as reached:
                    features.append(reached.features)
        finally:
            for handle in handles:
                handle.remove()
        return _filled(self.place, torch.cat(features, dim=1))


class ExpertClassifiers(_Half):
    """Every expert's classifier on its own part of the features ``[B, E * D]``.

    Returns what the wrapped model returns; where the classifier returned a tuple, so does this,
    with None in the other places.
    """

    def __init__(
        self, model: SplitModule, output: Any, path: Path, combine: Combine, width: int
    ) -> None:
        super().__init__(model)
        self.path = path
        self.place = _place(output, path)
        self.combine = combine
        self.width = width
        self.experts = nn.ModuleList(expert.get_submodule("classifier") for expert in model.experts)

    def forward(self, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run each classifier on its expert's features; further arguments go to each of them."""
        number = len(self.experts)
        columns = number * self.width
        if not isinstance(features, Tensor) or features.shape[1:2] != (columns,):
            came = f"{list(features.shape)}" if isinstance(features, Tensor) else repr(features)
            raise ArgumentError(
                f"Expected argument `features` to be [B, {columns}], the features of {number} "
                f"experts side by side, but got {came}. Pass what the first half returned."
            )
        each = [
            at_path(head(part, *args, **kwargs), self.path)
            for head, part in zip(self.experts, features.chunk(number, dim=1), strict=True)
        ]
        return _filled(self.place, self.combine(each))


def halves_of(model: SplitModule, combine: Combine) -> tuple[ExpertFeatures, ExpertClassifiers]:
    """The two modules of a model that was made of a pair.

    Raises:
        ArgumentError: it was not.
    """
    pair = model.experts[0]
    if not isinstance(pair, Pair):
        raise ArgumentError(
            "Expected a model made by `RIDEWrapper.from_pair(feature_extractor, classifier)`, but "
            "this one was made of a single backbone. Call it as a whole."
        )
    if any(isinstance(module, Recorded) for module in pair.classifier.modules()):
        raise ArgumentError(
            f"Expected every expert to have a classifier of its own, but the fork is at "
            f"{model.fork_at!r}, inside it. Pass `fork_at='classifier'`, or the name of a "
            "submodule of the feature extractor."
        )
    plain = plain_modules(model.parts(), [0])[0].eval()
    args, kwargs = model.example_input(2)
    with torch.no_grad():
        output = plain.get_submodule("feature_extractor")(*args, **kwargs)
        features = pair.features_in(output)
        returned = plain.get_submodule("classifier")(features)
    first = pair.place_of_features(output)
    second = reader_in(pair).place_in(returned)
    if first is None or second is None:
        raise ArgumentError(
            "Expected features and logits to be entries of what the two modules return, but a "
            "function computes them (`features=`, `logits=`). Call the model as a whole."
        )
    return (
        ExpertFeatures(model, output, first),
        ExpertClassifiers(model, returned, second, combine, features.shape[1]),
    )


def _place(output: Any, path: Path) -> Any:
    """The containers of ``output`` with ``...`` at ``path`` and None everywhere else."""
    if not path:
        return ...
    first, rest = path[0], path[1:]
    if isinstance(output, Mapping):
        return {key: _place(v, rest) if key == first else None for key, v in output.items()}
    names = list(getattr(output, "_fields", range(len(output))))
    index = first % len(output) if isinstance(first, int) else names.index(first)
    items = [_place(v, rest) if k == index else None for k, v in enumerate(output)]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def _filled(place: Any, value: Any) -> Any:
    """``place`` with ``value`` where it has ``...``."""
    if place is ...:
        return value
    if isinstance(place, dict):
        return {key: _filled(item, value) for key, item in place.items()}
    if isinstance(place, list | tuple):
        items = [_filled(item, value) for item in place]
        return type(place)(*items) if hasattr(place, "_fields") else type(place)(items)
    return None
