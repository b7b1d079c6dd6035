"""Any criterion, applied to every expert by itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ride_plugin._checks import (
    check_callable,
    check_choice,
    check_classes,
    check_target_form,
    may_read,
    refuse,
)
from ride_plugin._errors import ArgumentError, MissingExpertLogitsError
from ride_plugin._numerics import float32_or_better
from ride_plugin._output import Output, expert_logits

Criterion: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Maps logits ``[B, C]`` and a target to a scalar, or to one loss for each sample, ``[B]``."""


_SEVERAL = (Sequence, nn.ModuleList)
_ALTERS = (
    "forward",
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)
_OF_AN_INDEX = re.compile("out of (range|bounds)|Class values")  # what torch says of labels


def experts_loss(
    criterion: Criterion | Sequence[Criterion] | nn.ModuleList,
    output: Output,
    target: Tensor,
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    r"""Apply a criterion to each expert's logits, never to their mean.

    $$L = \sum_i \ell_i(z_i, y).$$

    (Paper, section 3: RIDE trains every expert by itself. A loss on the mean lets experts lean on
    each other; the authors' code switches to it when the diversity factor is zero, ours does not.)

    Args:
        criterion: maps logits ``[B, C]`` and ``target`` to a scalar, such as
            ``nn.CrossEntropyLoss()``, or to one loss for each sample, ``[B]``; or a sequence with
            one for each expert, as a criterion that keeps a state needs (a memory of samples, a
            counter), since a single one is called once for each expert. Logits of half precision
            reach it as float32, and so do the class weights of torch's own losses; weights in a
            function of yours have to be float32. Plain cross entropy, and the losses of
            `longtail`, run once over all experts, which gives the same number.
        output: what the wrapped model returned, or expert logits ``[B, E, C]``.
        target: class indices ``[B]`` or probabilities ``[B, C]``, which for torch's cross entropy
            need not sum to one, as in torch; for other criteria any tensor of B rows that they
            take (several labels, say), or whatever else they take in its place (mixup's pair of
            labels, a dict).
        reduction: ``"sum"`` over experts as in the paper, or ``"mean"``, which keeps the scale of
            a single model's loss (and needs the diversity weight divided by E to match).

    Returns:
        A scalar, or ``[B]`` where the criterion returns one loss for each sample.

    Raises:
        MissingExpertLogitsError: ``output`` is a bare ``[B, C]``.
        ArgumentError: the number of criteria differs from that of experts, a criterion returns
            something else, or the target does not fit.

    Example:
        >>> expert_logits = torch.randn(8, 3, 10, requires_grad=True)  # or the model's output
        >>> experts_loss(nn.CrossEntropyLoss(), expert_logits, torch.randint(10, (8,))).backward()
    """
    check_choice(
        reduction,
        "reduction",
        ("sum", "mean"),
        advice="It says how the experts' losses are joined; the criterion averages over samples.",
    )
    experts = float32_or_better(expert_logits(output))
    batch, num_experts, classes = experts.shape
    if batch == 0:
        refuse("output", "of at least one sample", experts)
    target = _checked(target, experts, strict=averages_rows(criterion))
    try:
        if averages_rows(criterion):
            rows = experts.reshape(batch * num_experts, classes)
            mean = _call(criterion, rows, target.repeat_interleave(num_experts, dim=0))
            return mean * num_experts if reduction == "sum" else mean
        criteria = _one_per_expert(criterion, num_experts)
        # Copies, as a criterion may write into what it is given: a margin into the logits, say.
        losses = [_call(one, experts[:, i].clone(), own(target)) for i, one in enumerate(criteria)]
    except MissingExpertLogitsError as error:
        raise ArgumentError(
            "Expected argument `criterion` to be the criterion of one expert, which is called on "
            f"its logits [{batch}, {classes}], but got {_kind(criterion)}, which takes the model's "
            "output. Add it beside: `criterion(output, target) + diversity(output, target)`; a "
            "RIDELoss is used as it is."
        ) from error
    except (IndexError, RuntimeError) as error:
        if isinstance(target, Tensor) and may_read(target) and _OF_AN_INDEX.search(str(error)):
            labels = target
            for one in criterion if isinstance(criterion, _SEVERAL) else [criterion]:
                labels = labels[labels != setting_of(one, "ignore_index", -100)]
            check_classes(labels, "target", classes)
        raise
    if len({loss.dim() for loss in losses}) > 1:
        shapes = ", ".join(str(list(loss.shape)) for loss in losses)
        raise ArgumentError(
            "Expected argument `criterion` to return losses of one shape for all experts, but got "
            f"{shapes}. Let each average over samples, or none."
        )
    each = torch.stack(losses)
    return each.sum(0) if reduction == "sum" else each.mean(0)


def setting_of(criterion: object, name: str, default: Any) -> Any:
    """What a criterion has as an attribute, or as a keyword if it is a ``functools.partial``."""
    if isinstance(criterion, partial) and not hasattr(criterion, name):
        if name in criterion.keywords:
            return criterion.keywords[name]
        criterion = criterion.func
    return getattr(criterion, name, default)


def _checked(target: Any, experts: Tensor, *, strict: bool) -> Any:
    """A target that cross entropy takes; another criterion says itself what it cannot use."""
    batch, _, classes = experts.shape
    if strict or (isinstance(target, Tensor) and target.dim() == 0):
        return check_target_form(target, batch, classes, device=experts.device)
    if not isinstance(target, Tensor):
        return target
    if len(target) != batch:
        refuse("target", f"that of {batch} samples, as many as `output` holds", target)
    return as_int64(target)


def as_int64(target: Any) -> Any:
    """Whole numbers of any type as int64, the only one that torch's losses take everywhere."""
    if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
        return target
    return target if target.dtype == torch.bool else target.long()


def own(target: Any) -> Any:
    """A target that only one call of a criterion can change."""
    return target.clone() if isinstance(target, Tensor) else target


def with_precise_weights(criterion: Any, logits: Tensor) -> Any:
    """A criterion of torch whose class weights are of half precision, with those of the logits.

    torch's functions take weights and logits of one precision only, and the logits are upcast.
    """

    def precise(tensor: Any) -> Any:
        half = isinstance(tensor, Tensor) and tensor.dtype in (torch.float16, torch.bfloat16)
        return tensor.to(logits.dtype) if half else tensor

    if isinstance(criterion, partial) and criterion.func is F.cross_entropy:
        keywords = {name: precise(value) for name, value in criterion.keywords.items()}
        return partial(criterion.func, *criterion.args, **keywords)
    if isinstance(criterion, nn.Module) and type(criterion).__module__ == nn.modules.loss.__name__:
        held = dict(criterion.named_buffers())
        weights = {name: precise(value) for name, value in held.items()}
        if any(weights[name] is not held[name] for name in held):
            return lambda *args: torch.func.functional_call(criterion, weights, args)
    return criterion


def averages_rows(criterion: object) -> bool:
    """Tell whether one call on all experts' rows gives the mean of their losses.

    Weighted means qualify: the sum of weights depends on the target only, which experts share. A
    class says so of itself by ``averages_rows = True``; its subclasses may override anything, so
    they have to say it again. A hook, or a forward that was set on the criterion itself, may make
    anything of it too.
    """
    if isinstance(criterion, Sequence):  # the compiler cannot look into the class of a list
        return False
    if criterion is F.cross_entropy:
        return True
    averages = type(criterion).__dict__.get("averages_rows") is True or (
        type(criterion) is nn.CrossEntropyLoss and criterion.reduction == "mean"
    )
    return averages and not any(getattr(criterion, "__dict__", {}).get(name) for name in _ALTERS)


def _kind(criterion: object) -> str:
    one = criterion[0] if isinstance(criterion, _SEVERAL) else criterion
    return type(one).__name__ if isinstance(one, nn.Module) else repr(one)


def _one_per_expert(
    criterion: Criterion | Sequence[Criterion] | nn.ModuleList, num_experts: int
) -> list[Criterion]:
    if not isinstance(criterion, _SEVERAL):
        return [criterion] * num_experts
    if len(criterion) != num_experts:
        raise ArgumentError(
            f"Expected argument `criterion` to have one entry for each of {num_experts} experts, "
            f"but got {len(criterion)}. Pass a single criterion to use it for all."
        )
    return list(criterion)


def _call(criterion: object, logits: Tensor, target: Tensor) -> Tensor:
    check_callable(criterion, "criterion", "criterion(logits, target)")
    loss: object = with_precise_weights(criterion, logits)(logits, target)
    if not isinstance(loss, Tensor) or loss.shape not in ((), logits.shape[:1]):
        shape = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ArgumentError(
            "Expected argument `criterion` to return a scalar tensor, or one loss for each sample, "
            f'[{len(logits)}], but got {shape}. One with reduction="none" that returns a loss '
            "for each class must be averaged: "
            "lambda logits, target: criterion(logits, target).mean()."
        )
    return loss
