"""Hooks and functions on a backbone: what follows its copies works, what cannot is refused."""

import types
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from ride_plugin import RIDEWrapper, SplitError
from tests.naive import train_both


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.early = nn.Linear(6, 8)
        self.middle = nn.Linear(8, 8)
        self.late = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)
        self.features = None

    def forward(self, x):
        x = self.early(x).relu()
        x = self.middle(x).relu()
        out = self.head(self.late(x).relu())
        return out if self.features is None else out + self.features.mean(1, keepdim=True)

    def keep(self, module, args, out):
        self.features = out


def wrapped(net):
    return RIDEWrapper(net, 2, fork_at="late", init="copy", example_input=torch.randn(2, 6))


@pytest.mark.parametrize("where", ["middle", "late"])
def test_a_hook_that_captured_the_backbone_is_refused_and_the_backbone_stays_as_it_is(where):
    net = Net()
    hooked = net.get_submodule(where)
    hooked.register_forward_hook(lambda module, args, out: setattr(net, "features", out))
    with pytest.raises(SplitError, match=f"forward hook of `{where}`.*the backbone itself"):
        wrapped(net)
    assert net.features is None


def test_other_functions_that_captured_a_part_are_refused():
    net = Net()
    net.early.scale = lambda x, early=net.early: x * early.weight.mean()
    with pytest.raises(SplitError, match=r"attribute `scale` of `early`.*captured `early`"):
        wrapped(net)
    net = Net()
    forward = net.forward
    net.forward = lambda x: forward(x) * 2
    with pytest.raises(SplitError, match="attribute `forward`"):
        wrapped(net)
    net = Net()
    parts = [net.middle.weight]
    net.late.register_forward_pre_hook(partial(lambda a, module, args: None, 1))
    wrapped(net)  # captured nothing
    net.late.register_forward_pre_hook(lambda module, args: (args[0] + parts[0].mean(),))
    with pytest.raises(SplitError, match=r"forward pre-hook of `late`.*`middle.weight`"):
        wrapped(net)


class Counting(nn.Linear):
    calls = 0

    def count(self, module, args, out):
        self.calls += 1
        return out * 2


def test_methods_follow_the_copies():
    for where in ("middle", "late"):
        net, x = Net(), torch.randn(5, 6)
        setattr(net, where, Counting(8, 8))
        net.get_submodule(where).register_forward_hook(net.get_submodule(where).count)
        net.forward = types.MethodType(Net.forward, net)
        single = RIDEWrapper(net, 1, fork_at="late", example_input=torch.randn(2, 6)).eval()
        assert net.get_submodule(where).calls == 0
        torch.testing.assert_close(single(x), net.eval()(x))


def test_a_method_that_writes_on_the_root_writes_on_each_experts_own():
    net = Net()
    net.late.register_forward_hook(net.keep)  # the root's, which runs on both sides
    train_both(net, wrapped(net), [torch.randn(5, 6) for _ in range(2)])


@pytest.mark.parametrize("where", ["early", "middle", "late", "head"])
@pytest.mark.parametrize("kind", ["pruned", "weight-normalised"])
def test_hooks_that_compute_a_weight_before_its_layer_runs(kind, where):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 6)
    layer = net.get_submodule(where)
    if kind == "pruned":
        prune.random_unstructured(layer, "weight", 0.4)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in many repositories
            nn.utils.weight_norm(layer)
    single = RIDEWrapper(net, 1, fork_at="late", example_input=torch.randn(2, 6)).eval()
    torch.testing.assert_close(single(x), net.eval()(x))
    model = wrapped(net).train()
    out = model(x)
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
