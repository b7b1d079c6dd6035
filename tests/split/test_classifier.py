"""Classifiers that are made anew: only where the logits come from nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper, SplitError, expert_logits
from ride_plugin.longtail import CosineClassifier


class Net(nn.Module):
    """What its logits are computed from is told by a function of itself and the features."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.neck = nn.Linear(8, 16), nn.Linear(16, 16)
        self.fc, self.other = nn.Linear(16, 5), nn.Linear(16, 5)
        self.scale, self.compute = nn.Parameter(torch.tensor(2.0)), compute

    def reset_classifier(self, number: int) -> None:
        raise AssertionError("must not be called")

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, self.neck(self.body(x).relu()).relu())


@pytest.mark.parametrize(
    "compute",
    [
        lambda net, h: (net.other(h) + net.fc(h)) / 2,
        lambda net, h: net.fc(h) - h[:, :5],
        lambda net, h: torch.stack([net.other(h), net.fc(h)]).mean(0),
    ],
    ids=["sum", "features", "mean"],
)
@pytest.mark.parametrize("options", [{"classifier": "cosine"}, {"num_classes": 9}, {}])
def test_one_of_several_classifiers_is_not_replaced(compute: Any, options: dict[str, Any]) -> None:
    with pytest.raises(SplitError, match=r"from more than one module: `fc` would be replaced"):
        RIDEWrapper(Net(compute), 2, fork_at="neck", **options).reset_classifier(9)


@pytest.mark.parametrize(
    "compute",
    [
        lambda net, h: net.fc(h) * net.scale,
        lambda net, h: nn.functional.normalize(net.fc(h), dim=1),
        lambda net, h: net.fc(h) / net.fc(h).norm(dim=1, keepdim=True),  # NaN of zeros
        lambda net, h: net.fc(h) * h.norm(dim=1, keepdim=True),
    ],
    ids=["scale", "normalised", "divided", "of each row"],
)
def test_what_is_computed_of_the_classifier_alone_stays(compute: Any) -> None:
    model = RIDEWrapper(Net(compute), 2, fork_at="neck", classifier="cosine", num_classes=9)
    assert [type(head) for head in model.classifiers] == [CosineClassifier] * 2
    x = torch.randn(3, 8)
    out = expert_logits(model(x))
    for k, expert in enumerate(model.experts):
        h = expert.neck(model.trunk.body(x).relu()).relu()
        torch.testing.assert_close(out[:, k], compute(expert, h))


def test_a_frozen_copy_of_the_classifier_is_not_taken_for_it() -> None:
    backbone = Net(lambda net, h: net.fc(h) + net.other(h).detach())
    backbone.other.load_state_dict(backbone.fc.state_dict())
    backbone.other.requires_grad_(False)
    model = RIDEWrapper(backbone, 2, fork_at="neck", init="copy")
    assert model.classifier_name == "fc"
    first, second = model.classifiers
    assert not torch.equal(first.weight, second.weight)
