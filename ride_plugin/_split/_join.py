"""Between wrapped models and plain modules: trunk and experts joined, and the way back."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ride_plugin._errors import ArgumentError, RIDEError
from ride_plugin._split import SplitModule
from ride_plugin._split._tape import FeatureHook, ForkHook, Recorded, UnitHooks
from ride_plugin._tree import logits_in

_OURS = (ForkHook, FeatureHook, UnitHooks)


class Joined(nn.Module):
    """One expert after the trunk: the backbone that ``from_parts`` splits at `head`."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The expert takes whatever the trunk returns, as one argument."""
        return self.head(self.body(*args, **kwargs))


def joined_by(
    trunk: nn.Module, expert_factory: Callable[[int], nn.Module]
) -> Callable[[int], nn.Module]:
    """A factory of whole networks from a trunk and a factory of experts, asked once for each.

    Raises:
        ArgumentError: an argument is of another kind.
    """
    for name, value, kind, fits in (
        ("trunk", trunk, "a torch.nn.Module", isinstance(trunk, nn.Module)),
        ("expert_factory", expert_factory, "a function of the index", callable(expert_factory)),
    ):
        if not fits:
            raise ArgumentError(
                f"Expected argument `{name}` to be {kind}, but got {type(value).__name__}."
            )

    @functools.cache
    def joined(index: int) -> nn.Module:
        expert = expert_factory(index)
        if not isinstance(expert, nn.Module):
            raise ArgumentError(
                "Expected argument `expert_factory` to return a torch.nn.Module, but for "
                f"{index} it returned {type(expert).__name__}."
            )
        return Joined(trunk, expert)

    return joined


def plain_modules(model: SplitModule, indices: range) -> nn.ModuleList:
    """For each index the backbone with the trunk's and that expert's weights, nothing of ours.

    The modules share one copy of the trunk; the model itself stays as it is.

    Raises:
        RIDEError: a module computes something else than its expert.
    """
    copied = copy.deepcopy(model)
    roots = [copied.experts[index] for index in indices]
    for root in roots:
        _reunite(root, copied)
    for part in (copied.trunk, *roots):
        _strip_hooks(part)
    plain = [nn.Sequential(r.body, r.head) if isinstance(r, Joined) else r for r in roots]
    for index, module in zip(indices, plain, strict=True):
        module.train(model.training)
        _check(model, index, module)
    return nn.ModuleList(plain)


def warn_if_equal(experts: nn.ModuleList) -> None:
    """Say so where a factory made two experts with the same weights."""
    states = [dict(expert.named_parameters()) for expert in experts]
    for k in range(1, len(states)):
        if states[0].keys() == states[k].keys() and all(
            torch.equal(tensor, states[k][name]) for name, tensor in states[0].items()
        ):
            warnings.warn(
                f"`expert_factory` gave experts 0 and {k} equal weights. They receive equal "
                "gradients and stay equal unless something tells them apart: initialise each anew.",
                UserWarning,
                stacklevel=4,
            )
            return


def _reunite(root: nn.Module, model: SplitModule) -> None:
    """Put the trunk's modules and tensors back to where the backbone had them."""
    for name, module in list(root.named_modules(remove_duplicate=False)):
        if isinstance(module, Recorded):
            path, _, attribute = name.rpartition(".")
            setattr(root.get_submodule(path), attribute, module.real)
    inside = {id(module) for module in root.modules()}
    for link in model._links:
        if id(link.view) not in inside:
            continue
        link.view.__dict__.pop(link.name, None)
        if link.name in link.owner._parameters:
            link.view._parameters[link.name] = link.owner._parameters[link.name]
        else:
            link.view._buffers[link.name] = link.owner._buffers[link.name]
            if link.name in link.owner._non_persistent_buffers_set:
                link.view._non_persistent_buffers_set.add(link.name)


def _strip_hooks(root: nn.Module) -> None:
    for module in root.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _OURS) or isinstance(getattr(hook, "__self__", None), _OURS):
                    del hooks[key]


def _check(model: SplitModule, index: int, module: nn.Module) -> None:
    args, kwargs = model.example_input(2)
    probe = copy.deepcopy(module).eval()  # a forward may leave caches behind
    with model.evaluating(), torch.no_grad():
        expected, _ = model.run_expert(index, model.run_trunk(*args, **kwargs))
        try:
            got = logits_in(probe(*args, **kwargs))
        except Exception as error:
            raise RIDEError(
                f"Expert {index} does not run as a module of its own ({type(error).__name__}: "
                f"{error}). With a trunk of several inputs, call trunk and expert yourself."
            ) from error
    if got is None or not _close(got, expected):
        raise RIDEError(
            f"The plain module of expert {index} computes other logits than the expert. Its "
            "backbone keeps references to submodules outside `named_modules()`."
        )


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e3 * torch.finfo(b.dtype).eps * max(1.0, float(b.abs().max()))
    return torch.allclose(a, b, rtol=0.0, atol=tolerance)


def as_expert_index(index: int, num_experts: int) -> int:
    """``index`` if it names an expert.

    Raises:
        ArgumentError: it does not.
    """
    if not isinstance(index, int) or not 0 <= index < num_experts:
        raise ArgumentError(
            f"Expected argument `expert` to be an index from 0 to {num_experts - 1}, but got "
            f"{index!r}."
        )
    return index
