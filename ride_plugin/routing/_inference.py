"""Routed inference: rows that are settled leave, only the others reach the next expert."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from typing_extensions import Self

from ride_plugin._checks import as_cpu_tensor, has_values, refuse, way_inside
from ride_plugin._compiler import is_exported, uncompiled
from ride_plugin._cost import check_router
from ride_plugin._errors import ArgumentError, ReplayError
from ride_plugin._split import (
    Holder,
    SplitModule,
    is_same,
    kept_rows_of,
    refuse_plain_state,
    refuse_state_of_part,
)
from ride_plugin.routing._exit import RoutedStages, RoutingOutput, run_everything, walk
from ride_plugin.routing._export import export_stages
from ride_plugin.routing._protocols import RoutableModel, Router
from ride_plugin.routing._threshold import CalibrationResult, calibrate

_NEEDED = ("run_trunk", "run_expert", "router_inputs", "evaluating", "num_experts")


class RoutingInference(nn.Module):
    r"""Serves a wrapped model with early exit: each row uses as many experts as it needs.

    The trunk runs once and expert 0 sees every row. After expert $i$ a row goes on if
    $\sigma(g_i) > t_i$, with $g_i$ the router's gate and $t_i$ its threshold; a row's logits are
    the mean of the logits of the experts it used. (Paper, section 3, "Routing"; the authors' code
    uses 0.5 for every gate.) Threshold 0 runs every expert on every row, threshold 1 runs one.

    A call always runs without gradients and with model and router in evaluation mode, whatever
    their modes; modes and BatchNorm statistics are left as they were. The output carries no expert
    logits, so a loss refuses it. The thresholds are a buffer: saved in the state dict, moved by
    ``.to()``, changed in place by `set_threshold` and `calibrate`. It holds their logits, since
    trained gates reach logits of 30, where float32 probabilities are all 1, and stays in float32
    when the model is cast to half precision.

    Args:
        model: a ``RIDEWrapper`` with at least two experts. One from ``torch.compile`` is served as
            it was before; compile `dense`, or export the stages.
        router: an ``ExpertRouter``, a ``ConfidenceRouter``, or any module or other object with such
            a ``gate``.
        threshold: one probability for all gates, or one for each (E-1 of them), from 0 to 1.

    Raises:
        ArgumentError: model and router do not fit, or a threshold is out of range.

    Example:
        >>> from ride_plugin import ConfidenceRouter, RIDEWrapper
        >>> backbone = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
        ...     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        ... )
        >>> model = RIDEWrapper(backbone, num_experts=3)
        >>> serve = RoutingInference(model, ConfidenceRouter(), threshold=0.5)
        >>> logits, num_experts_used = serve(torch.randn(4, 3, 32, 32), return_routing=True)
        >>> tuple(logits.shape), tuple(num_experts_used.shape)
        ((4, 10), (4,))
    """

    threshold_logits: Tensor

    def __init__(
        self, model: nn.Module, router: nn.Module, threshold: float | Sequence[float] = 0.5
    ) -> None:
        super().__init__()
        model = uncompiled(model)
        _check_fit(model, router)
        self.model = model
        self.router = router
        parameter = next(model.parameters(), torch.empty(0, device="cpu"))
        gates = cast("RoutableModel", model).num_experts - 1
        with torch.inference_mode(False):  # what is made in it could not be changed outside
            start = torch.zeros(gates, dtype=torch.float32, device=parameter.device)
            self.register_buffer("threshold_logits", start)
        self.set_threshold(threshold)

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any module; another model or router has to fit, as at construction."""
        if name in ("model", "router") and "threshold_logits" in vars(self).get("_buffers", ()):
            value = uncompiled(value)
            model, router = (value, self.router) if name == "model" else (self.model, value)
            _check_fit(model, router)
            experts = self.threshold_logits.numel() + 1
            if model.num_experts != experts:
                raise ArgumentError(
                    f"Expected `{name}` to serve {experts} experts, for which the thresholds are, "
                    f"but got a model of {model.num_experts}. Make another one: "
                    "`RoutingInference(model, router)`."
                )
        super().__setattr__(name, value)

    @property
    def stages(self) -> RoutedStages:
        """Trunk, experts and gates one by one, as the walk through them needs them."""
        model, router = cast("RoutableModel", self.model), cast("Router", self.router)
        return RoutedStages(model, router, self.threshold_logits)

    @property
    def threshold(self) -> Tensor:
        """The thresholds as probabilities ``[E-1]``; assigning to it is `set_threshold`.

        Each read makes a new tensor, so writing into one (``serve.threshold[0] = 0.9``) is lost.
        In float64, whose probabilities tell logits apart up to about 36, to three digits at 30; to
        hand on the very same limits, copy ``threshold_logits`` or the state dict.
        """
        return self.threshold_logits.double().sigmoid()

    @threshold.setter
    def threshold(self, value: float | Sequence[float] | Tensor) -> None:
        self.set_threshold(value)

    def set_threshold(self, threshold: float | Sequence[float] | Tensor) -> None:
        """Change the thresholds in place, which makes no compiled graph stale.

        Args:
            threshold: one probability for all gates, or one for each gate.

        Raises:
            ArgumentError: a value is not from 0 to 1, or their number is not 1 or E-1.
        """
        values = as_cpu_tensor(threshold, "threshold")
        if values.is_complex() or values.dtype == torch.bool:
            refuse("threshold", "a probability, or one for each gate", threshold)
        values = values.double()  # its logit keeps apart probabilities that are close to one
        if values.dim() > 1 or values.numel() not in (1, self.threshold_logits.numel()):
            raise ArgumentError(
                "Expected argument `threshold` to be one number or one for each of the "
                f"{self.threshold_logits.numel()} gates, but got shape {list(values.shape)}."
            )
        if not ((values >= 0) & (values <= 1)).all():
            raise ArgumentError(
                "Expected argument `threshold` to be a probability from 0 (all experts always) to "
                f"1 (one expert always), but got {threshold}."
            )
        self.threshold_logits.copy_(values.logit())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.threshold_logits
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # A cast of the model would round the limit between gates that lie close to each other.
        if self.threshold_logits.dtype != exact.dtype:
            self.threshold_logits = exact.to(self.threshold_logits.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        held = self.threshold_logits  # `assign=True` replaces it
        # Somebody's hooks run in it, which may rename entries; the parts load theirs only later.
        super()._load_from_state_dict(state_dict, prefix, *rest)
        refuse_plain_state(state_dict, prefix, self)
        refuse_state_of_part(state_dict, prefix, self)
        limits = state_dict.get(f"{prefix}threshold_logits", held)
        if isinstance(self.model, Holder) and not is_same(held, limits):
            # Else the model would warn of a state that holds its own tensors only.
            self.model.ride_versions = []

    @overload
    def forward(
        self, *args: Any, return_routing: Literal[False] = False, **kwargs: Any
    ) -> Tensor: ...

    @overload
    def forward(
        self, *args: Any, return_routing: Literal[True], **kwargs: Any
    ) -> RoutingOutput: ...

    @overload
    def forward(
        self, *args: Any, return_routing: bool = False, **kwargs: Any
    ) -> Tensor | RoutingOutput: ...

    @torch.no_grad()
    def forward(
        self, *args: Any, return_routing: bool = False, **kwargs: Any
    ) -> Tensor | RoutingOutput:
        """Run the trunk once and each expert on the rows that need it.

        Args:
            *args: what the model takes, and ``**kwargs``.
            return_routing: return also how many experts each row used.
            **kwargs: see ``*args``.

        Returns:
            logits ``[B, C]``, or a `RoutingOutput`.

        Raises:
            ArgumentError: this is being exported, or (on the CPU only) an expert's logits hold
                NaN. On an accelerator the check would stall the device; there such rows come back
                as NaN.
            ReplayError: the experts keep something of each row from call to call, a membrane
                potential say, that was not reset since the last call, and rows leave early.
        """
        if is_exported((args, kwargs)):
            raise ArgumentError(
                "Expected RoutingInference not to be exported as a whole: how many rows reach an "
                "expert depends on values, which no graph can hold. Export its stages, "
                "`serve.export_stages()`, or a module whose forward returns `serve.dense(x)`, "
                "which runs every expert on every row and selects afterwards."
            )
        stages, kept = self.stages, kept_rows_of(self.model)
        held = kept is not None and kept.held(cast("SplitModule", self.model).experts)
        with stages.evaluating():
            try:
                output = walk(stages, *args, **kwargs)
            except ReplayError as error:  # states of other numbers of rows, say
                if kept is None or not held:
                    raise
                raise kept.error() from error
        if kept is not None:
            kept.check(held, output.num_experts_used)
        return output if return_routing else output.logits

    if TYPE_CHECKING:
        __call__ = forward  # `nn.Module` declares a call of any kind

    @overload
    def dense(
        self, *args: Any, return_routing: Literal[False] = False, **kwargs: Any
    ) -> Tensor: ...

    @overload
    def dense(self, *args: Any, return_routing: Literal[True], **kwargs: Any) -> RoutingOutput: ...

    @overload
    def dense(
        self, *args: Any, return_routing: bool = False, **kwargs: Any
    ) -> Tensor | RoutingOutput: ...

    @torch.no_grad()
    def dense(
        self, *args: Any, return_routing: bool = False, **kwargs: Any
    ) -> Tensor | RoutingOutput:
        """Run every expert on every row and select afterwards; equal to ``forward`` row by row.

        No shape depends on a value, so this path compiles into one graph, captures and exports.
        It saves no work. Arguments and return as in ``forward``; under ``torch.compile`` and
        ``torch.export`` the model, and a router made by hand, must be in evaluation mode already.
        """
        stages, compiling = self.stages, torch.compiler.is_compiling()
        if compiling and (training := stages.in_training_mode()):
            raise ArgumentError(
                f"Expected the {training} to be in evaluation mode when the dense path is compiled "
                "or exported, but it is in training mode. Call `.eval()` first."
            )
        # A graph cannot restore modes.
        with nullcontext() if compiling else stages.evaluating():
            output = run_everything(stages, *args, **kwargs)
        return output if return_routing else output.logits

    def calibrate(
        self,
        loader: Iterable[Any],
        *,
        max_experts: float | None = None,
        max_flops: float | None = None,
        max_accuracy_drop: float | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> CalibrationResult:
        """Choose the threshold for a target and set it.

        Runs the model once over the loader, sweeps a threshold common to all gates (they share
        their output layer, so their probabilities are on one scale), and does the same for the
        confidence exits, on the same samples, for comparison. Give exactly one target.

        Where ``torch.distributed`` is initialised, every rank calls this with its own share of the
        data; the samples of all ranks count, and every rank ends with the same threshold. (What a
        sampler repeats to give every rank as many samples counts twice.)

        Args:
            loader: yields ``(x, y)``: ``y`` class indices ``[B]``; ``x`` a tensor, a tuple of
                positional or a dict of keyword arguments. Tensors are moved to the model's
                device. Use data that training has not seen, distributed as those to be served.
            max_experts: largest mean number of experts for each row, from 1; the most accurate
                threshold within it is chosen.
            max_flops: the same as FLOPs for each row, as `cost_report` counts them for its shape
                and the other arguments: a longer sequence costs more. A stored state of the trunk
                costs what its batch does, with the trunk.
            max_accuracy_drop: largest loss of top-1 accuracy against all experts, a share from 0
                to 1, for example 0.005; the cheapest threshold within it is chosen.
            progress: called after each batch with its number of samples, for example
                ``tqdm(total=len(dataset)).update``.

        Returns:
            The whole curve, the choice, and the baselines' curves.

        Raises:
            ArgumentError: the loader is empty, not exactly one target is given, or it is out of
                reach.

        Warns:
            LongTailedCalibrationWarning: the labels are long-tailed, which makes the choice right
                for such data and wrong for balanced ones.
        """
        result = calibrate(
            self.stages,
            loader,
            max_experts=max_experts,
            max_flops=max_flops,
            max_accuracy_drop=max_accuracy_drop,
            progress=progress,
        )
        self.threshold_logits.fill_(result.threshold_logit)
        return result

    def export_stages(self, example_input: Any = None) -> dict[str, ExportedProgram]:
        """Export trunk, experts and gates as programs of their own; `StagedRunner` runs them.

        Early exit cannot be one graph, since how many rows reach an expert depends on values. Its
        parts can: each takes any number of rows, and what remains is a loop of a few lines. Every
        tensor between the parts has the rows in its first dimension. Weights and thresholds are
        exported as they stand: the programs hold copies of them.

        Args:
            example_input: a batch as for ``RIDEWrapper``; by default the model's own example. All
                sizes but the batch are fixed by it.

        Returns:
            Programs by name, each of which `torch.export.save` can store:
            ``trunk``: the model's input tensors -> the tensors that cross the cut;
            ``expert_0``, ``expert_1``, ...: those -> logits ``[b, C]``, features ``[b, D]``;
            ``gate_0``, ...: mean logits ``[b, C]``, features ``[b, D]`` -> bool ``[b]``, goes on.

        Raises:
            ArgumentError: the model is not a ``RIDEWrapper``, its path for this input is
                unknown or another under the tracer, a module of the trunk returns a number that
                follows values or the number of rows, or ``torch.export`` refuses a stage for any
                number of rows.

        Example:
            >>> from ride_plugin import ConfidenceRouter, RIDEWrapper
            >>> backbone = nn.Sequential(
            ...     nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
            ...     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
            ... )
            >>> serve = RoutingInference(RIDEWrapper(backbone, 2), ConfidenceRouter())
            >>> sorted(serve.export_stages())
            ['expert_0', 'expert_1', 'gate_0', 'trunk']
        """
        return export_stages(self.stages, example_input)

    def extra_repr(self) -> str:
        """The thresholds, for ``repr``."""
        if not has_values(self.threshold_logits):
            return f"threshold=[...] on {self.threshold_logits.device}"
        # Four digits, but all of them where four would show a threshold that exits always or never.
        shown = [(round(value, 4), value) for value in self.threshold.tolist()]
        return f"threshold={[value if short in (0, 1) else short for short, value in shown]}"


def _check_fit(model: nn.Module, router: nn.Module) -> None:
    if not _can_be_routed(model):
        expected = f"a RIDEWrapper, or a model that has {', '.join(_NEEDED)}"
        wrap = "Wrap the backbone: `RIDEWrapper(backbone)`."
        refuse("model", expected, model, way_inside(model, "model", _can_be_routed) or wrap)
    if cast("RoutableModel", model).num_experts < 2:
        raise ArgumentError(
            "Expected argument `model` to have at least two experts, but it has one: there is "
            "nothing to route. Use the model itself."
        )
    check_router(router, model)


def _can_be_routed(model: object) -> bool:
    return all(hasattr(model, name) for name in _NEEDED)
