"""On an accelerator: eager, compiled and captured as a graph, in float32 and bfloat16.

    python -m benchmarks.speed --only accelerator

Ratios are against the straightforward form on the same card, in the same precision. Without a card
the eager form alone runs, on the processor and at small sizes, so that the script is known to work
before one is at hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.networks import Case, by_hand, images, resnet32, resnet50
from benchmarks.speed.routing import SHARES, Quota, ideal
from benchmarks.speed.straightforward import StraightforwardRouting, expert_by_expert_loss
from benchmarks.speed.timing import compare
from benchmarks.speed.training import class_counts, step
from ride_plugin import DiversityLoss, RIDEWrapper, RoutingInference, count_flops, experts_loss

Run = Callable[[], object]
Size = tuple[Callable[[int, bool], RIDEWrapper], int, int, int]

FORMS = ("eager", "compiled", "captured")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES: dict[str, Size] = {
    "ResNet-32, batch 128": (resnet32, 128, 32, 100),
    "ResNet-32, batch 1024": (resnet32, 1024, 32, 100),
    "ResNet-50 at 224, batch 64": (resnet50, 64, 224, 1000),
}
REHEARSAL: dict[str, Size] = {"ResNet-32, batch 4": (resnet32, 4, 32, 100)}


def accelerator() -> Case:
    """Training steps, then inference; every form against the straightforward one."""
    card = torch.cuda.is_available()
    device, forms = torch.device("cuda" if card else "cpu"), FORMS if card else FORMS[:1]

    def rows() -> Iterator[list[Any]]:
        yield from training(device, forms, SIZES if card else REHEARSAL)
        yield from inference(device, forms, (1, 8, 128, 1024) if card else (8,))

    title = "On an accelerator, 3 experts" if card else "Rehearsal on a processor, 3 experts"
    header = ["what", "form", "ours / straightforward", "ms", "launches", "share of the peak"]
    return title, header, rows()


def training(
    device: torch.device, forms: tuple[str, ...], sizes: dict[str, Size]
) -> Iterator[list[Any]]:
    """A whole step: forward, losses, backward and SGD."""
    for name, (network, batch, size, classes) in sizes.items():
        y = (torch.arange(batch) % classes).to(device)
        term = DiversityLoss(class_counts(classes), weight=0.45).to(device)
        x = images(batch, True, size).to(device)
        model, first = network(3, True).to(device), by_hand(network(3, False)).to(device)
        flops = 3 * batch * count_flops(model, x[:1])  # backward takes twice what forward takes

        def ours(out: Any, y: Tensor = y, term: DiversityLoss = term) -> Tensor:
            return experts_loss(F.cross_entropy, out, y) + term(out, y)

        def theirs(out: Tensor, y: Tensor = y, term: DiversityLoss = term) -> Tensor:
            return expert_by_expert_loss(out.float(), y, term.schedule.temperature, 0.45)

        for precision, dtype in DTYPES.items():
            half = dtype is torch.bfloat16
            straightforward = step(copy.deepcopy(first), theirs, x.contiguous(), half)
            for form in forms:
                run = step(copy.deepcopy(model), ours, x, half, compiled=form == "compiled")
                run = captured(run) if form == "captured" else run
                figures = _figures(run, straightforward, device)
                share = flops / (1e-3 * figures[1]) / peak(device, dtype)
                yield [name, f"{form}, {precision}", *_shown(figures), f"{share:.2f}"]


def inference(
    device: torch.device, forms: tuple[str, ...], batches: tuple[int, ...]
) -> Iterator[list[Any]]:
    """Routed rows, every expert, and the parts that routing cannot do without.

    Routed inference looks at its gates to choose rows, which no graph can hold; the parts at fixed
    numbers of rows say what capturing each stage would give at best.
    """
    for precision, dtype in DTYPES.items():
        served = resnet32().eval().optimize_for_inference().to(device, dtype)
        split = by_hand(resnet32(channels_last=False)).eval().to(device, dtype)
        for shares in SHARES:
            for batch in batches:
                quota, x = Quota(shares, batch).to(device), images(batch).to(device, dtype)
                plain = StraightforwardRouting(split, quota, torch.zeros(2, device=device))
                first, found = partial(plain, x.contiguous()), {}
                with torch.no_grad():
                    for way, run in _ways(served, quota, x, forms).items():
                        found[way] = _figures(run, first, device)
                for way, figures in found.items():
                    yield [f"{shares}, batch {batch}", f"{way}, {precision}", *_shown(figures), "-"]


def _ways(served: RIDEWrapper, quota: Quota, x: Tensor, forms: tuple[str, ...]) -> dict[str, Run]:
    ways: dict[str, Run] = {"routed, eager": partial(RoutingInference(served, quota), x)}
    for form in forms:
        every = partial(torch.compile(served) if form == "compiled" else served, x)
        ways[f"every expert, {form}"] = captured(every) if form == "captured" else every
    parts = ways["parts, eager"] = ideal(served, x, quota.sizes)
    if "captured" in forms:
        ways["parts, captured"] = captured(parts)
    return ways


def captured(run: Run) -> Run:
    """The launches of ``run`` recorded once, on a stream of their own, and replayed as one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def launches(run: Run, device: torch.device) -> int:
    """Kernels of one call on a card; on a processor, operations that no other one called."""
    on_card = device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if on_card else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as seen:
        run()
        if on_card:
            torch.cuda.synchronize()
    events = seen.events() or []
    if on_card:
        return sum(event.device_type.name == "CUDA" for event in events)
    called = (e for e in events if e.cpu_parent and e.cpu_parent.name.startswith("aten::"))
    inner = {event.id for event in called}
    return sum(e.name.startswith("aten::") and e.id not in inner for e in events)


@cache
def peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product, measured."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=dtype)
    product = partial(torch.mm, a, a)
    return float(2 * size**3 / (1e-3 * compare(product, product).ours_ms))


def _figures(run: Run, first: Run, device: torch.device) -> tuple[str, float, int]:
    ratio = compare(run, first)
    return str(ratio), ratio.ours_ms, launches(run, device)


def _shown(figures: tuple[str, float, int]) -> list[Any]:
    ratio, milliseconds, count = figures
    return [ratio, f"{milliseconds:.3g}", count]
