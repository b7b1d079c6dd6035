"""What a backbone returns beside its logits: code that would take rows for it, losses dropped."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin import ReplayError, RIDELoss, RIDEModule, RIDEWrapper


class ModelOutput(OrderedDict[str, Any]):
    """As transformers have it: entries that are None are left out, and indices are answered."""

    def __init__(self, **entries: Any) -> None:
        super().__init__((k, v) for k, v in entries.items() if v is not None)

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


@dataclass
class Answers:
    logits: Tensor
    loss: Tensor | None = None

    def __getitem__(self, index: int) -> Tensor:
        return (self.logits,)[index]


@dataclass
class NamesAlone:
    logits: Tensor
    loss: Tensor | None = None


class Net(nn.Module):
    """Computes a loss as well, where it is given labels."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.stem, self.late, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.kind = kind

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.fc(torch.relu(self.late(torch.relu(self.stem(x)))))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return self.kind(loss=loss, logits=logits)


def by_number(logits: Tensor, loss: Tensor | None) -> dict[Any, Any]:
    return {0: logits}


def with_default(logits: Tensor, loss: Tensor | None) -> dict[Any, Any]:
    return defaultdict(lambda: logits, logits=logits)


def plain(logits: Tensor, loss: Tensor | None) -> Any:
    return logits if loss is None else {"loss": loss, "logits": logits}


@pytest.mark.parametrize(
    ("kind", "name", "answer"),
    [
        (ModelOutput, "a ModelOutput", "`logits='logits'`"),
        (Answers, "an? Answers", "`logits='logits'`"),
        (by_number, "a dict", "`logits=0`"),
    ],
)
def test_what_answers_indices_beside_names_is_told_of(kind: Any, name: str, answer: str) -> None:
    """Without a word `outputs[0]` would be a row of the logits."""
    net = Net(kind)
    with pytest.warns(UserWarning, match=f"returns {name}.*first row.*`logits = model") as record:
        model = RIDEWrapper(net, 2, init="copy")
    assert len(record) == 1
    assert record[0].filename == __file__
    text = str(record[0].message)
    assert ("there is no `outputs.logits`" in text) == (answer == "`logits='logits'`")
    assert f"Pass {answer} to say" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = RIDEWrapper(net, 2, init="copy", **eval(f"dict({answer[1:-1]})"))
        same.load_state_dict(model.state_dict())
        x = torch.randn(4, 6)
        torch.testing.assert_close(same(x), model(x))


@pytest.mark.parametrize("kind", [dict, NamesAlone, with_default, plain])
def test_what_is_asked_for_names_alone_is_not(kind: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RIDEWrapper(Net(kind), 2)


@pytest.mark.parametrize("checkpoint_experts", [False, True])
@pytest.mark.parametrize("kind", [ModelOutput, dict, NamesAlone, plain])
@pytest.mark.parametrize("training", [False, True])
def test_a_loss_that_the_backbone_computes_of_labels_is_told_of_once(
    kind: Any, training: bool, checkpoint_experts: bool
) -> None:
    model = RIDEWrapper(Net(kind), 2, logits="logits", checkpoint_experts=checkpoint_experts)
    model.train(training)
    x, labels = torch.randn(4, 6), torch.arange(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    with pytest.warns(UserWarning, match="so that loss is dropped.*RIDELoss") as record:
        got = model(x, labels=labels)
    assert len(record) == 1
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(model(x, labels=labels), got)
    with pytest.warns(UserWarning, match="that loss is dropped"):  # a copy begins anew
        copy.deepcopy(model)(x, labels=labels)


def test_who_asks_for_outputs_or_computes_the_loss_elsewhere_is_not_told() -> None:
    x, labels = torch.randn(4, 6), torch.arange(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = RIDEWrapper(Net(ModelOutput), 2, logits="logits", return_experts="outputs")
        each = model(x, labels=labels)
        torch.testing.assert_close(each[1].loss, F.cross_entropy(each[1].logits, labels))
        model.eval()(x, labels=labels)
        model = RIDEWrapper(Net(ModelOutput), 2, logits="logits")
        one = RIDEModule(model, RIDELoss(nn.CrossEntropyLoss(), [3, 2, 2, 1, 1]))
        assert set(one(x, labels=labels)) == {"loss", "logits"}


class OnRequest(Net):
    """Returns logits alone, and more where it is given labels, as it is in training only."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        features = torch.relu(self.late(torch.relu(self.stem(x))))
        logits = self.fc(features)
        return logits if labels is None else self.kind(logits, features)


REQUESTED: dict[str, Any] = {
    "number": lambda z, h: (z, h.pow(2).mean()),
    "named": lambda z, h: {"logits": z, "centre_loss": h.pow(2).mean()},
    "second classifier": lambda z, h: {"logits": z, "second": h[:, :5].tanh()},
}


@pytest.mark.parametrize("checkpoint_experts", [False, True])
@pytest.mark.parametrize("kind", REQUESTED.values(), ids=REQUESTED)
def test_what_comes_on_request_only_is_told_of_and_handed_out(
    kind: Any, checkpoint_experts: bool
) -> None:
    """The example that the backbone was wrapped with asked for logits alone."""
    net = OnRequest(kind)
    model = RIDEWrapper(net, 2, init="copy", checkpoint_experts=checkpoint_experts)
    x, labels = torch.randn(4, 6), torch.arange(4)
    with pytest.warns(UserWarning, match=r"gradients flow through, `output\[.*\]`") as record:
        output = model(x, labels=labels)
    assert len(record) == 1
    torch.testing.assert_close(output, model(x))
    model.return_experts = "outputs"
    each = model(x, labels=labels)
    plain = [module.train()(x, labels=labels) for module in model.to_modules()]
    torch.testing.assert_close(each, plain)
    assert [type(entry) for entry in each] == [type(net(x, labels=labels))] * 2
    assert [type(entry) for entry in model(x)] == [Tensor] * 2
    torch.testing.assert_close(copy.deepcopy(model)(x, labels=labels), plain)


@pytest.mark.parametrize("order", [lambda z, h: (z, h), lambda z, h: (h, z)])
def test_several_matrices_on_request_are_asked_for(order: Any) -> None:
    x, labels = torch.randn(4, 6), torch.arange(4)
    net = OnRequest(order)
    with pytest.raises(ReplayError, match=r"a tuple with .* Pass `logits=`.* ignored, so"):
        RIDEWrapper(net, 2)(x, labels=labels)
    place = [tensor.shape[1] for tensor in net(x, labels=labels)].index(5)
    model = RIDEWrapper(net, 2, logits=place)
    torch.testing.assert_close(model(x, labels=labels), model(x))


def test_another_tensor_on_request_is_refused_by_its_shape() -> None:
    model = RIDEWrapper(OnRequest(lambda z, h: z[:, None]), 2)
    with pytest.raises(ReplayError, match=r"An expert returned a .* \[4, 1, 5\].*logits of 5"):
        model(torch.randn(4, 6), labels=torch.arange(4))


class InTraining(Net):
    """Returns logits alone in evaluation, and what ``kind`` makes of logits and features else."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        features = torch.relu(self.late(torch.relu(self.stem(x))))
        logits = self.fc(features)
        return self.kind(logits, features) if self.training else logits


@pytest.mark.parametrize(
    ("kind", "name", "answer"),
    [
        (lambda z, h: (z, h), "tuple of 2", "`logits=0`"),
        (lambda z, h: [h, z], "list of 2", "`logits=1`"),
        (lambda z, h: ModelOutput(logits=z, h=h), "ModelOutput", "`logits='logits'`"),
    ],
)
def test_what_answers_indices_in_training_alone_is_told_of(
    kind: Any, name: str, answer: str
) -> None:
    """Without a word `logits, features = model(x)` would be two rows in the user's loop."""
    net, x = InTraining(kind), torch.randn(2, 6)
    match = f"returns a {name} in training.*first row.*Pass {answer} to say"
    with pytest.warns(UserWarning, match=match) as record:
        model = RIDEWrapper(net, 2, init="copy")
    assert [warning.filename for warning in record] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"return_experts": "outputs"}, {"return_experts": "training"}):
            RIDEWrapper(net, 2, init="copy", **options)  # they return something else in training
        same = RIDEWrapper(net, 2, init="copy", **eval(f"dict({answer[1:-1]})"))
        same.load_state_dict(model.state_dict())
        for mode in (True, False):
            torch.testing.assert_close(same.train(mode)(x), model.train(mode)(x))


@pytest.mark.parametrize(
    "kind", [lambda z, h: (z, h.square().mean()), lambda z, h: (z, h[:, :5].tanh())]
)
def test_losses_in_training_alone_are_told_of_once_in_the_first_step(kind: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = RIDEWrapper(InTraining(kind), 2, num_classes=5)
    with pytest.warns(UserWarning, match=r"gradients flow through, `output\[1\]`") as record:
        model(torch.randn(4, 6))
    assert len(record) == 1


class WithTargets(nn.Module):
    """Logits alone, and a loss before them where it is given targets or told to."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, target: Tensor | None = None, contrast: bool = False) -> Any:
        h = torch.relu(self.body(x))
        z = self.fc(h)
        if target is None and not contrast:
            return z
        return (h.square().mean() if target is None else F.cross_entropy(z, target)), z


@pytest.mark.parametrize("more", [{"target": torch.arange(4)}, {"contrast": True}])
def test_a_loss_that_comes_in_a_later_step_only_is_told_of_once_as_well(more: Any) -> None:
    x = torch.randn(4, 6)
    model = RIDEWrapper(WithTargets(), 2, fork_at="fc", example_input=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x)
    with pytest.warns(UserWarning, match=r"gradients flow through, `output\[0\]`") as record:
        model(x, **more)
    assert len(record) == 1
    for each in ({}, more, more):
        RIDELoss(nn.CrossEntropyLoss(), [4, 3, 2, 1, 1])(
            model(x, **each), torch.arange(4)
        ).backward()
        optimizer.step()
