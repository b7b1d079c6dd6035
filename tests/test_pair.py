"""Models of a feature extractor and a classifier, and loops that call the two."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin import ArgumentError, RIDEWrapper, SplitError, expert_logits, experts_loss

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
def test_what_is_set_on_one_of_the_two_modules_its_parts_read(fork_at: str | None) -> None:
    class Scaled(nn.Sequential):
        epoch = 0

        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * (1 + self.epoch)

    body = Scaled(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU())
    model = RIDEWrapper.from_pair(body, Scaled(nn.Linear(12, 5)), num_experts=3, fork_at=fork_at)
    features, classifier = model.eval().as_pair()
    x = torch.randn(4, 8)
    before, logits = features(x), classifier(features(x))
    features.epoch = 1
    torch.testing.assert_close(features(x), 2 * before)
    classifier.epoch = 2
    torch.testing.assert_close(classifier(before), 3 * logits)
    torch.testing.assert_close(model(x), classifier(features(x)))
    assert (features.epoch, classifier.epoch) == (1, 2)


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
