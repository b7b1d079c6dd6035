"""The values that construction hands from step to step: a split backbone, then a model's parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ride_plugin._contexts import random_state_kept
from ride_plugin._errors import SplitError
from ride_plugin._inputs import Inputs, own_inputs
from ride_plugin._split._copying import copy_with_hooks, frozen_layers, unchanging
from ride_plugin._split._cut._features import features_of
from ride_plugin._split._cut._learn import throwaway
from ride_plugin._split._cut._unseen import watch_unseen
from ride_plugin._split._cut._views import Link, Views
from ride_plugin._split._examine import Call, is_same_tensor, on_meta
from ride_plugin._split._replay import (
    Layout,
    Running,
    TrunkState,
    play,
    read_attributes,
    record,
    write_attributes,
)
from ride_plugin._tree import Place, logits_in


@dataclass
class Split:
    """A backbone cut in two, with one expert that is an exact copy of its forked part.

    Attributes:
        views: the trunk and the expert.
        layouts: what crosses the cut, for each path seen (evaluation, training).
        attributes: plain attributes that the trunk sets, put back before each expert.
        late: attributes and buffers outside units that the code after the fork sets or fills, so
            that they are each expert's own.
        inputs: an example of two rows.
        num_classes: ``C``.
        fork_at: name of the first forked submodule.
        classifier: name of the classifier inside an expert, or None if there is no such module.
        doubt: why the fork that was chosen makes little sense, in words.
        sequence: what to say of code that takes the backbone's output apart, a tuple or a list,
            and whether it is one in training alone.
        calls: those of the backbone's forward in evaluation mode.
        state: what the trunk returned for three rows in evaluation mode.
        unseen: names of modules outside all units that were not called, which the trunk holds.
        differs: where an expert's whole output differs from the backbone's, in words.
        kept: attributes and buffers of an expert that hold something of each row for its next call.
        asked: names of units whose class the forward asks for where a stand-in answers.
    """

    views: Views
    layouts: list[Layout]
    attributes: list[Place]
    late: list[Place]
    inputs: Inputs
    num_classes: int
    fork_at: str
    classifier: str | None
    doubt: str | None = None
    sequence: tuple[str, bool] | None = None
    calls: Call | None = None
    state: TrunkState | None = None
    unseen: Sequence[str] = ()
    differs: str | None = None
    kept: Sequence[Place] = ()
    asked: Sequence[str] = ()


@dataclass
class Parts:
    """What a :class:`SplitModule` is made of: one trunk, every expert, and what runs them.

    Attributes:
        trunk: runs the shared part; its forked units lead to expert 0.
        experts: each runs the rest.
        running: the pass in progress, shared by all hooks and stand-ins.
        links: tensors that one side reads and the other owns.
        layouts, attributes, late, inputs, num_classes, fork_at, classifier: as in :class:`Split`.
        num_probed: how many leading experts to probe when learning a layout: 1 if all are copies,
            all of them if each was made by itself.
        redrawn: names, inside an expert, of trainable parameters that were drawn anew for each
            expert beside frozen ones.
        written: names of parameters and buffers that a forward writes.
        differs, kept, asked: as in :class:`Split`.
    """

    trunk: nn.Module
    experts: Sequence[nn.Module]
    running: Running
    links: list[Link]
    layouts: list[Layout]
    attributes: list[Place]
    late: list[Place]
    inputs: Inputs
    num_classes: int
    fork_at: str
    classifier: str | None
    num_probed: int = 1
    redrawn: Sequence[str] = ()
    written: frozenset[str] = frozenset()
    differs: str | None = None
    kept: Sequence[Place] = ()
    asked: Sequence[str] = ()

    def classifiers(self) -> list[nn.Module]:
        """The classifier of each expert; none if it is no submodule."""
        if self.classifier is None:
            return []
        return [expert.get_submodule(self.classifier) for expert in self.experts]

    def views(self, index: int) -> Views:
        """The trunk and one expert, for a trial on throwaway copies."""
        return Views(self.trunk, self.experts[index], self.running, [], [], self.written)


def replicate(split: Split, num_experts: int) -> Parts:
    """The split's own expert and exact copies of it, ``num_experts`` in all.

    What no training changes is not copied: all experts hold the same tensors.
    """
    experts, links = [split.views.expert], list(split.views.links)
    for _ in range(num_experts - 1):
        expert, own_links = _another_expert(split.views)
        experts.append(expert)
        links += own_links
    return parts_of(split, experts, links)


def parts_of(
    split: Split, experts: Sequence[nn.Module], links: list[Link], num_probed: int = 1
) -> Parts:
    """The parts of a model with the split's trunk and these experts."""
    if len(experts) > 1:
        watch_unseen(experts, links, split.unseen, split.views.running)
    return Parts(
        split.views.trunk,
        experts,
        split.views.running,
        links,
        split.layouts,
        split.attributes,
        split.late,
        split.inputs,
        split.num_classes,
        split.fork_at,
        split.classifier,
        num_probed,
        written=split.views.written,
        differs=split.differs,
        kept=split.kept,
        asked=split.asked,
    )


def trial_run(
    parts: Parts, index: int, inputs: Inputs, rows: Tensor | None = None, meta: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits ``[B, C]`` and features ``[B, D]`` of one expert, computed on throwaway copies.

    Args:
        parts: left as they are, whatever the backbone's forward changes.
        index: the expert.
        inputs: what the trunk receives, in evaluation mode.
        rows: int64 ``[b]``, the rows that go on into the expert; None for all.
        meta: return tensors without contents; it raises where the backbone looks at values.
    """
    with torch.no_grad(), random_state_kept(parts.trunk):
        views = throwaway(parts.views(index), training=False, meta=meta)
        start = read_attributes(views.trunk, parts.attributes)
        with on_meta(own_inputs(inputs), meta) as (args, kwargs):
            state, _ = record(
                views.trunk, views.running, parts.layouts, args, kwargs, stop_at_fork=True
            )
            write_attributes(views.expert, parts.attributes, start)
            state = state if rows is None else state.select(rows)
            output = play(views.expert, views.running, state)
    logits = logits_in(output)
    if logits is None:
        raise SplitError("The expert returned no logits [B, C].")
    features = features_of(views.running.features, views.running.returned, logits)
    return logits, logits if features is None else features


def feature_dim_of(parts: Parts) -> tuple[int, bool]:
    """``D``, the number of features that the experts' classifiers receive.

    Returns:
        ``D``, and whether what a classifier receives is the logits themselves, which it changes in
        place or hands on.

    Raises:
        SplitError: an expert returns another number of classes than it should.
    """
    try:
        try:
            logits, features = trial_run(parts, 0, parts.inputs, meta=True)
        except Exception:
            logits, features = trial_run(parts, 0, parts.inputs)
    except (RuntimeError, TypeError) as error:
        raise SplitError(
            f"The experts do not run with new classifiers ({error}): the backbone computes its "
            "logits from more than one. Change it before wrapping, and leave `classifier=` and "
            "`num_classes=` out."
        ) from error
    if logits.shape[1] != parts.num_classes:
        raise SplitError(
            f"Expected the experts to return logits of {parts.num_classes} classes, but they "
            f"return {logits.shape[1]}. A `classifier=` function has to return a module with "
            f"{parts.num_classes} outputs, its second argument; another number of classes is "
            "asked for by `num_classes=`."
        )
    return features.shape[1], is_same_tensor(logits, features)


def _another_expert(views: Views) -> tuple[nn.Module, list[Link]]:
    """Copy the expert; what belongs to the trunk or is frozen stays shared, ties stay ties."""
    memo = views.memo_onto(views.trunk, views.running)
    frozen = frozen_layers(views.expert, views.trunk.training)
    memo.update(unchanging(views.expert, frozen, views.written))
    mine = (views.expert, views.expert_links)
    expert, links = copy_with_hooks(mine, views.expert.modules(), memo)
    return expert, links
