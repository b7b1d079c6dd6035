"""RIDEWrapper: any backbone as one shared trunk and several experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ride_plugin._checks import (
    check_bool,
    check_choice,
    check_function,
    check_instance,
    check_integer,
    check_number,
    refuse,
)
from ride_plugin._compiler import check_compiles, refuse_tracing
from ride_plugin._construct import construct
from ride_plugin._contexts import training_pass
from ride_plugin._delegate import Names, from_backbone, refuse_added, set_on_parts, take_from_parts
from ride_plugin._errors import ArgumentError, SplitError
from ride_plugin._fold_batchnorm import folded_copy
from ride_plugin._halves import halves_of
from ride_plugin._inputs import own_inputs
from ride_plugin._output import (
    ExpertOutput,
    RouterInputs,
    attach_expert_logits,
    joined,
    mark_evaluated,
)
from ride_plugin._parameters import summary
from ride_plugin._recompute import checkpointed
from ride_plugin._split import (
    Pair,
    Parts,
    SplitModule,
    check_logits_choice,
    feature_dim_of,
    held_together_by,
    join_parts,
    losses_beside,
    losses_dropped,
    plain_modules,
    reader_in,
    unchanged,
    whole_outputs,
)
from ride_plugin._tree import tensors_in
from ride_plugin._watch import TrainingWatch

ReturnExperts: TypeAlias = bool | Literal["training", "outputs"]
"""Never, always, or in training mode: their logits, or whatever the backbone returns."""

_DECIDED = frozenset({"num_experts", "num_classes", "fork_at", "expert_width"})  # at wrapping
_RETURN_EXPERTS: tuple[ReturnExperts, ...] = (False, True, "training", "outputs")


class RIDEWrapper(SplitModule):
    r"""Turns a backbone into a shared trunk with forked experts (paper, section 3).

    The early submodules run once; the late ones and the classifier exist once for each expert.
    The ensemble's logits are the mean of the experts' logits. Make the optimizer after wrapping,
    from ``model.parameters()``: one of the backbone's parameters trains the backbone, which the
    model does not use. (A training in which nothing changes is warned of, as is one whose loss
    reaches the mean of the experts' logits alone.)

    Args:
        backbone: any module that maps a batch to logits ``[B, C]``; it is not modified. A
            structured output (a dataclass or dict with ``logits``, auxiliary heads in training)
            is reduced to its logits. Wrap the module itself, before DistributedDataParallel, FSDP
            and ``torch.compile``.
        num_experts: number of experts, ``E >= 1``. With one, the model is the backbone.
        fork_at: name of the first forked submodule, as in ``backbone.named_modules()``. By default
            the last two resolution levels of a convolutional network, or the last third of a
            transformer's blocks.
        expert_width: share of the channels that the experts keep, in ``(0, 1]``; the paper's is
            0.75. Widths tied to the trunk stay, for example a transformer's residual stream; then
            heads and hidden widths inside the blocks are narrowed.
        init: ``"fresh"`` redraws every expert's weights independently from the distribution that
            the backbone was initialised with (equal experts would stay equal). ``"copy"`` keeps
            the weights, for a pretrained backbone, and renews each expert's classifier.
        classifier: ``"cosine"`` gives each expert a :class:`CosineClassifier` with scale 30, as
            LDAM needs; a function of ``(in_features, num_classes)`` gives it any module; None
            keeps the backbone's.
        expert_factory: a function of the expert's index that returns a network with the backbone's
            submodule names, for example one of the same class with narrower late stages. Expert k
            is its forked half, with the weights that it has; its early half is dropped.
        example_input: a batch as the backbone's forward receives it: a tensor, a tuple of
            arguments, ``(batch,)`` where the only one is a tuple, or a dict of keyword arguments.
            Guessed if None.
        logits: which part of the backbone's output is the logits ``[B, C]``: an index, a key or
            attribute, or a function of the output (one of a module, not a lambda, if the model
            shall be pickled). None finds them where it is certain: the output itself, an entry
            named `logits`, the only matrix, or what a classifier returned that comes last of all;
            everything else is an error that lists what was found. Where the backbone returns a
            tuple or a list, if only in training, code that indexes its output would read rows of
            the logits, so there None is warned of.
        num_classes: ``C``. If it is the backbone's own number it confirms it; if not, the experts'
            classifiers are made anew with as many outputs, which needs a linear layer in the
            backbone (a pretrained head of 1000 classes, a task of 150) or ``classifier=``, and the
            parts' `num_classes`, `num_labels` and configuration say so. None takes the backbone's
            own number.
        return_experts: True returns :class:`ExpertOutput` instead of a tensor that carries the
            experts' logits; ``"training"`` does so in training mode only, so that validation code
            still receives plain logits. Can be set at any time, also when an engine has wrapped the
            model: ``RIDEWrapper.inside(engine).return_experts = "training"``. Needed where outputs
            are rebuilt or cast: DataParallel, DistributedDataParallel with ``static_graph`` or
            ``find_unused_parameters``, FSDP, accelerate, Fabric and Trainer in half precision.
            ``"outputs"`` is for losses that need more than logits (features, prototypes): in
            training mode a list of what the backbone returns, once for each expert.
        checkpoint_experts: compute the experts' activations a second time in the backward pass
            instead of keeping them; can be set at any time. Statistics and other state that a
            forward writes are updated once, and what it draws at random is drawn again.

    Raises:
        ArgumentError: an argument is out of range.
        SplitError: the backbone, or what ``expert_factory`` returns, cannot be split; the message
            says where, why and what to pass.
        WidthError: the experts cannot be narrowed; the message names the layer.

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
        expert_width: float = 1.0,
        init: Literal["fresh", "copy"] = "fresh",
        classifier: Literal["cosine"] | Callable[[int, int], nn.Module] | None = None,
        expert_factory: Callable[[int], nn.Module] | None = None,
        example_input: Any = None,
        logits: int | str | Callable[[Any], Tensor] | None = None,
        num_classes: int | None = None,
        return_experts: ReturnExperts = False,
        checkpoint_experts: bool = False,
    ) -> None:
        num_experts = check_integer(num_experts, "num_experts", 1)
        if num_classes is not None:
            num_classes = check_integer(num_classes, "num_classes", 2)
        check_logits_choice(logits)
        if fork_at is not None:
            check_instance(fork_at, "fork_at", str, "the name of a submodule, or None")
        init = check_choice(init, "init", ("fresh", "copy"))
        expert_width = check_number(expert_width, "expert_width", 0, 1, open_low=True)
        if callable(classifier):
            check_function(classifier, "classifier", "classifier(in_features, num_classes)")
        if expert_factory is not None:
            check_function(expert_factory, "expert_factory", "expert_factory(index)")
        if expert_width < 1 and init == "copy":
            raise ArgumentError(
                "Expected argument `expert_width` to be 1.0 with init='copy', but got "
                f"{expert_width}: narrower experts cannot keep the backbone's weights. Pass "
                "init='fresh'."
            )
        if expert_factory is not None and (expert_width < 1 or init == "copy"):
            raise ArgumentError(
                "Expected `expert_width` and `init` to be left alone with `expert_factory`, which "
                f"makes the experts as they are, but got {expert_width} and {init!r}."
            )
        parts = construct(
            backbone,
            num_experts,
            fork_at=fork_at,
            expert_width=expert_width,
            init=init,
            classifier=classifier,
            expert_factory=expert_factory,
            example_input=example_input,
            logits=logits,
            num_classes=num_classes,
            return_experts=return_experts,
        )
        self._assemble(parts, expert_width, return_experts, checkpoint_experts)

    def _assemble(
        self,
        parts: Parts,
        expert_width: float,
        return_experts: ReturnExperts,
        checkpoint_experts: bool,
    ) -> None:
        super().__init__(parts)
        self.feature_dim, self._classifies_logits = feature_dim_of(parts)
        self.expert_width = expert_width
        self.return_experts = return_experts
        self.checkpoint_experts = check_bool(checkpoint_experts, "checkpoint_experts")
        self._settings = held_together_by((self.trunk, *self.experts))
        self._of_backbone = Names.of(self, RIDEWrapper)
        self._watch = TrainingWatch(any(p.requires_grad for p in self.parameters()))

    @property
    def return_experts(self) -> ReturnExperts:
        """Whether the experts' logits are returned: see `RIDEWrapper`."""
        return self._return_experts

    @return_experts.setter
    def return_experts(self, value: ReturnExperts) -> None:
        asked: ReturnExperts = check_choice(value, "return_experts", _RETURN_EXPERTS)
        if asked == "outputs" and self._differs is not None:
            _refuse_outputs(self._differs, "the example")
        self._return_experts = asked

    @classmethod
    def inside(cls, model: nn.Module) -> Self:
        """Find the wrapped model in what an engine made of it.

        Args:
            model: a module with one wrapped model inside: DistributedDataParallel, DataParallel,
                FSDP, what ``accelerator.prepare`` or ``torch.compile`` returned, one of your own.

        Raises:
            ArgumentError: there is no wrapped model inside, or more than one.

        Example:
            >>> backbone = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
            >>> engine = nn.DataParallel(RIDEWrapper(backbone, 2, fork_at="2"))
            >>> RIDEWrapper.inside(engine).return_experts = "training"
            >>> type(engine.train()(torch.randn(4, 8))).__name__
            'ExpertOutput'
        """
        check_instance(model, "model", nn.Module, "a module")
        found = [module for module in model.modules() if isinstance(module, cls)]
        if len(found) != 1:
            refuse("model", f"a module with one {cls.__name__} inside, not {len(found)}", model)
        return found[0]

    @classmethod
    def from_parts(
        cls,
        trunk: nn.Module,
        expert_factory: Callable[[int], nn.Module],
        num_experts: int = 3,
        *,
        example_input: Any = None,
        return_experts: ReturnExperts = False,
        checkpoint_experts: bool = False,
    ) -> Self:
        """Build the model from a trunk and experts made by hand, instead of splitting a backbone.

        Trunk and experts are copied and keep their weights. Parameters are named
        ``trunk.body.*`` and ``experts.k.head.*``.

        Args:
            trunk: the shared part.
            expert_factory: returns expert ``k``: a module that takes what the trunk returns, as
                one argument, and returns logits ``[B, C]``. Widths may differ between experts, but
                the last linear layer has the same name and number of features in each.
            num_experts: ``E >= 1``.
            example_input: a batch as the trunk's forward receives it; guessed if None.
            return_experts: as for the class.
            checkpoint_experts: as for the class.

        Raises:
            ArgumentError: ``expert_factory`` returns no module.
            SplitError: an expert does not run on the trunk's result, or mixes rows.

        Example:
            >>> trunk = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
            >>> model = RIDEWrapper.from_parts(trunk, lambda k: nn.Linear(16, 5), num_experts=2)
            >>> tuple(model(torch.randn(4, 8)).shape)
            (4, 5)
        """
        number = check_integer(num_experts, "num_experts", 1)
        parts = join_parts(trunk, expert_factory, number, example_input)
        model = cls.__new__(cls)
        cls._assemble(model, parts, 1.0, return_experts, checkpoint_experts)
        return model

    @classmethod
    def from_pair(
        cls,
        feature_extractor: nn.Module,
        classifier: nn.Module,
        num_experts: int = 3,
        *,
        features: int | str | Callable[[Any], Tensor] | None = None,
        **options: Any,
    ) -> Self:
        """Wrap a feature extractor and a classifier that are two modules.

        The model maps a batch to logits, as every wrapped model. Training code that calls the two
        one after the other can go on doing so with the two modules of :meth:`as_pair`. Further
        modules after the classifier belong to it: ``nn.Sequential(classifier, scaling)``.

        Args:
            feature_extractor: returns features, or a tuple or dict that holds them.
            classifier: takes the features, as one argument, and returns logits, or a tuple or dict
                that holds them.
            num_experts: ``E >= 1``.
            features: where the features are in what the extractor returns: an index, a key or a
                function of it. None takes a tensor as it is, or the only matrix.
            **options: arguments of the class. Submodules have the names
                ``feature_extractor.*`` and ``classifier.*``, in ``fork_at`` for example.

        Raises:
            SplitError: it is not certain which the features are, or the pair cannot be split.

        Example:
            >>> extractor = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
            >>> model = RIDEWrapper.from_pair(extractor, nn.Linear(16, 5), num_experts=2)
            >>> net, head = model.as_pair()  # instead of extractor and classifier
            >>> tuple(head(net(torch.randn(4, 8))).shape)
            (4, 5)
        """
        try:
            return cls(Pair(feature_extractor, classifier, features), num_experts, **options)
        except SplitError as error:
            _tell_swap(cls, feature_extractor, classifier, num_experts, options, error)
            raise

    def as_pair(self) -> tuple[nn.Module, nn.Module]:
        """The model as the two modules of :meth:`from_pair`, with the model's own parameters.

        The first returns the features of all experts side by side, ``[B, E * D]``, which survive
        whatever is done to rows; the second runs each expert's classifier on its part and returns
        what the model returns, logits that carry the experts'. Where extractor or classifier
        returned a tuple, a dict or a dataclass, so do these, with None in the other places.

        What is done to features between the two has to treat each expert's part by itself.
        ``F.normalize(features, dim=1)`` divides by the norm of all parts together; write
        ``F.normalize(features.unflatten(1, (E, -1)), dim=2).flatten(1)``, or let such a step belong
        to the extractor.

        What a model refuses or keeps together (loading, moving, modes, writes into what experts
        share) the two refuse and keep as well. ``checkpoint_experts`` and ``torch.compile`` are for
        the model as a whole.

        Raises:
            ArgumentError: the model was not made by :meth:`from_pair`.
        """
        return halves_of(self, self._output, self._around_half)

    def to_module(self, expert: int = 0) -> nn.Module:
        """One expert as a plain module: the backbone's class with trunk and expert put together.

        The result is a copy with a state dict under the backbone's names, and holds nothing of this
        library but what you put in: a cosine classifier, weight scaling that was not folded in.
        (After :meth:`from_parts` it is ``nn.Sequential(trunk, expert)``, after
        :meth:`from_pair` an ``nn.ModuleDict`` of `feature_extractor` and `classifier`.)

        Args:
            expert: which one.

        Raises:
            ArgumentError: there is no such expert.

        Example:
            >>> backbone = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
            >>> RIDEWrapper(backbone, 2, fork_at="2").to_module(1)
            Sequential(
              (0): Linear(in_features=8, out_features=16, bias=True)
              (1): ReLU()
              (2): Linear(in_features=16, out_features=5, bias=True)
            )
        """
        index = check_integer(expert, "expert", 0, self.num_experts - 1)
        return plain_modules(self.parts(), [index]).train(self.training)[0]

    def to_modules(self) -> nn.ModuleList:
        """Every expert as in :meth:`to_module`; the modules share one copy of the trunk.

        The ensemble is ``torch.stack([module(x) for module in modules]).mean(0)``; each module runs
        the trunk by itself.
        """
        return plain_modules(self.parts(), range(self.num_experts)).train(self.training)

    def optimize_for_inference(self) -> Self:
        r"""Return a copy for serving: in evaluation mode, frozen, with BatchNorm folded away.

        In evaluation a BatchNorm after a convolution is an affine map of each channel,
        $w' = w \cdot \gamma / \sqrt{\sigma^2 + \epsilon}$ and
        $b' = \beta + (b - \mu) \gamma / \sqrt{\sigma^2 + \epsilon}$, so it costs nothing once it
        stands in the convolution's own weights. A pair is folded only where the BatchNorm receives
        exactly what the convolution returned, and only if the model's logits stay the same to 1e-5
        of their range; other BatchNorm layers stay as they are. This model is not changed.

        Returns:
            A copy that computes the same, faster, and can no longer be trained.

        Example:
            >>> backbone = nn.Sequential(
            ...     nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
            ...     nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            ...     nn.Linear(8, 5),
            ... )
            >>> fast = RIDEWrapper(backbone, 2).optimize_for_inference()
            >>> any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
            False
        """
        return folded_copy(self)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | ExpertOutput:
        """Run the trunk once and every expert on its result.

        Returns:
            The mean of the experts' logits, a plain ``[B, C]`` tensor that carries the experts'
            logits (read them with :func:`ride_plugin.expert_logits`); what ``return_experts`` asks
            for instead.
        """
        check_compiles()
        if len(self._modules) > 2:  # more than trunk and experts
            refuse_added(self)
        if type(args) is not tuple or any(type(value).__name__ == "Proxy" for value in args):
            refuse_tracing("torch.fx.symbolic_trace")
        # Another thread may be evaluating the model, which sets the modes of its modules.
        free = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        with nullcontext() if free else training_pass(self):
            output: Tensor | ExpertOutput = self._forward(args, kwargs)
            return output

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        asked = self.return_experts == "outputs" and self.training
        kind = self._watch.new_kind(args, kwargs) if not asked and self._trains() else None
        if not asked and kind is None:
            return self._output(self._each(args, kwargs), self.training, (args, kwargs))
        compares = asked and not torch.compiler.is_compiling()
        inputs = own_inputs((args, kwargs)) if compares else (args, kwargs)
        with whole_outputs() as outputs:
            each = self._each(args, kwargs)
        if compares and outputs:
            lacking = self._lacking_in(inputs, outputs[0])
            if lacking is not None:
                _refuse_outputs(lacking, "these arguments")
        if kind is not None:
            beside = losses_beside(reader_in(self.experts[0]), outputs[0]) if outputs else []
            self._watch.leaves_out(beside, kind)
        output = self._output(each, self.training)  # the watch sees them
        return (outputs or each) if asked else output

    def _keeps_all(self) -> bool:
        return self.return_experts == "outputs" and self.training

    def _has_to_stop(self) -> bool:
        # Hooks that a forward registers at its first call stand on a part that has run by itself.
        asked = self.return_experts == "outputs" and not torch.compiler.is_compiling()
        return asked or super()._has_to_stop()

    def _trains(self) -> bool:
        return self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _each(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        with self._settings_kept():
            if torch.compiler.is_compiling() or self.return_experts == "outputs":
                return self._logits_of_each(args, kwargs)
            with losses_dropped(kwargs) as losses:
                each = self._logits_of_each(args, kwargs)
        if losses:
            self._watch.drops_a_loss()
        return each

    def relink(self) -> None:
        """Follow tensors, and settings that all parts hold, where something has replaced them."""
        super().relink()
        self._settings = held_together_by((self.trunk, *self.experts))

    def _settings_kept(self) -> AbstractContextManager[None]:
        if self.num_experts == 1 or torch.compiler.is_compiling():
            return nullcontext()
        return unchanged(self._settings | self.shared_later)

    @contextmanager
    def _around_half(self) -> Iterator[None]:
        """What one of the two modules of a pair runs in: what guards a forward of the model."""
        alone = training_pass(self) if torch.is_grad_enabled() else nullcontext()
        with alone, self._settings_kept(), self.refusing_writes():
            yield

    def _logits_of_each(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        if self.checkpoint_experts and torch.is_grad_enabled():
            return self._checkpointed_experts(args, kwargs)
        return [logits for logits, _ in self._all_experts(args, kwargs)]

    def _output(
        self, each: Sequence[Tensor], training: bool, inputs: object = None
    ) -> Tensor | ExpertOutput:
        """What the model returns, of its experts' logits, in training mode or in evaluation."""
        output = joined(list(each))
        if not torch.compiler.is_compiling():
            if not training:
                self._watch.evaluates(self, output)
                # An attack wants the gradients of its inputs, and a model that has never trained
                # in training mode may do so in evaluation mode.
                unasked = torch.is_grad_enabled() and self._watch.began
                if unasked and not any(tensor.requires_grad for tensor in tensors_in(inputs)):
                    mark_evaluated(output)
            elif torch.is_grad_enabled():
                self._watch.trains(self, output)
        explicit = self.return_experts is True or (self.return_experts == "training" and training)
        return output if explicit else attach_expert_logits(*output)

    def router_inputs(self, *args: Any, **kwargs: Any) -> RouterInputs:
        """Compute what the router reads, in evaluation mode and without gradients.

        Whatever the model's mode, BatchNorm statistics stay as they are and the mode is restored,
        so stage two can be an ordinary training loop. The result can be stored and reused.

        Returns:
            :class:`RouterInputs`: expert logits ``[B, E, C]`` and features ``[B, E, D]``.
        """
        check_compiles()
        # A graph cannot restore modes; compile and export what is in evaluation mode already.
        mode = nullcontext() if torch.compiler.is_compiling() else self.evaluating()
        with mode, torch.no_grad():
            logits, features = zip(*self._all_experts(args, kwargs), strict=True)
            return RouterInputs(torch.stack(logits, dim=1), torch.stack(features, dim=1))

    def __prepare_scriptable__(self) -> None:
        """Refuse TorchScript, which asks for this."""
        refuse_tracing("torch.jit.script")

    def __repr__(self) -> str:
        """What is shared, forked and narrowed, and what that costs, in a few lines."""
        return summary(self, self.expert_width)

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any module; what the backbone has is set in trunk and experts, which read it.

        Raises:
            AttributeError: the backbone's own module or tensor, or what was decided at wrapping.
        """
        built = "_watch" in vars(self)
        if built and set_on_parts(self, self._of_backbone, name, value):
            return
        if built and name in _DECIDED and value != vars(self)[name]:
            raise AttributeError(
                f"Cannot set `{name}` of a wrapped model, since that would change nothing in it: "
                f"it was decided when the backbone was wrapped, {vars(self)[name]!r}. Wrap the "
                f"backbone again, `RIDEWrapper(backbone, {name}={value!r})`."
            )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """As for any module; what was set on trunk and experts is taken from them."""
        names = vars(self).get("_of_backbone")
        if names is None or not take_from_parts(self, names, name):
            super().__delattr__(name)

    def __getattr__(self, name: str) -> Any:
        """What the backbone says of itself: its `config`, say; see :mod:`ride_plugin._delegate`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            names = vars(self).get("_of_backbone")
            # What rebuilds a model module by module asks one that has no parts yet.
            if name.startswith("__") or names is None or "trunk" not in self._modules:
                raise
            return from_backbone(self, names, name)

    def _checkpointed_experts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        self._frozen_parts.tell_what_trains(self.experts)
        state = self.run_trunk(*args, **kwargs)

        def logits_of(index: int) -> Tensor:
            return self.run_expert(index, state)[0]

        return [
            checkpointed(partial(logits_of, k), expert, self._written)
            for k, expert in enumerate(self.experts)
        ]


def _refuse_outputs(differs: str, what: str) -> NoReturn:
    raise ArgumentError(
        "Expected argument `return_experts` to be True or 'training', but got 'outputs', and an "
        f"expert's whole output is not what the backbone returns for {what}, but {differs}. The "
        "forward collects it from all modules (`self.modules()`, or hooks on them), and those "
        "before the fork are passed by in an expert. Let it collect what modules return, leave out "
        "the flag that asks for it, or pass an earlier `fork_at=`."
    )


def _tell_swap(
    kind: type[RIDEWrapper],
    extractor: nn.Module,
    classifier: nn.Module,
    num_experts: int,
    options: dict[str, Any],
    error: SplitError,
) -> None:
    """Raise if a pair that cannot be wrapped can be in the other order."""
    try:
        kind(Pair(classifier, extractor), num_experts, **options)
    except Exception:  # whatever the reason, the order is not what is wrong, or not alone
        return
    raise SplitError(
        "Expected arguments `feature_extractor` and `classifier` in this order, but got a "
        f"{type(extractor).__name__} and a {type(classifier).__name__}, which run in the other "
        "order only. Swap them: `from_pair(feature_extractor, classifier)`."
    ) from error
