"""Trainable parameters whose values do not change the output yet, as in a fresh adapter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ride_plugin._contexts import random_state_kept
from ride_plugin._inputs import own_inputs
from ride_plugin._split._cut import Parts, Views, throwaway
from ride_plugin._split._replay import play, read_attributes, record, write_attributes
from ride_plugin._tree import logits_in


def inert_parameters(parts: Parts, redraw: Callable[[Tensor], object]) -> list[str]:
    """Names, inside an expert, of trainable parameters whose values do not change the output yet.

    The first matrix of a low-rank adapter is one while the second is zero. Such a parameter can be
    drawn anew for each expert without a change of what the pretrained network computes; any other
    may hold pretrained values. It is found by its gradient, which is zero; then other values are
    tried in its place.
    """
    with random_state_kept(parts.trunk), torch.enable_grad():
        views = throwaway(parts.views(0), training=False)
        before = _features(views, parts)
        candidates = {n: p for n, p in views.expert.named_parameters() if p.requires_grad}
        if not candidates or not before.requires_grad:
            return []
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(before.shape, generator=generator, device="cpu")
        total = (before * weights.to(before)).sum()
        gradients = torch.autograd.grad(total, list(candidates.values()), allow_unused=True)
        names = [
            name
            for name, gradient in zip(candidates, gradients, strict=True)
            if gradient is not None and not gradient.any()
        ]

        def makes_no_difference(tried: list[str]) -> bool:
            with torch.no_grad():
                copied = throwaway(views, training=False)
                for name in tried:
                    redraw(copied.expert.get_parameter(name))
                return torch.equal(_features(copied, parts), before)

        if names and not makes_no_difference(names):
            names = [name for name in names if makes_no_difference([name])]
        return names


def _features(views: Views, parts: Parts) -> Tensor:
    """What the classifier receives, or the logits where it is no module of its own."""
    args, kwargs = own_inputs(parts.inputs)
    start = read_attributes(views.trunk, parts.attributes)
    state, _ = record(views.trunk, views.running, (), args, kwargs, stop_at_fork=True)
    write_attributes(views.expert, parts.attributes, start)
    output = play(views.expert, views.running, state.detach())
    features = views.running.features
    views.running.forget()
    found = logits_in(output) if features is None else features
    assert found is not None  # the build has checked that there are logits
    return found
