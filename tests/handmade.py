"""Models split by hand: they satisfy what routing asks of a model without using the wrapper."""

import re
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.resnets import CifarResNet
from ride_plugin import ExpertRouter
from ride_plugin.routing import RouterInputs


@dataclass(frozen=True)
class HandmadeState:
    features: torch.Tensor

    @property
    def batch_size(self):
        return len(self.features)

    def select(self, rows):
        return HandmadeState(self.features.index_select(0, rows))


class HandmadeModel(nn.Module):
    """A trunk and experts, each expert giving logits and features; counts what it runs."""

    def __init__(self, trunk, experts, num_classes, feature_dim, example):
        super().__init__()
        self.trunk = trunk
        self.experts = nn.ModuleList(experts)
        self.num_experts = len(self.experts)
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self._example = example
        self.trunk_runs = 0
        self.rows_of_expert = [[] for _ in self.experts]

    def run_trunk(self, x):
        if not torch.compiler.is_compiling():
            self.trunk_runs += 1
        return HandmadeState(self.trunk(x))

    def run_expert(self, index, state):
        if not torch.compiler.is_compiling():
            self.rows_of_expert[index].append(state.batch_size)
        return self.experts[index](state.features)

    def forward(self, x):
        state = self.run_trunk(x)
        return torch.stack([expert(state.features)[0] for expert in self.experts], 1).mean(1)

    def router_inputs(self, x):
        with self.evaluating(), torch.no_grad():
            state = self.run_trunk(x)
            pairs = [self.run_expert(i, state) for i in range(self.num_experts)]
            logits, features = zip(*pairs, strict=True)
            return RouterInputs(torch.stack(logits, 1), torch.stack(features, 1))

    @contextmanager
    def evaluating(self):
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield self
        finally:
            for module in training:
                module.training = True

    def example_input(self, batch_size=1):
        return (self._example.expand(batch_size, *self._example.shape[1:]),), {}


class SmallExpert(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(8, width, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        features = F.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.fc(features), features


def small_model(num_experts=3, num_classes=5, width=12):
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    experts = [SmallExpert(width, num_classes) for _ in range(num_experts)]
    return HandmadeModel(trunk, experts, num_classes, width, torch.zeros(1, 3, 8, 8))


class Moody(nn.Module):
    """A router whose gate depends on its mode: at random in training, the same in evaluation."""

    def __init__(self, num_classes):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(num_classes), nn.Dropout(0.5)
        self.linear = nn.Linear(num_classes, 1)

    def gate(self, index, mean_logits, features):
        return self.linear(self.drop(self.norm(mean_logits))).squeeze(1)


class Cosine(nn.Module):
    def __init__(self, in_features, num_classes):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, num_classes).normal_())

    def forward(self, x):
        return 30 * F.normalize(x, dim=1) @ F.normalize(self.weight, dim=0)


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = CifarResNet.stage(16, 16, 1)

    def forward(self, x):
        return self.layer1(F.relu(self.bn1(self.conv1(x))))


class ResNetExpert(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.layer2 = CifarResNet.stage(16, width // 2, 2)
        self.layer3 = CifarResNet.stage(width // 2, width, 2)
        self.linear = Cosine(width, num_classes)

    def forward(self, x):
        features = self.layer3(self.layer2(x)).mean((2, 3))
        return self.linear(features), features


def resnet32_ride(state=None, num_experts=3, width=48, num_classes=100):
    """The authors' three-quarter width ResNet-32; ``state`` is a state dict under their names."""
    experts = [ResNetExpert(width, num_classes) for _ in range(num_experts)]
    model = HandmadeModel(Stem(), experts, num_classes, width, torch.zeros(1, 3, 32, 32)).eval()
    router = ExpertRouter.for_model(model, inputs="paper")
    if state is not None:
        own, gates = {}, {}
        for key, value in state.items():
            key = key.removeprefix("backbone.")
            if key.startswith("expert_help_pred_"):
                key = key.replace("expert_help_pred_hidden_fcs", "hidden")
                gates[key.replace("expert_help_pred_fc", "output")] = value
            elif match := re.match(r"(layer2|layer3|linear)s\.(\d)\.(.*)", key):
                own["experts.{1}.{0}.{2}".format(*match.groups())] = value
            else:
                own[f"trunk.{key}"] = value
        model.load_state_dict(own)
        router.load_state_dict(gates)
    return model, router


def resnet32_plain(num_classes=100):
    """The single network that the experts replace, at full width."""
    return nn.Sequential(Stem(), _First(ResNetExpert(64, num_classes))).eval()


class _First(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]
