"""Scores for each position of the input, a token say, which no class is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ride_plugin._errors import SplitError
from ride_plugin._inputs import Inputs, run_plainly
from ride_plugin._split._examine._logits import describe
from ride_plugin._tree import map_tensors, tensors_in


def refuse_scores_of_positions(
    copied: Callable[[], nn.Module],
    inputs: Inputs,
    logits_of: Callable[[Any], Tensor | None],
    output: Any,
    columns: int,
) -> None:
    """Raise if what is taken for logits has a column for each position of the input.

    Only a trial is certain: an input that is one position shorter gives one column less. Where it
    does not run, nothing is said, since as many columns may be a coincidence.

    Args:
        copied: returns a copy of the backbone in evaluation mode.
        inputs: an example of two rows.
        logits_of: takes the logits out of what the backbone returns.
        output: what it returned for the example.
        columns: of what was taken for its logits.

    Raises:
        SplitError: it has.
    """

    def has_as_many(tensor: Tensor) -> bool:
        return tensor.dim() > 1 and tensor.shape[1] == columns

    if not any(map(has_as_many, tensors_in(inputs))):
        return
    try:
        shorter = map_tensors(lambda t: t[:, :-1] if has_as_many(t) else t, inputs)
        found = logits_of(run_plainly(copied(), shorter))
    except Exception:
        return
    if found is not None and found.shape[1] == columns - 1:
        raise SplitError(
            "Expected argument `backbone` to return logits [B, C], a column for each class, but "
            f"got {describe(output)}. Its logits [2, {columns}] are a score for each of {columns} "
            f"positions of the input: for one of {columns - 1} there are {columns - 1} columns. "
            "Tokens, frames and choices are no classes. Wrap a network that has one prediction for "
            "each sample, or pass as `logits=` another entry of its output. If every input has "
            f"{columns} positions, and each is a class of yours, pass `num_classes={columns}`."
        )
