"""An attempt at a cut: what crosses it on every path, and whether both sides are the backbone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import nn

from ride_plugin._contexts import in_mode
from ride_plugin._errors import RIDEError, SplitError
from ride_plugin._split._copying import running_copy
from ride_plugin._split._cut import Lesson, Split, Views, learn, place_of, unseen_modules
from ride_plugin._split._examine import Call, Examined, refuse_third_row
from ride_plugin._split._replay import Layout, TrunkState, read_attributes, watch_classifier
from ride_plugin._split._saving import refuse_unsavable
from ride_plugin._split._verify import (
    WrittenBehind,
    check,
    kept_rows,
    refuse_feedback,
    refuse_reading_ahead,
)
from ride_plugin._tree import Place, dotted


def learned(
    source: nn.Module,
    views: Views,
    seen: Examined,
    fork_at: str,
    forked_units: list[str],
    outside: Collection[str] = (),
    cut: Callable[[frozenset[str]], Views] | None = None,
) -> Split:
    """Learn what crosses the cut between two views of a backbone, and check that they are it.

    Args:
        source: the backbone, or a copy of it that shares its parameters with the views.
        views: the trunk and an expert.
        seen: what one forward of it shows.
        fork_at: name of the first forked submodule.
        forked_units: names of the submodules that an expert owns.
        outside: names of tensors that belong to no unit, which either side may own.
        cut: makes the views anew, with those tensors that experts own.

    Raises:
        SplitError: they compute something else than the backbone, or mix rows.
    """
    attempt = _Attempt(source, views, seen, fork_at, outside, cut)
    found = None
    if seen.by_shapes:
        with suppress(Exception):  # almost free, but a backbone may look at values
            found = attempt.tried(meta=True)
    try:
        split, written, state = found or attempt.tried(meta=False)
    except RIDEError as error:
        collected = _collected(seen.root, forked_units)
        if not collected:
            raise
        raise SplitError(f"{error}{collected}") from error
    except Exception as error:
        refuse_third_row(in_mode(running_copy(source, (source,)), False), seen.inputs)
        advice = _collected(seen.root, forked_units)
        raise SplitError(
            f"Cannot split the backbone at {fork_at!r}: its forward runs as a whole, but fails "
            f"when an expert takes up what the trunk left ({type(error).__name__}: {error}). "
            "Its late part seems to need something of its early part that is no tensor, a "
            "cache say (Hugging Face's is switched off by `config.use_cache = False`), or that "
            "a hook leaves on the model (hand it on in the forward instead); or it takes "
            "batches of two rows only (ask for `x.size(0)`); or a module keeps something of each "
            "row from call to call, a membrane potential say (begin anew where the number of rows "
            "is another: `if self.v.shape != x.shape:`); or the forward copies a module "
            "before the fork (copy it in a submodule that holds it). Pass another `fork_at=`, "
            "or write trunk and experts as modules of their own and use "
            f"`RIDEWrapper.from_parts`.{advice}"
        ) from error
    name = seen.classifier
    classifier = name if name is not None and _is_in(name, forked_units) else None
    watch_classifier(split.views.expert, classifier, split.views.running)
    refuse_unsavable(source, split.views.trunk, split.views.expert)
    views = replace(split.views, written=split.views.written | written)
    # More attributes may start where the trunk started than were known when it ran.
    state = replace(state, attributes=read_attributes(views.expert, split.attributes))
    return replace(
        split,
        views=views,
        classifier=classifier,
        calls=seen.root,
        state=state,
        unseen=unseen_modules(views.trunk, attempt.spine, attempt.trees.values()),
        kept=kept_rows(replace(split, views=views), state, seen.root.changed),
    )


class _Attempt:
    """A cut while it is learned; for the arguments see :func:`learned`.

    Attributes:
        trees: the calls of one forward, by mode.
        spine: names of modules whose own forward runs on both sides.
    """

    def __init__(
        self,
        source: nn.Module,
        views: Views,
        seen: Examined,
        fork_at: str,
        outside: Collection[str],
        cut: Callable[[frozenset[str]], Views] | None,
    ) -> None:
        self._source = source
        self._views = views
        self._seen = seen
        self._fork_at = fork_at
        self._outside = outside
        self._cut = cut
        self._behind: set[str] = set()  # tensors outside units that were seen to be written behind
        self.trees = {False: seen.root}
        if seen.training_root is not None:
            self.trees[True] = seen.training_root
        names = {id(module): name for name, module in views.trunk.named_modules()}
        self.spine = {names[id(module)] for module, _ in views.spine}
        trees = self.trees.values()
        self._changed = {p for tree in trees for p in tree.changed if p[0] in self.spine}
        self._changed |= {  # on the meta device their draws leave no mark
            (name, key)
            for name in self.spine
            for key, value in vars(views.trunk.get_submodule(name)).items()
            if isinstance(value, torch.Generator)
        }

    def tried(self, meta: bool) -> tuple[Split, frozenset[str], TrunkState]:
        """The split, once it has been compared with the backbone; what that writes; its state."""
        lessons = self._lessons(meta)
        split, left = self._united(lessons)
        if any(lesson.ahead for lesson in lessons):
            refuse_reading_ahead(split)
        try:
            written, state, differs = check(self._source, split)
        except WrittenBehind as found:  # which only values show, as with `self.queue.data`
            if self._cut is None or found.names <= self._behind:
                raise SplitError(str(found)) from None
            self._behind.update(found.names)
            split, left = self._united(lessons)
            written, state, differs = check(self._source, split)
        if left:
            own = refuse_feedback(split, left)
            # What is the same for every expert starts where the trunk started: a count, say.
            same = [place for place in split.late if place in self._changed and place not in own]
            split = replace(split, attributes=sorted({*split.attributes, *same}))
        return replace(split, differs=differs), written, state

    def _lessons(self, meta: bool) -> list[Lesson]:
        """What crosses the cut on each path: both modes, cold and warm."""
        attributes = sorted(self._changed)  # `RANDOM` among them where the forward draws with numpy
        lessons: list[Lesson] = []
        for mode, warm in product(self.trees, (False, True) if attributes else (False,)):
            # A second lesson on one path teaches about state outside units only.
            once = not (self._outside or attributes)
            lesson = learn(
                self._views,
                self._seen.inputs,
                mode,
                attributes,
                outside=self._outside,
                warm=warm,
                known=[lesson.layout.path for lesson in lessons] if once else (),
                meta=meta,
            )
            if lesson is not None:
                lessons.append(lesson)
        return lessons

    def _united(self, lessons: list[Lesson]) -> tuple[Split, set[Place]]:
        """The split that fits all lessons, and the places where experts leave something."""
        layouts: dict[tuple[Any, ...], Layout] = {}
        for lesson in lessons:
            layouts.setdefault(lesson.layout.path, lesson.layout)
        writes = self._behind.union(*(lesson.writes for lesson in lessons))
        early = {place for lesson in lessons for place in lesson.early}
        late = {place for lesson in lessons for place in lesson.late}
        streams = {p for p in early if isinstance(self._attribute(p), torch.Generator)}
        if streams & late:
            raise SplitError(
                f"Cannot split the backbone at {self._fork_at!r}: it draws random numbers from a "
                f"generator of its own, `{dotted(*min(streams & late))}`, before "
                "and after the fork, so that trunk and experts would not follow one sequence. "
                "Draw from torch's common generator, or give each side one of its own."
            )
        # Read by experts only, on every path; or written by them, on any.
        forked = frozenset.intersection(*(lesson.reads for lesson in lessons)) | writes
        views = self._cut(forked) if self._cut is not None and forked else self._views
        split = Split(
            replace(views, written=views.written | writes),
            list(layouts.values()),
            sorted(early - streams),  # an expert's draws nothing
            sorted(late),
            self._seen.inputs,
            self._seen.num_classes,
            self._fork_at,
            None,
        )
        return split, late | {place_of(name) for name in writes}

    def _attribute(self, place: Place) -> Any:
        return vars(self._views.trunk.get_submodule(place[0])).get(place[1])


def _collected(root: Call, forked_units: list[str]) -> str:
    """What to say where hooks may collect what modules before the fork return; else nothing."""
    if root.hooked is None or _is_in(root.hooked, forked_units):
        return ""
    return (
        f" (Hooks stand on modules before the fork, first on `{root.hooked}`. If the forward "
        "computes with what they collect, a weighted sum of layers say, all of these modules have "
        f"to run in each expert: pass `fork_at={root.hooked!r}`.)"
    )


def _is_in(name: str, units: list[str]) -> bool:
    return any(f"{name}.".startswith(f"{unit}.") for unit in units)
