"""A training in which nothing learns is noticed; every other one is left in peace."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDELoss, RIDEWrapper, expert_logits

from .backbones import mlp

PASSES = 300


def train(
    model: RIDEWrapper, parameters: Iterable[Tensor], passes: int = PASSES, every: int = 1
) -> None:
    optimizer = torch.optim.SGD(parameters, 0.01)
    x, y = torch.randn(4, 20), torch.randint(0, 7, (4,))
    for step in range(passes):
        loss = nn.functional.cross_entropy(expert_logits(model(x)).mean(1), y)
        loss.backward()
        if step % every == every - 1:
            optimizer.step()
            optimizer.zero_grad()


def test_an_optimizer_made_before_wrapping_is_noticed_once() -> None:
    backbone = mlp()
    model = RIDEWrapper(backbone, 2)
    with pytest.warns(UserWarning, match=r"make it after wrapping, from `model\.parameters") as w:
        train(model, backbone.parameters())
    assert len(w) == 1
    assert w[0].filename == __file__


def test_a_training_is_left_in_peace() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = RIDEWrapper(mlp(), 2)
        train(model, model.parameters())
        accumulated = RIDEWrapper(mlp(), 2)
        train(accumulated, accumulated.parameters(), every=60)
        heads_only = RIDEWrapper(mlp(), 2)
        train(heads_only, [p for head in heads_only.classifiers for p in head.parameters()])
        experts_only = RIDEWrapper(mlp(), 2)
        train(experts_only, experts_only.experts.parameters())
        experts_only.eval()(torch.randn(2, 20))
        without = RIDEWrapper(mlp(), 2)
        for head in without.classifiers:
            head.requires_grad_(False)
        train(without, [p for p in without.parameters() if p.requires_grad])


@pytest.mark.parametrize("when", ["evaluation", "many passes"])
def test_classifiers_that_a_choice_by_name_left_out_are_noticed_once(when: str) -> None:
    model = RIDEWrapper(mlp(), 2)  # the backbone's classifier is `6`
    heads = [p for name, p in model.named_parameters() if name.startswith("6.")]
    rest = [p for name, p in model.named_parameters() if ".6." not in name]
    assert heads == []

    def epochs() -> None:
        train(model, [*heads, *rest], passes=6 if when == "evaluation" else PASSES)
        model.eval()(torch.randn(2, 20))

    with pytest.warns(UserWarning, match=r"`experts\.0\.6\.weight`.*parameter_groups_by\(") as w:
        epochs()
    assert len(w) == 1
    assert w[0].filename == __file__
    model.train()
    epochs()


def test_one_expert_that_does_not_train_is_noticed() -> None:
    model = RIDEWrapper(mlp(), 3)
    with pytest.warns(UserWarning, match=r"After 128 training passes `experts\.2\."):
        train(model, [*model.trunk.parameters(), *model.experts[:2].parameters()])


def _equal_experts() -> RIDEWrapper:
    model = RIDEWrapper(mlp(), 3)
    for k in (1, 2):
        model.experts[k].load_state_dict(model.experts[k - 1].state_dict())
    return model


def test_experts_that_were_made_equal_are_noticed_once() -> None:
    model = _equal_experts()
    with pytest.warns(UserWarning, match="Experts 0 and 1 have equal weights") as w:
        train(model, model.parameters())
    assert len(w) == 1
    assert w[0].filename == __file__


def test_gains_that_begin_equal_beside_other_frozen_weights_are_left_in_peace() -> None:
    layers = (nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 7))
    model, x = RIDEWrapper(nn.Sequential(*layers), 3, fork_at="2"), torch.randn(4, 20)
    model(x)
    for name, parameter in model.named_parameters():  # as test-time adaptation does
        parameter.requires_grad_(".3." in name)
    model(x)


def test_equal_experts_that_part_at_once_are_left_in_peace() -> None:
    x, y = torch.randn(4, 20), torch.randint(0, 7, (4,))
    for told_apart in ("targets", "classifiers"):
        model = _equal_experts()
        if told_apart == "classifiers":
            for classifier in model.classifiers:
                nn.init.normal_(classifier.weight)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(8):
                logits = expert_logits(model(x))
                targets = [(y + k * (told_apart == "targets")) % 7 for k in range(3)]
                losses = map(nn.functional.cross_entropy, logits.unbind(1), targets)
                optimizer.zero_grad()
                torch.stack(list(losses)).sum().backward()
                optimizer.step()


def test_an_optimizer_that_no_counter_shows_is_left_in_peace() -> None:
    model = RIDEWrapper(mlp(), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(PASSES):
            expert_logits(model(torch.randn(4, 20))).square().sum().backward()
            for parameter in model.parameters():
                parameter.data.sub_(0.001 * parameter.grad)
                parameter.grad = None


def test_passes_that_are_no_training_do_not_count() -> None:
    model = RIDEWrapper(mlp(), 2)
    x = torch.randn(4, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(PASSES):
            model(x)  # never goes back
        model.eval()
        for _ in range(PASSES):
            model(x).sum().backward()
        frozen = RIDEWrapper(mlp(), 2).train().requires_grad_(False)
        for _ in range(PASSES):
            frozen(x.requires_grad_(True)).sum().backward()
        compared = RIDEWrapper(mlp(), 2)
        train(compared, [torch.zeros(1, requires_grad=True)], passes=3)  # a look at the gradients
        compared.eval()(x)


def test_copies_begin_anew_and_need_no_graph() -> None:
    model = RIDEWrapper(mlp(), 2)
    train(model, model.parameters(), passes=1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.warns(UserWarning, match="In 128 training passes"):
            train(other, model.parameters(), passes=128)


@pytest.mark.parametrize("through", ["optimizer", "data"])
def test_an_epoch_that_changes_nothing_is_noticed_when_evaluation_begins(through: str) -> None:
    backbone = mlp()
    model = RIDEWrapper(backbone, 2)
    train(model, backbone.parameters(), passes=5)
    with pytest.warns(UserWarning, match="In 5 training passes no parameter"):
        model.eval()(torch.randn(2, 20))
    other = RIDEWrapper(backbone, 2)
    parameters = [p for head in other.classifiers for p in head.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(other, parameters, passes=5, every=5 if through == "optimizer" else 6)
        if through == "data":
            parameters[0].data.add_(1)
        other.eval()(torch.randn(2, 20))


def test_an_optimizer_whose_learning_rate_is_zero_at_first_is_left_in_peace() -> None:
    model = RIDEWrapper(mlp(), 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            expert_logits(model(torch.randn(4, 20))).sum().backward()
            optimizer.step()
        model.eval()(torch.randn(2, 20))


def fit(model: nn.Module, criterion: Callable[[Any, Tensor], Tensor], passes: int = 4) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(passes):
        optimizer.zero_grad()
        criterion(model(torch.randn(4, 20)), torch.randint(0, 7, (4,))).backward()
        optimizer.step()


@pytest.mark.parametrize("return_experts", [False, "training"])
def test_a_criterion_that_was_not_replaced_is_noticed_once(return_experts: Any) -> None:
    model = RIDEWrapper(mlp(), 2, return_experts=return_experts)

    def plain(out: Any, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out.logits if return_experts else out, target)

    with pytest.warns(UserWarning, match=r"`criterion = RIDELoss\(criterion, class_counts\)`") as w:
        fit(model, plain)
    assert len(w) == 1
    assert w[0].filename == __file__


def test_a_loss_of_experts_or_of_one_expert_is_left_in_peace() -> None:
    both = RIDELoss(nn.CrossEntropyLoss(), [9, 8, 7, 6, 5, 4, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(RIDEWrapper(mlp(), 2), both)
        fit(RIDEWrapper(mlp(), 1), nn.functional.cross_entropy)
        fit(
            RIDEWrapper(mlp(), 2), lambda out, y: both(out, y) + nn.functional.cross_entropy(out, y)
        )


@pytest.mark.parametrize("attacks", [1, 5])
def test_gradients_of_the_inputs_before_a_step_are_left_in_peace(attacks: int) -> None:
    model, y = RIDEWrapper(mlp(), 2), torch.randint(0, 7, (4,))
    criterion = RIDELoss(nn.CrossEntropyLoss(), [9, 8, 7, 6, 5, 4, 3])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            x = torch.randn(4, 20)
            for _ in range(attacks):  # of projected gradient descent, in training mode
                x.requires_grad_()
                loss = nn.functional.cross_entropy(model(x), y)
                x = x.detach() + 0.01 * torch.autograd.grad(loss, x)[0].sign()
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()


def freeze_by_plain_names(model: nn.Module, names: tuple[str, ...]) -> None:
    """Linear probing, as training code for plain networks begins it."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


@pytest.mark.parametrize("trained_before", [False, True])
def test_a_loop_by_plain_names_that_freezes_everything_is_noticed_once(
    trained_before: bool,
) -> None:
    model = RIDEWrapper(mlp(), 3)
    if trained_before:  # stage one, of which the watch has seen all that it wants
        train(model, model.parameters())
        assert model._watch.done
    freeze_by_plain_names(model, ("6.weight", "6.bias"))
    x = torch.randn(4, 20)
    with pytest.warns(UserWarning, match="begin with `trunk.` or `experts.0.`") as record:
        first, *_ = [model(x) for _ in range(3)]
    assert len(record) == 1
    assert record[0].filename == __file__
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()
    code = str(record[0].message).split("`model.parameter_groups_by`: `")[1]
    exec(code.split("`. (If")[0].replace("fc", "6"), {"model": model})  # what it says
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"experts.{k}.6.{kind}" for k in range(3) for kind in ("weight", "bias")}
    model(x).sum().backward()


def test_what_is_frozen_with_reason_is_left_in_peace() -> None:
    x = torch.randn(4, 20, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RIDEWrapper(mlp().requires_grad_(False), 1)(x.detach())  # before wrapping
        teacher = copy.deepcopy(RIDEWrapper(mlp(), 2)).requires_grad_(False)
        teacher(x.detach())
        model = RIDEWrapper(mlp(), 2).requires_grad_(False)
        with torch.no_grad():
            model(x)
        model.eval()(x.detach())
        for mode in (True, False):  # attacks and saliency
            model.train(mode)
            (gradient,) = torch.autograd.grad(model(x).sum(), x)
            assert gradient.any()
        model.train().router_inputs(x)
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        torch.func.functional_call(model, weights, x.detach())


class Beside(nn.Module):
    """Returns something beside its logits, in training or always."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.body, self.late = nn.Linear(20, 16), nn.Linear(16, 16)
        self.head, self.second, self.last = nn.Linear(16, 7), nn.Linear(16, 7), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x).relu()
        late = self.late(hidden).relu()
        logits = self.head(late)
        if self.kind == "a number":
            return logits, hidden.abs().mean()
        if self.kind == "a number among others":
            return {"logits": logits, "extra": [late, {"penalty": late.square().sum()}]}
        if self.kind == "a second classifier":
            return (logits, self.second(hidden)) if self.training else logits
        if self.kind == "two classifiers in one":
            both = torch.cat([logits, self.second(late)], 1)
            return both.chunk(2, 1) if self.training else (both[:, :7],)
        if self.kind == "features":
            return {"logits": logits, "features": late}
        if self.kind == "a number without gradients":
            return {"logits": logits, "sparsity": late.detach().mean()}
        if self.kind == "probabilities":
            return logits, (logits - 1).softmax(1)
        if self.kind == "features as wide as the logits":
            narrow = self.second(late)
            return {"logits": self.last(narrow.relu()), "features": narrow}
        if self.kind == "the caller's loss":
            return {"logits": logits, "loss": logits.square().mean()}
        return logits


TOLD = {
    "a number": r"output\[1\]",
    "a number among others": r"output\['extra'\]\[1\]\['penalty'\]",
    "a second classifier": r"output\[1\]",
    "two classifiers in one": r"output\[1\]",
    "the caller's loss": "a `loss` beside its logits",
}


@pytest.mark.parametrize("options", [{}, {"checkpoint_experts": True}, {"return_experts": True}])
@pytest.mark.parametrize("kind", list(TOLD))
def test_a_loss_beside_the_logits_is_told_once(kind: str, options: dict[str, Any]) -> None:
    if kind == "two classifiers in one":
        options = {"logits": 0, "num_classes": 7, **options}
    if kind == "a number":
        options = {"logits": 0, **options}
    model = RIDEWrapper(Beside(kind), 2, fork_at="late", **options)
    if kind != "the caller's loss":
        with torch.no_grad():
            model(torch.randn(4, 20))  # no training yet, so nothing to tell
    with pytest.warns(UserWarning, match=TOLD[kind]) as told:
        train(model, model.parameters(), 5)
    assert len(told) == 1
    assert told[0].filename == __file__
    assert 'return_experts="outputs"' in str(told[0].message)


@pytest.mark.parametrize(
    "kind",
    [
        "features",
        "features as wide as the logits",
        "probabilities",
        "a number without gradients",
        "nothing",
        *TOLD,
    ],
)
def test_what_no_loss_is_made_of_or_is_asked_for_is_left_in_peace(kind: str) -> None:
    asked = kind in TOLD
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = RIDEWrapper(
            Beside(kind),
            2,
            fork_at="late",
            logits=0 if kind in ("probabilities", "two classifiers in one", "a number") else None,
            return_experts="outputs" if asked else False,
        )
        if asked:
            assert len(model(torch.randn(4, 20))) == 2
        else:
            train(model, model.parameters(), 5)


def test_logits_that_a_function_makes_of_two_classifiers_are_left_in_peace() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = RIDEWrapper(
            Beside("a second classifier"), 2, fork_at="late", logits=_sum, num_classes=7
        )
        train(model, model.parameters(), 5)


def _sum(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0] + output[1]
