"""Knowledge distillation from a teacher, usually a RIDE model with more experts."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ride_plugin import functional
from ride_plugin._checks import (
    check_choice,
    check_floating,
    check_number,
    refuse,
    setting,
    warn_of_probabilities,
)
from ride_plugin._numerics import float32_or_better
from ride_plugin._output import Output, expert_logits, plain_logits

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

    Attributes:
        weight: may be set while training, once an epoch say, as may the others.
        temperature: see ``weight``.
        form: see ``weight``.

    Raises:
        ArgumentError: an argument is out of range.

    Example:
        >>> import torch
        >>> distillation = DistillationLoss(temperature=1.5)
        >>> expert_logits = torch.randn(8, 3, 10, requires_grad=True)  # or the model's output
        >>> distillation(expert_logits, torch.randn(8, 10)).backward()
    """

    weight: float = setting("weight", "The factor $w$.", check_number, 0)
    temperature: float = setting(
        "temperature", "The temperature $T$.", check_number, 0, open_low=True
    )
    form: DistillationForm = setting(
        "form",
        "What is distilled, each expert or their mean.",
        check_choice,
        get_args(DistillationForm),
    )

    def __init__(
        self,
        *,
        weight: float = 1.0,
        temperature: float = 1.5,
        form: DistillationForm = "per_expert",
    ) -> None:
        super().__init__()
        self.weight = weight
        self.temperature = temperature
        self.form = form
        self._looked = False

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

        Warns:
            UserWarning: at the first call, the teacher's logits are probabilities.
        """
        student = float32_or_better(expert_logits(output))
        if student.shape[0] == 0:
            refuse("output", "of at least one sample", student)
        if self.form == "official":
            student = functional.mean_logits(student)[:, None]
        batch, _, classes = student.shape
        teacher = check_floating(
            plain_logits(teacher_output, "teacher_output"),
            "teacher_output",
            batch,
            classes,
            advice="Teacher and student must see the same batch and know the same classes.",
        )
        if not (torch.compiler.is_compiling() or self._looked):
            self._looked = warn_of_probabilities(teacher, "teacher_output")
        divergence = functional.distillation_kl(student, teacher, self.temperature)
        return self.weight * divergence.mean()

    def extra_repr(self) -> str:
        """Arguments, as ``repr`` shows them."""
        return f"weight={self.weight}, temperature={self.temperature}, form={self.form!r}"
