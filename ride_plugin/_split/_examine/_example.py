"""An input that the backbone accepts: the one given, or one guessed from its first layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._errors import ArgumentError, SplitError
from ride_plugin._inputs import Inputs, as_inputs, batch_size_of, resize_batch, run_plainly
from ride_plugin._split._examine._logits import LogitsReader, describe, with_one_more
from ride_plugin._tree import holds_tensors, matrices_in, tensors_in

_SMALL_FIRST = (32, 224, 28, 64, 16, 8, 96, 128, 160, 192, 240, 256, 288, 299, 331, 384, 448, 512)
_LARGE_FIRST = (224, 32, 256, 299, 384, 240, 288, 192, 160, 128, 96, 64, 28, 331, 448, 512, 16, 8)
_ROWS = (
    "A batch is cut along the first dimension of its tensors, here and where rows are routed, so "
    "each row has to be a sample. Let the forward take one tensor of them, `torch.stack(crops)`, "
    "in place of a list with a tensor for each; and padded graphs [B, N, D] with a mask, or texts "
    "[B, T], in place of nodes [N, D] or tokens [N] with a vector that says whose they are. Or "
    "wrap alone the layers behind the pooling, which see one row for each sample."
)
_LENGTHS = (64, 16, 256, 512, 1024, 4096, 16000)
_PATIENCE = 10.0
"""Seconds of this thread after which no other guess is tried; what waits for others is not counted.

Later guesses are larger, and the cost of some networks grows with the square of the size.
"""


def find_example(backbone: nn.Module, example: Any, reader: LogitsReader) -> tuple[Inputs, Any]:
    """Find inputs for two rows that ``backbone`` (a throwaway copy, in eval mode) accepts.

    Returns:
        The inputs, and what the backbone returns for them.

    Raises:
        SplitError: no guess runs, or the given example does not; the message holds the cause.
    """
    if example is not None:
        given = as_inputs(example)
        inputs = resize_batch(given, 2)
        try:
            output = run_plainly(backbone, inputs)
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            if _runs(backbone, given):
                raise SplitError(
                    "The backbone runs on `example_input` as it is, but not on two rows of it "
                    f"({cause}). If it takes batches of one size only, make what has that size, an "
                    f"initial state say, from `x.size(0)` in its forward. {_ROWS}"
                ) from error
            if _runs_as_one(backbone, example):
                raise SplitError(
                    "The backbone runs on the tuple that was given as `example_input`, but not on "
                    f"its {len(example)} items as so many arguments ({cause}). A tuple holds the "
                    "arguments of the forward: where that takes one, which is a tuple, pass "
                    "`example_input=(batch,)`."
                ) from error
            raise SplitError(
                f"The backbone does not run on `example_input`: {cause}. Pass a batch as its "
                "forward receives it."
            ) from error
        if not _has_rows(reader, output):
            if reason := _batch_second(reader, output, inputs):
                raise SplitError(f"For two rows of `example_input` the backbone {reason}.")
            _refuse_other_rows(backbone, given, reader)
        return inputs, output
    furthest, best, advice = -1, "it has no layer whose input shape is known", ""
    began: float | None = None  # when the first guess had failed, however long that took
    with _calls_counted(backbone) as count:
        for inputs in _guesses(backbone):
            if began is not None and time.thread_time() - began > _PATIENCE:
                break
            count[0], ran = 0, ""
            try:
                output = run_plainly(backbone, inputs)
                ran = ". If that is a batch for it, let its forward return logits."
                ran += with_one_more(output)
                if _has_rows(reader, output):
                    return inputs, output
                cause = _batch_second(reader, output, inputs) or (
                    f"returned {describe(output)} where logits [B, C] were expected"
                )
                count[0] += 1
            except Exception as error:
                first = (str(error).splitlines() or [""])[0]
                cause = f"raised {type(error).__name__}: {first.removesuffix('.')}"
            if count[0] > furthest:  # what came furthest comes closest to what it takes
                furthest, best, advice = count[0], f"on {_shapes(inputs)} it {cause}", ran
            began = time.thread_time() if began is None else began
    raise SplitError(
        "Could not guess an input that the backbone accepts. The most plausible attempt: "
        f"{best}{advice or '.'} "
        "Pass `example_input=`: a batch as its forward receives it (a tensor, a tuple of arguments "
        "or a dict of keyword arguments)."
    )


def _refuse_other_rows(backbone: nn.Module, given: Inputs, reader: LogitsReader) -> None:
    """Refuse an example, as it is, for whose rows a backbone returns another number of rows."""
    if not _runs(backbone, given):
        return
    logits, rows = reader.logits_of(run_plainly(backbone, given)), batch_size_of(given)
    if logits is not None and len(logits) != rows:
        raise SplitError(
            f"The backbone returns {describe(logits)} for `example_input`, of which the first "
            f"tensor has {rows} rows. {_ROWS}"
        )


def refuse_third_row(backbone: nn.Module, inputs: Inputs) -> None:
    """Refuse an example of two rows, if a backbone fails on the three that are made of it.

    Raises:
        SplitError: it does; the message names arguments with several entries for each row.
    """
    try:
        run_plainly(backbone, resize_batch(inputs, 3))
    except Exception as error:
        args, kwargs = inputs
        named = (*((str(k), value) for k, value in enumerate(args)), *kwargs.items())
        folded = [
            (f"`{name}` of shape {list(tensor.shape)}", [2, len(tensor) // 2, *tensor.shape[1:]])
            for name, value in named
            for tensor in tensors_in(value)
            if tensor.dim() > 1 and len(tensor) > 2 and len(tensor) % 2 == 0
        ]
        advice = (
            "If it takes batches of two rows only (an initial state, say), ask for `x.size(0)`."
        )
        if folded:
            shape, rows = folded[0]
            advice = (
                f"{shape} has more entries than rows, so it was left as it is. If it holds several "
                "for each sample, images say, wrap the backbone in a module whose forward takes "
                f"{rows} and passes on `x.flatten(0, 1)`."
            )
        raise SplitError(
            "The backbone runs on two rows of the example input, but not on three, of which one "
            f"is made of the others ({type(error).__name__}: {error}). {advice} Integers of that "
            "row are rotated: sizes of which a forward is told, say, belong into its code."
        ) from error


def _runs(backbone: nn.Module, inputs: Inputs) -> bool:
    try:
        run_plainly(backbone, inputs)
    except Exception:
        return False
    return True


def _runs_as_one(backbone: nn.Module, example: Any) -> bool:
    """Whether a forward takes a tuple as its only argument: `(tokens, lengths)`, say."""
    if not isinstance(example, tuple) or not holds_tensors(example):
        return False
    return _runs(backbone, resize_batch(((example,), {}), 2))


def _has_rows(reader: LogitsReader, output: Any, number: int = 2) -> bool:
    logits = reader.logits_of(output)
    found = [t for _, t in matrices_in(output)] if logits is None else [logits]
    return any(tensor.shape[0] == number for tensor in found)


def _batch_second(reader: LogitsReader, output: Any, inputs: Inputs) -> str | None:
    """What a backbone did, if it takes the second dimension of two rows for the batch."""
    first = next(tensor for tensor in tensors_in(inputs) if tensor.dim() > 0)
    if first.dim() < 2 or not _has_rows(reader, output, first.shape[1]):
        return None
    return (
        f"returned {describe(output)}: a row for each of the {first.shape[1]} entries along "
        f"dimension 1 of {list(first.shape)}. The batch seems to lie there, with time first, as "
        "`nn.LSTM` takes it without `batch_first=True`; here and where rows are routed it is cut "
        "along dimension 0. Let the forward take [B, T] and transpose inside "
        "(`x = x.transpose(0, 1)`)"
    )


@contextmanager
def _calls_counted(backbone: nn.Module) -> Iterator[list[int]]:
    """How many submodules a forward has called, also one that failed: how far it came."""
    count = [0]

    def note(module: nn.Module, args: Any) -> None:
        count[0] += 1

    modules = [m for m in backbone.modules() if not isinstance(m, torch.jit.ScriptModule)]
    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def _shapes(inputs: Inputs) -> str:
    args, kwargs = inputs
    shown = [f"{list(value.shape)}" for value in args]
    return ", ".join(shown + [f"{name}={list(value.shape)}" for name, value in kwargs.items()])


def _guesses(backbone: nn.Module) -> Iterator[Inputs]:
    tensor = next(backbone.parameters(), None)
    if tensor is None:
        raise ArgumentError(
            "Expected argument `backbone` to be a torch.nn.Module with parameters, but it has none."
        )
    device = tensor.device
    dtype = tensor.dtype if tensor.is_floating_point() else torch.float32
    generator = torch.Generator().manual_seed(0)

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    def tokens(length: int, vocabulary: int) -> Tensor:
        high = max(2, min(vocabulary, 100))
        return torch.randint(1, high, (2, length), generator=generator, device="cpu").to(device)

    config = getattr(backbone, "config", None)
    name = getattr(backbone, "main_input_name", None)
    if config is not None and name == "input_ids":
        ids = tokens(16, _number(config, "vocab_size", 100))
        yield (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        yield (), {"input_ids": ids}
        end = getattr(config, "eos_token_id", None)
        if isinstance(end, int):  # BART and others read the features of the last token: it is this
            ids = ids.masked_fill(ids == end, 0 if end else 1)
            ids[:, -1] = end
            yield (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config is not None and isinstance(name, str) and name.startswith("pixel_values"):
        image = _image_shape(config)
        if name == "pixel_values":
            yield (), {name: floats(2, *image)}
        number = _number(config, "num_frames", 0) or _number(config, "frames_per_clip", 0)
        if number:
            yield (), {name: floats(2, number, *image)}
    if config is not None and name == "input_values":  # a spectrogram or a waveform
        frames, bins = (getattr(config, key, None) for key in ("max_length", "num_mel_bins"))
        if isinstance(frames, int) and isinstance(bins, int):
            yield (), {name: floats(2, frames, bins)}
        for length in (16000, *_LENGTHS):  # a second, as such models take it
            yield (), {"input_values": floats(2, length)}
    if config is not None and name == "input_features":  # a spectrogram, frames first or last
        bins = _number(config, "num_mel_bins", 80)
        frames = _number(config, "max_source_positions", 512)
        for shape in ((bins, 2 * frames), (frames, bins), (100, bins)):
            yield (), {name: floats(2, *shape)}
    for attribute in ("pretrained_cfg", "default_cfg"):  # timm's
        card = getattr(backbone, attribute, None) or {}
        size = card.get("input_size") if isinstance(card, Mapping) else None
        if size is not None:
            yield (floats(2, *size),), {}

    # The first layer mostly says it; where that is another part's (a text encoder beside an image
    # encoder, say), the first layer of another kind.
    firsts: dict[type, nn.Module] = {}
    for module in backbone.modules():
        if _input_is_known(module):
            firsts.setdefault(type(module), module)
    for first in firsts.values():
        yield from _guesses_of(first, floats, tokens)


def _number(config: Any, name: str, otherwise: int) -> int:
    """A whole number of a configuration; another one where it holds none."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else otherwise


def _image_shape(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a configuration tells of.

    CLIP and its kin keep them in the part for images, beside that for texts.
    """
    holders = (config, getattr(config, "vision_config", None))
    keys = ("image_size", "crop_size")
    named = (getattr(holder, key, None) for holder in holders for key in keys)
    side = next((value for value in named if value is not None), 224)
    sides = tuple(side) if isinstance(side, list | tuple) else (side, side)
    height, width = sides if [type(each) for each in sides] == [int, int] else (224, 224)
    channels = next((n for holder in holders if (n := _number(holder, "num_channels", 0))), 3)
    return channels, height, width


def _guesses_of(
    first: nn.Module, floats: Callable[..., Tensor], tokens: Callable[[int, int], Tensor]
) -> Iterator[Inputs]:
    if isinstance(first, nn.Conv2d):
        coarse = max(first.kernel_size) >= 7 or max(first.stride) >= 2
        sides = _LARGE_FIRST if coarse else _SMALL_FIRST
        for side in sides:
            yield (floats(2, first.in_channels, side, side),), {}
        for side in sides[:2]:  # frames of a video, then layers that a function call precedes
            yield (floats(2, 4, first.in_channels, side, side),), {}
            yield (floats(2, 3, side, side),), {}
            yield (floats(2, 1, side, side),), {}
    elif isinstance(first, nn.Conv1d):
        for length in _LENGTHS:
            yield (floats(2, first.in_channels, length),), {}
            if first.in_channels == 1:
                yield (floats(2, length),), {}
    elif isinstance(first, nn.Conv3d):
        for frames, side in ((8, 32), (8, 112), (16, 112), (16, 224)):
            yield (floats(2, first.in_channels, frames, side, side),), {}
    elif isinstance(first, nn.Embedding | nn.EmbeddingBag):
        yield (tokens(16, first.num_embeddings),), {}
    elif isinstance(first, nn.Linear):
        yield (floats(2, first.in_features),), {}
        yield (floats(2, 16, first.in_features),), {}
        side = round(first.in_features**0.5)
        if side * side == first.in_features:
            yield (floats(2, 1, side, side),), {}
        side = round((first.in_features / 3) ** 0.5)
        if 3 * side * side == first.in_features:
            yield (floats(2, 3, side, side),), {}
    elif isinstance(first, nn.RNNBase):
        yield (floats(2, 16, first.input_size),), {}
    elif isinstance(first, nn.BatchNorm2d):
        for side in _SMALL_FIRST:
            yield (floats(2, first.num_features, side, side),), {}
    elif isinstance(first, nn.modules.batchnorm._BatchNorm):
        yield (floats(2, first.num_features),), {}
        yield (floats(2, first.num_features, 64),), {}
        yield (floats(2, first.num_features, 8, 32, 32),), {}


def _input_is_known(module: nn.Module) -> bool:
    embeddings, convolutions = (nn.Embedding, nn.EmbeddingBag), (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    others = (nn.Linear, nn.RNNBase, nn.modules.batchnorm._BatchNorm)
    return isinstance(module, (*convolutions, *embeddings, *others))
