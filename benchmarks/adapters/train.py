"""One run: the trunk's results from the disk, train the experts, measure, write one JSON."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.adapters.data import Data, Group
from benchmarks.adapters.early_exit import measure_exits
from benchmarks.adapters.methods import Method
from ride_plugin import (
    DiversityLoss,
    RIDELoss,
    RIDEWrapper,
    cost_report,
    expert_logits,
    experts_loss,
)
from ride_plugin.longtail import LogitAdjustedLoss, shot_report
from ride_plugin.routing import TrunkState

SHOTS = ("overall", "many", "medium", "few")


@dataclass(frozen=True)
class Task:
    """What is learned, and by what.

    Attributes:
        methods: by name, in the order of the report.
        build: makes the model of a method for a number of classes.
        many: a class with more training samples than this is many-shot.
        few: a class with fewer is few-shot.
    """

    methods: Mapping[str, Method]
    build: Callable[[Method, int], RIDEWrapper]
    many: int
    few: int


@dataclass(frozen=True)
class Recipe:
    """AdamW with a cosine decay to zero; the same for every method."""

    lr: float = 2e-3
    weight_decay: float = 0.01
    batch_size: int = 64
    diversity_weight: float = 0.2


@dataclass(frozen=True)
class Stored:
    """What the trunk made of each group, and the labels: ``(state, labels)``."""

    train: list[tuple[Any, Tensor]] = field(repr=False)
    held_out: list[tuple[Any, Tensor]] = field(repr=False)
    test: list[tuple[Any, Tensor]] = field(repr=False)


def store(model: RIDEWrapper, data: Data, file: Path) -> Stored:
    """The trunk's results for all samples, computed once and kept in ``file``."""
    if not file.exists():
        parts = {
            name: _states(model, getattr(data, name)) for name in ("train", "held_out", "test")
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(parts, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    return Stored(**torch.load(file, weights_only=True))


def _states(model: RIDEWrapper, groups: list[Group]) -> list[tuple[Any, Tensor]]:
    def state(inputs: dict[str, Tensor]) -> TrunkState:
        # Parts of one size, since a few last sentences of one length would need no mask, and a
        # transformer takes another path then.
        number = -(-len(next(iter(inputs.values()))) // 32)
        parts = zip(*(tensor.tensor_split(number) for tensor in inputs.values()), strict=True)
        return TrunkState.cat(
            [model.run_trunk(**dict(zip(inputs, part, strict=True))).detach() for part in parts]
        )

    with model.evaluating(), torch.no_grad():
        return [(state(group.inputs), group.labels) for group in groups]


def run(
    task: Task,
    name: str,
    seed: int,
    imbalance: float,
    data: Data,
    recipe: Recipe,
    out: Path,
    cache: Path,
) -> None:
    """Train and measure one method with one seed, unless its result is there."""
    file = out / f"{name}-imbalance{imbalance:g}-seed{seed}.json"
    if file.exists():
        return
    method = task.methods[name]
    torch.manual_seed(seed)
    model = task.build(method, len(data.class_counts))
    stored = store(model, data, cache / f"{model.fork_at}-imbalance{imbalance:g}.pt")
    steps, seconds = train(model, stored.train, data.class_counts, method, seed, recipe)
    logits, labels = predict(model, stored.test)
    inputs = data.test[min(1, len(data.test) - 1)].inputs
    cost = cost_report(model, example_input={key: value[:1] for key, value in inputs.items()})

    def accuracy(logits: Tensor) -> dict[str, float]:
        report = shot_report(logits, labels, data.class_counts, many=task.many, few=task.few)
        return {shot: float(getattr(report, shot)) for shot in SHOTS}

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result: dict[str, Any] = {
        "method": name,
        "seed": seed,
        "imbalance": imbalance,
        "recipe": {**asdict(recipe), "epochs": method.epochs},
        "torch": torch.__version__,
        "device": platform.processor() or platform.machine(),
        "trainable_parameters": trainable,
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": {"trunk": cost.trunk_flops, "experts": list(cost.expert_flops)},
        "cpu_seconds": seconds,
        "cpu_seconds_per_step": seconds / steps,
        "accuracy": accuracy(logits.mean(1)),
        "experts": [accuracy(expert) for expert in logits.unbind(1)],
    }
    if method.num_experts > 1:
        result["disagreement"] = disagreement(logits)
    if method.num_experts > 1 and stored.held_out:  # thresholds are chosen on these
        result["exits"] = measure_exits(model, stored, data.class_counts, cost, seed)
    out.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(file)
    print(file.name, {k: round(100 * v, 2) for k, v in result["accuracy"].items()}, flush=True)


def train(
    model: RIDEWrapper,
    stored: list[tuple[Any, Tensor]],
    class_counts: list[int],
    method: Method,
    seed: int,
    recipe: Recipe,
) -> tuple[int, float]:
    """The ordinary loop, on stored results of the trunk; returns steps and processor seconds."""
    criteria = [LogitAdjustedLoss(class_counts, tau=t) for t in method.adjustments]
    diversity = DiversityLoss(
        class_counts,
        weight=recipe.diversity_weight if method.diversity else 0.0,
        form=method.diversity or "official",
    )
    ride = RIDELoss(criteria, diversity)  # compares what the criteria see
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, recipe.lr, weight_decay=recipe.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    total = method.epochs * len(_batches(stored, recipe.batch_size, generator))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    torch.manual_seed(seed)
    started = time.process_time()
    model.train()
    for _ in range(method.epochs):
        for group, rows in _batches(stored, recipe.batch_size, generator):
            state, labels = stored[group]
            out, target = model(state.select(rows)), labels[rows]
            if method.diversity and not method.compares_raw:
                loss = ride(out, target)
            else:
                loss = experts_loss(criteria, out, target)
                if method.diversity:
                    loss = loss + diversity(out, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        diversity.step()
    return total, time.process_time() - started


def _batches(
    stored: list[tuple[Any, Tensor]], size: int, generator: torch.Generator
) -> list[tuple[int, Tensor]]:
    """Batches of samples of one group, in random order: ``(group, rows)``."""
    found = [
        (index, rows)
        for index, (_, labels) in enumerate(stored)
        for rows in torch.randperm(len(labels), generator=generator).split(size)
    ]
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


def predict(model: RIDEWrapper, stored: list[tuple[Any, Tensor]]) -> tuple[Tensor, Tensor]:
    """Every expert's logits ``[N, E, C]`` and the labels."""
    logits = []
    with model.evaluating(), torch.no_grad():
        for state, labels in stored:
            for rows in torch.arange(len(labels)).split(256):
                logits.append(expert_logits(model(state.select(rows))))
    return torch.cat(logits), torch.cat([labels for _, labels in stored])


def disagreement(logits: Tensor) -> float:
    """Share of pairs of experts that choose different classes."""
    choices, pairs = logits.argmax(2), logits.shape[1] * (logits.shape[1] - 1)
    return float((choices[:, :, None] != choices[:, None]).sum((1, 2)).float().mean() / pairs)
