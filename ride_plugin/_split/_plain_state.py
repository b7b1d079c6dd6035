"""A checkpoint of the plain backbone, which a wrapped model cannot load."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ride_plugin._errors import CheckpointError, warn_caller

_PART = re.compile(r"^(?:trunk|experts\.\d+)\.")


def refuse_plain_state(state: Iterable[str], prefix: str, model: nn.Module) -> None:
    """Refuse a state that holds the backbone's names where the model's are expected.

    With ``strict=False`` torch would load nothing of it, and say so in what nobody reads.

    Args:
        state: names of what shall be loaded.
        prefix: of those that belong to the model.
        model: with trunk and experts, or one of the two modules of a pair.

    Raises:
        CheckpointError: it does.
    """
    names = _named_tensors(model).keys()
    given = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
    if any(name in names for name in given):
        return
    plain = {}
    for name in names:
        plain[_PART.sub("", name)] = name
        plain[_PART.sub("", name).removeprefix("feature_extractor.")] = name  # a pair's first half
    for name in given:
        mine = plain.get(name.removeprefix("module."))  # as DataParallel saves it
        if mine is not None:
            raise CheckpointError(
                f"Expected a state dict of the wrapped model, with names such as `{mine}`, but got "
                f"`{name}`, as the plain backbone calls it. To start from the weights of the plain "
                "one, load them before wrapping and keep them: `net.load_state_dict(state)`, then "
                '`RIDEWrapper(net, init="copy")`. To go on with a training, load what was saved '
                "of the wrapped model."
            )


def tell_of_nothing_new(state: Mapping[str, Any], prefix: str, model: nn.Module) -> None:
    """Warn of a state whose every tensor is the model's own: loading it changes nothing.

    Code that keeps of a checkpoint what has a known name, and fills up with the model's own state,
    comes to that with the plain backbone's checkpoint, and goes on as if it had been loaded.
    """
    own = {prefix + name: tensor for name, tensor in _named_tensors(model).items()}
    given = [(own[name], value) for name, value in state.items() if name in own]
    if (given or not state) and all(_is_same(mine, value) for mine, value in given):
        warn_caller(
            "This state dict holds nothing but the model's own tensors, so loading it changes "
            "nothing. If it should have held a checkpoint of the plain network, filtered by names: "
            "names of a wrapped model begin with `trunk.` or `experts.0.`, so none was left. Load "
            'it into the backbone before wrapping, and wrap with `init="copy"`.'
        )


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names."""
    named = (model.named_parameters, model.named_buffers)
    return {name: t for tensors in named for name, t in tensors(remove_duplicate=False)}


def _is_same(tensor: Tensor, value: Any) -> bool:
    if type(value) not in (Tensor, nn.Parameter) or value.shape != tensor.shape or tensor.is_meta:
        return False
    try:
        return bool(value.is_set_to(tensor))
    except (NotImplementedError, RuntimeError):  # sparse, say
        return False
