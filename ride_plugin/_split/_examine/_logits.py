"""Which of a backbone's outputs are its logits: decided where it is certain, asked where not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ride_plugin._closeness import close
from ride_plugin._errors import ArgumentError, ReplayError, SplitError
from ride_plugin._split._examine._activated import is_softmax
from ride_plugin._split._examine._classifier import Head, find_classifier, used_by_function
from ride_plugin._split._examine._probe import Call
from ride_plugin._tree import (
    Path,
    answers_indices,
    at_path,
    is_matrix,
    logits_in,
    matrices_in,
    places_in,
    tensors_in,
)

Choice: TypeAlias = int | str | Callable[[Any], Tensor] | None
"""What users say about it: an index, a key, a function of the output, or nothing."""

ASK = (
    "Pass `logits=`: an index, a key or attribute, or a function that returns the logits [B, C] "
    "of what the backbone returns"
)
_PAIR = (
    "Where features and classifier are two modules, wrap both: RIDEWrapper.from_pair("
    "feature_extractor, classifier)."
)


class _Kept(threading.local):
    def __init__(self) -> None:
        self.outputs: list[Any] | None = None
        self.losses: list[Tensor] | None = None
        self.first_is_loss = False


_kept = _Kept()


@contextmanager
def whole_outputs() -> Iterator[list[Any]]:
    """What every expert's forward returns, not its logits alone, in this thread and this block."""
    before, _kept.outputs = _kept.outputs, []
    try:
        yield _kept.outputs
    finally:
        _kept.outputs = before


@contextmanager
def losses_dropped(kwargs: Mapping[str, Any]) -> Iterator[list[Tensor]]:
    """The losses that experts' forwards return beside logits, in this thread and this block.

    Args:
        kwargs: of the call. With labels, or where they ask for an output without names, a number
            that comes first in such an output is a loss.
    """
    before = _kept.losses, _kept.first_is_loss
    asked = kwargs.get("labels") is not None or kwargs.get("return_dict") is False
    _kept.losses, _kept.first_is_loss = [], asked
    try:
        yield _kept.losses
    finally:
        _kept.losses, _kept.first_is_loss = before


def _note_loss(output: Any, training: bool) -> None:
    """Note the loss that an expert's forward returned beside the logits, if somebody asked."""
    if _kept.losses is not None and not isinstance(output, Tensor):
        loss = at_path(output, ("loss",))
        if isinstance(loss, Tensor):
            _kept.losses.append(loss)
        elif _kept.first_is_loss and not training:  # in training gradients tell of it
            first = at_path(output, (0,)) if isinstance(output, list | tuple) else None
            if isinstance(first, Tensor) and first.dim() == 0 and first.is_floating_point():
                _kept.losses.append(first)


@dataclass
class LogitsReader:
    """Forward hook of a view's root: of what the backbone returns, only the logits go on.

    Attributes:
        choice: what the user said.
        known: for each mode, training or not, and kind of output that the build has seen, where
            the logits lie in it.
        by_name: whether the choice is a name that the output had when the build saw it.
    """

    choice: Choice = None
    known: dict[tuple[bool, tuple[Path, ...]], Path] = field(default_factory=dict)
    by_name: bool = False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor:
        """Return the logits ``[B, C]``.

        Raises:
            ReplayError: the output is of a kind that the build has not seen.
        """
        if _kept.outputs is not None:
            _kept.outputs.append(output)
        if isinstance(output, Tensor) and not callable(self.choice):
            return output  # whoever runs the expert looks at its shape
        _note_loss(output, module.training)
        logits = self.logits_of(output, module.training)
        if logits is None and _of_one_row(args):
            logits = self._without_batch_dimension(output, module.training)
        if logits is None and not matrices_in(output):
            raise ReplayError(
                "The backbone returned no logits [B, C], as it did when it was wrapped, but "
                f"{describe(output)}: losses, say, which it computes itself in this mode. Call "
                "the model as when it was wrapped, without what asks for something else, and "
                "compute the loss of what it returns."
            )
        if logits is None:
            raise ReplayError(
                "The backbone returned something else than when it was wrapped, and which part of "
                f"it holds the logits is not certain: {describe(output)}. {ASK}. "
                + self._serves_both(output)
            )
        return logits

    def logits_of(self, output: Any, training: bool = False) -> Tensor | None:
        """The logits, or None where it is not certain which they are."""
        chosen = self.entry_of(output, training)
        return chosen if is_matrix(chosen) else None

    def _serves_both(self, output: Any) -> str:
        """What to say about calls that return something of another kind."""
        if self.by_name and isinstance(output, list | tuple):
            return (
                f"A {type(output).__name__} has no name {self.choice!r}. A function serves both "
                f"kinds of call: `logits=lambda output: output[i] if isinstance(output, "
                f"{type(output).__name__}) else output[{self.choice!r}]`, with i for its place."
            )
        return (
            "Where a call returns a tensor, an index or a key is ignored, so that it serves both."
        )

    def _without_batch_dimension(self, output: Any, training: bool) -> Tensor | None:
        """A vector where the logits lie: whoever runs the expert says what is wrong with it."""
        known = [at_path(output, path) for path in (*self.known.values(), ("logits",))]
        tensors = list(tensors_in(output))
        only = tensors if len(tensors) == 1 else []
        for entry in (self.entry_of(output, training), *known, *only):
            if isinstance(entry, Tensor) and entry.dim() == 1:
                return entry
        return None

    def entry_of(self, output: Any, training: bool = False) -> Any:
        """What was chosen, or what is known or certain to be the logits; whatever it is.

        What is known of the one mode holds in the other where nothing else is known of that.
        """
        if callable(self.choice):
            return self.choice(output)
        if isinstance(output, Tensor):
            return output
        if self.choice is not None:
            chosen = at_path(output, (self.choice,))
            # What has no names is asked for by `return_dict=False`: then as if nothing was said.
            unnamed = isinstance(output, list | tuple)
            if chosen is not None or not (unnamed and (self.by_name or self.choice == "logits")):
                return chosen
        kind = tuple(path for path, _ in matrices_in(output))
        path = self.known.get((training, kind), self.known.get((not training, kind)))
        return logits_in(output) if path is None else at_path(output, path)

    def place_in(self, output: Any, training: bool = False) -> Path | None:
        """Where the entry lies in the output; None if a function computes it."""
        entry = self.entry_of(output, training)
        if entry is output:
            return ()
        if isinstance(self.choice, int | str) and at_path(output, (self.choice,)) is entry:
            return (self.choice,)
        return next((path for path, tensor in matrices_in(output) if tensor is entry), None)


def _of_one_row(args: Any) -> bool:
    first = next(iter(tensors_in(args)), None)
    return first is not None and first.shape[:1] == (1,)


def check_logits_choice(choice: object, name: str = "logits") -> None:
    """Raise ArgumentError unless ``choice`` is something that ``logits=`` accepts."""
    if choice is None or callable(choice) or isinstance(choice, str):
        return
    if not isinstance(choice, int) or isinstance(choice, bool):
        raise ArgumentError(
            f"Expected argument `{name}` to be None, an index, a key or a function of the "
            f"output, but got {choice!r}."
        )


def find_logits(
    reader: LogitsReader,
    root: Call,
    output: Any,
    num_classes: int | None,
    differentiable: Callable[[], Any],
) -> tuple[Tensor, Head | None]:
    """The logits in the backbone's output in evaluation mode, and the classifier they come from.

    An entry named `logits` is taken, or the only matrix. Among several it is the one that a
    classifier returned and that depends on the others while none depends on it, or the only one
    with ``num_classes`` columns.

    Args:
        reader: is taught where they lie.
        root: the calls that led to ``output``.
        output: what the backbone returned for two rows.
        num_classes: what the user said.
        differentiable: runs the backbone again and returns its output with its graph.

    Raises:
        SplitError: it is not certain; the message lists what may be meant.
    """
    logits = reader.logits_of(output)
    reader.by_name = isinstance(reader.choice, str) and is_matrix(at_path(output, (reader.choice,)))
    found = matrices_in(output)
    if logits is None and len(found) > 1 and reader.choice is None:
        of_classifier, alone = _of_a_classifier(root, found, differentiable)
        path = of_classifier if alone else None
        if path is None and num_classes is not None:
            fitting = [path for path, tensor in found if tensor.shape[1] == num_classes]
            path = fitting[0] if len(fitting) == 1 else None
        if path is None:
            example = "" if of_classifier is None else f"; for example {proposed(of_classifier)}"
            rows = (
                " The wrapped model returns the logits alone: write `logits = model(x)` where the "
                "backbone's output is indexed or unpacked, which would take rows of them."
            )
            raise SplitError(
                "Which part of the backbone's output is the logits? It returned "
                f"{describe(output)}. {ASK}{example}.{rows if answers_indices(output) else ''}"
            )
        reader.known[False, tuple(path for path, _ in found)] = path
        logits = reader.logits_of(output)
    if logits is None or logits.shape[0] != 2:
        raise SplitError(
            "Expected argument `backbone` to map a batch to logits [B, C], but for 2 rows it "
            f"returned {describe(output)}. Wrap a classifier"
            + ("." if reader.choice is None else ", or pass another `logits=`.")
            + with_one_more(output)
        )
    return logits, find_classifier(root, logits)


def reader_in(root: nn.Module) -> LogitsReader:
    """What reads the logits of a view; a new reader where the view returns nothing else."""
    hooks = (hook for module in root.modules() for hook in module._forward_hooks.values())
    return next((hook for hook in hooks if isinstance(hook, LogitsReader)), LogitsReader())


def check_classifies(
    root: Call,
    output: Any,
    logits: Tensor,
    head: Head | None,
    reader: LogitsReader,
    num_classes: int | None,
    gradients: Callable[[Sequence[str]], Sequence[Tensor | None]],
) -> None:
    """Raise unless the logits come from a classifier, or are said to be logits.

    Raises:
        SplitError: they look like features, or are one column; or there is no classifier to give
            ``num_classes``.
    """
    columns = logits.shape[1]
    if columns == 1:
        raise SplitError(
            "Expected argument `backbone` to return logits [B, C] of at least two classes, but "
            f"got one column of {describe(output)}. One output is a "
            "regression or a single sigmoid, which is not supported: experts are compared by a "
            "softmax over classes, which is always 1 over one. For a task of two classes give the "
            "backbone two outputs, `nn.Linear(in_features, 2)`, with CrossEntropyLoss and targets "
            "0 and 1" + ("." if reader.choice is None else "; or pass another `logits=`.")
        )
    rectified = bool((logits >= 0).all() & (logits == 0).any() & logits.any())
    exact = head is not None and head.exact
    certain = head is not None and (exact or isinstance(output, Tensor) or is_softmax(logits))
    found = certain and not rectified
    if num_classes not in (None, columns):
        if not found:
            raise SplitError(
                f"Expected argument `num_classes` to be the backbone's own number, {columns}, or "
                "the backbone to end in a linear layer that can be made anew, but got "
                f"{num_classes} and found no such layer. {_PAIR}"
            )
        return
    named = any(path[-1:] == ("logits",) and t is logits for path, t in matrices_in(output))
    said = reader.choice is not None or named or columns in {num_classes, *_stated(root.module)}
    normalised = not exact and _of_length_one(logits)
    if said or (found and not normalised):
        return
    if (
        head is not None
        or rectified
        or normalised
        or not used_by_function(root, columns, gradients)
    ):
        raise SplitError(
            f"The backbone returns {describe(output)}, and no layer with a weight for each column "
            f"was found to return it: it looks like a feature extractor. {_PAIR} If these are "
            f"logits, pass `num_classes={columns}`."
        )


def _of_length_one(rows: Tensor) -> bool:
    """Whether rows were normalised, as embeddings are."""
    lengths = rows.float().norm(dim=1)
    return close(lengths, torch.ones_like(lengths), units=100, scale=0.0)


def describe(output: Any) -> str:
    """An output in words, with its matrices by name and shape."""
    if isinstance(output, Tensor):
        return f"a {output.dtype} tensor of shape {list(output.shape)}"
    if output is None:  # as of a forward without `return`
        return "None"
    found = matrices_in(output)
    kind = type(output).__name__
    tensors = found or places_in(output)[:3]
    listed = ", ".join(f"{spelled(path)} of shape {list(t.shape)}" for path, t in tensors)
    if found:
        return f"a {kind} with {listed}"
    return f"a {kind} without a matrix [B, C]" + (f", with {listed}" if tensors else "")


def with_one_more(output: Any) -> str:
    """How to get logits out of an output that has them as ``[B, 1, C]`` or ``[B, C, 1]``."""
    for path, tensor in places_in(output):
        if tensor.is_floating_point() and tensor.dim() == 3 and tensor.shape[1:].count(1) == 1:
            entry = "[:, 0]" if tensor.shape[1] == 1 else "[..., 0]"
            return (
                f" If {spelled(path)} of shape {list(tensor.shape)} holds them: "
                f"`logits=lambda output: {spelled(path)}{entry}`."
            )
    return ""


def _of_a_classifier(
    root: Call, found: Sequence[tuple[Path, Tensor]], differentiable: Callable[[], Any]
) -> tuple[Path | None, bool]:
    """The only matrix that a classifier returned, if no other matrix is computed from it.

    Returns:
        Its place, and whether all others lead to it, so that it is certain.
    """
    heads = [
        path for path, t in found if (head := find_classifier(root, t)) is not None and head.exact
    ]
    if len(heads) != 1:
        return None, False
    try:
        output = differentiable()
        tensors = [at_path(output, path) for path, _ in found]
        last = [
            path
            for (path, _), tensor in zip(found, tensors, strict=True)
            if not any(depends(other, tensor) for other in tensors if other is not tensor)
        ]
        learns = at_path(output, heads[0]).requires_grad
    except Exception:  # no gradients: then nothing is known of the order
        return None, False
    return (heads[0] if heads[0] in last and learns else None), last == heads


def depends(later: Tensor, earlier: Tensor) -> bool:
    """Whether ``later`` is ``earlier`` or was computed from it, by the graph for gradients."""
    if not later.requires_grad or not earlier.requires_grad:
        return False
    if later is earlier:
        return True
    # Several results of one operation, the parts of a chunk say, have numbers there.
    edges, seen = [(later.grad_fn, later.output_nr)], set[Any]()
    while edges:
        node, number = edges.pop()
        if node is None:
            continue
        if node is earlier.grad_fn and number == earlier.output_nr:
            return True
        if getattr(node, "variable", None) is earlier:  # where gradients of a leaf end up
            return True
        if node not in seen:
            seen.add(node)
            edges += node.next_functions
    return False


def _stated(backbone: nn.Module) -> set[object]:
    """The numbers of classes that a backbone says it has."""
    config = getattr(backbone, "config", None)
    return {getattr(backbone, "num_classes", None), getattr(config, "num_labels", None)} - {None}


def spelled(path: Path) -> str:
    """A place in an output, as Python code reads it."""
    return "output" + "".join(f"[{key!r}]" for key in path)


def proposed(path: Path) -> str:
    """The argument that says that the logits lie at a place, as code."""
    return f"`logits={path[0]!r}`" if len(path) == 1 else f"`logits=lambda output: {spelled(path)}`"
