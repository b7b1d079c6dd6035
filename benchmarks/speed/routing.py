"""Routed inference at fixed shares, and what the router itself costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from benchmarks.speed.networks import Case, by_hand, images, resnet32
from benchmarks.speed.straightforward import StraightforwardRouting
from benchmarks.speed.timing import compare
from ride_plugin import ExpertRouter, RIDEWrapper, RoutingInference
from ride_plugin.routing import StagedRunner, fuse_stages

Stage = Callable[..., Sequence[Tensor]]

SHARES = ((0.41, 0.09, 0.50), (0.8, 0.1, 0.1))
BATCHES = (1, 8, 128, 1024)
SLICE = 128  # rows; larger batches are also handed in as slices of it


def routing() -> Case:
    """Routed inference at fixed shares against the ideal and the straightforward implementation.

    Large batches also in slices, as a caller may hand them in: torch asks the system for large
    tensors anew each time.
    """

    def rows() -> Iterator[list[Any]]:
        model = resnet32().eval()
        served = model.optimize_for_inference()
        for shares in SHARES:
            for batch in BATCHES:
                x, contiguous = images(batch), images(batch, channels_last=False)
                gates = Quota(shares, batch)
                ours = RoutingInference(served, gates)
                theirs = _straightforward(gates)
                parts = ideal(served, x, gates.sizes)
                every = _all_experts(served, x)
                with torch.no_grad():
                    yield [
                        f"{shares}, batch {batch}",
                        compare(lambda: ours(x), parts),
                        compare(lambda: ours(x), lambda: theirs(contiguous)),
                        compare(lambda: ours(x), every),
                    ]
                    if batch > SLICE:
                        sliced = RoutingInference(served, Quota(shares, SLICE))
                        yield [
                            f"{shares}, batch {batch} in slices of {SLICE}",
                            "-",
                            compare(
                                lambda: torch.cat([sliced(part) for part in x.split(SLICE)]),
                                lambda: theirs(contiguous),
                            ),
                            "-",
                        ]

    header = ["shares of 1, 2, 3 experts", "ideal", "straightforward", "all experts"]
    return "Routed inference, BatchNorm folded, against", header, rows()


class Quota(nn.Module):
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


def _straightforward(gates: Quota) -> StraightforwardRouting:
    split = by_hand(resnet32(channels_last=False)).eval()
    return StraightforwardRouting(split, gates, torch.zeros(2))


def ideal(model: RIDEWrapper, x: Tensor, sizes: tuple[int, int]) -> Callable[[], None]:
    """Trunk once, and each expert at its own sub-batch, with nothing between."""
    split = by_hand(model).eval()
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


def exported() -> Case:
    """Stages without this library's Python, fused or in onnxruntime, at fixed shares."""

    def rows() -> Iterator[list[Any]]:
        served = resnet32().eval().optimize_for_inference()
        programs = RoutingInference(served, ExpertRouter.for_model(served)).export_stages()
        fused = fuse_stages(programs)
        stages = {name: _in_onnxruntime(program) for name, program in programs.items()}
        for shares in SHARES:
            for batch in BATCHES:
                x, quota = images(batch, channels_last=False), Quota(shares, batch)
                parts = ideal(served, images(batch), quota.sizes)
                quick, other = (at_shares(kind, quota) for kind in (fused, stages))
                theirs = _straightforward(quota)
                with torch.no_grad():
                    yield [
                        f"{shares}, batch {batch}",
                        compare(lambda: quick(x), lambda: theirs(x)),
                        compare(lambda: quick(x), parts),
                        compare(lambda: other(x), lambda: theirs(x)),
                    ]

    header = ["shares of 1, 2, 3 experts", "fused", "fused / ideal", "onnxruntime"]
    return "Exported stages / straightforward", header, rows()


def at_shares(stages: Mapping[str, Stage], quota: Quota) -> StagedRunner:
    gates = {
        f"gate_{i}": _at_fixed_share(stages[f"gate_{i}"], size)
        for i, size in enumerate(quota.sizes)
    }
    return StagedRunner({**stages, **gates})


def _in_onnxruntime(program: ExportedProgram) -> Stage:
    import onnxruntime

    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    assert exported is not None
    graph = exported.model_proto
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_inputs()]

    def stage(*tensors: Tensor) -> list[Tensor]:
        arrays = session.run(None, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})
        return [torch.from_numpy(array) for array in arrays]

    return stage


def _at_fixed_share(gate: Stage, size: int) -> Stage:
    """The gate's work, then a verdict by position."""

    def stage(*tensors: Tensor) -> list[Tensor]:
        (verdict,) = gate(*tensors)
        return [torch.arange(len(verdict)) < size]

    return stage


def gates() -> Case:
    """The router's own share of a forward that runs every expert."""

    def rows() -> Iterator[list[Any]]:
        model = resnet32().eval()
        router = ExpertRouter.for_model(model).eval()
        for batch in BATCHES:
            x = images(batch)
            with torch.no_grad():
                inputs = model.router_inputs(x)
                yield [batch, compare(partial(router, inputs), _all_experts(model, x))]

    return "The router's own time / that of all experts", ["batch", "ratio"], rows()
