"""What is compared, each method as a few fields; nothing here runs anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        rank: of the low-rank adapters in the last layers; 0 trains the classifier only.
        num_experts: 1 is the plain network.
        adjustments: multiple of the log prior that each expert's criterion adds to its logits.
        diversity: form of the diversity term, or None.
        compares_raw: the diversity term reads the logits without the adjustment.
        epochs: a classifier alone trains a little longer.
    """

    rank: int
    num_experts: int = 1
    adjustments: tuple[float, ...] = (1.0,)
    diversity: Literal["paper", "official"] | None = None
    compares_raw: bool = False
    epochs: int = 12


METHODS = {
    "head": Method(0, epochs=15),
    "one_rank8": Method(8),
    "one_rank24": Method(24),
    "three_rank8": Method(8, 3, (1.0, 1.0, 1.0)),
    "three_rank5": Method(5, 3, (1.0, 1.0, 1.0)),
    "three_rank5_official": Method(5, 3, (1.0, 1.0, 1.0), "official"),
    "three_rank5_official_raw": Method(5, 3, (1.0, 1.0, 1.0), "official", compares_raw=True),
    "three_rank2": Method(2, 3, (1.0, 1.0, 1.0)),
    "three_rank8_official": Method(8, 3, (1.0, 1.0, 1.0), "official"),
    "three_rank8_paper": Method(8, 3, (1.0, 1.0, 1.0), "paper"),
    "three_rank8_priors": Method(8, 3, (1.0, 0.0, 2.0)),
}
"""Trained parameters, classifiers included: ``three_rank5`` has 0.98 of ``one_rank24``'s.

``three_rank8`` has as many in its adapters, and two more classifiers.
"""

IMAGE_METHODS = {
    "head": Method(0, epochs=3),
    "one_rank38": Method(38, epochs=3),
    "three_rank4": Method(4, 3, (1.0, 1.0, 1.0), epochs=3),
    "one_rank4": Method(4, epochs=3),
}
"""``three_rank4`` trains 1.00 times the parameters of ``one_rank38``, classifiers included.

An epoch is of all images and all mirrored images.
"""
