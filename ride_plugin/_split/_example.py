"""An input that the backbone accepts: the one given, or one guessed from its first layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._errors import ArgumentError, SplitError
from ride_plugin._inputs import Inputs, as_inputs, resize_batch
from ride_plugin._tree import logits_in

_SMALL_FIRST = (32, 224, 28, 64, 16, 8, 96, 128, 160, 192, 240, 256, 288, 299, 331, 384, 448, 512)
_LARGE_FIRST = (224, 32, 256, 299, 384, 240, 288, 192, 160, 128, 96, 64, 28, 331, 448, 512, 16, 8)
_LENGTHS = (64, 256, 1024, 4096, 16000, 16, 512)


def find_example(backbone: nn.Module, example: Any) -> Inputs:
    """Return inputs for two rows that ``backbone`` (a throwaway copy, in eval mode) accepts.

    Raises:
        SplitError: no guess runs, or the given example does not; the message holds the cause.
    """
    if example is not None:
        inputs = resize_batch(as_inputs(example), 2)
        try:
            output = _run(backbone, inputs)
        except Exception as error:
            raise SplitError(
                f"The backbone does not run on `example_input`: {type(error).__name__}: {error}. "
                "Pass a batch as its forward receives it."
            ) from error
        if logits_in(output) is None:
            raise SplitError(
                "Expected argument `backbone` to map a batch to logits [B, C], but on "
                f"`example_input` it returned {_describe(output)}. Wrap a classifier."
            )
        return inputs
    last: str = "it has no layer whose input shape is known"
    for inputs in _guesses(backbone):
        try:
            logits = logits_in(output := _run(backbone, inputs))
        except Exception as error:
            last = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        if logits is not None and logits.shape[0] == 2:
            return inputs
        last = f"it returned {_describe(output)} where logits [B, C] were expected"
    raise SplitError(
        f"Could not guess an input that the backbone accepts (last attempt: {last}). Pass "
        "`example_input=`: a batch as its forward receives it (a tensor, a tuple of arguments or "
        "a dict of keyword arguments)."
    )


def _run(backbone: nn.Module, inputs: Inputs) -> Any:
    with torch.no_grad():
        return backbone(*inputs[0], **inputs[1])


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a {output.dtype} tensor of shape {list(output.shape)}"
    return type(output).__name__


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
        return torch.randn(shape, generator=generator).to(device, dtype)

    def tokens(length: int, vocabulary: int) -> Tensor:
        ids = torch.randint(1, max(2, min(vocabulary, 100)), (2, length), generator=generator)
        return ids.to(device)

    config = getattr(backbone, "config", None)
    name = getattr(backbone, "main_input_name", None)
    if config is not None and name == "input_ids":
        ids = tokens(16, int(getattr(config, "vocab_size", 100)))
        yield (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        yield (), {"input_ids": ids}
    if config is not None and name == "pixel_values":
        side = getattr(config, "image_size", None) or 224
        height, width = side if isinstance(side, list | tuple) else (side, side)
        channels = int(getattr(config, "num_channels", 3))
        yield (), {"pixel_values": floats(2, channels, height, width)}
    if config is not None and name == "input_values":  # a waveform
        for length in (16000, *_LENGTHS):  # a second, as such models take it
            yield (), {"input_values": floats(2, length)}
    size = (getattr(backbone, "default_cfg", None) or {}).get("input_size")
    if size is not None:
        yield (floats(2, *size),), {}

    first = next((m for m in backbone.modules() if _input_is_known(m)), None)
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
    elif isinstance(first, nn.Embedding):
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
    known = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.Linear, nn.RNNBase)
    return isinstance(module, (*known, nn.modules.batchnorm._BatchNorm))
