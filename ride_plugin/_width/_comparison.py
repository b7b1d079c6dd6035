"""Whether an operation does to narrower tensors what the same one did to the full-width ones.

Sizes that a backbone's own code has fixed may fit by luck and mean something else: groups that hold
no whole channels, or the last of three equal pieces that gets what the others have left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ride_plugin._width._ledger import RESHAPES
from ride_plugin._width._plan import Step, reshape_groups

_CUTS = {"__getitem__", "narrow", "split", "split_with_sizes", "chunk", "tensor_split", "hsplit"}
_CUTS |= {"vsplit", "dsplit", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"}


class Comparison:
    """Compares the operations of one trial, and pieces of one tensor with each other."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[int, int, int], int] = {}
        self._alive: list[Tensor] = []  # an id names a tensor only while it lives

    def difference(
        self, name: str, step: Step, source: Tensor | None, outputs: Sequence[Tensor]
    ) -> str | None:
        """Return what differs, or None.

        Args:
            name: of the operation.
            step: the same operation at full width.
            source: its first operand.
            outputs: what it returned.
        """
        expected = step.outputs
        if len(outputs) != len(expected) or any(
            len(e) != t.dim() or (t.numel() == 0 and 0 not in e)
            for t, e in zip(outputs, expected, strict=True)
        ):
            return f"`{name}` returns another number of tensors or dimensions, or nothing"
        if source is None or not outputs or not step.inputs:
            return None
        if name in _CUTS and not self._are_pieces_alike(step, source, outputs):
            return f"`{name}` with a fixed size"
        if name in RESHAPES and not _keeps_places(
            step.inputs[0], source.shape, expected[0], outputs[0].shape
        ):
            return f"`{name}` with fixed sizes"
        return None

    def _are_pieces_alike(self, step: Step, source: Tensor, outputs: Sequence[Tensor]) -> bool:
        """Whether pieces of a tensor that were equally long along a dimension still are."""
        whole = step.inputs[0]
        self._alive.append(source)
        for old, piece in zip(step.outputs, outputs, strict=True):
            if len(old) != len(whole):
                continue
            cut = [dim for dim in range(len(old)) if old[dim] != whole[dim]]
            if len(cut) == 1:
                key = (id(source), cut[0], old[cut[0]])
                if self._pieces.setdefault(key, piece.shape[cut[0]]) != piece.shape[cut[0]]:
                    return False
        return True


def _keeps_places(
    old_in: Sequence[int], new_in: Sequence[int], old_out: Sequence[int], new_out: Sequence[int]
) -> bool:
    """Whether a reshape cuts its input where it did: between groups of whole channels, say."""
    for ins, outs in reshape_groups(old_in, old_out):
        ins_before, ins_now = [old_in[i] for i in ins], [new_in[i] for i in ins]
        outs_before, outs_now = [old_out[o] for o in outs], [new_out[o] for o in outs]
        if math.prod(ins_now) != math.prod(outs_now):
            return False
        changed = [k for k in range(len(ins)) if ins_before[k] != ins_now[k]]
        if len(changed) != 1 or 0 in ins_before:
            continue
        channels, narrowed = ins_before[changed[0]], ins_now[changed[0]]
        outside = math.prod(ins_before[: changed[0]])  # rows, each with all channels
        for cut in range(1, len(outs)):
            pieces, rest = divmod(math.prod(outs_before[:cut]), outside)
            now, rest_now = divmod(math.prod(outs_now[:cut]), outside)
            if rest or not pieces:
                continue  # the cut lies before the channels
            if channels % pieces == 0:
                if rest_now or not now or narrowed % now:
                    return False
            elif pieces % channels == 0 and (rest_now or pieces * narrowed != now * channels):
                return False
    return True
