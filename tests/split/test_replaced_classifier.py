"""What a classifier had that is replaced, and the new one has not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin import RIDEWrapper
from ride_plugin.longtail import CosineClassifier


class Cosine(nn.Module):
    """Cosines between features and class weights, which stand in the columns, times a scale."""

    def __init__(self, in_features: int, num_classes: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(in_features, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.normalize(x, dim=1) @ F.normalize(self.weight, dim=0)


def net(head: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), head)


@pytest.mark.parametrize("classes", [5, 16])
def test_cosines_that_get_a_scale_are_warned_of(classes: int) -> None:
    with pytest.warns(
        UserWarning, match=r"`4` \(Cosine\) returns cosines times 1, and .* times 30"
    ):
        model = RIDEWrapper(net(Cosine(16, classes)), 2, classifier="cosine")
    assert type(model.classifiers[0]) is CosineClassifier


@pytest.mark.parametrize("head", [nn.Linear(16, 5), Cosine(16, 5, 30.0), CosineClassifier(16, 5)])
def test_what_is_no_cosine_or_has_that_scale_is_replaced_without_a_word(head: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RIDEWrapper(net(head), 2, classifier="cosine")
        RIDEWrapper(
            net(Cosine(16, 5)), 2, classifier=lambda d, c: CosineClassifier(d, c, scale=1.0)
        )


@pytest.mark.parametrize("options", [{"classifier": "cosine"}, {"num_classes": 7}])
def test_hooks_of_a_classifier_that_is_replaced_are_warned_of(options: dict[str, object]) -> None:
    def normalise(module: Any, *_: object) -> None:
        with torch.no_grad():
            module.weight.div_(module.weight.norm(dim=1, keepdim=True))

    def backbone() -> nn.Sequential:
        network = net(nn.Linear(16, 5))
        network[4].register_full_backward_hook(normalise)
        return network

    with pytest.warns(UserWarning, match=r"`4` has hooks \(`.*normalise`\).*`model.classifiers`"):
        RIDEWrapper(backbone(), 2, **options)  # type: ignore[arg-type]
    model = RIDEWrapper(backbone(), 2)  # each expert's classifier has the hook
    F.cross_entropy(model(torch.randn(4, 8)), torch.arange(4)).backward()
    classifiers: Any = model.classifiers
    for classifier in classifiers:
        torch.testing.assert_close(classifier.weight.norm(dim=1), torch.ones(5))
