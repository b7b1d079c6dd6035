"""One network served in every way that a user might pick instead, in turn in one process.

    python -m benchmarks.speed.alternatives --data cifar100_lt.npz --runs runs

Needs a finished run of `benchmarks.cifar`. The exits are calibrated on one half of the test images
and everything is measured on the other. earlyon and torch-uncertainty are measured where they are
installed. The plain backbone and theirs have an accuracy where their runs are in the same folder
(`--methods balanced_softmax_cosine balanced_softmax_earlyon balanced_softmax_packed`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, export

from benchmarks.cifar.data import Split, load, normalise
from benchmarks.cifar.evaluate import SHOTS, accuracy, flops
from benchmarks.cifar.methods import METHODS
from benchmarks.cifar.others import EarlyExit
from benchmarks.cifar.train import Recipe, Run
from benchmarks.machine import machine
from benchmarks.resnets import CifarResNet
from benchmarks.speed.networks import NarrowResNet32, to_channels_last
from benchmarks.speed.routing import _in_onnxruntime
from ride_plugin import ConfidenceRouter, RIDEWrapper, RoutingInference, cost_report
from ride_plugin.routing import StagedRunner, fuse_stages, quantize_stages

Serve = Callable[[Tensor], Any]
BATCHES = {1: 60, 8: 20, 128: 3}  # and how many calls each has in a round
ROUNDS = 5


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="as for benchmarks.cifar")
    parser.add_argument("--runs", type=Path, required=True, help="the folder of finished runs")
    parser.add_argument("--method", default="ride3_balanced_official")
    parser.add_argument("--max-experts", type=float, default=2.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = load(options.data, 100, torch.device("cpu"))
    model = Run(options.method, 0, Recipe(), data, options.runs).load_model().eval()
    assert isinstance(model, RIDEWrapper)
    _, test, counts = data
    order = torch.randperm(len(test.labels))
    held_out, measured = (Split(test.images[i], test.labels[i]) for i in order.chunk(2))
    served = model.optimize_for_inference()
    serve = RoutingInference(served, ConfidenceRouter("margin"))
    with torch.no_grad():
        batches = zip(held_out.images.split(250), held_out.labels.split(250), strict=True)
        result = serve.calibrate(
            ((normalise(x), y) for x, y in batches), max_experts=options.max_experts
        )
        ours = _ours(served, serve, normalise(held_out.images[:256]))
        ways = {name: (way, True) for name, way in ours.items()}
        ways |= _others(partial(_network, data=data, runs=options.runs))
        times = _times({name: way for name, (way, _) in ways.items()}, normalise(measured.images))
        print(machine())
        print(f"{result.curve.mean_experts[result.index]:.2f} experts on average")
        plain = flops(CifarResNet(100))
        print(f"all experts {cost_report(model).flops / plain:.2f} x plain")
        for name, (way, trained) in ways.items():
            cells = [
                f"{1e3 * median(t):.2f} / {1e3 * quantiles(t, n=20)[-1]:.2f}, "
                f"{batch / median(t):.0f}"
                for batch, t in times[name].items()
            ]
            shots = _accuracy(way, measured, counts) if trained else "-"
            print(f"| {name} | {' | '.join(cells)} | {shots} |", flush=True)


_OURS = (
    "all experts",
    "routed",
    "routed, fused",
    "routed, fused, eight bits",
    "routed, onnxruntime",
)


def _network(method: str, data: tuple[Split, Split, Tensor], runs: Path) -> tuple[nn.Module, bool]:
    """A method's network, and whether a finished run has its weights."""
    run = Run(method, 0, Recipe(), data, runs)
    trained = run.result_file.exists()
    return (run.load_model() if trained else run.model).eval(), trained


def _ours(served: RIDEWrapper, serve: RoutingInference, example: Tensor) -> dict[str, Serve]:
    programs = serve.export_stages()
    fused = fuse_stages(programs)
    ways: tuple[Serve, ...] = (
        served,
        serve,
        StagedRunner(fused),
        StagedRunner(quantize_stages(fused, [example])),
        StagedRunner({name: _in_onnxruntime(program) for name, program in programs.items()}),
    )
    return dict(zip(_OURS, ways, strict=True))


def _others(load: Callable[[str], tuple[nn.Module, bool]]) -> dict[str, tuple[Serve, bool]]:
    """What serves without experts; each with whether it was trained."""
    plain, trained = load("balanced_softmax_cosine")
    narrow = to_channels_last(NarrowResNet32(100)).eval()
    shapes = ({0: Dim("batch", min=1)},)
    program = export(plain, (torch.randn(2, 3, 32, 32),), dynamic_shapes=shapes)
    fused = fuse_stages({"plain": program})["plain"]
    ways: dict[str, tuple[Serve, bool]] = {
        "plain": (plain, trained),
        "plain, fused": (lambda x: fused(x)[0], trained),
        "narrower plain": (narrow, False),
    }
    for name in ("earlyon", "packed", "batch"):
        try:
            model, trained = load(f"balanced_softmax_{name}")
        except ImportError as error:
            print(f"{name} is not measured: {error}")
            continue
        if isinstance(model, EarlyExit):
            ways["earlyon, all leave at layer2"] = (partial(model.serve, threshold=0.0), trained)
            ways["earlyon, none leaves"] = (partial(model.serve, threshold=1.0), trained)
        else:
            ways[METHODS[f"balanced_softmax_{name}"].words] = (model, trained)
    return ways


def _times(ways: dict[str, Serve], images: Tensor) -> dict[str, dict[int, list[float]]]:
    """Processor time of single calls, the ways in turn, on the same images."""
    times: dict[str, dict[int, list[float]]] = {name: {b: [] for b in BATCHES} for name in ways}
    for number in range(ROUNDS + 1):
        for batch, calls in BATCHES.items():
            parts = [
                images[i * batch :][:batch] for i in range(number * calls, (number + 1) * calls)
            ]
            for name, way in ways.items():
                for part in parts:
                    start = time.process_time()
                    way(part)
                    if number:  # the first round only warms up
                        times[name][batch].append(time.process_time() - start)
    return times


def _accuracy(way: Serve, split: Split, counts: Tensor) -> str:
    logits = torch.cat([way(normalise(images)) for images in split.images.split(250)])
    shots = accuracy(logits, split.labels, counts)["accuracy"]
    return " / ".join(f"{100 * shots[name]:.1f}" for name in SHOTS)


if __name__ == "__main__":
    main()
