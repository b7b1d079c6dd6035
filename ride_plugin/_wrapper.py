"""RIDEWrapper: any backbone as one shared trunk and several experts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ride_plugin._checkpointing import checkpointed
from ride_plugin._errors import ArgumentError, RIDEError
from ride_plugin._output import ExpertOutput, RouterInputs, attach_expert_logits, mean_logits
from ride_plugin._split import TrunkState, split_backbone
from ride_plugin._split._analysis import layout_of, random_state_kept
from ride_plugin._split._build import another_expert
from ride_plugin._split._classifier import replace_classifier
from ride_plugin._split._example import Inputs, resize_batch
from ride_plugin._split._initialise import (
    break_tie,
    reinitialise,
    renew_classifier,
    warn_if_trained,
)
from ride_plugin._split._linked import LinkedModule
from ride_plugin._split._passes import play, pooled, read_attributes, record, write_attributes
from ride_plugin._split._state import Layout
from ride_plugin._split._tape import FeatureHook
from ride_plugin._split._tree import logits_in
from ride_plugin._split._views import Views


class RIDEWrapper(LinkedModule):
    r"""Turns a backbone into a shared trunk with forked experts (paper, section 3).

    The early submodules run once; the late ones and the classifier exist once for each expert.
    The ensemble's logits are the mean of the experts' logits.

    Args:
        backbone: any module that maps a batch to logits ``[B, C]``; it is not modified. A
            structured output (a dataclass or dict with ``logits``, auxiliary heads in training)
            is reduced to its logits.
        num_experts: number of experts, ``E >= 1``. With one, the model is the backbone.
        fork_at: name of the first forked submodule, as in ``backbone.named_modules()``. By default
            the last two resolution levels of a convolutional network, or the last third of a
            transformer's blocks.
        init: ``"fresh"`` redraws every expert's weights independently from the distribution that
            the backbone was initialised with (equal experts would stay equal). ``"copy"`` keeps
            the weights, for a pretrained backbone, and renews each expert's classifier.
        classifier: ``"cosine"`` gives each expert a :class:`CosineClassifier` with scale 30, as
            LDAM needs; a function of ``(in_features, num_classes)`` gives it any module; None
            keeps the backbone's.
        example_input: a batch as the backbone's forward receives it: a tensor, a tuple of
            arguments, or a dict of keyword arguments. Guessed if None.
        return_experts: return :class:`ExpertOutput` instead of a tensor that carries the experts'
            logits; can be set at any time. Needed under DistributedDataParallel with
            ``static_graph`` or ``find_unused_parameters``, and under DataParallel.
        checkpoint_experts: compute the experts' activations a second time in the backward pass
            instead of keeping them; can be set at any time. BatchNorm statistics are updated once.

    Raises:
        ArgumentError: an argument is out of range.
        SplitError: the backbone cannot be split; the message says where, why and what to pass.

    Example:
        >>> from ride_plugin import expert_logits
        >>> backbone = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
        ...     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        ... )
        >>> model = RIDEWrapper(backbone, num_experts=3)
        >>> out = model(torch.randn(4, 3, 32, 32))
        >>> tuple(out.shape), tuple(expert_logits(out).shape)
        ((4, 10), (4, 3, 10))
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_experts: int = 3,
        *,
        fork_at: str | None = None,
        init: Literal["fresh", "copy"] = "fresh",
        classifier: Literal["cosine"] | Callable[[int, int], nn.Module] | None = None,
        example_input: Any = None,
        return_experts: bool = False,
        checkpoint_experts: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(num_experts, int) or num_experts < 1:
            raise ArgumentError(
                f"Expected argument `num_experts` to be an integer >= 1, but got {num_experts!r}."
            )
        if init not in ("fresh", "copy"):
            raise ArgumentError(
                f"Expected argument `init` to be 'fresh' or 'copy', but got {init!r}."
            )
        split = split_backbone(backbone, fork_at, example_input)
        views = split.views
        self.num_experts = num_experts
        self.num_classes = split.num_classes
        self.fork_at = split.fork_at
        self.return_experts = return_experts
        self.checkpoint_experts = checkpoint_experts
        self._running = views.running
        self._layouts = split.layouts
        self._attributes = split.attributes
        self._inputs = split.inputs
        self._classifier = split.classifier
        self._links.extend(views.links)

        self.trunk = views.trunk
        self.experts = nn.ModuleList([views.expert])
        for _ in range(num_experts - 1):
            expert, links = another_expert(views)
            self.experts.append(expert)
            self._links.extend(links)
        if classifier is not None:
            for expert in self.experts:
                replace_classifier(expert, self._classifier, classifier, self.num_classes)
            for expert in self.experts:
                self._watch_classifier(expert)
        if num_experts > 1:
            self._initialise(init)
        self.feature_dim = self._measure_feature_dim()

    @property
    def classifiers(self) -> list[nn.Module]:
        """The classifier of each expert, in order; for cRT, tau-normalisation and the like."""
        if self._classifier is None:
            return []
        return [expert.get_submodule(self._classifier) for expert in self.experts]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | ExpertOutput:
        """Run the trunk once and every expert on its result.

        Returns:
            The mean of the experts' logits, a plain ``[B, C]`` tensor that carries the experts'
            logits (read them with :func:`ride_plugin.expert_logits`), or an
            :class:`ExpertOutput` if ``return_experts`` is set.
        """
        if self.checkpoint_experts and torch.is_grad_enabled():
            each = self._checkpointed_experts(args, kwargs)
        else:
            each = [logits for logits, _ in self._all_experts(args, kwargs)]
        stacked = torch.stack(each, dim=1)
        logits = mean_logits(stacked)
        if self.return_experts:
            return ExpertOutput(logits, stacked)
        return attach_expert_logits(logits, stacked)

    def run_trunk(self, *args: Any, **kwargs: Any) -> TrunkState:
        """Run the shared part only; hand the result to :meth:`run_expert`."""
        before = read_attributes(self.trunk, self._attributes)
        state, _ = record(self.trunk, self._running, self._layouts, args, kwargs, stop_at_fork=True)
        return self._settled(replace(state, attributes=before), args, kwargs)

    def start(self, *args: Any, **kwargs: Any) -> tuple[TrunkState, Tensor, Tensor]:
        """Run the shared part and expert 0 in one pass; equal to running one after the other.

        Returns:
            The state for the other experts, and expert 0's logits ``[B, C]`` and features
            ``[B, D]``, as :meth:`run_expert` returns them.
        """
        state, logits, features = self._first_expert(args, kwargs)
        return self._settled(state, args, kwargs), logits, features

    def run_expert(self, index: int, state: TrunkState) -> tuple[Tensor, Tensor]:
        """Run one expert on the trunk's state, or on some rows of it.

        Args:
            index: the expert, ``0 <= index < num_experts``.
            state: what :meth:`run_trunk` returned, or ``state.select(rows)``.

        Returns:
            Its logits ``[B, C]``, and what its classifier received, pooled to ``[B, D]``.
        """
        expert = self.experts[index]
        self._watch_classifier(expert)
        write_attributes(expert, self._attributes, state.attributes)
        self._running.features = None
        try:
            output = play(expert, self._running, state)
            return self._read(output)
        finally:
            self._running.features = None

    def router_inputs(self, *args: Any, **kwargs: Any) -> RouterInputs:
        """Compute what the router reads, in evaluation mode and without gradients.

        Whatever the model's mode, BatchNorm statistics stay as they are and the mode is restored,
        so stage two can be an ordinary training loop. The result can be stored and reused.

        Returns:
            :class:`RouterInputs`: expert logits ``[B, E, C]`` and features ``[B, E, D]``.
        """
        for expert in self.experts:
            self._watch_classifier(expert)
        # A graph cannot restore modes; compile and export what is in evaluation mode already.
        mode = nullcontext() if torch.compiler.is_compiling() else self.evaluating()
        with mode, torch.no_grad():
            logits, features = zip(*self._all_experts(args, kwargs), strict=True)
            return RouterInputs(torch.stack(logits, dim=1), torch.stack(features, dim=1))

    @contextmanager
    def evaluating(self) -> Iterator[Self]:
        """Evaluation mode for the duration of a block; every submodule's mode is restored."""
        training: list[nn.Module] = []
        rest: list[nn.Module] = [self]
        while rest:  # `modules()` spends most of its time on names
            module = rest.pop()
            rest.extend(child for child in module._modules.values() if child is not None)
            if module.training:
                training.append(module)
        if training:
            self.eval()
        try:
            yield self
        finally:
            for module in training:
                module.training = True

    def example_input(self, batch_size: int = 1) -> Inputs:
        """Inputs ``(args, kwargs)`` that the backbone accepts, for cost reports and export."""
        return resize_batch(self._inputs, batch_size)

    def extra_repr(self) -> str:
        """What was chosen: shown when the model is printed."""
        return f"num_experts={self.num_experts}, fork_at={self.fork_at!r}"

    def _all_experts(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[Tensor, Tensor]]:
        state, logits, features = self._first_expert(args, kwargs)
        rest = [self.run_expert(index, state) for index in range(1, self.num_experts)]
        return [(logits, features), *rest]

    def _first_expert(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[TrunkState, Tensor, Tensor]:
        if self.num_experts > 1 and any(layout.changes_in_place for layout in self._layouts):
            # Going on into expert 0 would let it write into what the others read.
            state = self.run_trunk(*args, **kwargs)
            return (state, *self.run_expert(0, state))
        before = read_attributes(self.trunk, self._attributes)
        self._running.features = None
        try:
            # The recording goes on into expert 0: one pass fewer over the backbone's own code.
            state, output = record(
                self.trunk, self._running, self._layouts, args, kwargs, stop_at_fork=False
            )
            return (replace(state, attributes=before), *self._read(output))
        finally:
            self._running.features = None

    def _settled(
        self, state: TrunkState, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TrunkState:
        if state.layout is None and not torch.compiler.is_compiling():
            # A path not seen at the build, for example padding at another input size.
            state = replace(state, layout=self._learn_layout(args, kwargs))
        return state.hollowed()

    def _checkpointed_experts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        state = self.run_trunk(*args, **kwargs)

        def logits_of(index: int) -> Tensor:
            return self.run_expert(index, state)[0]

        return [
            checkpointed(partial(logits_of, k), self.experts[k]) for k in range(len(self.experts))
        ]

    def _watch_classifier(self, expert: nn.Module) -> None:
        # A classifier that somebody replaced has lost the hook that keeps its input.
        if self._classifier is not None:
            head = expert.get_submodule(self._classifier)
            if not any(isinstance(h, FeatureHook) for h in head._forward_pre_hooks.values()):
                head.register_forward_pre_hook(FeatureHook(self._running))

    def _read(self, output: Any) -> tuple[Tensor, Tensor]:
        logits = logits_in(output)
        if logits is None:
            raise RIDEError("An expert returned no logits [B, C]; the backbone's output changed.")
        features = pooled(self._running.features)
        # A classifier that is not a module of its own leaves no feature; its logits stand in.
        return logits, logits if features is None else features

    def _learn_layout(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout | None:
        views = Views(self.trunk, self.experts[0], self._running, [], [])
        with random_state_kept(self):
            try:
                layout = layout_of(views, (args, kwargs), self.trunk.training, self._attributes)
            except RIDEError:
                return None  # every row can still go on; only `select` needs the layout
        self._layouts.append(layout)
        return layout

    def _measure_feature_dim(self) -> int:
        with self.evaluating(), torch.no_grad(), random_state_kept(self):
            args, kwargs = self._inputs
            _, features = self._all_experts(args, kwargs)[0]
        return features.shape[1]

    def _initialise(self, init: str) -> None:
        shared = {id(tensor) for tensor in self.trunk.parameters()}
        if init == "fresh":
            warn_if_trained(self.experts[0])
            left: list[str] = []
            for expert in self.experts:
                left = reinitialise(expert, shared)  # the same names for each
            if left:
                warnings.warn(
                    f"These parameters of the experts keep the backbone's values, because most of "
                    f"their entries are zero and have their places (identity, dirac, pruned): "
                    f"{left}. Initialise them yourself for each of `model.experts` if the experts "
                    "shall differ there.",
                    UserWarning,
                    stacklevel=3,
                )
        for head in self.classifiers:
            if init == "copy":
                renew_classifier(head)
            break_tie(head)
