"""Notices a training in which nothing learns, or a part does not, or all experts learn alike."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ride_plugin._distributed import running
from ride_plugin._errors import listed, warn_caller
from ride_plugin._output import ExpertOutput

_PASSES = 128  # training passes without a change that are too many, gradients accumulated or not
_EPOCH = 4  # passes that make an epoch, if evaluation comes after them
_SAMPLED = 64  # values of each parameter
_KINDS = 64  # of calls whose outputs are looked at


Kind: TypeAlias = tuple[Any, ...]


class TrainingWatch:
    """Compares the parameters after 1, 2, 4, ... training passes, and when evaluation begins.

    Once one has changed, which in an ordinary loop is at the second pass, a last look is for those
    that an optimizer should have and has not. A copy or an unpickled one begins anew, and may be
    frozen without a word, as teachers and averages of weights are.

    Args:
        could_train: whether some parameter required gradients when the model was wrapped.

    Attributes:
        done: whether there is nothing left to watch.
    """

    def __init__(self, could_train: bool = False) -> None:
        self.done = False
        self._could_train = could_train
        self._told_of_loss = False
        self._told_of_rest = False
        self._kinds: set[Kind] = set()  # of training passes whose whole output was looked at
        self._learns = False  # something has changed; it remains to be seen whether all does
        self._passes = 0
        self._reached: set[str] = set()  # outputs to which gradients have come back
        self._values: list[Tensor] = []
        self._versions: list[tuple[int, int]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainingWatch:
        return TrainingWatch()

    def __reduce__(self) -> tuple[type[TrainingWatch], tuple[()]]:
        return TrainingWatch, ()

    @property
    def began(self) -> bool:
        """Whether there has been a training pass."""
        return self._passes > 0

    def new_kind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kind | None:
        """What kind of call this is, if no training pass of it was looked at; else None.

        With targets, or where a flag asks for it, a backbone may return more than it did before.
        """
        if self._told_of_rest or len(self._kinds) >= _KINDS:
            return None
        named = ((name, _kind_of(value)) for name, value in sorted(kwargs.items()))
        kind = (*map(_kind_of, args), *named)
        return None if kind in self._kinds else kind

    def leaves_out(self, where: list[str], kind: Kind) -> None:
        """Warn once of what the backbone returns in training beside its logits, if anything."""
        self._kinds.add(kind)
        if where:
            self._told_of_rest = True
            warn_caller(
                "In training the backbone returns more than its logits that gradients flow "
                f"through, {listed(where)}, as an auxiliary loss or a second classifier does. The "
                "wrapped model returns the logits alone, so the rest is not learned. To add it to "
                'the loss, pass `return_experts="outputs"`: the model then returns in training '
                "what the backbone returns, once for each expert. (If your loss never used it, "
                "nothing is wrong.)"
            )

    def drops_a_loss(self) -> None:
        """Warn once of a loss that the backbone computed and that nobody gets."""
        if not self._told_of_loss:
            self._told_of_loss = True
            warn_caller(
                "The backbone returned a `loss` beside its logits, as it does where labels are "
                "passed to it. The wrapped model returns the logits alone, so that loss is "
                "dropped. Leave the labels out of the call and compute the loss of what the model "
                "returns: `loss = criterion(model(x), labels)` with `criterion = RIDELoss("
                "nn.CrossEntropyLoss(), class_counts)`; for a Trainer, `RIDEModule(model, "
                'criterion)` does both. (In training, `return_experts="outputs"` returns what '
                "each expert returned, with its loss.)"
            )

    def trains(self, module: nn.Module, output: ExpertOutput) -> None:
        """Take note of one training pass with gradients, and warn once where it is in vain."""
        if self._could_train and not output.logits.requires_grad:
            self._look_for_gradients(module)
        if self.done:
            return
        self._passes += 1
        if self._passes == 1:
            self._versions, self._values = _versions_in(module), _values_in(module)
            self.done = not self._values or not output.logits.requires_grad
        elif self._learns:
            if self._passes >= _PASSES:
                self._look_for_strays(module)
        elif self._passes & (self._passes - 1) == 0:  # a power of two
            self._judge(module, output.expert_logits.shape[1], last=self._passes >= _PASSES)
        if not (self.done or self._learns) and output.logits.requires_grad:
            for name, tensor in zip(("logits", "expert_logits"), output, strict=True):
                tensor.register_hook(partial(self._reach, name))

    def evaluates(self, module: nn.Module, output: ExpertOutput) -> None:
        """Take note of one pass in evaluation mode: after an epoch something has to be changed."""
        if self.done:
            return
        if self._passes >= _EPOCH and not self._learns:
            self._judge(module, output.expert_logits.shape[1], last=True)
        if self._passes >= _EPOCH and self._learns:
            self._look_for_strays(module)

    def _reach(self, name: str, gradient: Tensor | None) -> None:
        if gradient is not None:  # the other output of the same operation alone has one
            self._reached.add(name)

    def _judge(self, module: nn.Module, experts: int, *, last: bool) -> None:
        changed = self._has_changed(module, last)
        # As long as nothing learns, it may have been gradients of the inputs: attacks, saliency.
        mean_alone = changed and experts > 1 and self._reached == {"logits"}
        self._learns = changed and not mean_alone and not running()
        self.done = mean_alone or (changed and not self._learns) or (last and not changed)
        if mean_alone:
            warn_caller(
                "The loss has reached nothing but the mean of the experts' logits, so the experts "
                "train as one network and lean on each other. Replace the criterion, "
                "`criterion = RIDELoss(criterion, class_counts)`, and call it with what the model "
                "returned. (If a loss of the mean is meant, nothing is wrong.)"
            )
        elif self.done and not changed and self._reached:
            warn_caller(
                f"In {self._passes} training passes no parameter of the wrapped model has changed. "
                "An optimizer made from the backbone's parameters trains the backbone, which the "
                "model does not use: make it after wrapping, from `model.parameters()`, and after "
                "an engine that replaces parameters (FSDP; with FSDP1 in accelerate pass "
                "`use_orig_params=True`). A choice by the backbone's names finds none: those of a "
                "wrapped model begin with `trunk.` or `experts.0.`. (If gradients are accumulated "
                "over more passes, the learning rate is 0 or the model shall not learn, nothing is "
                "wrong.)"
            )
        elif changed and (twins := _equal_experts(module)):
            warn_caller(
                f"Experts {twins[0]} and {twins[1]} have equal weights, also after a step: they "
                "receive equal gradients and stay one expert. Whatever gave them the same values "
                '(a checkpoint loaded into each, a constant initialisation, `init="copy"` of a '
                "classifier that shares its weight with the trunk) has to leave them different."
            )

    def _look_for_gradients(self, module: nn.Module) -> None:
        """Warn of a model in which everything was frozen after wrapping; torch only says later."""
        parameters = list(module.parameters())  # other tensors while `functional_call` runs
        if not all(_has_values(p) and not p.requires_grad for p in parameters) or not parameters:
            return
        self._could_train = False
        warn_caller(
            "No parameter of the wrapped model trains, while some did when it was wrapped, so "
            "`backward()` will find nothing that requires gradients. A loop that freezes all but "
            "what it knows by name leaves nothing: names of a wrapped model begin with `trunk.` or "
            "`experts.0.`. Choose by the backbone's names with `model.parameter_groups_by`: `for p "
            "in model.parameter_groups_by(lambda net: [p for n, p in net.named_parameters() if "
            'n in ("fc.weight", "fc.bias")]): p.requires_grad_(True)`. (If the model shall not '
            "learn, as a teacher, nothing is wrong; call it under `torch.no_grad()`.)"
        )

    def _look_for_strays(self, module: nn.Module) -> None:
        """Warn of what has gradients that no optimizer takes, where that can hardly be meant.

        Which parts train is anybody's choice, but not one that leaves the classifiers out, or that
        differs between experts. What no optimizer has keeps its gradient when others are cleared.
        """
        self.done = True
        first = dict(self._versions)
        followed = [(n, p) for n, p in module.named_parameters() if first.get(id(p)) is not None]
        same = {name: p._version == first[id(p)] for name, p in followed}
        heads = _names_of_classifiers(module)
        odd = [
            name
            for name, parameter in followed
            if same[name]
            and (name in heads or not all(same.get(n, True) for n in _siblings(name, module)))
            and parameter.grad is not None
            and (parameter.grad.is_sparse or bool(parameter.grad.any()))
        ]
        if odd and not all(same.values()):
            warn_caller(
                f"After {self._passes} training passes {listed(odd)} of the wrapped model have "
                "gradients, but no optimizer has changed them, while it has changed others. Where "
                "parameters are chosen by name, those of a wrapped model begin with `trunk.` or "
                "`experts.0.`: choose them by `model.parameter_groups_by(function)`. Freeze what "
                "shall not train: `parameter.requires_grad_(False)`."
            )

    def _has_changed(self, module: nn.Module, last: bool) -> bool:
        # Optimizers count what they write, but for those that write to `parameter.data`. Engines
        # that gather sharded parameters count as well, so that among ranks only values tell.
        if not running():
            if self._versions != _versions_in(module):
                return True
            if not last:  # reading values makes an accelerator wait
                return False
        now = _values_in(module)
        return len(now) != len(self._values) or not all(map(torch.equal, now, self._values))


def _names_of_classifiers(module: nn.Module) -> set[str]:
    classifiers: Any = getattr(module, "classifiers", [])
    inside = {id(p) for classifier in classifiers for p in classifier.parameters()}
    return {name for name, p in module.named_parameters() if id(p) in inside}


def _siblings(name: str, module: nn.Module) -> list[str]:
    """The names of a parameter in all experts; its own alone if it is the trunk's."""
    if not name.startswith("experts."):
        return [name]
    own = name.split(".", 2)[2]
    experts: Any = module.get_submodule("experts")
    return [f"experts.{k}.{own}" for k in range(len(experts))]


def _versions_in(module: nn.Module) -> list[tuple[int, int]]:
    return [(id(p), p._version) for p in module.parameters() if p.requires_grad]


def _values_in(module: nn.Module, frozen: bool = False) -> list[Tensor]:
    """Some values of each parameter that trains, or of this rank's part of it.

    Args:
        module: holds them.
        frozen: whether those that do not train are wanted as well.
    """
    values = []
    for parameter in module.parameters():
        if (parameter.requires_grad or frozen) and _has_values(parameter):
            part = parameter.detach()
            part = (part.to_local() if hasattr(part, "to_local") else part).flatten()
            values.append(part[:: max(1, part.numel() // _SAMPLED)].clone())
    return values


def _equal_experts(module: nn.Module) -> tuple[int, int] | None:
    """The first two experts whose parameters have the same values, as far as those were sampled."""
    experts: Any = module.get_submodule("experts")
    # Where frozen weights differ, gradients do, and what trains may begin equal, as gains do.
    values = [_values_in(expert, frozen=True) if _values_in(expert) else [] for expert in experts]
    for i, j in combinations(range(len(values)), 2):
        alike = len(values[i]) == len(values[j]) > 0  # in some experts all may be frozen
        if alike and all(map(torch.equal, values[i], values[j])):
            return i, j
    return None


def _has_values(parameter: Tensor) -> bool:
    """Whether it is an ordinary parameter or one that FSDP has sharded; not meta, fake or lazy."""
    kinds = ("Parameter", "FlatParameter", "DTensor")
    return type(parameter).__name__ in kinds and not parameter.is_meta


def _kind_of(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | str) else type(value)
