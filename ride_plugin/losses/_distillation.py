"""Knowledge distillation from a teacher, usually a RIDE model with more experts."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import Tensor, nn

from ride_plugin import functional
from ride_plugin._errors import ArgumentError
from ride_plugin._numerics import float32_or_better
from ride_plugin._output import ExpertOutput, Output, expert_logits

DistillationForm = Literal["per_expert", "official"]


class DistillationLoss(nn.Module):
    r"""Divergence of the student's experts from a teacher's prediction, softened by a temperature.

    $$L = \frac{w\, T^2}{B} \sum_b \sum_i
    \mathrm{KL}\bigl(\mathrm{softmax}(t_b / T) \,\|\, \mathrm{softmax}(z_{bi} / T)\bigr).$$

    (The paper distils a model of many experts into one of few. Differs from the authors' code,
    which distils the ensemble's mean only, as ``form="official"`` does. Their code adds this term
    *and the whole RIDE loss* once for each expert: multiply the sum of all losses by E to
    reproduce it.)

    Args:
        weight: $w$, not negative.
        temperature: $T$; the authors use 1.5.
        form: ``"per_expert"`` distils every expert, which suits a loss summed over experts;
            ``"official"`` distils the mean of their logits, once.

    Raises:
        ArgumentError: an argument is out of range.

    Example:
        >>> import torch
        >>> distillation = DistillationLoss(temperature=1.5)
        >>> expert_logits = torch.randn(8, 3, 10, requires_grad=True)  # or the model's output
        >>> distillation(expert_logits, torch.randn(8, 10)).backward()
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        temperature: float = 1.5,
        form: DistillationForm = "per_expert",
    ) -> None:
        super().__init__()
        if not (math.isfinite(weight) and weight >= 0):
            raise ArgumentError(
                f"Expected argument `weight` to be finite and not negative, but got {weight}."
            )
        if not (math.isfinite(temperature) and temperature > 0):
            raise ArgumentError(
                f"Expected argument `temperature` to be positive, but got {temperature}."
            )
        if form not in get_args(DistillationForm):
            raise ArgumentError(
                f"Expected argument `form` to be one of {get_args(DistillationForm)}, "
                f"but got {form!r}."
            )
        self.weight = weight
        self.temperature = temperature
        self.form = form

    def forward(self, output: Output, teacher_output: Output) -> Tensor:
        """Return the weighted batch mean, summed over experts.

        Args:
            output: what the student returned, or its expert logits ``[B, E, C]``.
            teacher_output: what the teacher returned: logits ``[B, C]``, an `ExpertOutput`, or
                expert logits ``[B, E', C]``, which are averaged. It is held constant; run the
                teacher in evaluation mode (the authors' code leaves it in training mode).

        Returns:
            A scalar, float32 (float64 for float64 logits).

        Raises:
            MissingExpertLogitsError: ``output`` is a bare ``[B, C]``.
            ArgumentError: student and teacher do not fit, or the batch is empty.
        """
        student = float32_or_better(expert_logits(output))
        if student.shape[0] == 0:
            raise ArgumentError(
                "Expected argument `output` to hold at least one sample, but got expert logits "
                f"{list(student.shape)}."
            )
        if self.form == "official":
            student = functional.mean_logits(student)[:, None]
        divergence = functional.distillation_kl(
            student, _teacher_logits(teacher_output), self.temperature
        )
        return self.weight * divergence.mean()

    def extra_repr(self) -> str:
        """Arguments, as ``repr`` shows them."""
        return f"weight={self.weight}, temperature={self.temperature}, form={self.form!r}"


def _teacher_logits(output: Output) -> Tensor:
    if isinstance(output, Tensor):
        logits = output
    elif isinstance(output, tuple) and len(output) == 2:  # DDP rebuilds an ExpertOutput as a tuple
        logits = ExpertOutput(*output).logits
    else:
        raise ArgumentError(
            "Expected argument `teacher_output` to be logits [B, C], an ExpertOutput or expert "
            f"logits [B, E, C], but got {type(output).__name__}."
        )
    return functional.mean_logits(float32_or_better(logits)) if logits.dim() == 3 else logits
