"""What a trial of narrower widths follows and compares with: the plan, and the original's steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.overrides import TorchFunctionMode

from ride_plugin._split import operation_name
from ride_plugin._tree import tensors_in


class Amended(BaseException):
    """The plan was changed; try again. A forward that catches every ``Exception`` lets it pass."""


class Stuck(BaseException):
    """No change of the plan helps; the message says where and why. A forward lets it pass too."""


@dataclass
class NarrowingPlan:
    """Decisions that hold over all trials.

    Attributes:
        out: output width of a layer, where it differs from what the map gives.
        raw: sizes of a parameter that no layer owns, by dimension.
        kept: where layers kept their widths and why, by the modules' names.
        choice: how far an attention module has fallen back, as an index into its choices.
        shapes: attributes with sizes that a parameter is viewed in, as (module, attribute, key).
    """

    out: dict[str, int] = field(default_factory=dict)
    raw: dict[str, dict[int, int]] = field(default_factory=dict)
    choice: dict[str, int] = field(default_factory=dict)
    shapes: set[tuple[str, str, str]] = field(default_factory=set)
    kept: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One operation of the full-width expert: its name, and the shapes of what went in and out."""

    name: str
    inputs: list[tuple[int, ...]]
    outputs: list[tuple[int, ...]]


class Trace(TorchFunctionMode):
    """Writes down the operations of the full-width expert."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        shapes = shapes_in((args, kwargs or {}))  # before: an operation may resize in place
        result = func(*args, **(kwargs or {}))
        self.steps.append(Step(operation_name(func), shapes, shapes_in(result)))
        return result


def reshape_groups(
    before: Sequence[int], after: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions that a reshape maps onto each other, by equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        ins, outs = [i], [j]
        left, right = before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right and i < len(before):
                left *= before[i]
                ins.append(i)
                i += 1
            elif right < left and j < len(after):
                right *= after[j]
                outs.append(j)
                j += 1
            else:
                return [(list(range(len(before))), list(range(len(after))))]
        groups.append((ins, outs))
    return groups


def shapes_in(value: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors_in(value)]
