"""The measured cases; each returns a title, a header and rows that are computed as they print."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cifar.resnet import ResNet32
from benchmarks.speed.straightforward import (
    HandSplit,
    StraightforwardRouting,
    expert_by_expert_loss,
    pair_loop,
)
from benchmarks.speed.timing import compare
from ride_plugin import (
    DiversityLoss,
    ExpertRouter,
    RIDEWrapper,
    RoutingInference,
    experts_loss,
    optimize_for_inference,
)

Case = tuple[str, list[str], Iterator[list[Any]]]
COUNTS = [max(5, int(500 * 0.01 ** (c / 99))) for c in range(100)]
SHARES = ((0.41, 0.09, 0.50), (0.8, 0.1, 0.1))


def network(num_experts: int = 3, channels_last: bool = True) -> RIDEWrapper:
    """The paper's CIFAR network: ResNet-32, experts of 3/4 width, cosine classifiers."""
    model = RIDEWrapper(_Narrow(), num_experts, fork_at="layer2", classifier="cosine")
    return model.to(memory_format=torch.channels_last) if channels_last else model


class _Narrow(ResNet32):
    """Full width up to the fork and 3/4 of it from there on."""

    def __init__(self) -> None:
        super().__init__(100)
        self.layer2 = self._stage(16, 24, 2)
        self.layer3 = self._stage(24, 48, 2)
        self.linear = nn.Linear(48, 100)


def images(batch: int, channels_last: bool = True) -> Tensor:
    """Random images; the time of a convolution does not depend on their content."""
    x = torch.randn(batch, 3, 32, 32)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def training() -> Case:
    """A whole training step against the hand-written split, and against the first thing to try."""

    def step(model: nn.Module, loss: Callable[[Any], Tensor], x: Tensor, half: bool) -> Any:
        optimizer = torch.optim.SGD(
            model.parameters(), 1e-4, momentum=0.9, nesterov=True, fused=True
        )

        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                out = model(x)
            optimizer.zero_grad(set_to_none=True)
            loss(out).backward()
            optimizer.step()

        return run

    def rows() -> Iterator[list[Any]]:
        y = torch.randint(0, 100, (128,))
        diversity = DiversityLoss(COUNTS, weight=0.45, form="official")
        temperature = diversity.schedule.temperature
        for num_experts in (3, 4):
            model = network(num_experts)
            hand = HandSplit(model)
            first = HandSplit(network(num_experts, channels_last=False))

            def ours(out: Any) -> Tensor:
                return experts_loss(nn.functional.cross_entropy, out, y) + diversity(out, y)

            def theirs(out: Tensor) -> Tensor:
                return expert_by_expert_loss(out.float(), y, temperature, 0.45)

            x, contiguous = images(128), images(128, channels_last=False)
            mine = step(model, ours, x, False)
            half = step(copy.deepcopy(model), ours, x, True)
            same = step(hand, ours, x, False)
            plain = step(first, theirs, contiguous, False)
            yield [f"{num_experts} experts, hand-written split, same layout", compare(mine, same)]
            yield [f"{num_experts} experts, straightforward, contiguous", compare(mine, plain)]
            yield [
                f"{num_experts} experts in bfloat16, straightforward, contiguous",
                compare(half, plain),
            ]

    return "Training step, ResNet-32, batch 128", ["ours against", "ratio"], rows()


def loss() -> Case:
    """The diversity term alone, forward and backward."""

    def rows() -> Iterator[list[Any]]:
        for num_experts, classes, batch in [
            (2, 1000, 256), (4, 1000, 256), (8, 1000, 256), (4, 100, 128), (4, 8142, 128),
        ]:  # fmt: skip
            experts = torch.randn(batch, num_experts, classes, requires_grad=True)
            y = torch.randint(0, classes, (batch,))
            counts = [max(5, int(500 * 0.01 ** (c / (classes - 1)))) for c in range(classes)]
            paper = DiversityLoss(counts, weight=0.2)
            official = DiversityLoss(counts, weight=0.2, form="official")
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


def routing() -> Case:
    """Routed inference at fixed shares against the ideal and the straightforward implementation."""

    def rows() -> Iterator[list[Any]]:
        model = network().eval()
        served = optimize_for_inference(model)
        for shares in SHARES:
            for batch in (1, 8, 128, 1024):
                x, contiguous = images(batch), images(batch, channels_last=False)
                gates = _Quota(shares, batch)
                ours = RoutingInference(served, gates)
                first = HandSplit(network(channels_last=False)).eval()
                theirs = StraightforwardRouting(first, gates, torch.zeros(2))
                ideal = _ideal(HandSplit(served).eval(), x, gates.sizes)
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


def memory() -> Case:
    """Largest amount of live tensor memory in a training step, against the single backbone."""

    def rows() -> Iterator[list[Any]]:
        x, y = images(128), torch.randint(0, 100, (128,))
        single = _peak(ResNet32(100).to(memory_format=torch.channels_last), x, y)
        for num_experts in (1, 2, 3, 4, 8):
            model = network(num_experts)
            kept = _peak(model, x, y)
            model.checkpoint_experts = True
            again = _peak(model, x, y)
            plain = network(num_experts)
            ratio = compare(_train(model, x, y), _train(plain, x, y), seconds=0)
            yield [num_experts, f"{kept / single:.2f}", f"{again / single:.2f}", ratio]

    header = ["experts", "kept", "checkpointed", "time, checkpointed / kept"]
    return "Peak memory of a training step / the single backbone's", header, rows()


def scaling() -> Case:
    """Time of a training step against the number of experts."""

    def rows() -> Iterator[list[Any]]:
        x, y = images(64), torch.randint(0, 100, (64,))
        base = _train(network(1), x, y)
        for num_experts in (2, 3, 4, 6, 8):
            yield [num_experts, compare(_train(network(num_experts), x, y), base, seconds=0)]

    return "Training step against one expert, batch 64", ["experts", "ratio"], rows()


def _train(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    def run() -> None:
        out = model(x)
        if isinstance(model, RIDEWrapper):
            loss = experts_loss(nn.functional.cross_entropy, out, y)
        else:
            loss = nn.functional.cross_entropy(out, y)
        model.zero_grad(set_to_none=True)
        loss.backward()

    return run


def _peak(model: nn.Module, x: Tensor, y: Tensor) -> int:
    step = _train(model, x, y)
    step()
    model.zero_grad(set_to_none=True)
    with LiveBytes() as counter:
        step()
    return counter.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations create while they live; exact, no sampling."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: Any) -> None:
        import weakref

        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self._seen.discard(key)
            self.live -= size

        weakref.finalize(storage, freed)


CASES: dict[str, Callable[[], Case]] = {
    "training": training,
    "loss": loss,
    "routing": routing,
    "memory": memory,
    "scaling": scaling,
}
