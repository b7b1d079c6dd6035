"""Where the logits are in what a backbone returns in training mode, which may be another place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ride_plugin._errors import SplitError, listed
from ride_plugin._split._examine._classifier import Head, innermost_candidates
from ride_plugin._split._examine._logits import ASK, LogitsReader, depends, describe, spelled
from ride_plugin._split._examine._probe import Call, address_of
from ride_plugin._tree import Path, is_matrix, matrices_in


@dataclass
class Traced:
    """A pass with its graph for gradients.

    Attributes:
        output: what the backbone returned.
        made: what each of some submodules returned, by name.
        owned: the parameters of each, by name.
    """

    output: Any
    made: dict[str, list[Tensor]]
    owned: dict[str, list[nn.Parameter]]

    def comes_from(self, names: Sequence[str], entry: Any) -> bool:
        """Whether an entry of the output was computed with a parameter of these submodules."""
        parameters = [parameter for name in names for parameter in self.owned[name]]
        return isinstance(entry, Tensor) and any(depends(entry, p) for p in parameters)


Trace = Callable[[bool, Sequence[str]], Traced]
"""Runs the backbone in a mode, with its graph, and notes what some submodules return."""


def learn_training_output(
    reader: LogitsReader,
    roots: tuple[Call, Call],
    outputs: tuple[Any, Any],
    head: Head | None,
    trace: Trace,
) -> None:
    """Find the logits in what the backbone returns in training mode.

    With auxiliary heads there may be more entries than in evaluation, or others in their place:
    features where the logits were. Where the classifier is known, what is taken in training has to
    come from it.

    Args:
        reader: knows where the logits are in evaluation, and is taught where they are in training.
        roots: the calls in evaluation and in training.
        outputs: what the backbone returned in evaluation and in training.
        head: the classifier that the logits come from in evaluation.
        trace: see :data:`Trace`.

    Raises:
        SplitError: it is not certain which they are.
    """
    root, output = roots[1], outputs[1]
    found = matrices_in(output)
    place = tuple(path for path, _ in found)
    returned = [
        path
        for path, tensor in found
        if head is not None and any(_returned(call, tensor) for call in root.calls_of(head.name))
    ]
    logits = reader.logits_of(output, training=True)
    if logits is None:
        names = None
        if head is not None and not head.exact:
            names = _sources(reader, roots[0], outputs[0], head, trace)
        if head is not None and names is None:
            # Where evaluation takes no gradients, a layer that is the only one is believed.
            names = _names(reader, roots[0], outputs[0], head)
        if not returned or names is None or len(names) != 1:
            raise SplitError(
                "In training mode the backbone returns something else than in evaluation, and "
                f"which part of it is the logits is not certain: {describe(output)}. {ASK}."
                + _said_of_several(names or [], outputs)
            )
        reader.known[True, place] = returned[0]
        return
    taken = [path for path, tensor in found if tensor is logits]
    if head is None or callable(reader.choice) or set(taken) & set(returned):
        return
    other = _other_place(reader, roots[0], outputs[0], head, trace)
    if other is None:
        return
    if len(other) == 1 and reader.choice is None:
        reader.known[True, place] = other[0]
        return
    remedy = "Pass `logits=` a function that returns the logits [B, C] of either mode's output."
    if len(other) == 1:
        remedy = (
            f"They seem to be {spelled(other[0])} there: let the forward return them in the same "
            "place in both modes" + (", or leave `logits=` out." if head.exact else ".")
        )
    elif other:
        remedy += f" In training they may be {' or '.join(map(spelled, other))}."
    raise SplitError(
        f"In training mode the backbone returns {describe(output)}, and what is taken for the "
        f"logits there, as in evaluation, is not computed by the classifier `{head.name}` that "
        f"returns them in evaluation: it looks like features. {remedy} (If it has another "
        "classifier in training, a function, `logits=lambda output: output` say, is believed.)"
    )


def check_columns(reader: LogitsReader, outputs: tuple[Any, Any]) -> None:
    """Raise SplitError if what is taken for the logits is of other classes in training.

    Args:
        reader: knows where the logits are in both modes.
        outputs: what the backbone returned in evaluation and in training.
    """
    evaluation, training = reader.logits_of(outputs[0]), reader.logits_of(outputs[1], True)
    if training is None or evaluation is None or training.shape[1] == evaluation.shape[1]:
        return
    raise SplitError(
        f"What is taken for the logits has {training.shape[1]} columns in training and "
        f"{evaluation.shape[1]} in evaluation: {describe(outputs[1])}, and {describe(outputs[0])}. "
        "If those of evaluation are features, for retrieval or face recognition say, let the "
        "forward return logits in both modes. Features come from "
        "`model.router_inputs(x).expert_features` [B, E, D] of the wrapped model."
    )


def _other_place(
    reader: LogitsReader, root: Call, output: Any, head: Head, trace: Trace
) -> list[Path] | None:
    """Where the classifier's logits are in training, if what would be taken does not come from it.

    None if it does, or if nothing is known of that.
    """
    logits = reader.logits_of(output)
    assert logits is not None
    names = _sources(reader, root, output, head, trace)
    if not names:
        return None
    try:
        now = trace(True, names)
        entry = reader.entry_of(now.output, training=True)
        if now.comes_from(names, entry):
            return None
        others = [
            path
            for path, tensor in matrices_in(now.output)
            if tensor.shape == logits.shape and now.comes_from(names, tensor)
        ]
    except Exception:  # no gradients: then nothing is known of what it is computed from
        return None
    learns = is_matrix(entry) and entry.requires_grad
    return others if others or learns else None


def _sources(
    reader: LogitsReader, root: Call, output: Any, head: Head, trace: Trace
) -> list[str] | None:
    """The classifiers that the logits of evaluation are computed from; None if it is not known."""
    names = _names(reader, root, output, head)
    try:
        before = trace(False, names)
        if not head.exact:
            names = [name for name in names if not _is_read_by_others(name, before)]
        entry = reader.entry_of(before.output)
        known = isinstance(entry, Tensor) and entry.requires_grad
        return [n for n in names if before.comes_from([n], entry)] if known else None
    except Exception:  # no gradients
        return None


def _names(reader: LogitsReader, root: Call, output: Any, head: Head) -> list[str]:
    """The classifier that has returned the logits, or the layers that they may come from."""
    if head.exact:
        return [head.name]
    logits = reader.logits_of(output)
    assert logits is not None
    return list(dict.fromkeys(c.name for c in innermost_candidates(root, logits)))


def _said_of_several(sources: Sequence[str], outputs: tuple[Any, Any]) -> str:
    """How a function of the output trains all classifiers, where there are several."""
    evaluation, training = outputs
    if len(sources) < 2 or not isinstance(evaluation, Tensor):
        return ""
    alike = [spelled(path) for path, t in matrices_in(training) if t.shape == evaluation.shape]
    return (
        f" In evaluation they are computed from {listed(sources)} together, and an index would "
        "train one alone. If they are the mean, pass `logits=lambda output: output if "
        f"isinstance(output, torch.Tensor) else ({' + '.join(alike)}) / {len(alike)}`, as a "
        "function of a module if the model shall be pickled."
    )


def _is_read_by_others(name: str, seen: Traced) -> bool:
    """Whether the result of one of some submodules leads to that of another."""
    others = [t for other, made in seen.made.items() if other != name for t in made]
    return any(
        depends(later, earlier)
        for later in others
        for earlier in seen.made[name]
        if later is not earlier
    )


def _returned(call: Call, tensor: Tensor) -> bool:
    return any(address == address_of(tensor) for address, _ in call.outputs)
