"""Backbones that end in a softmax, a log-softmax or a sigmoid are told of; small logits are not."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin import RIDEWrapper


class Net(nn.Module):
    def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.late, self.fc = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fc(torch.relu(self.late(torch.relu(self.stem(x))))))


LAST: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "softmax": (lambda z: z.softmax(1), "probabilities: its rows sum to one.*softmax out of"),
    "sure of itself": (lambda z: (500 * z).softmax(1), "probabilities: its rows sum to one"),
    "log_softmax": (lambda z: z.log_softmax(1), "logarithms of.*CrossEntropyLoss in the place of"),
    "a module": (nn.LogSoftmax(1), "logarithms of probabilities.*what comes before log_softmax"),
    "sure logarithms": (lambda z: (500 * z).log_softmax(1), "logarithms of probabilities"),
    "sigmoid": (lambda z: z.sigmoid(), "ends in a sigmoid.*BCEWithLogitsLoss"),
    "sigmoids, saturated": (lambda z: (900 * z).sigmoid(), "ends in a sigmoid"),
    "reshaped": (lambda z: z[:, :, None].sigmoid().squeeze(2), "ends in a sigmoid"),
}


@pytest.mark.parametrize("what", LAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_are_told_of(what: str, dtype: torch.dtype) -> None:
    last, message = LAST[what]
    net = Net(last).to(dtype).requires_grad_(what != "sigmoid")  # frozen layers change nothing
    net.fc.requires_grad_(True)
    with pytest.warns(UserWarning, match=message) as record:
        RIDEWrapper(net, 2, num_classes=5)
    assert len([w for w in record if "The backbone returns" in str(w.message)]) == 1
    assert record[0].filename == __file__


@pytest.mark.parametrize("what", ["softmax", "log_softmax"])
def test_beside_something_else_they_are_no_features(what: str) -> None:
    last, message = LAST[what]
    net = Net(lambda z: (last(z), z.new_ones(len(z), 3, 3)))  # type: ignore[arg-type, return-value]
    with pytest.warns(UserWarning, match=message), pytest.warns(UserWarning, match="a tuple of 2"):
        model = RIDEWrapper(net, 2)
    assert model(torch.randn(4, 8)).shape == (4, 5)


LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda z: z,
    "small": lambda z: 0.01 * z + 0.5,
    "zeros": lambda z: 0 * z,
    "negative": lambda z: -z.abs(),
    "gated": lambda z: 8 * z.sigmoid() - 4,
    "of sigmoids, small": lambda z: z.sigmoid() * 0.5 + 0.1,
}


@pytest.mark.parametrize("what", LOGITS)
def test_logits_are_not(what: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RIDEWrapper(Net(LOGITS[what]), 2, num_classes=5)


class Prior(nn.Module):
    """Small logits of five classes, and the logarithms of their frequencies."""

    def __init__(self, how: str, std: float) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(std * torch.randn(5, 16))
        self.bias = nn.Parameter(torch.tensor([100.0, 5, 50, 2, 10]).div(167).log())

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "a convolution":
            return F.conv1d(x[..., None], self.weight[..., None], self.bias).flatten(1)
        if self.how == "an addition":
            return x @ self.weight.t() + self.bias
        return F.linear(x[:, None], self.weight, self.bias)[:, 0]


@pytest.mark.parametrize("how", ["a linear layer", "a convolution", "an addition"])
@pytest.mark.parametrize("std", [0.0, 1e-3])
def test_logits_near_logarithms_of_frequencies_are_not(how: str, std: float) -> None:
    net = Net(lambda z: z)
    net.fc = Prior(how, std)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RIDEWrapper(net, 2, num_classes=5, init="copy")
