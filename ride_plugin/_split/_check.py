"""The self-check of every build: one expert must be the backbone, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._closeness import close
from ride_plugin._contexts import RandomState, seed_everything
from ride_plugin._errors import RIDEError, SplitError, listed
from ride_plugin._inputs import Inputs, own_inputs, resize_batch
from ride_plugin._split._copies import running_copy, same_values
from ride_plugin._split._learn import memory_of, throwaway
from ride_plugin._split._parts import Split
from ride_plugin._split._passes import play, read_attributes, record, write_attributes
from ride_plugin._split._references import captured_by
from ride_plugin._split._state import TrunkState
from ride_plugin._split._views import Views
from ride_plugin._tree import logits_in, map_tensors, tensors_in

_BATCH = 3
_close = partial(close, units=100, scale=0.0, equal_nan=True)  # other kernels may run


class WrittenBehind(Exception):
    """Experts write tensors of the trunk, once for each expert; never leaves the library."""

    def __init__(self, names: set[str], prefix: str) -> None:
        super().__init__(
            f"{prefix}: what runs after the fork writes {listed(names)}, which the trunk holds, "
            "so that every expert would write the same tensor. Pass `fork_at=` an earlier "
            "submodule, before the module that holds it is called first."
        )
        self.names = names


def check(source: nn.Module, split: Split) -> frozenset[str]:
    """Compare the split with the backbone: evaluation, a seeded training pass, a row subset.

    Returns:
        Names of the parameters and buffers that a forward writes.

    Raises:
        SplitError: they differ; the message names the fork point and says what to pass.
        WrittenBehind: an expert writes what the trunk holds.
    """
    views, inputs, fork = split.views, split.inputs, split.fork_at
    written: set[str] = set()

    def backbone(training: bool) -> nn.Module:
        return running_copy(source, (source,), views.written).train(training)

    for training in (False, True):
        mode = "training" if training else "evaluation"
        batch = resize_batch(inputs, 2 if training else _BATCH)
        reference = backbone(training)
        contents = _Contents(reference)
        try:
            expected = _seeded(reference, batch)
        except Exception:
            if training:  # a backbone that cannot train on its own input has nothing to compare
                break
            raise
        moving = contents.written()
        written |= moving

        @cache
        def exact(training: bool = training, batch: Any = batch, first: Tensor = expected) -> bool:
            """Whether the backbone returns the same bits again; most do, and are not asked."""
            return torch.equal(first, _seeded(backbone(training), batch))

        # Where experts leave something outside units, a pass never goes on into expert 0.
        for stop_at_fork in (True,) if split.late else (True, False):
            copied = throwaway(views, training)
            try:
                state, got, behind = _one_expert(split, copied, batch, stop_at_fork)
            except RIDEError as error:
                raise SplitError(f"{_prefix(fork, mode)}: {error}") from error
            for link in copied.links:
                if link.name in link.view._buffers:
                    raise SplitError(
                        f"{_prefix(fork, mode)}: the forward sets `_buffers['{link.name}']` itself "
                        f"before the fork. Let it assign the attribute (`self.{link.name} = ...`), "
                        "which torch puts there, or pass `fork_at=` an earlier submodule."
                    )
            if not _same(got, expected, exact) and not _same(
                got, _unfused(backbone(training), batch, expected), exact
            ):
                difference = (got - expected).abs().max().item()
                raise SplitError(
                    f"{_prefix(fork, mode)}: with one expert the logits differ from the backbone's "
                    f"by up to {difference:.3g}. {_advice(state)}"
                )
            if behind:
                raise WrittenBehind(behind, _prefix(fork, mode))
            _check_buffers(reference, copied, fork, mode, exact)
            if stop_at_fork and not training:
                _check_rows(backbone, throwaway(views, False), state, expected, fork, moving)
            del state  # its activations may be large beside the weights
    return frozenset(written)


class _Contents:
    """What a module holds before a pass, to tell afterwards what the pass has written."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        # Parameters are large, and copies share them: versions and places in memory will do.
        self.parameters = {n: (p._version, memory_of(p)) for n, p in module.named_parameters()}

    def written(self) -> set[str]:
        """Names of the parameters and buffers that hold something else now."""
        parameters, buffers = (
            dict(self.module.named_parameters()),
            dict(self.module.named_buffers()),
        )
        return {
            name
            for name, mark in self.parameters.items()
            if name not in parameters
            or (parameters[name]._version, memory_of(parameters[name])) != mark
        } | {
            name
            for name, buffer in self.buffers.items()
            if name not in buffers or not _same(buffers[name], buffer, lambda: True)
        }


def _one_expert(
    split: Split, views: Views, inputs: Inputs, stop_at_fork: bool
) -> tuple[TrunkState, Tensor, set[str]]:
    """The trunk's state, the expert's logits, and the trunk's tensors that the expert wrote."""
    args, kwargs = own_inputs(inputs, tensors=True)
    behind: set[str] = set()
    seed_everything()
    start = read_attributes(views.trunk, split.attributes)
    with torch.no_grad():
        state, output = record(
            views.trunk, views.running, split.layouts, args, kwargs, stop_at_fork=stop_at_fork
        )
        if stop_at_fork:
            contents, drawn = _Contents(views.trunk), RandomState.now()
            write_attributes(views.expert, split.attributes, start)
            output = play(views.expert, views.running, state.hollowed(), drawn.restore)
            behind = contents.written()
    return state, _logits(output), behind


def _check_rows(
    backbone: Callable[[bool], nn.Module],
    views: Views,
    state: TrunkState,
    expected: Tensor,
    fork: str,
    moving: set[str],
) -> None:
    try:
        agree = _rows_agree(backbone, views, state, expected)
    except Exception as error:
        raise SplitError(
            f"{_prefix(fork, 'evaluation')}: an expert does not run on a subset of the rows, which "
            f"routing needs ({type(error).__name__}: {error}). {_advice(state)}"
        ) from error
    if agree:
        return
    relates = _relates_rows(backbone, state, expected)  # before anything is another precision
    if _rows_agree_in_double(backbone, views, state):
        return
    if moving:
        raise SplitError(
            f"{_prefix(fork, 'evaluation')}: its forward writes {listed(moving)} in evaluation "
            "too, and what a row gets depends on the rows that came with it. Switch that off "
            "before wrapping, and on again afterwards if it is needed to train; of a network "
            "that is prepared for quantization-aware training, "
            "`net.apply(torch.ao.quantization.disable_observer)` does. Or wrap the plain network, "
            "and prepare the wrapped one."
        )
    if relates:
        raise SplitError(
            f"{_prefix(fork, 'evaluation')}: what the backbone returns for a row depends on the "
            "rows that come with it, which routing cannot allow behind the fork. Pass `fork_at=` "
            "a later submodule, behind what looks at several rows (a mean, a mask or an order of "
            "the batch), or let the forward do that in training only (`if self.training:`)."
        )
    several = state.layout is not None and any(
        rows is not None and rows.per_sample > 1 for entry in state.layout.rows for rows in entry
    )
    raise SplitError(
        f"{_prefix(fork, 'evaluation')}: an expert's logits for some rows differ from those rows "
        "of the whole batch, so routing would change predictions. "
        + (
            "The batch that crosses the fork holds several slices of each row, which have to lie "
            "next to each other (those of a packed sequence do not): "
            "`torch.stack([x, flipped], dim=1).flatten(0, 1)` instead of "
            "`torch.cat([x, flipped])`."
            if several
            else _advice(state)
        )
    )


def _advice(state: TrunkState) -> str:
    """What to do where experts take up something else than the trunk left."""
    for key, value in zip(state.keys, state.values, strict=True):
        if kind := _hides_tensors(value):
            return (
                f"`{key}` returns {kind}, in which tensors are not found. Let it return them in a "
                "tuple, list, dict or dataclass, or pass `fork_at=` another submodule."
            )
    return "Pass `fork_at=` another submodule."


def _hides_tensors(value: Any) -> str | None:
    """Name what may hold tensors that nobody selects rows of, copies or moves."""
    if isinstance(value, Iterator):
        return f"a {type(value).__name__}, which can be read once only"
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next(filter(None, map(_hides_tensors, value)), None)
    if isinstance(value, FunctionType):
        kept = list(captured_by(value))
        return "a function that captured tensors" if _any_in(kept) else None
    if type(value) is Tensor:
        return "a tensor with tensors as attributes" if _any_in(vars(value)) else None
    if isinstance(value, Tensor | nn.Module | type) or _any_in(value):
        return None
    return f"a {type(value).__name__}" if _any_in(getattr(value, "__dict__", {})) else None


def _any_in(value: Any) -> bool:
    return next(tensors_in(value), None) is not None


def _rows_agree(
    backbone: Callable[[bool], nn.Module], views: Views, state: TrunkState, expected: Tensor
) -> bool:
    rows = torch.tensor([2, 0], device=expected.device)
    seed_everything()
    some = state.select(rows)
    with torch.no_grad():
        got = _logits(play(views.expert, views.running, some.hollowed()))
    if got.shape != expected[rows].shape:
        return False
    if _close(got, expected[rows]):
        return True
    # Kernels differ with the batch size, and a deep network amplifies their rounding: what the
    # backbone itself shows of it is allowed, as long as it can be rounding.
    alone = _seeded(backbone(False), some.values[0])
    noise = min(
        10 * float((alone - expected[rows]).abs().max()), 1e-3 * float(expected.abs().max())
    )
    return _close(got, expected[rows], allowed=noise)


def _relates_rows(
    backbone: Callable[[bool], nn.Module], state: TrunkState, expected: Tensor
) -> bool:
    """Whether the backbone itself returns something else for some rows alone."""
    rows = torch.tensor([2, 0], device=expected.device)
    alone = _seeded(backbone(False), state.select(rows).values[0])
    rounding = 1e-3 * float(expected.abs().max())
    return alone.shape == expected[rows].shape and not _close(
        alone, expected[rows], allowed=rounding
    )


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
        expected = _seeded(doubled(False), (args, kwargs))
        with torch.no_grad():
            layouts = [] if state.layout is None else [state.layout]
            again, _ = record(views.trunk, views.running, layouts, args, kwargs, stop_at_fork=True)
        return _rows_agree(doubled, views, again, expected)
    except Exception:  # no kernel for float64, or a dtype written into the backbone
        return False


def _check_buffers(
    reference: nn.Module, views: Views, fork: str, mode: str, exact: Callable[[], bool]
) -> None:
    ours = dict(views.trunk.named_buffers(remove_duplicate=False))
    ours.update(views.expert.named_buffers(remove_duplicate=False))
    for name, buffer in reference.named_buffers(remove_duplicate=False):
        if name in ours and not _same(ours[name], buffer, exact):
            raise SplitError(
                f"{_prefix(fork, mode)}: buffer `{name}` differs from the backbone's after one "
                "forward. Pass `fork_at=` another submodule."
            )


def _seeded(module: nn.Module, inputs: Inputs) -> Tensor:
    seed_everything()
    args, kwargs = own_inputs(inputs, tensors=True)
    with torch.no_grad():
        return _logits(module(*args, **kwargs))


def _unfused(hooked: nn.Module, inputs: Inputs, expected: Tensor) -> Tensor:
    """The backbone's logits as its layers compute them with a hook on each.

    torch replaces its own transformer layers by one fused kernel unless a hook is registered; the
    wrapper needs hooks, so it differs from the plain backbone by rounding, and no more.
    """
    for module in hooked.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(lambda *_: None)
    logits = _seeded(hooked, inputs)
    return logits if _close(logits, expected) else expected


def _logits(output: Any) -> Tensor:
    logits = logits_in(output)
    if logits is None:
        raise SplitError("The backbone returned no logits [B, C].")
    return logits


def _same(a: Tensor, b: Tensor, exact: Callable[[], bool]) -> bool:
    if same_values(a, b):
        return True
    return _close(a, b) and not exact()


def _prefix(fork: str, mode: str) -> str:
    return f"Cannot split the backbone at {fork!r} (checked in {mode} mode)"
