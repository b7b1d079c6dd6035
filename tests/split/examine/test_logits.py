"""Which output is the logits: found where it is certain, asked for where not, checked at calls."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin import (
    ArgumentError,
    ReplayError,
    RIDEError,
    RIDEWrapper,
    SplitError,
    expert_logits,
)


class Net(nn.Module):
    """Features of 16, logits of 5, returned as ``shape`` says."""

    def __init__(self, shape: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.late, self.fc = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.shape = shape

    def forward(self, x: Tensor) -> Any:
        features = torch.relu(self.late(torch.relu(self.stem(x))))
        return self.shape(features, self.fc(features))


class Twice(nn.Module):
    """Two heads on the same features, as contrastive learning has them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.late = nn.Linear(8, 16), nn.Linear(16, 16)
        self.project, self.fc = nn.Linear(16, 12), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.late(torch.relu(self.stem(x))))
        return {"projection": self.project(x), "out": self.fc(x)}


class Cosine(nn.Module):
    """Returns an embedding, which is a layer's result, and logits, which no module returns."""

    def __init__(self, detached: bool = False) -> None:
        super().__init__()
        self.stem, self.embed = nn.Linear(8, 16), nn.Linear(16, 12)
        self.centres = nn.Parameter(torch.randn(5, 12))
        self.detached = detached

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(torch.relu(self.stem(x)))
        logits = 16 * F.linear(F.normalize(x), F.normalize(self.centres))
        return (x.detach() if self.detached else x), logits


def indexing_is_told_of(net: nn.Module) -> Any:
    """A warning where the backbone returns what code indexes, in evaluation mode."""
    output = net.eval()(torch.randn(2, 8))
    net.train()
    if not isinstance(output, tuple | list):
        return nullcontext()
    kind = "named tuple" if hasattr(output, "_fields") else type(output).__name__
    return pytest.warns(UserWarning, match=rf"a {kind} of {len(output)}.*`model\(x\)\[0\]`")


@pytest.mark.parametrize(
    "shape",
    [
        lambda f, z: z,
        lambda f, z: (f, z),
        lambda f, z: (z, f),
        lambda f, z: [f, {"maps": f[:, :, None, None]}, z],
        lambda f, z: (f, {"logits": z}),
        lambda f, z: {"features": f, "out": z},
        lambda f, z: {"logits": z, "features": f, "again": 2 * z},
        lambda f, z: {"out": z, "maps": f[:, :, None, None]},
    ],
)
def test_logits_are_found_wherever_they_lie(shape: Callable[[Tensor, Tensor], Any]) -> None:
    net = Net(shape)
    with indexing_is_told_of(net):
        model = RIDEWrapper(net, 2, fork_at="late", init="copy")
    assert model.num_classes == 5
    assert model.feature_dim == 16
    assert model.classifiers == tuple(expert.fc for expert in model.experts)
    x = torch.randn(6, 8)
    for k, expert in enumerate(model.experts):
        state = {**net.state_dict()}
        state |= {f"fc.{name}": tensor for name, tensor in expert.fc.state_dict().items()}
        plain = Net(lambda f, z: z)
        plain.load_state_dict(state)
        torch.testing.assert_close(expert_logits(model(x))[:, k], plain(x))
    model(x).sum().backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in model.classifiers)


class Named(NamedTuple):
    features: Tensor
    scores: Tensor


@pytest.mark.parametrize(
    ("shape", "answer"),
    [
        (lambda f, z: (z, f), "`logits=0`"),
        (lambda f, z: [f, z], "`logits=1`"),
        (lambda f, z: (z,), "`logits=0`"),
        (lambda f, z: Named(f, z), "`logits='scores'`"),
        (lambda f, z: (f, {"out": [z]}), "`logits=lambda output: output[1]['out'][0]`"),
    ],
)
def test_code_that_indexes_a_tuple_is_told_that_it_would_get_rows(
    shape: Callable[[Tensor, Tensor], Any], answer: str
) -> None:
    """Once, at wrapping; and the answer that the warning names gives the same model."""
    net = Net(shape)
    with pytest.warns(UserWarning, match="their first row.*`logits = model") as record:
        model = RIDEWrapper(net, 2, init="copy")
    assert len(record) == 1
    assert record[0].filename == __file__
    assert f"Pass {answer} to say" in str(record[0].message)
    options = eval(f"dict({answer[1:-1]})")
    x = torch.randn(6, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = RIDEWrapper(net, 2, init="copy", **options)
        same.load_state_dict(model.state_dict())
        for mode in (True, False):
            torch.testing.assert_close(same.train(mode)(x), model.train(mode)(x))
        assert RIDEWrapper(net, 2, return_experts=True)(x)[0].shape == (6, 5)  # as code has it
    with pytest.warns(UserWarning, match="first row"):  # in evaluation mode it returns the logits
        RIDEWrapper(net, 2, return_experts="training")


def test_the_answer_holds_in_training_mode_too() -> None:
    class More(Net):
        def forward(self, x: Tensor) -> Any:
            features, logits = super().forward(x)
            return (features, features.tanh(), logits) if self.training else (logits, features)

    net, x = More(lambda f, z: (f, z)), torch.randn(4, 8)
    with pytest.warns(UserWarning, match="Pass `logits=`, a function of the output, to say"):
        model = RIDEWrapper(net, 1)
    torch.testing.assert_close(model(x), net(x)[2])
    torch.testing.assert_close(model.eval()(x), net.eval()(x)[0])


@pytest.mark.parametrize(
    "backbone", [Twice, Cosine, lambda: Cosine(True), lambda: Net(lambda f, z: (z, z.softmax(1)))]
)
def test_what_is_not_certain_is_asked_for(backbone: Callable[[], nn.Module]) -> None:
    with pytest.raises(SplitError, match=r"is the logits.*\[2, 5\].*Pass `logits=`: an index"):
        RIDEWrapper(backbone(), 2)


@pytest.mark.parametrize(
    ("backbone", "logits"),
    [
        (Twice, "out"),
        (Twice, lambda output: output["out"]),
        (Cosine, 1),
        (Cosine, -1),
        (lambda: Net(lambda f, z: (z, z.softmax(1))), 0),
        (lambda: Net(lambda f, z: z.view(-1, 5, 1)), lambda output: output.flatten(1)),
    ],
)
def test_the_answer_settles_it(backbone: Callable[[], nn.Module], logits: Any) -> None:
    net = backbone()
    x = torch.randn(4, 8)
    output = net(x)
    expected = logits(output) if callable(logits) else output[logits]
    model = RIDEWrapper(net, 1, logits=logits)
    assert model.num_classes == 5
    torch.testing.assert_close(model(x), expected)
    assert type(model.to_module()(x)) is type(output)  # the way back returns what it returned
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)


class Beside(Net):
    """Returns a number for each sample after the logits, as the loss of IB takes it."""

    def forward(self, x: Tensor) -> Any:
        features = torch.relu(self.late(torch.relu(self.stem(x))))
        return self.shape(self.fc(features), features.abs().sum(1, keepdim=True))


class Summed(nn.Module):
    """Three heads of one layer, of which the sum decides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.late, self.fc = nn.Linear(8, 16), nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = torch.relu(self.late(torch.relu(self.stem(x)))).chunk(3, 1)
        return tuple(map(self.fc, parts))


@pytest.mark.parametrize(
    ("net", "example"),
    [
        (Beside(lambda z, n: (z, n)), "`logits=0`"),
        (Beside(lambda z, n: (n, z)), "`logits=1`"),
        (Beside(lambda z, n: {"out": z, "norm": n}), "`logits='out'`"),
        (Twice(), None),  # two layers returned one each
        (Summed(), None),
        (Cosine(), None),  # the layer returned what the logits are computed from
        (Cosine(True), None),
        (Net(lambda f, z: (2 * z, f, f.tanh())), None),
    ],
)
def test_an_example_is_given_if_one_entry_alone_comes_from_a_classifier(
    net: nn.Module, example: str | None
) -> None:
    """The last matrix was proposed, which may be anything."""
    with pytest.raises(SplitError, match=r"is the logits.*Pass `logits=`: an index") as error:
        RIDEWrapper(net, 2)
    text = str(error.value)
    assert ("for example" in text) == (example is not None)
    unpacked = isinstance(net(torch.randn(2, 8)), tuple)
    assert ("write `logits = model(x)` where" in text) == unpacked
    if example is not None:
        assert f"for example {example}." in text
        assert RIDEWrapper(net, 2, **eval(f"dict({example[1:-1]})")).num_classes == 5


def test_the_list_of_candidates_has_their_shapes() -> None:
    with pytest.raises(SplitError) as error:
        RIDEWrapper(Twice(), 2)
    assert "output['projection'] of shape [2, 12], output['out'] of shape [2, 5]" in str(
        error.value
    )
    assert RIDEWrapper(Twice(), 2, logits="out").num_classes == 5
    assert RIDEWrapper(Twice(), 2, num_classes=5).num_classes == 5  # only one of them has five


@pytest.mark.parametrize("num_classes", [None, 2, 5])
def test_one_column_is_no_classification(num_classes: int | None) -> None:
    single = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
                           nn.Linear(16, 1))  # fmt: skip
    match = r"one column of a torch.float32 tensor of shape \[2, 1\].*two outputs, `nn.Linear"
    for net in (single, nn.Sequential(single, nn.Sigmoid())):
        with pytest.raises(SplitError, match=match):
            RIDEWrapper(net, 2, num_classes=num_classes)
    with pytest.raises(SplitError, match=r"one column of a tuple.*or pass another `logits=`"):
        RIDEWrapper(Beside(lambda z, n: (z, n)), 2, logits=1, num_classes=num_classes)


@pytest.mark.parametrize("logits", ["none", 2, lambda output: output["out"].unsqueeze(0)])
def test_a_wrong_answer_is_refused(logits: Any) -> None:
    with pytest.raises(SplitError, match="pass another `logits=`"):
        RIDEWrapper(Twice(), 2, logits=logits)


@pytest.mark.parametrize("logits", [1.0, True, ["out"]])
def test_an_answer_of_another_kind_is_refused(logits: Any) -> None:
    with pytest.raises(ArgumentError, match="`logits` to be None, an index, a key or a function"):
        RIDEWrapper(Twice(), 2, logits=logits)


class Auxiliary(Net):
    """Another head in training, first in what comes back."""

    def __init__(self, inside: bool = True) -> None:
        super().__init__(lambda f, z: z)
        self.auxiliary = nn.Linear(16, 5)
        self.inside = inside

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.stem(x))
        auxiliary = self.auxiliary(x)
        logits = self.fc(torch.relu(self.late(x)))
        logits = logits if self.inside else F.linear(x, self.fc.weight)
        return (auxiliary, logits) if self.training else logits


def test_auxiliary_heads_in_training_are_told_from_the_classifier() -> None:
    net = Auxiliary()
    model = RIDEWrapper(net, 1)
    x = torch.randn(4, 8)
    with pytest.warns(UserWarning, match=r"output\[0\]"):  # the heads are not learned
        torch.testing.assert_close(model(x), net(x)[1])
    torch.testing.assert_close(model.eval()(x), net.eval()(x))


def test_auxiliary_heads_that_cannot_be_told_are_asked_for() -> None:
    with pytest.raises(SplitError, match="In training mode the backbone returns something else"):
        RIDEWrapper(Auxiliary(inside=False), 1)
    net = Auxiliary(inside=False)
    model = RIDEWrapper(net, 1, logits=1)
    x = torch.randn(4, 8)
    with pytest.warns(UserWarning, match=r"output\[0\]"):
        torch.testing.assert_close(model(x), net(x)[1])


def extractor(*last: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), *last
    )


@pytest.mark.parametrize(
    "last",
    [
        (nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(16)),
        (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 64), nn.ReLU(inplace=True)),
        (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Dropout()),
    ],
)
def test_a_feature_extractor_is_no_classifier(last: tuple[nn.Module, ...]) -> None:
    with pytest.raises(SplitError, match=r"looks like a feature extractor.*from_pair.*num_classes"):
        RIDEWrapper(extractor(*last), 2)


def test_embeddings_of_length_one_are_no_logits() -> None:
    class Embedding(Net):
        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(super().forward(x), dim=1)

    with pytest.raises(SplitError, match=r"looks like a feature extractor.*`num_classes=5`"):
        RIDEWrapper(Embedding(lambda f, z: z), 2)
    assert RIDEWrapper(Embedding(lambda f, z: z), 2, num_classes=5).num_classes == 5


def test_a_structured_output_without_logits_is_no_classifier() -> None:
    class Pooler(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"hidden": x[:, None], "pooler": torch.tanh(self.late(torch.relu(self.stem(x))))}

    with pytest.raises(SplitError, match="looks like a feature extractor"):
        RIDEWrapper(Pooler(lambda f, z: z), 2)


def test_a_convolutional_classifier_is_confirmed_by_its_number_of_classes() -> None:
    def net() -> nn.Module:  # as SqueezeNet ends; a feature extractor may end so, too
        return extractor(nn.ReLU(), nn.Conv2d(16, 7, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten())  # fmt: skip

    with pytest.raises(SplitError, match="If these are logits, pass `num_classes=7`"):
        RIDEWrapper(net(), 2)
    assert RIDEWrapper(net(), 2, num_classes=7).num_classes == 7
    said = net()
    said.num_classes = 7  # as torchvision's has it
    assert RIDEWrapper(said, 2).num_classes == 7


def test_class_weights_used_by_a_function_are_a_classifier() -> None:
    class Functional(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.late(torch.relu(self.stem(x))))
            return 16 * F.linear(F.normalize(x), F.normalize(self.fc.weight))

    model = RIDEWrapper(Functional(lambda f, z: z), 2, fork_at="late")
    assert model.classifiers == ()
    assert model.num_classes == 5


class Weights(nn.Module):
    """Ends in a function of a bare matrix, or has one that is something else."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], *sizes: int) -> None:
        super().__init__()
        self.use, self.matrix = use, nn.Parameter(torch.randn(*sizes))
        self.stem, self.late, self.norm = nn.Linear(8, 16), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.norm(self.late(torch.relu(self.stem(x)))), self.matrix)


class Early(Weights):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.late(self.use(torch.relu(self.stem(x)), self.matrix)).mean(1))


def attended(tokens: Tensor, queries: Tensor) -> Tensor:
    return torch.softmax(queries @ tokens.mT, -1) @ tokens


@pytest.mark.parametrize(
    ("use", "sizes"), [(torch.add, (12, 16)), (attended, (4, 16)), (lambda x, m: x, (9, 16))]
)
def test_a_table_as_wide_as_the_features_does_not_make_them_logits(
    use: Callable[[Tensor, Tensor], Tensor], sizes: tuple[int, int]
) -> None:
    with pytest.raises(SplitError, match=r"looks like a feature extractor.*`num_classes=16`"):
        RIDEWrapper(Early(use, *sizes), 2, example_input=torch.randn(2, 12, 8))


def distances(x: Tensor, prototypes: Tensor) -> Tensor:
    return -torch.cdist(x, prototypes)


@pytest.mark.parametrize(("use", "sizes"), [(torch.matmul, (16, 5)), (distances, (5, 16))])
def test_a_matrix_with_weights_of_each_class_is_a_classifier(
    use: Callable[[Tensor, Tensor], Tensor], sizes: tuple[int, int]
) -> None:
    model = RIDEWrapper(Weights(use, *sizes), 2, fork_at="late", example_input=torch.randn(2, 8))
    assert model.num_classes in sizes
    assert model.classifier_name is None


def test_a_classifier_with_parametrised_weights_is_found() -> None:
    net = Net(lambda f, z: z)
    nn.utils.parametrizations.weight_norm(net.fc)
    model = RIDEWrapper(net, 2, init="copy")
    assert model.classifier_name == "fc"
    assert model.feature_dim == 16


def linear_net(**kwargs: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
                         nn.Linear(16, 5, **kwargs))  # fmt: skip


@pytest.mark.parametrize("init", ["fresh", "copy"])
@pytest.mark.parametrize("num_experts", [1, 3])
def test_another_number_of_classes_makes_the_classifiers_anew(init: Any, num_experts: int) -> None:
    net = linear_net(bias=False)
    model = RIDEWrapper(net, num_experts, init=init, num_classes=11)
    assert model.num_classes == 11
    assert net[4].weight.shape == (5, 16)  # the backbone keeps its own
    for head in model.classifiers:
        assert type(head) is nn.Linear
        assert head.weight.shape == (11, 16)
        assert head.bias is None
    x = torch.randn(4, 8)
    assert expert_logits(model(x)).shape == (4, num_experts, 11)
    assert model.router_inputs(x).expert_features.shape == (4, num_experts, 16)
    if init == "copy":
        assert torch.equal(model.trunk[0].weight, net[0].weight)
        assert all(torch.equal(e[2].weight, net[2].weight) for e in model.experts)
    assert model.to_module(0)(x).shape == (4, 11)


def test_the_number_of_classes_goes_with_another_kind_of_classifier() -> None:
    model = RIDEWrapper(linear_net(), 2, classifier="cosine", num_classes=7)
    assert [type(head).__name__ for head in model.classifiers] == ["CosineClassifier"] * 2
    assert model(torch.randn(3, 8)).shape == (3, 7)
    narrow = RIDEWrapper(linear_net(), 2, fork_at="2", expert_width=0.5, num_classes=7)
    assert narrow.classifiers[0].weight.shape == (7, 8)


def test_the_number_of_classes_is_checked() -> None:
    assert RIDEWrapper(linear_net(), 2, num_classes=5).num_classes == 5
    for wrong in (1, 2.5, True, "5"):
        with pytest.raises(ArgumentError, match="`num_classes` to be an integer >= 2"):
            RIDEWrapper(linear_net(), 2, num_classes=wrong)  # type: ignore[arg-type]
    with pytest.raises(SplitError, match=r"`num_classes` to be the backbone's own number, 16.*10"):
        RIDEWrapper(extractor(nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                              nn.Flatten()), 2, num_classes=10)  # fmt: skip
    with pytest.raises(SplitError, match=r"linear layer that `num_classes=` can replace"):
        RIDEWrapper(extractor(nn.Conv2d(16, 5, 7), nn.Flatten()), 2, num_classes=9,
                    example_input=torch.randn(2, 3, 32, 32))  # fmt: skip


def test_a_classifier_function_with_the_wrong_number_of_outputs_is_refused() -> None:
    with pytest.raises(SplitError, match=r"5 classes, but they return 16"):
        RIDEWrapper(linear_net(), 2, classifier=lambda features, classes: nn.Linear(16, 16))
    with pytest.raises(ArgumentError, match="`classifier` to return a torch"):
        RIDEWrapper(linear_net(), 2, classifier=lambda features, classes: None)  # type: ignore


class Flags(nn.Module):
    """Called by flags, as some codebases do: features first, then the classifier on them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.late, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.same = nn.Linear(8, 5)

    def forward(self, x: Tensor, features: bool = False, other: bool = False) -> Tensor:
        x = torch.relu(self.late(torch.relu(self.stem(x))))
        if features:
            return x
        return self.same(x) if other else self.fc(x)


class Structured(nn.Module):
    """Returns names with what they stand for, or a tuple where a call asks for one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.late, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        return_dict: bool = True,
        features: bool = False,
    ) -> Any:
        hidden = torch.relu(self.late(torch.relu(self.stem(x))))
        output = {"logits": self.fc(hidden), "maps": hidden[:, :, None]}
        if labels is not None:
            output = {"loss": F.cross_entropy(output["logits"], labels), **output}
        if features:
            output["features"] = hidden
        return output if return_dict else tuple(output.values())


@pytest.mark.parametrize("training", [False, True])
def test_a_key_holds_where_a_call_asks_for_a_tuple(training: bool) -> None:
    model = RIDEWrapper(Structured(), 2, fork_at="late", logits="logits").train(training)
    x, labels = torch.randn(4, 8), torch.arange(4)
    expected = model(x)
    torch.testing.assert_close(model(x, return_dict=False), expected)
    torch.testing.assert_close(expert_logits(model(x, return_dict=False)), expert_logits(expected))
    with pytest.warns(UserWarning, match="returned a `loss`"):
        out = model(x, labels)  # labelled, so that the warning comes with it
    torch.testing.assert_close(out, expected)
    again = copy.deepcopy(model)
    # In training gradients tell of a loss that has no name, once for each kind of call.
    told = pytest.warns(UserWarning, match=r"flow through, `output\[0\]`")
    with told if training else nullcontext():
        torch.testing.assert_close(model(x, labels, return_dict=False), expected)
    if not training:
        with pytest.warns(UserWarning, match="returned a `loss`"):
            again(x, labels, return_dict=False)
    with pytest.raises(ReplayError, match=r"not certain: a tuple with output\[0\].*output\[2\]"):
        model(x, return_dict=False, features=True)


class OfAnotherName(Structured):
    def forward(self, x: Tensor, return_dict: bool = True, features: bool = False) -> Any:
        output = super().forward(x, features=features)
        output = {"maps": output["maps"], "out": output.pop("logits"), **output}
        return output if return_dict else list(output.values())


def test_any_key_that_the_output_had_holds_where_a_call_asks_for_a_list() -> None:
    model = RIDEWrapper(OfAnotherName(), 2, fork_at="late", logits="out")
    x = torch.randn(4, 8)
    torch.testing.assert_close(model(x, return_dict=False), model(x))
    serves_both = r"A list has no name 'out'\. .* else output\['out'\]`"
    with pytest.raises(ReplayError, match=rf"not certain: a list .*{serves_both}"):
        model(x, return_dict=False, features=True)


def test_a_loss_in_a_tuple_that_a_call_asks_for_is_told_of() -> None:
    model = RIDEWrapper(Structured(), 2, fork_at="late", logits="logits")
    with pytest.warns(UserWarning, match=r"gradients flow through, `output\[0\]`"):
        model(torch.randn(4, 8), torch.arange(4), return_dict=False)


def test_a_key_says_nothing_of_a_tuple_where_it_is_another_than_logits() -> None:
    net = Net(lambda f, z: (z, f[:, :, None, None]))
    assert RIDEWrapper(net, 2, logits="logits").num_classes == 5
    with pytest.raises(SplitError, match="pass another `logits=`"):
        RIDEWrapper(net, 2, logits="out")


@pytest.mark.parametrize("flag", ["features", "other"])
@pytest.mark.parametrize("checkpoint_experts", [False, True])
def test_flags_that_leave_the_classifier_out_are_refused(
    flag: str, checkpoint_experts: bool
) -> None:
    model = RIDEWrapper(Flags(), 2, fork_at="late", checkpoint_experts=checkpoint_experts)
    x = torch.randn(4, 8)
    assert model(x).shape == (4, 5)
    trained = {  # a module that never ran is told first
        "features": r"its classifier did not run.*router_inputs",
        "other": r"`same` runs behind the fork, where it did not run",
    }
    with pytest.raises(RIDEError, match=trained[flag]):
        model(x, **{flag: True})
    with pytest.raises(RIDEError, match="its classifier did not run"):
        model.router_inputs(x, **{flag: True})
    assert model(x).shape == (4, 5)


class HasModes(nn.Module):
    """Returns logits, or a dictionary of losses, as the models of mmpretrain do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, target: Tensor | None = None, mode: str = "tensor") -> Any:
        logits = self.fc(torch.relu(self.stem(x)))
        if mode == "tensor" or target is None:
            return logits
        return {"loss": F.cross_entropy(logits, target)}


@pytest.mark.parametrize("training", [False, True])
def test_a_call_that_asks_for_losses_alone_is_told_how_to_call_it(training: bool) -> None:
    model = RIDEWrapper(HasModes(), 2, fork_at="fc").train(training)
    x, target = torch.randn(4, 8), torch.arange(4)
    with pytest.raises(ReplayError, match=r"a dict without.*Call the model as when.*the loss of"):
        model(x, target, mode="loss")
    assert expert_logits(model(x, target)).shape == (4, 2, 5)


def test_a_classifier_replaced_by_one_of_other_size_is_noticed() -> None:
    model = RIDEWrapper(linear_net(), 2)
    for expert in model.experts:
        expert[4] = nn.Linear(16, 9)
    with pytest.raises(RIDEError, match=r"\[4, 9\], where logits of 5 classes.*num_classes="):
        model(torch.randn(4, 8))


def test_a_compiled_backbone_is_taken_as_it_was_before() -> None:
    net = linear_net()
    compiled = torch.compile(net, backend="eager")
    with pytest.warns(UserWarning, match="compile the wrapped model instead"):
        model = RIDEWrapper(compiled, 2, init="copy")
    plain = RIDEWrapper(net, 2, init="copy")
    assert model.fork_at == plain.fork_at
    assert list(model.state_dict()) == list(plain.state_dict())
    net.load_state_dict(model.to_module(1).state_dict())
    x = torch.randn(4, 8)
    torch.testing.assert_close(expert_logits(model(x))[:, 1], net(x))


def test_a_compiled_backbone_with_a_forward_of_its_own_is_taken_as_it_was_before() -> None:
    """Its compiled forward holds on to the module, which is no reason to refuse it."""
    net = Net(lambda features, logits: logits)
    with pytest.warns(UserWarning, match="compile the wrapped model instead"):
        model = RIDEWrapper(torch.compile(net, backend="eager"), 2)
    assert list(model.state_dict()) == list(RIDEWrapper(net, 2).state_dict())


def test_a_compiled_part_is_taken_as_it_was_before() -> None:
    net = nn.Sequential(linear_net()[:2], linear_net()[2:])
    names = list(net.state_dict())
    net[0] = torch.compile(net[0], backend="eager")
    with pytest.warns(UserWarning, match="compile the wrapped model instead"):
        model = RIDEWrapper(net, 1)
    assert list(model.to_module().state_dict()) == names
    assert type(net[0]).__name__ == "OptimizedModule"  # the backbone keeps it


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["", "0", "1"])
def test_what_compile_changed_in_place_is_taken_as_it_was_before(name: str) -> None:
    net = nn.Sequential(linear_net()[:2], linear_net()[2:]).eval()
    net.get_submodule(name).compile(backend="eager")
    net(torch.randn(4, 8))
    with pytest.warns(UserWarning, match="compile the wrapped model instead"):
        model = RIDEWrapper(net, 2, init="copy").eval()
    x = torch.randn(4, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # not what a compiled call of the original would read
    wanted = torch.stack([module(x) for module in model.to_modules()], dim=1)
    torch.testing.assert_close(expert_logits(model(x)), wanted)


@pytest.mark.compiles
def test_a_copy_of_a_model_that_was_compiled_in_place_runs_its_own_weights() -> None:
    model = RIDEWrapper(linear_net(), 2).eval()
    x = torch.randn(4, 8)
    model.compile(backend="eager")
    wanted = model(x)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not copied(x).any()
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["trunk", "trunk.0", "experts.1", "experts.1.1"])
def test_a_part_that_is_compiled_by_itself_after_wrapping_is_refused(name: str) -> None:
    net = nn.Sequential(linear_net()[:2], linear_net()[2:])
    model = RIDEWrapper(net, 2, fork_at="1").eval()
    model.get_submodule(name).compile(backend="eager")
    with pytest.raises(ReplayError, match=r"compiled by itself.*`torch.compile\(model\)`"):
        model(torch.randn(4, 8))


@pytest.mark.compiles
@pytest.mark.parametrize("index", [0, 1])
def test_an_expert_in_whose_place_its_compiled_form_stands_is_refused(index: int) -> None:
    model = RIDEWrapper(linear_net(), 2, fork_at="2").eval()
    model.experts[index] = torch.compile(model.experts[index], backend="eager")
    with pytest.raises(
        ReplayError, match=rf"`experts.{index}` \(Sequential\) is compiled by itself"
    ):
        model(torch.randn(4, 8))


@pytest.mark.parametrize("inside", [False, True])
def test_wrapping_what_was_made_parallel_names_the_right_order(inside: bool) -> None:
    net: nn.Module = nn.DataParallel(linear_net())
    with pytest.raises(SplitError, match=r"DataParallel\(RIDEWrapper\(net, \.\.\.\)\)"):
        RIDEWrapper(nn.Sequential(net) if inside else net, 2)


class DistributedDataParallel(nn.Sequential):
    """Known by its name, since making a real one takes a process group."""


def test_distributed_modules_are_refused_by_name() -> None:
    with pytest.raises(SplitError, match=r"`0` is DistributedDataParallel.*ranks to drift apart"):
        RIDEWrapper(nn.Sequential(DistributedDataParallel(linear_net())), 2)


class StandsFor:
    """Passes for the module inside, as the models of ClassyVision do."""

    def __init__(self, inside: nn.Module) -> None:
        self.inside = inside

    def __getattr__(self, name: str) -> Any:
        if name == "inside":  # while it is copied
            raise AttributeError(name)
        return getattr(self.inside, name)

    def __call__(self, x: Tensor) -> Any:
        return self.inside(x)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self.inside)


@pytest.mark.parametrize("held", [False, True])
def test_an_object_that_passes_for_a_module_is_refused_by_name(held: bool) -> None:
    net: Any = StandsFor(linear_net())
    assert isinstance(net, nn.Module)
    match = rf"{'`1`' if held else 'it'} is StandsFor, .*answers for a Sequential inside"
    with pytest.raises(SplitError, match=match):
        RIDEWrapper(nn.Sequential(nn.Identity(), net) if held else net, 2)


def test_a_guess_that_fails_reports_the_attempt_that_came_furthest() -> None:
    class Needs32(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.Flatten()
            self.fc = nn.Linear(11, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.pool(self.conv(x)))

    with pytest.raises(SplitError) as error:
        RIDEWrapper(Needs32(), 2)
    assert "on [2, 3, 32, 32] it raised RuntimeError: mat1 and mat2 shapes" in str(error.value)


@pytest.mark.parametrize(
    ("returned", "words"), [(None, "None"), (torch.zeros(2, 5, 3), r"a torch.float32 tensor of .*")]
)
def test_a_forward_that_ran_but_returned_no_logits_is_told_so(returned: Any, words: str) -> None:
    class Forgets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Any:
            self.fc(x)
            return returned

    with pytest.raises(
        SplitError, match=rf"returned {words} where .* let its forward return logits"
    ):
        RIDEWrapper(Forgets(), 2)
    with pytest.raises(SplitError, match=rf"returned {words}\. Wrap a classifier"):
        RIDEWrapper(Forgets(), 2, example_input=torch.zeros(2, 8))


@pytest.mark.parametrize("attribute", ["pretrained_cfg", "default_cfg"])
def test_the_input_size_that_a_model_card_names_is_used(attribute: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 5, 3), nn.Flatten(), nn.Linear(4 * 13 * 15, 5))
    with pytest.raises(SplitError, match="Could not guess"):
        RIDEWrapper(net, 2)
    setattr(net, attribute, {"input_size": (3, 41, 47)})
    model = RIDEWrapper(net, 2, fork_at="2")
    assert model.example_input(3)[0][0].shape == (3, 3, 41, 47)


def test_plain_backbones_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RIDEWrapper(linear_net(), 2)(torch.randn(4, 8))


def test_a_classifier_cannot_be_made_anew_where_more_is_made_for_its_classes() -> None:
    class Shifted(Net):
        def __init__(self) -> None:
            super().__init__(lambda f, z: z)
            self.shift = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.shift

    assert RIDEWrapper(Shifted(), 2).num_classes == 5
    with pytest.raises(SplitError, match=r"from more than one\. Change it before wrapping"):
        RIDEWrapper(Shifted(), 2, num_classes=9)


def test_a_spectrogram_is_guessed_from_the_configuration() -> None:
    class Audio(nn.Module):
        main_input_name = "input_values"

        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(max_length=12, num_mel_bins=6)
            self.stem, self.late, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(40, 8), nn.Linear(8, 5)

        def forward(self, input_values: Tensor) -> Tensor:
            x = self.stem(input_values.unsqueeze(1)).flatten(2).mean(1)
            return self.fc(torch.relu(self.late(x)))

    assert RIDEWrapper(Audio(), 2).num_classes == 5


@pytest.mark.parametrize("where", ["before the classifier", "behind it"])
@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_a_squeeze_that_drops_the_batch_dimension_of_one_row_is_named(
    where: str, kind: str
) -> None:
    class Squeezing(Net):
        def forward(self, x: Tensor) -> Any:
            features = torch.relu(self.late(torch.relu(self.stem(x))))[..., None]
            if where == "before the classifier":
                features = features.squeeze()
                logits = self.fc(features)
            else:
                logits = self.fc(features.squeeze(-1)).squeeze()
            if kind == "tensor":
                return logits
            return (logits, features) if kind == "tuple" else {"out": logits}

    model = RIDEWrapper(
        Squeezing(lambda *_: None),
        2,
        example_input=torch.randn(2, 8),
        logits=0 if kind == "tuple" else None,
    ).eval()
    assert model(torch.randn(2, 8)).shape == (2, 5)
    with pytest.raises(ReplayError, match=r"batch of one row, as a plain `squeeze\(\)`"):
        model(torch.randn(1, 8))
    state = model.run_trunk(torch.randn(3, 8)).select(torch.tensor([1]))
    with pytest.raises(ReplayError, match=r"Name the dimension there"):
        model.run_expert(1, state)


def test_a_layer_that_cannot_take_the_row_without_its_batch_dimension_names_it_too() -> None:
    class Squeezing(Net):
        def __init__(self) -> None:
            super().__init__(lambda *_: None)
            self.norm = nn.BatchNorm1d(16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.late(torch.relu(self.stem(x)))[..., None].squeeze()
            return self.fc(torch.relu(self.norm(x)))

    model = RIDEWrapper(Squeezing(), 2).eval()
    state = model.run_trunk(torch.randn(3, 8))
    assert model.run_expert(1, state.select(torch.tensor([1, 0])))[0].shape == (2, 5)
    with pytest.raises(ReplayError, match=r"drops the batch dimension of one row: name"):
        model.run_expert(1, state.select(torch.tensor([1])))


@pytest.mark.parametrize(
    ("shape", "proposal"),
    [
        (lambda f, o: {"logits": o.unsqueeze(1)}, "lambda output: output['logits'][:, 0]"),
        (lambda f, o: (o.unsqueeze(2), 0), "lambda output: output[0][..., 0]"),
        (lambda f, o: o.unsqueeze(1), "lambda output: output[:, 0]"),
    ],
)
def test_logits_with_one_dimension_more_are_told_apart_by_a_function(
    shape: Callable[[Tensor, Tensor], Any], proposal: str
) -> None:
    net, x = Net(shape), torch.rand(3, 8)
    for example in (x, None):  # None: a guess, which the network runs on
        with pytest.raises(SplitError, match=r"of shape \[2, (1, 5|5, 1)\]") as told:
            RIDEWrapper(net, 2, example_input=example)
        assert f"`logits={proposal}`" in str(told.value)
    model = RIDEWrapper(net, 2, example_input=x, logits=eval(proposal))
    assert expert_logits(model(x)).shape == (3, 2, 5)
