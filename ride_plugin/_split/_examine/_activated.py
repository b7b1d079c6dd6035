"""Warns, when a backbone is wrapped, that it returns probabilities in the place of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ride_plugin._checks import rows_sum_to_one
from ride_plugin._errors import warn_caller

_WHY = "Experts' logits are what is averaged and compared here"
_OF_SHAPE = (
    *("View", "Reshape", "UnsafeView", "Squeeze", "Unsqueeze", "Transpose", "Permute"),
    *("Select", "Slice", "ToCopy", "Clone"),
)
_OF_LAYERS = ("Add", "Mm", "Convolution", "MkldnnConvolution")  # with a bias a linear one is Addmm


def warn_of_activated(logits: Tensor, differentiable: Callable[[], Tensor | None]) -> None:
    """Warn if a softmax, a log-softmax or a sigmoid has been applied to the logits.

    Numbers between zero and one may be logits that happen to be small, as those of a new model
    are, so that a sigmoid is known by the graph for gradients only. Those of a new model whose bias
    holds logarithms of frequencies look like the output of a log-softmax, so that this is none if
    the last operation in that graph is a layer's or an addition.

    Args:
        logits: of an example, with contents.
        differentiable: computes them again, with their graph.
    """
    if logits.shape[1] < 2:
        return
    if _probabilities(logits):
        warn_caller(
            f"The backbone returns probabilities: its rows sum to one. {_WHY}, and a criterion "
            "such as cross entropy takes a softmax by itself. Take the softmax out of the backbone "
            "before wrapping it, and apply it to what the wrapped model returns."
        )
    elif _logarithms(logits):
        if _ends_in(differentiable, *_OF_LAYERS):
            return
        warn_caller(
            "The backbone returns logarithms of probabilities, as log_softmax does: the "
            f"exponentials of its rows sum to one. {_WHY}, and the mean of log-probabilities is "
            "none: its exponentials sum to less than one. Return what comes before log_softmax, "
            "with CrossEntropyLoss in the place of NLLLoss, and apply log_softmax to what the "
            "wrapped model returns."
        )
    elif bool(((logits >= 0) & (logits <= 1)).all()) and _ends_in(differentiable, "Sigmoid"):
        warn_caller(
            "The backbone returns probabilities: it ends in a sigmoid. "
            f"{_WHY}, and the diversity term takes a softmax of them, which is nearly flat over "
            "numbers between zero and one. Take the sigmoid out of the backbone before wrapping "
            "it, with BCEWithLogitsLoss in the place of BCELoss, and apply it to what the wrapped "
            "model returns."
        )


def is_softmax(logits: Tensor) -> bool:
    """Whether rows of an example sum to one, or their exponentials do: classes, not features."""
    return logits.shape[1] > 1 and (_probabilities(logits) or _logarithms(logits))


def _probabilities(logits: Tensor) -> bool:
    return bool((logits >= 0).all()) and rows_sum_to_one(logits)


def _logarithms(logits: Tensor) -> bool:
    return bool((logits <= 0).all()) and rows_sum_to_one(logits.exp())


def _ends_in(differentiable: Callable[[], Any], *operations: str) -> bool:
    """Whether one of these computed the logits, but for changes of their shape."""
    try:
        node = differentiable().grad_fn
    except Exception:  # no gradients: then nothing is known of the last operation
        return False
    while node is not None and node.name().startswith(_OF_SHAPE):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith(operations)
