"""Models of a feature extractor and a classifier, and loops that call the two."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin import (
    ArgumentError,
    CheckpointError,
    ExpertOutput,
    ReplayError,
    RIDEError,
    RIDEWrapper,
    SplitError,
    _contexts,
    expert_logits,
    experts_loss,
)

from .backbones import CifarResNet


class Extractor(CifarResNet):
    """Returns features and feature maps, as codebases with attention on maps do."""

    def __init__(self) -> None:
        super().__init__(n=1)
        del self.linear

    def forward(self, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        maps = self.layer3(self.layer2(self.layer1(x)))
        return maps.mean((2, 3)), maps


class DotProduct(nn.Module):
    """Returns logits and nothing, and takes centroids that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor, *centroids: Any) -> tuple[Tensor, None]:
        return self.fc(x), None


def pair(**options: Any) -> tuple[RIDEWrapper, nn.Module, nn.Module]:
    extractor, classifier = Extractor(), DotProduct()
    return RIDEWrapper.from_pair(extractor, classifier, 3, **options), extractor, classifier


def test_a_pair_is_a_backbone() -> None:
    model, extractor, classifier = pair(init="copy")
    x = torch.randn(4, 3, 32, 32)
    assert model.eval()(x).shape == (4, 10)
    assert model.fork_at == "feature_extractor.layer2"
    assert model.classifier_name == "classifier.fc"
    assert model.feature_dim == 64
    assert {name.split(".")[1] for name, _ in model.trunk.named_parameters()} <= {
        "bn1", "conv1", "layer1"
    }  # fmt: skip
    classifier.load_state_dict(model.experts[1].classifier.state_dict())
    expected = classifier(extractor.eval()(x)[0])[0]
    torch.testing.assert_close(expert_logits(model(x))[:, 1], expected)
    plain = model.to_module(1)
    assert type(plain) is nn.ModuleDict
    torch.testing.assert_close(plain["classifier"](plain["feature_extractor"](x)[0])[0], expected)
    assert b"ride_plugin" not in pickle.dumps(plain)


def test_a_loop_that_calls_two_modules_goes_on_as_it_was() -> None:
    model, _, _ = pair()
    networks = dict(zip(("feat_model", "classifier"), model.as_pair(), strict=True))
    groups = [{"params": network.parameters()} for network in networks.values()]
    held = [parameter for group in groups for parameter in list(group["params"])]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len(list(model.parameters()))  # each belongs to one of the two
    before = [p.clone() for p in model.parameters()]
    x, y = torch.randn(6, 3, 32, 32), torch.randint(0, 10, (6,))
    optimizer = torch.optim.SGD(
        [{"params": n.parameters(), "lr": lr} for n, lr in zip(networks.values(), (0.1, 0.2))],  # noqa: B905
    )
    for network in networks.values():
        network.train()
    features, maps = networks["feat_model"](x)
    logits, routes = networks["classifier"](features, None)
    assert features.shape == (6, 3 * 64)
    assert maps is None
    assert routes is None
    assert logits.shape == (6, 10)
    experts_loss(F.cross_entropy, logits, y).backward()
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(changed)


@pytest.mark.parametrize("training", [False, True])
def test_the_two_modules_compute_what_the_model_computes(training: bool) -> None:
    model, _, _ = pair(fork_at="feature_extractor.layer3")
    other = copy.deepcopy(model)
    net, head = other.as_pair()
    net.train(training)
    head.train(training)
    model.train(training)
    x = torch.randn(6, 3, 32, 32)
    expected = model(x)
    logits, _ = head(net(x)[0])
    assert torch.equal(logits, expected)
    assert torch.equal(expert_logits(logits), expert_logits(expected))
    expert_logits(expected).square().sum().backward()
    expert_logits(logits).square().sum().backward()
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for p, q in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(p, q)
    for mine, theirs in zip(other.experts, model.experts, strict=True):  # none is left behind
        kept = theirs.classifier._forward_pre_hooks
        assert len(mine.classifier._forward_pre_hooks) == len(kept)


def test_rows_of_the_features_are_rows_of_the_logits() -> None:
    model, _, _ = pair()
    net, head = model.eval().as_pair()
    x = torch.randn(6, 3, 32, 32)
    features = net(x)[0].detach()[[4, 1]]
    torch.testing.assert_close(head(features)[0], model(x)[[4, 1]])


@pytest.mark.parametrize("fork_at", [None, "classifier"])
@pytest.mark.parametrize("name", ["epoch", "_epoch"])
def test_what_is_set_on_one_of_the_two_modules_its_parts_read(
    name: str, fork_at: str | None
) -> None:
    class Scaled(nn.Sequential):
        epoch, _epoch = 0, 0

        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * (1 + self.epoch + self._epoch)

    body = Scaled(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU())
    model = RIDEWrapper.from_pair(body, Scaled(nn.Linear(12, 5)), num_experts=3, fork_at=fork_at)
    features, classifier = model.eval().as_pair()
    x = torch.randn(4, 8)
    before, logits = features(x), classifier(features(x))
    setattr(features, name, 1)
    torch.testing.assert_close(features(x), 2 * before)
    setattr(classifier, name, 2)
    torch.testing.assert_close(classifier(before), 3 * logits)
    torch.testing.assert_close(model(x), classifier(features(x)))
    assert (getattr(features, name), getattr(classifier, name)) == (1, 2)


def test_the_two_modules_are_moved_copied_and_stored_like_any() -> None:
    model, _, _ = pair(fork_at="feature_extractor.layer3")
    net, head = model.as_pair()
    x = torch.randn(2, 3, 32, 32)
    for module in (net, head):
        module.double().eval()
    expected = head(net(x.double())[0])[0]
    assert expected.dtype == torch.float64
    torch.testing.assert_close(expected, model(x.double()))
    twins = copy.deepcopy((net, head))
    assert torch.equal(twins[1](twins[0](x.double())[0])[0], expected)
    fresh = [m.double().eval() for m in pair(fork_at="feature_extractor.layer3")[0].as_pair()]
    for module, trained in zip(fresh, (net, head), strict=True):
        module.load_state_dict(trained.state_dict())
    assert torch.equal(fresh[1](fresh[0](x.double())[0])[0], expected)


def test_a_pair_of_plain_modules_and_a_further_one_after_them() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    extractor = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16))
    classifier = nn.Sequential(nn.ReLU(), nn.Linear(16, 5), Scale())
    model = RIDEWrapper.from_pair(extractor, classifier, 2)
    assert model.fork_at == model.classifier_name == "classifier.1"
    with pytest.raises(ArgumentError, match=r"'classifier\.1', inside it\. Pass `fork_at='class"):
        model.as_pair()
    model = RIDEWrapper.from_pair(extractor, classifier, 2, fork_at="classifier")
    net, head = model.eval().as_pair()
    x = torch.randn(4, 8)
    assert torch.equal(head(net(x)), model(x))
    assert len(list(head.parameters())) == 6


def test_what_is_not_certain_of_a_pair_is_asked_for() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = torch.relu(self.a(x))
            return {"early": x, "late": self.b(x)}

    with pytest.raises(SplitError, match=r"Which part.*features\?.*Pass `features=`"):
        RIDEWrapper.from_pair(Two(), nn.Linear(16, 5), 2, example_input=torch.randn(2, 8))
    model = RIDEWrapper.from_pair(Two(), nn.Linear(16, 5), 2, features="late")
    net, head = model.eval().as_pair()
    x = torch.randn(3, 8)
    features = net(x)
    assert features["early"] is None
    assert torch.equal(head(features["late"]), model(x))
    computed = RIDEWrapper.from_pair(
        Two(), nn.Linear(16, 5), 2, features=lambda output: output["late"] + output["early"]
    )
    assert computed(x).shape == (3, 5)
    with pytest.raises(ArgumentError, match="Call the model as a whole"):
        computed.as_pair()


def test_misuse_of_a_pair_is_refused() -> None:
    with pytest.raises(ArgumentError, match="`classifier` to be a torch"):
        RIDEWrapper.from_pair(nn.Linear(8, 8), F.linear)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"RIDEWrapper\.from_pair"):
        RIDEWrapper(CifarResNet(n=1), 2).as_pair()
    net, head = pair()[0].as_pair()
    with pytest.raises(ArgumentError, match=r"`features` to be \[B, 192\].*\[2, 64\]"):
        head(torch.randn(2, 64))
    with pytest.raises(ArgumentError, match=r"`features` to be \[B, 192\]"):
        head(net(torch.randn(2, 3, 32, 32)))


class Causal(nn.Linear):
    """A classifier that is given more than features, as a long-tail repository's is."""

    def forward(self, x: Tensor, label: Any, embed: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Defaults(nn.Linear):
    def forward(self, x: Tensor, label: Any = None, *, embed: Any = None) -> Tensor:
        return super().forward(x)


def test_a_classifier_that_needs_more_than_features_is_told_to_give_defaults() -> None:
    extractor, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), torch.randn(2, 6)
    with pytest.raises(ArgumentError, match=r"`classifier`.*\(x.*label.*embed.*`?defaults"):
        RIDEWrapper.from_pair(extractor, Causal(8, 5), 2, example_input=x)
    model = RIDEWrapper.from_pair(
        extractor, Defaults(8, 5), 2, fork_at="classifier", example_input=x
    )
    assert model(x).shape == (2, 5)


def test_one_process_runs_the_two_modules_on_one_device() -> None:
    net, head = pair()[0].eval().as_pair()
    x = torch.randn(2, 3, 32, 32)
    parallel = nn.DataParallel(net), nn.DataParallel(head)  # without a GPU: one device
    assert torch.equal(parallel[1](parallel[0](x)[0])[0], head(net(x)[0])[0])


def test_a_swapped_pair_is_named() -> None:
    extractor = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    with pytest.raises(SplitError, match=r"a Linear and a Sequential.* Swap them: `from_pair"):
        RIDEWrapper.from_pair(nn.Linear(16, 7), extractor, 2)
    with pytest.raises(SplitError, match="accepts") as caught:  # wrong in either order
        RIDEWrapper.from_pair(extractor, nn.Linear(17, 7), 2)
    assert "Swap" not in str(caught.value)


def frozen_pair(**options: Any) -> RIDEWrapper:
    """Experts share a linear layer's weights and a normalisation layer that counts no more."""
    extractor = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16))
    extractor.requires_grad_(False)
    extractor[3].eval()
    options = {"init": "copy", "fork_at": "feature_extractor.2", **options}
    return RIDEWrapper.from_pair(extractor, nn.Linear(16, 5), 2, **options)


def plus_one(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() + 1 for name, tensor in module.state_dict().items()}


def test_a_state_of_experts_that_share_nothing_is_refused_by_a_half() -> None:
    net, head = frozen_pair().as_pair()
    before = [tensor.clone() for tensor in (*net.parameters(), *net.buffers())]
    state = net.state_dict()
    state["experts.1.2.weight"] = state["experts.1.2.weight"] + 1
    for strict in (True, False):
        for holder, prefix in ((net, ""), (nn.ModuleDict({"net": net, "head": head}), "net.")):
            given = {prefix + name: tensor for name, tensor in state.items()}
            with pytest.raises(CheckpointError, match=r"another `2\.weight` for each expert"):
                holder.load_state_dict(given, strict=strict and not prefix)
    assert all(map(torch.equal, before, (*net.parameters(), *net.buffers())))


def test_a_half_loads_a_shared_tensor_from_one_name() -> None:
    model = frozen_pair()
    net, _ = model.as_pair()
    state = plus_one(net)
    given = {name: tensor for name, tensor in state.items() if not name.startswith("experts.1.2.")}
    assert str(net.load_state_dict(given)) == "<All keys matched successfully>"
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("assign", [False, True])
def test_what_experts_share_is_one_tensor_after_a_half_is_loaded_or_moved(assign: bool) -> None:
    model = frozen_pair()
    net, head = model.as_pair()
    net.load_state_dict(plus_one(net), assign=assign)
    head.load_state_dict(plus_one(head), assign=assign)
    net.double()
    head.double()
    first, second = (expert.feature_extractor for expert in model.experts)
    assert first[2].weight is second[2].weight
    assert first[3].running_mean is second[3].running_mean
    (x,), _ = model.example_input(6)
    assert x.dtype == torch.float64
    torch.testing.assert_close(head.eval()(net.eval()(x)), model.eval()(x))


@pytest.mark.parametrize("index", [0, 1])
def test_a_half_keeps_frozen_layers_in_evaluation(index: int) -> None:
    model = frozen_pair()
    layers = [expert.feature_extractor[3] for expert in model.experts]
    half = model.eval().as_pair()[index]
    half.train()
    assert [layer.training for layer in layers] == [False, False]
    assert half.training
    assert model.training
    layers[0].requires_grad_(True)  # weights of both: layers that train count again
    if index == 0:
        half.train()
        assert [layer.training for layer in layers] == [True, True]


class Writes(nn.Module):
    """Counts in a table that all experts share, once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(2, 2, dtype=torch.long))
        self.writes = False

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            self.table += 1
        return x * (1 + self.table.sum())


class Settings:
    def __init__(self) -> None:
        self.scale, self.grows = 1.0, False


class Configured(nn.Linear):
    def __init__(self, settings: Settings) -> None:
        super().__init__(16, 16)
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        if self.settings.grows:
            self.settings.scale += 1
        return super().forward(x) * self.settings.scale


def test_a_half_refuses_the_passes_that_the_model_refuses() -> None:
    settings = Settings()
    body = [nn.Linear(8, 16), nn.ReLU(), Configured(settings), Writes()]
    model = RIDEWrapper.from_pair(
        nn.Sequential(*body), nn.Linear(16, 5), 2, fork_at="feature_extractor.2"
    )
    net, head = model.as_pair()
    x = torch.randn(6, 8)
    head(net(x))
    for expert in model.experts:
        expert.feature_extractor[3].writes = True
    with pytest.raises(ReplayError, match=r"written.*3\.table.*all experts share"):
        net(x)
    for expert in model.experts:
        expert.feature_extractor[3].writes = False
    settings.grows = True
    with pytest.raises(ReplayError, match=r"changed `feature_extractor\.2\.settings`"):
        net(x)


def test_a_half_tells_what_was_unfrozen_too_late() -> None:
    model = frozen_pair()
    net, _ = model.as_pair()
    net.requires_grad_(True)
    with pytest.warns(UserWarning, match="frozen when the model was wrapped"):
        net(torch.randn(6, 8))


def test_a_half_waits_for_threads_that_evaluate_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_contexts, "_PATIENCE", 0.1)
    model = frozen_pair()
    net, head = model.as_pair()
    x = torch.randn(6, 8)
    features = net(x)
    with ThreadPoolExecutor(1) as worker, model.evaluating():
        for half, given in ((net, x), (head, features)):
            with pytest.raises(RIDEError, match="has it in evaluation mode"):
                worker.submit(half, given).result()
            with torch.no_grad():
                half(given)


class Compares(nn.Sequential):
    """A loader that looks up what the other side of the cut holds."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("0.weight", "2.weight"):
            assert state[prefix + name].dim() == 2
        super()._load_from_state_dict(state, prefix, *rest)


def test_a_loader_of_the_extractor_finds_what_the_other_side_holds() -> None:
    net = Compares(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
    model = RIDEWrapper.from_pair(net, nn.Linear(16, 5), 2, fork_at="feature_extractor.2")
    for half in model.as_pair():
        state = plus_one(half)
        assert str(half.load_state_dict(state)) == "<All keys matched successfully>"
        assert all(torch.equal(t, state[name]) for name, t in half.state_dict().items())


def test_a_half_says_that_a_state_holds_nothing_new() -> None:
    for half in frozen_pair().as_pair():
        with pytest.warns(UserWarning, match="nothing but the model's own tensors"):
            half.load_state_dict(half.state_dict())
        half.load_state_dict(plus_one(half))


def test_halves_that_keep_activations_are_copied() -> None:
    class Keeps(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            self.kept = super().forward(x)
            return self.kept

    net = Keeps(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
    model = RIDEWrapper.from_pair(net, nn.Linear(16, 5), 2, fork_at="feature_extractor.2")
    halves, x = model.as_pair(), torch.randn(6, 8)
    expected = halves[1](halves[0](x))
    twins = copy.deepcopy(halves)
    assert torch.equal(twins[1](twins[0](x)), expected)
    assert not {*map(id, twins[0].parameters())} & {*map(id, model.parameters())}
    assert twins[0].trunk is twins[0].whole.trunk
    assert twins[0].whole is twins[1].whole
    alone = copy.deepcopy(halves[0])
    assert torch.equal(halves[1](alone(x)), expected)


def test_a_module_that_was_replaced_in_the_first_half_is_told() -> None:
    net, head = frozen_pair().as_pair()
    x = torch.randn(6, 8)
    head.experts[0] = nn.Linear(16, 5)  # which the second half runs
    head(net(x))
    net.experts[0] = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(RIDEError, match=r"as_pair\(\)"):
        net(x)


@dataclass(frozen=True)
class Output:
    features: Tensor
    hidden: Tensor
    size: int


class ReturnsFields(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Any:
        hidden = self.a(x).relu()
        return Output(self.b(hidden), hidden, len(x))


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class ReturnsObject(nn.Linear):
    def __init__(self, kind: Any) -> None:
        super().__init__(16, 5)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(logits=super().forward(x))


def test_a_pair_returns_dataclasses_and_objects_where_its_modules_did() -> None:
    model = RIDEWrapper.from_pair(
        ReturnsFields(), ReturnsObject(SimpleNamespace), 2, features="features",
        fork_at="feature_extractor.b",
    )  # fmt: skip
    net, head = model.eval().as_pair()
    x = torch.randn(6, 8)
    output = net(x)
    assert type(output) is Output
    assert output.features.shape == (6, 32)
    assert (output.hidden, output.size) == (None, None)
    logits = head(output.features)
    assert type(logits) is SimpleNamespace
    assert torch.equal(logits.logits, model(x))


def test_an_output_of_which_none_can_be_made_is_refused() -> None:
    model = RIDEWrapper.from_pair(
        nn.Sequential(nn.Linear(8, 16), nn.ReLU()), ReturnsObject(Slots), 2, fork_at="classifier"
    )
    with pytest.raises(ArgumentError, match=r"a Slots, of which none.*Call the model as a whole"):
        model.as_pair()


class Fills(nn.Sequential):
    """Each expert fills a list of its own; settings that several modules hold are one object."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.seen: list[float] = []
        self.settings = self[-1].settings = {"scale": 2.0}
        self.register_buffer("one", torch.ones(()))

    def forward(self, x: Tensor) -> Any:
        x = super().forward(x)
        self.seen.append(float(x.detach().mean()))
        return x * len(self.seen) * self.settings["scale"]


def test_a_list_that_is_set_on_a_half_is_each_experts_own_and_settings_are_all_experts() -> None:
    body = Fills(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
    last = Fills(nn.Linear(16, 5))
    model = RIDEWrapper.from_pair(body, last, 2, fork_at="feature_extractor.2")
    halves, x = model.as_pair(), torch.randn(6, 8)
    for half in halves:
        half.seen, half.settings = [], {"scale": 3.0}
    halves[1](halves[0](x))
    for name in ("feature_extractor", "classifier"):
        first, second = (expert.get_submodule(name) for expert in model.experts)
        assert (len(first.seen), len(second.seen)) == (1, 1)
        assert first.settings is second.settings
        assert first.settings == {"scale": 3.0}


def test_what_is_set_on_a_half_and_would_not_run_is_refused() -> None:
    body = Fills(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
    last = nn.Sequential(nn.Linear(16, 5))
    for fork_at in ("feature_extractor.2", "classifier"):
        model = RIDEWrapper.from_pair(body, last, 2, fork_at=fork_at)
        net, head = model.as_pair()
        for name, value in (("one", 2.0), ("one", torch.zeros(())), ("0", nn.Identity())):
            with pytest.raises(AttributeError, match=f"`{name}`.*{name}`, say"):
                setattr(net, name, value)
        with pytest.raises(AttributeError, match=r"`model\.experts\[k\]\.classifier\.0`"):
            setattr(head, "0", nn.Identity())
        net.head = nn.Linear(2, 2)  # nobody else's
        assert len(list(net.children())) == 3


@pytest.mark.parametrize("fork_at", ["feature_extractor.2", "classifier"])
def test_a_hook_of_the_classifier_runs_once(fork_at: str) -> None:
    def doubles(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        return (2 * args[0],)

    def squares(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, {**kwargs, **{key: value.square() for key, value in kwargs.items()}}

    class ByKeyword(nn.Sequential):
        def __call__(self, x: Tensor) -> Any:
            return super().__call__(input=x)

    body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12))
    for head, hook in (
        (nn.Sequential(nn.Linear(12, 5)), doubles),
        (ByKeyword(nn.Linear(12, 5)), squares),
    ):
        head.register_forward_pre_hook(hook, with_kwargs=hook is squares)
        model = RIDEWrapper.from_pair(body, head, 2, fork_at=fork_at).eval()
        features, classifier = model.as_pair()
        x = torch.randn(6, 8)
        for _ in range(2):
            assert torch.equal(expert_logits(classifier(features(x))), expert_logits(model(x)))


def test_the_second_half_returns_what_its_own_mode_asks_for() -> None:
    body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12))
    model = RIDEWrapper.from_pair(body, nn.Linear(12, 5), 2, return_experts="training")
    features, classifier = model.as_pair()
    x = torch.randn(6, 8)

    def returned() -> type:
        return type(classifier(features(x)))

    for set_modes in (
        lambda: (classifier.train(), features.eval()),
        lambda: (features.eval(), classifier.train()),
        lambda: model.train(),
    ):
        model.eval()
        set_modes()
        assert returned() is ExpertOutput
    for set_modes in (
        lambda: (classifier.eval(), features.train()),
        lambda: (features.train(), classifier.eval()),
        lambda: model.eval(),
    ):
        model.train()
        set_modes()
        assert returned() is Tensor


class ReadsNames(nn.Sequential):
    """Reads plain attributes of any name, some of which nobody has set."""

    factor = 1.0

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        for name in READ[:-2]:
            setattr(self, name, 1.0)

    def forward(self, x: Tensor) -> Any:
        x = super().forward(x)
        for name in READ[:-2]:
            x = x * getattr(self, name)
        return x * getattr(self, "absent", 1.0) * getattr(self, "_absent", 1.0)


READ = ("place", "path", "combine", "around", "width", "model", "whole", "shared", "relink",
        "_versions", "_lent", "_features", "factor", "absent", "_absent")  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_half_passes_on_whatever_name_the_plain_module_reads(name: str) -> None:
    body = ReadsNames(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12))
    model = RIDEWrapper.from_pair(
        body, ReadsNames(nn.Linear(12, 5)), 2, fork_at="feature_extractor.2"
    )
    features, classifier = model.eval().as_pair()
    x = torch.randn(4, 8)
    for expert in model.experts:
        nn.init.zeros_(expert.classifier[0].bias)
    before = expert_logits(model(x))
    for half, value, wanted in ((features, 2.0, 2), (classifier, 3.0, 6)):
        setattr(half, name, value)
        for repeats in range(2):
            torch.testing.assert_close(
                expert_logits(classifier(features(x))), wanted * before, msg=f"{name}, {repeats}"
            )
        half.load_state_dict(copy.deepcopy(half.state_dict()))
    torch.testing.assert_close(expert_logits(model(x)), 6 * before)
    again = copy.deepcopy(features), copy.deepcopy(classifier)
    torch.testing.assert_close(expert_logits(again[1](again[0](x))), 6 * before)


class TwoBranches(nn.Module):
    """Returns the features of one branch where a flag asks for them, else those of both."""

    def __init__(self, padded: bool) -> None:
        super().__init__()
        self.padded = padded
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.first, self.second = nn.Linear(16, 6), nn.Linear(16, 6)

    def forward(self, x: Tensor, branch: str | None = None) -> Tensor:
        x = self.body(x)
        if branch is None:
            return torch.cat((self.first(x), self.second(x)), dim=1)
        one = self.first(x) if branch == "first" else self.second(x)
        if not self.padded:
            return one
        return F.pad(one, (0, 6) if branch == "first" else (6, 0))


def test_parts_of_features_that_a_loop_would_concatenate_are_refused() -> None:
    model = RIDEWrapper.from_pair(
        TwoBranches(padded=False), nn.Linear(12, 5), 3, fork_at="feature_extractor.first"
    )
    features, classifier = model.as_pair()
    x, other = torch.randn(2, 4, 8)
    with pytest.raises(ReplayError, match=r"features \[B, 12\].*got \[4, 6\].*with zeros where"):
        features(x, branch="first")
    assert classifier(features(x)).shape == (4, 5)
    # What the message advises gives each expert the parts of its own.
    padded = RIDEWrapper.from_pair(
        TwoBranches(padded=True), nn.Linear(12, 5), 3, fork_at="feature_extractor.first"
    )
    features, classifier = padded.as_pair()
    mixed = 0.3 * features(x, branch="first") + 0.7 * features(other, branch="second")
    each = expert_logits(classifier(mixed))
    for k in range(3):
        plain = padded.to_module(k)
        assert isinstance(plain, nn.ModuleDict)
        halves = (
            0.3 * plain["feature_extractor"](x)[:, :6],
            0.7 * plain["feature_extractor"](other)[:, 6:],
        )
        torch.testing.assert_close(each[:, k], plain["classifier"](torch.cat(halves, dim=1)))


class WithLabels(nn.Module):
    """A classifier that returns something else where it is given labels, as a function says."""

    def __init__(self, instead: Any, width: int = 8) -> None:
        super().__init__()
        self.instead, self.fc = instead, nn.Linear(width, 5)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.fc(features)
        return (logits, None) if labels is None else self.instead(features, logits, labels)


@pytest.mark.parametrize(
    "instead",
    [
        lambda features, logits, labels: (logits.gather(1, labels[:, None]), None),
        lambda features, logits, labels: (F.cross_entropy(logits, labels), logits),
        lambda features, logits, labels: F.cross_entropy(logits, labels),
        lambda features, logits, labels: (features, logits),
        lambda features, logits, labels: ({"logits": logits}, None),
    ],
)
@pytest.mark.parametrize("width", [5, 8])
def test_a_classifier_that_returns_something_else_for_labels_is_refused(
    instead: Any, width: int
) -> None:
    extractor = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, width), nn.ReLU())
    model = RIDEWrapper.from_pair(extractor, WithLabels(instead, width), 3)
    features, classifier = model.as_pair()
    got = features(torch.randn(4, 6))
    with pytest.raises(ReplayError, match=r"logits of 5 classes lay.*beside the features"):
        classifier(got, torch.arange(4))
    assert classifier(got)[0].shape == (4, 5)


def test_labels_for_all_rows_reach_each_classifier() -> None:
    def margin(features: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        return logits - F.one_hot(labels, 5), None

    extractor = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    features, classifier = RIDEWrapper.from_pair(extractor, WithLabels(margin), 3).as_pair()
    got, labels = features(torch.randn(4, 6)), torch.tensor([3, 0, 4, 4])
    plain, told = (expert_logits(classifier(got, *args)[0]) for args in ((), (labels,)))
    torch.testing.assert_close(told, plain - F.one_hot(labels, 5)[:, None])


def test_a_half_says_that_a_batch_of_one_row_has_lost_its_dimension() -> None:
    class Squeezing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())[:, :, None].squeeze()

    features, _ = RIDEWrapper.from_pair(Squeezing(), nn.Linear(8, 5), 3).as_pair()
    assert features(torch.randn(2, 6)).shape == (2, 24)
    with pytest.raises(ReplayError, match="dropped the batch dimension"):
        features(torch.randn(1, 6))
