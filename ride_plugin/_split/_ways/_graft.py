"""Experts taken from networks of their own, put onto one trunk.

Each network is split by itself, with all the checks of a build; then its forked half is copied so
that whatever led to its own trunk leads to the common one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from ride_plugin._errors import ArgumentError, RIDEError, SplitError, warn_caller
from ride_plugin._inputs import resize_batch
from ride_plugin._split._build import split_backbone
from ride_plugin._split._copying import copy_with_hooks
from ride_plugin._split._cut import Parts, Split, parts_of, trial_run
from ride_plugin._split._examine import Choice
from ride_plugin._split._replay import Forked, Layout
from ride_plugin._tree import Place


def graft_experts(
    split: Split,
    factory: Callable[[int], nn.Module],
    num_experts: int,
    logits: Choice = None,
    num_classes: int | None = None,
) -> Parts:
    """The split's trunk with the forked halves of ``factory(0), factory(1), ...`` as experts.

    Args:
        split: of the backbone.
        factory: makes a network for each expert.
        num_experts: ``E``.
        logits: where they are in the backbone's output, and in that of each network.
        num_classes: what the user said; if it is the backbone's own number, it confirms what the
            networks return as it confirms the backbone's output.

    Raises:
        SplitError: a network does not fit the trunk; the message says which and why.
    """
    confirmed = num_classes if num_classes == split.num_classes else None
    networks = [module_from(factory, index) for index in range(num_experts)]
    grafted: list[Split] = []
    for index, network in enumerate(networks):
        try:
            other = split_backbone(network, split.fork_at, split.inputs, logits, confirmed)
            grafted.append(_transplanted(split, other))
        except (SplitError, AttributeError) as error:
            raise SplitError(f"`expert_factory({index})` does not fit: {error}") from error
    # What the trunk reads of its expert (a pass may go on into expert 0), it reads of the new one.
    first, names = grafted[0].views, {id(m): n for n, m in split.views.expert.named_modules()}
    for link in split.views.links:
        if id(link.owner) in names:
            owner = first.expert.get_submodule(names[id(link.owner)])
            first.links.append(replace(link, owner=owner))
    for other in grafted:
        other.views.expert.train(split.views.expert.training)
    return unite(split, grafted)


def unite(base: Split, splits: Sequence[Split]) -> Parts:
    """The parts of a model whose experts come from several splits of ``base``'s trunk.

    Raises:
        SplitError: the experts differ in what a model needs equal, or do not run on the trunk.
    """
    layouts, attributes, late = base.layouts, set(base.attributes), set(base.late)
    kept: set[Place] = set()
    for index, split in enumerate(splits):
        try:
            _check_alike(split, base)
            layouts = _joined(layouts, split.layouts)
        except SplitError as error:
            raise SplitError(f"`expert_factory({index})` does not fit: {error}") from error
        attributes |= set(split.attributes)
        late |= set(split.late)
        kept |= set(split.kept)
    experts = [split.views.expert for split in splits]
    links = [link for split in splits for link in split.views.links]
    for module in base.views.trunk.modules():
        if isinstance(module, Forked):
            module.ride_stand_for(experts[0])
    for link in links:
        link.refresh()
    written = frozenset[str]().union(*(split.views.written for split in (base, *splits)))
    views = replace(base.views, written=written)
    common = replace(
        base,
        views=views,
        layouts=layouts,
        attributes=sorted(attributes),
        late=sorted(late),
        kept=sorted(kept),
    )
    parts = parts_of(common, experts, links, num_probed=len(experts))
    _check_runs(parts)
    _warn_if_equal(experts)
    return parts


def module_from(factory: Callable[[int], nn.Module], index: int) -> nn.Module:
    """What a factory returns for an index.

    Raises:
        ArgumentError: it is no module.
    """
    network = factory(index)
    if not isinstance(network, nn.Module):
        raise ArgumentError(
            "Expected argument `expert_factory` to be a function of the expert's index that "
            f"returns a torch.nn.Module, but for {index} it returned {type(network).__name__}."
        )
    return network


def _check_alike(other: Split, split: Split) -> None:
    if other.num_classes != split.num_classes:
        raise SplitError(f"it has {other.num_classes} classes, the backbone {split.num_classes}.")
    if other.classifier != split.classifier:
        raise SplitError(
            f"its classifier is `{other.classifier}`, the backbone's is `{split.classifier}`."
        )


def _joined(ours: list[Layout], theirs: list[Layout]) -> list[Layout]:
    paths = {layout.path: layout for layout in theirs}
    if ours[0].path not in paths:  # the first is that of evaluation
        raise SplitError("before the fork it runs other operations than the backbone.")
    return [
        layout.joined(paths[layout.path]) if layout.path in paths else layout for layout in ours
    ]


def _transplanted(split: Split, other: Split) -> Split:
    """``other`` with a copy of its expert that runs on ``split``'s trunk instead of its own."""
    trunk, views = split.views.trunk, other.views
    memo = views.memo_onto(trunk, split.views.running)
    mine = (views.expert, views.expert_links)
    expert, links = copy_with_hooks(mine, views.expert.modules(), memo)
    expert.to(next(trunk.parameters(), torch.empty(0, device="cpu")).device)
    views = replace(
        views, trunk=trunk, expert=expert, running=split.views.running, links=links, spine=[]
    )
    return replace(other, views=views)


def _check_runs(parts: Parts) -> None:
    inputs = resize_batch(parts.inputs, 2)
    sizes = set()
    for index in range(len(parts.experts)):
        try:
            logits, features = trial_run(parts, index, inputs)
            trial_run(parts, index, inputs, torch.tensor([1, 0], device=logits.device))
        except (RIDEError, RuntimeError) as error:
            raise SplitError(
                f"`expert_factory({index})` does not run on the backbone's trunk ({error}). Its "
                "forked part has to take what the trunk returns."
            ) from error
        sizes.add(features.shape[1])
    if len(sizes) > 1:
        raise SplitError(
            "Expected the experts' classifiers to receive features of one size, which the router "
            f"reads, but they receive {sorted(sizes)}. Give the experts equal last widths."
        )


def _warn_if_equal(experts: Sequence[nn.Module]) -> None:
    """Warn where a factory made two experts with the same weights."""
    states = [dict(expert.named_parameters()) for expert in experts]
    for k in range(1, len(states)):
        if states[0].keys() == states[k].keys() and all(
            torch.equal(tensor, states[k][name]) for name, tensor in states[0].items()
        ):
            warn_caller(
                f"`expert_factory` gave experts 0 and {k} equal weights. They receive equal "
                "gradients and stay equal unless something tells them apart: initialise each anew."
            )
            return
