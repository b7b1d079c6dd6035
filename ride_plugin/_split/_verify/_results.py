"""The backbone's own results, which those of a split are compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ride_plugin._closeness import close
from ride_plugin._contexts import seed_everything
from ride_plugin._errors import SplitError, listed
from ride_plugin._inputs import Inputs, repeat_row, run_plainly
from ride_plugin._split._copying import same_values
from ride_plugin._split._cut import Views
from ride_plugin._split._examine import spelled
from ride_plugin._tree import logits_in, places_in

near = partial(close, units=100, scale=0.0, equal_nan=True)  # other kernels may run


def seeded(module: nn.Module, inputs: Inputs) -> Tensor:
    seed_everything()
    return logits_of(run_plainly(module, inputs))


def unfused(hooked: nn.Module, inputs: Inputs, expected: Tensor, views: Views) -> Tensor:
    """The backbone's logits as its layers compute them with a hook on each.

    torch replaces its own transformer layers by one fused kernel unless a hook is registered; the
    wrapper needs hooks, so it differs from the plain backbone by rounding, and no more. Likewise
    torch's encoder packs rows without their padding unless a mode sees its operations, as one does
    where the encoder is cut between its layers.
    """
    for module in hooked.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(lambda *_: None)
    for encoder in _packing(hooked, views).values():
        encoder.use_nested_tensor = False
    logits = seeded(hooked, inputs)
    return logits if near(logits, expected) else expected


def refuse_packing(backbone: Callable[[bool], nn.Module], inputs: Inputs, views: Views) -> None:
    """Raise SplitError if the logits depend on whether an encoder that is cut packs its rows.

    Rows of the example are taken as they are given: torch packs only those that are padded at
    their end, which is elsewhere in a row that was varied by a rotation.
    """
    packing = _packing(views.trunk, views)
    for row in range(2) if packing else ():
        batch = repeat_row(inputs, row)
        packed = seeded(backbone(False), batch)
        if unfused(backbone(False), batch, packed, views) is packed:
            raise SplitError(
                f"The logits depend on what {listed(packing)} (nn.TransformerEncoder) returns at "
                "padded positions: zeros where it packs the rows, which it does in evaluation "
                "without gradients and only when it runs as a whole, and other values everywhere "
                "else. Leave padded positions out of what follows the encoder (a mean over all "
                "positions, say); or make the encoder with `enable_nested_tensor=False`; or pass "
                f"as `fork_at=` the encoder itself, {next(iter(packing))!r}, or a later submodule."
            )


def _packing(module: nn.Module, views: Views) -> dict[str, nn.TransformerEncoder]:
    """Torch's encoders in a module that are cut between their layers, and may pack padded rows."""
    cut = {id(own) for own, _ in views.spine}
    names = {name for name, part in views.trunk.named_modules() if id(part) in cut}
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.TransformerEncoder)
        and name in names
        and getattr(part, "use_nested_tensor", False)
    }


def logits_of(output: Any) -> Tensor:
    logits = logits_in(output)
    if logits is None:
        raise SplitError("The backbone returned no logits [B, C].")
    return logits


def output_difference(expected: Any, got: Any) -> str | None:
    """The first entry in which two outputs differ by more than rounding, in words; None if none."""
    ours, theirs = places_in(got), places_in(expected)
    if [path for path, _ in ours] != [path for path, _ in theirs]:
        return other_places(expected, got)
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        try:
            alike = same_values(a, b) or near(a, b)
        except (NotImplementedError, RuntimeError, TypeError):  # sparse ones, say
            alike = a.shape == b.shape
        if not alike:
            return f"another {spelled(path)}"
    return None


def other_places(expected: Any, got: Any) -> str:
    """Where tensors are in one of two outputs and not in the other, in words."""
    ours, theirs = ([path for path, _ in places_in(output)] for output in (got, expected))
    first = listed(sorted(map(spelled, {*ours} ^ {*theirs})))
    return f"{len(ours)} tensors instead of {len(theirs)}, with or without {first}"


def same(a: Tensor, b: Tensor, exact: Callable[[], bool]) -> bool:
    if same_values(a, b):
        return True
    return near(a, b) and not exact()
