"""Ways through a forward: those that the build has seen, and those that training takes later."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from torch import nn

from ride_plugin._contexts import random_state_kept
from ride_plugin._distributed import running
from ride_plugin._errors import ReplayError, listed
from ride_plugin._inputs import Inputs
from ride_plugin._split._copying import held_by_all, weights_kept
from ride_plugin._split._cut import Parts, Split, learn_at_run_time, numbers_of_hooks, without_later
from ride_plugin._split._examine import whole_outputs
from ride_plugin._split._replay import Layout, TrunkState, form_of_inputs
from ride_plugin._split._verify import other_places, read_ahead, written_together
from ride_plugin._split._ways import output_of_backbone
from ride_plugin._tree import dotted, places_in

_MOST_LAYOUTS = 64  # a number among the arguments may be another at each call
_UNSEEN = "This call takes a path that was not seen when the model was wrapped, on which"
_MOST_LOOKS = 16  # each takes as long as a few passes; where paths are random they find nothing


class Paths:
    """What crosses the cut on each way through the forward that is known.

    Also whether an expert returns on it what the backbone does, where somebody asks for that.

    Attributes:
        layouts: one for each path.

    Args:
        layouts: those that the build has seen.
        hooks: torch's numbers of the hooks that trunk and experts had when they were wrapped.
    """

    def __init__(self, layouts: list[Layout], hooks: frozenset[int]) -> None:
        self.layouts = layouts
        self._hooks = hooks  # numbers of those that are no observers, on trunk and experts
        self._num_looks = 0
        self._compared: set[Any] = set()  # kinds of calls and of what they return

    def keep_hooks(self, roots: Sequence[nn.Module], first: int) -> None:
        """Take hooks with these numbers and above for a part of the computation."""
        self._hooks |= {number for number in numbers_of_hooks(roots) if number >= first}

    def may_look(self) -> bool:
        """Whether to look for one more path in passing; each question counts."""
        self._num_looks += 1
        return self._num_looks <= _MOST_LOOKS

    def learn(self, model: nn.Module, parts: Parts, inputs: Inputs) -> Layout | None:
        """The layout of the path that these inputs take; None where it cannot be told.

        Raises:
            ReplayError: on this path the trunk computes with what each expert has for itself, or
                experts write what the trunk has.
        """
        memo = without_later((parts.trunk, *parts.experts), self._hooks)
        training, attributes = parts.trunk.training, parts.attributes
        # Of no expert's own pass, and nothing of it stays.
        with random_state_kept(model), weights_kept(model), whole_outputs():
            try:
                lessons = [
                    learn_at_run_time(parts.views(index), inputs, training, attributes, memo)
                    for index in range(parts.num_probed)
                ]
            except Exception:  # as a small batch of this kind does not run, say
                return None  # every row can still go on; only `select` needs the layout
            if any(lesson.ahead for lesson in lessons):
                _refuse_reading_ahead(parts, inputs, memo)
            if len(parts.experts) > 1:
                _refuse_written_together(parts, inputs, memo)
        layouts = [lesson.layout for lesson in lessons]
        if any(other.path != layouts[0].path for other in layouts):
            return None  # a random path
        layout = reduce(Layout.joined, layouts)
        new = all(known.path != layout.path for known in self.layouts)
        if new and len(self.layouts) < _MOST_LAYOUTS:
            self.layouts.append(layout)
        return layout

    def lacking(self, model: nn.Module, parts: Parts, inputs: Inputs, output: Any) -> str | None:
        """What an expert's whole output lacks of the backbone's for these inputs, in words.

        Each kind of call is compared once. None where nothing is missing, or it cannot be told.

        Args:
            model: its random state is kept.
            parts: what it is made of.
            inputs: of its forward, or the trunk's state in their place.
            output: what an expert's forward returned.
        """
        stored = inputs[0][0] if inputs[0] and isinstance(inputs[0][0], TrunkState) else None
        inputs = inputs if stored is None else stored.values[0]
        ours = tuple(path for path, _ in places_in(output))
        kind = form_of_inputs(inputs), ours
        if kind in self._compared or len(self._compared) >= _MOST_LOOKS:
            return None
        # What no expert reads has no values in a stored state, and a pass with values of one rank
        # alone would wait for the others where a layer talks to them.
        for meta in (True,) if stored is not None or running() else (True, False):
            memo = without_later((parts.trunk, *parts.experts), self._hooks)
            try:
                with random_state_kept(model), weights_kept(model):
                    expected = output_of_backbone(parts, inputs, meta, memo)
            except Exception:  # as where the backbone looks at values
                continue
            if not {path for path, _ in places_in(expected)} <= {*ours}:
                return other_places(expected, output)
            break
        self._compared.add(kind)
        return None


def _refuse_written_together(parts: Parts, inputs: Inputs, memo: dict[int, Any]) -> None:
    training, attributes = parts.trunk.training, parts.attributes
    shared = held_by_all(parts.experts)
    for index in range(parts.num_probed):
        tensors, places = written_together(
            parts.views(index), inputs, training, attributes, memo, shared
        )
        if tensors:
            raise ReplayError(
                f"{_UNSEEN} what runs after the fork writes {listed(tensors)}, which the trunk "
                "holds, or experts share, so that every expert would write the same tensor. Wrap "
                "the backbone with an `example_input=` of this kind, so that each expert gets its "
                "own, and let the forward write it in training only (`if self.training:`). Where "
                "that is refused as well, pass `fork_at=` an earlier submodule, before the module "
                "that holds it is called first, or a later one, behind what writes it."
            )
        if places:
            raise ReplayError(
                f"{_UNSEEN} the forward changes {listed({dotted(*place) for place in places})}, "
                "which a module of the trunk holds, once in the trunk's pass and once more in "
                "each expert's. Change it in the forward of that module, or outside of the "
                "forward, in the training loop."
            )


def _refuse_reading_ahead(parts: Parts, inputs: Inputs, memo: dict[int, Any]) -> None:
    places = parts.attributes, parts.late
    split = Split(parts.views(0), [], *places, inputs, parts.num_classes, parts.fork_at, None)
    try:
        used = read_ahead(split, [parts.trunk.training], memo)
    except Exception:  # as a small batch of this kind does not run, say
        return
    if used:
        raise ReplayError(
            f"{_UNSEEN} the forward uses {listed(used)} before the fork, so that every expert "
            "would use those of expert 0. Use them in the forward of the module that holds them, "
            "or pass `fork_at=` an earlier submodule, and `example_input=` a call of this kind."
        )
