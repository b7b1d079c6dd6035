"""One criterion for the whole of stage one, to be put where the training code has its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ride_plugin._checks import (
    ClassCounts,
    check_callable,
    check_choice,
    check_class_counts,
    refuse,
    setting,
)
from ride_plugin._devices import keeping_digits
from ride_plugin._errors import ArgumentError, warn_caller
from ride_plugin._output import Output, expert_logits, is_evaluated, plain_logits
from ride_plugin._schedule import Schedule
from ride_plugin.losses._diversity import DiversityLoss
from ride_plugin.losses._experts_loss import (
    Criterion,
    as_int64,
    experts_loss,
    own,
    setting_of,
    with_precise_weights,
)
from ride_plugin.losses._first_call import look_at
from ride_plugin.losses._seen_logits import seen_logits

_OVER_EXPERTS = ("sum", "mean")


class RIDELoss(nn.Module):
    r"""The loss of stage one in place of a training code's own criterion.

    While gradients are recorded, it is the criterion of every expert plus the diversity term,

    $$L = \sum_i \ell(z_i, y) + L_\text{diversity},$$

    and without gradients, as in validation, the criterion of the plain logits, $\ell(\bar z, y)$.
    So the loop stays as it is, and the numbers of its validation stay comparable. (A reentrant
    checkpoint runs its block without gradients first: a loss computed inside of it prints as in
    validation, while the gradients are those of training. Compute the loss outside.)

    If the criterion has a method ``with_prior(logits)``, as `LogitAdjustedLoss` and
    `BalancedSoftmaxLoss` have, the diversity term compares what it returns. (Not in the paper: on
    the plain logits, which such a criterion does not see, experts would part by favouring rare
    classes on every image; see the results page.)

    Args:
        criterion: any module or function of ``(logits [B, C], target)`` that returns a scalar, or
            one loss for each sample, ``[B]``; or a sequence with one for each expert (in
            validation, the mean of their values), as one needs that keeps a state, a memory of
            samples, say: a single one is called, and its state advanced, once for each expert. One
            that sums over samples says so by ``reduction="sum"``, as an attribute, in a
            ``functools.partial`` or in the call: the diversity term is a sum then, too.
        diversity: training samples of each class, ``[C]``, for a `DiversityLoss` with its
            defaults; or a `DiversityLoss`.
        reduction: ``"sum"`` as above: the loss is about E times that of a single model, and with it
            the step of plain SGD. ``"mean"`` divides the whole loss by E.
        schedules: what shall step with the epoch beside the temperatures of the diversity term,
            such as a `DeferredReweighting` of the criterion's class weights.

    Attributes:
        criterion: the criterion; a ``ModuleList`` if modules came in a sequence.
        diversity: the `DiversityLoss`.
        over_experts: the argument `reduction`. The attribute of that name is the criterion's own.
        mean_loss: the criterion's mean over experts in the last call with gradients, detached: a
            number for logs that compares with validation, while the loss itself is a sum over
            experts, less the diversity. None before the first call and in compiled code.

    Raises:
        ArgumentError: an argument is of another kind.

    Warns:
        UserWarning: one of ``schedules`` was made for another criterion, a copy say; or, at the
            first call, the criterion adds a prior or has a factor for each class, and has no
            ``with_prior``, sums over samples without saying so, or, being one for all experts,
            keeps a state that each call advances; or the targets are of several classes for one
            sample. The criterion is looked at by calls of a copy; priors of at most 1.5 between two
            classes are not told, and no criterion is looked at that cannot be copied: one that
            calls functions of another module by its name (``losses.balanced(...)``), makes objects
            of a class, is compiled, or holds more than 64 MiB.
            Also, once, an output of a model in evaluation mode that has been trained, while
            gradients are recorded and no input requires one: a test loop without
            ``torch.no_grad()``; and a schedule that no ``step()`` moved, as `DiversityLoss` tells.

    Example:
        >>> criterion = RIDELoss(nn.CrossEntropyLoss(), [300, 100, 20])
        >>> output = torch.randn(8, 3, 3, requires_grad=True)  # or what the wrapped model returned
        >>> criterion(output, torch.randint(3, (8,))).backward()
        >>> criterion.step()  # at the end of each epoch
    """

    over_experts: str = setting(
        "over_experts", "The argument `reduction`.", check_choice, _OVER_EXPERTS
    )

    def __init__(
        self,
        criterion: Criterion | Sequence[Criterion] | nn.ModuleList,
        diversity: ClassCounts | DiversityLoss,
        *,
        reduction: Literal["sum", "mean"] = "sum",
        schedules: Sequence[Schedule] = (),
    ) -> None:
        super().__init__()
        if isinstance(criterion, RIDELoss):
            advice = "Use it as it is, or pass the criterion that it was made of."
            refuse("criterion", "the criterion of one expert", criterion, advice)
        several = isinstance(criterion, list | tuple | nn.ModuleList)
        each: list[Any] = list(criterion) if several else [criterion]  # type: ignore[arg-type]
        for one in each:
            check_callable(one, "criterion", "criterion(logits, target)")
        # Modules shall move and be saved with this one.
        modules = all(isinstance(one, nn.Module) for one in each)
        self.criterion: Any = criterion
        if several:
            self.criterion = nn.ModuleList(each) if modules else each
        if not isinstance(diversity, DiversityLoss):
            if diversity is None or isinstance(diversity, nn.Module | type | str | int | float):
                expected = "class counts, the training samples of each class, or a DiversityLoss"
                refuse("diversity", expected, diversity)
            diversity = DiversityLoss(check_class_counts(diversity, "diversity"))
        self.diversity = diversity
        self.over_experts = check_choice(reduction, "reduction", _OVER_EXPERTS)
        if not isinstance(schedules, list | tuple | nn.ModuleList) or not all(
            isinstance(schedule, Schedule) for schedule in schedules
        ):
            refuse("schedules", "a list of schedules, such as DeferredReweighting", schedules)
        self.schedules = nn.ModuleList(schedules)
        if modules:
            _look_for_other_criteria(self.criterion, schedules)
        self.mean_loss: Tensor | None = None
        self._looked = False
        self._told_of_evaluation = False
        self._scored = 0  # samples in training

    def forward(
        self, output: Output | None = None, target: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the loss: a scalar, or ``[B]`` where the criterion returns one for each sample.

        Args:
            output: what the wrapped model returned, or expert logits ``[B, E, C]``; without
                gradients also plain logits ``[B, C]``.
            target: as the criterion takes it. `DiversityLoss` uses it in the paper's form only.
                Rows whose label the criterion ignores (``ignore_index``) are part of the diversity
                term, which needs no label; the paper's form refuses them. To leave them out:
                ``criterion(expert_logits(output)[known], target[known])``.
            *args: handed on to the criterion.
            **kwargs: handed on to the criterion. ``output`` and ``target`` may come under the
                criterion's own names, ``criterion(input=..., target=...)``, say.

        Raises:
            MissingExpertLogitsError: gradients are recorded and ``output`` is a bare ``[B, C]``.
            ArgumentError: see `experts_loss` and `DiversityLoss`.
        """
        if output is None or target is None:
            output, target = self._under_own_names(output, target, kwargs)
        if not torch.is_grad_enabled():
            return self._of_mean(plain_logits(output, "output"), target, args, kwargs)
        experts = expert_logits(output)
        num_experts = experts.shape[1]
        loss = experts_loss(self._with(args, kwargs), experts, target)
        if not torch.compiler.is_compiling():
            self.mean_loss = loss.detach().mean() / num_experts
            if is_evaluated(experts) and not self._told_of_evaluation:
                self._told_of_evaluation = True
                _warn_of_evaluation()
            if self.training and experts.requires_grad:
                self._scored += len(experts)
                schedule: Any
                for schedule in self.schedules:
                    schedule.scored(self._scored)
            if not self._looked:
                self._looked = True
                diverse = self.diversity.weight != 0
                look_at(self.criterion, experts, target, args, kwargs, diverse=diverse)
        seen = seen_logits(self._each(), experts)
        total = loss + self._term(seen, target, loss, kwargs.get("reduction"))
        return total if self.over_experts == "sum" else total / num_experts

    def _term(
        self, seen: Tensor, target: Tensor, loss: Tensor, reduction: str | None = None
    ) -> Tensor:
        """The diversity term of each sample, their mean or their sum, as the criterion has it."""
        if loss.dim() == 1:
            return self.diversity.per_sample(seen, target)
        term: Tensor = self.diversity(seen, target)
        return term * len(seen) if (reduction or self.reduction) == "sum" else term

    @property
    def reduction(self) -> str:
        """The criterion's own, over samples: libraries ask any loss for it, and may set it."""
        return str(setting_of(self._each()[0], "reduction", "mean"))

    @reduction.setter
    def reduction(self, value: str) -> None:
        for one in self._each():
            if getattr(one, "reduction", "mean") != value:
                if not hasattr(one, "reduction"):
                    refuse("reduction", "left as it is, since the criterion has none", value)
                one.reduction = value

    def __setattr__(self, name: str, value: Any) -> None:
        """As for any module; what only the criterion has is set there: ``criterion.weight = w``."""
        built = "_looked" in vars(self) and not name.startswith("_")
        if built and name not in {*vars(self), *self._modules} and not hasattr(type(self), name):
            theirs = [one for one in self._each() if hasattr(one, name)]
            for one in theirs:
                setattr(one, name, value)
            if theirs:
                return
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """What this loss does not have its criterion may: ``criterion.update(epoch)``, say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not by `self`: before the module is set up that would ask here again.
            own = self.__dict__
            criterion = own.get("_modules", {}).get("criterion", own.get("criterion"))
            several = isinstance(criterion, list | nn.ModuleList)
            if several or name.startswith("__") or not hasattr(criterion, name):
                raise
            return getattr(criterion, name)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move as any module; a criterion with a ``to`` of its own is asked for that as well."""
        super().to(*args, **kwargs)
        for one in self._each():
            move = getattr(one, "to", None)
            if callable(move) and getattr(type(one), "to", None) is not nn.Module.to:
                move(*args, **kwargs)  # it keeps tensors that are no buffers
        return self

    def step(self) -> None:
        """End the epoch: for the diversity term, every schedule given, and the criterion's own.

        A criterion with a ``step()`` had it called by the loop before it was wrapped. What it steps
        there is not stepped once more.
        """
        schedules = [module for module in self.modules() if isinstance(module, Schedule)]
        before = [schedule.last_epoch for schedule in schedules]
        for one in {id(one): one for one in self._each()}.values():
            if not isinstance(one, Schedule) and callable(getattr(one, "step", None)):
                one.step()
        for schedule, epoch in zip(schedules, before, strict=True):
            if schedule.last_epoch == epoch:
                schedule.step()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        keeping_digits(self, lambda: super(RIDELoss, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Arguments, as ``repr`` shows them."""
        own = "" if isinstance(self.criterion, nn.Module) else f", criterion={self.criterion!r}"
        return f"reduction={self.over_experts!r}{own}"

    def _each(self) -> list[Any]:
        """The criterion, or those of the experts."""
        several = isinstance(self.criterion, (list, nn.ModuleList))
        return list(self.criterion) if several else [self.criterion]

    def _under_own_names(self, output: Any, target: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Both, of which one or none has come, taken out of what came by the criterion's names."""
        first = self._each()[0]
        called = first.forward if isinstance(first, nn.Module) else first
        try:
            own = list(inspect.signature(called).parameters)
        except (TypeError, ValueError):  # some functions written in C have no signature
            own = []
        names = [*own, "output", "target"][:2]
        if output is None:
            output = kwargs.pop(names[0], None)
        if target is None:
            target = kwargs.pop(names[1], None)
        if output is None or target is None:
            raise ArgumentError(
                f"Expected arguments `output` and `target` (or by the criterion's own names, "
                f"`{names[0]}` and `{names[1]}`), but `{'output' if output is None else 'target'}` "
                "is missing or None. Pass both by position: criterion(output, target)."
            )
        return output, target

    def _with(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The criterion, or all of them, with further arguments."""
        if not args and not kwargs:
            return self.criterion

        def bound(criterion: Any) -> Any:
            if not args:
                return partial(criterion, **kwargs)
            return lambda logits, target: criterion(logits, target, *args, **kwargs)

        if isinstance(self.criterion, (list, nn.ModuleList)):
            return [bound(one) for one in self.criterion]
        return bound(self.criterion)

    def _of_mean(
        self, logits: Tensor, target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        criteria, target = self._with(args, kwargs), as_int64(target)
        if not isinstance(criteria, (list, nn.ModuleList)):
            loss: Tensor = with_precise_weights(criteria, logits)(logits, target)
            return loss
        # Copies, as in training: what one criterion writes into its logits is not for the next.
        losses: list[Tensor] = [
            with_precise_weights(one, logits)(logits.clone(), own(target)) for one in criteria
        ]
        return torch.stack(losses).mean(0)


def _look_for_other_criteria(criterion: nn.Module, schedules: Sequence[Schedule]) -> None:
    """Warn of a schedule whose criterion is another one, a copy say, so that it changes nothing."""
    inside = list(criterion.modules())
    held = [t for one in inside for t in (*vars(one).values(), *one._buffers.values())]
    for schedule in schedules:
        moved = vars(schedule).get("criterion")
        if moved is None or any(moved is one for one in inside):
            continue
        if not any(moved.weight is tensor for tensor in held):  # of a criterion of one's own
            warn_caller(
                f"A {type(schedule).__name__} among `schedules` was made for a criterion that is "
                "not in argument `criterion`, so that it changes nothing here. Make it of the "
                "criterion that is passed; of several, which are copies, one for each: "
                "schedules=[DeferredReweighting(one, class_counts, start_epoch=160) for one in "
                "criteria]. (If this loss computes with that criterion in another way, nothing is "
                "wrong.)"
            )
            return


def _warn_of_evaluation() -> None:
    warn_caller(
        "The model is in evaluation mode while gradients are recorded, so this is the loss of "
        "training, summed over experts and less the diversity, and no test loss to compare with. "
        "Put the test loop under `with torch.no_grad():`, where the loss is the criterion of the "
        "plain logits. (If the model trains in evaluation mode, nothing is wrong.)"
    )
