"""Narrower experts: the forked part rebuilt with a share of its channels (paper, section 3).

The paper gives experts 3/4 of the backbone's width. Here any backbone's expert is narrowed by trial
forwards of a copy (see `_trial`), on tensors without contents where the backbone allows it. What
they found is then done to the expert itself, and its resized parameters are drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ride_plugin._closeness import close
from ride_plugin._contexts import random_state_kept
from ride_plugin._errors import RIDEError, WidthError, listed, warn_caller
from ride_plugin._inputs import Inputs, resize_batch
from ride_plugin._split import Split, TrunkState, Views, on_meta, throwaway
from ride_plugin._tree import ids_of_tensors, logits_in, tensors_in
from ride_plugin._width._attention import attention_of
from ride_plugin._width._fixed import replace_fixed_modules
from ride_plugin._width._layers import redrawn
from ride_plugin._width._ledger import Change, Ledger, empty_caches
from ride_plugin._width._map import WidthMap, groupings_of
from ride_plugin._width._plan import Amended, NarrowingPlan, Step, Stuck, Trace
from ride_plugin._width._runs import player_of, trunk_state
from ride_plugin._width._tables import tables_of
from ride_plugin._width._trial import Trial

_TRIALS = 60
_BATCH = 3  # fewer layers have three channels than two


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
    frozen = ids_of_tensors(views.trunk)
    _refuse_computed(expert, width, frozen)
    before = _size(expert, frozen)
    try:
        with random_state_kept(expert), torch.no_grad():
            replace_fixed_modules(split)
            try:  # almost free, but a backbone may look at values
                changes, told, kept = _narrowed(split, width, meta=True)
            except (Exception, Stuck):
                changes, told, kept = _narrowed(split, width, meta=False)
    except Stuck as error:
        raise WidthError(_message(width, str(error))) from error
    after = _size(expert, frozen)
    if after > before * (1 + width) / 2:
        reason = f"only {max(0, before - after):,} of {before:,} parameters could go"
        if kept:
            reason += f", since layers kept their widths for {'; '.join(kept[:3])}"
        raise WidthError(_message(width, reason))
    for text in told:
        warn_caller(text)
    _redraw(changes)
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


def _narrowed(split: Split, width: float, meta: bool) -> tuple[list[Change], list[str], list[str]]:
    """Try widths on a copy until they fit, then do the same to the expert.

    Args:
        split: its expert is narrowed.
        width: share of the channels to keep.
        meta: try on tensors without contents; it raises where the backbone looks at values.

    Returns:
        The changes of the expert, what users have to be told of factors that may be computed from
        a width, and why layers kept their widths.
    """

    def copied() -> Views:  # for each trial, since a forward may fill a cache
        views = throwaway(split.views, False, meta)
        empty_caches(views.expert)
        return views

    tables = tables_of(split.views.expert)  # of contents, which the trials may be without
    with on_meta(resize_batch(split.inputs, _BATCH), meta) as inputs:
        views = copied()
        states = [trunk_state(split, views, False, inputs)]
        try:
            states.append(trunk_state(split, views, True, inputs))
        except Exception:
            if meta:
                raise
            # It does not train on its input alone.
        references = [_reference(split, views, mode, state) for mode, state in enumerate(states)]
        trial = _fitting_trial(split, copied, width, references, tables)
        told = trial.follow_factors()
    ledger = Ledger(split.views.expert, ids_of_tensors(split.views.trunk))
    put_back = [ledger.undo, *empty_caches(split.views.expert)]
    trial.ledger.repeat_on(ledger)
    try:
        _check_rows(split)
        if meta and len(references) > 1 and _does_more(*references):
            _check_training(split, resize_batch(split.inputs, _BATCH))
    except Stuck:
        for step in put_back:
            step()
        raise
    kept = [f"`{name}` ({reason})" if name else reason for name, reason in trial.plan.kept.items()]
    return ledger.changes, told, kept


def _reference(split: Split, views: Views, training: int, state: TrunkState) -> _Reference:
    trace = Trace()
    run = player_of(split, views, state, bool(training))
    with trace:
        output = run()
    shapes = [tuple(t.shape) for t in tensors_in(output)]
    return _Reference(bool(training), state, trace.steps, shapes)


def _fitting_trial(
    split: Split,
    copied: Callable[[], Views],
    width: float,
    references: Sequence[_Reference],
    tables: Mapping[str, Collection[int]],
) -> Trial:
    plan = NarrowingPlan()
    for _ in range(_TRIALS):
        views = copied()
        attentions = [
            found
            for name, module in views.expert.named_modules()
            if (found := attention_of(name, module)) is not None
        ]
        widths = WidthMap(width, groupings_of(views.expert))
        frozen = ids_of_tensors(views.trunk)
        trial = Trial(views.expert, frozen, plan, widths, attentions, tables)
        try:
            for reference in references:
                run = player_of(split, views, reference.state, reference.training)
                trial.run(run, reference.steps, reference.output)
        except Amended:
            continue
        return trial
    raise Stuck(f"no consistent widths were found in {_TRIALS} trials")


def _check_rows(split: Split) -> None:
    """The narrowed expert runs, and its logits for some rows are those of the whole batch."""
    state, views = split.state, throwaway(split.views, False)
    assert state is not None  # the build has left it
    try:
        whole = logits_in(player_of(split, views, state)())
    except Exception as error:
        raise Stuck(f"it does not run when narrowed ({error})") from error
    if state.layout is None or whole is None:
        return
    rows = torch.tensor([2, 0], device=whole.device)
    try:
        some = logits_in(player_of(split, views, state.select(rows))())
    except (RIDEError, RuntimeError) as error:
        raise Stuck(f"it does not run on a subset of the rows ({error})") from error
    if not close(some, whole[rows]):
        raise Stuck("its rows depend on each other when narrowed")


def _does_more(evaluating: _Reference, training: _Reference) -> bool:
    """Whether training calls operations that evaluation does not, beside counting batches."""
    known = {step.name for step in evaluating.steps} | {"add_"}
    return any(step.name not in known for step in training.steps)


def _check_training(split: Split, batch: Inputs) -> None:
    """The narrowed expert runs in training mode: without contents torch does not check it all."""
    views = throwaway(split.views, True)
    try:
        player_of(split, views, trunk_state(split, views, True, batch), True)()
    except Exception as error:
        raise Stuck(f"it does not train when narrowed ({error})") from error


def _redraw(changes: Sequence[Change]) -> None:
    first: dict[tuple[int, str], Change] = {}
    for change in changes:  # a parameter that was resized twice is drawn from the original
        first.setdefault((id(change.module), change.name), change)
    with torch.no_grad():
        for change in first.values():
            if change.name in change.module._parameters:
                parameter: Any = change.module._parameters[change.name]
                scaled = change.name.startswith(("weight", "bias"))
                fan_ratio = change.fan_ratio if scaled else 1.0
                pieces = zip(
                    parameter.chunk(change.parts), change.old.chunk(change.parts), strict=True
                )
                parameter.copy_(torch.cat([redrawn(new, old, fan_ratio) for new, old in pieces]))


def _size(expert: nn.Module, frozen: set[int]) -> int:
    return sum(p.numel() for p in expert.parameters() if id(p) not in frozen)
