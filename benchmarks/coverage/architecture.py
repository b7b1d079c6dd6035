"""One architecture of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """How to build a backbone, and what is special about it.

    Attributes:
        name: unique within its source.
        source: the library it comes from, or whose published description it follows.
        build: returns the backbone with random weights; called after seeding.
        hard: what makes it hard to split, if anything does.
        compile: also compile it as one graph (slow, so only for some).
    """

    name: str
    source: str
    build: Callable[[], nn.Module]
    hard: str = ""
    compile: bool = False

    @property
    def key(self) -> str:
        """Unique in the whole zoo."""
        return f"{self.source}/{self.name}"
