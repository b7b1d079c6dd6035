"""The self-check of every build: one expert must be the backbone, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._contexts import in_mode, random_state, seed_everything
from ride_plugin._errors import RIDEError, SplitError, listed
from ride_plugin._inputs import Inputs, own_inputs, resize_batch
from ride_plugin._split._copying import running_copy, storage_of
from ride_plugin._split._cut import Split, Views, is_real, throwaway, throwaway_expert
from ride_plugin._split._examine import whole_outputs
from ride_plugin._split._replay import (
    Layout,
    TrunkState,
    play,
    read_attributes,
    record,
    take_up,
    write_attributes,
)
from ride_plugin._split._verify._check_rows import check_rows
from ride_plugin._split._verify._feedback import with_other_weights
from ride_plugin._split._verify._hidden import advice, hidden
from ride_plugin._split._verify._modes import other_modes
from ride_plugin._split._verify._once import Attributes, changed_again
from ride_plugin._split._verify._results import (
    logits_of,
    output_difference,
    refuse_packing,
    same,
    seeded,
    unfused,
)
from ride_plugin._split._verify._set_behind import set_behind
from ride_plugin._tree import Place, buffers_of, dotted, tensors_in

_BATCH = 3
_ANOTHER = "Pass `fork_at=` another submodule."


class WrittenBehind(Exception):
    """Experts write tensors of the trunk, once for each expert; never leaves the library."""

    def __init__(self, names: set[str], prefix: str) -> None:
        super().__init__(
            f"{prefix}: what runs after the fork writes {listed(names)}, which the trunk holds, "
            "so that every expert would write the same tensor. Pass `fork_at=` an earlier "
            "submodule, before the module that holds it is called first, or a later one, behind "
            "what writes it. A module that is called once for each of several inputs, for the two "
            "images of a pair say, may be called once for all of them: "
            "`self.encoder(torch.stack([a, b], dim=1).flatten(0, 1)).unflatten(0, (-1, 2))`."
        )
        self.names = names


def check(source: nn.Module, split: Split) -> tuple[frozenset[str], TrunkState, str | None]:
    """Compare the split with the backbone: evaluation, a seeded training pass, a row subset.

    Returns:
        Names of the parameters and buffers that a forward writes, what the trunk returned for
        three rows in evaluation mode, and in which entry the whole output of an expert differs
        from the backbone's in training mode, where its logits do not; None if in none.

    Raises:
        SplitError: they differ; the message names the fork point and says what to pass.
        WrittenBehind: an expert writes what the trunk holds.
    """
    views, inputs = split.views, split.inputs
    written: set[str] = set()
    evaluated: TrunkState | None = None
    differs: str | None = None

    def backbone(training: bool) -> nn.Module:
        return in_mode(running_copy(source, (source,), views.written), training)

    refuse_packing(backbone, inputs, views)
    for training in (False, True):
        prefix = _prefix(split.fork_at, training)
        batch = resize_batch(inputs, 2 if training else _BATCH)
        reference = backbone(training)
        contents = _Contents(reference)
        try:
            with whole_outputs() as outputs:
                expected = seeded(reference, batch)
        except Exception:
            if training:  # a backbone that cannot train on its own input has nothing to compare
                break
            raise
        moving = contents.written()
        written |= moving

        @cache
        def exact(training: bool = training, batch: Any = batch, first: Tensor = expected) -> bool:
            """Whether the backbone returns the same bits again; most do, and are not asked."""
            return torch.equal(first, seeded(backbone(training), batch))

        with _called(prefix):
            stopped = throwaway(views, training)
            own, at_fork = _stopped(split, stopped, batch)
        passes = _passes(split, throwaway(views, training), batch, prefix)
        on_trunk: set[Place] = set()
        for ran, state, got, behind, places in passes:
            on_trunk |= {place for place in places if is_real(ran.trunk.get_submodule(place[0]))}
            for link in ran.links:
                if link.name in link.view._buffers:
                    raise SplitError(
                        f"{prefix}: the forward sets `_buffers['{link.name}']` itself "
                        f"before the fork. Let it assign the attribute (`self.{link.name} = ...`), "
                        "which torch puts there, or pass `fork_at=` an earlier submodule."
                    )
            if not same(got, expected, exact) and not same(
                got, unfused(backbone(training), batch, expected, views), exact
            ):
                difference = (got - expected).abs().max().item()
                what_to_do = (
                    _unrepeatable(expected, seeded(backbone(training), batch))
                    or other_modes(reference, (ran.trunk, ran.expert))
                    or advice(state)
                )
                raise SplitError(
                    f"{prefix}: with one expert the logits differ from the backbone's "
                    f"by up to {difference:.3g}. {what_to_do}"
                )
            if behind:
                raise WrittenBehind(behind, prefix)
            _check_buffers(reference, ran, prefix, exact)
        _check_stopping(own, state, prefix, exact)
        second = seeded(reference, batch)
        if not torch.equal(second, expected):  # it goes on from what the first step has left
            steps = _second_steps(split, training, batch, prefix)
            if not all(same(got, second, exact) for got in steps):
                places = on_trunk | set_behind(ran.expert, stopped.trunk)
                names = listed([dotted(*place) for place in sorted(places)])
                raise SplitError(
                    f"{prefix}: in a second step the logits differ from the backbone's. What runs "
                    f"after the fork leaves {names or 'something'} where the code before it reads "
                    "it one step later, and every expert leaves another. Set it in the forward of "
                    "the module that reads it, or pass `fork_at=` an earlier submodule."
                )
        if training and outputs:
            differs = output_difference(outputs[-1], _whole_output(split, stopped, own, at_fork))
        if evaluated is None:
            evaluated = state
            fresh = partial(throwaway, views, False)
            check_rows(backbone, fresh, state, expected, prefix, moving)
        del state, own, passes  # activations may be large beside the weights
    assert evaluated is not None
    return frozenset(written), evaluated, differs


class _Contents:
    """What a module holds before a pass, to tell afterwards what the pass has written."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        self.marks = {name: _mark(buffer) for name, buffer in module.named_buffers()}
        # Parameters are large, and copies share them: versions and places in memory will do.
        self.parameters = {name: _mark(p) for name, p in module.named_parameters()}

    def written(self) -> set[str]:
        """Names of the parameters and buffers that hold something else now."""
        parameters = dict(self.module.named_parameters())
        buffers = dict(self.module.named_buffers())
        return {
            name
            for name, mark in self.parameters.items()
            if name not in parameters or _mark(parameters[name]) != mark
        } | {
            name
            for name, buffer in self.buffers.items()
            if name not in buffers or not same(buffers[name], buffer, lambda: True)
        }

    def rewritten(self) -> bool:
        """Whether something was written into a buffer, be it what stood there."""
        now = {name: _mark(buffer) for name, buffer in self.module.named_buffers()}
        return now != self.marks


def _mark(tensor: Tensor) -> tuple[int, Any]:
    return tensor._version, storage_of(tensor)


def _passes(
    split: Split, views: Views, inputs: Inputs, prefix: str
) -> Iterator[tuple[Views, TrunkState, Tensor, set[str], set[Place]]]:
    """Run trunk and experts as the model does: on into expert 0, then another from the tape.

    Where experts leave something outside units, or change what they are given, a pass stops at
    the fork, and the first expert starts from the tape as well.

    Yields:
        What ran, the trunk's state, the expert's logits, the names of the trunk's tensors that it
        wrote from the tape, and attributes of the trunk's modules that were set after the fork.
    """
    args, kwargs = own_inputs(inputs, tensors=True)
    goes_on = not split.late and not any(known.changes_in_place for known in split.layouts)
    other = throwaway_expert(split.views, views) if goes_on else views
    at_fork: list[Callable[[], None]] = []
    of_expert = Attributes(views.expert, [own for _, own in views.spine])
    ahead: set[Place] = set()
    of_trunk: list[Attributes] = []

    def stops(values: Sequence[Any], layout: Layout | None) -> bool:
        at_fork.append(random_state(views.expert))
        of_trunk.append(Attributes(views.trunk, [own for own, _ in views.spine]))
        ahead.update(of_expert.changed())
        return not goes_on

    seed_everything()
    start = read_attributes(views.trunk, split.attributes)  # the random state may be one
    with torch.no_grad(), _called(prefix):
        state, output = record(
            views.trunk, views.running, split.layouts, args, kwargs, stop_at_fork=stops
        )
        state = replace(state, attributes=start)
    if ahead:
        _refuse_counting_ahead(split, views.trunk.training, inputs, ahead, prefix)
    if output is not None:
        yield views, state, logits_of(output), set(), of_trunk[-1].changed()
    contents = _Contents(other.trunk)
    before = Attributes(other.trunk, [own for own, _ in views.spine])

    def played(ran: Views) -> Any:
        write_attributes(ran.expert, split.attributes, start)
        with torch.no_grad(), _called(prefix, state):
            return play(ran.expert, ran.running, state.hollowed(), at_fork[-1])

    output, behind, places = played(other), contents.written(), before.changed()
    if not behind and contents.rewritten():  # with equal weights it comes to the same
        played(with_other_weights(split.views, other))
        behind = contents.written()
    if places and not behind:
        another = throwaway_expert(split.views, other)
        _refuse_counting(changed_again(other.trunk, places, lambda: played(another)), prefix)
    yield other, state, logits_of(output), behind, places


def _stopped(split: Split, views: Views, inputs: Inputs) -> tuple[TrunkState, Callable[[], None]]:
    """What the trunk records where it stops at the fork, and what restores the random state."""
    args, kwargs = own_inputs(inputs, tensors=True)
    seed_everything()
    start = read_attributes(views.trunk, split.attributes)
    with torch.no_grad():
        state, _ = record(
            views.trunk, views.running, split.layouts, args, kwargs, stop_at_fork=True
        )
    return replace(state, attributes=start), random_state(views.expert)


def _second_steps(split: Split, training: bool, inputs: Inputs, prefix: str) -> Iterator[Tensor]:
    """An expert's logits in a second step, after a first one of its own, and of two experts."""
    for several in (False, True):
        views = throwaway(split.views, training)
        others = [with_other_weights(split.views, views)] if several else []
        for experts in ([views, *others], [views]):
            with _called(prefix):
                state, at_fork = _stopped(split, views, inputs)
            outputs = []
            for ran in experts:
                write_attributes(ran.expert, split.attributes, state.attributes)
                with torch.no_grad(), _called(prefix, state):
                    outputs.append(play(ran.expert, ran.running, state.hollowed(), at_fork))
            take_up(views.trunk, views.expert, split.late)
            for link in views.links:
                link.refresh()
        yield logits_of(outputs[0])


def _unrepeatable(first: Tensor, again: Tensor) -> str | None:
    """What to do about a backbone that differs from itself, where nothing can be compared."""
    if same(first, again, lambda: False):
        return None
    return (
        "So do the backbone's own in a second pass from the same random state, by up to "
        f"{(first - again).abs().max().item():.3g}: its forward seeds the generator anew "
        "(`torch.seed()`), draws from one that no module of it holds, or counts outside of its "
        "modules. Let it draw from torch's own generator as it stands; or wrap it with what "
        "draws there switched off: dropout of probability 0, say."
    )


def _check_stopping(
    own: TrunkState, state: TrunkState, prefix: str, exact: Callable[[], bool]
) -> None:
    """Refuse a trunk that computes something else where it stops than where it goes on.

    Before the fork stand-ins are there in the one case, the expert's own modules in the other.
    """
    steps = zip(own.keys, own.values, state.values, strict=False)
    changed = next(
        (
            key
            for key, ours, theirs in steps
            if key != "inputs"
            and not all(
                same(a, b, exact)
                for a, b in zip(tensors_in(ours), tensors_in(theirs), strict=False)
            )
        ),
        None,
    )
    if own.keys != state.keys or changed is not None:
        where = "" if changed is None else f", first in what `{changed}` returns"
        raise SplitError(
            f"{prefix}: where the forward stops at the fork, the trunk computes something else "
            f"than where it goes on into an expert{where}. Before the fork it looks through the "
            "backbone's own modules or parameters (`self.modules()`, `self.parameters()`), where "
            "an expert's are not the trunk's. Look through them in `__init__` and keep the result, "
            "or in the forward of a submodule, or behind the fork."
        )


def _whole_output(
    split: Split, views: Views, state: TrunkState, at_fork: Callable[[], None]
) -> Any:
    """What an expert's forward returns, with the logits and beside them; nothing is dropped."""
    write_attributes(views.expert, split.attributes, state.attributes)
    with torch.no_grad(), whole_outputs() as outputs:
        play(views.expert, views.running, state, at_fork)
    return outputs[-1]


def _refuse_counting_ahead(
    split: Split, training: bool, inputs: Inputs, places: set[Place], prefix: str
) -> None:
    """Refuse a trunk that counts on an expert's module: that expert's own pass counts as well."""
    views = throwaway(split.views, training)
    run = partial(_stopped, split, views, inputs)
    run()
    _refuse_counting(changed_again(views.expert, places, run), prefix)


def _refuse_counting(places: set[Place], prefix: str) -> None:
    if not places:
        return
    module, attribute = min(places)
    raise SplitError(
        f"{prefix}: each expert's pass changes {listed({f'{path}.{key}' for path, key in places})} "
        f"once more, beside the first pass. The forward calls a method of `{module}` that sets "
        f"`{attribute}` (`step()`, say), or calls `{module}` on both sides of the fork. Call the "
        "method outside of the forward, in the training loop, or inside of that module's own "
        "forward; or pass another `fork_at=`."
    )


@contextmanager
def _called(prefix: str, state: TrunkState | None = None) -> Iterator[None]:
    """Say where an error came from, and why if what the trunk left tells it."""
    try:
        yield
    except RIDEError as error:
        raise SplitError(f"{prefix}: {error}") from error
    except Exception as error:
        reason = None if state is None else hidden(state)
        if reason is None:
            raise
        raise SplitError(f"{prefix}: {type(error).__name__}: {error}. {reason}") from error


def _check_buffers(
    reference: nn.Module, views: Views, prefix: str, exact: Callable[[], bool]
) -> None:
    ours = dict((*buffers_of(views.trunk), *buffers_of(views.expert)))
    for name, buffer in buffers_of(reference):
        if name in ours and not same(ours[name], buffer, exact):
            raise SplitError(
                f"{prefix}: buffer `{name}` differs from the backbone's after one forward. "
                + (other_modes(reference, (views.trunk, views.expert)) or _ANOTHER)
            )


def _prefix(fork: str, training: bool) -> str:
    mode = "training" if training else "evaluation"
    return f"Cannot split the backbone at {fork!r} (checked in {mode} mode)"
