"""What a wrapped model returns, and the one place where expert logits are attached and read.

A wrapped model returns a plain ``[B, C]`` tensor, so existing evaluation code keeps working; the
experts' logits travel on that tensor as a Python attribute. Every loss reads them back through
:func:`expert_logits`, which refuses to guess when they are gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from ride_plugin._checks import may_read, refuse, version_of
from ride_plugin._errors import ArgumentError, MissingExpertLogitsError
from ride_plugin._numerics import float32_or_better
from ride_plugin.functional import mean_logits

_ATTRIBUTE = "_ride_expert_logits"
_OWNER = "_ride_owner"  # whose they are: the tensor's id, and its version at that time
_EVALUATED = "_ride_evaluated"  # set on experts' logits of a trained model in evaluation mode
_STEPS = 8  # operations between the model and a loss that are looked through

T = TypeVar("T")
PairClass = TypeVar("PairClass", bound="type[tuple[Any, ...]]")


def rebuilt_from_one_iterable(pair: PairClass) -> PairClass:
    """Let ``type(x)(part for part in x)`` make the pair, beside ``type(x)(*x)``.

    Engines map, cast and gather outputs in either manner; autocast of a whole model and the Hugging
    Face Trainer use the first, for which a NamedTuple alone lacks an argument.
    """
    from_two = pair.__new__

    @wraps(from_two)
    def new(cls: type[Any], *parts: Any, **named: Any) -> Any:
        if len(parts) != 1 or named or isinstance(parts[0], Tensor):
            return from_two(cls, *parts, **named)
        return from_two(cls, *(parts[0] if isinstance(parts[0], Iterable) else parts))

    pair.__new__ = new  # type: ignore[method-assign]
    return pair


@rebuilt_from_one_iterable
class ExpertOutput(NamedTuple):
    """Explicit output of a wrapped model: what ``RIDEWrapper(..., return_experts=True)`` returns.

    Attributes:
        logits: ``[B, C]``, the mean of the experts' logits (paper, section 3).
        expert_logits: ``[B, E, C]``, the logits of each expert.

    Example:
        >>> import torch
        >>> out = ExpertOutput(torch.zeros(2, 5), torch.zeros(2, 3, 5))
        >>> tuple(expert_logits(out).shape)
        (2, 3, 5)
    """

    logits: Tensor
    expert_logits: Tensor

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Torch asks here when it is given the pair in place of a tensor, by a criterion say."""
        name = getattr(function, "__name__", function)
        raise ArgumentError(
            f"Expected a tensor in `{name}`, but got ExpertOutput(logits, expert_logits), which a "
            "wrapped model returns with `return_experts`. As the criterion use "
            "`RIDELoss(criterion, class_counts)`, which takes it as it is; elsewhere pass "
            "`output.logits`."
        )


@rebuilt_from_one_iterable
class RouterInputs(NamedTuple):
    """What the router reads of a batch; plain tensors, so they can be computed once and stored.

    Attributes:
        expert_logits: ``[B, E, C]``, the logits of each expert.
        expert_features: ``[B, E, D]``, what each expert's classifier received, pooled.
    """

    expert_logits: Tensor
    expert_features: Tensor


Output: TypeAlias = Tensor | ExpertOutput | RouterInputs
"""Whatever holds expert logits: a carrying ``[B, C]``, a tuple from a model, or ``[B, E, C]``."""


class _Together(torch.autograd.Function):
    """The mean of the experts' logits and these themselves, as two results of one operation.

    An engine that waits for the gradient of what the model returned, as FSDP does before it gathers
    parameters, then also sees the gradient that arrives through the carried logits alone.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*each: Tensor) -> tuple[Tensor, Tensor]:
        experts = torch.stack(each, dim=1)
        return mean_logits(experts), experts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.num_experts = len(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_mean, of_experts = gradients
        if of_mean is not None:
            shared = (of_mean / ctx.num_experts).unsqueeze(1).expand(-1, ctx.num_experts, -1)
            of_experts = shared if of_experts is None else of_experts + shared
        return (None,) * ctx.num_experts if of_experts is None else of_experts.unbind(1)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        given = next(tangent for tangent in tangents if tangent is not None)
        return _Together.forward(*(given * 0 if one is None else one for one in tangents))


def joined(each: Sequence[Tensor]) -> ExpertOutput:
    """The explicit output of experts whose logits are ``[B, C]`` each, all on one graph."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # that graph is one node
        together: tuple[Tensor, Tensor] = _Together.apply(*each)  # type: ignore[no-untyped-call]
        return ExpertOutput(*together)
    experts = torch.stack(tuple(each), dim=1)
    return ExpertOutput(mean_logits(experts), experts)


def attach_expert_logits(logits: Tensor, experts: Tensor) -> Tensor:
    """Let ``logits`` ``[B, C]`` carry ``experts`` ``[B, E, C]``; returns ``logits`` itself."""
    setattr(logits, _ATTRIBUTE, experts)
    # A compiler knows no ids.
    owner = None if torch.compiler.is_compiling() else (id(logits), version_of(logits))
    setattr(logits, _OWNER, owner)
    return logits


def mark_evaluated(output: ExpertOutput) -> None:
    """Let the experts' logits say that they were made in evaluation mode, as :func:`is_evaluated`.

    A mark for those to which gradients may flow; without gradients it would say nothing new.
    """
    setattr(output.expert_logits, _EVALUATED, True)


def is_evaluated(experts: Tensor) -> bool:
    """Whether :func:`mark_evaluated` has marked these experts' logits."""
    return hasattr(experts, _EVALUATED)


def expert_logits(output: Output) -> Tensor:
    """Return the logits of every expert, whatever form a wrapped model's output has.

    Args:
        output: what the wrapped model returned: the plain ``[B, C]`` tensor that carries its
            expert logits, an :class:`ExpertOutput`, :class:`RouterInputs`, or a raw floating
            ``[B, E, C]`` tensor. A plain pair is told apart by its dimensions: ``[B, C]`` and
            ``[B, E, C]`` are an :class:`ExpertOutput`, ``[B, E, C]`` and ``[B, E, D]`` are
            :class:`RouterInputs`.

    The experts' logits travel with ``copy.deepcopy``, pickle and ``torch.save`` too. Of such a copy
    the values tell whether it was changed, which needs a look at them: on the CPU only.

    Returns:
        ``[B, E, C]``, same dtype and device, with its gradient history.

    Raises:
        MissingExpertLogitsError: ``output`` is a bare ``[B, C]`` tensor, was changed in place
            since the model returned it, is a copy on an accelerator, or has a gradient that its
            experts' logits do not have (a reentrant checkpoint around the model).
        ArgumentError: ``output`` is none of the accepted forms.

    Example:
        >>> import torch
        >>> tuple(expert_logits(torch.zeros(4, 3, 10)).shape)
        (4, 3, 10)
    """
    experts: object = None
    if isinstance(output, Tensor):
        experts = output if output.dim() == 3 else _carried(output)
    elif isinstance(output, (tuple, list)) and len(output) == 2:
        experts = _of_pair(*output)
    if not isinstance(experts, Tensor) or experts.dim() != 3 or not experts.is_floating_point():
        refuse(
            "output",
            "the wrapped model's [B, C] output, an ExpertOutput, or a floating-point tensor "
            "[B, E, C]",
            output,
            "Pass what the wrapped model returned.",
        )
    return experts


def without_experts(output: T | ExpertOutput) -> T | Tensor:
    """The ensemble's logits of an `ExpertOutput`; anything else as it is."""
    return output.logits if isinstance(output, ExpertOutput) else output


def plain_logits(output: object, name: str) -> Tensor:
    """The ensemble's logits ``[B, C]``, float32 or better, whatever form a model's output has.

    ``[B, E, C]`` is averaged. Of a pair both must fit: one that is neither :class:`ExpertOutput`
    nor :class:`RouterInputs` might as well be features and logits.

    Raises:
        ArgumentError: ``output`` is none of these; the message calls it ``name``.
    """
    logits = output
    if isinstance(output, (tuple, list)) and len(output) == 2:
        logits = None if _of_pair(*output) is None else output[0]
    if isinstance(logits, Tensor) and logits.is_floating_point() and logits.dim() in (2, 3):
        logits = float32_or_better(logits)
        return mean_logits(logits) if logits.dim() == 3 else logits
    refuse(name, "logits [B, C], an ExpertOutput or expert logits [B, E, C]", output)


def _carried(output: Tensor) -> Tensor | None:
    experts: Tensor | None = getattr(output, _ATTRIBUTE, None)
    if experts is None:
        if output.dim() != 2:
            return None
        if _is_of_no_wrapped_model(output):
            raise MissingExpertLogitsError(
                "Wrap the model, `model = RIDEWrapper(model, num_experts=3)`, make the optimizer "
                "from it, and call it in the place of the plain one: by its graph this output is "
                "not what a wrapped model returned. (If the model is wrapped, pass what it "
                'returned unchanged, or set `return_experts = "training"` on it; logits that each '
                "expert returned by itself are passed together, `torch.stack(each, dim=1)`.) "
                "Expected argument `output` to carry expert logits [B, E, C], but got bare logits "
                f"of shape {list(output.shape)}."
            )
        raise MissingExpertLogitsError(
            f"{_undone_by_hand(output)}"
            'Set `return_experts = "training"` on the RIDEWrapper, before DistributedDataParallel, '
            "FSDP or accelerator.prepare wraps it (afterwards: `RIDEWrapper.inside(model)."
            'return_experts = "training"`): in training it then returns ExpertOutput(logits, '
            "expert_logits), in evaluation plain logits as before. A model that is not wrapped has "
            "no experts: `RIDEWrapper(model, num_experts=3)`. Expected argument `output` to "
            f"carry expert logits [B, E, C], but got bare logits of shape {list(output.shape)}. "
            "They are lost when an engine rebuilds or casts the output (DataParallel; "
            "DistributedDataParallel with static_graph or find_unused_parameters; FSDP, "
            "accelerate, Fabric and the Hugging Face Trainer in bf16 or fp16; a full backward hook "
            "on the model), and when the output is cast, sliced, detached, cloned or used in "
            "arithmetic before the loss: then pass the model's output itself, or do to the "
            "experts' logits what was done to it: "
            "`criterion(expert_logits(output)[:n], target)` for its first n rows. The output of "
            "RoutingInference never has them."
        )
    if output.requires_grad and not experts.requires_grad:
        raise MissingExpertLogitsError(
            "Checkpoint with `use_reentrant=False`, or leave it to the RIDEWrapper by "
            "`checkpoint_experts=True`. Expected argument `output` to carry expert logits of its "
            "own graph, but they have no gradient while the output has one, so a loss of them "
            "would train nothing. A reentrant checkpoint around the whole model does this, and "
            "`requires_grad_()` on an output that was computed under `torch.no_grad`."
        )
    owner = getattr(output, _OWNER, None)
    if owner is not None and not torch.compiler.is_compiling():
        _check_unchanged(output, experts, *owner)
    return experts


def _check_unchanged(output: Tensor, experts: Tensor, owner: int, version: int | None) -> None:
    """Raise unless the experts' logits that a tensor carries are those of its values."""
    if owner == id(output):
        now = version_of(output)
        same = version is None or now is None or version == now
    elif may_read(output):  # the count of changes is no copy's own, but its values are
        mean, near = mean_logits(experts.detach()), 4 * torch.finfo(experts.dtype).eps
        same = torch.allclose(mean, output.detach(), rtol=near, atol=near, equal_nan=True)
    else:
        raise MissingExpertLogitsError(
            "Read the experts' logits before the output is copied, `experts = "
            "expert_logits(output)`, and pass these. Expected argument `output` to be the tensor "
            f"that the model returned, but got a copy of it on {output.device}, where looking "
            "whether it was changed would stall the device."
        )
    if not same:
        raise MissingExpertLogitsError(
            "Change the experts' logits instead of the output: `expert_logits(output) + ...`, or "
            "work on a copy. Expected argument `output` to be as the model returned it, but it was "
            "changed in place since (`+=`, `mul_`, item assignment), so the experts' logits [B, E, "
            f"C] that it carries no longer belong to its values {list(output.shape)}."
        )


def _undone_by_hand(output: Tensor) -> str:
    """Advice where an output's graph, or the lack of one, tells what was done to the output.

    Nodes of torch's own operations end in a number; those of engines and of this library do not.
    """
    if torch.is_grad_enabled() and not output.requires_grad:
        return (
            "Compute what is for a log only under `torch.no_grad()`, where RIDELoss is the "
            "criterion of the plain logits; read the experts' logits before the output is "
            "detached, `expert_logits(output).detach()`. The output has no gradient, as after "
            "`.detach()` or `.data`, while gradients are recorded. If an engine has done it: "
        )
    steps = _steps_since_the_model(output.grad_fn, _STEPS)
    if not steps:
        return ""
    if any(re.search(r"(?i)mm$", step) for step in steps):
        return (
            "Put the layer that stands behind the wrapped model inside of it, so that each expert "
            "has one: `RIDEWrapper.from_pair(feature_extractor, layer)`, or one module that runs "
            f"both. (By its graph the output is the model's, then {', '.join(steps)}.) If there is "
            "no such layer: "
        )
    if set(steps) == {"ToCopy"}:
        return (
            "Pass the model's output itself, before it was cast (`out.float()`, say): the losses "
            "compute in float32 or better. If an engine has cast it: "
        )
    return (
        "Do to the experts' logits what was done to the model's output (by its graph: "
        f"{', '.join(steps)}): `criterion(expert_logits(output)[rows], target[rows])` "
        "for some of its rows, `[..., columns]` for some classes. If an engine has done it: "
    )


def _steps_since_the_model(node: Any, at_most: int) -> list[str]:
    """Names of torch's operations between a wrapped model's output and a node of its graph.

    Empty where the node is the output itself, or where no output leads to it in so few steps.
    """
    if node is None or at_most == 0 or not re.search(r"Backward\d+$", node.name()):
        return []
    step = re.sub(r"Backward\d+$", "", node.name())
    for before, _ in node.next_functions:
        if before is None:
            continue
        if before.name() == f"{_Together.__name__}Backward":
            return [step]
        if steps := _steps_since_the_model(before, at_most - 1):
            return [*steps, step]
    return []


def _is_of_no_wrapped_model(output: Tensor) -> bool:
    """Whether its whole graph is torch's own operations on parameters.

    An engine may rebuild an output without its graph, or be one node of it; then nothing is known.
    """
    waiting, seen, parameters = [output.grad_fn], set[Any](), False
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # what collects the gradient of a leaf has one
        if variable is None and not re.search(r"Backward\d+$", node.name()):
            return False
        parameters = parameters or isinstance(variable, torch.nn.Parameter)
        waiting += [before for before, _ in node.next_functions]
    return parameters


def _of_pair(first: object, second: object) -> Tensor | None:
    """The expert logits of a pair, which engines may have rebuilt without its type."""
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return None
    if (first.dim(), second.dim()) == (2, 3) and first.shape == (second.shape[0], second.shape[2]):
        return second
    if (first.dim(), second.dim()) == (3, 3) and first.shape[:2] == second.shape[:2]:
        return first
    return None
