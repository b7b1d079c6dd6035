"""Backbones of which a deep copy is not what was copied: layers made anew, hooks with handles."""

from __future__ import annotations

import copy
import io
import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ReplayError, RIDEWrapper, SplitError, expert_logits
from ride_plugin._split._copying._copies import running_copy, same_values
from tests.naive import train_both


class Scale(nn.Module):
    """Copied as einops' layers are: from its settings, without hooks."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def __getstate__(self) -> dict[str, Any]:
        return {"by": self.by}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


def network() -> nn.Sequential:
    layers = [nn.Linear(6, 8), Scale(2.0), nn.Linear(8, 8), Scale(0.5), nn.ReLU(), nn.Linear(8, 4)]
    return nn.Sequential(*layers)


def wrapped(net: nn.Module, fork_at: str, num_experts: int = 3) -> RIDEWrapper:
    x = torch.randn(2, 6)
    return RIDEWrapper(net, num_experts, fork_at=fork_at, init="copy", example_input=x)


@pytest.mark.parametrize("fork_at", ["1", "2", "3", "5"])
def test_layers_that_are_copied_without_their_hooks(fork_at: str) -> None:
    net = network()
    train_both(net, wrapped(net, fork_at), [torch.randn(5, 6) for _ in range(3)])


@pytest.mark.parametrize("fork_at", ["2", "5"])
def test_hooks_of_others_on_such_layers_are_kept(fork_at: str) -> None:
    net = network()
    for layer in (net[1], net[3]):
        layer.register_forward_hook(lambda module, args, output: output + 1)
    model = wrapped(net, fork_at, num_experts=1).eval()
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), net.eval()(x), rtol=0, atol=0)
    for again in (model.to_module(0), copy.deepcopy(model), model.optimize_for_inference()):
        torch.testing.assert_close(again(x), net(x), rtol=0, atol=0)


class Extractor:
    """Collects features by hooks that are its methods, and keeps the handles."""

    def __init__(self, net: nn.Sequential, kept_in: str) -> None:
        self.seen: dict[int, Tensor] = {}
        handles = {
            str(k): net[k].register_forward_hook(partial(self.see, k) if k == 1 else self.see_three)
            for k in (1, 3)
        }
        self.handles = {"dict": handles, "list": list(handles.values()), "one": handles["3"]}[
            kept_in
        ]

    def see(self, number: int, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen[number] = output.detach()

    def see_gradient(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self.seen[2] = outputs[0].detach()

    def see_three(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.see(3, module, args, output)


@pytest.mark.parametrize("kept_in", ["dict", "list", "one"])
def test_the_methods_of_an_extractor_outside_are_copied_and_that_is_told(kept_in: str) -> None:
    net = nn.Sequential(*(nn.ReLU() if isinstance(part, Scale) else part for part in network()))
    extractor = Extractor(net, kept_in)
    with pytest.warns(UserWarning, match=r"A hook of `1` is a method .* \(Extractor\)"):
        model = wrapped(net, "2")
    assert extractor.seen == {}  # a build leaves it alone
    train_both(net, model, [torch.randn(5, 6) for _ in range(3)])


def test_a_method_that_hears_gradients_only_is_told_as_well() -> None:
    net, extractor = network(), Extractor(network(), "one")
    extractor.handles = net[2].register_full_backward_hook(extractor.see_gradient)
    with pytest.warns(UserWarning, match="A hook of `2` is a method of an object outside of"):
        model = wrapped(net, "5")
    train_both(net, model, [torch.randn(5, 6)])


def test_an_extractor_that_the_backbone_holds_is_copied_with_it_in_silence() -> None:
    net = nn.Sequential(*(nn.ReLU() if isinstance(part, Scale) else part for part in network()))
    net.extractor = Extractor(net, "list")  # type: ignore[assignment]
    train_both(net, wrapped(net, "2"), [torch.randn(5, 6) for _ in range(3)])


class TossesACoin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.choices = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        return random.choice(self.choices)(x)


@pytest.mark.parametrize("seed", range(4))
def test_a_module_on_its_own_is_compared_with_the_same_chances(seed: int) -> None:
    net = nn.Sequential(TossesACoin(), nn.ReLU(), TossesACoin(), nn.ReLU(), nn.Linear(6, 4))
    model = wrapped(net, "2").eval()
    random.seed(seed)
    alone = model.to_module(1)
    x = torch.randn(3, 6)
    before = random.getstate()
    expected = model.run_expert(1, model.run_trunk(x))[0]
    random.setstate(before)
    torch.testing.assert_close(alone(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"init": "copy"}, {"init": "fresh"}, {"expert_width": 0.5}])
def test_marks_on_parameters_are_on_those_of_trunk_and_experts(options: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    group = {"lr": 1e-4}
    for parameter in net.parameters():
        parameter._optim = group
        parameter._no_weight_decay = parameter.dim() == 1
        parameter.mask = torch.ones(parameter.shape)
        parameter.partner = net[0].weight
    model = RIDEWrapper(net, 2, fork_at="2", example_input=torch.randn(2, 6), **options)
    for made in (model, model.to_module(1), copy.deepcopy(model)):
        parameters: list[Any] = list(made.parameters())
        assert all(p._optim == group for p in parameters)
        assert [p._no_weight_decay for p in parameters] == [p.dim() == 1 for p in parameters]
        assert not {id(p.mask) for p in parameters} & {id(p.mask) for p in net.parameters()}
        assert all(p.partner is parameters[0] for p in parameters)


def test_marks_on_parameters_of_experts_that_were_made_by_hand() -> None:
    def made(layer: nn.Module) -> nn.Module:
        for parameter in layer.parameters():
            parameter.lr_scale = 0.1
        return layer

    def expert(index: int) -> nn.Module:
        return made(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))

    trunk = made(nn.Sequential(nn.Linear(6, 8), nn.ReLU()))
    model = RIDEWrapper.from_parts(trunk, expert, 2, example_input=torch.randn(2, 6))
    parameters: list[Any] = list(model.parameters())
    assert [p.lr_scale for p in parameters] == [0.1] * 10


class Eighths(Tensor):
    """A weight in eight bits, as libraries of quantization have: it knows few operations."""

    codes: Tensor
    KNOWN = (torch.ops.aten.detach, torch.ops.aten.clone, torch.ops.aten._to_copy)

    @staticmethod
    def __new__(cls, codes: Tensor) -> Eighths:
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        made.codes = codes
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Eighths:
        return Eighths(inner["codes"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in cls.KNOWN:
            return Eighths(args[0].codes.clone())
        raise NotImplementedError(f"Eighths does not know {func}.")


class Dequantizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight = Eighths(torch.randint(-8, 8, (8, 8), dtype=torch.int8))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.adapter = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        return x @ (weight.codes / 8) + self.adapter(x)


@pytest.mark.parametrize("fork_at", ["2", "4"])
def test_frozen_weights_of_a_class_that_knows_few_operations(fork_at: str) -> None:
    net = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), Dequantizes(), nn.ReLU(), Dequantizes(), nn.Linear(8, 4)
    )
    model = wrapped(net, fork_at)
    assert type(model.to_module(1)[4].weight) is type(net[4].weight)
    weights = {id(e.get_submodule("4").weight) for e in model.experts}
    assert len(weights) == 1
    model.train()
    copies = [model.to_module(k) for k in range(3)]
    x = torch.randn(5, 6)
    each = expert_logits(model(x))
    each.sum().backward()
    for k, alone in enumerate(copies):
        torch.testing.assert_close(each[:, k], alone(x), rtol=0, atol=0)


def test_large_weights_are_compared_to_the_bit_and_zeros_and_nans_as_equal() -> None:
    first = torch.randn(200, 300)
    first[0, 0], first[1, 1] = 0.0, torch.nan
    second = first.clone()
    second[0, 0] = -0.0
    assert same_values(first, second)
    assert same_values(first.t(), second.t())
    assert same_values(first[:, 1:], second[:, 1:])
    second[199, 299] += 1e-6
    assert not same_values(first, second)
    assert not same_values(first, first.double())


def test_a_view_of_a_buffer_is_one_of_the_copied_buffer_whichever_comes_first() -> None:
    class Table(nn.Module):
        def __init__(self, view_first: bool) -> None:
            super().__init__()
            values = torch.randn(4, 3)
            if view_first:
                self.first_row = values[0]
            self.register_buffer("values", values)
            if not view_first:
                self.first_row = values[0]

    for original in (Table(True), Table(False)):
        copied = running_copy(original, (original,))
        copied.values.zero_()
        assert not copied.first_row.any()
        assert original.values.any()


class KeepsWhatItSaw(nn.Module):
    """Leaves the features of itself and of a frozen teacher for the loss, as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.teacher = copy.deepcopy(self.body).requires_grad_(False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        taught, learned = self.teacher(x), self.body(x)
        self.seen = (learned, taught)
        return self.head(learned)


def test_a_model_that_keeps_what_it_saw_is_copied_and_saved_as_a_whole() -> None:
    x = torch.randn(4, 8)
    model = RIDEWrapper(KeepsWhatItSaw(), 2, fork_at="body.2", example_input=x).eval()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        alone, file = model.to_module(1), io.BytesIO()
        torch.save(alone, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), alone(x))
    with pytest.raises(ReplayError, match="what `teacher` returned before the fork"):
        copy.deepcopy(model).experts[1].seen[1].sum()


class Held:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *args: Any) -> None:
        assert self.value


UNCOPIED: list[Callable[[], Any]] = [threading.Lock, threading.local, lambda: iter(i for i in "a")]


@pytest.mark.parametrize("make", UNCOPIED, ids=["lock", "local", "generator"])
@pytest.mark.parametrize("inside", [lambda value: value, lambda value: [value], Held])
@pytest.mark.parametrize("place", ["net", "0.net", "5.net"])
def test_what_cannot_be_copied_is_named(
    place: str, inside: Callable[[Any], Any], make: Callable[[], Any]
) -> None:
    net = network()
    path, _, name = place.rpartition(".")
    setattr(net.get_submodule(path), name, inside(make()))
    with pytest.raises(SplitError, match=rf"attribute `{place}` \(\w+\) raises TypeError.*Remove"):
        wrapped(net, "2")


def test_a_file_and_a_hook_that_cannot_be_copied_are_named() -> None:
    net = network()
    net[2].register_forward_hook(Held(threading.Lock()))
    with pytest.raises(SplitError, match=r"attribute `2\._forward_hooks`"):
        wrapped(net, "2")
    with open(__file__, encoding="utf-8") as file:
        net = network()
        net[4].log = file
        with pytest.raises(SplitError, match=r"attribute `4\.log` \(TextIOWrapper\)"):
            wrapped(net, "2")


class LeavesOut(nn.Linear):
    """What the message advises."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return super().forward(x)


@pytest.mark.parametrize("fork_at", ["2", "5"])
def test_a_class_that_leaves_it_out_is_copied(fork_at: str) -> None:
    net = network()
    net[2] = LeavesOut()
    train_both(net, wrapped(net, fork_at), [torch.randn(5, 6) for _ in range(2)])
