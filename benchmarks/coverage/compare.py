"""Comparisons; each says by how much two values differ."""

from __future__ import annotations

import torch
from torch import Tensor


class Failed(Exception):
    """The wrapped model is not what it must be."""


class NotApplicable(Exception):
    """The backbone itself cannot do what the check asks for."""


def require_equal(got: Tensor, expected: Tensor, what: str) -> None:
    """To the bit; NaNs are equal."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        raise Failed(f"{what}: {got.dtype} {list(got.shape)}")
    if not torch.equal(got, expected) and not torch.equal(
        torch.nan_to_num(got.double(), nan=1.5), torch.nan_to_num(expected.double(), nan=1.5)
    ):
        raise Failed(f"{what}: differs by {float((got.double() - expected.double()).abs().max())}")


def require_close(got: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Up to rounding: kernels differ with the number of rows."""
    scale = float(expected.abs().max()) + 1e-30
    atol = tolerance * scale
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=0, atol=atol):
        raise Failed(f"{what}: differs by {float((got - expected).abs().max()):.2g} of {scale:.2g}")


def require_gradients(
    got: dict[str, Tensor | None], expected: dict[str, Tensor | None], subset: bool = False
) -> None:
    """Compare by name; rounding in sums over a batch is measured against the largest gradient."""
    if not subset and set(got) != set(expected):
        raise Failed(f"parameters: {sorted(set(got) ^ set(expected))[:3]}")
    largest = max((float(g.abs().max()) for g in expected.values() if g is not None), default=0.0)
    for name, ours in got.items():
        theirs = expected[name]
        if (ours is None or not ours.any()) and (theirs is None or not theirs.any()):
            continue
        if ours is None or theirs is None:
            raise Failed(f"{name}: {'no' if ours is None else 'a'} gradient")
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5 * largest, equal_nan=True):
            raise Failed(f"{name}: differs by {float((ours - theirs).abs().max()):.2g}")
