"""Where expert logits travel, what engines do to them, and what happens when they are gone."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

from ride_plugin import (
    ArgumentError,
    DiversityLoss,
    ExpertOutput,
    MissingExpertLogitsError,
    RIDELoss,
    RIDEWrapper,
    expert_logits,
    experts_loss,
)
from ride_plugin._output import attach_expert_logits, joined
from ride_plugin.routing import RouterInputs, RoutingOutput


def wrapped(**options: Any) -> RIDEWrapper:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
    backbone.append(nn.Linear(8, 5))
    return RIDEWrapper(backbone, 3, fork_at="2", **options)


def test_every_form_gives_the_expert_logits() -> None:
    experts, features = torch.randn(2, 3, 5), torch.randn(2, 3, 8)
    mean = experts.mean(1)
    forms = [
        experts,
        attach_expert_logits(mean.clone(), experts),
        ExpertOutput(mean, experts),
        (mean, experts),
        [mean, experts],
        RouterInputs(experts, features),
        (experts, features),
        (experts, experts.clone()),  # features as many as classes
    ]
    for form in forms:
        assert expert_logits(form) is experts


@pytest.mark.parametrize(
    "output",
    [
        *(torch.zeros(3), torch.zeros(2, 3, 4).long(), "x", (1, 2), None, {}, []),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4)),  # the wrong way round
        (torch.zeros(2, 8), torch.zeros(2, 5)),  # features and logits
        (torch.zeros(2, 4), torch.zeros(2, 3, 8)),  # logits and features
        (torch.zeros(2, 3, 4), torch.zeros(3, 3, 8)),
        (torch.zeros(2, 4), torch.zeros(2, 3, 4), torch.zeros(2)),
    ],
)
def test_what_is_ambiguous_or_something_else_is_refused(output: object) -> None:
    with pytest.raises(ArgumentError, match="`output`"):
        expert_logits(output)


def test_bare_logits_name_the_remedy_first_and_then_the_likely_causes() -> None:
    with pytest.raises(MissingExpertLogitsError) as error:
        expert_logits(torch.randn(4, 5, requires_grad=True))
    message = str(error.value)
    assert message.startswith('Set `return_experts = "training"` on the RIDEWrapper, before ')
    for word in (
        "[4, 5]",
        "RIDEWrapper(model, num_experts=3)",
        "DataParallel",
        "FSDP",
        "accelerate",
        "Fabric",
        "Trainer",
        "sliced",
    ):
        assert word in message


def test_the_output_of_a_model_that_is_not_wrapped_is_told_from_one_that_lost_its_experts() -> None:
    plain = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    for out in (plain(torch.randn(4, 6)), plain(torch.randn(4, 6))[:2].double() / 2):
        with pytest.raises(
            MissingExpertLogitsError, match=r"^Wrap the model, .*\[B, E, C\]"
        ) as error:
            expert_logits(out)
        assert str(list(out.shape)) in str(error.value)
        assert "DataParallel" not in str(error.value)
    model, x = wrapped(), torch.randn(4, 6)
    state = model.run_trunk(x)
    each = [model.run_expert(k, state)[0] for k in range(3)]
    with pytest.raises(MissingExpertLogitsError, match=r"torch\.stack\(each, dim=1\)"):
        expert_logits(each[0])
    assert expert_logits(torch.stack(each, dim=1)).shape == (4, 3, 5)
    scale = nn.Parameter(torch.ones(()))
    rebuilt = checkpoint(lambda x: model(x) * 1.0, x.requires_grad_(), use_reentrant=True)
    for lost in (model(x) * scale, rebuilt * scale, model(x).detach() + scale.detach()):
        with pytest.raises(MissingExpertLogitsError, match="Set `return_experts"):
            expert_logits(lost)


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        (lambda out: out[:2], "Slice"),
        (lambda out: out[torch.tensor([3, 0])], "Index"),
        (lambda out: out[:, :4][torch.tensor([True, False, True, True])], "(Slice, )+Index"),
        (lambda out: out.chunk(2)[0] / 2.0, "Split, Div"),
    ],
)
def test_what_was_made_of_an_output_by_hand_is_done_to_the_experts_logits(
    change: Callable[[Tensor], Tensor], steps: str
) -> None:
    model, y = wrapped(), torch.tensor([0, 1, 2, 3])
    out = model(torch.randn(4, 6))
    with pytest.raises(MissingExpertLogitsError, match=rf"^Do to .*graph: {steps}\).*\[rows\]"):
        expert_logits(change(out))
    rows = torch.tensor([3, 0])
    RIDELoss(nn.CrossEntropyLoss(), [4, 3, 2, 1, 1])(expert_logits(out)[rows], y[rows]).backward()


def test_the_output_before_a_cast_comes_first() -> None:
    out = wrapped()(torch.randn(4, 6))
    for cast in (out.double(), out.bfloat16().float()):
        with pytest.raises(MissingExpertLogitsError, match=r"^Pass the model's output itself.*Set"):
            expert_logits(cast)
    with pytest.raises(MissingExpertLogitsError, match=r"^Set `return_experts"):
        expert_logits(torch.randn(4, 5, requires_grad=True) + 1)


def test_a_detached_output_is_for_a_log_which_needs_no_gradients() -> None:
    out, y = wrapped()(torch.randn(4, 6)), torch.tensor([0, 1, 2, 3])
    criterion = RIDELoss(nn.CrossEntropyLoss(), [4, 3, 2, 1, 1])
    for detached in (out.detach(), out.data, out.data.double()[:, :5]):
        with pytest.raises(MissingExpertLogitsError, match=r"^Compute .*no_grad.*\.data.*Set"):
            criterion(detached, y)
        with torch.no_grad():
            number = criterion(detached, y)
            with pytest.raises(MissingExpertLogitsError, match=r"^Set `return_experts"):
                expert_logits(detached)  # nothing has a gradient here
        torch.testing.assert_close(number, nn.functional.cross_entropy(detached, y))


@pytest.mark.parametrize(
    "change",
    [
        lambda out: out.add_(1),
        lambda out: out.__iadd__(torch.ones(5)),
        lambda out: out.mul_(0.5),
        lambda out: out.__setitem__(0, 0.0),
        lambda out: out.data.new_zeros(()) or out.clamp_(0),
    ],
)
def test_a_change_in_place_is_seen(change: Callable[[Tensor], object]) -> None:
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            out = wrapped()(torch.randn(4, 6))
            expert_logits(out)
            change(out)
            with pytest.raises(MissingExpertLogitsError, match="changed in place"):
                expert_logits(out)


@pytest.mark.parametrize(
    "apart",
    [
        lambda model, x: checkpoint(model, x.requires_grad_(), use_reentrant=True),
        lambda model, x: torch.no_grad()(model)(x).requires_grad_(),
    ],
    ids=["reentrant", "no_grad"],
)
def test_experts_logits_outside_the_outputs_graph_train_nothing_and_are_refused(
    apart: Callable[[RIDEWrapper, Tensor], Tensor],
) -> None:
    output = apart(wrapped(), torch.randn(4, 6))
    with pytest.raises(MissingExpertLogitsError, match=r"use_reentrant=False.*checkpoint_experts"):
        experts_loss(nn.CrossEntropyLoss(), output, torch.tensor([0, 1, 2, 3]))


@pytest.mark.parametrize(("reentrant", "explicit"), [(False, False), (True, True)])
def test_a_checkpoint_around_the_model_trains_the_experts(reentrant: bool, explicit: bool) -> None:
    model, x = wrapped(return_experts=explicit), torch.randn(4, 6)
    y, parameters = torch.tensor([0, 1, 2, 3]), list(model.parameters())
    loss = experts_loss(nn.CrossEntropyLoss(), model(x), y)
    expected = torch.autograd.grad(loss, parameters)
    output = checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)
    experts_loss(nn.CrossEntropyLoss(), output, y).backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def saved(output: Tensor) -> Any:
    file = io.BytesIO()
    torch.save(output, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES = [copy.copy, copy.deepcopy, saved, lambda output: pickle.loads(pickle.dumps(output))]


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("copied", COPIES, ids=["copy", "deepcopy", "saved", "pickled"])
def test_a_copy_carries_the_experts_until_it_is_changed(
    copied: Callable[[Tensor], Tensor], inference: bool
) -> None:
    model = wrapped()
    with torch.inference_mode(inference), torch.no_grad():
        output = model(torch.randn(4, 6))
    other = copied(output)
    assert torch.equal(expert_logits(other), expert_logits(output))
    for _ in range(4):  # one of the counts is that of the original
        with torch.inference_mode(inference):
            other.add_(1)
        with pytest.raises(MissingExpertLogitsError, match="changed in place"):
            expert_logits(other)


def test_a_copy_whose_values_cannot_be_read_is_refused() -> None:
    with torch.no_grad():
        output = wrapped().to("meta")(torch.randn(4, 6, device="meta"))
    assert expert_logits(output).shape == (4, 3, 5)
    with pytest.raises(MissingExpertLogitsError, match="before the output is copied"):
        expert_logits(copy.deepcopy(output))


def test_inference_mode_has_no_versions_and_works() -> None:
    model = wrapped()
    with torch.inference_mode():
        out = model(torch.randn(4, 6))
        assert expert_logits(out).shape == (4, 3, 5)


# ------------------------------------------------------------- one graph


def test_both_results_hang_on_one_graph_with_the_gradients_of_stack_and_mean() -> None:
    each = [torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight, of_mean = torch.randn(4, 3, 5), torch.randn(4, 5)
    logits, experts = joined(each)
    assert logits.grad_fn is experts.grad_fn
    stacked = torch.stack(each, 1)
    assert experts.equal(stacked)
    assert logits.equal(stacked.mean(1))
    for a, b in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
        ours, theirs = (
            torch.autograd.grad(
                sum(
                    scale * (w * x).pow(2).sum()
                    for scale, w, x in ((a, of_mean, mean), (b, weight, all_of_them))
                    if scale
                ),
                each,
                retain_graph=True,
            )
            for mean, all_of_them in ((logits, experts), (stacked.mean(1), stacked))
        )
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)
    torch.autograd.gradcheck(lambda *z: joined(z), each)
    torch.autograd.gradgradcheck(lambda *z: joined(z), each)


def test_whoever_waits_for_the_gradient_of_the_output_sees_that_of_the_carried_logits() -> None:
    out = wrapped()(torch.randn(4, 6))
    called = []
    out.register_hook(called.append)
    expert_logits(out).register_hook(called.append)
    experts_loss(nn.CrossEntropyLoss(), out, torch.tensor([0, 1, 2, 3])).backward()
    of_experts, of_mean = sorted(called, key=lambda gradient: gradient is None)
    assert of_experts.shape == (4, 3, 5)
    assert of_experts.any()
    assert of_mean is None  # which tells a loss of the mean alone from one of the experts


@pytest.mark.parametrize(
    ("behind", "named"),
    [
        (nn.Linear(5, 3), "Addmm"),
        (nn.Linear(5, 3, bias=False), "Mm"),
        (nn.Sequential(nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), "Relu, Addmm"),
    ],
)
def test_a_layer_behind_the_wrapped_model_is_told_to_go_inside(
    behind: nn.Module, named: str
) -> None:
    out = behind(wrapped()(torch.randn(4, 6)))
    message = rf"^Put the layer that stands behind.*from_pair.*the model's, then {named}"
    with pytest.raises(MissingExpertLogitsError, match=message):
        expert_logits(out)


def test_other_operations_on_the_output_are_named_in_their_order() -> None:
    out = 2 * wrapped()(torch.randn(4, 6))[:2] + torch.ones(2, 5, requires_grad=True)
    with pytest.raises(MissingExpertLogitsError, match=r"by its graph: Slice, Mul, Add\)"):
        expert_logits(out)


# ------------------------------------------------------------- what engines do to outputs


def from_one_iterable(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """As autocast of a forward and the Hugging Face Trainer rebuild containers."""
    if isinstance(x, Tensor):
        return function(x)
    return type(x)(from_one_iterable(part, function) for part in x)


def by_fields(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """As accelerate, Lightning and torch's own scatter and gather rebuild named tuples."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        return type(x)({key: by_fields(value, function) for key, value in x.items()})
    parts = [by_fields(part, function) for part in x]
    return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)


def by_replacing(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return x._replace(**{name: function(value) for name, value in x._asdict().items()})


def by_make(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return type(x)._make(map(function, x))


def as_a_list(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return [function(part) for part in x]


@pytest.mark.parametrize(
    "rebuild",
    [
        from_one_iterable,
        by_fields,
        by_replacing,
        by_make,
        as_a_list,
        lambda x, function: _pytree.tree_map(function, x),
        lambda x, function: copy.copy(pickle.loads(pickle.dumps(by_make(x, torch.detach)))),
    ],
)
@pytest.mark.parametrize("kind", [ExpertOutput, RouterInputs])
def test_explicit_outputs_survive_being_rebuilt(rebuild: Any, kind: Any) -> None:
    if kind is ExpertOutput:
        pair = ExpertOutput(torch.zeros(4, 5), torch.zeros(4, 3, 5))
    else:
        pair = RouterInputs(torch.zeros(4, 3, 5), torch.zeros(4, 3, 8))
    again = rebuild(pair, lambda tensor: tensor.clone())
    assert rebuild is as_a_list or type(again) is kind
    assert [part.shape for part in again] == [part.shape for part in pair]
    assert expert_logits(again).shape == (4, 3, 5)


@pytest.mark.parametrize("kind", [ExpertOutput, RouterInputs, RoutingOutput])
def test_pairs_are_made_by_their_fields_names(kind: Any) -> None:
    first, second = torch.zeros(2, 5), torch.ones(2)
    made = kind(**dict(zip(kind._fields, (first, second), strict=True)))
    assert type(made) is kind
    assert made[0] is first
    assert made[1] is second


def test_two_of_them_are_gathered_along_the_batch() -> None:
    outputs = [ExpertOutput(torch.zeros(4, 5), torch.zeros(4, 3, 5)) for _ in range(2)]
    # As torch.nn.parallel.scatter_gather.gather does it, which itself needs an accelerator.
    gathered = type(outputs[0])(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))
    assert expert_logits(gathered).shape == (8, 3, 5)


def test_what_is_no_pair_is_refused_as_for_any_named_tuple() -> None:
    for arguments in ((), (torch.zeros(2, 5),), ([torch.zeros(2)] * 3,), (torch.zeros(1),) * 3):
        with pytest.raises(TypeError):
            ExpertOutput(*arguments)


def test_autocast_of_the_forward_casts_an_explicit_output() -> None:
    model = wrapped(return_experts=True)
    forward = torch.amp.custom_fwd(model.forward, device_type="cpu", cast_inputs=torch.float32)
    out = forward(torch.randn(4, 6))
    assert type(out) is ExpertOutput


@pytest.mark.parametrize("use", [nn.CrossEntropyLoss(), nn.functional.nll_loss, torch.add])
def test_a_pair_in_place_of_a_tensor_names_the_criterion_and_the_logits(use: Any) -> None:
    pair = ExpertOutput(torch.zeros(2, 5), torch.zeros(2, 3, 5))
    with pytest.raises(ArgumentError, match=r"RIDELoss\(criterion, class_counts\).*output\.logits"):
        use(pair, torch.tensor([0, 1]))


# ------------------------------------------------------------- when it is returned


class Casting(nn.Module):
    """An engine that returns outputs in float32, rebuilt, as mixed-precision launchers do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return from_one_iterable(self.module(x), torch.Tensor.float)


def test_training_returns_experts_and_evaluation_plain_logits() -> None:
    model = wrapped(return_experts="training")
    x = torch.randn(4, 6)
    assert type(model.train()(x)) is ExpertOutput
    assert type(model.eval()(x)) is Tensor
    assert expert_logits(model(x)).shape == (4, 3, 5)
    for value, kinds in ((True, (ExpertOutput, ExpertOutput)), (False, (Tensor, Tensor))):
        model.return_experts = value
        assert (type(model.train()(x)), type(model.eval()(x))) == kinds


@pytest.mark.parametrize("value", ["train", 1, None, "True"])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(
        ArgumentError, match="`return_experts` to be one of False, True, 'training'"
    ):
        wrapped(return_experts=value)
    model = wrapped()
    with pytest.raises(ArgumentError, match="`return_experts`"):
        model.return_experts = value
    assert model.return_experts is False


@pytest.mark.parametrize(
    "engine",
    [
        Casting,
        nn.DataParallel,
        pytest.param(lambda m: torch.compile(m, backend="eager"), marks=pytest.mark.compiles),
        lambda m: m,
    ],
)
def test_it_can_be_set_through_engines(engine: Callable[[nn.Module], nn.Module]) -> None:
    model = wrapped()
    engine_of_it = engine(model)
    assert RIDEWrapper.inside(engine_of_it) is model
    RIDEWrapper.inside(engine_of_it).return_experts = "training"
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    out = engine_of_it.train()(x)
    (
        experts_loss(nn.CrossEntropyLoss(), out, y) + DiversityLoss([9, 5, 3, 2, 1])(out, y)
    ).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert type(engine_of_it.eval()(x)) is Tensor


def test_no_wrapped_model_inside_or_several_are_refused() -> None:
    for model, count in ((nn.Linear(2, 2), 0), (nn.ModuleList([wrapped(), wrapped()]), 2)):
        with pytest.raises(ArgumentError, match=f"one RIDEWrapper inside, not {count}"):
            RIDEWrapper.inside(model)
    with pytest.raises(ArgumentError, match="`model` to be a module"):
        RIDEWrapper.inside(None)  # type: ignore[arg-type]


class Contrastive(nn.Module):
    """Returns normalised features, logits, and a prototype of each class made of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 4)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.encoder(x)
        prototypes = self.head(self.fc.weight)
        return nn.functional.normalize(self.head(features), dim=1), self.fc(features), prototypes


@pytest.mark.parametrize("checkpoint_experts", [False, True])
@pytest.mark.parametrize("engine", [nn.Identity, nn.DataParallel])
def test_a_loss_of_more_than_logits_gets_what_each_expert_returns(
    engine: Any, checkpoint_experts: bool
) -> None:
    model = RIDEWrapper(
        Contrastive(), 3, fork_at="encoder.2", logits=1, return_experts="outputs",
        checkpoint_experts=checkpoint_experts,
    )  # fmt: skip
    outer = model if engine is nn.Identity else engine(model)
    x = torch.randn(7, 6)
    each = outer(x)
    assert [[tuple(part.shape) for part in one] for one in each] == [[(7, 4), (7, 5), (5, 4)]] * 3
    for index, (features, logits, prototypes) in enumerate(each):
        plain = model.to_module(index)
        for got, expected in zip((features, logits, prototypes), plain(x), strict=True):
            torch.testing.assert_close(got, expected)
        torch.testing.assert_close(prototypes, plain.head(plain.fc.weight))
    sum((f.sum() + z.sum() + p.sum()) for f, z, p in each).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    plain = [model.to_module(index) for index in range(3)]
    alone = [
        torch.autograd.grad(sum(part.sum() for part in one(x)), list(one.parameters()))
        for one in plain
    ]
    of_trunk = sum(of_one[0] for of_one in alone)  # the first layer is shared
    torch.testing.assert_close(gradients[0], of_trunk)
    assert all(gradient is not None for gradient in gradients)
    mean = torch.stack([logits for _, logits, _ in each], 1).mean(1)
    torch.testing.assert_close(outer.eval()(x), mean)


def test_a_call_of_another_kind_returns_one_output_for_each_expert() -> None:
    """The model rehearses such a call first; what the rehearsal returns belongs to no expert."""

    class Flagged(Contrastive):
        def forward(self, x: Tensor, scaled: bool = False) -> tuple[Tensor, Tensor, Tensor]:
            return super().forward(2 * x if scaled else x)

    model = RIDEWrapper(Flagged(), 3, fork_at="encoder.2", logits=1, return_experts="outputs")
    x = torch.randn(7, 6)
    for args, kwargs in (((x,), {}), ((x, True), {}), ((x,), {"scaled": True}), ((), {"x": x})):
        each = model(*args, **kwargs)
        assert len(each) == 3
        for index, output in enumerate(each):
            torch.testing.assert_close(output, model.to_module(index)(*args, **kwargs))


def test_a_backbone_of_nothing_but_logits_returns_those_of_each_expert() -> None:
    backbone = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    model = RIDEWrapper(backbone, 2, fork_at="2", return_experts="outputs")
    x = torch.randn(3, 6)
    for index, logits in enumerate(model(x)):
        torch.testing.assert_close(logits, model.to_module(index)(x))
