"""Builds a split: a copy, one forward of it, the fork, two views, and what is learned of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ride_plugin._checks import refuse
from ride_plugin._contexts import random_state_kept
from ride_plugin._errors import RIDEError
from ride_plugin._split._attempt import learned
from ride_plugin._split._copying import (
    settings_at,
    warn_of_outside_hooks,
    written_parameters,
)
from ride_plugin._split._cut import (
    Split,
    Views,
    after_first_call,
    build_views,
    refuse_unfit,
    sides,
    source_of,
    spine_tensors,
)
from ride_plugin._split._examine import (
    Choice,
    choose_fork,
    examine,
)
from ride_plugin._split._replay import asked_for_classes
from ride_plugin._split._saving import tell_of_hidden_parameters
from ride_plugin._split._verify import (
    written_by_modes,
)


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
        answered = False  # to a forward that asks a stand-in for its class
        while True:
            source = source_of(backbone)
            try:
                with asked_for_classes(answered) as asked:
                    split = _split(source, fork_at, example_input, logits, num_classes, written)
            except RIDEError:
                # A pass that wrote parameters, which copies share, spoils what comes after it.
                more = written_parameters(backbone, (source,))
                if more <= written and (answered or not asked):
                    raise
                answered = answered or more <= written
                written |= more
            else:
                more = written_parameters(backbone, (split.views.trunk, split.views.expert))
                if more <= written:
                    return replace(split, asked=sorted(asked) if answered else [])
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
