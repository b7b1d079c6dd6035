"""What a wrapped model returns, and the one place where expert logits are attached and read.

A wrapped model returns a plain ``[B, C]`` tensor, so existing evaluation code keeps working; the
experts' logits travel on that tensor as a Python attribute. Every loss reads them back through
:func:`expert_logits`, which refuses to guess when they are gone.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ride_plugin._errors import ArgumentError, MissingExpertLogitsError

_ATTRIBUTE = "_ride_expert_logits"


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


def attach_expert_logits(logits: Tensor, experts: Tensor) -> Tensor:
    """Let ``logits`` ``[B, C]`` carry ``experts`` ``[B, E, C]``; returns ``logits`` itself.

    A loss of the carried logits alone still sends a gradient, zero, through ``logits``: engines
    such as FSDP2 hook what the model returned and wait there for the backward pass. Without it
    they would train nothing and say nothing.
    """
    if logits.requires_grad:
        never = torch.zeros((), dtype=torch.bool, device=logits.device)
        experts = torch.where(never, logits.unsqueeze(1), experts)
    setattr(logits, _ATTRIBUTE, experts)
    return logits


def expert_logits(output: Output) -> Tensor:
    """Return the logits of every expert, whatever form a wrapped model's output has.

    Args:
        output: what the wrapped model returned: the plain ``[B, C]`` tensor that carries its
            expert logits, an :class:`ExpertOutput`, :class:`RouterInputs`, or a raw floating
            ``[B, E, C]`` tensor.

    Returns:
        ``[B, E, C]``, same dtype and device, with its gradient history.

    Raises:
        MissingExpertLogitsError: ``output`` is a bare ``[B, C]`` tensor.
        ArgumentError: ``output`` is none of the accepted forms.

    Example:
        >>> import torch
        >>> tuple(expert_logits(torch.zeros(4, 3, 10)).shape)
        (4, 3, 10)
    """
    experts: object
    if isinstance(output, Tensor):
        experts = output if output.dim() == 3 else getattr(output, _ATTRIBUTE, None)
        if experts is None and output.dim() == 2:
            raise MissingExpertLogitsError(
                f"Expected argument `output` to carry expert logits [B, E, C], but got bare logits "
                f"of shape {list(output.shape)}. They are lost when the model's output is cast, "
                "sliced, detached, cloned or used in arithmetic before the loss, when the model "
                "runs under DistributedDataParallel with find_unused_parameters or static_graph, "
                "under DataParallel, or when the output comes from RoutingInference. Pass the "
                "model's output itself to the loss, or set `model.return_experts = True`, which "
                "returns ExpertOutput(logits, expert_logits)."
            )
    elif isinstance(output, RouterInputs):
        experts = output.expert_logits
    elif isinstance(output, tuple) and len(output) == 2:
        # A plain tuple too: wrappers such as DDP or accelerate rebuild containers by their type.
        experts = output[1]
    else:
        experts = None
    if not isinstance(experts, Tensor) or experts.dim() != 3 or not experts.is_floating_point():
        shape = list(output.shape) if isinstance(output, Tensor) else None
        raise ArgumentError(
            "Expected argument `output` to be the wrapped model's [B, C] output, an ExpertOutput, "
            f"or a floating-point tensor [B, E, C], but got {type(output).__name__}"
            f"{f' of shape {shape} and dtype {output.dtype}' if isinstance(output, Tensor) else ''}"
            ". Pass what the wrapped model returned."
        )
    return experts
