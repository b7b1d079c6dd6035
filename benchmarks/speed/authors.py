"""Against the RIDE authors' own code, from a checkout of theirs that the caller names.

Their network with three experts, their loss with its LDAM margins and class weights, and their
early exit; nothing else of theirs is imported. Their loss moves a tensor to CUDA when it is built,
which is switched off here, their exit prints a share for each expert, which is thrown away, and
their mask of bytes is one of booleans, since torch takes no other now.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.speed.networks import Case, images, resnet32, to_channels_last
from benchmarks.speed.routing import BATCHES, SHARES, Quota, at_shares, ideal
from benchmarks.speed.timing import compare
from benchmarks.speed.training import class_counts, step
from ride_plugin import DiversityLoss, ExpertRouter, RoutingInference, experts_loss
from ride_plugin.longtail import LDAMLoss, effective_number_weights
from ride_plugin.routing import fuse_stages

SIZES = ((100, 128), (1000, 128), (8142, 128))  # classes and batch of the loss alone
_OPTIONS = {"num_classes": 100, "reduce_dimension": True, "use_norm": True}  # of their networks


class Authors:
    """Their modules, from a checkout."""

    def __init__(self, checkout: Path) -> None:
        package = types.ModuleType("model")  # their own __init__ would import all networks
        package.__path__ = [str(checkout / "model")]
        nets = types.ModuleType("model.ldam_drw_resnets")
        nets.__path__ = [str(checkout / "model" / "ldam_drw_resnets")]
        with mock.patch.dict(sys.modules, {"model": package, "model.ldam_drw_resnets": nets}):
            self.losses = importlib.import_module("model.loss")
            self.networks = importlib.import_module("model.ldam_drw_resnets.ride_resnet_cifar")
            self.exits = importlib.import_module("model.ldam_drw_resnets.ea_resnet_cifar")

    def network(self) -> nn.Module:
        """ResNet-32 with three narrower experts and cosine classifiers."""
        block = self.networks.BasicBlock
        return cast("nn.Module", self.networks.ResNet_s(block, [5, 5, 5], 3, **_OPTIONS))

    def loss(self, counts: list[int]) -> Callable[[Tensor, list[Tensor], Tensor], Tensor]:
        """Their loss after its deferred re-weighting has begun."""
        with mock.patch.object(Tensor, "cuda", lambda tensor: tensor):
            criterion = self.losses.RIDELoss(
                counts, additional_diversity_factor=-0.45, reweight_epoch=160
            )
        criterion._hook_before_epoch(161)

        def loss(mean: Tensor, experts: list[Tensor], target: Tensor) -> Tensor:
            with _where_takes_bytes():
                result: Tensor = criterion(mean, target, extra_info={"logits": experts})
            return result

        return loss

    def routed(self, sizes: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        """Their early exit, whose gates do their work and then decide by position."""
        options = {**_OPTIONS, "top_choices_num": 30}
        network = self.exits.ResNet_s(self.exits.BasicBlock, [5, 5, 5], 3, **options).eval()
        gate = network.pred_expert_help

        def at_fixed_share(part: tuple[Tensor, Tensor], index: int) -> Tensor:
            verdict: Tensor = gate(part, index)
            verdict = torch.full_like(verdict, -1.0)
            verdict[: sizes[index]] = 1.0
            return verdict

        network.pred_expert_help = at_fixed_share

        def run(x: Tensor) -> Tensor:
            with contextlib.redirect_stdout(io.StringIO()):
                output: Tensor = network(x)[0]
            return output

        return run


@contextlib.contextmanager
def _where_takes_bytes() -> Iterator[None]:
    where = torch.where
    with mock.patch.object(torch, "where", lambda mask, *rest: where(mask.view(torch.bool), *rest)):
        yield


def training(authors: Authors) -> Case:
    """A whole training step and the loss alone, with LDAM and deferred re-weighting."""

    def rows() -> Iterator[list[Any]]:
        y = torch.randint(0, 100, (128,))
        criterion = _ours(100)
        model = resnet32()
        theirs = authors.loss(class_counts(100))
        mine = step(model, lambda out: criterion(out, y), images(128), False)
        for name, last in (("contiguous", False), ("channels-last", True)):
            network = authors.network()
            network = to_channels_last(network) if last else network

            def loss(out: Tensor, network: Any = network) -> Tensor:
                return theirs(out, network.logits, y)

            other = step(network, loss, images(128, last), False)
            yield [f"step, batch 128, theirs {name}", compare(mine, other)]
        for classes, batch in SIZES:
            yield [f"loss, C {classes}, B {batch}", _loss(authors, classes, batch)]

    return "Training, ours / the authors' code", ["what", "ratio"], rows()


def _ours(classes: int) -> Callable[[Any, Tensor], Tensor]:
    counts = class_counts(classes)
    ldam = LDAMLoss(counts, weight=effective_number_weights(counts, beta=0.9999))
    diversity = DiversityLoss(counts, weight=0.45, start_epoch=0)

    def loss(out: Any, target: Tensor) -> Tensor:
        return experts_loss(ldam, out, target) + diversity(out, target)

    return loss


def _loss(authors: Authors, classes: int, batch: int) -> Any:
    y = torch.randint(0, classes, (batch,))
    ours, theirs = _ours(classes), authors.loss(class_counts(classes))
    # Each side starts from logits as its own network hands them over: one tensor, or a list.
    joined = (60 * torch.rand(batch, 3, classes) - 30).requires_grad_()
    each = [part.detach().clone().requires_grad_() for part in joined.unbind(1)]
    with torch.no_grad():
        mean = torch.stack(each, dim=1).mean(dim=1)
    torch.testing.assert_close(ours(joined, y), theirs(mean, each, y), rtol=1e-4, atol=1e-4)

    def mine() -> None:
        joined.grad = None
        ours(joined, y).backward()

    def other() -> None:
        for part in each:
            part.grad = None
        theirs(torch.stack(each, dim=1).mean(dim=1), each, y).backward()

    return compare(mine, other)


def routing(authors: Authors) -> Case:
    """Routed inference at fixed shares: whole, and as fused stages."""

    def rows() -> Iterator[list[Any]]:
        served = resnet32().eval().optimize_for_inference()
        router = ExpertRouter.for_model(served)
        fused = fuse_stages(RoutingInference(served, router).export_stages())
        shares = SHARES[0]
        for batch in BATCHES:
            x, contiguous = images(batch), images(batch, channels_last=False)
            quota = Quota(shares, batch)
            whole, quick = RoutingInference(served, quota), at_shares(fused, quota)
            theirs, parts = authors.routed(quota.sizes), ideal(served, x, quota.sizes)
            with torch.no_grad():
                kernels = _convolutions(fused, lambda: quick(contiguous))
                yield [
                    f"{shares}, batch {batch}",
                    compare(lambda: whole(x), lambda: theirs(contiguous)),
                    compare(lambda: quick(contiguous), lambda: theirs(contiguous)),
                    compare(kernels, lambda: theirs(contiguous)),
                    compare(lambda: quick(contiguous), parts),
                ]

    header = ["shares of 1, 2, 3 experts", "ours", "fused", "its convolutions", "fused / ideal"]
    return "Routed inference, ours / the authors' code", header, rows()


def _convolutions(stages: Mapping[str, nn.Module], run: Callable[[], object]) -> Callable[[], None]:
    """The convolutions that a run of fused stages makes, on the same tensors and nothing else."""
    calls: list[tuple[nn.Module, tuple[Tensor, ...]]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append((module, inputs))

    hooks = [
        module.register_forward_pre_hook(note)
        for stage in stages.values()
        for module in stage.modules()
        if type(module).__name__ == "FusedConv2d"
    ]
    run()
    for hook in hooks:
        hook.remove()
    if not calls:
        raise RuntimeError("No FusedConv2d ran: there is no time of convolutions to compare.")

    def again() -> None:
        for module, inputs in calls:
            module(*inputs)

    return again
