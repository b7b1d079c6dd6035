"""Borrowed states under threads: many evaluate one model that is in training mode."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from benchmarks.zoo.images import conv_bn
from ride_plugin import (
    ExpertRouter,
    RIDEError,
    RIDEWrapper,
    RoutingInference,
    _contexts,
    expert_logits,
)
from ride_plugin._contexts import evaluating


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
