"""Whether an expert's logits for some rows are those of the whole batch, as routing needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ride_plugin._contexts import seed_everything
from ride_plugin._errors import SplitError, listed
from ride_plugin._inputs import run_plainly
from ride_plugin._split._cut import Views
from ride_plugin._split._replay import Rows, TrunkState, is_hollow, play, record
from ride_plugin._split._verify._hidden import advice
from ride_plugin._split._verify._once import Attributes
from ride_plugin._split._verify._results import logits_of, near, seeded
from ride_plugin._tree import dotted, holds_tensors, map_tensors

_DRAWS = 8  # passes without another seed that are compared with the first


def check_rows(
    backbone: Callable[[bool], nn.Module],
    fresh: Callable[[], Views],
    state: TrunkState,
    expected: Tensor,
    prefix: str,
    moving: set[str],
) -> None:
    """Raise SplitError unless they are.

    Args:
        backbone: returns a copy of it in a mode.
        fresh: returns a throwaway copy of trunk and expert.
        state: what the trunk returned for three rows in evaluation mode.
        expected: the backbone's logits for these.
        prefix: of the message.
        moving: names of what the backbone's forward writes in evaluation.
    """
    try:
        agree = _rows_agree(backbone, fresh(), state, expected)
        # Numbers that are computed of all rows show in any two; a choice made of them does not.
        chooses = state.layout is not None and state.layout.chooses
        mixes = (chooses or bool(moving)) and _others_matter(fresh, state, expected)
    except Exception as error:
        raise SplitError(
            f"{prefix}: an expert does not run on a subset of the rows, which "
            f"routing needs ({type(error).__name__}: {error}). "
            + _advice_on_attributes(fresh(), state)
            + advice(state)
        ) from error
    if agree and not mixes:
        return
    relates = _relates_rows(backbone, state, expected)  # before anything is another precision
    if not (mixes and moving) and _agrees_in_double(backbone, fresh, state):
        return
    if moving:
        raise SplitError(
            f"{prefix}: its forward writes {listed(moving)} in evaluation "
            "too, and what a row gets depends on the rows that came with it. Let it write in "
            "training only (`if self.training:`), or switch that off before wrapping, and on "
            "again afterwards if it is needed to train; of a network "
            "that is prepared for quantization-aware training, "
            "`net.apply(torch.ao.quantization.disable_observer)` does. Or wrap the plain network, "
            "and prepare the wrapped one."
        )
    if _draws(backbone, state):
        raise SplitError(
            f"{prefix}: its forward draws random numbers in evaluation (`F.dropout(x, "
            "training=True)`, say), so that a row gets others with other rows, which routing "
            "cannot allow behind the fork. Draw in training only (`training=self.training`), or "
            "pass `fork_at=` a submodule behind it. For dropout in evaluation let an `nn.Dropout` "
            "do it, and set that to training mode in the wrapped model (`.train()`)."
        )
    several = state.layout is not None and any(
        rows is not None and rows.per_sample > 1 for entry in state.layout.rows for rows in entry
    )
    if relates or (mixes and not several):
        raise SplitError(
            f"{prefix}: what the backbone returns for a row depends on the "
            "rows that come with it, which routing cannot allow behind the fork. Pass `fork_at=` "
            "a later submodule, behind what looks at several rows (a mean, a mask, an order or the "
            "longest of the batch), or let the forward do that in training only "
            "(`if self.training:`)."
        )
    raise SplitError(
        f"{prefix}: an expert's logits for some rows differ from those rows "
        "of the whole batch, so routing would change predictions. "
        + (
            "The batch that crosses the fork holds several slices of each row, which have to lie "
            "next to each other (those of a packed sequence do not): "
            "`torch.stack([x, flipped], dim=1).flatten(0, 1)` instead of "
            "`torch.cat([x, flipped])`."
            if several
            else advice(state)
        )
    )


def _advice_on_attributes(views: Views, state: TrunkState) -> str:
    """What to do where modules of the trunk leave tensors on themselves; empty if none does."""
    attributes = Attributes(views.trunk, [module for module, _ in views.spine])
    args, kwargs = state.values[0]
    with suppress(Exception), torch.no_grad():
        record(views.trunk, views.running, [], args, kwargs, stop_at_fork=True)
    names = [
        dotted(path, key)
        for path, key in sorted(attributes.changed())
        if holds_tensors(vars(views.trunk.get_submodule(path)).get(key))
    ]
    if not names:
        return ""
    return (
        f"Modules before the fork leave tensors on themselves, {listed(names)}, which are not "
        "found there for some rows: if the forward reads them, let these modules return them. "
    )


def _rows_agree(
    backbone: Callable[[bool], nn.Module], views: Views, state: TrunkState, expected: Tensor
) -> bool:
    rows = torch.tensor([2, 0], device=expected.device)
    some = state.select(rows)
    got = _played(views, some)
    if got.shape != expected[rows].shape:
        return False
    if near(got, expected[rows]):
        return True
    # Kernels differ with the batch size, and a deep network amplifies their rounding: what the
    # backbone itself shows of it is allowed, as long as it can be rounding.
    alone = seeded(backbone(False), some.values[0])
    noise = min(
        10 * float((alone - expected[rows]).abs().max()), 1e-3 * float(expected.abs().max())
    )
    return near(got, expected[rows], allowed=noise)


def _others_matter(fresh: Callable[[], Views], state: TrunkState, expected: Tensor) -> bool:
    """Whether a row's logits change with the rows that come with it.

    The row keeps its place, and the batch its size: the same kernels run, which leaves no rounding.
    The other rows are as unlike as they can be without leaving the bounds of what an index or a
    probability may be; rows of the example are often so alike that a choice made of all of them
    (the largest of their mean, or a range that an observer writes) is that of each one.
    """
    for turn in range(2 * state.batch_size):
        row = turn % state.batch_size
        among = state.select(torch.tensor([row] * state.batch_size, device="cpu"))
        try:
            got = _played(fresh(), with_extremes(among, row, turn))
        except Exception:  # no values for this forward, which may look at its numbers
            got = _played(fresh(), among)
        if got.shape != expected.shape or not near(got[row], expected[row]):
            return True
    return False


def _played(views: Views, state: TrunkState) -> Tensor:
    seed_everything()
    with torch.no_grad():
        return logits_of(play(views.expert, views.running, state.hollowed()))


def with_extremes(state: TrunkState, row: int, seed: int) -> TrunkState:
    """Of equal rows all but one get the least and the largest of the trunk's numbers instead."""
    assert state.layout is not None
    size = state.batch_size
    generator = torch.Generator().manual_seed(seed)

    def extreme(specs: Iterator[Rows | None], value: Tensor) -> Tensor:
        rows = next(specs)
        if rows is None or not value.is_floating_point() or not value.numel():
            return value
        if value.layout is not torch.strided or is_hollow(value):
            return value
        slices = torch.arange(value.shape[rows.dim], device="cpu") * size // value.shape[rows.dim]
        own = (slices == row).view(-1, *[1] * (value.dim() - 1)).movedim(0, rows.dim)
        largest = torch.zeros((), dtype=torch.bool, device="cpu")
        for dim, length in enumerate(value.shape):  # a mean over any dimension keeps a pattern
            if dim == rows.dim:
                continue
            lots = torch.rand(length, generator=generator, device="cpu") < 0.5
            largest = largest ^ lots.view(-1, *[1] * (value.dim() - dim - 1))
        others = torch.where(largest.to(value.device), value.max(), value.min())
        return torch.where(own.to(value.device), value, others)

    values = [state.values[0]]  # the inputs as they are: their columns may have bounds of their own
    for value, specs in zip(state.values[1:], state.layout.rows[1:], strict=True):
        values.append(map_tensors(partial(extreme, iter(specs)), value))
    return replace(state, values=values)


def _relates_rows(
    backbone: Callable[[bool], nn.Module], state: TrunkState, expected: Tensor
) -> bool:
    """Whether the backbone itself returns something else for some rows alone."""
    rows = torch.tensor([2, 0], device=expected.device)
    alone = seeded(backbone(False), state.select(rows).values[0])
    rounding = 1e-3 * float(expected.abs().max())
    return alone.shape == expected[rows].shape and not near(alone, expected[rows], allowed=rounding)


def _draws(backbone: Callable[[bool], nn.Module], state: TrunkState) -> bool:
    """Whether the backbone returns something else for the same rows once more.

    One other draw may make no difference: of a column, say, where a rectifier returned zeros.
    """
    inputs = state.values[0]
    expected = seeded(backbone(False), inputs)
    again = (logits_of(run_plainly(backbone(False), inputs)) for _ in range(_DRAWS))  # not seeded
    return any(not near(logits, expected) for logits in again)


def _agrees_in_double(
    backbone: Callable[[bool], nn.Module], fresh: Callable[[], Views], state: TrunkState
) -> bool:
    """Tell rounding that a network amplifies (it all but vanishes) from rows that really differ."""

    def doubled(training: bool) -> nn.Module:
        return backbone(training).double()

    def fresh_doubled() -> Views:
        views = fresh()
        views.trunk.double()
        views.expert.double()
        return views

    views = fresh_doubled()
    args, kwargs = map_tensors(
        lambda t: t.double() if t.is_floating_point() else t, state.values[0]
    )
    try:
        expected = seeded(doubled(False), (args, kwargs))
        with torch.no_grad():
            layouts = [] if state.layout is None else [state.layout]
            again, _ = record(views.trunk, views.running, layouts, args, kwargs, stop_at_fork=True)
        agree = _rows_agree(doubled, views, again, expected)
        return agree and not _others_matter(fresh_doubled, again, expected)
    except Exception:  # no kernel for float64, or a dtype written into the backbone
        return False
