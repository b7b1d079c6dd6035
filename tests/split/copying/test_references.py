"""Hooks and functions on a backbone: what follows its copies works, what cannot is refused."""

import gc
import types
import warnings
import weakref
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


@pytest.mark.parametrize("kind", [lambda f: {"scaled": f}, lambda f: [f], lambda f: (f, 1)])
def test_functions_in_containers_that_captured_a_part_are_refused(kind):
    net = Net()
    net.late.acts = kind(lambda x: x * net.middle.weight.mean())
    with pytest.raises(SplitError, match=r"attribute `acts` of `late`.*captured"):
        wrapped(net)
    net.late.acts = kind(lambda x: x.relu())
    wrapped(net)


def captures(parent):
    return lambda x: x * parent().early.bias.mean()


WEAK = {
    "reference": weakref.ref,
    "proxy": weakref.proxy,
    "method": lambda net: weakref.WeakMethod(net.keep),
    "in a list": lambda net: [weakref.ref(net)],
    "set": lambda net: weakref.WeakSet([net]),
    "keys": lambda net: weakref.WeakKeyDictionary({net: 1}),
    "values": lambda net: weakref.WeakValueDictionary({1: net}),
    "captured": lambda net: captures(weakref.ref(net)),
}


@pytest.mark.parametrize("kind", WEAK)
def test_weak_references_to_a_part_are_refused(kind):
    net = Net()
    object.__setattr__(net.late, "parent", WEAK[kind](net))
    with pytest.raises(SplitError, match=r"attribute `parent` of `late`.*the backbone itself"):
        wrapped(net)


def test_weak_references_to_others_and_to_what_is_gone_are_kept():
    net, other = Net(), nn.Linear(2, 2)
    net.late.others = [weakref.ref(other), weakref.ref(nn.Linear(2, 2))]
    net.late.proxies = (weakref.proxy(other),)
    net.lstm = nn.LSTM(8, 8)  # holds weak references to its own weights
    wrapped(net)


class Child(nn.Linear):
    def forward(self, x):
        return super().forward(x) * self.parent[0].early.weight.mean()


def test_a_parent_in_a_tuple_as_the_error_advises_leads_to_the_part_of_each_expert():
    net, x = Net(), torch.randn(5, 6)
    net.late = Child(8, 8)
    net.late.parent = (net,)
    expected = net.eval()(x)
    single = RIDEWrapper(net, 1, fork_at="late", example_input=torch.randn(2, 6)).eval()
    model = wrapped(net).train()
    del net
    gc.collect()
    torch.testing.assert_close(single(x), expected)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


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
