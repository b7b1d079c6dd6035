"""Backbones that checkpoint activations: the same gradients, or an error that says what works."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from benchmarks.zoo.images import conv_bn
from ride_plugin import ReplayError, RIDEWrapper, experts_loss
from ride_plugin._split._replay._reentrant import passed_by


class Checkpointing(nn.Module):
    """Stages of two blocks, checkpointed stage by stage, block by block, or all at once."""

    how = ""
    use_reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(conv_bn(3, 8), conv_bn(8, 8))
        self.layer2 = conv_bn(8, 16, 2)
        self.layer3 = nn.Sequential(conv_bn(16, 24, 2), conv_bn(24, 24))
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        stages: list[nn.Module] = [self.layer1, self.layer2, self.layer3]
        if self.how == "blocks":  # the stages themselves are not called
            stages = [*self.layer1, self.layer2, *self.layer3]
        if self.how == "all":
            x = self._run(self._body, x)
        else:
            for stage in stages:
                x = self._run(stage, x)
        return self.fc(x.mean((2, 3)))

    def _run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not (self.how and self.training):
            return function(x)
        return checkpoint(function, x, use_reentrant=self.use_reentrant)

    def _body(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(x)))


def set_how(model: nn.Module, how: str) -> None:
    for module in model.modules():
        if isinstance(module, Checkpointing):
            module.how = how


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    target = torch.arange(len(x)) % 10
    experts_loss(nn.functional.cross_entropy, model(x), target).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("how", ["stages", "blocks"])
def test_gradients_are_those_without_checkpointing(
    how: str, use_reentrant: bool, when: str
) -> None:
    backbone = Checkpointing()
    backbone.use_reentrant = use_reentrant
    if when == "before":
        set_how(backbone, how)
    model = RIDEWrapper(backbone, 3, fork_at="layer3")
    plain = copy.deepcopy(model)
    set_how(plain, "")
    set_how(model, how)
    x = torch.randn(4, 3, 12, 12, requires_grad=True)  # or reentrant checkpoints stop gradients
    expected, got = gradients(plain, x), gradients(model, x)
    for name, gradient in expected.items():
        assert gradient is not None
        assert got[name] is not None, name
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fork_at", ["layer1.1", "layer2", "layer3", "layer3.1"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("how", ["stages", "blocks"])
def test_each_layer_is_computed_again_once(how: str, use_reentrant: bool, fork_at: str) -> None:
    if how == "stages" and "." in fork_at:
        pytest.skip("a stage is one region")
    backbone = Checkpointing()
    backbone.use_reentrant = use_reentrant
    set_how(backbone, how)
    model = RIDEWrapper(backbone, 3, fork_at=fork_at)
    calls: dict[str, int] = {}
    gradients_of: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda *_, n=name: calls.__setitem__(n, calls.get(n, 0) + 1)
            )
    for name, parameter in model.named_parameters():
        parameter.register_hook(
            lambda _, n=name: gradients_of.__setitem__(n, gradients_of.get(n, 0) + 1)
        )
    # The first region gets no gradient from an image; an input with one asks for all regions.
    gradients(model, torch.randn(4, 3, 12, 12, requires_grad=True))
    assert calls == dict.fromkeys(calls, 2)  # forward, and once more in the backward
    assert len(calls) == 5 + 2 * sum(name.startswith("experts.1") for name in calls)
    # Twice would be an error under DistributedDataParallel.
    assert gradients_of == dict.fromkeys(gradients_of, 1)
    assert gradients_of.keys() == dict(model.named_parameters()).keys()


class Positions(nn.Module):
    """A parameter of no submodule before checkpoints, as position embeddings are."""

    def __init__(self, checkpoints: bool, scales: bool = False) -> None:
        super().__init__()
        self.p, self.scales, self.checkpoints = nn.Parameter(torch.ones(8)), scales, checkpoints
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.p
        run = self.checkpoints and x.requires_grad  # torch warns otherwise
        for layer in (self.a, self.b):
            x = checkpoint(layer, x, use_reentrant=True) if run else layer(x)
        return self.c(x * self.p if self.scales else x)


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("fork_at", ["b", "c"])
def test_a_parameter_before_reentrant_checkpoints_stays_in_the_trunk(
    fork_at: str, scales: bool
) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    model, plain = (
        RIDEWrapper(Positions(checkpoints, scales), 2, fork_at=fork_at, example_input=x)
        for checkpoints in (True, False)
    )
    assert model.trunk.p is not None
    plain.load_state_dict(model.state_dict())
    got, expected = (
        {name: g for name, g in gradients(m, x).items() if g is not None} for m in (model, plain)
    )
    assert got.keys() == expected.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient)


@pytest.mark.parametrize("when", ["before", "after"])
def test_one_region_across_the_fork_is_refused(when: str) -> None:
    backbone = Checkpointing()
    set_how(backbone, "all" if when == "before" else "")
    model = RIDEWrapper(backbone, 2, fork_at="layer3")
    set_how(model, "all")
    with pytest.raises(ReplayError, match=r"`fork_at=` a submodule.*checkpoint_experts=True"):
        gradients(model, torch.randn(4, 3, 12, 12))


def test_one_reentrant_region_across_the_fork_is_warned_of() -> None:
    backbone = Checkpointing()
    backbone.use_reentrant = True
    model = RIDEWrapper(backbone, 2, fork_at="layer3")
    set_how(model, "all")
    with pytest.warns(UserWarning, match=r"again for each expert.*`fork_at=` a submodule"):
        gradients(model, torch.randn(4, 3, 12, 12, requires_grad=True))


def test_torchs_checkpoint_is_left_as_it_was() -> None:
    backbone = Checkpointing()
    backbone.use_reentrant = True
    set_how(backbone, "blocks")
    model = RIDEWrapper(backbone, 2, fork_at="layer3")
    gradients(model, torch.randn(4, 3, 12, 12, requires_grad=True))
    assert "apply" not in vars(CheckpointFunction)


def test_another_thread_checkpoints_while_an_expert_passes_by() -> None:
    """The pass of one thread is none of another's."""
    calls: list[str] = []

    def function(x: Tensor) -> Tensor:
        calls.append(threading.current_thread().name)
        return x.exp()

    def train() -> None:
        x = torch.ones(2, requires_grad=True)
        checkpoint(function, x, use_reentrant=True).sum().backward()

    with passed_by(lambda: True):
        other = threading.Thread(target=train, name="other")
        other.start()
        other.join()
        train()
    assert calls.count("other") == 2  # it computed again in its backward
    assert len(calls) == 3


def test_only_what_crosses_the_fork_is_kept_of_a_reentrant_trunk() -> None:
    def live(how: str) -> list[tuple[bool, ...]]:
        backbone = Checkpointing()
        backbone.use_reentrant = True
        set_how(backbone, how)
        model = RIDEWrapper(backbone, 2, fork_at="layer3")
        layout = model.run_trunk(torch.randn(4, 3, 12, 12, requires_grad=True)).layout
        assert layout is not None
        return list(layout.live)

    assert live("stages") == live("") == [(False,), (False,), (True,)]
