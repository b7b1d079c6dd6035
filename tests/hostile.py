"""Values that an argument cannot take, and the check that they are refused in our words."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ride_plugin import RIDEError

LOGITS, EXPERTS = torch.randn(4, 3), torch.randn(4, 2, 3)
TARGET = torch.tensor([0, 1, 2, 0])

NUMBER = ["0.2", math.nan, math.inf, True, [0.2], 1j, object()]
WHOLE = ["3", 2.9, math.nan, True, [3], -(10**30), object()]
NAME = ["offical", 3, [], object()]
BOOL = ["yes", 1, [], None]
COUNT = [None, "abc", 3, [], [5], [[1, 2]], [5, 0, 2], [5, math.nan], [True] * 3, {"a": 3, "b": 4}]
TARGETS = [
    None,
    "a",
    [0, 1, 2, 0],
    TARGET[:2],
    TARGET[:, None],
    TARGET > 0,
    TARGET * 1j,
    TARGET / 3,
]
TENSOR = [None, "a", [[1.0]], LOGITS.long(), LOGITS[0], LOGITS[:, :, None, None]]
LABELS = [None, "abc", 3, [], [0.5], [[0]], [-1], [True], object()]
MODULE = [None, 3, "fc", object(), nn.ReLU]
WEIGHT = ["a", 3, [], [-1.0, 1, 1], [0.0, 0, 0], [math.nan, 1, 1], [True] * 3]

Kinds = dict[str, tuple[Any, list[Any]]]
"""For each argument a value that it takes, and values that it must refuse.

After a slash stand further words by which a message may name it, such as what it holds.
"""


def case_name(value: object) -> str:
    """A name of a case that is the same in every process: without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _good(kinds: Kinds) -> dict[str, Any]:
    return {argument.split("/")[0]: value for argument, (value, _) in kinds.items()}


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(map(_shown, value))})"
    return type(value).__name__ if isinstance(value, nn.Module) else repr(value)


def check_refusals(call: Callable[..., Any], kinds: Kinds) -> None:
    """Every wrong value gives an error of this library; one argument is wrong at a time."""
    good = _good(kinds)
    call(**good)
    wrong = []
    for words, (_, bad) in kinds.items():
        argument = words.split("/")[0]
        for value in bad:
            try:
                call(**good | {argument: value})
            except RIDEError as error:
                if not any(word in str(error) for word in words.split("/")):
                    wrong.append(f"{argument}={_shown(value)}: not named in: {error}")
            except Exception as error:
                wrong.append(f"{argument}={_shown(value)}: {type(error).__name__}: {error}")
            else:
                wrong.append(f"{argument}={_shown(value)}: accepted")
    assert not wrong, "\n".join(wrong)


def check_scalars(call: Callable[..., Any], kinds: Kinds) -> None:
    """Where Python's int or float is taken, numpy's and torch's are as well."""
    good = _good(kinds)
    for argument, value in good.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = np.int64(value) if isinstance(value, int) else np.float64(value)
            for same in (number, torch.tensor(value), np.array(value)):
                call(**good | {argument: same})
