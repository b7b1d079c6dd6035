"""Whether an expert's logits for some rows are those of the whole batch, as routing needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ride_plugin._contexts import seed_everything
from ride_plugin._errors import SplitError, listed
from ride_plugin._inputs import own_inputs
from ride_plugin._split._hidden import advice
from ride_plugin._split._passes import play, record
from ride_plugin._split._results import logits_of, near, seeded
from ride_plugin._split._state import TrunkState
from ride_plugin._split._views import Views
from ride_plugin._tree import map_tensors


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
    views = fresh()
    try:
        agree = _rows_agree(backbone, views, state, expected)
        mixes = bool(moving) and _written_by_others(fresh, state, expected.device)
    except Exception as error:
        raise SplitError(
            f"{prefix}: an expert does not run on a subset of the rows, which "
            f"routing needs ({type(error).__name__}: {error}). {advice(state)}"
        ) from error
    if agree and not mixes:
        return
    relates = _relates_rows(backbone, state, expected)  # before anything is another precision
    if not mixes and _rows_agree_in_double(backbone, views, state):
        return
    if moving:
        raise SplitError(
            f"{prefix}: its forward writes {listed(moving)} in evaluation "
            "too, and what a row gets depends on the rows that came with it. Switch that off "
            "before wrapping, and on again afterwards if it is needed to train; of a network "
            "that is prepared for quantization-aware training, "
            "`net.apply(torch.ao.quantization.disable_observer)` does. Or wrap the plain network, "
            "and prepare the wrapped one."
        )
    if relates and _draws(backbone, state):
        raise SplitError(
            f"{prefix}: its forward draws random numbers in evaluation (`F.dropout(x, "
            "training=True)`, say), so that a row gets others with other rows, which routing "
            "cannot allow behind the fork. Draw in training only (`training=self.training`), or "
            "pass `fork_at=` a submodule behind it. For dropout in evaluation let an `nn.Dropout` "
            "do it, and set that to training mode in the wrapped model (`.train()`)."
        )
    if relates:
        raise SplitError(
            f"{prefix}: what the backbone returns for a row depends on the "
            "rows that come with it, which routing cannot allow behind the fork. Pass `fork_at=` "
            "a later submodule, behind what looks at several rows (a mean, a mask or an order of "
            "the batch), or let the forward do that in training only (`if self.training:`)."
        )
    several = state.layout is not None and any(
        rows is not None and rows.per_sample > 1 for entry in state.layout.rows for rows in entry
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


def _rows_agree(
    backbone: Callable[[bool], nn.Module], views: Views, state: TrunkState, expected: Tensor
) -> bool:
    rows = torch.tensor([2, 0], device=expected.device)
    seed_everything()
    some = state.select(rows)
    with torch.no_grad():
        got = logits_of(play(views.expert, views.running, some.hollowed()))
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


def _written_by_others(fresh: Callable[[], Views], state: TrunkState, device: torch.device) -> bool:
    """Whether a row's logits change with the other rows, from which an expert writes something.

    An observer's range may change them as little as rounding does, and not at all if the other rows
    do not reach beyond it. Batches of one size leave no rounding, since the same kernels run; and
    of two rows one at most is beyond all others.
    """
    for row in (0, 1):
        alone, among = ([row] * 3, [row, (row + 1) % 3, (row + 2) % 3])
        results = []
        for chosen in (alone, among):
            seed_everything()
            views = fresh()
            some = state.select(torch.tensor(chosen, device=device))
            with torch.no_grad():
                results.append(logits_of(play(views.expert, views.running, some.hollowed()))[0])
        if not near(*results):
            return True
    return False


def _relates_rows(
    backbone: Callable[[bool], nn.Module], state: TrunkState, expected: Tensor
) -> bool:
    """Whether the backbone itself returns something else for some rows alone."""
    rows = torch.tensor([2, 0], device=expected.device)
    alone = seeded(backbone(False), state.select(rows).values[0])
    rounding = 1e-3 * float(expected.abs().max())
    return alone.shape == expected[rows].shape and not near(alone, expected[rows], allowed=rounding)


def _draws(backbone: Callable[[bool], nn.Module], state: TrunkState) -> bool:
    """Whether the backbone returns something else for the same rows once more."""
    inputs = state.values[0]
    expected = seeded(backbone(False), inputs)
    args, kwargs = own_inputs(inputs, tensors=True)
    with torch.no_grad():  # and not seeded again
        return not near(logits_of(backbone(False)(*args, **kwargs)), expected)


def _rows_agree_in_double(
    backbone: Callable[[bool], nn.Module], views: Views, state: TrunkState
) -> bool:
    """Tell rounding that a network amplifies (it all but vanishes) from rows that really differ."""

    def doubled(training: bool) -> nn.Module:
        return backbone(training).double()

    views.trunk.double()
    views.expert.double()
    args, kwargs = map_tensors(
        lambda t: t.double() if t.is_floating_point() else t, state.values[0]
    )
    try:
        expected = seeded(doubled(False), (args, kwargs))
        with torch.no_grad():
            layouts = [] if state.layout is None else [state.layout]
            again, _ = record(views.trunk, views.running, layouts, args, kwargs, stop_at_fork=True)
        return _rows_agree(doubled, views, again, expected)
    except Exception:  # no kernel for float64, or a dtype written into the backbone
        return False
