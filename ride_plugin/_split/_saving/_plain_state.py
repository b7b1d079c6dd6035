"""States that a wrapped model cannot load: of the plain backbone, under a prefix, of nothing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ride_plugin._errors import CheckpointError, listed, warn_caller

_PART = re.compile(r"^(?:trunk|experts\.\d+)\.")


def refuse_plain_state(state: Mapping[str, Any], prefix: str, model: nn.Module) -> None:
    """Refuse a state that holds the backbone's names, or the model's own behind a prefix too many.

    With ``strict=False`` torch would load nothing of it, and say so in what nobody reads.

    Args:
        state: what shall be loaded.
        prefix: of the names that belong to the model.
        model: with trunk and experts, or one of the two modules of a pair.

    Raises:
        CheckpointError: it does.
    """
    own = _named_tensors(model)
    given = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    _refuse_another_form(given, own, prefix)
    if any(name in own for name in given):
        return
    plain = {}
    for name in own:
        plain[_PART.sub("", name)] = name
        plain[_PART.sub("", name).removeprefix("feature_extractor.")] = name  # a pair's first half
    for name, value in given.items():
        for added, rest in _beginnings(name):
            mine = rest if rest in own else plain.get(rest)
            # Another module may end in the same short name, `weight` say; shapes tell them apart.
            if mine is None or (added and _shape_of(value) != _shape_of(own[mine])):
                continue
            if mine == rest:
                raise CheckpointError(
                    f"Expected a state dict with names such as `{prefix}{mine}`, but got "
                    f"`{prefix}{name}`, so that nothing would be loaded. Remove the prefix "
                    f"`{added}`: load {_renamed(prefix + added, prefix)}."
                )
            behind, bare = "", "`net.load_state_dict(state)`"
            if added:
                behind = f" behind the prefix `{added}`"
                bare += f" with `state` = {_renamed(prefix + added, '')}"
            raise CheckpointError(
                f"Expected a state dict of the wrapped model, with names such as `{mine}`, but got "
                f"`{name}`, as the plain backbone calls it{behind}. To start from the weights of "
                f"the plain one, load them before wrapping and keep them: {bare}, then "
                '`RIDEWrapper(net, init="copy")`. To go on with a training, load what was saved '
                "of the wrapped model."
            )


def _refuse_another_form(given: Collection[str], own: Collection[str], prefix: str) -> None:
    """Refuse in a pair the trunk of a model that was made of one backbone, and the other way round.

    In the first module of a pair the experts' names are those of such a model, so that they would
    be loaded and the trunk would not.

    Raises:
        CheckpointError: all names of the trunk are those of the other.
    """
    trunk = [name for name in given if name.startswith("trunk.")]
    if any(name in own for name in trunk):
        return
    forms = ("trunk.", "one backbone"), ("trunk.feature_extractor.", "a pair")
    for (theirs, made), (ours, wrapped) in (forms, forms[::-1]):
        for name in trunk:
            mine = ours + name.removeprefix(theirs)
            if name.startswith(theirs) and mine in own:
                raise CheckpointError(
                    f"Expected a state dict with names such as `{prefix}{mine}`, but got "
                    f"`{prefix}{name}`: it is of a model that was made of {made}, and this one was "
                    f"made of {wrapped}, so that the trunk would not be loaded. Make both in the "
                    "same way, by `RIDEWrapper` or by `RIDEWrapper.from_pair`."
                )


def refuse_state_of_part(state: Mapping[str, Any], prefix: str, module: nn.Module) -> None:
    """Refuse a state of one of a module's parts, whose names lack that of the part.

    Args:
        state: what shall be loaded.
        prefix: of the names that belong to the module.
        module: with parts.

    Raises:
        CheckpointError: it is one, so that nothing would be loaded.
    """
    own = _named_tensors(module)
    given = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
    if any(name in own for name in given):
        return
    for part, _ in module.named_children():
        for name in given:
            if f"{part}.{name}" in own:
                raise CheckpointError(
                    f"Expected a state dict with names such as `{prefix}{part}.{name}`, but got "
                    f"`{prefix}{name}`, so that nothing would be loaded. It is a state of the part "
                    f"`{prefix}{part}`: load it there, `.{prefix}{part}.load_state_dict(state)`."
                )


def tell_of_nothing_loaded(state: Mapping[str, Any], unexpected: Collection[str]) -> None:
    """Warn of a state of which nothing was loaded, because no name in it is one of the model's.

    Args:
        state: what was handed over.
        unexpected: the names for which torch found no place, after all hooks have renamed theirs.
    """
    if not state or len(unexpected) < len(state):
        return
    part = next((name for name, value in state.items() if isinstance(value, Mapping)), None)
    warn_caller(
        f"Nothing of this state dict was loaded: none of its names ({listed(list(state))}) is one "
        "of the model's. "
        + (
            "Names of a wrapped model begin with `trunk.` or `experts.0.`; those of the plain "
            'network are loaded before wrapping, into the backbone, which `init="copy"` keeps.'
            if part is None
            else f"It holds dicts, as a whole checkpoint does: load `checkpoint[{part!r}]`, or "
            "whichever of them is the model's."
        )
    )


def tell_of_nothing_new(state: Mapping[str, Any], prefix: str, model: nn.Module) -> None:
    """Warn of a state whose every tensor is the model's own: loading it changes nothing.

    Code that keeps of a checkpoint what has a known name, and fills up with the model's own state,
    comes to that with the plain backbone's checkpoint, and goes on as if it had been loaded.
    """
    own = {prefix + name: tensor for name, tensor in _named_tensors(model).items()}
    given = {name: is_same(own[name], value) for name, value in state.items() if name in own}
    if given and not all(given.values()):
        _tell_of_trunk_left(given, own, prefix)
    elif given or not state:
        warn_caller(
            "This state dict holds nothing but the model's own tensors, so loading it changes "
            "nothing. If it should have held a checkpoint of the plain network, filtered by names: "
            "names of a wrapped model begin with `trunk.` or `experts.0.`, so none was left. Load "
            'it into the backbone before wrapping, and wrap with `init="copy"`.'
        )


def _tell_of_trunk_left(given: Mapping[str, bool], own: Mapping[str, Tensor], prefix: str) -> None:
    """Warn of a state with the model's own trunk, which trains, beside other experts.

    Args:
        given: whether each tensor is the model's own.
        own: the model's tensors.
        prefix: of the names that belong to the model.
    """
    trunk = [name for name in given if name.startswith(f"{prefix}trunk.")]
    if any(own[name].requires_grad for name in trunk) and all(given[name] for name in trunk):
        warn_caller(
            "This state dict holds experts to be loaded beside the model's own trunk, which stays "
            f"as it is: `{trunk[0]}`, say, is the tensor that the model has. If the trunk should "
            "have been loaded as well, from a file filtered by names: those of a model that was "
            "made in another way are others, of one backbone or of `RIDEWrapper.from_pair`."
        )


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names."""
    named = (model.named_parameters, model.named_buffers)
    return {name: t for tensors in named for name, t in tensors(remove_duplicate=False)}


def _beginnings(name: str) -> Iterator[tuple[str, str]]:
    """A name as what stands before it and the rest: nothing first, then more and more of it.

    Nothing is taken from what belongs to a part: hooks of the part's own may rename it.
    """
    yield "", name
    if not _PART.match(name):
        for dot in re.finditer(r"\.", name):
            yield name[: dot.end()], name[dot.end() :]


def _renamed(old: str, new: str) -> str:
    """The code that keeps what has one prefix in a state's names, and puts another in its place."""
    stem = f'"{new}" + ' if new else ""
    return (
        f'`{{{stem}name.removeprefix("{old}"): value for name, value in state.items() '
        f'if name.startswith("{old}")}}`'
    )


def _shape_of(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def is_same(tensor: Tensor, value: Any) -> bool:
    """Whether a value of a state is a module's tensor itself, and not one of equal values."""
    if type(value) not in (Tensor, nn.Parameter) or value.shape != tensor.shape or tensor.is_meta:
        return False
    try:
        return bool(value.is_set_to(tensor))
    except (NotImplementedError, RuntimeError):  # sparse, say
        return False
