"""What goes wrong around the library: killed runs, interruptions, threads, fork and spawn."""

from __future__ import annotations

import copy
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin import (
    ConfidenceRouter,
    DiversityLoss,
    RIDEWrapper,
    RoutingInference,
    expert_logits,
    experts_loss,
)

EPOCHS, STEPS = 3, 4


class Backbone(nn.Module):
    """Random numbers, running statistics, and a place before and after the fork to interrupt."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.2))
        self.late = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.early(x)).mean((2, 3)))


def wrapped(num_experts: int = 3) -> RIDEWrapper:
    torch.manual_seed(0)
    example = torch.randn(2, 3, 8, 8)
    return RIDEWrapper(Backbone(), num_experts, fork_at="late", example_input=example)


def train(path: Path, kill_at: int | None = None, in_save: bool = False) -> dict[str, Any]:
    """The loop of docs/how-to/killed-runs.md: saves after every step, goes on where it stood."""
    model, diversity = wrapped(), DiversityLoss([30, 9, 4, 2], start_epoch=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    images = torch.randn(STEPS * 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(len(images)) % 4
    parts = {"model": model, "loss": diversity, "optimizer": optimizer, "scheduler": scheduler}
    done = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        done = state["done"]
    for epoch in range(done // STEPS, EPOCHS):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for step in range(done % STEPS, STEPS):
            if done == kill_at and not in_save:
                os.kill(os.getpid(), signal.SIGKILL)
            rows = order[4 * step : 4 * step + 4]
            out = model(images[rows])
            loss = experts_loss(F.cross_entropy, out, labels[rows]) + diversity(out, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            if done % STEPS == 0:
                scheduler.step()
                diversity.step()
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(state | {"random": torch.get_rng_state(), "done": done}, f"{path}.new")
            if done == kill_at and in_save:
                os.kill(os.getpid(), signal.SIGKILL)
            os.replace(f"{path}.new", path)
    return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}


def require_same(got: Any, expected: Any, where: str) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(got, expected), where
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key in expected:
            require_same(got[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        for k, pair in enumerate(zip(got, expected, strict=True)):
            require_same(*pair, f"{where}.{k}")
    else:
        assert got == expected, where


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_killed_again_and_again_ends_bit_for_bit_as_if_it_had_not_been(
    tmp_path: Path, seed: int
) -> None:
    expected = train(tmp_path / "whole.pth")
    generator = random.Random(seed)
    kills = sorted(generator.sample(range(1, EPOCHS * STEPS), 4))
    for kill_at in kills:
        child = multiprocessing.get_context("fork").Process(
            target=train, args=(tmp_path / "killed.pth", kill_at, generator.random() < 0.5)
        )
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
    got = train(tmp_path / "killed.pth")
    require_same(got, expected, "state")


class Interrupting(nn.Module):
    """Interrupts the call that it is told to, as a user or a scheduler would."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if ARMED:
            raise ARMED.pop()
        return self.layer(x)


ARMED: list[BaseException] = []
CALLS: dict[str, Callable[[RIDEWrapper, Tensor], Any]] = {
    "forward": lambda model, x: model(x),
    "router_inputs": lambda model, x: model.router_inputs(x),
    "routed": lambda model, x: RoutingInference(model, ConfidenceRouter(), 0.9)(x),
    "dense": lambda model, x: RoutingInference(model, ConfidenceRouter(), 0.9).dense(x),
    "run_expert": lambda model, x: model.run_expert(1, model.run_trunk(x)),
}


@pytest.mark.parametrize("place", ["early", "late"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interruption_inside_trunk_or_expert_leaves_the_model_as_it_was(
    place: str, call: str, kind: type[BaseException]
) -> None:
    backbone = Backbone()
    setattr(backbone, place, Interrupting(getattr(backbone, place)))
    model = RIDEWrapper(backbone, 3, fork_at="late", example_input=torch.randn(2, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    for training in (False, True):
        model.train(training)
        modes = [module.training for module in model.modules()]
        kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        torch.manual_seed(3)
        expected = expert_logits(copy.deepcopy(model)(x))
        ARMED.append(kind("interrupted"))
        with pytest.raises(kind, match="interrupted"):
            CALLS[call](model, x)
        assert [module.training for module in model.modules()] == modes
        model.load_state_dict(kept)  # running statistics of a trunk that had finished
        torch.manual_seed(3)
        assert torch.equal(expert_logits(model(x)), expected)


@pytest.mark.parametrize("training", [False, True])
def test_eight_threads_get_what_each_would_get_alone(training: bool) -> None:
    model = wrapped().eval()
    serve = RoutingInference(model, ConfidenceRouter(), 0.35)
    batches = [torch.randn(5, 3, 8, 8) for _ in range(8)]
    expected = [(serve(x), model.router_inputs(x).expert_logits) for x in batches]
    model.train(training)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong: list[str] = []

    def work(index: int) -> None:
        try:
            for _ in range(6):
                routed = serve(batches[index])
                inputs = model.router_inputs(batches[index])
                torch.testing.assert_close(routed, expected[index][0])
                torch.testing.assert_close(inputs.expert_logits, expected[index][1])
        except Exception as error:
            wrong.append(f"{index}: {error}")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert all(module.training == training for module in model.modules())
    require_same(model.state_dict(), kept, "state")


def answer(model: RIDEWrapper, x: Tensor, results: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        results.put(expert_logits(model(x)).numpy())


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_other_processes_compute_the_same(method: str) -> None:
    model, x = wrapped().eval(), torch.randn(3, 3, 8, 8)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=answer, args=(model, x, results))
    child.start()
    got = torch.from_numpy(results.get(timeout=120))
    child.join(60)
    assert torch.equal(got, expert_logits(model(x)))
