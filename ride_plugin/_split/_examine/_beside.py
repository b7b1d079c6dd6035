"""What a backbone returns beside its logits: what a loss may be made of, or code takes apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ride_plugin._split._examine._logits import LogitsReader, depends, proposed, spelled
from ride_plugin._tree import answers_indices, places_in


def losses_beside(reader: LogitsReader, output: Any) -> list[str]:
    """Where an output in training holds more than its logits that a loss may be made of.

    That is what gradients flow through: a number, as an auxiliary loss is, or a matrix like the
    logits that is neither made of them, as probabilities are, nor they of it, as of features. An
    entry named `loss` is told of by itself, in either mode, and a function may have made the logits
    of any matrix.

    Args:
        reader: takes the logits out of it.
        output: what the backbone returned, with its graph.

    Returns:
        Each place as code reads it: ``output[1]``.
    """
    logits = reader.entry_of(output, training=True)

    def second_classifier(tensor: Tensor) -> bool:
        alike = tensor.shape == logits.shape and not callable(reader.choice)
        return alike and not (depends(tensor, logits) or depends(logits, tensor))

    return [
        spelled(path)
        for path, tensor in places_in(output)
        if tensor.requires_grad
        and path[-1:] != ("loss",)
        and (tensor.dim() == 0 or second_classifier(tensor))
    ]


def sequence_around(
    reader: LogitsReader, output: Any, in_training: Any, traced: Callable[[], Any]
) -> tuple[str, bool] | None:
    """What to say of an output that code takes entries from by index; None of any other.

    A wrapped model returns a tensor in its place, which can be indexed and unpacked as well: no
    error tells code that did so with the backbone that it takes rows. Tuples and lists are such,
    and what answers `output[0]` beside names, as the outputs of transformers do. (A dict that is
    asked for names alone, or a dataclass, is not: a tensor does not have these.)

    Args:
        reader: takes the logits out of it.
        output: what the backbone returned in evaluation mode.
        in_training: in training mode; None if it did not run.
        traced: runs it in training mode again, and returns its output with its graph.

    Returns:
        The text, and whether such an output comes in training alone. Where the first step of
        training tells of losses in that, nothing else is said.
    """
    place, alone = reader.place_in(output), not answers_indices(output)
    if alone:
        if reader.choice is not None or not answers_indices(in_training):
            return None
        if _losses_in(reader, traced):
            return None
        output, place = in_training, reader.place_in(in_training, True)
    elsewhere = in_training is not None and reader.place_in(in_training, True) not in (place, ())
    answer = "`logits=`, a function of the output," if elsewhere or not place else proposed(place)
    kind, wrong = type(output).__name__, "`model(x)[0]` is their first row"
    if isinstance(output, list | tuple):
        kind = f"{'named tuple' if hasattr(output, '_fields') else kind} of {len(output)}"
        wrong += ", and unpacking takes rows apart"
    elif place and isinstance(place[0], str):
        wrong = (
            "`outputs[0]` is their first row, `outputs[:2]` are two rows, and there is no "
            f"`outputs.{place[0]}`"
        )
    return (
        f"The backbone returns a {kind}{' in training' if alone else ''}, but the wrapped model "
        f"returns the logits [B, C] alone: {wrong}. Write `logits = model(x)` where the backbone's "
        "output is indexed or unpacked. (The rest of it is there in training with "
        f'`return_experts="outputs"`.) Pass {answer} to say that you know.'
    ), alone


def _losses_in(reader: LogitsReader, traced: Callable[[], Any]) -> list[str]:
    try:
        return losses_beside(reader, traced())
    except Exception:  # it takes no gradients
        return []
