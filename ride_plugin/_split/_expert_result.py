"""What an expert returned, as logits and features, or refused by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ride_plugin._errors import ReplayError
from ride_plugin._split._cut import features_of
from ride_plugin._split._examine import describe, is_same_tensor
from ride_plugin._tree import is_matrix, logits_in


def logits_and_features(
    output: Any,
    received: Tensor | None,
    returned: Tensor | None,
    num_classes: int,
    *,
    classifier: str | None,
    classifies_logits: bool,
) -> tuple[Tensor, Tensor]:
    """An expert's logits ``[B, C]``, and what its classifier received, pooled to ``[B, D]``.

    Args:
        output: what the expert's forward returned.
        received: what its classifier received; None if it did not run.
        returned: what its classifier returned.
        num_classes: ``C``.
        classifier: name of the classifier inside an expert; None if it is no submodule.
        classifies_logits: whether the classifier received the very logits when it was wrapped.

    Raises:
        ReplayError: the output is another than it was when the backbone was wrapped.
    """
    logits = logits_in(output)
    refuse_lost_dimension(output, received)
    features = features_of(received, returned, logits)
    instead = not classifies_logits and is_same_tensor(logits, received)
    if (
        logits is None
        or logits.shape[1] != num_classes
        or (features is None and classifier is not None)
        or instead
    ):
        raise ReplayError(
            f"An expert returned {describe(output)}"
            + (", and its classifier did not run" if features is None else "")
            + (", which is what its classifier received" if instead else "")
            + f", where logits of {num_classes} classes were expected, as when the "
            "backbone was wrapped. A forward that is told by arguments to return something "
            "else cannot be trained this way: call the model for its logits. The experts' "
            "features come from `model.router_inputs(x)`, a plain backbone from "
            "`model.to_module(k)`; another number of classes is asked for when wrapping, by "
            "`num_classes=`."
        )
    # A classifier that is not a module of its own leaves no feature; its logits stand in.
    return logits, logits if features is None else features


def check_logits_of_half(
    logits: Any, features: Tensor, num_classes: int, *, classifies_logits: bool
) -> None:
    """Raise ReplayError unless what a classifier returned to a loop that calls it is its logits.

    Args:
        logits: what lies where they were when the pair was wrapped.
        features: what the classifier received.
        num_classes: see :func:`logits_and_features`.
        classifies_logits: see :func:`logits_and_features`.
    """
    refuse_lost_dimension(logits)
    logits_again = is_matrix(logits) and logits.shape[1] == num_classes
    if logits_again and (classifies_logits or not is_same_tensor(logits, features)):
        return
    raise ReplayError(
        "The classifier of an expert returned "
        + ("what it received" if logits is features else describe(logits))
        + f", where logits of {num_classes} classes lay when the pair was wrapped. Arguments "
        "beside the features go to each classifier as they are. If one lets it return something "
        "else, or elsewhere (a loss, features), call it for its logits, and compute the loss of "
        "what the second half returns."
    )


def refuse_lost_dimension(*values: Any) -> None:
    """Raise where a forward has dropped the batch dimension, as `squeeze()` does of one row."""
    if any(isinstance(value, Tensor) and value.dim() == 1 for value in values):
        raise ReplayError(
            "An expert has dropped the batch dimension of a batch of one row, as a plain "
            "`squeeze()` in the backbone's forward does. Name the dimension there "
            "(`squeeze(-1)`), or write `flatten(1)`: the last batch of an epoch may have one row, "
            "and early exit often leaves one."
        )
