"""Factors that a constructor has computed from a size: its root, or one over its root."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from ride_plugin._errors import listed
from ride_plugin._tree import dotted
from ride_plugin._width._ledger import Ledger
from ride_plugin._width._plan import Step, shapes_in

# Numbers that may equal a root by chance: a share of 0.25 is no root of 16.
_OTHERS = ("drop", "prob", "rate", "ratio", "eps", "momentum", "slope")
_PRODUCTS = {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__", "baddbmm", "addmm"}
_QUOTIENTS = {"div", "div_", "divide", "true_divide", "__rdiv__"} | {
    f"__{kind}truediv__" for kind in ("", "r", "i")
}
_POWERS = (0.5, -0.5)


def rescaled(module: nn.Module, old: int, new: int) -> Iterator[tuple[str, float]]:
    """Yield attributes of a module that are the root of ``old``, with that of ``new``."""
    for key, value in _factors(module):
        for power in _POWERS:
            if _is_root(value, old, power):
                yield key, new**power


class Factors:
    """What the operations of each module say of its factors: which are used, and beside what sizes.

    A number such as 0.125 equals a root of 64 by chance as well. It counts as one where an
    operation of the module that holds it multiplies or divides by it, beside tensors of that size,
    and where the same attribute of all modules of that class is a root of a size there.
    """

    def __init__(self) -> None:
        self._sizes: dict[str, dict[int, set[int]]] = {}
        self._used: dict[str, set[float]] = {}

    def note(self, path: str, step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note an operation of the module at ``path``; ``step`` is the same one at full width."""
        sizes = self._sizes.setdefault(path, {})
        for old, new in zip(step.inputs, shapes_in((args, kwargs)), strict=False):
            for before, now in zip(old, new, strict=False):
                sizes.setdefault(before, set()).add(now)
        # Others add, compare or bound by a number, as activations do.
        scales = step.name in _PRODUCTS | _QUOTIENTS or "attention" in step.name
        for value in (*args, *kwargs.values()) if scales else ():
            if type(value) is not float:
                continue
            # A number above one that multiplies cosines is chosen, not the root of their vectors.
            product = value > 1 and step.name in _PRODUCTS
            if not product or any(_is_root(value, s, 0.5) for shape in step.inputs for s in shape):
                self._used.setdefault(path, set()).add(value)

    def follow(self, ledger: Ledger, known: Collection[str]) -> list[str]:
        """Set the factors of a trial that has ended to those of its sizes.

        Args:
            ledger: of the trial.
            known: paths of modules whose factors are known otherwise.

        Returns:
            What users have to be told: of factors that stay, because the size that each is a root
            of has become several, and of those that followed and may have been chosen by hand.
        """
        of_class: dict[tuple[type, str], dict[str, float]] = {}
        for path, used in self._used.items():
            module = ledger.modules[path]
            for key, value in _factors(module):
                if value in used and path not in known:
                    of_class.setdefault((type(module), key), {})[path] = value
        left, guessed = [], []
        for (_, key), values in of_class.items():
            roots = self._roots(ledger, values)
            alike = len({old for old, _, _ in roots.values()}) == 1
            for path, (old, new, power) in roots.items():
                name = dotted(path, key)
                if len(new) > 1:
                    left.append(name)
                    continue
                value = values[path] * (min(new) / old) ** power
                ledger.set_attribute(ledger.modules[path], key, value)
                if alike and new != {old} and _is_round(values[path]):
                    guessed.append(f"`{name}` ({values[path]:g} became {value:.4g})")
        return _told(left, guessed)

    def _roots(
        self, ledger: Ledger, values: Mapping[str, float]
    ) -> dict[str, tuple[int, set[int], float]]:
        """Size before, sizes after and power of an attribute of the modules of a class, by path.

        Beside a weight it may have a gain, the same for all: networks without normalisation divide
        the gain of their activation by the root of the fan-in.
        """
        fans = {path: fan for path in values if (fan := _fan_in(ledger, ledger.modules[path]))}
        gains = [values[path] * old**0.5 for path, (old, _) in fans.items()]
        differ = len({old for old, _ in fans.values()}) > 1
        if len(fans) == len(values) and _close(min(gains), 1.0 if not differ else max(gains)):
            return {path: (old, {new}, -0.5) for path, (old, new) in fans.items()}
        for power in _POWERS:
            found = {
                path: (size, new, power)
                for path, value in values.items()
                for size, new in self._sizes[path].items()
                if _is_root(value, size, power)
            }
            if len(found) == len(values):
                return found
        return {}


def _told(left: list[str], guessed: list[str]) -> list[str]:
    told = []
    if left:
        told.append(
            f"{listed(left)} of the narrowed experts may be computed from a width, since each is "
            "the root of one, or one over it. It was left as it is: what was as wide has several "
            "widths. Set it in `model.experts[k]` if it is to follow one of them."
        )
    if guessed:
        more = f" and {len(guessed) - 3} more" if len(guessed) > 3 else ""
        told.append(
            f"{', '.join(guessed[:3])}{more} of the narrowed experts followed the width, since "
            "each was the root of a size that it is used beside, or one over it. If somebody chose "
            "the number instead of computing it, set it back in `model.experts[k]`."
        )
    return told


def _factors(module: nn.Module) -> Iterator[tuple[str, float]]:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return
    for key, value in list(vars(module).items()):
        if type(value) is float and key != "p" and not any(part in key for part in _OTHERS):
            yield key, value


def _fan_in(ledger: Ledger, module: nn.Module) -> tuple[int, int] | None:
    """Entries of the weight for each output, before and after."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() < 2:
        return None
    changes = (c.old for c in ledger.changes if c.module is module and c.name == "weight")
    return next(changes, weight)[0].numel(), weight[0].numel()


def _is_root(value: float, size: int, power: float) -> bool:
    return size > 1 and _close(value, size**power)


def _is_round(value: float) -> bool:
    """Whether somebody may have written the number down: 0.125, but not one over the root of 96."""
    return float(f"{value:.4g}") == value


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)
