"""The temperatures of the diversity loss, and the epoch from which they depend on the class."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor
from typing_extensions import Self

from ride_plugin import functional
from ride_plugin._checks import ClassCounts, check_choice, check_class_counts, check_number
from ride_plugin._numerics import float32_or_better
from ride_plugin._schedule import Schedule
from ride_plugin.functional import Form


class TemperatureSchedule(Schedule):
    r"""Temperature of each class: the same for all at first, lower for rare classes later.

    $$T_k = \eta \quad (\text{epoch} < \text{start\_epoch}), \qquad
    T_k = \eta\, \psi_k / \max_c \psi_c \quad (\text{then}).$$

    (The authors' code; the paper, section 3, has no warm-up and shifts the largest temperature to
    $\eta$ instead, which ``form="paper"`` does. See `functional.class_temperatures`, and
    `functional.class_balance` for $\psi$.)

    It behaves like a learning-rate scheduler: epochs count from zero, ``step()`` belongs at the end
    of each, ``state_dict()`` holds the epoch. It is a module, so that the temperatures follow
    ``.to()`` of whatever owns it; its state dict is that of any module and can be saved within.

    Args:
        class_counts: training samples of each class, ``[C]``, positive.
        eta: base temperature $\eta$, that of the most frequent class.
        gamma: $\gamma$, how strongly temperatures follow the counts (0: not at all). The authors
            use 0.05 (CIFAR-100-LT), 0.02 (ImageNet-LT) and 0.015 (iNaturalist).
        start_epoch: first epoch, counted from zero, with a temperature for each class. The authors
            use 160 of 200 (CIFAR-100-LT) and 80 of 100.
        form: ``"official"``, the normalisation in the authors' code, or ``"paper"``.

    Attributes:
        temperature: ``[C]``, the temperatures of the current epoch (a buffer updated in place).
        last_epoch: the current epoch. It may be set, as may ``eta``, ``gamma``, ``start_epoch`` and
            ``form``: the temperatures follow at once.
        is_active: whether classes have temperatures of their own in it.

    Raises:
        ArgumentError: counts that are not positive, eta not positive, gamma outside [0, 1],
            start_epoch negative, an unknown form, or, in the paper's form, a gamma so large that
            the temperature of the rarest class would not be positive.

    Example:
        >>> schedule = TemperatureSchedule([300, 100, 20], start_epoch=1)
        >>> schedule.temperature
        tensor([1., 1., 1.])
        >>> schedule.step()
        >>> schedule.temperature
        tensor([1.0000, 0.9324, 0.9054])
    """

    temperature: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        eta: float = 1.0,
        gamma: float = 0.05,
        start_epoch: int = 0,
        form: Form = "official",
    ) -> None:
        counts = check_class_counts(class_counts)
        super().__init__(start_epoch, counts)
        self._class_counts = counts
        self.register_buffer(
            "temperature",
            torch.empty(len(self._class_counts), dtype=torch.float32, device="cpu"),
            persistent=False,
        )
        self._set(eta, gamma, form)

    @property
    def eta(self) -> float:
        r"""Base temperature $\eta$."""
        return self._eta

    @eta.setter
    def eta(self, value: float) -> None:
        self._set(value, self._gamma, self._form)

    @property
    def gamma(self) -> float:
        """How strongly temperatures follow the counts."""
        return self._gamma

    @gamma.setter
    def gamma(self, value: float) -> None:
        self._set(self._eta, value, self._form)

    @property
    def form(self) -> Form:
        """The normalisation, ``"official"`` or ``"paper"``."""
        return self._form

    @form.setter
    def form(self, value: Form) -> None:
        self._set(self._eta, self._gamma, value)

    def _set(self, eta: float, gamma: float, form: Form) -> None:
        """Take settings that fit together, or none of them."""
        eta = check_number(eta, "eta", 0, open_low=True, advice="The paper uses 1.")
        gamma = check_number(
            gamma,
            "gamma",
            0,
            1,
            advice="The authors use 0.05, 0.02 and 0.015; 0 gives all classes one temperature.",
        )
        form = check_choice(form, "form", get_args(Form))
        # In float64 and no buffer, so that casting the module back and forth loses nothing.
        self._by_class = functional.class_temperatures(
            self._class_counts, eta=eta, gamma=gamma, form=form
        )
        self._eta, self._gamma, self._form = eta, gamma, form
        self._refresh()

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self._class_counts)

    @property
    def class_counts(self) -> Tensor:
        """A copy of what it was built with, ``[C]``, float64."""
        return self._class_counts.clone()

    def extra_repr(self) -> str:
        """Arguments and epoch, as ``repr`` shows them."""
        return (
            f"num_classes={self.num_classes}, eta={self.eta}, gamma={self.gamma}, "
            f"start_epoch={self.start_epoch}, form={self.form!r}, last_epoch={self.last_epoch}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # Temperatures differ in the third digit, which a cast to half precision would round away.
        self.temperature = float32_or_better(self.temperature)
        self._refresh()
        return self

    def _has_effect(self) -> bool:
        return not torch.allclose(self._by_class, torch.full_like(self._by_class, self._eta))

    def _refresh(self) -> None:
        super()._refresh()
        # In place: a compiled loss keeps the buffer it has seen and does not compile again.
        if self.is_active:
            self.temperature.copy_(self._by_class)
        else:
            self.temperature.fill_(self._eta)
