"""Methods of backbones whose meaning for trunk and experts is known: timm's, transformers', groups.

Each takes the wrapped model, then what the backbone's own method takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import signature
from operator import methodcaller
from typing import Any

from torch import nn

from ride_plugin._checks import check_integer, refuse
from ride_plugin._split import (
    Recorded,
    SplitModule,
    merged_groups,
    plain_views,
    replace_classifiers,
)

_PARTS = r"(?:trunk|experts\.\d+)\."
_ANCHOR = r"(?<![\\\[])\^"
# Names under which backbones return parameters for an optimizer: `get_param_groups`,
# `optim_parameters`, `get_1x_lr_params`, `get_parameters`, `get_optim_policies`. Code asks with
# `hasattr` and trains otherwise, without a word, where there is none.
GROUPS = re.compile(
    r"^(?!_)(?!.*(?:num|count|print))"
    r"(?:.*param(?:eter)?s?_groups?|.*optim\w*_(?:groups|params|parameters)"
    r"|.*_lr_params|get_(?:\w+_)?(?:param(?:eter)?s|polic(?:y|ies)))$"
)


def alike(values: list[Any]) -> bool:
    """Whether all are equal; what cannot be compared is not."""
    try:
        return all(bool(value == values[0]) for value in values)
    except Exception:  # tensors, and objects that cannot be compared
        return False


def _asked_of_each(model: SplitModule, name: str, *args: Any, **kwargs: Any) -> list[Any]:
    """What this method answers for every expert as a plain network, which has all the names.

    A trunk alone does not: such methods often choose from `self.named_parameters()`.
    """
    return [getattr(network, name)(*args, **kwargs) for network in plain_views(model.parts())]


def _no_weight_decay(model: SplitModule) -> Any:
    """What the backbone's method returns, and the same behind each part's prefix.

    Code compares whole names or uses the entries as patterns (timm), which the prefixed entries
    serve, or looks for the entries inside names (SlowFast), which the plain ones serve.
    """
    answers = _asked_of_each(model, "no_weight_decay")
    entries = dict.fromkeys(entry for answer in answers for entry in answer)
    parts = ("trunk", *(f"experts.{k}" for k in range(len(answers))))
    every = [*entries, *(f"{part}.{entry}" for part in parts for entry in entries)]
    return every if isinstance(answers[0], list) else set(every)


def _group_matcher(model: SplitModule, *args: Any, **kwargs: Any) -> Any:
    return _anywhere(_asked_of_each(model, "group_matcher", *args, **kwargs)[0])


def _anywhere(pattern: Any) -> Any:
    """Patterns of the backbone's names as patterns of the model's, which begin with a part's."""
    if isinstance(pattern, str):
        # Each alternative may begin with an anchor, which is of no use behind the prefix.
        return f"^{_PARTS}(?:{re.sub(_ANCHOR, '', pattern)})"
    if isinstance(pattern, dict):
        return {key: _anywhere(item) for key, item in pattern.items()}
    if callable(pattern):  # maps a name to its layer
        return lambda name: pattern(re.sub(f"^{_PARTS}", "", name))
    if isinstance(pattern, list | tuple):
        return type(pattern)(map(_anywhere, pattern))
    return pattern


def _no_weight_decay_keywords(model: SplitModule) -> set[str]:
    # They are parts of names, which the model's names have as well.
    return set().union(*_asked_of_each(model, "no_weight_decay_keywords"))


def parameter_groups(model: SplitModule, name: str) -> Callable[..., Any]:
    """A method that returns the groups of all parts, as the backbone's method of this name."""

    def groups(*args: Any, **kwargs: Any) -> Any:
        return merged_groups(model, model.parts(), methodcaller(name, *args, **kwargs), name)

    return groups


def _get_classifier(model: SplitModule, *args: Any, **kwargs: Any) -> nn.Module:
    """What the method returns for each expert: it may be two heads, or more than a layer."""
    experts: list[Any] = list(model.experts)
    answers = [expert.get_classifier(*args, **kwargs) for expert in experts]
    each = [answer if isinstance(answer, list | tuple) else [answer] for answer in answers]
    found = [part for parts in each for part in parts if isinstance(part, nn.Module)]
    # One that runs before the fork is the trunk's, where experts have a stand-in for it.
    real = [part.ride_real if isinstance(part, Recorded) else part for part in found]
    return nn.ModuleList(dict.fromkeys(real) or model.classifiers)


def _reset_classifier(model: SplitModule, num_classes: int, *args: Any, **kwargs: Any) -> None:
    own: Any = model.trunk.reset_classifier
    given = dict(signature(own).bind(num_classes, *args, **kwargs).arguments)
    for name in list(given)[1:]:  # what pools before the classifier, in timm's models
        value, present = given[name], _settings_of(model.experts[0], name)
        if value is not None and not any(alike([value, held]) for held in present):
            refuse(
                name,
                "left out, None or what the backbone has now, since `reset_classifier` of a "
                "wrapped model makes the experts' classifiers anew and changes nothing else",
                value,
                "Call it on the backbone before wrapping.",
            )
    number = check_integer(num_classes, "num_classes", 2)
    number = replace_classifiers(model.parts(), None, number).num_classes
    vars(model)["num_classes"] = number  # set as an attribute it would be refused
    model.relink()  # the parts hold other settings together


def _settings_of(expert: nn.Module, name: str) -> list[object]:
    """What a network or a module in it has under this name; of a pooling, also its kind."""
    # A list, as a stand-in hands out no modules to a loop over all of them.
    held = [getattr(module, name, None) for module in list(expert.modules())]
    return held + [getattr(value, "pool_type", None) for value in held]


def _checkpointing(model: SplitModule, enable: bool = True, *_: Any, **__: Any) -> None:
    model.checkpoint_experts = bool(enable)  # type: ignore[assignment]


def _enable(model: SplitModule, *_: Any, **__: Any) -> None:  # how to checkpoint, not whether
    _checkpointing(model, True)


def _disable(model: SplitModule, *_: Any, **__: Any) -> None:
    _checkpointing(model, False)


METHODS: dict[str, Callable[..., Any]] = {
    "activation_checkpointing_disable": _disable,  # transformers from 5.24 on
    "activation_checkpointing_enable": _enable,
    "get_classifier": _get_classifier,
    "gradient_checkpointing_disable": _disable,
    "gradient_checkpointing_enable": _enable,
    "group_matcher": _group_matcher,
    "no_weight_decay": _no_weight_decay,
    "no_weight_decay_keywords": _no_weight_decay_keywords,
    "reset_classifier": _reset_classifier,
    "set_grad_checkpointing": _checkpointing,
}
