"""Borrowed states: modes under threads, where many evaluate one model, and random states."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.zoo.images import conv_bn
from ride_plugin import (
    ExpertRouter,
    RIDEError,
    RIDEWrapper,
    RoutingInference,
    _contexts,
    cost_report,
    count_flops,
    expert_logits,
    plan,
)
from ride_plugin._compiler import EXPORTS
from ride_plugin._contexts import evaluating, random_state, random_state_kept, seed_everything
from ride_plugin.routing import fuse_stages


def small_model(num_experts: int = 3) -> RIDEWrapper:
    backbone = nn.Sequential(
        conv_bn(3, 8), conv_bn(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )
    return RIDEWrapper(backbone, num_experts, example_input=torch.randn(2, 3, 8, 8))


def statistics(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def test_eight_threads_evaluate_a_model_in_training_mode() -> None:
    model = small_model()
    router = ExpertRouter.for_model(model)
    serve = RoutingInference(model, router)
    batches = [torch.randn(4, 3, 8, 8) for _ in range(8)]
    model.eval()
    expected = [(serve(x), model.router_inputs(x).expert_logits) for x in batches]
    model.train()
    before = statistics(model)

    def work(index: int) -> bool:
        routed, logits = expected[index]
        return all(
            torch.equal(serve(batches[index]), routed)
            and torch.equal(model.router_inputs(batches[index]).expert_logits, logits)
            for _ in range(10)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert all(module.training for module in model.modules())
    assert all(map(torch.equal, before, statistics(model)))


def test_evaluation_beside_training_leaves_the_training_as_it_is() -> None:
    x = torch.randn(8, 3, 8, 8)

    def trained(beside: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = small_model(2)
        stop = threading.Event()

        def evaluate() -> None:
            while not stop.is_set():
                model.router_inputs(x)

        threads = [threading.Thread(target=evaluate) for _ in range(2 * beside)]
        for thread in threads:
            thread.start()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(10):
            optimizer.zero_grad()
            expert_logits(model(x)).square().sum().backward()
            optimizer.step()
        stop.set()
        for thread in threads:
            thread.join()
        return [*model.parameters(), *model.buffers()]

    assert all(map(torch.equal, trained(False), trained(True)))


def test_the_last_to_leave_restores_each_module() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    model[0].eval()
    outer, inner = evaluating(model), evaluating(model[1])
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert [m.training for m in (model, model[0], model[1], model[1][1])] == [1, 0, 0, 0]
    inner.__exit__(None, None, None)
    assert [m.training for m in (model, model[0], model[1], model[1][1])] == [1, 0, 1, 1]


class Cached(nn.Linear):
    """Computes its weight once for evaluation, as attention with a table of biases does."""

    scaled: Tensor

    def train(self, mode: bool = True) -> Cached:
        super().train(mode)
        if not mode:
            self.scaled = 2 * self.weight.detach()
        elif "scaled" in vars(self):
            del self.scaled  # read in training by mistake it would be an error
        return self

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 2 * self.weight if self.training else self.scaled)


class HoldsCached(nn.Sequential):
    def train(self, mode: bool = True) -> HoldsCached:
        return super().train(mode)


def test_parts_with_a_train_of_their_own_are_asked_to_change() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 8), HoldsCached(Cached(8, 8), nn.ReLU()), nn.Linear(8, 5))
    model, x = RIDEWrapper(backbone, 2, fork_at="1"), torch.randn(4, 6)
    model.experts[0].get_submodule("1")[1].eval()  # stays in evaluation, whoever asks
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        logits = model.router_inputs(x).expert_logits
        copies = [expert.eval() for expert in model.to_modules()]
        torch.testing.assert_close(logits, torch.stack([copy(x) for copy in copies], 1))
        off = [name for name, module in model.named_modules() if not module.training]
        assert off == ["experts.0.1.1"]
        assert not any("scaled" in vars(module) for module in model.modules())


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["a block that waits for training", "training that waits"])
def test_threads_that_wait_for_each_other_are_told(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_contexts, "_PATIENCE", 0.3)
    model, x = small_model(2).train(), torch.randn(4, 3, 8, 8)
    before = statistics(model)
    with ThreadPoolExecutor(1) as worker:
        if kind == "a block that waits for training":
            with model.evaluating(), pytest.raises(RIDEError, match="has it in evaluation mode"):
                worker.submit(model, x).result()
        else:
            handle = model.trunk.register_forward_pre_hook(
                lambda *_: worker.submit(model.router_inputs, x).result()
            )
            with pytest.raises(RIDEError, match="computes a training pass of it"):
                model(x)
            handle.remove()
        assert all(map(torch.equal, before, statistics(model)))
        worker.submit(model, x).result()  # both go on as if nothing had been
    model.router_inputs(x)
    assert model.training
    assert not all(map(torch.equal, before, statistics(model)))


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of devices that somebody has seeded, whether they have started or not."""
    kinds: list[str] = []
    for kind, name in (("cuda", "manual_seed_all"), ("mps", "manual_seed"), ("xpu", "manual_seed")):
        module = getattr(torch, kind)
        for each in {name, "manual_seed"}:
            monkeypatch.setattr(module, each, lambda seed, kind=kind: kinds.append(kind))
    torch.manual_seed(3)
    assert "cuda" in kinds
    kinds.clear()
    return kinds


def test_a_seed_that_waits_for_an_accelerator_goes_on_waiting(seeded: list[str]) -> None:
    """`torch.manual_seed(s)` leaves one where CUDA has not started, for `model.cuda()` later."""
    backbone = nn.Sequential(
        conv_bn(3, 8), nn.Dropout(), conv_bn(8, 16, 2), nn.Dropout(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    for options in ({}, {"expert_width": 0.5}, {"init": "copy"}, {"num_classes": 7}):
        model = RIDEWrapper(backbone, 2, example_input=x, **options)
    plan(backbone, num_experts=(2,), expert_widths=(0.5,), example_input=x)
    cost_report(model)
    count_flops(model, x)
    model.eval()(torch.randn(3, 3, 16, 16))  # a path that the build has not seen
    model.optimize_for_inference()
    model.to_module(1)
    if EXPORTS:
        serve = RoutingInference(model, ExpertRouter.for_model(model))
        fuse_stages(serve.export_stages())
        torch.export.export(model, (x,))
    assert seeded == []


@pytest.mark.parametrize("holds", [nn.Parameter, nn.Buffer])
def test_what_is_seeded_is_restored_on_the_devices_of_a_module(
    holds: type[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = {kind: tuple(torch.Generator() for _ in range(2)) for kind in ("cuda", "xpu")}
    for kind, generators in started.items():
        monkeypatch.setattr(getattr(torch, kind), "default_generators", generators)
    mps = torch.Generator()
    monkeypatch.setattr(torch.mps, "_get_default_mps_generator", lambda: mps)
    module = nn.Module()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for index, device in enumerate(("cuda:1", "xpu:0", "mps", "cpu", "meta")):
            setattr(module, f"t{index}", holds(torch.empty(2, device=device)))
    kept = [torch.default_generator, started["cuda"][1], started["xpu"][0], mps]
    others = [started["cuda"][0], started["xpu"][1]]

    def draw() -> list[object]:
        drawn = [torch.rand((), generator=g).item() for g in (*kept, *others)]
        return [*drawn, random.random(), np.random.random()]  # noqa: NPY002

    back = random_state(module)
    first = draw()
    back()
    before = [generator.get_state() for generator in (*kept, *others)]
    with random_state_kept(module), random_state_kept(nn.Linear(2, 2)):
        seed_everything()
        assert [generator.initial_seed() for generator in kept] == [0] * 4
        assert all(map(torch.equal, before[4:], (generator.get_state() for generator in others)))
        again = draw()
        seed_everything()
        assert draw()[:4] == again[:4]
        assert all(generator.initial_seed() != 0 for generator in others)
    after = draw()
    assert after[:4] == first[:4]
    assert after[6:] == first[6:]


def test_devices_that_have_not_started_have_no_state() -> None:
    with FakeTensorMode():
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(2, device="cuda:0"))
    if torch.cuda.is_initialized():
        pytest.skip("CUDA has started")
    with random_state_kept(module):
        seed_everything()
    random_state(module)()


def test_a_first_build_in_which_torch_imports_numpys_generator_is_as_any_other() -> None:
    script = """
import sys
import torch
from torch import nn
from ride_plugin import RIDEWrapper

class Leaky(nn.Module):
    def forward(self, x):  # for which torch imports numpy.random on tensors without contents
        return 0.5 * x

assert "numpy.random" not in sys.modules
net = nn.Sequential(nn.Linear(6, 8), Leaky(), nn.Linear(8, 8), Leaky(), nn.Linear(8, 5))
model = RIDEWrapper(net, 2, fork_at="2", example_input=torch.randn(2, 6))
import numpy
print(model._draws, numpy.random.rand() == numpy.random.RandomState(0).rand())
"""
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    # Nothing was drawn, and the seed of the build is not left behind.
    assert run.stdout.split() == ["False", "False"]
