"""Routed inference: rows that are settled leave, only the others reach the next expert."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ride_plugin._errors import ArgumentError
from ride_plugin.routing._exit import RoutingOutput, goes_on, start
from ride_plugin.routing._protocols import RoutableModel, Router
from ride_plugin.routing._threshold import CalibrationResult, calibrate


class RoutingInference(nn.Module):
    r"""Serves a wrapped model with early exit: each row uses as many experts as it needs.

    The trunk runs once and expert 0 sees every row. After expert $i$ a row goes on if
    $\sigma(g_i) > t_i$, with $g_i$ the router's gate and $t_i$ its threshold; a row's logits are
    the mean of the logits of the experts it used. (Paper, section 3, "Routing"; the authors' code
    uses 0.5 for every gate.) Threshold 0 runs every expert on every row, threshold 1 runs one.

    A call always runs without gradients and evaluates the model in evaluation mode, whatever its
    mode; modes and BatchNorm statistics are left as they were. The output carries no expert
    logits, so a loss refuses it. The thresholds are a buffer: saved in the state dict, moved by
    ``.to()``, changed in place by `set_threshold` and `calibrate`. It holds their logits, since
    trained gates reach logits of 30, where float32 probabilities are all 1.

    Args:
        model: a ``RIDEWrapper`` with at least two experts.
        router: an ``ExpertRouter``, a ``ConfidenceRouter``, or any module with such a ``gate``.
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
        _check_fit(model, router)
        self.model = model
        self.router = router
        parameter = next(model.parameters(), torch.empty(0))
        gates = cast("RoutableModel", model).num_experts - 1
        self.register_buffer("threshold_logits", torch.zeros(gates, device=parameter.device))
        self.set_threshold(threshold)

    @property
    def threshold(self) -> Tensor:
        """The thresholds as probabilities ``[E-1]``; change them with `set_threshold`."""
        return self.threshold_logits.sigmoid()

    def set_threshold(self, threshold: float | Sequence[float] | Tensor) -> None:
        """Change the thresholds in place, which makes no compiled graph stale.

        Args:
            threshold: one probability for all gates, or one for each gate.

        Raises:
            ArgumentError: a value is not from 0 to 1, or their number is not 1 or E-1.
        """
        # In float64 on the CPU: its logit keeps apart probabilities that are close to one.
        values = torch.as_tensor(threshold).detach().to("cpu", torch.float64)
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
            ArgumentError: (on the CPU only) an expert's logits hold NaN. On an accelerator the
                check would stall the device; there such rows come back as NaN.
        """
        model, router = cast("RoutableModel", self.model), cast("Router", self.router)
        with model.evaluating():
            state, total, features = start(model, args, kwargs)
            logits = mean = total
            used = torch.ones(len(total), dtype=torch.int64, device=total.device)
            limits = self.threshold_logits
            rows: Tensor | None = None  # which rows are still carried; None means all of them
            for index in range(1, model.num_experts):
                gate = router.gate(index - 1, mean, features)
                # The only wait for the device: the sizes of what follows depend on it.
                stay = goes_on(gate, limits[index - 1]).nonzero().squeeze(1)
                if len(stay) == 0:
                    break
                if len(stay) < len(total):
                    state, total = state.select(stay), total.index_select(0, stay)
                    rows = stay if rows is None else rows.index_select(0, stay)
                more, features = model.run_expert(index, state)
                total = total + more
                mean = total / (index + 1)
                if rows is None:
                    logits = mean
                    used.fill_(index + 1)
                else:
                    # Out of place: `logits` may be a tensor that the caller's model returned.
                    logits = logits.index_copy(0, rows, mean)
                    used.index_fill_(0, rows, index + 1)
        return RoutingOutput(logits, used) if return_routing else logits

    @torch.no_grad()
    def dense(
        self, *args: Any, return_routing: bool = False, **kwargs: Any
    ) -> Tensor | RoutingOutput:
        """Run every expert on every row and select afterwards; equal to ``forward`` row by row.

        No shape depends on a value, so this path compiles into one graph, captures and exports.
        It saves no work. Arguments and return as in ``forward``; under ``torch.compile`` and
        ``torch.export`` the model must be in evaluation mode already.
        """
        model, router = cast("RoutableModel", self.model), cast("Router", self.router)
        if torch.compiler.is_compiling() and self.model.training:
            raise ArgumentError(
                "Expected the model to be in evaluation mode when the dense path is compiled or "
                "exported, but it is in training mode. Call `.eval()` first."
            )
        experts, features = model.router_inputs(*args, **kwargs)
        logits = total = experts[:, 0]
        active = torch.ones_like(total[:, 0], dtype=torch.bool)
        used = active.to(torch.int64)
        for index in range(1, model.num_experts):
            gate = router.gate(index - 1, total / index, features[:, index - 1])
            active = active & goes_on(gate, self.threshold_logits[index - 1])
            total = total + experts[:, index]
            logits = torch.where(active[:, None], total / (index + 1), logits)
            used = used + active
        return RoutingOutput(logits, used) if return_routing else logits

    def calibrate(
        self,
        loader: Iterable[Any],
        *,
        max_experts: float | None = None,
        max_flops: float | None = None,
        max_accuracy_drop: float | None = None,
    ) -> CalibrationResult:
        """Choose the threshold for a target and set it.

        Runs the model once over the loader, sweeps a threshold common to all gates (they share
        their output layer, so their probabilities are on one scale), and does the same for the
        confidence exits, on the same samples, for comparison. Give exactly one target.

        Args:
            loader: yields ``(x, y)``: ``y`` class indices ``[B]``; ``x`` a tensor, a tuple of
                positional or a dict of keyword arguments. Tensors are moved to the model's
                device. Use data that training has not seen, distributed as those to be served.
            max_experts: largest mean number of experts for each row, from 1; the most accurate
                threshold within it is chosen.
            max_flops: the same as FLOPs for each row, as `cost_report` counts them.
            max_accuracy_drop: largest loss of top-1 accuracy against all experts, for example
                0.005; the cheapest threshold within it is chosen.

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
            cast("RoutableModel", self.model),
            cast("Router", self.router),
            loader,
            device=self.threshold_logits.device,
            max_experts=max_experts,
            max_flops=max_flops,
            max_accuracy_drop=max_accuracy_drop,
        )
        self.threshold_logits.fill_(result.threshold_logit)
        return result

    def extra_repr(self) -> str:
        """The thresholds, for ``repr``."""
        return f"threshold={[round(value, 4) for value in self.threshold.tolist()]}"


def _check_fit(model: nn.Module, router: nn.Module) -> None:
    needed = ("run_trunk", "run_expert", "router_inputs", "evaluating", "num_experts")
    missing = [name for name in needed if not hasattr(model, name)]
    if missing:
        raise ArgumentError(
            f"Expected argument `model` to be a RIDEWrapper, but got {type(model).__name__} "
            f"without {missing}. Hand in the wrapper itself, outside DistributedDataParallel."
        )
    if not callable(getattr(router, "gate", None)):
        raise ArgumentError(
            "Expected argument `router` to be an ExpertRouter or a ConfidenceRouter, but got "
            f"{type(router).__name__}, which has no method `gate`."
        )
    if cast("RoutableModel", model).num_experts < 2:
        raise ArgumentError(
            "Expected argument `model` to have at least two experts, but it has one: there is "
            "nothing to route. Use the model itself."
        )
    for name in ("num_experts", "num_classes", "feature_dim"):
        # A router without these, such as ConfidenceRouter, fits every model.
        if hasattr(router, name) and getattr(router, name) != getattr(model, name):
            raise ArgumentError(
                f"Expected argument `router` to fit the model's {name} {getattr(model, name)}, "
                f"but got {getattr(router, name)}. Use `ExpertRouter.for_model(model)`."
            )
