"""Test data whose class frequencies nobody knows: found from unlabelled samples, with a guard."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ride_plugin._checks import (
    ClassCounts,
    Numbers,
    as_cpu_tensor,
    as_labels,
    check_class_counts,
    check_floating,
    check_number,
    warn_of_probabilities,
)
from ride_plugin._errors import ArgumentError
from ride_plugin._numerics import float32_or_better
from ride_plugin.longtail._held_out import HeldOut, held_out_samples

_LARGEST_TAU = 3.0
_LARGEST_SHIFT = 14.0  # between the most frequent class and the rarest, in nats
_STANDARD_ERRORS = 2.0
_ACCURACY_ERRORS = 0.5


@dataclass(frozen=True, eq=False)
class PriorCalibration:
    r"""How a model's logits become probabilities for any class prior; see `calibrate_prior`.

    For a class prior $\pi(\tau)_c \propto n_c^{\tau}$ the posterior is the softmax of

    $$a\, z_c + (b + \tau) \log n_c.$$

    Attributes:
        scale: $a$, below one where the model is overconfident.
        offset: $b$, minus the share of the training prior that is left in the logits.
        log_counts: ``[C]`` float64, $\log (n_c / \sum_k n_k)$.
        held_out: what the held-out samples say about each prior.
    """

    scale: float
    offset: float
    log_counts: Tensor
    held_out: HeldOut = field(repr=False)

    def adjust(self, logits: Tensor, tau: float) -> Tensor:
        r"""Logits for a known class prior.

        Args:
            logits: ``[..., C]``.
            tau: the exponent of the prior: 1 for data distributed as the training data, 0 for
                balanced ones, below 0 where the rare classes are the frequent ones.

        Returns:
            ``[..., C]``, float32 or better.

        Raises:
            ArgumentError: the logits do not have ``C`` classes, or ``tau`` is not a number.

        Warns:
            UserWarning: the logits are probabilities, as far as can be told (on the CPU).
        """
        check_floating(logits, "logits", "...", len(self.log_counts))
        exponent = self.offset + check_number(tau, "tau", advice="Balanced data have 0.")
        warn_of_probabilities(logits, "logits")
        precise = float32_or_better(logits)
        return self.scale * precise + exponent * self.log_counts.to(precise)

    def estimate(self, logits: Tensor) -> PriorEstimate:
        r"""Find the class prior of unlabelled test data by maximum likelihood.

        With $q_i$ the posterior of sample i for balanced data, $\tau$ maximises

        $$\frac1N \sum_i \log \sum_c C\, \pi(\tau)_c\, q_{ic},$$

        the likelihood of the samples relative to that of balanced data, for $|\tau| \le 3$, or,
        where counts differ by less than a factor of 106, until the prior of the most frequent class
        and that of the rarest differ by $e^{14}$. (Saerens et al., "Adjusting the
        Outputs of a Classifier to New a Priori Probabilities", Neural Computation 2002, with one
        free number in place of C.) Whether it may be trusted is decided on samples that it was
        not found on: each half of the data judges the number that the other half found, and the
        held-out samples, weighted as the prior has it, must be classified better with it.

        Args:
            logits: ``[N, C]`` of the model that was calibrated, N >= 2.

        Returns:
            A `PriorEstimate`, whose `justified` is False where nothing should be changed.

        Raises:
            ArgumentError: the shape does not fit, or a logit is not finite.

        Warns:
            UserWarning: the logits are probabilities, as far as can be told.
        """
        check_floating(logits, "logits", "N", len(self.log_counts))
        if len(logits) < 2:
            raise ArgumentError(
                f"Expected argument `logits` to hold at least two samples, but got {len(logits)}. "
                "Collect a batch of test data first."
            )
        posterior = self.adjust(as_cpu_tensor(logits, "logits").double(), 0.0).log_softmax(dim=1)
        if not bool(posterior.isfinite().all()):
            raise ArgumentError("Expected argument `logits` to be finite, but some are not.")
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(logits), generator=generator, device="cpu")
        halves = posterior[order[::2]], posterior[order[1::2]]
        gains = torch.cat(
            [
                _log_likelihood(judge, self.log_counts, _most_likely(found_on, self.log_counts))
                - _log_likelihood(judge, self.log_counts, -self.offset)
                for found_on, judge in (halves, halves[::-1])
            ]
        )
        tau = _most_likely(posterior, self.log_counts)
        accuracy_gain, accuracy_error = self.held_out.accuracy_gain(tau, self.log_counts)
        return PriorEstimate(
            calibration=self,
            tau=tau,
            gain=float(gains.mean()),
            standard_error=float(gains.std()) / math.sqrt(len(gains)),
            accuracy_gain=accuracy_gain,
            accuracy_error=accuracy_error,
        )


@dataclass(frozen=True, eq=False)
class PriorEstimate:
    """What `PriorCalibration.estimate` found.

    Attributes:
        calibration: the calibration that it was found with.
        tau: the exponent of the most likely prior.
        gain: mean log-likelihood of a sample beyond that of the prior for which the logits as they
            are decide, whose exponent is minus the offset; in nats, on data that tau was not found
            on.
        standard_error: of `gain`.
        accuracy_gain: how much more of the held-out samples are classified right with this prior
            than with the logits as they are, weighted as the prior has it; 0.01 is one point.
        accuracy_error: the standard error of `accuracy_gain`.
    """

    calibration: PriorCalibration
    tau: float
    gain: float
    standard_error: float
    accuracy_gain: float
    accuracy_error: float

    @property
    def justified(self) -> bool:
        """Whether there is a shift, and adjusting for it helps.

        The gain must exceed two standard errors, or the data may have the classes that the logits
        as they are decide for: balanced ones after a criterion for long tails, those of training
        after cross entropy. Where it does, the held-out samples have a veto: the logits as they are
        may still serve a mild shift best, since a calibration fits probabilities and not decisions.
        They must gain half a standard error: with none, mild shifts lost up to 0.4 points, with a
        whole one, a few held-out samples could justify little.
        """
        likely = self.gain > _STANDARD_ERRORS * self.standard_error
        return likely and self.accuracy_gain > _ACCURACY_ERRORS * self.accuracy_error

    @property
    def prior(self) -> Tensor:
        """The class prior ``[C]``, float64: the estimate, or that of the logits as they are."""
        tau = self.tau if self.justified else -self.calibration.offset
        return (tau * self.calibration.log_counts).softmax(dim=0)

    def adjust(self, logits: Tensor) -> Tensor:
        """Logits for the estimated prior; the logits as they are where it is not justified."""
        return self.calibration.adjust(logits, self.tau) if self.justified else logits


@torch.inference_mode(False)  # tensors made in inference mode cannot be fitted
def calibrate_prior(logits: Tensor, labels: Numbers, class_counts: ClassCounts) -> PriorCalibration:
    r"""Learn two numbers from labelled held-out data: how sure logits are, and of which prior.

    A model trained on long-tailed data keeps some of its training prior whatever its loss, and is
    overconfident; unlabelled test data cannot tell either from a shift of the classes. With $m_c$
    the frequency of class c among the held-out labels, scale and offset minimise the cross entropy
    of $a\, z_c + b \log n_c + \log m_c$, which is convex. The held-out data may be balanced or
    long-tailed, and a few hundred samples suffice, some of which the model gets wrong; they must
    not be training data, which a model knows by heart. (Not in the paper.)

    Args:
        logits: ``[N, C]``: the model's output, or that of routed inference.
        labels: ``[N]``, class indices.
        class_counts: training samples of each class, ``[C]``.

    Raises:
        ArgumentError: shapes do not fit, the counts are equal, or those of all classes that the
            labels name are, a logit is not finite, or the logits tell nothing about the labels, or
            they classify all of them rightly.

    Warns:
        UserWarning: the logits are probabilities, as far as can be told.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> labels = torch.arange(3).repeat(100)
        >>> logits = torch.nn.functional.one_hot(labels, 3) * 2 + torch.randn(300, 3)
        >>> calibration = calibrate_prior(logits, labels, [100, 10, 1])
        >>> few_of_the_last = calibration.estimate(logits[(labels < 2)])
        >>> few_of_the_last.justified, few_of_the_last.tau > 0
        (True, True)
    """
    counts = check_class_counts(class_counts)
    log_counts = (counts / counts.sum()).log()
    check_floating(logits, "logits", "N", len(counts))
    target = as_labels(labels, "labels", len(counts)).clone()
    z = as_cpu_tensor(logits, "logits").double().clone()
    if len(z) != len(target) or not bool(z.isfinite().all()):
        raise ArgumentError(
            f"Expected argument `logits` to be finite, with a row for each of the {len(target)} "
            f"labels, but got {len(z)} rows."
        )
    warn_of_probabilities(z, "logits")
    if counts.min() == counts.max():
        raise ArgumentError(
            "Expected argument `class_counts` to differ between classes, but all are equal: the "
            "priors that can be told apart here are powers of the counts."
        )
    _check_that_both_are_determined(z, target, log_counts)
    scale, offset = _fitted(z, target, log_counts)
    if not scale > 0 or not math.isfinite(offset):
        raise ArgumentError(
            "Expected argument `logits` to tell something about the labels, but the best scale is "
            f"{scale:g}. Check that rows and labels belong together."
        )
    balanced = scale * z + offset * log_counts
    _check_that_some_are_wrong(balanced, target)
    return PriorCalibration(
        scale, offset, log_counts, held_out_samples(z, target, balanced, log_counts)
    )


def _fitted(z: Tensor, target: Tensor, log_counts: Tensor) -> tuple[float, float]:
    """Scale and offset; a scale that is zero but for rounding comes back as zero."""
    present = target.bincount(minlength=len(log_counts)).double().log()  # -inf for absent classes
    # Both on a scale of one: the search stops at small gradients, and those of small logits, or of
    # counts that hardly differ, are small everywhere.
    centred = z - z.mean(1, keepdim=True)
    unit, unit_of_counts = float(centred.abs().mean()), float(log_counts.std())
    rows, counts = centred / unit, (log_counts - log_counts.mean()) / unit_of_counts
    numbers = z.new_tensor([1.0, 0.0], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [numbers],
        max_iter=200,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(numbers[0] * rows + numbers[1] * counts + present, target)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    scale, offset = numbers.tolist()
    return scale / unit if scale > 1e-6 else min(scale, 0.0), offset / unit_of_counts


def _check_that_both_are_determined(z: Tensor, target: Tensor, log_counts: Tensor) -> None:
    """Refuse held-out data for which any scale, or any offset, fits alike.

    Cross entropy among the classes that the labels have depends on both numbers only where, within
    a row, logits and log counts of these classes vary, and not in proportion.
    """
    present = target.unique()
    counts = log_counts[present]
    if len(present) < 2 or bool(counts.max() == counts.min()):
        raise ArgumentError(
            "Expected argument `labels` to hold classes with different `class_counts`, but got "
            f"{'the class' if len(present) == 1 else 'only the classes'} "
            f"{', '.join(map(str, present.tolist()[:5]))}. Held-out data of all classes tell which "
            "prior is left in the logits."
        )
    rows = z[:, present] - z[:, present].mean(1, keepdim=True)
    counts = counts - counts.mean()
    rest = rows - (rows @ counts / counts.square().sum())[:, None] * counts
    if bool(rest.abs().max() <= 1e-6 * rows.abs().max().clamp_min(1e-300)):
        raise ArgumentError(
            "Expected argument `logits` to tell something about the labels, but in every row they "
            "are all the same, or differ by the class counts alone. Pass what the model returns."
        )


def _check_that_some_are_wrong(balanced: Tensor, target: Tensor) -> None:
    """Refuse held-out data for which the cross entropy falls on towards infinite numbers.

    If the label is ahead in every row, twice both numbers fit better still, and so on; where the
    search stops is chance.
    """
    among = balanced[:, target.unique()].amax(dim=1)
    if bool((balanced.gather(1, target[:, None])[:, 0] >= among).all()):
        raise ArgumentError(
            "Expected argument `logits` to be wrong about some held-out samples, but with the "
            f"numbers found all {len(target)} are classified rightly. Any larger numbers fit them "
            "better, so that neither is determined. Pass more samples, or harder ones, on which "
            "the model errs; training samples are no held-out ones."
        )


def _log_likelihood(posterior: Tensor, log_counts: Tensor, tau: float) -> Tensor:
    """Log-likelihood of each sample under the prior, up to a term that no prior changes."""
    return (posterior + (tau * log_counts).log_softmax(dim=0)).logsumexp(dim=1)


def _most_likely(posterior: Tensor, log_counts: Tensor) -> float:
    """Maximise the mean over tau: a coarse grid, then the golden section around its best."""

    def value(tau: float) -> float:
        return float(_log_likelihood(posterior, log_counts, tau).mean())

    # Where the counts differ little, a large exponent is a small shift.
    largest = max(_LARGEST_TAU, _LARGEST_SHIFT / float(log_counts.max() - log_counts.min()))
    step = largest / 12
    grid = [step * k for k in range(-12, 13)]
    best = max(grid, key=value)
    low, high = max(best - step, -largest), min(best + step, largest)
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(14):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if value(left) > value(right):
            high = right
        else:
            low = left
    return (low + high) / 2
