"""Whether a class prior helps, judged on labelled samples that were held out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeldOut:
    r"""For which priors each held-out sample is classified right; see `calibrate_prior`.

    Each adjusted logit is a straight line over $\tau$, so the label of a sample has the largest one
    on one interval, which is all that needs to be kept of its logits.

    Attributes:
        labels: ``[N]`` int64.
        right_before: ``[N]`` bool, whether the logits as they are have the label's as the largest.
        right_from: ``[N]`` float64, the smallest tau for which the adjusted logits have it so.
        right_to: ``[N]`` float64, the largest one; below `right_from` where there is none.
    """

    labels: Tensor
    right_before: Tensor
    right_from: Tensor
    right_to: Tensor

    def accuracy_gain(self, tau: float, log_counts: Tensor) -> tuple[float, float]:
        r"""What adjusting gains in accuracy where classes are as frequent as a prior has it.

        Sample i has the weight $\pi(\tau)_{y_i} / m_{y_i}$, with m the frequency of a class among
        the held-out samples; a class without any is left out.

        Args:
            tau: the exponent of the prior.
            log_counts: ``[C]`` of the calibration.

        Returns:
            The gain, between -1 and 1, and its standard error; 0.01 is one point.
        """
        present = self.labels.bincount(minlength=len(log_counts)).double()
        weight = ((tau * log_counts).softmax(dim=0) / present)[self.labels]
        weight = weight / weight.sum()
        after = (self.right_from <= tau) & (tau <= self.right_to)
        change = after.double() - self.right_before.double()
        gain = (weight * change).sum()
        return float(gain), float((weight * (change - gain)).norm())


def held_out_samples(
    logits: Tensor, labels: Tensor, adjusted: Tensor, log_counts: Tensor
) -> HeldOut:
    """Where the line of each sample's label is above those of all other classes.

    ``logits`` are those of the model and ``adjusted`` those for balanced data, both ``[N, C]``. The
    label overtakes class c where tau times the difference of their log counts makes up for what the
    label is behind; classes with as many samples as the label's stay as far apart as they are.
    """
    behind = adjusted - adjusted.gather(1, labels[:, None])
    slope = log_counts[labels][:, None] - log_counts
    crossing = behind / slope
    rising = torch.where(slope > 0, crossing, -math.inf).amax(dim=1)
    falling = torch.where(slope < 0, crossing, math.inf).amin(dim=1)
    never = ((slope == 0) & (behind > 0)).any(dim=1)
    return HeldOut(
        labels=labels,
        right_before=logits.argmax(dim=1) == labels,
        right_from=torch.where(never, math.inf, rising),
        right_to=falling,
    )
