"""In training mode the logits may lie elsewhere: what is taken there comes from the classifier."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ride_plugin import ReplayError, RIDEWrapper, SplitError

Shape = Callable[[Tensor, Tensor], Any]


class Net(nn.Module):
    """As many features as classes, so that no shape tells them apart.

    Args:
        evaluation, training: make what is returned in a mode of features and logits.
    """

    def __init__(self, evaluation: Shape, training: Shape, scale: float = 1.0) -> None:
        super().__init__()
        self.stem, self.late, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop = nn.Dropout()
        self.evaluation, self.training_output, self.scale = evaluation, training, scale

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.drop(torch.relu(self.late(torch.relu(self.stem(x)))))
        logits = self.fc(features)
        return features, logits if self.scale == 1 else logits * self.scale

    def forward(self, x: Tensor) -> Any:
        return (self.training_output if self.training else self.evaluation)(*self.both(x))


def pair(f: Tensor, z: Tensor) -> Any:
    return f, z


def swapped(f: Tensor, z: Tensor) -> Any:
    return z, f


def agree(net: Net, **options: Any) -> None:
    """The wrapped model with one expert returns the network's logits in both modes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The backbone returns a", UserWarning)
        model = RIDEWrapper(net, 1, fork_at="late", init="copy", **options)
    x = torch.randn(4, 6)
    for mode in (False, True):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "In training the backbone returns more")
            got = model.train(mode)(x)
        torch.manual_seed(1)
        torch.testing.assert_close(got, net.train(mode).both(x)[1])


@pytest.mark.parametrize(
    ("evaluation", "training"),
    [
        (swapped, pair),
        (lambda f, z: [z, f], lambda f, z: [f, z]),
        (lambda f, z: {"out": z, "aux": f}, lambda f, z: {"out": f, "aux": z}),
        (lambda f, z: {"out": z, "f": f[..., None]}, lambda f, z: {"out": z, "f": f}),
        (lambda f, z: (z, f[..., None]), lambda f, z: (f, z)),
    ],
)
def test_logits_and_features_may_change_places(evaluation: Shape, training: Shape) -> None:
    agree(Net(evaluation, training))


def test_logits_that_are_scaled_are_followed_to_another_place() -> None:
    net = Net(swapped, lambda f, z: (f.detach(), z), scale=16.0)
    net.fc = nn.Linear(8, 5)
    agree(net, num_classes=5)
    with pytest.raises(SplitError, match=r"output\[1\] there: let .* in both modes\. \(If"):
        RIDEWrapper(net, 1, fork_at="late", logits=0)


@pytest.mark.parametrize(
    ("scale", "options"), [(1.0, {}), (1.0, {"num_classes": 8}), (16.0, {"num_classes": 8})]
)
@pytest.mark.parametrize(
    ("evaluation", "training"),
    [
        (lambda f, z: z, lambda f, z: f),
        (lambda f, z: (z, f[..., None]), lambda f, z: (f, z[..., None])),
        (lambda f, z: {"logits": z}, lambda f, z: {"logits": f}),
        (lambda f, z: {"logits": z}, lambda f, z: {"logits": f, "other": z, "third": 2 * z}),
    ],
)
def test_features_in_the_place_of_logits_are_refused(
    evaluation: Shape, training: Shape, options: dict[str, Any], scale: float
) -> None:
    net = Net(evaluation, training, scale)
    with pytest.raises(SplitError, match=r"not computed by the classifier `fc`.*Pass `logits=`"):
        RIDEWrapper(net, 2, fork_at="late", **options)


def test_an_index_that_is_of_features_in_training_is_refused() -> None:
    net = Net(swapped, pair)
    with pytest.raises(SplitError, match=r"seem to be output\[1\].*or leave `logits=` out\."):
        RIDEWrapper(net, 2, fork_at="late", logits=0)
    agree(net)


def test_a_function_is_believed() -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__(pair, pair)
            self.second = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Any:
            features, logits = self.both(x)
            return self.second(features) if self.training else logits

    net = Two()
    with pytest.raises(SplitError, match=r"another classifier in training, a function, `log"):
        RIDEWrapper(net, 1, fork_at="late")
    assert RIDEWrapper(net, 1, fork_at="late", logits=lambda output: output).num_classes == 8


class Margin(Net):
    """Takes the classifier's weight by itself in training, as margin losses have it."""

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = super().both(x)
        if self.training:
            logits = 16 * F.linear(F.normalize(features), F.normalize(self.fc.weight))
        return features, logits


class Mean(Net):
    """The mean of two classifiers, and one of them alone in training."""

    def __init__(self, evaluation: Shape, training: Shape) -> None:
        super().__init__(evaluation, training)
        self.second = nn.Linear(8, 8)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = super().both(x)
        second = self.second(features)
        return features, logits if self.training else (logits + second) / 2


class Recomputed(Net):
    """The classifier inside a checkpoint, whose graph does not show what it reads."""

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(self.late(torch.relu(self.stem(x))))
        return features, checkpoint(lambda f: 2 * self.fc(f), features, use_reentrant=True)


class Frozen(Net):
    """Takes no gradients at all."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


@pytest.mark.parametrize("kind", [Net, Margin, Mean, Recomputed, Frozen])
@pytest.mark.parametrize("training", [lambda f, z: z, lambda f, z: {"logits": z, "f": f}])
@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad")
def test_logits_that_are_computed_otherwise_in_training_are_taken(
    kind: type[Net], training: Shape
) -> None:
    agree(kind(lambda f, z: z, training))


class Distilled(nn.Module):
    """Two heads in training, their mean in evaluation: LeViT, DeiT with distillation.

    Args:
        training: makes what is returned in training of what the heads return, and of features.
        last: whether the head that comes first in what is returned is called last.
    """

    def __init__(self, training: Callable[..., Any], last: bool = False) -> None:
        super().__init__()
        self.stem, self.late = nn.Linear(6, 8), nn.Linear(8, 8)
        self.head, self.head_dist = nn.Linear(8, 5), nn.Linear(8, 5)
        self.training_output, self.last = training, last

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.late(torch.relu(self.stem(x))))
        names = ("head_dist", "head") if self.last else ("head", "head_dist")
        made = {name: self.get_submodule(name)(x) for name in names}
        if self.training:
            return self.training_output(made["head"], made["head_dist"], x)
        return (made["head"] + made["head_dist"]) / 2


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "training",
    [lambda a, b, f: (a, b), lambda a, b, f: [f, b, a], lambda a, b, f: {"out": a, "dist": b}],
)
def test_one_of_two_heads_is_not_chosen_where_evaluation_takes_their_mean(
    training: Callable[..., Any], last: bool
) -> None:
    """The other one would never train. The message says how both do."""
    net = Distilled(training, last)
    together = r"not certain.*from `head(_dist)?`, `head(_dist)?` together.*`logits=lambda"
    with pytest.raises(SplitError, match=together) as error:
        RIDEWrapper(net, 2, fork_at="late")
    code = str(error.value).split("`logits=lambda")[1].split("`")[0]
    model = RIDEWrapper(net, 1, fork_at="late", init="copy", logits=eval(f"lambda{code}"))
    x = torch.randn(4, 6)
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), net.eval()(x))
    model.train()(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.experts[0].parameters())


def test_a_single_classifier_is_found_where_evaluation_takes_no_gradients() -> None:
    """The pass of evaluation does not tell what scaled logits are computed from."""
    net = Net(lambda f, z: z.detach() / 2, lambda f, z: {"f": f, "z": z})
    net.fc = nn.Linear(8, 5)
    model = RIDEWrapper(net, 1, fork_at="late", init="copy").train()
    x = torch.randn(4, 6)
    net.drop.p = model.get_submodule("experts.0.drop").p = 0.0
    torch.testing.assert_close(model(x), net.train()(x)["z"])


def test_several_matrices_are_taken_where_one_classifier_alone_returns_one() -> None:
    """Though evaluation returns something computed of it, and a hidden layer is as wide."""
    net = Net(lambda f, z: z.log_softmax(1), lambda f, z: {"f": f, "z": z})
    with pytest.warns(UserWarning, match="probabilities"):
        model = RIDEWrapper(net, 1, fork_at="late", init="copy")
    x = torch.randn(4, 6)
    torch.manual_seed(1)
    got = model.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(got, net.train()(x)["z"])


@pytest.mark.parametrize(
    ("evaluation", "logits"),
    [
        (lambda f, z: f, lambda output: output[0] if isinstance(output, tuple) else output),
        (lambda f, z: (f, z), 0),
        (lambda f, z: {"logits": f}, None),
    ],
)
def test_features_in_evaluation_beside_logits_in_training_are_refused(
    evaluation: Shape, logits: Any
) -> None:
    """As re-identification has it. The first step of training failed."""
    training = (lambda f, z: {"logits": z, "f": f}) if logits is None else swapped
    net = Net(evaluation, training)
    net.fc = nn.Linear(8, 5)
    with pytest.raises(SplitError, match=r"has 5 columns in training and 8 in evaluation: .*both"):
        RIDEWrapper(net, 2, fork_at="late", logits=logits, num_classes=8)
    net.evaluation = net.training_output = lambda f, z: z
    model = RIDEWrapper(net, 1, fork_at="late", init="copy")
    x = torch.randn(4, 6)
    features = model.router_inputs(x).expert_features[:, 0]
    torch.testing.assert_close(features, net.eval().both(x)[0])


class Flag(Net):
    """Returns features in the place of logits where somebody asks for them."""

    def forward(self, x: Tensor, feat: bool = False, flat: bool = False) -> Any:
        features, logits = self.both(x)
        return features.flatten(1) if flat else features if feat else logits


@pytest.mark.parametrize("mode", [False, True])
def test_a_flag_that_returns_what_the_classifier_received_is_refused(mode: bool) -> None:
    model = RIDEWrapper(Flag(pair, pair), 2, fork_at="late").train(mode)
    x = torch.randn(4, 6)
    assert model(x).shape == (4, 8)
    for flag in ("feat", "flat"):
        with pytest.raises(ReplayError, match=r"what its classifier received.*router_inputs"):
            model(x, **{flag: True})
    assert model(x[:0]).shape == (0, 8)


def test_a_classifier_that_hands_its_input_on_or_changes_it_in_place_is_no_fault() -> None:
    class Calibrated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.late = nn.Linear(6, 8), nn.Linear(8, 8)
            self.weight, self.last = nn.Parameter(torch.randn(5, 8)), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            logits = F.linear(torch.relu(self.late(torch.relu(self.stem(x)))), self.weight)
            logits += self.last(logits)
            return logits

    x = torch.randn(4, 6)
    assert RIDEWrapper(Calibrated(), 2, fork_at="late")(x).shape == (4, 5)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = RIDEWrapper(net, 2, fork_at="2", classifier=lambda features, classes: nn.Identity())
    assert model(x).shape == (4, 8)
