"""Compiling and exporting, which an old torch cannot do, and tracing, which none can."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode

from ride_plugin._errors import ArgumentError, VersionError, listed
from ride_plugin._tree import tensors_in

# The oldest torch with which the tests of each pass; see docs/evidence/environments.md.
COMPILES_FROM, EXPORTS_FROM = (2, 10), (2, 13)

_HERE = tuple(int(part) for part in torch.__version__.split(".")[:2])
COMPILES, EXPORTS = _HERE >= COMPILES_FROM, _HERE >= EXPORTS_FROM


COMPILED = "_orig_mod"  # where torch.compile keeps the module


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what ``torch.compile`` returned; by name, as importing it takes long."""
    return type(module).__name__ == "OptimizedModule" and COMPILED in module._modules


def uncompiled(module: Any) -> Any:
    """The module that ``torch.compile`` was given; whatever is not compiled, as it is."""
    if isinstance(module, nn.Module) and is_compiled(module):
        return module._modules[COMPILED]
    return module


def is_exported(inputs: Any) -> bool:
    """Whether a forward is being exported with these inputs, and not another one elsewhere.

    What torch notes of an export holds for all threads, so one that serves looks at its tensors.
    """
    # `is_exporting()` is true for torch.compile too in some versions of torch.
    if not getattr(torch.compiler, "_is_exporting_flag", False):
        return False
    if torch.compiler.is_dynamo_compiling():
        return True
    return detect_fake_mode(tuple(tensors_in(inputs))) is not None


def check_exports() -> None:
    """Raise VersionError if this torch is too old to export a model's stages."""
    if not EXPORTS:
        _needs_newer_torch("`export_stages`", EXPORTS_FROM)


@contextmanager
def as_exported() -> Iterator[None]:
    """Let a forward that asks `torch.compiler.is_exporting()` take the way of the export.

    The attention of transformers writes out its mask there, which it leaves out elsewhere.
    """
    before = torch.compiler._is_exporting_flag
    torch.compiler._is_exporting_flag = True
    try:
        yield
    finally:
        torch.compiler._is_exporting_flag = before


def check_compiles(asked: Sequence[str] = ()) -> None:
    """Refuse what would fail somewhere inside: an old torch's compiler, and tracing by any.

    Args:
        asked: names of modules whose class the forward asks for where a stand-in answers.

    Raises:
        VersionError: this is being compiled by a torch that is too old.
        ArgumentError: this is being traced, or compiled although the forward asks for classes.
    """
    if asked and torch.compiler.is_compiling():
        _refuse_asking(asked)
    if not COMPILES and torch.compiler.is_compiling():
        _needs_newer_torch("Compiling or exporting a wrapped model", COMPILES_FROM)
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        refuse_tracing("torch.jit.trace")


def refuse_tracing(what: str) -> None:
    """Raise because ``what`` takes a forward for a list of operations."""
    raise ArgumentError(
        f"Expected the wrapped model to be compiled or exported, but {what} cannot follow how its "
        "experts run. Use `torch.compile(model)`, `torch.export.export(model.eval(), (x,))`, "
        "`torch.onnx.export(model.eval(), (x,), dynamo=True)`, or "
        f"`{what}` of one expert as a plain module, `model.to_module(k)`. Operations are counted "
        "by `cost_report(model)`."
    )


def _needs_newer_torch(what: str, oldest: tuple[int, int]) -> None:
    raise VersionError(
        f"{what} needs torch {oldest[0]}.{oldest[1]} or newer, but this is torch "
        f"{torch.__version__}. Training, evaluation and routing work with it."
    )


def _refuse_asking(asked: Sequence[str]) -> None:
    raise ArgumentError(
        "Expected the wrapped model to be run as it is, but it is being compiled or exported, and "
        f"its forward asks for the class of {listed(asked)} (`isinstance`), where a compiler finds "
        "that of a stand-in. Let the forward ask for something else, as `hasattr(layer, "
        '"running_mean")` or a number in the loop, or compile each expert as a plain module: '
        "`model.to_module(k)`."
    )


# Not traced, so that the errors are these and none of the compiler's. torch.compiler.disable would
# mark them so too, and import the compiler, which takes longer than all the rest.
_needs_newer_torch._torchdynamo_disable = True  # type: ignore[attr-defined]
_refuse_asking._torchdynamo_disable = True  # type: ignore[attr-defined]
