"""The diversity term: experts of one network are paid for disagreeing."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from ride_plugin import functional
from ride_plugin._checks import (
    ClassCounts,
    check_bool,
    check_choice,
    check_class_counts,
    check_instance,
    check_number,
    check_target,
    refuse,
    setting,
)
from ride_plugin._devices import follow
from ride_plugin._errors import ArgumentError
from ride_plugin._numerics import float32_or_better
from ride_plugin._output import Output, expert_logits
from ride_plugin.functional import Form
from ride_plugin.losses._temperature import TemperatureSchedule


def _of_schedule(name: str) -> Any:
    """A setting that the schedule keeps; it may be set here as well as there."""
    return property(
        lambda loss: getattr(loss.schedule, name),
        lambda loss, value: setattr(loss.schedule, name, value),
        doc=f"``{name}`` of the schedule.",
    )


class DiversityLoss(nn.Module):
    r"""Distribution-aware diversity loss: minus the divergence between experts.

    $$L = -\frac{\lambda \bar T^2}{B} \sum_b \sum_i \mathrm{KL}\bigl(q(x_b) \,\|\, p_i(x_b)\bigr),
    \qquad p_i = \mathrm{softmax}(z_i / T), \quad q = \mathrm{softmax}(\bar z / T),$$

    with the ensemble's logits $\bar z$ held constant and the temperature of each *class* dividing
    that class's logit (the authors' code; see `functional.kl_from_mean`). With ``form="paper"``,
    each expert is compared with every other at the temperature of the sample's class (paper,
    section 3; see `functional.pairwise_kl`):

    $$L = -\frac{\lambda}{B} \sum_b \frac{1}{E-1} \sum_i \sum_{j \ne i}
    \mathrm{KL}\bigl(p_i(x_b) \,\|\, p_j(x_b)\bigr), \qquad
    p_i = \mathrm{softmax}(z_i / T_{y_b}).$$

    Add it to the classification loss of the experts; it is never positive. Its gain over weight 0
    was within the noise between seeds, but for 0.8 points in each of two seeds with balanced
    softmax and cosine classifiers on CIFAR-100-LT.

    **The paper's form can ruin experts.** Its divergence has no bound, and once experts are
    confident, one gains more by leaving the others than by being right: with cross entropy on
    CIFAR-100-LT at the default weight, the first of three experts fell to 7 % accuracy. The
    official form's gradient is bounded: for the logit of one sample and class, by ``weight * eta /
    (1 - gamma)``.

    Args:
        class_counts: training samples of each class, ``[C]``, positive.
        weight: $\lambda$, not negative. The authors use 0.45 (CIFAR-100-LT) and 0.2 (ImageNet-LT,
            iNaturalist); their own argument carries the minus sign.
        gamma: see `TemperatureSchedule`, whose default it has; so for the next two.
        eta: see `TemperatureSchedule`.
        start_epoch: see `TemperatureSchedule`.
        form: ``"official"`` or ``"paper"``, as above.
        detach_others: in the paper's form, each expert takes the others as given. **With False
            training diverges**: KL is unbounded, and every expert can drive the others' divergence
            up at no cost of its own (measured: accuracy 93.7 to 42.6 at the default weight).
        temperature: a schedule of your own instead of ``gamma``, ``eta`` and ``start_epoch``.

    Attributes:
        schedule: the `TemperatureSchedule` in use. Its settings, ``weight`` and ``detach_others``
            may be set while training, once an epoch say, and act at once.

    Raises:
        ArgumentError: an argument is out of range, or the schedule does not fit the others.

    Warns:
        UserWarning: once, ``start_epoch`` would change something, and ``step()`` was never called,
            although ten times the samples of ``class_counts`` were scored in training.

    Example:
        >>> import torch
        >>> diversity = DiversityLoss([300, 100, 20], weight=0.2)
        >>> expert_logits = torch.randn(8, 3, 3, requires_grad=True)  # or the model's output
        >>> loss = diversity(expert_logits, torch.randint(3, (8,)))
        >>> loss.backward()
        >>> diversity.step()  # at the end of each epoch
    """

    weight: float = setting(
        "weight",
        r"The factor $\lambda$.",
        check_number,
        0,
        advice="The loss has its minus sign built in: the authors' -0.2 is weight=0.2.",
    )
    detach_others: bool = setting(
        "detach_others", "Whether each expert takes the others as given.", check_bool
    )
    form = _of_schedule("form")
    gamma = _of_schedule("gamma")
    eta = _of_schedule("eta")
    start_epoch = _of_schedule("start_epoch")

    _scored = 0  # samples in training

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        weight: float = 0.2,
        gamma: float | None = None,
        eta: float | None = None,
        start_epoch: int | None = None,
        form: Form = "official",
        detach_others: bool = True,
        temperature: TemperatureSchedule | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.detach_others = detach_others
        all_given = {"gamma": gamma, "eta": eta, "start_epoch": start_epoch}
        given: dict[str, Any] = {k: value for k, value in all_given.items() if value is not None}
        if temperature is None:
            temperature = TemperatureSchedule(class_counts, form=form, **given)
        else:
            check_instance(temperature, "temperature", TemperatureSchedule, "a TemperatureSchedule")
            check_choice(form, "form", get_args(Form))
            _check_schedule(temperature, check_class_counts(class_counts), form, given)
        self.schedule = temperature
        self._check_detaching()

    def forward(self, output: Output, target: Tensor) -> Tensor:
        """Return the weighted batch mean.

        Args:
            output: what the wrapped model returned, or expert logits ``[B, E, C]``.
            target: in the paper's form class indices ``[B]``, or probabilities ``[B, C]``, for
                which a sample's temperature is the expected one. The official form does not use it:
                rows with a label to ignore, -100 say, count as any other.

        Returns:
            A scalar, float32 (float64 for float64 logits); zero for a single expert.

        Raises:
            MissingExpertLogitsError: ``output`` is a bare ``[B, C]``.
            ArgumentError: batch, classes or target do not fit; an index is out of range (checked
                where the tensors are on the CPU; an accelerator's kernel fails by itself).
        """
        divergence = self._divergence(output, target)
        return divergence.sum() * (-self.weight / len(divergence))

    def per_sample(self, output: Output, target: Tensor) -> Tensor:
        """Return the weighted term of each sample, ``[B]``, of which `forward` is the mean.

        Args:
            output: see `forward`.
            target: see `forward`.
        """
        return self._divergence(output, target) * -self.weight

    def _divergence(self, output: Output, target: Tensor) -> Tensor:
        experts = expert_logits(output)
        batch, num_experts, classes = experts.shape
        if classes != self.schedule.num_classes:
            raise ArgumentError(
                f"Expected argument `class_counts` to have a number for each of {classes} classes, "
                f"as the experts' logits {list(experts.shape)} have, but it has "
                f"{self.schedule.num_classes}. Pass the training samples of each class of the "
                "model, or build the model with `num_classes=`."
            )
        if batch == 0:
            refuse("output", "that of at least one sample", experts)
        logits = float32_or_better(experts)
        trains = self.training and experts.requires_grad and torch.is_grad_enabled()
        if trains and self.weight and num_experts > 1 and not torch.compiler.is_compiling():
            self._scored += batch
            self.schedule.scored(self._scored)
        follow(self, self.schedule.temperature, logits)
        class_temperature = self.schedule.temperature.to(logits.dtype)
        if self.form == "official":
            self._check_detaching()  # both can be set while training
            return functional.kl_from_mean(logits, class_temperature)
        target = check_target(target, batch, classes, device=logits.device)
        temperature = functional.sample_temperatures(class_temperature, target)
        return functional.pairwise_kl(logits, temperature, detach_others=self.detach_others)

    def _check_detaching(self) -> None:
        if self.form == "official" and not self.detach_others:
            raise ArgumentError(
                "Expected argument `detach_others` to be left alone with form='official', which "
                "always holds the ensemble's logits constant, but got False. It belongs to "
                "form='paper'."
            )

    def step(self) -> None:
        """End the epoch: the class temperatures act from ``start_epoch`` on."""
        self.schedule.step()

    def extra_repr(self) -> str:
        """Arguments, as ``repr`` shows them."""
        return f"weight={self.weight}, form={self.form!r}, detach_others={self.detach_others}"


def _check_schedule(
    schedule: TemperatureSchedule, counts: Tensor, form: str, given: dict[str, Any]
) -> None:
    for name, value in given.items():
        raise ArgumentError(
            f"Expected argument `{name}` to be left alone when `temperature` is given, but got "
            f"{value!r}. Set it on the TemperatureSchedule."
        )
    num_classes = len(counts)
    if schedule.num_classes != num_classes or schedule.form != form:
        raise ArgumentError(
            f"Expected argument `temperature` to be a schedule for {num_classes} classes with "
            f"form={form!r}, but got one for {schedule.num_classes} with form={schedule.form!r}."
        )
    own = schedule.class_counts
    if not torch.allclose(own / own.sum(), counts / counts.sum(), rtol=1e-3):
        raise ArgumentError(
            "Expected argument `class_counts` to be those of the schedule that is given as "
            "`temperature`, which makes the temperatures of its own, but they differ. Pass both "
            "the same."
        )
