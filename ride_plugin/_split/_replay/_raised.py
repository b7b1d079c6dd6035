"""What a unit of the trunk raised: a forward may catch it, and goes the same way in experts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Raised:
    """An entry of the tape in place of what a unit returned.

    It is not the exception itself, which with its traceback would hold all that the forward
    computed.
    """

    kind: type[BaseException]
    args: tuple[Any, ...]
    attributes: dict[str, Any]

    @classmethod
    def of(cls, error: BaseException) -> Raised:
        return cls(type(error), error.args, dict(vars(error)))

    def again(self) -> BaseException:
        """An exception like it."""
        error = self.kind.__new__(self.kind, *self.args)  # `__init__` may take something else
        vars(error).update(self.attributes)
        return error


def raised_by(unit: str) -> str:
    """The key of such an entry: with another one, a tape takes another path than where it ran."""
    return f"{unit} (raised)"


def being_handled() -> BaseException | None:
    """The exception that is being handled here; a compiled forward handles none."""
    return None if torch.compiler.is_compiling() else sys.exc_info()[1]
