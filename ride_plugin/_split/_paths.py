"""Ways through a forward: those that the build has seen, and those that training takes later."""

from __future__ import annotations

from functools import reduce

from torch import nn

from ride_plugin._contexts import random_state_kept
from ride_plugin._inputs import Inputs
from ride_plugin._split._learn import learn_at_run_time
from ride_plugin._split._logits import whole_outputs
from ride_plugin._split._observers import without_later
from ride_plugin._split._parts import Parts
from ride_plugin._split._state import Layout

_MOST_LAYOUTS = 64  # a number among the arguments may be another at each call
_MOST_LOOKS = 16  # each takes as long as a few passes; where paths are random they find nothing


class Paths:
    """What crosses the cut on each way through the forward that is known.

    Attributes:
        layouts: one for each path.
    """

    def __init__(self, layouts: list[Layout], hooks: frozenset[int]) -> None:
        self.layouts = layouts
        self._hooks = hooks  # numbers of those on trunk and experts, when the backbone was wrapped
        self._num_looks = 0

    def may_look(self) -> bool:
        """Whether to look for one more path in passing; each question counts."""
        self._num_looks += 1
        return self._num_looks <= _MOST_LOOKS

    def learn(self, model: nn.Module, parts: Parts, inputs: Inputs) -> Layout | None:
        """The layout of the path that these inputs take; None where it cannot be told."""
        memo = without_later((parts.trunk, *parts.experts), self._hooks)
        training, attributes = parts.trunk.training, parts.attributes
        with random_state_kept(model), whole_outputs():  # of no expert's own pass
            try:
                layouts = [
                    learn_at_run_time(parts.views(index), inputs, training, attributes, memo)
                    for index in range(parts.num_probed)
                ]
            except Exception:  # as a small batch of this kind does not run, say
                return None  # every row can still go on; only `select` needs the layout
        if any(other.path != layouts[0].path for other in layouts):
            return None  # a random path
        layout = reduce(Layout.joined, layouts)
        new = all(known.path != layout.path for known in self.layouts)
        if new and len(self.layouts) < _MOST_LAYOUTS:
            self.layouts.append(layout)
        return layout
