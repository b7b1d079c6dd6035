"""A split backbone as one module: its trunk and its experts, run one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from ride_plugin._checks import check_instance, check_integer, may_read, refuse
from ride_plugin._compiler import check_compiles
from ride_plugin._contexts import RandomState, evaluating
from ride_plugin._errors import (
    ArgumentError,
    CheckpointError,
    ReplayError,
    RIDEError,
    listed,
    warn_caller,
)
from ride_plugin._inputs import Inputs, in_order_of, resize_batch
from ride_plugin._split._copying import (
    COMPILED_CALL,
    Group,
    copy_with_hooks,
    count_parameters,
    detached_activations,
    held_together,
    hold_together,
    trains,
    unchanging,
)
from ride_plugin._split._cut import (
    Parts,
    has_unrun_hooks,
    keep_stand_ins,
    numbers_of_hooks,
    places_of_stand_ins,
)
from ride_plugin._split._examine import RANDOM, LogitsReader
from ride_plugin._split._expert_result import logits_and_features
from ride_plugin._split._groups import G, merged_groups
from ride_plugin._split._handed_out import HandedOut
from ride_plugin._split._paths import Paths
from ride_plugin._split._replay import (
    Forked,
    Layout,
    Recorded,
    TrunkState,
    belongs_to,
    expert_at,
    module_at,
    places_of_forks,
    places_of_units,
    play,
    read_attributes,
    record,
    take_up,
    versions_in,
    watch_classifier,
    write_attributes,
    writers_in,
)
from ride_plugin._split._saving import Frozen, Holder
from ride_plugin._split._verify import KeptRows
from ride_plugin._tree import Place, map_tensors, tensors_in


class SplitModule(Holder):
    """Trunk and experts; knows nothing of losses, routing or initialisation.

    Attributes:
        trunk: the shared part, under the backbone's names. Called by itself it goes on into the
            first expert, as the backbone's forward does, and warns of that; `run_trunk` returns
            what is shared.
        experts: one forked part for each expert, under the backbone's names. Called by itself, one
            runs the trunk first.
        num_experts: ``E``.
        num_classes: ``C``.
        fork_at: name of the first forked submodule.
        classifier_name: name of the classifier inside an expert; None if it is no submodule.
        redrawn_parameters: names, inside an expert, of the trainable parameters of which each
            expert got a draw of its own under ``init="copy"``: beside frozen parameters, those that
            do not act yet, such as the first matrix of a low-rank adapter.
    """

    _is_replica = False  # which DataParallel sets on its copies
    _classifies_logits = False  # whether an expert's classifier receives the very logits

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.num_experts = len(parts.experts)
        self.num_classes = parts.num_classes
        self.fork_at = parts.fork_at
        self.classifier_name = parts.classifier
        self._running = parts.running
        self._links = parts.links
        hooks = numbers_of_hooks((parts.trunk, *parts.experts))
        self._known_paths = Paths(parts.layouts, hooks)
        self._next_hook = 0  # torch's number of the next hook, when a pass began
        self._attributes = parts.attributes
        self._late = parts.late
        self._draws = RANDOM in parts.attributes  # with numpy or Python, before the fork
        self._inputs = parts.inputs
        self._num_probed = parts.num_probed
        self.redrawn_parameters = list(parts.redrawn)
        self._written = parts.written
        self._differs = parts.differs
        self._asked = parts.asked
        self.trunk = parts.trunk
        self.experts = nn.ModuleList(parts.experts)
        self._units = places_of_units(self.trunk)
        self._forks = [places_of_forks(expert) for expert in self.experts]
        self._stand_ins = [
            place for part in (self.trunk, *self.experts) for place in places_of_stand_ins(part)
        ]
        for place in self._stand_ins:
            stand_in = place.module
            if isinstance(stand_in, Forked):
                stand_in.ride_several = self.num_experts
            elif isinstance(stand_in, Recorded) and self.num_experts > 1:
                unit, name = stand_in.ride_real, stand_in.ride_key
                stand_in.ride_writers = writers_in(unit, name, parts.written)
        self._told_of_hooks = False  # of the trunk, which do not run
        self._goes_on_into = (parts.experts[0],)  # the trunk's pass; a tuple, so not registered
        self._frozen_parts = Frozen(self.trunk, parts.experts, parts.written)
        self._held_together: list[Group] = []  # between a change of tensors and `relink`
        self._handed_out = HandedOut()
        self._kept_rows = KeptRows(parts.kept)

    def parts(self) -> Parts:
        """What the model is made of now; the modules themselves, not copies."""
        self._handed_out.follow(self.trunk, self.experts)
        self._frozen_parts.refuse_merged()
        return Parts(
            self.trunk,
            list(self.experts),
            self._running,
            self._links,
            self._known_paths.layouts,
            self._attributes,
            self._late,
            self._inputs,
            self.num_classes,
            self.fork_at,
            self.classifier_name,
            self._num_probed,
            self.redrawn_parameters,
            self._written,
            self._differs,
            self._kept_rows.places,
            self._asked,
        )

    @property
    def set_by_experts(self) -> list[Place]:
        """Attributes and buffers outside units that the code after the fork sets or fills."""
        return self._late

    def hand_out(self, name: str) -> None:
        """Note that somebody got the trunk's value of this name, and may change what is in it."""
        # What the trunk's forward writes, experts get from there in each pass.
        written = ("", name) in self._attributes or ("", name) in self._late
        if not written and not torch.compiler.is_compiling():
            self._handed_out.note(name, self.trunk, self.experts)

    @property
    def shared_later(self) -> dict[str, Any]:
        """Values that all parts hold together since somebody changed what the model handed out."""
        return self._handed_out.shared

    @property
    def classifiers(self) -> tuple[nn.Module, ...]:
        """The classifier of each expert, in order; for cRT, tau-normalisation and the like.

        A tuple: another classifier takes its place in the expert, ``model.experts[i].fc = ...``.
        """
        return tuple(self.parts().classifiers())

    def run_trunk(self, *args: Any, **kwargs: Any) -> TrunkState:
        """Run the shared part only; hand the result to :meth:`run_expert`, or to the model.

        ``model(state)`` and every other method that takes a batch take what this returns in its
        place, and leave out the trunk. A frozen trunk in evaluation mode keeps nothing for a
        backward pass.
        """
        stored = self._stored(args, kwargs)
        if stored is not None:
            return stored
        return self._settled(self._recorded(args, kwargs))

    def start(self, *args: Any, **kwargs: Any) -> tuple[TrunkState, Tensor, Tensor]:
        """Run the shared part, then expert 0.

        Returns:
            The state for the other experts, and expert 0's logits ``[B, C]`` and features
            ``[B, D]``, as :meth:`run_expert` returns them.
        """
        state, logits, features = self._first_expert(args, kwargs)
        return self._settled(state), logits, features

    def run_expert(self, index: int, state: TrunkState) -> tuple[Tensor, Tensor]:
        """Run one expert on the trunk's state, or on some rows of it.

        Args:
            index: the expert, ``0 <= index < num_experts``.
            state: what :meth:`run_trunk` returned, or ``state.select(rows)``.

        Returns:
            Its logits ``[B, C]``, and what its classifier received, pooled to ``[B, D]``.

        Raises:
            ArgumentError: there is no such expert, or ``state`` is something else, a batch say.
        """
        index = check_integer(index, "index", 0, self.num_experts - 1)
        check_instance(state, "state", TrunkState, "what `run_trunk` returned")
        return self._run_expert(index, state)

    def _run_expert(self, index: int, state: TrunkState) -> tuple[Tensor, Tensor]:
        """As `run_expert`, which a whole pass calls for the experts after the first only."""
        check_compiles(self._asked)
        self._check_number()
        expert = self.experts[index]
        self._follow_tensors()
        if not torch.compiler.is_compiling():
            expert_at(self.experts, index)
            for place in self._forks[index]:
                place.keep_hook()
        # The expert draws what the trunk drew, and goes on drawing where the last one ended.
        draws = self._draws or state.draws_from is not None
        at_fork = RandomState.now().restore if draws else None
        write_attributes(expert, self._attributes, state.attributes)
        if state.draws_from is not None:
            state.draws_from.restore()
        self._running.forget()
        alone = self.num_experts == 1 or torch.compiler.is_compiling()
        versions = [] if alone else [versions_in((value,)) for value in state.values]
        try:
            watch_classifier(expert, self.classifier_name, self._running)
            output = play(expert, self._running, state, at_fork)
            if not alone:
                _refuse_changed(state, versions)
                if self._kept_rows.places and not expert.training:
                    self._kept_rows.note(index, expert)
            return self._read(output)
        except Exception as error:
            if not torch.compiler.is_compiling() and not belongs_to(expert, self._running):
                raise self._stranger(index) from error
            if state.chosen and not isinstance(error, RIDEError | torch.OutOfMemoryError):
                raise _not_on_these_rows(state, error) from error
            raise
        finally:
            self._running.forget()
            self._look_again()

    @contextmanager
    def evaluating(self) -> Iterator[Self]:
        """Evaluation mode for the duration of a block; every submodule's mode is restored."""
        with evaluating(self):
            yield self

    def example_input(self, batch_size: int = 1) -> Inputs:
        """Inputs ``(args, kwargs)`` that the backbone accepts, for cost reports and export."""
        return resize_batch(self._inputs, batch_size)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many; a shared one counts once."""
        trainable, total = count_parameters(self)
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || "
            f"trainable%: {100 * trainable / max(total, 1):.4f}"
        )

    def parameter_groups_by(self, function: Callable[[nn.Module], G]) -> G:
        """Groups of this model's parameters as a function for the plain backbone makes them.

        Code that groups parameters by name, for layer-wise learning rates or another one in the
        classifier, knows the backbone's names, and a wrapped model's begin with ``trunk.`` or
        ``experts.0.``. The function is called with each expert as a plain network under the
        backbone's names, made of this model's own parameters, and what it returns is merged: a
        group holds the parameters of the trunk and of all experts that belong there, each once.

        Args:
            function: maps a network to lists of parameters, or of pairs of name and parameter, in
                any nesting of lists, tuples and dictionaries. The network is for reading names and
                parameters and has no gradient hooks of its own; it is not meant to run.

        Returns:
            What the function returned, with this model's parameters; pairs have this model's names.

        Raises:
            ArgumentError: what the function returns holds no parameter, or its structure or its
                other values are not the same for all experts.

        Example:
            >>> from ride_plugin import RIDEWrapper
            >>> def groups(network):
            ...     head = [p for n, p in network.named_parameters() if n.startswith("2")]
            ...     rest = [p for n, p in network.named_parameters() if not n.startswith("2")]
            ...     return [{"params": head, "lr": 0.1}, {"params": rest, "lr": 0.01}]
            >>> backbone = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
            >>> model = RIDEWrapper(backbone, 3, fork_at="2")
            >>> optimizer = torch.optim.SGD(model.parameter_groups_by(groups))
            >>> [len(group["params"]) for group in optimizer.param_groups]
            [6, 2]
        """
        return merged_groups(self, self.parts(), function, "function")

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """What training changes, and nothing else: the part of ``state_dict()`` worth keeping.

        These are the parameters that require gradients, and buffers but for the statistics of
        frozen normalisation layers and integer tables beside frozen parameters. Load it with
        :meth:`load_trainable_state_dict` into a model that was wrapped alike.
        """
        of_parts = ("trunk", *(f"experts.{k}" for k in range(self.num_experts)))
        written = {f"{part}.{name}" for part in of_parts for name in self._written}
        fixed = unchanging(self, self._frozen_parts.layers, written)
        return {
            name: value.detach()
            for name, value in self.state_dict(keep_vars=True).items()
            if id(value) not in fixed
        }

    def load_trainable_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what :meth:`trainable_state_dict` returned; everything else stays as it is.

        Raises:
            CheckpointError: names or shapes are not those of what trains here, or this model's
                dtypes cannot hold the numbers; nothing was loaded.
            ArgumentError: it is no state dict.
        """
        if not isinstance(state, Mapping):
            refuse("state", "what `trainable_state_dict` returned", state)
        expected = self.trainable_state_dict()
        missing, unexpected = sorted(expected.keys() - state), sorted(state.keys() - expected)
        if missing or unexpected:
            raise CheckpointError(
                "Expected argument `state` to hold exactly what trains in this model, but "
                f"{missing[:3]} of {len(missing)} names are missing and {unexpected[:3]} of "
                f"{len(unexpected)} are unexpected. Wrap and freeze as when it was saved."
            )
        for name, value in expected.items():
            if not isinstance(state[name], Tensor) or state[name].shape != value.shape:
                raise CheckpointError(
                    f"Expected `state[{name!r}]` to be a tensor {list(value.shape)}, as in this "
                    f"model, but got {list(getattr(state[name], 'shape', ())) or state[name]!r}."
                )
            if not _can_hold(value, state[name]):
                raise CheckpointError(
                    f"Expected `state[{name!r}]` to hold numbers that {value.dtype} can hold, as "
                    f"this model does, but got {state[name].dtype}, of other or larger numbers. "
                    "Cast the model as it was when the state was saved."
                )
        self.load_state_dict(dict(state), strict=False)

    def note_shared(self) -> None:
        """Note which tensors experts hold together, before something replaces each by itself."""
        self._held_together = held_together(self.experts)

    def relink(self) -> None:
        """Follow tensors that something other than ``.to()`` or loading has replaced."""
        hold_together(self._held_together)
        self._held_together = []
        for link in self._links:
            link.refresh()

    def follow_with_inputs(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Keep the example input where the parameters are."""
        self._inputs = map_tensors(lambda example: _following(example, fn(example)), self._inputs)

    def parts_by_prefix(self) -> dict[str, nn.Module]:
        """Trunk and experts by the prefix of their names."""
        return {"trunk.": self.trunk, **super().parts_by_prefix()}

    def eval_frozen_layers(self) -> None:
        """Leave normalisation layers in evaluation that were frozen there, see :meth:`train`."""
        self._frozen_parts.keep_in_evaluation()

    def _lacking_in(self, inputs: Inputs, output: Any) -> str | None:
        """What an expert's whole output lacks of the backbone's for these inputs, in words."""
        return self._known_paths.lacking(self, self.parts(), inputs, output)

    def refusing_writes(self) -> AbstractContextManager[None]:
        """Around a pass: an error if an expert writes what all share; tells what trains as one."""
        if torch.compiler.is_compiling():
            return nullcontext()
        if self.training and torch.is_grad_enabled():
            self._frozen_parts.tell_what_trains(self.experts)
        return self._frozen_parts.refusing_writes()

    def _all_experts(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[Tensor, Tensor]]:
        with self.refusing_writes():
            state, logits, features = self._first_expert(args, kwargs)
        rest = [self.run_expert(index, state) for index in range(1, self.num_experts)]
        return [(logits, features), *rest]

    def _first_expert(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[TrunkState, Tensor, Tensor]:
        check_compiles(self._asked)
        self._check_number()
        stored = self._stored(args, kwargs)
        if stored is not None:
            return (stored, *self._run_expert(0, stored))
        if (self.num_experts == 1 or torch.compiler.is_compiling()) and not self._has_to_stop():
            return self._in_one_pass(args, kwargs)
        state = self._recorded(args, kwargs)
        # Where paths are random, each look for one takes long and finds nothing.
        if state.layout is None and not torch.compiler.is_compiling():
            watched = _get_current_dispatch_mode() is not None  # by a counter of FLOPs, say
            if not watched and self._known_paths.may_look():
                # Nothing is dropped: `return_experts="outputs"` may hand out what no expert reads.
                state = self._with_layout(state)
        return (state, *self._run_expert(0, state))

    def _keeps_all(self) -> bool:
        """Whether values of the trunk that no expert reads are handed out, so that none drops."""
        return False

    def _has_to_stop(self) -> bool:
        """Whether the trunk's pass must not go on into expert 0.

        It would run expert 0 with the trunk's own mode and attributes, write into what the other
        experts read, leave behind what belongs to the expert, and pass by hooks of the expert
        itself. It leads to the expert that was the first when the model was made; somebody may have
        put another one in its place. Where none of this matters, the exporter needs it, which takes
        no forward that ends in the middle; and a single expert then runs as the backbone does.
        """
        changes = self.num_experts > 1 and any(
            known.changes_in_place for known in self._known_paths.layouts
        )
        return bool(
            changes
            or self._late
            or self.trunk.training != self.experts[0].training
            or _is_hooked(self.experts[0])
            or self._is_replica
            or self.experts[0] is not self._goes_on_into[0]
        )

    def _in_one_pass(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[TrunkState, Tensor, Tensor]:
        """Both in one pass of the trunk, which goes on into expert 0."""
        check_compiles()
        self._keep_hooks()
        kwargs = in_order_of(self._inputs[1], kwargs)
        before = read_attributes(self.trunk, self._attributes)
        watch_classifier(self.experts[0], self.classifier_name, self._running)
        self._running.forget()

        def stops(values: Sequence[Any], layout: Layout | None) -> bool:
            """Whether it is not known what an expert changes on this path."""
            return layout is None and self.num_experts > 1

        try:
            state, output = record(
                self.trunk,
                self._running,
                self._known_paths.layouts,
                args,
                kwargs,
                stop_at_fork=stops,
            )
            state = replace(state, attributes=before)
            if output is None:  # it stopped
                state = state.hollowed()
                return (state, *self._run_expert(0, state))
            return (state, *self._read(output))
        finally:
            self._running.forget()
            self._look_again()

    def _recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TrunkState:
        check_compiles()
        kwargs = in_order_of(self._inputs[1], kwargs)
        take_up(self.trunk, self.experts[0], self._late)
        before = read_attributes(self.trunk, self._attributes)
        self._keep_hooks()
        self._tell_of_hooks()
        known, keep_all = self._known_paths.layouts, self._keeps_all()
        # A call may draw where the example did not: the share of a mixup with targets only, say.
        looks = self.training and not self._draws and not torch.compiler.is_compiling()
        start = RandomState.now() if looks else None
        try:
            state, _ = record(
                self.trunk,
                self._running,
                known,
                args,
                kwargs,
                stop_at_fork=True,
                keep_all=keep_all,
            )
        finally:
            self._look_again()
        if start is not None and start.same_as(RandomState.now()):
            start = None
        return replace(state, attributes=before, draws_from=start)

    def _check_number(self) -> None:
        if len(self.experts) != self.num_experts:
            raise ReplayError(
                f"`model.experts` holds {len(self.experts)} experts, but the model was made with "
                f"{self.num_experts}, as were its router and thresholds. Wrap the backbone with "
                f"`num_experts={len(self.experts)}`, then load what shall stay: "
                "`new.trunk.load_state_dict(model.trunk.state_dict())`, and "
                "`new.experts[j].load_state_dict(model.experts[k].state_dict())` for each."
            )

    def _stranger(self, index: int) -> ReplayError:
        """The error for an expert that was put there, and was not made for this trunk."""
        return ReplayError(
            f"`model.experts[{index}]` is none of the experts that the model was made with, but a "
            "copy of one, one of another model or another module, which does not read what this "
            "trunk computes. Load its weights into the expert that stood there: "
            f"`model.experts[{index}].load_state_dict(other.state_dict())`. (Experts of a model "
            "may change places, and parts of them may be replaced.)"
        )

    def _stored(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TrunkState | None:
        """The trunk's state, if that was given in place of a batch.

        Raises:
            ArgumentError: the trunk trains, which a stored result would not let it.
        """
        if not args or not isinstance(args[0], TrunkState):
            return None
        if len(args) > 1 or kwargs:
            raise ArgumentError(
                "Expected the trunk's state alone, but got other arguments beside it. The state "
                "holds the whole batch."
            )
        state = args[0]
        if (
            self.training
            and torch.is_grad_enabled()
            and trains(self.trunk.parameters())
            and not any(value.requires_grad for value in tensors_in(state.values))
        ):
            raise ArgumentError(
                "The trunk has parameters that train, but the state was stored without gradients, "
                "so they would not. Freeze the trunk (`model.trunk.requires_grad_(False)`), or "
                "pass the batch itself."
            )
        return state

    def _settled(self, state: TrunkState) -> TrunkState:
        """The state with the layout of its path, and without the values that no expert reads."""
        return self._with_layout(state).hollowed()

    def _with_layout(self, state: TrunkState) -> TrunkState:
        """The state, with what is to be known of a path that the build has not seen."""
        if state.layout is None and not torch.compiler.is_compiling():
            # A path not seen at the build, for example padding at another input size.
            layout = self._known_paths.learn(self, self.parts(), state.values[0])
            tape = state.keys, state.values, state.batch_size
            if layout is not None and layout.fits(*tape):  # not where paths are random
                state = replace(state, layout=layout)
        return state

    def _keep_hooks(self) -> None:
        """Set our hooks right, and follow what somebody has changed since the last pass."""
        if not torch.compiler.is_compiling():
            module_at(self, "trunk")
            keep_stand_ins(self._stand_ins, self.trunk, self.experts)
            for place in self._units:
                place.keep_hooks()
            self._handed_out.follow(self.trunk, self.experts)
            self._follow_tensors()

    def _tell_of_hooks(self) -> None:
        """Warn once of hooks on the trunk that do not run."""
        if self._told_of_hooks or torch.compiler.is_compiling():
            return
        if has_unrun_hooks(self.trunk, self.experts):
            self._told_of_hooks = True
            warn_caller(
                "Hooks are registered on `model.trunk` that run after its forward, which ends at "
                "the fork, so that they never run when the model is called. Register them on a "
                "module of the trunk (the shared result comes from `model.run_trunk(x)`), on "
                "`model.experts[k]`, or on the model itself."
            )

    def _look_again(self) -> None:
        """Know what a pass has written from what somebody changes between two passes."""
        if not torch.compiler.is_compiling():
            self._handed_out.look_again(self.trunk, self.experts)
            if RemovableHandle.next_id > self._next_hook:
                self._known_paths.keep_hooks((self.trunk, *self.experts), self._next_hook)

    def _follow_tensors(self) -> None:
        """Read the tensors that the modules hold now, and see which hooks a pass registers.

        Raises ReplayError where adapters were merged into a weight that experts share.

        FSDP2 gathers parameters, `functional_call` swaps them and a forward binds buffers anew
        (`self.queue = torch.cat(...)`) where they are owned, and only there: a view that went on
        reading the old tensor would train nothing.
        """
        if not torch.compiler.is_compiling():
            self._frozen_parts.refuse_merged()
            self._next_hook = RemovableHandle.next_id
            for link in self._links:
                link.refresh()

    def _read(self, output: Any) -> tuple[Tensor, Tensor]:
        return logits_and_features(
            output,
            self._running.features,
            self._running.returned,
            self.num_classes,
            classifier=self.classifier_name,
            classifies_logits=self._classifies_logits,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Activations that a backbone keeps (`self.feat = out`) would make deepcopy fail.
        memo.update(detached_activations(self))
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        inside = (*self.trunk.modules(), *self.experts.modules())
        held = {name: value for name, value in vars(self).items() if name != COMPILED_CALL}
        copied.__dict__ = copy_with_hooks(held, inside, memo)
        return copied

    def train(self, mode: bool = True) -> Self:
        """Set the mode, but leave normalisation layers in evaluation that were frozen there.

        That is: layers in evaluation mode without trainable parameters when the model was wrapped,
        unless their parameters have been unfrozen since.
        """
        super().train(mode)
        self.eval_frozen_layers()
        return self


def _can_hold(own: Tensor, given: Tensor) -> bool:
    """Whether a cast changes a value by rounding only; away from the CPU by its kind alone."""
    if own.dtype == given.dtype:
        return True
    if own.is_floating_point() != given.is_floating_point():
        return False
    return not may_read(given) or bool((given.to(own.dtype).isfinite() == given.isfinite()).all())


def _following(example: Tensor, moved: Tensor) -> Tensor:
    """The example input where the parameters are now, with its values: `to_empty` keeps none."""
    return example if moved.is_meta else example.to(moved.device, moved.dtype)


def _refuse_changed(state: TrunkState, versions: list[list[int | None]]) -> None:
    """Raise if an expert has changed a value of the trunk that the other experts go on reading.

    What experts were seen to change is cloned for each; this is what they did not do then.
    """
    now = [versions_in((value,)) for value in state.values]
    if now == versions:
        return
    changed = {k for k, a, b in zip(state.keys, versions, now, strict=True) if a != b}
    raise ReplayError(
        f"An expert has changed in place what {listed(changed)} returned before the fork, which "
        "the other experts read as well. It did not when the model was wrapped, or each would have "
        "got a copy: something decides it that was different then. Wrap the backbone as it is in "
        "use, with an `example_input=` of this kind, or let its forward make a new tensor "
        "(`h = h + 1` instead of `h += 1`)."
    )


def _not_on_these_rows(state: TrunkState, error: Exception) -> ReplayError:
    of_one = (
        "A plain `squeeze()` in the forward drops the batch dimension of one row: name the "
        "dimension there (`squeeze(-1)`), or write `flatten(1)`. Otherwise, if"
    )
    return ReplayError(
        f"An expert does not run on {state.batch_size} rows that were chosen of a batch "
        f"({type(error).__name__}: {error}). {of_one if state.batch_size == 1 else 'If'} it runs "
        "on the whole batch, the forward decides by "
        "all rows what is done with each: whether any has a global token, say. Route batches whose "
        "rows agree in that (padded on the other side, say), let the forward decide for each row, "
        "or pass `fork_at=` a later submodule."
    )


def _is_hooked(expert: nn.Module) -> bool:
    """Tell whether somebody has registered forward hooks on an expert itself."""
    ours = (isinstance(hook, LogitsReader) for hook in expert._forward_hooks.values())
    return bool(expert._forward_pre_hooks) or not all(ours)
