"""Fresh weights, copied weights, and what happens to frozen ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ride_plugin import RIDEWrapper
from ride_plugin._initialise import reinitialise
from ride_plugin._split._probe import clone_module

from .backbones import CifarResNet, mlp


def test_fresh_experts_differ_and_keep_the_spread() -> None:
    backbone = CifarResNet(n=1)
    with torch.no_grad():
        backbone.layer3[0].bn2.weight.zero_()  # zero-initialised gain: a constant
    model = RIDEWrapper(backbone, 3)
    name = "layer2.0.conv1.weight"
    weights = [expert.get_parameter(name) for expert in model.experts]
    original = backbone.get_parameter(name)
    for weight in weights:
        assert not torch.equal(weight, original)
        torch.testing.assert_close(weight.sort().values.std(), original.std(), rtol=1e-4, atol=0)
    assert not torch.equal(weights[0], weights[1])
    assert all((e.layer3[0].bn2.weight == 0).all() for e in model.experts)
    assert torch.equal(model.trunk.conv1.weight, backbone.conv1.weight)


def test_orthogonal_weights_stay_orthogonal() -> None:
    backbone = mlp()
    nn.init.orthogonal_(backbone[4].weight)
    model = RIDEWrapper(backbone, 2)
    weight = model.experts[1].get_parameter("4.weight")
    assert not torch.equal(weight, backbone[4].weight)
    torch.testing.assert_close(weight @ weight.t(), torch.eye(32), atol=1e-5, rtol=0)


def test_weights_that_cannot_be_redrawn_are_named() -> None:
    backbone = mlp()
    nn.init.eye_(backbone[4].weight)
    with pytest.warns(UserWarning, match=r"4\.weight"):
        model = RIDEWrapper(backbone, 2)
    assert torch.equal(model.experts[1].get_parameter("4.weight"), torch.eye(32))


def test_fresh_weights_for_a_trained_backbone_warn() -> None:
    backbone = CifarResNet(n=1)
    backbone(torch.randn(4, 3, 32, 32))
    with pytest.warns(UserWarning, match="looks trained"):
        RIDEWrapper(backbone, 2)


def test_copy_keeps_weights_and_renews_classifiers() -> None:
    backbone = CifarResNet(n=1)
    backbone(torch.randn(4, 3, 32, 32))
    model = RIDEWrapper(backbone, 2, init="copy")
    for expert in model.experts:
        assert torch.equal(expert.layer3[0].conv1.weight, backbone.layer3[0].conv1.weight)
        assert torch.equal(expert.layer3[0].bn1.running_var, backbone.layer3[0].bn1.running_var)
    heads = [head.weight for head in model.classifiers]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], backbone.linear.weight)


def test_zero_classifiers_do_not_stay_equal() -> None:
    backbone = mlp()
    nn.init.zeros_(backbone[-1].weight)
    first, second = (head.weight for head in RIDEWrapper(backbone, 2).classifiers)
    assert not torch.equal(first, second)
    assert first.abs().max() < 0.1


def test_frozen_parameters_keep_their_values() -> None:
    backbone = CifarResNet(n=1)
    kept = backbone.layer3[0].conv1.weight.requires_grad_(False)
    model = RIDEWrapper(backbone, 2)
    for expert in model.experts:
        assert torch.equal(expert.layer3[0].conv1.weight, kept)
        assert not expert.layer3[0].conv1.weight.requires_grad
        assert not torch.equal(expert.layer3[0].conv2.weight, backbone.layer3[0].conv2.weight)


def test_frozen_parameters_of_narrower_layers_warn() -> None:
    backbone = CifarResNet(n=1)
    backbone.layer3[0].conv1.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"layer3\.0\.conv1\.weight.*Unfreeze"):
        RIDEWrapper(backbone, 2, expert_width=0.75)


def test_frozen_layers_of_the_trunk_do_not_warn() -> None:
    backbone = CifarResNet(n=1)
    backbone.conv1.requires_grad_(False)
    model = RIDEWrapper(backbone, 2, expert_width=0.75)
    assert torch.equal(model.trunk.conv1.weight, backbone.conv1.weight)


def test_a_frozen_classifier_that_is_renewed_warns() -> None:
    backbone = CifarResNet(n=1).requires_grad_(False)
    with pytest.warns(UserWarning, match="Each expert gets a classifier of its own"):
        RIDEWrapper(backbone, 2, init="copy")


def test_experts_without_anything_to_learn_warn() -> None:
    backbone = mlp().requires_grad_(False)
    with pytest.warns(UserWarning, match="Every parameter behind the fork is frozen"):
        RIDEWrapper(backbone, 2)


def test_entries_are_shuffled_constants_stay_statistics_are_reset() -> None:
    expert = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    with torch.no_grad():
        expert[0].bias.fill_(0.25)
        expert[1].running_mean.fill_(3)
    before = clone_module(expert)
    assert reinitialise(expert, keep=set()) == []
    assert not torch.equal(expert[0].weight, before[0].weight)
    flat, old = expert[0].weight.flatten(), before[0].weight.flatten()
    assert torch.equal(flat.sort().values, old.sort().values)
    assert (expert[0].bias == 0.25).all()
    assert (expert[1].running_mean == 0).all()


def test_tied_tensors_are_kept() -> None:
    expert = nn.Linear(6, 5)
    before = expert.weight.clone()
    reinitialise(expert, keep={id(expert.weight)})
    assert torch.equal(expert.weight, before)
