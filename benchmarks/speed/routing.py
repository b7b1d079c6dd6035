"""Routed inference at fixed shares, and what the router itself costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.networks import Case, by_hand, images, resnet32
from benchmarks.speed.straightforward import HandSplit, StraightforwardRouting
from benchmarks.speed.timing import compare
from ride_plugin import ExpertRouter, RIDEWrapper, RoutingInference, optimize_for_inference

SHARES = ((0.41, 0.09, 0.50), (0.8, 0.1, 0.1))


def routing() -> Case:
    """Routed inference at fixed shares against the ideal and the straightforward implementation."""

    def rows() -> Iterator[list[Any]]:
        model = resnet32().eval()
        served = optimize_for_inference(model)
        for shares in SHARES:
            for batch in (1, 8, 128, 1024):
                x, contiguous = images(batch), images(batch, channels_last=False)
                gates = _Quota(shares, batch)
                ours = RoutingInference(served, gates)
                first = by_hand(resnet32(channels_last=False)).eval()
                theirs = StraightforwardRouting(first, gates, torch.zeros(2))
                ideal = _ideal(by_hand(served).eval(), x, gates.sizes)
                every = _all_experts(served, x)
                with torch.no_grad():
                    yield [
                        f"{shares}, batch {batch}",
                        compare(lambda: ours(x), ideal),
                        compare(lambda: ours(x), lambda: theirs(contiguous)),
                        compare(lambda: ours(x), every),
                    ]

    header = ["shares of 1, 2, 3 experts", "ideal", "straightforward", "all experts"]
    return "Routed inference, BatchNorm folded, against", header, rows()


class _Quota(nn.Module):
    """A router that lets a fixed number of rows go on, with the cost of the learned one."""

    def __init__(self, shares: tuple[float, ...], batch: int) -> None:
        super().__init__()
        self.real = ExpertRouter(48, 3, num_classes=100)
        second = round(batch * (1 - shares[0]))
        self.sizes = (second, min(second, round(batch * shares[2])))

    def gate(self, index: int, mean_logits: Tensor, features: Tensor) -> Tensor:
        """The learned gate's work, then a verdict by position."""
        logits = self.real.gate(index, mean_logits, features)
        verdict = torch.full_like(logits, -1.0)
        verdict[: self.sizes[index]] = 1.0
        return verdict


def _ideal(split: HandSplit, x: Tensor, sizes: tuple[int, int]) -> Callable[[], None]:
    """Trunk once, and each expert at its own sub-batch, with nothing between."""
    with torch.no_grad():
        features = split.trunk(x)
    parts = [features[:n].contiguous(memory_format=torch.channels_last) for n in sizes]

    def run() -> None:
        with torch.no_grad():
            split.experts[0](split.trunk(x))
            for expert, part in zip(list(split.experts)[1:], parts, strict=True):
                if len(part):
                    expert(part)

    return run


def _all_experts(model: RIDEWrapper, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def gates() -> Case:
    """The router's own share of a forward that runs every expert."""

    def rows() -> Iterator[list[Any]]:
        model = resnet32().eval()
        router = ExpertRouter.for_model(model).eval()
        for batch in (1, 8, 128, 1024):
            x = images(batch)
            with torch.no_grad():
                inputs = model.router_inputs(x)
                yield [batch, compare(lambda inputs=inputs: router(inputs), _all_experts(model, x))]

    return "The router's own time / that of all experts", ["batch", "ratio"], rows()
