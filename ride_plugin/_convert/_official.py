"""Loads checkpoints of the authors' code into a wrapped model and its router, and runs none of it.

Their files hold `layer3s.1.0.conv1.weight` where ours is `experts.1.layer3.0.conv1.weight`; beside
the tensors they pickle a configuration object, which is read as an empty shell.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._checks import refuse
from ride_plugin._convert._safe_load import load_tensors
from ride_plugin._cosine import CosineClassifier
from ride_plugin._errors import ArgumentError, CheckpointError
from ride_plugin._wrapper import RIDEWrapper
from ride_plugin.routing import ExpertRouter

_State = dict[str, Tensor]
_PREFIX = re.compile(r"^(?:module\.|backbone\.)+")
_OF_EXPERT = re.compile(r"^(layer\d+|linear)s\.(\d+)\.(.+)$")
_ROUTER = "expert_help_pred_"


@dataclass(frozen=True)
class OfficialCheckpoint:
    """What :func:`load_official_checkpoint` found in the file, all of it loaded but the router.

    Attributes:
        num_experts: ``E``.
        num_classes: ``C``.
        fork_at: first stage of which each expert has its own; `layer4` with ``share_layer3``.
        cosine: whether the classifiers are cosine classifiers (the authors' ``use_norm``).
        has_router: whether the file holds a router.
        router_loaded: whether it was loaded, that is whether a router was passed.
        num_parameters: numbers loaded, BatchNorm statistics included.
    """

    num_experts: int
    num_classes: int
    fork_at: str
    cosine: bool
    has_router: bool
    router_loaded: bool
    num_parameters: int


def load_official_checkpoint(
    model: RIDEWrapper,
    router: ExpertRouter | None,
    path: str | os.PathLike[str] | Mapping[str, Any],
) -> OfficialCheckpoint:
    """Load a file of the authors' model zoo, or one that their code trained, into our modules.

    The model has to be built to the file's measures: the same backbone (stages named `layer1`,
    `layer2`, ... and a stem `conv1`, `bn1`, as torchvision's and the CIFAR ResNets have them),
    number of experts, width and kind of classifier. Nothing is loaded unless everything fits.

    Reading runs none of the file's code: tensors are read by ``torch.load(weights_only=True)``,
    and whatever else it names (a configuration object, paths) becomes an empty shell.

    Args:
        model: receives trunk, experts and classifiers.
        router: receives the router's weights; None leaves them in the file.
        path: the file, or what it holds: a state dict under their names, or a dict that has one
            under `state_dict`. Prefixes `module.` and `backbone.` are removed.

    Returns:
        What was found and loaded.

    Raises:
        CheckpointError: the file does not fit, and the message names every key that does not; or
            it cannot be read without running its code.
        ArgumentError: ``model`` or ``router`` is of another kind.

    Example:
        >>> import torch
        >>> from collections import OrderedDict
        >>> layers = dict(conv1=nn.Linear(8, 16), layer2=nn.Linear(16, 16), fc=nn.Linear(16, 5))
        >>> model = RIDEWrapper(nn.Sequential(OrderedDict(layers)), 2, fork_at="layer2")
        >>> theirs = {"conv1.weight": torch.ones(16, 8), "conv1.bias": torch.zeros(16)}
        >>> for k in range(2):
        ...     theirs |= {f"layer2s.{k}.weight": torch.ones(16, 16)}
        ...     theirs |= {f"layer2s.{k}.bias": torch.zeros(16)}
        ...     theirs |= {f"linears.{k}.weight": torch.ones(5, 16)}
        ...     theirs |= {f"linears.{k}.bias": torch.zeros(5)}
        >>> found = load_official_checkpoint(model, None, {"state_dict": theirs})
        >>> found.num_experts, found.fork_at, found.cosine, found.has_router
        (2, 'layer2', False, False)
    """
    for name, value, kind in (("model", model, RIDEWrapper), ("router", router, ExpertRouter)):
        if not isinstance(value, kind) and (name == "model" or value is not None):
            raise ArgumentError(
                f"Expected argument `{name}` to be of type {kind.__name__}, but got "
                f"{type(value).__name__}. Hand in the module itself, not what DDP makes of it."
            )
    if not isinstance(path, str | os.PathLike | Mapping):
        refuse("path", "the name of a file, or the dict that one holds", path)
    content = path if isinstance(path, Mapping) else load_tensors(path)
    state = _state_in(content)
    found = _measure(state, router is not None)
    _check_measures(state, found, model)
    ours, gates = _renamed(state, model)
    problems = _misfits(ours, model)
    if router is not None:
        _check_gates(gates, router)
        problems += _misfits(gates, router)
    if problems:
        raise CheckpointError(
            "The checkpoint does not fit, and nothing was loaded (names are ours, shapes are "
            "`file -> model`):\n  "
            + "\n  ".join(problems)
            + "\nWrap the backbone that the authors trained, with the file's number of experts, "
            "width, fork and classifier; the page on load_official_checkpoint lists them."
        )
    converted: list[tuple[nn.Module, _State]] = [(model, _converted(ours, model))]
    if router is not None:
        converted.append((router, _converted(gates, router)))
    for module, loaded in converted:  # nothing can fail any more
        module.load_state_dict(loaded)
    return found


def _measure(state: _State, router_wanted: bool) -> OfficialCheckpoint:
    matches = [match for key in state if (match := _OF_EXPERT.match(key))]
    heads = {int(match[2]) for match in matches if match[1] == "linear"}
    stages = sorted({match[1] for match in matches} - {"linear"}, key=lambda name: int(name[5:]))
    if not heads or not stages or "linears.0.weight" not in state:
        raise CheckpointError(
            "Expected a RIDE checkpoint of the authors' code, with keys such as "
            f"`layer3s.0.0.conv1.weight` and `linears.0.weight`, but got {_some(state)}. A network "
            "without experts is loaded into the backbone before wrapping it with init='copy'."
        )
    weight = state["linears.0.weight"]
    cosine = "linears.0.bias" not in state  # their NormedLinear has none, and is stored [D, C]
    has_router = any(key.startswith(_ROUTER) for key in state)
    if router_wanted and not has_router:
        raise CheckpointError(
            "A router was passed, but the file holds none (no key begins with "
            f"`{_ROUTER}`): it is from stage one. Pass router=None and train the router."
        )
    loaded = [t for key, t in state.items() if router_wanted or not key.startswith(_ROUTER)]
    return OfficialCheckpoint(
        num_experts=max(heads) + 1,
        num_classes=weight.shape[1 if cosine else 0],
        fork_at=stages[0],
        cosine=cosine,
        has_router=has_router,
        router_loaded=router_wanted,
        num_parameters=sum(tensor.numel() for tensor in loaded),
    )


def _check_measures(state: _State, found: OfficialCheckpoint, model: RIDEWrapper) -> None:
    """The usual reasons why nothing fits, each with what to pass; keys are compared afterwards."""

    def refuse(has: str, other: str, remedy: str) -> None:
        raise CheckpointError(f"The file {has}, the model {other}: {remedy}. Nothing was loaded.")

    if not model.classifiers:
        has, other = "holds classifiers", "has none that is a module of its own"
        refuse(has, other, "wrap a backbone whose logits come from a linear layer")
    if found.num_experts != model.num_experts:
        has = f"holds {found.num_experts} experts"
        refuse(has, f"has {model.num_experts}", f"pass num_experts={found.num_experts}")
    stage = model.fork_at.split(".")[0]
    if stage != found.fork_at and re.fullmatch(r"layer\d+", stage):
        has = f"has experts that begin at {found.fork_at}"
        refuse(has, f"forks at {stage}", f"pass fork_at={found.fork_at!r}")
    if found.num_classes != model.num_classes:
        has = f"has {found.num_classes} classes"
        refuse(has, f"{model.num_classes}", "wrap a backbone with as many")
    head = model.classifiers[0]
    if found.cosine and isinstance(head, nn.Linear):
        has = "has cosine classifiers (`use_norm`)"
        refuse(has, "linear ones", "pass classifier='cosine'")
    if not found.cosine and isinstance(head, CosineClassifier):
        has = "has linear classifiers (no `use_norm`)"
        refuse(has, "cosine ones", "pass classifier=None")
    in_file = state["linears.0.weight"].shape[0 if found.cosine else 1]
    if in_file != model.feature_dim:
        width = model.expert_width * in_file / model.feature_dim
        has = f"has classifiers of {in_file} features"
        refuse(has, f"of {model.feature_dim}", f"pass expert_width={width:g}, or another backbone")


def _renamed(
    state: _State, model: RIDEWrapper
) -> tuple[dict[str, tuple[str, Tensor]], dict[str, tuple[str, Tensor]]]:
    """Our name -> (their name, tensor), for the model and for the router."""
    ours: dict[str, tuple[str, Tensor]] = {}
    gates: dict[str, tuple[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _OF_EXPERT.match(key)
        if key.startswith(_ROUTER):
            name = key.removeprefix(_ROUTER).replace("hidden_fcs.", "hidden.")
            gates[re.sub(r"^fc\.", "output.", name)] = key, tensor
        elif match is None:
            ours[f"trunk.{key}"] = key, tensor
        elif match[1] == "linear":
            head = model.classifiers[int(match[2])]
            ours[f"experts.{match[2]}.{model.classifier_name}.{match[3]}"] = (
                key,
                _laid(tensor, head),
            )
        else:
            ours[f"experts.{match[2]}.{match[1]}.{match[3]}"] = key, tensor
    return ours, gates


def _laid(tensor: Tensor, head: nn.Module) -> Tensor:
    """Their cosine weight is [D, C]; turned over where the head stores [C, D]."""
    if tensor.dim() != 2 or isinstance(head, nn.Linear):
        return tensor
    if isinstance(head, CosineClassifier):
        return tensor.T
    own = getattr(head, "weight", None)
    turned = isinstance(own, Tensor) and own.shape == tensor.T.shape
    if turned and tensor.shape[0] == tensor.shape[1]:
        raise CheckpointError(
            f"The file's classifier weight is square, {list(tensor.shape)}, so its shape does not "
            f"tell whether {type(head).__name__} stores it the same way. Pass classifier='cosine'."
        )
    return tensor.T if turned else tensor


def _check_gates(gates: dict[str, tuple[str, Tensor]], router: ExpertRouter) -> None:
    if router.inputs != "paper":
        raise CheckpointError(
            "The file's router reads what the paper's does, the router passed reads "
            f"{router.inputs!r}: pass ExpertRouter.for_model(model, inputs='paper'). Nothing was "
            "loaded."
        )
    if any(name.startswith("fcs.") for name in gates):
        raise CheckpointError(
            f"The file's router has an output layer for each gate (`{_ROUTER}fcs.0.weight`), "
            "ExpertRouter has one for all: it cannot hold these. Pass router=None and train one."
        )
    if "output.weight" in gates and "hidden.0.bias" in gates:
        top_k = gates["output.weight"][1].shape[1] - len(gates["hidden.0.bias"][1])
        if top_k != router.top_k:
            raise CheckpointError(
                f"The file's router reads the top {top_k} logits, the router passed reads "
                f"{router.top_k}: pass ExpertRouter.for_model(model, inputs='paper', "
                f"top_k={top_k}). Nothing was loaded."
            )


def _converted(theirs: dict[str, tuple[str, Tensor]], module: nn.Module) -> _State:
    own = module.state_dict()
    return {name: tensor.to(own[name]) for name, (_, tensor) in theirs.items()}


def _misfits(theirs: dict[str, tuple[str, Tensor]], module: nn.Module) -> list[str]:
    lines = []
    own: _State = module.state_dict()
    first_of: dict[int, str] = {}
    for name, tensor in own.items():
        if tensor.is_meta:
            lines.append(f"on the meta device in the model: {name}; move it with to_empty() first")
            continue
        if name not in theirs:
            lines.append(f"missing in the file: {name} {list(tensor.shape)}")
        elif theirs[name][1].shape != tensor.shape:
            key, given = theirs[name]
            lines.append(
                f"other shape: {name} {list(given.shape)} -> {list(tensor.shape)} (their {key})"
            )
        elif tensor.is_floating_point() and not theirs[name][1].is_floating_point():
            key, given = theirs[name]
            lines.append(f"other type: {name} {given.dtype} -> {tensor.dtype} (their {key})")
        elif not theirs[name][1].to(tensor.dtype).isfinite().all():
            key, given = theirs[name]
            largest = given.abs().max().item()
            lines.append(
                f"too large for {tensor.dtype}: {name}, up to {largest:g} (their {key}); load it "
                "into a model of float32 or bfloat16"
            )
        else:  # a frozen tensor is one for all experts, and holds one expert's values
            first = first_of.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
            if not torch.equal(theirs[first][1], theirs[name][1]):
                lines.append(f"one tensor in the model, two in the file: {first}, {name}")
    for name, (key, tensor) in theirs.items():
        if name not in own:
            lines.append(f"unexpected in the file: {key} {list(tensor.shape)}")
    return lines


def _state_in(content: Any) -> _State:
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(
            "Expected a checkpoint to be a state dict, or a dict that holds one under "
            f"`state_dict`, but got {type(state if state is not None else content).__name__}."
        )
    found: _State = {}
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"Expected a state dict to hold tensors only, but {key!r} is a "
                f"{type(tensor).__name__}. Pass the dict whose values are the weights."
            )
        name = _PREFIX.sub("", key)
        if name in found:
            raise CheckpointError(
                f"The state dict holds `{name}` twice, with and without a prefix. Remove one."
            )
        _check_tensor(key, tensor)
        found[name] = tensor
    return found


def _check_tensor(key: str, tensor: Tensor) -> None:
    """Refuse what has the right shape and no numbers that a weight could take."""
    kind = None
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_nested:
        kind = f"a {type(tensor).__name__}, not a plain tensor"
    elif tensor.is_meta:
        kind = "on the meta device, where it has no values"
    elif tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex():
        layout = "quantized" if tensor.is_quantized else f"{tensor.layout}"
        kind = f"{layout} of {tensor.dtype}, not dense and real"
    elif not tensor.isfinite().all():
        kind = "not finite: it holds NaN or infinity, so training diverged or the file is damaged"
    if kind is not None:
        raise CheckpointError(
            f"Expected dense, real and finite tensors in the checkpoint, but `{key}` is {kind}. "
            "Nothing was loaded."
        )


def _some(state: _State) -> str:
    return ", ".join(f"`{key}`" for key in list(state)[:4]) + (", ..." if len(state) > 4 else "")
