r"""Numerics that every Kullback-Leibler divergence of this library shares.

Experts of one network are close to each other and each is sure of itself, so the textbook sum
$\sum_c p_c (\log p_c - \log q_c)$ cancels: in float32 it is wrong in the first digit when logits
differ by 1e-3. Everything here is therefore written in the half log-ratio

$$h_c = \tfrac12 (\log p_c - \log q_c),$$

which follows from the *difference* of the logits, and in the two identities

$$p_c - q_c = (p_c + q_c) \tanh h_c, \qquad \sum_c (p_c + q_c) \tanh h_c = 0.$$

Nothing overflows, since tanh is bounded, and no digits are lost, since no two nearly equal
probabilities are ever subtracted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor


class Comparison(NamedTuple):
    """Two families of distributions over classes and how far apart they are.

    Attributes:
        p: ``[B, E, C]``, softmax of the experts' logits.
        q: ``[B, 1, C]``, softmax of the reference's logits.
        half_log_ratio: ``[B, E, C]``, half of ``log p - log q``; zero at masked classes.
    """

    p: Tensor
    q: Tensor
    half_log_ratio: Tensor


def compare(experts: Tensor, reference: Tensor, inverse_temperature: Tensor) -> Comparison:
    """Compare each expert with one reference.

    Args:
        experts: logits ``[B, E, C]``.
        reference: logits ``[B, 1, C]``.
        inverse_temperature: broadcasts against the logits, which it multiplies: half of what it
            would cost to divide them.
    """
    scaled, scaled_reference = experts * inverse_temperature, reference * inverse_temperature
    p, q = scaled.softmax(dim=-1), scaled_reference.softmax(dim=-1)
    # log-sum-exp read off the largest class: two reductions instead of a pass of exponentials. Its
    # rounding error enters the divergences squared only, because p and q both sum to one.
    top_logit = scaled.amax(-1, keepdim=True) - scaled_reference.amax(-1, keepdim=True)
    top_ratio = p.amax(-1, keepdim=True) / q.amax(-1, keepdim=True)
    normaliser = top_logit - top_ratio.log()
    # From the difference of the logits, not from `scaled`, whose rounding would drown it.
    h = torch.sub(experts, reference, out=memory_of(scaled)).mul_(inverse_temperature / 2)
    h.sub_(normaliser, alpha=0.5)
    # A class masked with -inf on both sides gives NaN here and has no probability on either side.
    return Comparison(p, q, h.nan_to_num_(nan=0.0))


def memory_of(tensor: Tensor) -> Tensor | None:
    """What an operation may write into, as its ``out``, which ``torch.func.vmap`` does not know."""
    mapped = not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(tensor)
    return None if mapped else tensor


_SLICE_BYTES = 512 * 1024
"""Logits that one thread works on at a time: with what is computed from them, a core's cache."""


def _by_slices(
    function: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, *beside: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply the function, on a CPU to a few samples at a time.

    The divergences are some twenty passes over the logits. Of a large batch each pass waits for
    memory, fresh memory above all; slices that fit in the cache use the same memory again.
    """
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        return function(logits, *beside)  # each pass is a kernel launch there, or fused
    cache = _SLICE_BYTES * torch.get_num_threads()
    if logits.nbytes <= cache:
        return function(logits, *beside)
    rows = max(1, cache * len(logits) // logits.nbytes)
    value, gradient = logits.new_empty(len(logits)), torch.empty_like(logits)
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        value[part], gradient[part] = function(logits[part], *(other[part] for other in beside))
    return value, gradient


class _KnownGradient(torch.autograd.Function):
    """Attach to values ``[B]`` the gradient ``[B, E, C]`` that was computed beside them.

    Value and gradient share all their work, so the backward pass is one multiplication and the
    forward pass leaves one copy of the logits behind instead of one for each operation.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        # The gradient is an output, too: as such it depends on the logits, so that who asks for a
        # second derivative comes here again, also where `grad_value` is a constant.
        return value.clone(), gradient.detach()

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]
    ) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(
        ctx: Any, grad_value: Tensor | None, grad_gradient: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        if grad_gradient is not None and not torch.compiler.is_compiling():
            raise NotImplementedError(
                "The divergences have no second derivative. Differentiate a loss twice without the "
                "diversity or distillation term: `experts_loss(criterion, output, target)`."
            )
        if grad_value is None:
            return None, None, None
        (gradient,) = ctx.saved_tensors
        return gradient * grad_value[:, None, None], None, None


def with_gradient(
    function: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, *beside: Tensor
) -> Tensor:
    """Return the function's value ``[B]``, with the gradient in ``logits`` that it knows.

    Args:
        function: takes samples of ``logits`` and of ``beside``, which must not see each other, and
            returns value ``[B]`` and gradient ``[B, E, C]``.
        logits: ``[B, E, C]``.
        beside: tensors with B rows, held constant.
    """
    with torch.no_grad():
        value, gradient = _by_slices(function, logits, *beside)
    attached: tuple[Tensor, Tensor] = _KnownGradient.apply(logits, value, gradient)  # type: ignore[no-untyped-call]
    return attached[0]


def float32_or_better(logits: Tensor) -> Tensor:
    """Upcast half precision, also what autocast made; float64 stays as it is."""
    return logits if logits.dtype == torch.float64 else logits.float()


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Let no operation on this tensor's device be lowered; the meta device knows no autocast."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


class Autocast(NamedTuple):
    """How autocast stands on a device: what runs later can run as it would have run at once.

    Attributes:
        device: its type.
        dtype: what operations are lowered to; None where autocast is off.
    """

    device: str
    dtype: torch.dtype | None

    @classmethod
    def now(cls, tensor: Tensor) -> Autocast:
        """The state for operations on this tensor's device."""
        device = tensor.device.type
        known = not tensor.is_meta and torch.is_autocast_enabled(device)
        return cls(device, torch.get_autocast_dtype(device) if known else None)

    def restored(self) -> AbstractContextManager[None]:
        """The same state for the duration of a block."""
        if self.device == "meta":
            return nullcontext()
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype is not None)


def inverse_of(temperature: Tensor | float, logits: Tensor) -> Tensor:
    """One over the temperature, which is held constant, in the dtype of the logits."""
    if isinstance(temperature, Tensor):
        return temperature.detach().to(logits.dtype).reciprocal()
    inverse = min(1 / temperature, torch.finfo(logits.dtype).max)  # torch refuses a larger one
    return torch.full((), inverse, dtype=logits.dtype, device=logits.device)
