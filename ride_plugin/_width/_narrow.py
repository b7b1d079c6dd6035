"""Narrower experts: the forked part rebuilt with a share of its channels (paper, section 3).

The paper gives experts 3/4 of the backbone's width. Here any backbone's expert is narrowed by trial
forwards (see `_trial`), then its resized parameters are drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ride_plugin._closeness import close
from ride_plugin._contexts import random_state_kept, seed_everything
from ride_plugin._errors import RIDEError, WidthError, listed
from ride_plugin._inputs import resize_batch
from ride_plugin._split import (
    Kept,
    Recorded,
    Split,
    TrunkState,
    play,
    read_attributes,
    record,
    throwaway,
    write_attributes,
)
from ride_plugin._tree import logits_in, tensors_in
from ride_plugin._width._attention import attention_of, replace_multihead_attention
from ride_plugin._width._layers import pads_in, redrawn
from ride_plugin._width._ledger import Change
from ride_plugin._width._map import WidthMap, groupings_of
from ride_plugin._width._plan import Amended, NarrowingPlan, Step, Stuck, Trace
from ride_plugin._width._trial import Trial

_TRIALS = 60
_BATCH = 3


@dataclass(frozen=True)
class _Reference:
    """One mode's forward of the full-width expert."""

    training: bool
    state: TrunkState
    steps: Sequence[Step]
    output: list[tuple[int, ...]]


def narrow_expert(split: Split, width: float) -> Split:
    """The split with a narrower expert; it is narrowed in place, before others are copied from it.

    A layer with ``c`` outputs gets about ``width * c`` (see :class:`WidthMap`). A width that has to
    equal one of the trunk stays as it is, for example that of a residual stream that begins in
    the trunk; then the layers inside the blocks are narrowed (hidden widths, attention heads).

    Raises:
        WidthError: a layer cannot be narrowed, or too little can be; the message names it.
    """
    _refuse_quantised(split.views.expert, width)
    expert, views = split.views.expert, split.views
    frozen = {id(t) for t in (*views.trunk.parameters(), *views.trunk.buffers())}
    _refuse_computed(expert, width, frozen)
    before = _size(expert, frozen)
    modes = {name: module.training for name, module in expert.named_modules()}
    kept = Kept(expert)  # trials run on the expert itself, and a forward may count or average
    try:
        with random_state_kept(expert):
            states = _trunk_states(split)
            _replace_fixed_modules(split, states[0])
            references = [_reference(split, training, s) for training, s in enumerate(states)]
            by_forwards = kept.changed()  # and not by narrowing
            changes = _narrowed(split, width, references, frozen)
            _check_rows(split, references[0])
    except Stuck as error:
        raise WidthError(_message(width, str(error))) from error
    finally:
        for name, module in expert.named_modules():
            while name not in modes:  # a module that was put in: as what it stands in
                name = name.rpartition(".")[0]
            module.training = modes[name]
    after = _size(expert, frozen)
    if after > before * (1 + width) / 2:
        raise WidthError(
            _message(width, f"only {max(0, before - after):,} of {before:,} parameters could go")
        )
    _redraw(changes)
    kept.restore(by_forwards)
    for module in expert.modules():  # the trials ran in training mode too
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()
    for link in views.links:
        link.refresh()
    return split


def _refuse_quantised(expert: nn.Module, width: float) -> None:
    """Observers keep sizes of their own, which torch does not check when it reads them."""
    for name, module in expert.named_modules():
        if any(base.__module__.startswith("torch.ao.") for base in type(module).__mro__):
            raise WidthError(
                _message(
                    width,
                    f"`{name}` is prepared for quantization. Wrap and narrow the backbone first, "
                    "then prepare the result",
                )
            )


def _refuse_computed(expert: nn.Module, width: float, frozen: set[int]) -> None:
    """A weight that is no parameter cannot be cut; torch may abort where what it is made of is."""
    names = [
        name
        for name, module in expert.named_modules()
        if (is_parametrized(module) or any(_is_computed(module, key) for key in vars(module)))
        and any(id(parameter) not in frozen for parameter in module.parameters())
    ]
    if names:
        raise WidthError(
            _message(
                width,
                f"the weights of {listed(names)} are computed from other tensors (normalised or "
                "pruned, say). Wrap and narrow the backbone as it was before, then do that to "
                "trunk and experts",
            )
        )


def _is_computed(module: nn.Module, key: str) -> bool:
    """Whether an attribute is a weight that a hook computes, as torch's older functions do."""
    value = vars(module)[key]
    if not isinstance(value, Tensor):
        return False
    made_of = (f"{key}_orig", f"{key}_g")  # spectral norm and pruning; weight norm
    return key == "weight" or (value.dim() > 1 and any(n in module._parameters for n in made_of))


def _message(width: float, reason: str) -> str:
    return (
        f"Cannot narrow the experts to expert_width={width}: {reason}. Pass `expert_factory=`, "
        "a function that returns a narrower backbone, or another `fork_at=`, or `expert_width=1.0`."
    )


def _trunk_states(split: Split) -> list[TrunkState]:
    """The trunk's results in evaluation mode and, if the backbone trains on its input, training."""
    args, kwargs = resize_batch(split.inputs, _BATCH)
    start = read_attributes(split.views.expert, split.attributes)
    states = []
    for training in (False, True):
        copied = throwaway(split.views, training)
        try:
            with torch.no_grad():
                state, _ = record(
                    copied.trunk, copied.running, split.layouts, args, kwargs, stop_at_fork=True
                )
        except Exception:
            if training:
                break
            raise
        states.append(replace(state, attributes=start))
    return states


def _play(split: Split, state: TrunkState, training: bool) -> Callable[[], Any]:
    expert = split.views.expert.train(training)

    def run() -> Any:
        write_attributes(expert, split.attributes, state.attributes)
        return play(expert, split.views.running, state)

    return run


def _replace_fixed_modules(split: Split, state: TrunkState) -> None:
    """Replace modules whose sizes are fixed by equal ones whose sizes can be changed."""
    expert = split.views.expert
    play_once = _play(split, state, False)
    with torch.no_grad():
        expected = logits_in(play_once())
        replaced = replace_multihead_attention(expert)
        if replaced and not close(logits_in(play_once()), expected):
            raise Stuck(f"`{replaced[0]}` could not be rebuilt with its heads apart")
    seen: dict[str, tuple[str, nn.Module, Any, Any]] = {}
    handles = []
    for name, module in expert.named_modules():
        if not isinstance(module, Recorded) and not any(True for _ in module.parameters()):

            def note(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
                x = next(tensors_in(args), None)
                kept = [t.detach().clone() if isinstance(t, Tensor) else t for t in (x, out)]
                seen[name] = (name, module, kept[0], kept[1])

            handles.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            play_once()
    finally:
        for handle in handles:
            handle.remove()
    for name, pad in pads_in(seen.values()):
        expert.set_submodule(name, pad)


def _reference(split: Split, training: int, state: TrunkState) -> _Reference:
    seed_everything()
    trace = Trace()
    with torch.no_grad(), trace:
        output = _play(split, state, bool(training))()
    shapes = [tuple(t.shape) for t in tensors_in(output)]
    return _Reference(bool(training), state, trace.steps, shapes)


def _narrowed(
    split: Split, width: float, references: Sequence[_Reference], frozen: set[int]
) -> list[Change]:
    expert = split.views.expert
    attentions = [
        found
        for name, module in expert.named_modules()
        if (found := attention_of(name, module)) is not None
    ]
    widths = WidthMap(width, groupings_of(expert))
    plan = NarrowingPlan()
    for _ in range(_TRIALS):
        trial = Trial(expert, frozen, plan, widths, attentions)
        try:
            for reference in references:
                seed_everything()
                run = _play(split, reference.state, reference.training)
                trial.run(run, reference.steps, reference.output)
        except Amended:
            trial.undo()
            continue
        except Stuck:
            trial.undo()
            raise
        return trial.changes
    raise Stuck(f"no consistent widths were found in {_TRIALS} trials")


def _check_rows(split: Split, reference: _Reference) -> None:
    """An expert's logits for some rows must be those of the whole batch, also when narrowed."""
    with torch.no_grad():
        whole = logits_in(_play(split, reference.state, False)())
        if reference.state.layout is None or whole is None:
            return
        rows = torch.tensor([2, 0], device=whole.device)
        try:
            some = logits_in(_play(split, reference.state.select(rows), False)())
        except (RIDEError, RuntimeError) as error:
            raise Stuck(f"it does not run on a subset of the rows ({error})") from error
    if not close(some, whole[rows]):
        raise Stuck("its rows depend on each other when narrowed")


def _redraw(changes: Sequence[Change]) -> None:
    first: dict[tuple[int, str], Change] = {}
    for change in changes:  # a parameter that was resized twice is drawn from the original
        first.setdefault((id(change.module), change.name), change)
    with torch.no_grad():
        for change in first.values():
            if change.name in change.module._parameters:
                parameter: Any = change.module._parameters[change.name]
                fan_ratio = change.fan_ratio if change.name in ("weight", "bias") else 1.0
                parameter.copy_(redrawn(parameter, change.old, fan_ratio))


def _size(expert: nn.Module, frozen: set[int]) -> int:
    return sum(p.numel() for p in expert.parameters() if id(p) not in frozen)
