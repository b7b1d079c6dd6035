"""Experts taken from networks of their own, put onto one trunk.

Each network is split by itself, with all the checks of a build; then its forked half is copied so
that whatever led to its own trunk leads to the common one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ride_plugin._errors import ArgumentError, RIDEError, SplitError
from ride_plugin._inputs import resize_batch
from ride_plugin._split._build import split_backbone
from ride_plugin._split._module import SplitModule
from ride_plugin._split._parts import Split
from ride_plugin._split._state import Layout
from ride_plugin._split._tape import Forked
from ride_plugin._split._views import Link


def graft_experts(
    model: SplitModule, split: Split, factory: Callable[[int], nn.Module], num_experts: int
) -> None:
    """Give ``model``, built from ``split`` with one expert, the forked halves of ``factory(k)``.

    Raises:
        SplitError: a network does not fit the trunk; the message says which and why.
    """
    networks = [_network(factory, index) for index in range(num_experts)]
    old = split.views.expert
    experts, links, layouts = [], [], split.layouts
    attributes = set(split.attributes)
    for index, network in enumerate(networks):
        try:
            other = split_backbone(network, split.fork_at, split.inputs)
            _check_alike(other, split)
            layouts = _joined(layouts, other.layouts)
            expert, own_links = _expert_on(split, other)
        except (SplitError, AttributeError) as error:
            raise SplitError(f"`expert_factory({index})` does not fit: {error}") from error
        experts.append(expert)
        links += own_links
        attributes |= set(other.attributes)
    # What the trunk's pass reads of an expert (when it goes on into expert 0) follows.
    names = {id(module): name for name, module in old.named_modules()}
    for link in split.views.links:
        if id(link.owner) in names:
            links.append(replace(link, owner=experts[0].get_submodule(names[id(link.owner)])))
    for module in model.trunk.modules():
        if isinstance(module, Forked):
            module.stand_for(experts[0])
    model.num_experts = num_experts
    model.experts = nn.ModuleList(expert.train(old.training) for expert in experts)
    model._links = links
    model._layouts = layouts
    model._kinds = num_experts
    model._attributes = sorted(attributes)
    for link in links:
        link.refresh()
    _check_runs(model)


def _network(factory: Callable[[int], nn.Module], index: int) -> nn.Module:
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
    paths = {layout.keys: layout for layout in theirs}
    if ours[0].keys not in paths:  # the first is that of evaluation
        raise SplitError("before the fork it runs other operations than the backbone.")
    return [
        layout.joined(paths[layout.keys]) if layout.keys in paths else layout for layout in ours
    ]


def _expert_on(split: Split, other: Split) -> tuple[nn.Module, list[Link]]:
    """A copy of ``other``'s expert in which ``other``'s trunk is replaced by ``split``'s."""
    trunk, views = split.views.trunk, other.views
    memo: dict[int, Any] = {id(views.running): split.views.running}
    for name, module in views.trunk.named_modules(remove_duplicate=False):
        memo[id(module)] = trunk.get_submodule(name)
    for name, tensor in (
        *views.trunk.named_parameters(remove_duplicate=False),
        *views.trunk.named_buffers(remove_duplicate=False),
    ):
        path, _, attribute = name.rpartition(".")
        memo[id(tensor)] = getattr(trunk.get_submodule(path), attribute)
    inside = {id(module) for module in views.expert.modules()}
    links = [link for link in views.links if id(link.view) in inside]
    expert, links = copy.deepcopy((views.expert, links), memo)
    return expert.to(next(trunk.parameters(), torch.empty(0)).device), links


def _check_runs(model: SplitModule) -> None:
    args, kwargs = resize_batch(model._inputs, 2)
    rows = torch.tensor([1, 0])
    sizes = set()
    for index in range(model.num_experts):
        try:
            with model.evaluating(), torch.no_grad():
                state = model.run_trunk(*args, **kwargs)
                logits, features = model.run_expert(index, state)
                model.run_expert(index, state.select(rows.to(logits.device)))
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
