"""Models from parts made by hand, experts from a factory, and the way back to plain modules."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin import (
    ArgumentError,
    ConfidenceRouter,
    ExpertRouter,
    ReplayError,
    RIDEWrapper,
    RoutingInference,
    SplitError,
    cost_report,
    expert_logits,
)
from ride_plugin.routing import RoutingQueue
from tests.backbones import BACKBONES, CifarResNet, TwoMatrices, mlp


def trunk() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, width, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.reduce = nn.Conv2d(width, 10, 1)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self.fc(self.reduce(x).mean((2, 3)))


def made_of_parts() -> tuple[RIDEWrapper, nn.Module, list[nn.Module]]:
    body, experts = trunk(), [Expert(12), Expert(16), Expert(6)]
    example = torch.randn(2, 3, 8, 8)
    return (
        RIDEWrapper.from_parts(body, experts.__getitem__, 3, example_input=example),
        body,
        experts,
    )


def test_parts_compute_what_they_compute_by_hand_in_training_too() -> None:
    model, body, experts = made_of_parts()
    x = torch.randn(6, 3, 8, 8)
    expected = body(x)
    expected = torch.stack([expert(expected) for expert in experts], dim=1)
    out = model(x)
    assert torch.equal(expert_logits(out), expected)
    expected.square().sum().backward()
    expert_logits(out).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    by_hand = {f"trunk.body.{n}": p.grad for n, p in body.named_parameters()}
    for k, expert in enumerate(experts):
        by_hand |= {f"experts.{k}.head.{n}": p.grad for n, p in expert.named_parameters()}
    assert gradients.keys() == by_hand.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, by_hand[name])
    assert torch.equal(model.trunk.body[1].running_mean, body[1].running_mean)
    assert torch.equal(model.experts[2].head.bn.running_var, experts[2].bn.running_var)


def test_parts_stay_the_callers_own() -> None:
    model, body, experts = made_of_parts()
    kept = [p.clone() for part in (body, *experts) for p in part.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    now = [p for part in (body, *experts) for p in part.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
    assert not any(module._forward_hooks for module in body.modules())


@pytest.mark.exports
def test_parts_satisfy_whatever_uses_a_wrapped_model() -> None:
    model, body, experts = made_of_parts()
    model.eval()
    body.eval()
    x = torch.randn(6, 3, 8, 8)
    state = model.run_trunk(x)
    rows = torch.tensor([4, 1])
    logits, features = model.run_expert(2, state.select(rows))
    assert features.shape == (2, model.feature_dim) == (2, 10)
    torch.testing.assert_close(logits, experts[2].eval()(body(x))[rows])
    serve = RoutingInference(model, ExpertRouter.for_model(model))
    dense = serve.dense(x, return_routing=True)
    routed = serve(x, return_routing=True)
    torch.testing.assert_close(routed.logits, dense.logits)
    assert torch.equal(routed.num_experts_used, dense.num_experts_used)
    report = cost_report(model)
    assert report.trunk_flops == 2 * 8 * 27 * 64
    assert report.expert_flops[1] == 2 * 16 * (72 * 16 + 10 * 16) + 2 * 10 * 5
    assert report.expert_parameters[1] == sum(p.numel() for p in experts[1].parameters())
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
    fresh = made_of_parts()[0].eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), expected)
    torch.testing.assert_close(model.optimize_for_inference()(x), expected)
    confident = RoutingInference(model, ConfidenceRouter(), 0.2)
    assert confident.export_stages().keys() == {
        "trunk", "expert_0", "expert_1", "expert_2", "gate_0", "gate_1"
    }  # fmt: skip
    queue = RoutingQueue(confident, batch_size=4)
    queue.submit(x[:3])
    queue.submit(x[3:])
    answers = queue.flush()
    torch.testing.assert_close(torch.cat([answers[0].logits, answers[1].logits]), confident(x))


class TwoMaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x)
        return x * scale[:, None, None, None], x.mean((2, 3))


class OnTwoMaps(nn.Module):
    """Reads one map or both, and may change the first in place."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.both = both
        self.fc = nn.Linear(4, 5)

    def forward(self, maps: tuple[Tensor, Tensor]) -> Tensor:
        x, mean = maps
        if self.both:
            return self.fc(x.relu_().mean((2, 3)) + mean)
        return self.fc(x.mean((2, 3)))


def test_experts_may_read_and_change_different_results_of_a_trunk_with_several_inputs() -> None:
    body, experts = TwoMaps(), [OnTwoMaps(False), OnTwoMaps(True), OnTwoMaps(False)]
    x, scale = torch.randn(4, 3, 8, 8), torch.rand(4)
    example = {"x": x, "scale": scale}
    model = RIDEWrapper.from_parts(body, experts.__getitem__, 3, example_input=example)
    expected = torch.stack([expert(body(x, scale)) for expert in experts], dim=1)
    assert torch.equal(expert_logits(model(x=x, scale=scale)), expected)
    state = model.run_trunk(x=x, scale=scale)
    for k in (1, 0, 1, 2):
        torch.testing.assert_close(model.run_expert(k, state)[0], expected[:, k])


class TwoReadings(nn.Module):
    """Late layers that read one result of the early ones or two, on another path if it is large."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.both = both
        self.conv, self.late, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.avg_pool2d(x, 2) if x.shape[-1] > 8 else x)
        mean = x.mean((2, 3))
        late = self.late(x).mean((2, 3))
        return self.fc(late + mean if self.both else late)


def test_what_any_expert_reads_is_kept_on_a_path_that_the_example_does_not_show() -> None:
    networks = [TwoReadings(False), TwoReadings(True)]
    for network in networks[1:]:
        network.conv.load_state_dict(networks[0].conv.state_dict())
    model = RIDEWrapper(
        networks[0],
        2,
        fork_at="late",
        expert_factory=networks.__getitem__,
        example_input=torch.randn(2, 3, 8, 8),
    ).eval()
    x, rows = torch.randn(4, 3, 16, 16), torch.tensor([3, 0])
    with torch.no_grad():
        state = model.run_trunk(x)
        for k, network in enumerate(networks):
            expected = network(x)
            torch.testing.assert_close(model.run_expert(k, state)[0], expected)
            torch.testing.assert_close(model.run_expert(k, state.select(rows))[0], expected[rows])


class Narrow(CifarResNet):
    """ResNet-14 whose last two stages have the widths given; shortcuts pad what is missing."""

    def __init__(self, widths: tuple[int, int], num_classes: int = 10) -> None:
        super().__init__(num_classes, n=1)
        self.layer2 = nn.Sequential(nn.Conv2d(16, widths[0], 3, 2, 1), nn.ReLU(inplace=True))
        self.layer3 = nn.Sequential(nn.Conv2d(widths[0], widths[1], 3, 2, 1), nn.ReLU())
        self.linear = nn.Linear(widths[1], num_classes)


def test_a_factory_gives_an_automatic_split_experts_of_any_width() -> None:
    backbone = CifarResNet(10, n=1)
    networks = [Narrow((10, 20)), Narrow((14, 20))]
    model = RIDEWrapper(backbone, 2, expert_factory=networks.__getitem__).eval()
    assert model.fork_at == "layer2"
    x = torch.randn(3, 3, 32, 32)
    for k, network in enumerate(networks):
        for name in ("conv1", "bn1", "layer1"):
            getattr(network, name).load_state_dict(getattr(backbone, name).state_dict())
        expected = network.eval()(x)
        torch.testing.assert_close(expert_logits(model(x))[:, k], expected)
        assert model.experts[k].layer2[0].out_channels == (10, 14)[k]
    assert not any(name.startswith("experts.0.layer1") for name in model.state_dict())


def test_a_classifier_can_be_swapped_on_experts_from_a_factory() -> None:
    model = RIDEWrapper(
        CifarResNet(10, n=1), 2, expert_factory=lambda k: Narrow((10, 20)), classifier="cosine"
    )
    assert model.classifiers[1].weight.shape == (10, 20)


def test_another_classifier_is_not_set_where_nobody_reads_it() -> None:
    model = RIDEWrapper(CifarResNet(10, n=1), 2)
    with pytest.raises(TypeError):
        model.classifiers[0] = nn.Linear(64, 10)
    model.experts[0].linear = other = nn.Linear(64, 10)
    assert model.classifiers == (other, model.experts[1].linear)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda k: Narrow((8, 16 + k)), r"features of one size.*\[16, 17\]"),
        (lambda k: Narrow((8, 16), 7), "7 classes, the backbone 10"),
        (lambda k: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 10)), "layer2"),
    ],
)
def test_networks_that_do_not_fit_are_named(factory, message: str) -> None:
    with pytest.raises(SplitError, match=message):
        RIDEWrapper(CifarResNet(10, n=1), 2, expert_factory=factory)


def pooled_last() -> nn.Module:
    """A network whose logits no layer has returned."""
    last = nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), *last)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc, self.other = nn.Linear(8, 8), nn.Linear(8, 5), nn.Linear(8, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)[:, :8] if x.dim() > 2 else x
        x = torch.relu(self.body(x))
        return self.fc(x), self.other(x)


@pytest.mark.filterwarnings("ignore:The backbone returns a tuple")
@pytest.mark.parametrize(("make", "fork_at"), [(pooled_last, "2"), (TwoHeads, "fc")])
def test_the_number_of_classes_confirms_the_networks_of_a_factory_too(make, fork_at: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = RIDEWrapper(
        make(),
        2,
        fork_at=fork_at,
        example_input=x,
        num_classes=5,
        expert_factory=lambda k: make(),
    )
    assert model(x).shape == (2, 5)


def test_advice_that_hand_made_parts_do_not_take_is_told_apart() -> None:
    with pytest.raises(SplitError, match=r"Pass `logits=`.*neither `logits=` nor.*logits alone"):
        RIDEWrapper.from_parts(nn.Linear(8, 8), lambda k: TwoHeads(), 2)


class Wide(Narrow):
    def __init__(self) -> None:
        super().__init__((8, 16))
        self.conv1, self.bn1 = nn.Conv2d(3, 20, 3, padding=1), nn.BatchNorm2d(20)
        self.layer1, self.layer2[0] = nn.Identity(), nn.Conv2d(20, 8, 3, 2, 1)


def test_a_network_that_needs_another_trunk_is_named() -> None:
    with pytest.raises(SplitError, match=r"`expert_factory\(0\)` does not"):
        RIDEWrapper(CifarResNet(10, n=1), 2, fork_at="layer2", expert_factory=lambda k: Wide())


def test_misuse_of_a_factory_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"expert_width.*expert_factory"):
        RIDEWrapper(
            CifarResNet(10, n=1), 2, expert_width=0.5, expert_factory=lambda k: Narrow((8, 8))
        )
    with pytest.raises(ArgumentError, match="for 0 it returned int"):
        RIDEWrapper(CifarResNet(10, n=1), 2, expert_factory=lambda k: 3)
    with pytest.raises(ArgumentError, match="for 0 it returned str"):
        RIDEWrapper.from_parts(trunk(), lambda k: "no module")
    with pytest.raises(ArgumentError, match="`expert_factory` to be a function"):
        RIDEWrapper.from_parts(trunk(), [Expert(4)])


def test_equal_experts_are_warned_of() -> None:
    one = Expert(4)
    with pytest.warns(UserWarning, match="experts 0 and 1 equal weights"):
        RIDEWrapper.from_parts(trunk(), lambda k: one, 2, example_input=torch.randn(2, 3, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RIDEWrapper.from_parts(
            trunk(), lambda k: Expert(4), 2, example_input=torch.randn(2, 3, 8, 8)
        )


def ours(module: nn.Module) -> list[str]:
    return [type(m).__name__ for m in module.modules() if "ride_plugin" in type(m).__module__]


@pytest.mark.parametrize("kind", list(BACKBONES))
def test_an_expert_comes_back_as_a_module_of_the_backbones_own_class(kind: str) -> None:
    constructor, shape, _ = BACKBONES[kind]
    backbone, x = constructor(), torch.randn(3, *shape)
    model = RIDEWrapper(backbone, 2).eval()
    for k in range(2):
        plain = model.to_module(k)
        assert type(plain) is type(backbone)
        assert torch.equal(plain(x), model.run_expert(k, model.run_trunk(x))[0])
        assert ours(plain) == []
        assert b"ride_plugin" not in pickle.dumps(plain)
        constructor().load_state_dict(plain.state_dict())  # strict: the names are the backbone's
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())


def test_narrow_experts_come_back_and_train_alone() -> None:
    model = RIDEWrapper(CifarResNet(10, n=1), 2, expert_width=0.75).train()
    plain = model.to_module(1)
    assert plain.training
    assert plain.layer2[0].conv1.out_channels == 24
    kept = model.trunk.conv1.weight.clone()
    optimiser = torch.optim.SGD(plain.parameters(), 0.1)
    plain(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimiser.step()
    assert not torch.equal(plain.conv1.weight, kept)
    assert torch.equal(model.trunk.conv1.weight, kept)  # a copy


def test_what_one_expert_has_kept_in_training_does_not_hinder_another() -> None:
    class Keeping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)  # with its gradient history, which cannot be copied
            return self.kept

    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)]
    model = RIDEWrapper(nn.Sequential(*layers), 2, fork_at="2")
    model.experts[0][2] = Keeping(8, 8)  # after wrapping, as pruning replaces a weight
    x = torch.randn(3, 6)
    expected = expert_logits(model(x))
    for index in range(2):
        torch.testing.assert_close(model.to_module(index)(x), expected[:, index])


def test_the_whole_comes_back_as_modules_that_share_the_trunk() -> None:
    model = RIDEWrapper(CifarResNet(10, n=1), 3).eval()
    plain = model.to_modules()
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(torch.stack([module(x) for module in plain]).mean(0), model(x))
    assert type(plain) is nn.ModuleList
    assert ours(plain) == []
    assert plain[0].layer1 is plain[2].layer1
    assert plain[0].layer2 is not plain[2].layer2
    count = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in plain.parameters()) == count
    again = pickle.loads(pickle.dumps(plain))
    assert again[0].layer1 is again[1].layer1


def test_parts_come_back_as_a_sequential() -> None:
    model, body, experts = made_of_parts()
    plain = model.eval().to_module(1)
    x = torch.randn(3, 3, 8, 8)
    assert type(plain) is nn.Sequential
    assert ours(plain) == []
    assert torch.equal(plain(x), experts[1].eval()(body.eval()(x)))


def test_an_optimised_copy_comes_back_too() -> None:
    model = RIDEWrapper(CifarResNet(10, n=1), 2).eval()
    x = torch.randn(3, 3, 32, 32)
    plain = model.optimize_for_inference().to_module(1)
    assert ours(plain) == []
    torch.testing.assert_close(plain(x), expert_logits(model(x))[:, 1], rtol=1e-4, atol=1e-4)


def test_an_expert_that_does_not_exist_is_refused() -> None:
    model = RIDEWrapper(CifarResNet(10, n=1), 2)
    with pytest.raises(ArgumentError, match=r"0 to 1, but got 2"):
        model.to_module(2)


@pytest.mark.parametrize("copied", [False, True])
def test_experts_may_change_places(copied: bool) -> None:
    torch.manual_seed(0)
    model, x = RIDEWrapper(CifarResNet(n=1, num_classes=5), 3).eval(), torch.rand(4, 3, 32, 32)
    model = copy.deepcopy(model) if copied else model
    before = expert_logits(model(x)).detach()
    first, last = model.experts[0], model.experts[2]
    model.experts[0], model.experts[2] = last, first
    after = expert_logits(model(x))
    torch.testing.assert_close(after, before.flip(1))
    torch.testing.assert_close(model.to_module(0)(x), before[:, 2])
    after[:, 0].sum().backward()
    trained = [sum(float(p.grad.abs().sum()) for p in e.parameters()) for e in (first, last)]
    assert trained[0] == 0 < trained[1]


def three() -> RIDEWrapper:
    return RIDEWrapper(mlp(), 3, example_input=torch.randn(2, 20))


@pytest.mark.parametrize("stranger", ["copy", "of another model", "plain"])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("training", [True, False])
def test_an_expert_that_was_not_made_for_the_trunk_is_refused(stranger, index, training) -> None:
    model, x = three().train(training), torch.randn(4, 20)
    ours, state = model.experts[index], model.run_trunk(x)
    made = {"copy": copy.deepcopy(model.experts[2]), "of another model": three().experts[2]}
    model.experts[index] = made.get(stranger, nn.Linear(32, 7))
    for call in (lambda: model(x), lambda: model.run_expert(index, state)):
        with pytest.raises(ReplayError, match=rf"experts\[{index}\]` is none of .*load_state_dict"):
            call()
    if stranger != "plain":  # the remedy
        ours.load_state_dict(model.experts[index].state_dict())
        model.experts[index] = ours
        torch.testing.assert_close(model.to_module(index)(x), expert_logits(model(x))[:, index])


def test_another_number_of_experts_is_refused_with_a_remedy_that_works() -> None:
    model, x = three().eval(), torch.randn(4, 20)
    wanted = expert_logits(model(x))[:, [0, 2]]
    router = RoutingInference(model, ConfidenceRouter())
    for change in (lambda: model.experts.append(model.experts[0]), lambda: model.experts.pop(3)):
        change()
    assert expert_logits(model(x)).shape == (4, 3, 7)
    model.experts.append(three().experts[0])
    with pytest.raises(ReplayError, match="holds 4 experts, but the model was made with 3"):
        model(x)
    del model.experts[3], model.experts[1]
    for call in (lambda: model(x), lambda: router(x), lambda: model.router_inputs(x)):
        with pytest.raises(ReplayError, match=r"holds 2 experts.*`num_experts=2`"):
            call()
    new = RIDEWrapper(mlp(), 2, example_input=x).eval()
    new.trunk.load_state_dict(model.trunk.state_dict())
    for ours, theirs in zip(new.experts, model.experts, strict=True):
        ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(expert_logits(new(x)), wanted)


def by_example(module: nn.Module) -> nn.Module:
    return torch.jit.trace(module, torch.randn(3, 20))


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # of a category that depends on the version
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("trace", [torch.jit.script, by_example, torch.fx.symbolic_trace])
def test_what_cannot_follow_the_experts_is_refused_with_remedies_that_work(trace, inside) -> None:
    model, x = three().eval(), torch.randn(4, 20)
    with pytest.raises(ArgumentError, match=r"torch\.compile\(model\).*to_module\(k\)"):
        trace(nn.Sequential(nn.Identity(), model) if inside else model)
    torch.testing.assert_close(trace(model.to_module(1))(x), model.to_module(1)(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # of a category that depends on the version
def test_every_pass_is_refused_to_tracing() -> None:
    model, x = three().eval(), torch.randn(4, 20)
    routed = RoutingInference(model, ConfidenceRouter())
    for call in (routed, lambda x: model.run_trunk(x), lambda x: model.router_inputs(x)):
        with pytest.raises(ArgumentError, match=r"torch\.jit\.trace cannot follow"):
            torch.jit.trace(call, x, check_trace=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the exporter that is refused
def test_the_onnx_exporter_that_traces_is_refused_with_the_one_that_does_not() -> None:
    pytest.importorskip("onnx")
    with pytest.raises(ArgumentError, match=r"torch\.onnx\.export\(.*dynamo=True\)"):
        torch.onnx.export(three().eval(), (torch.randn(4, 20),), io.BytesIO(), dynamo=False)


@pytest.mark.parametrize("chosen", [0, 1])
def test_where_the_logits_are_is_said_for_the_experts_of_a_factory_as_well(chosen: int) -> None:
    networks = [TwoMatrices(12), TwoMatrices(12)]
    model = RIDEWrapper(
        TwoMatrices(), 2, fork_at="body", expert_factory=networks.__getitem__, logits=chosen
    ).eval()
    x = torch.randn(3, 8)
    for network in networks:
        network.stem = model.trunk.stem
    expected = torch.stack([network.eval()(x)[chosen] for network in networks], dim=1)
    torch.testing.assert_close(expert_logits(model(x)), expected)
