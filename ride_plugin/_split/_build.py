"""Builds a split: a copy, one forward of it, the fork, two views, what crosses them, the check."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import nn

from ride_plugin._checks import refuse
from ride_plugin._contexts import in_mode, random_state_kept
from ride_plugin._errors import RIDEError, SplitError
from ride_plugin._split._copying import (
    running_copy,
    settings_at,
    warn_of_outside_hooks,
    written_parameters,
)
from ride_plugin._split._cut import (
    Split,
    Views,
    after_first_call,
    build_views,
    learn,
    place_of,
    refuse_unfit,
    sides,
    source_of,
    spine_tensors,
    unseen_modules,
)
from ride_plugin._split._examine import (
    Call,
    Choice,
    Examined,
    choose_fork,
    examine,
    refuse_third_row,
)
from ride_plugin._split._replay import Layout, TrunkState, read_attributes, watch_classifier
from ride_plugin._split._saving import refuse_unsavable, tell_of_hidden_parameters
from ride_plugin._split._verify import (
    WrittenBehind,
    check,
    kept_rows,
    refuse_feedback,
    refuse_reading_ahead,
    written_by_modes,
)
from ride_plugin._tree import Place, dotted


def split_backbone(
    backbone: nn.Module,
    fork_at: str | None,
    example_input: Any,
    logits: Choice = None,
    num_classes: int | None = None,
) -> Split:
    """Cut ``backbone`` at ``fork_at``; the backbone and the random state are left as they are.

    Args:
        backbone: any module that returns logits ``[B, C]``, or something that holds them.
        fork_at: name of the first forked submodule; None for the default.
        example_input: a batch for it; None to guess one.
        logits: where in its output the logits are; None to find them.
        num_classes: how many columns they have, or shall have; None for as many as there are.

    Raises:
        SplitError: it cannot be cut there; the message says what to pass.
    """
    if not isinstance(backbone, nn.Module):
        advice = "If that makes the network, pass what it returns: `RIDEWrapper(make(), ...)`."
        expected = "a torch.nn.Module that maps a batch to logits [B, C]"
        refuse("backbone", expected, backbone, advice if callable(backbone) else "")
    refuse_unfit(backbone)
    warn_of_outside_hooks(backbone)
    tell_of_hidden_parameters(backbone)
    with random_state_kept(backbone):
        written = written_by_modes(backbone)
        while True:
            source = source_of(backbone)
            try:
                split = _split(source, fork_at, example_input, logits, num_classes, written)
            except RIDEError:
                # A pass that wrote parameters, which copies share, spoils what comes after it.
                more = written_parameters(backbone, (source,))
                if more <= written:
                    raise
                written |= more
            else:
                more = written_parameters(backbone, (split.views.trunk, split.views.expert))
                if more <= written:
                    return split
                written |= more


def _split(
    source: nn.Module,
    fork_at: str | None,
    example_input: Any,
    logits: Choice,
    num_classes: int | None,
    written: frozenset[str],
) -> Split:
    """Cut ``source``, a copy of the backbone; its parameters become those of the split."""
    seen = examine(source, example_input, logits, num_classes, written)
    if seen.root.registers:
        source = after_first_call(source, seen.inputs, seen.settings, written)
        seen = examine(source, example_input, logits, num_classes, written)
    # Every copy of it returns its logits. A backbone that returns them alone for the example may
    # return more where it is given targets or a flag.
    source.register_forward_hook(seen.reader)
    fork = choose_fork(seen.root, fork_at)
    trunk_units, forked_units = sides(fork, seen.root, seen.training_root)
    settings = settings_at(source, seen.settings)

    def cut(forked_tensors: frozenset[str]) -> Views:
        views = build_views(source, trunk_units, forked_units, forked_tensors, settings)
        return replace(views, written=written)

    outside = spine_tensors(source, [*trunk_units, *forked_units])
    split = learned(source, cut(frozenset()), seen, fork.name, forked_units, outside, cut)
    doubt = None if fork_at is not None else fork.doubt
    return replace(split, doubt=doubt, sequence=seen.sequence)


def reason_of_fork(
    backbone: nn.Module,
    fork_at: str | None,
    example_input: Any,
    logits: Choice = None,
    num_classes: int | None = None,
) -> tuple[str, str]:
    """Where ``backbone`` is forked, and why there, in words."""
    refuse_unfit(backbone)
    with random_state_kept(backbone):
        seen = examine(source_of(backbone), example_input, logits, num_classes)
        fork = choose_fork(seen.root, fork_at)
    return fork.name, fork.reason


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
    trees = {False: seen.root}
    if seen.training_root is not None:
        trees[True] = seen.training_root
    names = {id(module): name for name, module in views.trunk.named_modules()}
    spine = {names[id(module)] for module, _ in views.spine}
    changed = {place for tree in trees.values() for place in tree.changed if place[0] in spine}
    changed |= {  # on the meta device their draws leave no mark
        (name, key)
        for name in spine
        for key, value in vars(views.trunk.get_submodule(name)).items()
        if isinstance(value, torch.Generator)
    }
    attributes = sorted(changed)  # `RANDOM` among them where the forward draws with numpy
    behind: set[str] = set()  # tensors outside units that were seen to be written by experts

    def lessons(meta: bool) -> tuple[Split, bool, set[Place]]:
        """What crosses the cut, for each path (both modes, cold and warm).

        Returns:
            The split, whether the trunk reads what experts own, and what experts leave.
        """
        layouts: dict[tuple[Any, ...], Layout] = {}
        reads: list[frozenset[str]] = []
        writes: set[str] = set(behind)
        early: set[Place] = set()
        late: set[Place] = set()
        ahead = False
        for mode, warm in product(trees, (False, True) if attributes else (False,)):
            lesson = learn(
                views,
                seen.inputs,
                mode,
                attributes,
                outside=outside,
                warm=warm,
                # A second lesson on one path teaches about state outside units only.
                known=() if outside or attributes else layouts,
                meta=meta,
            )
            if lesson is not None:
                reads.append(lesson.reads)
                writes |= lesson.writes
                early |= lesson.early
                late |= lesson.late
                ahead |= lesson.ahead
                layouts.setdefault(lesson.layout.path, lesson.layout)
        streams = {p for p in early if isinstance(_attribute(views.trunk, p), torch.Generator)}
        if streams & late:
            raise SplitError(
                f"Cannot split the backbone at {fork_at!r}: it draws random numbers from a "
                f"generator of its own, `{dotted(*min(streams & late))}`, before "
                "and after the fork, so that trunk and experts would not follow one sequence. "
                "Draw from torch's common generator, or give each side one of its own."
            )
        early -= streams  # an expert's draws nothing
        # Read by experts only, on every path; or written by them, on any.
        forked = frozenset.intersection(*reads) | writes
        split_views = cut(forked) if cut is not None and forked else views
        split_views = replace(split_views, written=split_views.written | writes)
        split = Split(
            split_views,
            list(layouts.values()),
            sorted(early),
            sorted(late),
            seen.inputs,
            seen.num_classes,
            fork_at,
            None,
        )
        return split, ahead, late | {place_of(name) for name in writes}

    def tried(meta: bool) -> tuple[Split, frozenset[str], TrunkState]:
        """The split, once it has been compared with the backbone; what that writes; its state."""
        split, ahead, left = lessons(meta)
        if ahead:
            refuse_reading_ahead(split)
        try:
            written, state, differs = check(source, split)
        except WrittenBehind as found:  # which only values show, as with `self.queue.data`
            if cut is None or found.names <= behind:
                raise SplitError(str(found)) from None
            behind.update(found.names)
            split, ahead, left = lessons(meta)
            written, state, differs = check(source, split)
        if left:
            own = refuse_feedback(split, left)
            # What is the same for every expert starts where the trunk started: a count, say.
            same = [place for place in split.late if place in changed and place not in own]
            split = replace(split, attributes=sorted({*split.attributes, *same}))
        return replace(split, differs=differs), written, state

    found = None
    if seen.by_shapes:
        with suppress(Exception):  # almost free, but a backbone may look at values
            found = tried(meta=True)
    try:
        split, written, state = found or tried(meta=False)
    except Exception as error:
        collected = _collected(seen.root, forked_units)
        if isinstance(error, RIDEError):
            if not collected:
                raise
            raise SplitError(f"{error}{collected}") from error
        refuse_third_row(in_mode(running_copy(source, (source,)), False), seen.inputs)
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
            f"`RIDEWrapper.from_parts`.{collected}"
        ) from error
    name = seen.classifier
    classifier = name if name is not None and _is_in(name, forked_units) else None
    watch_classifier(split.views.expert, classifier, split.views.running)
    refuse_unsavable(source, split.views.trunk, split.views.expert)
    views = replace(split.views, written=split.views.written | written)
    # More attributes may start where the trunk started than were known when it ran.
    state = replace(state, attributes=read_attributes(views.expert, split.attributes))
    kept = kept_rows(replace(split, views=views), state, seen.root.changed)
    unseen = unseen_modules(views.trunk, spine, trees.values())
    return replace(
        split,
        views=views,
        classifier=classifier,
        calls=seen.root,
        state=state,
        unseen=unseen,
        kept=kept,
    )


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


def _attribute(root: nn.Module, place: Place) -> Any:
    return vars(root.get_submodule(place[0])).get(place[1])
