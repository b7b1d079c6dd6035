"""A split backbone as one module: its trunk and its experts, run one at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from typing import Any, Self

import torch
from torch import Tensor, nn

from ride_plugin._contexts import evaluating, random_state_kept
from ride_plugin._errors import RIDEError
from ride_plugin._inputs import Inputs, resize_batch
from ride_plugin._split._analysis import layout_of
from ride_plugin._split._logits import LogitsReader, describe
from ride_plugin._split._parts import Parts
from ride_plugin._split._passes import play, pooled, read_attributes, record, write_attributes
from ride_plugin._split._probe import detached_activations
from ride_plugin._split._state import Layout, TrunkState
from ride_plugin._split._tape import places_of_units, watch_classifier
from ride_plugin._tree import logits_in, map_tensors


class SplitModule(nn.Module):
    """Trunk and experts; knows nothing of losses, routing or initialisation.

    Attributes:
        trunk: the shared part, under the backbone's names.
        experts: one forked part for each expert, under the backbone's names.
        num_experts: ``E``.
        num_classes: ``C``.
        fork_at: name of the first forked submodule.
        classifier_name: name of the classifier inside an expert; None if it is no submodule.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.num_experts = len(parts.experts)
        self.num_classes = parts.num_classes
        self.fork_at = parts.fork_at
        self.classifier_name = parts.classifier
        self._running = parts.running
        self._links = parts.links
        self._layouts = parts.layouts
        self._attributes = parts.attributes
        self._inputs = parts.inputs
        self._num_probed = parts.num_probed
        self.trunk = parts.trunk
        self.experts = nn.ModuleList(parts.experts)
        self._units = places_of_units(self.trunk)
        self.register_load_state_dict_post_hook(_relink)  # type: ignore[no-untyped-call]

    def parts(self) -> Parts:
        """What the model is made of now; the modules themselves, not copies."""
        return Parts(
            self.trunk,
            list(self.experts),
            self._running,
            self._links,
            self._layouts,
            self._attributes,
            self._inputs,
            self.num_classes,
            self.fork_at,
            self.classifier_name,
            self._num_probed,
        )

    @property
    def classifiers(self) -> list[nn.Module]:
        """The classifier of each expert, in order; for cRT, tau-normalisation and the like."""
        return self.parts().classifiers()

    def run_trunk(self, *args: Any, **kwargs: Any) -> TrunkState:
        """Run the shared part only; hand the result to :meth:`run_expert`."""
        before = read_attributes(self.trunk, self._attributes)
        self._keep_hooks()
        state, _ = record(self.trunk, self._running, self._layouts, args, kwargs, stop_at_fork=True)
        return self._settled(replace(state, attributes=before), args, kwargs)

    def start(self, *args: Any, **kwargs: Any) -> tuple[TrunkState, Tensor, Tensor]:
        """Run the shared part and expert 0 in one pass; equal to running one after the other.

        Returns:
            The state for the other experts, and expert 0's logits ``[B, C]`` and features
            ``[B, D]``, as :meth:`run_expert` returns them.
        """
        state, logits, features = self._first_expert(args, kwargs)
        return self._settled(state, args, kwargs), logits, features

    def run_expert(self, index: int, state: TrunkState) -> tuple[Tensor, Tensor]:
        """Run one expert on the trunk's state, or on some rows of it.

        Args:
            index: the expert, ``0 <= index < num_experts``.
            state: what :meth:`run_trunk` returned, or ``state.select(rows)``.

        Returns:
            Its logits ``[B, C]``, and what its classifier received, pooled to ``[B, D]``.
        """
        expert = self.experts[index]
        watch_classifier(expert, self.classifier_name, self._running)
        write_attributes(expert, self._attributes, state.attributes)
        self._running.features = None
        try:
            output = play(expert, self._running, state)
            return self._read(output)
        finally:
            self._running.features = None

    @contextmanager
    def evaluating(self) -> Iterator[Self]:
        """Evaluation mode for the duration of a block; every submodule's mode is restored."""
        with evaluating(self):
            yield self

    def example_input(self, batch_size: int = 1) -> Inputs:
        """Inputs ``(args, kwargs)`` that the backbone accepts, for cost reports and export."""
        return resize_batch(self._inputs, batch_size)

    def relink(self) -> None:
        """Follow tensors that something other than ``.to()`` or loading has replaced."""
        for link in self._links:
            link.refresh()

    def _all_experts(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[Tensor, Tensor]]:
        state, logits, features = self._first_expert(args, kwargs)
        rest = [self.run_expert(index, state) for index in range(1, self.num_experts)]
        return [(logits, features), *rest]

    def _first_expert(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[TrunkState, Tensor, Tensor]:
        changes = self.num_experts > 1 and any(known.changes_in_place for known in self._layouts)
        # Going on into expert 0 would let it write into what the others read, and would pass by the
        # hooks of the expert itself (FSDP2's gather its parameters); and DataParallel's replica of
        # the trunk leads to the original's expert, on another device.
        if changes or _is_hooked(self.experts[0]) or getattr(self, "_is_replica", False):
            state = self.run_trunk(*args, **kwargs)
            return (state, *self.run_expert(0, state))
        before = read_attributes(self.trunk, self._attributes)
        watch_classifier(self.experts[0], self.classifier_name, self._running)
        self._keep_hooks()
        self._running.features = None
        try:
            # The recording goes on into expert 0: one pass fewer over the backbone's own code.
            state, output = record(
                self.trunk, self._running, self._layouts, args, kwargs, stop_at_fork=False
            )
            return (replace(state, attributes=before), *self._read(output))
        finally:
            self._running.features = None

    def _settled(
        self, state: TrunkState, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TrunkState:
        if state.layout is None and not torch.compiler.is_compiling():
            # A path not seen at the build, for example padding at another input size.
            layout = self._learn_layout(args, kwargs)
            if layout is not None and layout.keys == state.keys:  # not where paths are random
                state = replace(state, layout=layout)
        return state.hollowed()

    def _keep_hooks(self) -> None:
        if not torch.compiler.is_compiling():
            for place in self._units:
                place.keep_hooks()

    def _read(self, output: Any) -> tuple[Tensor, Tensor]:
        logits = logits_in(output)
        features = pooled(self._running.features)
        if (
            logits is None
            or logits.shape[1] != self.num_classes
            or (features is None and self.classifier_name is not None)
        ):
            raise RIDEError(
                f"An expert returned {describe(output)}"
                + (", and its classifier did not run" if features is None else "")
                + f", where logits of {self.num_classes} classes were expected, as when the "
                "backbone was wrapped. A forward that is told by arguments to return something "
                "else cannot be trained this way: call the model for its logits. The experts' "
                "features come from `model.router_inputs(x)`, a plain backbone from "
                "`model.to_module(k)`; another number of classes is asked for when wrapping, by "
                "`num_classes=`."
            )
        # A classifier that is not a module of its own leaves no feature; its logits stand in.
        return logits, logits if features is None else features

    def _learn_layout(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout | None:
        layouts = []
        with random_state_kept(self):
            try:
                parts, training = self.parts(), self.trunk.training
                for index in range(self._num_probed):
                    views = parts.views(index)
                    layouts.append(layout_of(views, (args, kwargs), training, self._attributes))
            except RIDEError:
                return None  # every row can still go on; only `select` needs the layout
        if any(other.keys != layouts[0].keys for other in layouts):
            return None  # a random path
        layout = reduce(Layout.joined, layouts)
        if all(known.keys != layout.keys for known in self._layouts):
            self._layouts.append(layout)
        return layout

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Activations that a backbone keeps (`self.feat = out`) would make deepcopy fail.
        memo.update(detached_activations(self))
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._inputs = map_tensors(lambda example: _following(example, fn(example)), self._inputs)
        self.relink()
        return self


def _following(example: Tensor, moved: Tensor) -> Tensor:
    """The example input where the parameters are now, with its values: `to_empty` keeps none."""
    return example if moved.is_meta else example.to(moved.device, moved.dtype)


def _is_hooked(expert: nn.Module) -> bool:
    """Tell whether somebody has registered forward hooks on an expert itself."""
    ours = (isinstance(hook, LogitsReader) for hook in expert._forward_hooks.values())
    return bool(expert._forward_pre_hooks) or not all(ours)


def _relink(module: SplitModule, *_: Any) -> None:
    """Follow tensors that ``.to()`` or loading (with ``assign=True``) has replaced."""
    module.relink()
