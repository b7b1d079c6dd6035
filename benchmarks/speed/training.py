"""Training: a whole step, the diversity term alone, and the router's stage."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.resnets import CifarResNet
from benchmarks.speed.networks import (
    Case,
    by_hand,
    images,
    plain_resnet50,
    resnet32,
    resnet50,
    to_channels_last,
    train_step,
)
from benchmarks.speed.straightforward import (
    expert_by_expert_loss,
    pair_loop,
    router_step_by_expert,
)
from benchmarks.speed.timing import compare
from ride_plugin import (
    DiversityLoss,
    ExpertRouter,
    RIDELoss,
    RIDEWrapper,
    RoutingLoss,
    cost_report,
    count_flops,
    experts_loss,
)
from ride_plugin.longtail import BalancedSoftmaxLoss, long_tailed_counts
from ride_plugin.routing import RouterInputs


def class_counts(classes: int) -> list[int]:
    """From 500 down to 5, exponentially."""
    return long_tailed_counts(classes, 500, 100)


def training() -> Case:
    """A whole training step against the hand-written split, and against the first thing to try."""
    sizes: dict[str, tuple[Callable[[bool], RIDEWrapper], int, int, int]] = {
        "ResNet-32, 3 experts, batch 128": (lambda last: resnet32(3, last), 128, 32, 100),
        "ResNet-32, 4 experts, batch 128": (lambda last: resnet32(4, last), 128, 32, 100),
        "ResNet-50 at 224, 3 experts, batch 4": (lambda last: resnet50(3, last), 4, 224, 1000),
    }

    def rows() -> Iterator[list[Any]]:
        for name, (network, batch, size, classes) in sizes.items():
            model = network(True)
            y = torch.randint(0, classes, (batch,))
            diversity = DiversityLoss(class_counts(classes), weight=0.45)

            def ours(out: Any, y: Tensor = y, diversity: nn.Module = diversity) -> Tensor:
                return experts_loss(nn.functional.cross_entropy, out, y) + diversity(out, y)

            def theirs(out: Tensor, y: Tensor = y, term: DiversityLoss = diversity) -> Tensor:
                return expert_by_expert_loss(out.float(), y, term.schedule.temperature, 0.45)

            x, contiguous = images(batch, True, size), images(batch, False, size)
            mine = step(model, ours, x, False)
            plain = step(by_hand(network(False)), theirs, contiguous, False)
            laid_out = step(by_hand(network(True)), theirs, x, False)
            yield [
                name,
                compare(mine, step(by_hand(model), ours, x, False)),
                compare(mine, plain),
                compare(mine, laid_out),
                compare(step(copy.deepcopy(model), ours, x, True), plain),
            ]

    header = [
        "network",
        "same layers split by hand, same layout and loss",
        "straightforward",
        "straightforward in channels-last",
        "in bfloat16 / straightforward in float32",
    ]
    return "Training step, ours / other", header, rows()


def beside_plain() -> Case:
    """A training step of README's two lines against the plain backbone with the same criterion."""
    sizes: dict[str, tuple[nn.Module, int, int, int]] = {
        "ResNet-32, batch 128": (to_channels_last(CifarResNet(100)), 128, 32, 100),
        "ResNet-50 at 224, batch 4": (to_channels_last(plain_resnet50()), 4, 224, 1000),
    }

    def rows() -> Iterator[list[Any]]:
        for name, (backbone, batch, size, classes) in sizes.items():
            counts = class_counts(classes)
            x, y = images(batch, True, size), torch.randint(0, classes, (batch,))
            plain = BalancedSoftmaxLoss(counts)
            several = RIDELoss(plain, counts)
            model = RIDEWrapper(
                backbone, 3, expert_width=0.75, classifier="cosine", example_input=x[:2]
            )
            yield [
                name,
                f"{cost_report(model).flops / count_flops(backbone, x[:1]):.2f}",
                *(
                    compare(
                        step(model, partial(_loss, several, y), x, half),
                        step(backbone, partial(_loss, plain, y), x, half),
                    )
                    for half in (False, True)
                ),
            ]

    header = ["network", "FLOPs", "time in float32", "time in bfloat16"]
    return "Training step, three experts of 3/4 width / the plain backbone", header, rows()


def _loss(criterion: nn.Module, y: Tensor, out: Tensor) -> Tensor:
    loss: Tensor = criterion(out, y)
    return loss


def step(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    x: Tensor,
    half: bool,
    *,
    compiled: bool = False,
) -> Any:
    """Forward, in bfloat16 where it is ``half``, then loss, backward and a step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9, nesterov=True, fused=True)
    called = torch.compile(model) if compiled else model

    def run() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            out = called(x)
        optimizer.zero_grad(set_to_none=True)
        loss(out).backward()
        optimizer.step()

    return run


_KINDS = {
    "convolutions": ("convolution",),
    "BatchNorm": ("batch_norm",),
    "ReLU": ("relu", "threshold", "clamp_min"),
    "additions": ("add",),
}


def floor() -> Case:
    """What a training step consists of: the kernels' own time, by kind of operation."""

    def rows() -> Iterator[list[Any]]:
        for name, network, batch, size, classes in [
            ("ResNet-32, 3 experts", resnet32, 128, 32, 100),
            ("ResNet-50 at 224, 3 experts", resnet50, 4, 224, 1000),
        ]:
            step = train_step(network(), images(batch, True, size), torch.arange(batch) % classes)
            step()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                step()
            times = {e.key: e.self_cpu_time_total for e in seen.key_averages()}
            total = sum(times.values())
            shares = [
                sum(time for key, time in times.items() if any(part in key for part in parts))
                / total
                for parts in _KINDS.values()
            ]
            yield [name, *(f"{100 * share:.0f} %" for share in (*shares, 1 - sum(shares)))]

    return "Shares of a training step", ["network", *_KINDS, "everything else"], rows()


def loss() -> Case:
    """The diversity term alone, forward and backward."""

    def rows() -> Iterator[list[Any]]:
        for num_experts, classes, batch in [
            (2, 1000, 256), (4, 1000, 256), (8, 1000, 256), (4, 100, 128), (4, 8142, 128),
        ]:  # fmt: skip
            experts = torch.randn(batch, num_experts, classes, requires_grad=True)
            y = torch.randint(0, classes, (batch,))
            counts = class_counts(classes)
            paper = DiversityLoss(counts, weight=0.2, form="paper")
            official = DiversityLoss(counts, weight=0.2)
            temperature = paper.schedule.temperature[y]

            def run(function: Callable[[], Tensor], leaf: Tensor = experts) -> Callable[[], None]:
                def step() -> None:
                    leaf.grad = None
                    function().backward()

                return step

            yield [
                f"E {num_experts}, C {classes}, B {batch}",
                compare(
                    run(lambda: paper(experts, y)),
                    run(lambda: pair_loop(experts, temperature, 0.2)),
                ),
                compare(
                    run(
                        lambda: (
                            experts_loss(nn.functional.cross_entropy, experts, y)
                            + official(experts, y)
                        )
                    ),
                    run(
                        lambda: expert_by_expert_loss(
                            experts, y, official.schedule.temperature, 0.2
                        )
                    ),
                ),
            ]

    header = ["size", "paper's form / loop over pairs", "official form / expert by expert"]
    return "Loss, forward and backward", header, rows()


def router() -> Case:
    """Stage two: one step on frozen experts, and the same steps on what was stored once."""

    def rows() -> Iterator[list[Any]]:
        model = resnet32().eval().requires_grad_(False)
        first = by_hand(resnet32(channels_last=False)).eval().requires_grad_(False)
        folded = model.optimize_for_inference()
        gates, criterion = ExpertRouter.for_model(model), RoutingLoss()
        optimizer = torch.optim.Adam(gates.parameters(), 1e-3)
        for batch in (32, 128):
            x, contiguous = images(batch), images(batch, channels_last=False)
            y = torch.randint(0, 100, (batch,))
            stored = model.router_inputs(x)

            def learn(inputs: RouterInputs, y: Tensor = y) -> None:
                loss = criterion(gates(inputs), inputs, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

            def theirs(x: Tensor = contiguous, y: Tensor = y) -> None:
                router_step_by_expert(first, gates, optimizer, x, y)

            def with_inputs(
                model: RIDEWrapper, x: Tensor, then: Callable[[RouterInputs], None]
            ) -> None:
                then(model.router_inputs(x))

            yield [
                f"batch {batch}",
                compare(partial(with_inputs, model, x, learn), theirs),
                compare(partial(with_inputs, folded, x, learn), theirs),
                compare(partial(learn, stored), theirs),
            ]

    header = ["ResNet-32, 3 experts", "step", "BatchNorm folded", "on stored inputs"]
    return "Training the router, ours / straightforward", header, rows()
