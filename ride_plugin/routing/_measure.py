"""What calibration needs to know of held-out data: gates, hits and costs, of one pass over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn

from ride_plugin._checks import check_classes, check_predictions, refuse
from ride_plugin._cost import CostReport, cost_report
from ride_plugin._distributed import of_all_ranks
from ride_plugin._errors import ArgumentError
from ride_plugin._inputs import Inputs, as_inputs, row_sizes
from ride_plugin._numerics import float32_or_better
from ride_plugin._split import TrunkState
from ride_plugin._tree import holds_tensors, map_tensors
from ride_plugin.functional import running_means
from ride_plugin.routing._call import describe
from ride_plugin.routing._exit import RoutedStages, gate_logits
from ride_plugin.routing._protocols import Router


class Measured(NamedTuple):
    """Samples of one batch or of many; all tensors on the CPU.

    Attributes:
        gates: the gates' logits ``[N, E-1]``, by router.
        right: bool ``[N, E]``, whether the mean of the first 1, 2, ... E experts is right.
        labels: int64 ``[N]``.
        flops: int64 ``[N, E]``, FLOPs of a row that uses 1, 2, ... E experts, without gates.
        routed_flops: the same with the gates of the router that it passes.
    """

    gates: dict[str, Tensor]
    right: Tensor
    labels: Tensor
    flops: Tensor
    routed_flops: Tensor


@torch.no_grad()
def measure(
    routed: RoutedStages,
    baselines: Mapping[str, Router],
    loader: Iterable[Any],
    progress: Callable[[int], object] | None,
) -> Measured:
    """Run the model once over the loader, and each router on what it says.

    Where ``torch.distributed`` runs, the samples are those of every rank.

    Raises:
        ArgumentError: no rank has a sample, or a batch is no pair of inputs and labels.
    """
    costs = _Costs(routed)
    batches: list[Measured] = []
    for batch in loader:
        # The model may have been moved, and the thresholds, which lie elsewhere, not.
        device = next(routed.model.parameters(), routed.threshold_logits).device
        inputs, target = _unpack(batch, device)
        with routed.evaluating():
            found = _of_batch(routed, baselines, as_inputs(inputs), target, costs)
        if found is None:
            continue
        batches.append(found)
        if progress is not None:
            progress(len(found.labels))
    everything = [one for of_rank in of_all_ranks(batches, "calibrate") for one in of_rank]
    if not everything:
        raise ArgumentError(
            "Expected argument `loader` to yield at least one sample, but it is empty. If it is a "
            "generator it may have been used up: pass a DataLoader or a list of batches."
        )
    gates, *others = zip(*everything, strict=True)
    joined = {kind: torch.cat([one[kind] for one in gates]) for kind in gates[0]}
    return Measured(joined, *map(torch.cat, others))


def _of_batch(
    routed: RoutedStages,
    baselines: Mapping[str, Router],
    inputs: Inputs,
    target: Tensor,
    costs: _Costs,
) -> Measured | None:
    """What one batch says; None if it is empty. The target is on the CPU, where it is checked."""
    model = routed.model
    no_index = target.is_floating_point() or target.is_complex() or target.dtype == torch.bool
    if no_index:  # before the model runs: it may have come in the place of the inputs
        _refuse_target(target, "B")
    logits, features = model.router_inputs(*inputs[0], **inputs[1])
    if target.shape != logits.shape[:1]:
        _refuse_target(target, len(logits))
    target = target.long()
    check_classes(target, "loader", logits.shape[2])
    # Results come to the CPU here, so on an accelerator as well nothing more is waited for.
    check_predictions(logits.amax(dim=2, keepdim=True).cpu(), "the experts' logits")
    if len(target) == 0:
        return None
    means = running_means(logits)  # the bits that inference gives, so the curve is what it does
    gates = {}
    for kind, router in {"router": routed.router, **baselines}.items():
        columns = [
            gate_logits(router, index, means[:, index], features[:, index])
            for index in range(model.num_experts - 1)
        ]
        gates[kind] = float32_or_better(torch.stack(columns, dim=1)).cpu()
    right = means.argmax(dim=2).cpu() == target[:, None]
    return Measured(gates, right, target, *costs.of_rows(inputs, len(target)))


class _Costs:
    """FLOPs of rows, counted once for each kind of call.

    That is the shape of a row, since sequences differ in length, and all that is no tensor: a
    number may say how often a layer runs.
    """

    def __init__(self, routed: RoutedStages) -> None:
        self.routed = routed
        self.known: dict[tuple[str, tuple[tuple[int, ...], ...]], CostReport] = {}

    def of_rows(self, inputs: Inputs, rows: int) -> tuple[Tensor, Tensor]:
        """FLOPs ``[rows, E]`` of using 1, 2, ... E experts, without and with the router's gates."""
        kind = (str(describe(inputs)), row_sizes(inputs, rows))
        if kind not in self.known:
            router = cast("nn.Module", self.routed.router)
            example = _with_trunk(inputs)
            self.known[kind] = cost_report(self.routed.model, example_input=example, router=router)
        report = self.known[kind]
        alone = [report.trunk_flops + experts for experts in accumulate(report.expert_flops)]
        free, routed = (
            torch.tensor(flops, dtype=torch.int64, device="cpu").expand(rows, -1)
            for flops in (alone, report.flops_by_experts)
        )
        return free, routed


def _with_trunk(inputs: Inputs) -> Inputs:
    """Inputs on which the trunk runs: for a state that it once computed, those of that time.

    What no expert reads is no longer there; ones of the same shape stand for it.
    """
    args, _ = inputs
    if len(args) != 1 or not isinstance(args[0], TrunkState):
        return inputs
    state = args[0]
    given: Inputs = state.values[0]
    if not state.hollow or state.layout is None:
        return given
    kept = iter(state.layout.live[0])

    def there(tensor: Tensor) -> Tensor:
        return tensor if next(kept) else tensor.new_ones(()).expand(tensor.shape).clone()

    filled: Inputs = map_tensors(there, given)
    return filled


def _refuse_target(target: Tensor, rows: int | str) -> NoReturn:
    refuse(
        "loader",
        f"one that yields (x, y), in this order, with y class indices [{rows}]",
        target,
        "Pass `y.argmax(1)` for one-hot or mixed labels, `y.long()` for indices, `y.flatten()` "
        "for a column of them.",
    )


def _unpack(batch: Any, device: torch.device) -> tuple[Any, Tensor]:
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)):
        found = type(batch).__name__
        if isinstance(batch, tuple | list):
            found += f" of {len(batch)}: ({', '.join(type(part).__name__ for part in batch)})"
        raise ArgumentError(
            "Expected argument `loader` to yield pairs (x, y) with y a tensor of class indices, "
            f"but got {found}. Wrap the loader in a generator that yields pairs; x "
            "may be a tensor, a tuple of positional or a dict of keyword arguments."
        )
    inputs, target = batch
    if isinstance(inputs, list):  # what a DataLoader's default collation makes of tuples
        inputs = tuple(inputs)
    if not holds_tensors(inputs):
        raise ArgumentError(
            "Expected argument `loader` to yield pairs (x, y) with x a tensor, a tuple of "
            f"positional or a dict of keyword arguments, but got x of {type(inputs).__name__}."
        )
    moved: Any = map_tensors(lambda tensor: tensor.to(device), inputs)
    return moved, target.cpu()
