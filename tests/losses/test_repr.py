"""What a loss shows of its options when it is printed."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import nn

from ride_plugin import DistillationLoss, DiversityLoss, RIDELoss
from ride_plugin.longtail import DeferredReweighting, FocalLoss, LDAMLoss

COUNTS = [30, 10, 5]


@pytest.mark.parametrize(
    ("loss", "shown"),
    [
        (FocalLoss(gamma=1.5), "gamma=1.5"),
        (LDAMLoss(COUNTS, max_margin=0.25, scale=20.0), "num_classes=3, max_margin=0.25, scale=20"),
        (
            DeferredReweighting(LDAMLoss(COUNTS), COUNTS, start_epoch=4),
            "start_epoch=4, last_epoch=",
        ),
        (
            RIDELoss(F.cross_entropy, DiversityLoss(COUNTS)),
            "criterion=<function cross_entropy",
        ),
        (DiversityLoss(COUNTS, weight=0.5), "weight=0.5, form="),
        (DistillationLoss(weight=0.25, temperature=2.0), "weight=0.25, temperature=2.0, form="),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_loss_shows_its_options(loss: nn.Module, shown: str) -> None:
    assert shown in repr(loss)
