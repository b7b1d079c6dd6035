"""A checkpoint of the plain backbone, which a wrapped model cannot load."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from ride_plugin._errors import CheckpointError

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
    names = {
        name
        for tensors in (model.named_parameters, model.named_buffers)
        for name, _ in tensors(remove_duplicate=False)
    }
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
