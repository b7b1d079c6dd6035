"""A wrapped model as two modules, for training code that calls an extractor and a classifier."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from ride_plugin._errors import ArgumentError, ReplayError, RIDEError
from ride_plugin._names_read import may_be_set_late, names_read_by
from ride_plugin._output import ExpertOutput
from ride_plugin._split import (
    COMPILED_CALL,
    Holder,
    Pair,
    Recorded,
    SplitModule,
    StandIn,
    Unwinding,
    check_logits_of_half,
    is_same_tensor,
    own_containers,
    plain_modules,
    put_fork_hooks_first,
    reader_in,
    refuse_lost_dimension,
)
from ride_plugin._tree import OF_MODULES, Path, at_path, emptied, filled, tensors_in

Combine: TypeAlias = Callable[[Sequence[Tensor], bool], "Tensor | ExpertOutput"]
"""What a wrapped model makes of its experts' logits, in training mode or not."""

Around: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Makes the context that guards a pass of a wrapped model."""


class _Reached(Unwinding):
    """Unwinds an expert at its classifier."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


class _Stop:
    """Pre-hook of the classifiers while one thread wants the features only."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def install(self, classifier: nn.Module) -> RemovableHandle:
        """Register it before everybody's own hooks, which the second half runs."""
        handle = classifier.register_forward_pre_hook(self, prepend=True, with_kwargs=True)
        put_fork_hooks_first(classifier)
        return handle

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == self.thread:
            raise _Reached(next(tensors_in((args, kwargs))))


class _Half(Holder):
    """Holds some of a model's parameters and leads to the model, which is not registered in it.

    What it holds of its own has names that begin with ``ride_``: any other may be one of the plain
    module's.

    Attributes:
        called: what the pair calls the module of which this has the parts.
    """

    called = ""
    ride_around: Around
    ride_mentioned: frozenset[str]

    def __init__(self, model: SplitModule, around: Around) -> None:
        super().__init__()
        # Not registered: this is a part of it, and not the other way round.
        vars(self).update(ride_model=model, ride_around=around, ride_mentioned=frozenset())
        self.training = model.training

    def ride_hold(self, experts: Iterable[nn.Module]) -> None:
        """Hold each expert's module; what is set from here on, the parts have as well."""
        self.experts = nn.ModuleList(experts)
        names = [names_read_by(part) for part in self._real_parts()]
        vars(self)["ride_mentioned"] = frozenset().union(*names)

    @property
    def whole(self) -> SplitModule:
        """The model."""
        model: SplitModule = self.__dict__["ride_model"]
        return model

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this half, and the model's own; what was frozen stays in evaluation."""
        super().train(mode)
        self.whole.training = mode
        self.whole.eval_frozen_layers()
        return self

    def note_shared(self) -> None:
        """See the model's; this half holds some of its tensors."""
        self.whole.note_shared()

    def relink(self) -> None:
        """See the model's; this half holds some of its tensors."""
        self.whole.relink()

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any module, and in the parts where the plain module has this attribute.

        Raises:
            AttributeError: it is a submodule or a tensor, of which each part has its own.
        """
        own = hasattr(nn.Module, name) or name in OF_MODULES or name.startswith("ride_")
        if own or "experts" not in self._modules or name in self._modules:
            super().__setattr__(name, value)
            return
        added = name in self.ride_mentioned and may_be_set_late(value)
        parts = [part for part in self._real_parts() if added or hasattr(part, name)]
        if any(name in {*part._modules, *part._parameters, *part._buffers} for part in parts):
            raise AttributeError(
                f"Expected `{name}` to be replaced in the plain module before wrapping, but got "
                "another one for a half of the pair afterwards, which it would not run: it exists "
                "once in the trunk or once for each expert. Wrap a pair in which it is replaced, "
                f"or set it in the parts: `model.experts[k].{self.called}.{name}`, say."
            )
        held = [getattr(part, name, None) for part in parts]
        if not parts or not hasattr(type(self), name):
            super().__setattr__(name, value)
        if isinstance(value, nn.Module | nn.Parameter):
            return
        is_one = len(set(map(id, held))) == 1  # settings, say; a list that each fills is not
        for part in parts:
            setattr(part, name, value if is_one else own_containers(value))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copy.deepcopy(self.whole, memo)  # the parts by the model's own way, which survives more
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        held = {name: value for name, value in vars(self).items() if name != COMPILED_CALL}
        copied.__dict__ = copy.deepcopy(held, memo)
        return copied

    def shared(self) -> Sequence[nn.Module]:
        """The modules of this half that exist once, in the trunk."""
        return ()

    def _real_parts(self) -> list[nn.Module]:
        parts = (*self.shared(), *self.experts)
        return [part for part in parts if not isinstance(part, StandIn)]


class ExpertFeatures(_Half):
    """The trunk and every expert's feature extractor: returns features ``[B, E * D]``.

    The features of all experts stand side by side; where the extractor returned a tuple, so does
    this, with None in the other places.
    """

    called = "feature_extractor"

    def __init__(self, model: SplitModule, around: Around, place: Any, width: int) -> None:
        super().__init__(model, around)
        self.trunk = model.trunk
        self.ride_place = place
        self.ride_width = width
        self.ride_hold(expert.get_submodule(self.called) for expert in model.experts)

    def shared(self) -> Sequence[nn.Module]:
        """The extractor's part in the trunk."""
        return (self.trunk.get_submodule(self.called),)

    def parts_by_prefix(self) -> dict[str, nn.Module]:
        """The extractor's parts in trunk and experts by the prefix of their names."""
        return {f"trunk.{self.called}.": self.shared()[0], **super().parts_by_prefix()}

    def follow_with_inputs(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Keep the model's example input where the extractor is, which takes it."""
        self.whole.follow_with_inputs(fn)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the trunk once and every expert up to its classifier."""
        if getattr(self, "_is_replica", False):
            raise RIDEError(
                "DataParallel cannot run the two halves of a wrapped model on several devices. "
                "Use one process for each device (DistributedDataParallel), or the model itself."
            )
        self._check_parts()
        with self.ride_around():
            return filled(self.ride_place, torch.cat(self._features(args, kwargs), dim=1))

    def _features(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        model, stop = self.whole, _Stop()
        state = model.run_trunk(*args, **kwargs)
        handles = [stop.install(expert.get_submodule("classifier")) for expert in model.experts]
        features = []
        try:
            for index in range(model.num_experts):
                try:
                    model.run_expert(index, state)
                except _Reached as reached:
                    features.append(reached.features)
                    reached.call_hooks()
                else:
                    raise RIDEError(
                        f"Expert {index} went on where its classifier begins: a forward around it "
                        "catches whatever there is (`except:`). Catch `Exception` there."
                    )
        finally:
            for handle in handles:
                handle.remove()
        for each in features:
            refuse_lost_dimension(each)
            if each.shape[1:2] != (self.ride_width,):
                raise ReplayError(
                    f"Expected features [B, {self.ride_width}] of the extractor, as when the pair "
                    f"was wrapped, but got {list(each.shape)}. Parts of features that the loop "
                    "concatenates would be those of different experts, since the experts' features "
                    "stand side by side. Return features of that width from the extractor, with "
                    "zeros where this part has none, and add what was concatenated."
                )
        return features

    def _check_parts(self) -> None:
        """Raise RIDEError if this half does not hold what the model runs."""
        model = self.whole
        ours = (self.trunk, *self.experts)
        theirs = [expert.get_submodule(self.called) for expert in model.experts]
        if any(a is not b for a, b in zip(ours, (model.trunk, *theirs), strict=False)):
            raise RIDEError(
                "The first half of this pair holds another module than the model, which runs its "
                "own. Replace it in the model (`model.experts[k].feature_extractor = ...`), and "
                "then take the halves anew: `model.as_pair()`."
            )


class ExpertClassifiers(_Half):
    """Every expert's classifier on its own part of the features ``[B, E * D]``.

    Returns what the wrapped model returns; where the classifier returned a tuple, so does this,
    with None in the other places.
    """

    called = "classifier"

    def __init__(
        self,
        model: SplitModule,
        around: Around,
        place: Any,
        path: Path,
        combine: Combine,
        width: int,
        classifies_logits: bool,
    ) -> None:
        super().__init__(model, around)
        self.ride_path = path
        self.ride_place = place
        self.ride_combine = combine
        self.ride_width = width
        self.ride_classifies_logits = classifies_logits
        self.ride_hold(expert.get_submodule(self.called) for expert in model.experts)

    def forward(self, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run each classifier on its expert's features; further arguments go to each of them."""
        number = len(self.experts)
        columns = number * self.ride_width
        if not isinstance(features, Tensor) or features.shape[1:2] != (columns,):
            came = f"{list(features.shape)}" if isinstance(features, Tensor) else repr(features)
            raise ArgumentError(
                f"Expected argument `features` to be [B, {columns}], the features of {number} "
                f"experts side by side, but got {came}. Pass what the first half returned."
            )
        with self.ride_around():
            each = []
            for head, part in zip(self.experts, features.chunk(number, dim=1), strict=True):
                logits = at_path(head(part, *args, **kwargs), self.ride_path)
                check_logits_of_half(
                    logits,
                    part,
                    self.whole.num_classes,
                    classifies_logits=self.ride_classifies_logits,
                )
                each.append(logits)
            return filled(self.ride_place, self.ride_combine(each, self._trains()))

    def _trains(self) -> bool:
        """Whether the classifiers are in training mode, whatever was set on the first half since.

        They are asked and not this module, as the model sets the mode of its parts alone.
        """
        return any(part.training for part in self.experts)


def halves_of(
    model: SplitModule, combine: Combine, around: Around
) -> tuple[ExpertFeatures, ExpertClassifiers]:
    """The two modules of a model that was made of a pair.

    Args:
        model: the model.
        combine: makes of the experts' logits what the model returns.
        around: makes the context in which a half runs.

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
    places = _checked_place(output, first), _checked_place(returned, second)
    width, same = features.shape[1], is_same_tensor(at_path(returned, second), features)
    return (
        ExpertFeatures(model, around, places[0], width),
        ExpertClassifiers(model, around, places[1], second, combine, width, same),
    )


def _checked_place(output: Any, path: Path) -> Any:
    """See :func:`emptied`.

    Raises:
        ArgumentError: nothing that is like the output can be made of another tensor.
    """
    probe = object()
    try:
        place = emptied(output, path)
        if at_path(filled(place, probe), path) is probe:
            return place
    except Exception as error:  # whatever its class does where somebody copies it
        raise _not_alike(output) from error
    raise _not_alike(output)


def _not_alike(output: Any) -> ArgumentError:
    return ArgumentError(
        "Expected feature extractor and classifier to return tensors, or tuples, lists, dicts or "
        f"dataclasses that hold them, but got a {type(output).__name__}, of which none can be made "
        "with the values of all experts. Call the model as a whole."
    )
